"""The rule of a region that is a spelling of a row function with a closed form.

The closed form is of values that the forward has: those of the function (of a softmax p, of a norm
z), and one factor for each row (of a norm the reciprocal of the standard deviation). So nothing of
the spelling is differentiated. Besides those of closed.py there is the share ``y = x / S(x)`` that
is left of a softmax where only its quotient has branches that meet again, with

    J = (I - y 1^T) / S(x),  (J o J)^T s = (s (1 - 2 y) + S(s y^2)) / S(x)^2,
    curvature = -2 dL/dx / S(x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.structures.base import Tensors, add, mul
from hesscale_fx.structures.closed import ClosedForm, LogSoftmax, Normalization, Softmax
from hesscale_fx.structures.region import Region, RegionAt

aten = torch.ops.aten


@dataclass(frozen=True)
class Spelled:
    """What a region computes of its one input.

    Attributes:
        name: ``"softmax"``, ``"log_softmax"``, ``"layer_norm"``, ``"rms_norm"`` or ``"share"``.
        node: a node of the region that gives the factor of each row, ...
        power: ... to this power.
    """

    name: str
    node: fx.Node | None = None
    power: float = 1.0


class SpelledShare(ClosedForm):
    """Of the shares y and the reciprocal r of the sum."""

    def __init__(self, y: Tensor, rows: list[int], r: Tensor) -> None:
        self.active = [0]
        self.y, self.rows, self.r = y, rows, r

    def slope(self, g: Tensor | None) -> Tensor | None:
        return None if g is None else (g - (g * self.y).sum(self.rows, keepdim=True)) * self.r

    def both(self, s: Tensor | None, g: Tensor | None) -> dict[int, Tensor | None]:
        bent = mul(self.slope(g), -2 * self.r)
        if s is None:
            return {0: bent}
        weighted = s * self.y
        inner = s - 2 * weighted + (weighted * self.y).sum(self.rows, keepdim=True)
        return {0: add(inner * (self.r * self.r), bent)}


class SpelledSoftmax(Softmax):
    """Of the probabilities along some dimensions."""

    def __init__(self, p: Tensor, rows: list[int]) -> None:
        self.active = [0]
        self.p, self.rows = p, rows
        self.dim: Any = rows

    def slope(self, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        if len(self.rows) == 1:
            return aten._softmax_backward_data(g, self.p, self.rows[0], self.p.dtype)
        weighted = self.p * g
        return weighted - self.p * weighted.sum(self.rows, keepdim=True)


class SpelledLogSoftmax(LogSoftmax):
    """Of their logarithms."""

    def __init__(self, y: Tensor, rows: list[int]) -> None:
        self.active = [0]
        self.y, self.p, self.rows = y, y.exp(), rows
        self.dim: Any = rows

    def slope(self, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        if len(self.rows) == 1:
            return aten._log_softmax_backward_data(g, self.y, self.rows[0], self.y.dtype)
        return g - self.p * g.sum(self.rows, keepdim=True)


class SpelledNorm(Normalization):
    """Of the normalized rows and the reciprocal of their standard deviations."""

    def __init__(self, z: Tensor, rows: list[int], r: Tensor, centred: bool) -> None:
        self.active = [0]
        self.z, self.r, self.w = z, r, None
        self.rows, self.whole, self.centred = rows, z.shape, centred

    def slope(self, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        n = self._count()
        found = g - self.z * (self._total(g * self.z, None) / n)
        if self.centred:
            found = found - self._total(g, None) / n
        return found * self.r


class SpelledAt(RegionAt):
    """As `RegionAt`, for a region with `Region.spelled`.

    Args:
        region: the region.
        values: the value of each node that enters the region.
        run: computes from those of its inputs the nodes of the region that the forward has, in
            their own shapes.
    """

    def __init__(
        self,
        region: Region,
        values: Callable[[fx.Node], Tensor],
        run: Callable[[Mapping[fx.Node, Tensor]], Mapping[fx.Node, Tensor]],
    ) -> None:
        super().__init__(region, values, lambda inputs: [run(inputs)[n] for n in region.outputs])
        (self._x,), (self._y,) = region.inputs, region.outputs
        self._found = run({self._x: values(self._x)})
        self._rule = self._closed(region.spelled)

    def _closed(self, spelled: Spelled) -> ClosedForm:
        value, rows = self._forward(self._y), self._positions(self.region.row)
        if spelled.name == "softmax":
            return SpelledSoftmax(value, rows)
        if spelled.name == "log_softmax":
            return SpelledLogSoftmax(value, rows)
        assert spelled.node is not None
        r = self._forward(spelled.node)
        r = {1.0: r, -1.0: r.reciprocal(), -0.5: r.rsqrt()}[spelled.power]
        if spelled.name == "share":
            return SpelledShare(value, rows, r)
        return SpelledNorm(value, rows, r, spelled.name == "layer_norm")

    def _forward(self, node: fx.Node) -> Tensor:
        """A value that the forward has, over the region's axes."""
        found = self._found.get(node)
        return self.value(node) if found is None else self._layout.canonical(node, found)

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        (g,) = u
        if g is not None and g.dim() > len(self.region.dims[self._y]):
            return super().vjp(u)  # several
        return self._native(self._rule.slope(self._canonical_of(self._y, g)))

    def recursion(self, s: Tensors, g: Tensors) -> list[Tensor | None]:
        """Both terms at once."""
        if s[0] is None and g[0] is None:
            return [None]
        arrived = [self._canonical_of(self._y, v) for v in (s[0], g[0])]
        return self._native(self._rule.both(*arrived)[0])

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self.recursion(s, [None])

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return self.recursion([None], g)

    def _native(self, value: Tensor | None) -> list[Tensor | None]:
        return [None if value is None else self._finish(self._x, value)]
