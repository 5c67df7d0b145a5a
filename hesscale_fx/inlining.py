"""Write an operator out inside a captured graph, tracing its definition once for each kind of call.

Decomposing traces every call anew; of a model of many equal layers this traces one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from hesscale_fx.trace import Template, Tracer, inline, kind_of, trace


def write_in(graph: fx.Graph, definitions: Mapping[Any, Callable], fake_mode: Any) -> None:
    """Replace the calls of operators that give one tensor by their definitions."""
    templates: dict[Any, Template] = {}
    for node in list(graph.nodes):
        if node.target in definitions:
            (written,) = _write(graph, node, definitions[node.target], templates, fake_mode)
            node.replace_all_uses_with(written)
            graph.erase_node(node)


def _write(
    graph: fx.Graph,
    node: fx.Node,
    definition: Callable,
    templates: dict[Any, Template],
    fake_mode: Any,
) -> list[Any]:
    leaves, spec = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
    inputs = [v for v in leaves if isinstance(v, fx.Node)]
    constants = [None if isinstance(v, fx.Node) else v for v in leaves]
    key = (node.target, repr(constants), repr(spec), tuple(map(kind_of, [*inputs, node])))
    if key not in templates:

        def call(values: list[Any], tracer: Tracer) -> list[Any]:
            rest = iter(values)
            filled = [next(rest) if isinstance(v, fx.Node) else v for v in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return [in_order(definition(*args, **kwargs), layout(node.meta["val"]))]

        templates[key] = trace(call, [n.meta["val"] for n in inputs], fake_mode)

    def mark(made: fx.Node, role: str) -> None:
        for name in ("stack_trace", "nn_module_stack"):
            if name in node.meta:
                made.meta[name] = node.meta[name]

    with graph.inserting_before(node):
        return inline(graph, templates[key], inputs, mark)


def layout(value: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    strides = [s if isinstance(s, int) else s.node.hint for s in value.stride()]
    return sorted(range(value.dim()), key=lambda d: -strides[d])


def in_order(value: Tensor, order: list[int]) -> Tensor:
    """The same tensor in another layout, which the views that follow rely on."""
    if layout(value) == order:
        return value
    back = [order.index(d) for d in range(value.dim())]
    return value.permute(order).contiguous().permute(back)
