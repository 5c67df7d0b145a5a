"""Algebra on graphs: views of views, and sums that keep their dimensions."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hesscale_fx.simplify import simplify

aten = torch.ops.aten


def squeezed_sum(x: Tensor, dims: list[int]) -> Tensor:
    """As autograd's formulas sum what was broadcast."""
    kept = aten.sum.dim_IntList(x, dims, True)
    return aten.reshape.default(kept, [s for d, s in enumerate(x.shape) if d not in dims])


CASES = {
    "transposes that undo each other": (
        lambda x: aten.transpose.int(aten.permute.default(x, [0, 2, 1]), 1, 2),
        {},
    ),
    "transposes that do not": (
        lambda x: aten.transpose.int(aten.permute.default(x, [2, 0, 1]), -1, -3),
        {"permute": 1},
    ),
    "three of them": (
        lambda x: aten.permute.default(
            aten.transpose.int(aten.transpose.int(x, 0, 1), 1, 2), [-1, 1, 0]
        ),
        {"permute": 1},
    ),
    "a matrix twice": (lambda x: aten.t.default(aten.t.default(x[0])), {"select": 1}),
    "reshapes": (
        lambda x: aten.reshape.default(aten.reshape.default(x, [6, 4]), [3, 8]),
        {"reshape": 1},
    ),
    "there and back": (
        lambda x: aten.reshape.default(aten.reshape.default(x, [6, 4]), [2, 3, 4]),
        {},
    ),
    "a reshape that is needed": (
        lambda x: (y := aten.reshape.default(x, [6, 4]), aten.reshape.default(y, [3, 8])),
        {"reshape": 2},
    ),
    "a sum": (lambda x: squeezed_sum(x, [0, 2]), {"sum": 1}),
    "another view of a sum": (
        lambda x: aten.reshape.default(aten.sum.dim_IntList(x, [1], True), [4, 2]),
        {"sum": 1, "reshape": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_views_of_views(name):
    function, left = CASES[name]
    x = torch.arange(24.0).reshape(2, 3, 4)
    traced = make_fx(function, tracing_mode="fake")(x)
    before = {n for n in traced.graph.nodes if n.op == "call_function"}
    expected = traced(x)
    simplify(traced.graph, before)
    traced.recompile()
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=0)
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    found = Counter(str(n.target).split(".")[1] for n in calls)
    assert found == left


def test_the_users_own_views_are_left_as_they_are():
    traced = make_fx(CASES["three of them"][0], tracing_mode="fake")(torch.randn(2, 3, 4))
    simplify(traced.graph, set())
    assert len([n for n in traced.graph.nodes if n.op == "call_function"]) == 3
