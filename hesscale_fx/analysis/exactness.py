"""Which diagonals are exact, and where an off-diagonal part was dropped.

The recursion is exact at a tensor x if it is exact at every output y of the units that use it and
the off-diagonal part of the Hessian of y, which is dropped there, could not have reached the
diagonal of x. That part lies along *coupled* dimensions of y: entries whose other indices differ
have no common second derivative (samples of a batch stay apart until something mixes them). One
element of x reaches the dimensions that the unit *spreads* it along (a weight of a linear layer the
samples, but one feature). If no coupled dimension is spread along, nothing was lost.

Several uses of one tensor add to this that their branches must not meet again, except where the
Hessian is zero, or where no element is used twice (the gates of an LSTM cut from one projection).
Branches that meet couple a tensor along all dimensions but those along which nothing in the graph
below mixes. Everything here errs on the side of calling a diagonal approximate.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hesscale_fx.analysis.kinds import is_part, operands_of
from hesscale_fx.analysis.picks import index_of
from hesscale_fx.analysis.units import Partition, Unit
from hesscale_fx.structures import table
from hesscale_fx.structures.columns import Estimate
from hesscale_fx.structures.composite import Composite
from hesscale_fx.structures.fourier import DIMENSIONS, dimensions

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
    y -> the dimension of x it repeats, if x is indexed in order; `mixed`: dimensions of x along
    which elements of x meet in one element of y; `picked`: dimensions of x in which an element of y
    may have any place, so that they couple as soon as y does; `moved`: dimensions of y in `through`
    whose index is not that of x.
    """

    spread: set[int]
    through: dict[int, int]
    mixed: set[int]
    picked: set[int] = field(default_factory=set)
    moved: set[int] = field(default_factory=set)


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
        self._apart = StayApart(self._units, partition, self._is_flat)
        self._states: dict[Slot, State] = {}

    def run(self) -> tuple[dict[Slot, State], dict[fx.Node, State]]:
        for unit in reversed(self._units):
            outputs = [self._state((n, unit)) for n in unit.outputs]
            meeting = self._outputs_meet(unit)
            for position, slot in enumerate(unit.inputs):
                state = self._pull(unit, outputs, position)
                if meeting is not None:
                    state = self._met(slot, state, meeting, unit.call.target not in DISJOINT)
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
        shared = None
        for a, b in itertools.combinations(users, 2):
            common = self._below[a] & self._below[b]
            if not common:
                continue
            shared = self._units[lowest(common)].nodes[0]
            if not are_disjoint(a.call, b.call):
                break
        else:
            if shared is not None:
                self._states[slot] = self._met(slot, self._states[slot], shared, False)
            return
        self._states[slot] = self._met(slot, self._states[slot], shared, True)

    def _outputs_meet(self, unit: Unit) -> fx.Node | None:
        """Where two outputs of a unit meet again below."""
        for a, b in itertools.combinations(unit.outputs, 2):
            common = self._reach((a, unit)) & self._reach((b, unit))
            if common:
                return self._units[lowest(common)].nodes[0]
        return None

    def _met(self, slot: Slot, state: State, meeting: fx.Node, lost: bool) -> State:
        """The state of a tensor whose branches meet: cross terms couple it and may be lost."""
        return State(
            state.exact and not lost,
            state.coupled | self._apart.mixed(slot),
            {**state.lost, meeting: None} if lost else state.lost,
        )

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
        if isinstance(unit.rule, Estimate):
            result = State(False, set(), {unit.call: None})
        for output, state in zip(unit.outputs, outputs, strict=True):
            if self._partition.is_flat(output):
                if not self._partition.is_linear(unit.call):
                    result.coupled |= all_dims(node)
                continue
            passage = passage_of(unit.call, output, node)
            result = result.join(pass_through(state, passage, output, node))
        return result

    def _pull_region(self, unit: Unit, outputs: list[State], position: int) -> State:
        region = unit.region
        assert region is not None
        node = unit.inputs[position][0]
        own = {a for d in region.dims[node] for a in d}
        row = region.row if is_reduced(node, region.nodes) else set()
        result = State()
        coupled_axes: set[int] = set()
        for output, state in zip(unit.outputs, outputs, strict=True):
            dims = region.dims[output]
            axes = {a for d in dims for a in d}
            if self._partition.is_flat(output):
                if not self._is_flat(unit):
                    coupled_axes |= row
                continue
            coupled = {a for d in state.coupled for a in dims[d]}
            spread = (axes - own) | row
            lost = bool(coupled & spread)
            result = result.join(
                State(
                    state.exact and not lost,
                    set(),
                    {**state.lost, **({output: None} if lost else {})},
                )
            )
            coupled_axes |= coupled | row
        result.coupled = {i for i, d in enumerate(region.dims[node]) if coupled_axes & set(d)}
        return result


