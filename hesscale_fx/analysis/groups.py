"""Sets of nodes that are being joined, and which must be."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from hesscale_fx.analysis.kinds import operands_of


class Groups:
    """Disjoint sets of nodes, each listed in the order of `elements`."""

    def __init__(self, elements: list[fx.Node]) -> None:
        self.elements = elements
        self._index = {n: i for i, n in enumerate(elements)}
        self._set: dict[fx.Node, list[fx.Node]] = {n: [n] for n in elements}

    def copy(self) -> Groups:
        other = Groups(self.elements)
        other._set = dict(self._set)
        return other

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._set

    def set_of(self, node: fx.Node) -> list[fx.Node]:
        return self._set[node]

    def union(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        found = {m for n in nodes for m in self._set[n]}
        return sorted(found, key=self._index.__getitem__)

    def join(self, nodes: Iterable[fx.Node]) -> None:
        merged = self.union(nodes)
        for node in merged:
            self._set[node] = merged

    def sets(self, topological: bool = False) -> list[list[fx.Node]]:
        """Each set once; by first element, or such that a set comes after those it uses."""
        unique = list({id(s): s for s in self._set.values()}.values())
        if not topological:
            return sorted(unique, key=lambda s: self._index[s[0]])
        waiting: dict[int, set[int]] = {}
        for group in unique:
            used = {id(self._set[a]) for n in group for a in operands_of(n) if a in self._set}
            waiting[id(group)] = used - {id(group)}
        result: list[list[fx.Node]] = []
        pending = sorted(unique, key=lambda s: self._index[s[0]])
        done: set[int] = set()
        while pending:
            ready = [g for g in pending if waiting[id(g)] <= done]
            result += ready
            done |= {id(g) for g in ready}
            pending = [g for g in pending if id(g) not in done]
        return result


class Reconvergence:
    """Finds the nodes between a fan-out and the places where its branches meet again."""

    def __init__(self, component: list[fx.Node], active: set[fx.Node]) -> None:
        self._nodes = component
        index = {n: i for i, n in enumerate(component)}
        self._successors: dict[fx.Node, list[int]] = {}
        for i, node in enumerate(component):
            for operand in dict.fromkeys(operands_of(node)):
                if operand in active:
                    self._successors.setdefault(operand, []).append(i)
        self._below = [0] * len(component)  # bit j: node j is i or depends on it
        for i in range(len(component) - 1, -1, -1):
            bits = 1 << i
            for j in self._successors.get(component[i], ()):
                bits |= self._below[j]
            self._below[i] = bits
        self._predecessors: list[int] = [0] * len(component)
        for i, node in enumerate(component):
            for operand in operands_of(node):
                if operand in index:
                    self._predecessors[i] |= 1 << index[operand]

    def groups(self) -> list[list[fx.Node]]:
        found: dict[int, None] = {}
        for successors in self._successors.values():
            for k, i in enumerate(successors):
                for j in successors[:k]:
                    common = self._below[i] & self._below[j]
                    if common:
                        found[self._between(i, j, common)] = None
        sets = [[n for i, n in enumerate(self._nodes) if bits >> i & 1] for bits in found]
        return sorted(sets, key=len)

    def _between(self, i: int, j: int, common: int) -> int:
        """Branch nodes that reach a meeting node, and the nodes where they first meet."""
        branches = (self._below[i] | self._below[j]) & ~common
        result = 0
        for k in bits_of(branches):
            if self._below[k] & common:
                result |= 1 << k
        for k in bits_of(common):
            if self._predecessors[k] & branches or k in (i, j):
                result |= 1 << k
        return result


def bits_of(bits: int) -> Iterable[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low
