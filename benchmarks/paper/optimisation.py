"""Optimisation: loss and accuracy against steps and against seconds.

    python benchmarks/paper/optimisation.py [--full] [--only NAME] [--out DIR]

Every optimizer gets the same budget: a grid of learning rates, the same for all, by two values of
one more setting (the damping eps; for SGD its momentum); the rest is at its defaults. What has the
smallest training loss at the end, mean over the seeds of the grid, is run again on other seeds, and
these runs are what is reported. Seconds are processor time of steps on one thread, without
evaluation.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from pytorch_optimizer import AdaHessian
from torch import Tensor, nn

import hesscale_fx
from hesscale_fx.optim import AdaHesScale, AdaHesScaleGN
from hesscale_fx.optim.adapters import hessian_list

from common import Row, Run, canvas, curve, number, progress, seed_all, shown
from data import Data, digits, mnist1d, text
from workloads import GPT

RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
POINTS = 20  # of a curve


@dataclass
class Task:
    """A network, data, and how long it is trained."""

    make: Callable[[], nn.Module]
    data: Data
    batch: int
    steps: int


@dataclass
class Method:
    """An optimizer, and the options of `transform` that give it its diagonal, if it needs one."""

    make: Callable[..., torch.optim.Optimizer]
    options: dict | None = None
    setting: str = "eps"  # the other one that is tuned
    values: Sequence[float] = (1e-8, 1e-2)
    passed: bool = False  # as step(hessian=...)


METHODS = {
    "SGD": Method(torch.optim.SGD, setting="momentum", values=(0.9, 0.99)),
    "Adam": Method(torch.optim.Adam),
    "AdaHessian": Method(AdaHessian, {"method": "hutchinson"}, passed=True),
    "AdaHesScale": Method(AdaHesScale, {}),
    "AdaHesScaleGN": Method(AdaHesScaleGN, {"method": "hesscale_gn"}),
    "AdaHesScale, columns=1": Method(AdaHesScale, {"columns": 1}),
}


@dataclass
class Size:
    """How much is done."""

    steps: float  # of the task's
    rates: Sequence[float]
    tuning: int  # seeds
    seeds: int


SIZES = {
    "smoke": Size(0.02, RATES[:1], 1, 1),
    "default": Size(1, RATES, 2, 5),
    "full": Size(4, RATES, 3, 20),
}


def mlp() -> nn.Module:
    """64-64-64-10, tanh."""
    hidden = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def cnn() -> nn.Module:
    """The convolutional network of the MNIST-1D paper."""
    return nn.Sequential(
        *(nn.Conv1d(1, 25, 5, 2, 1), nn.ReLU()),
        *(nn.Conv1d(25, 25, 3, 2, 1), nn.ReLU()),
        *(nn.Conv1d(25, 25, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(125, 10)),
    )


def gpt_task() -> Task:
    """Two blocks of width 32 on windows of 32 characters."""
    data, alphabet = text(32)
    few = Data(data.x, data.y, data.x_test[::20], data.y_test[::20])
    return Task(lambda: GPT(2, 32, 4, alphabet, 32), few, 8, 100)


TASKS: dict[str, Callable[[], Task]] = {
    "digits-mlp": lambda: Task(mlp, digits(), 64, 200),
    "mnist1d-cnn": lambda: Task(cnn, mnist1d(), 64, 200),
    "text-gpt": gpt_task,
}


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of samples, or of the characters of several sequences."""
    return F.cross_entropy(logits, y.flatten())


