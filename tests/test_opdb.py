"""Operators of PyTorch's own database, and what serves where there is no structure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch.utils.checkpoint import checkpoint

import hesscale_fx

PATH = Path(__file__).parent.parent / "benchmarks" / "operators.py"

# One of each structure, and each that was once wrong or refused.
SUBSET = [
    "cdist",
    "cholesky",
    "complex",
    "fft.hfft2",
    "frexp",
    "index_put",
    "linalg.det",
    "linalg.eigh",
    "linalg.lstsq",
    "linalg.solve",
    "linalg.vector_norm",
    "masked.logaddexp",
    "native_group_norm",
    "nn.functional.dropout2d",
    "nn.functional.multilabel_margin_loss",
    "polar",
    "scatter_reduce.prod",
    "slice",
    "topk",
]


@pytest.fixture(scope="module")
def database():
    """benchmarks/operators.py, which is no package."""
    spec = importlib.util.spec_from_file_location("operators", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["operators"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["operators"]


@pytest.fixture(scope="module")
def found(database):
    return {op.full_name: op for op in database.entries()}


@pytest.mark.parametrize("name", SUBSET)
def test_an_operator_against_the_exact_diagonal(name, database, found):
    outcome = database.run_entry(found[name], count=1)
    assert (outcome.status, outcome.detail) == ("correct", "") and outcome.cases


# Several units of the recursion, which the fallback makes one; the first is complex, and is so
# without it.
JOINED = ["linalg.eig", "corrcoef", "linalg.pinv.singular", "nn.functional.linear_cross_entropy"]


@pytest.mark.parametrize("name", JOINED)
def test_an_operator_of_several_units(name, database, found):
    fallback = None if name == JOINED[0] else "exact"
    outcome = database.run_entry(found[name], fallback, count=1)
    assert (outcome.status, outcome.detail) == ("correct", "") and outcome.cases


@pytest.mark.parametrize("name", ["sigmoid", "cumsum", "index_add"])
def test_an_operator_in_place(name, database, found):
    outcome = database.run_entry(found[name], count=1, inplace=True)
    assert (outcome.status, outcome.detail) == ("correct", "") and outcome.cases


@pytest.mark.parametrize("status", ["approximate", "refused"])
def test_what_is_not_correct_says_so(status, database, found):
    name = {"approximate": "nn.functional.local_response_norm", "refused": "to_sparse"}[status]
    outcome = database.run_entry(found[name], count=1)
    assert outcome.status == status and outcome.detail


@pytest.mark.slow
def test_every_operator(database, found):
    outcomes = database.run_all(list(found), count=1)
    bad = [o for o in outcomes if o.status in ("wrong", "error")]
    assert not bad
    twice = [o for o in outcomes if o.twice]
    right = {o.name for o in twice if o.status == "correct"}
    assert len(right) >= 0.97 * len(twice)
    rest = database.run_all([o.name for o in twice if o.name not in right], "exact", count=1)
    right |= {o.name for o in rest if o.status == "correct"}
    assert len(right) >= 0.995 * len(twice)


# --- columns and estimates ----------------------------------------------------------------------


@torch.library.custom_op("hesscale_fx_tests::outer_square", mutates_args=())
def outer_square(x: torch.Tensor) -> torch.Tensor:
    """x x^T for each row of x, of which nothing is registered but the derivative."""
    return x.unsqueeze(-1) * x.unsqueeze(-2)


outer_square.register_fake(lambda x: x.new_empty((*x.shape, x.shape[-1])))
outer_square.register_autograd(
    lambda ctx, g: ((g + g.mT) @ ctx.saved_tensors[0].unsqueeze(-1)).squeeze(-1),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def quadratic(y: torch.Tensor) -> torch.Tensor:
    """Its Hessian is diagonal, of both signs; its gradient is not zero."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (weights * y * y).sum() + y.sin().sum()


def exact_diagonal(function, x: torch.Tensor) -> torch.Tensor:
    hessian = torch.autograd.functional.hessian(function, x)
    return hessian.reshape(x.numel(), x.numel()).diagonal().reshape(x.shape)


