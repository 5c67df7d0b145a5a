"""What is exact, per parameter; and how far off the rest is, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A place where an off-diagonal part of a Hessian was dropped."""

    node: str  # in the captured graph
    source: str  # the user's own line, may be empty

    def __str__(self) -> str:
        return f"{self.node} ({self.source})" if self.source else self.node


@dataclass(frozen=True)
class Entry:
    """One parameter of a `Report`."""

    exact: bool
    lost: tuple[Loss, ...]  # empty if exact

    @property
    def status(self) -> str:
        """``"exact"`` or ``"approximate"``."""
        return "exact" if self.exact else "approximate"


class Report(Mapping[str, Entry]):
    """Parameter name -> whether its diagonal is exact and, if not, where precision was lost.

    What is called exact equals the Hessian diagonal (for ``"hesscale_gn"`` that of the generalized
    Gauss-Newton matrix) to rounding; what is called approximate may be exact all the same.

    Attributes:
        of: ``"Hessian"`` or ``"Gauss-Newton"``.
        way: how the graph was captured, e.g. ``"torch.export"``.
        fixed: what the capture had to fix of values that come from data, with the source line;
            each is checked at every call.
        split: of methods with columns, how they come from the loss, and whether it is surely
            convex; else empty.
        joined: what is several operators but one unit, by the columns of its Jacobian, with the
            source line.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        of: str,
        way: str = "",
        fixed: tuple[str, ...] = (),
        split: str = "",
        joined: tuple[str, ...] = (),
    ) -> None:
        self._entries = entries
        self.of = of
        self.way = way
        self.fixed = fixed
        self.split = split
        self.joined = joined

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __str__(self) -> str:
        exact = sum(e.exact for e in self._entries.values())
        rows = [
            (name, e.status, "; ".join(map(str, e.lost[:2])) + ("; ..." if len(e.lost) > 2 else ""))
            for name, e in self._entries.items()
        ]
        head = f"{self.of}: {exact} of {len(self)} diagonals are exact"
        if self.way:
            head += f"; captured by {self.way}"
        if self.split:
            head += f"\nloss: {self.split}"
        if self.joined:
            head += "\none unit each, by columns:\n  " + "\n  ".join(self.joined)
        if self.fixed:
            head += "\nfixed, and checked at each call:\n  " + "\n  ".join(self.fixed)
        return head + "\n" + table(("parameter", "diagonal", "off-diagonal part dropped at"), rows)

    __repr__ = __str__


class LossCurvature(NamedTuple):
    """The trace of the loss's Hessian at the model's output, in two parts.

    Attributes:
        positive: the sum of positive eigenvalues, which columns carry.
        negative: that of the others, at most 0, which is left to the recursion.
    """

    positive: float
    negative: float

    @property
    def share(self) -> float:
        """How much of both is negative, between 0 and 1."""
        whole = self.positive - self.negative
        return abs(self.negative) / whole if whole else 0.0


@dataclass(frozen=True)
class Agreement:
    """One row of a `Verification`.

    Attributes:
        samples: number of coordinates compared.
        error: relative L1 error, sum |h - exact| / sum |exact|.
        correlation: Pearson's, NaN if either is constant.
        signs: share of coordinates whose signs agree.
    """

    samples: int
    error: float
    correlation: float
    signs: float

    @classmethod
    def of(cls, value: Tensor, exact: Tensor) -> Agreement:
        """Compare two vectors."""
        value, exact = value.double(), exact.double()
        total = exact.abs().sum().item()
        difference = (value - exact).abs().sum().item()
        error = difference / total if total else (0.0 if not difference else math.inf)
        a, b = value - value.mean(), exact - exact.mean()
        scale = (a.norm() * b.norm()).item()
        correlation = (a @ b).item() / scale if scale else math.nan
        signs = (value.sign() == exact.sign()).double().mean().item()
        return cls(value.numel(), error, correlation, signs)


class Verification(Mapping[str, Agreement]):
    """Parameter name -> how the diagonal agrees with the exact one; `overall` pools all."""

    def __init__(self, rows: dict[str, Agreement], overall: Agreement) -> None:
        self._rows = rows
        self.overall = overall

    def __getitem__(self, name: str) -> Agreement:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        rows = [
            (name, str(a.samples), f"{a.error:.2e}", f"{a.correlation:.4f}", f"{a.signs:.1%}")
            for name, a in [*self._rows.items(), ("overall", self.overall)]
        ]
        return table(("parameter", "sampled", "L1 error", "correlation", "signs agree"), rows)

    __repr__ = __str__


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of text, aligned."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [head, tuple("-" * w for w in widths), *rows]
    ]
    return "\n".join(lines)
