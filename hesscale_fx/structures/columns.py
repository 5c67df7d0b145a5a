"""Jacobians without a structure that is worth more: column by column, or estimated by random signs.

An operator that acts on the trailing *core* dimensions and repeats itself along those before them
(a Cholesky factor of each matrix of a batch) has a block of J for each batch entry, and one column
of every block costs one backward pass. A complex tensor counts as pairs of real numbers: gradient
and curvature of one are complex, with the real part for the real part and the imaginary part for
the imaginary part, which for the gradient is autograd's own convention.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, add, or_none, vjp, widen

# Columns of one block that are computed without being asked to, and at most.
SMALL, LARGE = 2048, 16384
# Numbers that one batched backward pass may give; more columns go one chunk after the other.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Columns:
    """Exact, by one backward pass for each output entry of a block.

    Args:
        core: how many trailing dimensions of a differentiated operand one block takes; None: all.
            With zero the operator is pointwise and operands may be broadcast.
        linear: whether it is linear in its differentiated operands jointly, so that there is no
            second derivative to look for.
        limit: most columns of one block.
        implementation: the same in plain torch, where autograd cannot differentiate it twice.
        accepts: whether this holds for a call with such arguments.
        name: what reports call it.
        blocks: where they are known one by one, how many leading dimensions of each differentiated
            operand number the blocks; then `core` says nothing.
    """

    core: int | None = None
    linear: bool = False
    limit: int = SMALL
    implementation: Callable | None = None
    accepts: Callable[[tuple, dict], bool] | None = None
    name: str = "columns"
    blocks: tuple[int, ...] | None = None

    def at(self, call: Call) -> ColumnsAt:
        if self.implementation is not None:
            call = Call(self.implementation, call.leaves, call.spec, call.active)
        return ColumnsAt(call, self)

    def count(self, operands: list[Tensor], outputs: list[Tensor]) -> int:
        """Columns of the largest block, for either question."""
        counts = [1]
        for i, x in enumerate(operands):
            for y in outputs:
                rank = self.rank(i, x, y)
                counts += [entries(y, rank), 0 if self.linear else entries(x, rank)]
        return max(counts)

    def numbers(self, operands: list[Tensor], outputs: list[Tensor]) -> int:
        """Numbers that all columns have together."""
        total = 0
        for i, x in enumerate(operands):
            ranks = [self.rank(i, x, y) for y in outputs]
            columns = [entries(y, rank) for y, rank in zip(outputs, ranks, strict=True)]
            columns += [] if self.linear else [entries(x, min(ranks))]
            total += sum(columns) * max(entries(v, 0) for v in (x, *outputs))
        return total

    def rank(self, i: int, x: Tensor, y: Tensor) -> int:
        """How many leading dimensions number the blocks of both the i-th operand and an output."""
        if self.blocks is not None:
            return self.blocks[i]
        rank = 0 if self.core is None else max(x.dim() - self.core, 0)
        same = rank <= y.dim() and all(
            str(a) == str(b) for a, b in zip(x.shape[:rank], y.shape[:rank], strict=False)
        )
        return rank if same else 0


@dataclass(frozen=True)
class Estimate:
    """Unbiased for both terms at any size, by one vector of random signs each.

    For signs z the product of ``J^T z`` and ``J^T (z s)`` has the expectation ``(J o J)^T s``, and
    that of v and ``H v`` the diagonal of H (Hutchinson 1989; Bekas et al. 2007). The signs are
    drawn in the graph, anew in each call, from the default generator.
    """

    name: str = "estimate"
    linear: bool = False

    def at(self, call: Call) -> EstimateAt:
        return EstimateAt(call)


def entries(x: Tensor, batch: int) -> int:
    """Real numbers in one block of x."""
    size = math.prod(hint(s) for s in x.shape[batch:])
    return 2 * size if x.is_complex() else size


def hint(size: Any) -> int:
    """A symbolic size as it was when traced; reading it must not fix it."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def pairs(x: Tensor, by: Callable[[Tensor, Tensor], Tensor], other: Tensor) -> Tensor:
    """`by` of the real and of the imaginary parts; other is real where x is."""
    if not x.is_complex():
        return by(x, other)
    return torch.complex(by(x.real, other.real), by(x.imag, other.imag))


def product(a: Tensor, b: Tensor) -> Tensor:
    return pairs(a, torch.mul, b)


