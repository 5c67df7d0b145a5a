"""The optimizers: their trajectories, and what one expects of a torch.optim.Optimizer."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from torch import nn

import hesscale_fx
from hesscale_fx.errors import HesScaleError
from hesscale_fx.optim import AdaHesScale, AdaHesScaleGN, Sophia, StepSizeScaling

FOLDER = Path(__file__).parent / "golden"
GOLDEN = torch.load(FOLDER / "official_adahesscale.pt", weights_only=True)


def scaled(params, lr=1e-3, **options):
    """Step-size scaling that acts, on an optimizer with a state."""
    return StepSizeScaling(torch.optim.Adam(params, lr, **options), delta=1e-4)


KINDS = [AdaHesScale, Sophia, scaled]


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (3,), ()]
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def fill(params, seed):
    """Set gradients and diagonals, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        h = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.hesscale = h.to(torch.promote_types(p.dtype, torch.float32))


def run(optimizer, params, seeds):
    for seed in seeds:
        fill(params, seed)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_same(got, want, tolerance=1e-12):
    assert all(relative_error(g, w) <= tolerance for g, w in zip(got, want, strict=True))


# --- what the step is --------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize(
    ("kind", "method"), [(AdaHesScale, "hesscale"), (AdaHesScaleGN, "hesscale_gn")]
)
def test_official_trajectories(kind, method, foreach):
    settings = GOLDEN["settings"]
    case = torch.load(FOLDER / "official_hesscale.pt", weights_only=True)[settings["case"]]
    net = nn.Sequential(*(eval(layer, {**vars(nn)}) for layer in case["arch"])).double()
    net.load_state_dict(case["state_dict"])
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), method=method)
    options = {key: settings[key] for key in ("lr", "betas", "eps")}
    optimizer = kind(net.parameters(), foreach=foreach, **options)
    for want in GOLDEN[kind.__name__]:
        optimizer.zero_grad()
        loss = hs.backward(case["x"], case["y"])
        optimizer.step()
        assert relative_error(loss, want["loss"]) < 1e-10
        for name, p in net.named_parameters():
            assert relative_error(p, want["params"][name]) < 1e-10


def adahesscale(p, g, h, state, t, lr, decay):
    """By the formula, for one tensor."""
    state["m"] = 0.8 * state["m"] + 0.2 * g
    state["v"] = 0.95 * state["v"] + 0.05 * h * h
    root = (state["v"] / (1 - 0.95**t)).sqrt() + 1e-6
    return (1 - lr * decay) * p - lr * state["m"] / (1 - 0.8**t) / root


def sophia(p, g, h, state, t, lr, decay):
    state["m"] = 0.8 * state["m"] + 0.2 * g
    state["v"] = 0.95 * state["v"] + 0.05 * h
    step = state["m"] / (0.5 * state["v"]).clamp(min=1e-6)
    return (1 - lr * decay) * p - lr * step.clamp(-1, 1)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("kind", "formula", "extra"),
    [(AdaHesScale, adahesscale, {}), (Sophia, sophia, {"gamma": 0.5})],
)
def test_formula_groups_decay_and_sign(kind, formula, extra, maximize, foreach):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "weight_decay": 0.0}]
    optimizer = kind(
        groups,
        lr=0.02,
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=0.1,
        maximize=maximize,
        foreach=foreach,
        **extra,
    )
    want = [p.detach().clone() for p in params]
    states = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in want]
    sign = -1 if maximize else 1  # the negated loss has the negated gradient and curvature
    for t in range(1, 7):
        fill(params, t)
        want = [
            formula(w, sign * p.grad, sign * p.hesscale, state, t, *(o or (0.02, 0.1)))
            for w, p, state, o in zip(want, params, states, [None, None, (0.3, 0.0)], strict=True)
        ]
        optimizer.step()
    assert_same([p.detach() for p in params], want)


def test_sophia_goes_on_with_the_running_diagonal():
    params = parameters()
    optimizer = Sophia(params, lr=0.1)
    run(optimizer, params, [1])
    before = [optimizer.state[p]["exp_hess"].clone() for p in params]
    for p in params:
        p.hesscale = None
    old = [p.detach().clone() for p in params]
    optimizer.step()
    for p, b, o in zip(params, before, old, strict=True):
        assert torch.equal(optimizer.state[p]["exp_hess"], b) and not torch.equal(p, o)


# --- step-size scaling -------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-8, 1e-3, 1e3])
def test_scaling_formula(delta):
    params = parameters()
    optimizer = StepSizeScaling(
        torch.optim.SGD(params, lr=0.1), delta=delta, max_scale=0.7, beta=0.9
    )
    want = [p.detach().clone() for p in params]
    v = [torch.zeros_like(w) for w in want]
    for t in range(1, 5):
        fill(params, t)
        v = [0.9 * a + 0.1 * p.hesscale**2 for a, p in zip(v, params, strict=True)]
        h = [(a / (1 - 0.9**t)).sqrt() for a in v]
        total = sum((b * (0.1 * p.grad) ** 2).sum() for b, p in zip(h, params, strict=True))
        scale = min(0.7, math.sqrt(2 * delta / total))
        want = [w - scale * 0.1 * p.grad for w, p in zip(want, params, strict=True)]
        optimizer.step()
        assert abs(optimizer.scale - scale) < 1e-12 * scale
    assert_same([p.detach() for p in params], want)


