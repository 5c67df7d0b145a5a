"""The reverse walk over units: order and accumulation. Knows no operator and no method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hesscale_fx.analysis.units import Unit

Slot = tuple[fx.Node, "Unit | None"]
Flow = dict[str, list[Any]]  # role -> one value for each output, or input; None is zero


def reverse(
    units: list[Unit],
    loss: fx.Node,
    seed: dict[str, Any],
    pull: Callable[[Unit, Flow], Flow],
    add: Callable[[Slot, str, Any, Any], Any],
    arrive: Callable[[Slot, dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[fx.Node, dict[str, Any]]:
    """Pull values from the loss to every leaf.

    Args:
        units: producers before consumers.
        loss: the node to start from.
        seed: its values by role; None is zero.
        pull: gives the values for a unit's inputs from those at its outputs.
        add: the sum of two values for a tensor that is used twice.
        arrive: may change the values of a tensor, before its producer is asked.

    Returns:
        For each leaf its values by role.
    """
    flow: dict[Slot, dict[str, Any]] = {}
    producer = next((u for u in reversed(units) if loss in u.outputs), None)
    flow[loss, producer] = dict(seed)
    for unit in reversed(units):
        arrived = [flow.pop((n, unit), {}) for n in unit.outputs]
        if arrive is not None:
            slots = [(n, unit) for n in unit.outputs]
            arrived = [arrive(s, a) if a else a for s, a in zip(slots, arrived, strict=True)]
        y = {role: [a.get(role) for a in arrived] for role in seed}
        if all(v is None for values in y.values() for v in values):
            continue
        for role, values in pull(unit, y).items():
            for slot, value in zip(unit.inputs, values, strict=True):
                if value is None:
                    continue
                known = flow.setdefault(slot, {})
                before = known.get(role)
                known[role] = value if before is None else add(slot, role, before, value)
    return {node: values for (node, unit), values in flow.items() if unit is None}
