"""Curvature at each k-th call, the plain gradient in between."""

from __future__ import annotations

import copy
import io
import pickle
import statistics
import time

import pytest
import torch
from torch import nn

import hesscale_fx
from hesscale_fx.optim import AdaHesScale, Sophia
from tests.helpers import Counting

aten = torch.ops.aten
LOSS = nn.CrossEntropyLoss()


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n=5):
    return torch.randn(n, 4), torch.randint(3, (n,))


def pattern(hs, args, calls):
    return [bool(hs(*args).hess_diag) for _ in range(calls)]


@pytest.fixture(scope="module")
def transformed():
    torch.manual_seed(0)
    net, args = network(), data()
    return net, args, hesscale_fx.transform(net, LOSS, args, every=3)


def test_every_third_call_has_curvature(transformed):
    net, args, hs = transformed
    hs.calls = 0
    want = hesscale_fx.transform(net, LOSS, args)(*args)
    for call in range(7):
        out = hs(*args)
        assert torch.equal(out.loss, want.loss)
        assert all(torch.equal(out.grads[k], g) for k, g in want.grads.items())
        assert list(out.grads) == list(want.grads)
        if call % 3 == 0:
            assert all(torch.equal(out.hess_diag[k], h) for k, h in want.hess_diag.items())
        else:
            assert out.hess_diag == {}
    assert hs.calls == 7


def test_in_between_nothing_of_curvature_runs(transformed):
    """Of matrix products a gradient has three: of two layers the weights, of one the input."""
    _, _, hs = transformed
    plain = hs._active.between_graph
    products = [n for n in plain.nodes if n.target in (aten.mm.default, aten.addmm.default)]
    backward = [n for n in products if n.name.endswith(("_grad", "_grad_1"))]
    assert len(backward) == 3
    roles = {n.meta.get("custom", {}).get("hesscale", {}).get("role") for n in plain.nodes}
    assert "curvature" not in roles
    assert any(n.name.endswith("_hess") for n in hs.graph.nodes)


def test_the_count_may_be_set(transformed):
    _, args, hs = transformed
    hs.calls = 2
    assert pattern(hs, args, 3) == [False, True, False]
    hs.calls = 0
    assert pattern(hs, args, 2) == [True, False]


def test_a_call_that_fails_is_none(transformed):
    _, args, hs = transformed
    hs.calls = 3
    with pytest.raises(hesscale_fx.HesScaleError):
        hs(args[0][:, :2], args[1])
    assert hs.calls == 3
    assert pattern(hs, args, 2) == [True, False]


def test_verify_does_not_count(transformed):
    _, args, hs = transformed
    hs.calls = 1
    assert hs.verify(*args, samples=4)["2.weight"].error < 1e-4
    assert hs.calls == 1


def test_copies_count_on_their_own(transformed):
    _, args, hs = transformed
    hs.calls = 1
    twin = copy.deepcopy(hs)
    loaded = pickle.loads(pickle.dumps(hs))
    hs.calls = 0
    assert pattern(twin, args, 3) == pattern(loaded, args, 3) == [False, False, True]
    assert hs.calls == 0


def test_the_state_is_the_models(transformed):
    net, args, hs = transformed
    assert list(hs.state_dict()) == list(net.state_dict())
    file = io.BytesIO()
    torch.save(hs.state_dict(), file)
    file.seek(0)
    net.load_state_dict(torch.load(file))


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "2"])
def test_other_counts_are_refused(every):
    with pytest.raises(hesscale_fx.HesScaleError, match="every must be a positive integer"):
        hesscale_fx.transform(network(), LOSS, every=every)


def test_captured_at_the_first_call():
    args = data()
    hs = hesscale_fx.transform(network(), LOSS, every=2)
    assert pattern(hs, args, 4) == [True, False, True, False]
    assert pattern(hs, (args[0].double().float()[:3], args[1][:3]), 2) == [True, False]


