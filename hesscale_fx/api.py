"""`transform`: the pipeline from a model to one graph with its curvature."""

from __future__ import annotations

import fnmatch
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)

from hesscale_fx.analysis.activity import active_nodes, ancestors
from hesscale_fx.analysis.depth import beyond
from hesscale_fx.analysis.exactness import State as Exactness
from hesscale_fx.analysis.exactness import exactness
from hesscale_fx.analysis.inturn import sum_in_turn
from hesscale_fx.analysis.join import Joiner
from hesscale_fx.analysis.joined import join_calls, join_complex, join_products
from hesscale_fx.analysis.picks import write_picks
from hesscale_fx.analysis.primitives import Primitives, write_out
from hesscale_fx.analysis.samples import Samples
from hesscale_fx.analysis.shifts import find_shifts
from hesscale_fx.analysis.units import Partition, Unit
from hesscale_fx.capture import capture
from hesscale_fx.captured import Captured, Leaf
from hesscale_fx.emit import Emission, Inseparable
from hesscale_fx.errors import (
    CaptureError,
    InvalidArgumentError,
    InvalidModelError,
    UnknownNameError,
    UnsupportedOperatorError,
    source_line,
)
from hesscale_fx.evaluate import Native
from hesscale_fx.every import Schedule
from hesscale_fx.failures import explain
from hesscale_fx.garbage import collected_rarely
from hesscale_fx.lossroot import LossRoot, loss_root_of
from hesscale_fx.methods import Calibrated, HesScale, LossSplit, Method, make_method
from hesscale_fx.modes import quiet
from hesscale_fx.module import HesScaleModule
from hesscale_fx.names import CALIBRATION, source_name
from hesscale_fx.program import Program, State
from hesscale_fx.random import Signs
from hesscale_fx.report import Entry, Loss, Report
from hesscale_fx.signature import Input, Signature
from hesscale_fx.stages import Stages, log
from hesscale_fx.step import Step, as_module
from hesscale_fx.structures import Structure
from hesscale_fx.structures.base import wide
from hesscale_fx.structures.columns import LARGE, Columns, Estimate
from hesscale_fx.structures.contraction import contracting_in

# What serves a call whose operator has no structure.
FALLBACKS: dict[str, Structure] = {"exact": Columns(limit=LARGE), "estimate": Estimate()}

# In torch's words for what a formula of its own cannot do.
SYMBOLIC = ("symbolic sizes/strides", "expected to contain only concrete integers")
DATA_DEPENDENT = (GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound)

Wrt = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
CURVATURE_DTYPES = (None, torch.bfloat16, torch.float32)


