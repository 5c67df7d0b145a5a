"""Closed forms and the algebra on templates give what the derived rule gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import hesscale_fx
from hesscale_fx import trace
from hesscale_fx.analysis import units
from hesscale_fx.structures import closed

ROWS = {
    "softmax": (lambda x: F.softmax(x, 1), []),
    "log_softmax": (lambda x: F.log_softmax(x, -1), []),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), [(6,), (6,)]),
    "layer_norm of two dimensions": (
        lambda x, w, b: F.layer_norm(x.view(5, 2, 3), (2, 3), w, b),
        [(2, 3), (2, 3)],
    ),
    "layer_norm without parameters": (lambda x: F.layer_norm(x, (6,)), []),
    "group_norm": (lambda x, w, b: F.group_norm(x.view(5, 6, 1), 2, w, b), [(6,), (6,)]),
    "group_norm without parameters": (lambda x: F.group_norm(x.view(5, 2, 3), 1), []),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x.view(5, 3, 2), None, None, w, b, training=True),
        [(3,), (3,)],
    ),
    "batch_norm with running statistics": (nn.BatchNorm1d(6, affine=False), []),
}


class Net(nn.Module):
    """A row operator between two linear layers, so that g and s are arbitrary."""

    def __init__(self, row, shapes):
        super().__init__()
        self.row = row
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.affine = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in shapes)

    def forward(self, x):
        y = self.row(self.first(x), *self.affine).reshape(-1, 6)
        return self.last(torch.tanh(y)).square().sum()


def diagonal(net, x):
    return hesscale_fx.transform(net, None, (x,))(x).hess_diag


def derive(monkeypatch):
    """From here on nothing has a closed form."""
    monkeypatch.setattr(closed, "CLOSED", {})
    monkeypatch.setattr(units, "recognize_row", lambda region: None)


@pytest.mark.parametrize("name", ROWS)
def test_closed_form_equals_the_derived_rule(name, monkeypatch):
    row, shapes = ROWS[name]
    net, x = Net(row, shapes).double(), torch.randn(5, 4).double()
    used = []
    evaluate = closed.ClosedForm.recursion
    monkeypatch.setattr(
        closed.ClosedForm, "recursion", lambda rule, s, g: used.append(rule) or evaluate(rule, s, g)
    )
    got = diagonal(net, x)
    assert used, "the closed form was not used"
    derive(monkeypatch)
    assert_close(got, diagonal(net, x), 1e-12, "closed and derived")


@pytest.mark.parametrize("name", ["by hand", *ROWS])
def test_algebra_changes_no_value(name, monkeypatch):
    def by_hand(x):
        d = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1)
        e = (-d - (-d).amax(1, keepdim=True)).exp()
        return torch.relu(e / e.sum(1, keepdim=True) - 0.1) * 2 - d / 3

    row, shapes = ROWS.get(name, (by_hand, []))
    net, x = Net(row, shapes).double(), torch.randn(5, 4).double()
    derive(monkeypatch)
    shorter = hesscale_fx.transform(net, None, (x,))
    monkeypatch.setattr(trace, "simplify_template", lambda graph, fake_mode: None)
    longer = hesscale_fx.transform(net, None, (x,))
    assert_close(shorter(x).hess_diag, longer(x).hess_diag, 1e-12, "with and without")
    assert len(shorter.graph.nodes) < 0.9 * len(longer.graph.nodes)


def test_a_bias_without_a_weight():
    x, bias = torch.randn(5, 6).double(), torch.randn(6).double()

    def loss(bias):
        return F.layer_norm(x, (6,), None, bias).pow(3).sum()

    got = hesscale_fx.transform(loss, None, (bias,), wrt="inputs")(bias).hess_diag["bias"]
    want = 6 * F.layer_norm(x, (6,), None, bias).sum(0)
    assert_close({"": got}, {"": want}, 1e-12, "bias")


W, V = torch.randn(6, 3).double(), torch.randn(1, 3).double()


def maximum_used_elsewhere(x):
    m = x.amax(1, keepdim=True)
    e = (x - m).exp()
    return (e / e.sum(1, keepdim=True) @ W).square().sum() + (m @ V).square().sum()


def exponential_used_elsewhere(x):
    e = (x - x.amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True) @ W).square().sum() + (e @ W).square().sum()


def literal(x, number=3):
    m = x.amax(1, keepdim=True)
    return (((x - m).sum(1, keepdim=True) + number * m) @ V).square().sum()


def size_of_another_axis(x):
    return literal(x, x.shape[0])


@pytest.mark.parametrize(
    "model", [maximum_used_elsewhere, exponential_used_elsewhere, literal, size_of_another_axis]
)
def test_a_maximum_that_matters_is_differentiated(model):
    x = torch.randn(3, 6).double().requires_grad_()
    (want,) = torch.autograd.grad(model(x), x)
    hs = hesscale_fx.transform(model, None, (x.detach(),), wrt="inputs")
    assert_close(dict(hs(x.detach()).grads), {"x": want}, 1e-12, "gradient")


def test_a_maximum_that_cancels_is_not():
    def model(x):
        e = (x - x.amax(1, keepdim=True)).exp()
        return (e / e.sum(1, keepdim=True) @ W).square().sum()

    hs = hesscale_fx.transform(model, None, (torch.randn(4, 6).double(),), wrt="inputs")
    assert any(u.region.cancelled for u in hs._program().units if u.region is not None)
