"""Recurrent layers as operators of ours while torch.export traces a model.

Of torch's own operators torch.export computes the shapes by running through all steps, each time
that it or its decompositions pass one. Of these it takes the shapes that are given here; `capture`
writes them out at the end (`recurrent`).
"""

from __future__ import annotations

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
    """Empty tensors such as a layer returns: its outputs at all steps, then the last states."""
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    out = x.new_empty(*time_first(x, batch_first), width)
    last = [x.new_empty(s.shape) for s in states]
    return (out.transpose(0, 1) if batch_first else out, *last)


def time_first(x: Tensor, batch_first: bool) -> tuple[Any, Any]:
    """Steps and batch of an input."""
    return (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])


def stands_for(name: str) -> None:
    """Define ``hesscale_fx::name``, which stands for ``torch.name`` where nothing is packed."""
    function, op = getattr(torch, name), getattr(aten, name).input
    hidden = "Tensor[] hx" if name == "lstm" else "Tensor hx"
    returns = "(Tensor, Tensor, Tensor)" if name == "lstm" else "(Tensor, Tensor)"

    def run(x: Tensor, *args: Any) -> Any:
        return tuple(t.clone() for t in function(x, *args))

    whole = torch.library.custom_op(
        f"hesscale_fx::{name}",
        run,
        mutates_args=(),
        schema=f"(Tensor input, {hidden}, {OPTIONS}) -> {returns}",
        tags=(torch.Tag.nondeterministic_seeded,),  # it may draw dropout
    )
    whole.register_fake(lambda x, hx, *options: shapes(x, states_of(hx), *options[-2:]))
    REPEATED[getattr(torch.ops.hesscale_fx, name).default] = op

    def call(*args: Any, **kwargs: Any) -> Any:
        return (whole if is_plain(args, kwargs) else function)(*args, **kwargs)

    replaces_in_export(function, call)
    replaces_in_export(op, call)


def states_of(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def is_plain(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call is one that is written out: valid, not packed, no autocast or torch.func.

    Sizes other than the batch's are fixed, as the steps would.
    """
    if len(args) != 9 or kwargs or not isinstance(args[3], bool):
        return False  # of packed sequences, or by names
    x, hx, params, batch_first = *args[:3], args[-1]
    states = states_of(hx)
    tensors = [x, *states, *params]
    if torch.is_autocast_enabled(x.device.type) or _functorch.peek_interpreter_stack() is not None:
        return False
    if len({(t.dtype, t.device) for t in tensors}) > 1 or any(t.dim() != 3 for t in (x, *states)):
        return False
    steps, batch = time_first(x, batch_first)
    fixed = [steps, x.shape[2], *(n for s in states for n in (s.shape[0], s.shape[2]))]
    sizes = [int(n) for n in (*fixed, *(n for p in params for n in p.shape))]
    same_batch = all(bool(s.shape[1] == batch) for s in states)
    return same_batch and all(sizes) and sizes[1] == params[0].shape[1]


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    stands_for(_name)
