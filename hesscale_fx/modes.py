"""How PyTorch is set while a model is traced, whatever the caller's settings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# They log whole tracebacks of attempts that fail; the failure that counts is raised.
NOISY = (
    "_subclasses.fake_tensor",
    "fx.experimental.symbolic_shapes",
    "export._draft_export",
    "export._trace",
    "_export.non_strict_utils",
)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns about its own internals; the user can do nothing about those."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|copyreg")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message="The tensor attributes? self\\.")
        warnings.filterwarnings("ignore", message=".*_flat_weights.*")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        silent = [logging.getLogger(f"torch.{name}") for name in NOISY]
        levels = [logger.level for logger in silent]
        for logger in silent:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(silent, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def grad_modes() -> Iterator[None]:
    """The modes in which a model is captured, whatever the caller's."""
    with torch.enable_grad(), no_autocast():
        yield


@contextmanager
def dispatch_kept() -> Iterator[None]:
    """A trace that fails within torch.func can leave the thread's dispatch keys changed."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(*keys):
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Ambient autocast belongs to the caller's own code, not to the captured graph."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    before = {k: torch.is_autocast_enabled(k) for k in kinds}
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind, on in before.items():
            torch.set_autocast_enabled(kind, on)
