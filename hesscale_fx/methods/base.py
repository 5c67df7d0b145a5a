"""The interface between the reverse walk and a method."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hesscale_fx.structures import Evaluation

Flow = dict[str, list[Tensor | None]]  # role -> one value for each output of a unit


class Method(Protocol):
    """What flows backwards through the units, role by role.

    A role is the name of one flowing quantity; ``"grad"`` is always the gradient.
    """

    @property
    def name(self) -> str:
        """What `transform` calls it."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The flowing quantities, the gradient first."""

    @property
    def needs_boundary(self) -> bool:
        """Whether the model and the loss are treated differently."""

    def seed(self, loss: Tensor) -> dict[str, Tensor | None]:
        """The values at the loss; None is zero."""

    def pull(self, role: str, at: Evaluation, y: Flow, inside: bool) -> list[Tensor | None]:
        """The values of `role` for each input of a unit; `inside`: before the boundary."""
