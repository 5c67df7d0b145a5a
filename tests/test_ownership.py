"""What a call returns is the caller's own, and was computed before the model's buffers changed."""

import pytest
import torch
from torch import nn

import hesscale_fx


class Written(nn.Module):
    """Its gradient is its buffer, which it changes afterwards."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self.views = views
        self.w = nn.Parameter(torch.randn(4, dtype=torch.double))
        self.register_buffer("scale", torch.randn(4, dtype=torch.double))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale.reshape(2, 2).t().t().reshape(4) if self.views else self.scale
        loss = (self.w * scale).sum() + x.sum()
        self.scale.mul_(0.5)
        return loss


class Shifted(nn.Module):
    """One buffer gets what another had."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        for name in ("newest", "older", "oldest"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.oldest.copy_(self.older)
        self.older.copy_(self.newest)
        self.newest.copy_(x)
        return (self.w * x + self.oldest).square().sum()


class Both(nn.Module):
    """Parameters with one gradient or parts of it, and one whose gradient is its diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.d, self.e = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = (
            self.a + self.b + nn.functional.pad(self.d, (0, 1)) + nn.functional.pad(self.e, (1, 0))
        )
        return (whole * x.sin()).sum() + self.c.exp().sum()


@pytest.mark.parametrize("views", [False, True])
def test_a_gradient_that_is_a_buffer_is_that_before_the_step(views):
    torch.manual_seed(0)
    model = Written(views)
    before = model.scale.clone()
    hs = hesscale_fx.transform(model)
    for _ in range(2):
        torch.testing.assert_close(hs(torch.ones(2)).grads["w"], before, rtol=0, atol=0)
        before = before / 2
        torch.testing.assert_close(model.scale, before, rtol=0, atol=0)


def test_buffers_that_hand_on_their_values():
    own, other = Shifted(), Shifted()
    hs = hesscale_fx.transform(own)
    for step in range(4):
        x = torch.full((3,), 1.0 + step)
        torch.testing.assert_close(hs(x).loss, other(x).detach())
        for (name, found), wanted in zip(own.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(found, wanted, msg=f"{name} after step {step}")


@pytest.mark.parametrize("wrt", [None, "inputs"])
def test_results_are_no_views_of_arguments_or_parameters(wrt):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.w).sum()

    model, x = Product(), torch.randn(4)
    out = hesscale_fx.transform(model, wrt=wrt)(x)
    for value in (*out.grads.values(), *out.hess_diag.values()):
        before = x.clone(), model.w.detach().clone()
        value.add_(1)
        torch.testing.assert_close((x, model.w.detach()), before, rtol=0, atol=0)


def test_results_are_no_views_of_each_other():
    model, x = Both(), torch.randn(3)
    out = hesscale_fx.transform(model)(x)
    results = [*out.grads.values(), *out.hess_diag.values()]
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    torch.testing.assert_close(tuple(out.grads.values()), expected)
    for value in results:
        value.mul_(2)  # an expanded tensor would refuse
    torch.testing.assert_close(tuple(out.grads.values()), tuple(2 * g for g in expected))


def test_a_sum_of_parameters_has_gradients_to_write_to():
    model = nn.Linear(3, 2)
    out = hesscale_fx.transform(model, lambda y: y.sum())(torch.randn(4, 3))
    for value in (*out.grads.values(), *out.hess_diag.values()):
        value.mul_(0.5)


def test_an_ordinary_model_has_no_copies():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    hs = hesscale_fx.transform(model, nn.CrossEntropyLoss())
    hs.materialize(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    (output,) = hs.graph.find_nodes(op="output")
    results = [*output.args[0][1].values(), *output.args[0][2].values()]
    assert all(node.target is not torch.ops.aten.clone.default for node in results)
