"""Why a trace failed, in the user's terms."""

from __future__ import annotations

import os
import traceback

from torch import nn

from hesscale_fx.errors import UnsupportedOperatorError

HERE = os.path.dirname(__file__)


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