class StayApart:
    """Dimensions along which entries of different index never meet anywhere below.

    Like the batch of a network without batch norm. Dimensions that units carry over in order form
    one class, over all tensors. A class is mixed if a unit that curves, or above one, combines its
    entries, moves them, or carries a class twice (``x + x.T``).
    """

    def __init__(self, units: list[Unit], partition: Partition, is_flat: Any) -> None:
        self._partition = partition
        self._parent: dict[Any, Any] = {}
        self._mixed: set[Any] = set()
        slots: dict[Slot, None] = {}
        for unit in units:
            inputs = dict.fromkeys(unit.inputs)
            outputs: list[Slot] = [(n, unit) for n in unit.outputs if not partition.is_flat(n)]
            slots.update(inputs)
            slots.update(dict.fromkeys(outputs))
            if is_flat(unit):
                continue
            if unit.region is not None:
                self._through_region(unit, [*inputs, *outputs])
            else:
                self._through_call(unit, list(inputs), outputs)
        for slot in slots:
            classes = [self._find((slot, d)) for d in all_dims(slot[0])]
            self._mixed.update(c for c in classes if classes.count(c) > 1)
        self._mixed = {self._find(c) for c in self._mixed}

    def mixed(self, slot: Slot) -> set[int]:
        """The other dimensions of a tensor."""
        return {d for d in all_dims(slot[0]) if self._find((slot, d)) in self._mixed}

    def _through_region(self, unit: Unit, slots: list[Slot]) -> None:
        assert unit.region is not None
        whole: dict[int, tuple[int, ...]] = {}  # axis -> the dimension that it is, or is part of
        for slot in slots:
            for d, axes in enumerate(unit.region.dims[slot[0]]):
                key = (unit, tuple(axes))
                if not axes:
                    continue
                self._join((slot, d), key)
                for a in axes:
                    if a in unit.region.row or whole.setdefault(a, tuple(axes)) != tuple(axes):
                        self._mixed.update((key, (unit, whole.get(a))))

    def _through_call(self, unit: Unit, inputs: list[Slot], outputs: list[Slot]) -> None:
        curves = len(outputs) < len(unit.outputs) and not self._partition.is_linear(unit.call)
        for slot in inputs:
            kept = set() if curves else all_dims(slot[0])
            for output in outputs:
                passage = passage_of(unit.call, output[0], slot[0])
                in_order = {d: e for d, e in passage.through.items() if d not in passage.moved}
                for d, e in in_order.items():
                    self._join((output, d), (slot, e))
                kept &= set(in_order.values())
            self._mixed.update((slot, d) for d in all_dims(slot[0]) - kept)

    def _find(self, key: Any) -> Any:
        root = key
        while root in self._parent:
            root = self._parent[root]
        while key != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def _join(self, a: Any, b: Any) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self._parent[a] = b


def is_reduced(node: fx.Node, members: list[fx.Node]) -> bool:
    """Whether a reduction in a region depends on an input of it (not so of a norm's scale)."""
    reached = {node}
    for member in members:
        if any(a in reached for a in operands_of(member)):
            if member.target in table.REDUCTIONS:
                return True
            reached.add(member)
    return False


def are_disjoint(a: fx.Node, b: fx.Node) -> bool:
    """Whether two calls take parts of one tensor that share no element."""
    first, second = part_of(a), part_of(b)
    if first is None or second is None or first[0] != second[0]:
        return False
    return first[2] <= second[1] or second[2] <= first[1]


