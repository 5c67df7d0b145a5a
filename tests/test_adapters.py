"""Adapters to other packages, against those packages."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import nn

import hesscale_fx
from hesscale_fx.errors import HesScaleError
from hesscale_fx.optim import AdaHesScale, Sophia, adapters


def classifier():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 1, 0])


def trajectory(make, step, copies=5):
    """Parameters after some steps of an optimizer on the same problem."""
    torch.manual_seed(0)
    net, x, y = classifier()
    net[0].bias.requires_grad_(False)
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    optimizer = make(net.named_parameters())
    for _ in range(copies):
        hs.zero_grad()
        hs.backward(x, y)
        step(optimizer)
    return [p.detach() for p in net.parameters()]


# --- pytorch_optimizer -------------------------------------------------------------------------


def with_hessian(optimizer):
    optimizer.step(hessian=adapters.hessian_list(optimizer))


def test_adahessian():
    """AdaHessian on HesScale diagonals is AdaHesScale."""
    package = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    got = trajectory(
        lambda p: package.AdaHessian(p, lr=0.01, eps=1e-8, adam_debias=False), with_hessian
    )
    want = trajectory(lambda p: AdaHesScale(p, lr=0.01, eps=1e-8), lambda o: o.step())
    assert all(relative_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))


def test_sophia():
    """SophiaH clips at p where Sophia clips at 1, and has no gamma: lr, p and eps make up."""
    package = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    lr, gamma, eps = 0.01, 0.05, 1e-8
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    got = trajectory(
        lambda p: package.SophiaH(
            p,
            lr=lr / gamma,
            p=gamma,
            eps=eps / gamma,
            betas=options["betas"],
            weight_decay=0.1 * gamma,
        ),
        with_hessian,
    )
    want = trajectory(
        lambda p: Sophia(p, lr=lr, gamma=gamma, eps=eps, **options), lambda o: o.step()
    )
    assert all(relative_error(g, w) < 1e-12 for g, w in zip(got, want, strict=True))


def test_hessian_list():
    net, x, y = classifier()
    optimizer = torch.optim.SGD(net.named_parameters())
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), wrt="2")
    out = hs(x, y)
    first, *_, weight, bias = adapters.hessian_list(optimizer, out.hess_diag)
    assert torch.equal(first, torch.zeros_like(net[0].weight))
    assert torch.equal(weight, out.hess_diag["2.weight"])
    assert torch.equal(bias, out.hess_diag["2.bias"])
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(HesScaleError, match=r"'0\.weight' has a gradient and no Hessian diagonal"):
        adapters.hessian_list(optimizer, out.hess_diag)


# --- laplace-torch -----------------------------------------------------------------------------


def loader(targets):
    data = torch.utils.data.TensorDataset(torch.randn(40, 4).double(), targets)
    return torch.utils.data.DataLoader(data, batch_size=16)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("weights", ["all", "last_layer", "subnetwork"])
def test_laplace(likelihood, weights, laplace):
    net, _, _ = classifier()
    classes = torch.randint(3, (40,))
    data = loader(classes if likelihood == "classification" else torch.randn(40, 3).double())
    options = {"subnetwork_indices": torch.arange(25, 40)} if weights == "subnetwork" else {}
    found = []
    for backend in (adapters.laplace_backend(), laplace.curvature.GGNInterface):
        fitted = laplace.Laplace(
            net, likelihood, weights, hessian_structure="diag", backend=backend, **options
        )
        fitted.fit(data)
        prediction = fitted(next(iter(data))[0])  # needs Jacobians of the backend too
        found.append((fitted.H, fitted.loss, prediction))
    (got, loss, prediction), (want, want_loss, want_prediction) = found
    assert got.shape == want.shape and relative_error(loss, want_loss) < 1e-10
    # Exact: all but the first layer of a classifier, whose loss has off-diagonal curvature.
    exact = slice(None)
    if likelihood == "classification":
        exact = {"all": slice(30, None), "subnetwork": slice(5, None)}.get(weights, exact)
    assert relative_error(got[exact], want[exact]) < 1e-10
    assert (got >= 0).all()
    if exact == slice(None):
        pairs = zip(prediction, want_prediction, strict=True)
        assert all(relative_error(g, w) < 1e-10 for g, w in pairs)


def test_laplace_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "laplace", None)
    monkeypatch.setitem(__import__("sys").modules, "laplace.curvature", None)
    with pytest.raises(HesScaleError, match="needs laplace-torch: pip install"):
        adapters.laplace_backend.__wrapped__()


# --- quantities --------------------------------------------------------------------------------


class Bowl(nn.Module):
    """A loss whose Hessian is diagonal, so that second order is all there is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 3))
        self.double()

    def forward(self, curvature, center):
        elements = torch.cat([self.a, self.b.flatten()])
        return (curvature * (elements - center).square()).sum() / 2


def bowl(at_the_minimum):
    model = Bowl()
    curvature = torch.rand(12).double() + 0.1
    elements = torch.cat([model.a, model.b.flatten()]).detach()
    center = elements if at_the_minimum else torch.randn(12).double()
    hs = hesscale_fx.transform(model)
    return model, hs(curvature, center), (curvature, center)


def rise(model, name, i, value, data):
    """How much the loss rises when one element is set to a value."""
    with torch.no_grad():
        flat = dict(model.named_parameters())[name].view(-1)
        old, before = flat[i].clone(), model(*data)
        flat[i] = value
        after = model(*data)
        flat[i] = old
    return after - before


@pytest.mark.parametrize("at_the_minimum", [True, False])
def test_saliency_and_utility_are_the_rise_of_the_loss(at_the_minimum):
    model, out, data = bowl(at_the_minimum)
    found = [adapters.utility(model.named_parameters(), out.grads, out.hess_diag)]
    if at_the_minimum:
        found.append(adapters.saliency(model.named_parameters(), out.hess_diag))
    for quantity in found:
        for name, p in model.named_parameters():
            want = torch.stack([rise(model, name, i, 0.0, data) for i in range(p.numel())])
            assert relative_error(quantity[name].flatten(), want) < 1e-12


@pytest.mark.parametrize(
    "rounding",
    [
        torch.bfloat16,
        torch.round,
        lambda p: torch.fake_quantize_per_tensor_affine(p.float(), 0.1, 0, -128, 127),
    ],
)
def test_rounding_sensitivity_is_twice_the_rise_of_the_loss(rounding):
    model, out, data = bowl(at_the_minimum=True)
    got = adapters.rounding_sensitivity(model.named_parameters(), out.hess_diag, rounding)
    for name, p in model.named_parameters():
        new = p.detach().to(rounding) if isinstance(rounding, torch.dtype) else rounding(p.detach())
        values = new.double().flatten()
        want = sum(rise(model, name, i, v, data) for i, v in enumerate(values))
        assert want > 0 and abs(got[name] - 2 * want) < 1e-12 * want


def test_names_that_do_not_fit_are_refused():
    model, out, _ = bowl(at_the_minimum=True)
    with pytest.raises(HesScaleError, match="no parameter of the name 'b'"):
        adapters.saliency({"a": model.a}, out.hess_diag)
