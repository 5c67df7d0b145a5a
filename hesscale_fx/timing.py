"""What a call costs in time, against a plain gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hesscale_fx.module import HesScaleModule
from hesscale_fx.report import table
from hesscale_fx.workload import Workload


@dataclass(frozen=True)
class Timing:
    """One thing timed: median and interquartile range in seconds."""

    name: str
    median: float
    spread: float


@dataclass(frozen=True)
class Comparison:
    """Rows of `Timing`; each ratio is to the plain gradient of the same kind."""

    rows: list[tuple[Timing, float]]

    @property
    def ratio(self) -> float:
        """What a call costs in plain gradients, not compiled."""
        return next(r for t, r in self.rows if t.name == "hesscale_fx")

    def __str__(self) -> str:
        shown = [
            (t.name, f"{1e3 * t.median:.3f}", f"{1e3 * t.spread:.3f}", f"{r:.2f}")
            for t, r in self.rows
        ]
        return table(("", "ms (median)", "quartiles apart", "ratio"), shown)


def compare(
    hs: HesScaleModule, work: Workload, seconds: float, compiled: bool = False
) -> Comparison:
    """Time `hs` and the gradient by autograd at the arguments of `work`."""
    names = hs._build.names
    parameters = [p for _, p in names.values() if p.requires_grad]
    step = hs._build.step
    step.bind(work.args, {})

    def plain(*args: Any) -> Any:
        return torch.autograd.grad(step(*args), parameters, allow_unused=True)

    def both(gradient: Callable, call: Callable, suffix: str = "") -> list[tuple[Timing, float]]:
        base = measure(f"gradient{suffix}", gradient, work.args, seconds)
        ours = measure(f"hesscale_fx{suffix}", call, work.args, seconds)
        return [(base, 1.0), (ours, ours.median / base.median)]

    rows = both(plain, hs)
    if compiled:
        forward = torch.compile(step)

        def fast(*args: Any) -> Any:
            return torch.autograd.grad(forward(*args), parameters, allow_unused=True)

        rows += both(fast, torch.compile(hs), ", compiled")
    return Comparison(rows)


def measure(name: str, call: Callable, args: tuple, seconds: float) -> Timing:
    """The median of many runs, after one to warm up."""
    from torch.utils.benchmark import Timer

    call(*args)
    timer = Timer("call(*args)", globals={"call": call, "args": args})
    found = timer.blocked_autorange(min_run_time=seconds)
    return Timing(name, found.median, found.iqr)
