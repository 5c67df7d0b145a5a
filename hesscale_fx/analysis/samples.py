"""Which dimension of each tensor counts the samples, and how parameters are used along it.

Methods that square per sample need to know what a sample is. It is not declared but found: a class
of dimensions that units carry over in order from one tensor to the next, and along which no unit
that matters combines entries. In a network without batch norm in training that is the batch. Where
there is none, all that enters the loss is one sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from hesscale_fx.analysis.axes import size_of
from hesscale_fx.analysis.exactness import (
    Slot,
    StayApart,
    all_dims,
    is_reduced,
    passage_of,
)
from hesscale_fx.analysis.kinds import is_part
from hesscale_fx.analysis.units import Partition, Unit


@dataclass(frozen=True)
class Rows:
    """Where a tensor has its samples: `dim` runs over (samples, inner) with `inner` the faster."""

    dim: int
    inner: int = 1


class Samples(StayApart):
    """The samples of one graph.

    Args:
        units: producers before consumers.
        partition: what is linear and flat.
        boundary: the model's output, whose samples are meant; None: those of a leading dimension.
    """

    def __init__(self, units: list[Unit], partition: Partition, boundary: fx.Node | None) -> None:
        self._lead: dict[tuple[Slot, int], sympy.Expr] = {}  # extents of leading factors
        super().__init__(units, partition, lambda unit: False)
        self._users: dict[Slot, int] = {}
        for slot in (s for unit in units for s in unit.inputs):
            self._users[slot] = self._users.get(slot, 0) + 1
        self._slots = [*self._users, *((n, u) for u in units for n in u.outputs)]
        self._class = self._choose(boundary)
        self.count = self._count()
        if self.count is None:
            self._class = None
        self._rows = self._find_rows()
        self._after = self._combined(units)

    @property
    def found(self) -> bool:
        """Whether there are samples that do not interact."""
        return self._class is not None

    def rows(self, slot: Slot) -> Rows | None:
        """Where a tensor has its samples; None: it belongs to all or to none of them."""
        return self._rows.get(slot)

    def _find_rows(self) -> dict[Slot, Rows]:
        found: dict[Slot, Rows] = {}
        for slot in self._slots if self.found else ():
            for d in all_dims(slot[0]):
                if self._find((slot, d)) == self._class:
                    size = size_of(slot[0].meta["val"].shape[d])
                    found[slot] = Rows(d, int(sympy.cancel(size / self.count)))
        return found

    def uses(self, unit: Unit) -> tuple[str, ...]:
        """For each input how the unit uses it; see `methods.base.Place`."""
        found = []
        for position, slot in enumerate(unit.inputs):
            if self.rows(slot) is not None or slot in self._after:
                found.append("rows")
            elif all(self.rows((n, unit)) is None for n in unit.outputs):
                met = any((n, unit) in self._after for n in unit.outputs)
                found.append("met" if met else "rows")
            else:
                plain = len(unit.outputs) == 1 and self._is_plain(slot)
                use = "once" if plain else "shared"
                found.append("own" if self.is_own(unit, position) else use)
        return tuple(found)

    def _combined(self, units: list[Unit]) -> set[Slot]:
        """Tensors without samples that depend on tensors with."""
        after: set[Slot] = set()
        for unit in units:
            if any(self.rows(s) is not None or s in after for s in unit.inputs):
                after |= {(n, unit) for n in unit.outputs if self.rows((n, unit)) is None}
        return after

    def is_own(self, unit: Unit, position: int) -> bool:
        """Whether no element of an input has two uses in one sample, and none elsewhere.

        Then squares of its derivatives per sample are squares of its derivatives per use.
        """
        slot = unit.inputs[position]
        with_rows = [n for n in unit.outputs if self.rows((n, unit)) is not None]
        if len(with_rows) != 1 or len(unit.outputs) != 1 or not self._is_plain(slot):
            return False
        rows = self.rows((with_rows[0], unit))
        assert rows is not None
        return rows.inner == 1 and self._spread(unit, position) <= {rows.dim}

    def _is_plain(self, slot: Slot) -> bool:
        """Whether each element of a leaf reaches at most one of `slot`, and nothing else."""
        if self._users.get(slot, 0) != 1:
            return False
        unit = slot[1]
        return unit is None or (
            len(unit.outputs) == 1
            and all(
                not self._spread(unit, i) and self._is_plain(s) for i, s in enumerate(unit.inputs)
            )
        )

    def _spread(self, unit: Unit, position: int) -> set[int]:
        """Dimensions of the one output along which one element of an input reaches several."""
        node, output = unit.inputs[position][0], unit.outputs[0]
        if unit.region is None:
            return passage_of(unit.call, output, node).spread
        dims = unit.region.dims
        own = {a for d in dims[node] for a in d}
        row = unit.region.row if is_reduced(node, unit.region.nodes) else set()
        return {i for i, d in enumerate(dims[output]) if set(d) - own or set(d) & row}

    # --- classes of dimensions ------------------------------------------------------------------

    def _choose(self, boundary: fx.Node | None) -> Any:
        """The class of dimensions that counts the samples."""
        slots = [s for s in self._slots if s[1] is not None]
        if boundary is not None:
            at = [s for s in slots if s[0] is boundary]
            candidates = [self._find((s, d)) for s in at[:1] for d in sorted(all_dims(s[0]))]
        else:
            candidates = [self._find((s, 0)) for s in slots if all_dims(s[0])]
        allowed = dict.fromkeys(c for c in candidates if c not in self._mixed)
        size = {c: sum(self._has(s, c) for s in slots) for c in allowed}
        return max(allowed, key=lambda c: size[c], default=None)

    def _has(self, slot: Slot, found: Any) -> bool:
        return any(self._find((slot, d)) == found for d in all_dims(slot[0]))

    def _count(self) -> sympy.Expr | None:
        """The number of samples, if every tensor's dimension is a whole multiple of it."""
        if self._class is None:
            return None
        sizes = [
            size_of(slot[0].meta["val"].shape[d])
            for slot in self._slots
            for d in all_dims(slot[0])
            if self._find((slot, d)) == self._class
        ]
        sizes += [size for key, size in self._lead.items() if self._find(key) == self._class]
        for count in sizes:
            ratios = [sympy.cancel(size / count) for size in sizes]
            if all(r.is_Integer for r in ratios):
                return count
        return None

    def _through_region(self, unit: Unit, slots: list[Slot]) -> None:
        """As the base class, but of a dimension with several factors only the first is followed."""
        region = unit.region
        assert region is not None
        flat = self._is_flat(unit)
        slots = [*dict.fromkeys(unit.inputs), *((n, unit) for n in unit.outputs)]
        for slot in slots:
            for d, axes in enumerate(region.dims[slot[0]]):
                if axes:
                    self._join((slot, d), (unit, axes[0]))
                    self._mix(unit, axes[1:])
                    size = size_of(slot[0].meta["val"].shape[d])
                    for axis in axes[1:]:
                        size = sympy.cancel(size / self._extent(unit, axis))
                    self._lead[slot, d] = size
        if not flat:  # above a linear end nothing has to stay apart
            self._mix(unit, region.row)

    def _extent(self, unit: Unit, axis: int) -> Any:
        assert unit.region is not None
        known = unit.region.sizes.get(axis)
        return known if known is not None else sympy.Symbol(f"axis{axis}", positive=True)

    def _is_flat(self, unit: Unit) -> bool:
        return all(self._partition.is_flat(n) for n in unit.outputs) and all(
            is_part(n) or self._partition.is_linear(n) for n in unit.nodes
        )

    def _mix(self, unit: Unit, axes: Iterable[int]) -> None:
        self._mixed.update((unit, a) for a in axes)

    def _through_call(self, unit: Unit, inputs: list[Slot], outputs: list[Slot]) -> None:
        flat = self._is_flat(unit)
        outputs = outputs or [(n, unit) for n in unit.outputs]
        mixed = set(self._mixed)
        super()._through_call(unit, inputs, outputs)
        if flat:
            self._mixed = mixed
