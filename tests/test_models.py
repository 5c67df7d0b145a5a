"""Whole models against autograd (loss, gradients) and the brute force (curvature)."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from helpers import assert_close, cast, relative_error
from models import CASES
from reference import autograd, reference
from torch import nn

import hesscale_fx

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def build(name, dtype):
    """A case in one dtype. Its numbers fit bfloat16, so every dtype has the same model."""
    torch.manual_seed(0)
    made = copy.deepcopy(CASES[name]())
    made.model = made.model.to(torch.bfloat16).to(dtype)
    if isinstance(made.loss, nn.Module):
        made.loss = made.loss.to(torch.bfloat16).to(dtype)
    for what in ("inputs", "targets", "kwargs"):
        setattr(made, what, cast(cast(getattr(made, what), torch.bfloat16), dtype))
    return made


def transformed(made, method="hesscale"):
    """Loss, gradients and curvature of a copy, and the copy as the call left it."""
    model = copy.deepcopy(made.model)
    args = (*made.inputs, *made.targets)
    hs = hesscale_fx.transform(model, made.loss, args, made.kwargs or None, method=method)
    torch.manual_seed(3)
    return hs(*args, **made.kwargs), model


def plain(made):
    """The same by autograd, and the copy as a plain forward leaves it."""
    model = copy.deepcopy(made.model)
    loss, grads = autograd(model, made.loss, made.inputs, made.targets, made.kwargs, seed=3)
    return loss, grads, model


@lru_cache(maxsize=4)
def brute_force(name, method="hesscale"):
    made = build(name, torch.float64)
    return reference(
        made.model, made.reference_loss or made.loss, made.inputs, made.targets, made.kwargs,
        method=method, seed=3,
    ).hess_diag  # fmt: skip


def _check_float64(name, method):
    made = build(name, torch.float64)
    out, model = transformed(made, method)
    drawn = torch.get_rng_state()
    loss, grads, model_after = plain(made)
    assert torch.equal(drawn, torch.get_rng_state()), "the generator advanced otherwise"
    assert relative_error(out.loss, loss) < 1e-12
    assert_close(dict(out.grads), grads, 1e-10, "gradients")
    for (n, a), (_, b) in zip(model.named_buffers(), model_after.named_buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14), f"buffer {n}"
    want = {n: brute_force(name, method)[n] for n in grads}
    assert_close(dict(out.hess_diag), want, made.tolerance, "curvature")


def _norm_error(got, want):
    """Over all parameters together: rounding spreads over sums of many terms."""
    got = torch.cat([g.detach().double().flatten() for g in got.values()])
    want = torch.cat([w.detach().double().flatten() for w in want.values()])
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


# Unit roundoff is 6e-8 and 4e-3; a pass is some twenty roundings deep, and the curvature
# squares what it meets.
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def _check_low_precision(name, dtype):
    made = build(name, dtype)
    if dtype == torch.bfloat16 and not made.low_precision:
        pytest.skip("a tie or a kink decides: rounding the data changes the question")
    try:
        loss, grads, _ = plain(made)
    except RuntimeError as error:
        assert "not implemented for" in str(error)
        pytest.skip(f"torch itself: {error}")
    out, _ = transformed(made)
    assert out.loss.dtype == loss.dtype
    assert [g.dtype for g in out.grads.values()] == [g.dtype for g in grads.values()]
    assert {h.dtype for h in out.hess_diag.values()} == {torch.float32}
    assert relative_error(out.loss, loss) < _ROUNDING[dtype]
    error = _norm_error(dict(out.grads), grads)
    assert error < _ROUNDING[dtype], f"gradients differ by {error:.1e}"
    if made.random:
        return  # another dtype draws other masks
    want = {n: brute_force(name)[n] for n in grads}
    error = _norm_error(dict(out.hess_diag), want)
    assert error < max(_ROUNDING[dtype], made.tolerance), f"curvature differs by {error:.1e}"


# Every case runs in float64; these also run otherwise by default, and all under `-m slow`.
BROAD = {
    "mlp-GELU(approximate='none')", "conv-2d-reflect", "conv-transposed-2d", "pool-avg-2d-ceil",
    "norm-batch-2d", "norm-layer", "dropout-plain", "recurrent-gru", "gpt", "embedding-bag-mean",
    "mixture-dense", "hand-spelled", "loss-cross-entropy-ignore-class", "loss-gaussian-nll",
}  # fmt: skip
# Some of a family, of which the others run by default.
LONG = {
    "transformer-encoder-post", "transformer-encoder-post-dropout", "transformer-encoder-padding",
    "transformer-encoder-pre-dropout", "multihead-bias-kv", "multihead-causal-weights",
    "transformer-decoder", "gpt-by-hand", "gpt-dropout", "gpt-untied", "bert-dropout",
    "multihead-plain", "multihead-weights", "multihead-dropout", "multihead-sequence-first",
    "recurrent-lstm-dropout", "recurrent-GRUCell", "recurrent-gru-2-bidirectional", "resnet-eval",
    "dropout-eval",
}  # fmt: skip
# Of the families with many members every third runs by default.
LARGE = ("mlp-", "loss-", "pool-", "conv-")


def _parameters():
    """Every case in every variant, those of one case together: they share a reference."""
    assert set(CASES) >= BROAD | LONG
    seen = dict.fromkeys(LARGE, 0)
    for name, made in CASES.items():
        family = next((f for f in LARGE if name.startswith(f)), "")
        seen[family] = seen.get(family, 0) + 1
        skipped = name in LONG or (family and seen[family] % 3 != 1)
        for variant in ("float64", "float32", "bfloat16", "gauss-newton"):
            if variant != "gauss-newton" or made().loss is not None:
                quick = name in BROAD or (variant == "float64" and not skipped)
                marks = () if quick else pytest.mark.slow
                yield pytest.param(name, variant, id=f"{name}-{variant}", marks=marks)


@pytest.mark.parametrize(("name", "variant"), list(_parameters()))
def test_model(name, variant):
    if variant == "float64":
        _check_float64(name, "hesscale")
    elif variant == "gauss-newton":
        _check_float64(name, "hesscale_gn")
    else:
        _check_low_precision(name, DTYPES[variant])
