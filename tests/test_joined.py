"""Several operators as one unit: calls under fallback="exact", complex numbers, picks of a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscale_fx
from hesscale_fx.structures.composite import Composite


def quadratic(y: torch.Tensor) -> torch.Tensor:
    """Its Hessian is diagonal, of both signs; its gradient is not zero."""
    y = torch.view_as_real(y) if y.is_complex() else y
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (weights * y * y).sum() + y.sin().sum()


def point(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def exact_diagonal(function, x: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(function, x)
    return hessian.reshape(x.numel(), x.numel()).diagonal().reshape(x.shape)


def compare(function, x: torch.Tensor, reference=None, **options) -> tuple[float, object]:
    """The error of the diagonal, and the report."""
    hs = hesscale_fx.transform(function, None, (x,), wrt="inputs", **options)
    (found,) = hs(x).hess_diag.values()
    return relative_error(found, exact_diagonal(reference or function, x)), hs.report()


KEYS, VALUES = point(2, 4, 3).sin(), point(2, 4, 3).cos()
CALLS = {
    "cov": torch.cov,
    "cov, a method": lambda x: x.cov(),
    "local_response_norm": lambda x: F.local_response_norm(x[None], 3),
    "local_response_norm, a module": lambda x: nn.LocalResponseNorm(3)(x[None]),
    "attention": lambda x: F.scaled_dot_product_attention(x.view(2, 4, 3), KEYS, VALUES),
    "a product's pseudoinverse": lambda x: torch.linalg.pinv(x @ KEYS.reshape(6, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_unit_with_the_fallback(name):
    def loss(x: torch.Tensor) -> torch.Tensor:
        return quadratic(CALLS[name](x))

    error, report = compare(loss, point(4, 6), fallback="exact")
    (entry,), (joined,) = report.values(), report.joined
    assert error < 1e-9 and entry.exact
    assert joined and joined in str(report)


def test_a_report_says_what_is_one_unit_and_where():
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return quadratic(torch.cov(x)) + quadratic(F.local_response_norm(x[None], 3))

    _, report = compare(Net(), point(4, 6), fallback="exact")
    for name, joined in zip(["cov", "local_response_norm"], report.joined, strict=True):
        assert joined.startswith(f"{name} (") and "test_joined.py" in joined


def test_without_the_fallback_a_call_is_its_units():
    error, report = compare(lambda x: quadratic(torch.cov(x)), point(4, 6))
    (entry,) = report.values()
    assert error > 1e-3 and not entry.exact and not report.joined


class Layers(nn.Module):
    """Each call of it is one unit already."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1).double(), nn.LayerNorm(4).double()
        self.out = nn.Linear(12, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.norm(self.conv(x)))
        return self.out(F.adaptive_avg_pool2d(h, (1, 4)).flatten(1))


def test_layers_keep_their_own_rules():
    x, y = point(2, 2, 4, 4), torch.tensor([0, 2])
    torch.manual_seed(0)
    net = Layers()
    plain = hesscale_fx.transform(net, F.cross_entropy, (x, y))
    same = hesscale_fx.transform(net, F.cross_entropy, (x, y), fallback="exact")
    assert not same.report().joined and len(same.graph.nodes) == len(plain.graph.nodes)
    for name, value in plain(x, y).hess_diag.items():
        assert torch.equal(value, same(x, y).hess_diag[name])


def test_a_large_call_stays_its_units():
    def loss(x: torch.Tensor) -> torch.Tensor:
        return quadratic(F.local_response_norm(x, 3))

    x, results = point(1, 5, 500), []
    for fallback in (None, "exact"):
        hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs", fallback=fallback)
        assert not hs.report().joined
        results.append(hs(x).hess_diag["x"])
    assert torch.equal(*results)


def test_what_stays_in_place_shares_columns():
    """The batch and the heads of attention; a column is of one of its matrices."""
    k, v = (point(5, 2, 4, 3) * c for c in (1.0, -0.7))

    def loss(q: torch.Tensor) -> torch.Tensor:
        return quadratic(F.scaled_dot_product_attention(q, k, v))

    q = point(5, 2, 4, 3).sin()
    hs = hesscale_fx.transform(loss, None, (q,), wrt="inputs", fallback="exact")
    assert relative_error(hs(q).hess_diag["q"], exact_diagonal(loss, q)) < 1e-10
    shapes = [n.meta["val"].shape for n in hs.graph.nodes if n.target is torch.ops.aten.eye.default]
    assert set(shapes) <= {(3, 3), (12, 12)}, "also the queries stay in place"


def test_what_autograd_cannot_do_as_one_stays_its_units(monkeypatch):
    def loss(x: torch.Tensor) -> torch.Tensor:
        return quadratic(torch.cov(x))

    def refuse(self, *values):
        raise RuntimeError("derivative for something is not implemented")

    x = point(4, 6)
    plain = hesscale_fx.transform(loss, None, (x,), wrt="inputs")
    monkeypatch.setattr(Composite, "__call__", refuse)
    hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs", fallback="exact")
    assert torch.equal(hs(x).hess_diag["x"], plain(x).hess_diag["x"]) and not hs.report().joined


