"""Which dimensions of the tensors in a region are the same axis.

Reshapes, permutations and broadcasts only rename elements. Each tensor of a region is described
by the *atomic axes* its dimensions are made of: ``x.view(N, G, K)`` of an (N, C) tensor splits the
axis of C into (G, K). With every tensor viewed over all atomic axes, size one where it is
constant, views vanish and all that remains is pointwise functions and sums along axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

Dims = list[list[int]]  # for each dimension of a tensor the atoms it is made of, outermost first


class AxesError(Exception):
    """The dimensions of a graph cannot be factored into common axes."""


def size_of(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Axes:
    """Union-find over atoms that may also be split into factors."""

    def __init__(self) -> None:
        self._size: list[sympy.Expr] = []
        self._parent: list[int] = []
        self._parts: dict[int, list[int]] = {}
        self._dims: dict[fx.Node, Dims] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._dims

    def nodes(self) -> list[fx.Node]:
        return list(self._dims)

    def atom(self, size: sympy.Expr) -> int:
        self._size.append(size)
        self._parent.append(len(self._parent))
        return len(self._size) - 1

    def size(self, atom: int) -> sympy.Expr:
        return self._size[self.root(atom)]

    def root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def resolve(self, atoms: Sequence[int]) -> list[int]:
        """Replace atoms by their roots and by the parts they were split into."""
        result: list[int] = []
        for atom in atoms:
            root = self.root(atom)
            if root in self._parts:
                result += self.resolve(self._parts[root])
            else:
                result.append(root)
        return result

    def dims(self, node: fx.Node) -> Dims:
        return [self.resolve(d) for d in self._dims[node]]

    def atoms(self, node: fx.Node) -> list[int]:
        return [a for d in self.dims(node) for a in d]

    def fresh(self, node: fx.Node) -> None:
        """A tensor that enters: each dimension is an axis of its own."""
        self._dims[node] = [self._new(s) for s in node.meta["val"].shape]

    def _new(self, size: Any) -> list[int]:
        expr = size_of(size)
        return [] if expr == 1 else [self.atom(expr)]

    # --- what views do ----------------------------------------------------------------------

    def view(self, node: fx.Node, source: fx.Node) -> None:
        """`node` has the elements of `source` in the same order."""
        pending = [a for d in self.dims(source) for a in d]
        dims: Dims = []
        for size in node.meta["val"].shape:
            dims.append(self._take(pending, size_of(size)))
        if pending:
            raise AxesError(f"reshape of {source.name} to {node.name}")
        self._dims[node] = dims

    def _take(self, pending: list[int], size: sympy.Expr) -> list[int]:
        """Remove atoms of total `size` from the front of `pending`, splitting one if needed."""
        taken: list[int] = []
        while size != 1:
            if not pending:
                raise AxesError("sizes do not match")
            head = pending.pop(0)
            if self.size(head) == size:
                return [*taken, head]
            rest = quotient(size, self.size(head))
            if rest is not None:
                taken.append(head)
                size = rest
                continue
            inner = quotient(self.size(head), size)
            if inner is None:
                raise AxesError("sizes do not factor")
            outer, last = self._split(head, size, inner)
            pending.insert(0, last)
            return [*taken, outer]
        return taken

    def _split(self, atom: int, outer: sympy.Expr, inner: sympy.Expr) -> tuple[int, int]:
        parts = [self.atom(outer), self.atom(inner)]
        self._parts[self.root(atom)] = parts
        return parts[0], parts[1]

    def permute(self, node: fx.Node, source: fx.Node, order: Sequence[int]) -> None:
        dims = self._dims[source]
        self._dims[node] = [dims[i] for i in order]

    def reduce(self, node: fx.Node, source: fx.Node, over: Sequence[int], keepdim: bool) -> None:
        dims = self._dims[source]
        kept = [[] if i in over else d for i, d in enumerate(dims)]
        self._dims[node] = kept if keepdim else [d for i, d in enumerate(kept) if i not in over]

    def carry(self, node: fx.Node, by: Sequence[tuple[fx.Node, dict[int, int]]]) -> None:
        """Some dimensions of `node` repeat those of operands, the others are new.

        `by`: operands, each with dimension of `node` -> dimension of the operand.
        """
        dims: Dims = []
        for position, size in enumerate(node.meta["val"].shape):
            common: list[int] | None = None
            for operand, through in by:
                if position not in through:
                    continue
                mine = self._dims[operand][through[position]]
                if common is None:
                    common = mine
                else:
                    self._unify(common, mine)
            dims.append(self._new(size) if common is None else common)
        self._dims[node] = dims

    def broadcast(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        """A pointwise result: operands are aligned from the right and their axes unified."""
        shape = node.meta["val"].shape
        dims: Dims = []
        for position in range(len(shape)):
            common: list[int] | None = None
            for operand in operands:
                index = position - len(shape) + len(self._dims[operand])
                if index < 0 or size_of(operand.meta["val"].shape[index]) == 1:
                    continue
                if common is None:
                    common = self._dims[operand][index]
                else:
                    self._unify(common, self._dims[operand][index])
            dims.append(self._new(shape[position]) if common is None else common)
        self._dims[node] = dims

    def _unify(self, first: list[int], second: list[int]) -> None:
        a, b = self.resolve(first), self.resolve(second)
        while a and b:
            x, y = a.pop(0), b.pop(0)
            if x == y:
                continue
            if self.size(x) == self.size(y):
                self._parent[y] = x
                if y in self._parts:  # pragma: no cover - resolve() never gives a split atom
                    raise AxesError("split atom")
                continue
            inner = quotient(self.size(x), self.size(y))
            if inner is not None:
                outer, last = self._split(x, self.size(y), inner)
                self._parent[y] = outer
                a.insert(0, last)
                continue
            inner = quotient(self.size(y), self.size(x))
            if inner is None:
                raise AxesError("axes do not factor")
            outer, last = self._split(y, self.size(x), inner)
            self._parent[x] = outer
            b.insert(0, last)
        if a or b:
            raise AxesError("axes of different length")


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b if it is surely an integer, else None."""
    if b == 0:
        return None
    if a.is_Integer and b.is_Integer:
        return sympy.Integer(int(a) // int(b)) if int(a) % int(b) == 0 else None
    ratio = sympy.cancel(a / b)
    numerator, denominator = ratio.as_numer_denom()
    return numerator if denominator == 1 and numerator.is_integer is not False else None
