"""The oracle: one test that proves a rule.

For any w and d the function ``h(y) = <w, y - y0> + 1/2 <d, (y - y0)^2>`` has the gradient w and the
diagonal Hessian d at ``y0 = f(x)``, so the exact Hessian diagonal of ``h(f(x))`` is what the
recursion must give for g = w, s = d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from hesscale_fx.api import transform
from hesscale_fx.errors import HesScaleError, InvalidArgumentError


class CheckError(HesScaleError, AssertionError):
    """A rule disagrees with the exact Hessian diagonal."""


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        errors: for each differentiated argument, by position among the tensors, the largest
            difference of gradient and of curvature relative to the largest entry.
        tolerance: what was allowed.
    """

    errors: dict[int, tuple[float, float]]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is at most the tolerance."""
        return all(max(pair) <= self.tolerance for pair in self.errors.values())


def check(
    op: Callable[..., Any], *args: Any, tolerance: float = 1e-9, seed: int = 0, **kwargs: Any
) -> Check:
    """Prove by example that gradient and curvature pass `op` rightly.

    Each floating-point tensor argument is differentiated alone, and compared with the Hessian
    diagonal that double backward gives, one coordinate at a time. Use small tensors in float64.

    Args:
        op: an operator, or any function of tensors.
        *args: its arguments.
        tolerance: largest relative error allowed.
        seed: of the random weights w and d.
        **kwargs: its keyword arguments.

    Returns:
        The errors found.

    Raises:
        CheckError: an error exceeds the tolerance; the message says for which argument.
        HesScaleError: the operator is not supported.

    Example:
        >>> import torch, hesscale_fx
        >>> hesscale_fx.check(torch.mm, torch.randn(2, 3).double(), torch.randn(3, 4).double()).ok
        True
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
    floating = [i for i in tensors if leaves[i].is_floating_point()]
    if not floating:
        raise InvalidArgumentError("check() needs a floating-point tensor argument.")
    head = Head.of(op, args, kwargs, seed)
    errors: dict[int, tuple[float, float]] = {}
    for position in floating:

        def loss(x: Tensor, *weights: Tensor, position: int = position) -> Tensor:
            inner = list(leaves)
            inner[position] = x
            a, k = pytree.tree_unflatten(inner, spec)
            return head(op(*a, **k), weights)

        x = leaves[position].detach()
        hs = transform(loss, None, (x, *head.weights), wrt="inputs", dynamic=False)
        out = hs(x, *head.weights)
        name = next(iter(out.grads))
        grad, diagonal = exact(lambda v: loss(v, *head.weights), x)
        errors[tensors.index(position)] = (
            relative(out.grads[name], grad),
            relative(out.hess_diag[name], diagonal),
        )
    result = Check(errors, tolerance)
    if not result.ok:
        worst = ", ".join(
            f"argument {i}: gradient {g:.2g}, curvature {h:.2g}"
            for i, (g, h) in errors.items()
            if not max(g, h) <= tolerance
        )
        raise CheckError(
            f"The structure of {getattr(op, '__name__', op)} is wrong, or its autograd formula is: "
            f"relative error against the exact Hessian diagonal {worst}; allowed {tolerance:.0e}."
        )
    return result


@dataclass
class Head:
    """The function h on the floating-point outputs of an operator."""

    weights: list[Tensor]  # y0, w and d for each output

    @classmethod
    def of(cls, op: Callable, args: tuple, kwargs: dict[str, Any], seed: int) -> Head:
        """Random weights for the outputs of ``op(*args, **kwargs)``."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            outputs = floating_outputs(op(*args, **kwargs))
        weights = []
        for y in outputs:
            w, d = (
                torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for _ in "wd"
            )
            weights += [y, w, d]
        return cls(weights)

    def __call__(self, result: Any, weights: tuple[Tensor, ...]) -> Tensor:
        """h of the outputs."""
        total: Any = 0.0
        for k, y in enumerate(floating_outputs(result)):
            y0, w, d = weights[3 * k : 3 * k + 3]
            total = total + (w * (y - y0)).sum() + 0.5 * (d * (y - y0) ** 2).sum()
        return total


def floating_outputs(result: Any) -> list[Tensor]:
    """The differentiable tensors in an operator's result."""
    leaves = pytree.tree_leaves(result)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


def exact(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian diagonal by double backward, one coordinate at a time."""
    x = x.detach().clone().requires_grad_()
    diagonal = torch.zeros(x.numel(), dtype=x.dtype)
    value = loss(x)
    if not value.requires_grad:
        return torch.zeros_like(x), diagonal.reshape(x.shape)
    (grad,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
    if grad.requires_grad:
        for i, entry in enumerate(grad.reshape(-1)):
            (row,) = torch.autograd.grad(entry, x, retain_graph=True, materialize_grads=True)
            diagonal[i] = row.reshape(-1)[i]
    return grad.detach(), diagonal.reshape(x.shape)


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference entry (over 1 if all are zero)."""
    if not value.numel():
        return 0.0
    scale = reference.abs().max().clamp(min=1.0 if not reference.any() else 0.0)
    return ((value - reference).abs().max() / scale).item()
