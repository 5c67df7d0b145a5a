"""Squared gradients per sample: the empirical Fisher information, as it is usually called."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscale_fx.errors import InvalidModelError
from hesscale_fx.methods.base import Flow, Place
from hesscale_fx.methods.columns import Columns
from hesscale_fx.structures import Evaluation


@dataclass(frozen=True)
class EmpiricalFisher(Columns):
    """``sum_b (dL_b/dv)^2`` for a loss L that is a sum of L_b over samples, however weighted.

    For a mean over N samples L_b has 1/N in it: N times this is the mean of squared gradients.
    The one column is the gradient itself, started at the loss.
    """

    name: str = "empirical_fisher"
    columns: int | None = 0
    curved: bool = False
    needs_boundary = False
    of = "squared gradients"
    exactness = "always"

    def seed(self, loss: Tensor) -> dict[str, Tensor | None]:
        one = torch.ones_like(loss)
        return {"grad": one, "columns": one.unsqueeze(0), "hess": None}

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if "met" in place.uses:
            raise InvalidModelError(
                "A parameter of the loss is used after the samples were combined, so it has no "
                "gradient per sample. Leave it out of wrt, or use another method."
            )
        return super().pull(role, at, y, Place(True, place.rows, place.uses))
