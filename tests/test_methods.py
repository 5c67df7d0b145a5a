"""Every method against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from reference import exact_hessian_diagonal
from test_columns import DOUBLE, MODELS, default, labels, mlp, x
from torch import nn

import hesscale_fx
from hesscale_fx import transform
from hesscale_fx.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_autograd(method):
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), labels(4)
    out = transform(net, F.cross_entropy, (inputs, y), method=method)(inputs, y)
    loss = F.cross_entropy(net(inputs), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    names = [n for n, _ in net.named_parameters()]
    assert_close(out.grads, dict(zip(names, grads, strict=True)), 1e-12, method)
    torch.testing.assert_close(out.loss, loss.detach())
    assert not any(h.requires_grad for h in out.hess_diag.values())
    assert all(
        h.shape == p.shape for h, p in zip(out.hess_diag.values(), net.parameters(), strict=True)
    )


# --- bl89 -----------------------------------------------------------------------------------------


def test_bl89_starts_at_y_p_1_minus_p():
    net, inputs, y = nn.Linear(5, 3).to(DOUBLE), x(4, 5), labels(4)
    p = net(inputs).softmax(1)
    s = F.one_hot(y, 3) * p * (1 - p) / 4
    want = {"weight": s.T @ inputs.square(), "bias": s.sum(0)}
    for loss in (F.cross_entropy, lambda z, y: F.nll_loss(z.softmax(1).log(), y)):
        got = transform(net, loss, method="bl89")(inputs, y).hess_diag
        assert_close(got, want, 1e-12, "bl89")


def test_bl89_is_the_recursion_where_there_is_no_softmax():
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), x(4, 3)
    a, b = (transform(net, F.mse_loss, method=m)(inputs, y) for m in ("bl89", "hesscale"))
    assert_close(a.hess_diag, b.hess_diag, 1e-12, "mse")


def test_bl89_refuses_a_softmax_it_does_not_know():
    def loss(z, y):
        e = z.exp()
        return F.nll_loss((e / e.sum(1, keepdim=True)).log(), y)

    with pytest.raises(hesscale_fx.HesScaleError, match="log_softmax"):
        transform(mlp(), loss, (torch.randn(4, 5), labels(4)), method="bl89")


# --- squared gradients per sample -----------------------------------------------------------------


def fisher(net, loss, inputs, y):
    """The gradient of the loss through one sample at a time, squared."""
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    z = net(inputs)
    (seed,) = torch.autograd.grad(loss(z, y), z, retain_graph=True)
    samples = seed.reshape(len(inputs), -1)
    for b in range(len(inputs)):
        alone = torch.zeros_like(samples)
        alone[b] = samples[b]
        grads = torch.autograd.grad(
            z, list(net.parameters()), alone.reshape(z.shape), True, materialize_grads=True
        )
        for t, g in zip(total.values(), grads, strict=True):
            t += g.detach() ** 2
    return total


@pytest.mark.parametrize(
    "name",
    default(
        [n for n in MODELS if n != "batch norm"], "tied", "lstm", "sequence first", "weight norm"
    ),
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_squared_gradients_per_sample(name):
    net, inputs, y = MODELS[name]()
    net = net.to(DOUBLE)
    out = transform(net, F.cross_entropy, (inputs, y), method="empirical_fisher")(inputs, y)
    assert_close(out.hess_diag, fisher(net, F.cross_entropy, inputs, y), 1e-10, name)


def test_there_is_no_gradient_per_sample_where_samples_interact():
    net, inputs, y = MODELS["batch norm"]()
    with pytest.raises(hesscale_fx.HesScaleError, match="eval mode"):
        transform(net.to(DOUBLE), F.cross_entropy, (inputs, y), method="empirical_fisher")


def test_a_parameter_used_after_the_samples_were_combined():
    class Penalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z, y):
            return F.cross_entropy(z, y) + self.scale**2

    with pytest.raises(hesscale_fx.HesScaleError, match="combined"):
        transform(mlp(), Penalized(), (torch.randn(4, 5), labels(4)), method="empirical_fisher")


# --- exact and Hutchinson -------------------------------------------------------------------------


def test_hutchinson_of_transposed_logits():
    """Of whose nll_loss2d a kernel wants contiguous log-probabilities."""

    class Tokens(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    net, inputs = Tokens(4, 5).to(DOUBLE), x(3, 6, 4)
    y = torch.arange(18).reshape(3, 6) % 5
    hs = transform(net, F.cross_entropy, (inputs, y), method="hutchinson", samples=4)
    torch.manual_seed(1)
    got = hs(inputs, y).hess_diag

    def flat(z, y):
        return F.cross_entropy(z.transpose(1, 2).reshape(-1, 5), y.flatten())

    again = transform(net, flat, (inputs, y), method="hutchinson", samples=4)
    torch.manual_seed(1)
    assert_close(got, again(inputs, y).hess_diag, 1e-12, "transposed logits")


@pytest.mark.parametrize(
    "name", default(["pooled convolutions", "tied", "lstm", "batch norm"], "tied", "lstm")
)
def test_exact(name):
    net, inputs, y = MODELS[name]()
    net = net.to(DOUBLE)
    out = transform(net, F.cross_entropy, (inputs, y), method="exact")(inputs, y)
    params = dict(net.named_parameters())
    want = exact_hessian_diagonal(lambda: F.cross_entropy(net(inputs), y), params)
    assert_close(out.hess_diag, want, 1e-10, name)


def test_exact_under_dropout_sees_the_mask_of_its_gradient():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(DOUBLE)
    inputs, y = x(4, 5), labels(4)
    hs = transform(net, F.cross_entropy, (inputs, y), method="exact")
    torch.manual_seed(5)
    out = hs(inputs, y)
    after = torch.rand(())
    torch.manual_seed(5)
    want = transform(net, F.cross_entropy, (inputs, y), columns="exact")
    torch.manual_seed(5)
    assert_close(out.grads, want(inputs, y).grads, 1e-12, "gradient")
    assert torch.equal(after, torch.rand(()))
    assert (out.hess_diag["3.weight"].abs().sum(0) == 0).equal(
        out.grads["3.weight"].abs().sum(0) == 0
    )


@pytest.mark.parametrize("name", default(["pooled convolutions", "attention"], "attention"))
def test_hutchinson_is_right_for_every_pair_of_coordinates(name):
    """``z * Hz`` is quadratic in z: unit vectors give the diagonal, one entry each."""
    net, inputs, y = MODELS[name]()
    net = net.to(DOUBLE)
    hs = transform(net, F.cross_entropy, (inputs, y), method="hutchinson")
    program = hs._program()
    params = dict(net.named_parameters())
    want = exact_hessian_diagonal(lambda: F.cross_entropy(net(inputs), y), params)
    signs = [torch.zeros(1, *p.shape, dtype=DOUBLE) for p in params.values()]
    for vector, (n, p) in zip(signs, params.items(), strict=True):
        for i in range(0, p.numel(), 7):
            vector.view(-1)[i] = 1
            with torch.no_grad():
                got = program.function(hs, inputs, y, *signs)[2][n].reshape(-1)
            vector.view(-1)[i] = 0
            torch.testing.assert_close(got[i], want[n].reshape(-1)[i], rtol=1e-9, atol=1e-12)


def test_hutchinson_samples_are_averaged():
    """The same signs for every sample give what one sample gives."""
    net, inputs, y = nn.Linear(5, 3), torch.randn(4, 5), labels(4)
    one, three = (
        transform(net, F.cross_entropy, (inputs, y), method="hutchinson", samples=k) for k in (1, 3)
    )
    signs = [torch.randn(1, *p.shape).sign() for p in net.parameters()]
    with torch.no_grad():
        a = one._program().function(one, inputs, y, *signs)[2]
        repeated = [s.expand(3, *s.shape[1:]) for s in signs]
        b = three._program().function(three, inputs, y, *repeated)[2]
    assert_close(b, a, 1e-5, "mean")
    first, second = (one(inputs, y).hess_diag["weight"] for _ in range(2))
    assert not torch.equal(first, second)


def test_methods_that_need_a_boundary_say_so():
    model = lambda a: mlp()(a).sum()  # noqa: E731
    for method in ("bl89", "ggn"):
        with pytest.raises(hesscale_fx.HesScaleError, match="hesscale_fx.output"):
            transform(model, wrt="inputs", example_inputs=(torch.randn(4, 5),), method=method)


def test_a_report_calls_exact_only_what_is():
    net, inputs, y = mlp(), torch.randn(4, 5), labels(4)
    expected = {
        "hesscale": True, "hesscale_gn": True, "bl89": False, "ggn": True, "hutchinson": False,
        "empirical_fisher": True, "exact": True,
    }  # fmt: skip
    for method, exact in expected.items():
        hs = transform(net, F.cross_entropy, (inputs, y), method=method)
        assert hs.report()["4.weight"].exact == exact, method
    assert not transform(net, F.cross_entropy, (inputs, y), columns=1).report()["4.weight"].exact
    hs = transform(net, F.cross_entropy, (inputs, y), calibrate=True)
    assert not hs.report()["4.weight"].exact
