"""One element of each row as a reduction, where it meets the row again: ``x - x.gather(1, y)``.

Alone a gather is a selection. But where its result is combined with other functions of the row, the
cut at it would lose their cross terms; the sum of the row behind a mask is the same element, and
part of a region.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.units import flat_nodes, is_linear, is_region_node, operands_of
from hesscale_fx.trace import Tracer, inline, trace

aten = torch.ops.aten


def write_picks(
    primitives: Primitives, active: set[fx.Node], loss: fx.Node, fake_mode: Any
) -> bool:
    """Write such gathers out in the primitive graph; whether there was one."""
    flat = {n for n in flat_nodes(primitives.graph, loss, active) if is_linear(n, active)}
    curved = {n for n in active if is_region_node(n) and n not in flat}
    found = [n for n in primitives.graph.nodes if n in active and place_of(n) is not None]
    found = [n for n in found if n is not loss and meets_again(n, curved, active)]
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
    place = place_of(node)
    assert place is not None
    dim, index = place
    inputs: list[Any] = [node.args[0], index]

    def call(values: list[Any], tracer: Tracer) -> list[Any]:
        return [picked(values[0], values[1], dim)]

    def mark(made: fx.Node, role: str) -> None:
        made.meta["stack_trace"] = node.meta.get("stack_trace")
        primitives.source[made] = primitives.source[node]

    template = trace(call, [n.meta["val"] for n in inputs], fake_mode)
    with primitives.graph.inserting_before(node):
        (result,) = inline(primitives.graph, template, inputs, mark)
    assert result is not None
    return result


def picked(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The element of each row along `dim` whose number stands in `index`, which keeps it or not."""
    places = torch.arange(x.shape[dim], device=x.device)
    keeps = index.dim() == x.dim()
    index = index if keeps else index.unsqueeze(dim)
    places = places.reshape([-1 if d == dim else 1 for d in range(x.dim())])
    hit = places == torch.remainder(index, x.shape[dim])
    return torch.where(hit, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(dim, keeps)


def place_of(node: fx.Node) -> tuple[int, fx.Node] | None:
    """The dimension along which a call takes one element of each row, and their numbers."""
    args: Any = node.args
    if node.target is aten.gather.default:
        x, dim, index = args[:3]
        shape, own = (list(map(str, n.meta["val"].shape)) for n in (index, x))
        if own:
            dim %= len(own)
            own[dim] = "1"
            return (dim, index) if shape == own else None
    if node.target is aten.index.Tensor and len(args[1]) == 2:
        x, (rows, index) = args
        if x.meta["val"].dim() == 2 and is_one_each(index) and counts(rows, x):
            return 1, index
    return None


def is_one_each(index: Any) -> bool:
    """Whether it is a vector of numbers."""
    value = index.meta["val"] if isinstance(index, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype is not torch.bool


def counts(index: Any, x: fx.Node) -> bool:
    """Whether an index is 0, 1, 2, ... for all rows of x."""
    if not isinstance(index, fx.Node) or not is_one_each(index):
        return False
    bounds: dict[Any, list[Any]] = {
        aten.arange.default: [0, *index.args],
        aten.arange.start: [*index.args],
        aten.arange.start_step: [*index.args],
    }
    start, _, *step = bounds.get(index.target, [None, None])
    return start == 0 and step in ([], [1]) and same_rows(index, x)


def same_rows(a: fx.Node, b: fx.Node) -> bool:
    return str(a.meta["val"].shape[0]) == str(b.meta["val"].shape[0])


def meets_again(pick: fx.Node, curved: set[fx.Node], active: set[fx.Node]) -> bool:
    """Whether other functions of the row that it takes from come together with what it gives.

    `curved`: the nodes that regions may consist of and that are not linear to the loss.
    """
    above: dict[fx.Node, None] = {}
    waiting: list[Any] = [pick.args[0]]
    while waiting:
        node = waiting.pop()
        if node in active and node not in above:
            above[node] = None
            waiting += operands_of(node) if node in curved else []
    return bool(below([pick], pick, curved) & below(above, pick, curved))


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
