"""Model and loss as one module of tensors, which is what is traced."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from hesscale_fx.boundary import output
from hesscale_fx.errors import InvalidArgumentError, InvalidModelError
from hesscale_fx.signature import TENSOR


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
        """The loss, a module or a function."""
        return self._function if self.loss is None else self.loss

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Remember the structure of the arguments; return their tensors."""
        leaves, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self.static = [TENSOR if isinstance(v, torch.Tensor) else v for v in leaves]
        return [v for v in leaves if isinstance(v, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The loss of the call that is bound, with these tensors in it."""
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
    """What a function calls its first arguments."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return names + [f"{default}_{i}" for i in range(len(names), count)]
