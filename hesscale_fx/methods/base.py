"""The interface between the reverse walk and a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import add

# Role -> one value for each output of a unit; at a root also "signs".
Flow = dict[str, list[Tensor | None]]


@dataclass(frozen=True)
class Place:
    """What a method may know of where a unit stands; it knows neither graph nor operator.

    Attributes:
        inside: before the boundary between model and loss.
        rows: for each output the dimension that runs over (samples, inner), and inner; None where
            a tensor has no samples of its own.
        uses: for each input ``"rows"``, if it has samples or no output has; ``"own"``, if the unit
            uses no element of it twice in one sample; ``"once"``, if only this unit uses it,
            and all that is before it keeps elements apart; ``"met"``, if it is used where
            samples have been combined; ``"exact"``, if the recursion is exact there and serves in
            the place of random columns; else ``"shared"``.
        exact: for each input whether the recursion is exact there; empty if no one asks.
        leaves: for each input whether it is one that is differentiated.
        is_row: entries of one row of an input reach several of an output, not linearly.
        is_root: the unit is the one of the loss that bends, and its matrix of second derivatives
            has a square root in closed form.
    """

    inside: bool = False
    rows: tuple[tuple[int, int] | None, ...] = ()
    uses: tuple[str, ...] = ()
    exact: tuple[bool, ...] = ()
    leaves: tuple[bool, ...] = ()
    is_row: bool = False
    is_root: bool = False


@dataclass(frozen=True)
class Output:
    """What is known of the model's output where the loss begins.

    Attributes:
        kind: of the square root of the loss's Hessian there: ``"diagonal"``, if it is diagonal;
            ``"root"``, if columns arrive from a unit of the loss; else ``"full"``.
        rows: as in `Place`.
        coupled: dimensions along which the Hessian is not diagonal.
        convex: it surely has no negative part.
    """

    kind: str
    rows: tuple[int, int] | None
    coupled: tuple[int, ...]
    convex: bool = False


class Method:
    """What flows backwards through the units, role by role.

    A role is the name of one flowing quantity; ``"grad"`` is always the gradient, and ``"hess"``
    has the shape of the tensor it belongs to. ``"columns"`` have one more dimension in front, and
    ``"factor"`` is a number.
    """

    name: str
    roles: tuple[str, ...] = ("grad", "hess")
    needs_boundary = False  # whether model and loss are treated differently
    needs_samples = False  # whether `Place.rows` and `Place.uses` are asked for
    columns: int | None = 0  # at the model's output; None: all there are
    tail: int | None = None  # how many contractions the columns pass; None: all
    # What the method returns, as a report calls it.
    of = "Hessian"
    # When its diagonals are exact: where the recursion is, "always" or "never".
    exactness = "recursion"

    @property
    def asked(self) -> str:
        """The argument of `transform` that asked for it, for errors."""
        return f"method={self.name!r}"

    def seed(self, loss: Tensor) -> dict[str, Tensor | None]:
        """The values at the loss; None is zero."""
        return {role: torch.ones_like(loss) if role == "grad" else None for role in self.roles}

    def pull(self, role: str, at: Evaluation, y: Flow, place: Place) -> list[Tensor | None]:
        """The values of `role` for each input of a unit."""
        raise NotImplementedError

    def begin(
        self, z: Tensor, values: Mapping[str, Tensor | None], output: Output, given: Any
    ) -> dict[str, Tensor | None]:
        """The values with which the model is entered at its output z; `columns` methods only.

        Args:
            z: the output.
            values: what arrived from the loss.
            output: what is known of the Hessian of the loss there.
            given: random signs (columns, *z.shape) if `columns` is a number, and the Hessian of the
                loss for each sample if `output.kind` is ``"full"``.
        """
        return dict(values)

    def fold(self, values: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """What goes on where the `tail` begins, of the values at a contraction's output."""
        return dict(values)

    def read_out(self, values: Mapping[str, Tensor | None]) -> Tensor | None:
        """The diagonal of a leaf."""
        return values.get("hess")


def sums(a: list[Tensor | None], b: list[Tensor | None]) -> list[Tensor | None]:
    """Entry by entry, where None is zero."""
    return [add(x, y) for x, y in zip(a, b, strict=True)]
