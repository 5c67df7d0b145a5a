"""Find reductions on whose value nothing depends: the maximum that a stable softmax subtracts.

Their derivative cancels, but only after every term of it was computed. Whether it does is decided
by evaluating it at random points: a region of analytic functions (no kinks between the reduction
and the outputs) whose derivative is zero at one random point is zero everywhere, but for a set of
measure zero. The axes are given a few entries each, so this costs milliseconds; a number written in
the model that happens to equal one such size, as in ``(x - m).sum() + 3 * m``, equals no other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.structures import table
from hesscale_fx.structures.region import Region, RegionAt

aten = torch.ops.aten

PEAKS = {aten.amax.default, aten.amin.default, aten.max.default, aten.min.default}
ANALYTIC = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.rsub.Scalar, aten.exp.default, aten.log.default, aten.reciprocal.default,
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.tanh.default,
    aten.sigmoid.default, aten.pow.Tensor_Scalar, aten.sqrt.default, aten.rsqrt.default,
}  # fmt: skip
TOLERANCE = 1e-12
ENTRIES = (3, 4)  # of every axis, at one point and at the other
SIZE = 2.718281828  # stands for a symbolic size in a product; no axis has it


def find_cancelled(region: Region) -> set[fx.Node]:
    """The maxima and minima whose derivative is zero, in a region whose outputs are all known."""
    found: set[fx.Node] = set()
    for node in region.nodes:
        if node in region.outputs or not is_choice(node):
            continue
        if is_analytic_below(node, region) and cancels(node, region):
            found.add(node)
    return found


def is_choice(node: fx.Node) -> bool:
    """Whether a reduction picks one entry of each row."""
    if node.target in PEAKS:
        return True
    source: Any = node.args[0] if node.target in table.REDUCTIONS else None
    return source is not None and source.target is aten.where.self


def is_analytic_below(node: fx.Node, region: Region) -> bool:
    below = {node}
    for other in region.nodes:
        if other not in below and any(a in below for a in other.all_input_nodes):
            if other.target not in ANALYTIC | table.VIEWS | table.IDENTITIES:
                return False
            below.add(other)
    return True


def cancels(node: fx.Node, region: Region) -> bool:
    """Whether the derivative with respect to `node` vanishes at two random points."""
    return all(vanishes(node, region, entries) for entries in ENTRIES)


def vanishes(node: fx.Node, region: Region, entries: int) -> bool:
    small = dataclasses.replace(region, sizes=dict.fromkeys(region.order, entries))
    generator = torch.Generator().manual_seed(entries)

    def shape(n: fx.Node) -> list[int]:
        return [entries ** len(d) for d in region.dims[n]]

    def draw(n: fx.Node) -> Any:
        value = n.meta.get("val")
        if not isinstance(value, Tensor):
            return SIZE
        drawn = torch.rand(shape(n), generator=generator, dtype=torch.float64)
        return drawn + 0.5 if value.is_floating_point() else (drawn > 0.5).to(value.dtype)

    values: dict[fx.Node, Any] = {}
    at = RegionAt(small, lambda n: values.setdefault(n, draw(n)), lambda inputs: [])
    g = [torch.randn(shape(n), generator=generator, dtype=torch.float64) for n in small.outputs]
    return at.cancels(node, g, TOLERANCE, moved=0.3)
