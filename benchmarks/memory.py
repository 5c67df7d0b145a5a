"""How much memory a call takes at its peak, beyond what is there before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(call: Callable, device: str = "cpu") -> int:
    """Bytes that `call` holds at most at one time, its results included."""
    call()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    del result
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def ratio(ours: Callable, plain: Callable, parameters: list[Tensor], device: str = "cpu") -> float:
    """Peak of a second-order step over a gradient step's.

    The parameters count once in both, and the diagonal that is returned is allowed for.
    """
    own = size(parameters)
    diagonal = sum(p.numel() * max(4, p.element_size()) for p in parameters)
    return (own + peak(ours, device) - diagonal) / (own + peak(plain, device))
