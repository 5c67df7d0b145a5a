"""Sophia's clipped update on HesScale diagonals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.optim.base import Batch, CurvatureOptimizer, ParamsT, check_options, scalar
from hesscale_fx.optim.lookup import curvature_dtype


class Sophia(CurvatureOptimizer):
    """Sophia (Liu et al. 2023) with a HesScale diagonal instead of an estimated one.

    With gradient g and Hessian diagonal h::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) h                 (where this step has a diagonal)
        p = (1 - lr weight_decay) p - lr clip(m / max(gamma v, eps), -1, 1)

    Where the running diagonal is negative or small the step is lr in the direction of the sign of
    m. A step without a diagonal (plain ``loss.backward()``) goes on with the running one, so it
    may be refreshed every few steps, as in the paper; the first step needs one.

    Args:
        params: parameters, named parameters, or groups of them, as for `torch.optim.Adam`.
        lr: the largest change of an element in one step, in the parameter's unit.
        betas: decay of the running gradient and of the running diagonal.
        gamma: scales the diagonal; the larger, the fewer elements are clipped.
        eps: least denominator, in the diagonal's unit.
        weight_decay: decoupled, as in AdamW.
        maximize: ascend instead; the curvature of the negated loss is ``-h``.
        foreach: update all parameters of one kind together, which is faster on an accelerator and
            takes memory for another copy of them; by default there and not on the CPU.

    Raises:
        InvalidArgumentError: an option is out of range.

    Source:
        Liu, Li, Hall, Liang & Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for
        Language Model Pre-training", 2023, algorithm 3.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Linear(4, 3)
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
        >>> optimizer = hesscale_fx.optim.Sophia(net.parameters(), lr=0.01)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> first = hs.backward(x, y)
        >>> optimizer.step()
        >>> bool(hs(x, y).loss < first)
        True
    """

    _curvature_state = ("exp_hess",)
    _keeps_curvature = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        check_options(lr, betas, eps, weight_decay)
        if not gamma > 0:
            raise InvalidArgumentError(f"gamma must be positive, not {gamma}.")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "gamma": gamma,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def _initial_state(self, p: Tensor) -> dict[str, Tensor]:
        return {
            "exp_avg": torch.zeros_like(p),
            "exp_hess": torch.zeros_like(p, dtype=curvature_dtype(p)),
        }

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        beta1, beta2 = group["betas"]
        lr = scalar(group["lr"])
        exp_avg, exp_hess = batch.state("exp_avg"), batch.state("exp_hess")
        sign = -1.0 if group["maximize"] else 1.0

        if group["weight_decay"] != 0:
            torch._foreach_mul_(batch.params, 1 - lr * group["weight_decay"])
        torch._foreach_mul_(exp_avg, beta1)
        torch._foreach_add_(exp_avg, batch.grads, alpha=sign * (1 - beta1))
        if batch.hess:
            torch._foreach_mul_(exp_hess, beta2)
            torch._foreach_add_(exp_hess, batch.hess, alpha=sign * (1 - beta2))

        denominators = torch._foreach_mul(exp_hess, group["gamma"])
        torch._foreach_clamp_min_(denominators, group["eps"])
        updates = torch._foreach_div(exp_avg, denominators)
        torch._foreach_clamp_min_(updates, -1.0)
        torch._foreach_clamp_max_(updates, 1.0)
        torch._foreach_mul_(updates, -lr)
        torch._foreach_add_(batch.params, updates)
