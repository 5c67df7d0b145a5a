"""Turn calls on tensors into nodes of an fx graph.

Rules are plain functions on tensors. Run inside `Tracer.recording()` on the fake tensors of the
graph, every ATen call they make (autograd's own formulas included) becomes a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    decompose,
    get_proxy_slot,
    track_tensor_tree,
)


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
        table = {torch.ops.aten.constant_pad_nd.default: crop_or_pad}
        with self._fake_mode, self._mode, decompose(table), torch.no_grad():
            yield

    def create(self, op: str, target: Any, args: tuple = (), kwargs: Any = None) -> fx.Proxy:
        return self._tracer.create_proxy(op, target, args, kwargs or {})

    def track(self, value: Any, proxy: Any) -> Any:
        """Let `value` (a tensor, or a tuple of them) stand for the node of `proxy`."""
        return track_tensor_tree(value, proxy, constant=None, tracer=self._tracer)

    def call(self, target: Callable, args: tuple, kwargs: dict[str, Any], value: Any) -> fx.Node:
        """Record one whole call, whose result is known to be `value`, without decomposing it."""
        proxied = pytree.tree_map(self._proxy, (args, kwargs))
        proxy = self._tracer.create_proxy("call_function", target, *proxied)
        self.track(value, proxy)
        return proxy.node

    def node(self, value: torch.Tensor) -> fx.Node:
        """The node that a tensor stands for."""
        return get_proxy_slot(value, self._tracer).proxy.node

    def has(self, value: torch.Tensor) -> bool:
        return get_proxy_slot(value, self._tracer, None) is not None

    def _proxy(self, value: Any) -> Any:
        slot: Any = None
        if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            slot = get_proxy_slot(value, self._tracer, None)
        if slot is None:
            return value
        return slot.proxy if isinstance(value, torch.Tensor) else slot.force()


def crop_or_pad(x: torch.Tensor, pad: list[int], value: float = 0) -> torch.Tensor:
    """Autograd's formula of padding crops by negative padding, which symbolic sizes do not take."""
    if not all(isinstance(p, int) and p <= 0 for p in pad):
        return NotImplemented
    for i in range(0, len(pad), 2):
        dim = x.dim() - 1 - i // 2
        x = (
            torch.ops.aten.slice.Tensor(x, dim, -pad[i], x.shape[dim] + pad[i + 1])
            if pad[i] or pad[i + 1]
            else x
        )
    return x
