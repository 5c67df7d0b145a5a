"""Write an operator out inside a captured graph, tracing its definition once for each kind of call.

Decomposing traces every call anew; of a model of many equal layers this traces one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from hesscale_fx.trace import Template, Tracer, inline, kind_of, trace

aten = torch.ops.aten


def write_in(graph: fx.Graph, definitions: Mapping[Any, Callable], fake_mode: Any) -> None:
    """Replace the calls of these operators by their definitions."""
    templates: dict[Any, Template] = {}
    for node in list(graph.nodes):
        if node.target in definitions:
            written = _write(graph, node, definitions[node.target], templates, fake_mode)
            if isinstance(node.meta["val"], Tensor):
                node.replace_all_uses_with(written[0])
            for part in list(node.users):  # of several outputs
                part.replace_all_uses_with(written[part.args[1]])
                graph.erase_node(part)
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
            results = pytree.tree_leaves(definition(*args, **kwargs))
            values = pytree.tree_leaves(node.meta["val"])
            return [in_order(r, layout(v)) for r, v in zip(results, values, strict=True)]

        templates[key] = trace(call, [n.meta["val"] for n in inputs], fake_mode)
        keep_linear(templates[key])

    def mark(made: fx.Node, role: str) -> None:
        for name in ("stack_trace", "nn_module_stack"):
            if name in node.meta:
                made.meta[name] = node.meta[name]

    with graph.inserting_before(node):
        return inline(graph, templates[key], inputs, mark)


def keep_linear(template: Template) -> None:
    """One call for a linear layer, which a trace has seen as ``addmm(bias, x, t(weight))``."""
    for node in list(template.graph.nodes):
        if node.target not in (aten.addmm.default, aten.mm.default) or node.kwargs:
            continue
        *bias, x, transposed = node.args
        if isinstance(transposed, fx.Node) and transposed.target is aten.t.default:
            node.target, node.args = aten.linear.default, (x, transposed.args[0], *bias)
            if not transposed.users and transposed not in template.outputs:
                template.graph.erase_node(transposed)


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
