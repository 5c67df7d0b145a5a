"""A region of many reductions, by edge pushing, gives what the direct rule gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import hesscale_fx
from hesscale_fx import evaluate
from hesscale_fx.structures import table
from hesscale_fx.structures.pushing import PushingAt


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


def ends(net, x):
    """The first tensor is used at both ends."""
    return F.softmax(net.norms[1](net.norms[0](x).sin()) * x.sigmoid(), -1)


FUNCTIONS = [
    offset,
    *(
        pytest.param(function, marks=pytest.mark.slow)
        for function in (post_norm, mixed, row_of_statistics, positions, ends)
    ),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pushing_equals_the_direct_rule(function, monkeypatch):
    net, x = Net(function).double(), torch.randn(3, 4).double()
    used = []
    recursion = PushingAt.recursion
    monkeypatch.setattr(
        PushingAt, "recursion", lambda rule, s, g: used.append(rule) or recursion(rule, s, g)
    )
    got = hesscale_fx.transform(net, None, (x,))(x).hess_diag
    assert used, "no region was evaluated node by node"
    monkeypatch.setattr(evaluate, "is_long", lambda region: False)
    used.clear()
    expected = hesscale_fx.transform(net, None, (x,))(x).hess_diag
    assert not used
    assert_close(got, expected, 1e-12, "diagonals")


def norms(net, x):
    for norm in [*net.norms] * 3:
        x = norm(x + x.sin())
    return x


def threshold(net, x):
    """A normalizer found by iteration, each step of which sums along the row."""
    offset = x.mean(-1, keepdim=True)
    for _ in range(20):
        offset = offset + 0.3 * (F.softplus(x - offset).sum(-1, keepdim=True) - 1)
    return F.softplus(x - offset)


def apart(net, x):
    """No tensor but the first and the last is on every path: no part can be cut off."""
    y = x
    for norm in [*net.norms] * 3:
        y = norm(y).sin() * x.sigmoid()
    return y


@pytest.mark.parametrize(
    "function", [threshold, *(pytest.param(f, marks=pytest.mark.slow) for f in (norms, apart))]
)
def test_a_region_of_any_number_of_reductions_is_exact(function):
    net, x = Net(function).double(), torch.randn(1, 4).double()
    # With one row and a diagonal Hessian after it the recursion is exact up to the first bias.
    net.last.weight.data = torch.eye(3, 6).double()
    hs = hesscale_fx.transform(net, None, (x,), wrt="first.bias")
    sums = [n for n in hs.graph.nodes if n.target in table.REDUCTIONS]
    assert len(sums) > 18

    def loss(bias):
        return torch.func.functional_call(net, {"first.bias": bias}, x)

    exact = torch.autograd.functional.hessian(loss, net.first.bias.detach()).diagonal()
    assert_close(hs(x).hess_diag, {"first.bias": exact}, 1e-10, "diagonals")


def test_what_many_levels_would_repeat_is_cut():
    """Each level of a deep post-norm network would have a region of all norms after it."""

    def deep(net, x):
        for norm in [*net.norms] * 3:
            x = norm(x + net.inner(x).tanh())
        return x

    net, x = Net(deep).double(), torch.randn(3, 4).double()
    hs = hesscale_fx.transform(net, None, (x,))
    assert len(hs.graph.nodes) < 1500
    assert not hs.report()["inner.weight"].exact
