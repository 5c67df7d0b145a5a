"""Operators defined by pointwise functions and reductions along a row.

A definition is the operator written out in plain torch. From it the analysis knows which
dimensions the operator couples, and the region rule derives its Jacobian and curvature, so a
named operator and its hand-written spelling share one rule. Reductions keep their dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.overrides import handle_torch_function, has_torch_function

aten = torch.ops.aten
BICUBIC = 2  # grid_sample's mode

DEFINITIONS: dict[Any, Callable[..., Any]] = {}
# Definitions that replace the operator at capture: they contain contractions or selections, which
# a region does not.
AT_CAPTURE: dict[Any, Callable[..., Any]] = {}
# What models repeat so often that it is written in after the others -> whose definition it has.
REPEATED: dict[Any, Any] = {
    aten.scaled_dot_product_attention.default: aten.scaled_dot_product_attention.default
}
# What a definition calls many times, as it is called there -> what it does; see `repeats`.
STEPS: dict[Callable, Callable] = {}
# Their definition reads other outputs of the call (a drawn mask), passed as the keyword `saved`.
READS_OUTPUTS: set[Any] = set()
# Their definition holds for some calls only; asked with the call's arguments.
ACCEPTS: dict[Any, Callable[..., bool]] = {}


def defines(
    *ops: Any,
    at_capture: bool = False,
    reads_outputs: bool = False,
    accepts: Callable[..., bool] | None = None,
) -> Callable:
    def decorate(function: Callable) -> Callable:
        for op in ops:
            (AT_CAPTURE if at_capture else DEFINITIONS)[op] = function
            if reads_outputs:
                READS_OUTPUTS.add(op)
            if accepts is not None:
                ACCEPTS[op] = accepts
        return function

    return decorate


def repeats(step: Callable) -> Callable:
    """Let a trace keep calls of `step` whole, to be written in later from one trace of it.

    Its first argument after the input is the state, a tuple of tensors; it returns the next one, of
    the same shapes.
    """

    @functools.wraps(step)
    def call(*args: Any) -> Any:
        if has_torch_function(args[:1]):  # a trace is on that wants to know
            return handle_torch_function(call, args[:1], *args)
        return step(*args)

    STEPS[call] = step
    return call


def dims_of(x: Tensor, dim: Any) -> list[int]:
    """All dimensions when `dim` is None or empty, else the non-negative ones."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(x.dim()))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % max(x.dim(), 1) for d in dims] if x.dim() else []


def count(x: Tensor, dims: list[int]) -> Any:
    n: Any = 1
    for d in dims:
        n = n * x.shape[d]
    return n


