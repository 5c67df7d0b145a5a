"""Regions against brute force on random graphs.

A random function of pointwise operators and reductions along one dimension lies between its leaves
and ``h(y) = sum <w, y> + 1/2 <d, (y - y0)^2>``. There is no contraction inside, so the curvature of
each leaf must be the exact diagonal of the Hessian of h(f(x)). With a matrix in front of the leaf,
or between f and h, the same holds of the pieces, and the matrices square in between.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

import hesscale_fx

N, C, K = 3, 4, 2

SHAPES = {"full": (N, C), "row": (C,), "thin row": (1, C), "column": (N, 1)}

UNARY = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "bump": lambda x: torch.exp(-(x**2)),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "square": lambda x: torch.square(torch.tanh(x)),
    "product": lambda x: torch.sin(x) * torch.sin(x),
    "detached": lambda x: torch.sin(x) * torch.cos(x).detach(),
    "masked": lambda x: torch.where(MASK[:, : x.shape[1]], torch.sin(x), 0.5),
    "filled": lambda x: torch.cos(x).masked_fill(MASK[:, : x.shape[1]], 0.0),
    "relu": lambda x: F.relu(x) * x,
    "view": lambda x: (x.reshape(N, -1, 2) if x.shape[1] == C else x).sin().reshape(x.shape),
    "transposed": lambda x: (x.T * torch.tanh(x.T)).T,
}
BINARY = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "div": lambda a, b: a / (1 + b**2),
    "min": torch.minimum,
    "silu": lambda a, b: a * F.silu(b),
}
# Over the last dimension, which is kept: a tensor of (N, 1), or one of (N, C) made with it.
REDUCE = {
    "sum": lambda x: 0.5 * x.sum(1, keepdim=True),
    "mean": lambda x: x.mean(-1)[:, None],
    "unsqueezed": lambda x: x.mean(1).unsqueeze(1),
    "logsumexp": lambda x: torch.logsumexp(x, 1, keepdim=True),
    "norm": lambda x: torch.sqrt(1 + (x * x).sum(1, keepdim=True)),
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "shifted": lambda x: x - x.amax(1, keepdim=True),
    "softmax": lambda x: F.softmax(x, 1),
    "log-softmax": lambda x: F.log_softmax(x, 1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:], eps=0.1),
    "normalised": lambda x: x / (x.square().mean(1, keepdim=True) + 0.1).sqrt(),
    "var": lambda x: x.var(1, keepdim=True, correction=0),
}
MASK = torch.arange(N)[:, None] % 2 == torch.arange(C) % 3 % 2


@st.composite
def programs(draw, longest=7):
    """Leaves' kinds, steps (an operator and the indices of its operands), number of outputs."""
    leaves = ["full", *draw(st.lists(st.sampled_from(sorted(SHAPES)), max_size=2))]
    steps = []
    for i in range(draw(st.integers(2, longest))):
        family = draw(st.sampled_from(["unary", "binary", "binary", "reduce"]))
        table = {"unary": UNARY, "binary": BINARY, "reduce": REDUCE}[family]
        # Late values are likely operands, so that graphs are deep; any earlier one may be shared.
        last = len(leaves) + i - 1
        operands = [last - min(draw(st.integers(0, 2 * last)), last) // 2]
        if family == "binary":
            operands.append(draw(st.integers(0, last)))
        steps.append((draw(st.sampled_from(sorted(table))), tuple(operands)))
    return leaves, steps, draw(st.integers(1, 2)), draw(st.integers(0, 99))


def run(program, leaves):
    """The last values of the program, each as (N, C): they all count."""
    _, steps, outputs, _ = program
    values = [x.expand(N, x.shape[-1]) if x.dim() == 1 or x.shape[0] == 1 else x for x in leaves]
    for name, operands in steps:
        args = [values[i] for i in operands]
        if name in REDUCE:
            # A column has no row to reduce.
            value = REDUCE[name](args[0].expand(N, C) if name == "var" else args[0])
        else:
            value = (UNARY.get(name) or BINARY[name])(*args)
        values.append(value)
    return values[-outputs:]


def h(ys, constants):
    return sum((w * y).sum() + 0.5 * (d * (y - y0) ** 2).sum() for y, (w, d, y0) in zip(
        ys, constants, strict=True))  # fmt: skip


def data(program):
    kinds, _, _, seed = program
    torch.manual_seed(seed)
    leaves = [torch.randn(SHAPES[k]).double() for k in kinds]
    with torch.no_grad():
        ys = run(program, leaves)
    return leaves, [(torch.randn_like(y), torch.randn_like(y), y) for y in ys]


def exact(f, leaves):
    """Gradient and diagonal of the Hessian of the scalar f with respect to each leaf."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True, materialize_grads=True)
    diagonals = []
    for x, g in zip(leaves, grads, strict=True):
        d = torch.zeros(x.numel()).double()
        for i in range(x.numel()):
            if g.requires_grad:
                (row,) = torch.autograd.grad(
                    g.flatten()[i], x, retain_graph=True, materialize_grads=True
                )
                d[i] = row.flatten()[i]
        diagonals.append(d.view_as(x))
    return [g.detach() for g in grads], diagonals


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *leaves):
        return self.f(*leaves)


def transformed(f, leaves, dynamic=False):
    hs = hesscale_fx.transform(Function(f), None, tuple(leaves), wrt="inputs", dynamic=dynamic)
    out = hs(*leaves)
    return list(out.grads.values()), list(out.hess_diag.values())


def compare(got, want, what):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a - b).abs().max().item()
        assert error <= 1e-9 * max(1.0, b.abs().max().item()), f"{what} of leaf {i}: {error:.1e}"


def check(program):
    """f between its leaves and h."""
    leaves, constants = data(program)

    def loss(*leaves):
        return h(run(program, leaves), constants)

    grads, diagonals = transformed(loss, leaves)
    want_grads, want = exact(loss, leaves)
    compare(grads, want_grads, "gradient")
    compare(diagonals, want, "curvature")


def check_between_matrices(program):
    """x = z A before the first leaf, u = y B after the first output."""
    leaves, _ = data(program)
    a = torch.randn(K, C).double()
    z = torch.randn(N, K).double()
    leaves[0] = z @ a
    ys = [y.detach() for y in run(program, leaves)]
    b = torch.randn(ys[0].shape[1], K).double()
    us = [ys[0] @ b, *ys[1:]]
    constants = [(torch.randn_like(u), torch.randn_like(u), u) for u in us]

    def loss(z, *others):
        y, *rest = run(program, [z @ a, *others])
        return h([y @ b, *rest], constants)

    # Each level by itself: what the outputs get from h, pulled back through the matrix.
    (w, d, _), *rest = constants
    levels = [
        lambda *x: h(run(program, x)[:1], [(w @ b.T, d @ (b * b).T, ys[0])]),
        lambda *x: h(run(program, x)[1:], rest) + 0 * x[0].sum(),
    ]
    want_grads, want = [torch.zeros_like(x) for x in leaves], [torch.zeros_like(x) for x in leaves]
    for level in levels:
        for total, part in zip((want_grads, want), exact(level, leaves), strict=True):
            for x, y in zip(total, part, strict=True):
                x += y
    want_grads[0], want[0] = want_grads[0] @ a.T, want[0] @ (a * a).T
    grads, diagonals = transformed(loss, [z, *leaves[1:]])
    compare(grads, want_grads, "gradient")
    compare(diagonals, want, "curvature")


def configured(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes
    )


@configured(20)
@given(programs())
def test_a_random_region_is_exact(program):
    check(program)


# A row of one entry less its maximum is zero, and that maximum no constant for it.
SHIFTED = (["full"], [("mean", (0,)), ("shifted", (1,)), ("div", (1, 2))], 1, 3)


@configured(12)
@example(SHIFTED)
@given(programs())
def test_a_random_region_between_matrices(program):
    check_between_matrices(program)


@pytest.mark.slow
@configured(1000)
@given(programs(longest=14))
def test_many_random_regions_are_exact(program):
    check(program)


@pytest.mark.slow
@configured(500)
@given(programs(longest=14))
def test_many_random_regions_between_matrices(program):
    check_between_matrices(program)
