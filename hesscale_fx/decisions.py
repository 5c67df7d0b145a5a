"""Values of tensors that steer a model: take the example's path, and assert it at each call.

torch.export cannot evaluate ``if torch.any(var < 0): raise``. An eager run of the model records
what such reads of tensor values gave; the trace then gets the same answers, each with an assertion
in the graph, so that a call which would decide otherwise fails instead of being silently wrong. A
number that only takes part in arithmetic stays symbolic (torch's own unbacked symbols), and a
comparison of one asserts the comparison, not the number.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

from hesscale_fx.errors import MESSAGE, CaptureError

# Reads that turn tensor values into Python values: where they live and under which name.
READS = (
    (Tensor, "__bool__"),
    (Tensor, "__int__"),
    (Tensor, "__float__"),
    (Tensor, "__index__"),
    (Tensor, "item"),
    (Tensor, "tolist"),
    (Tensor, "numpy"),
    (Tensor, "__array__"),
    (torch, "equal"),
    (torch, "allclose"),
    (torch, "is_nonzero"),
)
ARRAYS = ("numpy", "__array__")
TORCH = os.path.dirname(torch.__file__)
HERE = os.path.dirname(__file__)
NUMPY = (
    "The model turns a tensor that depends on its arguments or parameters into a numpy array, "
    "which no graph can hold.\nWrite that part in torch, or move it out of the model and pass its "
    "result as an argument."
)


@dataclass(frozen=True)
class Decision:
    """One value that the capture has fixed: what was asked, what it gave, and where."""

    name: str
    result: Any
    where: str  # the innermost source line outside torch; may be empty
    symbols: frozenset[str] = frozenset()  # of the numbers that it depends on, where it has some

    def describe(self) -> str:
        """E.g. ``__bool__() gave False at model.py:12: if y.sum() > 0:``."""
        result = repr(self.result)
        text = f"{self.name} gave {result if len(result) < 60 else result[:57] + '...'}"
        return f"{text} at {self.where}" if self.where else text


def user_line(frame: Any) -> str:
    """The innermost line outside torch and this package, as ``file:line: code``."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((TORCH, HERE, "<")):
            return f"{name}:{frame.f_lineno}: {linecache.getline(name, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""


