"""Let what sums over several axes sum over a row first, where a region has sums over that row.

A region has one row. The mean of all losses of a batch, whose terms hold sums over the classes, is
the mean over the samples of means over the classes, of which the inner one is of the same row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hesscale_fx.analysis.axes import Axes
from hesscale_fx.analysis.groups import Groups
from hesscale_fx.analysis.kinds import flat_nodes, is_linear, is_region_node, operands_of
from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.regions import assign, reduced_axes

aten = torch.ops.aten
# The reductions that may be taken along some dimensions first, and what takes them.
IN_TURN: dict[Any, Any] = {
    aten.sum.default: aten.sum.dim_IntList,
    aten.sum.dim_IntList: aten.sum.dim_IntList,
    aten.mean.default: aten.mean.dim,
    aten.mean.dim: aten.mean.dim,
}


def sum_in_turn(primitives: Primitives, active: set[fx.Node], loss: fx.Node) -> bool:
    """Split such reductions of the primitive graph; whether there was one."""
    flat = {n for n in flat_nodes(primitives.graph, loss, active) if is_linear(n, active)}
    curved = [
        n for n in primitives.graph.nodes if n in active and n not in flat and is_region_node(n)
    ]
    if not any(n.target in IN_TURN for n in curved):
        return False
    groups = Groups(curved)
    for node in curved:
        groups.join([node, *(u for u in node.users if u in groups)])
    found = [split(group, primitives) for group in groups.sets()]
    return any(found)


def split(nodes: list[fx.Node], primitives: Primitives) -> bool:
    """Split the reductions among connected nodes."""
    axes = Axes()
    for node in nodes:
        assign(node, axes, strict=False)
    found = False
    below: dict[fx.Node, set[frozenset[int]]] = {}  # the rows that a node depends on
    for node in nodes:
        before: set[frozenset[int]] = set().union(*(below.get(a, set()) for a in operands_of(node)))
        reduced = frozenset(reduced_axes(node, axes))
        inner = max((row for row in before if row < reduced), key=len, default=None)
        if node.target in IN_TURN and inner:
            x: Any = node.args[0]
            dims = [d for d, atoms in enumerate(axes.dims(x)) if atoms and inner.issuperset(atoms)]
            if inner == {a for d in dims for a in axes.dims(x)[d]}:
                insert(node, dims, primitives)
                found = True
        below[node] = before | ({reduced} if reduced else set())
    return found


def insert(node: fx.Node, dims: list[int], primitives: Primitives) -> None:
    """Let a reduction reduce what has been reduced along `dims`."""
    x: Any = node.args[0]
    target = IN_TURN[node.target]
    with primitives.graph.inserting_before(node):
        inner = primitives.graph.call_function(target, (x, dims, True))
    inner.meta["val"] = target(x.meta["val"], dims, True)
    primitives.source[inner] = primitives.source[node]
    node.replace_input_with(x, inner)
