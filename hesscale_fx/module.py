"""The GraphModule that `transform` returns, and its result."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.utils._sympy.printers import PythonPrinter

from hesscale_fx.errors import CallError, CallTypeError, InvalidArgumentError, NotCapturedError


class Result(NamedTuple):
    """What a call returns.

    Attributes:
        loss: the scalar loss.
        grads: parameter name -> gradient, of the parameter's shape and dtype.
        hess_diag: parameter name -> Hessian diagonal, of the parameter's shape; in float32 for
            parameters of lower precision. Its unit is that of loss / parameter^2.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    hess_diag: dict[str, Tensor]


@dataclass
class Input:
    """One tensor argument of the captured graph."""

    name: str
    shape: list[int | sympy.Expr]
    dtype: torch.dtype
    device: torch.device

    def describe(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{format_shape(self.shape)}"


def format_shape(shape: Any) -> str:
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
            {s for i in inputs for d in i.shape if isinstance(d, sympy.Expr) for s in d.free_symbols},
            key=str,
        )
        self._guard = self._compile_guards(symbols)

    def _compile_guards(self, symbols: list[Any]) -> tuple[list[str], Callable] | None:
        usable = [g for g in self.guards if g.free_symbols <= set(symbols)]
        if not usable:
            return None
        code = " and ".join(f"({PythonPrinter().doprint(g)})" for g in usable)
        names = [str(s) for s in symbols]
        scope: dict[str, Any] = {"math": __import__("math"), "torch": torch}
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
        for have, want in zip(leaves, self._static, strict=True):
            if want is not TENSOR and not (type(have) is type(want) and have == want):
                raise CallError(
                    f"The call has the constant argument {have!r} where the graph was captured "
                    f"with {want!r}, which is baked in. " + RETRANSFORM
                )
        return [leaves[i] for i in self._tensors]

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
    text = f"{len(args)} positional argument(s)"
    return text + (f" and keywords {sorted(kwargs)}" if kwargs else "")


def describe_spec(spec: pytree.TreeSpec) -> str:
    args, kwargs = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    return describe_call(args, kwargs)


@dataclass
class Program:
    """One captured and emitted graph."""

    graph: fx.Graph
    signature: Signature
    training: list[bool]  # mode of every submodule of the model
    constants: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    function: Callable | None = None
    code: str = ""

    def __deepcopy__(self, memo: dict) -> Program:
        return Program(self.graph, self.signature, self.training, self.constants, self.info,
                       self.function, self.code)


