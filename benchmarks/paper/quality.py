"""Approximation quality: the error of every diagonal against the exact one.

    python benchmarks/paper/quality.py [--full] [--only mlp|nets] [--out DIR]

Relative L1 error over all parameters, sum |h - exact| / sum |exact|, at initialisation and after
training, mean and standard deviation over seeds. The multilayer perceptrons are those of
`benchmarks/dial.py`: 10-16-..-16-5 in float64 on the labels of a random teacher. The other
networks are small enough for the exact diagonal: a CNN and a ResNet on scikit-learn's digits (8 x
8), and a GPT of two blocks on arithmetic progressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hesscale_fx

import kfac
from common import Row, Run, canvas, mean_and_spread, progress, seed_all, shown
from dial import TinyGPT, classifier, error, sentences, teacher_data, train
from workloads import Residual

Diagonal = dict[str, Tensor]

# Label -> options of transform, and whether the cost does not grow with the number of classes.
METHODS: dict[str, tuple[dict, bool]] = {
    "HesScale": ({}, True),
    "HesScale, calibrated": ({"calibrate": True}, True),
    "HesScale, columns=1": ({"columns": 1}, True),
    'HesScale, columns="exact"': ({"columns": "exact"}, False),
    "HesScaleGN": ({"method": "hesscale_gn"}, True),
    "BL89": ({"method": "bl89"}, True),
    "GGN": ({"method": "ggn"}, False),
    "GGN, 1 column": ({"method": "ggn", "columns": 1}, True),
    "Hutchinson": ({"method": "hutchinson"}, True),
    "squared gradient": ({"method": "empirical_fisher"}, True),
}
KFAC = {"KFAC": (None, False), "KFAC, 1 sample": (1, True)}
LABELS = [*METHODS, *KFAC]
LINEAR = {label for label, (_, linear) in {**METHODS, **KFAC}.items() if linear}
# What the paper compares, and the Gauss-Newton variant.
PAPER = {"HesScale", "HesScaleGN", "BL89", "Hutchinson", "squared gradient", "KFAC, 1 sample"}


@dataclass
class Problem:
    """A network and data on which the exact diagonal can be had."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    steps: int
    batch: int = 32
    linear_layers: bool = False  # alone, so that KFAC is defined
    separate: bool = True  # no sample sees another


@dataclass
class Size:
    """How much is done."""

    hidden: Sequence[int]
    mlp_seeds: int
    seeds: int
    training: float = 1.0  # of the steps
    networks: Sequence[str] = ("tanh MLP", "relu MLP", "tanh CNN", "relu CNN", "ResNet", "GPT")


SIZES = {
    "smoke": Size((1,), 1, 1, 0.01, ("tanh MLP", "tanh CNN")),
    "default": Size((1, 2, 3), 20, 5),
    "full": Size((1, 2, 3), 20, 20),
}


def digits(count: int = 256) -> tuple[Tensor, Tensor]:
    """Images of shape (count, 1, 8, 8) in 0..1, and labels; drawn at random."""
    data = load_digits()
    chosen = torch.randperm(len(data.target))[:count]
    return torch.tensor(data.images)[chosen, None] / 16, torch.tensor(data.target)[chosen]


