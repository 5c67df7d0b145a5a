"""One captured and emitted graph, what it serves, and the functions that run it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.units import Unit
from hesscale_fx.captured import Captured
from hesscale_fx.errors import CallError, CallTypeError
from hesscale_fx.every import without_curvature
from hesscale_fx.layouts import channels_last
from hesscale_fx.random import Signs
from hesscale_fx.report import Report
from hesscale_fx.signature import Signature

ASSERTIONS = {torch.ops.aten._assert_async.msg, torch.ops.aten._assert_scalar.default}


@dataclass
class State:
    """What a graph has baked in of the model besides its code."""

    modes: list[bool]  # train or eval, of every submodule
    names: list[str]  # of parameters and buffers
    dtypes: list[torch.dtype]
    devices: list[torch.device]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """The state of `model` now."""
        named = [*model.named_parameters(), *model.named_buffers()]
        return cls(
            [m.training for m in model.modules()],
            [name for name, _ in named],
            [t.dtype for _, t in named],
            [t.device for _, t in named],
        )

    def check_names(self, now: State) -> None:
        """Raise where parameters or buffers came or went: what to return was decided before."""
        changed = [n for n in (*now.names, *self.names) if (n in now.names) != (n in self.names)]
        if changed:
            raise CallError(
                "The model's parameters or buffers have changed since the graph was captured: "
                f"{', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''} "
                "came or went. Transform the model again."
            )

    def mismatch(self, now: State) -> Exception | None:
        """Why a graph of this state does not serve another, or None."""
        if now.modes != self.modes:
            return CallError(
                "The model's train/eval mode has changed since the graph was captured. Set it "
                "back with hs.train() or hs.eval(), or transform again."
            )
        if now.dtypes != self.dtypes or now.devices != self.devices:
            return CallTypeError(
                "The dtype or device of the model's parameters or buffers has changed since the "
                "graph was captured. Transform the model again."
            )
        return None


@dataclass
class RandomState:
    """Of the default generators, to run again with the same draws."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(eq=False)
class Program:
    """One captured and emitted graph."""

    graph: fx.Graph
    signature: Signature
    state: State  # of the model that the graph serves
    constants: dict[str, Tensor]
    report: Report
    captured: Captured
    primitives: Primitives
    units: list[Unit]
    random: list[Signs] = field(default_factory=list)  # inputs after the call's own
    steady: Program | None = None  # with calibration: for calls that refresh no factor
    split: Program | None = None  # of `loss_curvature`, once it was asked for
    function: Callable | None = None
    asserts: bool = False  # it has fixed decisions that a call may contradict
    code: str = ""
    between: Callable | None = None  # without curvature
    between_graph: fx.Graph | None = None
    # What a compiler gets in place of `function` and `between`, once one has asked.
    laid_out: tuple[Callable | None, Callable | None] | None = None

    def generate(self, owner: nn.Module, between: bool = False) -> Any:
        """Make the functions, at first and after the graph was edited.

        Args:
            owner: has the attributes that the graph takes; the functions' first argument.
            between: whether there are calls without curvature.

        Returns:
            The code of the graph.
        """
        self.laid_out = None
        code, self.function = function_of(self.graph, owner)
        self.code = code.src
        self.asserts = any(n.target in ASSERTIONS for n in self.graph.nodes)
        if between:
            self.between_graph = without_curvature(self.graph)
            _, self.between = function_of(self.between_graph, owner)
        if self.steady is not None:
            self.steady.generate(owner)
        return code

    def lay_out(self, owner: nn.Module) -> None:
        """Make what a compiler gets, if there is none yet."""
        if self.laid_out is not None:
            return
        functions = []
        known = (self.graph, self.function), (self.between_graph, self.between)
        for graph, function in known:
            if graph is not None:
                own = copied(graph)
                if channels_last(own):
                    _, function = function_of(own, owner)
            functions.append(function)
        self.laid_out = functions[0], functions[1]
        if self.steady is not None:
            self.steady.lay_out(owner)

    def function_for(self, due: bool) -> Callable:
        """What runs a call, with or without curvature; a profiler sees every node by its name."""
        functions = self.function, self.between
        if torch.compiler.is_compiling():
            if self.laid_out is not None and not torch.compiler.is_exporting():
                functions = self.laid_out
        elif torch.autograd.profiler._is_profiler_enabled:
            from hesscale_fx.inspect.profiling import named

            graph = self.graph if due else self.between_graph
            return named(graph)  # type: ignore[arg-type]
        function = functions[0 if due else 1]
        assert function is not None
        return function

    def exported(self) -> fx.Graph:
        """What torch.export runs in place of a call."""
        graph = copied(self.graph)
        graph.set_codegen(Checked(self.signature))
        return graph

    def with_signs(self, tensors: list[Any], generator: torch.Generator | None) -> list[Any]:
        """A call's tensors followed by the random signs that the graph takes."""
        if not self.random:
            return tensors
        sizes = self.signature.sizes(tensors)
        return [*tensors, *(signs.draw(sizes, generator) for signs in self.random)]

    def __deepcopy__(self, memo: dict) -> Program:
        return Program(
            self.graph,
            self.signature,
            self.state,
            self.constants,
            self.report,
            self.captured,
            self.primitives,
            self.units,
            self.random,
            copy.deepcopy(self.steady, memo),
            None,
            self.function,
            self.asserts,
            self.code,
            self.between,
            self.between_graph,
        )


class Checked(fx.graph.CodeGen):
    """Refuses arguments that a graph does not serve where fx interprets it."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self._signature = signature

    def process_inputs(self, *args: Any) -> Any:
        """See `fx.graph.CodeGen`."""
        reason = self._signature.mismatch(list(args))
        if reason is not None:
            raise reason
        return args


def copied(graph: fx.Graph) -> fx.Graph:
    """The same nodes in a graph of their own."""
    own = fx.Graph()
    own.output(own.graph_copy(graph, {}))
    return own


def function_of(graph: fx.Graph, owner: nn.Module) -> tuple[Any, Callable]:
    """The Python code of a graph, and the function of the owner and its inputs that it defines."""
    graph.owning_module = owner  # type: ignore[assignment]
    code = graph.python_code(root_module="self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<hesscale_fx graph {id(graph)}>", "exec"), scope)
    return code, scope["forward"]
