"""Comparisons that every test file uses."""

from __future__ import annotations

import pytest
import torch


def relative_error(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    """Largest deviation over the largest magnitude (``floor`` where that is smaller)."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} where {tuple(want.shape)} is right"
    got, want = got.detach().double(), want.detach().double()
    if not torch.equal(torch.isfinite(got), torch.isfinite(want)):
        return float("inf")
    keep = torch.isfinite(want)
    if not keep.any():
        return 0.0
    scale = max(want[keep].abs().max().item(), floor)
    error = (got - want)[keep].abs().max().item()
    return error / scale if scale > 0 else error


def assert_close(got: dict, want: dict, tolerance: float, what: str, floor: float = 1e-4) -> None:
    """Two dicts of tensors, entry by entry, each relative to its own magnitude.

    A tensor smaller than ``floor`` times the largest of all (a bias that a normalisation
    removes is zero but for rounding) is held to that magnitude instead.
    """
    assert list(got) == list(want), f"{what}: keys {list(got)} where {list(want)} is right"
    sizes = [w.detach().abs().double().max().item() for w in want.values() if w.numel()]
    least = floor * max((s for s in sizes if s < float("inf")), default=0.0)
    errors = {n: relative_error(got[n], want[n], least) for n in want}
    wrong = {n: e for n, e in errors.items() if not e <= tolerance}
    assert not wrong, f"{what} differ: " + ", ".join(f"{n} by {e:.2e}" for n, e in wrong.items())


def cast(tree, dtype):
    """Floating-point tensors of a tuple or dict in another dtype."""
    if isinstance(tree, torch.Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {k: cast(v, dtype) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(cast(v, dtype) for v in tree)
    return tree


def some(values, every):
    """Every so many by default, all of them under `-m slow`."""
    for i, value in enumerate(values):
        yield pytest.param(value, marks=() if i % every == 0 else pytest.mark.slow)


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward
