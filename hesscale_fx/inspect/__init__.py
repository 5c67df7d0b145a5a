"""Look inside: what the compiler emitted, what it costs, and where curvature comes from."""

from hesscale_fx.inspect.difference import Change, Difference, diff
from hesscale_fx.inspect.drawing import draw
from hesscale_fx.inspect.network import (
    critical_path,
    curvature_of,
    dependents,
    dominators,
    generated_from,
    origin_of,
    to_networkx,
)
from hesscale_fx.inspect.page import html
from hesscale_fx.inspect.profiling import times
from hesscale_fx.inspect.summary import Row, Summary, summary

__all__ = [
    "Change",
    "Difference",
    "Row",
    "Summary",
    "critical_path",
    "curvature_of",
    "dependents",
    "diff",
    "dominators",
    "draw",
    "generated_from",
    "html",
    "origin_of",
    "summary",
    "times",
    "to_networkx",
]
