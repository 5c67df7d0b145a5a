"""Real models (benchmarks/zoo), and the second way of capture on small ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from real_models import against_brute_force, measure
from reference import autograd
from torch import nn

import hesscale_fx

from zoo import CASES, classics

# One for each way of capture but the plain one: with fixed values, below autograd, on values.
DEFAULT = {
    "Regression with missing targets": "torch.export with fixed values",
    "GAN, gradient penalty": "make_fx",
    "PINN, torch.func": "make_fx on values",
}


# torch.func.hessian, the first time it runs.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", DEFAULT)
def test_way_of_capture(name):
    row = measure(name, samples=0, seconds=0)
    assert not row.failure
    assert row.right, row
    assert row.way == DEFAULT[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in CASES if n not in DEFAULT])
def test_model(name):
    row = measure(name, samples=2, seconds=0)
    if "ModuleNotFoundError" in row.failure:
        pytest.skip("needs the extra `models`")
    assert not row.failure
    assert row.right, row
    assert row.dynamic != "WRONG"


# In which regions of different rows follow or read each other, and complex numbers lie between.
BETWEEN_ROWS = [
    "Linear-chain CRF", "Hidden Markov model", "Neural Turing machine", "Capsules", "Soft k-means",
    "U-Net", "NeRF", "Graph convolution, scatter", "Contrastive", "FNet by hand",
    "Gaussian process",
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=() if n in ("Hidden Markov model", "Contrastive") else pytest.mark.slow
        )
        for n in BETWEEN_ROWS
    ],
)
def test_the_brute_force_agrees(name):
    torch.manual_seed(0)
    assert against_brute_force(CASES[name](), math.inf) < 1e-9


def test_lengths_of_packed_sequences_are_fixed_but_not_their_order():
    torch.manual_seed(0)
    case = CASES["GRU on packed sequences"]()
    x, lengths, y = case.args
    hs = hesscale_fx.transform(case.model, case.loss, case.args)
    assert hs.report().way == "make_fx on values"
    order = torch.tensor([2, 0, 1])
    out = hs(x, lengths[order], y)
    loss, grads = autograd(case.model, case.loss, (x, lengths[order]), (y,))
    assert torch.allclose(out.loss, loss, rtol=1e-12)
    assert all(torch.allclose(out.grads[n], g, rtol=1e-9) for n, g in grads.items())
    with pytest.raises(hesscale_fx.HesScaleError, match="does not hold"):
        hs(x, lengths - 1, y)


class Branch(nn.Module):
    """Reads a value, a shape and a number of its data."""

    def __init__(self):
        super().__init__()
        self.net = classics.mlp(3, 4, 2)

    def forward(self, x):
        y = self.net(x)
        if x.sum() > 0:
            y = F.silu(y)
        return y.square().mean()


def same(hs, model, x):
    loss, grads = autograd(model, None, (x,))
    out = hs(x)
    assert torch.allclose(out.loss, loss, rtol=1e-12)
    return all(torch.allclose(out.grads[n], g, rtol=1e-9) for n, g in grads.items())


def test_a_lazily_captured_module_captures_again_and_keeps_both():
    model = Branch().double()
    hs = hesscale_fx.transform(model)
    up = torch.rand(4, 3, dtype=torch.float64)
    assert same(hs, model, up)
    assert same(hs, model, -up)
    assert len(hs._programs) == 2
    assert same(hs, model, up[:3]), "the batch is free on either path"
    assert same(hs, model, -up)
    assert len(hs._programs) == 2


def test_the_report_says_what_is_fixed_and_where():
    hs = hesscale_fx.transform(Branch().double(), None, (torch.ones(4, 3).double(),))
    report = hs.report()
    assert report.way == "torch.export with fixed values"
    (line,) = report.fixed
    assert "True" in line
    assert "test_zoo.py" in line
    assert "if x.sum() > 0" in line
    assert line in str(report)


def test_a_comparison_asserts_no_more_than_the_comparison():
    class Model(Branch):
        def forward(self, x):
            loss = self.net(x).square().mean()
            return loss * 2 if loss.item() > 1e-9 else loss

    model, x = Model().double(), torch.rand(4, 3, dtype=torch.float64)
    hs = hesscale_fx.transform(model, None, (x,))
    assert same(hs, model, x * 2)


def test_an_integer_part_of_a_number_is_asserted():
    """Torch drops this assertion; silently wrong if nothing else were done."""

    class Model(Branch):
        def forward(self, x):
            return self.net(x).square().mean() * int(x.max().item() * 10)

    model, x = Model().double(), torch.full((4, 3), 0.55).double()
    hs = hesscale_fx.transform(model, None, (x,))
    assert same(hs, model, x)
    with pytest.raises(hesscale_fx.HesScaleError, match="gave 0.55"):
        hs(x * 2)


def test_what_the_model_cuts_off_is_cut_off_below_autograd():
    class Model(Branch):
        def forward(self, x):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            (constant,) = torch.autograd.grad(self.net(x).square().sum(), x)
            y = self.net(x)
            with torch.no_grad():
                z = y * 2
            total = slope.square().mean() + constant.mean() * y.mean()
            return total + (y * z).mean() + (y.detach() * y).mean()

    model, x = Model().double(), torch.randn(4, 3, dtype=torch.float64)
    hs = hesscale_fx.transform(model, None, (x,))
    assert hs.report().way == "make_fx"
    assert same(hs, model, x)
    assert same(hs, model, torch.randn(7, 3, dtype=torch.float64))
