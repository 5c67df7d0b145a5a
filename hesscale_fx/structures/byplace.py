"""Functions that PyTorch traces with the sizes of the example, by their like that leaves them free.

Both have kernels that ask for sizes as numbers, which would fix the size of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.whole import replaces


@replaces(torch, "take_along_dim")
@replaces(torch.Tensor, "take_along_dim")
def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None, **options: Any) -> Any:
    """torch.take_along_dim by torch.gather; both are broadcast but for `dim`."""
    if dim is None:
        return torch.gather(input.reshape(-1), 0, indices.reshape(-1), **options)
    if not -input.dim() <= dim < input.dim() == indices.dim():
        return torch.ops.aten.take_along_dim(input, indices, dim, **options)  # its own error
    dim %= input.dim()
    sizes = [list(input.shape), list(indices.shape)]
    for shape in sizes:
        shape[dim] = 1
    shape = torch.broadcast_shapes(*sizes)
    input, indices = (
        t.expand(*shape[:dim], t.shape[dim], *shape[dim + 1 :]) for t in (input, indices)
    )
    return torch.gather(input, dim, indices, **options)


@replaces(torch, "masked_select")
@replaces(torch.Tensor, "masked_select")
def masked_select(input: Tensor, mask: Tensor, **options: Any) -> Any:
    """torch.masked_select by indexing."""
    if options or mask.dtype is not torch.bool:
        return torch.ops.aten.masked_select(input, mask, **options)
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask]
