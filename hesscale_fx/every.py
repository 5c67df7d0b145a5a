"""Curvature at each k-th call only: the schedule, and the graph for the calls in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hesscale_fx.errors import CallError, InvalidArgumentError
from hesscale_fx.simplify import is_write


@dataclass
class Schedule:
    """Says which calls compute curvature: the first, and each `every`-th after it.

    Attributes:
        every: the distance between them.
        calls: how many calls there were.
    """

    every: int
    calls: int = 0
    # What the call under way does. A compiled graph depends on this and not on the count, which
    # would make it again for each value.
    _due: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InvalidArgumentError(f"every must be a positive integer, not {self.every!r}.")

    def begin(self) -> None:
        """A call begins, outside of what is compiled."""
        self._due = self.calls % self.every == 0

    def due(self) -> bool:
        """Whether the call under way computes curvature; one that did not `begin` does."""
        due, self._due = self._due, None
        if due is None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            raise CallError(
                "A module with every=... counts its calls, which a compiled function around it "
                "cannot. Compile the module itself: hs.compile() or torch.compile(hs), and call "
                "it outside of other compiled functions."
            )
        return due is not False


def without_curvature(graph: fx.Graph) -> fx.Graph:
    """The same graph with an empty dictionary of diagonals, and nothing that only they need."""
    plain = fx.Graph()
    loss, grads, *rest = plain.graph_copy(graph, {}, return_output_node=False)  # type: ignore[misc]
    plain.output((loss, grads, *({} for _ in rest)))
    for node in reversed(plain.nodes):
        custom = node.meta.get("custom") or {}
        if is_write(node) and custom.get("hesscale", {}).get("role") == "curvature":
            plain.erase_node(node)
    plain.eliminate_dead_code()
    return plain
