"""Results that are the caller's own: no views of arguments, parameters, buffers or each other."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.simplify import is_view, is_write

aten = torch.ops.aten


def base(node: Any) -> fx.Node:
    """The node whose memory a value may be a view of, or the node itself."""
    while node.op == "call_function" and node.args:
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            break
        listed = node.target is operator.getitem and is_view(source)  # one of several views
        if not listed and (is_write(node) or not is_view(node)):
            break
        node = source
    return node


def is_given(node: fx.Node) -> bool:
    """Whether it is an argument, a parameter or a buffer."""
    return node.op in ("placeholder", "get_attr")


def own_results(graph: fx.Graph) -> list[fx.Node]:
    """Copy what is returned where its memory is something else's as well.

    The gradient of ``(w * buffer).sum()`` is the buffer, which the model may write to afterwards
    and the caller may not write to. Results with several entries in one place are copied too.

    Returns:
        The copies.
    """
    (output,) = graph.find_nodes(op="output")
    copying = graph.find_nodes(op="call_function", target=aten.copy_.default)
    writes = [n for n in copying if is_given(base(n.args[0]))]  # all of them come last
    first = min([*writes, output])
    taken: set[fx.Node] = set()
    copies: list[fx.Node] = []

    def own(value: fx.Node) -> fx.Node:
        origin = base(value)
        shared = is_given(origin) or origin in taken
        taken.add(origin)
        if not shared and not overlaps(value.meta["val"]):
            return value
        with graph.inserting_before(first):
            copied = graph.call_function(aten.clone.default, (value,))
        copied.meta["val"] = value.meta["val"]
        copies.append(copied)
        return copied

    output.args = (fx.node.map_arg(output.args[0], own),)
    return copies


def overlaps(value: Any) -> bool:
    """Whether an expanded tensor has one entry in several places."""
    return isinstance(value, Tensor) and any(
        isinstance(size, int) and size > 1 and stride == 0
        for size, stride in zip(value.shape, value.stride(), strict=True)
    )