def cnn(activation: type[nn.Module]) -> nn.Module:
    """Two convolutions, pooling and two linear layers; 2,146 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), activation(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 12, 3, padding=1), activation(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 24), activation(), nn.Linear(24, 10)),
    ).double()


def resnet() -> nn.Module:
    """A stem and two basic blocks with batch norm in training, and global average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(Residual(6, 6, 1), Residual(6, 12, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
    ).double()


def problems(size: Size, kind: str) -> dict[tuple[str, int], Problem]:
    """(Network, hidden layers) -> problem; 0 where hidden layers are not what is varied."""
    found: dict[tuple[str, int], Problem] = {}
    if kind == "mlp":
        for activation, name in ((nn.Tanh, "tanh"), (nn.ReLU, "relu")):
            for hidden in size.hidden:
                make = partial(classifier, hidden, activation)
                found[f"{name} MLP", hidden] = Problem(make, teacher_data, 300, linear_layers=True)
    else:
        found["tanh CNN", 0] = Problem(partial(cnn, nn.Tanh), digits, 100)
        found["relu CNN", 0] = Problem(partial(cnn, nn.ReLU), digits, 100)
        found["ResNet", 0] = Problem(resnet, digits, 50, batch=16, separate=False)
        found["GPT", 0] = Problem(lambda: TinyGPT().double(), sentences, 100, batch=8)
    return {case: problem for case, problem in found.items() if case[0] in size.networks}


def estimators(problem: Problem, net: nn.Module) -> dict[str, Callable[[Tensor, Tensor], Diagonal]]:
    """Label -> diagonal of a batch."""
    found: dict[str, Callable[[Tensor, Tensor], Diagonal]] = {}
    for label, (options, _) in {**METHODS, "exact": ({"method": "exact"}, False)}.items():
        if label == "squared gradient" and not problem.separate:
            continue  # there is no gradient of one sample
        hs = hesscale_fx.transform(net, F.cross_entropy, **options)
        found[label] = lambda x, y, hs=hs: hs(x, y).hess_diag
    if squares := found.get("squared gradient"):  # the mean of squares of the terms of a mean
        found["squared gradient"] = lambda x, y: {n: len(x) * v for n, v in squares(x, y).items()}
    if problem.linear_layers:
        for label, (columns, _) in KFAC.items():
            found[label] = lambda x, y, c=columns: kfac.diagonal(net, x, c)
    return found


def measure(name: str, hidden: int, problem: Problem, seeds: int, training: float) -> list[Row]:
    """One row for each seed, stage and method."""
    net = problem.make()
    calls = estimators(problem, net)
    rows = []
    for seed in progress(range(seeds), f"{name} {hidden or ''}"):
        seed_all(seed)
        net.load_state_dict(problem.make().state_dict())
        x, y = problem.data()
        for stage in ("initialisation", "trained"):
            if stage == "trained":
                train(net, x, y, max(1, round(training * problem.steps)))
            batch = x[: problem.batch], y[: problem.batch]
            want = calls["exact"](*batch)
            for label in LABELS:
                if label in calls:
                    off = error(calls[label](*batch), want, want)
                    row = {"network": name, "hidden": hidden, "stage": stage}
                    rows.append({**row, "method": label, "seed": seed, "error": off})
    return rows


def measure_all(size: Size, kind: str) -> list[Row]:
    """Of the MLPs, or of the other networks."""
    seeds = size.mlp_seeds if kind == "mlp" else size.seeds
    return [
        row
        for (name, hidden), problem in problems(size, kind).items()
        for row in measure(name, hidden, problem, seeds, size.training)
    ]


def errors(rows: list[Row], **where: object) -> list[float]:
    """Over the seeds of one case."""
    return [r["error"] for r in rows if all(r[k] == v for k, v in where.items())]


def report(run: Run, rows: list[Row], kind: str) -> None:
    """One table: methods by cases, and who is first."""
    cases = list(dict.fromkeys((r["network"], r["hidden"], r["stage"]) for r in rows))
    for stage in ("initialisation", "trained"):
        those = [c for c in cases if c[2] == stage]
        columns = [
            {m: errors(rows, network=n, hidden=h, stage=s, method=m) for m in LABELS}
            for n, h, s in those
        ]
        lines = [
            [label, *(entry(c[label]) for c in columns)]
            for label in LABELS
            if any(c[label] for c in columns)
        ]
        for title, among in (("first of the paper's", PAPER), ("first at linear cost", LINEAR)):
            lines.append([f"*{title}*", *(f"*{first(c, among)}*" for c in columns)])
        heads = [f"{n}, {h}" if h else n for n, h, _ in those]
        run.table(f"quality-{kind}-{stage}", ["", *heads], lines)


def entry(found: list[float]) -> str:
    """Mean and spread, of nothing and of rounding as words."""
    if not found:
        return "-"
    return "exact" if max(found) < 1e-9 else shown(found, 2)


def first(column: dict[str, list[float]], among: set[str]) -> str:
    """The method of the smallest mean."""
    means = {m: mean_and_spread(e)[0] for m, e in column.items() if e and m in among}
    return min(means, key=lambda m: means[m])


COLORS = [f"C{k}" for k in range(10)] + ["black", "navy"]
STYLES = {
    label: {"color": color, "marker": marker}
    for label, color, marker in zip(LABELS, COLORS, "osv^D<>pP*Xh", strict=True)
}


def plot_depth(rows: list[Row], size: Size) -> object:
    """MLPs: error against hidden layers."""
    cases = list(dict.fromkeys((r["network"], r["stage"]) for r in rows))
    figure = canvas(len(cases), height=3.4)
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, (name, stage) in zip(panels, cases, strict=True):
        for label in LABELS:
            runs = [
                errors(rows, network=name, hidden=h, stage=stage, method=label) for h in size.hidden
            ]
            means = [max(numpy.mean(r), 1e-3) for r in runs]  # those that are exact lie at the edge
            line = "-" if label.startswith("HesScale") else "--"
            axes.semilogy(size.hidden, means, line, label=label, lw=1, ms=5, **STYLES[label])
        axes.set(title=f"{name}, {stage}", xlabel="hidden layers", xticks=list(size.hidden))
    panels[0].set(ylabel="relative L1 error", ylim=(0.9e-3, None))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def plot_nets(rows: list[Row]) -> object:
    """The others: one panel a network, methods below each other."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    labels = [m for m in LABELS if errors(rows, method=m)]
    figure = canvas(len(networks), width=2.6, height=3.2)
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, networks, strict=True):
        for stage, marker in (("initialisation", "o"), ("trained", "s")):
            for k, label in enumerate(reversed(labels)):
                found = errors(rows, network=name, stage=stage, method=label)
                fill = STYLES[label]["color"] if stage == "trained" else "none"
                axes.semilogx(
                    [max(e, 1e-3) for e in found],
                    [k + (0.15 if stage == "initialisation" else -0.15)] * len(found),
                    **{"ls": "", "marker": marker, "ms": 4},
                    **{"color": STYLES[label]["color"], "markerfacecolor": fill},
                )
        axes.set(title=name, xlabel="relative L1 error")
        axes.set_yticks(range(len(labels)), list(reversed(labels)))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, draw."""
    run = Run(__doc__.splitlines()[0], SIZES, argv, ("mlp", "nets"))
    size: Size = run.size
    for kind in ("mlp", "nets"):
        if run.only not in (None, kind):
            continue
        rows = run.rows(f"quality-{kind}", partial(measure_all, size, kind))
        report(run, rows, kind)
        run.figure(f"quality-{kind}", plot_depth(rows, size) if kind == "mlp" else plot_nets(rows))


if __name__ == "__main__":
    main()
