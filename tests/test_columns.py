"""Columns of the loss's root and calibration, against dense Jacobians and Hessians."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn
from torch.nn.utils import parametrizations

import hesscale_fx
from hesscale_fx import transform
from hesscale_fx.structures.persample import product_norms

DOUBLE = torch.float64


def positive(hessian):
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors * values.clamp(min=0)) @ vectors.T


def brute_force(net, loss, x, y):
    """The diagonal of ``J^T H+ J``, H+ the positive part of the loss's Hessian at the output."""
    params = {n: p.detach() for n, p in net.named_parameters()}
    z = net(x).detach()
    hessian = torch.func.jacrev(torch.func.jacrev(lambda z: loss(z, y)))(z).reshape(
        z.numel(), z.numel()
    )
    hessian = positive(hessian)
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(params)
    rows = {n: j.reshape(z.numel(), -1) for n, j in jacobian.items()}
    return {n: (j * (hessian @ j)).sum(0).reshape(params[n].shape) for n, j in rows.items()}


class Sequence(nn.Module):
    """Attention over positions, a tied embedding, a norm; logits of (batch * positions, words)."""

    def __init__(self, tied):
        super().__init__()
        self.words, self.places = nn.Embedding(7, 6), nn.Parameter(torch.randn(4, 6))
        self.value, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 7)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places
        h = self.norm(x)
        weights = (h @ h.transpose(1, 2)).tril().softmax(-1)
        return self.head(x + weights @ self.value(h).tanh()).flatten(0, 1)


class Last(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


def mlp(out=3):
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, out))


def convolutions(end):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)] if end else [nn.Conv2d(4, 3, 1)]
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, 2, groups=1), nn.Tanh(), *head
    )


def x(*shape):
    return torch.randn(shape, dtype=DOUBLE)


def labels(*shape):
    return torch.randint(3, shape)


WEIGHTED = nn.CrossEntropyLoss(
    weight=torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE), label_smoothing=0.1, ignore_index=2
)
LOSSES = {
    "cross entropy": (F.cross_entropy, lambda: labels(4)),
    "weights, smoothing, ignored": (WEIGHTED, lambda: torch.tensor([0, 1, 2, 1])),
    "soft targets": (F.cross_entropy, lambda: torch.rand(4, 3, dtype=DOUBLE).softmax(1)),
    "mse": (F.mse_loss, lambda: x(4, 3)),
    "bce": (F.binary_cross_entropy_with_logits, lambda: torch.rand(4, 3, dtype=DOUBLE)),
    "poisson": (F.poisson_nll_loss, lambda: torch.rand(4, 3, dtype=DOUBLE)),
    "coupled": (lambda z, y: z.square().logsumexp(1).mean() + F.cross_entropy(z, y),
                lambda: labels(4)),
}  # fmt: skip
MODELS = {
    "pooled convolutions": lambda: (convolutions(True), x(3, 2, 4, 4), labels(3)),
    "spatial targets": lambda: (convolutions(False), x(3, 2, 4, 4), labels(3, 2, 2)),
    "attention": lambda: (Sequence(False), torch.randint(7, (3, 4)), torch.randint(7, (12,))),
    "tied": lambda: (Sequence(True), torch.randint(7, (3, 4)), torch.randint(7, (12,))),
    "lstm": lambda: (Last(nn.LSTM(5, 4, batch_first=True)), x(3, 3, 5), labels(3)),
    "sequence first": lambda: (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
                               x(4, 5), labels(4)),
    "weight norm": lambda: (nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(),
                                          nn.Linear(6, 3)), x(4, 5), labels(4)),
    "batch norm": lambda: (nn.Sequential(nn.Linear(5, 6),
                                         nn.BatchNorm1d(6, track_running_stats=False),
                                         nn.Tanh(), nn.Linear(6, 3)), x(4, 5), labels(4)),
    "1d convolution": lambda: (nn.Sequential(nn.Conv1d(2, 3, 2, dilation=2), nn.Tanh(),
                                             nn.Flatten(), nn.Linear(9, 3)), x(4, 2, 5), labels(4)),
}  # fmt: skip


def default(names, *slow):
    """The names as parameters, some of them for the slow suite."""
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names]


@pytest.mark.parametrize("name", default(LOSSES, "soft targets", "poisson", "cross entropy"))
def test_the_ggn_is_exact_for_every_loss(name):
    loss, target = LOSSES[name]
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), target()
    out = transform(net, loss, (inputs, y), method="ggn")(inputs, y)
    assert_close(out.hess_diag, brute_force(net, loss, inputs, y), 1e-10, name)


