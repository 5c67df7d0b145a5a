"""verify(): the measured error is that of an independent calculation, and nothing is disturbed."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from models import CASES, GPT
from test_exactness import exact_diagonal
from test_models import build
from torch import nn

import hesscale_fx
from hesscale_fx import verify as verify_module
from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.report import Agreement, Verification, table

SEED = 11


def compare(value, exact):
    """Error, correlation and signs in other words than the package's."""
    a, b = value.double().flatten(), exact.double().flatten()
    error = float((a - b).abs().sum() / b.abs().sum()) if b.abs().sum() else 0.0
    both = torch.stack([a, b])
    correlation = float(torch.corrcoef(both)[0, 1]) if len(a) > 1 else math.nan
    return error, correlation, float((a.sign() == b.sign()).double().mean())


def by_differences(loss, parameters, h=1e-5):
    """The diagonal from gradients on both sides, where autograd cannot differentiate twice."""
    result = {}
    for name, p in parameters.items():
        flat = p.detach().view(-1)
        result[name] = torch.zeros_like(p)
        for i, middle in enumerate(flat.tolist()):
            sides = []
            for side in (middle + h, middle - h):
                flat[i] = side
                torch.manual_seed(3)
                sides.append(torch.autograd.grad(loss(), p)[0].view(-1)[i])
            flat[i] = middle
            result[name].view(-1)[i] = (sides[0] - sides[1]) / (2 * h)
    return result


def agree(row, value, exact, rough=False):
    error, correlation, signs = compare(value, exact)
    assert row.samples == value.numel()
    if exact.abs().max() < 1e-12:
        return  # a bias that a normalisation removes: a ratio of roundings
    rounding = 1e-12 + 1e-15 / float(exact.abs().mean())  # of gradients of about one
    assert row.error == pytest.approx(error, rel=1e-6, abs=1e-6 if rough else rounding)
    # The bias of keys has no effect: its diagonal is zero, the sign that of a rounding.
    zero = float((exact.abs() < 1e-12 * exact.abs().max()).double().mean())
    assert rough or row.signs == pytest.approx(signs, abs=0.02 + zero)
    constant = min(value.std(correction=0), exact.std(correction=0)) < 1e-10
    if not constant and not math.isnan(correlation):
        assert row.correlation == pytest.approx(correlation, abs=1e-6)


def check(model, loss, inputs, targets=(), kwargs=None, samples=10_000, **options):
    """verify() of all coordinates against the diagonals by an own double backward."""
    kwargs = kwargs or {}
    args = (*inputs, *targets)
    reference = copy.deepcopy(model)
    hs = hesscale_fx.transform(model, loss, args, kwargs or None, **options)
    torch.manual_seed(3)
    found = hs.verify(*args, samples=samples, **kwargs)
    torch.manual_seed(3)
    out = hs(*args, **kwargs)

    def value():
        result = reference(*inputs, **kwargs)
        return result if loss is None else loss(result, *targets)

    parameters, rough = dict(reference.named_parameters()), False
    try:
        want = exact_diagonal(value, parameters)
    except (RuntimeError, NotImplementedError) as error:
        assert "derivative" in str(error)
        want, rough = by_differences(value, parameters), True
    assert list(found) == list(out.hess_diag)
    for name, row in found.items():
        agree(row, out.hess_diag[name], want[name], rough)
    names = list(found)
    agree(
        found.overall,
        torch.cat([out.hess_diag[n].flatten() for n in names]),
        torch.cat([want[n].flatten() for n in names]),
        rough,
    )
    return found


MODELS = [
    "mlp-ReLU()", "mlp-Hardsigmoid()", "mlp-Hardswish()", "dropout-plain", "norm-batch-2d",
    "multihead-padding", "conv-2d-reflect", "embedding-bag-mean",
    "loss-cross-entropy-label-smoothing",
]  # fmt: skip


def cases():
    for name in CASES:
        marks = [] if name in MODELS else [pytest.mark.slow]
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(cases()))
def test_every_coordinate_of_every_model(name):
    made = build(name, torch.float64)
    check(made.model, made.loss, made.inputs, made.targets, made.kwargs)


def mlp(width=8):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    net.append(nn.Linear(width, 3))
    return net.double(), torch.randn(7, 6).double(), torch.randint(3, (7,))


