"""What each module costs and how exact its diagonals are, as a table."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hesscale_fx.inspect.costs import peak
from hesscale_fx.inspect.nodes import Record, Records, records
from hesscale_fx.report import table

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule

HEAD = (
    "module",
    "type",
    "params",
    "forward",
    "gradient",
    "curvature",
    "ratio",
    "exact",
    "memory",
)
TEXTS = ("module", "type")  # the columns that are no numbers
LEGEND = (
    "forward, gradient, curvature: FLOPs of matrix products, convolutions and attention, 2 for "
    "each multiply-add; ratio: curvature to gradient; exact: parameters whose diagonal is; "
    "memory: bytes at the peak of the whole graph."
)


@dataclass(frozen=True)
class Row:
    """One module with all that it contains.

    Attributes:
        module: its path; empty for the whole, ``loss`` for the loss.
        type: name of its class.
        parameters: number of elements of its parameters; shared ones count once.
        forward: FLOPs of the forward.
        gradient: FLOPs that the gradient adds.
        curvature: FLOPs that the curvature adds.
        exact: how many of its parameter tensors' diagonals are exact.
        differentiated: how many parameter tensors are differentiated.
        memory: bytes that its nodes hold at the peak of the whole graph.
    """

    module: str
    type: str
    parameters: int = 0
    forward: int = 0
    gradient: int = 0
    curvature: int = 0
    exact: int = 0
    differentiated: int = 0
    memory: int = 0

    @property
    def ratio(self) -> float:
        """Curvature FLOPs over gradient FLOPs; NaN without either."""
        return self.curvature / self.gradient if self.gradient else math.nan

    def plus(self, record: Record, memory: int) -> Row:
        """With a node's costs added."""
        return replace(
            self,
            forward=self.forward + record.flops * (record.role == "forward"),
            gradient=self.gradient + record.flops * (record.role == "gradient"),
            curvature=self.curvature + record.flops * (record.role == "curvature"),
            memory=self.memory + memory,
        )


