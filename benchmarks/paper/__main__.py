"""The paper's experiments, all or those named.

    python benchmarks/paper [quality] [optimisation] [reinforcement] [cost] [--full] [--out DIR]

Each can be run by itself too: ``python benchmarks/paper/quality.py --help``.
"""

from __future__ import annotations

import importlib
import sys

EXPERIMENTS = ("quality", "optimisation", "reinforcement", "cost")


def main(argv: list[str]) -> None:
    """Run them one after the other; what is no name goes to each."""
    named = [a for a in argv if a in EXPERIMENTS]
    for name in named or EXPERIMENTS:
        print(f"== {name}", flush=True)
        importlib.import_module(name).main([a for a in argv if a not in EXPERIMENTS])


if __name__ == "__main__":
    main(sys.argv[1:])
