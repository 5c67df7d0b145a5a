"""Loss, gradients and Hessian diagonals of any PyTorch model in one fx graph."""

from hesscale_fx.api import transform
from hesscale_fx.boundary import output
from hesscale_fx.errors import HesScaleError
from hesscale_fx.module import HesScaleModule, Result

__all__ = ["HesScaleError", "HesScaleModule", "Result", "output", "transform"]