def test_a_call_across_the_boundary_is_cut_there():
    weight, y = point(3, 6), torch.tensor([0, 2, 1, 1])

    def model(x: torch.Tensor) -> torch.Tensor:
        z = hesscale_fx.output(F.linear(x.tanh(), weight))
        return F.cross_entropy(z, y)

    x = point(4, 6)
    found = [
        hesscale_fx.transform(
            model, None, (x,), wrt="inputs", method="hesscale_gn", fallback=fallback
        )(x).hess_diag["x"]
        for fallback in (None, "exact")
    ]
    assert torch.equal(*found)


# --- complex values -----------------------------------------------------------------------------


def of_parts(x: torch.Tensor) -> torch.Tensor:
    y = torch.fft.rfft(x)
    return (y.real**2 + y.imag**2 + 0.1).sqrt()


SPECTRA = {
    "abs": lambda x: torch.fft.rfft(x).abs(),
    "parts": of_parts,
    "pairs": lambda x: torch.view_as_real(torch.fft.rfft(x)).norm(dim=-1),
    "pairs, by hand": lambda x: (
        torch.view_as_real(torch.fft.rfft(x)).pow(2).sum(-1, keepdim=True) + 0.1
    ).sqrt(),
    "products of pairs": lambda x: torch.view_as_real(torch.fft.rfft(x)).square().sum(-1).sqrt(),
    "conjugate": lambda x: ((y := torch.fft.rfft(x)) * y.conj()).real.log1p(),
    "filtered": lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 + 2j)),
    "two dimensions": lambda x: torch.fft.fft(torch.fft.fft(x, dim=0)).real,
    "short-time": lambda x: torch.stft(
        x, 4, window=torch.ones(4).double(), center=False, return_complex=True
    ).abs(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_complex_values_lie_inside_one_unit(name):
    error, report = compare(lambda x: quadratic(SPECTRA[name](x)), point(3, 6))
    (entry,) = report.values()
    assert error < 1e-10 and entry.exact and len(report.joined) == 1


def test_complex_values_that_lose_nothing_stay_apart():
    error, report = compare(lambda x: quadratic(torch.fft.rfft(x)), point(3, 6))
    assert error < 1e-10 and not report.joined


# --- one element of each row --------------------------------------------------------------------

Y = torch.tensor([0, 5, 2, 2])


def margins(x: torch.Tensor, p: int, weight: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """multi_margin_loss by hand."""
    hinge = (1 - x.gather(1, Y[:, None]) + x).clamp(min=0) ** p
    hinge = hinge if weight is None else hinge * weight[Y][:, None]
    rows = (hinge * (torch.arange(6) != Y[:, None])).sum(1) / 6
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_margins_of_classes(p, weighted, reduction):
    weight = point(6).abs() if weighted else None
    error, report = compare(
        lambda x: quadratic(F.multi_margin_loss(x, Y, p=p, weight=weight, reduction=reduction)),
        point(4, 6),
        lambda x: quadratic(margins(x, p, weight, reduction)),
    )
    (entry,) = report.values()
    assert error < 1e-12 and entry.exact


PICKS = {
    "gathered": lambda x: x - x.gather(-1, Y[:, None]),
    "taken": lambda x: x.take_along_dim(Y[:, None], 1) * x.logsumexp(1, keepdim=True),
    "indexed": lambda x: x - x[torch.arange(4), Y][:, None],
    "indexed from the end": lambda x: x.sigmoid() * x[torch.arange(len(x)), Y - 6].unsqueeze(1),
    "advantage": lambda x: x[torch.arange(4), Y] - x.mean(1),
    "alone": lambda x: x.log_softmax(1)[torch.arange(4), Y],
    "all in one mean": lambda x: (x - x[torch.arange(4), Y][:, None]).relu().pow(2).mean(),
}


@pytest.mark.parametrize("name", PICKS)
def test_an_element_of_each_row_meets_its_row(name):
    error, report = compare(lambda x: quadratic(PICKS[name](x)), point(4, 6))
    (entry,) = report.values()
    assert error < 1e-12 and entry.exact


def test_a_pick_alone_stays_a_selection():
    x = point(4, 6)
    hs = hesscale_fx.transform(
        lambda x: quadratic(x.sin()[torch.arange(4), Y]), None, (x,), wrt="inputs"
    )
    rules = {(n.meta.get("custom") or {}).get("hesscale", {}).get("rule") for n in hs.graph.nodes}
    assert "selection" in rules and "row" not in rules


def test_a_transform_leaves_the_batch_free_and_takes_long_signals():
    """The dimensions before the transformed one number the blocks."""

    def loss(x):
        return torch.fft.rfft(x).abs().pow(1.5).sum()

    hs = hesscale_fx.transform(loss, None, (point(3, 6),), wrt="inputs")
    for x in (point(3, 6), point(5, 6)):
        exact = torch.autograd.functional.hessian(loss, x).reshape(x.numel(), -1).diagonal()
        assert relative_error(hs(x).hess_diag["x"].flatten(), exact) < 1e-10
    assert hs.report()["x"].exact
    hesscale_fx.transform(loss, None, (point(8, 512),), wrt="inputs")
