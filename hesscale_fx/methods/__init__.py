"""What flows backwards. A method combines the three questions of a rule and knows no operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.methods.base import Method, Output, Place
from hesscale_fx.methods.bl89 import BL89
from hesscale_fx.methods.calibrated import Calibrated
from hesscale_fx.methods.columns import Columns
from hesscale_fx.methods.fisher import EmpiricalFisher
from hesscale_fx.methods.hesscale import HesScale
from hesscale_fx.methods.products import Exact, Hutchinson
from hesscale_fx.methods.split import LossSplit

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        HesScale("hesscale"),
        HesScale("hesscale_gn", gauss_newton=True),
        BL89(),
        Columns("ggn", curved=False),
        EmpiricalFisher(),
        Hutchinson(),
        Exact(),
    )
}

# The arguments of `transform` that a method takes beside those that all take.
OPTIONS = {
    "hesscale": ("columns", "generator", "calibrate", "tail"),
    "hesscale_gn": ("tail",),
    "ggn": ("columns", "generator"),
    "hutchinson": ("samples", "generator"),
}


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name with such options.

    Raises:
        InvalidArgumentError: there is no such method, or it does not take an option.
    """
    if name not in METHODS:
        raise InvalidArgumentError(
            f"Unknown method {name!r}; choose one of {', '.join(map(repr, METHODS))}."
        )
    for option in options:
        if option not in OPTIONS.get(name, ()):
            takers = [m for m, taken in OPTIONS.items() if option in taken]
            raise InvalidArgumentError(
                f"method={name!r} takes no {option}=; {' and '.join(map(repr, takers))} do."
            )
    if name == "hutchinson":
        samples = options.get("samples", 1)
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise InvalidArgumentError(f"samples must be a number from 1 on, not {samples!r}.")
        return Hutchinson(samples=samples)
    if "tail" in options:
        return with_tail(name, options)
    calibrate = options.get("calibrate", False)
    if not isinstance(calibrate, int) or calibrate < 0:
        raise InvalidArgumentError(
            f"calibrate must be True, or the number of calls between two, not {calibrate!r}."
        )
    default = "exact" if name == "ggn" else 1 if calibrate else 0
    columns = options.get("columns", default)
    if not is_count(columns) and columns != "exact":
        raise InvalidArgumentError(f"columns must be 0, a number or 'exact', not {columns!r}.")
    if name == "ggn" and columns == 0:
        raise InvalidArgumentError("method='ggn' needs columns: give a number of them, or 'exact'.")
    if "generator" in options and columns in (0, "exact"):
        raise InvalidArgumentError("generator= is for random columns: give columns=1 or more.")
    count = None if columns == "exact" else columns
    if name == "ggn":
        return Columns("ggn", columns=count, curved=False)
    if calibrate and columns == 0:
        raise InvalidArgumentError("calibrate= needs columns: give a number of them, or 'exact'.")
    if calibrate:
        return Calibrated(columns=count)
    if name == "hesscale" and columns != 0:
        return Columns("hesscale", columns=count)
    return METHODS[name]


def with_tail(name: str, options: Mapping[str, Any]) -> Method:
    """The method with all columns through the last contractions.

    Raises:
        InvalidArgumentError: the tail is no number, or other options leave no room for it.
    """
    tail = options["tail"]
    if not is_count(tail):
        raise InvalidArgumentError(
            f"tail must be a number of contractions from 0 on, not {tail!r}; all of them is "
            "columns='exact'."
        )
    for option in ("calibrate", "generator", "columns"):
        given = options.get(option)
        if given not in (None, False, "exact") or (option, given) == ("columns", 0):
            raise InvalidArgumentError(
                f"tail= carries all columns and nothing random, so it takes no "
                f"{option}={given!r}. Give one of the two."
            )
    if tail == 0:
        return METHODS[name]
    return Columns(name, curved=name == "hesscale", tail=tail)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


__all__ = [
    "METHODS",
    "Calibrated",
    "Columns",
    "Exact",
    "HesScale",
    "Hutchinson",
    "LossSplit",
    "Method",
    "Output",
    "Place",
    "make_method",
]