@pytest.mark.parametrize(
    "kind",
    [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, AdaHesScale, Sophia],
)
def test_scaling_leaves_a_trusted_step_alone(kind):
    params, alone = parameters(), parameters()
    got = run(StepSizeScaling(kind(params, lr=0.01), delta=1e9), params, range(3))
    want = run(kind(alone, lr=0.01), alone, range(3))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_scaling_without_curvature_or_step_is_not_nan():
    params = parameters()
    optimizer = StepSizeScaling(torch.optim.SGD(params, lr=0.0))
    before = [p.detach().clone() for p in params]
    assert all(torch.equal(a, b) for a, b in zip(run(optimizer, params, [0]), before, strict=True))
    assert optimizer.scale == 1


def test_scaling_after_the_dtype_of_a_parameter_has_changed():
    params = parameters(torch.float32)
    optimizer = StepSizeScaling(torch.optim.SGD(params, lr=0.1), delta=1e-4)
    run(optimizer, params, [0])
    again = parameters()
    for p, q in zip(params, again, strict=True):
        p.grad = None
        q.data = p.data.double()
        p.data = q.data.clone()
    other = StepSizeScaling(torch.optim.SGD(again, lr=0.1), delta=1e-4)
    other.load_state_dict(optimizer.state_dict())
    assert_same(run(optimizer, params, [1]), run(other, again, [1]), 1e-6)