@pytest.mark.parametrize(
    "name", default(MODELS, "attention", "lstm", "sequence first", "1d convolution")
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_ggn_is_exact_in_every_model(name):
    net, inputs, y = MODELS[name]()
    net = net.to(DOUBLE)
    out = transform(net, F.cross_entropy, (inputs, y), method="ggn")(inputs, y)
    assert_close(out.hess_diag, brute_force(net, F.cross_entropy, inputs, y), 1e-10, name)


def test_another_batch_size():
    net = convolutions(True).to(DOUBLE)
    hs = transform(net, F.cross_entropy, (x(4, 2, 4, 4), labels(4)), method="ggn")
    for n in (5, 2):
        inputs, y = x(n, 2, 4, 4), labels(n)
        want = brute_force(net, F.cross_entropy, inputs, y)
        assert_close(hs(inputs, y).hess_diag, want, 1e-10, f"batch {n}")


def test_a_model_of_relu_has_only_a_gauss_newton_part():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net, inputs, y = net.to(DOUBLE), x(4, 5), labels(4)
    exact = transform(net, F.cross_entropy, method="exact")(inputs, y).hess_diag
    got = transform(net, F.cross_entropy, columns="exact")(inputs, y).hess_diag
    assert_close(got, exact, 1e-10, "columns")
    plain = transform(net, F.cross_entropy)(inputs, y).hess_diag
    assert (plain["0.weight"] - exact["0.weight"]).abs().max() > 1e-3  # so this can fail


def test_exact_columns_are_the_ggn_and_the_second_derivatives():
    """The rest is what HesScale has beyond its own Gauss-Newton part, with the same gradient."""
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), labels(4)
    parts = {
        "both": transform(net, F.cross_entropy, columns="exact"),
        "ggn": transform(net, F.cross_entropy, method="ggn"),
        "s": transform(net, F.cross_entropy),
        "gn": transform(net, F.cross_entropy, method="hesscale_gn"),
    }
    d = {name: hs(inputs, y).hess_diag for name, hs in parts.items()}
    want = {n: d["ggn"][n] + d["s"][n] - d["gn"][n] for n in d["both"]}
    assert_close(d["both"], want, 1e-10, "columns")


def test_the_negative_part_of_a_loss_is_left_to_the_recursion():
    net, inputs, y = nn.Linear(5, 3).to(DOUBLE), x(4, 5), labels(4)
    loss = lambda z, y: -F.cross_entropy(z, y)  # noqa: E731
    exact = transform(net, loss, method="exact")(inputs, y).hess_diag
    assert (exact["weight"] < 0).all()
    assert_close(transform(net, loss, columns=1)(inputs, y).hess_diag, exact, 1e-10, "negative")


MEANS = {
    "one": (lambda: (mlp(), x(4, 5), labels(4)), F.cross_entropy, 1),
    "three": (lambda: (mlp(), x(4, 5), x(4, 3)), F.mse_loss, 3),
    "shared": (MODELS["pooled convolutions"], F.cross_entropy, 2),
    "positions": (MODELS["tied"], F.cross_entropy, 1),
    "batch norm": (MODELS["batch norm"], F.cross_entropy, 1),
    "full": (lambda: (mlp(), x(4, 5), labels(4)), LOSSES["coupled"][0], 2),
}


@pytest.mark.parametrize("name", default(MEANS, "positions", "three", "batch norm", "full"))
def test_random_columns_are_right_on_average(name):
    make, loss, count = MEANS[name]
    net, inputs, y = make()
    net = net.to(DOUBLE)
    generator = torch.Generator().manual_seed(0)
    hs = transform(net, loss, (inputs, y), method="ggn", columns=count, generator=generator)
    want = torch.cat([v.flatten() for v in brute_force(net, loss, inputs, y).values()])
    draws = [torch.cat([v.flatten() for v in hs(inputs, y).hess_diag.values()]) for _ in range(300)]
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    seen = want > 1e-10 * want.max()
    # Where the recursion is exact there is no noise but rounding.
    z = (draws.mean(0) - want)[seen] / error[seen].clamp(min=1e-13 * want.max())
    assert z.abs().mean() < 1.5 and z.abs().max() < 7
    assert draws.std(0)[seen].max() > 0  # they are random


