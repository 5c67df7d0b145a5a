"""HesScale whose Gauss-Newton part has the right mass: one factor for each parameter tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscale_fx.methods.base import Flow, Output, Place, sums
from hesscale_fx.methods.columns import Columns
from hesscale_fx.methods.persample import squares
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import add


@dataclass(frozen=True)
class Calibrated(Columns):
    """``s = factor * s_gn + s_rest`` at each parameter.

    The recursion is linear in its sources: s_gn is fed by the loss alone, s_rest by the second
    derivatives of the model. The factor is the trace of the Gauss-Newton matrix of that tensor,
    from `columns`, over the sum of s_gn. A method that does not `refresh` takes the factors as they
    are, and carries no columns.
    """

    name: str = "hesscale"
    columns: int | None = 1
    refresh: bool = True

    @property
    def asked(self) -> str:  # type: ignore[override]
        return "calibrate="

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        fresh = ("columns", "mass") if self.refresh else ()
        return ("grad", *fresh, "gauss", "hess")

    @property
    def exactness(self) -> str:  # type: ignore[override]
        return "never"

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if role == "mass":
            return sums(at.squared_vjp(y["mass"]), self.own_squares(at, y, place))
        if role in ("grad", "columns"):
            return super().pull(role, at, y, place)
        factors = y["factors"]
        if role == "gauss":
            passed = at.squared_vjp(y["gauss"])
            return [p if f is None else None for p, f in zip(passed, factors, strict=True)]
        passed = at.squared_vjp(y["hess"])
        for i, factor in enumerate(factors):  # both parts in one, where they meet their parameter
            if factor is not None:
                parts = zip(y["gauss"], y["hess"], strict=True)
                both = [add(None if a is None else factor * a, b) for a, b in parts]
                passed[i] = at.squared_vjp(both)[i]
        return sums(passed, at.curvature(y["grad"]))

    def begin(
        self, z: Tensor, values: Mapping[str, Tensor | None], output: Output, given: tuple
    ) -> dict[str, Tensor | None]:
        found = super().begin(z, {"columns": None, **values}, output, given)
        hess, left = values["hess"], found["hess"]
        found["gauss"] = hess if hess is None or output.convex else hess.clamp(min=0)
        if output.kind == "full":
            found["gauss"] = self.positive(z, given[1], output)
        return {role: found.get(role) for role in self.roles} | {"hess": left}

    def factor(self, values: Mapping[str, Tensor | None], known: Tensor) -> Tensor:
        """Of one parameter: the new one, or the known one where there is no mass."""
        mass = add(values.get("mass"), squares(values.get("columns")))
        gauss = values.get("gauss")
        if mass is None or gauss is None:
            return known
        trace, total = mass.sum().to(known.dtype), gauss.sum().to(known.dtype)
        found = total > 0
        return torch.where(found, trace / torch.where(found, total, 1), known)

    def scaled(self, values: Mapping[str, Tensor | None], factor: Tensor) -> Tensor | None:
        """The diagonal of one parameter."""
        gauss, hess = values.get("gauss"), values.get("hess")
        return add(None if gauss is None else factor.to(gauss.dtype) * gauss, hess)
