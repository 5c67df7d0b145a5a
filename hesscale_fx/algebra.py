"""Cheaper curvature by algebra on a template: scalars and broadcasts move outwards.

Derived rules are full of tensors that hold one number (derivatives of a mean), of signs, and of
row statistics repeated along the row before anything is computed with them. Every node is seen
as ``scale * base``, where the base may be smaller than the node and stands for itself repeated.
Products, sums and views pass both on, so that a sign or a factor is applied once, at the end, and
functions of a row statistic are computed once a row. Gradients are left as autograd gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.simplify import FULL, ONES, ZEROS, can_merge, freeze, is_tensor, written_to

aten = torch.ops.aten

UNARY = {
    aten.exp.default, aten.log.default, aten.rsqrt.default, aten.sqrt.default, aten.tanh.default,
    aten.sigmoid.default, aten.reciprocal.default, aten.erf.default, aten.sin.default,
    aten.cos.default, aten.sgn.default, aten.abs.default, aten.log1p.default, aten.expm1.default,
    aten.pow.Tensor_Scalar,
}  # fmt: skip
# Broadcasting functions of two tensors that are not linear.
BINARY = {
    aten.eq.Tensor, aten.ne.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor,
    aten.maximum.default, aten.minimum.default,
}  # fmt: skip
RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
VIEWS = {
    *RESHAPES, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.clone.default,
}  # fmt: skip
# Linear in their first operand, which has the shape of the result.
KERNELS = {
    aten.threshold_backward.default, aten.tanh_backward.default, aten.sigmoid_backward.default,
    aten.gelu_backward.default, aten.hardtanh_backward.default, aten.leaky_relu_backward.default,
    aten.silu_backward.default, aten.masked_fill.Scalar,
}  # fmt: skip
MASKS = {
    aten.threshold_backward.default, aten.hardtanh_backward.default, aten.masked_fill.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A node's value: ``scale * base``, or the number `scale` everywhere if there is no base."""

    base: fx.Node | None
    scale: float = 1.0


def simplify_template(graph: fx.Graph, fake_mode: Any) -> None:
    """Rewrite the nodes of a traced rule that belong to curvature."""
    Algebra(graph, fake_mode).run()


