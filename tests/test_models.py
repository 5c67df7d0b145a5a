"""Whole models against autograd (loss, gradients) and the brute force (curvature)."""

from __future__ import annotations

import copy

import hesscale_fx
import pytest
import torch
from helpers import assert_close, cast, relative_error
from models import CASES
from reference import autograd, reference
from torch import nn

SLOW = ("unet-bicubic", "recurrent-lstm-2-bidirectional", "recurrent-gru-2-bidirectional")


def build(name, dtype):
    torch.manual_seed(0)
    made = copy.deepcopy(CASES[name]())
    made.model = made.model.to(dtype)
    if isinstance(made.loss, nn.Module):
        made.loss = made.loss.to(dtype)
    made.inputs, made.targets = cast(made.inputs, dtype), cast(made.targets, dtype)
    made.kwargs = cast(made.kwargs, dtype)
    return made


def transformed(made, method="hesscale"):
    """Loss, gradients and curvature of a copy, and the copy as the call left it."""
    model = copy.deepcopy(made.model)
    args = (*made.inputs, *made.targets)
    hs = hesscale_fx.transform(
        model, made.loss, args, made.kwargs or None, method=method
    )
    torch.manual_seed(3)
    out = hs(*args, **made.kwargs)
    return out, model


@pytest.mark.parametrize("name", CASES)
def test_float64(name):
    made = build(name, torch.float64)
    out, model = transformed(made)
    drawn = torch.get_rng_state()
    plain = copy.deepcopy(made.model)
    loss, grads = autograd(plain, made.loss, made.inputs, made.targets, made.kwargs, seed=3)
    assert torch.equal(drawn, torch.get_rng_state()), "the generator advanced otherwise"
    assert relative_error(out.loss, loss) < 1e-12
    assert_close(dict(out.grads), grads, 1e-10, "gradients")
    for (n, a), (_, b) in zip(model.named_buffers(), plain.named_buffers()):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14), f"buffer {n}"
    want = reference(
        copy.deepcopy(made.model), made.reference_loss or made.loss, made.inputs, made.targets,
        made.kwargs, seed=3,
    )  # fmt: skip
    want = {n: want.hess_diag[n] for n in grads}
    assert_close(dict(out.hess_diag), want, 1e-9, "curvature")


@pytest.mark.parametrize("name", [n for n in CASES if build(n, torch.float64).loss is not None])
def test_gauss_newton(name):
    made = build(name, torch.float64)
    out, _ = transformed(made, "hesscale_gn")
    loss, grads = autograd(
        copy.deepcopy(made.model), made.loss, made.inputs, made.targets, made.kwargs, seed=3
    )
    assert relative_error(out.loss, loss) < 1e-12
    assert_close(dict(out.grads), grads, 1e-10, "gradients")
    want = reference(
        copy.deepcopy(made.model), made.reference_loss or made.loss, made.inputs, made.targets,
        made.kwargs, method="hesscale_gn", seed=3,
    )  # fmt: skip
    want = {n: want.hess_diag[n] for n in grads}
    assert_close(dict(out.hess_diag), want, 1e-9, "curvature")


def _norm_error(got, want):
    """Over all parameters together: rounding spreads over sums of many terms."""
    got = torch.cat([g.detach().double().flatten() for g in got.values()])
    want = torch.cat([w.detach().double().flatten() for w in want.values()])
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


# A forward, a backward and a curvature pass of some twenty roundings each, and up to two
# digits lost to cancellation in the norms: 2^-24 and 2^-9 times a hundred, at most.
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_low_precision(name, dtype):
    if dtype == torch.bfloat16 and not build(name, torch.float64).low_precision:
        pytest.skip("a tie or a kink decides, or torch has no kernel: bfloat16 answers another question")
    made = build(name, dtype)
    try:
        loss, grads = autograd(
            copy.deepcopy(made.model), made.loss, made.inputs, made.targets, made.kwargs, seed=3
        )
    except RuntimeError as error:
        assert "not implemented for" in str(error)
        pytest.skip(f"torch itself: {error}")
    out, _ = transformed(made)
    assert out.loss.dtype == loss.dtype
    assert all(out.grads[n].dtype == g.dtype for n, g in grads.items())
    assert all(h.dtype == torch.float32 for h in out.hess_diag.values())
    assert relative_error(out.loss, loss) < _ROUNDING[dtype]
    assert _norm_error(dict(out.grads), grads) < _ROUNDING[dtype]
    if made.random:
        return  # other dtypes draw other masks; float64 holds the curvature to its mask
    exact = copy.deepcopy(made)
    exact.model, exact.inputs = exact.model.double(), cast(exact.inputs, torch.float64)
    exact.targets, exact.kwargs = cast(exact.targets, torch.float64), cast(exact.kwargs, torch.float64)
    if isinstance(exact.loss, nn.Module):
        exact.loss = exact.loss.double()
    full, _ = transformed(exact)
    assert _norm_error(dict(out.hess_diag), dict(full.hess_diag)) < _ROUNDING[dtype]
