"""Optimizers that read ``p.hesscale`` beside ``p.grad``, and adapters to those of others.

`hs.backward` fills both. See the README, section "Optimizers".
"""

from hesscale_fx.optim.adahesscale import AdaHesScale, AdaHesScaleGN
from hesscale_fx.optim.base import CurvatureOptimizer
from hesscale_fx.optim.scaling import StepSizeScaling
from hesscale_fx.optim.sophia import Sophia

__all__ = [
    "AdaHesScale",
    "AdaHesScaleGN",
    "CurvatureOptimizer",
    "Sophia",
    "StepSizeScaling",
]