def part_of(call: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, start and end of what a slice or select takes, if they are known."""
    if call.target not in (aten.slice.Tensor, aten.select.int):
        return None
    x: Any = call.args[0]
    args = [*call.args[1:], *(0, 0, 2**63 - 1)[len(call.args) - 1 :]]
    dim, start = int(args[0]) % rank(x), args[1]  # type: ignore[arg-type]
    end = args[2] if call.target is aten.slice.Tensor else None
    size = x.meta["val"].shape[dim]
    bounds = []
    for bound in (start, end):
        if bound is not None and not isinstance(bound, int):
            return None
        if bound is not None and bound < 0:
            if not isinstance(size, int):
                return None
            bound = max(bound + size, 0)
        bounds.append(bound)
    low = bounds[0] or 0
    if call.target is aten.select.int:
        return dim, low, low + 1
    return dim, low, 2**63 - 1 if bounds[1] is None else bounds[1]


def lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def rank(node: fx.Node) -> int:
    """Dimensions of a tensor, a complex one seen as pairs of real numbers."""
    value = node.meta["val"]
    value = value if isinstance(value, torch.Tensor) else value[0]
    return value.dim() + value.is_complex()


def all_dims(node: fx.Node) -> set[int]:
    return set(range(rank(node)))


def pass_through(state: State, passage: Passage, output: fx.Node, node: fx.Node) -> State:
    """The state of an operand, given that of the output."""
    lost = bool(state.coupled & passage.spread)
    coupled = set(passage.mixed)
    if state.coupled:
        coupled |= passage.picked
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

# Each element of y is one of x, none twice, at the same place but for one dimension.
ALONG = {
    aten.slice.Tensor, aten.cat.default, aten.constant_pad_nd.default, aten.flip.default,
    aten.roll.default, aten.split.Tensor, aten.split_with_sizes.default,
}  # fmt: skip
# Each element of y is one of x, none twice, at any place.
BIJECTIONS = {
    aten.view.default, aten._unsafe_view.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.roll.default,
}  # fmt: skip
# The same, at any place along one dimension; and those where elements of x may appear twice.
ORDERED = {aten.sort.default, aten.sort.stable, aten.topk.default}
GATHERED = {aten.gather.default, aten.cummax.default, aten.cummin.default}
# Outputs that share no element of x.
DISJOINT = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def passage_of(call: fx.Node, output: fx.Node, node: fx.Node) -> Passage:
    """The passage of operand `node` of an operator that is no region."""
    args: list[Any] = list(call.args)
    y, x = rank(output), rank(node)
    same = {d: d for d in range(y)}
    target = call.target
    unknown = Passage(all_dims(output), {}, all_dims(node))
    if isinstance(target, Composite):
        part = output.args[1] if is_part(output) else 0
        return _only(target.through[args.index(node), part], y, x)  # type: ignore[index]
    if table.any_complex((call.args, output)):
        return _complex(call, output, node) or unknown
    if operands_of(call).count(node) > 1:
        return unknown
    if target is aten.linear.default and rank(args[1]) == 2:
        return _linear(y, x, args[0] is node, args[1] is node)
    if target in (aten.mm.default, aten.bmm.default):
        batch = {d: d for d in range(y - 2)}
        if args[0] is node:
            return Passage({y - 1}, {**batch, y - 2: y - 2}, {x - 1})
        return Passage({y - 2}, {**batch, y - 1: y - 1}, {x - 2})
    if target is aten.convolution.default:
        return _convolution(y, x, args, node)
    if target in ALONG and x == y and (target is not aten.roll.default or len(args) > 2):
        return Passage(set(), same, set(), moved=_acted(args, target, x))
    if target in (aten.tril.default, aten.triu.default):
        return Passage(set(), same, set())
    if target in BIJECTIONS:
        return Passage(set(), {}, set(), all_dims(node))
    if target in (aten.select.int, aten.unbind.int):
        dim = int(args[1] if len(args) > 1 else 0) % x
        return Passage(set(), {d: d if d < dim else d + 1 for d in range(y)}, set())
    if target is aten.stack.default:
        dim = int(args[1] if len(args) > 1 else 0) % y
        return Passage(set(), {d: d - (d > dim) for d in range(y) if d != dim}, set())
    if target is aten.cumsum.default and x:
        dim = int(args[1]) % x
        return Passage({dim}, _without(same, dim), {dim})
    if target in ORDERED | GATHERED and x:
        position = 2 if target is aten.topk.default else 1
        if target is aten.sort.stable or len(args) <= position:
            return unknown
        dim = int(args[position]) % x
        return Passage({dim} if target in GATHERED else set(), _without(same, dim), set(), {dim})
    if target is aten.embedding.default:
        return _indexed(0, y - 1, y)
    if target is aten.index_select.default and x == y and x:
        return _indexed(int(args[1]) % x, 1, y)
    if index_of(call) is not None:
        return Passage(set(), {0: 0}, set(), {1})
    if target is aten.index.Tensor:
        given = [(d, i) for d, i in enumerate(args[1]) if i is not None]
        if len(given) == 1 and given[0][1].meta["val"].dtype in (torch.int64, torch.int32):
            return _indexed(given[0][0], rank(given[0][1]), y)
    found = re.search(r"(pool|upsample)\w*?([123])d", str(target))
    if found:  # the last dimensions; no two elements of x meet in a maximum
        spatial = set(range(y - int(found[2]), y))
        outer = {d: d for d in range(y) if d not in spatial}
        largest = "max_pool" in str(target)
        return Passage(spatial, outer, set() if largest else spatial, spatial if largest else set())
    return unknown


def _only(through: dict[int, int], y: int, x: int) -> Passage:
    """What is known to stay in place; all else may meet all else."""
    spread, mixed = set(range(y)) - set(through), set(range(x)) - set(through.values())
    return Passage(spread, dict(through), mixed)


def _complex(call: fx.Node, output: fx.Node, node: fx.Node) -> Passage | None:
    """Of an operator on complex tensors, as pairs of real numbers along a last dimension."""
    y, x = output.meta["val"], node.meta["val"]
    outer = {d: d for d in range(y.dim())}
    if call.target in (aten.view_as_real.default, aten.view_as_complex.default):
        return Passage(set(), {d: d for d in range(rank(node))}, set())
    if call.target in DIMENSIONS:
        mixed = dimensions(call.target, call.args, call.kwargs, x.dim())
        kept = {d: d for d in outer if d not in mixed}
        pair = (mixed | {v.dim()} if v.is_complex() else mixed for v in (y, x))
        return Passage(next(pair), kept, next(pair))
    moves = call.target in table.COMPLEX_SELECTION
    elementwise = moves or table.is_pointwise(call.target)
    if not elementwise or list(map(str, y.shape)) != list(map(str, x.shape)):
        return None
    if call.target in table.IDENTITIES and y.is_complex() and x.is_complex():
        return Passage(set(), {d: d for d in range(rank(node))}, set())
    # An element of a pair reaches both of another, unless it is only put there or taken out.
    spread = {y.dim()} if y.is_complex() and not moves else set()
    return Passage(spread, outer, {x.dim()} if x.is_complex() and not moves else set())


def _without(same: dict[int, int], dim: int) -> dict[int, int]:
    return {d: e for d, e in same.items() if d != dim}


def _acted(args: list[Any], target: Any, rank: int) -> set[int]:
    """The dimensions along which one of `ALONG` moves elements."""
    if target is aten.constant_pad_nd.default:
        return set(range(rank - len(args[1]) // 2, rank))
    position = {aten.roll.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2}
    index = position.get(target, 1)
    dims = args[index] if len(args) > index else 0
    return {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _indexed(dim: int, count: int, y: int) -> Passage:
    """Dimension `dim` of x replaced by the `count` dimensions of an index."""
    spread = set(range(dim, dim + count))
    through = {d: d if d < dim else d - count + 1 for d in range(y) if d not in spread}
    return Passage(spread, through, set(), set())


def _convolution(y: int, x: int, args: list[Any], node: fx.Node) -> Passage:
    spatial = set(range(2, y))
    if args[0] is node:
        return Passage({1, *spatial}, {0: 0}, set(range(1, x)))
    if args[1] is not node:
        return Passage({0, *spatial}, {1: 0}, set())
    transposed, groups = args[6], args[8]
    channel = 1 if transposed else 0
    if transposed and groups != 1:
        return Passage({0, *spatial}, {}, set(range(x)))
    return Passage({0, *spatial}, {1: channel}, set(range(x)) - {channel})


def _linear(y: int, x: int, first: bool, weight: bool) -> Passage:
    batch = set(range(y - 1))
    if first:
        return Passage({y - 1}, {d: d for d in batch}, {x - 1})
    if weight:
        return Passage(batch, {y - 1: 0}, {1})
    return Passage(batch, {y - 1: 0}, set())
