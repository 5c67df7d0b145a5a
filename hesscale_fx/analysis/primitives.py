"""Write operators with a definition out, so that regions can be seen through them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hesscale_fx import structures
from hesscale_fx.structures import definitions
from hesscale_fx.trace import Tracer


@dataclass
class Primitives:
    """The captured graph with definitions written out, for analysis.

    `of` maps each captured node to the primitive node with its value; `source` each primitive node
    to the captured node it came from.
    """

    graph: fx.Graph
    of: dict[fx.Node, fx.Node]
    source: dict[fx.Node, fx.Node]
    defined: set[fx.Node]  # captured nodes that were written out
    whole: dict[fx.Node, fx.Node]  # nodes that repeat a captured multi-output call as it is


def write_out(graph: fx.Graph, fake_mode: Any) -> Primitives:
    """The same graph with every operator that has a definition replaced by it."""
    tracer = Tracer(fake_mode)
    values: dict[fx.Node, Any] = {}
    source: dict[fx.Node, fx.Node] = {}
    defined: set[fx.Node] = set()
    whole: dict[fx.Node, fx.Node] = {}
    with tracer.recording():
        for node in graph.nodes:
            if node.op == "output":
                continue
            before = len(tracer.graph.nodes)
            values[node] = _write(node, tracer, values, defined, whole)
            for new in list(tracer.graph.nodes)[before:] if before else tracer.graph.nodes:
                source[new] = node
                new.meta.setdefault("stack_trace", node.meta.get("stack_trace"))
    of = {
        node: tracer.node(value)
        for node, value in values.items()
        if isinstance(value, torch.Tensor) and tracer.has(value)
    }
    return Primitives(tracer.graph, of, source, defined, whole)


def _write(
    node: fx.Node, tracer: Tracer, values: dict[fx.Node, Any], defined: set, whole: dict
) -> Any:
    if node.op != "call_function":
        proxy = tracer.create(node.op, node.target, node.args)
        proxy.node.meta["val"] = node.meta["val"]
        return tracer.track(node.meta["val"], proxy)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
        return args[0][args[1]]  # type: ignore[index]
    definition = structures.definition_of(node.target)
    value = node.meta.get("val")
    if definition is None or not is_floating(node) or isinstance(value, (tuple, list)):
        made = tracer.call(node.target, args, kwargs, value)  # type: ignore[arg-type]
        if isinstance(value, (tuple, list)):
            whole[made] = node
    if definition is None or not is_floating(node):
        return value
    if isinstance(value, (tuple, list)) and node.target in definitions.READS_OUTPUTS:
        saved = [v.detach() if isinstance(v, torch.Tensor) else v for v in value]
        kwargs = {**kwargs, "saved": saved}
    defined.add(node)
    out = definition(*args, **kwargs)
    if not isinstance(value, (tuple, list)):
        return out
    return [v if o is None else o for o, v in zip(out, value, strict=False)]


def is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(first, torch.Tensor) and first.is_floating_point()
