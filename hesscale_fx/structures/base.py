"""The three questions that a rule answers, and what it needs to know of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Tensors = Sequence[Tensor | None]

# While a graph is emitted, tells a tensor that is zero whatever the input from one that is not.
zero_test: ContextVar[Callable[[Tensor], bool] | None] = ContextVar("zero_test", default=None)


def or_none(value: Tensor | None) -> Tensor | None:
    """None instead of a tensor that is known to be zero, so that nothing is computed with it."""
    test = zero_test.get()
    return None if value is None or (test is not None and test(value)) else value


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def mul(*factors: Tensor | None) -> Tensor | None:
    """The product where None is zero."""
    result: Tensor | None = None
    for factor in factors:
        if factor is None:
            return None
        result = factor if result is None else result * factor
    return result


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which curvature of a tensor is held: half precisions widen to float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(wide(value.dtype))
    return value


class Evaluation(Protocol):
    """One unit ``y = f(x)`` at a point. None stands for zero in every argument and result.

    `u`, `s` and `g` hold one tensor of the output's shape for each output; results hold one
    tensor of the input's shape for each differentiated input.
    """

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        """``J^T u``; if u has one more dimension in front, for each of its entries."""

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        """``(J o J)^T s``."""

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        """``sum_k g[k] * d2 y[k] / dx^2``, the diagonal for each input."""


def recursion(at: Evaluation, s: Tensors, g: Tensors) -> list[Tensor | None]:
    """``(J o J)^T s + sum_k g[k] d2 y[k]/dx^2``, at once where a rule has that shorter."""
    at_once = getattr(at, "recursion", None)
    if at_once is not None:
        return at_once(s, g)
    return [add(a, b) for a, b in zip(at.squared_vjp(s), at.curvature(g), strict=True)]


@dataclass
class Call:
    """One call of an operator, with the operands that are differentiated.

    `leaves` are the flattened arguments; `active` the positions of the differentiated tensors
    among them, one entry an operand (a tensor that is an operand twice has two).
    """

    op: Callable
    leaves: list[Any]
    spec: pytree.TreeSpec
    active: list[int]

    @classmethod
    def of(cls, op: Callable, args: tuple, kwargs: dict[str, Any], active: list[int]) -> Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(op, leaves, spec, active)

    def operands(self) -> list[Tensor]:
        return [self.leaves[i] for i in self.active]

    def run(self, leaves: list[Any]) -> list[Tensor]:
        """The outputs at other leaves (not detached, autograd may record)."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        out = self.op(*args, **kwargs)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    def vjp(self, u: Tensors, change: Callable[[Any], Any] | None = None) -> list[Tensor | None]:
        """``J^T u`` by autograd's own formula, at leaves mapped by `change`."""
        leaves = [v if change is None else change(v) for v in self.leaves]
        for i in self.active:
            leaves[i] = leaves[i].detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.run(leaves)
        return vjp(outputs, [leaves[i] for i in self.active], u)


def vjp(outputs: Tensors, inputs: list[Tensor], u: Tensors) -> list[Tensor | None]:
    """``J^T u`` of outputs that autograd recorded; outputs with u = None are left out."""
    pairs = [
        (y, c.to(y.dtype))
        for y, c in zip(outputs, u, strict=False)
        if c is not None and y is not None and y.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    ys, cs = zip(*pairs, strict=True)
    if cs[0].dim() > ys[0].dim():
        return several(
            lambda one: torch.autograd.grad(ys, inputs, one, True, allow_unused=True), cs
        )
    return [or_none(g) for g in torch.autograd.grad(ys, inputs, cs, allow_unused=True)]


# Up to so many backward passes are written out one by one: no kernel needs a batched form.
UNROLLED = 8


def several(
    pull: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], u: Sequence[Tensor]
) -> list[Tensor | None]:
    """`pull` for each entry of the first dimension of u, together or, failing that, in turn."""
    known: list[bool] = []

    def present(one: Sequence[Tensor]) -> list[Tensor]:
        found = pull(one)
        known[:] = [g is not None for g in found]
        return [g for g in found if g is not None]

    count = u[0].shape[0]
    try:
        if isinstance(count, int) and count <= UNROLLED:
            raise NotImplementedError
        stacked = list(torch.vmap(present)(list(u)))
    except (RuntimeError, NotImplementedError):
        if not isinstance(count, int):
            raise
        each = [present([v[k] for v in u]) for k in range(count)]
        stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    rest = iter(stacked)
    return [next(rest) if k else None for k in known]


class Structure(Protocol):
    """A row of the table: how to evaluate the three questions for calls of an operator."""

    @property
    def name(self) -> str:
        """The term of the table, e.g. ``"contraction"``."""

    @property
    def linear(self) -> bool:
        """Whether y is linear in all differentiated operands jointly."""

    def at(self, call: Call) -> Evaluation:
        """Evaluate at the operands of `call`."""
