"""Recognize softmax, log-softmax, layer norm, rms norm and shares, however they are spelled.

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
from dataclasses import dataclass
from functools import cached_property

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
OTHERS = 2  # entries of every axis that is not of the row, ...
LONG = 2**12  # ... one if a row is longer than this
LONGEST = 2**20  # entries of a row; drawing more would take long
# A row is the drawn normal numbers times a scale plus a shift, or the exponential of that.
Draw = tuple[float, float, bool]
ANY: tuple[Draw, ...] = ((2, 0, False), (2, -50, False), (2, 50, False), (40, 0, False))
POSITIVE: tuple[Draw, ...] = ((1, 0, True), (1, -40, True), (1, 40, True), (9, 0, True))
# Of a node that gives the factor of a row.
POWERS = (1.0, -1.0, -0.5)


@dataclass(frozen=True)
class RowFunction:
    """A function of rows in the last dimension.

    Attributes:
        name: as in `Spelled`.
        value: the function.
        draws: rows at which it is told from others.
        factor: a number for each row that its closed form needs.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    draws: tuple[Draw, ...]
    factor: Callable[[Tensor], Tensor] | None = None


def total(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


PLAIN = [
    RowFunction("softmax", lambda x: torch.softmax(x, -1), ANY),
    RowFunction("log_softmax", lambda x: torch.log_softmax(x, -1), ANY),
    RowFunction("share", lambda x: x / total(x), POSITIVE, lambda x: 1 / total(x)),
]


def norms(eps: float) -> list[RowFunction]:
    """The layer norm and the rms norm without weights."""
    draws = ((2.0, 0.0, False), (2.0, 1.0, False), (math.sqrt(eps) or 1.0, 0.0, False))

    def rms(x: Tensor) -> Tensor:
        return (mean(x * x) + eps).rsqrt()

    def deviations(x: Tensor) -> Tensor:
        return x - mean(x)

    return [
        RowFunction(
            "layer_norm",
            lambda x: deviations(x) * rms(deviations(x)),
            draws,
            lambda x: rms(deviations(x)),
        ),
        RowFunction("rms_norm", lambda x: x * rms(x), draws, rms),
    ]


def recognize_row(region: Region) -> Spelled | None:
    """The row function that a region computes of its one input, or None."""
    if region.name != "row" or len(region.inputs) != 1 or len(region.outputs) != 1:
        return None
    if not all(may_be_row_function(n, region) for n in region.nodes):
        return None
    (x,), (y,) = region.inputs, region.outputs
    every = sorted(region.order)
    if any(sorted(sum(region.dims[n], [])) != every for n in (x, y)):
        return None  # an input that rows share, or an output of one number a row
    if all(region.sizes.get(a) == 1 for a in region.row) or wide(dtype_of(x)) != dtype_of(x):
        return None
    if math.prod(region.sizes.get(a, 1) for a in region.row) > LONGEST:
        return None
    samples = list(samples_of(region))
    functions = PLAIN + [f for eps in numbers_of(region) for f in norms(eps)]
    for function in functions:
        points = [s.at(draw) for s in samples for draw in function.draws]
        if all(agree(p.y, function.value(p.x)) for p in points):
            return spelled(function, region, points)
    return None


def spelled(function: RowFunction, region: Region, points: list[At]) -> Spelled | None:
    """With the node that gives the factor; None if it has one that no node gives."""
    if function.factor is None:
        return Spelled(function.name)
    factors = [function.factor(p.x) for p in points]
    nodes = [n for n in region.nodes if region.row.isdisjoint(sum(region.dims[n], []))]
    for power in POWERS:
        for node in nodes:
            if all(agree(p.rows(node) ** power, f) for p, f in zip(points, factors, strict=True)):
                return Spelled(function.name, node, power)
    return None


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
        row = {a: region.sizes.get(a, entries) for a in region.row}
        others = OTHERS if math.prod(row.values()) <= LONG else 1
        sizes = {a: row.get(a, others) for a in region.order}
        yield Sample(dataclasses.replace(region, sizes=sizes))


class Sample:
    """A region of known sizes, at rows to draw."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._points: dict[Draw, At] = {}

    def at(self, draw: Draw) -> At:
        if draw not in self._points:
            self._points[draw] = At(self._region, draw)
        return self._points[draw]


class At:
    """A region's values at drawn rows, with these in the last dimension."""

    def __init__(self, region: Region, draw: Draw) -> None:
        self._region = region
        self._generator = torch.Generator().manual_seed(0)
        (source,), (output,) = region.inputs, region.outputs
        scale, shift, positive = draw
        drawn = scale * self._normal(source) + shift
        self._known = {source: drawn.exp() if positive else drawn}
        self._rule = RegionAt(region, self._value, lambda inputs: [])
        self.x = self.rows(source)
        self._output = output

    @cached_property
    def y(self) -> Tensor:
        return self.rows(self._output)

    def _normal(self, node: fx.Node) -> Tensor:
        sizes = self._region.sizes
        shape = [math.prod(sizes[a] for a in dim) for dim in self._region.dims[node]]
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def _value(self, node: fx.Node) -> Tensor:
        if node not in self._known:
            self._known[node] = self._normal(node)
        return self._known[node]

    def rows(self, node: fx.Node) -> Tensor:
        order, row = self._region.order, self._region.row
        inner = [i for i, a in enumerate(order) if a in row]
        outer = [i for i, a in enumerate(order) if a not in row]
        return self._rule.value(node).permute(*outer, *inner).flatten(len(outer))


def agree(a: Tensor, b: Tensor) -> bool:
    """To rounding, relative to the largest entry of each row."""
    if a.shape != b.shape:
        return False
    size = b.abs().amax(-1, keepdim=True)
    return bool(((a - b).abs() <= recognize.TOLERANCE * size).all())
