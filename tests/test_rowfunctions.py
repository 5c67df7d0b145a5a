"""Spelled-out row functions use closed forms, and only those that are the same function."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn
from torch._guards import detect_fake_mode

import hesscale_fx
from hesscale_fx.analysis import units
from hesscale_fx.analysis.activity import active_nodes
from hesscale_fx.analysis.primitives import write_out
from hesscale_fx.api import Builder
from hesscale_fx.capture import capture
from hesscale_fx.evaluate import Native
from hesscale_fx.structures.base import recursion
from hesscale_fx.structures.region import RegionAt
from hesscale_fx.structures.spelled import SpelledAt

aten = torch.ops.aten
ROWS, ENTRIES = 5, 6
W = torch.randn(ENTRIES, 3, generator=torch.Generator().manual_seed(0)).double()


def exponentials(x, maximum):
    return (x - maximum).exp()


def total(x):
    return x.sum(-1, keepdim=True)


def share(e):
    return e / total(e)


def over_two(x):
    e = (x - x.amax((0, 1))).exp()
    return e / e.sum((0, 1))


def peak(x):
    return x.amax(-1, keepdim=True)


def mean(x):
    return x.mean(-1, keepdim=True)


def centred(x):
    return x - mean(x)


def one_pass(x):
    return mean(x * x) - mean(x).square()


SPELLINGS = {
    "softmax": [
        lambda x: F.softmax(x, -1),
        lambda x: share(exponentials(x, peak(x))),
        lambda x: (lambda e: e * e.sum(-1)[:, None] ** -1)(exponentials(x, peak(x))),
        lambda x: over_two(x.T.reshape(2, 3, -1)).flatten(0, 1).T,
    ],
    "share": [
        lambda x: share(exponentials(x, peak(x).detach())),
        lambda x: share(x.exp()),
        lambda x: x.exp() * total(x.exp()).reciprocal(),
    ],
    "log_softmax": [
        lambda x: F.log_softmax(x, -1),
        lambda x: x - total(x.exp()).log(),
        lambda x: x - peak(x) - exponentials(x, peak(x)).sum(-1, keepdim=True).log(),
        lambda x: x - x.logsumexp(-1, keepdim=True),
    ],
    "layer_norm": [
        lambda x: F.layer_norm(x, (ENTRIES,)),
        lambda x: centred(x) / (mean(centred(x) ** 2) + 1e-5).sqrt(),
        lambda x: (x - mean(x)) * (one_pass(x) + 1e-5) ** -0.5,
        lambda x: centred(x) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
        lambda x: centred(x) * (mean(centred(x) * centred(x)) + 1e-5).rsqrt(),
    ],
    "rms_norm": [
        lambda x: F.rms_norm(x, (ENTRIES,), eps=1e-6),
        lambda x: x * (mean(x**2) + 1e-6).rsqrt(),
        lambda x: x / ((x * x).sum(-1, keepdim=True) / ENTRIES + 1e-6).sqrt(),
    ],
}


def model(functions):
    """Each function of an input of its own, between contractions."""

    def loss(*xs):
        terms = [
            (f(x @ W @ W.T) @ W).sin().square().sum() for f, x in zip(functions, xs, strict=True)
        ]
        return torch.stack(terms).sum()

    return loss


def sample(count=ROWS):
    return torch.randn(count, ENTRIES, generator=torch.Generator().manual_seed(1)).double()


def analysed(functions, dynamic=False):
    """The units that reduce and bend, and what evaluates them; nothing is emitted."""
    xs = tuple(sample() for _ in functions)
    builder = Builder(model(functions), None, "hesscale", "inputs", dynamic=dynamic)
    captured = next(capture(builder.step, xs, {}, dynamic=dynamic))
    primitives = write_out(captured.graph, detect_fake_mode([captured.loss.meta["val"]]))
    loss = primitives.of[captured.loss]
    starts = [primitives.of[leaf.node] for leaf in captured.leaves if leaf.kind == "input"]
    active = active_nodes(primitives.graph, loss, starts)
    partition = units.Partition(primitives.graph, loss, active, primitives.source)
    found = [u for u in partition.units if u.structure == "row" and len(u.nodes) > 1]
    return found, Native(primitives, partition.units)


def names(functions, **options):
    found, _ = analysed(functions, **options)
    return [u.region.spelled and u.region.spelled.name for u in found]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_equals_the_derived_rule(name):
    found, native = analysed(SPELLINGS[name])
    assert len(found) == len(SPELLINGS[name])
    for unit in found:
        assert unit.region.spelled.name == name
        check(unit, native)


def check(unit, native):
    """All questions, at random values of all that enters."""
    generator = torch.Generator().manual_seed(2)

    def draw(node):
        return torch.randn(node.meta["val"].shape, generator=generator).double().exp()

    known = {}

    def values(node):
        if node not in known:
            known[node] = draw(node)
        return known[node]

    run = native.runner(unit, values)
    closed = SpelledAt(unit.region, values, run)
    derived = RegionAt(unit.region, values, lambda v: [run(v)[n] for n in unit.outputs])
    s, g = draw(unit.outputs[0]), draw(unit.outputs[0]) - 1
    for question in (
        lambda at: at.vjp([g]),
        lambda at: at.vjp([torch.stack([g, s])]),
        lambda at: at.squared_vjp([s]),
        lambda at: at.curvature([g]),
        lambda at: recursion(at, [s], [g]),
    ):
        (got,), (want,) = question(closed), question(derived)
        assert_close({"": got}, {"": want}, 1e-12, str(unit.region.spelled))


def test_the_forward_is_not_computed_again():
    functions = [SPELLINGS["softmax"][1], SPELLINGS["layer_norm"][1]]
    xs = tuple(sample() for _ in functions)
    hs = hesscale_fx.transform(model(functions), None, xs, wrt="inputs")
    kinds = (aten.exp.default, aten.amax.default, aten.mean.dim, aten.sqrt.default)
    assert [sum(n.target is k for n in hs.graph.nodes) for k in kinds] == [1, 1, 2, 1]
    xs = tuple(sample(ROWS + 2).requires_grad_() for _ in functions)
    want = torch.autograd.grad(model(functions)(*xs), xs)
    got = hs(*(x.detach() for x in xs)).grads
    assert_close(got, dict(zip(got, want, strict=True)), 1e-12, "gradients")


def elsewhere(x):
    e = exponentials(x, peak(x))
    return torch.cat([share(e), e])


NEAR_MISSES = {
    "another exponent": lambda x: share(exponentials(x, peak(x)) ** 1.0000001),
    "another exponent below": lambda x: (lambda e: e / total(e**1.0000001))(x.exp()),
    "a square": lambda x: exponentials(x, peak(x)) ** 2 / total(x.exp()),
    "more than the sum": lambda x: (lambda e: e / (total(e) + 1e-9))(x.exp()),
    "a maximum that matters": lambda x: (
        lambda e: e / (total(e) + 1e-6)
    )(exponentials(x, peak(x))),
    "a detached maximum that matters": lambda x: (
        lambda m: exponentials(x, m) / total(x.exp())
    )(peak(x).detach()),
    "a detached sum": lambda x: (lambda e: e / total(e).detach())(x.exp()),
    "used elsewhere": elsewhere,
    "eps outside the root": lambda x: centred(x) / (mean(centred(x) ** 2).sqrt() + 1e-9),
    "another root": lambda x: centred(x) * (mean(centred(x) ** 2) + 1e-5) ** -0.5000001,
    "unbiased": lambda x: centred(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "a detached mean": lambda x: (x - mean(x).detach()) / (one_pass(x) + 1e-5).sqrt(),
    "a detached variance": lambda x: centred(x) / (mean(centred(x) ** 2) + 1e-5).sqrt().detach(),
    "eps twice": lambda x: x / ((mean(x * x) + 1e-12).sqrt() + 1e-12),
    "the batch's size": lambda x: x / ((x * x).sum(0, keepdim=True) / ROWS + 1e-6).sqrt(),
    "twice": lambda x: 2 * x * (mean(x * x) + 1e-6).rsqrt(),
}  # fmt: skip


def test_another_function_is_not():
    assert not [name for name in names(NEAR_MISSES.values(), dynamic=True) if name]


def test_half_precision_is_left_to_the_derived_rule():
    assert names([lambda x: share(exponentials(x, peak(x)))]) == ["softmax"]
    assert names([lambda x: share(exponentials(x, peak(x)).bfloat16()).double()]) == [None]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("options", [{"method": "hesscale_gn"}, {"columns": "exact"}])
def test_every_method_is_served(name, options, monkeypatch):
    """The same diagonals as without recognition, in a model with a loss of its own."""
    torch.manual_seed(0)
    net = Net(SPELLINGS[name][1]).double()
    x, y = sample(), torch.randint(3, (ROWS,))
    got = hesscale_fx.transform(net, F.cross_entropy, (x, y), **options)(x, y)
    asked = []
    monkeypatch.setattr(units, "recognize_row", asked.append)
    want = hesscale_fx.transform(net, F.cross_entropy, (x, y), **options)(x, y)
    assert asked
    assert_close(got.hess_diag, want.hess_diag, 1e-12, "diagonals")
    assert_close(got.grads, want.grads, 1e-12, "gradients")


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(ENTRIES, ENTRIES), nn.Linear(ENTRIES, 3)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))
