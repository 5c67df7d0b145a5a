"""The GraphModule that `transform` returns, and its result."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._guards import TracingContext

from hesscale_fx.accumulate import accumulate, clear
from hesscale_fx.errors import MESSAGE, CallError, CallTypeError, NotCapturedError
from hesscale_fx.every import Schedule
from hesscale_fx.heap import keep_freed
from hesscale_fx.methods import Exact
from hesscale_fx.names import CALIBRATION
from hesscale_fx.program import Program, RandomState, State
from hesscale_fx.report import LossCurvature, Report, Verification
from hesscale_fx.signature import RETRANSFORM
from hesscale_fx.stages import log
from hesscale_fx.verify import LossOf, exact_diagonal, graph_loss, model_loss, verify

if TYPE_CHECKING:
    from hesscale_fx.inspect import Difference, Summary


class Result(NamedTuple):
    """What a call returns: tensors of their own, which share no memory with the model's.

    Attributes:
        loss: the scalar loss.
        grads: parameter name -> gradient, of the parameter's shape and dtype.
        hess_diag: parameter name -> Hessian diagonal, of the parameter's shape; in float32 for
            parameters of lower precision. Its unit is that of loss / parameter^2. Empty in the
            calls between, where `transform` was asked for curvature at ``every`` k-th call only.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    hess_diag: dict[str, Tensor]


