"""`hs.backward`: gradients and diagonals onto the user's own parameters."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import nn

import hesscale_fx
from hesscale_fx.errors import CallError


def classifier():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 1, 0])


def test_fills_both_as_a_call_computes_them():
    net, x, y = classifier()
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    out = hs(x, y)
    loss = hs.backward(x, y)
    assert torch.equal(loss, out.loss) and not loss.requires_grad
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, out.grads[name])
        assert torch.equal(p.hesscale, out.hess_diag[name])
        assert not p.grad.requires_grad and not p.hesscale.requires_grad


def test_accumulates_as_autograd_does():
    net, x, y = classifier()
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(reduction="sum"))
    whole = hs(x, y)
    hs.backward(x[:2], y[:2])
    first = net[0].weight.grad
    hs.backward(x[2:], y[2:])
    assert net[0].weight.grad is first  # in place: views of it, e.g. one flat gradient, stay valid
    for name, p in net.named_parameters():
        assert relative_error(p.grad, whole.grads[name]) < 1e-12
        assert relative_error(p.hesscale, whole.hess_diag[name]) < 1e-12


def test_zero_grad_clears_both():
    net, x, y = classifier()
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    hs.backward(x, y)
    hs.zero_grad(set_to_none=False)
    assert all(p.grad.abs().max() == 0 == p.hesscale.abs().max() for p in net.parameters())
    hs.backward(x, y)
    hs.zero_grad()
    assert all(p.grad is None and p.hesscale is None for p in net.parameters())


def test_a_gradient_cleared_alone_is_refused():
    net, x, y = classifier()
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    hs.backward(x, y)
    net.zero_grad()  # knows nothing of the diagonals
    before = net[0].weight.hesscale.clone()
    with pytest.raises(CallError, match=r"'0\.weight' was cleared.*hs\.zero_grad"):
        hs.backward(x, y)
    assert torch.equal(net[0].weight.hesscale, before) and net[0].weight.grad is None


def test_tied_weights_are_added_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    x, y = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    hs = hesscale_fx.transform(net, nn.MSELoss())
    out = hs(x, y)
    hs.backward(x, y)
    assert torch.equal(net[0].weight.hesscale, out.hess_diag["0.weight"])
    want = torch.autograd.grad(nn.functional.mse_loss(net(x), y), net[0].weight)[0]
    assert relative_error(net[2].weight.grad, want) < 1e-12


def test_only_what_wrt_selects_is_written():
    net, x, y = classifier()
    net[0].bias.requires_grad_(False)
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), wrt="2")
    hs.backward(x, y)
    written = [n for n, p in net.named_parameters() if p.grad is not None]
    assert written == ["2.weight", "2.bias"]
    assert not any(hasattr(p, "hesscale") for p in net[0].parameters())


def test_inputs_too():
    net, x, y = classifier()
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), wrt=["inputs", "2.bias"])
    out = hs(x, y)
    hs.backward(x, y)
    assert torch.equal(x.hesscale, out.hess_diag["input"]) and x.grad is not None
    assert torch.equal(net[2].bias.grad, out.grads["2.bias"])
    computed = x * net[0].weight.sum()
    with pytest.raises(CallError, match="'input' was computed from other tensors"):
        hs.backward(computed, y)


def test_results_that_are_one_tensor_get_memory_of_their_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x * (self.a + self.b)).sum()

    model, x = Model(), torch.arange(4.0)
    hs = hesscale_fx.transform(model)
    hs.backward(x)
    model.a.grad.mul_(10)  # as gradient clipping does
    model.a.hesscale.add_(1)
    assert torch.equal(model.b.grad, torch.arange(4.0)) and torch.equal(x, torch.arange(4.0))
    assert torch.equal(model.b.hesscale, torch.zeros(4))


def test_the_model_runs_once():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    hs.backward(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))
    assert net[1].num_batches_tracked == 1


@pytest.mark.slow
def test_compiled():
    net, x, y = classifier()
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), (x, y))
    out = hs(x, y)
    hs.compile()
    hs.backward(x, y)
    for name, p in net.named_parameters():
        assert relative_error(p.hesscale, out.hess_diag[name]) < 1e-12
