"""The rule of a region: pointwise functions and reductions along one common set of axes.

Within a row of n entries cut the region at its reductions ``r_j = sum_k psi_j(x_k, r_<j)``. What is
left between them, the outputs ``y`` and the integrands ``psi_j``, is pointwise in the inputs and in
the r_j. With the adjoints ``l_j = dL/dr_j`` the function

    Lambda(x, r) = sum_k g_k y_k(x, r) + sum_j l_j psi_j(x, r)

has the gradient of the loss in x, and the second derivatives of the loss along one entry of an
input v, whose total derivative is (1, C_j) in (v, r_j), are those of a Lagrangian:

    P(v, v) + 2 sum_j P(v, r_j) C_j + sum_jl C_j C_l S(P(r_j, r_l)),    S: sum over the row,
    C_j = d psi_j/dv + sum_{l<j} S(d psi_j/dr_l) C_l,
    P(u, w) = d2 Lambda / du dw              for `curvature`,
              sum_k s_k dy_k/du dy_k/dw      for `squared_vjp`.

All partials are elementwise and come from autograd. The cost is linear in the region, for any
number of reductions; without any, this is the pointwise rule ``a^2 s + a' g``. An input that is
constant along some axes sums P and C over those of the row first, and the result over the others.

One tensor may be read along two axes, as in the differences of all pairs of rows. These readings v
and w are two inputs, and where their indices are equal they are one entry x, which gets twice

    P(v, w) + sum_j (P(v, r_j) C_j^w + P(w, r_j) C_j^v) + sum_jl C_j^v C_l^w S(P(r_j, r_l)).

Every tensor is viewed over the region's atomic axes (see analysis/axes.py), so that nothing here
knows about reshapes or permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.structures import table
from hesscale_fx.structures.base import Tensors, add, mul, or_none, vjp, wide, widen

aten = torch.ops.aten


@dataclass
class Twins:
    """Two inputs of a region that are the same tensor, read along different axes."""

    source: fx.Node
    first: fx.Node
    second: fx.Node
    dims: list[list[int]]  # of the source, by the axes of the first reading
    axes: list[tuple[int, int]]  # of either reading, in the same order


@dataclass
class Region:
    """A set of nodes with one rule, and the axes of the tensors in it."""

    nodes: list[fx.Node]  # in topological order
    inputs: list[fx.Node]  # differentiated
    outputs: list[fx.Node]
    dims: dict[fx.Node, list[list[int]]]  # of every tensor in or entering the region
    order: list[int]  # all atomic axes
    row: set[int]  # the axes that the reductions sum over
    sizes: dict[int, int]  # of the axes whose size is a constant
    # Reductions that cancel: no output changes with them (the maximum in a softmax).
    cancelled: set[fx.Node] = field(default_factory=set)
    # Of their source, which is an input too, no node reads it but through them.
    twins: list[Twins] = field(default_factory=list)
    # The operator, with options, that it is a spelling of.
    named: tuple[Any, dict[str, Any]] | None = None
    # The row function that it is a spelling of (see spelled.py).
    spelled: Any = None

    name: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if any(n.target in table.REDUCTIONS for n in self.nodes):
            self.name = "row"
        elif all(n.target in table.VIEWS or n.target in table.CHOICES for n in self.nodes):
            self.name = "selection"
        else:
            self.name = "diagonal"


def reduction(node: fx.Node) -> tuple[list[int], bool]:
    """The dimensions a reduction sums over, and whether it keeps them."""
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        dim = list(range(rank))
    dims = [dim] if isinstance(dim, int) else list(dim)  # type: ignore[arg-type]
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return [d % max(rank, 1) for d in dims] if rank else [], bool(keepdim)


class Layout:
    """Moves tensors between their own shape and the region's axes."""

    def __init__(self, region: Region, values: Callable[[fx.Node], Tensor]) -> None:
        self.region = region
        self.position = {axis: i for i, axis in enumerate(region.order)}
        self.sizes: dict[int, Any] = dict(region.sizes)
        members = set(region.nodes)
        dims = [
            (dim, size)
            for node, node_dims in region.dims.items()
            for dim, size in zip(
                node_dims,
                (node.meta["val"] if node in members else values(node)).shape,
                strict=True,
            )
        ]
        missing = set(region.order) - set(self.sizes)
        while missing:  # a symbolic size: a whole dimension, or what is left of one
            for dim, size in dims:
                unknown = [a for a in dim if a in missing]
                if len(unknown) == 1:
                    rest = math.prod(self.sizes[a] for a in dim if a not in missing)
                    self.sizes[unknown[0]] = size if rest == 1 else size // rest
                    missing.discard(unknown[0])
                    break
            else:
                raise AssertionError("an axis of unknown size")

    def axes(self, node: fx.Node) -> list[int]:
        return [a for d in self.region.dims[node] for a in d]

    def shape(self, node: fx.Node) -> list[Any]:
        """The node's shape over the region's axes, one where it is constant."""
        own = set(self.axes(node))
        return [self.sizes[a] if a in own else 1 for a in self.region.order]

    def canonical(self, node: fx.Node, value: Tensor) -> Tensor:
        axes = self.axes(node)
        if self._is_plain(node):
            return value
        value = value.reshape([self.sizes[a] for a in axes])
        ranks = sorted(range(len(axes)), key=lambda i: self.position[axes[i]])
        value = value.permute(ranks) if ranks != list(range(len(axes))) else value
        return value.reshape(self.shape(node))

    def native(self, node: fx.Node, value: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        if self._is_plain(node):
            return value
        axes = self.axes(node)
        inner = sorted(axes, key=lambda a: self.position[a])
        value = value.reshape([self.sizes[a] for a in inner])
        ranks = [inner.index(a) for a in axes]
        value = value.permute(ranks) if ranks != list(range(len(axes))) else value
        return value.reshape(node.meta["val"].shape if self._static(node) else self._shape(node))

    def ratio(self, axes: list[int]) -> Any:
        """The number of places along axes."""
        return math.prod([self.sizes[a] for a in axes])

    def merged(self, twins: Twins, value: Tensor) -> Tensor:
        """Where the indices of two readings of a tensor are equal, in the tensor's own shape."""
        for a, b in twins.axes:
            if a == b:
                continue
            i, j = self.position[a], self.position[b]
            shape = list(value.shape)
            shape[i] = shape[j] = self.sizes[a]
            value = value.expand(shape).diagonal(dim1=i, dim2=j)
            value = value.movedim(-1, i - (j < i)).unsqueeze(j)
        axes = [a for a, _ in twins.axes]
        value = value.expand([self.sizes[a] if a in axes else 1 for a in self.region.order])
        inner = sorted(axes, key=lambda a: self.position[a])
        value = value.reshape([self.sizes[a] for a in inner])
        value = value.permute([inner.index(a) for a in axes])
        return value.reshape([self.ratio(d) for d in twins.dims])

    def behind(self, node: fx.Node, value: Tensor) -> Tensor:
        """As `native`, behind one more dimension in front."""
        axes = self.axes(node)
        inner = sorted(axes, key=lambda a: self.position[a])
        value = value.reshape([value.shape[0], *(self.sizes[a] for a in inner)])
        value = value.permute([0, *(1 + inner.index(a) for a in axes)])
        return value.reshape([value.shape[0], *self._shape(node)])

    def _static(self, node: fx.Node) -> bool:
        return all(isinstance(s, int) for s in node.meta["val"].shape)

    def _shape(self, node: fx.Node) -> list[Any]:
        return [math.prod([self.sizes[a] for a in d]) for d in self.region.dims[node]]

    def _is_plain(self, node: fx.Node) -> bool:
        dims = self.region.dims[node]
        return len(dims) == len(self.region.order) and all(
            d in ([], [a]) for d, a in zip(dims, self.region.order, strict=True)
        )

    def sum(self, value: Tensor | None, axes: set[int]) -> Tensor | None:
        """Sum over those of `axes` along which the value is not constant.

        The value may have one more dimension in front.
        """
        if value is None:
            return None
        offset = value.dim() - len(self.position)
        dims = [
            offset + self.position[a]
            for a in axes
            if not same_sizes([value.shape[offset + self.position[a]]], [1])
        ]
        return value.sum(sorted(dims), keepdim=True) if dims else value


@dataclass
class Function:
    """One pointwise function of the cut region: an output, or the integrand of a reduction."""

    node: fx.Node
    is_output: bool
    value: Tensor | None = None
    variables: dict[fx.Node, Tensor] = field(default_factory=dict)
    first: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    second: dict[tuple[fx.Node, fx.Node], Tensor | None] = field(default_factory=dict)


class RegionAt:
    """Evaluates a region's rule; see the module's docstring.

    Args:
        region: the region.
        values: the value of each node that enters the region.
        run: computes the region's outputs, in their own shapes, from those of its inputs; used
            for `vjp`, so that it may call native operators where the region was written with them.
    """

    def __init__(
        self,
        region: Region,
        values: Callable[[fx.Node], Tensor],
        run: Callable[[dict[fx.Node, Tensor]], list[Tensor]],
        layout: Layout | None = None,
    ) -> None:
        self.region = region
        self._values = values
        self._run = run
        self._layout = layout or Layout(region, values)
        self._members = set(region.nodes)
        self._reductions = [n for n in region.nodes if n.target in table.REDUCTIONS]
        self._known: dict[fx.Node, Any] = {}
        self._functions: dict[tuple[fx.Node, bool], Function] = {}
        self._active = self._depends(region.inputs)

    def _depends(self, inputs: list[fx.Node]) -> set[fx.Node]:
        reached = set(inputs)
        for node in self.region.nodes:
            if node in self.region.cancelled or is_constant(node):
                continue
            if any(a in reached for a in node.all_input_nodes):
                reached.add(node)
        return reached

    # --- the three questions ------------------------------------------------------------------

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        inputs = {n: self._values(n).detach().requires_grad_() for n in self.region.inputs}
        with torch.enable_grad():
            outputs = self._run(inputs)
        return vjp(outputs, list(inputs.values()), u)

    def per_sample(self, u: Tensors, dim: int, inner: int) -> list[Tensor | None]:
        """``J^T u`` for each sample; of the one output, `dim` runs over (samples, inner)."""
        (output,) = self.region.outputs
        axes = self.region.dims[output][dim]
        if not axes or self._layout.ratio(axes[1:]) != inner:
            return [None] * len(self.region.inputs)
        weights = self._weights(u)
        return [self._alone(v, weights, axes[0]) for v in self.region.inputs]

    def _alone(
        self, v: fx.Node, weights: list[tuple[Function, Tensor]], axis: int
    ) -> Tensor | None:
        """The derivative for one input, with the axis of the samples in front."""
        absent = self._absent(v)
        if axis not in absent:
            return None
        terms = [mul(self._first(f, v), weight) for f, weight in weights]
        total = self._total([t for t in terms if t is not None], absent - {axis})
        place = self._layout.position[axis]
        if total is None or same_sizes([total.shape[place]], [1]):
            return None
        return self._layout.behind(v, total.movedim(place, 0))

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        weights = [self._canonical_of(n, v) for n, v in zip(self.region.outputs, s, strict=True)]
        if all(w is None for w in weights):
            return [None] * len(self.region.inputs)

        def entries(u: fx.Node, v: fx.Node) -> list[Tensor]:
            found = []
            for node, weight in zip(self.region.outputs, weights, strict=True):
                if weight is not None:
                    f = self._linearized(node, True)
                    if self.region.name == "selection":  # then u is v
                        found.append(_pulled(f.value, f.variables.get(v), weight))
                    else:
                        found.append(mul(self._first(f, u), self._first(f, v), weight))
            return [t for t in found if t is not None]

        return self._diagonal(entries)

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        weights = self._weights(g)

        def entries(u: fx.Node, v: fx.Node) -> list[Tensor]:
            found = [mul(self._second(f, u, v), weight) for f, weight in weights]
            return [t for t in found if t is not None]

        return self._diagonal(entries)

    def _weights(self, g: Tensors) -> list[tuple[Function, Tensor]]:
        """The functions of Lambda, each with its g or its adjoint."""
        outputs = self.region.outputs
        return self._adjoints([self._canonical_of(n, v) for n, v in zip(outputs, g, strict=True)])

    def _adjoints(self, u: Tensors) -> list[tuple[Function, Tensor]]:
        """The same for values over the region's axes, or stacks of such values."""
        weights: list[tuple[Function, Tensor]] = []
        for node, weight in zip(self.region.outputs, u, strict=True):
            if weight is not None:
                weights.append((self._linearized(node, True), weight))
        for node in reversed(self._reductions):
            terms = self._adjoint_terms(node, weights)
            if terms and node in self._active:
                adjoint = self._total(terms, self._absent(node))
                assert adjoint is not None
                weights.append((self._linearized(node, False), adjoint))
        return weights

    def _adjoint_terms(self, node: fx.Node, weights: list[tuple[Function, Tensor]]) -> list[Tensor]:
        """What sums to dL/dr of a reduction, given the weights of all that follows it."""
        terms = [mul(self._first(f, node), weight) for f, weight in weights]
        return [t for t in terms if t is not None]

    def cancels(self, node: fx.Node, g: Tensors, tolerance: float, moved: float) -> bool:
        """Whether dL/dr of a reduction is zero here, though terms of it are not.

        `moved`: added to its value, so that what holds for its value alone does not count: of a row
        of one entry x - max(x) is zero.
        """
        self._known[node] = self._value(node) + moved
        weights = self._weights(g)
        own = [i for i, (f, _) in enumerate(weights) if f.node is node and not f.is_output]
        terms = self._adjoint_terms(node, weights[: own[0]] if own else weights)
        total = self._total(terms, self._absent(node))
        largest = max((t.abs().max().item() for t in terms), default=0.0)
        return total is None or bool(total.abs().max() <= tolerance * largest)

    def _diagonal(self, entries: Callable[[fx.Node, fx.Node], list[Tensor]]) -> list[Tensor | None]:
        """The diagonal for each input, given the elementwise second derivatives P(u, v)."""
        coupling: dict[tuple[fx.Node, fx.Node], Tensor | None] = {}

        def between(a: fx.Node, b: fx.Node) -> Tensor | None:
            if (a, b) not in coupling:
                absent = self._absent(a) & self._absent(b)
                coupling[a, b] = self._total(entries(a, b), absent)
            return coupling[a, b]

        results = []
        for v in self.region.inputs:
            absent = self._absent(v)
            inside, outside = absent & self.region.row, absent - self.region.row
            slopes = self._slopes(v, inside)
            parts = [self._total(entries(v, v), absent)]
            for i, (a, ca) in enumerate(slopes):
                for term in entries(v, a):  # one by one: not all vary along every axis
                    cross = mul(self._layout.sum(term, inside), ca + ca)
                    parts.append(self._layout.sum(cross, outside))
                for b, cb in slopes[: i + 1]:
                    factor = ca if a is b else ca + ca
                    parts.append(self._layout.sum(mul(between(a, b), factor, cb), outside))
            total: Tensor | None = None
            for part in parts:
                total = add(total, or_none(part))
            results.append(None if total is None else self._finish(v, total))
        for twins in self.region.twins:
            position = self.region.inputs.index(twins.source)
            results[position] = add(results[position], self._between(twins, entries, between))
        return results

    def _between(
        self,
        twins: Twins,
        entries: Callable[[fx.Node, fx.Node], list[Tensor]],
        between: Callable[[fx.Node, fx.Node], Tensor | None],
    ) -> Tensor | None:
        """Twice the second derivatives between two readings of a tensor, where these are equal."""
        sides = []
        for node, axes in zip(
            (twins.first, twins.second), zip(*twins.axes, strict=True), strict=True
        ):
            absent = set(self.region.order) - set(axes)
            inside = absent & self.region.row
            sides.append((node, absent, inside, self._slopes(node, inside)))
        (v, without_v, inside_v, slopes_v), (w, without_w, inside_w, slopes_w) = sides
        terms: list[Tensor | None] = list(entries(v, w))
        for node, inside, slopes in ((v, inside_v, slopes_w), (w, inside_w, slopes_v)):
            for r, c in slopes:
                terms += [mul(self._layout.sum(t, inside), c) for t in entries(node, r)]
        for a, ca in slopes_v:
            terms += [mul(between(a, b), ca, cb) for b, cb in slopes_w]
        total = self._total([t for t in terms if t is not None], without_v & without_w)
        return None if total is None else self._layout.merged(twins, total + total)

    def _slopes(self, v: fx.Node, inside: set[int]) -> list[tuple[fx.Node, Tensor]]:
        """C_j = dr_j/dv for every reduction that v reaches."""
        slopes: list[tuple[fx.Node, Tensor]] = []
        for node in self._reductions:
            if node not in self._active:
                continue
            f = self._linearized(node, False)
            slope = self._layout.sum(self._first(f, v), inside)
            for earlier, c in slopes:
                inner = self._layout.sum(self._first(f, earlier), self.region.row)
                slope = add(slope, mul(inner, c))
            slope = or_none(slope)
            if slope is not None:
                slopes.append((node, slope))
        return slopes

    def value(self, node: fx.Node) -> Tensor:
        """The value of a node in or entering the region, over the region's axes."""
        return self._value(node)

    # --- pieces -------------------------------------------------------------------------------

    def _absent(self, node: fx.Node) -> set[int]:
        return set(self.region.order) - set(self._layout.axes(node))

    def _total(self, terms: list[Tensor], axes: set[int]) -> Tensor | None:
        result: Tensor | None = None
        for term in terms:
            result = add(result, self._layout.sum(term, axes))
        return result

    def _canonical_of(self, node: fx.Node, value: Tensor | None) -> Tensor | None:
        return None if value is None else self._layout.canonical(node, widen(value))

    def _finish(self, node: fx.Node, value: Tensor) -> Tensor:
        value = value.to(wide(node.meta["val"].dtype))
        shape = self._layout.shape(node)
        value = value if same_sizes(value.shape, shape) else value.expand(shape)
        return self._layout.native(node, value)

    def _value(self, node: fx.Node) -> Any:
        """The canonical value of a node in or entering the region."""
        if node not in self._known:
            if not isinstance(node.meta["val"], Tensor):  # a size
                self._known[node] = self._values(node)
            elif node in self._members:
                self._known[node] = self._compute(node, self._value)
            else:
                self._known[node] = self._layout.canonical(node, widen(self._values(node)))
        return self._known[node]

    def _compute(self, node: fx.Node, value: Callable[[fx.Node], Tensor]) -> Tensor:
        if node.target in table.VIEWS:
            return value(node.args[0])  # type: ignore[arg-type]
        if node.target in table.IDENTITIES:
            x = value(node.args[0])  # type: ignore[arg-type]
            dtype = node.meta["val"].dtype
            return x if dtype.is_floating_point and x.is_floating_point() else x.to(dtype)
        if node.target in table.REDUCTIONS:
            return self._reduce(node, value)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _reduce(self, node: fx.Node, value: Callable[[fx.Node], Tensor]) -> Tensor:
        source: Any = node.args[0]
        over = self._over(node)
        x = value(source)
        if node.target in _PEAKS:
            return _PEAKS[node.target](x, self._positions(over)) if over else x
        if node.target in _MEANS:  # in one call, as the forward has it
            return x.mean(self._positions(over), keepdim=True) if over else x
        integrand = self._integrand(node, x)
        return integrand.sum(self._positions(over), keepdim=True) if over else integrand

    def _over(self, node: fx.Node) -> list[int]:
        source: Any = node.args[0]
        dims, _ = reduction(node)
        return [a for d in dims for a in self.region.dims[source][d]]

    def _positions(self, axes: Iterable[int]) -> list[int]:
        return sorted(self._layout.position[a] for a in axes)

    def _integrand(self, node: fx.Node, x: Tensor) -> Tensor:
        """psi of a reduction whose operand is x: what is summed, over all its axes."""
        source: Any = node.args[0]
        shape = self._layout.shape(source)
        over = self._over(node)
        if node.target in _PEAKS and over:
            # Autograd shares the derivative of a maximum evenly among ties; its second is zero.
            full = self._value(source)
            peak = _PEAKS[node.target](full, self._positions(over))
            hit = (full == peak).to(full.dtype)
            return x * (hit / hit.sum(self._positions(over), keepdim=True))
        x = x if same_sizes(x.shape, shape) else x.expand(shape)
        if node.target in _MEANS and over:
            return x / math.prod([self._layout.sizes[a] for a in over])
        return x

    def _linearized(self, node: fx.Node, is_output: bool) -> Function:
        """The function with its variables: inputs and earlier reductions, over its own axes."""
        if (node, is_output) not in self._functions:
            f = Function(node, is_output)
            target: Any = node if is_output else node.args[0]
            shape = self._layout.shape(target)
            memo: dict[fx.Node, Tensor] = {}
            with torch.enable_grad():
                if is_output and node in self._reductions:
                    f.value = self._variable(f, node, shape) * 1
                else:
                    f.value = self._substitute(f, target, shape, memo)
                    f.value = f.value if is_output else self._integrand(node, f.value)
                if not same_sizes(f.value.shape, shape):
                    f.value = f.value.expand(shape)
            self._functions[node, is_output] = f
        return self._functions[node, is_output]

    def _substitute(self, f: Function, node: fx.Node, shape: Any, memo: dict) -> Tensor:
        """Evaluate `node` with every input and reduction replaced by a variable of `f`."""
        if node not in memo:
            if node not in self._active:
                memo[node] = self._value(node)
            elif node not in self._members or node in self._reductions:
                memo[node] = self._variable(f, node, shape)
            else:
                memo[node] = self._compute(node, lambda n: self._substitute(f, n, shape, memo))
        return memo[node]

    def _variable(self, f: Function, node: fx.Node, shape: Any) -> Tensor:
        if node not in f.variables:
            value = self._value(node)
            value = value if same_sizes(value.shape, shape) else value.expand(shape)
            f.variables[node] = value.detach().requires_grad_()
        return f.variables[node]

    def _first(self, f: Function, u: fx.Node) -> Tensor | None:
        if u not in f.first:
            f.first[u] = derivative(f.value, f.variables.get(u))
        return f.first[u]

    def _second(self, f: Function, u: fx.Node, v: fx.Node) -> Tensor | None:
        if (u, v) not in f.second:
            first = self._first(f, u)
            f.second[u, v] = f.second[v, u] = derivative(first, f.variables.get(v))
        return f.second[u, v]


def same_sizes(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        (isinstance(x, int) and isinstance(y, int) and x == y)
        or (not isinstance(x, int) and not isinstance(y, int) and x.node.expr == y.node.expr)
        for x, y in zip(a, b, strict=True)
    )


def derivative(y: Tensor | None, x: Tensor | None) -> Tensor | None:
    """dy/dx where each element of y depends on one element of x."""
    if y is None or x is None or not y.requires_grad:
        return None
    with torch.enable_grad():
        (d,) = torch.autograd.grad(
            y, x, torch.ones_like(y), create_graph=True, retain_graph=True, allow_unused=True
        )
    return or_none(d)


def _pulled(y: Tensor | None, x: Tensor | None, weight: Tensor) -> Tensor | None:
    """``J^T weight`` of entries 0 and 1, which squaring does not change.

    What a mask hides does not count even if it is infinite, as it does not for the gradient.
    """
    if y is None or x is None or not y.requires_grad:
        return None
    weight = weight.to(y.dtype)
    weight = weight if same_sizes(weight.shape, y.shape) else weight.expand(y.shape)
    (found,) = torch.autograd.grad(y, x, weight, retain_graph=True, allow_unused=True)
    return or_none(found)


def is_constant(node: fx.Node) -> bool:
    """Whether no derivative passes the node, whatever its operands."""
    if node.target in table.CONSTANT:
        return True
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return False
    return not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex())


_MEANS = {aten.mean.default, aten.mean.dim}
_PEAKS: dict[Any, Callable[[Tensor, list[int]], Tensor]] = {
    aten.amax.default: lambda x, dims: x.amax(dims, keepdim=True),
    aten.max.default: lambda x, dims: x.amax(dims, keepdim=True),
    aten.amin.default: lambda x, dims: x.amin(dims, keepdim=True),
    aten.min.default: lambda x, dims: x.amin(dims, keepdim=True),
}
