"""Jacobians whose entries are 0 or 1, or one scale for each output or each input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, mul, widen
from hesscale_fx.structures.persample import call_per_sample


@dataclass(frozen=True)
class Selection:
    """Entries 0 or 1: ``(J o J)^T s = J^T s``. Indexing, padding, concatenation, max-pooling."""

    name: str = "selection"
    linear: bool = True

    def at(self, call: Call) -> SelectionAt:
        return SelectionAt(call)


@dataclass
class SelectionAt:
    call: Call

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self.call.vjp(s, widen)

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return [None] * len(self.call.active)

    def per_sample(self, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
        return call_per_sample(self.call, u, dim, inner)


@dataclass(frozen=True)
class ManyToOne:
    """Linear, and each input element reaches at most one output element.

    Then a column of J has one entry a, and ``(J o J)^T s = a * (a s) = J^T 1 * J^T s``.
    """

    accepts: Callable[[tuple, dict], bool] | None = None
    name: str = "scaled selection"
    linear: bool = True

    def at(self, call: Call) -> ManyToOneAt:
        return ManyToOneAt(call)


class ManyToOneAt(SelectionAt):
    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        ones = [None if t is None else torch.ones_like(t) for t in s]
        first = self.call.vjp(ones, widen)
        return [mul(a, b) for a, b in zip(first, self.call.vjp(s, widen), strict=True)]


@dataclass(frozen=True)
class ScaledSelection:
    """Each output k is a sum of inputs times one scale c[k]: ``(J o J)^T s = J^T (c s)``.

    `scale` gives c for a call, broadcastable to the output.
    """

    scale: Callable[[Call], Tensor | float]
    name: str = "scaled selection"
    linear: bool = True

    def at(self, call: Call) -> ScaledSelectionAt:
        return ScaledSelectionAt(call, self.scale)


class ScaledSelectionAt(SelectionAt):
    def __init__(self, call: Call, scale: Callable[[Call], Tensor | float]) -> None:
        super().__init__(call)
        self.scale = scale

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        if s[0] is None:
            return [None] * len(self.call.active)
        return self.call.vjp([s[0] * self.scale(self.call)], widen)


@dataclass(frozen=True)
class Separable:
    """Linear in one image, the same for every channel, a product over the last `dims` dimensions.

    ``J = A_1 (x) ... (x) A_d``, so ``J o J`` is the product of the squared factors. The factors
    are the operator's own response to the identity, one spatial dimension at a time; their rows
    sum to one, so what is constant along a dimension stays so. Adaptive average pools and linear
    or cubic interpolation.
    """

    dims: int
    name: str = "scaled selection"
    linear: bool = True

    def at(self, call: Call) -> SeparableAt:
        return SeparableAt(call, self.dims)


class SeparableAt(SelectionAt):
    def __init__(self, call: Call, dims: int) -> None:
        super().__init__(call)
        self.dims = dims

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        result = s[0]
        if result is None:
            return [None]
        x = widen(self.call.operands()[0])
        for dim in range(x.dim() - self.dims, x.dim()):
            factor = self._factor(x, dim)
            result = torch.tensordot(result, factor.square(), dims=([dim], [1])).movedim(-1, dim)
        return [result]

    def _factor(self, x: Tensor, dim: int) -> Tensor:
        """A of shape (inputs, outputs) along `dim`."""
        first = x.dim() - self.dims
        size = x.shape[dim]
        spatial = [size if d == dim else 1 for d in range(first, x.dim())]
        identity = torch.eye(size, dtype=x.dtype, device=x.device)
        # The rows of the identity stand where the batch is (the channels, if there is none).
        probe = identity.reshape([size] + [1] * (first - 1) + spatial)
        probe = probe.expand([size] + [1] * (first - 1) + list(x.shape[first:]))
        leaves = list(self.call.leaves)
        leaves[self.call.active[0]] = probe.contiguous()
        response = self.call.run(leaves)[0]
        for d in range(x.dim() - 1, -1, -1):
            if d not in (0, dim):
                response = response.select(d, 0)
        return response
