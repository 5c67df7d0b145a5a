"""Corners that models reach.

Rows of zeros, functions whose trace depends on sizes, models that set tensors and modules anew.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import some
from torch import nn

import hesscale_fx
from hesscale_fx.errors import HesScaleError

ROWS = torch.tensor([[0.6, -1.1, 0.3], [0, 0, 0], [0.2, 0.9, -0.7]], dtype=torch.float64)

OF_ZERO_ROWS = {
    "cdist": lambda x: torch.exp(-torch.cdist(x, x)).sum(),
    "norm": lambda x: x.norm(dim=1).sum(),
    "squared norm": lambda x: x.norm(dim=1).square().sum(),
    "norm of order 1.5": lambda x: torch.linalg.vector_norm(x, 1.5, dim=1).sum(),
    "norm of order 3": lambda x: torch.linalg.vector_norm(x, 3, dim=1).sum(),
    "normalize": lambda x: (F.normalize(x, dim=1) * torch.arange(3)).sum(1).square().sum(),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.new_ones(3), dim=1).sum(),
    "std": lambda x: x.std(1).sum(),
    "pdist": lambda x: F.pdist(torch.cat([x, x[:1]])).sum(),
}


@pytest.mark.parametrize("name", list(some(OF_ZERO_ROWS, 5)))
def test_rows_of_zeros(name):
    """At a kink the gradient is autograd's and the curvature finite."""
    f = OF_ZERO_ROWS[name]
    _, grads, hess_diag = hesscale_fx.transform(f, wrt="inputs")(ROWS)
    x = ROWS.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(grads["x"], want)
    assert want.isfinite().all() and hess_diag["x"].isfinite().all()


def test_the_norm_of_a_row_of_zeros_hides_no_other_row():
    f = lambda x: (x.norm(dim=1) - 1).square().sum()  # noqa: E731
    hess_diag = hesscale_fx.transform(f, wrt="inputs")(ROWS).hess_diag["x"]
    r = ROWS.norm(dim=1, keepdim=True)
    exact = 2 - 2 / r + 2 * ROWS**2 / r**3
    torch.testing.assert_close(hess_diag[::2], exact[::2])
    assert hess_diag[1].eq(0).all()  # no slope at a kink, and no second derivative


OF_ANY_SIZE = {
    "take_along_dim": lambda z, y: -torch.take_along_dim(z.log_softmax(1), y[:, None], 1).mean(),
    "its method": lambda z, y: -z.log_softmax(1).take_along_dim(y[:, None], dim=-1).mean(),
    "broadcast": lambda z, y: z.take_along_dim(torch.tensor([[0, 2]]), 1).square().mean(),
    "masked_select": lambda z, y: z.square().masked_select(y[:, None] == torch.arange(5)).mean(),
    "cdist": lambda z, y: torch.cdist(z, z.new_ones(4, 5)).square().mean(),
}


@pytest.mark.parametrize("name", list(some(OF_ANY_SIZE, 3)))
def test_one_graph_for_every_batch(name):
    loss = OF_ANY_SIZE[name]
    net = nn.Linear(4, 5).double()
    batches = {n: (torch.randn(n, 4).double(), torch.randint(5, (n,))) for n in (7, 1, 5, 70)}
    hs = hesscale_fx.transform(net, loss, batches[7])
    for x, y in batches.values():
        value = loss(net(x), y)
        (want,) = torch.autograd.grad(value, net.weight)
        out = hs(x, y)
        torch.testing.assert_close(out.loss, value.detach())
        torch.testing.assert_close(out.grads["weight"], want)


def test_distances_are_by_differences_at_every_size():
    """torch takes products for more than 25 rows, whose curvature would be another."""
    net = nn.Linear(4, 5).double()
    x, centres = torch.randn(30, 4).double(), torch.randn(30, 5).double()
    losses = (
        lambda z: torch.cdist(z, centres).square().mean(),
        lambda z: (z[:, None] - centres).square().sum(-1).mean(),
    )
    have, want = (hesscale_fx.transform(net, f, (x,))(x).hess_diag for f in losses)
    torch.testing.assert_close(have["weight"], want["weight"])


