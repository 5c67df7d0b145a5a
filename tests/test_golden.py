"""Values of the official implementation (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_close, relative_error, some
from torch import nn

import hesscale_fx

GOLDEN = torch.load(Path(__file__).parent / "golden" / "official_hesscale.pt", weights_only=True)
LAYERS = {"Linear", "Tanh", "Sigmoid", "ReLU", "ELU", "Conv2d", "MaxPool2d", "Flatten", "Dropout"}


def _build(case):
    names = {n: getattr(nn, n) for n in LAYERS | {"CrossEntropyLoss", "MSELoss"}}
    net = nn.Sequential(*(eval(layer, names) for layer in case["arch"])).double()
    net.load_state_dict(case["state_dict"])
    loss = eval(case["loss_fn"], names)
    loss.reduction = case["reduction"]
    return net.train(case["training"]), loss


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
@pytest.mark.parametrize("name", GOLDEN)
def test_official_values(name, method):
    case = GOLDEN[name]
    net, loss = _build(case)
    hs = hesscale_fx.transform(net, loss, (case["x"], case["y"]), method=method)
    out = hs(case["x"], case["y"])
    assert relative_error(out.loss, case["loss"]) < 1e-10
    assert_close(dict(out.grads), case["grads"], 1e-10, "gradients", floor=0)
    assert_close(dict(out.hess_diag), case[method], 1e-10, method, floor=0)


@pytest.mark.parametrize("name", list(some(GOLDEN, 3)))
def test_the_last_layer_is_exact(name):
    case = GOLDEN[name]
    net, loss = _build(case)
    last = f"{len(net) - 1}."
    for method, exact in (("hesscale", "diag_h"), ("hesscale_gn", "diag_ggn")):
        out = hesscale_fx.transform(net, loss, method=method)(case["x"], case["y"])
        want = {n: v for n, v in case[exact].items() if n.startswith(last)}
        assert want
        assert_close({n: out.hess_diag[n] for n in want}, want, 1e-10, f"{method} against {exact}")
        # and above it is an approximation, so that this test can fail
        first = next(iter(case[exact]))
        assert relative_error(out.hess_diag[first], case[exact][first]) > 1e-4


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.endswith("_ce")])
def test_gauss_newton_is_not_negative_for_a_convex_loss(name):
    case = GOLDEN[name]
    net, loss = _build(case)
    out = hesscale_fx.transform(net, loss, method="hesscale_gn")(case["x"], case["y"])
    assert all((h >= 0).all() for h in out.hess_diag.values())


def test_the_equations_of_the_paper():
    """Softmax cross-entropy: p - p*p at the logits, then s @ (W*W) and s^T @ (x*x)."""
    a, b = nn.Linear(4, 5, bias=False).double(), nn.Linear(5, 3, bias=False).double()
    x, y = torch.randn(1, 4).double(), torch.tensor([2])
    out = hesscale_fx.transform(nn.Sequential(a, b), nn.CrossEntropyLoss())(x, y)
    h = a(x)
    p = b(h).softmax(-1)
    s = p - p * p
    assert relative_error(out.hess_diag["1.weight"], s.T @ (h * h)) < 1e-12
    s = s @ (b.weight * b.weight)
    assert relative_error(out.hess_diag["0.weight"], s.T @ (x * x)) < 1e-12
