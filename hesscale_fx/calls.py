"""Which call of the user each node of a capture comes from: ``torch.cov(x)`` and its many nodes.

torch.export notes the outermost function of torch that ran. Below autograd a mode of ours does.
"""

from __future__ import annotations

from typing import Any

import torch.fx.traceback
from torch import fx
from torch.overrides import TorchFunctionMode

KEY = "hesscale_call"
# What a trace of one node into several has to hand on.
NOTED = ("torch_fn", "custom")


class NoteCalls(TorchFunctionMode):
    """Notes in each recorded node the outermost function of torch that ran, and its number."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; a mode sees no calls from within it."""
        self._count += 1
        name = getattr(func, "__name__", str(func))
        if (getattr(func, "__module__", None) or "").startswith("torch.autograd"):
            return func(*args, **(kwargs or {}))  # what it records are the calls of others
        with torch.fx.traceback.annotate({KEY: (name, self._count)}):
            return func(*args, **(kwargs or {}))


def call_of(node: fx.Node) -> tuple[str, Any] | None:
    """The name of the function that a captured node comes from, and what tells the call apart."""
    noted = (node.meta.get("custom") or {}).get(KEY)
    if noted is not None:
        return noted[0], noted
    exported = node.meta.get("torch_fn")
    if exported is None:
        return None
    return exported[0].rsplit("_", 1)[0], exported
