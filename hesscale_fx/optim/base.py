"""What the optimizers here share: where their inputs come from, their groups and their state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from hesscale_fx.accumulate import clear
from hesscale_fx.errors import InvalidArgumentError, InvalidModelError
from hesscale_fx.optim.lookup import (
    ByName,
    curvature_dtype,
    find,
    no_curvature,
    parameters,
    restore_curvature,
)


@dataclass
class Batch:
    """Parameters that one update treats together, with what belongs to each.

    Either all have a new diagonal or none has, and `hess` is empty.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    hess: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, p: Tensor, grad: Tensor, hess: Tensor | None, state: dict[str, Tensor]) -> None:
        """Append one parameter."""
        self.params.append(p)
        self.grads.append(grad)
        if hess is not None:
            self.hess.append(hess)
        self.states.append(state)

    def state(self, name: str) -> list[Tensor]:
        """One entry of every parameter's state."""
        return [state[name] for state in self.states]


class CurvatureOptimizer(Optimizer):
    """Base class: a `torch.optim.Optimizer` whose update also reads a Hessian diagonal.

    A subclass names its state in `_initial_state` and `_curvature_state` and moves one `Batch` in
    `_update`. The diagonal has the parameter's shape and the unit loss / parameter^2.
    """

    _curvature_state: tuple[str, ...] = ()  # kept in float32 for parameters of lower precision
    _keeps_curvature = False  # a step without a new diagonal goes on with the running one

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`; refuses complex parameters."""
        super().add_param_group(param_group)
        for name, p in parameters(self.param_groups):
            if p.is_complex():
                raise InvalidModelError(
                    f"{name!r} is complex; a Hessian diagonal is defined for real parameters only."
                )

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: ByName = None,
        hess_diag: ByName = None,
    ) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the loss again, fills gradients and diagonals, and returns the loss.
            grads: gradients by parameter name, as in a `Result`; by default those in ``p.grad``.
            hess_diag: Hessian diagonals by parameter name; by default those in ``p.hesscale``.
                By name, the optimizer must have been built from ``net.named_parameters()``; a
                sequence in the order of the parameters needs no names.

        Returns:
            What the closure returned, or None.

        Raises:
            HesScaleError: a parameter has a gradient and no diagonal, or one that is sparse or of
                another shape, or the names do not fit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        all_grads, all_hess = find(groups, grads, "grads"), find(groups, hess_diag, "hess_diag")
        moving = [
            (name, p, h)
            for (name, p), grad, h in zip(parameters(groups), all_grads, all_hess, strict=True)
            if grad is not None
        ]
        for name, p, h in moving:
            if h is None and not (self._keeps_curvature and self.state.get(p)):
                raise no_curvature(name)
        if not all(self.state.get(p) for _, p, _ in moving):
            self._initialise([p for _, p, _ in moving])
        start = 0
        for group in groups:
            part = slice(start, start := start + len(group["params"]))
            for batch in self._batches(group, all_grads[part], all_hess[part]):
                self._update(group, batch)
        return loss

    def _batches(
        self, group: dict[str, Any], grads: list[Tensor | None], hess: list[Tensor | None]
    ) -> list[Batch]:
        """The group's parameters that have a gradient: one by one, or together by kind."""
        batches: dict[Any, Batch] = {}
        for i, (p, grad, h) in enumerate(zip(group["params"], grads, hess, strict=True)):
            if grad is None:
                continue
            foreach = group["foreach"]
            if foreach is None:
                foreach = p.device.type != "cpu"  # there it would only cost cache
            # The compiler fuses as it likes, and foreach kernels want one kind of tensor.
            together = foreach or torch.compiler.is_compiling()
            key = (p.device, p.dtype, h is None) if together else i
            if h is not None:
                h = h.to(curvature_dtype(p))
            batches.setdefault(key, Batch()).add(p, grad, h, self.state[p])
        return list(batches.values())

    @torch.compiler.disable
    def _initialise(self, moving: list[Tensor]) -> None:
        """Not part of a compiled graph, which would keep its first call."""
        for p in moving:
            if not self.state[p]:
                self.state[p].update(self._initial_state(p))

    def _initial_state(self, p: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and ``.hesscale`` of the parameters."""
        super().zero_grad(set_to_none)
        clear((p for _, p in parameters(self.param_groups)), set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another optimizer, in memory of its own.

        Args:
            state_dict: what `state_dict` returned; of any dtype and device.
        """
        state_dict = pytree.tree_map_only(Tensor, torch.clone, state_dict)
        super().load_state_dict(state_dict)
        restore_curvature(self, state_dict, self._curvature_state)


def check_options(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Refuse what torch's own optimizers refuse."""
    if not lr >= 0:
        raise InvalidArgumentError(f"lr must not be negative, not {lr}.")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise InvalidArgumentError(f"lr must have one element, not shape {list(lr.shape)}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise InvalidArgumentError(f"betas must be at least 0 and less than 1, not {betas}.")
    if not eps >= 0:
        raise InvalidArgumentError(f"eps must not be negative, not {eps}.")
    if not weight_decay >= 0:
        raise InvalidArgumentError(f"weight_decay must not be negative, not {weight_decay}.")


def scalar(value: float | Tensor) -> Any:
    """A number; in a compiled graph a tensor, or it would be made again for every value."""
    if not torch.compiler.is_compiling():
        return float(value)
    if isinstance(value, Tensor):
        return value
    return torch.ones((), dtype=torch.float64, device="cpu") * value


__all__ = ["Batch", "CurvatureOptimizer", "ParamsT", "check_options", "scalar"]
