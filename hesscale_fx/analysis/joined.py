"""Which nodes are one operator.

Calls of the user that are several units, functions of matrices that are products, and what complex
numbers flow through.

A complex value between two units has its real and its imaginary part, whose common second
derivative would be dropped; so what gives a complex value is put together with what uses it, up to
where it is real again.
"""

from __future__ import annotations

import torch
from torch import fx

from hesscale_fx.analysis.exactness import rank
from hesscale_fx.analysis.groups import Groups
from hesscale_fx.analysis.join import Joiner
from hesscale_fx.analysis.kinds import is_part, is_region_node, operands_of
from hesscale_fx.calls import call_of
from hesscale_fx.structures import Structure, table
from hesscale_fx.structures.composite import Composite
from hesscale_fx.structures.contraction import Contraction
from hesscale_fx.structures.region import reduction

aten = torch.ops.aten
TAKE = (aten.select.int, aten.slice.Tensor)


def join_calls(joiner: Joiner, inside: set[fx.Node]) -> None:
    """Make one operator of each call of the user; of one across the boundary, of each side.

    Args:
        joiner: the graph.
        inside: the nodes before the boundary, if it matters.
    """
    found: dict[tuple, list[fx.Node]] = {}
    for node in joiner.primitives.graph.nodes:
        call = call_of(joiner.primitives.source[node]) if node in joiner.active else None
        if call is not None and node.op == "call_function":
            found.setdefault((call, node in inside), []).append(node)
    for (call, _), nodes in found.items():
        joiner.join(call[0], nodes)


def join_products(joiner: Joiner, inside: set[fx.Node]) -> None:
    """Let a function of matrices take in the product that only it uses: ``pinv(a @ b.mT)``."""
    for node in list(joiner.primitives.graph.nodes):
        if node not in joiner.active or not is_of_matrices(node):
            continue
        members = dict.fromkeys([node, *(u for u in node.users if is_part(u))])
        waiting = operands_of(node)
        while waiting:
            operand = waiting.pop()
            used = [u for u in operand.users if u in joiner.active]
            product = isinstance(structure_at(operand), Contraction)
            seen_through = operand.target in table.VIEWS | table.IDENTITIES
            if operand not in joiner.active or any(u not in members for u in used):
                continue
            if product or seen_through:
                members[operand] = None
                waiting += [] if product else operands_of(operand)
        has_product = any(isinstance(structure_at(n), Contraction) for n in members)
        if has_product and len({n in inside for n in members}) == 1:
            joiner.join(joiner.primitives.source[node].name, members)


def is_of_matrices(node: fx.Node) -> bool:
    """Whether it is, or is made of, a function that takes each matrix as a whole."""
    if isinstance(node.target, Composite):
        return any(map(is_of_matrices, node.target.nodes))
    return getattr(structure_at(node), "core", None) == 2


def structure_at(node: fx.Node) -> Structure | None:
    """The structure of a call that is a unit of its own."""
    if node.op != "call_function":
        return None
    return table.structure_of(node.target, node.args, node.kwargs)


def join_complex(joiner: Joiner, inside: set[fx.Node]) -> None:
    """Make one operator of what gives complex values, what uses them, and where they meet again."""
    nodes = [n for n in joiner.primitives.graph.nodes if n in joiner.active]
    groups = Groups(nodes)
    for node in nodes:
        if is_complex(node):
            users = [u for u in node.users if u in joiner.active]
            groups.join([node, *users])
    for group in groups.sets():
        if not any(map(is_complex, group)):
            continue
        members = [n for n in group if n.op == "call_function"]
        members += meeting(members, nodes, joiner.active)
        if len({n in inside for n in members}) == 1:
            joiner.join(str(joiner.primitives.source[members[0]].name), members)


def is_complex(node: fx.Node) -> bool:
    """Whether a node gives a complex value, or is a call of several outputs with one."""
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in values)


def meeting(members: list[fx.Node], nodes: list[fx.Node], active: set[fx.Node]) -> list[fx.Node]:
    """The functions of single elements of `members` alone, down to where two of them meet.

    Such as the square root of the sum of squares of a real and an imaginary part, be they taken
    apart as two tensors or stand in pairs along a last dimension.
    """
    inside = set(members)
    reached: dict[fx.Node, set[fx.Node]] = {}  # such a function -> the parts that it depends on
    pairs = {n for n in inside if n.target is aten.view_as_real.default}
    meets: set[fx.Node] = set()
    for node in nodes:
        operands = [a for a in dict.fromkeys(operands_of(node)) if a in active]
        known = operands and all(a in inside or a in reached for a in operands)
        if node in inside or not known or not (node.target in TAKE or is_region_node(node)):
            continue
        if node.target in table.REDUCTIONS:
            if operands[0] not in pairs or reduction(node)[0] != [rank(operands[0]) - 1]:
                continue
            meets.add(node)
        elif pairs.issuperset(operands) and table.is_pointwise(node.target):
            pairs.add(node)
        parts = set().union(*(reached.get(a, {a}) for a in operands))
        reached[node] = {node} if node.target in TAKE else parts
        if len(operands) > 1 and len(reached[node]) > 1:
            meets.add(node)
    kept: dict[fx.Node, None] = {}
    for node in reversed(list(reached)):
        if node in meets or any(u in kept for u in node.users):
            kept[node] = None
    return list(kept)
