"""Fourier transforms: linear, and dense along the dimensions that they transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.columns import Columns

aten = torch.ops.aten

# Where an operator takes the dimensions, and those it transforms without.
DIMENSIONS: dict[Any, tuple[int, Any]] = {
    **{getattr(aten, f"_fft_{kind}").default: (1, None) for kind in ("c2c", "r2c", "c2r")},
    **{
        getattr(aten, f"fft_{kind}{some}").default: (2, default)
        for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
        for some, default in (("", -1), ("2", (-2, -1)), ("n", None))
    },
}


def dimensions(op: Any, args: tuple, kwargs: Any, rank: int) -> set[int]:
    """Those that a call transforms, of a tensor with `rank` of them."""
    position, default = DIMENSIONS[op]
    found = args[position] if len(args) > position else (kwargs or {}).get("dim", default)
    if found is None:
        return set(range(rank))
    return {d % rank for d in ([found] if isinstance(found, int) else found)}


@dataclass(frozen=True)
class Transform:
    """The dimensions before the first that is transformed number the blocks of the Jacobian."""

    op: Any
    name: str = "linear map"
    linear: bool = True

    def of_call(self, args: tuple, kwargs: Any) -> Columns:
        """The structure of one call."""
        core = None
        if args:
            rank = (args[0] if isinstance(args[0], Tensor) else args[0].meta["val"]).dim()
            core = rank - min(dimensions(self.op, args, kwargs, rank), default=0)
        return Columns(core, linear=True, name=self.name)


def half(whole: Callable, x: Tensor, s: Any = None, dim: Any = -1, norm: Any = None) -> Tensor:
    """The first half of a transform, which is all of a real signal's.

    Of torch's own the second derivative cannot be batched with symbolic sizes, and that of a slice
    fixes them (torch 2.13); that of a product does neither.
    """
    y = whole(x, s, dim, norm)
    last = -1 if dim is None else dim if isinstance(dim, int) else dim[-1]
    first = torch.eye(y.shape[last], y.shape[last] // 2 + 1, dtype=y.dtype, device=y.device)
    return (y.movedim(last, -1) @ first).movedim(-1, last)


# In the place of operators, where they are differentiated twice.
HALVES: dict[Any, Callable] = {
    aten.fft_rfft.default: partial(half, torch.fft.fft),
    aten.fft_rfft2.default: partial(half, torch.fft.fft2, dim=(-2, -1)),
    aten.fft_rfftn.default: partial(half, torch.fft.fftn, dim=None),
}
