"""CTC against PyTorch's loss and gradient, and against a sum over all paths."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesscale_fx

T, N, C = 4, 3, 3
INPUT = torch.tensor([4, 3, 4])


def collapse(path):
    return [k for k, _ in itertools.groupby(path) if k != 0]


def path_sums(log_p, targets, lengths):
    """One loss a sample by brute force: every path that collapses to the target."""
    losses = []
    for n in range(N):
        want = targets[n, : lengths[n]].tolist()
        t = int(INPUT[n])
        paths = [p for p in itertools.product(range(C), repeat=t) if collapse(p) == want]
        scores = [sum(log_p[i, n, k] for i, k in enumerate(p)) for p in paths]
        losses.append(-torch.logsumexp(torch.stack(scores), 0))
    return torch.stack(losses)


def hessian_diagonal(f, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0].flatten() for g in grad.flatten()]
    return torch.stack(rows).diagonal().reshape(x.shape)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("concatenated", [False, True])
def test_the_unit_is_exact(reduction, concatenated):
    log_p = torch.randn(T, N, C, dtype=torch.float64).log_softmax(-1)
    targets = torch.tensor([[1, 1], [2, 1], [2, 0]])  # a repeated label, and a short target
    lengths = torch.tensor([2, 2, 1])
    given = torch.cat([t[:n] for t, n in zip(targets, lengths, strict=True)])
    given = given if concatenated else targets

    def finish(losses):
        if reduction == "mean":
            losses = (losses / lengths).mean()
        elif reduction == "sum":
            losses = losses.sum()
        return losses.sin().sum()

    def model(x):
        loss = F.ctc_loss(x, given, INPUT, lengths, reduction=reduction)
        return loss.sin().sum()

    out = hesscale_fx.transform(model, None, (log_p,), wrt="inputs", dynamic=False)(log_p)
    expected = hessian_diagonal(lambda x: finish(path_sums(x, targets, lengths)), log_p)
    torch.testing.assert_close(out.loss, model(log_p))
    # A sine of a vector or of a scalar: in both each entry of log_p reaches one sine only.
    torch.testing.assert_close(out.hess_diag["x"], expected, rtol=1e-9, atol=1e-11)


def test_gradients_are_those_of_torch_and_the_graph_is_all_aten():
    net = nn.Linear(5, C).double()
    loss = nn.CTCLoss(zero_infinity=True)
    x = torch.randn(T, N, 5, dtype=torch.float64)
    targets, lengths = torch.tensor([[1, 2], [1, 1], [2, 2]]), torch.tensor([2, 2, 2])

    def full(out, targets, inputs, lengths):
        return loss(out.log_softmax(-1), targets, inputs, lengths)

    hs = hesscale_fx.transform(net, full)
    out = hs(x, targets, INPUT, lengths)
    value = full(net(x), targets, INPUT, lengths)
    grads = torch.autograd.grad(value, list(net.parameters()))
    torch.testing.assert_close(out.loss, value.detach())
    for found, grad in zip(out.grads.values(), grads, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-11)
    assert all("hesscale" not in str(n.target) for n in hs.graph.nodes)
    assert all(h.isfinite().all() for h in out.hess_diag.values())
    assert hs.verify(x, targets, INPUT, lengths).overall.samples == 18
