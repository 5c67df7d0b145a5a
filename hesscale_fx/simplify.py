"""Algebra on an fx graph of ATen calls: constants zero and one, common subexpressions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}
ONES = {aten.ones_like.default, aten.ones.default, aten.new_ones.default}
FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
# Zero in, zero out (in every tensor operand, or in the only one).
KEEP_ALL = {
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.view.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.sum.dim_IntList,
    aten.sum.default, aten.mean.dim, aten.mean.default,
    aten._to_copy.default, aten.detach.default, aten.clone.default, aten.reshape.default,
    aten._unsafe_view.default, aten.mul.Scalar, aten.div.Scalar, aten.alias.default,
    aten.slice.Tensor, aten.select.int, aten.abs.default, aten.sgn.default, aten.square.default,
}  # fmt: skip
KEEP_ONE = {
    aten.expand.default, aten.view.default, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.detach.default, aten._to_copy.default,
    aten.clone.default, aten.reshape.default, aten._unsafe_view.default, aten.t.default,
    aten.alias.default, aten.squeeze.dims,
}  # fmt: skip
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
FUSED = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}
# Their second argument is a dimension or several.
DIMS_SECOND = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten._softmax.default, aten._log_softmax.default,
}  # fmt: skip
PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default}
# Backward kernels that are linear in their first operand.
LINEAR_FIRST = {
    aten.div.Tensor, aten.threshold_backward.default, aten.tanh_backward.default,
    aten.sigmoid_backward.default, aten.gelu_backward.default, aten.silu_backward.default,
    aten.masked_fill.Scalar, aten.embedding_dense_backward.default, aten.slice_backward.default,
    aten.select_backward.default, aten.hardtanh_backward.default, aten.leaky_relu_backward.default,
}  # fmt: skip


class Constants:
    """Remembers which nodes are zero, or one, everywhere and for every input."""

    def __init__(self) -> None:
        self._zero: dict[fx.Node, bool] = {}
        self._one: dict[fx.Node, bool] = {}

    def is_zero(self, value: Any) -> bool:
        return self._remember(self._zero, value, 0, self._zero_call)

    def is_one(self, value: Any) -> bool:
        return self._remember(self._one, value, 1, self._one_call)

    def _remember(self, memo: dict, value: Any, number: int, rule: Callable) -> bool:
        if not isinstance(value, fx.Node):
            return isinstance(value, (int, float)) and value == number
        if value not in memo:
            memo[value] = value.op == "call_function" and rule(value)
        return memo[value]

    def _zero_call(self, node: fx.Node) -> bool:
        target, args = node.target, node.args
        if target in ZEROS:
            return True
        if target in FULL:
            fill = args[FULL[target]]
            return isinstance(fill, (int, float)) and fill == 0
        if target is aten.masked_fill.Scalar:
            return self.is_zero(args[0]) and self.is_zero(args[2])
        if target is aten.where.self:
            return self.is_zero(args[1]) and self.is_zero(args[2])
        if target in PRODUCTS:
            return self.is_zero(args[0]) or self.is_zero(args[1])
        if target is aten.mul.Scalar:
            return self.is_zero(args[0]) or self.is_zero(args[1])
        if target in KEEP_ALL:
            return all(self.is_zero(a) for a in node.all_input_nodes if is_tensor(a)) and (
                target not in (aten.add.Tensor, aten.sub.Tensor) or self.is_zero(args[1])
            )
        return target in LINEAR_FIRST and self.is_zero(args[0])

    def _one_call(self, node: fx.Node) -> bool:
        target, args = node.target, node.args
        if target in ONES:
            return True
        if target in FULL:
            fill = args[FULL[target]]
            return isinstance(fill, (int, float)) and fill == 1
        if target is aten.mul.Tensor:
            return self.is_one(args[0]) and self.is_one(args[1])
        if target is aten.pow.Tensor_Scalar:
            return self.is_zero(args[1])
        return target in KEEP_ONE and self.is_one(args[0])


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def same_type(a: fx.Node, b: fx.Node) -> bool:
    """Whether one may stand for the other: shape (symbols included), dtype and device."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    return x.dtype == y.dtype and x.device == y.device and sizes(a) == sizes(b)


def is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def functionalize(graph: fx.Graph) -> None:
    """Replace writes into temporaries, which autograd's formulas make, by functional calls."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        functional = functional_overload(node.target) if is_write(node) else None
        x: Any = node.args[0] if node.args else None
        if functional is None or x.op == "placeholder" or (is_view(x) and not is_write(x)):
            continue
        if any(is_view(u) and not is_write(u) for u in x.users):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(functional, node.args, node.kwargs)
        made.meta.update(node.meta)
        order[made] = order[node]
        later = [u for u in x.users if order[u] > order[node]]
        for user in later:
            user.replace_input_with(x, made)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def functional_overload(target: Any) -> Any:
    """``aten.add_.Scalar`` -> ``aten.add.Scalar``, or None."""
    name = getattr(getattr(target, "_schema", None), "name", "").removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[:-1], None)
    wanted = [str(a.type) for a in target._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if [str(a.type) for a in found._schema.arguments] == wanted:
            return found
    return None


def written_to(graph: fx.Graph) -> set[fx.Node]:
    """Temporaries that are written into all the same, with what is a view of what is written.

    Two of them that are equal when made must not become one: both writes would reach it. Buffers
    are written after everything else.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        written: Any = node.args[0] if is_write(node) else None
        while isinstance(written, fx.Node) and written not in found and written.op != "get_attr":
            found.add(written)
            written = written.args[0] if is_view(written) and written.args else None
    return found


