"""A slow, independent brute force of the recursion, for tests only.

It shares no code with ``hesscale_fx``: a model is exported with ``torch.export``,
its ATen graph is interpreted eagerly, and every unit's full Jacobian and the
diagonal of its second derivative are computed densely by autograd. So it is only
for tiny shapes, and it has no rules per operator that could be wrong.

For one unit ``y = f(x)`` with Jacobian J::

    g_x = J^T g_y
    s_x = (J o J)^T s_y + sum_k g_y[k] * d2 y[k] / dx^2

Units are regions (``units="region"``, the contract) or single operators
(``units="op"``, which shows what a pass without regions would return).

Regions. The graph is cut at contractions (products of two operands: matmul,
linear, convolution), at operators that choose, move or mix entries (slices, pools,
interpolation, embedding), and at those of complex numbers, which are pairs of real ones.
A value's level is the largest number of cuts between it and the loss; a region is a
connected component of equal level, and a value used at several levels belongs to each of
them, as if recomputed there.

Where a component reduces along two different sets of dimensions it is split between
them: by stages, each up to where another row begins, or where a tensor would have one
axis twice. Pointwise functions between two stages belong to the later one, if a single
tensor is cut above them; a stage that only one other takes, and that has its row, is one
with that; and what regions of different rows read alike is as if recomputed in each.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.node import map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class Reference(NamedTuple):
    loss: torch.Tensor
    grads: dict[Any, torch.Tensor]
    hess_diag: dict[Any, torch.Tensor]


# --------------------------------------------------------------------------- capture


def _sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Attention as its two contractions with a softmax between them."""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], dim=-3)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    weights = scores.softmax(-1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return weights @ v


def _gru_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    ir, iz, in_ = F.linear(x, w_ih, b_ih).chunk(3, 1)
    hr, hz, hn = F.linear(h, w_hh, b_hh).chunk(3, 1)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    n = torch.tanh(in_ + r * hn)
    return (1 - z) * n + z * h


def _lstm_cell(x, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    h, c = hx
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _rnn_cell(act):
    def cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
        return act(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return cell


def _recurrent(cell, states):
    """The layers of nn.RNN, nn.GRU or nn.LSTM. (torch's own decomposition loses dropout.)"""

    def run(x, hx, params, biases, layers, dropout, train, bidirectional, batch_first):
        hx = list(hx) if states == 2 else [hx]
        x = x.transpose(0, 1) if batch_first else x
        per = 4 if biases else 2
        ways = 2 if bidirectional else 1
        final = []
        for layer in range(layers):
            outs = []
            for way in range(ways):
                i = layer * ways + way
                weights = params[i * per : (i + 1) * per]
                state = tuple(h[i] for h in hx) if states == 2 else hx[0][i]
                steps = [None] * x.shape[0]
                for t in reversed(range(x.shape[0])) if way else range(x.shape[0]):
                    state = cell(x[t], state, *weights)
                    steps[t] = state[0] if states == 2 else state
                outs.append(torch.stack(steps))
                final.append(state)
            x = torch.cat(outs, -1)
            if dropout and train and layer < layers - 1:
                x = torch.dropout(x, dropout, True)
        x = x.transpose(0, 1) if batch_first else x
        if states == 2:
            return (x, torch.stack([h for h, _ in final]), torch.stack([c for _, c in final]))
        return x, torch.stack(final)

    return run


def _decompositions() -> dict:
    table = {
        aten.lstm.input: _recurrent(_lstm_cell, 2),
        aten.gru.input: _recurrent(_gru_cell, 1),
        aten.rnn_tanh.input: _recurrent(_rnn_cell(torch.tanh), 1),
        aten.rnn_relu.input: _recurrent(_rnn_cell(torch.relu), 1),
    }
    table[aten.scaled_dot_product_attention.default] = _sdpa
    table[aten.gru_cell.default] = _gru_cell
    table[aten.lstm_cell.default] = _lstm_cell
    table[aten.rnn_tanh_cell.default] = _rnn_cell(torch.tanh)
    table[aten.rnn_relu_cell.default] = _rnn_cell(torch.relu)
    return table


class _Joint(nn.Module):
    """model and loss as one module: args are the model's inputs, then the targets."""

    def __init__(self, model, loss, n_targets):
        super().__init__()
        self.model, self.n_targets = model, n_targets
        self.loss = loss

    def forward(self, *args, **kwargs):
        cut = len(args) - self.n_targets
        out = self.model(*args[:cut], **kwargs)
        return out if self.loss is None else self.loss(out, *args[cut:])


class _Flat(nn.Module):
    """A callable whose outputs are flattened to the tensors among them."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args, **kwargs):
        return tuple(pytree.tree_leaves(self.fn(*args, **kwargs)))


class _Graph:
    """An exported graph, and the value of every node from one eager run of it."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict):
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            ep = torch.export.export(module, args, kwargs, strict=False)
            ep = ep.run_decompositions(_decompositions())
        sig = ep.graph_signature
        tensors = dict(module.named_parameters(remove_duplicate=False))
        tensors.update(module.named_buffers(remove_duplicate=False))
        flat = iter(pytree.tree_leaves((args, kwargs)))
        self.nodes, self.env, self.saved = [], {}, {}
        self.leaf_tensor: dict = {}
        alias, first = {}, {}
        for node in ep.graph.nodes:
            if node.op == "placeholder":
                name = node.name
                target = (
                    sig.inputs_to_parameters.get(name)
                    or sig.inputs_to_buffers.get(name)
                    or sig.inputs_to_lifted_tensor_constants.get(name)
                )
                if target is None:
                    value = next(flat)
                elif target in tensors:
                    value = tensors[target]
                elif target in ep.state_dict:
                    value = ep.state_dict[target]
                else:
                    value = ep.constants[target]
                if isinstance(value, torch.Tensor):
                    self.leaf_tensor[node] = value
                    alias[node] = first.setdefault(id(value), node)
                    value = value.detach()
                self.env[node] = value
            elif node.op == "output":
                outs = [spec.arg for spec in sig.output_specs]
                kinds = [spec.kind for spec in sig.output_specs]
                by_name = {n.name: n for n in ep.graph.nodes}
                self.outputs = [
                    by_name[a.name] if hasattr(a, "name") else None
                    for a, k in zip(outs, kinds, strict=True)
                    if k == torch.export.graph_signature.OutputKind.USER_OUTPUT
                ]
        for node, keep in alias.items():
            if node is not keep:
                node.replace_all_uses_with(keep)
                self.outputs = [keep if o is node else o for o in self.outputs]
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for node in ep.graph.nodes:
                if node.op == "call_function":
                    self.env[node] = self.call(node, self.env, record=True)
                    self.nodes.append(node)
        self._keep = ep

    def call(self, node, env, record=False):
        """The value of a node; ``record`` also draws its random mask, once."""

        def look(n):
            return env[n] if n in env else self.env[n]

        args = map_arg(node.args, look)
        kwargs = map_arg(node.kwargs, look)
        target = node.target
        if target in _OVERRIDES:
            return _OVERRIDES[target](self.saved, node, record, *args, **kwargs)
        if target in (aten.view.default, aten._unsafe_view.default):
            return args[0].reshape(args[1])
        return target(*args, **kwargs)


# Operators that are random, or that torch cannot differentiate twice, in plain torch.


def _dropout(saved, node, record, x, p, train):
    if record:
        saved[node] = torch.native_dropout(torch.ones_like(x), p, train)
    scale, mask = saved[node]
    return x * scale, mask


def _rrelu(saved, node, record, x, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    if record:
        y = aten.rrelu.default(x, lower, upper, training)
        saved[node] = torch.where(x < 0, y / x, torch.ones_like(x))
    return x * saved[node]


def _batch_norm_train(saved, node, record, x, w, b, rm, rv, momentum, eps):
    if record:
        return aten._native_batch_norm_legit_functional.default(
            x, w, b, rm, rv, True, momentum, eps
        )
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    y = y if w is None else y * w.view(shape)
    y = y if b is None else y + b.view(shape)
    return y, None, None, None, None


def _batch_norm_functional(saved, node, record, x, w, b, rm, rv, training, momentum, eps):
    if not training:
        return _batch_norm_eval(saved, node, record, x, w, b, rm, rv, momentum, eps)
    return _batch_norm_train(saved, node, record, x, w, b, rm, rv, momentum, eps)


def _batch_norm_eval(saved, node, record, x, w, b, rm, rv, momentum, eps):
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = (x - rm.view(shape)) / (rv.view(shape) + eps).sqrt()
    y = y if w is None else y * w.view(shape)
    y = y if b is None else y + b.view(shape)
    return y, None, None


def _batch_norm_no_stats(saved, node, record, x, w, b, training, momentum, eps):
    return _batch_norm_train(saved, node, False, x, w, b, None, None, momentum, eps)[:3]


def _hardsigmoid(saved, node, record, x):
    # torch's own slope: its 1/6 is a float32 whatever the dtype
    if record:
        saved[node] = aten.hardsigmoid_backward.default(torch.ones_like(x), x)
    return aten.hardsigmoid.default(x.detach()) + saved[node] * (x - x.detach())


def _weight_norm(saved, node, record, v, g, dim=0):
    dims = [d for d in range(v.ndim) if d != dim]  # -1: one norm over everything
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())


def _multilabel_margin(saved, node, record, x, target, reduction=1):
    rows = x.reshape(-1, x.shape[-1])
    losses = []
    for row, t in zip(rows, target.reshape(-1, x.shape[-1]), strict=True):
        labels = []
        for label in t.tolist():
            if label < 0:
                break
            labels.append(label)
        rest = [j for j in range(len(row)) if j not in labels]
        total = row.sum() * 0
        for label in labels:
            total = total + (1 - (row[label] - row[rest])).clamp(min=0).sum()
        losses.append(total / len(row))
    out = torch.stack(losses).reshape(x.shape[:-1])
    return out if reduction == 0 else out.mean() if reduction == 1 else out.sum()


def _embedding_bag(
    saved,
    node,
    record,
    weight,
    indices,
    offsets,
    scale_grad=False,
    mode=0,
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    ends = [*offsets.tolist()[1:], len(indices)]
    starts = offsets.tolist()
    if include_last_offset:
        starts, ends = starts[:-1], offsets.tolist()[1:]
    bags = []
    for a, b in zip(starts, ends, strict=True):
        keep = [i for i in range(a, b) if indices[i].item() != padding_idx]
        rows = weight[indices[keep]]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[keep, None]
        bags.append(
            weight[0] * 0
            if not keep
            else rows.sum(0)
            if mode == 0
            else rows.mean(0)
            if mode == 1
            else rows.amax(0)
        )
    return torch.stack(bags), None, None, None


def _ctc(log_probs, targets):
    """The forward algorithm over the extended labels blank, a, blank, b, blank."""
    total = 0.0
    for i, target in enumerate(targets.tolist()):
        labels = [0]
        for k in target:
            labels += [k, 0]
        p = log_probs[:, i, labels].exp()
        zero = p[0, 0] * 0
        alpha = [p[0, 0], p[0, 1], *[zero] * (len(labels) - 2)]
        for row in p[1:]:
            old = [zero, zero, *alpha]  # alpha[j] is old[j + 2]
            skips = [j > 1 and labels[j] not in (0, labels[j - 2]) for j in range(len(labels))]
            alpha = [
                row[j] * (old[j + 2] + old[j + 1] + (old[j] if skip else zero))
                for j, skip in enumerate(skips)
            ]
        total = total - (alpha[-1] + alpha[-2]).log()
    return total


@torch.library.custom_op("hesscale_reference::ctc_loss", mutates_args=())
def _ctc_op(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _ctc(log_probs, targets)


@_ctc_op.register_fake
def _(log_probs, targets):
    return log_probs.new_empty(())


def ctc_loss(log_probs, targets):
    """``F.ctc_loss`` of full lengths, summed, which torch.export cannot capture; one unit."""
    return torch.ops.hesscale_reference.ctc_loss(log_probs, targets)


_OVERRIDES: dict[Any, Callable] = {
    torch.ops.hesscale_reference.ctc_loss.default: lambda saved, node, record, *args: _ctc(*args),
    aten.native_dropout.default: _dropout,
    aten.rrelu.default: _rrelu,
    aten.hardsigmoid.default: _hardsigmoid,
    aten._native_batch_norm_legit_functional.default: _batch_norm_functional,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_eval,
    aten._native_batch_norm_legit.no_stats: _batch_norm_no_stats,
    aten._weight_norm.default: _weight_norm,
    aten.multilabel_margin_loss.default: _multilabel_margin,
    aten.embedding_bag.padding_idx: _embedding_bag,
}


# --------------------------------------------------------------------------- structure

_CONTRACTIONS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "addbmm",
    "linear",
    "matmul",
    "mv",
    "addmv",
    "dot",
    "vdot",
    "bilinear",
    "_trilinear",
    "convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "einsum",
    "embedding_bag",
    "conv_tbc",
}
# A unit of its own: what takes some entries and leaves others, or moves them along an axis.
_SELECTING = {
    "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "flip", "roll", "narrow",
    "cat", "stack", "index", "gather", "index_select", "constant_pad_nd", "pad", "repeat",
    "diagonal",
}  # fmt: skip
# A unit of its own: linear, or linear between kinks, and mixing neighbours; CTC, and what has a
# dense Jacobian of its own (linear algebra, products along an axis).
_MIXING = {
    "linalg_cholesky",
    "linalg_cholesky_ex",
    "linalg_solve_triangular",
    "cumprod",
    "index_add",
    "scatter_add",
    "index_put",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_unpool2d",
    "max_unpool3d",
    "embedding",
    "ctc_loss",
    "cumsum",
    "im2col",
    "col2im",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
}
_REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "std",
    "var",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "nll_loss_nd",
    "kl_div",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "smooth_l1_loss",
    "l1_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "multi_margin_loss",
    "poisson_nll_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "cosine_similarity",
    "pairwise_distance",
}
# What is behind these is a constant, a random draw included.
_STOPS = {
    "detach", "lift_fresh_copy", "new_empty", "new_zeros", "new_ones", "new_full", "empty_like",
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "bernoulli",
}  # fmt: skip


def _op_name(node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def _is_part(node) -> bool:
    """One of several results of an operator."""
    return node.target is operator.getitem


def _is_global_mean(graph, node) -> bool:
    """adaptive average pooling to size one: ``x.mean((-2, -1))`` under another name."""
    name = _op_name(node)
    return name.startswith("adaptive_avg_pool") and all(
        d == 1 for d in graph.env[node].shape[-int(name[-2]) :]
    )


def _reduced_dims(graph: _Graph, node) -> set[int]:
    """The dimensions of the first operand that a node reduces along; none if pointwise."""
    name = _op_name(node)
    x = graph.env[node.args[0]] if node.args and isinstance(node.args[0], torch.fx.Node) else None
    if not isinstance(x, torch.Tensor) or x.ndim == 0:
        return set()
    everything = set(range(x.ndim))
    if name in ("softmax", "_softmax", "log_softmax", "_log_softmax"):
        return {node.args[1] % x.ndim}
    if name == "cross_entropy_loss":
        return {1 if x.ndim > 1 else 0}
    if name in ("layer_norm", "rms_norm"):
        return set(range(x.ndim - len(node.args[1]), x.ndim))
    if name == "group_norm":
        return everything - {0}
    if name == "instance_norm":
        return everything - {0, 1}
    if name.startswith("_native_batch_norm_legit"):
        fixed = "no_training" in name or (name.endswith("functional") and not node.args[5])
        return set() if fixed else everything - {1}
    if name == "_weight_norm":
        return everything - {node.args[2] if len(node.args) > 2 else 0}
    if _is_global_mean(graph, node):
        return set(range(x.ndim - int(name[-2]), x.ndim))
    if name in ("max", "min", "median") and len(node.all_input_nodes) > 1:
        return set()
    if name in _REDUCTIONS or name in ("max", "min", "median"):
        y = graph.env[node]
        y = y[0] if isinstance(y, (tuple, list)) else y
        if name == "cosine_similarity":
            return {(node.args[2] if len(node.args) > 2 else 1) % x.ndim}
        if y.numel() == 1 and x.numel() > 1:
            return everything
        if y.numel() == x.numel():
            return set()
        at = {"linalg_vector_norm": 2, "norm": 2}.get(name, 1)
        dims = node.args[at] if len(node.args) > at else node.kwargs.get("dim")
        if isinstance(dims, torch.fx.Node):  # a target: a loss for every sample
            return {1} if name == "nll_loss_nd" else {x.ndim - 1}
        dims = [dims] if isinstance(dims, int) else dims
        return {d % x.ndim for d in dims} if dims else everything
    return set()


def _shape(value):
    value = (
        next((v for v in value if v is not None), None)
        if isinstance(value, (tuple, list))
        else value
    )
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


_VIEWS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t",
    "squeeze", "unsqueeze", "expand", "select", "slice", "split", "split_with_sizes", "chunk",
    "unbind", "clone", "contiguous", "movedim", "repeat", "flip", "roll", "narrow",
}  # fmt: skip


_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}


class _Axes:
    """Which dimensions of which nodes are one axis of the data.

    A dimension is an ordered list of atoms, their sizes multiply to its own. An atom is
    a name; once identified with others, or split by a reshape, it stands for those.
    """

    def __init__(self):
        self.size: list[int] = []
        self.means: dict[int, list[int]] = {}

    def new(self, size):
        self.size.append(size)
        return len(self.size) - 1

    def resolve(self, atoms):
        return [b for a in atoms for b in (self.resolve(self.means[a]) if a in self.means else [a])]

    def _split(self, atom, first):
        self.means[atom] = [self.new(first), self.new(self.size[atom] // first)]
        return self.means[atom]

    def take(self, atoms, size):
        """The leading atoms that make up ``size``, and the rest; None if none do."""
        atoms, head = self.resolve(atoms), []
        while size > 1:
            if not atoms:
                return None
            first, *atoms = atoms
            if self.size[first] > size:
                if self.size[first] % size:
                    return None
                first, rest = self._split(first, size)
                atoms = [rest, *atoms]
            if size % self.size[first]:
                return None
            size //= self.size[first]
            head.append(first)
        return head, atoms

    def identify(self, one, other):
        one, other = self.resolve(one), self.resolve(other)
        while one and other:
            a, b = one[0], other[0]
            if a != b and len(one) == len(other) == 1:  # of a slice too: sizes may differ
                self.means[a] = [b]
                return
            if self.size[a] < self.size[b]:
                one, other, a, b = other, one, b, a
            if a != b and self.size[a] > self.size[b]:
                if self.size[a] % self.size[b]:
                    return
                a, rest = self._split(a, self.size[b])
                one = [a, rest, *one[1:]]
            if a != b:
                self.means[a] = [b]
            one, other = self.resolve(one[1:]), self.resolve(other[1:])


def _row_keys(graph: _Graph, part) -> tuple[dict, set, dict]:
    """For every node that reduces, the axes of the component along which it does.

    Axes are followed by dataflow, never by size or by position alone: pointwise
    operators align their operands by broadcasting, reshapes merge and split axes, the
    other views are followed by running them on the indices of their input, a reduction
    removes what it sums over, and ``stack`` adds an axis. What would have one axis twice
    (the next step of a Markov chain, the differences of all pairs) has no row here: these
    nodes, and those behind them, come second. Third, for every dimension its axes.
    """
    known = _Axes()
    beyond: set = set()
    axes: dict = {}  # node -> for every dimension its atoms

    def fresh(shape):
        return [[known.new(size)] for size in shape]

    def of(node):
        if node not in axes:
            axes[node] = fresh(_shape(graph.env[node]))
        return axes[node]

    def viewed(n):
        source = n.args[0]
        shape = _shape(graph.env[source])
        index = torch.arange(math.prod(shape)).reshape(shape)
        moved = graph.call(n, {source: index})
        moved = moved[0] if isinstance(moved, (tuple, list)) else moved
        coordinates = torch.unravel_index(moved, shape) if shape else ()
        result = fresh(moved.shape)
        for d in range(moved.ndim):
            varies = [
                of(source)[i]
                for i, c in enumerate(coordinates)
                if moved.shape[d] > 1 and c.numel() and (c.diff(dim=d) != 0).any()
            ]
            if varies:
                result[d] = [a for v in varies for a in v]
        return result

    def reshaped(n, out):
        atoms = [
            a
            for size, dim in zip(_shape(graph.env[n.args[0]]), of(n.args[0]), strict=True)
            if size > 1
            for a in dim
        ]
        result = []
        for size in out:
            taken = known.take(atoms, size)
            if taken is None:
                return fresh(out)
            result.append(taken[0] or [known.new(1)])
            atoms = taken[1]
        return result

    def stacked(n, out):
        at = (n.args[1] if len(n.args) > 1 else 0) % len(out)
        result = fresh(out)
        for a in n.args[0]:
            for d, theirs in zip([d for d in range(len(out)) if d != at], of(a), strict=True):
                known.identify(result[d], theirs)
        return result

    def repeated(n, out):
        times, *dim = n.args[1:]
        dim = dim[0] if dim else n.kwargs.get("dim")
        if dim is None or not isinstance(times, int):
            return fresh(out)
        result = list(of(n.args[0]))
        result[dim] = [*result[dim], known.new(times)]
        return result

    def aligned(n, out):
        """Operands by broadcasting; of other operators only those of as many dimensions."""
        everywhere = torch.Tag.pointwise in getattr(n.target, "tags", ())
        everywhere = everywhere or _op_name(n) in ("layer_norm", "rms_norm")
        mine: list = [None] * len(out)
        for a in n.all_input_nodes:
            shape = _shape(graph.env[a])
            if not everywhere and len(shape) != len(out):
                continue
            for d in range(1, min(len(out), len(shape)) + 1):
                if shape[-d] == out[-d] > 1:
                    theirs = of(a)[-d]
                    if mine[-d] is None:
                        mine[-d] = theirs
                    else:
                        known.identify(mine[-d], theirs)
        return [m if m is not None else f for m, f in zip(mine, fresh(out), strict=True)]

    def is_twice(n):
        atoms = [a for dim in axes[n] for a in known.resolve(dim) if known.size[a] > 1]
        return len(set(atoms)) < len(atoms)

    def are_twice(n, before):
        return is_twice(n) or (known.means != before and any(map(is_twice, axes)))

    keys = {}
    for n in part:
        if any(a in beyond for a in n.all_input_nodes):
            beyond.add(n)
            continue
        dims = _reduced_dims(graph, n)
        out = _shape(graph.env[n])
        name = _op_name(n)
        before = dict(known.means)
        if dims:
            first = n.args[0]
            keys[n] = [a for d in dims for a in of(first)[d]]
            for a in n.all_input_nodes:  # of a loss: the input and the target
                if a is not first and _shape(graph.env[a]) == _shape(graph.env[first]):
                    for one, other in zip(of(first), of(a), strict=True):
                        known.identify(one, other)
        if name in _RESHAPES:
            axes[n] = reshaped(n, out)
        elif name in _VIEWS:
            axes[n] = viewed(n)
        elif name == "stack":
            axes[n] = stacked(n, out)
        elif name == "repeat_interleave":
            axes[n] = repeated(n, out)
        elif dims and len(out) == len(of(n.args[0])) - len(dims):
            axes[n] = [a for d, a in enumerate(of(n.args[0])) if d not in dims]
        else:
            axes[n] = aligned(n, out)
        if are_twice(n, before):
            known.means = before
            beyond.add(n)
            keys.pop(n, None)
    found = {
        n: frozenset(a for a in known.resolve(k) if known.size[a] > 1) for n, k in keys.items()
    }
    atoms = {n: [frozenset(known.resolve(d)) for d in dims] for n, dims in axes.items()}
    return {n: key for n, key in found.items() if key}, beyond, atoms


# --------------------------------------------------------------------------- one unit


def _batched_grad(y, x, cotangents):
    """Rows of the Jacobian; by vmap where torch can, else one at a time."""
    chunks = []
    for part in cotangents.split(256):
        try:
            rows = torch.autograd.grad(
                y, x, part, retain_graph=True, allow_unused=True, is_grads_batched=True
            )[0]
            if rows is None:
                rows = x.new_zeros(len(part), *x.shape)
        except RuntimeError:
            rows = torch.stack(
                [
                    r if r is not None else torch.zeros_like(x)
                    for r in (
                        torch.autograd.grad(y, x, c, retain_graph=True, allow_unused=True)[0]
                        for c in part
                    )
                ]
            )
        chunks.append(rows.reshape(len(part), -1))
    return torch.cat(chunks)


def _as_real(x):
    """A complex tensor as pairs of real numbers."""
    return torch.view_as_real(x) if _is_complex(x) else x


def _is_complex(x):
    return isinstance(x, torch.Tensor) and x.is_complex()


def _pull_back(graph: _Graph, nodes, inputs, outputs, second: bool):
    """Contributions of one unit to each of its inputs: {input: (g, s)}.

    ``outputs`` maps nodes of the unit to their accumulated (g, s).
    """
    result = {}
    for v in inputs:
        leaf = _as_real(graph.env[v].detach()).clone().requires_grad_()
        local: dict = {v: torch.view_as_complex(leaf) if graph.env[v].is_complex() else leaf}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for n in nodes:
                if any(a in local for a in n.all_input_nodes):
                    local[n] = graph.call(n, local)
            ys = [(_as_real(local[o]), gs) for o, gs in outputs.items() if o in local]
            ys = [(y, gs) for y, gs in ys if y.requires_grad]
            if not ys:
                continue
            y = torch.cat([y.reshape(-1) for y, _ in ys])
            g = torch.cat([g.reshape(-1) for _, (g, _) in ys])
            s = torch.cat([s.reshape(-1) for _, (_, s) in ys])
            eye = torch.eye(len(y), dtype=y.dtype)
            jac = _batched_grad(y, leaf, eye)
            g_x, s_x = g @ jac, s @ jac.square()
            if second and g.any():
                (gx,) = torch.autograd.grad(y, leaf, g, create_graph=True, allow_unused=True)
                if gx is not None and gx.requires_grad:
                    gx = gx.reshape(-1)
                    hessian = _batched_grad(gx, leaf, torch.eye(len(gx), dtype=y.dtype))
                    s_x = s_x + hessian.diagonal()
        result[v] = (g_x.reshape(leaf.shape).detach(), s_x.reshape(leaf.shape).detach())
    return result


# --------------------------------------------------------------------------- the recursion


def _recursion(graph: _Graph, seeds: dict, leaves: set, *, second=True, units="region"):
    """Pull (g, s) from the seeded nodes back to the leaves: {leaf: (g, s)}."""
    env = graph.env

    def differentiable(value):
        if isinstance(value, (tuple, list)):
            return any(differentiable(v) for v in value)
        return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())

    active = set(leaves)
    for n in graph.nodes:
        if (
            _op_name(n) not in _STOPS
            and differentiable(env[n])
            and any(a in active for a in n.all_input_nodes)
        ):
            active.add(n)
    nodes = [n for n in graph.nodes if n in active]

    def is_cut(n):
        name = _op_name(n)
        if units == "op":
            return n.target is not operator.getitem
        if _is_global_mean(graph, n):
            return False
        if any(_is_complex(env[a]) for a in (n, *n.all_input_nodes)):
            return True
        return name in _CONTRACTIONS or name in _MIXING or name in _SELECTING

    if units == "region":
        made: dict = {}
        for part in _components([n for n in nodes if not is_cut(n)]):
            made.update(_sum_in_turn(graph, part))
        active.update(made.values())
        nodes = [m for n in nodes for m in ((made[n], n) if n in made else (n,))]

    owner = {}  # of every node that a cut unit covers: the cut and its getitems
    for n in nodes:
        if n.target is operator.getitem and n.args[0] in owner:
            owner[n] = owner[n.args[0]]
        elif is_cut(n):
            owner[n] = n
    members = defaultdict(list)
    for n, c in owner.items():
        members[c].append(n)

    # Levels, from the loss upwards.
    level: dict = {}  # of a cut
    belongs: dict = defaultdict(set)  # of any other node
    users = defaultdict(list)
    for n in nodes:
        for a in n.all_input_nodes:
            users[a].append(n)
    for n in reversed(nodes):
        used = {0} if n in seeds else set()
        for u in users[n]:
            if u in owner and owner[u] is not owner.get(n):
                if owner[u] in level:
                    used.add(level[owner[u]] + 1)
            elif u not in owner:
                used |= belongs[u]
        if n in owner:
            if used:
                c = owner[n]
                level[c] = max(level.get(c, 0), *used)
        else:
            belongs[n] = used

    at: dict = {}  # (node, level) -> [g, s]; level None for cuts and leaves

    def add(node, where, g, s):
        key = (node, None) if node in owner or node in leaves else (node, where)
        if key in at:
            at[key] = (at[key][0] + g, at[key][1] + s)
        else:
            at[key] = (g, s)

    for node, (g, s) in seeds.items():
        if node in active:
            add(node, 0, g, s)

    last = max([0, *level.values(), *(max(b) for b in belongs.values() if b)])
    for here in range(last + 1):
        inside = [n for n in nodes if n not in owner and here in belongs[n]]
        for part in _components(inside):
            for unit in _stages(graph, part, active):
                _run_unit(graph, unit, here, active, at, add, second)
        for c in [c for c in members if level.get(c) == here]:
            _run_unit(graph, members[c], here + 1, active, at, add, second)
    return {leaf: at[leaf, None] for leaf in leaves if (leaf, None) in at}


def _run_unit(graph, unit, where, active, at, add, second):
    own = set(unit)
    outputs = {}
    for n in unit:
        for key in ((n, None), (n, where)):
            if key in at:
                outputs[n] = at[key]
    inputs = dict.fromkeys(
        a for n in unit for a in n.all_input_nodes if a in active and a not in own
    )
    for v, (g, s) in _pull_back(graph, unit, inputs, outputs, second).items():
        add(v, where, g, s)


def _components(nodes):
    """Connected components, each in topological order."""
    parent = {n: n for n in nodes}

    def find(n):
        while parent[n] is not n:
            n = parent[n]
        return n

    for n in nodes:
        for a in n.all_input_nodes:
            if a in parent:
                parent[find(n)] = find(a)
    groups = defaultdict(list)
    for n in nodes:
        groups[find(n)].append(n)
    return list(groups.values())


def _sum_in_turn(graph, part):
    """Let what sums over more than a row sum over that row first, if it follows it.

    ``x.softmax(1).sum()`` is ``x.softmax(1).sum(1).sum()``, of which the inner one is of the row.
    """
    row_keys, _, atoms = _row_keys(graph, part)
    below: dict = {}  # the rows that a node depends on
    made = {}
    for n in part:
        before = set().union(*(below.get(a, ()) for a in n.all_input_nodes))
        key = row_keys.get(n, frozenset())
        below[n] = before | ({key} if key else set())
        inner = max((row for row in before if row < key), key=len, default=None)
        if inner and _op_name(n) in ("sum", "mean"):
            x = n.args[0]
            dims = [d for d, own in enumerate(atoms[x]) if own & inner]
            sums = aten.sum.dim_IntList if _op_name(n) == "sum" else aten.mean.dim
            with n.graph.inserting_before(n):
                made[n] = n.graph.call_function(sums, (x, dims, True))
            graph.env[made[n]] = sums(graph.env[x], dims, True)
            n.replace_input_with(x, made[n])
    return made


def _stages(graph, part, active):
    """Split a component where it reduces along other dimensions; last stage first."""
    users = defaultdict(list)
    for n in part:
        for a in n.all_input_nodes:
            users[a].append(n)
    reducing = {n for n in part if _reduced_dims(graph, n)}
    stages: list[list] = []
    rest = list(part)
    while rest:
        now = _one_stage(graph, rest)
        left = _left_to_later(now, users, reducing, active)
        now = [n for n in now if n not in left] or now
        stages.append(now)
        rest = [n for n in rest if n not in set(now)]
    at = {n: k for k, stage in enumerate(stages) for n in stage}
    for stage in reversed(stages):
        left = _left_to_later(stage, users, reducing, active)
        at.update((n, min(at[u] for u in users[n])) for n in reversed(stage) if n in left)
    by_stage = defaultdict(list)
    for n in part:
        by_stage[at[n]].append(n)
    units = [u for k in sorted(by_stage) for u in _components(by_stage[k])]
    return _widest(graph, units, users)[::-1]


def _widest(graph, units, users):
    """Units whose results only one other takes are one with it, if both reduce along one row."""
    unit_of = {n: unit for unit in units for n in unit}
    for unit in list(units):
        takers = {id(unit_of[u]): unit_of[u] for n in unit for u in users[n]}
        takers.pop(id(unit), None)
        if len(takers) == 1:
            (other,) = takers.values()
            if len(_one_stage(graph, unit + other)) == len(unit + other):
                other[:0] = unit
                unit_of.update(dict.fromkeys(unit, other))
                units = [u for u in units if u is not unit]
    return units


def _one_stage(graph, rest):
    """The nodes up to where another reduction, or an axis for the second time, follows."""
    row_keys, beyond, _ = _row_keys(graph, rest)
    pending, key = set(rest), {}
    for n in rest:
        before = [a for a in n.all_input_nodes if a in pending]
        keys = {row_keys.get(n), *(key.get(a) for a in before)} - {None}
        if n is rest[0] or (n not in beyond and all(a in key for a in before) and len(keys) < 2):
            key[n] = next(iter(keys), None)
    return list(key)


def _left_to_later(nodes, users, reducing, active):
    """What follows the reductions of a stage and only later ones use: they take it instead.

    Not where that parts what meets again: of ``e / e.sum()`` both e and the sum would cross.
    """
    own, above = set(nodes), {}
    for n in nodes:
        above[n] = {n}.union(*(above.get(a, {a}) for a in n.all_input_nodes if a in active))
    left = {n for n in nodes if n not in reducing and users[n] and not _is_part(n)}
    left -= {a for n in nodes if _is_part(n) for a in n.all_input_nodes}
    while True:
        crossing: dict = {}  # the tensors of this stage that a node would take, if left
        for n in nodes:
            found = {b for a in n.all_input_nodes if a in active for b in crossing.get(a, {a})}
            parted = any(
                a is not b and above.get(a, {a}) & above.get(b, {b}) for a in found for b in found
            )
            if n in left and not parted:
                crossing[n] = found
        fewer = {n for n in crossing if all(u in crossing for u in users[n] if u in own)}
        if fewer == left:
            return left
        left = fewer


# --------------------------------------------------------------------------- public


def reference(
    model: nn.Module | Callable,
    loss: Callable | None = None,
    inputs: tuple = (),
    targets: tuple = (),
    kwargs: dict | None = None,
    *,
    method: str = "hesscale",
    units: str = "region",
    seed: int | None = None,
) -> Reference:
    """Loss, gradients and curvature by brute force.

    Results are keyed by ``model.named_parameters()`` (those that require grad) and, for
    floating-point inputs, by their position among ``inputs``. ``seed`` seeds the default
    generator just before the forward runs, so that it draws the masks a plain forward
    after ``torch.manual_seed(seed)`` would; the generator is put back afterwards.
    """
    kwargs = kwargs or {}
    if not isinstance(model, nn.Module):
        fn, model = model, nn.Module()
        model.forward = fn
    with torch.random.fork_rng():

        def build(module, args, kw):
            if seed is not None:
                torch.manual_seed(seed)
            return _Graph(module, args, kw)

        if method == "hesscale":
            joint = _Joint(model, loss, len(targets))
            graph = build(_Flat(joint), (*inputs, *targets), kwargs)
            (out,) = graph.outputs
            value = graph.env[out]
            one = torch.ones_like(value)
            leaves = _leaves(graph, model, inputs)
            found = _recursion(graph, {out: (one, one * 0)}, set(leaves), units=units)
        elif method == "hesscale_gn":
            graph = build(_Flat(model), inputs, kwargs)
            leaves = _leaves(graph, model, inputs)
            values = [graph.env[o] for o in graph.outputs]
            structure = _output_structure(model, inputs, kwargs, seed)

            def tail(*args):
                out = pytree.tree_unflatten(list(args[: len(values)]), structure)
                return loss(out, *args[len(values) :])

            holder = _Flat(tail)
            if isinstance(loss, nn.Module):
                holder.loss = loss
            head = _Graph(holder, (*values, *targets), {})
            (out,) = head.outputs
            value = head.env[out]
            one = torch.ones_like(value)
            tops = {
                n: v
                for n, v in head.leaf_tensor.items()
                if any(v is w for w in values) and v.is_floating_point()
            }
            seeds_at = _recursion(head, {out: (one, one * 0)}, set(tops), units=units)
            seeds: dict = {}
            for node, w in zip(graph.outputs, values, strict=True):
                for top, v in tops.items():
                    if v is w and top in seeds_at:
                        seeds[node] = seeds_at[top]
            found = _recursion(graph, seeds, set(leaves), second=False, units=units)
        else:
            raise ValueError(method)
    grads, hess = {}, {}
    for node, names in leaves.items():
        zero = torch.zeros_like(graph.env[node])
        g, s = found.get(node, (zero, zero))
        for name in names:
            grads[name], hess[name] = g, s
    for name, p in model.named_parameters():
        if p.requires_grad and name not in grads:
            grads[name] = hess[name] = torch.zeros_like(p)
    return Reference(value, grads, hess)


def _output_structure(model, inputs, kwargs, seed):
    with torch.random.fork_rng(), torch.no_grad(), _buffers_kept(model):
        return pytree.tree_structure(model(*inputs, **kwargs))


@contextlib.contextmanager
def _buffers_kept(module):
    before = {n: b.clone() for n, b in module.named_buffers()}
    try:
        yield
    finally:
        for n, b in module.named_buffers():
            b.copy_(before[n])


def _leaves(graph, model, inputs) -> dict:
    """{placeholder: its names}: parameters that require grad, floating-point inputs."""
    named = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    leaves: dict = {}
    taken = set()
    for node, tensor in graph.leaf_tensor.items():
        names = []
        if id(tensor) in named:
            names.append(named[id(tensor)])
        for i, x in enumerate(inputs):
            if isinstance(x, torch.Tensor) and x is tensor and x.is_floating_point():
                names.append(i)
        names = [n for n in names if n not in taken]
        if names:
            taken.update(names)
            leaves[node] = names
    return leaves


def exact_hessian_diagonal(fn: Callable[[], torch.Tensor], params: dict) -> dict:
    """The exact diagonal of d2 fn / d params^2, one Hessian-vector product per entry.

    ``fn`` reads the tensors in ``params``, which must require grad.
    """
    diagonal = {}
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        loss = fn()
        for name, p in params.items():
            (g,) = torch.autograd.grad(
                loss, p, create_graph=True, allow_unused=True, materialize_grads=True
            )
            if not g.requires_grad:
                diagonal[name] = torch.zeros_like(p)
                continue
            eye = torch.eye(p.numel(), dtype=p.dtype)
            diagonal[name] = (
                _batched_grad(g.reshape(-1), p, eye).diagonal().reshape(p.shape).detach().clone()
            )
    return diagonal


def autograd(model, loss, inputs=(), targets=(), kwargs=None, seed=None):
    """Loss and gradients by plain autograd: {name: grad}, zeros where unreached."""
    if seed is not None:
        torch.manual_seed(seed)
    out = model(*inputs, **(kwargs or {}))
    value = out if loss is None else loss(out, *targets)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        value, list(params.values()), allow_unused=True, materialize_grads=True
    )
    return value.detach(), dict(zip(params, grads, strict=True))
