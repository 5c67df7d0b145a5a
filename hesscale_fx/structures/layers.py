"""Recurrent layers as operators of ours while torch.export traces a model.

torch.export, and the decompositions after it, run through all steps of torch's own operators each
time they pass one; of these they compute the shapes. `capture` writes them out at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from hesscale_fx.structures.definitions import REPEATED
from hesscale_fx.structures.whole import replaces_in_export

aten = torch.ops.aten

OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)


def shapes(x: Tensor, states: list[Tensor], bidirectional: bool, batch_first: bool) -> tuple:
    """Empty tensors such as a layer returns: all outputs, then the last of each state."""
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    first, second = x.shape[:2]
    if batch_first:
        out = x.new_empty(second, first, width).transpose(0, 1)
    else:
        out = x.new_empty(first, second, width)
    return (out, *(x.new_empty(s.shape) for s in states))


def stands_for(name: str) -> None:
    """Define ``hesscale_fx::name`` of the signature of ``torch.name`` on tensors that are padded."""
    function, op = getattr(torch, name), getattr(aten, name).input
    hidden = "Tensor[] hx" if name == "lstm" else "Tensor hx"
    returns = "(Tensor, Tensor, Tensor)" if name == "lstm" else "(Tensor, Tensor)"
    tags = (torch.Tag.nondeterministic_seeded,)

    def real(x: Tensor, *args: Any) -> Any:
        return tuple(t.clone() for t in function(x, *args))

    def fake(x: Tensor, hx: Any, *options: Any) -> Any:
        states = [hx] if isinstance(hx, Tensor) else hx
        return shapes(x, states, *options[-2:])

    whole = torch.library.custom_op(
        f"hesscale_fx::{name}",
        real,
        mutates_args=(),
        schema=f"(Tensor input, {hidden}, {OPTIONS}) -> {returns}",
        tags=tags,
    )
    whole.register_fake(fake)
    REPEATED[getattr(torch.ops.hesscale_fx, name).default] = op

    def call(*args: Any, **kwargs: Any) -> Any:
        return (whole if is_plain(args, kwargs) else function)(*args, **kwargs)

    replaces_in_export(function, call)
    replaces_in_export(op, call)


def is_plain(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call is on padded tensors, and nothing around it changes what it computes."""
    padded = len(args) > 3 and isinstance(args[3], bool) and args[0].dim() == 3
    cast = padded and torch.is_autocast_enabled(args[0].device.type)
    transformed = _functorch.peek_interpreter_stack() is not None
    return padded and not kwargs and not cast and not transformed


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    stands_for(_name)
