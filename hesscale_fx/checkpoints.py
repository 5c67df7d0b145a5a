"""Activation checkpoints while a model is captured: the captured graph holds what they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointFunction


def run_through(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """The reentrant checkpoint without its autograd function."""
    return function(*args)


@contextmanager
def seen_through() -> Iterator[None]:
    """Reentrant checkpoints run their function under no_grad, which a capture would obey."""
    before = CheckpointFunction.__dict__.get("apply")
    CheckpointFunction.apply = staticmethod(run_through)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = before  # type: ignore[method-assign]