def point(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def through(x: torch.Tensor) -> torch.Tensor:
    return quadratic(outer_square(x))


def written_out(x: torch.Tensor) -> torch.Tensor:
    return quadratic(x.unsqueeze(-1) * x.unsqueeze(-2))


def test_columns_of_an_unknown_operator_are_exact():
    x = point(2, 3)
    hs = hesscale_fx.transform(through, wrt="inputs", fallback="exact")
    assert relative_error(hs(x).hess_diag["x"], exact_diagonal(written_out, x)) < 1e-12
    y = point(5, 3)
    assert relative_error(hs(y).hess_diag["x"], exact_diagonal(written_out, y)) < 1e-12


def test_estimates_are_unbiased_and_drawn_anew():
    x = point(2, 3)
    hs = hesscale_fx.transform(through, None, (x,), wrt="inputs", fallback="estimate")
    torch.manual_seed(0)
    draws = torch.stack([hs(x).hess_diag["x"] for _ in range(2000)])
    want = exact_diagonal(written_out, x)
    assert draws.std(0).min() > 0
    deviation = (draws.mean(0) - want).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert deviation.max() < 4, "standard errors from the exact diagonal"
    torch.manual_seed(1)
    first = hs(x).hess_diag["x"]
    torch.manual_seed(1)
    assert torch.equal(first, hs(x).hess_diag["x"]), "the default generator decides"


def test_estimates_of_a_complex_operator_are_unbiased():
    def loss(x: torch.Tensor) -> torch.Tensor:
        return quadratic(torch.view_as_real(torch.fft.fft(x)))

    x = point(1, 1100)  # 2200 columns are too many
    hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs", fallback="estimate")
    torch.manual_seed(0)
    draws = torch.stack([hs(x).hess_diag["x"].sum() for _ in range(200)])
    y = torch.view_as_real(torch.fft.fft(x))
    s = 2 * torch.linspace(-1, 2, y.numel()).double().reshape(y.shape) - y.sin()
    # The sum over the inputs of the square of a cosine, and of a sine, of 2 pi j k / n.
    j = torch.arange(1100).double()
    angle = 2 * torch.pi * torch.outer(j, j) / 1100
    want = (s[0, :, 0] @ angle.cos().square() + s[0, :, 1] @ angle.sin().square()).sum()
    assert (draws.mean() - want).abs() < 4 * draws.std() / len(draws) ** 0.5


def test_report_calls_columns_exact_and_estimates_not():
    x = point(2, 3)

    def entry(fallback):
        hs = hesscale_fx.transform(through, None, (x,), wrt="inputs", fallback=fallback)
        hs(x)
        rules = {n.meta["custom"]["hesscale"]["rule"] for n in hs.graph.nodes if "custom" in n.meta}
        return hs.report()["x"].exact, rules

    assert entry("exact")[0] and "columns" in entry("exact")[1]
    assert not entry("estimate")[0] and "estimate" in entry("estimate")[1]


def test_large_columns_are_refused_with_the_way_out():
    x = point(50, 50)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return quadratic(torch.linalg.cholesky(x @ x.T + torch.eye(50, dtype=x.dtype)))

    with pytest.raises(hesscale_fx.HesScaleError) as info:
        hesscale_fx.transform(loss, None, (x,), wrt="inputs")
    for part in ("linalg_cholesky", "2500", "2048", 'fallback="exact"', 'fallback="estimate"'):
        assert part in str(info.value)
    hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs", fallback="estimate")
    assert hs(x).hess_diag["x"].isfinite().all()


def test_an_unknown_fallback_is_refused():
    with pytest.raises(ValueError, match="'exact', 'estimate'"):
        hesscale_fx.transform(through, None, (point(2, 3),), wrt="inputs", fallback="guess")


def test_a_batch_of_matrices_shares_its_columns():
    def loss(x: torch.Tensor) -> torch.Tensor:
        return quadratic(torch.linalg.inv(x))

    x = point(3, 2, 2)
    hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs")
    assert relative_error(hs(x).hess_diag["x"], exact_diagonal(loss, x)) < 1e-10
    values = [n.meta.get("val") for n in hs.graph.nodes if n.op == "call_function"]
    longest = max(int(v.numel()) for v in values if isinstance(v, torch.Tensor))
    assert longest <= 3 * 4 * 4, "one block of columns for each matrix, none between matrices"


def test_an_operand_that_stands_twice():
    def solve(x: torch.Tensor) -> torch.Tensor:
        return quadratic(torch.linalg.solve(x, x) * 1.0)

    x = point(3, 3)
    out = hesscale_fx.transform(solve, None, (x,), wrt="inputs")(x)
    assert out.hess_diag["x"].abs().max() < 1e-9, "the identity, whatever x"


# --- what a capture meets -----------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def body(x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh())

        if self.reentrant is None:
            return body(x).square().sum()
        return checkpoint(body, x, use_reentrant=self.reentrant).square().sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(reentrant):
    plain, net, x = Checkpointed(None), Checkpointed(reentrant), point(5, 3)
    net.load_state_dict(plain.state_dict())
    want = hesscale_fx.transform(plain, None, (x,))(x)
    got = hesscale_fx.transform(net, None, (x,))(x)
    for name in want.grads:
        assert torch.equal(got.grads[name], want.grads[name])
        assert torch.equal(got.hess_diag[name], want.hess_diag[name])


def by_cond(w: torch.Tensor) -> torch.Tensor:
    return torch.cond(w.sum() > 0, lambda w: w.sin(), lambda w: w.cos(), (w,)).sum()


def by_while_loop(w: torch.Tensor) -> torch.Tensor:
    return while_loop(lambda i, w: i < 3, lambda i, w: (i + 1, w * w), (torch.tensor(0), w))[
        1
    ].sum()


def by_scan(w: torch.Tensor) -> torch.Tensor:
    start = torch.zeros((), dtype=w.dtype)
    return scan(lambda c, x: (c + x * x, c * 1.0), start, w)[0].sum()


@pytest.mark.parametrize(
    ("model", "name"), [(by_cond, "cond"), (by_while_loop, "while_loop"), (by_scan, "scan")]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_control_flow_in_the_graph_is_refused_by_name(model, name):
    with pytest.raises(NotImplementedError, match=f"higher_order.{name}") as info:
        hesscale_fx.transform(model, None, (point(3),), wrt="inputs")
    assert isinstance(info.value, hesscale_fx.HesScaleError)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_ask_for_sparse_gradients_get_dense_ones(kind):
    index = torch.tensor([[1, 2], [2, 5]])
    results = []
    for sparse in (False, True):
        table = kind(6, 3, sparse=sparse).double()
        nn.init.constant_(table.weight, 0.3)
        hs = hesscale_fx.transform(table, lambda out: out.sin().sum(), (index,))
        results.append(hs(index))
    dense, sparse = results
    for a, b in [(dense.grads, sparse.grads), (dense.hess_diag, sparse.hess_diag)]:
        assert b["weight"].layout is torch.strided
        assert torch.equal(a["weight"], b["weight"])


def test_residuals_of_least_squares_need_a_full_rank():
    target = point(4, 2)

    def loss(a: torch.Tensor) -> torch.Tensor:
        found = torch.linalg.lstsq(a, target, driver="gelsd")
        return found.solution.sin().sum() + found.residuals.sum()

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs")
    out = hs(x)
    assert abs(out.loss - loss(x)) < 1e-12
    assert relative_error(out.hess_diag["a"], exact_diagonal(loss, x)) < 1e-9
    x[:, 1] = x[:, 0]
    assert not torch.linalg.lstsq(x, target, driver="gelsd").residuals.numel()
    with pytest.raises(hesscale_fx.HesScaleError, match="full rank"):
        hs(x)


@pytest.mark.parametrize("include_self", [False, True])
def test_products_by_index_with_zeros(include_self):
    index, factors = torch.tensor([0, 2, 0, 0]), point(4)
    factors[0] = 0.0

    def loss(f: torch.Tensor) -> torch.Tensor:
        start = torch.linspace(1, 2, 3, dtype=f.dtype)
        y = start.index_reduce(0, index, f, "prod", include_self=include_self)
        z = start.scatter_reduce(0, index, f.sin(), "prod", include_self=include_self)
        return quadratic(y) + z.sum()

    def written(f: torch.Tensor) -> torch.Tensor:
        start = torch.linspace(1, 2, 3, dtype=f.dtype)
        own = start if include_self else torch.tensor([1.0, start[1], 1.0]).double()
        places = [[0, 2, 3], [], [1]]
        y, z = (
            torch.stack([s * v[p].prod() for s, p in zip(own, places, strict=True)])
            for v in (f, f.sin())
        )
        return quadratic(y) + z.sum()

    hs = hesscale_fx.transform(loss, None, (factors,), wrt="inputs")
    out = hs(factors)
    assert abs(out.loss - written(factors)) < 1e-12
    assert relative_error(out.hess_diag["f"], exact_diagonal(written, factors)) < 1e-12


def test_what_a_mask_hides_may_be_infinite():
    """The curvature of logaddexp at two infinities is NaN, which a product with 0 would keep."""
    hidden, other = torch.tensor([False, True, False]), point(3)

    def loss(x: torch.Tensor) -> torch.Tensor:
        low = [v.masked_fill(hidden, float("-inf")) for v in (x, other)]
        return torch.logaddexp(*low)[~hidden].square().sum()

    out = hesscale_fx.transform(loss, None, (point(3),), wrt="inputs")(point(3))
    assert out.hess_diag["x"][1] == 0
    want = exact_diagonal(lambda x: torch.logaddexp(x, other)[~hidden].square().sum(), point(3))
    assert relative_error(out.hess_diag["x"], want) < 1e-12


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_tensors_are_refused_by_name():
    weight = torch.eye(3, dtype=torch.float64).to_sparse_csr()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.sampled_addmm(weight, x, x).to_dense().sum()

    with pytest.raises(NotImplementedError, match="sparse") as info:
        hesscale_fx.transform(loss, None, (point(3, 3),), wrt="inputs")
    assert isinstance(info.value, hesscale_fx.HesScaleError)


def test_complex_intermediates_of_a_real_loss():
    def loss(x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x)
        return quadratic(spectrum.real) + quadratic(spectrum.imag)

    x = point(2, 6)
    out = hesscale_fx.transform(loss, None, (x,), wrt="inputs")(x)
    assert relative_error(out.hess_diag["x"], exact_diagonal(loss, x)) < 1e-10


def test_a_complex_pair_is_not_called_exact_where_its_parts_meet():
    factor = torch.tensor(0.6 + 0.8j, dtype=torch.complex128)

    def loss(x: torch.Tensor) -> torch.Tensor:
        y = x * factor
        return y.abs().pow(3).sum() * y.real.pow(2).sum()

    x = point(4)
    hs = hesscale_fx.transform(loss, None, (x,), wrt="inputs")
    off = relative_error(hs(x).hess_diag["x"], exact_diagonal(loss, x))
    assert off > 1e-3 and not hs.report()["x"].exact