@dataclass
class Trainer:
    """One network with one optimizer's step; captured once and used for every run."""

    task: Task
    method: Method
    net: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.net = self.task.make()
        options = self.method.options
        self.hs = None
        if options is not None:
            self.hs = hesscale_fx.transform(self.net, cross_entropy, self.batch(), **options)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Samples drawn at random."""
        data = self.task.data
        chosen = torch.randint(len(data.x), (self.task.batch,))
        return data.x[chosen], data.y[chosen]

    def step(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
        """Make one step; the loss before it."""
        if self.hs is None:
            optimizer.zero_grad()
            loss = cross_entropy(self.net(x), y)
            loss.backward()
            optimizer.step()
            return loss.item()
        self.hs.zero_grad()
        loss = self.hs.backward(x, y)
        if self.method.passed:
            optimizer.step(hessian=hessian_list(optimizer))  # type: ignore[call-arg]
        else:
            optimizer.step()
        return loss.item()

    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy on the data for testing."""
        with torch.no_grad():
            logits = self.net(self.task.data.x_test)
            y = self.task.data.y_test.flatten()
            return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()

    def run(self, rate: float, setting: float, seed: int, steps: int, evaluate: bool) -> list[Row]:
        """Train; one row for each point of the curve, with the mean loss since the one before."""
        seed_all(seed)
        self.net.load_state_dict(self.task.make().state_dict())
        optimizer = self.method.make(
            self.net.parameters(), lr=rate, **{self.method.setting: setting}
        )
        rows, losses, times = [], [], []
        for step in range(1, steps + 1):
            x, y = self.batch()
            start = time.process_time()
            losses.append(self.step(optimizer, x, y))
            times.append(time.process_time() - start)
            if not losses[-1] < 1e3:  # diverged, or not a number
                losses = [math.inf]
            if step % max(1, steps // POINTS) == 0 or losses == [math.inf]:
                test = self.evaluate() if evaluate else (math.nan, math.nan)
                row = {"step": step, "loss": statistics.mean(losses), "seconds": sum(times)}
                rows.append({**row, "test_loss": test[0], "accuracy": test[1]})
                if losses == [math.inf]:
                    break
                losses = []
        return rows


def measure(name: str, size: Size) -> list[Row]:
    """Every run of a task."""
    task = TASKS[name]()
    steps = max(2, round(size.steps * task.steps))
    rows: list[Row] = []
    total = len(METHODS) * (2 * len(size.rates) * size.tuning + size.seeds)
    with progress(None, name, total) as bar:
        for label, method in METHODS.items():
            trainer = Trainer(task, method)

            def run(
                purpose: str, at: tuple[float, float], seed: int, label=label, trainer=trainer
            ) -> float:
                bar.set_postfix_str(f"{label}, {at[0]:g}")
                found = trainer.run(*at, seed, steps, purpose == "test")
                kept = found if purpose == "test" else found[-1:]
                case = {"method": label, "purpose": purpose, "seed": seed}
                case |= {"rate": at[0], "setting": at[1]}
                rows.extend({**case, **row} for row in kept)
                bar.update()
                return found[-1]["loss"]

            seeds = range(1000, 1000 + size.tuning)
            grid = itertools.product(size.rates, method.values)
            means = {at: statistics.mean(run("tune", at, s) for s in seeds) for at in grid}
            best = min(means, key=lambda at: means[at])
            for seed in range(size.seeds):
                run("test", best, seed)
    return rows


def report(run: Run, name: str, rows: list[Row]) -> None:
    """One line for each optimizer: its rate, what it reached, what a step costs."""
    lines = []
    tested = {m: [r for r in rows if r["method"] == m and r["purpose"] == "test"] for m in METHODS}
    for label, points in tested.items():
        last = max(r["step"] for r in points)
        ends = [r for r in points if r["step"] == last]
        diverged = len({r["seed"] for r in points}) > len(ends)
        rate, setting = points[0]["rate"], points[0]["setting"]
        edge = rate in (min(run.size.rates), max(run.size.rates))
        texts = [
            shown([math.inf if diverged else r[k] for r in ends]) for k in ("loss", "test_loss")
        ]
        accuracy = shown([100 * r["accuracy"] for r in ends])
        step = 1e3 * statistics.median(r["seconds"] for r in ends) / last
        lines.append(
            [
                *(label, f"{rate:g}{' (edge)' if edge else ''}"),
                *(f"{METHODS[label].setting} {setting:g}", *texts, accuracy, number(step, 2)),
            ]
        )
    heads = ["", "rate", "setting", "training loss", "test loss", "test accuracy, %", "ms a step"]
    run.table(f"optimisation-{name}", heads, lines)


def plot(name: str, rows: list[Row]) -> object:
    """Training loss and accuracy, against steps and against seconds."""
    figure = canvas(4)
    panels = figure.subplots(1, 4)
    for k, label in enumerate(METHODS):
        tested = [r for r in rows if r["method"] == label and r["purpose"] == "test"]
        runs = [[r for r in tested if r["seed"] == s] for s in sorted({r["seed"] for r in tested})]
        runs = [r for r in runs if math.isfinite(r[-1]["loss"])]  # those that did not diverge
        if not runs:
            continue
        steps = [r["step"] for r in runs[0]]
        seconds = statistics.median(r[-1]["seconds"] for r in runs) / steps[-1]
        for axes, quantity in zip(panels, ("loss", "accuracy", "loss", "accuracy"), strict=True):
            x = steps if axes in panels[:2] else [seconds * s for s in steps]
            curve(axes, x, [[p[quantity] for p in r] for r in runs], label=label, color=f"C{k}")
    for axes, quantity in zip(panels, ("training loss", "test accuracy") * 2, strict=True):
        axes.set(xlabel="step" if axes in panels[:2] else "processor seconds", ylabel=quantity)
    figure.suptitle(name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, draw."""
    run = Run(__doc__.splitlines()[0], SIZES, argv, tuple(TASKS))
    for name in TASKS:
        if run.only in (None, name):
            rows = run.rows(f"optimisation-{name}", partial(measure, name, run.size))
            report(run, name, rows)
            run.figure(f"optimisation-{name}", plot(name, rows))


if __name__ == "__main__":
    main()
