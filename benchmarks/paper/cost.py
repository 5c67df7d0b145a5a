"""Cost: time of a step of every method against parameters and against classes.

    python benchmarks/paper/cost.py [--full] [--out DIR]

Processor time on one thread of loss, gradients and diagonal, over that of loss and gradients by
autograd; methods take turns, so that a busy machine hits all alike, and the ratio is that of the
smallest times. The networks are multilayer perceptrons of three square layers with relu and
cross-entropy, batch 64: of growing width with ten classes, and of width 256 with growing numbers of
classes. What takes longer than half a second is measured once and left out of larger networks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import hesscale_fx

import kfac
from common import Row, Run, canvas, number, progress, seed_all
from others import hutchinson
from workloads import Workload, mlp

PLAIN = "gradient"
METHODS: dict[str, dict] = {
    "HesScale": {},
    "HesScaleGN": {"method": "hesscale_gn"},
    "BL89": {"method": "bl89"},
    "HesScale, columns=1": {"columns": 1},
    "HesScale, calibrated": {"calibrate": True},
    "HesScale, calibrate=10": {"calibrate": 10},
    'HesScale, columns="exact"': {"columns": "exact"},
    "GGN": {"method": "ggn"},
    "squared gradient": {"method": "empirical_fisher"},
    "Hutchinson": {"method": "hutchinson"},
    "exact": {"method": "exact"},
}
AUTOGRAD = "Hutchinson, double backward"
KFAC = {"KFAC": None, "KFAC, 1 sample": 1}
LABELS = [PLAIN, *METHODS, AUTOGRAD, *KFAC]
LIMIT = 0.5  # seconds a step
MANY = 10  # calls in a measurement of what does not cost the same each time


@dataclass
class Size:
    """How much is done."""

    widths: Sequence[int]
    classes: Sequence[int]
    rounds: int


SIZES = {
    "smoke": Size((8,), (3,), 1),
    "default": Size((32, 64, 128, 256, 512), (2, 10, 30, 100, 300), 15),
    "full": Size((32, 64, 128, 256, 512, 1024, 2048), (2, 10, 30, 100, 300, 1000), 30),
}


def plain(work: Workload) -> Callable[[], object]:
    """Loss and gradients."""
    parameters = list(work.model.parameters())
    return lambda: torch.autograd.grad(
        work.loss(work.model(*work.inputs), *work.targets), parameters
    )


def with_gradient(work: Workload, columns: int | None) -> Callable[[], object]:
    """KFAC's diagonal and, as everything else here has them, the gradients."""
    step = plain(work)
    return lambda: (step(), kfac.diagonal(work.model, *work.inputs, columns))


def several(call: Callable[[], object]) -> Callable[[], None]:
    """Of a method that refreshes every tenth call."""

    def calls() -> None:
        for _ in range(MANY):
            call()

    return calls


def measure(axis: str, at: int, work: Workload, rounds: int, skip: set[str]) -> list[Row]:
    """One row for each method; `skip` learns what took too long."""
    calls: dict[str, Callable[[], object]] = {PLAIN: plain(work), AUTOGRAD: hutchinson(work)}
    for label, options in METHODS.items():
        if label not in skip:
            hs = hesscale_fx.transform(work.model, work.loss, work.args, **options)
            calls[label] = partial(hs, *work.args)
            if "calibrate=10" in label:
                calls[label] = several(calls[label])
    calls |= {label: with_gradient(work, columns) for label, columns in KFAC.items()}
    times: dict[str, list[float]] = {label: [] for label in LABELS if label in calls}
    for r in progress(range(rounds + 1), f"{axis} {at}"):
        for label in times:
            if label in skip:
                continue
            start = time.process_time()
            calls[label]()
            taken = (time.process_time() - start) / (MANY if "calibrate=10" in label else 1)
            if r == 1:  # the first warmed up
                times[label].clear()
            times[label].append(taken)
            if taken > LIMIT:
                skip.add(label)
    base = min(times[PLAIN])
    size = sum(p.numel() for p in work.model.parameters())
    return [
        {
            **{"axis": axis, "at": at, "parameters": size, "method": label},
            **{"ms": 1e3 * min(t), "median_ms": 1e3 * statistics.median(t), "ratio": min(t) / base},
        }
        for label, t in times.items()
    ]


def measure_all(size: Size) -> list[Row]:
    """Both axes."""
    rows = []
    for axis, points in (("width", size.widths), ("classes", size.classes)):
        skip: set[str] = set() if axis == "width" else {"exact"}
        for at in points:
            seed_all(0)
            sizes = [at] * 4 + [10] if axis == "width" else [256] * 4 + [at]
            rows += measure(axis, at, mlp(sizes, 64), size.rounds, skip)
    return rows


def report(run: Run, rows: list[Row]) -> None:
    """Ratios to the gradient's time, for each axis."""
    for axis, name in (("width", "cost-parameters"), ("classes", "cost-classes")):
        part = [r for r in rows if r["axis"] == axis]
        points = list(dict.fromkeys(r["at"] for r in part))
        found = {(r["method"], r["at"]): r for r in part}
        lines = [
            [m, *(number(found[m, a]["ratio"]) if (m, a) in found else "-" for a in points)]
            for m in LABELS[1:]
            if any((m, a) in found for a in points)
        ]
        base = [f"{number(found[PLAIN, a]['ms'])} ms" for a in points]
        heads = [
            f"{found[PLAIN, a]['parameters']:,} parameters" if axis == "width" else f"{a} classes"
            for a in points
        ]
        run.table(name, ["", *heads], [[f"*{PLAIN}*", *base], *lines])


def plot(rows: list[Row]) -> object:
    """Milliseconds against parameters and against classes."""
    figure = canvas(2, width=4.6, height=3.6)
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), ("width", "classes"), strict=True):
        for k, label in enumerate(LABELS):
            part = [r for r in rows if r["axis"] == axis and r["method"] == label]
            x = [r["parameters"] if axis == "width" else r["at"] for r in part]
            style = {"color": "black" if label == PLAIN else f"C{k % 10}", "ms": 4, "lw": 1}
            style["ls"] = "-" if k <= 10 else "--"  # there are ten colors
            y = [r["ms"] for r in part]
            axes.loglog(x, y, label=label, marker="osv^D<>pP*Xhd8.1"[k], **style)
        axes.set(xlabel="parameters, 10 classes" if axis == "width" else "classes, width 256")
    left = figure.axes[0]
    left.set_ylabel("ms a step")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, draw."""
    run = Run(__doc__.splitlines()[0], SIZES, argv)
    rows = run.rows("cost", partial(measure_all, run.size))
    report(run, rows)
    run.figure("cost", plot(rows))


if __name__ == "__main__":
    main()