def transform(
    model: Any,
    loss: Callable | None = None,
    example_inputs: tuple | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    method: str = "hesscale",
    wrt: Wrt = None,
    dynamic: bool = True,
    columns: int | str | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    calibrate: bool | int | None = None,
    tail: int | None = None,
    fallback: str | None = None,
    curvature_dtype: torch.dtype | None = None,
    every: int = 1,
) -> HesScaleModule:
    """Give a module that returns loss, gradients and Hessian diagonals in one graph.

    The model and its loss are traced into one functional ATen graph; nodes that compute gradients
    and HesScale curvature are added in reverse order. The model is not changed; the returned module
    shares its parameters, buffers and submodules.

    Args:
        model: an `nn.Module`, a `torch.fx.GraphModule`, a `torch.export.ExportedProgram`, or a
            function that calls modules of its closure. Without `loss` it returns the scalar loss.
        loss: ``loss(output, *targets)``, a module or function. Its positional parameters without
            default after the first tell how many of the trailing call arguments are targets.
            Parameters of its own are differentiated too, under ``"loss."``.
        example_inputs: what the returned module will be called with, targets included; ``()`` if it
            takes nothing. Given, the graph is captured now and another kind of call raises; else
            at the first call, and again for calls that the graphs so far do not serve.
        example_kwargs: keyword arguments of the model in such a call.
        method: what is computed:

            - ``"hesscale"`` (Elsayed & Mahmood 2022).
            - ``"hesscale_gn"``, which keeps only the curvature of the loss: an approximation of
              the Gauss-Newton diagonal.
            - ``"bl89"`` (Becker & LeCun 1989), the softmax of the loss as if elementwise.
            - ``"ggn"``, the diagonal of the generalized Gauss-Newton matrix, exact for a loss
              that is convex in the model's output.
            - ``"empirical_fisher"``, the sum of squared gradients per sample.
            - ``"hutchinson"``, the mean of ``z * Hz`` over `samples` random sign vectors z.
            - ``"exact"``, one Hessian-vector product a coordinate; for small models.

            ``"hesscale_gn"``, ``"bl89"``, ``"ggn"``, `columns`, `calibrate` and `tail` must know
            where the model ends: pass `loss`, or mark the output with `hesscale_fx.output`.
        wrt: which tensors to differentiate: names, prefixes (``"encoder"``), patterns
            (``"*.weight"``), a predicate on (name, parameter), or ``"inputs"`` for the
            floating-point inputs; a list mixes them. By default all parameters that require grad.
        dynamic: leave the leading dimension of the inputs free where the model allows it.
        fallback: what serves an operator without a structure, which otherwise raises an error:
            ``"exact"``, the columns of its Jacobian, one backward pass for each element of its
            output and of its operand, for small ones; or ``"estimate"``, unbiased by random signs
            that are drawn in each call, at any size. With ``"exact"`` a single call of a function
            of torch that the recursion would cut into several units with a loss (attention,
            ``torch.cov``), and a function of matrices with the product that only it uses
            (``pinv(a @ b.mT)``), is one unit by columns too, where all its columns are at most
            2^22 numbers, at most 2048 columns of one block; larger ones stay as they are.
            ``hs.report().joined`` lists them.
        curvature_dtype: ``torch.bfloat16`` contracts curvature (matrix products, convolutions) in
            bfloat16, added up in float32: about 0.3% median error, and faster where the hardware
            has such products (avx512_bf16, AMX, GPUs). Gradients and all else stay as they are.
        every: compute curvature at the first call and each `every`-th after it (``hs.calls``
            counts). The calls in between run the graph of the loss and its gradients alone and
            return an empty ``hess_diag``: an old diagonal is never passed off as a new one.

        columns: for ``"hesscale"`` how many columns of a square root of the loss's Hessian at the
            model's output are pulled back exactly, squared per sample at the parameters, in place
            of the Gauss-Newton part of the recursion: 0 (none, the paper's method), a number (so
            many random combinations; unbiased for that part), or ``"exact"`` (all there are:
            outputs per sample). For ``"ggn"`` the same, by default ``"exact"``. The negative part
            of a loss that is not convex flows as in the recursion. Where samples interact (batch
            norm in training) the whole batch counts as one sample.
        samples: of ``"hutchinson"``, 1 by default.
        generator: of the random signs, on the device of the model; else torch's own.
        calibrate: for ``"hesscale"``: True or a number n of calls, to give the Gauss-Newton part of
            each parameter tensor the trace of the Gauss-Newton matrix by one factor, estimated by
            `columns` columns (1 by default) at every call, or every n-th. See
            `HesScaleModule.factors`.
        tail: for ``"hesscale"`` and ``"hesscale_gn"``: a number n, to carry all columns, as
            ``columns="exact"`` does, through the last n contractions of the model only, and to
            go on from there by the recursion, started at their squares. A contraction (linear
            layer, convolution, matrix product, ...) is one of the last n if no path from it to
            the model's output meets more than n, itself included. Their parameters get what
            ``columns="exact"`` gives. 0 is the recursion alone. Nothing is random.

    Returns:
        A `torch.fx.GraphModule` whose call ``hs(*inputs, *targets, **kwargs)`` gives a
        `Result` ``(loss, grads, hess_diag)``: the scalar loss and two dictionaries by parameter
        name, in the order of ``model.named_parameters()``. Gradients have the parameter's dtype,
        diagonals at least float32; their unit is loss / parameter^2. Nothing requires grad.

    Raises:
        HesScaleError: one of its subclasses, which says what is not supported and the way out.

    Source:
        Elsayed & Mahmood, "HesScale: Scalable Computation of Hessian Diagonals", 2022; Becker &
        LeCun, "Improving the Convergence of Back-Propagation Learning with Second Order Methods",
        1989.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
        >>> loss, grads, hess_diag = hs(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))
        >>> hess_diag["0.weight"].shape
        torch.Size([8, 4])
    """
    asked = {
        "columns": columns,
        "samples": samples,
        "generator": generator,
        "calibrate": calibrate,
        "tail": tail,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    builder = Builder(model, loss, method, wrt, dynamic, fallback, curvature_dtype, options)
    schedule = Schedule(every)
    hs = HesScaleModule(
        builder.model,
        builder.step.loss,
        builder,
        lazy=example_inputs is None,
        schedule=schedule if schedule.every > 1 else None,
    )
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise InvalidArgumentError(
            f"example_inputs must be the tuple of arguments that hs will be called with, not "
            f"{type(example_inputs).__name__}: write example_inputs=(x, y)."
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InvalidArgumentError(
            "example_kwargs must be the dictionary of the model's keyword arguments, not "
            f"{type(example_kwargs).__name__}."
        )
    if example_inputs is not None:
        hs._capture(tuple(example_inputs), dict(example_kwargs or {}))
    elif example_kwargs is not None:
        hs._capture((), dict(example_kwargs))
    return hs


class Builder:
    """Everything `transform` was asked for; a call builds the program for given arguments."""

    def __init__(
        self,
        model: Any,
        loss: Callable | None,
        method: str,
        wrt: Wrt,
        dynamic: bool,
        fallback: str | None = None,
        curvature_dtype: torch.dtype | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if fallback is not None and fallback not in FALLBACKS:
            raise InvalidArgumentError(
                f"Unknown fallback {fallback!r}; choose None or one of "
                f"{', '.join(map(repr, FALLBACKS))}."
            )
        self.method = make_method(method, options or {})
        self.generator: torch.Generator | None = (options or {}).get("generator")
        self.calibrate = int((options or {}).get("calibrate", 0))
        if loss is not None and not callable(loss):
            raise InvalidArgumentError(f"loss must be callable, not {type(loss).__name__}.")
        if isinstance(loss, type):
            raise InvalidArgumentError(
                f"loss is the class {loss.__name__}; give an instance: {loss.__name__}(...)."
            )
        if curvature_dtype not in CURVATURE_DTYPES:
            raise InvalidArgumentError(
                f"curvature_dtype must be torch.bfloat16, torch.float32 or None, not "
                f"{curvature_dtype!r}. (Squares leave the range of float16.)"
            )
        if curvature_dtype is torch.bfloat16 and not isinstance(self.method, HesScale):
            raise InvalidArgumentError(
                "curvature_dtype is for the recursion: method='hesscale' or 'hesscale_gn' without "
                "columns, calibration or tail."
            )
        self.model, self.prefix = as_module(model)
        self.loss = loss
        self.wrt = wrt
        self.dynamic = dynamic
        self.fallback = fallback
        self.curvature_dtype = curvature_dtype
        self.step = Step(self.model, loss)
        self._built = 0
        self.names = self._parameter_names()
        self.selected = self._selected()  # complain about `wrt` now, not at the first call

    def _parameter_names(self) -> dict[str, tuple[str, nn.Parameter]]:
        """User's name -> (name within `step`, parameter), tied ones once."""
        found: dict[str, tuple[str, nn.Parameter]] = {}
        seen: set[int] = set()
        for inner, parameter in self.step.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = inner.removeprefix("model.")
            name = name.removeprefix(self.prefix)
            found[name] = (inner, parameter)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """User's name -> the parameter that the model has under it now."""
        return {name: self.step.get_parameter(inner) for name, (inner, _) in self.names.items()}

    def _selected(self) -> list[str]:
        """Names of the parameters to differentiate."""
        trainable = [n for n, (_, p) in self.names.items() if p.requires_grad]
        wrt = self.wrt
        if wrt is None:
            chosen = trainable
        elif callable(wrt):
            chosen = self._chosen_by(wrt)
        else:
            patterns = [wrt] if isinstance(wrt, str) else list_of_names(wrt)
            chosen = []
            for pattern in patterns:
                if pattern == "inputs":
                    continue
                hits = [n for n in self.names if matches(n, pattern)]
                if not hits:
                    raise UnknownNameError(
                        f"wrt={pattern!r} matches no parameter. Names are "
                        f"{', '.join(list(self.names)[:8])}{', ...' if len(self.names) > 8 else ''}"
                        ", or 'inputs' for the floating-point inputs."
                    )
                chosen += [h for h in hits if h not in chosen]
            chosen = [n for n in self.names if n in chosen]
            if patterns and not chosen and "inputs" not in patterns:
                raise UnknownNameError(f"wrt={wrt!r} matches no parameter.")
        if callable(wrt) and not chosen:
            raise UnknownNameError("The predicate given as wrt matches no parameter.")
        if not chosen and not self.wants_inputs:
            raise InvalidArgumentError(
                "There is no parameter to differentiate: none requires grad. Set requires_grad, or "
                "say what to differentiate with wrt, e.g. wrt='inputs'. A function's parameters "
                "are those of the modules that it names; a tensor of its own is none."
            )
        for name in chosen:
            if self.names[name][1].is_complex():
                raise InvalidModelError(
                    f"Parameter {name!r} is complex; a Hessian diagonal is defined for real "
                    "parameters only. Keep real and imaginary parts, or leave it out of wrt."
                )
        return chosen

    def _chosen_by(self, predicate: Callable[[str, nn.Parameter], bool]) -> list[str]:
        try:
            inspect.signature(predicate).bind("name", None)
        except TypeError as error:
            raise InvalidArgumentError(
                "wrt is called as wrt(name, parameter), which this predicate does not take: "
                f"{error}."
            ) from error
        except ValueError:  # it has no signature
            pass
        return [n for n, (_, p) in self.names.items() if predicate(n, p)]

    @property
    def wants_inputs(self) -> bool:
        """Whether `wrt` asks for the floating-point inputs."""
        return (
            not callable(self.wrt)
            and self.wrt is not None
            and (self.wrt == "inputs" or "inputs" in self.wrt)
        )

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        """Capture, analyse and emit for such arguments."""
        # Under inference mode autograd gives no formula.
        with torch.inference_mode(False), collected_rarely():
            return self.build(*pytree.tree_map_only(torch.Tensor, differentiable, (args, kwargs)))

    def build(self, args: tuple, kwargs: Mapping[str, Any]) -> Program:
        """As a call does."""
        stages = Stages()
        reason: Exception | None = None
        for captured in capture(self.step, args, kwargs, dynamic=self.dynamic):
            try:
                stages.done("capture", f"{len(captured.graph.nodes)} nodes, {captured.way}")
                with quiet():  # torch logs the attempts that fail
                    program = self.compile(captured, stages)
                if not serves(program.signature, args, kwargs):
                    continue  # a batch of one is captured as two; a rule has fixed it since
                if isinstance(self.method, Calibrated) and self.calibrate > 1:
                    kept = replace(self.method, refresh=False)
                    program.steady = self.compile(captured, stages, kept)
                stages.total()
                return program
            except (*DATA_DEPENDENT, RuntimeError) as error:  # another capture fixes the size
                if not isinstance(error, DATA_DEPENDENT) and not any(
                    t in str(error) for t in SYMBOLIC
                ):
                    raise
                log.info("not compiled: %s", str(error).splitlines()[0])
                reason = error
        raise CaptureError(explain(reason, self.step)) from reason  # type: ignore[arg-type]

    def split(self, captured: Captured) -> Program:
        """The graph of `HesScaleModule.loss_curvature`."""
        stages = Stages()
        with quiet(), torch.inference_mode(False):
            program = self.compile(captured, stages, LossSplit())
        stages.total()
        return program

    def factors(self) -> torch.Tensor | None:
        """Factors of a calibrated method, all 1, one a parameter that is differentiated."""
        if not isinstance(self.method, Calibrated):
            return None
        if self.wants_inputs:
            raise InvalidArgumentError(
                "calibrate= keeps a factor for each parameter; wrt='inputs' has none. Use columns=."
            )
        if CALIBRATION in dict(self.model.named_buffers()) or hasattr(self.model, CALIBRATION):
            raise InvalidModelError(
                f"The model has an attribute {CALIBRATION!r}, which calibrate= needs for its "
                "factors. Rename it."
            )
        first = self.names[self.selected[0]][1]
        return torch.ones(len(self.selected), dtype=wide(first.dtype), device=first.device)

    def compile(self, captured: Captured, stages: Stages, method: Method | None = None) -> Program:
        """Analyse and emit; what autograd cannot differentiate as one operator is left apart."""
        failed: Counter[frozenset[fx.Node]] = Counter()
        while True:
            try:
                return self._compile(captured, stages, method or self.method, failed)
            except Inseparable as error:
                log.info("not one operator: %s", error)
                failed[error.sources] += 1

    def _join(
        self,
        captured: Captured,
        primitives: Primitives,
        active: set[fx.Node],
        method: Method,
        failed: Counter[frozenset[fx.Node]],
    ) -> list[fx.Node]:
        """Put together in the primitive graph what is exact as one operator only."""
        loss, *ends = (primitives.of[n] for n in (captured.loss, *captured.boundary))
        joiner = Joiner(primitives, active, loss, ends, failed)
        inside = ancestors(ends) if method.needs_boundary else set()
        if self.fallback == "exact":
            join_calls(joiner, inside)
            join_products(joiner, inside)
        join_complex(joiner, inside)
        return joiner.joined

    def _compile(
        self,
        captured: Captured,
        stages: Stages,
        method: Method,
        failed: Counter[frozenset[fx.Node]],
    ) -> Program:
        is_split = isinstance(method, LossSplit)
        outputs = self._outputs(captured)
        if method.needs_boundary and not captured.boundary:
            raise InvalidArgumentError(
                f"{method.asked} treats the model and the loss differently, but no "
                "loss was given. Pass it: transform(model, loss), or mark the model's output "
                "with hesscale_fx.output(z)."
            )
        fake_mode = detect_fake_mode(
            [leaf.node.meta["val"] for leaf in captured.leaves] or [captured.loss.meta["val"]]
        )
        primitives = write_out(captured.graph, fake_mode)
        stages.done("definitions", f"{len(primitives.graph.nodes)} primitive nodes")
        leaves = [primitives.of[leaf.node] for leaf in outputs.values()]
        loss = primitives.of[captured.loss]
        active = active_nodes(primitives.graph, loss, leaves)
        if write_picks(primitives, active, loss, fake_mode):
            active = active_nodes(primitives.graph, loss, leaves)
        if sum_in_turn(primitives, active, loss):
            active = active_nodes(primitives.graph, loss, leaves)
        shifts = find_shifts(primitives.graph, active, loss)
        if shifts:
            active = active_nodes(primitives.graph, loss, leaves, shifts)
        joined = self._join(captured, primitives, active, method, failed)
        loss = primitives.of[captured.loss]
        inside = ancestors(primitives.of[n] for n in captured.boundary)
        partition = Partition(
            primitives.graph,
            loss,
            active,
            primitives.source,
            inside if method.needs_boundary else None,
        )
        check_supported(partition, primitives.source, self.fallback)
        stages.done("units", f"{len(partition.units)} units")
        states, exact = exactness(partition)
        stages.done("exactness")
        samples, loss_root = None, None
        boundary = [primitives.of[n] for n in captured.boundary]
        if method.needs_samples:
            one = boundary[0] if method.needs_boundary else None
            samples = Samples(partition.units, partition, one)
            if not method.needs_boundary and not samples.found:
                raise InvalidModelError(
                    f"method={method.name!r} squares the gradient of each sample, but the samples "
                    "of this model interact, or none was found in the leading dimension. Batch "
                    "norm in training does that: put it in eval mode, or use another method."
                )
        if method.needs_samples and method.needs_boundary:
            native = Native(primitives, partition.units)
            loss_root = loss_root_of(
                primitives.graph,
                partition.units,
                partition,
                states,
                native,
                boundary,
                loss,
                method.asked,
            )
        linear = {u for u in partition.units if all(map(partition.is_linear, u.nodes))}
        emission = Emission(
            captured,
            primitives,
            partition.units,
            states,
            inside,
            method,
            fake_mode,
            samples,
            loss_root,
            linear,
            set() if method.tail is None else beyond(partition.units, inside, method.tail),
        )
        with contracting_in(self.curvature_dtype):
            graph = emission.split() if is_split else emission.run(outputs)
        stages.done("emission", f"{len(graph.nodes)} nodes, method {method.name}")
        constants = self._name_attributes(graph, captured)
        return Program(
            graph=graph,
            signature=signature_of(captured),
            state=State.of(self.model),
            constants=constants,
            report=report_of(method, outputs, primitives, exact, captured, loss_root, joined),
            captured=captured,
            primitives=primitives,
            units=partition.units,
            random=[Signs.of(n) for n in emission.random],
        )

    def _outputs(self, captured: Captured) -> dict[str, Leaf]:
        by_name = {leaf.name: leaf for leaf in captured.leaves if leaf.kind == "parameter"}
        tensors = {id(p): n for n, (_, p) in self.names.items()}
        # Export lists a tied weight under one of its names, not always the first.
        for inner, parameter in self.step.named_parameters(remove_duplicate=False):
            if inner in by_name:
                by_name.setdefault(self.names[tensors[id(parameter)]][0], by_name[inner])
        outputs = {}
        for name in self._selected():
            outputs[name] = by_name[self.names[name][0]]
        if self.wants_inputs:
            for leaf in captured.leaves:
                if leaf.kind == "input" and leaf.node.meta["val"].is_floating_point():
                    outputs[leaf.name] = leaf
        if not outputs:
            raise InvalidArgumentError(
                "wrt='inputs' asks for floating-point inputs, but none of the inputs is one."
            )
        return outputs

    def _name_attributes(self, graph: fx.Graph, captured: Captured) -> dict[str, torch.Tensor]:
        """Let the graph's attributes have the names they have in the module; give the constants."""
        constants = {}
        for leaf in captured.leaves:
            if leaf.kind == "constant" and leaf.value is not None:
                constants[leaf.name] = leaf.value
        suffix = f"_of_{self._built}" if self._built else ""  # each graph has its own
        for node in graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                node.target = name + suffix if name in constants else name.removeprefix("model.")
        self._built += 1
        return {name + suffix: value for name, value in constants.items()}


def report_of(
    method: Method,
    outputs: Mapping[str, Leaf],
    primitives: Primitives,
    states: Mapping[fx.Node, Exactness],
    captured: Captured,
    loss_root: LossRoot | None,
    joined: list[fx.Node],
) -> Report:
    """What the analysis found, by parameter."""
    entries = {}
    # Columns that are random, or whose sum is, serve even where the recursion is exact.
    noisy = loss_root is not None and loss_root.kind == "full" and "gauss" in method.roles
    told: dict[fx.Node, Loss] = {}  # the first layers have lost what all later ones have
    for name, leaf in outputs.items():
        state = states.get(primitives.of[leaf.node], Exactness())
        lost = dict.fromkeys(primitives.source[n] for n in state.lost)
        for node in lost:
            if node not in told:
                told[node] = Loss(source_name(node), source_line(node))
        losses = tuple(told[n] for n in lost)
        exact = method.exactness == "always" or (
            method.exactness == "recursion" and state.exact and not noisy
        )
        entries[name] = Entry(exact, () if exact else losses)
    fixed = tuple(d.describe() for d in captured.fixed)
    split = "" if loss_root is None else loss_root.describe()
    found = ((n.target.name, source_line(primitives.source[n])) for n in joined)  # type: ignore[union-attr]
    units = tuple(f"{name} ({line})" if line else name for name, line in found)
    return Report(entries, method.of, captured.way, fixed, split, units)


def matches(name: str, pattern: str) -> bool:
    """A name, a prefix at a dot, or a shell pattern."""
    stem = pattern.rstrip(".")
    return name == stem or name.startswith(f"{stem}.") or fnmatch.fnmatchcase(name, pattern)


def list_of_names(wrt: Any) -> list[str]:
    """The patterns of a `wrt` that is a list, or an error."""
    named = isinstance(wrt, Iterable) and not isinstance(wrt, (torch.Tensor, Mapping))
    patterns = list(wrt) if named else [wrt]
    for pattern in patterns:
        if not named or not isinstance(pattern, str):
            raise InvalidArgumentError(
                "wrt takes names, patterns, a list of them, or a predicate on (name, parameter), "
                f"not {type(pattern).__name__}. The names are those of model.named_parameters()."
            )
    return patterns


def differentiable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that autograd takes of one from inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def serves(signature: Signature, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a graph takes the arguments it was captured for."""
    return signature.mismatch(signature.flatten(args, dict(kwargs))) is None


def signature_of(captured: Captured) -> Signature:
    """The arguments that a captured graph serves."""
    inputs = []
    for leaf in captured.leaves:
        if leaf.kind == "input":
            value = leaf.node.meta["val"]
            shape = [s if isinstance(s, int) else s.node.expr for s in value.shape]
            inputs.append(Input(leaf.name, shape, value.dtype, value.device))
    return Signature(inputs, captured.in_spec, captured.in_leaves, captured.guards)


def check_supported(
    partition: Partition, source: dict[fx.Node, fx.Node], fallback: str | None = None
) -> None:
    """Give operators without a structure the fallback, or refuse them, all at once."""
    alone = [u for u in partition.units if u.region is None]
    unknown = [u for u in alone if u.rule is None]
    large = [u for u in alone if is_large(u)]
    if fallback is not None:
        for unit in [*unknown, *large]:
            other = FALLBACKS[fallback]
            known = unit.rule
            if isinstance(known, Columns) and isinstance(other, Columns):
                other = replace(known, limit=other.limit)  # it knows more of its blocks
            unit.fallback = other
        unknown, large = [], [u for u in alone if is_large(u)]
    if unknown:
        calls = [u.call for u in unknown]
        registers = "\n".join(
            f"  hesscale_fx.register(torch.ops.{n}, ...)"
            for n in dict.fromkeys(str(c.target) for c in calls)
        )
        raise UnsupportedOperatorError(
            "No structure is known for the Jacobian of:\n"
            + "\n".join(listed(c, source) for c in calls)
            + "\nRegister one, e.g. 'pointwise', 'selection' or 'contraction':\n"
            + registers
            + "\nor let the columns of their Jacobians serve, if they are small, or estimates: "
            'transform(..., fallback="exact") or transform(..., fallback="estimate").'
        )
    if large:
        way = 'fallback="estimate"' if fallback else 'fallback="exact" or fallback="estimate"'
        raise UnsupportedOperatorError(
            "Too large for the columns of the Jacobian, which are computed one by one:\n"
            + "\n".join(
                f"{listed(u.call, source)}: {columns(u)} columns, at most {u.rule.limit}"  # type: ignore[union-attr]
                for u in large
            )
            + f"\nAllow another way: transform(..., {way})."
        )


def columns(unit: Unit) -> int:
    """How many columns of the Jacobian the rule of a unit computes; 0 if it has no such rule."""
    if not isinstance(unit.rule, Columns):
        return 0
    outputs = [n.meta["val"] for n in unit.outputs if isinstance(n.meta["val"], torch.Tensor)]
    return unit.rule.count([n.meta["val"] for n, _ in unit.inputs], outputs)


def is_large(unit: Unit) -> bool:
    """Whether the rule of a unit would compute more columns than it may."""
    return isinstance(unit.rule, Columns) and columns(unit) > unit.rule.limit


def listed(node: fx.Node, source: dict[fx.Node, fx.Node]) -> str:
    """A line on one call, for an error."""
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else "several outputs"
    where = source_line(source[node])
    return f"  {node.name}: {node.target} {shape}" + (f"  at {where}" if where else "")
