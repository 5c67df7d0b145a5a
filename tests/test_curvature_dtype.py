"""Curvature contracted in bfloat16."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hesscale_fx

aten = torch.ops.aten
LOSS = nn.CrossEntropyLoss()


def both(model, loss, args, dtype=torch.bfloat16):
    plain = hesscale_fx.transform(model, loss, args)
    low = hesscale_fx.transform(model, loss, args, curvature_dtype=dtype)
    return plain, low


def median_error(have, want):
    """Of all elements that are not zero."""
    errors = [((have[k] - h).abs() / h.abs())[h != 0].flatten() for k, h in want.items()]
    return torch.cat(errors).median().item()


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, 2),
        nn.Flatten(),
        nn.Linear(4 * 100, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    return net, (torch.randn(6, 2, 5, 5), torch.randint(3, (6,)))


def attention():
    net = nn.Sequential(
        nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Flatten(), nn.Linear(80, 3)
    )
    return net, (torch.randn(6, 5, 16), torch.randint(3, (6,)))


@pytest.mark.parametrize("make", [convolutional, pytest.param(attention, marks=pytest.mark.slow)])
def test_within_a_percent_and_gradients_untouched(make):
    torch.manual_seed(0)
    net, args = make()
    plain, low = both(net, LOSS, args)
    want, have = plain(*args), low(*args)
    assert torch.equal(have.loss, want.loss)
    for name, grad in want.grads.items():
        assert torch.equal(have.grads[name], grad), name
    assert {h.dtype for h in have.hess_diag.values()} == {torch.float32}
    assert 0 < median_error(have.hess_diag, want.hess_diag) < 0.01


def test_only_contractions_are_rounded():
    """All that has bfloat16 operands is a contraction, or moves elements for one."""
    net, args = convolutional()
    _, low = both(net, LOSS, args)
    moves = {
        aten._to_copy.default, aten.t.default, aten.permute.default, aten.reshape.default,
        aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, torch.ops.aten.expand.default,
    }  # fmt: skip
    contractions = {aten.mm.default, aten.bmm.default, aten.convolution_backward.default}
    rounded = [
        n
        for n in low.graph.nodes
        for v in n.all_input_nodes
        if isinstance(v.meta.get("val"), torch.Tensor) and v.meta["val"].dtype == torch.bfloat16
    ]
    kinds = {n.target for n in rounded if n.op == "call_function"}
    assert contractions & kinds
    assert {k for k in kinds - moves - contractions if "getitem" not in str(k)} == set()


def test_the_sum_of_a_bias_is_not_rounded():
    """The last bias gets the same s as without, and adds it up in float32."""
    net, args = convolutional()
    plain, low = both(net, LOSS, args)
    assert torch.equal(low(*args).hess_diag["6.bias"], plain(*args).hess_diag["6.bias"])


def test_small_squares_do_not_vanish():
    """(1e-20)^2 is below the range of float16 by far, and within that of bfloat16."""
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3))
    x, y = torch.randn(5, 4) * 1e-15, torch.randint(3, (5,))
    plain, low = both(net, LOSS, (x, y))
    have, want = low(x, y).hess_diag, plain(x, y).hess_diag
    assert want["0.weight"].abs().max() < 1e-28
    assert median_error(have, want) < 0.01


def test_one_row_without_a_batch():
    net = nn.Linear(3, 2)
    x, y = torch.randn(3), torch.randn(2)
    plain, low = both(net, nn.MSELoss(), (x, y))
    have, want = low(x, y).hess_diag, plain(x, y).hess_diag
    assert torch.equal(have["bias"], want["bias"])
    assert median_error(have, want) < 0.01


def test_a_wider_dtype_changes_nothing():
    net, args = convolutional()
    plain, same = both(net, LOSS, args, torch.float32)
    assert same.code == plain.code


def test_float64_is_rounded_on_request_and_returned_in_float64():
    net, (x, y) = convolutional()
    net, x = net.double(), x.double()
    plain, low = both(net, LOSS, (x, y), torch.float32)
    have, want = low(x, y).hess_diag, plain(x, y).hess_diag
    assert {h.dtype for h in have.values()} == {torch.float64}
    assert 0 < median_error(have, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, "bfloat16"])
def test_others_are_refused(dtype):
    with pytest.raises(hesscale_fx.HesScaleError, match="curvature_dtype must be torch.bfloat16"):
        hesscale_fx.transform(nn.Linear(2, 1), nn.MSELoss(), curvature_dtype=dtype)


def workloads():
    """The networks that the benchmarks time."""
    path = Path(__file__).parents[1] / "benchmarks" / "workloads.py"
    spec = importlib.util.spec_from_file_location("workloads", path)
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module.WORKLOADS


@pytest.mark.slow
@pytest.mark.parametrize("name", list(workloads()))
def test_within_a_percent_on_every_benchmark(name):
    torch.manual_seed(0)
    work = workloads()[name]()
    plain, low = both(work.model, work.loss, work.args)
    want, have = plain(*work.args), low(*work.args)
    assert median_error(have.hess_diag, want.hess_diag) < 0.01
    for key, grad in want.grads.items():
        assert torch.equal(have.grads[key], grad), key
