"""The paper's experiments (benchmarks/paper) run, and what they compute by themselves is right."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesscale_fx

for package in ("gymnasium", "matplotlib", "mnist1d", "pytorch_optimizer", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="needs the extra paper: make paper")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "paper"))
common, cost, kfac, optimisation, quality, reinforcement = map(
    importlib.import_module,
    ("common", "cost", "kfac", "optimisation", "quality", "reinforcement"),
)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_kfac_of_one_sample_is_the_gauss_newton_diagonal():
    """With one sample the mean of products is the product of means."""
    model, x, y = net(), torch.randn(1, 4, dtype=torch.float64), torch.tensor([2])
    want = hesscale_fx.transform(model, F.cross_entropy, method="ggn")(x, y).hess_diag
    torch.testing.assert_close(kfac.diagonal(model, x), want)


def test_kfac_with_sampled_labels_has_the_exact_one_as_its_mean():
    model, x = net(), torch.randn(6, 4, dtype=torch.float64)
    torch.manual_seed(0)
    got = kfac.diagonal(model, x, 4000)
    for name, want in kfac.diagonal(model, x).items():
        torch.testing.assert_close(got[name], want, rtol=0.1, atol=0)


def test_advantages_stop_at_the_end_of_an_episode():
    errors = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    dones = torch.tensor([[False], [True], [False], [False]])
    decay = reinforcement.DISCOUNT * reinforcement.TRACE
    want = torch.tensor([[1 + 2 * decay], [2.0], [4 + 8 * decay], [8.0]])
    torch.testing.assert_close(reinforcement.advantages(errors, dones), want)


def test_a_table_is_put_into_its_place():
    page = "before\n<!-- a -->\nold\n<!-- end -->\nafter\n"
    want = "before\n<!-- a -->\n\nnew\n\n<!-- end -->\nafter\n"
    assert common.placed(page, "a", "new") == want
    with pytest.raises(ValueError, match="no place for b"):
        common.placed(page, "b", "new")


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (12345.6, "12346"), (0.0, "0.00"), (1e-7, "1.00e-07")]
)
def test_numbers(value, text):
    assert common.number(value) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("experiment", [quality, optimisation, reinforcement, cost])
def test_runs(experiment, tmp_path, capsys):
    experiment.main(["--smoke", "--out", str(tmp_path)])
    first = capsys.readouterr().out
    assert list(tmp_path.glob("*.svg")) and list(tmp_path.glob("*.csv"))
    assert "| --- |" in first
    experiment.main(["--smoke", "--redraw", "--out", str(tmp_path)])
    assert capsys.readouterr().out == first