@contextmanager
def intercepted(answer: Callable[[str, Callable, tuple, dict], Any]) -> Iterator[None]:
    """Let `answer` serve every read of a tensor's value, also inside torch's own functions."""
    busy = False

    def replacement(name: str, original: Callable) -> Callable:
        def read(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:  # one read made of others
                return original(*args, **kwargs)
            busy = True
            try:
                return answer(name, original, args, kwargs)
            finally:
                busy = False

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


def site(depth: int) -> tuple[str, int]:
    """Where the read was asked for: a read is told from others by its place and order there."""
    frame = sys._getframe(depth)
    return frame.f_code.co_filename, frame.f_lineno


class Reads:
    """What each place of the model read, in order."""

    def __init__(self) -> None:
        self._found: dict[Any, list[Decision]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note every read of an eager run."""

        def answer(name: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            result = original(*args, **kwargs)
            if name not in ARRAYS:
                decision = Decision(f"{name}()", result, user_line(sys._getframe(2)))
                place = (name, *site(3))
                self._found[place].append(decision)
            return result

        with intercepted(answer):
            yield

    @contextmanager
    def replaying(self, fixed: list[Decision], symbolic: bool) -> Iterator[None]:
        """Give the noted answers, each asserted in the trace; append them to `fixed`.

        With `symbolic` a number stays a symbol until something depends on its value; the tracer
        must then turn what the symbols' environment defers into assertions, as torch.export does.
        """
        pending = {key: deque(found) for key, found in self._found.items()}

        def answer(name: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            queue = pending.get((name, *site(3)))
            decision = queue.popleft() if queue else None
            if not isinstance(args[0], Tensor) or not is_traced(args[0]) or name in ARRAYS:
                return original(*args, **kwargs)
            if decision is None:
                raise CaptureError(
                    "The model reads tensor values in another order when traced than when run, so "
                    "its path cannot be fixed. Move the control flow out of the model."
                )
            if symbolic and name == "item":
                return hinted(original(*args, **kwargs), decision.result)
            if symbolic and name == "tolist":
                return symbolic_list(args[0], decision.result)
            fixed.append(decision)
            assert_same(decision, args, kwargs)
            return decision.result

        with intercepted(answer), noting_guards(fixed):
            yield


@contextmanager
def fixing(fixed: list[Decision], arrays: list[Tensor]) -> Iterator[None]:
    """Let a trace on real values read them, each asserted in the trace and appended to `fixed`.

    Tensors that become numpy arrays are appended to `arrays`.
    """

    def answer(name: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        result = original(*args, **kwargs)
        if name in ARRAYS:
            arrays.append(args[0])
        else:
            decision = Decision(f"{name}()", result, user_line(sys._getframe(2)))
            fixed.append(decision)
            assert_same(decision, args, kwargs)
        return result

    with intercepted(answer):
        yield


def is_traced(x: Tensor) -> bool:
    """Whether `x` stands for a node of a trace and has no value."""
    return isinstance(x, torch._subclasses.FakeTensor) or type(x).__name__ == "FunctionalTensor"


def hinted(number: Any, value: Any) -> Any:
    """Tell the symbol that stands for a read number its value in the example.

    Where a decision depends on it, torch then takes the example's and asserts it in the graph.
    """
    if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        env = number.node.shape_env
        for symbol in number.node.expr.free_symbols:
            if symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)):
                env.set_real_tensor_prop_unbacked_vals(
                    symbol, int(value) if isinstance(value, bool) else value
                )
    return number


def symbolic_list(x: Tensor, values: Any) -> Any:
    """``x.tolist()`` with a symbol for each number."""
    if x.dim() == 0:
        return hinted(x.item(), values)
    return [symbolic_list(part, value) for part, value in zip(x.unbind(), values, strict=True)]


@contextmanager
def noting_guards(fixed: list[Decision]) -> Iterator[None]:
    """Append what torch fixes of the symbols that have got a value by `hinted`."""
    original = ShapeEnv._log_real_tensor_propagation

    def note(env: Any, expression: Any, result: Any) -> None:
        symbols = frozenset(str(s) for s in expression.free_symbols)
        decision = Decision(str(expression), result, user_line(sys._getframe(1)), symbols)
        if decision not in fixed:
            fixed.append(decision)

    ShapeEnv._log_real_tensor_propagation = note  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShapeEnv._log_real_tensor_propagation = original  # type: ignore[method-assign]


def check_asserted(graph: fx.Graph, fixed: list[Decision]) -> None:
    """Every symbol on whose value a decision depends must occur in an assertion of the graph.

    Torch drops what it cannot express, such as the integer part of a symbolic float.
    """
    checks = graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)
    asserted = {s for node in checks for s in re.findall(r"\w+", str(node.args[1]))}
    for decision in fixed:
        unbacked = {s for s in decision.symbols if s.startswith(("u", "zuf"))}
        if not unbacked <= asserted:
            raise CaptureError(f"Torch does not assert what it fixes: {decision.describe()}.")


def assert_same(decision: Decision, args: tuple, kwargs: dict[str, Any]) -> None:
    """Record an assertion that the read would give the same."""
    x, result, name = args[0], decision.result, decision.name.removesuffix("()")
    if name in ("equal", "allclose"):
        if x.shape != args[1].shape:
            return
        close = torch.isclose(*args, **kwargs) if name == "allclose" else x == args[1]
        condition = close.all() if result else ~close.all()
    elif isinstance(result, bool):
        condition = (x != 0).all() if result else (x == 0).all()
    elif isinstance(result, list):
        condition = (x == torch.tensor(result, dtype=x.dtype, device=x.device)).all()
    elif name in ("__int__", "__index__"):
        condition = (x.trunc() == result).all() if x.is_floating_point() else (x == result).all()
    elif result != result:
        condition = x.isnan().all()
    else:
        condition = (x == result).all()
    # On the host an assertion that fails is an exception; on a device it would end the process's
    # use of it.
    torch._assert_async(condition.detach().cpu(), f"{MESSAGE}: {decision.describe()}")
