"""What differs between two emitted graphs, by the forward node that the difference belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from hesscale_fx.inspect.nodes import GENERATED, Record, Records, records
from hesscale_fx.report import table

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        source: name of the forward node, in the first graph if it is there; empty for the whole.
        module: its module's path.
        kind: ``removed`` (only in the first), ``added`` (only in the second) or ``changed``.
        what: what differs, in words.
    """

    source: str
    module: str
    kind: str
    what: str


class Difference(Sequence[Change]):
    """The changes from one graph to another, in the order of the forward; print it for a table."""

    def __init__(self, changes: list[Change]) -> None:
        self._changes = changes

    def __getitem__(self, index: Any) -> Any:
        return self._changes[index]

    def __len__(self) -> int:
        return len(self._changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self._changes)

    def __str__(self) -> str:
        if not self._changes:
            return "no difference"
        rows = [(c.module, c.source or "(all)", c.kind, c.what) for c in self._changes]
        return table(("module", "node", "", "what"), rows)

    __repr__ = __str__


def diff(hs: HesScaleModule, other: HesScaleModule) -> Difference:
    """What differs between the graphs that two modules ran last.

    Forward nodes are matched by module and operator in their order, so names that moved do not
    count. For each the operator's shape, structure and generated nodes are compared.

    Args:
        hs: the first.
        other: the second: another method, another version of the model.

    Returns:
        A `Difference`, empty (and false) if there is none.

    Raises:
        NotCapturedError: one of them has no graph yet.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> args = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> a = hesscale_fx.transform(net, nn.CrossEntropyLoss(), args)
        >>> b = hesscale_fx.transform(net, nn.CrossEntropyLoss(), args, method="hesscale_gn")
        >>> [c.module for c in a.diff(b) if c.source], len(a.diff(a))
        (['1'], 0)
    """
    one, two = records(hs), records(other)
    changes = [Change("", "", "changed", text) for text in of_wholes(one, two)]
    left, right = forward(one), forward(two)
    matcher = SequenceMatcher(None, list(map(key, left)), list(map(key, right)), autojunk=False)
    made, made_other = generated(one), generated(two)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            for a, b in zip(left[i:i_end], right[j:j_end], strict=True):
                what = compare(a, b, made.get(a.name, []), made_other.get(b.name, []))
                if what:
                    changes.append(Change(a.name, a.module, "changed", "; ".join(what)))
            continue
        for nodes, kind in ((left[i:i_end], "removed"), (right[j:j_end], "added")):
            changes += [Change(r.name, r.module, kind, f"{r.op} {r.shape}") for r in nodes]
    return Difference(changes)


def of_wholes(one: Records, two: Records) -> list[str]:
    """Method, parameters and what of them is exact."""
    found = []
    methods = [r.hs._build.method.name for r in (one, two)]
    if methods[0] != methods[1]:
        found.append(f"method {methods[0]} -> {methods[1]}")
    reports = one.program.report, two.program.report
    for name in dict.fromkeys([*reports[0], *reports[1]]):
        states = [r[name].status if name in r else "absent" for r in reports]
        if states[0] != states[1]:
            found.append(f"diagonal of {name}: {states[0]} -> {states[1]}")
    return found


def forward(found: Records) -> list[Record]:
    """Leaves and forward nodes; sizes are left out."""
    return [r for r in found if r.shape and r.role not in (*GENERATED, "output")]


def key(r: Record) -> tuple[str, str, str]:
    """What makes a node the same in another graph."""
    leaf = r.role in ("parameter", "buffer", "input")
    return r.module, r.op, r.name if leaf else ""


def generated(found: Records) -> dict[str, list[Record]]:
    """Forward node -> what was generated from it; what a unit made is its last node's."""
    made: dict[str, list[Record]] = {}
    for r in found:
        if r.role in GENERATED and r.forward:
            made.setdefault(r.forward[-1], []).append(r)
    return made


def compare(a: Record, b: Record, made: list[Record], made_other: list[Record]) -> list[str]:
    """What differs between two forward nodes and what was generated from them."""
    found = [
        f"{name} {before or 'none'} -> {after or 'none'}"
        for name, before, after in (
            ("shape", plain(a.shape), plain(b.shape)),
            ("dtype", a.dtype, b.dtype),
            ("structure", a.structure, b.structure),
        )
        if before != after
    ]
    for role in GENERATED:
        ours = Counter(r.op for r in made if r.role == role)
        theirs = Counter(r.op for r in made_other if r.role == role)
        gone, new = ours - theirs, theirs - ours
        if gone or new:
            parts = [f"-{counted(gone)}"] * bool(gone) + [f"+{counted(new)}"] * bool(new)
            counts = f"{sum(ours.values())} -> {sum(theirs.values())} nodes"
            found.append(f"{role} {counts} ({', '.join(parts)})")
    states = [
        "exact" if e else "approximate" for e in map(exactness, (made, made_other)) if e is not None
    ]
    if len(set(states)) > 1:
        found.append(f"curvature {states[0]} -> {states[1]}")
    return found


def exactness(made: list[Record]) -> bool | None:
    """Whether the curvature among generated nodes is exact; None if there is none."""
    curved = [r.exact for r in made if r.role == "curvature"]
    return all(curved) if curved else None


def plain(shape: str) -> str:
    """Without the numbers of symbols, which every capture gives anew."""
    return re.sub(r"\b[su]\d+", "s", shape)


def counted(ops: Counter[str]) -> str:
    """E.g. ``2 mul, add``."""
    return ", ".join(
        (f"{n} " if n > 1 else "") + op.removeprefix("aten.").split(".")[0] for op, n in ops.items()
    )
