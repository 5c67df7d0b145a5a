"""All columns through the last contractions, the recursion above them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from test_columns import DOUBLE, MODELS, labels, mlp, x
from torch import nn

import hesscale_fx
from hesscale_fx import transform


def diagonal(net, inputs, y, **options):
    return transform(net, F.cross_entropy, (inputs, y), **options)(inputs, y).hess_diag


def exact_parts(net, inputs, y, tail):
    """The parameters whose diagonals are those of all columns."""
    got = diagonal(net, inputs, y, tail=tail)
    want = diagonal(net, inputs, y, columns="exact")
    return {n for n in want if (got[n] - want[n]).abs().max() < 1e-12 * want[n].abs().max()}


class Skip(nn.Module):
    """The first layer reaches the head both directly and through another layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h + self.second(h).tanh())


@pytest.mark.parametrize(
    "method", ["hesscale", pytest.param("hesscale_gn", marks=pytest.mark.slow)]
)
def test_no_tail_is_the_recursion_and_a_long_one_is_all_columns(method):
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), labels(4)
    plain = diagonal(net, inputs, y, method=method)
    columns = {"columns": "exact"} if method == "hesscale" else {"method": "ggn"}
    whole = diagonal(net, inputs, y, **columns)
    assert_close(diagonal(net, inputs, y, method=method, tail=0), plain, 1e-12, "none")
    assert_close(diagonal(net, inputs, y, method=method, tail=3), whole, 1e-12, "all")
    assert (plain["0.weight"] - whole["0.weight"]).abs().max() > 1e-3  # so this can fail


def test_above_the_tail_goes_the_recursion():
    """Started at the diagonal of the upper half, as that of a quadratic function of the middle."""
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), labels(4)
    lower, upper = net[:3], net[3:]
    middle = lower(inputs).detach()
    top = transform(upper, F.cross_entropy, wrt="inputs", columns="exact")(middle, y)
    (g,), (s,) = top.grads.values(), top.hess_diag.values()

    def quadratic(z):
        return (g * (z - middle) + 0.5 * s * (z - middle) ** 2).sum()

    want = transform(lower, quadratic)(inputs).hess_diag
    got = diagonal(net, inputs, y, tail=1)
    assert_close({n: got[n] for n in want}, want, 1e-12, "above")


def test_the_longest_path_counts():
    """Where each sample uses a weight once, squares at the output of its layer are enough."""
    net, inputs, y = Skip().to(DOUBLE), x(4, 5), labels(4)
    assert {n.split(".")[0] for n in exact_parts(net, inputs, y, 1)} == {"head", "second"}
    assert len(exact_parts(net, inputs, y, 2)) == 6


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        pytest.param("pooled convolutions", 3, marks=pytest.mark.slow),
        pytest.param("batch norm", 2, marks=pytest.mark.slow),
        pytest.param("weight norm", 2, marks=pytest.mark.slow),
        pytest.param("tied", 3, marks=pytest.mark.slow),
        pytest.param("attention", 3, marks=pytest.mark.slow),
        pytest.param("lstm", 4, marks=pytest.mark.slow),
    ],
)
def test_a_tail_of_the_whole_depth_is_exact_in_every_model(name, depth):
    net, inputs, y = MODELS[name]()
    net = net.to(DOUBLE)
    every = {n for n, _ in net.named_parameters()}
    assert exact_parts(net, inputs, y, depth) == every
    assert exact_parts(net, inputs, y, depth - 1) < every


@pytest.mark.slow
def test_how_often_a_tensor_is_computed_does_not_matter():
    class Apart(Skip):
        def forward(self, x):
            first, second = self.first(x).tanh(), self.first(x).tanh()
            return self.head(first + self.second(second).tanh())

    net, inputs, y = Skip().to(DOUBLE), x(4, 5), labels(4)
    twin = Apart().to(DOUBLE)
    twin.load_state_dict(net.state_dict())
    a, b = (diagonal(n, inputs, y, tail=1) for n in (net, twin))
    assert_close(a, b, 1e-12, "spelling")


def test_one_graph_for_every_batch_size():
    net, inputs, y = mlp().to(DOUBLE), x(4, 5), labels(4)
    hs = transform(net, F.cross_entropy, (inputs, y), tail=1)
    assert hs.report()["4.weight"].exact and not hs.report()["0.weight"].exact
    more, labels_of_more = x(7, 5), labels(7)
    want = diagonal(net, more, labels_of_more, tail=1)
    assert_close(hs(more, labels_of_more).hess_diag, want, 1e-12, "batch")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tail": -1}, "from 0 on, not -1"),
        ({"tail": True}, "from 0 on, not True"),
        ({"tail": "exact"}, "columns='exact'"),
        ({"tail": 1, "columns": 2}, "takes no columns=2"),
        ({"tail": 1, "columns": 0}, "takes no columns=0"),
        ({"tail": 1, "calibrate": True}, "takes no calibrate=True"),
        ({"tail": 1, "generator": torch.Generator()}, "takes no generator="),
        ({"tail": 1, "method": "ggn"}, "takes no tail="),
        ({"tail": 1, "curvature_dtype": torch.bfloat16}, "tail"),
    ],
)
def test_nonsense_is_refused_by_name(options, words):
    with pytest.raises(hesscale_fx.HesScaleError, match=words):
        transform(mlp(), F.cross_entropy, **options)


def test_a_tail_needs_to_know_where_the_model_ends():
    model = lambda a: mlp()(a).sum()  # noqa: E731
    with pytest.raises(hesscale_fx.HesScaleError, match=r"tail=.*hesscale_fx.output"):
        transform(model, wrt="inputs", example_inputs=(torch.randn(4, 5),), tail=1)