class Averaging(nn.Module):
    """Assigns to a buffer, and leaves a tensor on itself."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.last = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * self.last.detach().mean(0)
        return (self.last - self.mean).square().mean()


@pytest.mark.parametrize("lazy", list(some([True, False], 2)))
def test_a_buffer_that_is_assigned_is_written_back(lazy):
    model, x = Averaging().double(), torch.randn(7, 4).double()
    eager = copy.deepcopy(model)
    hs = hesscale_fx.transform(model, None, None if lazy else (x,))
    for _ in range(2):
        torch.testing.assert_close(hs(x).loss, eager(x).detach())
        torch.testing.assert_close(model.mean, eager.mean)
    assert not hasattr(model, "last")  # nothing of the trace is left
    model(x), eager(x)  # sets another tensor
    torch.testing.assert_close(hs(x).loss, eager(x).detach())


def test_a_buffer_that_changes_its_shape_is_refused():
    class Growing(Averaging):
        def forward(self, x):
            self.mean = torch.cat([self.mean, self.mean])
            return self.fc(x).square().mean()

    with pytest.raises(hesscale_fx.HesScaleError, match="'mean'.*another shape") as caught:
        hesscale_fx.transform(Growing())(torch.randn(7, 4))
    assert isinstance(caught.value, TypeError)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X, Y = torch.randn(7, 4).double(), torch.arange(7) % 3


@pytest.mark.parametrize("lazy", list(some([True, False], 2)))
def test_what_is_set_in_place_of_a_parameter_or_child_is_seen(lazy):
    model = network()
    hs = hesscale_fx.transform(model, F.cross_entropy, None if lazy else (X, Y))
    hs(X, Y)
    model[2] = nn.Linear(5, 3).double()
    model[0].weight = nn.Parameter(torch.randn(5, 4).double())
    loss = F.cross_entropy(model(X), Y)
    torch.testing.assert_close(hs.backward(X, Y), loss.detach())
    wants = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, want in zip(model.parameters(), wants, strict=True):
        torch.testing.assert_close(parameter.grad, want)
        assert parameter.hesscale.isfinite().all()


@pytest.mark.parametrize("lazy", list(some([True, False], 2)))
def test_parameters_that_come_later_are_named(lazy):
    model = network()
    hs = hesscale_fx.transform(model, F.cross_entropy, None if lazy else (X, Y))
    hs(X, Y)
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(hesscale_fx.HesScaleError, match="3.weight, 3.bias came or went") as caught:
        hs(X, Y)
    assert isinstance(caught.value, ValueError) and "again" in str(caught.value)


def test_captured_in_inference_mode():
    """Autograd, whose formulas are traced, is off there."""
    model = network()
    want = hesscale_fx.transform(model, F.cross_entropy)(X, Y)
    with torch.inference_mode():
        have = hesscale_fx.transform(model, F.cross_entropy)(X.clone(), Y)
    for name, diagonal in want.hess_diag.items():
        torch.testing.assert_close(have.hess_diag[name], diagonal, rtol=0, atol=0)


class Agent:
    """No module, but holds one."""

    def __init__(self):
        self.actor = network()

    def loss(self, x, y):
        return F.cross_entropy(self.actor(x), y)

    __call__ = loss


def in_a_list():
    layers = [nn.Linear(4, 5).double(), nn.Linear(5, 3).double()]

    def loss(x, y):
        for layer in layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(x, y)

    return loss, [p for layer in layers for p in layer.parameters()]


def of_an_object(bound):
    agent = Agent()
    return agent.loss if bound else agent, list(agent.actor.parameters())


@pytest.mark.parametrize(
    "make", [in_a_list, lambda: of_an_object(True), lambda: of_an_object(False)]
)
def test_functions_whose_modules_are_in_a_list_or_on_an_object(make):
    loss, parameters = make()
    out = hesscale_fx.transform(loss)(X, Y)
    wants = torch.autograd.grad(loss(X, Y), parameters)
    assert len(out.grads) == len(wants)
    for have, want in zip(out.grads.values(), wants, strict=True):
        torch.testing.assert_close(have, want)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class GivesDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return Output(self.net(x))


def test_the_boundary_is_found_in_a_dataclass():
    model = GivesDataclass()
    loss = lambda out, y: F.cross_entropy(out.logits, y)  # noqa: E731
    have = hesscale_fx.transform(model, loss, method="hesscale_gn")(X, Y)
    want = hesscale_fx.transform(model.net, F.cross_entropy, method="hesscale_gn")(X, Y)
    for h, w in zip(have.hess_diag.values(), want.hess_diag.values(), strict=True):
        torch.testing.assert_close(h, w)


def test_a_tensor_where_none_was_is_named_in_short():
    class Masked(nn.Linear):
        def forward(self, x, mask=None):
            y = super().forward(x)
            return (y if mask is None else y * mask).square().mean()

    hs = hesscale_fx.transform(Masked(4, 3).double(), None, (X, None))
    with pytest.raises(ValueError, match=r"Argument 1 is a tensor \[7, 1\] where .* with None"):
        hs(X, X[:, :1])
    hs = hesscale_fx.transform(Masked(4, 3).double(), None, (X,), {"mask": None})
    with pytest.raises(ValueError, match="Argument 'mask' is a tensor"):
        hs(X, mask=X[:, :1])


def test_an_error_of_the_model_is_not_blamed_on_the_trace():
    with pytest.raises(hesscale_fx.HesScaleError, match="takes 2 positional") as caught:
        hesscale_fx.transform(network(), lambda out, *ys: out.sum())(X, Y)
    assert "torch.cond" not in str(caught.value) and "yourself" in str(caught.value)


WRONG = {
    "a predicate of one argument": (lambda: transform(wrt=lambda n: True), "wrt.name, parameter."),
    "wrt a number": (lambda: transform(wrt=3), "not int"),
    "wrt parameters": (lambda: transform(wrt=list(network().parameters())), "not Parameter"),
    "a class as loss": (lambda: transform(nn.CrossEntropyLoss), r"CrossEntropyLoss\(...\)"),
    "a class as model": (lambda: hesscale_fx.transform(nn.Linear), "is a class"),
    "keywords in a list": (lambda: transform(example_kwargs=[1]), "dictionary"),
}


def transform(loss=F.cross_entropy, **options):
    return hesscale_fx.transform(network(), loss, **options)


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_the_wrong_kind(name):
    make, words = WRONG[name]
    with pytest.raises(hesscale_fx.HesScaleError, match=words) as caught:
        make()
    assert isinstance(caught.value, (TypeError, ValueError)) and len(str(caught.value)) < 250


def test_too_many_arguments_of_a_lazy_module_are_a_type_error():
    with pytest.raises(TypeError, match="takes 2 positional") as caught:
        transform()(X, X, Y)
    assert isinstance(caught.value, hesscale_fx.HesScaleError)


def test_a_write_into_an_input_names_it_and_the_line():
    class Clamping(nn.Module):
        def forward(self, out, target):
            target.clamp_(max=1.0)  # the line
            return (out - target).square().mean()

    with pytest.raises(hesscale_fx.HesScaleError, match="'target' at .*# the line"):
        transform(Clamping())(X, torch.randn(7, 3).double())


class Routed(nn.Module):
    """Experts that see the samples routed to them, as transformers writes them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4, 4))
        self.double()

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x @ self.experts[0])
        with torch.no_grad():
            mask = F.one_hot(chosen, num_classes=3).permute(2, 1, 0)
            hit = mask.sum((-1, -2)).greater(0).nonzero()
        for expert in hit:
            position, sample = torch.where(mask[expert[0]])
            y = F.linear(x[sample], self.experts[expert[0]]).tanh()
            out.index_add_(0, sample, y * weights[sample, position, None])
        return out.pow(2).sum()


