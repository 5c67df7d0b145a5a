"""Several nodes as one operator, whose rule is the columns of their common Jacobian.

Between two units the recursion drops what is off the diagonal; inside one it does not. So what
would lose by being cut, and is small, is put together (analysis/join.py says what that is) and
stands in the graph as one call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from hesscale_fx.structures import table
from hesscale_fx.structures.columns import Columns


@dataclass
class Step:
    """One call of a composite; nodes stand for values, also for those of its results."""

    target: Any
    args: tuple
    kwargs: Mapping[str, Any]
    results: dict[fx.Node, int | None]  # which of several it is, or None

    def operands(self) -> list[fx.Node]:
        """The nodes among its arguments."""
        found: list[fx.Node] = []
        fx.node.map_arg((self.args, dict(self.kwargs)), found.append)
        return found


class Composite:
    """A function of the values that enter `nodes`, in the order of `entering`.

    Args:
        name: what reports call it.
        nodes: in topological order.
        steps: the calls that compute them.
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
        steps: list[Step],
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
        self.calls = describe(steps, entering, outputs)
        self._steps = steps

    def __call__(self, *values: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the steps."""
        known: dict[fx.Node, Any] = dict(zip(self.entering, values, strict=True))
        for step in self._steps:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), known.__getitem__)
            found = plain(step.target, args, kwargs)(*args, **kwargs)
            for node, index in step.results.items():
                known[node] = found if index is None else found[index]
        results = tuple(known[n] for n in self.outputs)
        return results if len(results) > 1 else results[0]

    def __eq__(self, other: object) -> bool:
        """Two of the same calls are the same function, so that one trace serves both."""
        if not isinstance(other, Composite):
            return False
        return (self.calls, self.structure) == (other.calls, other.structure)

    def __hash__(self) -> int:
        return hash((self.calls, self.structure))

    def __repr__(self) -> str:
        return f"<{self.name} as one>"


def plain(target: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What computes a call such that autograd differentiates it twice."""
    if target is operator.getitem:
        return operator.getitem
    structure = table.structure_of(target, args, dict(kwargs))
    written = getattr(structure, "implementation", None)
    return written or table.differentiable(target)


def describe(steps: list[Step], entering: list[fx.Node], outputs: list[fx.Node]) -> Any:
    """The calls with numbers in the place of nodes."""
    number = {n: i for i, n in enumerate(entering)}

    def shown(values: Sequence[Any]) -> tuple[str, ...]:
        return tuple(f"%{number[v]}" if isinstance(v, fx.Node) else repr(v) for v in values)

    calls = []
    for step in steps:
        leaves, spec = pytree.tree_flatten((tuple(step.args), dict(step.kwargs)))
        calls.append((step.target, shown(leaves), repr(spec), tuple(step.results.values())))
        for node in step.results:
            number[node] = len(number)
    return tuple(calls), shown(outputs)
