"""Spelled-out activations use PyTorch's own kernels, and only those that are the same function."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import hesscale_fx

aten = torch.ops.aten
ROOT = math.sqrt(2 / math.pi)
SPELLINGS = {
    "gelu": (F.gelu, lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "tanh gelu": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3)))),
    ),
    "silu": (F.silu, lambda x: x / (1 + torch.exp(-x))),
}
KERNELS = {aten.gelu_backward.default, aten.silu_backward.default}


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x))).square().sum()


def transformed(function, x):
    torch.manual_seed(0)
    return hesscale_fx.transform(Net(function).double(), None, (x,))


def kernels(hs):
    return [n for n in hs.graph.nodes if n.target in KERNELS]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_recognized(name):
    native, spelled = SPELLINGS[name]
    x = 3 * torch.randn(5, 4).double()
    one, other = transformed(native, x), transformed(spelled, x)
    assert kernels(other)
    assert_close(other(x).hess_diag, one(x).hess_diag, 1e-12, "diagonals")
    assert_close(other(x).grads, one(x).grads, 1e-12, "gradients")


def test_another_function_is_not():
    def close(x):  # a constant in six digits
        return 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * torch.pow(x, 3))))

    x = torch.randn(5, 4).double()
    hs = transformed(close, x)
    assert not kernels(hs)
    torch.manual_seed(0)
    net = Net(close).double()
    grads = torch.autograd.grad(net(x), list(net.parameters()))
    assert_close(hs(x).grads, dict(zip(hs(x).grads, grads, strict=True)), 1e-12, "gradients")
