"""What regions cost: in the compiled graph, and in the analysis of a deep one.

    python benchmarks/regions.py [--rounds 30] [--kernels] [--profile]

First, a network whose LayerNorm, GELU and softmax are written out by hand against the same network
through `torch.nn.functional`: both transformed, both compiled, timed in turns on one thread by
processor time, which other jobs disturb least; `--kernels` adds the time in the kernels that the
compiler generated, which is what the spelling decides. Second, the seconds
that the analysis takes on a pre-norm GPT of 24 layers: definitions written out, units, exactness.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch._guards import detect_fake_mode

import hesscale_fx
from hesscale_fx.analysis.activity import active_nodes
from hesscale_fx.analysis.exactness import exactness
from hesscale_fx.analysis.primitives import write_out
from hesscale_fx.analysis.units import Partition
from hesscale_fx.api import Builder
from hesscale_fx.capture import capture


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """By hand, as the two below."""
    d = x - x.mean(-1, keepdim=True)
    return d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    """With the error function."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Along the last dimension."""
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


class Layer(nn.Module):
    """x + B softmax(gelu(A norm(x)))."""

    def __init__(self, width: int, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.norm = nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Either spelling."""
        if self.by_hand:
            return x + self.b(
                softmax(gelu(self.a(layer_norm(x, self.norm.weight, self.norm.bias))))
            )
        return x + self.b(F.softmax(F.gelu(self.a(self.norm(x))), -1))


def network(width: int, layers: int, by_hand: bool) -> nn.Module:
    """The same parameters for both spellings."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(width, by_hand) for _ in range(layers)), nn.Linear(width, 10))


def interleaved(calls: list[Callable], rounds: int) -> list[float]:
    """Median seconds of each call, timed in turns so that a busy machine hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(3):
        for call in calls:
            call()
    for k in range(rounds):
        order = list(enumerate(calls))
        for i, call in order if k % 2 else reversed(order):
            start = time.process_time()
            call()
            times[i].append(time.process_time() - start)
    return [statistics.median(t) for t in times]


def in_kernels(call: Callable) -> float:
    """Seconds of one call in generated kernels, compiled with `enable_kernel_profile`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    found = [e for e in profiler.key_averages() if "cpp_fused" in e.key]
    assert found, "no generated kernel was seen"
    return sum(e.self_cpu_time_total for e in found) / 1e6


def spelling(width: int, layers: int, batch: int, rounds: int, kernels: bool) -> None:
    """Print how long the hand-written network takes by that of torch.nn.functional."""
    torch._inductor.config.cpp.enable_kernel_profile = kernels
    x, y = torch.randn(batch, width), torch.randint(10, (batch,))
    results, calls = [], []
    for by_hand in (True, False):
        hs = hesscale_fx.transform(network(width, layers, by_hand), F.cross_entropy, (x, y))
        compiled = torch.compile(hs)
        results.append(compiled(x, y))
        calls.append(lambda compiled=compiled: compiled(x, y))
    difference = max(
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(results[0].hess_diag.values(), results[1].hess_diag.values(), strict=True)
    )
    hand, named = interleaved(calls, rounds)
    print(f"{layers} layers of width {width}, batch {batch}, compiled:")
    print(f"  by hand              {hand * 1e3:8.2f} ms")
    print(f"  torch.nn.functional  {named * 1e3:8.2f} ms")
    print(f"  ratio                {hand / named:8.2f}    largest difference {difference:.0e}")
    if kernels:
        times = [[in_kernels(call) for call in calls] for _ in range(rounds)]
        for what, choose in (("median", statistics.median), ("least", min)):
            hand, named = (choose(t) for t in zip(*times, strict=True))
            print(f"  kernels, {what:6s}  {hand * 1e3:6.3f} ms against {named * 1e3:6.3f} ms")


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention, then the MLP."""
        b, t, d = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model that returns its loss."""

    def __init__(self, layers: int, width: int = 16, vocab: int = 32, length: int = 8) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the next token."""
        x = self.token(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def analysis(layers: int, repeats: int, profile: bool) -> None:
    """Print the processor seconds that each part of the analysis takes (the best of `repeats`)."""
    tokens, targets = torch.randint(32, (4, 8)), torch.randint(32, (4, 8))
    builder = Builder(GPT(layers), None, "hesscale", None, dynamic=True)
    captured = next(capture(builder.step, (tokens, targets), {}, dynamic=True))
    fake_mode = detect_fake_mode([leaf.node.meta["val"] for leaf in captured.leaves])
    leaves = list(builder._outputs(captured).values())

    def run() -> list[float]:
        marks = [time.process_time()]
        primitives = write_out(captured.graph, fake_mode)
        marks.append(time.process_time())
        loss = primitives.of[captured.loss]
        starts = [primitives.of[leaf.node] for leaf in leaves]
        active = active_nodes(primitives.graph, loss, starts)
        partition = Partition(primitives.graph, loss, active, primitives.source)
        marks.append(time.process_time())
        exactness(partition)
        marks.append(time.process_time())
        counts[:] = len(primitives.graph.nodes), len(partition.units)
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]

    counts: list[int] = []
    best = min((run() for _ in range(repeats)), key=sum)
    print(f"GPT of {layers} layers: {counts[0]} nodes, {counts[1]} units")
    for name, seconds in zip(("definitions", "units", "exactness"), best, strict=True):
        print(f"  {name:20s} {seconds:8.3f} s")
    print(f"  {'analysis':20s} {sum(best):8.3f} s")
    if profile:
        with cProfile.Profile() as profiler:
            run()
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(40)


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each network")
    parser.add_argument("--kernels", action="store_true", help="time the generated kernels too")
    parser.add_argument("--layers", type=int, default=24, help="of the GPT that is analysed")
    parser.add_argument("--profile", action="store_true", help="where the analysis spends its time")
    parser.add_argument("--skip-spelling", action="store_true", help="only the analysis")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's own, on first export and compilation
    torch.set_num_threads(1)
    if not options.skip_spelling:
        spelling(128, 3, 256, options.rounds, options.kernels)
    analysis(options.layers, 3, options.profile)


if __name__ == "__main__":
    main()
