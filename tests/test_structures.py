"""Every entry of the table of structures against the exact Hessian diagonal.

`hesscale_fx.check` compares, for each floating-point argument alone, gradient and curvature with
double backward at random g and s. Each case names the overloads it is there for and is held to
meeting them in the captured graph; `test_every_entry_has_a_case` compares those with the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hesscale_fx
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hesscale_fx import api, structures
from hesscale_fx.check import CheckError
from hesscale_fx.structures import definitions, table

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

    @property
    def overloads(self) -> set[Any]:
        return {overload(name) for name in self.ops.split()} - {None}

    def __str__(self) -> str:
        return "-".join(filter(None, [self.ops.replace(" ", "+"), self.note]))


def case(ops: str, function: Callable[..., Any], *args: Any, note: str = "") -> Case:
    return Case(ops, function, args, note)


def several(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """One function that returns what each returns."""
    return lambda *args: [f(*args) for f in functions]


SELECTION = [
    # indexing
    case("slice.Tensor", several(lambda x: x[1:, ::2], lambda x: x[:, -3:-1]), r(3, 5)),
    case("select.int", several(lambda x: x[1], lambda x: x.select(-1, -2)), r(3, 4).t()),
    case("index.Tensor", several(
        lambda x: x[i(0, 2, 2)],
        lambda x: x[:, i([0, 1], [3, 3])],
        lambda x: x[i(0, 1), i(2, -1)],
        lambda x: x[torch.tensor([True, False, True]).nonzero_static(size=2).squeeze(1)],
    ), r(3, 4)),
    case("index_select.default", lambda x: x.index_select(-1, i(3, 0, 0)), r(2, 4)),
    case("gather.default", several(
        lambda x: x.gather(1, i([0, 0, 1], [3, 2, 2])),
        lambda x: x.gather(-2, i([1, 0, 1, 1])),
    ), r(4, 2).t()),
    case("take.default", lambda x: x.take(i([0, 5], [-1, 5])), r(2, 3)),
    case("take_along_dim.default", several(
        lambda x: x.take_along_dim(i([0, 0], [1, 0]), 1),
        lambda x: x.take_along_dim(i(3, 1, 1)),
    ), r(2, 3)),
    case("narrow.default", lambda x: x.narrow(-1, 1, 2), r(2, 4)),
    case("narrow.Tensor", lambda x: aten.narrow.Tensor(x, 1, torch.tensor(1), 2), r(2, 4)),
    case("slice_scatter.default", lambda x, y: x.slice_scatter(y, -1, 1, 4, 2), r(2, 4), r(2, 2)),
    case("select_scatter.default", lambda x, y: x.select_scatter(y, -1, 2), r(2, 4), r(2)),
    case("diagonal.default", several(
        lambda x: x.diagonal(), lambda x: x.diagonal(1, -1, 0)
    ), r(2, 3, 3)),
    case("diagonal_scatter.default", lambda x, y: x.diagonal_scatter(y, 1), r(3, 3), r(2)),
    case("diag_embed.default", lambda x: x.diag_embed(1, 0, -1), r(2, 3)),
    case("triu.default", lambda x: x.triu(-1), r(3, 4)),
    case("tril.default", lambda x: x.tril(1), r(2, 3, 4)),
    case("unfold.default", lambda x: x.unfold(-1, 3, 2), r(2, 7)),
    case("as_strided.default", lambda x: x.as_strided((3, 2), (2, 1), 1), r(3, 4)),
    case("masked_select.default", lambda x: x.masked_select(
        torch.tensor([True, False, True])), r(2, 3)),
    case("masked_scatter.default", lambda x, y: x.masked_scatter(
        torch.tensor([True, False, True]), y), r(2, 3), r(5)),
    case("scatter.src", lambda x, y: x.scatter(-1, i([0, 2], [1, 0]), y), r(2, 3), r(2, 2)),
    case("scatter.value", lambda x: x.scatter(0, i([0, 1, 0]), 2.0), r(2, 3)),
    case("scatter.value_reduce", lambda x: x.scatter(
        0, i([0, 1, 0]), 2.0, reduce="add"), r(2, 3)),
    case("scatter.reduce", lambda x: x.scatter(
        0, i([0, 1, 0]), torch.ones(1, 3).double(), reduce="add"), r(2, 3)),
    case("scatter_add.default", lambda x, y: x.scatter_add(
        1, i([0, 0], [1, 0]), y), r(2, 3), r(2, 2)),
    *[
        case("scatter_reduce.two", lambda x, y, how=how, own=own: x.scatter_reduce(
            0, i([0, 0, 1], [0, 1, 1]), y, how, include_self=own), r(2, 3), r(2, 3),
            note=f"{how}-{own}")
        for how, own in [("sum", True), ("mean", True), ("amax", True), ("amin", False)]
    ],
    case("index_put.default", several(
        lambda x, y: x.index_put((i(0, 2),), y),
        lambda x, y: x.index_put((i(1, 1), i(0, 0)), y[:, 0], accumulate=True),
    ), r(3, 2), r(2, 2)),
    case("_unsafe_index.Tensor", lambda x: aten._unsafe_index(x, [None, i(0, 2, 2)]), r(2, 3)),
    case("_unsafe_index_put.default", lambda x, y: aten._unsafe_index_put(
        x, [i(0, 0)], y, True), r(2, 3), r(2, 3)),
    case("index.Tensor_hacked_twin", lambda x: aten.index.Tensor_hacked_twin(x, [i(0, 0)]), r(2, 3)),
    case("_unsafe_index.Tensor_hacked_twin", lambda x: aten._unsafe_index.Tensor_hacked_twin(
        x, [i(0, 0)]), r(2, 3)),
    case("index_put.hacked_twin", lambda x, y: aten.index_put.hacked_twin(
        x, [i(0, 1)], y), r(2, 3), r(2, 3)),
    case("_unsafe_index_put.hacked_twin", lambda x, y: aten._unsafe_index_put.hacked_twin(
        x, [i(0, 1)], y), r(2, 3), r(2, 3)),
    case("index_copy.default", lambda x, y: x.index_copy(-1, i(2, 0), y), r(2, 3), r(2, 2)),
    case("index_fill.int_Scalar", lambda x: x.index_fill(-1, i(2, 0), 1.5), r(2, 3)),
    case("index_fill.int_Tensor", lambda x, v: x.index_fill(-1, i(2, 0), v), r(2, 3), r()),
    case("put.default", several(
        lambda x, y: x.put(i(0, 3), y), lambda x, y: x.put(i(1, 1), y, accumulate=True)
    ), r(2, 3), r(2)),
    case("trace.default", lambda x: x.trace(), r(3, 4)),
    case("unbind.int", lambda x: x.unbind(-1), r(2, 3)),
    case("split.Tensor", lambda x: x.split(2, -1), r(2, 5)),
    case("split_with_sizes.default", lambda x: x.split([1, 3], 1), r(2, 4)),
    case("split.sizes", lambda x: aten.split.sizes(x, [1, 3], 1), r(2, 4)),
    case("chunk.default", lambda x: x.chunk(2, -1), r(2, 5)),
    case("_unsafe_masked_index.default", lambda x: aten._unsafe_masked_index(
        x, torch.tensor([True, False, True]), [i(0, 7, 1)], 0.0), r(2, 3)),
    case("_unsafe_masked_index_put_accumulate.default",
         lambda x, y: aten._unsafe_masked_index_put_accumulate(
             x, torch.tensor([True, False, True]), [i(0, 0, 0)], y), r(2), r(3)),
    case("embedding.default", several(
        lambda w: F.embedding(i([0, 2], [2, 1]), w),
        lambda w: F.embedding(i(0, 1, 2), w, padding_idx=1),
    ), r(3, 2)),
    # rearranging
    case("cat.default", several(
        lambda x, y: torch.cat([x, y, x], -1), lambda x, y: torch.cat([x, y[:, :2]], 0)
    ), r(2, 2), r(2, 3)),
    case("stack.default", lambda x, y: torch.stack([x, y, y], -1), r(2, 2), r(2, 2)),
    case("constant_pad_nd.default", several(
        lambda x: F.pad(x, (1, 2), value=0.5), lambda x: F.pad(x, (-1, 1, 2, 0))
    ), r(2, 3)),
    case("reflection_pad1d.default", lambda x: F.pad(x, (1, 2), "reflect"), r(1, 2, 3)),
    case("reflection_pad2d.default", lambda x: F.pad(x, (1, 2, 0, 1), "reflect"), r(1, 2, 3)),
    case("reflection_pad3d.default", lambda x: F.pad(
        x, (1, 1, 0, 1, 1, 0), "reflect"), r(1, 2, 2, 2)),
    case("replication_pad1d.default", lambda x: F.pad(x, (1, 2), "replicate"), r(1, 2, 3)),
    case("replication_pad2d.default", lambda x: F.pad(x, (1, 2, 0, 1), "replicate"), r(1, 2, 3)),
    case("replication_pad3d.default", lambda x: F.pad(
        x, (1, 1, 0, 1, 1, 0), "replicate"), r(1, 2, 2, 2)),
    case("", lambda x: F.pad(x, (1, 2, 0, 1), "circular"), r(1, 1, 2, 3), note="circular"),
    case("repeat.default", lambda x: x.repeat(2, 1, 3), r(2, 2)),
    case("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, -1), r(2, 3)),
    case("repeat_interleave.self_Tensor", lambda x: x.repeat_interleave(
        i(2, 0, 1), -1, output_size=3), r(2, 3)),
    case("roll.default", several(lambda x: x.roll(1), lambda x: x.roll((1, -1), (0, 1))), r(2, 3)),
    case("flip.default", lambda x: x.flip(0, -1), r(2, 3)),
    case("rot90.default", lambda x: x.rot90(1, (0, -1)), r(2, 3)),
    case("im2col.default", lambda x: F.unfold(
        x, (2, 2), dilation=(1, 2), padding=1, stride=(2, 1)), r(1, 2, 3, 3)),
    case("col2im.default", lambda x: F.fold(x, (3, 3), (2, 2), padding=1, stride=2), r(1, 4, 4)),
    case("pixel_shuffle.default", lambda x: F.pixel_shuffle(x, 2), r(1, 4, 2, 1)),
    case("pixel_unshuffle.default", lambda x: F.pixel_unshuffle(x, 2), r(1, 1, 2, 4)),
    case("channel_shuffle.default", lambda x: F.channel_shuffle(x, 2), r(1, 4, 2)),
    # choosing
    case("sort.default", lambda x: x.sort(-1, descending=True), r(2, 3)),
    case("sort.stable", lambda x: x.sort(dim=0, stable=True), r(3, 2)),
    case("", lambda x: x.argsort(0).to(x.dtype) * x.msort(), r(3, 2), note="argsort"),
    case("topk.default", several(
        lambda x: x.topk(2, -1), lambda x: x.topk(1, 0, largest=False)
    ), r(2, 4)),
    case("kthvalue.default", several(
        lambda x: x.kthvalue(2), lambda x: x.kthvalue(1, 0, keepdim=True)
    ), r(3, 4)),
    case("median.dim", several(
        lambda x: x.median(-1), lambda x: x.median(0, keepdim=True)
    ), r(3, 4)),
    case("median.default", lambda x: x.median(), r(2, 3)),
    case("nanmedian.dim", lambda x: x.nanmedian(-1, keepdim=True), r(2, 3)),
    case("nanmedian.default", lambda x: x.nanmedian(), r(2, 3)),
    case("mode.default", lambda x: x.mode(-1, keepdim=True), r(2, 3)),
    case("cummax.default", lambda x: x.cummax(-1), r(2, 4)),
    case("cummin.default", lambda x: x.cummin(0), r(4, 2)),
    case("max.dim", several(lambda x: x.max(-1), lambda x: x.max(0, keepdim=True)[0]), r(3, 4)),
    case("min.dim", several(lambda x: x.min(-1), lambda x: x.min(0, keepdim=True)[0]), r(3, 4)),
    case("max_pool2d_with_indices.default", several(
        lambda x: F.max_pool2d(x, 2, stride=1, padding=1),
        lambda x: F.max_pool2d(x, 2, dilation=2, ceil_mode=True, return_indices=True),
        lambda x: F.max_pool1d(x[:, :, 0], 2),
    ), r(1, 2, 4, 3)),
    case("max_pool3d_with_indices.default", lambda x: F.max_pool3d(
        x, 2, stride=1, padding=1), r(1, 1, 2, 2, 3)),
    case("adaptive_max_pool2d.default", several(
        lambda x: F.adaptive_max_pool2d(x, (2, 3), return_indices=True),
        lambda x: F.adaptive_max_pool1d(x[:, :, 0], 2),
    ), r(1, 2, 3, 4)),
    case("adaptive_max_pool3d.default", lambda x: F.adaptive_max_pool3d(
        x, (1, 2, 2)), r(1, 1, 2, 3, 2)),
    case("fractional_max_pool2d.default", lambda x: aten.fractional_max_pool2d(
        x, [2, 2], [2, 2], u(1, 1, 2).fill_(0.3)), r(1, 1, 4, 4)),
    case("fractional_max_pool3d.default", lambda x: aten.fractional_max_pool3d(
        x, [2, 2, 2], [1, 2, 2], u(1, 1, 3).fill_(0.3)), r(1, 1, 2, 4, 4)),
    case("max_unpool2d.default", lambda x: F.max_unpool2d(
        x, i(0, 7, 10, 13).reshape(1, 1, 2, 2), 2), r(1, 1, 2, 2)),
    case("max_unpool3d.default", lambda x: F.max_unpool3d(
        x, i(0, 7).reshape(1, 1, 1, 1, 2), 2), r(1, 1, 1, 1, 2)),
    # adding
    case("cumsum.default", several(
        lambda x: x.cumsum(-1), lambda x: x.cumsum(0, dtype=torch.float64)
    ), r(2, 4)),
    *[
        case(f"upsample_nearest{d}d.vec", lambda x: F.interpolate(
            x, scale_factor=2), r(1, 2, *[2] * d))
        for d in (1, 2, 3)
    ],
    *[
        case(f"_upsample_nearest_exact{d}d.vec", lambda x: F.interpolate(
            x, scale_factor=1.5, mode="nearest-exact"), r(1, 1, *[3] * d))
        for d in (1, 2, 3)
    ],
    *[
        case(f"{name}{d}d.default", lambda x, d=d, op=overload(f"{name}{d}d.default"): op(
            x, [3] * d), r(1, 1, *[2] * d))
        for d in (1, 2, 3)
        for name in ("upsample_nearest", "_upsample_nearest_exact")
    ],
]

SCALED = [
    case("nll_loss_forward.default", several(
        lambda x: F.nll_loss(x, i(0, 2)),
        lambda x: F.nll_loss(x, i(1, 2), weight=torch.tensor([1.0, 2, 3]).double()),
        lambda x: F.nll_loss(x, i(1, 0), ignore_index=1, reduction="sum"),
        lambda x: F.nll_loss(x, i(1, 0), reduction="none"),
    ), r(2, 3)),
    case("nll_loss2d_forward.default", several(
        lambda x: F.nll_loss(x, i([0], [2]).reshape(1, 2, 1)),
        lambda x: F.nll_loss(x, i([1], [2]).reshape(1, 2, 1), ignore_index=1,
                             weight=torch.tensor([1.0, 2, 3]).double()),
    ), r(1, 3, 2, 1)),
    case("avg_pool2d.default", several(
        lambda x: F.avg_pool2d(x, 2, stride=1, padding=1),
        lambda x: F.avg_pool2d(x, (2, 3), padding=1, count_include_pad=False, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.avg_pool1d(x[0], 2, 1, 1, count_include_pad=False),
    ), r(1, 1, 3, 4)),
    case("avg_pool3d.default", several(
        lambda x: F.avg_pool3d(x, 2, stride=1, padding=1, count_include_pad=False),
        lambda x: F.avg_pool3d(x, (1, 2, 2), ceil_mode=True),
        lambda x: F.avg_pool3d(x, 2, divisor_override=5),
    ), r(1, 1, 2, 3, 2)),
    case("_adaptive_avg_pool2d.default", several(
        lambda x: F.adaptive_avg_pool2d(x, (3, 2)), lambda x: F.adaptive_avg_pool2d(x[0], 2),
        lambda x: F.adaptive_avg_pool1d(x[0], 2),
    ), r(1, 2, 4, 3)),
    case("_adaptive_avg_pool3d.default", several(
        lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2)), lambda x: F.adaptive_avg_pool3d(x, 1),
    ), r(1, 2, 2, 3, 2)),
    case("upsample_linear1d.vec", several(
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        lambda x: F.interpolate(x, size=5, mode="linear", align_corners=True),
        lambda x: F.interpolate(x, size=2, mode="linear"),
    ), r(1, 2, 3)),
    case("upsample_bilinear2d.vec", several(
        lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear"),
        lambda x: F.interpolate(x, size=(5, 2), mode="bilinear", align_corners=True),
    ), r(2, 1, 3, 2)),
    case("upsample_bicubic2d.vec", several(
        lambda x: F.interpolate(x, size=(5, 3), mode="bicubic"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
    ), r(1, 2, 3, 2)),
    case("upsample_trilinear3d.vec", several(
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
        lambda x: F.interpolate(x, size=(3, 1, 2), mode="trilinear", align_corners=True),
    ), r(1, 1, 2, 2, 1)),
    case("_upsample_bilinear2d_aa.vec", several(
        lambda x: F.interpolate(x, size=(2, 4), mode="bilinear", antialias=True),
        lambda x: F.interpolate(x, scale_factor=0.6, mode="bilinear", antialias=True),
    ), r(1, 1, 4, 3)),
    case("_upsample_bicubic2d_aa.vec", lambda x: F.interpolate(
        x, size=(2, 4), mode="bicubic", antialias=True), r(1, 1, 4, 3)),
    case("upsample_linear1d.default", lambda x: aten.upsample_linear1d(
        x, [4], False), r(1, 1, 3)),
    case("upsample_bilinear2d.default", lambda x: aten.upsample_bilinear2d(
        x, [4, 2], True), r(1, 1, 3, 3)),
    case("upsample_bicubic2d.default", lambda x: aten.upsample_bicubic2d(
        x, [4, 2], False), r(1, 1, 3, 3)),
    case("upsample_trilinear3d.default", lambda x: aten.upsample_trilinear3d(
        x, [3, 2, 1], False), r(1, 1, 2, 2, 2)),
    case("_upsample_bilinear2d_aa.default", lambda x: aten._upsample_bilinear2d_aa(
        x, [2, 2], False), r(1, 1, 4, 3)),
    case("_upsample_bicubic2d_aa.default", lambda x: aten._upsample_bicubic2d_aa(
        x, [2, 2], False), r(1, 1, 4, 3)),
]

CONTRACTION = [
    case("mm.default", torch.mm, r(3, 2).t(), r(3, 4)),
    case("mm.default", lambda x: x @ x, r(3, 3), note="twice"),
    case("bmm.default", torch.bmm, r(2, 2, 3), r(2, 2, 3).mT),
    case("bmm.default", lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y), r(1, 2, 2, 3),
         r(1, 2, 2, 3), note="einsum"),
    case("bmm.default", torch.matmul, r(2, 1, 2, 3), r(2, 3, 2), note="matmul"),
    case("mv.default", torch.mv, r(2, 3), r(3)),
    case("dot.default", torch.dot, r(3), r(3)),
    case("dot.default", lambda x: torch.dot(x, x), r(3), note="twice"),
    case("vdot.default", torch.vdot, r(3), r(3)),
    case("linear.default", F.linear, r(2, 2, 3), r(4, 3), r(4)),
    case("linear.default", F.linear, r(3), r(4, 3), note="vector"),
    case("_trilinear.default", F.bilinear, r(2, 2), r(2, 3), r(2, 2, 3), r(2)),
    case("convolution.default", lambda x, w, b: F.conv1d(
        x, w, b, stride=2, padding=1, dilation=2, groups=2), r(1, 4, 6), r(2, 2, 2), r(2),
        note="1d"),
    case("convolution.default", lambda x, w: F.conv2d(
        x, w, stride=(2, 1), padding="valid"), r(2, 2, 4, 3), r(2, 2, 2, 2), note="2d"),
    case("convolution.default", lambda x, w: F.conv2d(
        x, w, padding="same", dilation=(1, 2)), r(1, 1, 3, 3), r(2, 1, 2, 2), note="same"),
    case("convolution.default", lambda x, w, b: F.conv3d(
        x, w, b, padding=(1, 0, 1)), r(1, 1, 2, 2, 3), r(2, 1, 2, 2, 2), r(2), note="3d"),
    case("convolution.default", lambda x, w, b: F.conv_transpose2d(
        x, w, b, stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2)),
        r(1, 4, 2, 3), r(4, 1, 2, 2), r(2), note="transposed"),
    case("prod.default", lambda x: x.prod(), r(2, 3)),
    case("prod.dim_int", several(lambda x: x.prod(-1), lambda x: x.prod(0, keepdim=True)), r(2, 3)),
    case("cumprod.default", lambda x: x.cumprod(-1), r(2, 4)),
]

POSITIVE = [
    "acosh", "digamma", "lgamma", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sqrt",
]  # fmt: skip
UNARY = [
    "abs", "acos", "angle", "asin", "asinh", "atan", "atanh", "ceil", "celu", "clone",
    "conj_physical", "cos", "cosh", "deg2rad", "elu", "erf", "erfc", "erfinv", "exp", "exp2",
    "expm1", "floor", "frac", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "i0",
    "leaky_relu", "log_sigmoid", "mish", "nan_to_num", "neg", "positive", "rad2deg", "relu",
    "relu6", "round", "selu", "sgn", "sigmoid", "sign", "silu", "sin", "sinc", "sinh", "softplus",
    "softshrink", "special_entr", "special_erfcx", "special_i0e", "special_i1", "special_i1e",
    "special_log_ndtr", "special_ndtri", "square", "tan", "tanh", "trunc",
]  # fmt: skip
