"""How torchvision is made to run beside a torch that has no CUDA."""

from __future__ import annotations

from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, whose compiled operators load beside a CUDA build of torch only.

    Importing it needs the two that it registers shapes for; with their schemas declared, its models
    (plain torch) work, and what calls the compiled operators (detection) does not.
    """
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
    import torchvision

    return torchvision


_kept: list[torch.library.Library] = []  # a library that is collected takes its operators along