def squeeze(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    if keepdim:
        return x
    for d in sorted(dims, reverse=True):
        x = x.squeeze(d)
    return x


def total(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None or dtype == x.dtype else x.to(dtype)


@defines(aten.softmax.int, aten._softmax.default)
def softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = cast(x, dtype if isinstance(dtype, torch.dtype) else None)
    # The maximum cancels, so no derivative passes it.
    e = (x - x.detach().amax(dims_of(x, dim), keepdim=True)).exp()
    return e / total(e, dims_of(x, dim))


@defines(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = cast(x, dtype if isinstance(dtype, torch.dtype) else None)
    z = x - x.detach().amax(dims_of(x, dim), keepdim=True)
    # Contiguous as the kernel's, which nll_loss2d_backward relies on.
    return (z - total(z.exp(), dims_of(x, dim)).log()).contiguous()


@defines(aten.logsumexp.default)
def logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    dims = dims_of(x, dim)
    peak = x.amax(dims, keepdim=True).detach()
    # Where every entry is infinite the shift must not make inf - inf.
    peak = torch.where(peak.abs() == float("inf"), torch.zeros_like(peak), peak)
    return squeeze(total((x - peak).exp(), dims).log() + peak, dims, keepdim)


def power(x: Tensor, exponent: float) -> Tensor:
    """A power of what is not negative, with derivatives of zero where it is zero.

    So norms and standard deviations of rows of zeros have PyTorch's derivative, and like every
    kink no second one.
    """
    zero = x == 0
    y = torch.where(zero, torch.ones_like(x), x)
    y = y.sqrt() if exponent == 0.5 else y.pow(exponent)
    return torch.where(zero, torch.zeros_like(x), y)


def root(x: Tensor, order: float = 2) -> Tensor:
    return power(x, 1 / order) if order > 0 else x.pow(1 / order)


def moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Deviations from the mean over `dims` and the biased variance."""
    d = x - x.mean(dims, keepdim=True)
    return d, (d * d).mean(dims, keepdim=True)


@defines(aten.var.correction)
def var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    dims = dims_of(x, dim)
    d = x - x.mean(dims, keepdim=True)
    n = count(x, dims) - (1 if correction is None else correction)
    return squeeze(total(d * d, dims) / n, dims, keepdim)


@defines(aten.var_mean.correction)
def var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    dims = dims_of(x, dim)
    mean = squeeze(x.mean(dims, keepdim=True), dims, keepdim)
    return var(x, dim, correction=correction, keepdim=keepdim), mean


@defines(aten.std.correction)
def std(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return root(var(x, dim, correction=correction, keepdim=keepdim))


@defines(aten.std_mean.correction)
def std_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    v, mean = var_mean(x, dim, correction=correction, keepdim=keepdim)
    return root(v), mean


@defines(aten.linalg_vector_norm.default)
def vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    x = cast(x, dtype)
    dims = dims_of(x, dim)
    if ord == float("inf"):
        return squeeze(absolute(x).amax(dims, keepdim=True), dims, keepdim)
    if ord == -float("inf"):
        return squeeze(absolute(x).amin(dims, keepdim=True), dims, keepdim)
    if ord == 0:
        return squeeze(total((x != 0).to(x.dtype), dims), dims, keepdim)
    if ord == 1:
        return squeeze(total(absolute(x), dims), dims, keepdim)
    if ord == 2:
        return squeeze(root(total(x * x, dims)), dims, keepdim)
    powers = absolute(x).pow(ord) if not 0 < ord < 2 else power(absolute(x), ord)
    return squeeze(root(total(powers, dims), ord), dims, keepdim)


@defines(aten.dist.default)
def dist(x: Tensor, y: Tensor, p: Any = 2) -> Tensor:
    return vector_norm(x - y, p)


@defines(aten._cdist_forward.default)
def cdist(x: Tensor, y: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


@defines(aten.norm.ScalarOpt_dim)
def norm_dim(x: Tensor, p: Any, dim: Any, keepdim: bool = False) -> Tensor:
    return vector_norm(x, 2 if p is None else p, dim, keepdim)


@defines(aten.norm.Scalar)
def norm_all(x: Tensor, p: Any = 2) -> Tensor:
    return vector_norm(x, p)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@defines(aten.layer_norm.default)
def layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    d, v = moments(x, list(range(x.dim() - len(shape), x.dim())))
    return affine(d * (v + eps).rsqrt(), weight, bias)


@defines(aten.native_layer_norm.default)
def native_layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    dims = list(range(x.dim() - len(shape), x.dim()))
    d, v = moments(x, dims)
    rstd = (v + eps).rsqrt()
    return affine(d * rstd, weight, bias), None, None


@defines(aten.rms_norm.default)
def rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(x.dim() - len(shape), x.dim()))
    tiny = torch.finfo(x.dtype).eps if eps is None else eps
    return affine(x * ((x * x).mean(dims, keepdim=True) + tiny).rsqrt(), weight, None)


@defines(aten._fused_rms_norm.default)
def fused_rms_norm(x: Tensor, shape: Any, weight: Any, eps: Any) -> Any:
    dims = list(range(x.dim() - len(shape), x.dim()))
    tiny = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = ((x * x).mean(dims, keepdim=True) + tiny).rsqrt()
    return affine(x * rstd, weight, None), None


def per_channel(p: Tensor | None, x: Tensor) -> Tensor | None:
    return None if p is None else p.reshape([1, -1] + [1] * (x.dim() - 2))


@defines(aten.group_norm.default)
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    d, v = moments(
        x.reshape([x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]]),
        list(range(2, x.dim() + 1)),
    )
    y = (d * (v + eps).rsqrt()).reshape(x.shape)
    return affine(y, per_channel(weight, x), per_channel(bias, x))


@defines(aten.native_group_norm.default)
def native_group_norm(
    x: Tensor, weight: Any, bias: Any, n: Any, c: Any, hw: Any, groups: int, eps: float
) -> Any:
    rows = x.reshape([x.shape[0], groups, -1])
    d, v = moments(rows, [2])
    rstd = (v + eps).rsqrt()
    y = affine((d * rstd).reshape(x.shape), per_channel(weight, x), per_channel(bias, x))
    return y, rows.mean(2), rstd.squeeze(2)


def batch_statistics(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


@defines(aten._native_batch_norm_legit_functional.default)
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Batch norm; the statistics that it returns besides are not differentiated."""
    if training:
        d, v = moments(x, batch_statistics(x))
        y = d * (v + eps).rsqrt()
    else:
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - running_mean.reshape(shape)) * (running_var.reshape(shape) + eps).rsqrt()
    return affine(y, per_channel(weight, x), per_channel(bias, x)), None, None, None, None


@defines(aten._batch_norm_with_update_functional.default)
def batch_norm_with_update(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return (*batch_norm(x, weight, bias, mean, var, True, momentum, eps)[:1], *[None] * 5)


@defines(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(
    x: Tensor, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    return (*batch_norm(x, weight, bias, None, None, True, momentum, eps)[:1], None, None)


@defines(aten._native_batch_norm_legit_no_training.default)
def batch_norm_eval(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Any:
    return (*batch_norm(x, weight, bias, mean, var, False, momentum, eps)[:1], None, None)


@defines(aten.native_dropout.default, reads_outputs=True)
def native_dropout(x: Tensor, p: float, train: bool | None = True, *, saved: Any = None) -> Any:
    """The mask is drawn once, by the operator itself; here it is a constant."""
    if not train or p == 0:
        return x, None
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * (saved[1].to(x.dtype) * scale), None


@defines(aten.rrelu_with_noise_functional.default, reads_outputs=True)
def rrelu(
    x: Tensor,
    noise: Tensor,
    lower: Any = 1 / 8,
    upper: Any = 1 / 3,
    training: bool = False,
    *,
    saved: Any = None,
) -> Any:
    """The slopes are drawn by the operator itself."""
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), None
    return x * saved[1], None


@defines(aten.abs.default)
def absolute(x: Tensor) -> Tensor:
    """Autograd's second derivative of abs bakes sizes in; it is zero."""
    return x * x.sgn().detach()


@defines(aten.max.dim, aten.min.dim, reads_outputs=True)
def choose(x: Tensor, dim: int, keepdim: bool = False, *, saved: Any = None) -> Any:
    """The entry at the index that the operator chose."""
    dims = dims_of(x, dim)
    if not dims:
        return x.clone(), None
    index = saved[1] if keepdim else saved[1].unsqueeze(dims[0])
    shape = [-1 if d == dims[0] else 1 for d in range(x.dim())]
    here = torch.arange(x.shape[dims[0]], device=x.device).reshape(shape) == index
    # where, not a product: an infinite entry times zero is NaN.
    chosen = torch.where(here, x, torch.zeros_like(x))
    return squeeze(total(chosen, dims), dims, keepdim), None


def picks_one(x: Any, dim: int, index: Any, **options: Any) -> bool:
    """Whether a gather takes one entry of each row (x and index: tensors or their stand-ins)."""
    dim = dim % max(len(x.shape), 1)
    if len(x.shape) == 0 or index.shape[dim] != 1:
        return False
    pairs = zip(x.shape, index.shape, strict=True)
    return all(str(a) == str(b) for d, (a, b) in enumerate(pairs) if d != dim)


@defines(aten.gather.default, accepts=picks_one)
def pick(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """The labelled entry of each row, as a sum over the row."""
    dims = dims_of(x, dim)
    shape = [-1 if d == dims[0] else 1 for d in range(x.dim())]
    here = torch.arange(x.shape[dims[0]], device=x.device).reshape(shape) == index
    return total(torch.where(here, x, torch.zeros_like(x)), dims)


@defines(aten.hardsigmoid.default)
def hardsigmoid(x: Tensor) -> Tensor:
    """Autograd cannot differentiate its backward; at the kinks the derivative is zero."""
    ramp = x * (1 / 6) + 0.5
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, ramp)).to(x.dtype)


@defines(aten.masked_fill.Tensor)
def masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, x)


@defines(aten.dot.default, aten.vdot.default)
def dot(x: Tensor, y: Tensor) -> Tensor:
    """A row, not a contraction: the two may be one tensor."""
    return (x * y).sum()


def one_by_one(x: Any, y: Any, **options: Any) -> bool:
    """Whether each product of a batch is of one row and one column, as einsum writes a dot."""
    return _is_one(x.shape[1]) and _is_one(y.shape[2])


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@defines(aten.bmm.default, accepts=one_by_one)
def dots(x: Tensor, y: Tensor) -> Tensor:
    """As `dot`: each entry is used once."""
    return (x * y.transpose(1, 2)).sum(2, keepdim=True)


# --- replaced at capture ------------------------------------------------------------------------


@defines(aten.scaled_dot_product_attention.default, at_capture=True)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Two contractions with a softmax between; the fused kernels hide the probabilities."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # The queries are fewer than the scores.
    scores = batched_product(query * factor, key.transpose(-2, -1))
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device)
        columns = torch.arange(key.shape[-2], device=query.device)
        scores = scores + bias_of(columns <= rows.unsqueeze(-1), scores.dtype)
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores + (bias_of(attn_mask, scores.dtype) if is_choice else attn_mask)
    # Without a mask of the user's no row is masked whole.
    weights = scores.softmax(-1) if attn_mask is None else safe_softmax(scores)
    if dropout_p > 0:
        weights = aten.native_dropout(weights, dropout_p, True)[0]
    return batched_product(weights, value)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores; unlike a fill it leaves nothing to do for derivatives."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; equal leading sizes need none of matmul's questions to symbolic shapes."""
    if a.dim() < 3 or a.shape[:-2] != b.shape[:-2]:
        return a @ b
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3))
    return product.reshape(*a.shape[:-1], b.shape[-1])


def safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row that is masked whole gives zeros, not NaN."""
    masked = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(masked, 0.0).softmax(-1)
    return weights.masked_fill(masked, 0.0)


@defines(aten._safe_softmax.default, at_capture=True)
def _safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return safe_softmax(cast(x, dtype).movedim(dim, -1)).movedim(-1, dim)


@defines(aten.rrelu.default, at_capture=True)
def rrelu_composite(
    x: Tensor,
    lower: Any = 1 / 8,
    upper: Any = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Tensor:
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    noise = torch.empty_like(x)
    return aten.rrelu_with_noise_functional(x, noise, lower, upper, training)[0]


def copied(view: Any) -> Callable[..., Any]:
    def copy_of(*args: Any, **kwargs: Any) -> Any:
        found = view(*args, **kwargs)
        return found.clone() if isinstance(found, Tensor) else [v.clone() for v in found]

    return copy_of


for _name in (
    "alias", "as_strided", "diagonal", "expand", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "view_as_real", "view_as_complex",
):  # fmt: skip
    _view, _copy = getattr(aten, _name), getattr(aten, f"{_name}_copy")
    for _overload in set(_view.overloads()) & set(_copy.overloads()):
        defines(getattr(_copy, _overload), at_capture=True)(copied(getattr(_view, _overload)))


@defines(aten.grid_sampler_2d.default, at_capture=True)
def grid_sampler_2d(x: Tensor, grid: Tensor, mode: int, *options: Any) -> Any:
    """Pixels by index times weights, each pixel once: PyTorch's own decomposition.

    Bicubic weights of pixels beyond the border meet in one pixel; they stay a unit.
    """
    if mode == BICUBIC:
        return NotImplemented
    op = aten.grid_sampler_2d.default
    return get_decompositions([op])[op](x, grid, mode, *options)


@defines(aten.narrow_copy.default, at_capture=True)
def narrow_copy(x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    return x.narrow(dim, start, length).clone()


@defines(aten.copy.default, at_capture=True)
def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape)


def scaled_sum(beta: Any, a: Tensor, alpha: Any, b: Tensor) -> Tensor:
    return (a if beta == 1 else a * beta) + (b if alpha == 1 else b * alpha)


@defines(aten.addmm.default, at_capture=True)
def addmm(a: Tensor, b: Tensor, c: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return scaled_sum(beta, a, alpha, torch.mm(b, c))


@defines(aten.addmv.default, at_capture=True)
def addmv(a: Tensor, b: Tensor, c: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return scaled_sum(beta, a, alpha, torch.mv(b, c))


@defines(aten.addbmm.default, at_capture=True)
def addbmm(a: Tensor, b: Tensor, c: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return scaled_sum(beta, a, alpha, torch.bmm(b, c).sum(0))


@defines(aten.baddbmm.default, at_capture=True)
def baddbmm(a: Tensor, b: Tensor, c: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return scaled_sum(beta, a, alpha, torch.bmm(b, c))


@defines(aten.addr.default, at_capture=True)
def addr(a: Tensor, b: Tensor, c: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return scaled_sum(beta, a, alpha, b.unsqueeze(1) * c)


def reduced(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """PyTorch's own decomposition reads the labels otherwise than its kernel."""
    rows = x if x.dim() == 2 else x.unsqueeze(0)
    labels = target if x.dim() == 2 else target.unsqueeze(0)
    classes = torch.arange(rows.shape[1], device=x.device)
    # Labels count up to the first -1 of their row.
    valid = (labels < 0).to(torch.int64).cumsum(1) == 0
    is_target = ((labels.unsqueeze(2) == classes) & valid.unsqueeze(2)).any(1)
    picked = rows.gather(1, labels.clamp(min=0)).unsqueeze(2)
    hinge = (1 - picked + rows.unsqueeze(1)).clamp(min=0)
    counted = valid.unsqueeze(2) & ~is_target.unsqueeze(1)
    loss = (hinge * counted.to(x.dtype)).sum((1, 2)) / rows.shape[1]
    return reduced(loss if x.dim() == 2 else loss.squeeze(0), reduction)
