"""How much of the loss's Hessian at the model's output is negative."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hesscale_fx.methods.base import Flow, Place
from hesscale_fx.methods.columns import Columns
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import recursion


@dataclass(frozen=True)
class LossSplit(Columns):
    """The diagonals of the two parts, with which the model would be entered; it is not."""

    name: str = "loss_curvature"
    columns: int | None = 0

    @property
    def asked(self) -> str:
        return "loss_curvature"

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("grad", "gauss", "hess")

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if role == "grad":
            return at.vjp(y["grad"])
        if role == "hess":
            return recursion(at, y["hess"], y["grad"])
        return [None] * len(place.uses)
