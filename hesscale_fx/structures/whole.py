"""Functions that a capture replaces by operators of ours.

They are units that the captured graph must keep whole, and whose own operators have shapes that
depend on data or hide what their derivatives need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

# Where a function is found, its name there, and what is called instead.
_REPLACED: list[tuple[Any, str, Callable]] = []


def replaces(owner: Any, name: str) -> Callable[[Callable], Callable]:
    """Have a capture call the decorated function instead of ``owner.name``."""

    def register(function: Callable) -> Callable:
        _REPLACED.append((owner, name, function))
        return function

    return register


# The same for a trace above autograd alone: what is called instead has no derivative.
_REPLACED_IN_EXPORT: dict[Callable, Callable] = {}


def replaces_in_export(original: Callable, function: Callable) -> None:
    """Have torch.export call `function` instead of the function or operator `original`."""
    _REPLACED_IN_EXPORT[original] = function


class Replacing(TorchFunctionMode):
    """Catches what was imported by name, such as ``from torch.linalg import lstsq``."""

    def __init__(self, table: dict[Callable, Callable]) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what stands for `func`."""
        return self._table.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def captured_whole(*, exporting: bool = False) -> Iterator[None]:
    """Let a traced model call the operators that stand for the functions above.

    Args:
        exporting: whether torch.export traces, which differentiates nothing.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    table = {o[2]: r[2] for o, r in zip(originals, _REPLACED, strict=True)}
    if exporting:
        table.update(_REPLACED_IN_EXPORT)
    # A mode sees no calls from within a function of torch.nn.functional, which it has seen already.
    for owner, name, function in _REPLACED:
        setattr(owner, name, function)
    try:
        with Replacing(table):
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
