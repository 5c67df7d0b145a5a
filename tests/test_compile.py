"""Compiled, exported, packaged: the emitted graph outside of eager mode."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

import hesscale_fx
from tests.helpers import Counting, assert_close

LOSS = nn.CrossEntropyLoss()
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n=5):
    return torch.randn(n, 4), torch.randint(3, (n,))


def check(have, want, tolerance=1e-5):
    torch.testing.assert_close(have.loss, want.loss)
    assert_close(dict(have.grads), dict(want.grads), tolerance, "gradients")
    assert_close(dict(have.hess_diag), dict(want.hess_diag), tolerance, "curvature")


# ------------------------------------------------------------------ before the first capture


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_before_the_first_capture(in_place):
    net, args = network(), data()
    hs = hesscale_fx.transform(net, LOSS)
    run = hs
    if in_place:
        hs.compile(fullgraph=True, backend=Counting())
    else:
        run = torch.compile(hs, fullgraph=True, backend=Counting())
    check(run(*args), hesscale_fx.transform(net, LOSS, args)(*args))
    # Another kind of call is captured when it comes, too.
    net.double()
    args = args[0].double(), args[1]
    check(run(*args), hesscale_fx.transform(net, LOSS, args)(*args))


def test_inside_another_compiled_function():
    net, args = network(), data()
    hs = hesscale_fx.transform(net, LOSS)

    def twice(x, y):
        return 2 * hs(x, y).hess_diag["0.weight"]

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call hs\.materialize"):
        torch.compile(twice, fullgraph=True, backend=Counting())(*args)
    want = 2 * hesscale_fx.transform(net, LOSS)(*args).hess_diag["0.weight"]
    assert torch.equal(torch.compile(twice, backend=Counting())(*args), want)
    assert torch.equal(torch.compile(twice, fullgraph=True, backend=Counting())(*args), want)


def test_every_inside_another_compiled_function_is_refused():
    args = data()
    hs = hesscale_fx.transform(network(), LOSS, args, every=2)
    step = torch.compile(lambda x, y: hs(x, y).loss, fullgraph=True, backend=Counting())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="counts its calls"):
        step(*args)


def test_every_compiled_from_outside():
    args = data()
    hs = hesscale_fx.transform(network(), LOSS, every=3)
    backend = Counting()
    run = torch.compile(hs, fullgraph=True, backend=backend)
    assert [bool(run(*args).hess_diag) for _ in range(7)] == [i % 3 == 0 for i in range(7)]
    assert (hs.calls, backend.graphs) == (7, 2)


class Recurrent(nn.Module):
    """A layer that Dynamo takes on request only, inside of another."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"gru": nn.GRU(4, 5, batch_first=True)})
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner["gru"](x.unsqueeze(1))[0][:, -1])


@torch._dynamo.config.patch(allow_rnn=False)
def test_a_recurrent_layer():
    net, (x, y) = Recurrent(), data()
    hs = hesscale_fx.transform(net, LOSS, (x, y))
    check(torch.compile(hs, fullgraph=True, backend="eager")(x, y), hs(x, y))


@pytest.mark.parametrize("first", [1, pytest.param(3, marks=pytest.mark.slow), 64])
def test_at_most_two_recompilations_over_batches(first):
    hs = hesscale_fx.transform(network(), LOSS)
    backend = Counting()
    run = torch.compile(hs, fullgraph=True, backend=backend)
    for n in (first, 1, 3, 16, 17, 64):
        args = data(n)
        check(run(*args), hs(*args))
    assert backend.graphs <= 3
    assert len(hs._programs) == 1


# ------------------------------------------------------------------ export


def test_export_before_the_first_capture_is_refused():
    hs = hesscale_fx.transform(network(), LOSS)
    with pytest.raises(hesscale_fx.HesScaleError, match="materialize"):
        torch.export.export(hs, data())
    torch.export.export(hs.materialize(*data()), data())
    hs.eval()
    with pytest.raises(hesscale_fx.HesScaleError, match="train/eval"):
        torch.export.export(hs, data())


def test_export_of_another_call_than_the_graph_serves_is_refused():
    """The size of the batch is baked into its mean."""
    hs = hesscale_fx.transform(network(), LOSS, data(5), dynamic=False)
    with pytest.raises(hesscale_fx.HesScaleError, match="has shape"):
        torch.export.export(hs, data(7))
    torch.export.export(hs, data(5))


