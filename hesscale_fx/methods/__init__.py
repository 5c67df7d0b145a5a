"""What flows backwards. A method combines the three questions of a rule and knows no operator."""

from hesscale_fx.methods.base import Method
from hesscale_fx.methods.hesscale import HesScale

METHODS = {m.name: m for m in (HesScale("hesscale"), HesScale("hesscale_gn", gauss_newton=True))}

__all__ = ["METHODS", "HesScale", "Method"]
