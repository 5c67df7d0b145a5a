"""What the zoo holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Case:
    """A model in train mode, its loss, and the arguments of one call."""

    model: nn.Module
    loss: Callable | None = None
    args: tuple = ()  # the model's inputs, then the loss's targets
    kwargs: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable:
    """Register a builder under a name."""

    def add(build: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in CASES, name
        CASES[name] = build
        return build

    return add