@dataclass
class ColumnsAt:
    call: Call
    rule: Columns

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        inputs, outputs = self._record()
        results: list[Tensor | None] = [None] * len(inputs)
        for y, weight in zip(outputs, s, strict=False):
            if weight is None or not y.requires_grad:
                continue
            for i, x in enumerate(inputs):
                results[i] = add(results[i], self._squared(i, x, y, weight.to(y.dtype)))
        return self._finish(results)

    def _squared(self, i: int, x: Tensor, y: Tensor, weight: Tensor) -> Tensor | None:
        batch = self.rule.rank(i, x, y)
        total: Tensor | None = None
        for basis, part in self._basis(y, batch, x):
            columns = batched_grad(y, x, basis)
            if columns is None:
                return None
            # Each column has its weight, one for each block.
            core = list(range(batch + 1, basis.dim()))
            mine = part(basis) * part(weight)
            mine = mine.sum(core) if core else mine
            mine = mine.reshape([*mine.shape, *[1] * (x.dim() - batch)])
            total = add(total, (product(columns, columns) * mine).sum(0))
        return total

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        if self.rule.linear:
            return [None] * len(self.call.active)
        inputs, outputs = self._record()
        used = [
            (y, u.to(y.dtype))
            for y, u in zip(outputs, g, strict=False)
            if u is not None and y.requires_grad
        ]
        if not used:
            return [None] * len(self.call.active)
        ys, us = zip(*used, strict=True)
        with torch.enable_grad():
            slopes = torch.autograd.grad(ys, inputs, us, create_graph=True, allow_unused=True)
        ranks = [min(self.rule.rank(i, x, y) for y in ys) for i, x in enumerate(inputs)]
        return self._finish(list(map(self._diagonal, slopes, inputs, ranks)))

    def _diagonal(self, q: Tensor | None, x: Tensor, batch: int) -> Tensor | None:
        """Of the Jacobian of the gradient q."""
        if q is None or not q.requires_grad or or_none(q) is None:
            return None
        total: Tensor | None = None
        for basis, part in self._basis(x, batch, x):
            rows = batched_grad(q, x, basis)
            if rows is None:
                return None
            value = (part(rows) * part(basis)).sum(0)
            if x.is_complex():
                zero = torch.zeros_like(value)
                real = part is real_part
                value = torch.complex(value if real else zero, zero if real else value)
            total = add(total, value)
        return total

    def _record(self) -> tuple[list[Tensor], list[Tensor]]:
        """Operands and outputs with autograd's record between them."""
        leaves = [widen(v) for v in self.call.leaves]
        shared: dict[int, Tensor] = {}  # an operand that stands twice is differentiated as one
        for i in self.call.active:
            key = id(self.call.leaves[i])
            if key not in shared:
                x = leaves[i].detach()
                if self.rule.core == 0:  # pointwise: what is broadcast is summed at the end
                    tensors = [v.shape for v in leaves if isinstance(v, Tensor)]
                    x = x.expand(torch.broadcast_shapes(*tensors))
                shared[key] = x.requires_grad_()
            leaves[i] = shared[key]
        with torch.enable_grad():
            outputs = self.call.run(leaves)
        return list(shared.values()), outputs

    def _finish(self, results: list[Tensor | None]) -> list[Tensor | None]:
        """One result for each operand, None for the second of one that stands twice."""
        found = iter(results)
        seen: set[int] = set()
        final: list[Tensor | None] = []
        for x in self.call.operands():
            value = None if id(x) in seen else next(found)
            seen.add(id(x))
            final.append(
                value if value is None or self.rule.core != 0 else value.sum_to_size(x.shape)
            )
        return final

    def _basis(
        self, y: Tensor, batch: int, x: Tensor
    ) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """Unit vectors of a block of y, the same for every block: (columns, *y.shape).

        Chunk by chunk, first along the real parts, then along the imaginary ones.
        """
        core = list(y.shape[batch:])
        size: Any = math.prod(core)
        real = y.real.dtype if y.is_complex() else y.dtype
        unit = torch.eye(size, dtype=real, device=y.device)
        count = hint(size)
        numbers = max(math.prod(map(hint, x.shape)), math.prod(map(hint, y.shape)), 1)
        step = max(CHUNK // numbers, 1)
        for start in range(0, max(count, 1), step):
            rows = unit if step >= count else unit[start : start + step]
            rows = rows.reshape([rows.shape[0], *[1] * batch, *core])
            rows = rows.expand([rows.shape[0], *y.shape])
            if not y.is_complex():
                yield rows, real_part
                continue
            zero = torch.zeros_like(rows)
            yield torch.complex(rows, zero), real_part
            yield torch.complex(zero, rows), imaginary_part


def real_part(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def imaginary_part(x: Tensor) -> Tensor:
    return x.imag


def batched_grad(y: Tensor, x: Tensor, vectors: Tensor) -> Tensor | None:
    """``J^T v`` for each of the vectors, which are stacked along the first dimension."""

    def grad(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(y, x, v, retain_graph=True, materialize_grads=True)
        return found

    (reached,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True, allow_unused=True)
    with warnings.catch_warnings():  # of operators that have no batched form
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return None if reached is None else torch.func.vmap(grad)(vectors)


@dataclass
class EstimateAt:
    call: Call

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        drawn = [None if v is None else signs(v) for v in s]
        weighted = [
            None if z is None or v is None else product(z, v) for z, v in zip(drawn, s, strict=True)
        ]
        plain, scaled = self.call.vjp(drawn, widen), self.call.vjp(weighted, widen)
        return [
            None if a is None or b is None else product(a, b)
            for a, b in zip(plain, scaled, strict=True)
        ]

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        leaves = [widen(v) for v in self.call.leaves]
        for i in self.call.active:
            leaves[i] = leaves[i].detach().requires_grad_()
        inputs = [leaves[i] for i in self.call.active]
        with torch.enable_grad():
            outputs = self.call.run(leaves)
            used = [
                (y, u.to(y.dtype))
                for y, u in zip(outputs, g, strict=False)
                if u is not None and y.requires_grad
            ]
            if not used:
                return [None] * len(inputs)
            ys, us = zip(*used, strict=True)
            slopes = torch.autograd.grad(ys, inputs, us, create_graph=True, allow_unused=True)
        results: list[Tensor | None] = []
        for q, x in zip(slopes, inputs, strict=True):  # each alone: no cross terms to average out
            z = signs(x)
            (row,) = [None] if q is None or not q.requires_grad else vjp([q], [x], [z])
            results.append(None if row is None else product(z, row))
        return results


def signs(x: Tensor) -> Tensor:
    """Independent Rademacher signs, for the real and the imaginary part."""
    real = x.real if x.is_complex() else x

    def draw() -> Tensor:
        bits = torch.randint(0, 2, real.shape, dtype=real.dtype, device=real.device)
        return 2 * bits - 1

    return torch.complex(draw(), draw()) if x.is_complex() else draw()