@pytest.mark.parametrize(
    "options", [{"columns": 1}, pytest.param({"calibrate": True}, marks=pytest.mark.slow)], ids=str
)
def test_what_the_recursion_has_exactly_has_no_noise(options):
    one_sample, _, _ = MODELS["batch norm"]()
    for net, last in ((mlp(), "4"), (one_sample, "3")):
        net, inputs, y = net.to(DOUBLE), x(4, 5), labels(4)
        hs = transform(net, F.cross_entropy, (inputs, y), **options)
        a, b = hs(inputs, y).hess_diag, hs(inputs, y).hess_diag
        want = transform(net, F.cross_entropy, (inputs, y))(inputs, y).hess_diag
        for name in (f"{last}.weight", f"{last}.bias"):
            torch.testing.assert_close(a[name], want[name], rtol=1e-12, atol=0)
        assert not torch.equal(a["0.weight"], b["0.weight"])


def test_two_classes_that_compete_have_one_column():
    """Its square is the same for all signs, so that one random column is exact."""
    net, inputs, y = mlp(2).to(DOUBLE), x(4, 5), torch.randint(2, (4,))
    want = brute_force(net, F.cross_entropy, inputs, y)
    got = transform(net, F.cross_entropy, (inputs, y), method="ggn", columns=1)(inputs, y).hess_diag
    assert_close(got, want, 1e-10, "two classes")


def test_a_generator_repeats_its_draws_and_a_compiled_graph_draws_afresh():
    net, inputs, y = mlp(), torch.randn(4, 5), labels(4)
    first, second = (
        transform(net, F.cross_entropy, columns=1, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    a, b = first(inputs, y).hess_diag, second(inputs, y).hess_diag
    assert_close(a, b, 0, "draws")
    assert not torch.equal(a["0.weight"], first(inputs, y).hess_diag["0.weight"])
    hs = transform(net, F.cross_entropy, (inputs, y), columns=1)
    fast = torch.compile(hs, fullgraph=True, backend="eager")
    c, d = (fast(inputs, y).hess_diag["0.weight"] for _ in range(2))
    assert not torch.equal(c, d)


# --- calibration ----------------------------------------------------------------------------------


def test_calibration_gives_each_tensor_the_mass_of_the_ggn():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net, inputs, y = net.to(DOUBLE), x(4, 5), labels(4)
    want = brute_force(net, F.cross_entropy, inputs, y)
    hs = transform(net, F.cross_entropy, calibrate=True, columns="exact")
    got = hs(inputs, y).hess_diag
    plain = transform(net, F.cross_entropy)(inputs, y).hess_diag
    for name, factor in hs.factors.items():
        torch.testing.assert_close(got[name].sum(), want[name].sum())
        torch.testing.assert_close(got[name], factor * plain[name])
    assert max(abs(f - 1) for f in hs.factors.values()) > 1e-2


@pytest.mark.parametrize(
    "name", default(["pooled convolutions", "attention", "tied"], "attention", "tied")
)
def test_factors_are_ratios_of_traces_in_every_model(name):
    net, inputs, y = MODELS[name]()
    net = net.to(DOUBLE)
    want = brute_force(net, F.cross_entropy, inputs, y)
    plain = transform(net, F.cross_entropy, method="hesscale_gn")(inputs, y).hess_diag
    hs = transform(net, F.cross_entropy, calibrate=True, columns="exact")
    hs(inputs, y)
    report = hs.report()
    for n, factor in hs.factors.items():
        ratio = (want[n].sum() / plain[n].sum()).item()
        assert factor == pytest.approx(ratio, rel=1e-9) or plain[n].sum() == 0, n
        assert factor == 1 or not report[n].exact


@pytest.mark.parametrize(("places", "outputs", "inputs"), [(1, 3, 4), (2, 9, 8), (9, 3, 2)])
def test_squared_norms_by_products_over_places_or_features(places, outputs, inputs):
    u, v = x(4, places, outputs), x(4, places, inputs)
    want = (u.transpose(1, 2) @ v).square().sum()
    torch.testing.assert_close(product_norms(u, v), want)


def test_factors_are_kept_between_refreshes():
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), labels(4)
    hs = transform(net, F.cross_entropy, calibrate=3, columns="exact")
    assert set(hs.factors.values()) == {1.0}
    first = hs(inputs, y).hess_diag
    known = hs.factors
    again = hs(inputs, y).hess_diag  # by the graph without columns: the same factors, same point
    assert_close(again, first, 1e-12, "between")
    for p in net.parameters():
        p.data.mul_(1.1)
    hs(inputs, y)
    assert hs.factors == known
    hs(inputs, y)
    assert hs.factors != known


def test_factors_are_saved_loaded_and_copied():
    net, inputs, y = mlp(), torch.randn(4, 5), labels(4)
    hs = transform(net, F.cross_entropy, (inputs, y), calibrate=2)
    hs(inputs, y)
    assert hs.state_dict()["calibration"].shape == (len(list(net.parameters())),)
    other = transform(mlp(), F.cross_entropy, calibrate=2)
    other.load_state_dict(hs.state_dict())
    assert other.factors == hs.factors == copy.deepcopy(hs).factors
    assert set(net.state_dict()) == set(hs.state_dict()) - {"calibration"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": -1}, "columns"),
        ({"columns": True}, "columns"),
        ({"method": "bl89", "columns": 1}, "takes no columns="),
        ({"method": "ggn", "columns": 0}, "needs columns"),
        ({"method": "hesscale_gn", "calibrate": True}, "takes no calibrate="),
        ({"calibrate": -1}, "calibrate"),
        ({"calibrate": True, "columns": 0}, "needs columns"),
        ({"calibrate": True, "wrt": "inputs"}, "wrt='inputs'"),
        ({"generator": torch.Generator()}, "random columns"),
        ({"samples": 3}, "takes no samples="),
    ],
)
def test_options_are_refused_by_name(options, words):
    with pytest.raises(hesscale_fx.HesScaleError, match=words):
        transform(mlp(), F.cross_entropy, **options)