class HesScaleModule(fx.GraphModule):
    """A GraphModule that returns loss, gradients and Hessian diagonals; see `transform`.

    Its parameters, buffers and submodules are the model's own. `graph`, `code` and
    `print_readable()` show the graph that served last.
    """

    # How many graphs a lazily captured module keeps.
    max_programs = 8

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None,
        build: Callable[[tuple, Mapping[str, Any]], Program],
        lazy: bool,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), "HesScaleModule")
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_loss_module", loss)
        self._build = build
        self._lazy = lazy
        self._programs: OrderedDict[int, Program] = OrderedDict()
        self._active: Program | None = None
        self._link()

    def _link(self) -> None:
        """Share the model's own parameters, buffers and submodules."""
        model = self._model
        self._modules = dict(model._modules)
        if self._loss_module is not None:
            self._modules["loss"] = self._loss_module
        self._parameters = dict(model._parameters)
        self._buffers = dict(model._buffers)
        self._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
        for program in self._programs.values():
            for name, value in program.constants.items():
                self._buffers[name] = value
                self._non_persistent_buffers_set.add(name)
        self.training = model.training

    # --- graph ----------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The emitted graph."""
        if "_active" not in self.__dict__:  # GraphModule's own constructor asks
            return self.__dict__["_graph"]
        return self._program().graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if self.__dict__.get("_active") is None:
            self.__dict__["_graph"] = graph
            return
        self._program().graph = graph
        self.recompile()

    @property
    def code(self) -> str:
        """Python source of the emitted graph."""
        return self._program().code

    def recompile(self) -> Any:
        """Generate the code of the graph again, after the graph was edited."""
        program = self.__dict__.get("_active")
        if program is None:
            return None
        self.__dict__["_graph"] = program.graph
        program.graph.owning_module = self
        code = program.graph.python_code(root_module="self")
        scope = dict(code.globals)
        source = compile(code.src, f"<hesscale_fx graph {id(program)}>", "exec")
        exec(source, scope)
        program.code = code.src
        program.function = scope["forward"]
        return code

    def _program(self) -> Program:
        active = self._active
        if active is None:
            raise NotCapturedError(
                "The graph is not captured yet: it is at the first call. Call "
                "hs.materialize(*inputs, *targets, **kwargs) to capture it now, or give "
                "transform() example_inputs."
            )
        return active

    def materialize(self, *args: Any, **kwargs: Any) -> HesScaleModule:
        """Capture the graph for such arguments now, without running it.

        Args:
            *args: what a call would get: inputs, then targets.
            **kwargs: the model's keyword arguments.

        Returns:
            The module itself.
        """
        self._find(args, kwargs)
        return self

    def _find(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Program, list[Any]]:
        """The program that serves a call, and the call's tensors."""
        active = self._active
        modes = [m.training for m in self._model.modules()]
        reason: Exception | None = None
        if active is not None:
            reason, tensors = self._serves(active, args, kwargs, modes)
            if reason is None:
                return active, tensors
        for key in reversed(self._programs):
            program = self._programs[key]
            if program is not active:
                other, tensors = self._serves(program, args, kwargs, modes)
                if other is None:
                    self._programs.move_to_end(key)
                    self._activate(program)
                    return program, tensors
        if not self._lazy and reason is not None:
            raise reason
        return self._capture(args, kwargs)

    def _serves(
        self, program: Program, args: tuple, kwargs: Mapping[str, Any], modes: list[bool]
    ) -> tuple[Exception | None, list[Any]]:
        try:
            tensors = program.signature.flatten(args, kwargs)
        except (CallError, CallTypeError) as error:
            return error, []
        if modes != program.training:
            return CallError(
                "The model's train/eval mode has changed since the graph was captured. Call "
                "hs.train() or hs.eval() to set it back, or transform again."
            ), []
        return program.signature.mismatch(tensors), tensors

    @torch.compiler.disable
    def _capture(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Program, list[Any]]:
        program = self._build(args, kwargs)
        self._programs[id(program)] = program
        while len(self._programs) > self.max_programs:
            self._programs.popitem(last=False)
        self._link()
        self._activate(program)
        self.recompile()
        return program, program.signature.flatten(args, kwargs)

    def _activate(self, program: Program) -> None:
        self._active = program

    # --- call -----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Loss, gradients and Hessian diagonals at these arguments."""
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Result:
        program, tensors = self._find(args, kwargs)
        with torch.no_grad(), without_autocast():
            loss, grads, hess = program.function(self, *tensors)  # type: ignore[misc]
        return Result(loss, grads, hess)

    # --- what a module does ---------------------------------------------------------------------

    def _apply(self, fn: Callable, recurse: bool = True) -> HesScaleModule:
        self._model._apply(fn, recurse)
        for program in self._programs.values():
            program.constants = {k: fn(v) for k, v in program.constants.items()}
        self._link()
        return self

    def train(self, mode: bool = True) -> HesScaleModule:
        """Set the model's mode; a lazily captured module keeps one graph for each."""
        self._model.train(mode)
        self.training = mode
        return self

    def __deepcopy__(self, memo: dict) -> HesScaleModule:
        build = copy.deepcopy(self._build, memo)
        model, loss = copy.deepcopy((self._model, self._loss_module), memo)
        other = HesScaleModule(model, loss, build, self._lazy)
        for program in self._programs.values():
            twin = copy.deepcopy(program)
            other._programs[id(twin)] = twin
            other._active = twin
            other._link()
            other.recompile()
        return other

    def __reduce__(self) -> Any:
        raise InvalidArgumentError(
            "A transformed module is not pickled; save it with torch.save(hs.state_dict()) and "
            "transform the model again, or torch.export.save(torch.export.export(hs, args), path)."
        )


@contextmanager
def _noop() -> Iterator[None]:
    yield


def without_autocast() -> Any:
    """Ambient autocast must not touch the curvature; the graph has its own casts."""
    if torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    if torch.is_autocast_enabled("cuda"):
        return torch.autocast("cuda", enabled=False)
    return _noop()