class Algebra:
    """One pass over one template, in order."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self._graph = graph
        self._fake_mode = fake_mode
        self._fixed = written_to(graph)
        self._form: dict[fx.Node, Form] = {}
        self._whole: dict[fx.Node, fx.Node] = {}  # node -> what computes its whole value
        self._known: dict[Any, fx.Node] = {}
        self._sizes: dict[str, tuple[fx.Node, int]] = {}  # symbolic size -> where it is found
        self._number: dict[fx.Node, int] = {}
        self._at: fx.Node | None = None

    def run(self) -> None:
        if any(map(is_curvature, self._graph.nodes)):
            for node in list(self._graph.nodes):
                self._visit(node)
            self._graph.eliminate_dead_code()

    def _visit(self, node: fx.Node) -> None:
        self._at = node
        if node.op == "placeholder" and is_tensor(node):
            for dim, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, int):
                    self._sizes.setdefault(str(size), (node, dim))
        fixed = node in self._fixed or any(a in self._fixed for a in node.all_input_nodes)
        if node.op == "output" or (node.op == "call_function" and not fixed):
            rule = self._rule(node)
            form = rule(node, *node.args) if rule is not None and is_plain(node) else None
            if form is not None and fits(form, node):
                self._form[node] = form
                return
            if node.op == "output" or (not fixed and is_curvature(node)):
                self._use_whole(node)

    def _rule(self, node: fx.Node) -> Callable[..., Form | None] | None:
        if not is_curvature(node) or node.kwargs.keys() - ALLOWED:
            return None
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return None  # an index has no factor that is a fraction
        target: Any = node.target
        if target in RULES:
            return getattr(self, RULES[target])
        for targets, name in GROUPS:
            if target in targets:
                return getattr(self, name)
        return None

    # --- forms ----------------------------------------------------------------------------------

    def _of(self, node: Any) -> Form:
        """Of an operand; of a number the number."""
        if isinstance(node, (int, float)):
            return Form(None, float(node))
        return self._form.get(node, Form(node))

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """An earlier call of the same, or a new one before the node that is visited."""
        key = (target, freeze(args), freeze(kwargs))
        if key not in self._known:
            assert self._at is not None
            if (target, args, kwargs) == (self._at.target, self._at.args, dict(self._at.kwargs)):
                self._known[key] = self._at
                return self._at
            with self._graph.inserting_before(self._at):
                made = self._graph.call_function(target, args, kwargs)
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self._fake_mode, torch.no_grad():
                made.meta["val"] = target(*values[0], **values[1])
            made.meta["hesscale_role"] = self._at.meta.get("hesscale_role", "hess")
            self._known[key] = made
        return self._known[key]

    def _commutative(self, target: Any, x: fx.Node, y: fx.Node) -> fx.Node:
        first, second = sorted((x, y), key=lambda n: self._number.setdefault(n, len(self._number)))
        return self._call(target, first, second)

    def _scaled(self, form: Form) -> Any:
        """The value with its scale, in the shape of its base; a number if it has none."""
        if form.base is None or form.scale == 1:
            return form.scale if form.base is None else form.base
        if form.scale == -1:
            return self._call(aten.neg.default, form.base)
        return self._call(aten.mul.Tensor, form.base, form.scale)

    def _use_whole(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            whole = self._make_whole(operand)
            if whole is not operand:
                node.replace_input_with(operand, whole)

    def _make_whole(self, node: fx.Node) -> fx.Node:
        """What computes the node's value in its own shape."""
        form = self._form.get(node)
        if form is None or form.base is None:
            return node
        if node not in self._whole:
            value = self._scaled(form)
            shape = node.meta["val"].shape
            if not same_shape(value.meta["val"].shape, shape):
                sizes = [self._size(s) for s in shape]
                if any(s is None for s in sizes):
                    return node
                value = self._call(aten.expand.default, value, sizes)
            self._whole[node] = value
        return self._whole[node]

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        found = self._sizes.get(str(size))
        return None if found is None else self._call(aten.sym_size.int, *found)

    # --- rules ----------------------------------------------------------------------------------

    def _fill(self, node: fx.Node, *args: Any) -> Form | None:
        if node.target in ZEROS:
            return Form(None, 0.0)
        if node.target in ONES:
            return Form(None, 1.0)
        fill = args[FULL[node.target]]  # type: ignore[index]
        return Form(None, float(fill)) if isinstance(fill, (int, float)) else None

    def _same(self, node: fx.Node, x: fx.Node) -> Form:
        return self._of(x)

    def _neg(self, node: fx.Node, x: Any) -> Form:
        form = self._of(x)
        return Form(form.base, -form.scale)

    def _by_size(self, node: fx.Node, x: Any, y: Any) -> Form | None:
        """A product or quotient with a symbolic size."""
        a = self._of(x)
        if not_tensor(x) or a.base is None:
            return None
        return Form(self._call(node.target, a.base, y), a.scale)

    def _mul(self, node: fx.Node, x: Any, y: Any) -> Form | None:
        if not_tensor(x) or not_tensor(y):
            return self._by_size(node, x, y)
        a, b = self._of(x), self._of(y)
        scale = a.scale * b.scale
        if scale == 0:
            return Form(None, 0.0)
        if a.base is None or b.base is None:
            return Form(b.base if a.base is None else a.base, scale)
        if a.base is b.base and self._is_mask(a.base):
            return Form(a.base, scale)
        for mask, other in ((a.base, b.base), (b.base, a.base)):
            # The mask of a relu times s is the relu's kernel at s.
            if self._is_mask(mask) and same_type(mask, other):
                return Form(self._call(mask.target, other, *mask.args[1:]), scale)
        return Form(self._commutative(aten.mul.Tensor, a.base, b.base), scale)

    def _is_mask(self, node: fx.Node) -> bool:
        """Whether every entry is 0 or 1, made by a kernel at ones."""
        return (
            node.target in MASKS
            and is_linear_kernel(node)
            and self._of(node.args[0]) == Form(None, 1.0)
        )

    def _div(self, node: fx.Node, x: Any, y: Any) -> Form | None:
        if not_tensor(x) or not_tensor(y):
            return self._by_size(node, x, y)
        a, b = self._of(x), self._of(y)
        if b.scale == 0:
            return None
        scale = a.scale / b.scale
        if b.base is None:
            return Form(a.base, scale)
        if a.base is None:
            return Form(self._call(aten.reciprocal.default, b.base), scale)
        return Form(self._call(aten.div.Tensor, a.base, b.base), scale)

    def _add(self, node: fx.Node, x: Any, y: Any, sign: int = 1) -> Form | None:
        a, b = self._of(x), self._of(y)
        alpha: Any = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or not_tensor(x) or not_tensor(y):
            return None
        b = Form(b.base, b.scale * alpha * sign)
        if a.base is b.base:
            return Form(a.base if a.scale + b.scale else None, a.scale + b.scale)
        if a.base is None:
            a, b = b, a
        if b.base is None:
            if b.scale == 0:
                return a
            return Form(self._call(aten.add.Tensor, self._scaled(a), b.scale))
        if b.scale == 1 or a.scale < 0 < b.scale:
            a, b = b, a
        assert a.base is not None and b.base is not None
        ratio = b.scale / a.scale if a.scale else None
        if ratio is None:
            return None
        if ratio == 1:
            return Form(self._commutative(aten.add.Tensor, a.base, b.base), a.scale)
        if ratio == -1:
            return Form(self._call(aten.sub.Tensor, a.base, b.base), a.scale)
        return Form(self._call(aten.add.Tensor, a.base, b.base, alpha=ratio), a.scale)

    def _sub(self, node: fx.Node, x: Any, y: Any) -> Form | None:
        return self._add(node, x, y, sign=-1)

    def _rsub(self, node: fx.Node, x: Any, y: Any, alpha: Any = 1) -> Form | None:
        return self._add(node, y, x, sign=-1) if alpha == 1 else None

    def _sum(self, node: fx.Node, x: fx.Node, dims: Any = None, keepdim: bool = False) -> Any:
        form, shape = self._of(x), x.meta["val"].shape
        if not dims or not shape:
            return None
        wanted = [d % len(shape) for d in dims]
        have: Any = [1] * len(shape) if form.base is None else form.base.meta["val"].shape
        scale, left = form.scale, []
        for d in wanted:
            if is_one(have[d]) and not is_one(shape[d]):
                if not isinstance(shape[d], int):
                    return None
                scale *= shape[d]
            elif not is_one(shape[d]) or not keepdim:
                left.append(d)
        if form.base is None:
            return Form(None, scale) if keepdim or not left else None
        if not keepdim and len(left) < len(wanted):
            return None
        if not left:
            return Form(form.base, scale)
        return Form(self._call(aten.sum.dim_IntList, form.base, left, keepdim), scale)

    def _expand(self, node: fx.Node, x: fx.Node, *args: Any) -> Form | None:
        form = self._of(x)
        return form if len(node.meta["val"].shape) == len(x.meta["val"].shape) else None

    def _view(self, node: fx.Node, x: fx.Node, *args: Any) -> Form | None:
        form = self._of(x)
        if form.base is None:
            return form
        if not same_shape(form.base.meta["val"].shape, x.meta["val"].shape):
            return None
        # The base need not have the strides for a view.
        target = aten.reshape.default if node.target in RESHAPES else node.target
        return Form(self._call(target, form.base, *args, **node.kwargs), form.scale)

    def _unary(self, node: fx.Node, x: fx.Node, *args: Any) -> Form | None:
        form = self._of(x)
        if form.base is None:
            return None
        return Form(self._call(node.target, self._scaled(form), *args))

    def _binary(self, node: fx.Node, x: Any, y: Any) -> Form | None:
        a, b = self._of(x), self._of(y)
        if a.base is None or b.base is None:
            return None
        return Form(self._call(node.target, self._scaled(a), self._scaled(b)))

    def _kernel(self, node: fx.Node, x: fx.Node, *args: Any) -> Form | None:
        form = self._of(x)
        if form.base is None or not is_linear_kernel(node) or not same_type(form.base, node):
            return None
        return Form(self._call(node.target, form.base, *args, **node.kwargs), form.scale)


