"""Model and loss in, one functional ATen graph out.

With captured.py and decomposing.py the only file that knows torch.export. The captured graph is at
a pinned level: operators with a structure of their own stay whole (silu, layer_norm, linear,
convolution, ...); every other composite operator is decomposed by PyTorch's own formulas.
"""

from __future__ import annotations

import functools
import io
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import sympy
import torch
from torch import fx, nn

from hesscale_fx import below_autograd
from hesscale_fx.captured import Captured, from_program
from hesscale_fx.checkpoints import seen_through
from hesscale_fx.decisions import Decision, Reads, check_asserted
from hesscale_fx.errors import MODEL_ERRORS, CaptureError, HesScaleError, Refusal
from hesscale_fx.failures import OWN_ERROR, explain, refuse_sparse_error
from hesscale_fx.modes import dispatch_kept, grad_modes, quiet
from hesscale_fx.registered import Registered
from hesscale_fx.step import Step, argument_names, attributes_kept
from hesscale_fx.structures.whole import captured_whole

log = logging.getLogger("hesscale_fx")


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
    """A size as sympy has it."""
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
    """By autograd, zeros where the loss does not depend on a parameter."""
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