class Summary(Sequence[Row]):
    """One `Row` a module, outer before inner; print it for a table.

    Attributes:
        total: the row of the whole graph.
        peak: bytes at the moment when a run holds most, besides arguments and parameters.
        peak_at: name of the node that runs at that moment.
        nodes: number of nodes.
        of_data: sizes that only the values of a run give, such as the number of entries that a
            mask selects; they count as 1.
    """

    def __init__(
        self,
        rows: list[Row],
        total: Row,
        peak: int,
        peak_at: str,
        nodes: int,
        method: str,
        of_data: tuple[str, ...] = (),
    ) -> None:
        self._rows = rows
        self.total = total
        self.peak = peak
        self.peak_at = peak_at
        self.nodes = nodes
        self.method = method
        self.of_data = of_data

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return next(r for r in [self.total, *self._rows] if r.module == index)
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def overhead(self) -> float:
        """FLOPs of a run over those of the loss and its gradient alone; NaN if there are none."""
        plain = self.total.forward + self.total.gradient
        return (plain + self.total.curvature) / plain if plain else math.nan

    def __str__(self) -> str:
        return table(HEAD, [cells(r) for r in [*self._rows, self.total]]) + "\n" + self._foot()

    __repr__ = __str__

    def _foot(self) -> str:
        at = f" at {self.peak_at}" if self.peak_at else ""
        unknown = f" Sizes that depend on data count as 1: {', '.join(self.of_data)}."
        times = "" if math.isnan(self.overhead) else f"{self.overhead:.2f} times"
        return (
            f"{self.method}, {self.nodes} nodes; "
            + (f"{times} the FLOPs of a plain gradient; " if times else "")
            + f"{in_units(self.peak, 'B')} at peak{at}.\n"
            + textwrap.fill(LEGEND + unknown * bool(self.of_data), 80)
        )

    def _repr_html_(self) -> str:
        """For notebooks."""
        # Notebooks right-align all cells; leading blanks show how modules nest.
        styles = [
            f"text-align:{'left' if name in TEXTS else 'right'};white-space:pre" for name in HEAD
        ]

        def line(tag: str, texts: Sequence[str]) -> str:
            pairs = zip(styles, texts, strict=True)
            shown = (f"<{tag} style='{style}'>{html.escape(t)}</{tag}>" for style, t in pairs)
            return f"<tr>{''.join(shown)}</tr>"

        head = line("th", HEAD)
        body = "".join(line("td", cells(r)) for r in self._rows) + line("th", cells(self.total))
        foot = html.escape(self._foot())
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table><p>{foot}</p>"

    def __rich__(self) -> Any:
        """For `rich.print`."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        found = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            caption=self._foot(),
            caption_justify="left",
        )
        for name in HEAD:
            found.add_column(name, justify="left" if name in TEXTS else "right", no_wrap=True)
        for row in self._rows:
            found.add_row(*map(escape, cells(row)))
        found.add_section()
        found.add_row(*map(escape, cells(self.total)), style="bold")
        return found


def summary(hs: HesScaleModule, *args: Any, depth: int | None = None, **kwargs: Any) -> Summary:
    """Per module parameters, FLOPs, exactness and memory at peak.

    A rule's cost is counted at the module whose operators the rule belongs to; a region that spans
    modules at the module of its last operator. Costs of a module include its submodules'.

    Args:
        hs: what `hesscale_fx.transform` returned.
        *args: what a call would get; free sizes have its values. Without, the graph that served
            last at the sizes of its example.
        depth: how many levels of modules to show; None shows all.
        **kwargs: the model's keyword arguments.

    Returns:
        A `Summary`: a sequence of `Row`, also by module path; ``total`` has the sums. FLOPs are
        those of `torch.utils.flop_counter`, bytes those of the tensors that live (without the
        allocator's overhead and kernels' own work space).

    Raises:
        NotCapturedError: there is no graph yet and no arguments are given.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), (x, y))
        >>> row = hs.summary()["2"]
        >>> row.parameters, row.forward, row.gradient, row.curvature, row.exact
        (27, 240, 480, 480, 2)
    """
    return of_records(records(hs, args, kwargs), depth)


def of_records(found: Records, depth: int | None = None) -> Summary:
    """The summary of a graph whose records are there."""
    hs = found.hs
    moment = peak(found.program.graph, found.sizes)
    rows = empty_rows(hs)
    for record in found:
        memory = moment.held.get(record.name, 0)
        for path in within(record.module, rows):
            rows[path] = rows[path].plus(record, memory)
    for name, entry in found.program.report.items():
        for path in within(name.rpartition(".")[0], rows):
            row = rows[path]
            rows[path] = replace(
                row, exact=row.exact + entry.exact, differentiated=row.differentiated + 1
            )
    total = replace(rows.pop(""), module="total")
    shown = [r for r in rows.values() if depth is None or r.module.count(".") < depth]
    method = hs._build.method.name
    of_data = tuple(sorted(found.sizes.of_data))
    return Summary(shown, total, moment.total, moment.at, len(found), method, of_data)


def empty_rows(hs: HesScaleModule) -> dict[str, Row]:
    """A row for each module of the model and its loss, with its parameters counted."""
    build = hs._build
    rows = {}
    for inner, module in build.step.named_modules(remove_duplicate=False):
        path = inner.removeprefix("model").removeprefix(".")
        path = path.removeprefix(build.prefix) if path != build.prefix.rstrip(".") else ""
        if path not in rows:
            rows[path] = Row(path, type(module).__name__)
    rows[""] = Row("", type(hs._model).__name__.removeprefix("_"))
    if build.loss is not None and "loss" not in rows:
        rows["loss"] = Row("loss", getattr(build.loss, "__name__", type(build.loss).__name__))
    for name, (_, parameter) in build.names.items():
        for path in within(name.rpartition(".")[0], rows):
            rows[path] = replace(rows[path], parameters=rows[path].parameters + parameter.numel())
    return rows


def within(path: str, rows: dict[str, Row]) -> list[str]:
    """The paths of a module and of all that contain it, among `rows`."""
    parts = path.split(".") if path else []
    return [p for p in (".".join(parts[:i]) for i in range(len(parts) + 1)) if p in rows]


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    path = row.module.split(".")
    exact = f"{row.exact}/{row.differentiated}" if row.differentiated else "-"
    return (
        "  " * (len(path) - 1) + path[-1],
        row.type,
        f"{row.parameters:,}" if row.parameters else "-",
        *(in_units(n) if n else "-" for n in (row.forward, row.gradient, row.curvature)),
        "-" if math.isnan(row.ratio) else f"{row.ratio:.2f}",
        exact,
        in_units(row.memory) if row.memory else "-",
    )


def in_units(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix, e.g. ``1.3 M``."""
    prefixes = ("", "k", "M", "G", "T", "P")
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {prefixes[power]}{unit}".strip()