class HesScaleModule(fx.GraphModule):
    """A GraphModule that returns loss, gradients and Hessian diagonals; see `transform`.

    Its parameters, buffers and submodules are the model's own. `graph`, `code` and
    `print_readable()` show the graph that served last.
    """

    _model: nn.Module
    _loss_module: nn.Module | None
    # How many graphs a lazily captured module keeps.
    max_programs = 8

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None,
        build: Any,  # makes the program for given arguments
        lazy: bool,
        schedule: Schedule | None = None,  # None: every call computes curvature
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), "HesScaleModule")
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_loss_module", loss)
        self._build = build
        self._lazy = lazy
        self._schedule = schedule
        self._programs: OrderedDict[int, Program] = OrderedDict()
        self._active: Program | None = None
        self._lineno_map = self._prologue_start = None  # Dynamo reads them
        self._calibration: Tensor | None = build.factors()
        self._calls = 0
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
        if self._calibration is not None:
            self._buffers[CALIBRATION] = self._calibration
        for program in self._every_program():
            for name, value in program.constants.items():
                self._buffers[name] = value
                self._non_persistent_buffers_set.add(name)
        self.training = model.training

    def _relink(self) -> None:
        """Share what has been set on the model in place of what it had: a new child, or buffer."""
        model = self._model
        for own, kept in (
            (self._modules, model._modules),
            (self._parameters, model._parameters),
            (self._buffers, model._buffers),
        ):
            if any(own.get(name) is not value for name, value in kept.items()):
                return self._link()

    def _every_program(self) -> Iterator[Program]:
        for program in self._programs.values():
            yield program
            if program.steady is not None:
                yield program.steady
            if program.split is not None:
                yield program.split

    @property
    def factors(self) -> dict[str, float]:
        """Parameter name -> factor of its Gauss-Newton part, with ``calibrate=``; 1 at first.

        They are held in the buffer ``calibration``, in this order: saved and loaded with the
        module's state, and to be averaged over processes like any other buffer.
        """
        if self._calibration is None:
            raise CallError("There are no factors: transform(..., calibrate=True) has them.")
        return dict(zip(self._build.selected, self._calibration.tolist(), strict=True))

    # --- graph ----------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The emitted graph."""
        if "_active" not in self.__dict__:  # GraphModule's own constructor asks
            return self.__dict__["_graph"]
        if torch.compiler.is_exporting():
            return self._exported_graph()
        if self._active is None and TracingContext.try_get() is not None:
            return self.__dict__["_graph"]  # Dynamo asks every GraphModule that it sees
        return self._program().graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if self.__dict__.get("_active") is None:
            self.__dict__["_graph"] = graph
            return
        self._program().graph = graph
        self.recompile()

    def _exported_graph(self) -> fx.Graph:
        """What torch.export runs in place of a call: it takes the graph of any GraphModule."""
        program = self._program()
        if program.state.modes != State.of(self._model).modes:
            raise NotCapturedError(
                "The graph was captured with the model in another train/eval mode. Call "
                "hs.materialize(*inputs, *targets) before torch.export, or transform again."
            )
        return program.exported()

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
        return program.generate(self, between=self._schedule is not None)

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
        program, _ = self._find(args, kwargs)
        program.lay_out(self)  # a function around the module may be compiled next
        return self

    def _find(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Program, list[Any]]:
        """The program that serves a call, and the call's tensors."""
        active = self._active
        state = State.of(self._model)
        reason: Exception | None = None
        if not torch.compiler.is_compiling():
            self._relink()
        if active is not None:
            active.state.check_names(state)
            reason, tensors = self._serves(active, args, kwargs, state)
            if reason is None:
                return active, tensors
        for key in reversed(self._programs):
            program = self._programs[key]
            if program is not active:
                other, tensors = self._serves(program, args, kwargs, state)
                if other is None:
                    self._programs.move_to_end(key)
                    self._activate(program)
                    return program, tensors
        if reason is not None and not self._lazy:
            raise reason
        return self._capture(args, kwargs, reason)

    def _serves(
        self, program: Program, args: tuple, kwargs: Mapping[str, Any], state: State
    ) -> tuple[Exception | None, list[Any]]:
        try:
            tensors = program.signature.flatten(args, kwargs)
        except (CallError, CallTypeError) as error:
            return error, []
        reason = program.state.mismatch(state)
        if reason is not None:
            return reason, []
        return program.signature.mismatch(tensors), tensors

    @torch.compiler.disable(
        reason="a HesScaleModule captures its graph at the first call of a kind; inside another "
        "compiled function call hs.materialize(*inputs, *targets) before"
    )
    def _capture(
        self, args: tuple, kwargs: Mapping[str, Any], reason: Exception | None = None
    ) -> tuple[Program, list[Any]]:
        if reason is not None:
            log.info("capturing again: %s", reason)
        program = self._build(args, kwargs)
        keep_freed()
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

    @property
    def calls(self) -> int:
        """How many calls there were, which says when curvature is due; may be set.

        With ``every=k`` a call computes curvature where this is a multiple of k. Set it to resume
        training at some step, or to 0 for curvature at the next call. Always 0 without ``every``.
        """
        return 0 if self._schedule is None else self._schedule.calls

    @calls.setter
    def calls(self, count: int) -> None:
        if self._schedule is not None:
            self._schedule.calls = count

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Loss, gradients and Hessian diagonals at these arguments."""
        if self._schedule is None and self._compiled_call_impl is None:
            return nn.Module.__call__(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return nn.Module.__call__(self, *args, **kwargs)
        if self._compiled_call_impl is not None:
            self._ready(args, kwargs)
        if self._schedule is None:
            return nn.Module.__call__(self, *args, **kwargs)
        self._schedule.begin()
        result = nn.Module.__call__(self, *args, **kwargs)
        self._schedule.calls += 1  # a call that fails is none
        return result

    def _ready(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Capture, before the compiler's own tracing begins, what the call needs."""
        self._relink()
        if any(isinstance(m, nn.RNNBase) for m in self._model.modules()):
            # Dynamo would refuse the module, whose parameters alone the graph takes from it.
            torch._dynamo.config.allow_rnn = True
        if self._lazy or self._active is None:
            self._find(args, kwargs)

        if self._active is not None:
            self._active.lay_out(self)

    # `torch.compile(hs)` asks modules with these two, as torch's lazy modules have them, to make
    # themselves ready before each call.
    _initialize_hook = True

    def _infer_parameters(self, module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._ready(args, kwargs)
        if self._schedule is not None:
            self._schedule.begin()
            self._schedule.calls += 1

    def forward(self, *args: Any, **kwargs: Any) -> Result:
        """See `__call__`."""
        program, tensors = self._find(args, kwargs)
        due = self._schedule is None or self._schedule.due()
        with torch.no_grad(), without_autocast():
            if isinstance(self._build.method, Exact) and due:
                return self._exact(program, tensors, args, kwargs)
            if torch.compiler.is_compiling() or not program.asserts:
                return self._run(program, due, tensors)
            return self._run_asserting(program, due, tensors, args, kwargs)

    def _run(self, program: Program, due: bool, tensors: list[Any]) -> Result:
        if program.steady is not None and due:
            refreshes = self._calls % self._build.calibrate == 0
            self._calls += 1
            program = program if refreshes else program.steady
        tensors = program.with_signs(tensors, self._build.generator)
        return Result(*program.function_for(due)(self, *tensors))

    def _run_asserting(
        self,
        program: Program,
        due: bool,
        tensors: list[Any],
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> Result:
        """Run a graph that asserts what it has fixed; where that does not hold, another one."""
        state = State.of(self._model)
        tried: list[Program] = []
        captured = False
        while True:
            random = RandomState.now()
            try:
                return self._run(program, due, tensors)
            except RuntimeError as error:
                if MESSAGE not in str(error):
                    raise
                fixed = str(error).split(f"{MESSAGE}: ")[-1].splitlines()[0]
            random.restore()
            tried.append(program)
            others = [p for p in reversed(self._programs.values()) if p not in tried]
            serving = [p for p in others if self._serves(p, args, kwargs, state)[0] is None]
            if serving:
                program = serving[0]
                self._activate(program)
            elif self._lazy and not captured:
                with torch.enable_grad():
                    program, tensors = self._capture(args, kwargs)
                captured = True
            else:
                raise CallError(
                    f"What the capture fixed does not hold in this call: {fixed}. " + RETRANSFORM
                )

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute as a call does, and add the result to ``p.grad`` and ``p.hesscale``.

        Both accumulate over calls, as autograd does into ``p.grad``, until they are cleared:
        `zero_grad` of this module or of an optimizer of `hesscale_fx.optim` clears both. Only what
        `wrt` selects is written; with ``wrt="inputs"`` the arguments too. After ``hs.compile()`` it
        runs the compiled graph.

        Args:
            *args: what a call would get: inputs, then targets.
            **kwargs: the model's keyword arguments.

        Returns:
            The scalar loss.

        Raises:
            CallError: a gradient was cleared without its diagonal, or an argument of
                ``wrt="inputs"`` is not a leaf.

        Example:
            >>> import torch, hesscale_fx
            >>> from torch import nn
            >>> net = nn.Linear(4, 3)
            >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
            >>> loss = hs.backward(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))
            >>> net.weight.grad.shape, net.weight.hesscale.shape
            (torch.Size([3, 4]), torch.Size([3, 4]))
        """
        out = self(*args, **kwargs)
        program, tensors = self._find(args, kwargs)
        names = [i.name for i in program.signature.inputs]
        leaves = dict(zip(names, tensors, strict=True))
        leaves.update(self._build.parameters())
        others = [*self.buffers(), *(t for t in tensors if isinstance(t, Tensor))]
        accumulate(leaves, out.grads, out.hess_diag, others, self._schedule is not None)
        return out.loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and ``.hesscale`` of the parameters."""
        super().zero_grad(set_to_none)
        clear(self.parameters(), set_to_none)

    # --- what is exact ---------------------------------------------------------------------------

    def report(self) -> Report:
        """Say for each parameter whether its diagonal is exact, and if not, why.

        Returns:
            A mapping from parameter name to ``exact`` and the places where an off-diagonal part was
            dropped, with the user's source lines; print it for a table. The analysis is sound:
            what it calls exact is exact. It may call an exact diagonal approximate.

        Example:
            >>> import torch, hesscale_fx
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
            >>> _ = hs.materialize(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))
            >>> hs.report()["2.weight"].exact, hs.report()["0.weight"].exact
            (True, False)
        """
        return self._program().report

    def loss_curvature(self, *args: Any, **kwargs: Any) -> LossCurvature:
        """How much of the loss's Hessian at the model's output is negative on these data.

        Columns (``columns=``, ``calibrate=``, ``tail=``, ``method="ggn"``) are those of a square
        root of the positive part; the negative part, of a loss that is not convex in the model's
        output, is left to the recursion. Works with every method, and runs a graph of its own that
        ends at the output: calls are not slowed down.

        Args:
            *args: what a call would get: inputs, then targets.
            **kwargs: the model's keyword arguments.

        Returns:
            The traces of both parts, summed over samples, in units of loss / output^2.

        Raises:
            HesScaleError: the model's output is not known, or there are several.

        Example:
            >>> import torch, hesscale_fx
            >>> from torch import nn
            >>> hs = hesscale_fx.transform(nn.Linear(4, 3), nn.CrossEntropyLoss())
            >>> hs.loss_curvature(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])).negative
            0.0
        """
        program, tensors = self._find(args, kwargs)
        if program.split is None:
            split = self._build.split(program.captured)
            split.generate(self)
            program.split = split
            self._link()
        assert program.split.function is not None
        with torch.no_grad(), without_autocast():
            positive, negative = program.split.function(self, *tensors)
        return LossCurvature(positive.item(), negative.item())

    def summary(self, *args: Any, depth: int | None = None, **kwargs: Any) -> Summary:
        """Per module parameters, FLOPs, exactness, memory; see `hesscale_fx.inspect.summary`."""
        from hesscale_fx.inspect.summary import summary

        return summary(self, *args, depth=depth, **kwargs)

    def diff(self, other: HesScaleModule) -> Difference:
        """What differs in the graph of another; see `hesscale_fx.inspect.diff`."""
        from hesscale_fx.inspect.difference import diff

        return diff(self, other)

    def verify(self, *args: Any, samples: int = 64, seed: int = 0, **kwargs: Any) -> Verification:
        """Measure the error of the diagonals on your own data.

        Draws coordinates of each parameter and computes the exact Hessian diagonal there by
        Hessian-vector products through plain autograd on the original model. Parameters, buffers
        and the random state are left as they were; memory does not grow with `samples`.

        Args:
            *args: what a call would get: inputs, then targets.
            samples: coordinates per parameter; all of them where there are fewer.
            seed: of the draw.
            **kwargs: the model's keyword arguments.

        Returns:
            For each parameter and overall the relative L1 error, the correlation and the share of
            equal signs; print it for a table.
        """
        program, tensors = self._find(args, kwargs)
        state = torch.get_rng_state()
        step = self._build.step
        before = {name: b.clone() for name, b in step.named_buffers()}
        out = self.forward(*args, **kwargs)  # computes curvature whatever the schedule
        with torch.no_grad():
            for name, buffer in step.named_buffers():
                buffer.copy_(before[name])
        losses, start = self._losses(program, tensors, args, kwargs, before)
        chosen = {name: start[name] for name in out.hess_diag}
        try:
            return verify(losses, state, chosen, out.hess_diag, samples, seed)
        finally:
            torch.set_rng_state(state)

    def _exact(
        self, program: Program, tensors: list[Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> Result:
        """Loss and gradients by the graph, the diagonal beside it."""
        function = program.function
        assert function is not None
        state = torch.get_rng_state()
        before = {name: b.clone() for name, b in self._build.step.named_buffers()}
        out = Result(*function(self, *tensors))
        after = torch.get_rng_state()
        losses, start = self._losses(program, tensors, args, kwargs, before)
        try:
            diagonal = {
                name: exact_diagonal(losses[::-1], state, {n: start[n] for n in out.grads}, name)
                for name in out.grads
            }
        finally:
            torch.set_rng_state(after)
        return Result(out.loss, out.grads, diagonal)

    def _losses(
        self,
        program: Program,
        tensors: list[Any],
        args: tuple,
        kwargs: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
    ) -> tuple[list[LossOf], dict[str, Tensor]]:
        """The loss as functions to differentiate again, and where: inputs and parameters."""
        step, names = self._build.step, self._build.names
        step.bind(args, kwargs)
        inputs = [i.name for i in program.signature.inputs]
        start = {
            **dict(zip(inputs, tensors, strict=True)),
            **{name: p.detach() for name, p in self._build.parameters().items()},
        }
        state = {n.removeprefix("model."): b for n, b in buffers.items()}
        primitives = program.primitives
        inner = {n: inner for n, (inner, _) in names.items()}
        losses = [
            model_loss(step, inner, inputs, tensors, buffers),
            graph_loss(program.captured, primitives.graph, primitives.of, {**start, **state}),
        ]
        return losses, start

    # --- what a module does ---------------------------------------------------------------------

    def _apply(self, fn: Callable, recurse: bool = True) -> HesScaleModule:
        self._model._apply(fn, recurse)
        if self._loss_module is not None:
            self._loss_module._apply(fn, recurse)
        for program in self._every_program():
            program.constants = {k: fn(v) for k, v in program.constants.items()}
        if self._calibration is not None:
            self._calibration = fn(self._calibration)
        self._link()
        if not self._lazy and self._active is not None:
            self._recapture(fn)
        return self

    def _recapture(self, fn: Callable) -> None:
        """Capture again where the model has gone, as `.to()` on any module would."""
        active = self._active
        if active is None or active.state.mismatch(State.of(self._model)) is None:
            return
        args, kwargs = active.signature.example()
        moved = [fn(v) if isinstance(v, Tensor) else v for v in pytree.tree_leaves((args, kwargs))]
        spec = pytree.tree_structure((args, kwargs))
        self._programs.clear()
        self._capture(*pytree.tree_unflatten(moved, spec))

    def train(self, mode: bool = True) -> HesScaleModule:
        """Set the model's mode; a lazily captured module keeps one graph for each."""
        self._model.train(mode)
        self.training = mode
        return self

    def __deepcopy__(self, memo: dict) -> HesScaleModule:
        build = copy.deepcopy(self._build, memo)
        model, loss = copy.deepcopy((self._model, self._loss_module), memo)
        schedule = copy.copy(self._schedule)
        other = HesScaleModule(model, loss, build, self._lazy, schedule)
        if self._calibration is not None:
            other._calibration = self._calibration.clone()
            other._link()
        for program in self._programs.values():
            twin = copy.deepcopy(program)
            other._programs[id(twin)] = twin
            other._active = twin
            other._link()
            other.recompile()
        return other

    def __reduce__(self) -> Any:
        """Pickle what the graphs were made of; they are made again when loaded."""
        examples = [program.signature.example() for program in self._programs.values()]
        parts = (self._build, self._model, self._loss_module, self._lazy)
        return rebuild, (*parts, examples, self._schedule, self._calibration)


def rebuild(
    build: Callable,
    model: nn.Module,
    loss: nn.Module | None,
    lazy: bool,
    examples: list,
    schedule: Schedule | None = None,
    factors: Tensor | None = None,
) -> HesScaleModule:
    """A module that captures again at zeros of the shapes that were captured before."""
    hs = HesScaleModule(model, loss, build, lazy, schedule)
    hs._calibration = factors
    for args, kwargs in examples:
        hs._capture(args, kwargs)
    return hs


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
