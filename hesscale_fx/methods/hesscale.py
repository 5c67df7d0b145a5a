"""HesScale (Elsayed & Mahmood 2022) and its generalized Gauss-Newton variant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscale_fx.methods.base import Flow
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import add


@dataclass(frozen=True)
class HesScale:
    """``s_x = (J o J)^T s_y + sum_k g_y[k] d2 y[k]/dx^2``, started at zero.

    With `gauss_newton` the second term is dropped inside the model, so that only the curvature of
    the loss flows through it.
    """

    name: str
    gauss_newton: bool = False
    roles: tuple[str, ...] = ("grad", "hess")

    @property
    def needs_boundary(self) -> bool:
        return self.gauss_newton

    def seed(self, loss: Tensor) -> dict[str, Tensor | None]:
        return {"grad": torch.ones_like(loss), "hess": None}

    def pull(self, role: str, at: Evaluation, y: Flow, inside: bool) -> list[Tensor | None]:
        if role == "grad":
            return at.vjp(y["grad"])
        passed = at.squared_vjp(y["hess"])
        if self.gauss_newton and inside:
            return passed
        return [add(a, b) for a, b in zip(passed, at.curvature(y["grad"]), strict=True)]
