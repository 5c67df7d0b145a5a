"""Measure diagonals against the exact ones, by plain autograd on the original model."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscale_fx import structures
from hesscale_fx.captured import Captured
from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.registered import Registered
from hesscale_fx.report import Agreement, Verification
from hesscale_fx.structures.base import several, wide

LossOf = Callable[[dict[str, Tensor]], Tensor]


def model_loss(
    step: nn.Module,
    inner: Mapping[str, str],
    inputs: list[str],
    tensors: list[Tensor],
    buffers: Mapping[str, Tensor],
) -> LossOf:
    """The scalar loss of the original model as a function of parameters and inputs.

    Args:
        step: the model and loss as a module of flat tensors.
        inner: user's parameter name -> name within `step`.
        inputs: names of the flat tensors.
        tensors: their values.
        buffers: those of `step`, by name.
    """

    def loss(values: dict[str, Tensor]) -> Tensor:
        state = {name: b.clone() for name, b in buffers.items()}
        state.update({inner[n]: v for n, v in values.items() if n in inner})
        flat = [values.get(n, t) for n, t in zip(inputs, tensors, strict=True)]
        with Registered(step):
            return torch.func.functional_call(step, state, tuple(flat))

    return loss


def graph_loss(
    captured: Captured,
    graph: fx.Graph,
    of: Mapping[fx.Node, fx.Node],
    start: Mapping[str, Tensor],
) -> LossOf:
    """The same by the captured graph with definitions written out.

    Where autograd cannot differentiate an operator twice (hardsigmoid, fused kernels) it can its
    definition.
    """

    def loss(values: dict[str, Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = {}
        for leaf in captured.leaves:
            name = leaf.name.removeprefix("model.")
            env[of[leaf.node]] = values.get(name, start.get(name, leaf.value))
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                call = structures.differentiable(node.target)
                env[node] = call(*args, **kwargs)
        return env[of[captured.loss]]

    return loss


def verify(
    losses: list[LossOf],
    state: Tensor,
    parameters: dict[str, Tensor],
    diagonals: dict[str, Tensor],
    samples: int,
    seed: int,
) -> Verification:
    """Compare diagonals with exact entries by double backward, one coordinate at a time.

    Args:
        losses: the scalar loss at given parameters; a later one is used where autograd cannot
            differentiate the earlier ones twice.
        state: of the default generator at the start of each evaluation.
        parameters: where to evaluate.
        diagonals: what to compare.
        samples: coordinates per parameter; all where there are fewer.
        seed: of the draw.

    Raises:
        InvalidArgumentError: fewer than one sample is asked for.
    """
    if samples < 1:
        raise InvalidArgumentError(f"samples must be at least 1, not {samples}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: torch.randperm(p.numel(), generator=generator)[:samples].sort().values
        for name, p in parameters.items()
    }
    rows, values, exacts = {}, [], []
    with progress(sum(len(c) for c in chosen.values())) as advance:
        for name in parameters:
            exact = exact_entries(losses, state, parameters, name, chosen[name], advance)
            value = diagonals[name].reshape(-1)[chosen[name].to(diagonals[name].device)].cpu()
            rows[name] = Agreement.of(value, exact)
            values.append(value.double())
            exacts.append(exact.double())
    return Verification(rows, Agreement.of(torch.cat(values), torch.cat(exacts)))


def exact_entries(
    losses: list[LossOf],
    state: Tensor,
    parameters: dict[str, Tensor],
    name: str,
    indices: Tensor,
    advance: Callable[[], None],
) -> Tensor:
    """Entries of one parameter's Hessian diagonal, in float64."""
    for attempt, loss in enumerate(losses):
        try:
            return _entries(loss, state, parameters, name, indices, advance)
        except (RuntimeError, NotImplementedError) as error:
            known = "derivative" in str(error) or "not implemented" in str(error)
            if not known or attempt == len(losses) - 1:
                raise
    raise AssertionError("no loss given")


def _entries(
    loss: LossOf,
    state: Tensor,
    parameters: dict[str, Tensor],
    name: str,
    indices: Tensor,
    advance: Callable[[], None],
) -> Tensor:
    x = parameters[name].detach().clone().requires_grad_()
    found = torch.zeros(len(indices), dtype=torch.float64)
    torch.set_rng_state(state)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss({**parameters, name: x})
        if not value.requires_grad:
            return found
        (grad,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        if not grad.requires_grad:
            return found
        flat = grad.reshape(-1)
        for k, i in enumerate(indices.tolist()):
            (row,) = torch.autograd.grad(flat[i], x, retain_graph=True, materialize_grads=True)
            found[k] = row.reshape(-1)[i].detach().double().cpu()
            advance()
    return found


def exact_diagonal(
    losses: list[LossOf], state: Tensor, parameters: dict[str, Tensor], name: str, chunk: int = 64
) -> Tensor:
    """The Hessian diagonal of one parameter, by one Hessian-vector product for each coordinate.

    Args:
        losses: the scalar loss at given parameters; a later one where an earlier one fails.
        state: of the default generator at the start of each evaluation.
        parameters: where to evaluate.
        name: of the parameter.
        chunk: so many products at once, where the operators have batched kernels.

    Returns:
        The diagonal in the parameter's shape and dtype, at least float32.
    """
    for attempt, loss in enumerate(losses):
        try:
            return _diagonal(loss, state, parameters, name, chunk)
        except (RuntimeError, NotImplementedError):
            if attempt == len(losses) - 1:
                raise
    raise AssertionError("no loss given")


def _diagonal(
    loss: LossOf, state: Tensor, parameters: dict[str, Tensor], name: str, chunk: int
) -> Tensor:
    x = parameters[name].detach().clone().requires_grad_()
    found = torch.zeros(x.numel(), dtype=wide(x.dtype), device=x.device)
    torch.set_rng_state(state)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss({**parameters, name: x})
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
            if grad.requires_grad:
                for start in range(0, x.numel(), chunk):
                    stop = min(start + chunk, x.numel())
                    found[start:stop] = _rows(grad, x, start, stop)
    return found.reshape(x.shape)


def _rows(grad: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
    """Entries start to stop of the diagonal."""
    eye = torch.zeros(stop - start, x.numel(), dtype=grad.dtype, device=grad.device)
    eye[:, start:stop].fill_diagonal_(1)

    def pull(one: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(grad, x, one[0], True, allow_unused=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        (rows,) = several(pull, [eye.reshape(-1, *x.shape)])
    if rows is None:
        return torch.zeros(stop - start, dtype=grad.dtype, device=grad.device)
    return rows.reshape(stop - start, -1)[:, start:stop].diagonal().detach()


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A tqdm bar, where tqdm is installed, for what takes more than a few seconds."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="verify", delay=3, leave=False) as bar:
        yield lambda: bar.update() and None
