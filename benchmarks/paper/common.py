"""What the experiments share: command line, seeds, progress, CSV, tables and plots."""

from __future__ import annotations

import argparse
import csv
import math
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # dial and workloads; so import this module first
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("The experiments draw with matplotlib: pip install 'hesscale_fx[paper]'")

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "hesscale_fx",  # the same figure is the same file
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

Size = TypeVar("Size")
Row = dict[str, Any]


class Run:
    """One run of an experiment: its size and where its results go.

    Results are written to ``--out``; with ``--write`` the tables and figures that
    `docs/experiments.md` shows are brought up to date too.
    """

    def __init__(
        self,
        description: str,
        sizes: dict[str, Any],
        argv: Sequence[str] | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        parser = argparse.ArgumentParser(description=description)
        chosen = parser.add_mutually_exclusive_group()
        chosen.add_argument("--full", action="store_true", help="all seeds and sizes")
        chosen.add_argument("--smoke", action="store_true", help="seconds: does it run at all")
        parser.add_argument("--out", type=Path, default=ROOT / "build" / "paper", help="folder")
        parser.add_argument("--redraw", action="store_true", help="from the CSV of the last run")
        parser.add_argument(
            "--write", action="store_true", help="bring the documentation up to date"
        )
        if parts:
            parser.add_argument("--only", choices=parts, help="one part")
        given = parser.parse_args(argv)
        self.size = sizes["full" if given.full else "smoke" if given.smoke else "default"]
        self.out: Path = given.out
        self.docs = ROOT / "docs" if given.write else None
        self.redraw: bool = given.redraw
        self.only: str | None = getattr(given, "only", None)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    def rows(self, name: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """What was measured, written as CSV; with ``--redraw`` what was written before."""
        path = self.out / f"{name}.csv"
        if self.redraw:
            with path.open(newline="", encoding="utf-8") as file:
                return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]
        rows = measure()
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table in Markdown, and put it into its place in the documentation."""
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        print(f"\n{name}\n{text}", flush=True)
        (self.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        if self.docs is not None:
            page = self.docs / "experiments.md"
            page.write_text(placed(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")

    def figure(self, name: str, figure: Figure) -> None:
        """Save it as SVG."""
        folders = [self.out] + ([self.docs / "figures"] if self.docs is not None else [])
        for folder in folders:
            folder.mkdir(exist_ok=True)
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            # Matplotlib ends lines in blanks.
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r" +$", "", text, flags=re.MULTILINE), encoding="utf-8")


def value(text: str) -> Any:
    """What a field of a CSV file says."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def placed(page: str, name: str, text: str) -> str:
    """The page with the text between ``<!-- name -->`` and ``<!-- end -->``."""
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    found, count = re.subn(
        pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page, count=1, flags=re.DOTALL
    )
    if not count:
        raise ValueError(f"The page has no place for {name}: <!-- {name} --> ... <!-- end -->.")
    return found


def seed_all(seed: int) -> None:
    """Of every generator in use."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
    """The items, with a bar on standard error."""
    return tqdm(items, label, total=total, leave=False, dynamic_ncols=True)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for a single one); infinity stays infinity."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and spread as text."""
    mean, spread = mean_and_spread(values)
    if mean == math.inf:
        return "diverges"
    return f"{number(mean, digits)} ± {number(spread, 2)}"


def number(value: float, digits: int = 3) -> str:
    """Digits that count, never an exponent where a reader expects none."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        return f"{value:.{max(decimals, 0)}f}"
    return f"{value:.{digits - 1}e}"


def canvas(columns: int, rows: int = 1, width: float = 3.1, height: float = 2.8) -> Figure:
    """A figure for so many panels."""
    return Figure(figsize=(width * columns, height * rows), layout="constrained")


def curve(axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], **style: Any) -> None:
    """Mean over runs, and the band of one standard deviation."""
    mean, spread = numpy.mean(runs, axis=0), numpy.std(runs, axis=0)
    (line,) = axes.plot(x, mean, **style)
    axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, lw=0)
