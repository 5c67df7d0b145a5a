"""The emitted graph under the profiler: each node is a range of its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.profiler import record_function

from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.inspect.nodes import records

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule


class Named(fx.Interpreter):
    """Runs a graph with a range of the profiler around each call."""

    def run_node(self, node: fx.Node) -> Any:
        """Run one node."""
        if node.op != "call_function":
            return super().run_node(node)
        with record_function(node.name):
            return super().run_node(node)


def named(graph: fx.Graph) -> Callable:
    """A function of the module and its inputs that runs `graph` so."""

    def run(module: torch.nn.Module, *tensors: Any) -> Any:
        return Named(module, graph=graph).run(*tensors)

    return run


def times(hs: HesScaleModule, profile: Any, by: str = "role") -> dict[str, float]:
    """Sum what a profile says of the calls of `hs`.

    A call under an active profiler (not compiled) shows every node as a range of its name.

    Args:
        hs: what was called.
        profile: a finished `torch.profiler.profile`.
        by: ``"role"``, ``"module"``, ``"rule"``, ``"op"`` or ``"name"``.

    Returns:
        Seconds: of the device where the profile has any, else of the CPU.

    Raises:
        InvalidArgumentError: another `by`.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> from torch.profiler import ProfilerActivity, profile
        >>> hs = hesscale_fx.transform(nn.Linear(4, 1), nn.MSELoss())
        >>> x, y = torch.randn(5, 4), torch.randn(5, 1)
        >>> _ = hs.materialize(x, y)
        >>> with profile(activities=[ProfilerActivity.CPU]) as prof:
        ...     _ = hs(x, y)
        >>> sorted(hesscale_fx.inspect.times(hs, prof))
        ['curvature', 'forward', 'gradient']
    """
    if by not in ("role", "module", "rule", "op", "name"):
        raise InvalidArgumentError(f"by={by!r}: choose 'role', 'module', 'rule', 'op' or 'name'.")
    found = records(hs)
    rows = [event for event in profile.key_averages() if event.key in found]
    device = any(event.device_time_total for event in rows)
    total: dict[str, float] = {}
    for event in rows:
        key = getattr(found[event.key], by)
        spent = event.device_time_total if device else event.cpu_time_total
        total[key] = total.get(key, 0.0) + spent / 1e6
    return total
