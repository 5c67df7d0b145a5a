"""Loss, gradients and Hessian diagonals of any PyTorch model in one fx graph."""

from hesscale_fx import inspect
from hesscale_fx.api import transform
from hesscale_fx.boundary import output
from hesscale_fx.check import check
from hesscale_fx.errors import HesScaleError
from hesscale_fx.module import HesScaleModule, Result
from hesscale_fx.structures.custom import Rule, register

__all__ = [
    "HesScaleError",
    "HesScaleModule",
    "Result",
    "Rule",
    "check",
    "inspect",
    "output",
    "register",
    "transform",
]
