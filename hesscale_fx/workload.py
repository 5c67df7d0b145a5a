"""A model, its loss and example arguments from what is typed on a command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.step import count_targets


@dataclass
class Workload:
    """What `transform` needs, and the call to make.

    Attributes:
        model: the module.
        loss: ``loss(output, *targets)``, or None if the model returns its loss.
        args: inputs, then targets.
    """

    model: nn.Module
    loss: Callable | None
    args: tuple[Tensor, ...]


def load(name: str) -> Any:
    """The object that ``package.module:attribute`` or ``path/to/file.py:attribute`` names.

    Raises:
        InvalidArgumentError: it is not of this form, or there is nothing of this name.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise InvalidArgumentError(
            f"{name!r} names no object: write package.module:factory or path/to/file.py:factory."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(f"{error.name}.")):
            raise  # something that the module itself imports
        raise InvalidArgumentError(
            f"There is no module {error.name!r} here or among the installed packages."
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidArgumentError(f"{where} has no {attribute!r}.")
        found = getattr(found, part)
    return found


def from_file(path: Path) -> Any:
    """A module from its file."""
    if not path.is_file():
        raise InvalidArgumentError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module


def loss_named(name: str) -> Callable:
    """A loss of `torch.nn` by its class's name, or the object that ``module:attribute`` names."""
    if ":" in name:
        found = load(name)
        return found() if isinstance(found, type) else found
    found = getattr(nn, name, None)
    if not (isinstance(found, type) and name.endswith("Loss")):
        raise InvalidArgumentError(
            f"torch.nn has no loss {name!r}: write e.g. CrossEntropyLoss, or module:function."
        )
    return found()


def tensor_of(text: str) -> Tensor:
    """A random tensor for ``SHAPE``, ``SHAPE:DTYPE`` or ``SHAPE:DTYPE:HIGH``.

    Floating-point values are normal, integers are below HIGH.

    Example:
        >>> tensor_of("8,3,32,32").shape
        torch.Size([8, 3, 32, 32])
        >>> tensor_of("8,16:int64:1000").dtype
        torch.int64
    """
    shape_text, _, rest = text.partition(":")
    dtype_text, _, high = rest.partition(":")
    try:
        shape = [int(s) for s in shape_text.split(",") if s.strip()]
        limit = int(high) if high else None
    except ValueError:
        raise InvalidArgumentError(
            f"{text!r} is no shape: write 8,3,32,32 or 8,16:int64:1000 (values below 1000)."
        ) from None
    if any(size < 0 for size in shape):
        raise InvalidArgumentError(f"{text!r} has a negative size.")
    dtype = getattr(torch, dtype_text or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgumentError(f"torch has no dtype {dtype_text!r}.")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    if dtype is torch.bool:
        return torch.randint(2, shape).bool()
    if limit is None:
        raise InvalidArgumentError(
            f"{text!r} has integers: say what they are below, e.g. {shape_text}:{dtype_text}:10."
        )
    return torch.randint(limit, shape, dtype=dtype)


def build(
    name: str, inputs: Sequence[str], targets: Sequence[str], loss: str | None, train: bool
) -> Workload:
    """Call the factory and draw what it does not give.

    Args:
        name: of the factory. It returns the model, ``(model, loss)`` or ``(model, loss, args)``.
        inputs: the model's inputs, as for `tensor_of`.
        targets: the loss's targets, likewise; by default what the loss takes.
        loss: name of the loss, for `loss_named`.
        train: the model's mode.

    Raises:
        InvalidArgumentError: an argument is wrong or missing.
    """
    made = load(name)
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    model, given, args = (*made, None, None)[:3] if isinstance(made, tuple) else (made, None, None)
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"{name} gives {type(model).__name__}; it must give an nn.Module, (model, loss) or "
            "(model, loss, example_inputs)."
        )
    model.train(train)
    chosen = loss_named(loss) if loss else given
    if args is None or inputs:
        if not inputs:
            raise InvalidArgumentError(
                f"{name} gives no example inputs: say their shapes with --input, e.g. "
                "--input 8,3,32,32, once for each input."
            )
        drawn = tuple(map(tensor_of, inputs))
        ends = [tensor_of(t) for t in targets]
        if chosen is not None and not ends and count_targets(chosen):
            ends = [target_for(chosen, model, drawn)]
        args = (*drawn, *ends)
    return Workload(model, chosen, tuple(args))


CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
BINARY = (nn.BCELoss, nn.BCEWithLogitsLoss)
REAL = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def target_for(loss: Callable, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """A random target that fits the model's output, for the losses where it is clear."""
    mode = model.training
    with torch.no_grad():
        out = model.eval()(*inputs)
    model.train(mode)
    if isinstance(out, Tensor):
        if isinstance(loss, CLASSES):
            classes = out.shape[1] if out.dim() > 1 else out.shape[0]
            return torch.randint(classes, (out.shape[0], *out.shape[2:]) if out.dim() > 1 else ())
        if isinstance(loss, BINARY):
            return torch.randint(2, out.shape).to(out.dtype)
        if isinstance(loss, REAL):
            return torch.randn_like(out)
    kind = getattr(loss, "__name__", type(loss).__name__)
    raise InvalidArgumentError(
        f"What target {kind} takes is not known: say it with --target, e.g. --target 8:int64:10."
    )
