"""Errors of hesscale_fx. Each is a `HesScaleError` and the builtin exception that fits."""

from __future__ import annotations

import os
import re

import torch.fx

# How the message of an assertion in an emitted graph begins.
MESSAGE = "hesscale_fx: the captured path does not hold"


class HesScaleError(Exception):
    """Base class of every error that hesscale_fx raises on purpose."""


class InvalidModelError(HesScaleError, TypeError):
    """The model, its loss or its parameters cannot be differentiated as asked."""


class InvalidArgumentError(HesScaleError, ValueError):
    """An argument of `transform`, `register` or `check` is wrong."""


class UnknownNameError(HesScaleError, KeyError):
    """A name matches nothing, e.g. `wrt`."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class CaptureError(HesScaleError, RuntimeError):
    """The model could not be traced into one graph."""


class Refusal(CaptureError):
    """A reason that no other way of capture would change."""


class ModelTypeError(Refusal, TypeError):
    """The model or the loss raises a TypeError at these arguments: too many, or of another kind."""


class ModelValueError(Refusal, ValueError):
    """The model or the loss raises a ValueError at these arguments."""


MODEL_ERRORS = (ModelTypeError, ModelValueError)


class UnsupportedOperatorError(HesScaleError, NotImplementedError):
    """An operator on the path from a differentiated tensor to the loss has no structure."""


class CallError(HesScaleError, ValueError):
    """The arguments of a call do not fit the captured graph."""


class CallTypeError(HesScaleError, TypeError):
    """The arguments of a call have another dtype, device or number than the captured graph."""


class NotCapturedError(HesScaleError, RuntimeError):
    """The graph was asked for before the first call captured it."""


class MissingPackageError(HesScaleError, ImportError):
    """An optional package or program is not installed."""


NOT_OURS = ("/torch/", os.path.dirname(__file__))


def source_line(node: torch.fx.Node) -> str:
    """The user's own source line of a node, e.g. ``model.py:12: h = foo(x)``; may be empty."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    frames = [
        (lines[i], lines[i + 1] if i + 1 < len(lines) else "")
        for i in range(len(lines))
        if lines[i].startswith("File ")
    ]
    # The innermost frame outside torch is the line the user wrote.
    own = [f for f in frames if not any(p in f[0].split(",")[0] for p in NOT_OURS)]
    if not own:
        return ""
    where, code = own[-1]
    found = re.match(r'File "(.*)", line (\d+)', where)
    return f"{found[1]}:{found[2]}: {code}" if found else code
