"""How torchvision is made to run beside a torch that has no CUDA."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, whose compiled operators load beside a CUDA build of torch only.

    Importing it needs the two that it registers shapes for; with their schemas declared, its models
    (plain torch) work, and what calls the compiled operators (detection) does not.
    """
    if "torchvision" not in sys.modules and not has_operators():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
    import torchvision

    return torchvision


def has_operators() -> bool:
    """Whether torchvision's compiled operators load beside this torch."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torchvision is not installed: pip install torchvision")
    try:
        torch.ops.load_library(str(next(Path(found.origin).parent.glob("_C*.so"))))
    except (OSError, StopIteration):
        return False
    return True


_kept: list[torch.library.Library] = []  # a library that is collected takes its operators along
