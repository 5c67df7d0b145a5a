"""Torch's own checks of tensor values: take the branch of the example, and assert it later.

torch.export cannot evaluate ``if torch.any(var < 0): raise``, which losses and distributions have
to check their arguments. An eager run of the model records what such reads
gave; the trace then gets the same answers, each with an assertion in the graph, so that a call
which would decide otherwise fails instead of being silently wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.errors import CaptureError

# Reads that turn tensor values into Python values: where they live and under which name.
READS = (
    (Tensor, "__bool__"),
    (Tensor, "__int__"),
    (Tensor, "__float__"),
    (Tensor, "__index__"),
    (Tensor, "item"),
    (Tensor, "tolist"),
    (torch, "equal"),
    (torch, "allclose"),
    (torch, "is_nonzero"),
)
TORCH = os.path.dirname(torch.__file__)
MESSAGE = "hesscale_fx: the captured path does not hold"


@dataclass
class Decision:
    """One read: what was called and what it gave."""

    name: str
    result: Any
    by_torch: bool  # whether torch's own code asked, not the model's

    def describe(self) -> str:
        """E.g. ``__bool__() gave False``."""
        return f"{self.name}() gave {self.result!r}"


@contextmanager
def intercepted(answer: Callable[[str, Callable, tuple, dict], Any]) -> Iterator[None]:
    """Let `answer` serve every read of a tensor's value, also inside torch's own functions."""

    def replacement(name: str, original: Callable) -> Callable:
        def read(*args: Any, **kwargs: Any) -> Any:
            return answer(name, original, args, kwargs)

        return read

    inherited = [(owner, name, name in vars(owner)) for owner, name in READS]
    originals = [getattr(owner, name) for owner, name in READS]
    try:
        for (owner, name), original in zip(READS, originals, strict=True):
            setattr(owner, name, replacement(name, original))
        yield
    finally:
        for (owner, name, own), original in zip(inherited, originals, strict=True):
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


@contextmanager
def recording(made: list[Decision]) -> Iterator[None]:
    """Note every read of an eager run."""
    depth = 0

    def answer(name: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        nonlocal depth
        depth += 1
        try:
            result = original(*args, **kwargs)
        finally:
            depth -= 1
        if not depth:
            asked = sys._getframe(2).f_code.co_filename
            made.append(Decision(name, result, asked.startswith(TORCH)))
        return result

    with intercepted(answer):
        yield


@contextmanager
def replaying(made: list[Decision]) -> Iterator[None]:
    """Give the noted answers in order, each asserted in the trace."""
    pending = list(made)

    def answer(name: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        if not isinstance(args[0], Tensor) or not _is_traced(args[0]):
            return original(*args, **kwargs)
        if not pending or pending[0].name != name:
            raise CaptureError(
                "The model reads tensor values in another order when traced than when run, so its "
                "path cannot be fixed. Move the control flow out of the model."
            )
        decision = pending.pop(0)
        assert_same(decision, args, kwargs)
        return decision.result

    with intercepted(answer):
        yield


def _is_traced(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor) or type(x).__name__ == "FunctionalTensor"


def assert_same(decision: Decision, args: tuple, kwargs: dict[str, Any]) -> None:
    """Record an assertion that the read would give the same."""
    x, result = args[0], decision.result
    if decision.name in ("equal", "allclose"):
        if x.shape != args[1].shape:
            return
        close = torch.isclose(*args, **kwargs) if decision.name == "allclose" else x == args[1]
        condition = close.all() if result else ~close.all()
    elif isinstance(result, bool):
        condition = (x != 0).all() if result else (x == 0).all()
    elif isinstance(result, list):
        condition = (x == torch.tensor(result, dtype=x.dtype, device=x.device)).all()
    elif decision.name in ("__int__", "__index__"):
        condition = (x.trunc() == result).all() if x.is_floating_point() else (x == result).all()
    else:
        condition = (x == result).all()
    torch._assert_async(condition, f"{MESSAGE}: {decision.describe()}")
