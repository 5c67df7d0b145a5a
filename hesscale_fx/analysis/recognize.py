"""Recognize pointwise functions that have a name, however they are spelled.

A GELU written out is a dozen kernels and its derivatives two dozen, where PyTorch's own are one
each. Analytic functions of one variable that agree at many random points agree everywhere (but for
a set of measure zero of functions), so a region of such functions is compared with the named ones
at a few points, to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.structures.region import Region, RegionAt

aten = torch.ops.aten

# With a second derivative of their own, or a formula shorter than that of the spelled-out function.
NAMED: list[tuple[Any, dict[str, Any]]] = [
    (aten.gelu.default, {}),
    (aten.gelu.default, {"approximate": "tanh"}),
    (aten.silu.default, {}),
]
ANALYTIC = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.rsub.Scalar, aten.exp.default, aten.reciprocal.default, aten.tanh.default,
    aten.sigmoid.default, aten.erf.default, aten.pow.Tensor_Scalar,
}  # fmt: skip
POINTS = 32
TOLERANCE = 1e-13


def recognize(region: Region) -> tuple[Any, dict[str, Any]] | None:
    """The operator and its options that a region of several nodes computes of its one input."""
    if len(region.nodes) < 2 or len(region.inputs) != 1 or len(region.outputs) != 1:
        return None
    (x,), (y,) = region.inputs, region.outputs
    if not all(is_like(node, x, region) for node in region.nodes):
        return None
    entries = math.ceil(POINTS ** (1 / max(1, len(region.order))))
    small = dataclasses.replace(region, sizes=dict.fromkeys(region.order, entries))
    generator = torch.Generator().manual_seed(0)
    shape = [entries ** len(d) for d in region.dims[x]]
    drawn = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    at = RegionAt(small, lambda node: drawn, lambda inputs: [])
    found, point = at.value(y), at.value(x)
    for op, options in NAMED:
        if is_equal(found, op(point, **options)):
            return op, options
    return None


def is_like(node: fx.Node, x: fx.Node, region: Region) -> bool:
    """Whether a node is an analytic function of x, entry by entry, and of numbers."""
    return (
        node.target in ANALYTIC
        and node.meta["val"].dtype == x.meta["val"].dtype
        and region.dims[node] == region.dims[x]
        and all(a is x or a in region.nodes for a in node.all_input_nodes)
    )


def is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE * (1 + b.abs())).all())
