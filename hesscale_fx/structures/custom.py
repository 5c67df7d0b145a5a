"""Rules that a user gives for an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.structures import table
from hesscale_fx.structures.base import Call, Structure, Tensors, several, widen
from hesscale_fx.structures.definitions import DEFINITIONS


@dataclass(frozen=True)
class Rule:
    """Three functions that say how gradient and curvature pass an operator ``y = op(*args)``.

    Args:
        squared_vjp: ``squared_vjp(s, *args, **kwargs)`` gives ``(J o J)^T s``.
        curvature: ``curvature(g, *args, **kwargs)`` gives ``sum_k g[k] d2 y[k] / dx^2``.
        vjp: ``vjp(u, *args, **kwargs)`` gives ``J^T u``; by default autograd's own formula.

    Each returns a tensor of the argument's shape for each tensor argument in order, as a tuple (or
    the tensor itself if there is one such argument); None is zero. `s`, `g` and `u` have the
    output's shape; an operator with several outputs gets a tuple of them, None for zero.
    """

    squared_vjp: Callable[..., Any]
    curvature: Callable[..., Any]
    vjp: Callable[..., Any] | None = None
    name: str = "custom"
    linear: bool = False

    def at(self, call: Call) -> RuleAt:
        return RuleAt(self, call)


@dataclass
class RuleAt:
    rule: Rule
    call: Call

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        if self.rule.vjp is None:
            return self.call.vjp(u)
        outputs = self.call.run(self.call.leaves)
        given = [v for v in u if v is not None]
        rank = next((y.dim() for y, v in zip(outputs, u, strict=False) if v is not None), 0)
        if not given or given[0].dim() == rank:
            return self._ask(self.rule.vjp, u, self.call.leaves)
        rule = self.rule.vjp

        def pull(one: Sequence[Tensor]) -> list[Tensor | None]:
            rest = iter(one)
            filled = [None if v is None else next(rest) for v in u]
            return self._ask(rule, filled, self.call.leaves)

        return several(pull, given)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self._ask(self.rule.squared_vjp, s, [widen(v) for v in self.call.leaves])

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return self._ask(self.rule.curvature, g, [widen(v) for v in self.call.leaves])

    def _ask(self, function: Callable, values: Tensors, leaves: list[Any]) -> list[Tensor | None]:
        if all(v is None for v in values):
            return [None] * len(self.call.active)
        args, kwargs = pytree.tree_unflatten(leaves, self.call.spec)
        found = function(values[0] if len(values) == 1 else tuple(values), *args, **kwargs)
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        tensors = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        if len(results) != len(tensors):
            raise InvalidArgumentError(
                f"The rule of {self.call.op} returned {len(results)} value(s) for "
                f"{len(tensors)} tensor argument(s)."
            )
        by_position = dict(zip(tensors, results, strict=True))
        return [by_position[i] for i in self.call.active]


def overloads_of(op: Any) -> list[Any]:
    """The operator overloads that a user's name for an operator stands for."""
    if isinstance(op, torch._ops.OpOverload):
        return [op]
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [getattr(op, name) for name in op.overloads()]
    inner = getattr(op, "_opoverload", None)  # what torch.library.custom_op returns
    if isinstance(inner, torch._ops.OpOverload):
        return [inner]
    raise InvalidArgumentError(
        f"register() takes an operator such as torch.ops.mylib.myop, not {op!r}. A Python function "
        "becomes one with torch.library.custom_op."
    )


def register(op: Any, structure: str | Structure | Callable[..., Any] | tuple) -> None:
    """Say how curvature passes an operator of your own.

    The operator needs an autograd formula (`torch.library.register_autograd`), from which the
    gradient and what the structure leaves open are derived.

    Args:
        op: ``torch.ops.mylib.myop``, one overload of it, or what `custom_op` returned.
        structure: one of

            - ``"pointwise"``: each output element depends on one element of each operand. Its
              autograd formula must itself be differentiable;
            - ``"selection"``: linear with coefficients 0 and 1;
            - ``"scaled selection"``: linear, each input element reaches one output element;
            - ``"contraction"``: linear in each operand alone, with coefficients 0 and 1;
            - a function that computes the same in plain torch, from pointwise functions and
              reductions along one set of dimensions (the rule is derived from it);
            - a `Rule`, or a tuple ``(vjp, squared_vjp, curvature)`` of three functions.

    Raises:
        InvalidArgumentError: an unknown structure, or no operator.

    Example:
        >>> import torch, hesscale_fx
        >>> @torch.library.custom_op("docs::cube", mutates_args=())
        ... def cube(x: torch.Tensor) -> torch.Tensor:
        ...     return x**3
        >>> _ = cube.register_fake(lambda x: torch.empty_like(x))
        >>> cube.register_autograd(
        ...     lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
        ...     setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        ... )
        >>> hesscale_fx.register(cube, "pointwise")
        >>> hesscale_fx.check(cube, torch.randn(4, dtype=torch.float64)).ok
        True

    Source:
        The structures are those of Elsayed & Mahmood 2022, generalized; see `check` for the proof
        by example that a registered one is right.
    """
    for overload in overloads_of(op):
        _forget(overload)
        if structure in ("pointwise", "diagonal"):
            table.POINTWISE.add(overload)
        elif isinstance(structure, str):
            if structure not in table.NAMED:
                names = ", ".join(map(repr, ["pointwise", *table.NAMED]))
                raise InvalidArgumentError(
                    f"Unknown structure {structure!r}; choose one of {names}, a Rule, three "
                    "functions, or a function that computes the same in plain torch."
                )
            table.TABLE[overload] = table.NAMED[structure]
        elif isinstance(structure, tuple) and len(structure) == 3 and all(map(callable, structure)):
            vjp, squared_vjp, curvature = structure
            table.TABLE[overload] = Rule(squared_vjp, curvature, vjp)
        elif hasattr(structure, "at"):
            table.TABLE[overload] = structure  # type: ignore[assignment]
        elif callable(structure):
            DEFINITIONS[overload] = structure
        else:
            raise InvalidArgumentError(f"{structure!r} is no structure; see help(register).")


def _forget(overload: Any) -> None:
    table.POINTWISE.discard(overload)
    table.TABLE.pop(overload, None)
    DEFINITIONS.pop(overload, None)