def test_export_computes_curvature_whatever_the_schedule():
    args = data()
    hs = hesscale_fx.transform(network(), LOSS, args, every=3)
    hs.calls = 1
    _, _, hess_diag = torch.export.export(hs, args).module()(*args)
    assert list(hess_diag) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert hs.calls == 1


def test_saved_loaded_and_free_in_the_batch(tmp_path):
    net, args = network(), data()
    hs = hesscale_fx.transform(net, LOSS, args)
    free = {0: torch.export.Dim.AUTO}
    program = torch.export.export(hs, args, dynamic_shapes=((free, free),))
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    for n in (5, 17):
        args = data(n)
        check(hesscale_fx.Result(*loaded(*args)), hs(*args))


def test_no_node_waits_for_the_device():
    """Nothing is read back to the host, so that CUDA can record the graph."""
    hs = hesscale_fx.transform(network(), LOSS, data())
    reads = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default}
    reads |= {torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
    assert not [n for n in hs.graph.nodes if n.target in reads]


# ------------------------------------------------------------------ with the compiler itself


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_of_the_compiler(mode):
    net, args = network(), data(16)
    hs = hesscale_fx.transform(net, LOSS)
    run = torch.compile(hs, fullgraph=True, mode=mode)
    for _ in range(2):
        check(run(*args), hs(*args))
        with torch.no_grad():
            net[0].weight.mul_(1.5)


def processor_seconds():
    """Of this process and of the C++ compilers that it has waited for."""
    spent = os.times()
    return spent.user + spent.children_user


@needs_compiler
@pytest.mark.slow
def test_compiles_within_two_and_a_half_times_the_gradient():
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(16, 16), nn.GELU())))
    args = torch.randn(8, 16), torch.randn(8, 16)
    hs = hesscale_fx.transform(net, nn.MSELoss(), args)
    parameters = list(net.parameters())
    seconds = {}
    for kind in ("warm up", "plain", "ours"):
        torch._dynamo.reset()
        start = processor_seconds()
        with fresh_cache(), torch._inductor.config.patch(compile_threads=1):
            if kind == "ours":
                torch.compile(hs, fullgraph=True)(*args)
            else:
                loss = torch.compile(lambda x, y: nn.functional.mse_loss(net(x), y))
                torch.autograd.grad(loss(*args), parameters)
        seconds[kind] = processor_seconds() - start
    assert seconds["ours"] < 2.5 * seconds["plain"], seconds


ELSEWHERE = """
import sys, torch
package, data = sys.argv[1:]
step = torch._inductor.aoti_load_package(package)
state, batches, lr, want = torch.load(data)
step.load_constants(state, check_full_update=True, user_managed=True)
for (x, y), (want_loss, want_hess) in zip(batches, want):
    loss, grads, hess_diag = step(x, y)
    torch.testing.assert_close(loss, want_loss)
    for name, h in want_hess.items():
        torch.testing.assert_close(hess_diag[name], h, rtol=1e-4, atol=1e-6)
        state[name].sub_(lr * grads[name] / (hess_diag[name].abs() + 1))
assert "hesscale_fx" not in sys.modules
print("same")
"""


@needs_compiler
@pytest.mark.slow
def test_one_file_trains_in_a_process_without_this_library(tmp_path):
    """An AOTInductor package follows the parameters that a process without hesscale_fx updates."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    args = data(8)
    hs = hesscale_fx.transform(net, LOSS, args)
    free = {0: torch.export.Dim.AUTO}
    program = torch.export.export(hs, args, dynamic_shapes=((free, free),))
    package = tmp_path / "step.pt2"
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(package),
        inductor_configs={"always_keep_tensor_constants": True},
    )

    state = {name: v.detach().clone() for name, v in net.state_dict().items()}
    batches, want = [data(8), data(11), data(8)], []
    for x, y in batches:
        out = hs(x, y)
        want.append((out.loss, copy.deepcopy(dict(out.hess_diag))))
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.sub_(0.1 * out.grads[name] / (out.hess_diag[name].abs() + 1))
    torch.save((state, batches, 0.1, want), tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(package), str(tmp_path / "data.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "same", done.stderr
