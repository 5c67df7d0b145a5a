"""Operators that are linear in each operand alone, every coefficient 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, widen


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

    name: str = "contraction"
    linear: bool = False

    def at(self, call: Call) -> ContractionAt:
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
