"""Exact columns of a square root of the loss's Hessian, pulled back, beside the recursion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.methods.base import Flow, Method, Output, Place, sums
from hesscale_fx.methods.persample import pull_columns, spread_out, squares, squares_per_sample
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import add, recursion, wide

Passage = Callable[[list[Tensor | None]], list[Tensor | None]]  # s at outputs -> s at inputs


@dataclass(frozen=True)
class Columns(Method):
    """``sum_k (J^T u_k)^2`` per sample at the parameters, for columns u_k at the model's output.

    The columns are those of a square root of the Hessian of the loss (`columns` = None) or
    combinations of them with random signs. Where the loss is not convex, the diagonal of the
    negative part flows as HesScale's s does. With `curved` that s is fed by the second-derivative
    terms of the model too, else the result is the Gauss-Newton diagonal. With a `tail` the columns
    end at the first contraction that is not one of the last so many, in s.

    Beside random columns "gauss" is the diagonal of what they stand for, as far as the recursion is
    exact: there it serves in their place, without their noise.
    """

    name: str
    columns: int | None = None
    curved: bool = True
    tail: int | None = None
    needs_boundary = True
    needs_samples = True

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        sure = ("gauss",) if self.columns else ()
        return ("grad", "columns", *sure, "hess")

    @property
    def of(self) -> str:  # type: ignore[override]
        return "Hessian" if self.curved else "Gauss-Newton"

    @property
    def asked(self) -> str:
        if self.tail is not None:
            return "tail="
        return "columns=" if self.name == "hesscale" else super().asked

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        if role == "grad":
            return at.vjp(y["grad"])
        if role == "columns":
            if place.is_root:
                return at.root(y["grad"], self._scaled(y["signs"][0]))  # type: ignore[attr-defined]
            return pull_columns(at, y["columns"], place)
        if role == "gauss":
            return self.while_exact(at.squared_vjp(y["gauss"]), place)
        flow = self.flow(at, y, place)
        return self.with_gauss(flow, y, place, with_squares(flow, at, y, place, y["hess"]))

    def flow(self, at: Evaluation, y: Flow, place: Place) -> Passage:
        """What s becomes through a unit."""
        if not self.curved and place.inside:
            return at.squared_vjp
        return lambda s: recursion(at, s, y["grad"])

    def while_exact(self, passed: list[Tensor | None], place: Place) -> list[Tensor | None]:
        """What flows on of "gauss": nothing where the recursion is not exact, or ends."""
        if not place.exact:
            return [None] * len(passed)
        uses = zip(passed, place.exact, place.uses, strict=True)
        return [p if exact and use != "exact" else None for p, exact, use in uses]

    def with_gauss(
        self, flow: Passage, y: Flow, place: Place, passed: list[Tensor | None]
    ) -> list[Tensor | None]:
        """What flows of s, where the recursion is exact with the part that columns stand for."""
        if "exact" not in place.uses:
            return passed
        found = flow(sums(y["gauss"], y["hess"]))
        uses = zip(place.uses, passed, found, strict=True)
        return [f if use == "exact" else p for use, p, f in uses]

    def begin(
        self, z: Tensor, values: Mapping[str, Tensor | None], output: Output, given: Any
    ) -> dict[str, Tensor | None]:
        found = {**values, **self.diagonals(z, values["hess"], output, given)}
        if "columns" in self.roles:
            found["columns"] = self.root(z, values, output, given)
        return {role: found.get(role) for role in self.roles}

    def diagonals(
        self, z: Tensor, s: Tensor | None, output: Output, given: Any
    ) -> dict[str, Tensor | None]:
        """Of the Hessian at z: the negative part as "hess", and as "gauss" the positive part."""
        if output.kind == "full":
            left = factor(z, given[1], output, None)[1]
            diagonal = unflatten(given[1].diagonal(dim1=1, dim2=2), z, output)
            return {"gauss": diagonal.to(left.dtype) - left, "hess": left}
        if s is None or output.convex:
            return {"gauss": s, "hess": None}
        return {"gauss": s.clamp(min=0), "hess": s.clamp(max=0)}

    def root(
        self, z: Tensor, values: Mapping[str, Tensor | None], output: Output, given: Any
    ) -> Tensor | None:
        """The columns at z."""
        signs, s, columns = self._scaled(given[0]), values["hess"], values["columns"]
        if output.kind == "full":
            return factor(z, given[1], output, signs)[0]
        if output.kind == "diagonal" and s is not None:
            columns = (s if output.convex else s.clamp(min=0)).sqrt()
            columns = columns.unsqueeze(0) if signs is None else columns * signs
        return spread_out(columns, output) if columns is not None and signs is None else columns

    def fold(self, values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The diagonal of the columns in s, in their place."""
        return {**values, "columns": None, "hess": self.read_out(values)}

    def _scaled(self, signs: Tensor | None) -> Tensor | None:
        """So that the squares of all columns add up to what one has on average."""
        return signs if signs is None or not self.columns else signs * self.columns**-0.5

    def read_out(self, values: Mapping[str, Tensor | None]) -> Tensor | None:
        return add(values.get("hess"), squares(values.get("columns")))


def with_squares(
    flow: Passage, at: Evaluation, y: Flow, place: Place, s: list[Tensor | None]
) -> list[Tensor | None]:
    """What flows of s, with the squares of columns at the parameters that they meet here."""
    passed = flow(s)
    if "own" in place.uses:
        found = flow(sums(s, [squares(u) for u in y["columns"]]))
        uses = zip(place.uses, passed, found, strict=True)
        passed = [f if use == "own" else p for use, p, f in uses]
    if "once" in place.uses and any(u is not None for u in y["columns"]):
        passed = sums(passed, squares_per_sample(at, y["columns"], place))
    return passed


def factor(
    z: Tensor, hessian: Tensor, output: Output, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Columns of a square root of the positive part, and the diagonal of the negative part.

    Args:
        z: the model's output.
        hessian: of the loss, (samples, n, n) with n entries of z in each sample.
        output: where z has its samples.
        signs: (k, *z.shape), for k random combinations of the columns; None for all.
    """
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    left = (vectors.square() * values.clamp(max=0).unsqueeze(-2)).sum(-1)
    if signs is None:
        columns = root.permute(2, 0, 1)
    else:
        flat = torch.stack([flatten(s, output) for s in signs])
        columns = (root * flat.unsqueeze(-2)).sum(-1)
    dtype = wide(z.dtype)
    back = [unflatten(c, z, output) for c in columns]
    return torch.stack(back).to(dtype), unflatten(left, z, output).to(dtype)


def flatten(value: Tensor, output: Output) -> Tensor:
    """(samples, entries of each) from a tensor like z."""
    if output.rows is None:
        return value.reshape(1, -1)
    dim, inner = output.rows
    value = value.movedim(dim, 0)
    return value.reshape(value.shape[0] // inner, -1)


def unflatten(value: Tensor, z: Tensor, output: Output) -> Tensor:
    """The inverse of `flatten`."""
    if output.rows is None:
        return value.reshape(z.shape)
    dim = output.rows[0]
    return value.reshape(z.movedim(dim, 0).shape).movedim(0, dim)
