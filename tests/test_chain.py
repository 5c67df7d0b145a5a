"""A region evaluated stage by stage gives what the direct rule gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import hesscale_fx
from hesscale_fx import evaluate
from hesscale_fx.analysis import units
from hesscale_fx.structures.chain import ChainAt


class Net(nn.Module):
    """A function of rows, with two norms and a contraction, between linear layers."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(4))
        self.inner = nn.Linear(6, 6)
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter, 0.5)

    def forward(self, x):
        return self.last(self.function(self, self.first(x))).square().sum()


def post_norm(net, x):
    for norm in net.norms[:3]:
        x = norm(x + net.inner(x).tanh())
    return x


def offset(net, x):
    """A weight that is constant along the batch enters between two norms, and before them."""
    x = F.rms_norm(x + net.inner.bias, (6,))
    return net.norms[1](x * net.norms[0].weight + x.sin()) + net.norms[0].bias


def mixed(net, x):
    x = F.gelu(F.rms_norm(x, (6,)))
    x = x / (1 + x.norm(dim=-1, keepdim=True))
    return F.log_softmax(net.norms[0](x), -1)


def row_of_statistics(net, x):
    x = net.norms[0](x)
    spread = F.softplus(x).mean(-1, keepdim=True)
    return net.norms[1](spread * x.exp()).softmax(-1)


def positions(net, x):
    x = net.norms[0](x.unsqueeze(1) + net.inner.weight)
    return net.norms[1](2 * x + x.sin()).mean(1)


FUNCTIONS = [
    offset,
    *(
        pytest.param(function, marks=pytest.mark.slow)
        for function in (post_norm, mixed, row_of_statistics, positions)
    ),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_chain_equals_the_direct_rule(function, monkeypatch):
    net, x = Net(function).double(), torch.randn(3, 4).double()
    used = []
    through = ChainAt._through
    monkeypatch.setattr(
        ChainAt, "_through", lambda rule, rows: used.append(rule) or through(rule, rows)
    )
    got = hesscale_fx.transform(net, None, (x,))(x).hess_diag
    assert used, "no region was evaluated stage by stage"
    monkeypatch.setattr(evaluate, "is_chain", lambda region: False)
    used.clear()
    expected = hesscale_fx.transform(net, None, (x,))(x).hess_diag
    assert not used
    assert_close(got, expected, 1e-12, "diagonals")


@pytest.mark.slow
def test_a_deep_chain_is_exact_as_one_region():
    """Fourteen reductions along one row, more than the direct rule is asked for."""

    def chain(net, x):
        for norm in net.norms:
            x = norm(x + x.sin())
        x = F.rms_norm(F.rms_norm(x, (6,)).exp(), (6,))
        for _ in range(4):
            x = F.softmax(3 * x, -1)
        return x

    assert units.MAX_REDUCTIONS < 14 <= units.MAX_IN_CHAIN
    net, x = Net(chain).double(), torch.randn(1, 4).double()
    # With one row and a diagonal Hessian after it the recursion is exact up to the first bias.
    net.last.weight.data = torch.eye(3, 6).double()
    hs = hesscale_fx.transform(net, None, (x,), wrt="first.bias")

    def loss(bias):
        return torch.func.functional_call(net, {"first.bias": bias}, x)

    exact = torch.autograd.functional.hessian(loss, net.first.bias.detach()).diagonal()
    assert_close(hs(x).hess_diag, {"first.bias": exact}, 1e-10, "diagonals")
