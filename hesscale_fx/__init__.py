"""Loss, gradients and Hessian diagonals of any PyTorch model in one fx graph."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hesscale_fx.api import transform
from hesscale_fx.boundary import output
from hesscale_fx.check import check
from hesscale_fx.errors import HesScaleError
from hesscale_fx.module import HesScaleModule, Result
from hesscale_fx.structures.custom import Rule, register

if TYPE_CHECKING:
    from hesscale_fx import inspect, optim

__all__ = [
    "HesScaleError",
    "HesScaleModule",
    "Result",
    "Rule",
    "check",
    "inspect",
    "optim",
    "output",
    "register",
    "transform",
]


def __getattr__(name: str) -> Any:
    """Import `inspect` and `optim` when they are first used."""
    if name in ("inspect", "optim"):
        return import_module(f"hesscale_fx.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
