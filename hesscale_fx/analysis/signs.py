"""Whether the loss is surely convex where it bends, from the signs of what is linear behind it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from hesscale_fx.structures import table

aten = torch.ops.aten

NLL = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default, aten.nll_loss_nd.default}
KEEP = {
    aten.add.Tensor, aten.add.Scalar, aten.sum.default, aten.sum.dim_IntList, aten.mean.default,
    aten.mean.dim,
}  # fmt: skip
FLIP = {aten.neg.default, aten.rsub.Scalar}


def signs(graph: fx.Graph, loss: fx.Node) -> dict[fx.Node, int]:
    """1 where the loss surely grows (or stays) with every entry of a node, -1 where it falls.

    A node that is left out may do either.
    """
    found: dict[fx.Node, int | None] = {loss: 1}
    for node in reversed(graph.nodes):
        sign = found.get(node)
        if node not in found:
            continue
        for i, operand in enumerate(node.args):
            if isinstance(operand, fx.Node):
                passed = None if sign is None else through(node, i)
                mine = None if passed is None or sign is None else sign * passed
                known = found.get(operand, mine)
                found[operand] = mine if known == mine else None
    return {node: sign for node, sign in found.items() if sign is not None}


def through(node: fx.Node, position: int) -> int | None:
    """The sign of the derivative of a call in one operand, or None if it is not known."""
    target: Any = node.target
    if target is operator.getitem:
        return 1 if node.args[1] == 0 else None
    if target in NLL:
        return -1 if position == 0 and (len(node.args) < 3 or node.args[2] is None) else None
    if node.kwargs:
        return None
    if target in KEEP or target in table.VIEWS:
        return 1
    if target in FLIP:
        return -1
    if target is aten.sub.Tensor:
        return 1 if position == 0 else -1
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        other = node.args[1]
        known = isinstance(other, (int, float)) and position == 0
        return None if not known else 1 if other >= 0 else -1  # type: ignore[operator]
    return None


def is_convex(graph: fx.Graph, loss: fx.Node, bent: Iterable[fx.Node]) -> bool:
    """Whether all that bends is a square, or a log-softmax whose output is only taken away."""
    known = signs(graph, loss)
    squares = (aten.pow.Tensor_Scalar, aten.square.default)
    for node in bent:
        is_square = node.target in squares and (len(node.args) < 2 or node.args[1] == 2)
        if known.get(node) != (1 if is_square else -1):
            return False
    return True
