"""The reference itself, where the right answer is known without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, cast, relative_error
from models import CASES
from reference import autograd, exact_hessian_diagonal, reference
from torch import nn


class _Leaf(nn.Module):
    """A function of one parameter: no layer below it, so the diagonal is exact."""

    def __init__(self, fn, *shape):
        super().__init__()
        self.w, self.fn = nn.Parameter(torch.randn(*shape).double()), fn

    def forward(self):
        return self.fn(self.w)


_ROW = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()
_EXACT = {
    "pointwise": lambda w: (w * torch.sigmoid(w)).sin().sum(),
    "square-root-of-sum": lambda w: (w * w).sum().sqrt(),
    "softmax": lambda w: (w.softmax(-1) * _ROW).sum(-1).mean(),
    "layer-norm": lambda w: (F.layer_norm(w, (5,)) * _ROW).tanh().sum(),
    "norm-then-softmax": lambda w: (F.layer_norm(w, (5,)).softmax(-1) * _ROW).sum(),
    "cross-entropy": lambda w: F.cross_entropy(w, torch.tensor([0, 4, 2]), label_smoothing=0.1),
    "focal": lambda w: (1 - w.log_softmax(-1)[:, 0].exp()).square().mean(),
    "pool-of-squares": lambda w: F.avg_pool1d(w.square()[None], 2)[0].sum(),
    "contraction": lambda w: (w @ _ROW).square().sum(),
    "batch-norm": lambda w: (F.batch_norm(w, None, None, training=True) * _ROW).sin().sum(),
}


@pytest.mark.parametrize("name", _EXACT)
def test_one_unit_is_exact(name):
    leaf = _Leaf(_EXACT[name], 3, 5)
    got = reference(leaf)
    exact = exact_hessian_diagonal(leaf, dict(leaf.named_parameters()))
    grad = torch.autograd.grad(leaf(), leaf.w)[0]
    assert relative_error(got.grads["w"], grad) < 1e-12
    if name == "contraction":  # exact only where the Hessian above is diagonal, as here
        assert relative_error(got.hess_diag["w"], exact["w"]) < 1e-12
    assert relative_error(got.hess_diag["w"], exact["w"]) < 1e-12


def test_operators_alone_are_not_enough():
    """x * sigmoid(x): the example of the contract, 0.12 where 0.78 is right."""

    def swish(w):
        y = w * torch.sigmoid(w)
        return 1.3 * y + 0.2 * (y - y.detach()).square()

    leaf = _Leaf(swish, 1)
    leaf.w.data.fill_(0.7)
    assert abs(reference(leaf).hess_diag["w"].item() - 0.78) < 0.01
    assert abs(reference(leaf, units="op").hess_diag["w"].item() - 0.12) < 0.01


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), F.smooth_l1_loss])
def test_the_last_layer_is_exact(loss):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4).double()
    y = (
        torch.randint(3, (6,))
        if isinstance(loss, nn.CrossEntropyLoss)
        else torch.randn(6, 3).double()
    )
    got = reference(net, loss, (x,), (y,))
    last = {n: p for n, p in net.named_parameters() if n.startswith("2.")}
    exact = exact_hessian_diagonal(lambda: loss(net(x), y), last)
    assert_close({n: got.hess_diag[n] for n in last}, exact, 1e-12, "last layer")
    _, grads = autograd(net, loss, (x,), (y,))
    assert_close({n: got.grads[n] for n in grads}, grads, 1e-12, "gradients")


def _through(y, x, g, s):
    """The diagonal of the Hessian in x of <g, y> + <s, (y - y0)^2> / 2 at y0 = y(x)."""
    x = x.detach().clone().requires_grad_()
    y0 = y(x).detach()

    def loss():
        return (g * y(x)).sum() + 0.5 * (s * (y(x) - y0).square()).sum()

    return exact_hessian_diagonal(loss, {"x": x})["x"]


def _grad(fn, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(x), x)[0]


class _PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        y = F.layer_norm(x + self.one(x), (4,))
        return F.layer_norm(y + self.two(y), (4,))


def test_a_chain_of_norms_is_one_region_at_each_level():
    """By hand: the norm below is recomputed in the region above, which spans both."""
    net = _PostNorm().double()
    x, target, weight = (torch.randn(3, 4).double() for _ in range(3))
    (one, two), zero = (m.weight.detach() for m in (net.one, net.two)), torch.zeros(())

    def loss(out, target):
        return (weight * (out - target).square()).sum()

    def norm(v):
        return F.layer_norm(v, (4,))

    def top(below, above):
        return loss(norm(norm(x + below) + above), target)

    below = x @ one.T
    y = norm(x + below)
    above = y @ two.T
    g = _grad(lambda v: top(below, v), above)
    s = _through(lambda v: top(below, v), above, 1.0, zero)
    direct = _through(lambda v: top(v, above), below, 1.0, zero)
    through = _through(lambda v: norm(x + v), below, g @ two, s @ two.square())
    got = reference(net, loss, (x,), (target,)).hess_diag
    assert relative_error(got["two.weight"], s.T @ y.square()) < 1e-12
    assert relative_error(got["one.weight"], (direct + through).T @ x.square()) < 1e-12


class _Mixture(nn.Module):
    """Samples, experts and classes, three of each."""

    def __init__(self, spelling):
        super().__init__()
        self.gate, self.spelling = nn.Parameter(torch.randn(3, 3).double()), spelling
        self.experts = nn.ParameterList(torch.randn(3, 3).double() for _ in range(3))

    def forward(self):
        return self.mixed(self.gate, torch.stack(list(self.experts), -2))

    def mixed(self, gate, outs):
        gate = gate.softmax(-1)
        if self.spelling == "stack":
            return (gate.unsqueeze(-1) * outs).sum(-2)
        if self.spelling == "expand":
            flat = gate.unsqueeze(-1).expand(3, 3, 3).reshape(3, 9)
        else:
            flat = gate.repeat_interleave(3, -1)
        return (flat * outs.reshape(3, 9)).view(3, 3, 3).sum(-2)


@pytest.mark.parametrize("spelling", ["stack", "expand", "repeat"])
def test_axes_of_equal_size_are_not_one(spelling):
    """By hand: a region of the experts' axis ends where the classes' begins."""
    net, labels = _Mixture(spelling), torch.tensor([1, 1, 0])
    outs = torch.stack([e.detach() for e in net.experts], -2)
    gate, out = net.gate.detach(), net().detach()
    g = _grad(lambda v: F.cross_entropy(v, labels), out)
    s = _through(lambda v: F.cross_entropy(v, labels), out, 1.0, torch.zeros(()))
    got = reference(net, F.cross_entropy, (), (labels,)).hess_diag
    assert relative_error(got["gate"], _through(lambda v: net.mixed(v, outs), gate, g, s)) < 1e-12
    by_expert = _through(lambda v: net.mixed(gate, v), outs, g, s)
    for k in range(3):
        assert relative_error(got[f"experts.{k}"], by_expert[:, k]) < 1e-12


def test_spelling_does_not_matter():
    """GRU: torch's layer, torch's cell in a loop."""
    layer = nn.GRU(3, 4, batch_first=True).double()
    cell = nn.GRUCell(3, 4).double()
    for (_, a), (_, b) in zip(layer.named_parameters(), cell.named_parameters(), strict=True):
        b.data.copy_(a.data)
    x, w = torch.randn(2, 3, 3).double(), torch.randn(4).double()

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            h = x.new_zeros(2, 4)
            for t in range(3):
                h = self.cell(x[:, t], h)
            return (h * w).sin().mean()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return (self.layer(x)[0][:, -1] * w).sin().mean()

    one, other = reference(Loop(), None, (x,)), reference(Layer(), None, (x,))
    for a, b in zip(cell.named_parameters(), layer.named_parameters(), strict=True):
        assert (
            relative_error(one.hess_diag["cell." + a[0]], other.hess_diag["layer." + b[0]]) < 1e-12
        )


@pytest.mark.parametrize(
    "name", ["gpt-dropout", "resnet", "recurrent-lstm-dropout", "llama", "detach"]
)
def test_gradients_are_autograd_s(name):
    built = CASES[name]()
    inputs, targets = cast(built.inputs, torch.float64), cast(built.targets, torch.float64)
    model = built.model.double()
    got = reference(model, built.loss, inputs, targets, seed=3)
    loss, grads = autograd(model, built.loss, inputs, targets, seed=3)
    assert abs(got.loss - loss) < 1e-12
    assert_close({n: got.grads[n] for n in grads}, grads, 1e-10, "gradients")
