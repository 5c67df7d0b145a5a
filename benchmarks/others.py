"""What else gives a diagonal: BackPACK's extensions and Hutchinson's estimator.

Each is a call that computes the gradient and its diagonal of a workload, for `step.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from workloads import Workload

EXTENSIONS = ("DiagHessian", "DiagGGNExact", "DiagGGNMC")


def hutchinson(work: Workload) -> Callable[[], Any]:
    """AdaHessian's estimator with one sample: z * (Hz), by double backward."""
    parameters = list(work.model.parameters())

    def step() -> Any:
        # The fused kernels of attention have no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = work.loss(work.model(*work.inputs), *work.targets)
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            signs = [torch.randint_like(p, 2).mul_(2).sub_(1) for p in parameters]
            products = torch.autograd.grad(grads, parameters, signs)
        return [z * h for z, h in zip(signs, products, strict=True)]

    return step


def backpack_step(work: Workload, extension: str) -> Callable[[], Any]:
    """One of BackPACK's extensions, on a copy of the model, which its hooks stay in."""
    import backpack
    from backpack import extensions

    model, loss = backpack.extend(copy.deepcopy(work.model)), backpack.extend(nn.CrossEntropyLoss())
    made = getattr(extensions, extension)()

    def step() -> None:
        model.zero_grad()
        with backpack.backpack(made):
            loss(model(*work.inputs), *work.targets).backward()

    return step


# What says that a package is not installed, or does not know a layer of the model.
REFUSALS = (ImportError, NotImplementedError, RuntimeError, AttributeError, AssertionError)


def others(work: Workload) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that can be run on a workload, each tried once, and why the rest cannot."""
    found, refused = {}, {}
    makers: dict[str, Callable[[], Callable]] = {"Hutchinson": lambda: hutchinson(work)}
    for extension in EXTENSIONS:
        makers[f"BackPACK {extension}"] = lambda e=extension: backpack_step(work, e)
    for name, make in makers.items():
        try:
            step = make()
            step()
        except REFUSALS as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            found[name] = step
    return found, refused
