"""Becker & LeCun (1989): the softmax of the loss as if it were elementwise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hesscale_fx.errors import UnsupportedOperatorError
from hesscale_fx.methods.base import Flow, Method, Place
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import recursion


@dataclass(frozen=True)
class BL89(Method):
    """The recursion of HesScale, but between logits and loss no class sees another.

    Of a softmax p only ``dp_i/dz_i = p_i (1 - p_i)`` and ``d2 p_i/dz_i^2 = p_i (1-p_i) (1-2 p_i)``
    are kept. Under cross-entropy with one-hot target y a logit then has ``y p (1 - p)``, where
    HesScale has ``p (1 - p)``.
    """

    name: str = "bl89"
    needs_boundary = True
    exactness = "never"

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if role == "grad":
            return at.vjp(y["grad"])
        if not place.inside and place.is_row:
            elementwise = getattr(at, "elementwise", None)
            if elementwise is None:
                raise UnsupportedOperatorError(
                    "method='bl89' treats the softmax of the loss as if elementwise, and knows "
                    "softmax and log_softmax as calls of PyTorch. Write the loss with them, e.g. "
                    "F.cross_entropy, or use method='hesscale'."
                )
            return elementwise(y["hess"], y["grad"])
        return recursion(at, y["hess"], y["grad"])
