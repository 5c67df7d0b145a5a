"""Step-size scaling: no step further than the running curvature trusts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

PIECE = 1 << 17  # elements


class StepSizeScaling(Optimizer):
    r"""Scale the whole step of any optimizer by its curvature (Elsayed et al. 2024).

    The step u that the wrapped optimizer would make is multiplied by::

        min(max_scale, sqrt(2 delta / sum(h u^2)))

    so that the loss along it changes by no more than about delta to second order. h is the running
    curvature, ``sqrt(v / (1 - beta^t))`` with ``v = beta v + (1 - beta) diag^2``, and the sum runs
    over all parameters. u is all that the optimizer changes, with its weight decay.

    It is an optimizer itself: give it to learning-rate schedulers, step it, save and load it in
    place of the wrapped one, whose groups it shares. A step without a diagonal goes on with the
    running curvature; the first step of a parameter needs one. On the CPU it keeps memory for
    another copy of the parameters, and its step compiles to several graphs.

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
        self._before: dict[Tensor, Tensor] = {}
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
        cpu = any(p.device.type == "cpu" for g in self.param_groups for p in g["params"])
        if closure is None:  # refuse before anything has moved
            begin = self._begin_apart if cpu else self._begin
            moving, fresh, before = begin(hess_diag, kwargs.get("grads"))
            self._advance(fresh)
            loss = self.optimizer.step(**kwargs)
        else:
            everything = [p for _, p in parameters(self.param_groups)]
            remember = self._copy_apart if cpu else self._copy
            values = dict(zip(everything, remember(everything), strict=True))
            loss = self.optimizer.step(closure, **kwargs)
            moving, fresh = self._moving(hess_diag, kwargs.get("grads"))
            before = [values[p] for p in moving]
            self._advance(fresh)
        if moving:
            states = [self.state[p] for p in moving]
            running = [state["exp_hess_sq"] for state in states]
            bias = corrections([state["step"] for state in states], self.beta)
            self.scale = rescale(moving, before, running, bias, self.delta, self.max_scale)
        return loss

    def _moving(
        self, hess_diag: ByName, grads: ByName
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The parameters that move, and those of them that have a new diagonal, with it."""
        groups = self.param_groups
        found, given = find(groups, hess_diag, "hess_diag"), find(groups, grads, "grads")
        moving, fresh = [], []
        for (name, p), diag, grad in zip(parameters(groups), found, given, strict=True):
            if grad is None:
                continue
            if diag is not None:
                fresh.append((p, diag))
            elif not self.state.get(p):
                raise no_curvature(name)
            moving.append(p)
        if not all(self.state.get(p) for p in moving):
            self._initialise(moving)
        return moving, fresh

    @torch.compiler.disable
    def _initialise(self, moving: list[Tensor]) -> None:
        """Not part of a compiled graph, which would keep its first call."""
        for p in moving:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float64, device="cpu")
                self.state[p]["exp_hess_sq"] = torch.zeros_like(p, dtype=curvature_dtype(p))

    def _begin(
        self, hess_diag: ByName, grads: ByName
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[Tensor]]:
        """All that can be refused; what moves, and its values before."""
        moving, fresh = self._moving(hess_diag, grads)
        return moving, fresh, self._copy(moving)

    def _copy(self, params: list[Tensor]) -> list[Tensor]:
        """On the CPU into memory that is kept: to touch new pages costs more than to write them."""
        values = []
        for p in params:
            if p.device.type != "cpu":
                values.append(p.clone())
                continue
            kept = self._before.get(p)
            if kept is None or kept.shape != p.shape or kept.dtype != p.dtype:
                kept = self._before[p] = torch.empty_like(p)
            values.append(kept.copy_(p))
        return values

    # On the CPU not part of a compiled graph that writes the parameters too: Inductor (torch 2.13)
    # may put such a copy after the writing. And what comes before and what after is then compiled
    # apart, which is faster there than one loop that updates and sums.
    _begin_apart = torch.compiler.disable(_begin)
    _copy_apart = torch.compiler.disable(_copy)

    def _advance(self, fresh: list[tuple[Tensor, Tensor]]) -> None:
        """Update the running curvature."""
        states = [self.state[p] for p, _ in fresh]
        running, steps = [s["exp_hess_sq"] for s in states], [s["step"] for s in states]
        if fresh:
            advance(running, steps, [diag for _, diag in fresh], self.beta)

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
        return {**super().__getstate__(), **own, "scale": self.scale, "_before": {}}


def advance(running: list[Tensor], steps: list[Tensor], diags: list[Tensor], beta: float) -> None:
    """The running square of the diagonal, in place."""
    torch._foreach_add_(steps, 1.0)
    for v, diag in zip(running, diags, strict=True):
        for part, h in pieces(v, diag):
            h = h.to(part.dtype)
            torch._foreach_mul_([part], beta)
            torch._foreach_addcmul_([part], [h], [h], 1 - beta)


def rescale(
    params: list[Tensor],
    before: list[Tensor],
    running: list[Tensor],
    bias: list[Any],
    delta: float,
    max_scale: float,
) -> Tensor:
    """Shorten the step that was made, and return the factor."""
    triples = zip(params, before, running, strict=True)
    changes = [change(*triple).to(params[0].device) for triple in triples]
    total = sum(one / c**0.5 for one, c in zip(changes, bias, strict=True))
    scale = (2 * delta / total).sqrt().clamp(max=max_scale)
    for p, b in zip(params, before, strict=True):
        # b + scale (p - b), and p itself, to the last digit, at scale 1.
        torch.lerp(b, p, scale.to(p.device, p.dtype), out=p)
    return scale


def change(p: Tensor, before: Tensor, v: Tensor) -> Tensor:
    """``sum(sqrt(v) (p - before)^2)``, in float64."""
    if not in_pieces(p):
        u, root = p - before, v.sqrt()
        return root.mul_(u).mul_(u).sum().double()
    sums, room = [], None
    for new, old, sq in pieces(p, before, v):
        room = room or (torch.empty_like(new), torch.empty_like(sq))
        u = torch.sub(new, old, out=room[0][: len(new)])
        root = torch.sqrt(sq, out=room[1][: len(new)])
        sums.append(root.mul_(u).mul_(u).sum())
    return torch.stack(sums).sum(dtype=torch.float64)


def in_pieces(p: Tensor) -> bool:
    """Whether to let each operator in turn go over a piece that stays in the cache.

    The compiler needs no such help, and an accelerator would lose by it.
    """
    compiling = torch.compiler.is_compiling()
    return not compiling and p.device.type == "cpu" and p.numel() > 2 * PIECE


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Along the first dimension."""
    first = tensors[0]
    if not in_pieces(first):
        return iter([tensors])
    rows = max(1, PIECE * len(first) // first.numel())
    return zip(*(t.split(rows) for t in tensors), strict=True)