def test_experts_in_a_loop_over_those_that_were_chosen():
    torch.manual_seed(0)
    net, x = Routed(), torch.randn(5, 4).double()
    hs = hesscale_fx.transform(net, example_inputs=(x,))
    out = hs(x)
    want = torch.autograd.grad(net(x), list(net.parameters()))
    for got, expected in zip(out.grads.values(), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(h.isfinite().all() for h in out.hess_diag.values())
    found = hs.verify(x)
    assert all(found[n].error < 1e-10 for n, entry in hs.report().items() if entry.exact)
    with pytest.raises(HesScaleError, match="capture fixed does not hold"):
        hs(-x)


def test_a_spatial_transformer_leaves_the_batch_free():
    torch.manual_seed(0)
    locate, head = nn.Linear(9, 6).double(), nn.Linear(9, 2).double()

    def loss(x):
        shift = locate(x.flatten(1)).view(-1, 2, 3) + torch.eye(2, 3)
        grid = F.affine_grid(shift, x.shape, align_corners=False)
        return head(F.grid_sample(x, grid, align_corners=False).flatten(1)).pow(2).sum()

    make = lambda n: torch.randn(n, 1, 3, 3).double()  # noqa: E731
    hs = hesscale_fx.transform(loss, example_inputs=(make(3),))
    for n in (1, 3, 8):
        x = make(n)
        params = [*head.parameters(), *locate.parameters()]
        want = torch.autograd.grad(loss(x), params)
        for got, expected in zip(hs(x).grads.values(), want, strict=True):
            torch.testing.assert_close(got, expected)
        found = hs.verify(x)
        assert all(found[name].error < 1e-10 for name in found if name.startswith("head"))
