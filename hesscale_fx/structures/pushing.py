"""The rule of a region with many reductions, one node at a time.

`region.RegionAt` cuts a region at all its reductions at once and needs the second derivatives
between each two of them, through everything in between. Here the Hessian of the loss with respect
to the tensors that are live at one place of the region moves backwards instead, node by node, as in
edge pushing (Gower and Mello, A new framework for the computation of Hessians, 2012). Within a row

    H[u, v] = D[u, v] + sum_p (q_p[u] c_p[v]^T + c_p[u] q_p[v]^T),

with D elementwise: between entries at the same place of the row, where a tensor that is constant
along it stands at every place. With g the gradient, a pointwise node ``y = f(a, b, ..)`` gives way
to its operands by

    D[a, b] += f_a f_b D[y, y] + g_y f_ab,    D[a, w] += f_a D[y, w],    q[a] += f_a q[y],

c as q, and a reduction ``r = sum_k f(a_k)`` by the same and, for what reaches each entry of the row
from all others, a new pair

    c[a] = f_a,    q[a] = f_a D[r, r] / 2,    q[w] = D[r, w].

The number of nodes grows with that of the region's; pairs are kept in stacks, so that they pass a
node together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from hesscale_fx.structures import table
from hesscale_fx.structures.base import Tensors, add, mul
from hesscale_fx.structures.region import Function, Region, RegionAt, reduction, same_sizes

# Reductions of a region from which on this rule takes less than the direct one.
MANY = 3


def is_long(region: Region) -> bool:
    """Whether the region has many reductions, and reads no tensor along two axes."""
    sums = sum(n.target in table.REDUCTIONS and bool(reduction(n)[0]) for n in region.nodes)
    return sums >= MANY and not region.twins


@dataclass
class Pairs:
    """A stack of pairs q and c, by tensor; each stands for its sum over the axes `over`."""

    over: frozenset[int]
    q: dict[fx.Node, Tensor] = field(default_factory=dict)
    c: dict[fx.Node, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> tuple:
        """Stacks of one kind can be made one."""
        return self.over, frozenset(self.q), frozenset(self.c)


@dataclass
class Hessian:
    """The Hessian within a row with respect to the live tensors; what is absent is zero."""

    gradient: dict[fx.Node, Tensor] = field(default_factory=dict)
    entries: dict[fx.Node, dict[fx.Node, Tensor]] = field(default_factory=dict)  # D, symmetric
    pairs: list[Pairs] = field(default_factory=list)

    def add(self, u: fx.Node, v: fx.Node, value: Tensor | None) -> None:
        """Add to D[u, v]."""
        if value is not None:
            total = add(self.entries.get(u, {}).get(v), value)
            assert total is not None
            self.entries.setdefault(u, {})[v] = self.entries.setdefault(v, {})[u] = total

    def take(self, node: fx.Node) -> tuple[Tensor | None, Tensor | None, dict[fx.Node, Tensor]]:
        """Remove g, D[node, node] and D[node, w]."""
        others = self.entries.pop(node, {})
        own = others.pop(node, None)
        for other in others:
            del self.entries[other][node]
        return self.gradient.pop(node, None), own, others

    def join_pairs(self) -> None:
        """Make stacks of one kind one."""
        kinds: dict[tuple, list[Pairs]] = {}
        for pairs in self.pairs:
            if pairs.q and pairs.c:
                kinds.setdefault(pairs.kind, []).append(pairs)
        self.pairs = [_joined(same) for same in kinds.values()]


def _joined(same: list[Pairs]) -> Pairs:
    if len(same) == 1:
        return same[0]
    return Pairs(
        same[0].over,
        {n: torch.cat([p.q[n] for p in same]) for n in same[0].q},
        {n: torch.cat([p.c[n] for p in same]) for n in same[0].c},
    )


class PushingAt(RegionAt):
    """As `RegionAt`, for a region with `is_long`."""

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self.recursion(s, [None] * len(s))

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return self.recursion([None] * len(g), g)

    def recursion(self, s: Tensors, g: Tensors) -> list[Tensor | None]:
        """Both terms together."""
        hessian = Hessian()
        for node, square, slope in zip(self.region.outputs, s, g, strict=True):
            hessian.add(node, node, self._canonical_of(node, square))
            if slope is not None:
                hessian.gradient[node] = self._canonical_of(node, slope)  # type: ignore[assignment]
        found: dict[fx.Node, Tensor | None] = {}
        done = self._done_after()
        for node in reversed(self.region.nodes):
            if node in self._active:
                self._push(hessian, node)
            for v in done.get(node, ()):
                found[v] = self._retire(hessian, v)
        totals = [found.get(v) for v in self.region.inputs]
        return [
            None if total is None else self._finish(v, total)
            for v, total in zip(self.region.inputs, totals, strict=True)
        ]

    def _done_after(self) -> dict[fx.Node, list[fx.Node]]:
        """By node the inputs that no node before it uses."""
        first: dict[fx.Node, fx.Node] = {}
        for node in reversed(self.region.nodes):
            first.update(dict.fromkeys(node.all_input_nodes, node))
        done: dict[fx.Node, list[fx.Node]] = {}
        for v in self.region.inputs:
            done.setdefault(first[v], []).append(v)
        return done

    def _push(self, hessian: Hessian, node: fx.Node) -> None:
        if node in self._reductions and self._over(node):
            self._push_sum(hessian, node)
        else:
            self._push_pointwise(hessian, node)

    def _push_pointwise(self, hessian: Hessian, node: fx.Node) -> None:
        f = self._local(node)
        g, own, others = hessian.take(node)
        operands = list(f.variables)
        for i, a in enumerate(operands):
            first = self._first(f, a)
            self._add_gradient(hessian, a, mul(first, g))
            for w, value in others.items():
                both = 2 if w is a else 1  # of a both as operand and as the other one
                self._add(hessian, a, w, mul(first, both * value))
            for b in operands[: i + 1]:
                self._add(hessian, a, b, mul(first, self._first(f, b), own))
                self._add(hessian, a, b, mul(self._second(f, a, b), g))
        self._pull_pairs(hessian, node, {a: self._first(f, a) for a in operands})

    def _push_sum(self, hessian: Hessian, node: fx.Node) -> None:
        f = self._local(node)
        (a,) = f.variables
        first = self._first(f, a)
        g, own, others = hessian.take(node)
        self._add_gradient(hessian, a, mul(first, g))
        self._pull_pairs(hessian, node, {a: first})
        if first is None:
            return
        q = {} if own is None else {a: first * (own / 2)}
        for w, value in others.items():
            if self.region.row.isdisjoint(self._layout.axes(w)):
                self._add(hessian, a, w, first * value)  # the same at every place of the row
            else:
                total = add(q.get(w), value)
                assert total is not None
                q[w] = total
        if q:
            over = frozenset(self._layout.axes(node)) - self.region.row
            stack = {w: value.unsqueeze(0) for w, value in q.items()}
            hessian.pairs.append(Pairs(over, stack, {a: first.unsqueeze(0)}))
        hessian.join_pairs()

    def _pull_pairs(
        self, hessian: Hessian, node: fx.Node, first: dict[fx.Node, Tensor | None]
    ) -> None:
        for pairs in hessian.pairs:
            for side in (pairs.q, pairs.c):
                value = side.pop(node, None)
                for a, slope in first.items():
                    moved = self._layout.sum(mul(slope, value), self._absent(a) - pairs.over)
                    total = add(side.get(a), moved)
                    if total is not None:
                        side[a] = total

    def _add(self, hessian: Hessian, a: fx.Node, b: fx.Node, value: Tensor | None) -> None:
        hessian.add(a, b, self._layout.sum(value, self._absent(a) & self._absent(b)))

    def _add_gradient(self, hessian: Hessian, a: fx.Node, value: Tensor | None) -> None:
        total = add(hessian.gradient.get(a), self._layout.sum(value, self._absent(a)))
        if total is not None:
            hessian.gradient[a] = total

    def _retire(self, hessian: Hessian, node: fx.Node) -> Tensor | None:
        """The diagonal for an input that nothing will reach any more."""
        _, total, _ = hessian.take(node)
        for pairs in hessian.pairs:
            product = mul(pairs.q.pop(node, None), pairs.c.pop(node, None))
            if product is not None:
                total = add(total, self._layout.sum(2 * product.sum(0), self._absent(node)))
        return total

    def _local(self, node: fx.Node) -> Function:
        """The node, or the integrand of a sum, as a function of its operands alone."""
        f = Function(node, True)
        sums = node in self._reductions and bool(self._over(node))
        shape = self._layout.shape(node.args[0] if sums else node)  # type: ignore[arg-type]

        def operand(n: fx.Node) -> Tensor:
            return self._variable(f, n, shape) if n in self._active else self._value(n)

        with torch.enable_grad():
            if sums:
                f.value = self._integrand(node, operand(node.args[0]))  # type: ignore[arg-type]
            else:
                f.value = self._compute(node, operand)
                if not same_sizes(f.value.shape, shape):
                    f.value = f.value.expand(shape)
        return f
