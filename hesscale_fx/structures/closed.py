"""Closed forms of the derived rule for the row operators that models are full of.

They give what `region.RegionAt` derives from the operator's definition (a test compares them), with
a handful of kernels: the operator's own results, which the forward has computed, stand for the row
statistics. Only a unit that is exactly one such call uses them.

Normalization ``y = w z + b``, ``z = (x - mean) r`` over rows of n entries, with a = s w^2, c = g w:

    dz_k/dx_i = r (delta_ki - m - z_k z_i / n),   m = 1/n
    (J o J)^T s = r^2 [a (1 - 2 m - 2 z^2/n) + m^2 S(a) + 2 m z S(a z)/n + z^2 S(a z^2)/n^2]
    curvature   = -r/n [2 z dL/dx + r S(c z) (1 - m - z^2/n)],   S: sum over the row

and without a mean (rms norm) the same with m = 0.

Softmax ``y = p``, log-softmax with p = exp(y), J = I - 1 p^T:

    softmax:      (J o J)^T s = p^2 (s (1 - 2 p) + S(s p^2)),  curvature = (1 - 2 p) dL/dx
    log-softmax:  (J o J)^T s = s (1 - 2 p) + p^2 S(s),        curvature = (p^2 - p) S(g)

Both terms are computed together, because much of one serves the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from hesscale_fx.structures.base import Call, Tensors, add, mul, widen
from hesscale_fx.structures.persample import split
from hesscale_fx.structures.region import derivative

aten = torch.ops.aten

CLOSED: dict[Any, Callable[[Call], Any]] = {}


def closed_form(*ops: Any) -> Callable:
    def register(rule: Callable[[Call], Any]) -> Callable[[Call], Any]:
        CLOSED.update(dict.fromkeys(ops, rule))
        return rule

    return register


class ClosedForm:
    """Evaluates one call of an operator; subclasses answer for the one output ``y``."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.active = call.active
        args, kwargs = pytree.tree_unflatten([widen(v) for v in call.leaves], call.spec)
        self.prepare(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Compute what both answers use, from the operator's arguments."""

    def both(self, s: Tensor | None, g: Tensor | None) -> dict[int, Tensor | None]:
        """``(J o J)^T s + sum_k g_k d2 y_k / dx^2`` by position among the tensor arguments.

        One of s and g may be None, for zero; what is left out is zero.
        """
        raise NotImplementedError

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self.call.vjp(u)

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self.recursion(s, [None])

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return self.recursion([None], g)

    def recursion(self, s: Tensors, g: Tensors) -> list[Tensor | None]:
        if s[0] is None and g[0] is None:
            return [None] * len(self.active)
        return self._by_operand(self.both(widen(s[0]), widen(g[0])))

    def _by_operand(self, found: dict[int, Any]) -> list[Tensor | None]:
        tensors = [i for i, v in enumerate(self.call.leaves) if isinstance(v, Tensor)]
        return [found.get(tensors.index(i)) for i in self.call.active]

    def slope(self, g: Tensor | None) -> Tensor | None:
        """dL/dx of the first operand, by the operator's own kernel."""
        if g is None or 0 not in self.call.active:
            return None
        return self.call.vjp([g], widen)[self.call.active.index(0)]


class Named(ClosedForm):
    """A pointwise operator of one tensor, by autograd's formulas for it."""

    def prepare(self, x: Tensor, **options: Any) -> None:
        self.x, self.options = x, options

    def both(self, s: Tensor | None, g: Tensor | None) -> dict[int, Tensor | None]:
        x = self.x.detach().requires_grad_()
        with torch.enable_grad():
            first = derivative(self.call.op(x, **self.options), x)
            second = derivative(first, x)
        assert first is not None
        return {0: add(mul(first * first, s), mul(second, g))}


@closed_form(aten.softmax.int, aten._softmax.default)
class Softmax(ClosedForm):
    def prepare(self, x: Tensor, dim: int, dtype: Any = None) -> None:
        self.dim = dim
        self.p = torch.softmax(x, dim)

    def both(self, s: Tensor | None, g: Tensor | None) -> dict[int, Tensor | None]:
        squared = self.p * self.p
        weighted = mul(squared, s)
        bent = add(weighted, self.slope(g))
        assert bent is not None
        bent = bent - 2 * (self.p * bent)
        if weighted is not None:
            bent = bent + squared * weighted.sum(self.dim, keepdim=True)
        return {0: bent}

    def elementwise(self, s: Tensors, g: Tensors) -> list[Tensor | None]:
        """Both terms of the recursion, of ``dp_i/dx_i`` and ``d2 p_i/dx_i^2`` alone."""
        first = self.p - self.p * self.p
        bent = mul(g[0], first - 2 * (self.p * first))
        return [add(mul(s[0], first * first), bent)]


@closed_form(aten.log_softmax.int, aten._log_softmax.default)
class LogSoftmax(ClosedForm):
    def prepare(self, x: Tensor, dim: int, dtype: Any = None) -> None:
        self.dim = dim
        self.p = torch.log_softmax(x, dim).exp()

    def both(self, s: Tensor | None, g: Tensor | None) -> dict[int, Tensor | None]:
        p = self.p
        of_g = None if g is None else g.sum(self.dim, keepdim=True)
        if s is None:
            return {0: mul(p * p - p, of_g)}
        total = s.sum(self.dim, keepdim=True)
        total = total if of_g is None else total + of_g
        inner = p * total - 2 * s
        return {0: s + p * (inner if of_g is None else inner - of_g)}

    def elementwise(self, s: Tensors, g: Tensors) -> list[Tensor | None]:
        """As for the softmax: ``d log p_i/dx_i = 1 - p_i`` and ``-p_i (1 - p_i)``."""
        rest = 1 - self.p
        return [add(mul(s[0], rest * rest), mul(g[0], -(self.p * rest)))]

    def root(self, g: Tensors, signs: Tensor | None) -> list[Tensor | None]:
        """Columns of a square root of ``sum_k g_k d2 y_k/dx^2 = w (diag(p) - p p^T)``.

        With w = -S(g), where it is positive, `S = diag(sqrt p) - p sqrt(p)^T` is one. As S sqrt(p)
        is zero, a reflection Q that takes sqrt(p) to a class m leaves S Q without column m:

            S Q = S - S[:, m] (sqrt p + e_m)^T / (1 + sqrt p_m)

        All of them are (classes - 1, *x.shape), with the last class for m. Combined with random
        signs (k, *x.shape) m is the likeliest class: then two classes that compete have one
        column, and their part no noise.
        """
        if g[0] is None:
            return [None]
        dim = self.dim % self.p.dim()
        scale = (-widen(g[0]).sum(dim, keepdim=True)).clamp(min=0).sqrt()
        half = self.p.sqrt()
        classes = self.p.shape[dim]
        shape = [classes if d == dim else 1 for d in range(self.p.dim())]
        place = torch.arange(classes, device=half.device).reshape(shape)
        likeliest = classes - 1 if signs is None else self.p.argmax(dim, keepdim=True)
        chosen = (place == likeliest).to(half.dtype)
        if signs is None:
            count = classes - 1 if classes > 1 else classes
            eye = torch.eye(classes, dtype=half.dtype, device=half.device)
            signs = eye[:count].reshape(count, *shape)
        axis = half + chosen
        along = (axis * signs).sum(dim + 1, keepdim=True)
        length = 1 + (half * chosen).sum(dim, keepdim=True)
        mixed = half * (signs - axis * (along / length))
        return [scale * (mixed - self.p * mixed.sum(dim + 1, keepdim=True))]


class Normalization(ClosedForm):
    """`z`, `r` and `w` of a call, all broadcastable, and the dimensions of a row.

    `shape`: that of x with rows visible, if it is not its own; `affine`: the dimensions that a
    weight sums over.
    """

    shape: list[Any] | None = None
    centred = True  # whether a mean is subtracted
    rows: list[int]
    affine: list[int]
    whole: Any  # the shape of x
    parameters: Any  # the shape of weight and bias
    z: Tensor
    r: Tensor
    w: Tensor | None

    def _count(self) -> Any:
        n: Any = 1
        for d in self.rows:
            n = n * self.z.shape[d]
        return n

    def _total(self, value: Tensor, weight: Tensor | None) -> Tensor:
        """Sum over the row, weighted."""
        if weight is None:
            return value.sum(self.rows, keepdim=True)
        missing = self.z.dim() - weight.dim()
        varied = [d for d in self.rows if d >= missing and not is_one(weight.shape[d - missing])]
        same = [d for d in self.rows if d not in varied]
        if missing and varied == list(range(missing, self.z.dim())):
            total = value.flatten(missing) @ weight.flatten()
            return total.reshape([*total.shape, *[1] * len(varied)])
        value = value.sum(same, keepdim=True) if same else value
        return (value * weight).sum(varied, keepdim=True) if varied else value * weight

    def _view(self, value: Tensor | None) -> Tensor | None:
        return value if self.shape is None or value is None else value.reshape(self.shape)

    def _parameter(self, value: Tensor) -> Tensor:
        """Of the shape of the weight and bias, from that of z."""
        return value.sum(self.affine).reshape(self.parameters)

    def both(self, s: Tensor | None, g: Tensor | None) -> dict[int, Tensor | None]:
        found: dict[int, Tensor | None] = {}
        s, g, slope = self._view(s), self._view(g), self._view(self.slope(g))
        n, r = self._count(), self.r
        squares = r * r
        # constant + z (linear + z square), each one number a row
        constant = linear = square = direct = None
        if s is not None:
            direct, constant, linear, square = self._of_s(s, n, found)
        if g is not None and slope is not None:
            along = self._total(g * self.z, self.w) / n
            mean = 1 / n if self.centred else 0
            constant, square = add(constant, along * (mean - 1)), add(square, along / n)
        if 0 in self.active:
            inner = add(mul(self.z, mul(square, squares)), mul(linear, squares))
            inner = add(inner, None if slope is None else slope * (r * (-2 / n)))
            total = add(mul(self.z, inner), mul(constant, squares))
            total = add(total, mul(direct, squares))
            found[0] = None if total is None else total.reshape(self.whole)
        return found

    def _of_s(
        self, s: Tensor, n: Any, found: dict[int, Tensor | None]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """What is not a product with the row's z, and the coefficients of those, before r^2."""
        sz = s * self.z
        szz = sz * self.z
        direct = (1 - 2 / n) * s if self.centred else s
        direct = direct - (2 / n) * szz
        w = None
        if self.w is not None:
            found[1], found[2] = self._parameter(szz), self._parameter(s)
            w = self.w * self.w
            direct = direct * w
        square = self._total(szz, w) / n / n
        if not self.centred:
            return direct, None, None, square
        return direct, self._total(s, w) / n / n, self._total(sz, w) / n * (2 / n), square


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def per_row(value: Tensor, shape: Any, rows: list[int]) -> Tensor:
    """Row statistics, broadcastable to x."""
    return value.reshape([1 if d in rows else size for d, size in enumerate(shape)])


@closed_form(aten.layer_norm.default)
class LayerNorm(Normalization):
    def prepare(
        self,
        x: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> None:
        first = x.dim() - len(shape)
        self.rows, self.affine = list(range(first, x.dim())), list(range(first))
        self.whole, self.parameters = x.shape, shape
        _, mean, r = torch.native_layer_norm(x, shape, weight, bias, eps)
        self.r, self.w = per_row(r, x.shape, self.rows), weight
        self.z = (x - per_row(mean, x.shape, self.rows)) * self.r

    def per_sample(self, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
        if u[0] is None or dim in self.rows:
            return [None] * len(self.call.active)
        first = split(widen(u[0]), dim, inner).flatten(1, len(self.affine))
        z = split(self.z, dim, inner).flatten(1, len(self.affine))
        return self._by_operand({1: (first * z).sum(1), 2: first.sum(1)})


@closed_form(aten.group_norm.default)
class GroupNorm(Normalization):
    def prepare(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> None:
        n, c = x.shape[:2]
        self.whole, self.parameters = x.shape, [c]
        self.shape = [n, groups, c // groups, *x.shape[2:]]
        self.rows = list(range(2, len(self.shape)))
        self.affine = [0, *range(3, len(self.shape))]
        area: Any = 1
        for size in x.shape[2:]:
            area = area * size
        x = x.contiguous()
        _, mean, r = torch.native_group_norm(x, weight, bias, n, c, area, groups, eps)
        self.r = per_row(r, self.shape, self.rows)
        self.z = (x.reshape(self.shape) - per_row(mean, self.shape, self.rows)) * self.r
        ones = [1] * (len(self.shape) - 3)
        self.w = None if weight is None else weight.reshape([1, groups, c // groups, *ones])


class BatchNorm(Normalization):
    """With the statistics of the batch; `results` are those of the operator."""

    def _set(self, x: Tensor, weight: Tensor | None, results: Any) -> None:
        self.whole, self.parameters = x.shape, [x.shape[1]]
        self.rows = self.affine = [d for d in range(x.dim()) if d != 1]
        self.r = per_row(results[2], x.shape, self.rows)
        self.z = (x - per_row(results[1], x.shape, self.rows)) * self.r
        self.w = None if weight is None else per_row(weight, x.shape, self.rows)


@closed_form(aten._native_batch_norm_legit_functional.default)
class BatchNormRunning(BatchNorm):
    def prepare(self, x: Tensor, weight: Tensor | None, *rest: Any) -> None:
        results = aten._native_batch_norm_legit_functional(x, weight, *rest)
        self._set(x, weight, results)


@closed_form(aten._native_batch_norm_legit.no_stats)
class BatchNormPlain(BatchNorm):
    def prepare(self, x: Tensor, weight: Tensor | None, *rest: Any) -> None:
        self._set(x, weight, aten._native_batch_norm_legit.no_stats(x, weight, *rest))


def closed_form_of(call: Call, inputs: int) -> ClosedForm | None:
    """The rule of a call that is differentiated in `inputs` tensors, or None if it is derived."""
    rule = CLOSED.get(call.op)
    if rule is None or len(call.active) != inputs:
        return None
    x = call.leaves[0]
    if any(isinstance(v, torch.dtype) and v != x.dtype for v in call.leaves):
        return None  # it converts besides
    if rule is BatchNormRunning and call.leaves[5] is not True:
        return None  # in evaluation a batch norm is pointwise
    made = rule(call)
    if isinstance(made, Normalization) and made.w is None and call.active != [0]:
        return None  # a bias without a weight
    return made
