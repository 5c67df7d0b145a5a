"""One element of each row as a reduction, where it meets the row again: ``x - x[arange(n), y]``.

Alone it is a selection. But where it is combined with other functions of the row, the cut at it
would lose their cross terms; the sum of the row behind a mask is the same element, and part of a
region. (A gather is written so always; see structures/definitions.py.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.analysis.kinds import flat_nodes, is_linear, is_region_node, operands_of
from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.trace import Tracer, inline, trace

aten = torch.ops.aten


def write_picks(
    primitives: Primitives, active: set[fx.Node], loss: fx.Node, fake_mode: Any
) -> bool:
    """Write such gathers out in the primitive graph; whether there was one."""
    flat = {n for n in flat_nodes(primitives.graph, loss, active) if is_linear(n, active)}
    curved = {n for n in active if is_region_node(n) and n not in flat}
    found = [n for n in primitives.graph.nodes if n in active and index_of(n) is not None]
    found = [n for n in found if n is not loss and same_rows(n, n.args[0])]
    found = [n for n in found if meets_again(n, curved, active)]
    captured = {p: c for c, p in primitives.of.items()}
    for node in found:
        source = primitives.source[node]
        result = written_out(node, primitives, fake_mode)
        node.replace_all_uses_with(result)
        if node in captured:
            primitives.of[captured[node]] = result
            primitives.defined.add(source)
    return bool(found)


def written_out(node: fx.Node, primitives: Primitives, fake_mode: Any) -> fx.Node:
    """Put `picked` in front of a call."""
    inputs: list[Any] = [node.args[0], index_of(node)]

    def call(values: list[Any], tracer: Tracer) -> list[Any]:
        return [picked(values[0], values[1])]

    def mark(made: fx.Node, role: str) -> None:
        made.meta["stack_trace"] = node.meta.get("stack_trace")
        primitives.source[made] = primitives.source[node]

    template = trace(call, [n.meta["val"] for n in inputs], fake_mode)
    with primitives.graph.inserting_before(node):
        (result,) = inline(primitives.graph, template, inputs, mark)
    assert result is not None
    return result


def picked(x: Tensor, index: Tensor) -> Tensor:
    """``x[arange(len(x)), index]``."""
    places = torch.arange(x.shape[1], device=x.device)
    hit = places == torch.remainder(index, x.shape[1]).unsqueeze(1)
    return torch.where(hit, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(1)


def index_of(node: fx.Node) -> fx.Node | None:
    """The numbers of the elements that a call takes, one of each of the first rows of a matrix."""
    args: Any = node.args
    if node.target is not aten.index.Tensor or len(args[1]) != 2:
        return None
    x, (rows, index) = args
    fits = x.meta["val"].dim() == 2 and is_one_each(index) and counts(rows)
    return index if fits else None


def is_one_each(index: Any) -> bool:
    """Whether it is a vector of numbers."""
    value = index.meta["val"] if isinstance(index, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype is not torch.bool


def counts(index: Any) -> bool:
    """Whether an index is 0, 1, 2, ..."""
    if not isinstance(index, fx.Node) or not is_one_each(index):
        return False
    bounds: dict[Any, list[Any]] = {
        aten.arange.default: [0, *index.args],
        aten.arange.start: [*index.args],
        aten.arange.start_step: [*index.args],
    }
    start, _, *step = bounds.get(index.target, [None, None])
    return start == 0 and step in ([], [1])


def same_rows(a: Any, b: Any) -> bool:
    return str(a.meta["val"].shape[0]) == str(b.meta["val"].shape[0])


def meets_again(pick: fx.Node, curved: set[fx.Node], active: set[fx.Node]) -> bool:
    """Whether other functions of the row that it takes from come together with what it gives.

    `curved`: the nodes that regions may consist of and that are not linear to the loss.
    """
    above = row_of(pick, curved, active)
    return bool(below([pick], pick, curved) & below(above, pick, curved))


def row_of(pick: fx.Node, curved: set[fx.Node], active: set[fx.Node]) -> set[fx.Node]:
    """What a call picks from, and what that is a function of."""
    found: set[fx.Node] = set()
    waiting: list[Any] = [pick.args[0]]
    while waiting:
        node = waiting.pop()
        if node in active and node not in found:
            found.add(node)
            waiting += operands_of(node) if node in curved else []
    return found


def below(starts: Iterable[fx.Node], pick: fx.Node, curved: set[fx.Node]) -> set[fx.Node]:
    """What depends on some nodes through `curved`, but not through `pick` unless it is a start."""
    found: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        more = {u for u in node.users if u in curved and u is not pick} - found
        found |= more
        waiting += more
    return found
