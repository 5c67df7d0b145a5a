"""torch.compile(loss_fn, backend="hesscale")."""

from __future__ import annotations

import copy
import shutil
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn

import hesscale_fx
from hesscale_fx import backend as module
from hesscale_fx.optim import Sophia

LOSS = nn.CrossEntropyLoss()
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Inductor takes seconds a graph, and what is tested here is in front of it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(module, "COMPILER", "aot_eager")


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def data(n=5):
    return torch.randn(n, 4), torch.randint(3, (n,))


def compiled(net, **options):
    return torch.compile(lambda x, y: LOSS(net(x), y), backend="hesscale", **options)


def clear(net):
    for p in net.parameters():
        p.grad = p.hesscale = None


def check(net, want, scale=1.0):
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, scale * want.grads[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(p.hesscale, scale * want.hess_diag[name], rtol=1e-4, atol=1e-6)


def test_torch_finds_it():
    """Without an import of hesscale_fx, through the entry point of the installed package."""
    (found,) = entry_points(group="torch_dynamo_backends", name="hesscale")
    assert found.load() is module.hesscale
    assert "hesscale" in torch._dynamo.list_backends()


def test_loss_gradients_diagonals_and_buffers_over_batches():
    net = network()
    twin = copy.deepcopy(net)
    step = compiled(net, fullgraph=True)
    hs = hesscale_fx.transform(twin, LOSS)
    for n in (5, 5, 7, 9):
        args = data(n)
        loss = step(*args)
        loss.backward()
        want = hs(*args)
        torch.testing.assert_close(loss.detach(), want.loss)
        check(net, want)
        clear(net)
        for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_accumulates_and_scales_with_the_loss():
    net, args = network().eval(), data()
    want = hesscale_fx.transform(net, LOSS)(*args)
    step = compiled(net)
    (step(*args) / 2).backward()
    (step(*args) + step(*args)).backward()
    check(net, want, 2.5)


def test_a_diagonal_left_over_is_refused():
    net, args = network().eval(), data()
    step = compiled(net)
    step(*args).backward()
    net.zero_grad()  # of torch: the gradients only
    loss = step(*args)
    with pytest.raises(hesscale_fx.HesScaleError, match="its .hesscale was not"):
        loss.backward()


def test_trains_with_an_optimizer():
    net, args = network(), data(32)
    step, optimizer = compiled(net), Sophia(net.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = step(*args)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_two_modules_of_one_kind_share_the_graph():
    a, b = network().eval(), network().eval()
    args = data()
    step = torch.compile(lambda net, x, y: LOSS(net(x), y), backend="hesscale")
    for net in (a, b):
        step(net, *args).backward()
        check(net, hesscale_fx.transform(net, LOSS)(*args))


def test_tied_and_frozen_parameters():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    net[3].bias.requires_grad_(False)
    args = data()
    want = hesscale_fx.transform(net, LOSS)(*args)
    compiled(net)(*args).backward()
    assert net[3].bias.grad is None and not hasattr(net[3].bias, "hesscale")
    torch.testing.assert_close(net[0].weight.hesscale, want.hess_diag["0.weight"])


def test_a_plain_tensor_that_requires_grad():
    w, (x, y) = torch.randn(4, 3, requires_grad=True), data()
    step = torch.compile(lambda w, x, y: LOSS(x @ w, y), backend="hesscale")
    step(w, x, y).backward()
    want = hesscale_fx.transform(lambda w: LOSS(x @ w, y), wrt="inputs")(w.detach())
    torch.testing.assert_close(w.hesscale, want.hess_diag["w"])
    torch.testing.assert_close(w.grad, want.grads["w"])


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_numbers_are_constants_of_a_graph(dynamic):
    net, args = network().eval(), data()
    want = hesscale_fx.transform(net, LOSS)(*args)
    step = torch.compile(
        lambda x, y, c: c * LOSS(net(x), y), backend="hesscale", dynamic=dynamic, fullgraph=True
    )
    for scale in (0.5, 0.25, 3.0):
        step(*args, scale).backward()
        check(net, want, scale)
        clear(net)


def test_options():
    net, args = network().eval(), data()
    step = compiled(net, options={"curvature_dtype": torch.bfloat16})
    step(*args).backward()
    want = hesscale_fx.transform(net, LOSS)(*args).hess_diag["0.weight"]
    error = ((net[0].weight.hesscale - want).abs() / want.abs()).median()
    assert 0 < error < 0.01
    with pytest.raises(Exception, match="The backend has no option 'mehtod'"):
        compiled(net, options={"mehtod": "hesscale"})(*args)


def test_without_gradients_it_is_the_other_backend():
    net, args = network().eval(), data()
    with torch.no_grad():
        loss = compiled(net)(*args)
    torch.testing.assert_close(loss, LOSS(net(args[0]), args[1]).detach())
    assert not loss.requires_grad


def test_what_is_no_loss_is_refused():
    net, args = network(), data()
    step = torch.compile(lambda x, y: (LOSS(net(x), y), net(x)), backend="hesscale")
    with pytest.raises(Exception, match="functions that return one scalar loss"):
        step(*args)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own
def test_a_tensor_computed_outside_is_refused():
    net, (x, y) = network(), data()
    step = torch.compile(LOSS, backend="hesscale")
    with pytest.raises(hesscale_fx.HesScaleError, match="computed from other tensors"):
        step(net(x), y)


def test_an_autocast_around_the_call_is_refused():
    net, args = network(), data()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(hesscale_fx.HesScaleError, match="put it inside"),
    ):
        compiled(net)(*args)


def test_an_autocast_inside():
    net, (x, y) = network().eval(), data()

    def loss(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        return LOSS(out.float(), y)

    torch.compile(loss, backend="hesscale")(x, y).backward()
    want = hesscale_fx.transform(net, LOSS)(x, y)
    assert not torch.equal(net[0].weight.grad, want.grads["0.weight"])
    for name, p in net.named_parameters():
        assert (p.grad - want.grads[name]).abs().max() < 0.02
        assert (p.hesscale - want.hess_diag[name]).abs().max() < 0.02


@torch.library.custom_op("hesscale_test_backend::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_fake(torch.empty_like)
cube.register_autograd(
    lambda ctx, grad: grad * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_an_operator_without_a_structure_is_named():
    w = torch.randn(4, requires_grad=True)
    step = torch.compile(lambda w: cube(w).sum(), backend="hesscale")
    with pytest.raises(hesscale_fx.HesScaleError, match="hesscale_test_backend.cube"):
        step(w)


@needs_compiler
@pytest.mark.slow
def test_the_loss_is_that_of_inductor(monkeypatch):
    monkeypatch.setattr(module, "COMPILER", "inductor")
    net, args = network(), data()
    twin = copy.deepcopy(net)
    loss = compiled(net)(*args)
    other = torch.compile(lambda x, y: LOSS(twin(x), y))(*args)
    torch.testing.assert_close(loss, other, check_device=False)
    loss.backward(), other.backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        assert p.hesscale.shape == p.shape
