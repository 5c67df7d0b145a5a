"""What a second-order step costs: the ratio to a plain gradient step of the same model.

    python benchmarks/step.py [workload ...] [--rounds 30] [--no-compile] [--others]
        [--method NAME] [--bfloat16] [--every K] [--cold] [--device cuda] [--precision NAME]

Calls are timed in turns, so that a busy machine hits all alike; the table shows the median of each
call's time over that of loss and gradient, eager against eager and compiled against compiled, with
quartiles of the ratio from round to round. Memory is the peak of an eager call over the gradient's;
the parameters count once in both, and the diagonal that is returned is allowed for. With --others
what else gives a diagonal runs in the same rounds: BackPACK where it knows the layers, and
Hutchinson's estimator by double backward. With --bfloat16 a line more says how far the diagonal is
from that in float32, and with --every the time is the mean of the K calls of a round. Where there
is a CUDA device, a ResNet-50 and a GPT-2 follow on it, in float32, in TF32 and with bfloat16
parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

import hesscale_fx

from memory import ratio as memory_ratio
from others import others
from workloads import LARGE, WORKLOADS, Workload

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass
class Timing:
    """Seconds of one call, round by round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)


def finished(call: Callable, device: str) -> Callable:
    """The call, and what it has left to do on a device."""
    if device == "cpu":
        return call

    def both() -> None:
        call()
        torch.cuda.synchronize()

    return both


def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, Timing]:
    """Time every call once a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for call in calls.values():
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: Timing(seconds) for name, seconds in times.items()}


def repeated(call: Callable, seconds: float = 0.02) -> Callable:
    """The call so often that a measurement takes some time."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    count = max(1, int(seconds / (time.perf_counter() - start)))

    def several() -> None:
        for _ in range(count):
            call()

    several.count = count  # type: ignore[attr-defined]
    return several


def gradient_step(work: Workload, compiled: bool) -> Callable:
    """Loss and gradient by autograd."""
    parameters = list(work.model.parameters())

    def loss() -> torch.Tensor:
        return work.loss(work.model(*work.inputs), *work.targets)

    run = torch.compile(loss) if compiled else loss
    return lambda: torch.autograd.grad(run(), parameters)


def measure(
    name: str,
    rounds: int,
    compiled: bool,
    compare: bool = False,
    device: str = "cpu",
    precision: str = "float32",
    cold: bool = False,
    **options: Any,
) -> str:
    """One row of the table; `options` are those of `hesscale_fx.transform`."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    work = (WORKLOADS | LARGE)[name]().to(device, dtype)
    start = time.perf_counter()
    hs = hesscale_fx.transform(work.model, work.loss, work.args, **options)
    seconds = {"transform": time.perf_counter() - start}
    error = rounding(work, hs, method=options["method"]) if "curvature_dtype" in options else ""
    calls = {"plain": gradient_step(work, False), "ours": lambda: hs(*work.args)}
    parameters = list(work.model.parameters())
    memory = "-"  # the calls of a cycle differ
    if options.get("every", 1) == 1:
        memory = f"{memory_ratio(calls['ours'], calls['plain'], parameters, device):.2f}"
    refused: dict[str, str] = {}
    if compare:
        beside, refused = others(work)
        calls |= beside
    if compiled:
        torch._dynamo.reset()
        torch.compile(torch.sin)(torch.ones(2))  # what only the first compilation takes
        fast = torch.compile(hs, fullgraph=True)
        for key, call in (
            ("plain compiled", gradient_step(work, True)),
            ("ours compiled", lambda: fast(*work.args)),
        ):
            with fresh_cache() if cold else nullcontext():
                start = time.perf_counter()
                call()
                seconds[key] = time.perf_counter() - start
            calls[key] = call
    calls = {k: finished(c, device) for k, c in calls.items()}
    # Both of a pair equally often, so that the ratio of their times is that of one call.
    cycle = options.get("every", 1)
    several = -(-repeated(calls["plain"]).count // cycle) * cycle
    many = {k: (lambda c=c: [c() for _ in range(several)]) for k, c in calls.items()}
    found = interleaved(many, rounds)
    eager = ratio(found["ours"], found["plain"])
    both = ratio(found["ours compiled"], found["plain compiled"]) if compiled else "-"
    million = sum(p.numel() for p in parameters) / 1e6
    label = name if device == "cpu" else f"{name}, {precision}"
    times = ", ".join(f"{k} {1e3 * t.median / several:.3g}" for k, t in found.items())
    builds = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
    row = f"| {label} | {million:.2f} | {eager} | {both} | {memory} | {times} | {builds} |"
    known = {"plain", "ours", "plain compiled", "ours compiled"}
    lines = [f"{k} {ratio(t, found['plain'])}" for k, t in found.items() if k not in known]
    lines += [f"{k} not: {why}" for k, why in refused.items()]
    lines += [error] if error else []
    return "\n".join([row, *(f"  {line}" for line in lines)])


def rounding(work: Workload, hs: Callable, **options: Any) -> str:
    """The relative error of a diagonal to that of the model's own precision, over all entries."""
    exact = hesscale_fx.transform(work.model, work.loss, work.args, **options)(*work.args).hess_diag
    pairs = [(found, exact[name]) for name, found in hs(*work.args).hess_diag.items()]
    each = torch.cat([((a - b).abs() / b.abs())[b != 0].flatten() for a, b in pairs])
    return f"median relative error {each.median():.2%}"


def ratio(ours: Timing, plain: Timing) -> str:
    """Median, and the quartiles of the rounds."""
    each = sorted(a / b for a, b in zip(ours.seconds, plain.seconds, strict=True))
    low, high = each[len(each) // 4], each[(3 * len(each)) // 4]
    return f"{statistics.median(each):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=", ".join(WORKLOADS | LARGE))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--others", action="store_true", help="BackPACK and Hutchinson beside")
    parser.add_argument("--method", default="hesscale")
    parser.add_argument("--bfloat16", action="store_true", help="curvature_dtype=torch.bfloat16")
    parser.add_argument("--every", type=int, default=1, help="curvature in each k-th call")
    parser.add_argument("--cold", action="store_true", help="compile from empty caches")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of these workloads")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    made: dict[str, Any] = {"method": options.method}
    if options.every > 1:
        made["every"] = options.every
    if options.bfloat16:
        made["curvature_dtype"] = torch.bfloat16
    device = options.device or "cpu"
    rows = [(name, device, options.precision) for name in options.workloads or WORKLOADS]
    if torch.cuda.is_available() and not options.workloads:
        rows += [(name, "cuda", precision) for name in LARGE for precision in PRECISIONS]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    if any(device == "cuda" for _, device, _ in rows):
        print(torch.cuda.get_device_name())
    print("| workload | million parameters | eager | compiled | memory | ms | seconds to build |")
    print("|---|---|---|---|---|---|---|")
    for name, device, precision in rows:
        compare = options.others and name in WORKLOADS
        compiled = not options.no_compile
        where = device, precision, options.cold
        row = measure(name, options.rounds, compiled, compare, *where, **made)
        print(row, flush=True)


if __name__ == "__main__":
    main()
