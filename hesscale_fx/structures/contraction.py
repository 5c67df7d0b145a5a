"""Operators that are linear in each operand alone, every coefficient 0 or 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, wide, widen
from hesscale_fx.structures.persample import call_norms, call_per_sample, call_totals

# While a graph is emitted, the dtype in which curvature is contracted, if not that it is held in.
low_precision: ContextVar[torch.dtype | None] = ContextVar("low_precision", default=None)


@contextmanager
def contracting_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Contract curvature in `dtype` where it is held in a wider one."""
    token = low_precision.set(dtype)
    try:
        yield
    finally:
        low_precision.reset(token)


def squared(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        value = widen(value)
        return value * value
    return value


@dataclass(frozen=True)
class Contraction:
    """Each entry of J is one element (or product) of the other operands.

    So ``(J o J)^T s`` is the vjp with the other operands squared: a matrix product passes
    ``s @ (W * W)`` up and gives its weight ``s^T @ (x * x)`` (Becker & LeCun 1989, eq. 9;
    Elsayed & Mahmood 2022, eqs. 6 and 7). Second derivatives in one operand are zero.
    """

    # Whether linear in each operand as a whole; a product of the entries of one operand is not.
    in_each: bool = True
    # Where the third operand is a bias, the dimension of the output that is its own.
    bias_dim: int | None = None
    name: str = "contraction"
    linear: bool = False

    def at(self, call: Call) -> ContractionAt:
        dtype = low_precision.get() if self.in_each else None
        if dtype is not None:
            return LowPrecisionAt(call, dtype, self.bias_dim)
        return ContractionAt(call)


@dataclass
class ContractionAt:
    call: Call

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self.call.vjp(s, squared)

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return [None] * len(self.call.active)

    def per_sample(self, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
        return call_per_sample(self.call, u, dim, inner)

    def norms_per_sample(self, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
        return call_norms(self.call, u, dim, inner)

    def totals(self, s: Tensors) -> list[Tensor | None]:
        return call_totals(self.call, s)


@dataclass
class LowPrecisionAt(ContractionAt):
    """Curvature is rounded to `dtype` before it is contracted, and widened at once.

    The kernels add up in float32. A bias is no contraction: its sum is not rounded.
    """

    dtype: torch.dtype
    bias_dim: int | None

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        call = self.call
        held = [wide(v.dtype) for v in call.operands()]
        if s[0] is None or all(d.itemsize <= self.dtype.itemsize for d in held):
            return super().squared_vjp(s)
        bias = 2 if self.bias_dim is not None and 2 in call.active else None
        leaves = [None if i == bias else v for i, v in enumerate(call.leaves)]
        active = [i for i in call.active if i != bias]
        rounded = Call(call.op, leaves, call.spec, active).vjp(s, self._rounded)
        found = dict(zip(active, rounded, strict=True))
        if bias is not None:
            found[bias] = self._of_bias(s[0])
        pairs = zip(call.active, held, strict=True)
        return [None if (v := found[i]) is None else v.to(dtype) for i, dtype in pairs]

    def _rounded(self, value: Any) -> Any:
        value = squared(value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value

    def _of_bias(self, s: Tensor) -> Tensor:
        assert self.bias_dim is not None
        own = self.bias_dim % s.dim()
        return s.sum([d for d in range(s.dim()) if d != own]) if s.dim() > 1 else s


@dataclass(frozen=True)
class Trilinear:
    """A sum over some dimensions of the product of three broadcast operands.

    The entries of J for one operand are sums of products of the other two. For `nn.Bilinear`.
    """

    # Whether linear in each operand as a whole; a product of the entries of one operand is not.
    in_each: bool = True
    name: str = "contraction"
    linear: bool = False

    def at(self, call: Call) -> TrilinearAt:
        return TrilinearAt(Call(trilinear, call.leaves, call.spec, call.active))


def trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    summed: list[int],
    unroll_dim: int = 1,
) -> Tensor:
    """aten._trilinear, whose own kernel torch cannot trace with symbolic sizes."""
    rank = a.dim() + len(expand_a)
    dims = [[d for d in range(rank) if d not in e] for e in (expand_a, expand_b, expand_c)]
    out = [d for d in range(rank) if d not in summed]
    return torch.einsum(a, dims[0], b, dims[1], c, dims[2], out)


class TrilinearAt(ContractionAt):
    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        if s[0] is None:
            return [None] * len(self.call.active)
        return [self._squared_vjp(s[0], i) for i in self.call.active]

    def _squared_vjp(self, s: Tensor, active: int) -> Tensor:
        *operands, e1, e2, e3, summed, _ = self._arguments()
        rank = operands[0].dim() + len(e1)
        # Letters of each operand's dimensions, without those it is broadcast along.
        dims = [[d for d in range(rank) if d not in expanded] for expanded in (e1, e2, e3)]
        out = [d for d in range(rank) if d not in summed]
        mine = dims.pop(active)
        operands.pop(active)
        (a, b), (da, db) = [widen(v) for v in operands], dims
        kept = sorted({*da, *db} & {*mine, *out})
        entries = torch.einsum(a, da, b, db, kept)
        return torch.einsum(s, out, entries.square(), kept, mine)

    def _arguments(self) -> list[Any]:
        args = list(torch.utils._pytree.tree_unflatten(self.call.leaves, self.call.spec)[0])
        return args + [1] * (8 - len(args))
