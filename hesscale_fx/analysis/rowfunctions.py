"""Recognize softmax, log-softmax, layer norm and rms norm, however they are spelled.

As in `recognize`, by values: a region of analytic functions is compared with the named ones, to
rounding, at random rows of the size that the model has (or of two sizes, where that is a symbol).
What else enters (a maximum that the user detached) is drawn at random too, so that a function which
depends on it is none of these. The rows are far from zero, close to it and steep, so that a small
number added somewhere tells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from hesscale_fx.analysis import recognize
from hesscale_fx.structures import table
from hesscale_fx.structures.base import wide
from hesscale_fx.structures.region import Region, RegionAt
from hesscale_fx.structures.spelled import Spelled

aten = torch.ops.aten

ANALYTIC = recognize.ANALYTIC | {
    aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.square.default,
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default,
}  # fmt: skip
SIZES = (5, 7)  # of an axis of a row whose size is a symbol
OTHERS = 2  # entries of every axis that is not of the row
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
}
# What rows are drawn from: scale and shift of a normal distribution.
SOFTMAX_ROWS = ((2, 0), (2, -50), (2, 50), (40, 0))
# A node of these powers is the reciprocal of the standard deviation.
POWERS = (1.0, -1.0, -0.5)


def recognize_row(region: Region) -> Spelled | None:
    """The row function that a region computes of its one input, or None."""
    if region.name != "row" or not all(may_be_row_function(n, region) for n in region.nodes):
        return None
    if len(region.inputs) != 1 or len(region.outputs) != 1:
        return None
    (x,), (y,) = region.inputs, region.outputs
    every = sorted(region.order)
    if any(sorted(sum(region.dims[n], [])) != every for n in (x, y)):
        return None  # an input that rows share, or an output of one number a row
    if all(region.sizes.get(a) == 1 for a in region.row) or wide(dtype_of(x)) != dtype_of(x):
        return None
    samples = list(samples_of(region))
    for name, function in SOFTMAXES.items():
        if all(s.computes(function, *rows) for s in samples for rows in SOFTMAX_ROWS):
            return Spelled(name)
    return recognize_norm(region, samples)


def recognize_norm(region: Region, samples: list[Sample]) -> Spelled | None:
    """With every number in the region for the one that is added to the variance."""
    for eps in numbers_of(region):
        rows = [(2.0, 0.0), (2.0, 1.0)] + ([(math.sqrt(eps), 0.0)] if eps else [])
        for name, centred in (("layer_norm", True), ("rms_norm", False)):
            norm = Norm(centred, eps)
            if all(s.computes(norm.value, *at) for s in samples for at in rows):
                found = deviation(region, [s.at(*at) for s in samples for at in rows], norm)
                return None if found is None else Spelled(name, *found)
    return None


def deviation(region: Region, points: list[At], norm: Norm) -> tuple[fx.Node, float] | None:
    """The node of the forward whose power is the reciprocal of the standard deviation."""
    for power in POWERS:
        for node in region.nodes:
            if region.row.isdisjoint(sum(region.dims[node], [])) and all(
                agree(p.row_value(node) ** power, norm.reciprocal(p.x)) for p in points
            ):
                return node, power
    return None


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm or an rms norm without weights, of rows in the last dimension."""

    centred: bool
    eps: float

    def _deviations(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def reciprocal(self, x: Tensor) -> Tensor:
        return (self._deviations(x).square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def value(self, x: Tensor) -> Tensor:
        return self._deviations(x) * self.reciprocal(x)


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def operands(node: fx.Node) -> list[fx.Node]:
    """Without the sizes in a view's arguments."""
    seen_through = node.target in table.VIEWS | table.IDENTITIES
    return [node.args[0]] if seen_through else node.all_input_nodes  # type: ignore[list-item]


def may_be_row_function(node: fx.Node, region: Region) -> bool:
    """Whether a node is analytic, in one dtype, and of tensors."""
    known = node.target in ANALYTIC | table.VIEWS | table.IDENTITIES or node in region.cancelled
    dtype = dtype_of(region.inputs[0])
    values = [a.meta.get("val") for a in (node, *operands(node))]
    return known and all(isinstance(v, Tensor) and v.dtype == dtype for v in values)


def numbers_of(region: Region) -> list[float]:
    """Zero, and the positive numbers among the arguments of a region's nodes."""
    found = {0.0: None}
    for node in region.nodes:
        if node.target not in table.VIEWS | table.IDENTITIES | table.REDUCTIONS:
            values = [*node.args, *node.kwargs.values()]
            found |= {float(v): None for v in values if isinstance(v, (int, float)) and v > 0}
    return list(found)


def samples_of(region: Region) -> Iterator[Sample]:
    """The region over axes of few entries, but for those of the row."""
    symbolic = any(a not in region.sizes for a in region.row)
    for entries in SIZES if symbolic else SIZES[:1]:
        sizes = {
            a: region.sizes.get(a, entries) if a in region.row else OTHERS for a in region.order
        }
        yield Sample(dataclasses.replace(region, sizes=sizes))


class Sample:
    """A region of known sizes, at rows to draw."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._points: dict[tuple[float, float], At] = {}

    def at(self, scale: float, shift: float) -> At:
        if (scale, shift) not in self._points:
            self._points[scale, shift] = At(self.region, scale, shift)
        return self._points[scale, shift]

    def computes(self, function: Callable[[Tensor], Tensor], scale: float, shift: float) -> bool:
        """Whether the region is the function, of rows in the last dimension."""
        at = self.at(scale, shift)
        return agree(at.y, function(at.x))


class At:
    """A region's values at drawn rows, with these in the last dimension."""

    def __init__(self, region: Region, scale: float, shift: float) -> None:
        self._region = region
        self._generator = torch.Generator().manual_seed(0)
        (source,), (output,) = region.inputs, region.outputs
        self._known = {source: scale * self._draw(source) + shift}
        self._rule = RegionAt(region, self._value, lambda inputs: [])
        self.x, self.y = self.row_value(source), self.row_value(output)

    def _draw(self, node: fx.Node) -> Tensor:
        sizes = self._region.sizes
        shape = [math.prod(sizes[a] for a in dim) for dim in self._region.dims[node]]
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def _value(self, node: fx.Node) -> Tensor:
        if node not in self._known:
            self._known[node] = self._draw(node)
        return self._known[node]

    def row_value(self, node: fx.Node) -> Tensor:
        rows = [i for i, a in enumerate(self._region.order) if a in self._region.row]
        others = [i for i in range(len(self._region.order)) if i not in rows]
        return self._rule.value(node).permute(*others, *rows).flatten(len(others))


def agree(a: Tensor, b: Tensor) -> bool:
    """To rounding, relative to the largest entry of each row."""
    if a.shape != b.shape:
        return False
    size = b.abs().amax(-1, keepdim=True)
    return bool(((a - b).abs() <= recognize.TOLERANCE * size).all())
