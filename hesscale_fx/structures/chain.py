"""The rule of a region with many reductions, stage by stage.

`region.RegionAt` cuts a region at all its m reductions at once and needs the second derivatives
between each two of them, through everything in between. Where a region falls apart into stages that
only a common row holds together (the norms along the residual stream of a post-norm transformer)
less will do: within a row, the Hessian of a tensor between two stages is

    H = diag(d) + sum_k (Q_k C_k^T + C_k Q_k^T)

with one pair for each reduction further on. A stage y = f(x) turns that of y into

    J^T H J + sum_i g_i d2 y_i/dx^2 = diag(P(x, x)) + pairs (J^T Q_k, J^T C_k) + pairs (Q_j, C_j),
    Q_j = P(x, r_j) + 1/2 sum_l S(P(r_j, r_l)) C_l,

with P, C and S of `region` for the stage alone, its own reductions r_j, and s = d. The result is
the same; what is done for each reduction is a vector-Jacobian product of the stages before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from hesscale_fx.structures import table
from hesscale_fx.structures.base import Tensors, add, mul
from hesscale_fx.structures.region import Function, Region, RegionAt


def is_chain(region: Region) -> bool:
    """Whether the rule is evaluated stage by stage: several of them reduce.

    A pair belongs to one row, so no tensor in the region may be common to several.
    """
    reducing = [s for s in region.stages if any(n.target in table.REDUCTIONS for n in s)]
    outside = set(region.order) - region.row
    return len(reducing) > 1 and all(
        outside <= {a for d in region.dims[n] for a in d} for n in region.nodes
    )


@dataclass
class Row:
    """What flows at one tensor: its gradient and its Hessian within a row, None where zero."""

    gradient: Tensor | None = None
    diagonal: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # Q and C, each a stack

    def __add__(self, other: Row) -> Row:
        return Row(
            add(self.gradient, other.gradient),
            add(self.diagonal, other.diagonal),
            self.pairs + other.pairs,
        )


class ChainAt(RegionAt):
    """As `RegionAt`, for a region with `is_chain`."""

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self.recursion(s, [None] * len(s))

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return self.recursion([None] * len(g), g)

    def recursion(self, s: Tensors, g: Tensors) -> list[Tensor | None]:
        """Both terms, whose pairs pass the stages together."""
        outputs = self.region.outputs
        return self._through(
            [
                Row(self._canonical_of(node, b), self._canonical_of(node, a))
                for node, a, b in zip(outputs, s, g, strict=True)
            ]
        )

    def _stages(self) -> list[Stage]:
        return [Stage(self, self._part(nodes)) for nodes in self.region.stages]

    def _part(self, nodes: list[fx.Node]) -> Region:
        own, members = set(nodes), self._members
        entering = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in own)
        outputs = [
            n
            for n in nodes
            if n in self.region.outputs or any(u in members and u not in own for u in n.users)
        ]
        inputs = [a for a in entering if a in self._active]
        return dataclasses.replace(
            self.region, nodes=nodes, inputs=inputs, outputs=outputs, stages=[]
        )

    def _through(self, outputs: list[Row]) -> list[Tensor | None]:
        at = dict(zip(self.region.outputs, outputs, strict=True))
        for stage in reversed(self._stages()):
            seen = [self._joined(n, at.get(n, Row())) for n in stage.region.outputs]
            for node, row in stage.through(seen):
                at[node] = at.get(node, Row()) + row
        totals = [self._diagonal_of(v, at.get(v, Row())) for v in self.region.inputs]
        return [
            None if total is None else self._finish(v, total)
            for v, total in zip(self.region.inputs, totals, strict=True)
        ]

    def _joined(self, node: fx.Node, row: Row) -> Row:
        """With all pairs in one stack, so that they pass the next stage together."""
        if len(row.pairs) < 2:
            return row
        shape = self._layout.shape(node)
        stacks = [
            torch.cat([v.expand(v.shape[0], *shape) for v in side])
            for side in zip(*row.pairs, strict=True)
        ]
        return Row(row.gradient, row.diagonal, [(stacks[0], stacks[1])])

    def _diagonal_of(self, node: fx.Node, row: Row) -> Tensor | None:
        """The diagonal of the Hessian, summed over the rows that the node is common to."""
        outside = self._absent(node) - self.region.row
        total = self._layout.sum(row.diagonal, outside)
        for q, c in row.pairs:
            total = add(total, self._layout.sum(2 * (q * c).sum(0), outside))
        return total


class Stage(RegionAt):
    """One part of a chain, over the axes of the whole."""

    def __init__(self, chain: ChainAt, region: Region) -> None:
        super().__init__(region, chain._values, chain._run, chain._layout)
        self._value = chain._value  # type: ignore[method-assign]

    def through(self, outputs: list[Row]) -> Iterator[tuple[fx.Node, Row]]:
        """What flows at each input, not yet summed over the rows that it is common to."""
        weights = self._adjoints([row.gradient for row in outputs])
        squares = [
            (self._linearized(n, True), row.diagonal)
            for n, row in zip(self.region.outputs, outputs, strict=True)
        ]

        def entries(u: fx.Node, v: fx.Node) -> list[Tensor]:
            found = [
                mul(self._first(f, u), self._first(f, v), s) for f, s in squares if s is not None
            ]
            found += [mul(self._second(f, u, v), weight) for f, weight in weights]
            return [t for t in found if t is not None]

        def total(u: fx.Node, v: fx.Node, axes: set[int]) -> Tensor | None:
            return self._total(entries(u, v), axes)

        stacks = [
            tuple(self._adjoints(_only(i, side, len(outputs))) for side in pair)
            for i, row in enumerate(outputs)
            for pair in row.pairs
        ]
        for v in self.region.inputs:
            inside = self._absent(v) & self.region.row
            pairs = list(self._new_pairs(v, inside, total))
            for side in stacks:
                q, c = (self._pulled(v, adjoints, inside) for adjoints in side)
                if q is not None and c is not None:
                    pairs.append((q, c))
            yield v, Row(self._pulled(v, weights, inside), total(v, v, inside), pairs)

    def _new_pairs(
        self, v: fx.Node, inside: set[int], total: Callable[..., Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(Q_j, C_j) of the stage's own reductions."""
        slopes = self._slopes(v, inside)
        for a, slope in slopes:
            q = total(v, a, inside)
            for b, other in slopes:
                coupled = mul(total(a, b, self._absent(a) & self._absent(b)), other)
                q = add(q, None if coupled is None else coupled / 2)
            if q is not None:
                yield q.unsqueeze(0), slope.unsqueeze(0)

    def _pulled(
        self, v: fx.Node, weights: list[tuple[Function, Tensor]], inside: set[int]
    ) -> Tensor | None:
        """J^T u for one input, given the adjoints of u."""
        terms = [mul(self._first(f, v), weight) for f, weight in weights]
        return self._total([t for t in terms if t is not None], inside)


def _only(index: int, value: Tensor, count: int) -> list[Tensor | None]:
    return [value if i == index else None for i in range(count)]
