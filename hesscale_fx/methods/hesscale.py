"""HesScale (Elsayed & Mahmood 2022) and its generalized Gauss-Newton variant."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hesscale_fx.methods.base import Flow, Method, Place
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import recursion


@dataclass(frozen=True)
class HesScale(Method):
    """``s_x = (J o J)^T s_y + sum_k g_y[k] d2 y[k]/dx^2``, started at zero.

    With `gauss_newton` the second term is dropped inside the model, so that only the curvature of
    the loss flows through it.
    """

    name: str = "hesscale"
    gauss_newton: bool = False

    @property
    def needs_boundary(self) -> bool:  # type: ignore[override]
        return self.gauss_newton

    @property
    def of(self) -> str:  # type: ignore[override]
        return "Gauss-Newton" if self.gauss_newton else "Hessian"

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if role == "grad":
            return at.vjp(y["grad"])
        if self.gauss_newton and place.inside:
            return at.squared_vjp(y["hess"])
        return recursion(at, y["hess"], y["grad"])
