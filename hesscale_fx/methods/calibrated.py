"""HesScale whose Gauss-Newton part has the right mass: one factor for each parameter tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscale_fx.methods.base import Flow, Place
from hesscale_fx.methods.columns import Columns, with_squares
from hesscale_fx.methods.persample import norms_per_sample, squares, totals_of
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import add


@dataclass(frozen=True)
class Calibrated(Columns):
    """``s = factor * s_gn + s_rest`` at each parameter.

    The recursion is linear in its sources: s_gn is fed by the loss alone, s_rest by the second
    derivatives of the model. The factor is the trace of the Gauss-Newton matrix of that tensor,
    from `columns`, over the sum of s_gn; where the recursion is exact it is 1. A method that does
    not `refresh` takes the factors as they are, and carries no columns.
    """

    name: str = "hesscale"
    columns: int | None = 1
    refresh: bool = True

    @property
    def asked(self) -> str:
        return "calibrate="

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        fresh = ("columns", "factor", "mass") if self.refresh else ()
        return ("grad", *fresh, "gauss", "hess")

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if role in ("grad", "columns"):
            return super().pull(role, at, y, place)
        factors = self.met(at, y, place)
        if role == "factor":
            return factors
        if role == "mass":
            pairs = zip(place.uses, factors, strict=True) if place.uses else ()
            others = tuple(use if f is None else "factor" for use, f in pairs)
            rest = replace(place, uses=others)
            return with_squares(at.squared_vjp, at, y, rest, y["mass"])
        if role == "gauss":
            uses = place.uses or ("rows",) * len(factors)
            flows = zip(at.squared_vjp(y["gauss"]), factors, uses, strict=True)
            return [p if f is None and use != "exact" else None for p, f, use in flows]
        flow = self.flow(at, y, place)
        passed = self.with_gauss(flow, y, place, flow(y["hess"]))
        for i, factor in enumerate(factors):  # both parts in one, where they meet their parameter
            if factor is not None:
                parts = zip(y["gauss"], y["hess"], strict=True)
                both = [add(None if a is None else factor * a, b) for a, b in parts]
                passed[i] = flow(both)[i]
        return passed

    def met(self, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        """The factors of the parameters that a unit meets, where they can be told there."""
        known = y["factors"]
        if not self.refresh or all(f is None for f in known):
            return known
        traces = norms_per_sample(at, y["columns"], place)
        wanted = [f is not None and t is not None for f, t in zip(known, traces, strict=True)]
        totals = totals_of(at, y["gauss"], wanted)
        found = zip(wanted, known, traces, totals, strict=True)
        return [ratio(t, total, f) if want else None for want, f, t, total in found]

    def factor(self, values: Mapping[str, Tensor | None], known: Tensor) -> Tensor:
        """Of one parameter: the new one, or the known one where there is no mass."""
        met = values.get("factor")
        if met is not None:
            return met.to(known.dtype)
        parts = (values.get("mass"), squares(values.get("columns")))
        masses = [p.sum() for p in parts if p is not None]
        gauss = values.get("gauss")
        if not masses or gauss is None:
            return known
        return ratio(sum(masses[1:], masses[0]), gauss.sum(), known)

    def scaled(self, values: Mapping[str, Tensor | None], factor: Tensor) -> Tensor | None:
        """The diagonal of one parameter."""
        gauss, hess = values.get("gauss"), values.get("hess")
        return add(None if gauss is None else factor.to(gauss.dtype) * gauss, hess)


def ratio(trace: Tensor | None, total: Tensor | None, known: Tensor | None) -> Tensor:
    """The factor that gives `total` the trace, or the known one where there is nothing to scale."""
    assert known is not None
    if trace is None or total is None:
        return known
    trace, total = trace.to(known.dtype), total.to(known.dtype)
    found = total > 0
    return torch.where(found, trace / torch.where(found, total, 1), known)
