"""Model and loss in, one functional ATen graph out.

The only file that knows torch.export. The captured graph is at a pinned level: operators with a
structure of their own stay whole (silu, layer_norm, linear, convolution, ...); every other
composite operator is decomposed by PyTorch's own formulas.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export.graph_signature import (
    ExportGraphSignature,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from hesscale_fx import below_autograd, structures
from hesscale_fx.boundary import output
from hesscale_fx.checkpoints import seen_through
from hesscale_fx.decisions import Decision, Reads, check_asserted
from hesscale_fx.decomposing import decomposed
from hesscale_fx.errors import (
    MESSAGE,
    MODEL_ERRORS,
    CaptureError,
    HesScaleError,
    InvalidArgumentError,
    InvalidModelError,
    Refusal,
    UnsupportedOperatorError,
    source_line,
)
from hesscale_fx.inlining import write_in
from hesscale_fx.registered import Registered, refuse_computed
from hesscale_fx.signature import TENSOR
from hesscale_fx.simplify import merge_equal
from hesscale_fx.structures import definitions
from hesscale_fx.structures.whole import captured_whole

aten = torch.ops.aten
HERE = os.path.dirname(__file__)
log = logging.getLogger("hesscale_fx")


@dataclass
class Leaf:
    """One tensor placeholder of the captured graph."""

    node: fx.Node
    kind: str  # "parameter", "buffer", "constant" or "input"
    name: str  # the user's qualified name; for inputs the argument's name
    value: torch.Tensor | None = None  # of a lifted constant


@dataclass
class Captured:
    """A functional forward graph with what its placeholders and outputs mean."""

    graph: fx.Graph
    leaves: list[Leaf]
    loss: fx.Node
    mutations: dict[str, fx.Node]  # buffer name -> its new value
    boundary: list[fx.Node]  # nodes that were marked as the model's output
    in_spec: pytree.TreeSpec
    in_leaves: list[Any]  # one an argument leaf: the name of its placeholder or a constant
    guards: list[Any]  # what the sizes must satisfy for the model to take the captured path
    position: int  # of the loss among the graph's outputs
    way: str = ""
    fixed: list[Decision] = field(default_factory=list)  # values from data; asserted in the graph


class Step(nn.Module):
    """Model and loss as one module of flat tensor inputs, the form in which they are traced."""

    def __init__(self, model: nn.Module, loss: Callable | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss if isinstance(loss, nn.Module) else None
        self._function = loss if self.loss is None else None
        self.targets = count_targets(loss) if loss is not None else 0
        self.spec: pytree.TreeSpec | None = None
        self.static: list[Any] = []

    @property
    def loss_fn(self) -> Callable | None:
        return self._function if self.loss is None else self.loss

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Remember the structure of the arguments; return their tensors."""
        leaves, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self.static = [TENSOR if isinstance(v, torch.Tensor) else v for v in leaves]
        return [v for v in leaves if isinstance(v, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        assert self.spec is not None
        flat = iter(tensors)
        leaves = [next(flat) if v is TENSOR else v for v in self.static]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with assigned_in_place(self):
            if self.loss_fn is None:
                return self.model(*args, **kwargs)
            inputs, targets = split_targets(args, self.targets)
            out = mark_boundary(self.model(*inputs, **kwargs))
            return self.loss_fn(out, *targets)


@contextmanager
def assigned_in_place(step: nn.Module) -> Iterator[None]:
    """Write into a buffer what a forward assigns to it, ``self.mean = 0.9 * self.mean + ...``.

    torch.export knows the buffers that are written into, and forgets those that are assigned.
    """
    before = [(m, name, b) for m in step.modules() for name, b in m._buffers.items()]
    yield
    for module, name, buffer in before:
        now = module._buffers.get(name)
        if now is buffer:
            continue
        if buffer is None or now is None or (now.shape, now.dtype) != (buffer.shape, buffer.dtype):
            raise InvalidModelError(
                f"The forward of {type(module).__name__} sets its buffer {name!r} to a tensor of "
                "another shape or dtype, or from or to None. If it is a cache, call the model once "
                "before, so that it is filled; else keep its shape and dtype."
            )
        with torch.no_grad():
            buffer.copy_(now)
        module._buffers[name] = buffer


@contextmanager
def attributes_kept(step: nn.Module) -> Iterator[None]:
    """Take back tensors of a trace that a forward leaves on its module, ``self.last = y``."""
    before = [(m, dict(m.__dict__)) for m in step.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            for name, value in list(module.__dict__.items()):
                if attributes.get(name, module) is value or not holds_traced(value):
                    continue
                if name in attributes:
                    module.__dict__[name] = attributes[name]
                else:
                    del module.__dict__[name]


def holds_traced(value: Any) -> bool:
    """Whether a value has tensors of a trace among its leaves."""
    leaves = pytree.tree_leaves(value)
    return any(isinstance(v, (FakeTensor, FunctionalTensor)) for v in leaves)


def split_targets(args: tuple, targets: int) -> tuple[tuple, tuple]:
    """The trailing `targets` positional arguments belong to the loss."""
    if len(args) < targets:
        raise InvalidArgumentError(
            f"The loss takes {targets} target(s) after the model's output, but the call has only "
            f"{len(args)} positional argument(s). Call hs(*inputs, *targets, **kwargs)."
        )
    cut = len(args) - targets
    return args[:cut], args[cut:]


def count_targets(loss: Callable) -> int:
    """How many positional parameters without a default follow the first one of `loss`."""
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"The signature of loss {loss!r} cannot be read, so the number of targets is unknown. "
            "Wrap it: loss=lambda output, target: ..."
        ) from error
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    return sum(p.default is inspect.Parameter.empty for p in positional[1:])


def mark_boundary(out: Any) -> Any:
    """Mark every floating-point tensor in the model's output as the boundary to the loss."""

    def mark(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return output(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            marked = copy.copy(value)
            for name, item in vars(value).items():
                object.__setattr__(marked, name, pytree.tree_map(mark, item))
            return marked
        return value

    return pytree.tree_map(mark, out)


class _Function(nn.Module):
    """A function with the modules that its closure holds, under the names used there."""

    def __init__(self, function: Callable, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def modules_of(function: Callable) -> dict[str, nn.Module]:
    """The modules that a function reaches: its closure, globals, defaults, self and partials.

    Also those in the lists and dictionaries that it names, and on the object whose method it is.
    """
    found: dict[str, nn.Module] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and all(value is not m for m in found.values()):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if isinstance(item, nn.Module):
                    add(f"{name}_{i}", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, nn.Module) and isinstance(key, str):
                    add(f"{name}_{key}".replace(".", "_"), item)

    def visit(f: Any) -> None:
        if isinstance(f, functools.partial):
            for i, value in enumerate(f.args):
                add(f"arg{i}", value)
            for name, value in f.keywords.items():
                add(name, value)
            visit(f.func)
            return
        owner = getattr(f, "__self__", None)
        if isinstance(owner, nn.Module):
            add(type(owner).__name__.lower(), owner)
        elif owner is not None and hasattr(owner, "__dict__") and not inspect.ismodule(owner):
            for name, value in vars(owner).items():
                add(name, value)
        elif not inspect.isroutine(f) and not isinstance(f, type):
            return visit(f.__call__)  # an object that can be called
        f = inspect.unwrap(getattr(f, "__func__", f))
        if inspect.isfunction(f):
            scope = inspect.getclosurevars(f)
            for name, value in {**scope.globals, **scope.nonlocals}.items():
                add(name, value)
                if inspect.isfunction(value) and value is not f:
                    inner = inspect.getclosurevars(value).nonlocals
                    for key, item in inner.items():
                        add(key, item)

    visit(function)
    return found


def as_module(model: Any) -> tuple[nn.Module, str]:
    """The module to trace and the prefix of its parameters that the user's names do not have."""
    if isinstance(model, torch.export.ExportedProgram):
        return model.module(), ""
    if isinstance(model, nn.Module):
        return model, ""
    if isinstance(model, type):
        raise InvalidModelError(
            f"{model.__name__} is a class; transform() takes a model: {model.__name__}(...)."
        )
    if callable(model):
        modules = modules_of(model)
        prefix = f"{next(iter(modules))}." if len(modules) == 1 else ""
        return _Function(model, modules), prefix
    raise InvalidModelError(
        f"transform() takes an nn.Module, a GraphModule, an ExportedProgram or a function, "
        f"not {type(model).__name__}."
    )


# They log whole tracebacks of attempts that fail; the failure that counts is raised.
NOISY = (
    "_subclasses.fake_tensor",
    "fx.experimental.symbolic_shapes",
    "export._draft_export",
    "export._trace",
    "_export.non_strict_utils",
)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns about its own internals; the user can do nothing about those."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|copyreg")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message="The tensor attributes? self\\.")
        warnings.filterwarnings("ignore", message=".*_flat_weights.*")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        silent = [logging.getLogger(f"torch.{name}") for name in NOISY]
        levels = [logger.level for logger in silent]
        for logger in silent:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(silent, levels, strict=True):
                logger.setLevel(level)


def capture(
    step: Step, args: tuple, kwargs: Mapping[str, Any], *, dynamic: bool
) -> Iterator[Captured]:
    """Trace `step` at the given arguments, in one way after another.

    The first is torch.export. Where it refuses, or where what it gave cannot be compiled because of
    a size that depends on data, the next ones fix what came from data and assert it at each call.

    Yields:
        What was captured; ask for the next one if it cannot be compiled.

    Raises:
        CaptureError: nothing can trace the model; the reason is torch.export's.
        InvalidModelError: the result is not one real floating-point scalar.
    """
    tensors = step.bind(args, kwargs)
    names = argument_names(step, args, kwargs)
    first: CaptureError | None = None
    for way in ways(step, tensors, dynamic):
        start = time.perf_counter()
        try:
            with attributes_kept(step):
                captured = way(names)
        except Refusal:
            raise
        except CaptureError as error:
            log.info("not captured: %s", str(error).splitlines()[0])
            first = first or error
            continue
        if captured is not None:
            seconds = time.perf_counter() - start
            log.info(
                "captured %d nodes by %s in %.2fs", len(captured.graph.nodes), captured.way, seconds
            )
            yield captured
    if first is not None:
        raise first


def ways(step: Step, tensors: list[torch.Tensor], dynamic: bool) -> Iterator[Callable]:
    """Each way of capture, best first; a way gives None where it would bake in what is free."""
    batches = [True, False] if dynamic else [False]
    for free in batches:
        yield functools.partial(exported, step, tensors, free, None)
    reads = decide(step, tensors)
    if len(reads):
        for free in batches:
            yield functools.partial(exported, step, tensors, free, reads)
    for free in batches:
        yield functools.partial(recorded, step, tensors, reads if free else None)


def exported(
    step: Step, tensors: list[torch.Tensor], free: bool, reads: Reads | None, names: list[str]
) -> Captured | None:
    """By torch.export, with the decisions of `reads` fixed."""
    given = [roomy(t) for t in tensors] if free else tensors
    fixed: list[Decision] = []
    program = export(step, given, free, reads, fixed)
    enlarged = any(a is not b for a, b in zip(given, tensors, strict=True))
    if enlarged and not is_free(program):
        return None  # the enlarged batch got baked in: it is no batch
    captured = from_program(program, step, names)
    captured.fixed = fixed
    captured.way = "torch.export" + (" with fixed values" if fixed else "")
    return captured


def recorded(
    step: Step, tensors: list[torch.Tensor], reads: Reads | None, names: list[str]
) -> Captured | None:
    """By make_fx below autograd: on symbolic sizes with `reads`, else on the example's values."""
    free = reads is not None
    given = [roomy(t) for t in tensors] if free else tensors
    fixed: list[Decision] = []
    with dispatch_kept():
        path = record(step, given, reads, fixed)
    program = export(path.module, given, free, None, fixed, step)
    enlarged = any(a is not b for a, b in zip(given, tensors, strict=True))
    if enlarged and not is_free(program):
        return None
    captured = from_program(program, step, names)
    inputs = [leaf for leaf in captured.leaves if leaf.kind == "input"]
    sizes = {
        s: as_expression(inputs[i].node.meta["val"].shape[d]) for s, (i, d) in path.sizes.items()
    }
    captured.guards += [g.xreplace(sizes) for g in path.guards if g.free_symbols]
    captured.fixed = fixed
    captured.way = "make_fx" if free else "make_fx on values"
    check_gradient(captured, step, tensors)
    return captured


def record(
    step: Step, tensors: list[torch.Tensor], reads: Reads | None, fixed: list[Decision]
) -> below_autograd.Path:
    """`below_autograd.trace`, with its errors as ours."""
    try:
        with quiet(), grad_modes(), captured_whole(), Registered(step):
            return below_autograd.trace(step, tensors, reads, fixed)
    except HesScaleError:
        raise
    except Exception as error:
        reason = CaptureError(explain(error, step))
        # Frames that live on hold guards of torch.func, which restore its state when they die.
        traceback.clear_frames(error.__traceback__)
    raise reason


def as_expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def check_gradient(captured: Captured, step: Step, tensors: list[torch.Tensor]) -> None:
    """Refuse a path below autograd along which autograd finds another gradient than in the model.

    It would be an error of ours, not the user's; a wrong number is worse.
    """
    parameters = {n: p for n, p in step.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in step.named_buffers()}
    inputs = [t.detach().clone() for t in tensors]
    kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.random.fork_rng(), grad_modes(), kernels:
        state = torch.get_rng_state()
        loss = torch.func.functional_call(step, buffers, tuple(t.clone() for t in inputs))
        want = gradients(loss, parameters)
        torch.set_rng_state(state)
        rest = iter(inputs)
        values = {**dict(step.named_parameters()), **dict(step.named_buffers())}
        flat = []
        for leaf in captured.leaves:
            value = next(rest) if leaf.kind == "input" else values.get(leaf.name, leaf.value)
            flat.append(value)
        runner = fx.Interpreter(fx.GraphModule({}, captured.graph))
        outputs = runner.run(*flat)
        have = gradients(outputs[captured.position], parameters)
    # What is zero but for rounding (a bias before a softmax) is held to the others' size.
    floor = 1e-4 * max((float(g.abs().max()) for g in want if g.numel()), default=0.0)
    for name, one, other in zip(parameters, want, have, strict=True):
        scale = max(float(one.abs().max()), floor) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
            raise Refusal(
                f"{type(step.model).__name__} cannot be captured: along the recorded path the "
                f"gradient of {name.removeprefix('model.')!r} is not the model's own.\n"
                "The model cuts gradients off in a way that cannot be followed; use x.detach() or "
                "torch.no_grad()."
            )


def gradients(loss: Any, parameters: dict[str, nn.Parameter]) -> tuple[torch.Tensor, ...]:
    if not loss.requires_grad:
        return tuple(torch.zeros_like(p) for p in parameters.values())
    return torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )


def roomy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind whose leading size is no 0 or 1, which export would bake in."""
    if tensor.dim() == 0 or tensor.shape[0] > 1:
        return tensor
    return tensor.new_zeros((2, *tensor.shape[1:]))


def export(
    module: nn.Module,
    tensors: list[torch.Tensor],
    free: bool,
    reads: Reads | None,
    fixed: list[Decision],
    step: Step | None = None,
) -> Any:
    """torch.export with the leading dimensions free (where the model allows) or all fixed."""
    auto = torch.export.Dim.AUTO
    shapes = tuple({0: auto} if t.dim() else None for t in tensors) if free else None
    options: dict[str, Any] = {"dynamic_shapes": (shapes,) if shapes else None, "strict": False}
    replaying = reads.replaying(fixed, symbolic=True) if reads is not None else nullcontext()
    try:
        # On failure export prints its partial graph to stderr.
        with (
            quiet(),
            redirect_stderr(io.StringIO()),
            grad_modes(),
            replacing_calls(module),
            seen_through(),
            replaying,
        ):
            program = torch.export.export(module, tuple(tensors), **options)
    except HesScaleError:
        raise
    except Exception as error:
        refuse_sparse_error(error, step or module)
        raise CaptureError(explain(error, step or module)) from error
    check_asserted(program.graph, fixed)
    return program


@contextmanager
def replacing_calls(module: nn.Module) -> Iterator[None]:
    """Have what `module` calls replaced while it runs, and nothing that torch.export does itself.

    A mode is asked for every attribute of a tensor; of a model of many layers export reads as many.
    """
    forward, registered = module.forward, Registered(module)

    @functools.wraps(forward)
    def run(*tensors: torch.Tensor) -> Any:
        with captured_whole(exporting=True), registered:
            return forward(*tensors)

    module.forward = run
    try:
        yield
    finally:
        del module.forward


def decide(step: Step, tensors: list[torch.Tensor]) -> Reads:
    """Run the step eagerly on copies and note what its control flow reads."""
    reads = Reads()
    buffers = {name: b.clone() for name, b in step.named_buffers()}
    inputs = tuple(t.detach().clone() for t in tensors)
    try:
        with torch.random.fork_rng(), grad_modes(), captured_whole(), reads.recording():
            torch.func.functional_call(step, buffers, inputs)
    except Exception as error:
        kind = next((k for k in MODEL_ERRORS if isinstance(error, k.__bases__[-1])), Refusal)
        raise kind(explain(error, step, OWN_ERROR)) from error
    return reads


def is_free(program: Any) -> bool:
    """Whether every tensor input of the program kept its leading dimension as a symbol."""
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.name in inputs]
    return all(
        not isinstance(v.shape[0], int) for v in values if isinstance(v, torch.Tensor) and v.dim()
    )


@contextmanager
def grad_modes() -> Iterator[None]:
    """The modes in which a model is captured, whatever the caller's."""
    with torch.enable_grad(), no_autocast():
        yield


@contextmanager
def dispatch_kept() -> Iterator[None]:
    """A trace that fails within torch.func can leave the thread's dispatch keys changed."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(*keys):
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Ambient autocast belongs to the caller's own code, not to the captured graph."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    before = {k: torch.is_autocast_enabled(k) for k in kinds}
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind, on in before.items():
            torch.set_autocast_enabled(kind, on)


# What fake tensors of a sparse layout fail with.
NO_STRIDES = ("layout_impl is only implemented", "tensors do not have strides")


def refuse_sparse_error(error: Exception, step: nn.Module) -> None:
    """Refuse what fails only because it has a tensor of a layout that no trace can hold."""
    if any(text in str(error) for text in NO_STRIDES):
        raise UnsupportedOperatorError(
            f"{type(getattr(step, 'model', step)).__name__} computes with tensors of a sparse "
            f"layout{user_line(error)}; only dense tensors are supported. Use to_dense() before "
            "the model."
        ) from error


def user_line(error: Exception) -> str:
    """The innermost line outside torch and this package, e.g. `` at model.py:12: h = foo(x)``."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "/torch/" not in frame.filename and not frame.filename.startswith((HERE, "<eval")):
            where = f" at {frame.filename}:{frame.lineno}: {frame.line}"
    return where


ONE_PATH = (
    "torch.export traces one path: replace control flow that reads tensor values "
    "(torch.where, torch.cond), or move it out of the module."
)
OWN_ERROR = (
    "The model or the loss raises it without any trace as well: call them on these arguments "
    "yourself, as loss(model(*inputs), *targets)."
)


def explain(error: Exception, step: nn.Module, way_out: str = ONE_PATH) -> str:
    """The reason of a failed capture in two lines."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = text[0] if text else type(error).__name__
    if type(error).__name__ not in reason:
        reason = f"{type(error).__name__}: {reason}"
    name = type(getattr(step, "model", step)).__name__
    return f"{name} cannot be captured{user_line(error)}: {reason[:300]}\n{way_out}"


def argument_names(step: Step, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """A readable name for each leaf of the call's arguments."""
    inputs, targets = split_targets(args, step.targets)
    forward = step.model.function if isinstance(step.model, _Function) else step.model.forward
    names = positional_names(forward, len(inputs), "input")
    if step.loss_fn is not None:
        loss = step.loss_fn.forward if isinstance(step.loss_fn, nn.Module) else step.loss_fn
        names += positional_names(loss, len(targets) + 1, "target")[1:]
    top = dict(zip(names, args, strict=True)) if len(set(names)) == len(names) else {}
    if not top:
        top = {f"input_{i}": a for i, a in enumerate(args)}
    result = []
    for name, value in [*top.items(), *kwargs.items()]:
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            parts = [
                str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path
            ]
            result.append("_".join([name, *parts]))
    return result


def positional_names(function: Callable, count: int, default: str) -> list[str]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return names + [f"{default}_{i}" for i in range(len(names), count)]


def from_program(program: Any, step: Step, names: list[str]) -> Captured:
    """Decompose an exported program to the pinned level and read off its signature."""
    detach_no_grad(program.graph_module)
    try:
        with quiet(), no_autocast():
            graph, signature = decompose(program)
            write_repeated(graph)
    except Exception as error:
        refuse_sparse_error(error, step)
        raise CaptureError(explain(error, step)) from error
    refuse_control_flow(graph)
    refuse_sparse(graph)
    ask_for_dense_gradients(graph)
    inputs = read_inputs(program, signature, graph, step, names)
    leaves = unify_tied(inputs, step, graph)
    for leaf in leaves:
        leaf.node.meta["hesscale_name"] = leaf.name.removeprefix("model.").lstrip("_")
    refuse_writes(signature, leaves, graph)
    outputs = graph.find_nodes(op="output")[0]
    kinds = [spec.kind.name for spec in signature.output_specs]
    check_loss([o for o, k in zip(outputs.args[0], kinds, strict=True) if k == "USER_OUTPUT"], step)
    drop_checks(graph)
    name_checks(graph)
    see_through_selections(graph)
    merge_equal(graph)
    boundary = strip_boundary(graph)  # may replace the outputs, so they are read after it
    results = outputs.args[0]
    return Captured(
        graph=graph,
        leaves=leaves,
        loss=results[kinds.index("USER_OUTPUT")],
        mutations={
            spec.target: results[i]
            for i, spec in enumerate(signature.output_specs)
            if spec.kind.name == "BUFFER_MUTATION"
        },
        boundary=boundary,
        in_spec=step.spec,  # type: ignore[arg-type]
        in_leaves=list(step.static),
        guards=guards_of(leaves),
        position=kinds.index("USER_OUTPUT"),
    )


def refuse_control_flow(graph: fx.Graph) -> None:
    """torch.cond, scan, while_loop, map: their bodies are graphs of their own."""
    found = [n for n in graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    if found:
        names = ", ".join(dict.fromkeys(f"torch.ops.higher_order.{n.target}" for n in found))
        where = (line for line in map(source_line, found) if line and not line.startswith("<"))
        lines = "".join(f"\n  at {line}" for line in where)
        raise UnsupportedOperatorError(
            f"No rule is known for control flow that stays in the graph: {names}.{lines}\nUnroll "
            "the loop in Python, take torch.where of both branches, or move it out of the model."
        )


def refuse_sparse(graph: fx.Graph) -> None:
    """Tensors whose layout has no strides."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            raise UnsupportedOperatorError(
                f"{node.target} gives a tensor of layout {value.layout}; only dense tensors are "
                "supported. Use to_dense() before the model."
            )


# Position of the argument that asks for a sparse gradient.
SPARSE = {
    aten.embedding.default: 4, aten.embedding_bag.default: 5, aten.embedding_bag.padding_idx: 5,
    aten._embedding_bag.default: 5,
}  # fmt: skip


def ask_for_dense_gradients(graph: fx.Graph) -> None:
    """Gradients and diagonals are dense, also where an embedding asks for sparse ones."""
    for node in graph.nodes:
        position = SPARSE.get(node.target)
        if position is not None and len(node.args) > position:
            node.update_arg(position, False)
        if position is not None and "sparse" in node.kwargs:
            node.update_kwarg("sparse", False)


def detach_no_grad(module: fx.GraphModule) -> None:
    """Detach what the model computes under torch.no_grad(); decomposing forgets the mode."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and not node.args[0]:
            for part in list(node.users):
                with module.graph.inserting_after(part):
                    constant = module.graph.call_function(aten.detach.default, (part,))
                constant.meta.update(part.meta)
                part.replace_all_uses_with(constant, lambda user, new=constant: user is not new)
        elif node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                detach_no_grad(inner)


def read_inputs(
    program: Any, signature: Any, graph: fx.Graph, step: Step, names: list[str]
) -> list[Leaf]:
    """What each placeholder is."""
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    inputs = iter([n for n, v in zip(names, step.static, strict=True) if v is TENSOR])
    buffers = dict(step.named_buffers(remove_duplicate=False))
    leaves: list[Leaf] = []
    constants = 0
    for spec in signature.input_specs:
        node, kind = placeholders[spec.arg.name], spec.kind.name
        if kind == "USER_INPUT":
            leaves.append(Leaf(node, "input", next(inputs)))
        elif kind == "PARAMETER" or (kind == "BUFFER" and spec.target in buffers):
            leaves.append(Leaf(node, kind.lower(), spec.target))
        elif kind in ("CONSTANT_TENSOR", "BUFFER"):  # a buffer of the recorded module is none's
            value = program.constants.get(spec.target, program.state_dict.get(spec.target))
            refuse_computed(value, step)
            leaves.append(Leaf(node, "constant", f"_constant_{constants}", value))
            constants += 1
        else:
            raise CaptureError(f"The captured program has an input of kind {kind}: {spec.target}.")
    return leaves


def guards_of(leaves: list[Leaf]) -> list[Any]:
    """Conditions on symbolic sizes that the trace relied on, as sympy expressions."""
    fake_mode = detect_fake_mode([leaf.node.meta["val"] for leaf in leaves])
    env = getattr(fake_mode, "shape_env", None)
    if env is None:
        return []
    found = [env.simplify(guard.expr) for guard in env.guards]
    return list(dict.fromkeys(g for g in found if g.free_symbols))


def unify_tied(leaves: list[Leaf], step: Step, graph: fx.Graph) -> list[Leaf]:
    """Export lists a tied parameter under each of its names; keep the first."""
    tensors = dict(step.named_parameters(remove_duplicate=False))
    first: dict[int, Leaf] = {}
    kept = []
    for leaf in leaves:
        if leaf.kind == "parameter":
            known = first.setdefault(id(tensors[leaf.name]), leaf)
            if known is not leaf:
                leaf.node.replace_all_uses_with(known.node)
                graph.erase_node(leaf.node)
                continue
        kept.append(leaf)
    return kept


def refuse_writes(signature: Any, leaves: list[Leaf], graph: fx.Graph) -> None:
    """A model may write into its buffers, and into nothing else that was there before."""
    buffers = {leaf.name for leaf in leaves if leaf.kind == "buffer"}
    names = {leaf.node.name: leaf.name for leaf in leaves}
    results = graph.find_nodes(op="output")[0].args[0]
    for spec, result in zip(signature.output_specs, results, strict=True):
        line = source_line(result) if isinstance(result, fx.Node) else ""
        where = f" at {line}" if line else ""
        if spec.kind.name == "BUFFER_MUTATION" and spec.target not in buffers:
            raise InvalidModelError(
                "The model writes into a tensor that is neither a buffer of it nor made by it. "
                "Register it: module.register_buffer(name, tensor)."
            )
        if spec.kind.name == "USER_INPUT_MUTATION":
            raise InvalidModelError(
                f"The model writes into its input {names.get(spec.target, spec.target)!r}{where}. "
                "Let it work on a copy: x = x.clone()."
            )
        if spec.kind.name == "PARAMETER_MUTATION":
            name = spec.target.removeprefix("model.")
            raise InvalidModelError(
                f"The model writes into its parameter {name!r}{where}; "
                "then the loss is no function of the parameters. Make it a buffer."
            )


def check_loss(outputs: list[Any], step: Step) -> None:
    """The program must return one real floating-point scalar."""
    who = "The loss" if step.loss_fn is not None else "The model"
    way = "Pass the loss: transform(model, loss), e.g. transform(model, lambda out: out.loss)."
    if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
        what = f"{len(outputs)} values" if len(outputs) != 1 else "no tensor"
        raise InvalidModelError(f"{who} returns {what}, not one scalar loss. {way}")
    value = outputs[0].meta["val"]
    if not isinstance(value, torch.Tensor):
        raise InvalidModelError(f"{who} returns a {type(value).__name__}, no tensor. {way}")
    if value.dim() > 0:
        if step.loss_fn is not None:
            way = "Reduce it, e.g. with .mean() or reduction='mean'."
        raise InvalidModelError(
            f"{who} returns a tensor of shape {list(value.shape)}, not a scalar. {way}"
        )
    if not value.is_floating_point():
        way = "Take its real part or abs()." if value.is_complex() else "Convert it to float."
        raise InvalidModelError(
            f"{who} returns {value.dtype}; it must be a real floating-point scalar. {way}"
        )


CHECKS = {
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def drop_checks(graph: fx.Graph) -> None:
    """Export's checks of shapes and dtypes: the module checks its arguments itself."""
    for node in reversed(graph.nodes):
        if node.target in CHECKS:
            graph.erase_node(node)


def name_checks(graph: fx.Graph) -> None:
    """Let torch's assertions of numbers that come from data say what they are."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        condition, text = node.args
        reason = str(text).removeprefix("Runtime assertion failed for expression ")
        read = condition
        while isinstance(read, fx.Node) and not isinstance(read.target, torch._ops.OpOverload):
            read = next(iter(read.all_input_nodes), None)
        where = source_line(read) if isinstance(read, fx.Node) else ""
        at = f" at {where}" if where else ""
        node.args = (condition, f"{MESSAGE}: {reason.split(' on node ')[0]}{at}")


def see_through_selections(graph: fx.Graph) -> None:
    """Views, to which a region does not end, instead of selections of all there is.

    ``x[:]`` is x; export writes one for every ``:`` next to a None or an index. ``x[:, 0]`` of a
    dimension of one entry drops it.
    """
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and takes_all(*node.args):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.select.int and size_of(*node.args[:2]) == 1:
            node.target, node.args = aten.squeeze.dim, node.args[:2]


def takes_all(x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether a slice is of all entries."""
    size = size_of(x, dim)
    ends = end in (None, sys.maxsize) or (isinstance(end, int) and size is not None and end >= size)
    return start in (None, 0) and ends and step == 1


def size_of(x: fx.Node, dim: int) -> int | None:
    """The number of entries along a dimension, where it is no symbol."""
    size = x.meta["val"].shape[dim]
    return size if isinstance(size, int) else None


def strip_boundary(graph: fx.Graph) -> list[fx.Node]:
    """Remove the identity operators that marked the model's output; return what they marked."""
    marked: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node.target == torch.ops.hesscale_fx.output.default:
            source = node.args[0]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            marked[source] = None
    return list(marked)


@functools.cache
def _core_table() -> dict[Any, Callable]:
    return dict(torch.export.default_decompositions().items())


def decompositions() -> dict[Any, Callable]:
    """PyTorch's decompositions, without those of operators that have a structure here."""
    table = {op: f for op, f in _core_table().items() if not structures.is_known(op)}
    table.update(structures.definitions_for_capture())
    for op in definitions.REPEATED:
        table.pop(op, None)
    return table


def decompose(program: Any) -> tuple[fx.Graph, Any]:
    """The functional graph at the pinned level, and a program's signature that it has."""
    table = decompositions()
    signature = program.graph_signature
    values = [n.meta.get("val") for n in program.graph.nodes]
    found = decomposed(program.graph, table, detect_fake_mode(pytree.tree_leaves(values)))
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    if found is None or any(kinds[n.name].kind.name != "BUFFER" for n in found.written):
        program = program.run_decompositions(table)
        return program.graph_module.graph, program.graph_signature
    mutations = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(new.name), kinds[old.name].target)
        for old, new in found.written.items()
    ]
    return found.graph, ExportGraphSignature(
        signature.input_specs, [*mutations, *signature.output_specs]
    )


def write_repeated(graph: fx.Graph) -> None:
    """Write out the operators of which one definition serves many equal layers."""
    written = structures.definitions_for_capture()
    repeated = {op: written[of] for op, of in definitions.REPEATED.items() if of in written}
    values = [n.meta["val"] for n in graph.nodes if n.target in repeated]
    if values:
        with no_autocast():
            write_in(graph, repeated, detect_fake_mode(pytree.tree_leaves(values)))
