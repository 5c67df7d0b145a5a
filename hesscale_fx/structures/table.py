"""The table: which structure the Jacobian of an operator has.

An operator is known if it is pointwise (PyTorch's own tag), a view, a reduction, has a definition
in definitions.py, or stands here. All others are decomposed by PyTorch's formulas at capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures import definitions, recurrent  # noqa: F401  (registers definitions)
from hesscale_fx.structures.bag import EmbeddingBag, written_out
from hesscale_fx.structures.base import Call, Structure, widen
from hesscale_fx.structures.contraction import Contraction, Trilinear, trilinear
from hesscale_fx.structures.ctc import CTC, recursion
from hesscale_fx.structures.selection import (
    ManyToOne,
    ScaledSelection,
    Selection,
    Separable,
)

aten = torch.ops.aten


def packets(*names: str) -> list[Any]:
    """The overloads of the named ATen operators that this version of torch has.

    Those that are functions of tensors: no out-variants, and none of lists or strings.
    """
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, o) for o in packet.overloads()]
    return [op for op in found if is_function_of_tensors(op)]


def is_function_of_tensors(op: Any) -> bool:
    schema = op._schema
    takes_tensor = any("Tensor" in str(a.type) for a in schema.arguments)
    # Written out by every trace: TorchScript's spelling of lists of optional tensors.
    return takes_tensor and not schema.is_mutable and not op._overloadname.endswith("hacked_twin")


SELECTION = packets(
    # indexing
    "slice", "select", "index_select", "gather", "take", "take_along_dim",
    "slice_scatter", "select_scatter", "diagonal", "diagonal_scatter", "diag_embed", "triu",
    "tril", "unfold", "as_strided", "masked_select", "masked_scatter", "scatter_add",
    "index_put", "_unsafe_index", "_unsafe_index_put", "index_copy", "index_fill", "put", "trace",
    "unbind", "split_with_sizes", "_unsafe_masked_index",
    "_unsafe_masked_index_put_accumulate", "embedding",
    # rearranging
    "cat", "stack", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "repeat",
    "roll", "flip", "rot90", "im2col", "col2im", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    # choosing
    "sort", "topk", "kthvalue", "mode", "cummax", "cummin",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d",
    "max_unpool3d",
    # adding
    "cumsum",
)  # fmt: skip
# Scatter's reductions have no derivative.
SELECTION += [
    aten.index.Tensor, aten.split.Tensor, aten.scatter.src, aten.scatter.value,
    aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor, aten.median.dim,
    aten.nanmedian.dim,
]  # fmt: skip

CONTRACTION = [
    aten.mm.default, aten.bmm.default, *packets("mv"),
]  # fmt: skip
# Linear in each entry of their one operand, so the same rule holds.
MULTILINEAR = packets("prod", "cumprod")

# Unlike along one dimension, the median of all shares its derivative among ties.
MANY_TO_ONE = [
    *packets("nll_loss_forward", "nll_loss2d_forward"), aten.median.default, aten.nanmedian.default,
]  # fmt: skip
# As a maximum here does.
TIES = packets("scatter_reduce")


def pool_scale(call: Call) -> Tensor:
    """One over the divisor of each window: its average of ones over its number of entries."""
    leaves = list(call.leaves)
    (position,) = call.active
    leaves[position] = torch.ones_like(widen(leaves[position]))
    average = call.run(leaves)[0]
    args = list(torch.utils._pytree.tree_unflatten(leaves, call.spec)[0])
    args += [[], 0, False, True, None][len(args) - 2 :] if len(args) < 7 else []
    args[6] = 1
    return average / call.op(*args)


def reduces_linearly(args: tuple, kwargs: dict[str, Any]) -> bool:
    return (args[4] if len(args) > 4 else kwargs["reduce"]) in ("sum", "mean", "amax", "amin")


SCALED = {op: ScaledSelection(pool_scale) for op in packets("avg_pool2d", "avg_pool3d")}
SEPARABLE = {
    **{op: Separable(1) for op in packets("upsample_linear1d")},
    **{
        op: Separable(2)
        for op in packets(
            "_adaptive_avg_pool2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
        )
    },
    # Every trace writes out their other overload.
    aten.upsample_bilinear2d.vec: Separable(2),
    aten.upsample_bicubic2d.vec: Separable(2),
    **{op: Separable(3) for op in packets("_adaptive_avg_pool3d", "upsample_trilinear3d")},
}  # fmt: skip

# One of ours, and one that torch cannot trace with symbolic sizes.
IMPLEMENTATIONS: dict[Any, Callable] = {
    torch.ops.hesscale_fx.ctc_loss.default: recursion,
    aten._trilinear.default: trilinear,
}
TWINS: dict[Any, Callable] = {aten.embedding_bag.padding_idx: written_out}

TABLE: dict[Any, Structure] = {
    **{op: Selection() for op in SELECTION},
    **{op: Contraction() for op in CONTRACTION},
    **{op: Contraction(bias_dim=-1) for op in packets("linear")},
    **{op: Contraction(bias_dim=1) for op in packets("convolution")},
    **{op: Contraction(in_each=False) for op in MULTILINEAR},
    **{op: ManyToOne() for op in MANY_TO_ONE},
    **{op: ManyToOne(accepts=reduces_linearly) for op in TIES},
    aten._trilinear.default: Trilinear(),
    aten.embedding_bag.padding_idx: EmbeddingBag(),
    torch.ops.hesscale_fx.ctc_loss.default: CTC(),
    **SCALED,
    **SEPARABLE,
}

# Bijections of elements and broadcasts: regions see through them.
VIEWS = {
    *packets(
        "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
        "_reshape_alias",
    ),
    aten.view.default,
}  # fmt: skip
# Identities in value: they change memory or dtype only.
IDENTITIES = set(packets("clone", "_to_copy", "alias"))
REDUCTIONS = {
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default,
    aten.amin.default, aten.max.default, aten.min.default,
}  # fmt: skip
# Pointwise in fact, though without the tag.
POINTWISE = {
    aten.masked_fill.Scalar, aten.where.self, aten.where.Scalar, aten.where.ScalarSelf,
    aten.where.ScalarOther, *packets("rsub"),
}  # fmt: skip

# Of the pointwise: jointly linear in their differentiated operands, and 0/1 in each alone.
LINEAR_POINTWISE = set(packets("add", "sub", "neg", "rsub", "where", "masked_fill", "positive"))
PRODUCTS = set(packets("mul", "div"))  # linear if only the first operand is differentiated


# What they return does not depend on the values of their operands.
CONSTANT = set(
    packets(
        "detach", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
        "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "bernoulli",
        "multinomial", "sym_size", "item", "_local_scalar_dense",
    )
)  # fmt: skip


def is_pointwise(op: Any) -> bool:
    if op in CONSTANT:
        return False
    if op in IDENTITIES or op in POINTWISE:
        return True
    return torch.Tag.pointwise in getattr(op, "tags", ()) and op not in TABLE


def definition_of(op: Any, args: tuple = (), kwargs: Any = None) -> Callable | None:
    """An operator written out; asked with the arguments of a call where not all have one."""
    accepts = definitions.ACCEPTS.get(op)
    if accepts is not None and args and not accepts(*args, **(kwargs or {})):
        return None
    return definitions.DEFINITIONS.get(op)


def definitions_for_capture() -> dict[Any, Callable]:
    return dict(definitions.AT_CAPTURE)


def implementation_of(op: Any) -> Callable:
    """What an emitted graph holds of an operator, which is the operator unless it stands here."""
    return IMPLEMENTATIONS.get(op, op)


def differentiable(op: Any) -> Callable:
    """The operator, or its like in plain torch if autograd cannot differentiate it twice."""
    return TWINS.get(op) or implementation_of(op)


def is_region(op: Any) -> bool:
    """Whether the operator may be part of a region (design: pointwise, reductions, views)."""
    return op in VIEWS or op in REDUCTIONS or is_pointwise(op)


def structure_of(op: Any, args: tuple = (), kwargs: Any = None) -> Structure | None:
    """The structure of a call of an operator that is a unit of its own, or None."""
    # A view that regions cannot see through, its sizes having no common factors.
    structure = Selection() if op in VIEWS else TABLE.get(op)
    accepts = getattr(structure, "accepts", None)
    return structure if accepts is None or accepts(args, kwargs or {}) else None


def is_known(op: Any) -> bool:
    return op in TABLE or definition_of(op) is not None or is_region(op) or op in CONSTANT


NAMED: dict[str, Structure] = {
    "selection": Selection(),
    "scaled selection": ManyToOne(),
    "contraction": Contraction(),
}
