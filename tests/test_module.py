"""The module that transform returns: names, laziness, shapes, copies, modes, its graph."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, relative_error
from reference import autograd, exact_hessian_diagonal, reference
from torch import nn

import hesscale_fx
from hesscale_fx.errors import InvalidModelError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("offset", torch.zeros(5))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)) * self.frozen + self.offset)


NAMES = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "unused.weight", "unused.bias"]
LOSS = nn.CrossEntropyLoss()


def data(n=6):
    return torch.randn(n, 4), torch.randint(3, (n,))


def check(out, model, loss, inputs, targets, tolerance=1e-5):
    """Against autograd and the brute force, in float32."""
    value, grads = autograd(model, loss, inputs, targets)
    assert relative_error(out.loss, value) < tolerance
    assert_close(dict(out.grads), grads, tolerance, "gradients")
    want = reference(model, loss, inputs, targets).hess_diag
    assert_close(dict(out.hess_diag), {n: want[n] for n in grads}, 10 * tolerance, "curvature")


# ------------------------------------------------------------------ results


def test_result_is_named_and_a_triple():
    x, y = data()
    out = hesscale_fx.transform(Net(), LOSS)(x, y)
    loss, grads, hess_diag = out
    assert loss is out.loss and grads is out.grads and hess_diag is out.hess_diag
    assert loss.shape == ()
    assert isinstance(grads, dict) and isinstance(hess_diag, dict)


def test_keys_are_the_model_s_names_in_order():
    net = Net()
    x, y = data()
    out = hesscale_fx.transform(net, LOSS)(x, y)
    expected = [n for n, p in net.named_parameters() if p.requires_grad]
    assert list(out.grads) == list(out.hess_diag) == expected == NAMES
    for n, p in net.named_parameters():
        if p.requires_grad:
            assert out.grads[n].shape == out.hess_diag[n].shape == p.shape
    check(out, net, LOSS, (x,), (y,))


def test_an_unreached_parameter_gets_zeros():
    out = hesscale_fx.transform(Net(), LOSS)(*data())
    for values in (out.grads, out.hess_diag):
        assert values["unused.weight"].shape == (2, 2)
        assert not values["unused.weight"].any() and not values["unused.bias"].any()


def test_tied_weights_come_once_with_both_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    net = Tied()
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    out = hesscale_fx.transform(net, nn.MSELoss())(x, y)
    assert list(out.hess_diag) == [n for n, _ in net.named_parameters()]
    check(out, net, nn.MSELoss(), (x,), (y,))


def test_a_module_shared_under_two_names():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    out = hesscale_fx.transform(net, nn.MSELoss())(x, y)
    assert list(out.grads) == ["0.weight", "0.bias"]
    check(out, net, nn.MSELoss(), (x,), (y,))


class HeldInAList(nn.Module):
    """Its weight is used through a plain list, in the forward or beyond torch.export."""

    def __init__(self, branches=False):
        super().__init__()
        self.fc = nn.Linear(3, 4).double()
        self.weights, self.branches = [self.fc.weight], branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x.sum()
        y = nn.functional.linear(x, self.weights[0], self.fc.bias).tanh()
        if self.branches:
            y = torch.func.vmap(torch.func.grad(lambda v: v.pow(3).sum()))(y)
        return y.pow(2).sum() + torch.cat([self.weights[0].flatten()]).pow(4).sum()


@pytest.mark.parametrize("branches", [False, True])
def test_a_parameter_reached_past_the_registry(branches):
    net, x = HeldInAList(branches), torch.randn(5, 3, dtype=torch.float64)
    hs = hesscale_fx.transform(net, example_inputs=(x,))
    out, want = hs(x), torch.autograd.grad(net(x), list(net.parameters()))
    for got, expected in zip(out.grads.values(), want, strict=True):
        torch.testing.assert_close(got, expected)
    exact = hesscale_fx.transform(net, example_inputs=(x,), method="exact")(x).hess_diag
    assert hs.verify(x).overall.error < 1e-10
    for name, value in out.hess_diag.items():  # one layer: exact
        torch.testing.assert_close(value, exact[name])


def test_a_loss_that_regularizes_a_list_of_parameters():
    net = nn.Linear(3, 4).double()
    params, x = list(net.parameters()), torch.randn(5, 3, dtype=torch.float64)

    def loss(y):
        return y.pow(2).mean() + sum(p.pow(4).sum() for p in params)

    _, grads, hess_diag = hesscale_fx.transform(net, loss, (x,))(x)
    for got, expected in zip(
        grads.values(), torch.autograd.grad(loss(net(x)), params), strict=True
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(hess_diag["bias"], 2 / 4 + 12 * net.bias**2)


def test_a_tensor_computed_from_a_parameter_before_the_call():
    net = nn.Linear(3, 4)
    kept = net.weight.t()
    with pytest.raises(
        InvalidModelError, match=r"(?s)computed from its parameter 'weight'.*forward"
    ):
        hesscale_fx.transform(net, lambda y: (y @ kept.t()).sum(), (torch.randn(5, 3),))


def test_nothing_requires_grad_and_nothing_is_accumulated():
    net = Net()
    hs = hesscale_fx.transform(net, LOSS)
    x, y = data()
    x.requires_grad_()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            out = hs(x, y)
        tensors = [out.loss, *out.grads.values(), *out.hess_diag.values()]
        assert not any(t.requires_grad for t in tensors)
    assert all(p.grad is None for p in net.parameters()) and x.grad is None


def test_ambient_modes_change_no_number():
    x, y = data()
    hs = hesscale_fx.transform(Net(), LOSS)
    want = hs(x, y)
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out = hs(x, y)
        assert torch.equal(out.loss, want.loss)
        for n in NAMES:
            assert torch.equal(out.hess_diag[n], want.hess_diag[n])
            assert torch.equal(out.grads[n], want.grads[n])


def test_captured_under_no_grad_is_the_same():
    net, (x, y) = Net(), data()
    with torch.no_grad():
        out = hesscale_fx.transform(net, LOSS, (x, y))(x, y)
    check(out, net, LOSS, (x,), (y,))


# ------------------------------------------------------------------ wrt

_WRT = {
    "one name": ("fc2.weight", ["fc2.weight"]),
    "names": (["fc2.bias", "fc1.weight"], ["fc1.weight", "fc2.bias"]),
    "pattern": ("fc1.*", ["fc1.weight", "fc1.bias"]),
    "prefix": ("fc1.", ["fc1.weight", "fc1.bias"]),
    "wildcard": ("*.bias", ["fc1.bias", "fc2.bias", "unused.bias"]),
    "predicate": (lambda n, p: p.ndim == 2 and "unused" not in n, ["fc1.weight", "fc2.weight"]),
}


@pytest.mark.parametrize("name", _WRT)
def test_wrt_selects_parameters(name):
    wrt, keys = _WRT[name]
    net, (x, y) = Net(), data()
    everything = hesscale_fx.transform(net, LOSS)(x, y)
    out = hesscale_fx.transform(net, LOSS, wrt=wrt)(x, y)
    assert list(out.grads) == list(out.hess_diag) == keys
    for n in keys:
        assert relative_error(out.grads[n], everything.grads[n]) < 1e-6
        assert relative_error(out.hess_diag[n], everything.hess_diag[n]) < 1e-6


def test_wrt_may_name_a_frozen_parameter():
    net, (x, y) = Net(), data()
    out = hesscale_fx.transform(net, LOSS, wrt="frozen")(x, y)
    assert list(out.hess_diag) == ["frozen"] and out.hess_diag["frozen"].any()
    assert not net.frozen.requires_grad


def test_wrt_inputs():
    net, (x, y) = Net(), data()
    out = hesscale_fx.transform(net, LOSS, wrt="inputs")(x, y)
    assert list(out.grads) == list(out.hess_diag) == ["x"]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(LOSS(net(leaf), y), leaf)
    assert relative_error(out.grads["x"], grad) < 1e-5
    assert relative_error(out.hess_diag["x"], reference(net, LOSS, (x,), (y,)).hess_diag[0]) < 1e-4


def test_wrt_inputs_and_parameters():
    net, (x, y) = Net(), data()
    out = hesscale_fx.transform(net, LOSS, wrt=["fc2.*", "inputs"])(x, y)
    assert set(out.grads) == {"fc2.weight", "fc2.bias", "x"}
    want = reference(net, LOSS, (x,), (y,)).hess_diag
    assert relative_error(out.hess_diag["fc2.weight"], want["fc2.weight"]) < 1e-4
    assert relative_error(out.hess_diag["x"], want[0]) < 1e-4


def test_curvature_of_the_input_of_one_region_is_exact():
    y = torch.tensor([0, 2])
    x = torch.randn(2, 3).double()

    class Head(nn.Module):
        def forward(self, z):
            return F.cross_entropy(z, y)

    out = hesscale_fx.transform(Head(), wrt="inputs")(x)
    leaf = x.clone().requires_grad_()
    exact = exact_hessian_diagonal(lambda: F.cross_entropy(leaf, y), {"z": leaf})
    assert_close(dict(out.hess_diag), exact, 1e-12, "curvature")


# ------------------------------------------------------------------ ways to call


class Losing(nn.Module):
    """A model that returns its loss, in a dictionary too."""

    def __init__(self, wrapped=False):
        super().__init__()
        self.net, self.wrapped = Net(), wrapped

    def forward(self, x, labels=None, *, scale=1.0):
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels) * scale
        return {"loss": loss, "logits": logits} if self.wrapped else loss


def test_a_model_that_returns_the_loss():
    net, (x, y) = Losing(), data()
    check(hesscale_fx.transform(net)(x, y), net, None, (x, y), ())


def test_keyword_arguments_and_structured_outputs():
    net, (x, y) = Losing(wrapped=True), data()
    out = hesscale_fx.transform(net, lambda out: out["loss"])(x, labels=y, scale=2.0)
    loss, grads = autograd(net, lambda o: o["loss"], (x,), (), {"labels": y, "scale": 2.0})
    assert relative_error(out.loss, loss) < 1e-5
    assert_close(dict(out.grads), grads, 1e-5, "gradients")


def test_several_targets():
    net, (x, y) = Net(), data()
    w = torch.rand(6)

    def loss(logits, y, w):
        return (F.cross_entropy(logits, y, reduction="none") * w).mean()

    check(hesscale_fx.transform(net, loss)(x, y, w), net, loss, (x,), (y, w))


def test_a_loss_with_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(3))

        def forward(self, out, y):
            return (((out - y) * (-self.log_scale).exp()).square() / 2 + self.log_scale).mean()

    net, loss = nn.Linear(4, 3), Scaled()
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    out = hesscale_fx.transform(net, loss)(x, y)
    assert list(out.grads)[:2] == ["weight", "bias"]
    others = [n for n in out.grads if n not in ("weight", "bias")]
    assert len(others) == 1 and others[0].endswith("log_scale")
    leaf = dict(loss.named_parameters())
    exact = exact_hessian_diagonal(lambda: loss(net(x), y), leaf)["log_scale"]
    assert relative_error(out.hess_diag[others[0]], exact) < 1e-5


def test_a_function_that_includes_the_model():
    net, (x, y) = Net(), data()
    out = hesscale_fx.transform(lambda x, y: LOSS(net(x), y))(x, y)
    assert len(out.grads) == len(NAMES)
    want = hesscale_fx.transform(net, LOSS)(x, y)
    for a, b in zip(out.hess_diag.values(), want.hess_diag.values(), strict=True):
        assert relative_error(a, b) < 1e-6


def test_no_inputs_only_parameters():
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self):
            return (self.w**3).sum()

    out = hesscale_fx.transform(Bowl(), example_inputs=())()
    assert torch.allclose(out.hess_diag["w"], torch.tensor([6.0, 12.0]))


@pytest.mark.parametrize("kind", ["symbolic_trace", "export", "lazy"])
def test_other_kinds_of_model(kind):
    net, (x, y) = Net(), data()
    want = hesscale_fx.transform(net, LOSS, (x, y))(x, y)
    if kind == "symbolic_trace":
        hs = hesscale_fx.transform(torch.fx.symbolic_trace(net), LOSS)
    elif kind == "export":
        hs = hesscale_fx.transform(torch.export.export(net, (x,)), LOSS)
    else:
        hs = hesscale_fx.transform(net, LOSS)
    out = hs(x, y)
    for n in out.hess_diag:
        assert relative_error(out.hess_diag[n], want.hess_diag[n]) < 1e-6
    reached = [n for n in NAMES if not n.startswith("unused")]
    assert [n for n in out.hess_diag if not n.startswith("unused")] == reached


# ------------------------------------------------------------------ laziness and shapes


def test_lazy_until_the_first_call():
    hs = hesscale_fx.transform(Net(), LOSS)
    with pytest.raises(hesscale_fx.HesScaleError, match="materialize"):
        hs.graph
    hs(*data())
    hs.graph.lint()


def test_materialize_captures_without_a_call():
    hs = hesscale_fx.transform(Net(), LOSS)
    hs.materialize(*data())
    assert len(hs.graph.nodes) > 10
    assert hs(*data()).loss.isfinite()


def test_example_inputs_capture_at_once():
    hs = hesscale_fx.transform(Net(), LOSS, data())
    assert len(hs.graph.nodes) > 10 and "def forward" in hs.code


@pytest.mark.parametrize("n", [1, 3, 60])
def test_another_batch_runs_on_the_same_graph(n):
    net = Net()
    hs = hesscale_fx.transform(net, LOSS, data(6))
    before = hs.graph
    x, y = data(n)
    out = hs(x, y)
    assert hs.graph is before
    check(out, net, LOSS, (x,), (y,))


@pytest.mark.parametrize("n", [1, 3, 60])
def test_the_batch_size_is_not_baked_in(n):
    """1/N enters the curvature squared: a constant would be wrong by more than a factor."""

    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return (torch.tanh(self.fc(x)).square() / x.shape[0]).sum()

    net = Averaged()
    hs = hesscale_fx.transform(net, example_inputs=(torch.randn(6, 4),))
    before = hs.graph
    x = torch.randn(n, 4)
    out = hs(x)
    assert hs.graph is before
    check(out, net, None, (x,), ())


@pytest.mark.parametrize("n", [2, 9])
def test_batch_norm_and_convolution_with_another_batch(n):
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 3),
    )  # fmt: skip
    hs = hesscale_fx.transform(net, LOSS, (torch.randn(4, 1, 5, 5), torch.randint(3, (4,))))
    before = hs.graph
    x, y = torch.randn(n, 1, 5, 5), torch.randint(3, (n,))
    plain = copy.deepcopy(net)
    out = hs(x, y)
    assert hs.graph is before
    check(out, plain, LOSS, (x,), (y,), 1e-4)


def test_static_shapes_refuse_another_batch():
    hs = hesscale_fx.transform(Net(), LOSS, data(6), dynamic=False)
    hs(*data(6))
    with pytest.raises(hesscale_fx.HesScaleError, match="shape"):
        hs(*data(7))


def test_lazily_captured_keeps_several_graphs():
    class AnyWidth(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, x):
            return self.fc(x.unflatten(-1, (-1, 3)).mean(-2)).square().mean()

    net = AnyWidth()
    hs = hesscale_fx.transform(net)
    graphs = {}
    for width in (3, 6, 3, 6):
        x = torch.randn(4, width)
        check(hs(x), net, None, (x,), ())
        graphs.setdefault(width, hs.graph)
        assert hs.graph is graphs[width]
    assert graphs[3] is not graphs[6]


def test_train_and_eval_are_two_graphs_when_lazy():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    hs = hesscale_fx.transform(net, LOSS)
    x, y = data()
    for mode in (True, False, True):
        net.train(mode)
        plain = copy.deepcopy(net)
        check(hs(x, y), plain, LOSS, (x,), (y,), 1e-4)


def test_batch_norm_statistics_are_written_back():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    plain = copy.deepcopy(net)
    hs = hesscale_fx.transform(net, LOSS, data())
    assert torch.equal(net[1].running_mean, torch.zeros(8)), "capture must not count as a forward"
    for _ in range(3):
        x, y = data()
        hs(x, y)
        plain(x)
    for (n, a), (_, b) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), n
    assert net[1].num_batches_tracked == 3


def test_an_empty_batch_does_what_torch_does():
    net = Net()
    x, y = torch.randn(0, 4), torch.randint(3, (0,))
    out = hesscale_fx.transform(net, nn.CrossEntropyLoss(reduction="sum"))(x, y)
    assert out.loss == 0 and not any(h.any() for h in out.hess_diag.values())
    assert hesscale_fx.transform(net, LOSS)(x, y).loss.isnan()


def test_nan_and_infinity_pass_through():
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    x[0, 0] = float("nan")
    out = hs(x, y)
    loss, grads = autograd(net, LOSS, (x,), (y,))
    assert out.loss.isnan() and loss.isnan()
    for n, g in grads.items():
        assert torch.equal(out.grads[n].isnan(), g.isnan()), n
    assert out.hess_diag["fc1.weight"].isnan().any()


# ------------------------------------------------------------------ living with an optimizer


def test_in_place_updates_are_seen():
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        out = hs(x, y)
        check(out, net, LOSS, (x,), (y,))
        for n, p in net.named_parameters():
            p.grad = out.grads.get(n)
        optimizer.step()


def test_a_loaded_state_is_seen():
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    net.load_state_dict(Net().state_dict())
    check(hs(x, y), net, LOSS, (x,), (y,))


def test_the_user_s_model_is_not_changed():
    class Hooked(Net):
        pass

    net = Hooked()
    net.fc1.eval()
    seen = []
    net.fc2.register_forward_hook(lambda *_: seen.append(1))
    net.fc1.weight.grad = torch.ones_like(net.fc1.weight)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    identity = {n: (id(p), p.requires_grad) for n, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    keys = {n: set(m.__dict__) for n, m in net.named_modules()}
    x, y = data()
    want = LOSS(net(x), y)
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    hs(x, y)
    assert {k: v.clone() for k, v in net.state_dict().items()}.keys() == state.keys()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    assert {n: (id(p), p.requires_grad) for n, p in net.named_parameters()} == identity
    assert [m.training for m in net.modules()] == modes
    assert {n: set(m.__dict__) for n, m in net.named_modules()} == keys
    assert torch.equal(net.fc1.weight.grad, torch.ones_like(net.fc1.weight))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "fc1.weight")
    assert type(net) is Hooked and len(net.fc2._forward_hooks) == 1
    before = len(seen)
    assert torch.equal(LOSS(net(x), y), want) and len(seen) == before + 1


def test_no_grad_inside_the_model_stops_both():
    """A power iteration, a target network: what no_grad covers is a constant."""

    class Target(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                target = self.fc(x).tanh() + 1
            return (self.fc(x) - target).square().mean()

    class Detached(Target):
        def forward(self, x):
            return (self.fc(x) - (self.fc(x).tanh() + 1).detach()).square().mean()

    net, x = Target(), torch.randn(5, 4)
    out = hesscale_fx.transform(net)(x)
    _, grads = autograd(net, None, (x,))
    assert_close(dict(out.grads), grads, 1e-5, "gradients")
    twin = Detached()
    twin.load_state_dict(net.state_dict())
    want = reference(twin, None, (x,)).hess_diag
    assert_close(dict(out.hess_diag), {n: want[n] for n in grads}, 1e-5, "curvature")


def test_spectral_norm_in_train_mode():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 3))
    plain, (x, y) = copy.deepcopy(net), data()
    out = hesscale_fx.transform(net, LOSS)(x, y)
    loss, grads = autograd(plain, LOSS, (x,), (y,))
    assert relative_error(out.loss, loss) < 1e-5
    assert_close(dict(out.grads), grads, 1e-4, "gradients")
    for (n, a), (_, b) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), n


# ------------------------------------------------------------------ randomness


def test_one_mask_is_used_once():
    """Gradients and curvature belong to the mask of the returned loss."""
    net = nn.Sequential(
        nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)
    )
    hs = hesscale_fx.transform(net, LOSS)
    x, y = data()
    losses = set()
    for seed in range(4):
        torch.manual_seed(seed)
        out = hs(x, y)
        after = torch.get_rng_state()
        loss, grads = autograd(net, LOSS, (x,), (y,), seed=seed)
        assert torch.equal(after, torch.get_rng_state())
        assert relative_error(out.loss, loss) < 1e-5
        assert_close(dict(out.grads), grads, 1e-5, "gradients")
        want = reference(net, LOSS, (x,), (y,), seed=seed).hess_diag
        assert_close(dict(out.hess_diag), {n: want[n] for n in grads}, 1e-4, "curvature")
        losses.add(out.loss.item())
    assert len(losses) == 4


def test_capture_leaves_the_generator_alone():
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    before = torch.get_rng_state()
    hesscale_fx.transform(net, LOSS, data())
    torch.set_rng_state(before)
    x, y = data()
    state = torch.get_rng_state()
    hesscale_fx.transform(net, LOSS, (x, y))
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------ copies, files, dtypes


def test_deepcopy_is_independent():
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    want = hs(x, y)
    twin = copy.deepcopy(hs)
    with torch.no_grad():
        net.fc1.weight.zero_()
    assert torch.equal(twin(x, y).hess_diag["fc2.weight"], want.hess_diag["fc2.weight"])
    assert not torch.equal(hs(x, y).hess_diag["fc2.weight"], want.hess_diag["fc2.weight"])


def test_pickle_or_a_clear_word(tmp_path):
    """A transformed module pickles, or says what to do instead."""
    x, y = data()
    hs = hesscale_fx.transform(Net(), LOSS, (x, y))
    want = hs(x, y)
    try:
        text = pickle.dumps(hs)
    except hesscale_fx.HesScaleError as error:
        assert "save" in str(error) and "load" in str(error)
        assert callable(getattr(hs, "save", None)) or "state_dict" in str(error)
    else:
        assert torch.equal(
            pickle.loads(text)(x, y).hess_diag["fc1.weight"], want.hess_diag["fc1.weight"]
        )


def test_to_another_dtype():
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS)
    hs(x, y)
    hs.to(torch.float64)
    x = x.double()
    out = hs(x, y)
    assert out.hess_diag["fc1.weight"].dtype == torch.float64
    check(out, net, LOSS, (x,), (y,), 1e-10)


def test_state_dict_is_the_model_s():
    net = Net()
    hs = hesscale_fx.transform(net, LOSS, data())
    assert list(hs.state_dict()) == list(net.state_dict())
    assert [n for n, _ in hs.named_parameters()] == [n for n, _ in net.named_parameters()]
    other = Net()
    hs.load_state_dict(other.state_dict())
    assert torch.equal(net.fc1.weight, other.fc1.weight)


# ------------------------------------------------------------------ the graph


@pytest.fixture
def captured():
    torch.manual_seed(0)
    net = Net()
    return net, hesscale_fx.transform(net, LOSS, data())


def test_the_graph_is_a_graph_module_s(captured):
    _, hs = captured
    assert isinstance(hs, torch.fx.GraphModule)
    hs.graph.lint()
    text = hs.print_readable(print_output=False)
    assert "fc1_grad" in text and "fc1_hess" in text
    assert "def forward" in hs.code
    assert sum(n.op == "output" for n in hs.graph.nodes) == 1


def test_only_aten_calls_and_the_user_s_own_tensors(captured):
    net, hs = captured
    own = {id(t) for t in [*net.parameters(), *net.buffers()]}
    for node in hs.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output"), node.format_node()
        if node.op == "call_function":
            target = node.target
            aten = isinstance(target, torch._ops.OpOverload) and target.namespace in (
                "aten",
                "prims",
            )
            builtin = getattr(operator, getattr(target, "__name__", ""), None) is target
            assert aten or builtin, f"{node.name} calls {target}"
        elif node.op == "get_attr":
            tensor = functools.reduce(getattr, str(node.target).split("."), hs)
            assert id(tensor) in own, f"{node.target} is not the model's"


def test_placeholders_are_the_inputs(captured):
    _, hs = captured
    assert [n.name for n in hs.graph.nodes if n.op == "placeholder"] == ["x", "target"] or [
        n.name for n in hs.graph.nodes if n.op == "placeholder"
    ][0] == "x"
    assert sum(n.op == "placeholder" for n in hs.graph.nodes) == 2


def test_nodes_are_named_after_their_source(captured):
    _, hs = captured
    names = [n.name for n in hs.graph.nodes]
    for source in ("fc1", "fc2"):
        for role in ("grad", "hess"):
            assert any(n.startswith(f"{source}_") and f"_{role}" in n for n in names), (
                source,
                role,
            )
            assert f"{source}_{role}" in names, (source, role)


def test_every_generated_node_has_its_meta(captured):
    _, hs = captured
    about = {n: (n.meta.get("custom") or {}).get("hesscale") for n in hs.graph.nodes}
    generated = [n for n, a in about.items() if a and a["role"] != "forward"]
    assert len(generated) > 10
    for node in generated:
        assert "val" in node.meta, node.name
        about = node.meta["custom"]["hesscale"]
        assert {"source", "role", "rule", "exact"} <= set(about), (node.name, about)
    first = next(n for n in generated if n.name.startswith("fc1_"))
    assert (
        "in forward" in first.meta["stack_trace"] and "test_module.py" in first.meta["stack_trace"]
    )
    assert "fc1" in str(first.meta["nn_module_stack"])
    calls = [n for n in hs.graph.nodes if n.op == "call_function"]
    assert all("val" in n.meta for n in calls)


def test_sizes_are_symbols_in_the_graph(captured):
    _, hs = captured
    shapes = [n.meta["val"].shape for n in hs.graph.nodes if n.op == "placeholder"]
    assert all(isinstance(s[0], torch.SymInt) for s in shapes)


def test_the_forward_is_not_computed_twice(captured):
    _, hs = captured
    tanh = [n for n in hs.graph.nodes if n.target == torch.ops.aten.tanh.default]
    assert len(tanh) == 1


def test_gradients_alone_cost_no_curvature():
    """Nothing dead is left in the graph."""
    hs = hesscale_fx.transform(Net(), LOSS, data())
    graph = copy.deepcopy(hs.graph)
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    unused = {n.name for n in hs.graph.nodes} - {n.name for n in graph.nodes}
    assert len(graph.nodes) == before, f"dead: {unused}"


# ------------------------------------------------------------------ compilation

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)]
)
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    compiled = torch.compile(hs, fullgraph=True, backend=backend)
    for step in range(2):
        want, out = hs(x, y), compiled(x, y)
        assert relative_error(out.loss, want.loss) < 1e-5
        assert_close(dict(out.grads), dict(want.grads), 1e-5, "gradients")
        assert_close(dict(out.hess_diag), dict(want.hess_diag), 1e-5, "curvature")
        assert not any(h.requires_grad for h in out.hess_diag.values())
        with torch.no_grad():  # an optimizer's in-place step is seen
            for p in net.parameters():
                p.add_(0.1 * (step + 1))


def test_compile_in_place():
    torch._dynamo.reset()
    net, (x, y) = Net(), data()
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    want = hs(x, y)
    hs.compile(fullgraph=True, backend="aot_eager")
    out = hs(x, y)
    assert_close(dict(out.hess_diag), dict(want.hess_diag), 1e-5, "curvature")
    with torch.no_grad():
        net.fc1.weight.mul_(2)
    check(hs(x, y), net, LOSS, (x,), (y,))


@needs_compiler
@pytest.mark.slow
def test_compiled_convolution_with_batch_norm_and_another_batch():
    torch._dynamo.reset()
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    plain = copy.deepcopy(net)
    x, y = torch.randn(4, 1, 6, 6), torch.randint(3, (4,))
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    compiled = torch.compile(hs, fullgraph=True)
    for n in (4, 7):
        x, y = torch.randn(n, 1, 6, 6), torch.randint(3, (n,))
        out = compiled(x, y)
        want = hesscale_fx.transform(plain, LOSS)(x, y)
        assert_close(dict(out.hess_diag), dict(want.hess_diag), 1e-4, "curvature")
    for (name, a), (_, b) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_the_graph_exports_and_runs_elsewhere():
    """No Python object of ours is needed to run it."""
    x, y = data()
    hs = hesscale_fx.transform(Net(), LOSS, (x, y))
    want = hs(x, y)
    exported = torch.export.export(hs, (x, y))
    loss, grads, hess = exported.module()(x, y)
    assert relative_error(loss, want.loss) < 1e-6
    assert relative_error(hess["fc1.weight"], want.hess_diag["fc1.weight"]) < 1e-6
    kinds = {n.target.namespace for n in exported.graph.nodes if hasattr(n.target, "namespace")}
    assert kinds <= {"aten", "prims"}


def test_a_batch_that_equals_another_size_stays_free():
    def model(x):
        padded = torch.nn.functional.pad(torch.tanh(x), (1, 0))  # a kernel that wants numbers
        return (padded[:, :3] * padded[:, 1:]).square().mean()

    x = torch.randn(3, 3, dtype=torch.float64)
    hs = hesscale_fx.transform(model, None, (x,), wrt="inputs")
    y = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(hs(y).loss, model(y))
