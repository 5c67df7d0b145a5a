"""Part of the forward as a function, for what differentiates it once more."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx import structures


@dataclass
class Recomputed:
    """The calls that depend on some nodes; what is random is not drawn again but enters."""

    nodes: list[fx.Node]
    entering: list[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph, starts: list[fx.Node]) -> Recomputed:
        """What depends on `starts`."""
        drawn: set[fx.Node] = set()
        for node in graph.nodes:
            tags = getattr(node.target, "tags", ())
            part = node.target is operator.getitem and node.args[0] in drawn
            if part or torch.Tag.nondeterministic_seeded in tags:
                drawn.add(node)
        inner = reached(graph, starts) - drawn
        nodes = [n for n in graph.nodes if n in inner]
        entering = dict.fromkeys(a for n in nodes for a in n.all_input_nodes)
        return cls(nodes, [n for n in entering if n not in inner and n not in starts])

    def run(self, known: Mapping[fx.Node, Any], result: fx.Node) -> Tensor:
        """The value of a node, given those of the starts and of all that enters."""
        env = dict(known)
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = structures.differentiable(node.target)(*args, **kwargs)
        return env[result]


def reached(graph: fx.Graph, starts: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls that depend on `starts`."""
    found = set(starts)
    for node in graph.nodes:
        if node.op == "call_function" and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found - set(starts)
