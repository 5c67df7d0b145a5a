"""What is seen while it compiles and while it runs: the log and the profiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import hesscale_fx
from hesscale_fx import inspect
from hesscale_fx.errors import InvalidArgumentError


def model():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return net, nn.CrossEntropyLoss(), (torch.randn(5, 4), torch.randint(3, (5,)))


@pytest.fixture(scope="module")
def profiled():
    torch.manual_seed(0)
    net, loss, args = model()
    hs = hesscale_fx.transform(net.eval(), loss, args)
    plain = hs(*args)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        under = hs(*args)
    return hs, plain, under, prof


def test_every_stage_is_logged(caplog):
    net, loss, args = model()
    with caplog.at_level(logging.INFO, logger="hesscale_fx"):
        hs = hesscale_fx.transform(net, loss)
        hs(*args)
        said = [r.getMessage() for r in caplog.records if r.name == "hesscale_fx"]
        for stage in ("capture", "definitions", "units", "exactness", "emission", "total"):
            assert sum(m.startswith(f"{stage}: ") for m in said) == 1, (stage, said)
        assert any(f"{len(hs.graph.nodes)} nodes" in m for m in said)
        caplog.clear()
        hs(*args)
        assert not caplog.records  # nothing was compiled
        hs.eval()
        hs(*args)
        assert any("again" in r.getMessage() and "mode" in r.getMessage() for r in caplog.records)


@pytest.mark.slow
def test_torch_logs_shows_it():
    code = (
        "import torch, hesscale_fx; "
        "hesscale_fx.transform(torch.nn.Linear(2, 1), torch.nn.MSELoss())"
        "(torch.randn(3, 2), torch.randn(3, 1))"
    )
    plain = {k: v for k, v in os.environ.items() if k != "TORCH_LOGS"}
    for extra, shown in (({"TORCH_LOGS": "hesscale_fx"}, True), ({}, False)):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**plain, **extra},
            timeout=120,
        )
        assert ran.returncode == 0 and ("emission: " in ran.stderr) == shown, ran.stderr
        assert not ran.stdout


def test_the_profiler_shows_the_names_of_nodes(profiled):
    hs, _, _, prof = profiled
    seen = {e.key for e in prof.key_averages()}
    calls = {n.name for n in hs.graph.nodes if n.op == "call_function"}
    assert calls <= seen
    assert "_0_weight_hess" in seen and "aten::mm" in seen


def test_the_profiler_changes_nothing(profiled):
    hs, plain, under, _ = profiled
    assert torch.equal(plain.loss, under.loss)
    for name in plain.hess_diag:
        assert torch.equal(plain.hess_diag[name], under.hess_diag[name])
        assert torch.equal(plain.grads[name], under.grads[name])
        assert not under.hess_diag[name].requires_grad


def test_times_by_role(profiled):
    hs, _, _, prof = profiled
    roles = inspect.times(hs, prof)
    assert set(roles) == {"forward", "gradient", "curvature"} and min(roles.values()) > 0
    modules = inspect.times(hs, prof, by="module")
    assert {"0", "1", "2", "3", "loss"} == set(modules)
    assert sum(modules.values()) == pytest.approx(sum(roles.values()))
    names = inspect.times(hs, prof, by="name")
    whole = {e.key: e.cpu_time_total / 1e6 for e in prof.key_averages()}
    assert names["_0_weight_hess"] == pytest.approx(whole["_0_weight_hess"])
    with pytest.raises(InvalidArgumentError, match="role"):
        inspect.times(hs, prof, by="colour")
