"""The arguments that a captured graph serves, and what is wrong with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._sympy.printers import PythonPrinter

from hesscale_fx.errors import CallError, CallTypeError


@dataclass
class Input:
    """One tensor argument of the captured graph."""

    name: str
    shape: list[int | sympy.Expr]
    dtype: torch.dtype
    device: torch.device

    def describe(self) -> str:
        """E.g. ``float32[s0, 3]``."""
        return f"{str(self.dtype).removeprefix('torch.')}{format_shape(self.shape)}"


def format_shape(shape: Any) -> str:
    """E.g. ``[s0, 3]``."""
    return "[" + ", ".join(str(s) for s in shape) + "]"


class Signature:
    """The arguments that a graph serves."""

    def __init__(
        self,
        inputs: list[Input],
        spec: pytree.TreeSpec,
        static: list[Any],
        guards: list[sympy.Expr],
    ) -> None:
        self.inputs = inputs
        self._spec = spec
        self._static = static  # a value for each leaf that is no tensor, else TENSOR
        self._tensors = [i for i, v in enumerate(static) if v is TENSOR]
        self._plain = spec == pytree.tree_flatten((tuple(static), {}))[1] and all(
            v is TENSOR for v in static
        )
        self.guards = guards
        symbols = sorted(
            {
                s
                for i in inputs
                for d in i.shape
                if isinstance(d, sympy.Expr)
                for s in d.free_symbols
            },
            key=str,
        )
        self._guard = self._compile_guards(symbols)

    def _compile_guards(self, symbols: list[Any]) -> tuple[list[str], Callable] | None:
        usable = [g for g in self.guards if g.free_symbols <= set(symbols)]
        if not usable:
            return None
        code = " and ".join(f"({PythonPrinter().doprint(g)})" for g in usable)
        names = [str(s) for s in symbols]
        scope: dict[str, Any] = {"math": math, "torch": torch}
        return names, eval(f"lambda {', '.join(names)}: {code}", scope)

    def flatten(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors of a call.

        Raises:
            CallTypeError: another number or nesting of arguments than the graph serves.
        """
        if self._plain and not kwargs and len(args) == len(self._static):
            return list(args)
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec != self._spec:
            raise CallTypeError(
                f"The call has {describe_call(args, kwargs)}, but the graph was captured with "
                f"{describe_spec(self._spec)}. " + RETRANSFORM
            )
        for i, (have, want) in enumerate(zip(leaves, self._static, strict=True)):
            if want is not TENSOR and not is_same(have, want):
                raise CallError(
                    f"{argument_at(i, args, kwargs)} is {brief(have)} where the graph was captured "
                    f"with {brief(want)}, which is baked in. " + RETRANSFORM
                )
        return [leaves[i] for i in self._tensors]

    def example(self) -> tuple[tuple, dict[str, Any]]:
        """Zeros that the graph serves, with 2 for every free size."""
        leaves = list(self._static)
        for position, want in zip(self._tensors, self.inputs, strict=True):
            shape = [
                s if isinstance(s, int) else int(s.subs(dict.fromkeys(s.free_symbols, 2)))
                for s in want.shape
            ]
            leaves[position] = torch.zeros(shape, dtype=want.dtype, device=want.device)
        return pytree.tree_unflatten(leaves, self._spec)

    def sizes(self, tensors: list[Tensor]) -> dict[str, int]:
        """The free sizes by name, as a call has them."""
        return {
            str(size): have.shape[d]
            for want, have in zip(self.inputs, tensors, strict=True)
            for d, size in enumerate(want.shape)
            if isinstance(size, sympy.Symbol)
        }

    def mismatch(self, tensors: list[Any]) -> Exception | None:
        """Why the graph does not serve these tensors, or None."""
        bound: dict[Any, Any] = {}
        pending: list[tuple[Input, int, Any, sympy.Expr]] = []
        for want, have in zip(self.inputs, tensors, strict=True):
            if not isinstance(have, Tensor):
                return CallTypeError(
                    f"Argument {want.name!r} is {type(have).__name__}; the graph serves a tensor "
                    f"{want.describe()}. " + RETRANSFORM
                )
            if have.dtype != want.dtype or have.device != want.device:
                return CallTypeError(
                    f"Argument {want.name!r} has dtype {have.dtype} on {have.device}; the graph "
                    f"serves {want.dtype} on {want.device}. Convert it with .to(...), or transform "
                    "again with such an example."
                )
            if have.dim() != len(want.shape):
                return self._wrong_shape(want, have)
            for d, (w, h) in enumerate(zip(want.shape, have.shape, strict=True)):
                if isinstance(w, int):
                    if w != h:
                        return self._wrong_shape(want, have)
                elif isinstance(w, sympy.Symbol):
                    if w not in bound:
                        bound[w] = h
                    elif bound[w] != h:
                        return self._wrong_shape(want, have, f"{w} = {bound[w]}")
                else:
                    pending.append((want, d, have, w))
        for want, d, have, expr in pending:
            if not torch.compiler.is_compiling():
                value = expr.subs({k: int(v) for k, v in bound.items()})
                if int(value) != have.shape[d]:
                    return self._wrong_shape(want, have)
        if self._guard is not None and not torch.compiler.is_compiling():
            names, function = self._guard
            by_name = {str(k): v for k, v in bound.items()}
            if all(n in by_name for n in names) and not function(*(by_name[n] for n in names)):
                return CallError(
                    f"The sizes {by_name} take another path through the model than the captured "
                    f"one, which holds for {' and '.join(str(g) for g in self.guards)}. "
                    + RETRANSFORM
                )
        return None

    def _wrong_shape(self, want: Input, have: Tensor, also: str = "") -> CallError:
        where = f" (with {also} from another argument)" if also else ""
        return CallError(
            f"Argument {want.name!r} has shape {format_shape(have.shape)}; the graph serves "
            f"{format_shape(want.shape)}{where}, where names are free sizes. " + RETRANSFORM
        )


class _Tensor:
    def __repr__(self) -> str:
        return "<tensor>"

    def __deepcopy__(self, memo: dict) -> _Tensor:
        return self

    def __reduce__(self) -> Any:
        return "TENSOR"


TENSOR = _Tensor()
RETRANSFORM = (
    "Call transform() again with such an example, or without example_inputs: then each kind of "
    "call is captured when it first comes."
)


def describe_call(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """The number of arguments and the keywords."""
    text = f"{len(args)} positional argument(s)"
    return text + (f" and keywords {sorted(kwargs)}" if kwargs else "")


def describe_spec(spec: pytree.TreeSpec) -> str:
    """The same of captured arguments."""
    args, kwargs = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    return describe_call(args, kwargs)


def is_same(a: Any, b: Any) -> bool:
    """Whether two constants are equal; what cannot be compared as a whole (an array) is not."""
    if type(a) is not type(b):
        return False
    try:
        return a is b or bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False


def argument_at(position: int, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Which argument of a call a leaf belongs to, for a message."""
    path = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0][position][0]
    first = path[1] if len(path) > 1 else path[0]
    return f"Argument {getattr(first, 'key', getattr(first, 'idx', position))!r}"


def brief(value: Any) -> str:
    """A value in a message: tensors by shape, others in one line."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:60]}..."
