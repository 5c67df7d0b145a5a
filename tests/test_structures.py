"""Every entry of the table of structures against the exact Hessian diagonal.

`hesscale_fx.check` compares, for each floating-point argument alone, gradient and curvature with
double backward at random g and s. Each case names the overloads it is there for and is held to
meeting them in the captured graph; `test_every_entry_has_a_case` compares those with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

import hesscale_fx
from hesscale_fx import api, structures
from hesscale_fx.check import CheckError
from hesscale_fx.structures import definitions, table
from hesscale_fx.structures.columns import Columns
from hesscale_fx.structures.fourier import Transform

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    """Normal entries in float64: no ties, nothing at a kink."""
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def u(*shape: int, low: float = 0.2, high: float = 0.8) -> torch.Tensor:
    return torch.rand(shape, generator=GENERATOR, dtype=torch.float64) * (high - low) + low


def i(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


def overload(name: str) -> Any:
    """``"add.Tensor"``; None where this version of torch has no such operator."""
    packet, _, rest = name.partition(".")
    return getattr(getattr(aten, packet, None), rest, None)


@dataclass(frozen=True)
class Case:
    ops: str  # the overloads it is there for
    function: Callable[..., Any]
    args: tuple
    note: str = ""
    twin: Callable[..., Any] | None = None  # the same by hand, where autograd differentiates once
    tolerance: float = 1e-9

    @property
    def overloads(self) -> set[Any]:
        return {overload(name) for name in self.ops.split()} - {None}

    def __str__(self) -> str:
        return "-".join(filter(None, [self.ops.replace(" ", "+"), self.note]))


def case(ops: str, function: Callable[..., Any], *args: Any, **options: Any) -> Case:
    return Case(ops, function, args, **options)


def several(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """One function that returns what each returns."""
    return lambda *args: [f(*args) for f in functions]


SAMPLES = u(1, 1, 3)
SELECTION = [
    # indexing
    case("slice.Tensor", several(lambda x: x[1:, ::2], lambda x: x[:, -3:-1]), r(3, 5)),
    case("select.int", several(lambda x: x[1], lambda x: x.select(-1, -2)), r(3, 4).t()),
    case(
        "index.Tensor",
        several(
            lambda x: x[i(0, 2, 2)],
            lambda x: x[:, i([0, 1], [3, 3])],
            lambda x: x[i(0, 1), i(2, -1)],
            lambda x: x[torch.tensor([True, False, True]).nonzero_static(size=2).squeeze(1)],
        ),
        r(3, 4),
    ),
    case("index_select.default", lambda x: x.index_select(-1, i(3, 0, 0)), r(2, 4)),
    case(
        "gather.default",
        several(
            lambda x: x.gather(1, i([0, 0, 1], [3, 2, 2])),
            lambda x: x.gather(-2, i([1, 0, 1, 1])),
        ),
        r(4, 2).t(),
    ),
    case("take.default", lambda x: x.take(i([0, 5], [-1, 5])), r(2, 3)),
    case(
        "take_along_dim.default",
        several(
            lambda x: x.take_along_dim(i([0, 0], [1, 0]), 1),
            lambda x: x.take_along_dim(i(3, 1, 1)),
        ),
        r(2, 3),
    ),
    case("slice_scatter.default", lambda x, y: x.slice_scatter(y, -1, 1, 4, 2), r(2, 4), r(2, 2)),
    case("select_scatter.default", lambda x, y: x.select_scatter(y, -1, 2), r(2, 4), r(2)),
    case(
        "diagonal.default",
        several(lambda x: x.diagonal(), lambda x: x.diagonal(1, -1, 0)),
        r(2, 3, 3),
    ),
    case("diagonal_scatter.default", lambda x, y: x.diagonal_scatter(y, 1), r(3, 3), r(2)),
    case("diag_embed.default", lambda x: x.diag_embed(1, 0, -1), r(2, 3)),
    case("triu.default", lambda x: x.triu(-1), r(3, 4)),
    case("tril.default", lambda x: x.tril(1), r(2, 3, 4)),
    case("unfold.default", lambda x: x.unfold(-1, 3, 2), r(2, 7)),
    case("as_strided.default", lambda x: x.as_strided((3, 2), (2, 1), 1), r(3, 4)),
    case(
        "masked_select.default",
        lambda x: x.masked_select(torch.tensor([True, False, True])),
        r(2, 3),
    ),
    case(
        "masked_scatter.default",
        lambda x, y: x.masked_scatter(torch.tensor([True, False, True]), y),
        r(2, 3),
        r(5),
    ),
    case("scatter.src", lambda x, y: x.scatter(-1, i([0, 2], [1, 0]), y), r(2, 3), r(2, 2)),
    case("scatter.value", lambda x: x.scatter(0, i([0, 1, 0]), 2.0), r(2, 3)),
    case(
        "scatter_add.default", lambda x, y: x.scatter_add(1, i([0, 0], [1, 0]), y), r(2, 3), r(2, 2)
    ),
    *[
        case(
            "scatter_reduce.two",
            lambda x, y, how=how, own=own: x.scatter_reduce(
                0, i([0, 0, 1], [0, 1, 1]), y, how, include_self=own
            ),
            r(2, 3),
            r(2, 3),
            note=f"{how}-{own}",
        )
        for how, own in [("sum", True), ("mean", True), ("amax", True), ("amin", False)]
    ],
    case(
        "index_put.default",
        several(
            lambda x, y: x.index_put((i(0, 2),), y),
            lambda x, y: x.index_put((i(1, 1), i(0, 0)), y[:, 0], accumulate=True),
        ),
        r(3, 2),
        r(2, 2),
    ),
    case("_unsafe_index.Tensor", lambda x: aten._unsafe_index(x, [None, i(0, 2, 2)]), r(2, 3)),
    case(
        "_unsafe_index_put.default",
        lambda x, y: aten._unsafe_index_put(x, [i(0, 0)], y, True),
        r(2, 3),
        r(2, 3),
    ),
    case("index_copy.default", lambda x, y: x.index_copy(-1, i(2, 0), y), r(2, 3), r(2, 2)),
    case("index_fill.int_Scalar", lambda x: x.index_fill(-1, i(2, 0), 1.5), r(2, 3)),
    case("index_fill.int_Tensor", lambda x, v: x.index_fill(-1, i(2, 0), v), r(2, 3), r()),
    case(
        "put.default",
        several(lambda x, y: x.put(i(0, 3), y), lambda x, y: x.put(i(1, 1), y, accumulate=True)),
        r(2, 3),
        r(2),
    ),
    case("trace.default", lambda x: x.trace(), r(3, 4)),
    case("unbind.int", lambda x: x.unbind(-1), r(2, 3)),
    case("split.Tensor", lambda x: x.split(2, -1), r(2, 5)),
    case("split_with_sizes.default", lambda x: x.split([1, 3], 1), r(2, 4)),
    case(
        "_unsafe_masked_index.default",
        lambda x: aten._unsafe_masked_index(
            x, torch.tensor([True, False, True]), [i(0, 7, 1)], 0.0
        ),
        r(2, 3),
    ),
    case(
        "_unsafe_masked_index_put_accumulate.default",
        lambda x, y: aten._unsafe_masked_index_put_accumulate(
            x, torch.tensor([True, False, True]), [i(0, 0, 0)], y
        ),
        r(2),
        r(3),
    ),
    case(
        "embedding.default",
        several(
            lambda w: F.embedding(i([0, 2], [2, 1]), w),
            lambda w: F.embedding(i(0, 1, 2), w, padding_idx=1),
        ),
        r(3, 2),
    ),
    # rearranging
    case(
        "cat.default",
        several(lambda x, y: torch.cat([x, y, x], -1), lambda x, y: torch.cat([x, y[:, :2]], 0)),
        r(2, 2),
        r(2, 3),
    ),
    case("stack.default", lambda x, y: torch.stack([x, y, y], -1), r(2, 2), r(2, 2)),
    case(
        "constant_pad_nd.default",
        several(lambda x: F.pad(x, (1, 2), value=0.5), lambda x: F.pad(x, (-1, 1, 2, 0))),
        r(2, 3),
    ),
    case("reflection_pad1d.default", lambda x: F.pad(x, (1, 2), "reflect"), r(1, 2, 3)),
    case("reflection_pad2d.default", lambda x: F.pad(x, (1, 2, 0, 1), "reflect"), r(1, 2, 3)),
    case(
        "reflection_pad3d.default", lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), "reflect"), r(1, 2, 2, 2)
    ),
    case("replication_pad1d.default", lambda x: F.pad(x, (1, 2), "replicate"), r(1, 2, 3)),
    case("replication_pad2d.default", lambda x: F.pad(x, (1, 2, 0, 1), "replicate"), r(1, 2, 3)),
    case(
        "replication_pad3d.default",
        lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), "replicate"),
        r(1, 2, 2, 2),
    ),
    case("", lambda x: F.pad(x, (1, 2, 0, 1), "circular"), r(1, 1, 2, 3), note="circular"),
    case("repeat.default", lambda x: x.repeat(2, 1, 3), r(2, 2)),
    case("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, -1), r(2, 3)),
    case(
        "repeat_interleave.self_Tensor",
        lambda x: x.repeat_interleave(i(2, 0, 1), -1, output_size=3),
        r(2, 3),
    ),
    case("roll.default", several(lambda x: x.roll(1), lambda x: x.roll((1, -1), (0, 1))), r(2, 3)),
    case("flip.default", lambda x: x.flip(0, -1), r(2, 3)),
    case("rot90.default", lambda x: x.rot90(1, (0, -1)), r(2, 3)),
    case(
        "im2col.default",
        lambda x: F.unfold(x, (2, 2), dilation=(1, 2), padding=1, stride=(2, 1)),
        r(1, 2, 3, 3),
    ),
    case("col2im.default", lambda x: F.fold(x, (3, 3), (2, 2), padding=1, stride=2), r(1, 4, 4)),
    case("pixel_shuffle.default", lambda x: F.pixel_shuffle(x, 2), r(1, 4, 2, 1)),
    case("pixel_unshuffle.default", lambda x: F.pixel_unshuffle(x, 2), r(1, 1, 2, 4)),
    case("channel_shuffle.default", lambda x: F.channel_shuffle(x, 2), r(1, 4, 2)),
    # choosing
    case("sort.default", lambda x: x.sort(-1, descending=True), r(2, 3)),
    case("sort.stable", lambda x: x.sort(dim=0, stable=True), r(3, 2)),
    case("", lambda x: x.argsort(0).to(x.dtype) * x.msort(), r(3, 2), note="argsort"),
    case(
        "topk.default",
        several(lambda x: x.topk(2, -1), lambda x: x.topk(1, 0, largest=False)),
        r(2, 4),
    ),
    case(
        "kthvalue.default",
        several(lambda x: x.kthvalue(2), lambda x: x.kthvalue(1, 0, keepdim=True)),
        r(3, 4),
    ),
    case(
        "median.dim", several(lambda x: x.median(-1), lambda x: x.median(0, keepdim=True)), r(3, 4)
    ),
    case("median.default", lambda x: x.median(), r(2, 3)),
    case("nanmedian.dim", lambda x: x.nanmedian(-1, keepdim=True), r(2, 3)),
    case("nanmedian.default", lambda x: x.nanmedian(), r(2, 3)),
    case("mode.default", lambda x: x.mode(-1, keepdim=True), r(2, 3)),
    case("cummax.default", lambda x: x.cummax(-1), r(2, 4)),
    case("cummin.default", lambda x: x.cummin(0), r(4, 2)),
    case("max.dim", several(lambda x: x.max(-1), lambda x: x.max(0, keepdim=True)[0]), r(3, 4)),
    case("min.dim", several(lambda x: x.min(-1), lambda x: x.min(0, keepdim=True)[0]), r(3, 4)),
    case(
        "max_pool2d_with_indices.default",
        several(
            lambda x: F.max_pool2d(x, 2, stride=1, padding=1),
            lambda x: F.max_pool2d(x, 2, dilation=2, ceil_mode=True, return_indices=True),
            lambda x: F.max_pool1d(x[:, :, 0], 2),
        ),
        r(1, 2, 4, 3),
    ),
    case(
        "max_pool3d_with_indices.default",
        lambda x: F.max_pool3d(x, 2, stride=1, padding=1),
        r(1, 1, 2, 2, 3),
    ),
    case(
        "adaptive_max_pool2d.default",
        several(
            lambda x: F.adaptive_max_pool2d(x, (2, 3), return_indices=True),
            lambda x: F.adaptive_max_pool1d(x[:, :, 0], 2),
        ),
        r(1, 2, 3, 4),
    ),
    case(
        "adaptive_max_pool3d.default",
        lambda x: F.adaptive_max_pool3d(x, (1, 2, 2)),
        r(1, 1, 2, 3, 2),
    ),
    case(
        "fractional_max_pool2d.default",
        lambda x: aten.fractional_max_pool2d(x, [2, 2], [2, 2], SAMPLES[..., :2]),
        r(1, 1, 4, 4),
    ),
    case(
        "fractional_max_pool3d.default",
        lambda x: aten.fractional_max_pool3d(x, [1, 2, 2], [1, 2, 2], SAMPLES),
        r(1, 1, 2, 4, 4),
    ),
    case(
        "max_unpool2d.default",
        lambda x: F.max_unpool2d(x, i(0, 7, 10, 13).reshape(1, 1, 2, 2), 2),
        r(1, 1, 2, 2),
    ),
    case(
        "max_unpool3d.default",
        lambda x: F.max_unpool3d(x, i(0, 7).reshape(1, 1, 1, 1, 2), 2),
        r(1, 1, 1, 1, 2),
    ),
    # adding
    case(
        "cumsum.default",
        several(lambda x: x.cumsum(-1), lambda x: x.cumsum(0, dtype=torch.float64)),
        r(2, 4),
    ),
    *[
        case(
            f"upsample_nearest{d}d.vec",
            lambda x: F.interpolate(x, scale_factor=2),
            r(1, 2, *[2] * d),
        )
        for d in (1, 2, 3)
    ],
    *[
        case(
            f"_upsample_nearest_exact{d}d.vec",
            lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
            r(1, 1, *[3] * d),
        )
        for d in (1, 2, 3)
    ],
    *[
        case(
            name,
            lambda x, name=name: overload(name)(x, [3] * (x.dim() - 2)),
            r(1, 1, *[2] * d),
        )
        for d in (1, 2, 3)
        for name in (f"upsample_nearest{d}d.default", f"_upsample_nearest_exact{d}d.default")
    ],
]

SCALED = [
    case(
        "nll_loss_forward.default",
        several(
            lambda x: F.nll_loss(x, i(0, 2)),
            lambda x: F.nll_loss(x, i(1, 2), weight=torch.tensor([1.0, 2, 3]).double()),
            lambda x: F.nll_loss(x, i(1, 0), ignore_index=1, reduction="sum"),
            lambda x: F.nll_loss(x, i(1, 0), reduction="none"),
        ),
        r(2, 3),
    ),
    case(
        "nll_loss2d_forward.default",
        several(
            lambda x: F.nll_loss(x, i([0], [2]).reshape(1, 2, 1)),
            lambda x: F.nll_loss(
                x,
                i([1], [2]).reshape(1, 2, 1),
                ignore_index=1,
                weight=torch.tensor([1.0, 2, 3]).double(),
            ),
        ),
        r(1, 3, 2, 1),
    ),
    case(
        "avg_pool2d.default",
        several(
            lambda x: F.avg_pool2d(x, 2, stride=1, padding=1),
            lambda x: F.avg_pool2d(x, (2, 3), padding=1, count_include_pad=False, ceil_mode=True),
            lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            lambda x: F.avg_pool2d(x, 2, divisor_override=3),
            lambda x: F.avg_pool1d(x[0], 2, 1, 1, count_include_pad=False),
        ),
        r(1, 1, 3, 4),
    ),
    case(
        "avg_pool3d.default",
        several(
            lambda x: F.avg_pool3d(x, 2, stride=1, padding=1, count_include_pad=False),
            lambda x: F.avg_pool3d(x, (1, 2, 2), ceil_mode=True),
            lambda x: F.avg_pool3d(x, 2, divisor_override=5),
        ),
        r(1, 1, 2, 3, 2),
    ),
    case(
        "_adaptive_avg_pool2d.default",
        several(
            lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
            lambda x: F.adaptive_avg_pool2d(x[0], 2),
            lambda x: F.adaptive_avg_pool1d(x[0], 2),
        ),
        r(1, 2, 4, 3),
    ),
    case(
        "_adaptive_avg_pool3d.default",
        several(
            lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2)),
            lambda x: F.adaptive_avg_pool3d(x, 1),
        ),
        r(1, 2, 2, 3, 2),
    ),
    case(
        "upsample_linear1d.vec",
        several(
            lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
            lambda x: F.interpolate(x, size=5, mode="linear", align_corners=True),
            lambda x: F.interpolate(x, size=2, mode="linear"),
        ),
        r(1, 2, 3),
    ),
    case(
        "upsample_bilinear2d.vec",
        several(
            lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear"),
            lambda x: F.interpolate(x, size=(5, 2), mode="bilinear", align_corners=True),
        ),
        r(2, 1, 3, 2),
    ),
    case(
        "upsample_bicubic2d.vec",
        several(
            lambda x: F.interpolate(x, size=(5, 3), mode="bicubic"),
            lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
        ),
        r(1, 2, 3, 2),
    ),
    case(
        "upsample_trilinear3d.vec",
        several(
            lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
            lambda x: F.interpolate(x, size=(3, 1, 2), mode="trilinear", align_corners=True),
        ),
        r(1, 1, 2, 2, 1),
    ),
    case(
        "_upsample_bilinear2d_aa.vec",
        several(
            lambda x: F.interpolate(x, size=(2, 4), mode="bilinear", antialias=True),
            lambda x: F.interpolate(x, scale_factor=0.6, mode="bilinear", antialias=True),
        ),
        r(1, 1, 5, 4),
    ),
    case(
        "_upsample_bicubic2d_aa.vec",
        lambda x: F.interpolate(x, size=(2, 4), mode="bicubic", antialias=True),
        r(1, 1, 4, 3),
    ),
    case("upsample_linear1d.default", lambda x: aten.upsample_linear1d(x, [4], False), r(1, 1, 3)),
    case(
        "upsample_trilinear3d.default",
        lambda x: aten.upsample_trilinear3d(x, [3, 2, 1], False),
        r(1, 1, 2, 2, 2),
    ),
    case(
        "_upsample_bilinear2d_aa.default",
        lambda x: aten._upsample_bilinear2d_aa(x, [2, 2], False),
        r(1, 1, 4, 3),
    ),
    case(
        "_upsample_bicubic2d_aa.default",
        lambda x: aten._upsample_bicubic2d_aa(x, [2, 2], False),
        r(1, 1, 4, 3),
    ),
]

CONTRACTION = [
    case("mm.default", torch.mm, r(3, 2).t(), r(3, 4)),
    case("bmm.default", torch.bmm, r(2, 2, 3), r(2, 2, 3).mT),
    case(
        "bmm.default",
        lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y),
        r(1, 2, 2, 3),
        r(1, 2, 2, 3),
        note="einsum",
    ),
    case("bmm.default", torch.matmul, r(2, 1, 2, 3), r(2, 3, 2), note="matmul"),
    case("mv.default", torch.mv, r(2, 3), r(3)),
    case("linear.default", F.linear, r(2, 2, 3), r(4, 3), r(4)),
    case("linear.default", F.linear, r(3), r(4, 3), note="vector"),
    case("_trilinear.default", F.bilinear, r(2, 2), r(2, 3), r(2, 2, 3), r(2)),
    case(
        "convolution.default",
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1, dilation=2, groups=2),
        r(1, 4, 6),
        r(2, 2, 2),
        r(2),
        note="1d",
    ),
    case(
        "convolution.default",
        lambda x, w: F.conv2d(x, w, stride=(2, 1), padding="valid"),
        r(2, 2, 4, 3),
        r(2, 2, 2, 2),
        note="2d",
    ),
    case(
        "convolution.default",
        lambda x, w: F.conv2d(x, w, padding="same", dilation=(1, 2)),
        r(1, 1, 2, 3),
        r(2, 1, 3, 1),
        note="same",
    ),
    case(
        "convolution.default",
        lambda x, w, b: F.conv3d(x, w, b, padding=(1, 0, 1)),
        r(1, 1, 2, 2, 3),
        r(2, 1, 2, 2, 2),
        r(2),
        note="3d",
    ),
    case(
        "convolution.default",
        lambda x, w, b: F.conv_transpose2d(
            x, w, b, stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2)
        ),
        r(1, 4, 2, 3),
        r(4, 1, 2, 2),
        r(2),
        note="transposed",
    ),
    case("prod.default", lambda x: x.prod(), r(2, 3)),
    case("prod.dim_int", several(lambda x: x.prod(-1), lambda x: x.prod(0, keepdim=True)), r(2, 3)),
    case("cumprod.default", lambda x: x.cumprod(-1), r(2, 4)),
]

POSITIVE = [
    "acosh", "digamma", "lgamma", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sqrt",
]  # fmt: skip
UNARY = [
    "abs", "acos", "angle", "asin", "asinh", "atan", "atanh", "ceil", "celu", "clone",
    "cos", "cosh", "deg2rad", "elu", "erf", "erfc", "erfinv", "exp", "exp2",
    "expm1", "floor", "frac", "gelu", "hardtanh", "i0",
    "leaky_relu", "mish", "nan_to_num", "neg", "rad2deg", "relu",
    "relu6", "round", "selu", "sgn", "sigmoid", "sign", "silu", "sin", "sinc", "sinh", "softplus",
    "special_entr", "special_erfcx", "special_i0e", "special_i1", "special_i1e",
    "special_log_ndtr", "special_ndtri", "square", "tan", "tanh", "trunc",
]  # fmt: skip


def unary(name: str) -> Callable[..., Any]:
    for owner in (torch, F, aten):
        if hasattr(owner, name):
            return getattr(owner, name)
    raise AssertionError(name)


POINTWISE = [
    *[
        case(
            " ".join(f"{n}.default" for n in UNARY[k : k + 4]),
            several(*map(unary, UNARY[k : k + 4])),
            u(2, 3).t(),
        )
        for k in range(0, len(UNARY), 4)
    ],
    *[
        case(
            " ".join(f"{n}.default" for n in POSITIVE[k : k + 4]),
            several(*map(unary, POSITIVE[k : k + 4])),
            u(2, 3, low=1.2, high=2),
        )
        for k in range(0, len(POSITIVE), 4)
    ],
    case(
        "logit.default polygamma.default threshold.default",
        several(
            lambda x: x.logit(1e-3),
            lambda x: torch.polygamma(1, x),
            lambda x: F.threshold(x, 0.5, 2.0),
        ),
        u(2, 3),
    ),
    case(
        "celu.default elu.default leaky_relu.default gelu.default softplus.default",
        several(
            lambda x: F.celu(x, 0.7),
            lambda x: F.elu(x, 1.3),
            lambda x: F.leaky_relu(x, 0.2),
            lambda x: F.gelu(x, approximate="tanh"),
            lambda x: F.softplus(x, 2.0, 1.0),
            F.selu,
            F.silu,
            F.mish,
            F.gelu,
            F.hardswish,
            F.relu6,
            F.logsigmoid,
            F.softshrink,
            F.hardtanh,
            F.relu,
            F.hardshrink,
            torch.tanh,
            F.tanhshrink,
            F.softsign,
            lambda x: aten.log_sigmoid(x),
            torch.conj_physical,
            torch.positive,
        ),
        2 * r(2, 3),
        note="options",
    ),
    case(
        "clamp.default clamp_min.default clamp_max.default hardtanh.default",
        several(
            lambda x: x.clamp(-0.5, 0.6),
            lambda x: x.clamp(min=0.1),
            lambda x: x.clamp_max(0.2),
            lambda x: x.clamp_min(0),
            lambda x: F.hardtanh(x, -0.3, 0.4),
        ),
        r(2, 3),
    ),
    case(
        "clamp.Tensor",
        several(torch.clamp, lambda x, a, b: x.clamp(min=a), lambda x, a, b: x.clamp(max=b)),
        r(2, 3),
        r(3) - 0.5,
        r(2, 1) + 0.5,
    ),
    case(
        "add.Tensor sub.Tensor rsub.Scalar rsub.Tensor",
        several(
            lambda x, y: torch.add(x, y, alpha=2),
            lambda x, y: torch.sub(x, y, alpha=-0.5),
            lambda x, y: 2 - x,
            lambda x, y: torch.rsub(x, y, alpha=3),
            lambda x, y: x + x + 1,
            lambda x, y: aten.rsub.Tensor(x, y),
        ),
        r(2, 3),
        r(3),
    ),
    case(
        "mul.Tensor div.Tensor reciprocal.default",
        several(
            torch.mul,
            lambda x, y: x / (y + 4),
            lambda x, y: x * x,
            lambda x, y: 3 / (x + 5),
            lambda x, y: x * x.sigmoid() * y,
        ),
        r(2, 3),
        r(2, 1, 3).mT.mT,
    ),
    case(
        "div.Tensor_mode remainder.Tensor fmod.Tensor",
        several(
            lambda x, y: torch.div(x, y, rounding_mode="floor") + x,
            torch.fmod,
            lambda x, y: torch.remainder(x, y),
            lambda x, y: x % 0.7,
            lambda x, y: x.fmod(0.7),
        ),
        3 * r(2, 3),
        u(3),
    ),
    case(
        "pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor",
        several(
            lambda x, y: x**3,
            lambda x, y: 2**x,
            torch.pow,
            lambda x, y: x**-0.5,
            lambda x, y: x**0,
        ),
        u(2, 3),
        r(3),
    ),
    case(
        "float_power.Tensor_Scalar float_power.Tensor_Tensor float_power.Scalar",
        several(
            lambda x, y: x.float_power(2.5),
            torch.float_power,
            lambda x, y: torch.float_power(2, x),
        ),
        u(2, 3),
        r(3),
    ),
    case(
        "xlogy.Tensor xlogy.Scalar_Self xlogy.Scalar_Other",
        several(torch.xlogy, lambda x, y: torch.xlogy(2, x), lambda x, y: torch.xlogy(x, 2)),
        u(2, 3),
        u(3),
    ),
    case(
        "special_xlog1py.default special_xlog1py.self_scalar special_xlog1py.other_scalar",
        several(
            torch.special.xlog1py,
            lambda x, y: torch.special.xlog1py(2, x),
            lambda x, y: torch.special.xlog1py(x, 2),
        ),
        u(2, 3),
        u(3),
    ),
    case(
        "maximum.default minimum.default fmax.default fmin.default max.other min.other",
        several(
            torch.maximum,
            torch.minimum,
            torch.fmax,
            torch.fmin,
            torch.max,
            torch.min,
            lambda x, y: torch.maximum(x, x * 2),
        ),
        r(2, 3),
        r(3),
    ),
    case(
        "atan2.default hypot.default logaddexp.default logaddexp2.default copysign.Tensor",
        several(
            torch.atan2,
            torch.hypot,
            torch.logaddexp,
            torch.logaddexp2,
            torch.copysign,
            lambda x, y: x.copysign(-1),
        ),
        r(2, 3),
        r(3),
    ),
    case("ldexp.Tensor", torch.ldexp, r(2, 3), r(3)),
    case("special_zeta.self_scalar", lambda x: torch.special.zeta(2.5, x), u(2, 3)),
    case(
        "igamma.default igammac.default",
        several(
            lambda x: torch.igamma(torch.full_like(x, 1.5), x),
            lambda x: torch.igammac(torch.full_like(x, 1.5), x),
        ),
        u(2, 3),
    ),
    case(
        "addcmul.default addcdiv.default",
        several(
            lambda x, y, z: torch.addcmul(x, y, z, value=2),
            lambda x, y, z: torch.addcdiv(x, y, z, value=-2),
            lambda x, y, z: torch.addcmul(x, y, y),
        ),
        r(2, 3),
        r(3),
        u(2, 1),
    ),
    case("lerp.Tensor", torch.lerp, r(2, 3), r(3), r(2, 1)),
    case("lerp.Scalar", lambda x, y: torch.lerp(x, y, 0.3), r(2, 3), r(3)),
    case(
        "where.self where.Scalar where.ScalarOther where.ScalarSelf",
        several(
            lambda x, y: torch.where(x > 0, x, y),
            lambda x, y: torch.where(y > 0, 2.0, x * x),
            lambda x, y: torch.where(x > y, x, 0.0),
            lambda x, y: torch.where(x > 0, x, x),
            lambda x, y: torch.where(x > 0, 1.0, 2.0) * x,
        ),
        r(2, 3),
        r(3),
    ),
    case(
        "masked_fill.Scalar masked_fill.Tensor",
        several(
            lambda x, v: x.masked_fill(torch.eye(3) > 0, 2.0),
            lambda x, v: x.masked_fill(torch.eye(3) > 0, v),
        ),
        r(3, 3),
        r(),
    ),
    case(
        "tanh_backward.default sigmoid_backward.default threshold_backward.default",
        several(
            aten.tanh_backward,
            aten.sigmoid_backward,
            lambda g, x: aten.threshold_backward(g, x, 0.3),
        ),
        r(2, 3),
        u(2, 3),
    ),
    case(
        "",
        lambda x: [x * x.sigmoid(), x.exp() / (1 + x.exp()), x**2 * x],
        r(2, 3).t(),
        note="by hand",
    ),
    case("", lambda x, y: [x.t() * y, (x * y.t()).t()], r(3, 3), r(3, 3), note="transposed"),
]

ROW = [
    case(
        "softmax.int",
        several(lambda x: x.softmax(-1), lambda x: x.softmax(0), lambda x: F.softmin(x, 1)),
        r(3, 2).t(),
    ),
    case(
        "_softmax.default _log_softmax.default",
        several(lambda x: aten._softmax(x, 1, False), lambda x: aten._log_softmax(x, -1, False)),
        r(2, 3),
    ),
    case("log_softmax.int", lambda x: x.log_softmax(-1), r(2, 3)),
    case(
        "logsumexp.default",
        several(
            lambda x: x.logsumexp(-1, keepdim=True),
            lambda x: x.logsumexp((0, 2)),
        ),
        r(2, 3, 2),
    ),
    case(
        "var.correction std.correction",
        several(
            lambda x: x.var(-1),
            lambda x: x.var((0, -1), correction=0, keepdim=True),
            lambda x: x.std(0, correction=2),
            lambda x: x.std(),
        ),
        r(3, 2, 4),
    ),
    case(
        "var_mean.correction std_mean.correction",
        several(
            lambda x: torch.var_mean(x, -1, keepdim=True),
            lambda x: torch.std_mean(x, (0, 1)),
            lambda x: torch.var_mean(x),
        ),
        r(2, 3),
    ),
    case(
        "linalg_vector_norm.default",
        several(
            *(lambda x, p=p: torch.linalg.vector_norm(x, p, -1) for p in (0, 1, 2, 2.5)),
            lambda x: torch.linalg.vector_norm(x, float("inf"), (0, 1), keepdim=True),
            lambda x: torch.linalg.vector_norm(x, -float("inf")),
            lambda x: x.norm(),
            lambda x: F.normalize(x, dim=0),
        ),
        r(3, 2).t(),
    ),
    case(
        "norm.Scalar norm.ScalarOpt_dim",
        several(
            lambda x: aten.norm.Scalar(x, 3),
            lambda x: aten.norm.ScalarOpt_dim(x, None, [-1], True),
        ),
        r(2, 3),
    ),
    case(
        "layer_norm.default",
        lambda x, w, b: F.layer_norm(x, (2, 3), w, b),
        r(2, 2, 3),
        r(2, 3),
        r(2, 3),
    ),
    case("layer_norm.default", lambda x: F.layer_norm(x, (3,), eps=0.1), r(3, 2).t(), note="plain"),
    case(
        "native_layer_norm.default",
        lambda x, w, b: aten.native_layer_norm(x, [3], w, b, 1e-3)[0],
        r(2, 3),
        r(3),
        r(3),
    ),
    case("rms_norm.default", lambda x, w: F.rms_norm(x, (3,), w, 1e-3), r(2, 3), r(3)),
    case(
        "_fused_rms_norm.default",
        lambda x, w: aten._fused_rms_norm(x, [3], w, 1e-3)[0],
        r(2, 3),
        r(3),
    ),
    case("group_norm.default", lambda x, w, b: F.group_norm(x, 2, w, b), r(2, 4, 2), r(4), r(4)),
    case(
        "native_group_norm.default",
        lambda x, w, b: aten.native_group_norm(x, w, b, 2, 4, 2, 2, 1e-3)[0],
        r(2, 4, 2),
        r(4),
        r(4),
    ),
    case("", lambda x, w: F.instance_norm(x, weight=w), r(2, 2, 3), r(2), note="instance_norm"),
    case(
        "_native_batch_norm_legit_functional.default",
        lambda x, w, b: F.batch_norm(
            x, torch.zeros(2).double(), torch.ones(2).double(), w, b, True
        ),
        r(3, 2, 2),
        r(2),
        r(2),
        note="batch_norm",
    ),
    case(
        "_native_batch_norm_legit_no_training.default",
        lambda x, w, b: F.batch_norm(x, torch.zeros(2).double(), 2 * torch.ones(2).double(), w, b),
        r(3, 2),
        r(2),
        r(2),
        note="batch_norm",
    ),
    case(
        "_native_batch_norm_legit.no_stats",
        lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-3)[0],
        r(3, 2),
        r(2),
        r(2),
    ),
    case(
        "_native_batch_norm_legit_no_training.default",
        lambda x, w, b: aten._native_batch_norm_legit_no_training(
            x, w, b, torch.zeros(2).double(), torch.ones(2).double(), 0.1, 1e-3
        )[0],
        r(3, 2),
        r(2),
        r(2),
    ),
    case(
        "_batch_norm_with_update_functional.default",
        lambda x, w, b: aten._batch_norm_with_update_functional(
            x, w, b, torch.zeros(2).double(), torch.ones(2).double(), 0.1, 1e-3
        )[0],
        r(3, 2),
        r(2),
        r(2),
        twin=lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-3),
    ),
    case(
        "_native_batch_norm_legit_functional.default",
        lambda x, w, b: aten._native_batch_norm_legit_functional(
            x, w, b, torch.zeros(2).double(), torch.ones(2).double(), True, 0.1, 1e-3
        )[0],
        r(3, 2),
        r(2),
        r(2),
    ),
    case(
        "native_dropout.default",
        several(
            lambda x: F.dropout(x, 0.0),
            lambda x: aten.native_dropout(x, 0.5, False)[0],
            lambda x: aten.native_dropout(x, 1.0, True)[0],
        ),
        r(2, 3),
    ),
    case(
        "rrelu_with_noise_functional.default",
        lambda x: aten.rrelu_with_noise_functional(x, torch.ones_like(x), 0.25, 0.25, True)[0],
        r(2, 3),
        twin=lambda x: F.leaky_relu(x, 0.25),
    ),
    case(
        "rrelu.default",
        several(lambda x: F.rrelu(x), lambda x: F.rrelu(x, 0.25, 0.25, training=True)),
        r(2, 3),
    ),
    case(
        "sum.default sum.dim_IntList mean.default mean.dim",
        several(
            lambda x: x.sum(),
            lambda x: x.sum((0, -1)),
            lambda x: x.sum(1, keepdim=True),
            lambda x: x.mean(),
            lambda x: x.mean(-1),
            lambda x: x.mean((0, 1), keepdim=True),
            lambda x: x.sum(-1, dtype=torch.float64),
        ),
        r(3, 2, 2).mT,
    ),
    case(
        "amax.default amin.default max.default min.default",
        several(
            lambda x: x.amax(-1, keepdim=True),
            lambda x: x.amax((0, 1)),
            lambda x: x.amin(0),
            lambda x: x.max(),
            lambda x: x.min(),
            lambda x: x.aminmax(dim=0),
        ),
        r(2, 3),
    ),
    case(
        "dot.default vdot.default",
        several(torch.dot, torch.vdot, lambda x, y: torch.dot(x, x)),
        r(3),
        r(3),
    ),
    case(
        "hardsigmoid.default",
        F.hardsigmoid,
        3 * r(2, 3),
        # PyTorch's kernel rounds 1/6 to float32.
        twin=lambda x: (x / 6 + 0.5).clamp(0, 1),
        tolerance=1e-7,
    ),
    case("", lambda x, y: F.cosine_similarity(x, y, -1), r(2, 3), r(2, 3), note="cosine"),
    case("", lambda x, y: F.pairwise_distance(x, y), r(2, 3), r(2, 3), note="distance"),
]

VIEWS = [
    case(
        "view.default permute.default transpose.int",
        several(
            lambda x: x.view(4, 3),
            lambda x: x.view(-1),
            lambda x: x.permute(-1, 0, 1),
            lambda x: x.transpose(-1, 0),
            lambda x: x.mT,
            lambda x: x.reshape(3, -1),
        ),
        r(2, 2, 3),
    ),
    case(
        "t.default unsqueeze.default squeeze.dim squeeze.dims squeeze.default expand.default",
        several(
            lambda x: x.t(),
            lambda x: x.unsqueeze(-1),
            lambda x: x.squeeze(-1),
            lambda x: x.unsqueeze(0).squeeze((0, -1)),
            lambda x: x.squeeze(),
            lambda x: x.expand(2, -1, 4),
            lambda x: x.expand_as(torch.ones(3, 2)),
        ),
        r(3, 1),
    ),
    case(
        "",
        several(
            lambda x: x.t().reshape(-1),
            lambda x: x.flatten(),
            lambda x: x.unflatten(1, (1, -1)),
            lambda x: x.movedim(0, 1),
            lambda x: x.movedim((0, 1), (1, 0)),
            lambda x: x.view_as(x),
        ),
        r(3, 2).t(),
        note="other views",
    ),
    case("_reshape_alias.default", lambda x: aten._reshape_alias(x, [3, 2], [2, 1]), r(2, 3)),
    case("_unsafe_view.default", lambda x: aten._unsafe_view(x, [3, 2]), r(2, 3)),
    case(
        "clone.default _to_copy.default alias.default",
        several(
            lambda x: x.clone(memory_format=torch.contiguous_format),
            lambda x: x.to(torch.float64),
            lambda x: aten._to_copy(x, dtype=torch.float64),
            lambda x: x.contiguous(),
            lambda x: aten.alias(x),
            lambda x: x.type_as(x),
            lambda x: x.double(),
        ),
        r(3, 2).t(),
    ),
]


QUERY, KEY = r(1, 2, 3, 2), r(1, 2, 3, 2)

AT_CAPTURE = [
    # The last contraction only: what lies before it is exact for no recursion.
    case(
        "scaled_dot_product_attention.default",
        lambda v: F.scaled_dot_product_attention(QUERY, KEY, v, is_causal=True),
        r(1, 2, 3, 2),
        twin=lambda v: (QUERY @ KEY.mT / 2**0.5 - 1e9 * torch.ones(3, 3).triu(1)).softmax(-1) @ v,
    ),
    case(
        "addmm.default",
        lambda a, b, c: torch.addmm(a, b, c, beta=2, alpha=-1),
        r(3),
        r(2, 2),
        r(2, 3),
    ),
    case("addmv.default", lambda a, b, c: torch.addmv(a, b, c, beta=2), r(2), r(2, 3), r(3)),
    case(
        "addbmm.default",
        lambda a, b, c: torch.addbmm(a, b, c, alpha=2),
        r(2, 2),
        r(2, 2, 3),
        r(2, 3, 2),
    ),
    case("baddbmm.default", torch.baddbmm, r(2, 2, 2), r(2, 2, 3), r(2, 3, 2)),
    case("addr.default", lambda a, b, c: torch.addr(a, b, c, beta=0.5), r(2, 3), r(2), r(3)),
    *[
        case(
            "embedding_bag.padding_idx",
            lambda w, mode=mode: F.embedding_bag(
                i(0, 2, 1, 2), w, i(0, 3), mode=mode, padding_idx=1
            ),
            r(3, 2),
            note=mode,
            twin=twin,
        )
        for mode, twin in [
            ("sum", lambda w: torch.stack([w[0] + w[2], w[2]])),
            ("mean", lambda w: torch.stack([(w[0] + w[2]) / 2, w[2]])),
            ("max", lambda w: torch.stack([torch.maximum(w[0], w[2]), w[2]])),
        ]
    ],
    case(
        "embedding_bag.padding_idx",
        lambda w, p: F.embedding_bag(i(0, 2, 1, 2), w, i(0, 3), mode="sum", per_sample_weights=p),
        r(3, 2),
        r(4),
        note="weighted",
        twin=lambda w, p: torch.stack([p[0] * w[0] + p[1] * w[2] + p[2] * w[1], p[3] * w[2]]),
    ),
    case(
        "multilabel_margin_loss.default",
        lambda x: F.multilabel_margin_loss(x, i([0, 2, -1], [1, -1, 0]), reduction="sum"),
        r(2, 3),
        twin=lambda x: (
            (
                (1 - x[0, 0] + x[0, 1]).relu()
                + (1 - x[0, 2] + x[0, 1]).relu()
                + (1 - x[1, 1] + x[1, 0]).relu()
                + (1 - x[1, 1] + x[1, 2]).relu()
            )
            / 3
        ),
    ),
    case(
        "",
        lambda x: F.multi_margin_loss(
            x,
            i(1, 2),
            p=2,
            margin=0.7,
            weight=torch.tensor([1.0, 2, 3]).double(),
            reduction="none",
        ),
        r(2, 3),
        note="multi_margin_loss",
        twin=lambda x: torch.stack(
            [
                sum(w * (0.7 - x[n, k] + x[n, j]).relu() ** 2 for j in range(3) if j != k) / 3
                for n, k, w in [(0, 1, 2), (1, 2, 3)]
            ]
        ),
    ),
    case(
        "copy.default",
        lambda x, y: aten.copy(x, y * 2),
        r(2, 3),
        r(3),
        twin=lambda x, y: 0 * x + 2 * y,
    ),
    case("_safe_softmax.default", lambda x: aten._safe_softmax(x, 0), r(2, 3)),
]


# --- recurrent layers ---------------------------------------------------------------------------


def recurrent(name: str, gates: int, packed: bool = False) -> Case:
    """One step of one layer of width 2: exact for its weights, as each reaches one gate."""
    state = r(1, 3, 2)
    states = (state, 2 * state) if name == "lstm" else state

    def run(*params: torch.Tensor) -> Any:
        op = getattr(torch, name)
        if packed:
            return op(X[0], i(3), states, params, True, 1, 0.0, True, False)
        return op(X, states, params, True, 1, 0.0, True, False, False)

    params = [r(2 * gates, 2), r(2 * gates, 2), r(2 * gates), r(2 * gates)]
    return case(f"{name}.{'data' if packed else 'input'}", run, *params)


X = r(1, 3, 2)
RECURRENT = [
    recurrent(name, gates, packed)
    for name, gates in [("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)]
    for packed in (False, True)
]

# --- tests --------------------------------------------------------------------------------------

CASES = [*SELECTION, *SCALED, *CONTRACTION, *POINTWISE, *ROW, *VIEWS, *AT_CAPTURE, *RECURRENT]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The operators in the graphs captured during a test, and those replaced at capture."""
    seen: set[Any] = set()
    capture, replaced = api.capture, structures.definitions_for_capture

    def recording_capture(*args: Any, **kwargs: Any) -> Any:
        for result in capture(*args, **kwargs):
            seen.update(n.target for n in result.graph.nodes)
            yield result

    def recording(op: Any, definition: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.add(op)
            return definition(*args, **kwargs)

        return run

    monkeypatch.setattr(api, "capture", recording_capture)
    monkeypatch.setattr(
        structures,
        "definitions_for_capture",
        lambda: {op: recording(op, f) for op, f in replaced().items()},
    )
    return seen


def head(outputs: Any, weights: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """``<w, y - y0> + 1/2 <d, (y - y0)^2>``: gradient w and diagonal Hessian d at y0."""
    total = torch.zeros((), dtype=torch.float64)
    for y, (y0, w, d) in zip(pytree.tree_leaves(outputs), weights, strict=True):
        total = total + (w * (y - y0) + d * (y - y0) ** 2 / 2).sum()
    return total


def against_functorch(
    function: Callable[..., Any],
    args: tuple,
    twin: Callable[..., Any] | None = None,
    tolerance: float = 1e-9,
) -> None:
    """The oracle without `hesscale_fx.check`: torch.func on the function or its twin."""
    twin = twin or function
    weights = [(y.detach(), r(*y.shape), r(*y.shape)) for y in pytree.tree_leaves(function(*args))]
    for k, x in enumerate(args):

        def loss(f: Callable[..., Any], v: torch.Tensor, k: int = k) -> torch.Tensor:
            return head(f(*args[:k], v, *args[k + 1 :]), weights)

        grad = torch.func.grad(partial(loss, twin))
        hessian = torch.func.jacrev(grad)
        hs = hesscale_fx.transform(
            lambda v, loss=loss: loss(function, v), None, (x,), wrt="inputs", dynamic=False
        )
        out = hs(x)
        diagonal = hessian(x).reshape(x.numel(), x.numel()).diagonal().reshape(x.shape)
        for got, want in [(*out.grads.values(), grad(x)), (*out.hess_diag.values(), diagonal)]:
            scale = max(want.abs().max().item(), 1e-3)
            assert (got - want).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_exact_hessian_diagonal(case: Case, captured: set[Any]) -> None:
    if case.twin is None:
        hesscale_fx.check(case.function, *case.args, tolerance=case.tolerance)
    else:
        against_functorch(case.function, case.args, case.twin, case.tolerance)
    assert case.overloads <= captured, "not in the captured graph"


# Checked by test_opdb.py against their own samples.
BY_DATABASE = {
    aten.dist.default, aten._cdist_forward.default, aten.polar.default, aten.frexp.Tensor,
    aten.as_strided_scatter.default, aten.max_pool2d_with_indices_backward.default,
}  # fmt: skip


def test_every_entry_has_a_case() -> None:
    entries = {
        *table.TABLE,
        *definitions.DEFINITIONS,
        *definitions.AT_CAPTURE,
        *table.VIEWS,
        *table.IDENTITIES,
        *table.REDUCTIONS,
        *table.POINTWISE,
    }
    # Columns know nothing of their operator; test_opdb.py runs them. Copies are their views.
    columns = {op for op, found in table.TABLE.items() if isinstance(found, (Columns, Transform))}
    copies = {op for op in definitions.AT_CAPTURE if op._schema.name.endswith("_copy")}
    elsewhere = columns | copies | BY_DATABASE
    entries = {op for op in entries - elsewhere if op.namespace == "aten"}  # no test's or user's
    covered = set().union(*(case.overloads for case in CASES))
    assert not sorted(map(str, entries - covered)), "entries of the table without a case"


def test_every_case_names_operators_that_exist() -> None:
    names = {name for case in CASES for name in case.ops.split()}
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if version == (2, 13):
        assert not [name for name in names if overload(name) is None]


def test_the_table_takes_functions_of_tensors_only() -> None:
    for op in [*table.TABLE, *table.VIEWS, *table.IDENTITIES, *table.POINTWISE]:
        assert not op._schema.is_mutable
        assert any("Tensor" in str(a.type) for a in op._schema.arguments)


INDEPENDENT = [
    case("mm", torch.mm, r(2, 3), r(3, 2)),
    case("linear", F.linear, r(2, 3), r(2, 3), r(2)),
    case("conv2d", F.conv2d, r(1, 2, 3, 3), r(2, 2, 2, 2), r(2)),
    case("conv_transpose1d", F.conv_transpose1d, r(1, 2, 3), r(2, 2, 2), r(2)),
    case("avg_pool2d", lambda x: F.avg_pool2d(x, 2, 1, 1, count_include_pad=False), r(1, 1, 3, 3)),
    case("interpolate", lambda x: F.interpolate(x, size=3, mode="bilinear"), r(1, 1, 2, 2)),
    case("embedding", lambda w: F.embedding(i(0, 2, 2), w), r(3, 2)),
    case("gather", lambda x: x.gather(1, i([0, 0], [2, 1])), r(2, 3)),
    case("sort", lambda x: x.sort(-1)[0], r(2, 3)),
    case("prod", lambda x: x.prod(-1), r(2, 3)),
    case("gelu", F.gelu, r(2, 3)),
    case("swish", lambda x: x * x.sigmoid(), r(2, 3)),
    case("div", torch.div, r(2, 3), 2 + u(3)),
    case("log_softmax", lambda x: x.log_softmax(-1), r(2, 3)),
    case("layer_norm", lambda x, w: F.layer_norm(x, (3,), w), r(2, 3), r(3)),
]


@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_against_functorch(case: Case) -> None:
    against_functorch(case.function, case.args)


# --- kinks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (torch.relu, [-1.0, 0.0, 2.0]),
        (torch.abs, [-1.0, 0.0, 2.0]),
        (lambda x: x.clamp(-1, 2), [-1.0, 0.0, 2.0]),
        (lambda x: torch.maximum(x, -x), [-1.0, 0.0, 2.0]),
        (lambda x: x.max(), [2.0, 1.0, 2.0]),
        (lambda x: x.amin(0), [1.0, 1.0, 2.0]),
        (lambda x: x.median(), [1.0, 1.0, 2.0]),
        (lambda x: x.sort()[0], [1.0, 1.0, 0.0]),
        (lambda x: F.max_pool1d(x[None], 2, 1), [1.0, 1.0, 0.0]),
        (F.hardtanh, [-1.0, 0.5, 1.0]),
        (lambda x: F.leaky_relu(x, 0.2), [-1.0, 0.0, 1.0]),
        (F.softshrink, [-0.5, 0.5, 1.0]),
    ],
)
def test_at_a_kink_the_second_derivative_is_zero(function: Any, x: list[float]) -> None:
    """The first is autograd's J; so what is left of the recursion is (J o J)^T d."""
    point = torch.tensor(x, dtype=torch.float64)
    weights = [(y.detach(), r(*y.shape), r(*y.shape)) for y in [function(point)]]
    jacobian = torch.func.jacrev(function)(point).reshape(-1, 3)
    hs = hesscale_fx.transform(
        lambda v: head(function(v), weights), None, (point,), wrt="inputs", dynamic=False
    )
    out = hs(point)
    (grad,), (diagonal,) = out.grads.values(), out.hess_diag.values()
    torch.testing.assert_close(grad, jacobian.T @ weights[0][1].reshape(-1))
    torch.testing.assert_close(diagonal, (jacobian**2).T @ weights[0][2].reshape(-1))


