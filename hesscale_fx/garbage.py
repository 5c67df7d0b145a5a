"""How often Python looks for garbage while a model is compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Graphs and traces are many small objects, most of which live until the end.
ALLOCATIONS = 100_000


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Collect after many more allocations than by default, which is a tenth of a compilation."""
    before = gc.get_threshold()
    if before[0]:  # else the caller has switched it off
        gc.set_threshold(max(before[0], ALLOCATIONS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
