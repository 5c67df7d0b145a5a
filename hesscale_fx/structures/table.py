"""The table: which structure the Jacobian of an operator has.

An operator is known if it is pointwise (PyTorch's own tag), a view, a reduction, has a definition
in definitions.py, or stands here. All others are decomposed by PyTorch's formulas at capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.structures import (  # noqa: F401  (they register)
    bysize,
    definitions,
    recurrent,
    recurrent_whole,
)
from hesscale_fx.structures.bag import EmbeddingBag, written_out
from hesscale_fx.structures.base import Call, Structure, widen
from hesscale_fx.structures.byindex import index_reduce, scatter_reduce
from hesscale_fx.structures.columns import Columns
from hesscale_fx.structures.contraction import Contraction, Trilinear, trilinear
from hesscale_fx.structures.ctc import CTC, recursion
from hesscale_fx.structures.fourier import DIMENSIONS, HALVES, Transform
from hesscale_fx.structures.lstsq import by_pinv
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
    aten.nanmedian.dim, aten.max_pool2d_with_indices_backward.default,
    aten.as_strided_scatter.default,
]  # fmt: skip

CONTRACTION = [
    aten.mm.default, aten.bmm.default, *packets("mv"),
]  # fmt: skip
# Linear in each entry of their one operand, so the same rule holds.
MULTILINEAR = packets("prod", "cumprod")

# Unlike along one dimension, the median of all shares its derivative among ties.
MANY_TO_ONE = [
    *packets("nll_loss_forward", "nll_loss2d_forward", "frexp"), aten.median.default,
    aten.nanmedian.default,
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


def adds_or_chooses(args: tuple, kwargs: dict[str, Any]) -> bool:
    return args[1] in ("sum", "mean", "max", "min")


def pair_distances(x: Tensor, p: float = 2) -> Tensor:
    """The norms of the differences of all pairs of rows."""
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return definitions.vector_norm(x[i] - x[j], p, 1)


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

# Linear, and dense.
LINEAR_MAPS = packets("stft", "istft", "trapezoid", "trapz", "cumulative_trapezoid")
# Functions of each matrix of a batch.
OF_MATRICES = packets(
    "cholesky", "cholesky_inverse", "cholesky_solve", "linalg_cholesky", "linalg_cholesky_ex",
    "linalg_det", "_linalg_det", "linalg_slogdet", "_linalg_slogdet", "logdet", "slogdet",
    "linalg_inv", "linalg_inv_ex", "inverse", "linalg_eigh", "_linalg_eigh", "linalg_eigvalsh",
    "linalg_eig", "linalg_eigvals", "linalg_svd", "_linalg_svd", "linalg_svdvals", "svd",
    "linalg_pinv", "pinverse", "linalg_matrix_exp", "matrix_exp", "linalg_matrix_power",
    "matrix_power", "linalg_qr", "qr", "linalg_householder_product", "orgqr", "ormqr",
    "linalg_lu", "linalg_lu_factor", "linalg_lu_factor_ex", "lu_unpack", "linalg_lu_solve",
    "lu_solve", "linalg_solve", "linalg_solve_ex", "_linalg_solve_ex",
    "linalg_solve_triangular", "triangular_solve", "linalg_cond", "linalg_matrix_norm",
    "nuclear_norm", "linalg_lstsq", "geqrf", "_lu_with_info",
)  # fmt: skip
# Functions of a whole tensor that no rule of a row or a contraction gives: products of several
# matrices or of one with itself, products by index, differences between all pairs of rows.
OF_TENSORS = packets(
    "linalg_multi_dot", "chain_matmul", "linalg_tensorinv", "linalg_tensorsolve", "cov",
    "corrcoef", "linalg_vander", "logcumsumexp", "quantile", "nanquantile",
    "grid_sampler_2d", "grid_sampler_3d", "renorm",
)  # fmt: skip

# Two of ours, one that torch cannot trace with symbolic sizes, one that it decomposes wrongly.
IMPLEMENTATIONS: dict[Any, Callable] = {
    torch.ops.hesscale_fx.ctc_loss.default: recursion,
    torch.ops.hesscale_fx.lstsq.default: by_pinv,
    aten._trilinear.default: trilinear,
    aten.multilabel_margin_loss.default: definitions.multilabel_margin_loss,
}
TWINS: dict[Any, Callable] = {
    **HALVES,
    aten.embedding_bag.padding_idx: written_out,
    aten.scatter_reduce.two: scatter_reduce,
    aten.index_reduce.default: index_reduce,
}

TABLE: dict[Any, Structure | Transform] = {
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
    torch.ops.hesscale_fx.lstsq.default: Columns(core=2, implementation=by_pinv),
    **SCALED,
    **SEPARABLE,
    **{op: Columns(linear=True, name="linear map") for op in LINEAR_MAPS},
    **{op: Transform(op) for op in DIMENSIONS},
    **{op: Columns(core=2) for op in OF_MATRICES},
    **{op: Columns() for op in OF_TENSORS},
    aten.index_reduce.default: Columns(implementation=index_reduce),
    **{op: Columns(linear=True, accepts=adds_or_chooses) for op in packets("segment_reduce")},
    **{op: Columns(implementation=pair_distances) for op in packets("_pdist_forward")},
    # Linear but for kinks, in each row alone.
    aten.multilabel_margin_loss.default: Columns(
        core=1, linear=True, implementation=definitions.multilabel_margin_loss
    ),
}

# Bijections of elements and broadcasts: regions see through them.
VIEWS = {
    *packets(
        "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
        "_reshape_alias",
    ),
    aten.view.default,
}  # fmt: skip
# Between complex numbers and pairs of real ones.
COMPLEX_SELECTION = {
    aten._to_copy.default, *packets("view_as_real", "view_as_complex", "complex", "real", "imag"),
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
    aten.where.ScalarOther, *packets("rsub", "polar"),
}  # fmt: skip

# Of the pointwise: each output element is one element of an operand, or none.
CHOICES = set(packets("where", "masked_fill"))
# Of the pointwise: jointly linear in their differentiated operands, and 0/1 in each alone.
LINEAR_POINTWISE = set(packets("add", "sub", "neg", "rsub", "where", "masked_fill", "positive"))
PRODUCTS = set(packets("mul", "div"))  # linear if only the first operand is differentiated


# What they return does not depend on the values of their operands.
CONSTANT = set(
    packets(
        "detach", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
        "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "bernoulli",
        "multinomial", "normal", "sym_size", "item", "_local_scalar_dense",
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
    if any_complex((args, kwargs)):
        return None
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
    if not isinstance(op, torch._ops.OpOverload):
        return getattr(op, "structure", None)
    # A view that regions cannot see through, its sizes having no common factors.
    structure = Selection() if op in VIEWS else TABLE.get(op)
    if structure is None and op in COMPLEX_SELECTION:
        return Selection()
    if structure is None and is_pointwise(op):  # between real and complex numbers
        return Columns(core=0)
    if isinstance(structure, Transform):
        return structure.of_call(args, kwargs)
    if any_complex((args, kwargs)) and not isinstance(structure, (Selection, Columns)):
        return complex_structure(op)
    accepts = getattr(structure, "accepts", None)
    if accepts is None or accepts(args, kwargs or {}):
        return structure
    return Columns(implementation=TWINS.get(op))


def any_complex(tree: Any) -> bool:
    """Whether a call has complex numbers among its arguments (values, or nodes of them)."""
    if isinstance(tree, (tuple, list)):
        return any(map(any_complex, tree))
    if isinstance(tree, dict):
        return any(map(any_complex, tree.values()))
    value = tree.meta.get("val", tree) if isinstance(tree, fx.Node) else tree
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex)


def complex_structure(op: Any) -> Structure | None:
    """Of an operator on complex numbers, as pairs of real ones."""
    if op in (aten.sum.default, aten.sum.dim_IntList):
        return Selection()
    if is_pointwise(op):
        return Columns(core=0)
    return Columns() if op in TABLE or op in REDUCTIONS else None


def is_known(op: Any) -> bool:
    known = op in TABLE or op in CONSTANT or op in COMPLEX_SELECTION
    return known or definition_of(op) is not None or is_region(op)


NAMED: dict[str, Structure] = {
    "selection": Selection(),
    "scaled selection": ManyToOne(),
    "contraction": Contraction(),
}