def test_samples_are_drawn_without_repetition_and_agree_with_the_coordinates_they_are():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    out = hs(x, y)
    want = exact_diagonal(lambda: F.cross_entropy(net(x), y), dict(net.named_parameters()))
    found = hs.verify(x, y, samples=5, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    for name, row in found.items():
        chosen = torch.randperm(want[name].numel(), generator=generator)[:5].sort().values
        assert row.samples == len(chosen) == min(5, want[name].numel())
        agree(row, out.hess_diag[name].flatten()[chosen], want[name].flatten()[chosen])
    assert found.overall.samples == sum(row.samples for row in found.values())


def test_as_many_samples_as_coordinates_are_all_of_them():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    most = max(p.numel() for p in net.parameters())
    all_, more = hs.verify(x, y, samples=most), hs.verify(x, y, samples=10 * most, seed=5)
    assert [row.samples for row in all_.values()] == [p.numel() for p in net.parameters()]
    assert all_.overall.error == pytest.approx(more.overall.error, rel=1e-12)


def test_the_seed_alone_decides_what_is_drawn():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    first, again, other = (hs.verify(x, y, samples=3, seed=s) for s in (1, 1, 2))
    assert dict(first) == dict(again) and dict(first) != dict(other)


def test_what_is_called_exact_measures_as_exact():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    found, report = hs.verify(x, y), hs.report()
    assert {n for n, row in found.items() if row.error < 1e-12} == {
        n for n in report if report[n].exact
    }
    assert found["4.weight"].correlation == pytest.approx(1)
    assert found["4.weight"].signs == 1


def test_inputs():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y), wrt=["0.weight", "inputs"])
    found = hs.verify(x, y, samples=100)
    out = hs(x, y)
    inner = x.clone().requires_grad_()
    names = [n for n in out.hess_diag if n != "0.weight"]
    assert list(found) == list(out.hess_diag) and len(names) == 1
    want = exact_diagonal(lambda: F.cross_entropy(net(inner), y), {names[0]: inner})
    agree(found[names[0]], out.hess_diag[names[0]], want[names[0]])


def test_a_subset_of_the_parameters():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y), wrt="2")
    assert list(hs.verify(x, y)) == ["2.weight", "2.bias"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_tied_weights_are_one_parameter():
    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    found = check(Tied().double(), F.mse_loss, (x,), (y,))
    assert list(found) == ["a.weight", "a.bias"]


def test_gauss_newton_is_compared_with_the_hessian():
    net, x, y = mlp()
    full = hesscale_fx.transform(net, F.cross_entropy, (x, y)).verify(x, y)
    gn = hesscale_fx.transform(net, F.cross_entropy, (x, y), method="hesscale_gn").verify(x, y)
    assert gn["4.weight"].error < 1e-12
    assert gn["0.weight"].error != full["0.weight"].error


def test_captured_at_the_first_call():
    net, x, y = mlp()
    assert hesscale_fx.transform(net, F.cross_entropy).verify(x, y)["4.bias"].error < 1e-12


def test_half_precision():
    net, x, y = mlp()
    net = net.bfloat16()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x.bfloat16(), y))
    assert hs.verify(x.bfloat16(), y)["4.weight"].error < 0.1


# ------------------------------------------------------------------ nothing is disturbed


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l2, self.drop = nn.Linear(4, 6), nn.Linear(6, 2), nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.l2(self.drop(self.norm(self.l1(x)).tanh()))


def noisy():
    torch.manual_seed(0)
    net = Noisy().double().train()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 2).double()
    return net, x, y, hesscale_fx.transform(net, F.mse_loss, (x, y))


def test_one_mask_serves_the_diagonals_and_what_they_are_compared_with():
    net, x, y, hs = noisy()
    for _ in range(3):
        assert hs.verify(x, y)["l2.weight"].error < 1e-12


def test_model_and_its_state_are_as_before():
    net, x, y, hs = noisy()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad for p in net.parameters()]
    hs.verify(x, y)
    after = net.state_dict()
    assert list(after) == list(before)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert [p.grad for p in net.parameters()] == grads == [None] * len(grads)
    assert all(p.requires_grad for p in net.parameters())
    assert net.training and hs.training


