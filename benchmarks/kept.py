"""Results that outlive a run, so that one table of one version of the code can be made in pieces.

They lie in build/, which git ignores and `make clean` removes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def version(*more: Path) -> str:
    """A digest of the package, of PyTorch's version and of the further files or folders."""
    digest = hashlib.sha256(torch.__version__.encode())
    for place in (ROOT / "hesscale_fx", *more):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Kept:
    """Rows by name, those of other versions left aside.

    Args:
        name: of the file in build/.
        current: the version that the rows belong to.
    """

    def __init__(self, name: str, current: str) -> None:
        self.path = ROOT / "build" / f"{name}.json"
        self.version = current
        self.rows: dict[str, Any] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["version"] == current:
                self.rows = found["rows"]

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Any:
        return self.rows[name]

    def __setitem__(self, name: str, row: Any) -> None:
        """Keep a row, at once."""
        self.rows[name] = row
        self.path.parent.mkdir(exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"version": self.version, "rows": self.rows}, indent=1))
        part.replace(self.path)
