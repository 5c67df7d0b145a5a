"""What a node of the primitive graph is."""

from __future__ import annotations

import operator

import torch
from torch import fx

from hesscale_fx import structures
from hesscale_fx.structures import table


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in order, a node that is an operand twice listed twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))]


def is_region_node(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and table.is_region(node.target)
        and not table.any_complex((node.args, node.kwargs))
    )


def is_part(node: fx.Node) -> bool:
    """An output of a multi-output operator; it belongs to the operator's unit."""
    return node.target is operator.getitem


def is_linear(node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether an operator is linear in all its active operands jointly."""
    if is_part(node) or node.target in table.VIEWS or node.target in table.IDENTITIES:
        return True
    operands = [a for a in operands_of(node) if a in active]
    if node.target in table.REDUCTIONS:
        return True  # a maximum is linear but for ties
    if node.target in table.LINEAR_POINTWISE:
        return True
    if node.target in table.PRODUCTS:
        return (
            len(operands) == 1
            and node.args[0] is operands[0]
            or (len(operands) == 1 and "mul" in str(node.target))
        )
    structure = structures.structure_of(node.target, node.args, node.kwargs)
    if structure is None:
        return False
    return structure.linear or (getattr(structure, "in_each", False) and len(operands) == 1)


def flat_nodes(graph: fx.Graph, loss: fx.Node, active: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose Hessian is zero: only linear functions lie between them and the loss."""
    flat = {loss}
    for node in reversed(graph.nodes):
        if node in active and node.op == "call_function":
            users = [u for u in node.users if u in active]
            if users and all(u in flat and is_linear(u, active) for u in users):
                flat.add(node)
    return flat
