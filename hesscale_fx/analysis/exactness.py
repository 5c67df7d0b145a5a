"""Which diagonals are exact, and where an off-diagonal part was dropped.

The recursion is exact at a tensor x if it is exact at every output y of the units that use it and
the off-diagonal part of the Hessian of y, which is dropped there, could not have reached the
diagonal of x. That part lies along *coupled* dimensions of y: entries whose other indices differ
have no common second derivative (samples of a batch stay apart until something mixes them). One
element of x reaches the dimensions that the unit *spreads* it along (a weight of a linear layer the
samples, but one feature). If no coupled dimension is spread along, nothing was lost.

Several uses of one tensor add to this that their branches must not meet again, except where the
Hessian is zero. Everything here errs on the side of calling a diagonal approximate.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hesscale_fx.analysis.units import Partition, Unit, is_part

aten = torch.ops.aten

Slot = tuple[fx.Node, "Unit | None"]


@dataclass
class State:
    """What is known of the Hessian of one tensor."""

    exact: bool = True
    coupled: set[int] = field(default_factory=set)  # dimensions along which it is not diagonal
    lost: dict[fx.Node, None] = field(default_factory=dict)  # where off-diagonal parts were dropped

    def join(self, other: State) -> State:
        return State(
            self.exact and other.exact,
            self.coupled | other.coupled,
            {**self.lost, **other.lost},
        )


@dataclass
class Passage:
    """How one operand x of a call is connected to the output y, by dimensions.

    `spread`: dimensions of y along which one element of x reaches several; `through`: dimension of
    y -> the dimension of x it repeats; `mixed`: dimensions of x along which elements of x meet in
    one element of y, or that some other dimension of y depends on.
    """

    spread: set[int]
    through: dict[int, int]
    mixed: set[int]


def exactness(partition: Partition) -> tuple[dict[Slot, State], dict[fx.Node, State]]:
    """The state of every tensor: of inner ones by (node, producing unit), and of the leaves."""
    return Exactness(partition).run()


class Exactness:
    """One run of the analysis, in the order of the reverse walk."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._units = partition.units
        self._index = {unit: i for i, unit in enumerate(self._units)}
        self._users: dict[Slot, list[Unit]] = {}
        for unit in self._units:
            for slot in unit.inputs:
                self._users.setdefault(slot, []).append(unit)
        self._below = self._curved_below()
        self._states: dict[Slot, State] = {}

    def run(self) -> tuple[dict[Slot, State], dict[fx.Node, State]]:
        for unit in reversed(self._units):
            outputs = [self._state((n, unit)) for n in unit.outputs]
            apart = self._outputs_stay_apart(unit)
            for position, slot in enumerate(unit.inputs):
                state = self._pull(unit, outputs, position)
                if apart is not None:
                    state = State(False, all_dims(slot[0]), {**state.lost, apart: None})
                known = self._states.get(slot)
                self._states[slot] = state if known is None else known.join(state)
        leaves = {}
        for slot in self._users:
            self._check_branches(slot)
            if slot[1] is None:
                leaves[slot[0]] = self._states[slot]
        return self._states, leaves

    def _state(self, slot: Slot) -> State:
        self._check_branches(slot)
        return self._states.setdefault(slot, State())

    # --- branches that meet again -----------------------------------------------------------------

    def _curved_below(self) -> dict[Unit, int]:
        """For each unit the units at or below it that are not linear with a zero Hessian."""
        below: dict[Unit, int] = {}
        consumers: dict[Unit, list[Unit]] = {}
        for unit in self._units:
            for _, producer in unit.inputs:
                if producer is not None:
                    consumers.setdefault(producer, []).append(unit)
        for unit in reversed(self._units):
            bits = 0 if self._is_flat(unit) else 1 << self._index[unit]
            for consumer in consumers.get(unit, ()):
                bits |= below[consumer]
            below[unit] = bits
        return below

    def _is_flat(self, unit: Unit) -> bool:
        return all(
            self._partition.is_flat(n) and (is_part(n) or self._partition.is_linear(n))
            for n in unit.nodes
        )

    def _check_branches(self, slot: Slot) -> None:
        """A tensor whose uses meet again below has lost their cross terms."""
        users = self._users.get(slot, [])
        for a, b in itertools.combinations(users, 2):
            common = self._below[a] & self._below[b]
            if common:
                meeting = self._units[common.bit_length() - 1 if a is b else lowest(common)]
                state = self._states.get(slot, State())
                self._states[slot] = State(
                    False, all_dims(slot[0]), {**state.lost, meeting.nodes[0]: None}
                )
                return

    def _outputs_stay_apart(self, unit: Unit) -> fx.Node | None:
        """None if the outputs of a unit do not meet again below; else where they do."""
        for a, b in itertools.combinations(unit.outputs, 2):
            reach_a = self._reach((a, unit))
            common = reach_a & self._reach((b, unit))
            if common:
                return self._units[lowest(common)].nodes[0]
        return None

    def _reach(self, slot: Slot) -> int:
        bits = 0
        for user in self._users.get(slot, ()):
            bits |= self._below[user]
        return bits

    # --- through one unit ---------------------------------------------------------------------

    def _pull(self, unit: Unit, outputs: list[State], position: int) -> State:
        if unit.region is not None:
            return self._pull_region(unit, outputs, position)
        node = unit.inputs[position][0]
        result = State(coupled=set())
        for output, state in zip(unit.outputs, outputs, strict=True):
            if self._partition.is_flat(output):
                if not self._partition.is_linear(unit.call):
                    result.coupled = all_dims(node)
                continue
            passage = passage_of(unit.call, output, node)
            result = result.join(pass_through(state, passage, output, node))
        return result

    def _pull_region(self, unit: Unit, outputs: list[State], position: int) -> State:
        region = unit.region
        assert region is not None
        node = unit.inputs[position][0]
        own = {a for d in region.dims[node] for a in d}
        result = State()
        coupled_axes: set[int] = set()
        for output, state in zip(unit.outputs, outputs, strict=True):
            dims = region.dims[output]
            axes = {a for d in dims for a in d}
            if self._partition.is_flat(output):
                if not self._is_flat(unit):
                    coupled_axes |= region.row
                continue
            coupled = {a for d in state.coupled for a in dims[d]}
            spread = (axes - own) | region.row
            lost = bool(coupled & spread)
            result = result.join(
                State(
                    state.exact and not lost,
                    set(),
                    {**state.lost, **({output: None} if lost else {})},
                )
            )
            coupled_axes |= coupled | region.row
        result.coupled = {i for i, d in enumerate(region.dims[node]) if coupled_axes & set(d)}
        return result


def lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, torch.Tensor) else value[0].dim()


def all_dims(node: fx.Node) -> set[int]:
    return set(range(rank(node)))


def pass_through(state: State, passage: Passage, output: fx.Node, node: fx.Node) -> State:
    """The state of an operand, given that of the output."""
    lost = bool(state.coupled & passage.spread)
    coupled = set(passage.mixed)
    for d in state.coupled:
        if d in passage.through:
            coupled.add(passage.through[d])
        else:  # it depends on dimensions of x that nothing else repeats
            coupled |= all_dims(node) - set(passage.through.values())
    return State(
        state.exact and not lost,
        coupled,
        {**state.lost, **({output: None} if lost else {})},
    )


# --- dimensions of single operators ---------------------------------------------------------------

# One element of x reaches at most one of y, and the other way round, along one acted dimension.
ALONG = {
    aten.slice.Tensor: 1, aten.narrow.default: 1, aten.index_select.default: None,
    aten.cat.default: None, aten.stack.default: None, aten.constant_pad_nd.default: None,
    aten.flip.default: None, aten.roll.default: None,
}  # fmt: skip


def passage_of(call: fx.Node, output: fx.Node, node: fx.Node) -> Passage:
    """The passage of operand `node` of an operator that is no region."""
    operands: list[Any] = list(call.args)
    first = operands[0] is node
    y, x = rank(output), rank(node)
    target = call.target
    if target is aten.linear.default and not (first and operands[1] is node):
        return _linear(y, x, first, operands[1] is node)
    if target in (aten.mm.default, aten.bmm.default) and operands[0] is not operands[1]:
        batch = y - 2
        inner = x - 1 if first else x - 2
        spread = {y - 1} if first else {y - 2}
        kept = batch if first else batch + 1
        return Passage(spread, {**{d: d for d in range(batch)}, kept: kept}, {inner})
    if target is aten.convolution.default and operands[0] is not operands[1]:
        if first:
            return Passage(set(range(1, y)), {0: 0}, set(range(1, x)))
        return Passage({0, *range(2, y)}, {}, set(range(x)))
    if target in ALONG and x == y:
        return Passage(set(), {d: d for d in range(y)}, set())
    if target is aten.select.int:
        dim = int(operands[1]) % x
        return Passage(set(), {d: d if d < dim else d + 1 for d in range(y)}, set())
    if is_part(output) and target in (aten.unbind.int,):
        dim = int(operands[1] if len(operands) > 1 else 0) % x
        return Passage(set(), {d: d if d < dim else d + 1 for d in range(y)}, set())
    if is_part(output) and target in (aten.split.Tensor, aten.split_with_sizes.default):
        return Passage(set(), {d: d for d in range(y)}, set())
    name = str(target)
    if "pool" in name or "upsample" in name:
        spatial = set(range(2, y))
        sums = set() if "max_pool" in name else set(range(2, x))
        return Passage(spatial, {0: 0, 1: 1} if x == y and x > 2 else {}, sums)
    if target is aten.embedding.default:
        return Passage(set(range(y - 1)), {y - 1: 1}, set())
    return Passage(all_dims(output), {}, all_dims(node))


def _linear(y: int, x: int, first: bool, weight: bool) -> Passage:
    batch = set(range(y - 1))
    if first:
        return Passage({y - 1}, {d: d for d in batch}, {x - 1})
    if weight:
        return Passage(batch, {y - 1: 0}, {1})
    return Passage(batch, {y - 1: 0}, set())
