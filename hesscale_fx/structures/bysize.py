"""Functions whose trace depends on the sizes of the example, by their like whose trace does not.

The kernels of the first two and the checks of grid_sample ask for sizes as numbers. Distances are
computed by differences up to 25 rows and by products above, which have another curvature: here by
differences at every size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.whole import replaces

MODE = "use_mm_for_euclid_dist_if_necessary"


def is_free(*tensors: Tensor) -> bool:
    """Whether a size is a symbol."""
    return any(not isinstance(n, int) for t in tensors for n in t.shape)


@replaces(torch, "take_along_dim")
@replaces(torch.Tensor, "take_along_dim")
def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None, **options: Any) -> Any:
    """torch.take_along_dim by torch.gather; both are broadcast but for `dim`."""
    if dim is None:
        return take_along_dim(input.reshape(-1), indices.reshape(-1), 0, **options)
    if not (is_free(input, indices) and -input.dim() <= dim < input.dim() == indices.dim()):
        return torch.ops.aten.take_along_dim(input, indices, dim, **options)
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
    if options or not is_free(input, mask) or mask.dtype is not torch.bool:
        return torch.ops.aten.masked_select(input, mask, **options)
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask]


@replaces(torch, "cdist")
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = MODE) -> Tensor:
    """torch.cdist by differences, unless products are asked for."""
    mode = 1 if compute_mode == "use_mm_for_euclid_dist" else 2
    return torch.ops.aten.cdist(x1, x2, p, mode)


@replaces(torch, "grid_sampler")
def grid_sampler(input: Tensor, grid: Tensor, *options: Any) -> Tensor:
    """torch.grid_sampler by the operator of as many dimensions, where the shapes fit."""
    dims = input.dim() - 2
    fits = dims in (2, 3) and grid.dim() == input.dim() and grid.shape[-1] == dims
    if not (fits and is_free(input, grid)):
        return torch.ops.aten.grid_sampler(input, grid, *options)
    torch._check(input.shape[0] == grid.shape[0])
    sample = torch.ops.aten.grid_sampler_2d if dims == 2 else torch.ops.aten.grid_sampler_3d
    return sample(input, grid, *options)
