"""Write an operator out inside a captured graph, tracing its definition once for each kind of call.

Decomposing traces every call anew; of a model of many equal layers this traces one, and of a
recurrent layer one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from hesscale_fx.calls import NOTED
from hesscale_fx.structures.definitions import STEPS
from hesscale_fx.trace import Template, Tracer, inline, kind_of, trace

aten = torch.ops.aten


def write_in(graph: fx.Graph, definitions: Mapping[Any, Callable], fake_mode: Any) -> None:
    """Replace the calls of these operators by their definitions."""
    templates: dict[Any, Template] = {}
    for table in (definitions, STEPS):  # the steps that definitions are made of come second
        for node in list(graph.nodes):
            if node.target in table:
                written = _write(graph, node, table[node.target], templates, fake_mode)
                _replace(graph, node, written)
    graph.eliminate_dead_code()


def _replace(graph: fx.Graph, node: fx.Node, written: list[Any]) -> None:
    if isinstance(node.meta["val"], Tensor):
        node.replace_all_uses_with(written[0])
    for part in list(node.users):  # of several outputs
        part.replace_all_uses_with(written[part.args[1]])  # type: ignore[index]
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
            with KeptWhole(tracer):
                results = pytree.tree_leaves(definition(*args, **kwargs))
            shown = pytree.tree_leaves(node.meta["val"])
            return [in_order(r, layout(v)) for r, v in zip(results, shown, strict=True)]

        templates[key] = trace(call, [n.meta["val"] for n in inputs], fake_mode)

    def mark(made: fx.Node, role: str) -> None:
        for name in ("stack_trace", "nn_module_stack", *NOTED):
            if name in node.meta:
                made.meta[name] = node.meta[name]

    with graph.inserting_before(node):
        return inline(graph, templates[key], inputs, mark)


class KeptWhole(TorchFunctionMode):
    """What a trace of a definition keeps in one call: linear layers and steps.

    PyTorch's dispatcher takes a linear layer apart and folds its leading dimensions into one.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the call, or leave it to the dispatcher."""
        if func is not linear and func not in STEPS:
            return func(*args, **(kwargs or {}))
        with disable_proxy_modes_tracing():
            if func is not linear:
                state = tuple(s.new_empty(s.shape) for s in args[1])
                return self._tracer.record(func, args, state)
            args = tuple(a for a in args if a is not None)
            return self._tracer.record(aten.linear.default, args, linear(*args))


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
