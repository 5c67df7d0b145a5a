"""``J^T u`` for each sample alone, for parameters that a unit uses several times in one sample.

Each function serves calls of one kind and gives (samples, *shape) for each differentiated input,
None where it has nothing better than a backward pass for each sample. `dim` of the output runs over
(samples, inner), and so it does for every operand that has samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, widen

aten = torch.ops.aten


def call_per_sample(call: Call, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
    """For contractions and embeddings."""
    rule = RULES.get(call.op)
    nothing: list[Tensor | None] = [None] * len(call.active)
    if rule is None or u[0] is None or any(v is not None for v in u[1:]):
        return nothing
    args, kwargs = pytree.tree_unflatten([widen(v) for v in call.leaves], call.spec)
    found = rule(widen(u[0]), dim, inner, *args, **kwargs)
    tensors = [i for i, v in enumerate(call.leaves) if isinstance(v, Tensor)]
    return [found.get(tensors.index(i)) for i in call.active]


def call_norms(call: Call, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
    """Squared norms of the same, summed over the samples; one number for each input."""
    rule = NORMS.get(call.op)
    if rule is None:
        return [None if v is None else (v * v).sum() for v in call_per_sample(call, u, dim, inner)]
    nothing: list[Tensor | None] = [None] * len(call.active)
    if u[0] is None:
        return nothing
    args, kwargs = pytree.tree_unflatten([widen(v) for v in call.leaves], call.spec)
    found = rule(widen(u[0]), dim, inner, *args, **kwargs)
    tensors = [i for i, v in enumerate(call.leaves) if isinstance(v, Tensor)]
    return [found.get(tensors.index(i)) for i in call.active]


def call_totals(call: Call, s: Tensors) -> list[Tensor | None]:
    """The sum of all elements of ``(J o J)^T s`` for weight and bias of a linear layer."""
    nothing: list[Tensor | None] = [None] * len(call.active)
    if call.op is not aten.linear.default or s[0] is None or s[0].dim() < 2:
        return nothing
    x = widen(call.leaves[0])
    found = {1: (s[0].sum(-1) * x.square().sum(-1)).sum(), 2: s[0].sum()}
    tensors = [i for i, v in enumerate(call.leaves) if isinstance(v, Tensor)]
    return [found.get(tensors.index(i)) for i in call.active]


def split(value: Tensor, dim: int, inner: int) -> Tensor:
    """(samples, inner, others...) with all but the last of the others in their order."""
    value = value.movedim(dim, 0)
    return value.reshape(value.shape[0] // inner, inner, *value.shape[1:])


def linear(u: Tensor, dim: int, inner: int, x: Tensor, w: Tensor, bias: Any = None) -> Any:
    """``sum_t u_t x_t^T`` and ``sum_t u_t`` over the places t of a sample."""
    if w.dim() != 2 or dim == u.dim() - 1:
        return {}
    u, x = split(u, dim, inner).flatten(1, -2), split(x, dim, inner).flatten(1, -2)
    return {1: u.transpose(1, 2) @ x, 2: u.sum(1)}


def linear_norms(u: Tensor, dim: int, inner: int, x: Tensor, w: Tensor, bias: Any = None) -> Any:
    """``|sum_t u_t x_t^T|^2 = sum_tt' (u_t.u_t') (x_t.x_t')``, over pairs of places or directly."""
    if w.dim() != 2 or dim == u.dim() - 1:
        return {}
    u, x = split(u, dim, inner).flatten(1, -2), split(x, dim, inner).flatten(1, -2)
    return {1: product_norms(u, x), 2: u.sum(1).square().sum()}


def product_norms(u: Tensor, x: Tensor) -> Tensor:
    """The sum of ``|u_b^T x_b|^2`` over b, for (samples, places, features) each."""
    places, outputs, inputs = hint(u.shape[1]), hint(u.shape[2]), hint(x.shape[2])
    if places == 1:
        return (u.square().sum(2) * x.square().sum(2)).sum()
    if places * (outputs + inputs) < outputs * inputs:
        return ((u @ u.transpose(1, 2)) * (x @ x.transpose(1, 2))).sum()
    return (u.transpose(1, 2) @ x).square().sum()


def hint(size: Any) -> int:
    """A size, or what it is in the example where it is free: it chooses a way, not a result."""
    return size if isinstance(size, int) else size.node.hint


def convolution(
    u: Tensor, dim: int, inner: int, x: Tensor, w: Tensor, bias: Any, *options: Any
) -> Any:
    """The same where the places are those of the kernel, whose inputs are unfolded."""
    stride, padding, dilation, transposed, _, groups = options
    if dim != 0 or inner != 1 or transposed or groups != 1 or w.dim() not in (3, 4):
        return {}
    grads = u.flatten(2) @ unfold(x, w, stride, padding, dilation).transpose(1, 2)
    return {1: grads.reshape(grads.shape[0], *w.shape), 2: u.flatten(2).sum(2)}


def convolution_norms(
    u: Tensor, dim: int, inner: int, x: Tensor, w: Tensor, bias: Any, *options: Any
) -> Any:
    """As of a linear layer whose places are those of the kernel."""
    stride, padding, dilation, transposed, _, groups = options
    if dim != 0 or inner != 1 or transposed or groups != 1 or w.dim() not in (3, 4):
        return {}
    patches = unfold(x, w, stride, padding, dilation)
    u = u.flatten(2)
    norms = product_norms(u.transpose(1, 2), patches.transpose(1, 2))
    return {1: norms, 2: u.sum(2).square().sum()}


def unfold(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The inputs of each place of the kernel, (samples, entries of the kernel, places)."""
    if w.dim() == 3:
        x, stride, padding = x.unsqueeze(2), [1, *stride], [0, *padding]
        dilation = [1, *dilation]
    kernel = [1, *w.shape[2:]][-2:]
    return aten.im2col(x, kernel, dilation, padding, stride)


def embedding(u: Tensor, dim: int, inner: int, w: Tensor, index: Tensor, *options: Any) -> Any:
    """Each sample looks up in a table of its own."""
    padding = options[0] if options else -1
    if dim >= index.dim() or padding != -1 or any(options[1:]):
        return {}
    u, index = split(u, dim, inner), split(index, dim, inner)
    samples, rows = index.shape[0], w.shape[0]
    first = torch.arange(samples, device=index.device) * rows
    index = index + first.reshape(-1, *[1] * (index.dim() - 1))
    found = aten.embedding_dense_backward(u, index, samples * rows, -1, False)
    return {0: found.reshape(samples, rows, w.shape[1])}


RULES: dict[Any, Any] = {
    aten.linear.default: linear,
    aten.convolution.default: convolution,
    aten.embedding.default: embedding,
}
# Where the squared norm is cheaper than what it is of.
NORMS: dict[Any, Any] = {
    aten.linear.default: linear_norms,
    aten.convolution.default: convolution_norms,
}
