"""Random signs, which a graph takes as inputs and every call draws afresh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.printers import PythonPrinter


@dataclass
class Signs:
    """One tensor of random signs."""

    shape: list[int | tuple[list[str], Callable]]  # a size, or free sizes and what it is of them
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, node: fx.Node) -> Signs:
        """The signs that a placeholder stands for."""
        value = node.meta["val"]
        return cls([size_from(s) for s in value.shape], value.dtype, value.device)

    def draw(self, sizes: Mapping[str, int], generator: torch.Generator | None) -> Tensor:
        """Draw them where the free sizes are `sizes`."""
        shape = [s if isinstance(s, int) else s[1](*(sizes[n] for n in s[0])) for s in self.shape]
        bits = torch.randint(0, 2, shape, generator=generator, dtype=self.dtype, device=self.device)
        return 2 * bits - 1


def size_from(size: Any) -> Any:
    """A size, or the names of free sizes and a function of them."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    names = sorted(map(str, expr.free_symbols))
    return names, eval(f"lambda {', '.join(names)}: {PythonPrinter().doprint(expr)}")
