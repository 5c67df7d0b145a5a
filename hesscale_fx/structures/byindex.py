"""Products by index, written out: PyTorch's derivatives of them ask for values where they are zero.

Here a product is taken over all entries, those of other places counting as one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """aten.scatter_reduce.two, differentiable twice for products too."""
    if reduce != "prod":
        return aten.scatter_reduce.two(x, dim, index, src, reduce, include_self=include_self)
    if x.dim() == 0:
        flat = product_at(x.reshape(1), 0, index.reshape(-1), src.reshape(-1), include_self)
        return flat.reshape(())
    corner = tuple(slice(0, n) for n in index.shape)
    if index.dim() == 0:
        index, src = index.reshape(1), src.reshape(1)
    else:
        src = src[corner]
    return product_at(x, dim % x.dim(), index, src, include_self)


def index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """aten.index_reduce, differentiable twice for products too."""
    if reduce != "prod":
        return aten.index_reduce.default(x, dim, index, source, reduce, include_self=include_self)
    if x.dim() == 0:
        flat = product_at(x.reshape(1), 0, index.reshape(-1), source.reshape(-1), include_self)
        return flat.reshape(())
    dim %= x.dim()
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    everywhere = index.reshape(shape).expand(source.shape)
    return product_at(x, dim, everywhere, source, include_self)


def product_at(x: Tensor, dim: int, index: Tensor, factors: Tensor, include_self: bool) -> Tensor:
    """``x[.., index[.., i, ..], ..] *= factors[.., i, ..]`` along `dim`; index as factors.

    Along the other dimensions the index may end before x does.
    """
    places = torch.arange(x.shape[dim], device=x.device)
    here = index.movedim(dim, -1).unsqueeze(-2) == places.unsqueeze(-1)
    factors = factors.movedim(dim, -1).unsqueeze(-2)
    product = torch.where(here, factors, torch.ones_like(factors)).prod(-1).movedim(-1, dim)
    touched = here.any(-1).movedim(-1, dim)
    pads: list[Any] = []
    for d in reversed(range(x.dim())):
        pads += [0, 0 if d == dim else x.shape[d] - index.shape[d]]
    if any(not isinstance(p, int) or p for p in pads):
        product, touched = F.pad(product, pads, value=1.0), F.pad(touched, pads, value=False)
    return product * (x if include_self else torch.where(touched, torch.ones_like(x), x))
