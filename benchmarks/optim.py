"""What a step of the optimizers costs, compiled, against fused Adam's.

    python benchmarks/optim.py [--rounds 60] [--width 1024] [--layers 4]

The parameters are those of a multilayer perceptron; gradients and diagonals are random and given.
All are timed in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from hesscale_fx.optim import AdaHesScale, AdaHesScaleGN, Sophia, StepSizeScaling


def parameters(width: int, layers: int) -> list[nn.Parameter]:
    """Those of a square MLP, with a gradient and a diagonal each."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
        p.hesscale = torch.randn_like(p)
    return list(net.parameters())


def compiled(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Its step, compiled."""
    return torch.compile(optimizer.step)


def bytes_alone(params: list[nn.Parameter]) -> Callable[[], None]:
    """A lower bound: only moves what scaled Adam must, 8 tensors before the sum and 4 after it."""
    m, v, square = ([torch.rand_like(p) for p in params] for _ in range(3))

    @torch.compile
    @torch.no_grad()
    def before() -> None:
        for p, a, b, c in zip(params, m, v, square, strict=True):
            both = (p.grad + p.hesscale) * 1e-9
            a.add_(both)
            b.sub_(both)
            c.add_(both)

    @torch.compile
    @torch.no_grad()
    def after() -> None:
        for p, a, b in zip(params, m, v, strict=True):
            p.add_(a * b * 1e-9)

    return lambda: (before(), after())[0]


def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median processor time of each call, in turns so that a busy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(4):  # compile, and compile again for the state that is there now
            call()
    for k in range(rounds):
        order = list(calls.items())
        for name, call in order if k % 2 else reversed(order):
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's own, on first compilation
    torch.set_num_threads(1)
    # All share the frame of Optimizer.step; past the default of 8 the last ones would run eagerly.
    torch._dynamo.config.recompile_limit = 100

    def params() -> list[nn.Parameter]:
        return parameters(options.width, options.layers)

    reference = "Adam, fused"
    calls = {
        reference: torch.optim.Adam(params(), fused=True).step,
        "Adam, compiled": compiled(torch.optim.Adam(params())),
        "AdaHesScale, compiled": compiled(AdaHesScale(params())),
        "AdaHesScaleGN, compiled": compiled(AdaHesScaleGN(params())),
        "Sophia, compiled": compiled(Sophia(params())),
        "AdaHesScale": AdaHesScale(params()).step,
        "Sophia": Sophia(params()).step,
        "StepSizeScaling(AdaHesScale), compiled": compiled(StepSizeScaling(AdaHesScale(params()))),
        "StepSizeScaling(Adam), compiled": compiled(StepSizeScaling(torch.optim.Adam(params()))),
        "StepSizeScaling(fused Adam), compiled": compiled(
            StepSizeScaling(torch.optim.Adam(params(), fused=True))
        ),
        "StepSizeScaling(SGD), compiled": compiled(StepSizeScaling(torch.optim.SGD(params()))),
        "StepSizeScaling(fused Adam)": StepSizeScaling(torch.optim.Adam(params(), fused=True)).step,
        "bytes of StepSizeScaling(Adam) alone": bytes_alone(params()),
    }
    medians = interleaved(calls, options.rounds)
    count = sum(p.numel() for p in params())
    print(f"{count:,} parameters in {2 * options.layers} tensors")
    for name, seconds in medians.items():
        print(f"  {name:40s} {seconds * 1e3:8.2f} ms  {seconds / medians[reference]:6.2f}")


if __name__ == "__main__":
    main()