# --- what one expects of an optimizer ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_by_a_closure(kind):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    optimizer = kind(net.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)

    def closure():
        optimizer.zero_grad()
        return hs.backward(x, y)

    losses = []
    for _ in range(30):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0] - 0.02
    assert optimizer.param_groups[0]["lr"] < 1e-3
    optimizer.zero_grad()
    assert all(p.grad is None and p.hesscale is None for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_result_by_name(kind):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).double()
    twin = copy.deepcopy(net)
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 1, 0])
    hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
    hesscale_fx.transform(twin, nn.CrossEntropyLoss()).backward(x, y)
    kind(twin.parameters()).step()

    out = hs(x, y)
    optimizer = kind(hs.named_parameters())
    for name, p in net.named_parameters():
        p.grad = out.grads[name]
    optimizer.step(hess_diag=out.hess_diag)
    assert_same(net.parameters(), list(twin.parameters()))
    if kind is not scaled:  # takes the gradients of the result too
        net.load_state_dict({n: p + 1 for n, p in net.state_dict().items()})
        hs.zero_grad()
        before = net[0].weight.detach().clone()
        optimizer.step(grads=out.grads, hess_diag=out.hess_diag)
        assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_round_trip(kind, dtype):
    params, again = parameters(dtype), parameters(dtype)
    optimizer, other = kind(params, lr=0.02), kind(again, lr=0.5)
    run(optimizer, params, range(3))
    state = optimizer.state_dict()
    with torch.no_grad():
        for p, q in zip(params, again, strict=True):
            q.copy_(p)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.02
    want = run(optimizer, params, range(3, 6))
    got = run(other, again, range(3, 6))  # the state is its own: the first run did not move it
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_state_across_dtypes(kind):
    params, low = parameters(), parameters(torch.bfloat16)
    optimizer, other = kind(params), kind(low)
    run(optimizer, params, range(3))
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, low, strict=True):
        for key, value in optimizer.state[p].items():
            loaded = other.state[q][key]
            # A square such as 1e-16 is 0 in float16 and has three digits in bfloat16.
            want = {"step": value.dtype, "exp_avg": q.dtype}.get(key, torch.float32)
            assert loaded.dtype == want
            assert relative_error(loaded, value.to(want)) < 1e-7
    assert all(p.isfinite().all() for p in run(other, low, range(3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(kind, duplicate):
    params = parameters()
    optimizer = kind(params)
    run(optimizer, params, range(2))
    other, again = duplicate((optimizer, params))
    for seed in (2, 3):
        fill(params, seed)
        fill(again, seed)
        optimizer.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_absent(kind):
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = kind(params)
    fill(params, 0)
    params[1].grad = None  # frozen, or no part of this step
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    fill(params, 1)  # thawed
    optimizer.step()
    assert not torch.equal(params[1], before)
    optimizer.zero_grad()
    optimizer.step()  # with nothing to do


@pytest.mark.parametrize("kind", KINDS)
def test_added_group(kind):
    params = parameters()
    optimizer = kind(params[:1], lr=0.1)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    before = [p.detach().clone() for p in params]
    assert all(
        not torch.equal(a, b) for a, b in zip(run(optimizer, params, [0]), before, strict=True)
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize("kind", [AdaHesScale, Sophia])
def test_learning_rate_as_a_tensor(kind):
    params, again = parameters(), parameters()
    got = run(kind(params, lr=torch.tensor(0.01, dtype=torch.float64)), params, range(3))
    assert_same(got, run(kind(again, lr=0.01), again, range(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_learning_rate_no_step(kind):
    params = parameters()
    before = [p.detach().clone() for p in params]
    got = run(kind(params, lr=0.0), params, range(2))  # the first steps of a warm-up
    assert all(torch.equal(g, b) for g, b in zip(got, before, strict=True))


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_without_diagonal_is_refused_before_anything_moves(kind):
    params = parameters()
    fill(params, 0)
    params[1].hesscale = None
    before = [p.detach().clone() for p in params]
    with pytest.raises(HesScaleError, match="'parameter 1 of group 0' has a gradient and no"):
        kind(params).step()
    named = zip("abc", params, strict=True)
    with pytest.raises(HesScaleError, match="'b' has a gradient and no Hessian diagonal"):
        kind(named).step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_misshapen_are_refused(kind):
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = kind(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    table.weight.hesscale = torch.ones(5, 3)
    with pytest.raises(HesScaleError, match="grad of 'weight' is sparse.*sparse=False"):
        optimizer.step()
    table.weight.grad = torch.ones(5, 3)
    table.weight.hesscale = torch.ones(3)
    with pytest.raises(HesScaleError, match=r"hesscale of 'weight' has shape \[3\]"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_do_not_fit_are_refused(kind):
    params = parameters()
    fill(params, 0)
    diagonals = {"a": params[0].hesscale, "b": params[1].hesscale, "c": params[2].hesscale}
    with pytest.raises(HesScaleError, match="does not know the names.*named_parameters"):
        kind(params).step(hess_diag=diagonals)
    optimizer = kind([(f"module.{n}", p) for n, p in zip("abc", params, strict=True)])
    with pytest.raises(HesScaleError, match="None of the names in hess_diag"):
        optimizer.step(hess_diag=diagonals)
    with pytest.raises(HesScaleError, match="1 tensors for 3 parameters"):
        optimizer.step(hess_diag=[params[0].hesscale])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdaHesScale(p, lr=-1.0), "lr"),
        (lambda p: AdaHesScale(p, lr=float("nan")), "lr"),
        (lambda p: AdaHesScale(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: AdaHesScale(p, eps=-1e-8), "eps"),
        (lambda p: Sophia(p, weight_decay=-0.1), "weight_decay"),
        (lambda p: Sophia(p, gamma=0.0), "gamma"),
        (lambda p: StepSizeScaling(torch.optim.SGD(p), delta=0.0), "delta"),
        (lambda p: StepSizeScaling(p), "wraps an optimizer"),
        (lambda p: AdaHesScale([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(HesScaleError, match=message):
        make(parameters())


# --- compiled ----------------------------------------------------------------------------------

COMPILED = [
    AdaHesScale,
    pytest.param(Sophia, marks=pytest.mark.slow),
    pytest.param(
        lambda p, lr: StepSizeScaling(AdaHesScale(p, lr), delta=1e-4),
        marks=pytest.mark.slow,
        id="scaled",
    ),
]


# torch itself, when it compiles any optimizer.
@pytest.mark.filterwarnings("ignore:.*Profiler function:UserWarning")
@pytest.mark.parametrize("tensor", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_and_scheduled_without_compiling_again(kind, tensor):
    torch.compiler.reset()  # what it learned of other optimizers
    params, again = parameters(), parameters()
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizer, eager = kind(params, lr if tensor else lr.item()), kind(again, lr.item())
    optimizer.param_groups[0]["weight_decay"] = eager.param_groups[0]["weight_decay"] = 0.1
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, eager)]
    step = torch.compile(optimizer.step)
    for seed in range(6):
        fill(params, seed)
        fill(again, seed)
        with torch.compiler.set_stance("fail_on_recompile" if seed > 2 else "default"):
            step()
        eager.step()
        for rate in rates:
            rate.step()
    assert_same([p.detach() for p in params], [p.detach() for p in again])
    assert eager.param_groups[0]["lr"] < 0.001


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Profiler function:UserWarning")
@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {"fused": True}), (AdaHesScale, {})],
)
def test_scaling_compiled_around_any_optimizer(kind, options):
    torch.compiler.reset()
    # Without the scalar, which torch's own SGD and Adam, compiled, leave behind at first (2.13).
    params, again = parameters()[:2], parameters()[:2]
    optimizer = StepSizeScaling(kind(params, lr=0.1, **options), delta=1e-4)
    eager = StepSizeScaling(kind(again, lr=0.1, **options), delta=1e-4)
    step = torch.compile(optimizer.step)
    for seed in range(3):
        fill(params, seed)
        fill(again, seed)
        step()
        eager.step()
        assert 0 < eager.scale < 1
        assert abs(optimizer.scale / eager.scale - 1) < 1e-12
        assert_same([p.detach() for p in params], [p.detach() for p in again])


@pytest.mark.slow
def test_lazily_imported():
    code = (
        "import sys, hesscale_fx; assert 'hesscale_fx.optim' not in sys.modules; "
        "assert hesscale_fx.optim.AdaHesScale; assert not hasattr(hesscale_fx, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
