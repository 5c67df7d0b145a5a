"""Connectionist temporal classification (Graves et al. 2006) as one unit.

PyTorch's kernel hides its recursion and has no second derivative. With occupancies
``gamma[t, k] = -d loss / d log_p[t, k]``, a path takes exactly one symbol at each time and the
path sum is exponential-linear in log_p, so

    d2 loss / d log_p[t, k]^2 = gamma^2 - gamma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, mul, widen
from hesscale_fx.structures.whole import replaces

NONE, MEAN = 0, 1


@torch.library.custom_op("hesscale_fx::ctc_loss", mutates_args=())
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> Tensor:
    """Stands for torch.ctc_loss in a captured graph; the emitted one holds `recursion`."""
    args = (log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
    return recursion(*args).clone()


@ctc_loss.register_fake
def _(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, *rest: Any) -> Tensor:
    batch = log_probs.shape[1:2] if log_probs.dim() == 3 else ()
    return log_probs.new_empty(batch if rest[2] == NONE else ())


@replaces(torch, "ctc_loss")
def whole(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """torch.ctc_loss by the operator above, whose shapes do not depend on data."""
    lengths = [
        v if isinstance(v, Tensor) else torch.tensor(v, device=log_probs.device)
        for v in (input_lengths, target_lengths)
    ]
    return ctc_loss(log_probs, targets, *lengths, blank, reduction, zero_infinity)


def recursion(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> Tensor:
    """The loss by the forward recursion over time, in plain torch (Graves et al., eqs. 6 to 8)."""
    losses = negative_log_likelihood(log_probs, targets, input_lengths, target_lengths, blank)
    if zero_infinity:
        losses = torch.where(losses == float("inf"), torch.zeros_like(losses), losses)
    weights = sample_weights(target_lengths, reduction, losses)
    weighted = losses * weights
    if reduction != NONE:
        return weighted.sum()
    return weighted if log_probs.dim() == 3 else weighted.squeeze(0)


def sample_weights(target_lengths: Tensor, reduction: int, losses: Tensor) -> Tensor:
    """What each sample's loss counts: the mean divides by the target's length first."""
    if reduction != MEAN:
        return torch.ones_like(losses)
    lengths = target_lengths.reshape(-1).clamp(min=1).to(losses.dtype)
    return 1 / (lengths * losses.shape[0])


def padded(targets: Tensor, lengths: Tensor) -> Tensor:
    """Targets of shape (batch, longest), also when they are given one after another."""
    if targets.dim() == 2:
        return targets
    start = (lengths.cumsum(0) - lengths).unsqueeze(1)
    column = torch.arange(targets.shape[0], device=targets.device)
    return targets[(start + column).clamp(max=targets.shape[0] - 1)]


def negative_log_likelihood(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """One loss a sample; log_probs (time, batch, classes) or (time, classes)."""
    p = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    lengths, times = target_lengths.reshape(-1), input_lengths.reshape(-1)
    labels = padded(targets, lengths)
    batch, longest = labels.shape
    # Labels with blanks around them: blank, l1, blank, l2, ..., blank.
    blanks = torch.full_like(labels, blank)
    states = torch.stack([blanks, labels], 2).reshape(batch, 2 * longest)
    states = torch.cat([states, blanks[:, :1]], 1)
    before = torch.cat([states[:, :2], states[:, :-2]], 1)
    position = torch.arange(2 * longest + 1, device=p.device)
    may_skip = (states != blank) & (states != before) & (position >= 2)
    low = float("-inf")
    emitted = p.gather(2, states.unsqueeze(0).expand(p.shape[0], -1, -1))
    alpha = emitted[0].masked_fill(position >= 2, low)
    alpha = alpha.masked_fill((position == 1) & (lengths == 0).unsqueeze(1), low)
    for t in range(1, p.shape[0]):
        one = torch.cat([torch.full_like(alpha[:, :1], low), alpha[:, :-1]], 1)
        two = torch.cat([torch.full_like(alpha[:, :2], low), alpha[:, :-2]], 1)
        two = two.masked_fill(~may_skip, low)
        step = log_sum_exp(torch.stack([alpha, one, two])) + emitted[t]
        alpha = torch.where((t < times).unsqueeze(1), step, alpha)
    last = (2 * lengths).unsqueeze(1)
    ends = (position == last) | ((position == last - 1) & (position >= 0))
    return -log_sum_exp(alpha.masked_fill(~ends, low).t())


def log_sum_exp(x: Tensor) -> Tensor:
    """Over the first dimension; minus infinity, with zero derivative, where all entries are."""
    peak = x.amax(0).detach()
    empty = peak == float("-inf")
    shifted = x - torch.where(empty, torch.zeros_like(peak), peak)
    total = shifted.exp().sum(0)
    safe = torch.where(empty, torch.ones_like(total), total)
    return torch.where(empty, peak, safe.log() + peak)


@dataclass(frozen=True)
class CTC:
    """The structure of the operator above; differentiable in log_probs only."""

    name: str = "row"
    linear: bool = False

    def at(self, call: Call) -> CTCAt:
        return CTCAt(Call(recursion, call.leaves, call.spec, call.active))


@dataclass
class CTCAt:
    call: Call

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        if s[0] is None:
            return [None]
        (slope,) = self.call.vjp([torch.ones_like(s[0])], widen)
        return [mul(slope, self.call.vjp(s, widen)[0])]

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        if g[0] is None:
            return [None]
        _, _, _, lengths, _, reduction, _ = self.call.leaves
        (gamma,) = Call(_summed, self.call.leaves, self.call.spec, self.call.active).vjp(
            [torch.ones((), dtype=widen(g[0]).dtype, device=g[0].device)], widen
        )
        if gamma is None:
            return [None]
        per_sample = widen(g[0]).reshape(1, -1, 1) if gamma.dim() == 3 else widen(g[0])
        if reduction == MEAN:
            like = torch.zeros_like(lengths.reshape(-1), dtype=gamma.dtype)
            weights = sample_weights(lengths, reduction, like)
            per_sample = per_sample * (
                weights.reshape(1, -1, 1) if gamma.dim() == 3 else weights.squeeze(0)
            )
        # gamma here is the gradient of the summed loss, minus the occupancy.
        return [per_sample * (gamma * gamma + gamma)]


def _summed(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> Tensor:
    return recursion(log_probs, targets, input_lengths, target_lengths, blank, 2, zero_infinity)
