"""What the documentation shows runs: the examples of docstrings and the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import hesscale_fx

README = Path(__file__).parent.parent / "README.md"
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


BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


# torch.func.hessian, the first time it runs.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{len(b)} characters")
def test_blocks_of_the_readme(block: str) -> None:
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_the_readme_has_blocks() -> None:
    assert len(BLOCKS) >= 3
