"""Sums, means and maxima of embeddings over bags of indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, widen

MEAN, MAX = 1, 2


@dataclass(frozen=True)
class EmbeddingBag:
    """``y[b] = sum_p c[p] W[i[p]]`` over the positions p of bag b.

    An index that stands n times in a bag has the entry ``n c`` in J, so its square is not the sum
    of the squares: with ``C[p]`` the sum of c over the positions of the bag that have p's index,
    ``(J o J)^T s`` gives ``c[p] C[p] s[b]`` to the row of p.
    """

    name: str = "contraction"
    linear: bool = False

    def at(self, call: Call) -> EmbeddingBagAt:
        return EmbeddingBagAt(call)


@dataclass
class EmbeddingBagAt:
    call: Call

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u[:1])

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return [None] * len(self.call.active)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        names = (
            "weight",
            "indices",
            "offsets",
            "by_freq",
            "mode",
            "sparse",
            "scale",
            "last",
            "pad",
        )
        args: dict[str, Any] = dict(zip(names, self.call.leaves, strict=False))
        if s[0] is None:
            return [None] * len(self.call.active)
        if args["mode"] == MAX:  # a selection
            return self.call.vjp(s[:1], widen)
        bag = bags_of(args["indices"], args["offsets"], args["last"])
        weight, indices = widen(args["weight"]), args["indices"]
        rows = s[0][bag]
        scale = torch.ones_like(rows[:, 0]) if args["scale"] is None else widen(args["scale"])
        kept = counted(args["indices"], args["pad"], weight, scale)
        share = kept
        if args["mode"] == MEAN:
            size = torch.zeros_like(s[0][:, 0]).index_add(0, bag, kept).clamp(min=1)
            share = kept / size[bag]
        coefficient = scale * share
        together = self._together(bag, args, coefficient)
        of_weight = torch.zeros_like(weight)
        of_weight = of_weight.index_add(0, indices, (coefficient * together).unsqueeze(1) * rows)
        of_scale = (weight[indices].square() * rows).sum(1) * share.square()
        return [of_weight if i == 0 else of_scale for i in self.call.active]

    def _together(self, bag: Tensor, args: dict[str, Any], coefficient: Tensor) -> Tensor:
        """For each position the sum of coefficients of its index within its bag."""
        key = bag * args["weight"].shape[0] + args["indices"]
        group = torch.searchsorted(key.sort().values, key)
        return torch.zeros_like(coefficient).index_add(0, group, coefficient)[group]


def bags_of(indices: Tensor, offsets: Tensor, include_last: bool) -> Tensor:
    """The bag of each position."""
    starts = offsets[:-1] if include_last else offsets
    position = torch.arange(indices.shape[0], device=indices.device).to(starts.dtype)
    return torch.searchsorted(starts, position, right=True) - 1


def counted(indices: Tensor, pad: int | None, weight: Tensor, like: Tensor) -> Tensor:
    """One for each position, zero where it is padding."""
    if pad is None:
        return torch.ones_like(like)
    return (indices != pad % weight.shape[0]).to(like.dtype)


def written_out(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    scale: Tensor | None = None,
    last: bool = False,
    pad: int | None = None,
) -> list[Tensor]:
    """The operator in plain torch, which autograd can differentiate twice.

    Of its four outputs only the first counts.
    """
    bag = bags_of(indices, offsets, last)
    rest = [bag, offsets, offsets]
    bags = offsets.shape[0] - (1 if last else 0)
    rows = weight[indices]
    kept = counted(indices, pad, weight, rows[:, 0])
    empty = rows.new_zeros(bags, weight.shape[1])
    if mode == MAX:
        index = bag.unsqueeze(1).expand_as(rows)
        low = rows.masked_fill((kept == 0).unsqueeze(1), float("-inf"))
        found = empty.scatter_reduce(0, index, low, "amax", include_self=False)
        return [found.masked_fill(found == float("-inf"), 0.0), *rest]
    rows = rows * kept.unsqueeze(1)
    total = empty.index_add(0, bag, rows if scale is None else rows * scale.unsqueeze(1))
    if mode != MEAN:
        return [total, *rest]
    size = kept.new_zeros(bags).index_add(0, bag, kept).clamp(min=1)
    return [total / size.unsqueeze(1), *rest]