def test_several_outputs_are_refused_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    loss = lambda z, y: (z[0] - z[1] - y).square().mean()  # noqa: E731
    with pytest.raises(hesscale_fx.HesScaleError, match="has 2"):
        transform(Two(), loss, (torch.randn(4, 5), torch.ones(4, 3)), columns=1)


# --- the negative part of a loss ------------------------------------------------------------------

CONVEX = "convex"
NEGATIVE = "a negative part is left to the recursion"
SPLITS = {
    "root": (F.cross_entropy, f"closed form; {CONVEX}"),
    "negative root": (lambda z, y: -F.cross_entropy(z, y), f"closed form; {NEGATIVE}"),
    "full": (lambda z, y: (z.sin().sum(1) * z[:, 0]).mean(), f"eigenvectors.*{NEGATIVE}"),
    "diagonal": (lambda z, y: z.sin().mean(), f"diagonal; {NEGATIVE}"),
}


@pytest.mark.parametrize("name", default(SPLITS, "root", "diagonal"))
def test_how_much_of_a_loss_is_negative_is_reported(name):
    loss, words = SPLITS[name]
    net, inputs, y = nn.Linear(5, 3).to(DOUBLE), x(4, 5), labels(4)
    hs = transform(net, loss, (inputs, y), columns=1)
    assert re.search(words, str(hs.report()))
    z = net(inputs).detach()
    hessian = torch.func.jacrev(torch.func.jacrev(lambda z: loss(z, y)))(z)
    values = torch.linalg.eigvalsh(hessian.reshape(z.numel(), -1))
    found = hs.loss_curvature(inputs, y)
    want = [values.clamp(min=0).sum(), values.clamp(max=0).sum()]
    torch.testing.assert_close(torch.tensor(found), torch.stack(want).float())
    assert found.share == pytest.approx((want[1] / (want[1] - want[0])).item(), abs=1e-6)


def test_every_method_says_how_much_of_a_loss_is_negative():
    net, inputs, y = nn.BatchNorm1d(3), torch.randn(4, 3), labels(4)
    hs = transform(net, lambda z, y: -F.cross_entropy(z, y))
    before = hs(inputs, y).loss
    assert hs.report().split == "" and hs.loss_curvature(inputs, y).share == 1
    mean = net.running_mean.clone()
    hs.loss_curvature(inputs, y)
    assert torch.equal(net.running_mean, mean)  # nothing is written
    assert torch.equal(hs(inputs, y).loss, before)
    alone = transform(lambda a: net(a).square().sum(), wrt="inputs")
    with pytest.raises(hesscale_fx.HesScaleError, match=r"loss_curvature.*hesscale_fx.output"):
        alone.loss_curvature(inputs)