def test_random_state_is_as_before():
    net, x, y, hs = noisy()
    before = torch.get_rng_state()
    hs.verify(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_grad_mode_and_inference_around_it_do_not_matter():
    net, x, y, hs = noisy()
    torch.manual_seed(4)
    want = hs.verify(x, y)
    torch.manual_seed(4)
    with torch.no_grad():
        assert dict(hs.verify(x, y)) == dict(want)


# ------------------------------------------------------------------ memory


@pytest.mark.slow
def test_nothing_is_kept_of_one_sample_when_the_next_begins(monkeypatch):
    """Memory does not grow: as many tensors are alive at every sample, however many there are."""
    net, x, y = mlp(16)
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y), wrt="2.weight")
    alive = []
    grad = torch.autograd.grad

    def watched(*args, **kwargs):
        if kwargs.get("retain_graph"):
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            assert not kwargs.get("create_graph")  # a second derivative that is itself recorded
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    hs.verify(x, y, samples=12)
    assert len(alive) == 12
    # The first row is not made yet when the first sample begins.
    assert max(alive[2:]) <= alive[1] and len(set(alive[2:])) == 1


def test_the_graph_is_built_once_a_parameter_not_once_a_sample():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    for samples in (2, 20):
        calls.clear()
        hs.verify(x, y, samples=samples)
        assert len(calls) == len(list(net.parameters()))


# ------------------------------------------------------------------ what it says


def test_table():
    net, x, y = mlp()
    found = hesscale_fx.transform(net, F.cross_entropy, (x, y)).verify(x, y, samples=4)
    assert isinstance(found, Verification) and len(found) == 6
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "parameter" and "L1 error" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == [*found, "overall"]
    assert len({line.index("4") for line in lines[2:4]}) <= 2
    assert repr(found) == str(found)
    row = lines[2].split()
    assert float(row[2]) == pytest.approx(found["0.weight"].error, rel=1e-2)
    assert row[4].endswith("%")


def test_agreement_of_constants_and_zeros():
    zero, one = torch.zeros(3), torch.ones(3)
    assert Agreement.of(zero, zero).error == 0 and Agreement.of(zero, zero).signs == 1
    assert Agreement.of(one, zero).error == math.inf
    assert math.isnan(Agreement.of(one, one).correlation)
    assert Agreement.of(2 * one, one).error == pytest.approx(1)
    ramp = torch.arange(3.0)
    assert Agreement.of(-ramp, ramp).correlation == pytest.approx(-1)


def test_columns_are_aligned():
    text = table(("a", "bb"), [("long name", "x"), ("n", "y")]).splitlines()
    assert text[2].index("x") == text[3].index("y") == text[0].index("bb")


def test_at_least_one_sample():
    net, x, y = mlp()
    hs = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    with pytest.raises(InvalidArgumentError, match="samples"):
        hs.verify(x, y, samples=0)


def test_an_error_of_the_model_is_not_swallowed():
    def broken(values):
        raise RuntimeError("something else")

    p = {"w": torch.ones(2)}
    with pytest.raises(RuntimeError, match="something else"):
        verify_module.verify([broken, broken], torch.get_rng_state(), p, p, 2, 0)


def test_progress_bar_counts_every_sample(monkeypatch):
    tqdm_auto = pytest.importorskip("tqdm.auto")
    counted = []

    class Bar:
        def __init__(self, total, **options):
            self.total = total
            assert options["delay"] >= 1  # not for what is over at once

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self):
            counted.append(self.total)

    monkeypatch.setattr(tqdm_auto, "tqdm", Bar)
    net, x, y = mlp()
    found = hesscale_fx.transform(net, F.cross_entropy, (x, y)).verify(x, y, samples=3)
    assert counted == [found.overall.samples] * found.overall.samples


def test_gpt_with_attention_kernel_and_sampled():
    torch.manual_seed(0)
    net = GPT(layers=1).double()
    tokens = torch.randint(5, (2, 4))
    inputs = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    hs = hesscale_fx.transform(net, None, inputs)
    found, out = hs.verify(*inputs, samples=8), hs(*inputs)
    want = exact_diagonal(lambda: net(*inputs), dict(net.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    for name, row in found.items():
        chosen = torch.randperm(want[name].numel(), generator=generator)[:8].sort().values
        agree(row, out.hess_diag[name].flatten()[chosen], want[name].flatten()[chosen])
    assert relative_error(out.loss, net(*inputs)) < 1e-12
