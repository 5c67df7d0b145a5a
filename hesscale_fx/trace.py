"""Turn calls on tensors into nodes of an fx graph.

Rules are plain functions on tensors. `trace` runs one on fake tensors and records every call it
makes (autograd's own formulas included) in a small graph, a template; `inline` copies a template
into another graph. What has been traced for operands of one kind serves all others of that kind, so
that a model of many equal layers costs what one of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    get_proxy_slot,
    track_tensor_tree,
)

from hesscale_fx.algebra import simplify_template
from hesscale_fx.simplify import functionalize


class Tracer:
    """An fx graph under construction and the fake tensors that stand for its nodes."""

    def __init__(self, fake_mode: Any) -> None:
        self._tracer = PythonKeyTracer()
        self._tracer.root = nn.Module()
        self._tracer.graph = fx.Graph()
        self._fake_mode = fake_mode
        self._mode = ProxyTorchDispatchMode(self._tracer, "symbolic")

    @property
    def graph(self) -> fx.Graph:
        return self._tracer.graph

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every ATen call inside becomes a node; nothing is computed."""
        # The Python dispatcher has formulas for symbolic sizes where the kernels bake them in.
        with self._fake_mode, enable_python_dispatcher(), self._mode, torch.no_grad():
            yield

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """What is recorded inside belongs to one flowing quantity."""
        before = len(self.graph.nodes)
        yield
        for node in list(self.graph.nodes)[before:]:
            node.meta["hesscale_role"] = name

    def create(self, op: str, target: Any, args: tuple = (), name: str | None = None) -> fx.Proxy:
        return self._tracer.create_proxy(op, target, args, {}, name=name)

    def track(self, value: Any, proxy: Any) -> Any:
        """Let `value` (a tensor, or a tuple of them) stand for the node of `proxy`."""
        return track_tensor_tree(value, proxy, constant=None, tracer=self._tracer)

    def record(self, target: Any, args: tuple, value: Any) -> Any:
        """Let `value` stand for one new node, the call of `target` with tensors tracked before."""
        proxies = pytree.tree_map_only(
            torch.Tensor, lambda t: get_proxy_slot(t, self._tracer).proxy, args
        )
        name = getattr(target, "overloadpacket", target).__name__
        return self.track(value, self.create("call_function", target, proxies, name))

    def node(self, value: torch.Tensor) -> fx.Node:
        """The node that a tensor stands for."""
        return get_proxy_slot(value, self._tracer).proxy.node

    def has(self, value: torch.Tensor) -> bool:
        return get_proxy_slot(value, self._tracer, None) is not None


@dataclass
class Template:
    """A function traced once: placeholders for its operands, then its calls."""

    graph: fx.Graph
    outputs: list[fx.Node | None]  # None where the function gave None


def trace(
    function: Callable[[list[Any], Tracer], list[Any]], values: list[Any], fake_mode: Any
) -> Template:
    """Record what `function` does with fake `values` (tensors or symbolic sizes)."""
    tracer = Tracer(fake_mode)
    values = distinct(values)
    with tracer.recording():
        for i, value in enumerate(values):
            tracer.track(value, tracer.create("placeholder", f"operand_{i}"))
        outputs = function(values, tracer)
    nodes = [None if o is None else tracer.node(o) for o in outputs]
    # The outputs take part in what functionalizing replaces.
    ends = tracer.graph.output([n for n in nodes if n is not None])
    functionalize(tracer.graph)
    simplify_template(tracer.graph, fake_mode)
    kept = iter(ends.args[0])
    results = [None if n is None else next(kept) for n in nodes]
    tracer.graph.erase_node(ends)
    return Template(tracer.graph, results)


def distinct(values: list[Any]) -> list[Any]:
    """Copies of templates share fake tensors; operands that share one must be told apart."""
    seen: set[int] = set()
    result = []
    for value in values:
        if isinstance(value, torch.Tensor) and id(value) in seen:
            value = value.detach()
        seen.add(id(value))
        result.append(value)
    return result


def inline(
    graph: fx.Graph,
    template: Template,
    inputs: list[fx.Node],
    mark: Callable[[fx.Node, str], None],
) -> list[fx.Node | None]:
    """Copy a template's calls to the end of `graph`; `mark` is told each new node and its role."""
    env: dict[fx.Node, fx.Node] = {}
    pending = iter(inputs)
    for inner in template.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(pending)
            continue
        env[inner] = graph.node_copy(inner, env.__getitem__)
        mark(env[inner], inner.meta.get("hesscale_role", ""))
    return [None if o is None else env[o] for o in template.outputs]


def kind_of(node: fx.Node) -> Any:
    """What a trace may depend on of an operand: type, sizes and strides, not the value."""
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        layout = (*value.shape, *value.stride())
        pending = value.is_conj(), value.is_neg()  # what a view leaves to the next kernel to do
        return (value.dtype, value.device, tuple(map(str, layout)), pending)
    return str(value)
