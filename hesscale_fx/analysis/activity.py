"""What a derivative passes on its way from the differentiated leaves to the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from hesscale_fx.structures.region import is_constant


def active_nodes(
    graph: fx.Graph,
    loss: fx.Node,
    leaves: Iterable[fx.Node],
    constants: Collection[fx.Node] = (),
) -> set[fx.Node]:
    """Nodes that depend on a leaf and that the loss depends on, differentiably.

    `constants`: nodes known to pass no derivative on.
    """
    reached = set(leaves)
    for node in graph.nodes:
        follows = node.op == "call_function" and any(a in reached for a in node.all_input_nodes)
        if follows and node not in constants and not is_constant(node):
            reached.add(node)
    needed: set[fx.Node] = {loss} & reached
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(a for a in node.all_input_nodes if a in reached)
    return needed


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all they depend on."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
