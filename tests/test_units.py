"""One region above a leaf: nothing is dropped, so the diagonal is the exact Hessian's.

Each function is the smallest of its kind; whole models say that something is wrong, these
say what.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from reference import exact_hessian_diagonal
from torch import distributions as D
from torch import nn

import hesscale_fx


class Leaf(nn.Module):
    def __init__(self, fn):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.fn = fn
        self.w = nn.Parameter(torch.randn(4, 3, generator=draw).double())
        self.register_buffer("b", torch.randn(4, 3, generator=draw).double())
        self.register_buffer("rows", torch.randn(4, generator=draw).double())
        self.register_buffer("labels", torch.tensor([0, 1, 2, 1]))

    def forward(self):
        return self.fn(self.w, self)


def _clipped(w, m):
    log_prob = w.log_softmax(-1).gather(-1, m.labels[:, None])[:, 0]
    ratio = (log_prob + 1).exp()
    return -torch.min(ratio * m.rows, ratio.clamp(0.8, 1.2) * m.rows).mean()


def _stable_cross_entropy(w, m):
    h = w - w.max(-1, keepdim=True).values
    return (h.exp().sum(-1).log() - h.gather(-1, m.labels[:, None]).squeeze(-1)).mean()


def _ce(w, m):
    return F.cross_entropy(w, m.labels, reduction="none")


UNITS = {
    # a product summed: reconvergence, not a contraction
    "product-sum": lambda w, m: (w.exp() * w).sum(),
    "product-mean": lambda w, m: (w.exp() * w).mean(),
    "product-sum-weighted": lambda w, m: (m.b * w.exp() * w).sum(),
    "product-sum-nonlinear": lambda w, m: (w.exp() * w).sin().sum(),
    "product-relu": lambda w, m: (w.relu() * w.exp()).sum(),
    "quotient": lambda w, m: ((m.b - w) ** 2 / w.exp()).sum(),
    "expectation": lambda w, m: (w.softmax(-1) * w).sum(),
    "entropy": lambda w, m: -(w.softmax(-1) * w.log_softmax(-1)).sum(-1).mean(),
    "entropy-shared": lambda w, m: (lambda p: -(p.exp() * p).sum())(w.log_softmax(-1)),
    "l2-normalised": lambda w, m: (w / w.norm(dim=-1, keepdim=True) * m.b).sum(),
    "over-its-sum": lambda w, m: (w / (w * w).sum(-1, keepdim=True) * m.b).sum(),
    "cosine": lambda w, m: F.cosine_similarity(w, m.b).sum(),
    "cosine-square": lambda w, m: F.cosine_similarity(w, m.b).square().sum(),
    "product-of-logsumexp": lambda w, m: (w.logsumexp(-1) * w.logsumexp(-1).exp()).sum(),
    "two-losses": lambda w, m: (_ce(w, m) * _ce(w, m)).mean(),
    "focal": lambda w, m: (1 - (-_ce(w, m)).exp()).square().mul(_ce(w, m)).mean(),
    "square-root-of-sum": lambda w, m: (w * w).sum().sqrt(),
    # minimum and maximum
    "minimum": lambda w, m: torch.minimum(w, m.b).sum(),
    "minimum-of-two": lambda w, m: torch.min(w, w * w).sum(),
    "minimum-with-ties": lambda w, m: torch.minimum(w, w.clamp(-0.5, 0.5)).sum(),
    "maximum-of-two": lambda w, m: torch.maximum(w, w * w).sin().sum(),
    "clipped-ratio": _clipped,
    # a row constant taken away
    "minus-max": lambda w, m: (w - w.max(-1, keepdim=True).values).exp().sum(),
    "minus-amax": lambda w, m: (w - w.amax(-1, keepdim=True)).exp().sum(),
    "minus-logsumexp": lambda w, m: (lambda z: (z * z.softmax(-1) * m.b).sin().sum())(
        w - w.logsumexp(-1, keepdim=True)
    ),
    "logsumexp-by-hand": lambda w, m: (
        (w - w.max(-1, keepdim=True).values).exp().sum(-1).log().sin().sum()
    ),
    "stable-cross-entropy": _stable_cross_entropy,
    "cubed-deviation": lambda w, m: ((w - w.mean(-1, keepdim=True)).pow(3) * m.b).sum(),
    # distributions
    "categorical-log-prob": lambda w, m: (
        D.Categorical(logits=w, validate_args=False).log_prob(m.labels).sin().sum()
    ),
    "categorical-entropy": lambda w, m: (
        D.Categorical(logits=w, validate_args=False).entropy().sum()
    ),
    "normal-log-prob": lambda w, m: D.Normal(w, w.exp(), validate_args=False).log_prob(m.b).sum(),
    # losses
    "huber-mean": lambda w, m: F.huber_loss(w, m.b, delta=0.5),
    "huber-sum": lambda w, m: F.huber_loss(w, m.b, reduction="sum"),
    "huber-none": lambda w, m: F.huber_loss(w, m.b, reduction="none").sin().sum(),
    "smooth-l1": lambda w, m: F.smooth_l1_loss(w, m.b, beta=0.5),
    "nll-none": lambda w, m: (
        F.nll_loss(w.log_softmax(-1), m.labels, reduction="none").square().sum()
    ),
    "pairwise-distance": lambda w, m: F.pairwise_distance(w, m.b).square().sum(),
    "triplet": lambda w, m: F.triplet_margin_loss(w, m.b, m.b + 1),
    # rows
    "rms-norm": lambda w, m: F.rms_norm(w, (3,)).sin().sum(),
    "rms-norm-eps": lambda w, m: F.rms_norm(w, (3,), eps=1e-2).sin().sum(),
    "layer-norm-softmax": lambda w, m: (F.layer_norm(w, (3,)).softmax(-1) * m.b).sum(),
    "batch-norm": lambda w, m: (F.batch_norm(w, None, None, training=True) * m.b[0]).sin().sum(),
    "group-norm": lambda w, m: F.group_norm(w[None], 2).sin().sum(),
    "standard-deviation": lambda w, m: w.std(-1).sin().sum(),
    "norm": lambda w, m: w.norm(dim=-1).sin().sum(),
    "prod": lambda w, m: w.prod(-1).sin().sum(),
    "logsumexp": lambda w, m: w.logsumexp(-1).sin().sum(),
    # selections
    "top-k": lambda w, m: w.topk(2, -1).values.softmax(-1).square().sum(),
    "sort": lambda w, m: (w.sort(-1).values * m.b).sin().sum(),
    "where": lambda w, m: torch.where(m.b > 0, w * w, w.exp()).sum(),
    "detached-factor": lambda w, m: (w * w.detach()).exp().sum(),
    # a contraction
    "linear": lambda w, m: F.linear(m.b, w).sin().sum(),
}


@pytest.mark.parametrize("name", UNITS)
def test_one_region_is_exact(name):
    leaf = Leaf(UNITS[name])
    out = hesscale_fx.transform(leaf, example_inputs=())()
    loss = leaf()
    (grad,) = torch.autograd.grad(loss, leaf.w)
    exact = exact_hessian_diagonal(leaf, {"w": leaf.w})["w"]
    assert relative_error(out.loss, loss) < 1e-12
    error = relative_error(out.grads["w"], grad, floor=1e-3)
    assert error < 1e-10, f"gradient by {error:.1e}"
    error = relative_error(out.hess_diag["w"], exact, floor=1e-3)
    assert error < 1e-9, f"curvature by {error:.1e}"


@pytest.mark.parametrize("name", ["minimum", "maximum-of-two", "entropy", "batch-norm", "top-k"])
def test_nothing_is_written_in_place(name):
    """Autograd's own formulas write into their arguments; two operands would share them."""
    hs = hesscale_fx.transform(Leaf(UNITS[name]), example_inputs=())
    written = [
        node.format_node()
        for node in hs.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    assert not written
