"""Write operators with a definition out, so that regions can be seen through them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from hesscale_fx import structures
from hesscale_fx.structures import definitions
from hesscale_fx.trace import Template, Tracer, inline, kind_of, trace


@dataclass
class Primitives:
    """The captured graph with definitions written out, for analysis.

    `of` maps each captured node to the primitive node with its value; `source` each primitive node
    to the captured node it came from.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    of: dict[fx.Node, fx.Node] = field(default_factory=dict)
    source: dict[fx.Node, fx.Node] = field(default_factory=dict)
    # Captured nodes that were written out.
    defined: set[fx.Node] = field(default_factory=set)
    # Nodes that repeat a captured multi-output call as it is.
    whole: dict[fx.Node, fx.Node] = field(default_factory=dict)
    # Outputs of composite operators (see join.py) and the nodes that compute them one by one.
    stands_for: dict[fx.Node, fx.Node] = field(default_factory=dict)


def write_out(graph: fx.Graph, fake_mode: Any) -> Primitives:
    """The same graph with every operator that has a definition replaced by it."""
    result = Primitives()
    parts: dict[fx.Node, list[fx.Node]] = {}  # of a multi-output call, its outputs
    templates: dict[Any, Template] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        value = node.meta.get("val")
        if node.target is operator.getitem and node.args[0] in parts:
            result.of[node] = parts[node.args[0]][node.args[1]]
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        definition = structures.definition_of(node.target, args, kwargs)
        written = definition is not None and is_floating(node)
        several = isinstance(value, (tuple, list))
        if not written or several:
            copy = result.graph.node_copy(node, result.of.__getitem__)
            result.source[copy] = node
            result.of[node] = copy
            if several:
                result.whole[copy] = node
                parts[node] = _parts_of(copy, value, result, node)
        if written:
            outputs = _inline(node, definition, parts.get(node), result, templates, fake_mode)
            result.defined.add(node)
            if several:
                parts[node] = [w or p for w, p in zip(outputs, parts[node], strict=True)]
            else:
                assert outputs[0] is not None
                result.of[node] = outputs[0]
    return result


def _parts_of(copy: fx.Node, value: Any, result: Primitives, node: fx.Node) -> list[fx.Node]:
    found = []
    for index, part in enumerate(value):
        item = result.graph.call_function(operator.getitem, (copy, index))
        item.meta["val"] = part
        result.source[item] = node
        found.append(item)
    return found


def _inline(
    node: fx.Node,
    definition: Any,
    parts: list[fx.Node] | None,
    result: Primitives,
    templates: dict[Any, Template],
    fake_mode: Any,
) -> list[fx.Node | None]:
    """Add the definition of `node`; give the primitive node of each output that it defines."""
    leaves, spec = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
    operands = [result.of[v] for v in leaves if isinstance(v, fx.Node)]
    saved = parts if node.target in definitions.READS_OUTPUTS and parts else []
    inputs = [*operands, *saved]
    constants = [None if isinstance(v, fx.Node) else v for v in leaves]
    key = (node.target, repr(constants), repr(spec), tuple(kind_of(n) for n in inputs))
    if key not in templates:

        def call(values: list[Any], tracer: Tracer) -> list[Any]:
            rest = iter(values)
            filled = [next(rest) if isinstance(v, fx.Node) else v for v in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            if saved:
                kwargs["saved"] = [v.detach() for v in rest]
            out = definition(*args, **kwargs)
            return list(out) if isinstance(out, (tuple, list)) else [out]

        templates[key] = trace(call, [n.meta["val"] for n in inputs], fake_mode)

    def mark(made: fx.Node, role: str) -> None:
        made.meta["stack_trace"] = node.meta.get("stack_trace")
        result.source[made] = node

    return inline(result.graph, templates[key], inputs, mark)


def is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(first, torch.Tensor) and first.is_floating_point()
