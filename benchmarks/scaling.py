"""Whether the cost grows as the gradient's does: the ratio against model size and batch size.

    python benchmarks/scaling.py [--plot ratio.svg] [--rounds 9] [--largest 100]

Prints both tables; with --plot (it needs matplotlib, extra `bench`) draws them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

import hesscale_fx

from step import gradient_step, interleaved
from workloads import Workload, mlp

WIDTHS = (592, 1024, 1840, 3264, 5792)  # three square layers: 1 to 100 million parameters
BATCHES = (1, 4, 16, 64, 256, 1024)


def measure(work: Workload, rounds: int) -> tuple[float, float]:
    """Million parameters, and the ratio of medians, eager."""
    hs = hesscale_fx.transform(work.model, work.loss, work.args)
    calls = {"plain": gradient_step(work, False), "ours": lambda: hs(*work.args)}
    times = interleaved(calls, rounds)
    million = sum(p.numel() for p in work.model.parameters()) / 1e6
    return million, times["ours"].median / times["plain"].median


def plot(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    """One panel a curve, the abscissa logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install 'hesscale_fx[bench]'")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (label, points) in zip(panels, curves.items(), strict=True):
        axes.semilogx(*zip(*points, strict=True), marker="o")
        axes.axhline(5 / 3, color="gray", linestyle="--", label="5/3: two more products to three")
        axes.set(xlabel=label, ylim=(0, 3))
    panels[0].set_ylabel("time / plain gradient step")
    panels[0].legend()
    figure.savefig(path)


def main() -> None:
    """Print the tables, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="file to draw into: .svg, .pdf, .png")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--largest", type=float, default=100, help="million parameters")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    torch.manual_seed(0)
    curves: dict[str, list[tuple[float, float]]] = {"million parameters": [], "batch size": []}
    widths = [w for w in WIDTHS if 3 * w * w <= 1.05e6 * options.largest]
    for width in widths:
        point = measure(mlp([width] * 4 + [10], 64), options.rounds)
        curves["million parameters"].append(point)
        print(f"{point[0]:8.1f} million parameters, batch 64: {point[1]:.2f}", flush=True)
    for batch in BATCHES:
        _, found = measure(mlp([1024] * 4 + [10], batch), options.rounds)
        curves["batch size"].append((batch, found))
        print(f"     3.2 million parameters, batch {batch}: {found:.2f}", flush=True)
    if options.plot is not None:
        plot(options.plot, curves)


if __name__ == "__main__":
    main()
