"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

pytest.importorskip("click")
from click.testing import CliRunner

from hesscale_fx import workload
from hesscale_fx.__main__ import main
from hesscale_fx.cli import FAILED, MODEL, OK, UNSUPPORTED, USAGE, cli
from hesscale_fx.errors import InvalidArgumentError

NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

def full():
    return nn.Linear(4, 1), nn.MSELoss(), (torch.randn(5, 4), torch.randn(5, 1))

def halved(z, y):
    return ((z - y) ** 2).mean() / 2

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))

    def forward(self, x):
        y = self.w * x
        return torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,)).sum()

class inverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.linalg.inv(x @ x.T + 9 * self.w * torch.eye(70)).sum()

def broken():
    raise OSError("no such weights")

number = 3
"""
CLASSIFY = ["--loss", "CrossEntropyLoss", "--input", "5,4"]


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return str(tmp_path / "net.py")


def run(*arguments):
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def test_help_teaches():
    result = run("--help")
    assert result.exit_code == OK
    for word in ("inspect", "report", "verify", "bench", "--input", "Exit codes", "factory"):
        assert word in result.output
    assert "..." not in result.output.split("Commands:")[1]  # nothing is cut short
    for command in ("inspect", "report", "verify", "bench"):
        assert "--target" in run(command, "--help").output


def test_inspect(net, tmp_path):
    paths = {s: tmp_path / f"out.{s}" for s in ("html", "dot", "json", "graphml")}
    result = run(
        "inspect",
        f"{net}:make",
        *CLASSIFY,
        *("--html", str(paths["html"]), "--values", "--draw", str(paths["dot"])),
        *("--graph", str(paths["json"])),
    )
    assert result.exit_code == OK, result.output
    assert "Linear" in result.output and "at peak" in result.output
    assert "_0_weight_hess" in paths["html"].read_text(encoding="utf-8")
    assert '"negative":' in paths["html"].read_text(encoding="utf-8")
    assert paths["dot"].read_text().startswith("digraph")
    assert json.loads(paths["json"].read_text())["multigraph"]
    result = run("inspect", f"{net}:make", *CLASSIFY, "--graph", str(paths["graphml"]))
    assert ET.parse(paths["graphml"]).getroot().tag.endswith("graphml")


def test_report_verify_and_bench(net):
    result = run("report", f"{net}:make", *CLASSIFY)
    assert result.exit_code == OK and "2 of 4 diagonals are exact" in result.output
    result = run("verify", f"{net}:full", "--max-error", "1e-4")
    assert result.exit_code == OK and "overall" in result.output
    result = run("verify", f"{net}:make", *CLASSIFY, "--max-error", "1e-6")
    assert result.exit_code == FAILED and "exceeds" in result.output
    result = run("bench", f"{net}:full", "--seconds", "0.01")
    assert result.exit_code == OK and "ratio" in result.output
    result = run("bench", f"{net}:full", "--seconds", "0.01", "--max-ratio", "0.0001")
    assert result.exit_code == FAILED


def test_options_reach_transform(net):
    result = run("report", f"{net}:make", *CLASSIFY, "--method", "hesscale_gn", "--wrt", "2")
    assert "Gauss-Newton: 2 of 2" in result.output
    result = run("report", f"{net}:make", *CLASSIFY, "--columns", "1")
    assert "the root of its Hessian at the output" in result.output
    inverse = ("report", f"{net}:inverse", "--input", "70,8")
    assert run(*inverse).exit_code == UNSUPPORTED
    assert run(*inverse, "--fallback", "estimate").exit_code == OK
    result = run("report", f"{net}:make", "--loss", f"{net}:halved", *("--input", "5,4"),
                 *("--target", "5,3"))  # fmt: skip
    assert result.exit_code == OK


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (("make",), USAGE, "no example inputs"),
        (("nothing",), USAGE, "has no 'nothing'"),
        (("number",), USAGE, "gives int"),
        (("make", "--input", "5,x"), USAGE, "no shape"),
        (("make", "--input", "5,4:int64"), USAGE, "below"),
        (("make", "--input", "5,4:real"), USAGE, "dtype"),
        (("make", "--input", "5,4", "--loss", "Foo"), USAGE, "no loss 'Foo'"),
        (("make", "--input", "5,4", "--loss", "CTCLoss"), USAGE, "--target"),
        (("make", "--method", "other"), USAGE, "hesscale_gn"),
        (("make", "--input", "-5,4"), USAGE, "negative size"),
        (("make", *CLASSIFY, "--wrt", "other"), USAGE, "no parameter"),
        (("make", *CLASSIFY, "--columns", "some"), USAGE, "neither a number nor exact"),
        (("make", *CLASSIFY, "--calibrate", "0"), USAGE, "range"),
        (("make", *CLASSIFY, "--fallback", "other"), USAGE, "estimate"),
        (("make", "--input", "5,4"), UNSUPPORTED, "--loss CrossEntropyLoss"),
        (("Branches", "--input", "2,8"), UNSUPPORTED, "cond"),
        (("broken", "--input", "2,8"), MODEL, "OSError: no such weights"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_errors_have_codes_and_no_traceback(net, arguments, code, message):
    name, *rest = arguments
    result = run("report", f"{net}:{name}", *rest)
    assert result.exit_code == code, result.output
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("inspect", "--draw", "net.jpeg"), ".svg"),
        (("inspect", "--graph", "net.txt"), ".graphml"),
        (("inspect", "--html", "net.txt"), ".html"),
        (("inspect", "--html", "no/such/net.html"), "no folder"),
        (("inspect", "--values"), "--html"),
        (("inspect", "--depth", "0"), "range"),
        (("verify", "--samples", "0"), "range"),
        (("bench", "--seconds", "0"), "range"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_options_are_found_before_anything_is_shown(net, arguments, message):
    command, *rest = arguments
    result = run(command, f"{net}:make", *CLASSIFY, *rest)
    assert result.exit_code == USAGE and message in result.output, result.output
    assert "at peak" not in result.output


def test_the_traceback_is_shown_when_asked(net):
    with pytest.raises(OSError, match="no such weights"):
        run("--traceback", "report", f"{net}:broken")


def test_wrong_names():
    for name, message in (
        ("json", "names no object"),
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("missing.py:f", "no file"),
    ):
        result = run("report", name)
        assert result.exit_code == USAGE and message in result.output, result.output


def test_targets_fit_the_loss():
    nn = torch.nn
    x = (torch.randn(5, 4),)
    classes = workload.target_for(nn.CrossEntropyLoss(), nn.Linear(4, 3), x)
    assert classes.shape == (5,) and classes.max() < 3 and not classes.is_floating_point()
    image = workload.target_for(nn.NLLLoss(), nn.Conv2d(2, 3, 1), (torch.randn(2, 2, 4, 4),))
    assert image.shape == (2, 4, 4)
    binary = workload.target_for(nn.BCEWithLogitsLoss(), nn.Linear(4, 3), x)
    assert binary.shape == (5, 3) and set(binary.unique().tolist()) <= {0.0, 1.0}
    assert workload.target_for(nn.MSELoss(), nn.Linear(4, 3), x).shape == (5, 3)
    with pytest.raises(InvalidArgumentError, match="--target"):
        workload.target_for(nn.MultiMarginLoss(), nn.Linear(4, 3), x)


def test_without_click_there_is_a_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "hesscale_fx.cli")
    with pytest.raises(SystemExit, match=r"hesscale_fx\[cli\]"):
        main()


PROGRAM = """
import sys
import hesscale_fx

heavy = [m for m in ("rich", "click", "matplotlib", "pydot") if m in sys.modules]
assert not heavy, heavy
sys.argv = ["hesscale-fx", "report", "net:full"]
from hesscale_fx.__main__ import main

main()
"""


def test_as_a_program_in_the_folder_of_the_model(net, tmp_path):
    """And the package itself imports nothing that only some of it needs."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert ran.returncode == OK, ran.stderr
    assert "2 of 2 diagonals are exact" in ran.stdout and not ran.stderr
