"""Diagonals by Hessian-vector products: Hutchinson's estimator, and the exact one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscale_fx.methods.base import Flow, Method, Place
from hesscale_fx.structures import Evaluation


@dataclass(frozen=True)
class Hutchinson(Method):
    """The mean of ``z * (H z)`` over `samples` vectors z of random signs (AdaHessian's estimator).

    The graph has the products by a second backward pass through the first.
    """

    name: str = "hutchinson"
    samples: int = 1
    exactness = "never"
    roles = ("grad",)

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        return at.vjp(y["grad"])

    def estimate(
        self,
        loss: Callable[[list[Tensor]], Tensor],
        leaves: list[Tensor],
        signs: list[Tensor],
    ) -> list[Tensor | None]:
        """The diagonal for each leaf.

        Args:
            loss: the scalar loss as a function of the leaves.
            leaves: where to differentiate.
            signs: for each leaf (samples, *leaf.shape).
        """
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = loss(leaves)
            grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        bent = [(g, i) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        found: list[Tensor | None] = [None] * len(leaves)
        for k in range(self.samples if bent else 0):
            vectors = [signs[i][k].to(g.dtype) for g, i in bent]
            products = torch.autograd.grad(
                [g for g, _ in bent], leaves, vectors, retain_graph=True, allow_unused=True
            )
            for i, product in enumerate(products):
                if product is not None:
                    term = signs[i][k] * product.to(signs[i].dtype) / self.samples
                    before = found[i]
                    found[i] = term if before is None else before + term
        return found


@dataclass(frozen=True)
class Exact(Method):
    """One Hessian-vector product for each coordinate, in chunks; the reference, for small models.

    The graph has loss and gradients; the diagonal is computed beside it, by a second backward pass
    through the captured model.
    """

    name: str = "exact"
    exactness = "always"
    roles = ("grad",)

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        return at.vjp(y["grad"])
