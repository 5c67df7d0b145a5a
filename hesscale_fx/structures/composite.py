"""Several nodes as one operator, whose rule is the columns of their common Jacobian.

Between two units the recursion drops what is off the diagonal; inside one it does not. So what
would lose by being cut, and is small, is put together (analysis/join.py says what that is) and
stands in the graph as one call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from hesscale_fx.structures import table
from hesscale_fx.structures.columns import Columns


class Composite:
    """A function of the values that enter `nodes`, in the order of `entering`.

    Args:
        name: what reports call it.
        nodes: in topological order.
        entering: the nodes that they use and that are not among them.
        outputs: those that others use.
        structure: its rule.
        through: for the i-th of `entering` and the k-th of `outputs`, at (i, k): dimension of the
            output -> dimension of the operand that it repeats, entry by entry.
    """

    def __init__(
        self,
        name: str,
        nodes: list[fx.Node],
        entering: list[fx.Node],
        outputs: list[fx.Node],
        structure: Columns,
        through: dict[tuple[int, int], dict[int, int]],
    ) -> None:
        self.name = self.__name__ = name
        self.nodes = nodes
        self.entering = entering
        self.outputs = outputs
        self.structure = structure
        self.through = through
        self._key = (describe(nodes, entering, outputs), structure)

    def __call__(self, *values: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the nodes."""
        known: dict[fx.Node, Any] = dict(zip(self.entering, values, strict=True))
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = plain(node)(*args, **kwargs)
        found = tuple(known[n] for n in self.outputs)
        return found if len(found) > 1 else found[0]

    def __eq__(self, other: object) -> bool:
        """Two of the same calls are the same function, so that one trace serves both."""
        return isinstance(other, Composite) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<{self.name} as one>"


def plain(node: fx.Node) -> Any:
    """What computes a node such that autograd differentiates it twice."""
    if node.target is operator.getitem:
        return operator.getitem
    structure = table.structure_of(node.target, node.args, node.kwargs)
    written = getattr(structure, "implementation", None)
    return written or table.differentiable(node.target)


def describe(nodes: list[fx.Node], entering: list[fx.Node], outputs: list[fx.Node]) -> Any:
    """The calls with numbers in the place of nodes."""
    number = {n: i for i, n in enumerate([*entering, *nodes])}

    def shown(values: Sequence[Any]) -> tuple[str, ...]:
        return tuple(f"%{number[v]}" if isinstance(v, fx.Node) else repr(v) for v in values)

    calls = []
    for node in nodes:
        leaves, spec = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
        calls.append((node.target, shown(leaves), repr(spec)))
    return tuple(calls), shown(outputs)
