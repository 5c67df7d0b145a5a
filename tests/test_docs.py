"""What the documentation shows runs: docstrings, the README and the pages of docs/."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hesscale_fx

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
MODULES = [m.name for m in pkgutil.walk_packages(hesscale_fx.__path__, "hesscale_fx.")]


def examples(name: str) -> list[doctest.DocTest]:
    return [t for t in doctest.DocTestFinder().find(importlib.import_module(name)) if t.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    output: list[str] = []
    for test in examples(name):
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


def test_what_users_extend_with_has_examples() -> None:
    for name in ("boundary", "check", "structures.custom"):
        assert examples(f"hesscale_fx.{name}")


FENCED = re.compile(
    r"^(?P<needs><!-- needs: \w+ -->\n)?(?P<slow><!-- slow -->\n)?```python\n(?P<source>.*?)^```$"
    r"(?:\s*^```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """A block of Python on a page, and what the page shows below it."""

    page: Path
    line: int
    source: str
    output: str | None
    needs: str | None  # a package without which it is not run
    slow: bool = False  # left out of the default tests

    def run(self, scope: dict[str, Any]) -> str:
        # Tracebacks and reports name the line on the page.
        code = compile("\n" * (self.line - 1) + self.source, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, scope)
        return printed.getvalue()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("source")) + 1,
            found["source"],
            found["output"],
            found["needs"] and found["needs"].split()[2],
            bool(found["slow"]),
        )
        for found in FENCED.finditer(text)
    ]


BLOCKS = {page: blocks_of(page) for page in [README, *sorted(DOCS.glob("*.md"))]}

# torch.func.hessian, the first time it runs.
torchscript = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)


@torchscript
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b, id=f"line {b.line}", marks=[pytest.mark.slow] * b.slow)
        for b in BLOCKS[README]
    ],
)
def test_blocks_of_the_readme(block: Block, monkeypatch, tmp_path) -> None:
    """Each stands alone."""
    monkeypatch.chdir(tmp_path)
    block.run({"__name__": "readme"})


@torchscript
@pytest.mark.parametrize(
    "page", [p for p, b in BLOCKS.items() if b and p != README], ids=lambda p: p.name
)
def test_blocks_of_a_page(page: Path, monkeypatch, tmp_path, request) -> None:
    """They follow each other, and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    name = f"page_{page.stem}"  # not that of a package
    monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
    torch.manual_seed(0)
    for block in BLOCKS[page]:
        if block.needs and importlib.util.find_spec(block.needs) is None:
            continue
        if block.needs == "laplace":
            request.getfixturevalue("laplace")
        printed = block.run(module.__dict__)
        if block.output is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(block.output, printed, flags)
            assert same, f"{page.name}, line {block.line}, prints\n{printed}"


def unfenced(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_every_fence_of_python_is_found() -> None:
    for page, blocks in BLOCKS.items():
        text = page.read_text(encoding="utf-8")
        assert text.count("```python") == len(blocks), page
        # An indented block would be shown, and not be run.
        indented = r"\n\n    (?:import |from \w+ import |(?:\w+ = )?(?:torch|nn|hesscale_fx)\.)"
        assert not re.search(indented, unfenced(text)), page
        assert page == README or not any(b.slow for b in blocks), page
    assert len(BLOCKS[README]) >= 3


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    # A function that its module is named after has a heading of its own.
    shown = set(re.findall(r"^(?:::: |      heading: )(\S+)$", page, re.MULTILINE))
    for package in (hesscale_fx, hesscale_fx.inspect, hesscale_fx.optim):
        names = {
            f"{package.__name__}.{n}"
            for n in package.__all__
            if not isinstance(getattr(package, n), ModuleType)
        }
        assert names <= shown, names - shown


@pytest.mark.slow
def test_the_site_builds(tmp_path) -> None:
    """Strictly: every link and every name of the reference resolves."""
    pytest.importorskip("mkdocs", reason="needs the extra docs: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("transform", "check.check", "inspect.summary.summary", "optim.AdaHesScale"):
        assert f'id="hesscale_fx.{name}"' in page
