"""How many contractions lie between a unit and the model's output."""

from __future__ import annotations

from torch import fx

from hesscale_fx.analysis.exactness import Slot
from hesscale_fx.analysis.units import Unit

# Units of one call that mix nothing: each entry of J is 0, 1 or a scale.
SELECTIONS = ("selection", "scaled selection")


def is_counted(unit: Unit) -> bool:
    """Whether a unit is a contraction, or what else combines entries and is no region."""
    return unit.region is None and unit.structure not in SELECTIONS


def beyond(units: list[Unit], inside: set[fx.Node], depth: int) -> set[Unit]:
    """The contractions of the model that are farther from its output than the last `depth`.

    A contraction is one of the last n if no path from it to the output meets more than n of them,
    itself included (the levels of the partition, counted from the output). The distance does not
    depend on how often a tensor is computed, nor on selections and regions in between.

    Args:
        units: producers before consumers.
        inside: the nodes before the model's output, and it.
        depth: n.
    """
    met: dict[Slot, int] = {}  # the most contractions on a path from a tensor to the output
    found: set[Unit] = set()
    for unit in reversed(units):
        if unit.nodes[-1] not in inside:
            continue
        count = max((met.get((n, unit), 0) for n in unit.outputs), default=0) + is_counted(unit)
        if is_counted(unit) and count > depth:
            found.add(unit)
        for slot in unit.inputs:
            met[slot] = max(met.get(slot, 0), count)
    return found