def simplify(graph: fx.Graph, generated: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Fold and merge; forward nodes may serve for generated ones, never the other way round.

    Returns:
        The nodes that moved forward, each with the first node that needs it there.
    """
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # Strides at run time need not be those that the tracer saw.
            node.target = aten.reshape.default
        elif node.target is aten.sym_numel.default:
            expand_numel(graph, node)
    constants = Constants()
    seen: dict[Any, fx.Node] = {}
    written = written_to(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if node in generated:
            shorten(node, written)
        replacement = fold(node, constants) if node in generated else None
        if replacement is None and node in generated:
            accumulate(graph, node)
            multiply_and_add(node)
        if replacement is None:
            keeps = written.isdisjoint([node, *node.all_input_nodes])
            replacement = merge(node, seen) if keeps and can_merge(node) else None
        if replacement is not None and replacement is not node:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    moved = {}
    for node in [n for n in graph.nodes if n in generated]:
        square = share_square(node)
        if square is not None:
            moved[square] = node
    graph.eliminate_dead_code()
    return moved


def expand_numel(graph: fx.Graph, node: fx.Node) -> None:
    """Sizes one by one, which torch.compile knows."""
    (x,) = node.args
    product: Any = 1
    value: Any = 1
    with graph.inserting_before(node):
        for dim, size in enumerate(x.meta["val"].shape):  # type: ignore[union-attr]
            factor: Any = size
            value = value * size
            if not isinstance(size, int):
                factor = graph.call_function(aten.sym_size.int, (x, dim))
                factor.meta["val"] = size
            if isinstance(product, int) and isinstance(factor, int):
                product = product * factor
            elif product == 1:
                product = factor
            else:
                product = graph.call_function(operator.mul, (product, factor))
                product.meta["val"] = value
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def merge_equal(graph: fx.Graph) -> None:
    """Calls of the same operator on the same operands are one."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and can_merge(node):
            first = merge(node, seen)
            if first is not None and first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def shorten(node: fx.Node, written: set[fx.Node]) -> None:
    """Let a view be one of what it is a view of a view of, unless any of them is written to."""
    args: Any = node.args
    first = args[0] if args else None
    if not isinstance(first, fx.Node):
        return
    if not written.isdisjoint([node, first, *first.all_input_nodes]):
        return
    inner: Any = first.args
    if node.target in TRANSPOSES and first.target in TRANSPOSES:
        order = permutation(first)
        node.args = (inner[0], [order[d] for d in permutation(node)])
        node.target = aten.permute.default
    # Whether a reshape copies depends on strides, and what others read must not be copied twice.
    elif node.target is aten.reshape.default and len(first.users) == 1:
        if first.target is aten.reshape.default:
            node.update_arg(0, inner[0])
        elif first.target is aten.sum.dim_IntList and inner[2:] == (True,) and not first.kwargs:
            shape = sizes(inner[0])
            summed = {d % max(1, len(shape)) for d in inner[1] or range(len(shape))}
            if sizes(node) == [s for d, s in enumerate(shape) if d not in summed]:
                node.target, node.args = first.target, inner[:2]


def permutation(node: fx.Node) -> list[int]:
    """Which dimension of its operand each of a transposed tensor is."""
    args: Any = node.args
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        return [d % rank for d in args[1]]
    order = list(range(rank))
    if rank > 1:
        a, b = args[1:] if node.target is aten.transpose.int else (0, 1)
        order[a], order[b] = order[b], order[a]
    return order


def sizes(node: Any) -> list[str]:
    """Of each dimension, symbols by name."""
    return [str(s) for s in node.meta["val"].shape]


def fold(node: fx.Node, constants: Constants) -> fx.Node | None:
    """A simpler node of the same value, or None."""
    target, args = node.target, node.args
    first = args[0] if args else None
    if target in (aten.detach.default, aten.alias.default):
        return first  # type: ignore[return-value]
    if not isinstance(first, fx.Node):
        return None
    second = args[1] if len(args) > 1 else None
    candidate: Any = None
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        if constants.is_one(second):
            candidate = first
        elif constants.is_one(first):
            candidate = second
    elif target is aten.add.Tensor and not node.kwargs:
        if constants.is_zero(second):
            candidate = first
        elif constants.is_zero(first):
            candidate = second
    elif target in (aten.sub.Tensor, aten.div.Tensor, aten.div.Scalar):
        unit = constants.is_zero if target is aten.sub.Tensor else constants.is_one
        candidate = first if unit(second) and not node.kwargs else None
    elif target in (
        aten.reshape.default,
        aten.expand.default,
        aten.sum.dim_IntList,
        aten.clone.default,
        aten._to_copy.default,
    ):
        # A copy may be there to give a kernel that reads memory in order what it needs.
        copies = target is aten.clone.default and not same_strides(node, first)
        candidate = first if not copies and same_layout(node, first) else None
    elif target is aten.neg.default and first.target is target:
        candidate = first.args[0]
    elif target in TRANSPOSES:
        candidate = first if permutation(node) == list(range(node.meta["val"].dim())) else None
    elif target is aten.pow.Tensor_Scalar and second == 1:
        candidate = first
    if isinstance(candidate, fx.Node) and same_type(candidate, node):
        return candidate
    return None


def accumulate(graph: fx.Graph, node: fx.Node) -> None:
    """``a + b @ c`` is one call, which adds while it multiplies."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return
    for a, product in (node.args, node.args[::-1]):
        if (
            isinstance(a, fx.Node)
            and isinstance(product, fx.Node)
            and product.target in FUSED
            and len(product.users) == 1
            and same_type(a, node)
            and same_type(product, node)
        ):
            node.target = FUSED[product.target]
            node.args = (a, *product.args)
            return


def share_square(node: fx.Node) -> fx.Node | None:
    """The square of a reshaped tensor is the reshaped square, where that is needed as well.

    Returns:
        The square, if it had to move before `node`.
    """
    view: Any = node.args[0] if node.target is aten.mul.Tensor else None
    if not isinstance(view, fx.Node) or node.args != (view, view):
        return None
    whole: Any = view.args[0] if view.target is aten.reshape.default else view
    while whole.target is aten.expand.default and same_type(whole, whole.args[0]):
        whole = whole.args[0]
    square = next(
        (u for u in whole.users if u.target is node.target and u.args == (whole, whole)), node
    )
    if square is node or whole is view:
        return None
    moves = node < square
    if moves:
        node.prepend(square)
    node.target, node.args = view.target, (square, *view.args[1:])
    return square if moves else None


def multiply_and_add(node: fx.Node) -> None:
    """``a + b * c`` likewise, for curvature; gradients are left as autograd rounds them."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or len(node.args) != 2:
        return
    if node.meta.get("hesscale_role", "grad") == "grad":
        return
    alpha: Any = node.kwargs.get("alpha", 1)
    sign = 1 if node.target is aten.add.Tensor else -1
    a, product = node.args
    if sign == alpha == 1 and not is_single_product(product, node):
        a, product = product, a
    if not isinstance(alpha, (int, float)) or not is_single_product(product, node):
        return
    operands: list[Any] = [a, *product.args]  # type: ignore[union-attr]
    # With two small operands the kernel falls back to a loop over single elements.
    if (
        all(is_tensor(v) if isinstance(v, fx.Node) else False for v in operands)
        and sum(not same_type(v, node) for v in operands) <= 1
        and len({v.meta["val"].dtype for v in operands}) == 1
    ):
        node.target = aten.addcmul.default
        node.args = tuple(operands)
        node.kwargs = {} if sign * alpha == 1 else {"value": sign * alpha}


def is_single_product(product: Any, node: fx.Node) -> bool:
    return (
        isinstance(product, fx.Node)
        and product.target is aten.mul.Tensor
        and len(product.users) == 1
        and same_type(product, node)
    )


def same_strides(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"].stride(), b.meta["val"].stride()
    return list(map(str, x)) == list(map(str, y))


def same_layout(node: fx.Node, first: fx.Node) -> bool:
    if node.target is aten.sum.dim_IntList:
        dims: Any = node.args[1]
        value = first.meta["val"]
        lengths = [value.shape[d] for d in dims or range(value.dim())] if value.dim() else []
        return all(isinstance(n, int) and n == 1 for n in lengths)
    return same_type(node, first)


def can_merge(node: fx.Node) -> bool:
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or node.is_impure():
        return False
    return not is_write(node)


def merge(node: fx.Node, seen: dict[Any, fx.Node]) -> fx.Node | None:
    """An earlier node with the same call; else remember this one."""
    args = from_the_front(node) if node.target in DIMS_SECOND else node.args
    key: Any = (node.op, node.target, freeze(args), freeze(node.kwargs))
    if node.target is aten.sym_size.int:
        key = ("size", str(node.meta["val"]))  # the same symbol, whatever tensor it is read from
    return seen.setdefault(key, node)


def from_the_front(node: fx.Node) -> tuple:
    """The arguments with dimensions counted from the front, so that -1 and 1 may be the same."""
    x: Any = node.args[0]
    dims: Any = node.args[1]
    rank = x.meta["val"].dim() if isinstance(x, fx.Node) else 0
    if not rank or not isinstance(dims, (int, list, tuple)):
        return node.args
    dims = dims % rank if isinstance(dims, int) else [d % rank for d in dims]
    return (x, dims, *node.args[2:])


def freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, freeze(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    # 1, 1.0 and True are equal but not the same argument.
    return (type(value).__name__, value)