def test_buffers_are_written_in_every_call():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    twin, args = copy.deepcopy(net), data()
    hs, plain = (hesscale_fx.transform(m, LOSS, args, every=k) for m, k in ((net, 3), (twin, 1)))
    for _ in range(4):
        hs(*args), plain(*args)
    assert net[1].num_batches_tracked == 4
    assert torch.equal(net[1].running_var, twin[1].running_var)


# ------------------------------------------------------------------ backward and optimizers


def test_backward_leaves_no_diagonal_in_between(transformed):
    net, args, hs = transformed
    hs.calls = 0
    seen = []
    for _ in range(4):
        hs.zero_grad()
        hs.backward(*args)
        seen.append(getattr(net[0].weight, "hesscale", None) is not None)
        assert net[0].weight.grad is not None
    hs.zero_grad()
    assert seen == [True, False, False, True]


@pytest.mark.parametrize("first", [0, 2])
def test_calls_with_and_without_curvature_are_not_added(transformed, first):
    _, args, hs = transformed
    hs.zero_grad()
    hs.calls = first
    hs.backward(*args)
    with pytest.raises(hesscale_fx.HesScaleError, match="set hs.calls to the step's number"):
        hs.backward(*args)
    hs.zero_grad()


def test_accumulation_over_the_calls_of_one_step(transformed):
    net, args, hs = transformed
    want = hesscale_fx.transform(net, LOSS, args)(*args).hess_diag["0.weight"]
    hs.zero_grad()
    for step in range(4):
        for _ in range(2):
            hs.calls = step
            hs.backward(*args)
        found = getattr(net[0].weight, "hesscale", None)
        if step % 3 == 0:
            assert torch.allclose(found, 2 * want)
        else:
            assert found is None
        hs.zero_grad()


def test_sophia_refreshes_and_others_refuse():
    net, args = network(), data(32)
    hs = hesscale_fx.transform(net, LOSS, args, every=4)
    optimizer = Sophia(net.named_parameters(), lr=0.01)
    losses = []
    for _ in range(9):
        optimizer.zero_grad()
        losses.append(hs.backward(*args).item())
        optimizer.step()
    assert losses[-1] < losses[0]
    out = hs(*args)
    optimizer.step(grads=out.grads, hess_diag=out.hess_diag)
    strict = AdaHesScale(net.named_parameters(), lr=0.01)
    with pytest.raises(hesscale_fx.HesScaleError, match="no Hessian diagonal"):
        strict.step(grads=out.grads, hess_diag=out.hess_diag)


# ------------------------------------------------------------------ compiled


def test_two_graphs_are_compiled_whatever_the_count(transformed):
    torch._dynamo.reset()
    net, args, _ = transformed
    hs = hesscale_fx.transform(net, LOSS, args, every=3)
    want = hesscale_fx.transform(net, LOSS, args)(*args)
    backend = Counting()
    hs.compile(backend=backend, fullgraph=True)
    assert pattern(hs, args, 13) == [i % 3 == 0 for i in range(13)]
    assert backend.graphs == 2
    hs.calls = 0
    assert torch.equal(hs(*args).hess_diag["0.weight"], want.hess_diag["0.weight"])
    hs.zero_grad()
    hs.calls = 1
    hs.backward(*args)
    assert torch.equal(net[0].weight.grad, want.grads["0.weight"])
    hs.zero_grad()


def ratio(every, rounds=60):
    """Median seconds of a cycle over those of as many plain gradient steps, in turns."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    )
    args = torch.randn(128, 512), torch.randint(10, (128,))
    hs = hesscale_fx.transform(net, LOSS, args, every=every)
    parameters = list(net.parameters())
    times = {"ours": [], "plain": []}
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(every):
            hs(*args)
        middle = time.process_time()
        for _ in range(every):
            torch.autograd.grad(LOSS(net(args[0]), args[1]), parameters)
        times["ours"].append(middle - start)
        times["plain"].append(time.process_time() - middle)
    return statistics.median(times["ours"]) / statistics.median(times["plain"])


@pytest.mark.slow
def test_every_tenth_call_costs_a_tenth():
    assert ratio(10) < 1.1
