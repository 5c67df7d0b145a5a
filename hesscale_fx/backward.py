"""The reverse walk over units: order and accumulation. Knows no operator and no method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, fx

from hesscale_fx.analysis.units import Unit
from hesscale_fx.methods import Method
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import add

Key = tuple[fx.Node, "Unit | None"]


def reverse(
    units: list[Unit],
    loss: tuple[fx.Node, Tensor],
    method: Method,
    evaluate: Callable[[Unit], Evaluation],
    inside: Callable[[Unit], bool],
    scope: Callable[[fx.Node, Unit | None, str], AbstractContextManager],
    mark: Callable[[fx.Node, Unit | None, str, Tensor], None],
) -> dict[fx.Node, dict[str, Tensor | None]]:
    """Pull the method's values from the loss to every leaf.

    Args:
        units: producers before consumers.
        loss: the loss' node and value.
        method: what flows.
        evaluate: the rule of a unit at the traced point.
        inside: whether a unit lies before the boundary.
        scope: entered around all that is computed for a (source node, unit, role).
        mark: told of each value that a unit gave to a source node.

    Returns:
        For each leaf its values by role; None is zero.
    """
    flow: dict[Key, dict[str, Tensor | None]] = {}
    producer = next((u for u in reversed(units) if loss[0] in u.outputs), None)
    with scope(loss[0], None, "grad"):
        flow[loss[0], producer] = method.seed(loss[1])
    for unit in reversed(units):
        arrived = [flow.pop((n, unit), {}) for n in unit.outputs]
        y = {role: [a.get(role) for a in arrived] for role in method.roles}
        if all(v is None for values in y.values() for v in values):
            continue
        at = evaluate(unit)
        for role in method.roles:
            with scope(unit.nodes[-1], unit, role):
                results = method.pull(role, at, y, inside(unit))
            for key, value in zip(unit.inputs, results, strict=True):
                if value is not None:
                    check_shape(key[0], value, role)
                    mark(key[0], unit, role, value)
                    with scope(key[0], unit, role):
                        slot = flow.setdefault(key, {})
                        slot[role] = total = add(slot.get(role), value)
                    if total is not None and total is not value:
                        mark(key[0], unit, role, total)
    return {node: values for (node, unit), values in flow.items() if unit is None}


def check_shape(node: fx.Node, value: Tensor, role: str) -> None:
    """A rule that gives another shape than its input's is a bug; never let it broadcast."""
    want, have = node.meta["val"].shape, value.shape
    ok = len(want) == len(have) and all(
        not isinstance(a, int) or not isinstance(b, int) or a == b
        for a, b in zip(want, have, strict=True)
    )
    assert ok, f"{role} of {node.name}: shape {tuple(have)}, expected {tuple(want)}"