# --- structures of users' own operators ---------------------------------------------------------


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes custom operators; forgets what was registered for them."""
    with torch.library._scoped_library("tests", "FRAGMENT"):
        made: list[Any] = []

        def make(function: Callable[..., Any], backward: Callable[..., Any]) -> Any:
            name = f"tests_{request.node.name.split('[')[0]}::op{len(NAMES)}"
            NAMES.append(name)

            def impl(x: torch.Tensor) -> torch.Tensor:
                return function(x).clone()

            op = torch.library.custom_op(name, impl, mutates_args=())
            op.register_fake(lambda x: torch.empty_like(function(x)))
            op.register_autograd(
                lambda ctx, g: backward(g, *ctx.saved_tensors),
                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
            )
            made.append(op._opoverload)
            return op

        yield make
        for op in made:
            table.TABLE.pop(op, None)
            table.POINTWISE.discard(op)
            definitions.DEFINITIONS.pop(op, None)


NAMES: list[str] = []


def cube(own: Callable[..., Any]) -> Any:
    return own(lambda x: x**3, lambda g, x: 3 * g * x**2)


def doubled(own: Callable[..., Any]) -> Any:
    return own(lambda x: 2 * x, lambda g, x: 2 * g)


def flipped(own: Callable[..., Any]) -> Any:
    return own(lambda x: x.flip(0), lambda g, x: g.flip(0))


CUBE_RULE = {
    "squared_vjp": lambda s, x: s * (3 * x**2) ** 2,
    "curvature": lambda g, x: 6 * x * g,
}


@pytest.mark.parametrize(
    ("make", "structure"),
    [
        (cube, "pointwise"),
        (cube, lambda x: x**3),
        (cube, hesscale_fx.Rule(**CUBE_RULE)),
        (cube, (lambda g, x: 3 * g * x**2, *CUBE_RULE.values())),
        (doubled, "scaled selection"),
        (doubled, "pointwise"),
        (flipped, "selection"),
        (flipped, "contraction"),
    ],
)
def test_a_registered_structure_is_right(own: Any, make: Any, structure: Any) -> None:
    op = make(own)
    with pytest.raises(hesscale_fx.HesScaleError, match="register"):
        hesscale_fx.check(op, r(3))
    hesscale_fx.register(op, structure)
    assert hesscale_fx.check(op, r(3)).ok
    against_functorch(
        lambda x: op(x).sin(),
        (r(3),),
        {
            cube: lambda x: (x**3).sin(),
            doubled: lambda x: (2 * x).sin(),
            flipped: lambda x: x.flip(0).sin(),
        }[make],
    )


@pytest.mark.parametrize(
    ("make", "structure"),
    [
        (doubled, "selection"),
        (cube, "scaled selection"),
        (cube, lambda x: x**2 * 3),
        (cube, hesscale_fx.Rule(CUBE_RULE["squared_vjp"], lambda g, x: None)),
        (cube, (lambda g, x: g, *CUBE_RULE.values())),
    ],
)
def test_check_refuses_a_wrong_structure(own: Any, make: Any, structure: Any) -> None:
    op = make(own)
    hesscale_fx.register(op, structure)
    with pytest.raises(CheckError, match="argument 0"):
        hesscale_fx.check(op, r(3))


def test_register_again_replaces(own: Any) -> None:
    op = doubled(own)
    hesscale_fx.register(op, "selection")
    hesscale_fx.register(op, "scaled selection")
    assert hesscale_fx.check(op, r(3)).ok


def test_register_takes_packets_and_overloads(own: Any) -> None:
    op = doubled(own)._opoverload
    hesscale_fx.register(op.overloadpacket, "scaled selection")
    assert table.TABLE[op].name == "scaled selection"
    hesscale_fx.register(op, "pointwise")
    assert op in table.POINTWISE and op not in table.TABLE


def test_register_names_what_it_does_not_know(own: Any) -> None:
    op = doubled(own)
    with pytest.raises(hesscale_fx.HesScaleError, match="'selecton'; choose one of 'pointwise'"):
        hesscale_fx.register(op, "selecton")
    with pytest.raises(hesscale_fx.HesScaleError, match="no structure"):
        hesscale_fx.register(op, 3)
    with pytest.raises(hesscale_fx.HesScaleError, match="torch.library.custom_op"):
        hesscale_fx.register(lambda x: x, "pointwise")


def test_a_rule_returns_one_result_for_each_tensor(own: Any) -> None:
    op = doubled(own)
    hesscale_fx.register(op, hesscale_fx.Rule(lambda s, x: (s, s), lambda g, x: None))
    with pytest.raises(hesscale_fx.HesScaleError, match=r"2 value\(s\) for 1 tensor"):
        hesscale_fx.check(op, r(3))


def test_check_needs_a_floating_point_tensor() -> None:
    with pytest.raises(hesscale_fx.HesScaleError, match="floating-point"):
        hesscale_fx.check(torch.abs, i(1, 2))


def test_an_argument_that_does_not_matter_passes_zero() -> None:
    assert hesscale_fx.check(lambda x, y: x * 2, r(2), r(2)).ok
