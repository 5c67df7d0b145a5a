"""Step-size scaling: no step further than the running curvature trusts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.optim import Optimizer

from hesscale_fx.accumulate import clear
from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.optim.adahesscale import corrections
from hesscale_fx.optim.base import CurvatureOptimizer
from hesscale_fx.optim.lookup import (
    ByName,
    curvature_dtype,
    find,
    no_curvature,
    parameters,
    restore_curvature,
)


class StepSizeScaling(Optimizer):
    r"""Scale the whole step of any optimizer by its curvature (Elsayed et al. 2024).

    The step u that the wrapped optimizer would make is multiplied by::

        min(max_scale, sqrt(2 delta / sum(h u^2)))

    so that the loss along it changes by no more than about delta to second order. h is the running
    curvature, ``sqrt(v / (1 - beta^t))`` with ``v = beta v + (1 - beta) diag^2``, and the sum runs
    over all parameters. u is all that the optimizer changes, with its weight decay.

    It is an optimizer itself: give it to learning-rate schedulers, step it, save and load it in
    place of the wrapped one, whose groups it shares. A step without a diagonal goes on with the
    running curvature; the first step of a parameter needs one.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        delta: the trust region, in the loss's unit.
        max_scale: the largest factor.
        beta: decay of the running squared diagonal.

    Attributes:
        optimizer: the wrapped optimizer.
        scale: the factor of the last step, a scalar tensor; None before the first.

    Raises:
        InvalidArgumentError: an option is out of range.

    Source:
        Elsayed, Farrahi, Dangel & Mahmood, "Revisiting Scalable Hessian Diagonal Approximations for
        Applications in Reinforcement Learning", 2024.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Linear(4, 3)
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
        >>> adam = torch.optim.Adam(net.parameters(), lr=10.0)
        >>> optimizer = hesscale_fx.optim.StepSizeScaling(adam, delta=1e-4)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> first = hs.backward(x, y)
        >>> optimizer.step()
        >>> bool(optimizer.scale < 0.1), bool(hs(x, y).loss < first)
        (True, True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        delta: float = 1e-8,
        max_scale: float = 1.0,
        beta: float = 0.999,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InvalidArgumentError(
                f"StepSizeScaling wraps an optimizer, not {type(optimizer).__name__}: write "
                "StepSizeScaling(torch.optim.Adam(net.parameters()))."
            )
        if not (delta > 0 and max_scale > 0 and 0 <= beta < 1):
            raise InvalidArgumentError(
                "delta and max_scale must be positive and beta at least 0 and less than 1, not "
                f"delta={delta}, max_scale={max_scale}, beta={beta}."
            )
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.delta, self.max_scale, self.beta = delta, max_scale, beta
        self.scale: Tensor | None = None
        self._share()

    def _share(self) -> None:
        self.param_groups = self.optimizer.param_groups
        self.defaults = self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`."""
        if "optimizer" in self.__dict__:
            self.optimizer.add_param_group(param_group)
        else:  # of the constructor, whose groups are the wrapped optimizer's already
            super().add_param_group(param_group)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, hess_diag: ByName = None, **kwargs: Any
    ) -> Any:
        """Make the wrapped optimizer's step, scaled.

        Args:
            closure: evaluates the loss again, fills gradients and diagonals, and returns the loss.
            hess_diag: Hessian diagonals by parameter name, or in the order of the parameters; by
                default those in ``p.hesscale``.
            **kwargs: for the wrapped optimizer's step.

        Returns:
            What the wrapped optimizer's step returned.

        Raises:
            HesScaleError: a parameter has a gradient and never had a diagonal, or one that is
                sparse or of another shape, or the names do not fit.
        """
        self._share()
        if isinstance(self.optimizer, CurvatureOptimizer):
            kwargs["hess_diag"] = hess_diag
        if closure is None:  # refuse before anything has moved
            moving = self._advance(hess_diag, kwargs.get("grads"))
        before = [p.clone() for _, p in parameters(self.param_groups)]
        loss = self.optimizer.step(closure, **kwargs)
        if closure is not None:
            moving = self._advance(hess_diag, kwargs.get("grads"))
        pairs = [
            (b, p)
            for b, (_, p), moves in zip(before, parameters(self.param_groups), moving, strict=True)
            if moves
        ]
        if pairs:
            states = [self.state[p] for _, p in pairs]
            bias = corrections([state["step"] for state in states], self.beta)
            running = [state["exp_hess_sq"] for state in states]
            self.scale = rescale(pairs, running, bias, self.delta, self.max_scale)
        return loss

    def _advance(self, hess_diag: ByName, grads: ByName) -> list[bool]:
        """Update the running curvature; tell which parameters move."""
        groups = self.param_groups
        found = find(groups, hess_diag, "hess_diag")
        moving = [grad is not None for grad in find(groups, grads, "grads")]
        for (name, p), diag, moves in zip(parameters(groups), found, moving, strict=True):
            if moves and diag is None and not self.state.get(p):
                raise no_curvature(name)
        pairs = [
            (p, diag)
            for (_, p), diag, moves in zip(parameters(groups), found, moving, strict=True)
            if moves and diag is not None
        ]
        if not all(self.state.get(p) for p, _ in pairs):
            self._initialise([p for p, _ in pairs])
        for p, diag in pairs:
            state, diag = self.state[p], diag.to(curvature_dtype(p))
            state["step"] += 1
            state["exp_hess_sq"].mul_(self.beta).addcmul_(diag, diag, value=1 - self.beta)
        return moving

    @torch.compiler.disable
    def _initialise(self, moving: list[Tensor]) -> None:
        """Not part of a compiled graph, which would keep its first call."""
        for p in moving:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float64, device="cpu")
                self.state[p]["exp_hess_sq"] = torch.zeros_like(p, dtype=curvature_dtype(p))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and ``.hesscale`` of the parameters."""
        self.optimizer.zero_grad(set_to_none)
        clear((p for _, p in parameters(self.param_groups)), set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The running curvature, and under ``"optimizer"`` the state of the wrapped optimizer."""
        self._share()
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, of any dtype and device."""
        own = pytree.tree_map_only(Tensor, torch.clone, state_dict)
        self.optimizer.load_state_dict(own.pop("optimizer"))
        super().load_state_dict(own)
        self._share()
        restore_curvature(self, own, ("exp_hess_sq",))

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles: torch's own leaves out what it does not know."""
        own = {key: self.__dict__[key] for key in ("optimizer", "delta", "max_scale", "beta")}
        return {**super().__getstate__(), **own, "scale": self.scale}


def rescale(
    pairs: list[tuple[Tensor, Tensor]],
    running: list[Tensor],
    bias: list[Any],
    delta: float,
    max_scale: float,
) -> Tensor:
    """Shorten the step from the first to the second of each pair, and return the factor.

    A function, for what a compiled method sets on its object is lost where torch's own step breaks
    the graph (torch 2.13).
    """
    changes = []
    for (b, p), v in zip(pairs, running, strict=True):
        u, root = p - b, v.sqrt()
        changes.append(root.mul_(u).mul_(u).sum().to(pairs[0][1].device, torch.float64))
    total = sum(change / c**0.5 for change, c in zip(changes, bias, strict=True))
    scale = (2 * delta / total).sqrt().clamp(max=max_scale)
    for b, p in pairs:
        # b + scale (p - b), and p itself, to the last digit, at scale 1.
        p.copy_(b.lerp_(p, scale.to(p.device, p.dtype)))
    return scale
