"""AdaHesScale: Adam with the Hessian diagonal in place of the gradient under the root."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscale_fx.optim.base import Batch, CurvatureOptimizer, ParamsT, check_options, scalar
from hesscale_fx.optim.lookup import curvature_dtype


class AdaHesScale(CurvatureOptimizer):
    r"""AdaHesScale (Elsayed & Mahmood 2022; Elsayed et al. 2024).

    With gradient g and Hessian diagonal h::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) h^2
        p = (1 - lr weight_decay) p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: parameters, named parameters, or groups of them, as for `torch.optim.Adam`.
        lr: step size; unlike Adam's it has no unit: the update is a damped Newton step.
        betas: decay of the running gradient and of the running squared diagonal.
        eps: added to the root, in the diagonal's unit.
        weight_decay: decoupled, as in AdamW.
        maximize: ascend instead.
        foreach: update all parameters of one kind together, which is faster on an accelerator and
            takes memory for another copy of them; by default there and not on the CPU.

    Raises:
        InvalidArgumentError: an option is out of range.

    Source:
        Elsayed & Mahmood, "HesScale: Scalable Computation of Hessian Diagonals", 2022; Elsayed,
        Farrahi, Dangel & Mahmood, "Revisiting Scalable Hessian Diagonal Approximations for
        Applications in Reinforcement Learning", 2024.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Linear(4, 3)
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
        >>> optimizer = hesscale_fx.optim.AdaHesScale(net.parameters(), lr=0.01)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> first = hs.backward(x, y)
        >>> optimizer.step()
        >>> optimizer.zero_grad()  # clears p.grad and p.hesscale
        >>> bool(hs(x, y).loss < first)
        True
    """

    _curvature_state = ("exp_hess_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        check_options(lr, betas, eps, weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def _initial_state(self, p: Tensor) -> dict[str, Tensor]:
        return {
            # In float64, for 1 - beta^t of the first steps; on the CPU, where reading it is free.
            "step": torch.zeros((), dtype=torch.float64, device="cpu"),
            "exp_avg": torch.zeros_like(p),
            "exp_hess_sq": torch.zeros_like(p, dtype=curvature_dtype(p)),
        }

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        beta1, beta2 = group["betas"]
        lr = scalar(group["lr"])
        steps, exp_avg = batch.state("step"), batch.state("exp_avg")
        exp_hess_sq = batch.state("exp_hess_sq")
        sign = -1.0 if group["maximize"] else 1.0  # of g; h is squared

        torch._foreach_add_(steps, 1.0)
        if group["weight_decay"] != 0:
            torch._foreach_mul_(batch.params, 1 - lr * group["weight_decay"])
        torch._foreach_mul_(exp_avg, beta1)
        torch._foreach_add_(exp_avg, batch.grads, alpha=sign * (1 - beta1))
        torch._foreach_mul_(exp_hess_sq, beta2)
        torch._foreach_addcmul_(exp_hess_sq, batch.hess, batch.hess, 1 - beta2)

        correction1, correction2 = corrections(steps, beta1), corrections(steps, beta2)
        sizes = [-lr / c for c in correction1]
        denominators = torch._foreach_sqrt(exp_hess_sq)
        torch._foreach_div_(denominators, [c**0.5 for c in correction2])
        torch._foreach_add_(denominators, group["eps"])
        if torch.compiler.is_compiling():  # the sizes are tensors, which addcdiv does not take
            updates = torch._foreach_div(exp_avg, denominators)
            torch._foreach_mul_(updates, sizes)
            torch._foreach_add_(batch.params, updates)
        else:
            torch._foreach_addcdiv_(batch.params, exp_avg, denominators, sizes)


def corrections(steps: list[Tensor], beta: float) -> list[Any]:
    """``1 - beta^t`` of each; in a compiled graph as tensors."""
    if not torch.compiler.is_compiling():
        return [1 - beta ** step.item() for step in steps]
    # Inductor would put a power into the loop over the elements, but an exponential that many
    # read it computes once.
    power = torch.exp(torch.stack(steps) * math.log(beta)) if beta else 0 * torch.stack(steps)
    return list((1 - power).unbind())


class AdaHesScaleGN(AdaHesScale):
    """AdaHesScaleGN (Elsayed & Mahmood 2022): the same update with the Gauss-Newton diagonal.

    The diagonal is what ``transform(..., method="hesscale_gn")`` computes; options as for
    `AdaHesScale`.
    """
