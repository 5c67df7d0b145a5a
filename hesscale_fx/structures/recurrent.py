"""Recurrent layers written out step by step, as torch.nn defines them.

PyTorch's own decomposition (torch 2.13) leaves out the dropout between layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hesscale_fx.structures.definitions import defines, repeats

aten = torch.ops.aten

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, list[Tensor]], State]  # input projection, state, weights


def rnn_step(act: Callable[[Tensor], Tensor]) -> Step:
    @repeats
    def step(projected: Tensor, state: State, weights: list[Tensor]) -> State:
        return (act(projected + linear(state[0], *weights[:2])),)

    return step


@repeats
def lstm_step(projected: Tensor, state: State, weights: list[Tensor]) -> State:
    h, c = state
    bias = weights[1:2] if len(weights) > 1 and weights[1].dim() == 1 else []
    i, f, g, o = (projected + linear(h, weights[0], *bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    projection = weights[1 + len(bias) :]  # of an LSTM with proj_size
    return (linear(h, projection[0]) if projection else h), c


@repeats
def gru_step(projected: Tensor, state: State, weights: list[Tensor]) -> State:
    h = state[0]
    xr, xz, xn = projected.chunk(3, -1)
    hr, hz, hn = linear(h, *weights[:2]).chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((h - n) * (xz + hz).sigmoid() + n,)


def layer(
    x: Tensor, state: State, weights: list[Tensor], biased: bool, step: Step, backward: bool
) -> tuple[Tensor, State]:
    """One direction of one layer over x of shape (time, batch, features)."""
    w_ih, w_hh, *rest = weights
    projected = linear(x, w_ih, rest[0] if biased else None)
    inner = [w_hh, *(rest[1:] if biased else rest)]
    outputs = []
    for at in reversed(projected.unbind()) if backward else projected.unbind():
        state = step(at, state, inner)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backward else outputs), state


def stack_layers(
    x: Tensor,
    states: list[State],
    params: list[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    step: Step,
) -> tuple[Tensor, list[State]]:
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    size = len(params) // (layers * directions)
    finals = []
    for i in range(layers):
        outputs = []
        for d in range(directions):
            k = i * directions + d
            weights = params[k * size : (k + 1) * size]
            out, final = layer(x, states[k], weights, biased, step, d == 1)
            outputs.append(out)
            finals.append(final)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if train and dropout and i < layers - 1:
            x = torch.native_dropout(x, dropout, True)[0]
    return (x.transpose(0, 1) if batch_first else x), finals


@defines(aten.lstm.input, at_capture=True)
def lstm(x: Tensor, hx: list[Tensor], params: list[Tensor], *options: Any) -> Any:
    states: list[State] = list(zip(hx[0].unbind(), hx[1].unbind(), strict=True))
    out, finals = stack_layers(x, states, params, *options, lstm_step)  # type: ignore[call-arg]
    return out, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])


def simple(step: Step) -> Callable[..., Any]:
    def recurrent(x: Tensor, hx: Tensor, params: list[Tensor], *options: Any) -> Any:
        states = [(h,) for h in hx.unbind()]
        out, finals = stack_layers(x, states, params, *options, step)  # type: ignore[call-arg, arg-type]
        return out, torch.stack([h for (h,) in finals])

    return recurrent


defines(aten.gru.input, at_capture=True)(simple(gru_step))
defines(aten.rnn_tanh.input, at_capture=True)(simple(rnn_step(torch.tanh)))
defines(aten.rnn_relu.input, at_capture=True)(simple(rnn_step(torch.relu)))


def packed(op: Any) -> Callable[..., Any]:
    """Packed sequences: PyTorch's decomposition, which is right without dropout."""

    def recurrent(*args: Any) -> Any:
        dropout, train = args[-3], args[-2]
        if dropout and train:
            raise NotImplementedError(
                "a packed sequence through a recurrent layer with dropout; set dropout=0 or pad"
            )
        return torch._decomp.decomposition_table[op](*args)

    return recurrent


for _op in (aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data):
    if _op in torch._decomp.decomposition_table:
        defines(_op, at_capture=True)(packed(_op))
