"""The axes of connected nodes, and the region that they make."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

from torch import fx

from hesscale_fx.analysis.axes import Axes, AxesError
from hesscale_fx.analysis.kinds import operands_of
from hesscale_fx.structures import table
from hesscale_fx.structures.region import Region, Twins, reduction


def region_of(nodes: list[fx.Node], active: set[fx.Node]) -> Region | None:
    """The region of `nodes`, or None if its axes have no common factors or no common row."""
    axes = Axes()
    members = set(nodes)
    try:
        for node in nodes:
            assign(node, axes)
    except AxesError:
        return None
    dims = {n: axes.dims(n) for n in axes.nodes()}
    if any(len(set(d)) < len(d) for d in (sum(v, []) for v in dims.values())):
        return None  # one axis twice in a tensor, e.g. x + x.T
    rows = {
        frozenset(a for d in reduction(n)[0] for a in dims[n.args[0]][d])  # type: ignore[index]
        for n in nodes
        if n.target in table.REDUCTIONS
    } - {frozenset()}
    if len(rows) > 1:
        return None
    inputs = [
        a
        for a in dict.fromkeys(a for n in nodes for a in operands_of(n))
        if a in active and a not in members
    ]
    widest = max(dims.values(), key=lambda v: len(sum(v, [])))
    order = list(dict.fromkeys([*sum(widest, []), *(a for v in dims.values() for a in sum(v, []))]))
    outputs = [n for n in nodes if not any(u in members for u in n.users)]
    sizes = {a: int(axes.size(a)) for a in order if axes.size(a).is_Integer}
    return Region(nodes, inputs, outputs, dims, order, set(next(iter(rows), ())), sizes)


def twins_of(region: Region, first: fx.Node, second: fx.Node) -> Twins | None:
    """How two inputs of a region read the same tensor, if they do it along different axes."""
    (root, chain), (other, second_chain) = source_of(first), source_of(second)
    if root is not other:
        return None
    steps = zip(chain, second_chain, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda step: step[0] is step[1], steps))
    source = chain[common - 1] if common else root
    chain, second_chain = chain[common:], second_chain[common:]
    axes = Axes()
    axes.fresh(source)
    try:
        for node in [*chain, *second_chain]:
            assign(node, axes)
    except AxesError:
        return None
    pairs: list[tuple[int, int]] = []
    dims: list[list[int]] = []
    for dim in axes.dims(source):
        dims.append([])
        for atom in dim:
            a, b = (places(n, atom, axes, region) for n in (first, second))
            if a is None or b is None or len(a) != len(b):
                return None
            pairs += zip(a, b, strict=True)
            dims[-1] += a
    one, two = ({p[i] for p in pairs} for i in (0, 1))
    apart = all(a == b or (a not in two and b not in one) for a, b in pairs)
    return Twins(source, first, second, dims, pairs) if apart and one != two else None


def source_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The tensor that a node is a view of, and the views from there on."""
    chain: list[fx.Node] = []
    while node.op == "call_function" and node.target in table.VIEWS:
        chain.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return node, chain


def places(node: fx.Node, atom: int, axes: Axes, region: Region) -> list[int] | None:
    """The region's axes along which an input has an atom of its source."""
    for own, dims in zip(axes.dims(node), region.dims[node], strict=True):
        if own == [atom]:
            return dims
    return None


def axes_of(nodes: list[fx.Node], apart: Collection[fx.Node] = ()) -> Axes:
    """The axes of nodes, new ones where they have no common factors with those of the operands.

    `apart`: nodes that get new ones, so that views of one tensor may read it along two axes.
    """
    axes = Axes()
    for node in nodes:
        assign(node, axes, strict=False)
        if node in apart:
            axes.fresh(node)
    return axes


def reduced_axes(node: fx.Node, axes: Axes) -> list[int]:
    if node.target not in table.REDUCTIONS:
        return []
    dims = axes.dims(node.args[0])  # type: ignore[arg-type]
    return [a for d in reduction(node)[0] for a in dims[d]]


def assign(node: fx.Node, axes: Axes, *, strict: bool = True) -> None:
    """Give `node` the axes that follow from its operands'."""
    operands = operands_of(node)
    for operand in operands:
        if operand not in axes:
            axes.fresh(operand)
    try:
        _assign(node, axes, operands)
    except AxesError:
        if strict:
            raise
        axes.fresh(node)


def _assign(node: fx.Node, axes: Axes, operands: list[fx.Node]) -> None:
    target = node.target
    if target in table.REDUCTIONS:
        axes.reduce(node, operands[0], *reduction(node))
    elif target not in table.VIEWS:
        axes.broadcast(node, operands)
    else:
        name = str(target).split(".")[1]
        rank = operands[0].meta["val"].dim()
        args: Any = node.args
        if name == "permute":
            axes.permute(node, operands[0], [d % rank for d in args[1]])
        elif name == "transpose":
            order = list(range(rank))
            a, b = args[1] % max(rank, 1), args[2] % max(rank, 1)
            if rank:
                order[a], order[b] = order[b], order[a]
            axes.permute(node, operands[0], order)
        elif name == "t":
            axes.permute(node, operands[0], list(reversed(range(rank))))
        elif name in ("expand", "expand_as"):
            axes.broadcast(node, operands[:1])
        elif name == "movedim":
            raise AxesError("movedim")
        else:
            axes.view(node, operands[0])