ALLOWED = {"alpha", "pin_memory", "memory_format", "approximate"}
RULES: dict[Any, str] = {
    aten.neg.default: "_neg",
    aten.mul.Tensor: "_mul",
    aten.mul.Scalar: "_mul",
    aten.div.Tensor: "_div",
    aten.div.Scalar: "_div",
    aten.add.Tensor: "_add",
    aten.sub.Tensor: "_sub",
    aten.rsub.Scalar: "_rsub",
    aten.sum.dim_IntList: "_sum",
    aten.expand.default: "_expand",
    aten.detach.default: "_same",
    aten.alias.default: "_same",
}
GROUPS: list[tuple[Any, str]] = [
    ({*ZEROS, *ONES, *FULL}, "_fill"),
    (VIEWS, "_view"),
    (UNARY, "_unary"),
    (BINARY, "_binary"),
    (KERNELS, "_kernel"),
]


def is_curvature(node: fx.Node) -> bool:
    return node.meta.get("hesscale_role", "grad") != "grad"


def is_plain(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point() and can_merge(node)


def not_tensor(value: Any) -> bool:
    """Whether an operand is a symbolic size."""
    return isinstance(value, fx.Node) and not is_tensor(value)


def is_linear_kernel(node: fx.Node) -> bool:
    return node.target is not aten.masked_fill.Scalar or bool(node.args[2] == 0)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def same_shape(a: Any, b: Any) -> bool:
    return [str(s) for s in a] == [str(s) for s in b]


def same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and same_shape(x.shape, y.shape)


def fits(form: Form, node: fx.Node) -> bool:
    """Whether the base, repeated, has the type of the node."""
    value: Tensor = node.meta["val"]
    if form.base is None:
        return value.dtype.is_floating_point
    base = form.base.meta["val"]
    if base.dtype != value.dtype or base.device != value.device or base.dim() != value.dim():
        return False
    return all(is_one(b) or str(b) == str(v) for b, v in zip(base.shape, value.shape, strict=True))
