"""Hessian diagonals for what others have written, and three quantities made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hesscale_fx.errors import MissingPackageError, UnknownNameError
from hesscale_fx.optim.lookup import ByName, find, no_curvature, parameters

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def hessian_list(optimizer: Optimizer, hess_diag: ByName = None) -> list[Tensor]:
    """The diagonals as ``step(hessian=[...])`` of pytorch_optimizer's optimizers takes them.

    Args:
        optimizer: pytorch_optimizer's AdaHessian, SophiaH, or another one with such a step.
        hess_diag: by parameter name, if the optimizer was built from ``net.named_parameters()``; by
            default what `hs.backward` has left in ``p.hesscale``.

    Returns:
        One tensor for each parameter, of its shape and dtype, in the order of the groups; zeros
        for those without a gradient, which such a step passes over.

    Raises:
        HesScaleError: a parameter has a gradient and no diagonal, or the names do not fit.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> from pytorch_optimizer import AdaHessian
        >>> net = nn.Linear(4, 3)
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss())
        >>> optimizer = AdaHessian(net.parameters(), lr=0.01)
        >>> _ = hs.backward(torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0]))
        >>> _ = optimizer.step(hessian=hesscale_fx.optim.adapters.hessian_list(optimizer))
        >>> hs.zero_grad()  # clears p.grad and p.hesscale; the optimizer's clears only p.grad
    """
    groups = optimizer.param_groups
    found: list[Tensor] = []
    for (name, p), h in zip(parameters(groups), find(groups, hess_diag, "hess_diag"), strict=True):
        if h is None and p.grad is not None:
            raise no_curvature(name)
        found.append(torch.zeros_like(p) if h is None else h.to(p.dtype))
    return found


@functools.cache
def laplace_backend(method: str = "hesscale_gn") -> type:
    """A curvature backend for the diagonal Laplace approximations of laplace-torch.

    Args:
        method: of `hesscale_fx.transform`; one whose diagonal is not negative.

    Returns:
        A subclass of ``laplace.curvature.GGNInterface``, for ``Laplace(..., backend=)`` with all
        weights, the last layer or a subnetwork. Only the diagonal is computed here.

    Raises:
        MissingPackageError: laplace-torch is not installed.

    Source:
        Daxberger et al., "Laplace Redux", 2021.

    Example::

        from laplace import Laplace
        from hesscale_fx.optim.adapters import laplace_backend

        la = Laplace(
            net, "classification", "all", hessian_structure="diag", backend=laplace_backend()
        )
        la.fit(train_loader)
    """
    try:
        from laplace.curvature import GGNInterface
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "laplace_backend needs laplace-torch: pip install 'hesscale_fx[adapters]'."
        ) from error
    from hesscale_fx.api import transform

    class HesScaleBackend(GGNInterface):
        """Diagonals by one backward pass instead of a Jacobian for each sample."""

        @functools.cached_property
        def _transformed(self) -> Any:
            return transform(
                self._model, self.lossfunc, method=method, wrt=lambda _, p: p.requires_grad
            )

        def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """The negative log-likelihood of a batch and the diagonal of its Hessian, flat."""
            if self.last_layer:  # its input is all that the rest of the model is needed for
                features: Any = self.model
                with torch.no_grad():
                    _, x = features.forward_with_features(x)
            loss, _, hess_diag = self._transformed(x, y)
            flat = torch.cat([hess_diag[name].flatten() for name in self.params_dict])
            if self.subnetwork_indices is not None:
                flat = flat[self.subnetwork_indices]
            return self.factor * loss, self.factor * flat.to(self.params[0].dtype)

    return HesScaleBackend


def _pairs(named: Named, hess_diag: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> parameter and diagonal, of all that have a diagonal."""
    known = dict(named)
    unknown = [name for name in hess_diag if name not in known]
    if unknown:
        raise UnknownNameError(
            f"There is a diagonal and no parameter of the name {unknown[0]!r}. Pass the "
            "named_parameters() of the model that was transformed."
        )
    return {name: (known[name].detach(), h) for name, h in hess_diag.items()}


def saliency(parameters: Named, hess_diag: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Optimal Brain Damage's saliency: the rise of the loss when an element is set to 0.

    To second order and at a minimum, where the gradient is 0. Prune the smallest.

    Args:
        parameters: ``net.named_parameters()``.
        hess_diag: parameter name -> Hessian diagonal.

    Returns:
        Parameter name -> ``h p^2 / 2``, of the parameter's shape, in the loss's unit.

    Raises:
        UnknownNameError: a diagonal belongs to none of the parameters.

    Source:
        LeCun, Denker & Solla, "Optimal Brain Damage", 1989.

    Example:
        >>> import torch
        >>> p, h = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 3.0])
        >>> saliency({"w": p}, {"w": h})
        {'w': tensor([2., 6.])}
    """
    return {name: h * p.square() / 2 for name, (p, h) in _pairs(parameters, hess_diag).items()}


def utility(
    parameters: Named, grads: Mapping[str, Tensor], hess_diag: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """UPGD's second-order utility: the rise of the loss when an element is set to 0.

    Args:
        parameters: ``net.named_parameters()``.
        grads: parameter name -> gradient.
        hess_diag: parameter name -> Hessian diagonal.

    Returns:
        Parameter name -> ``h p^2 / 2 - g p``, of the parameter's shape, in the loss's unit.

    Raises:
        UnknownNameError: a diagonal belongs to none of the parameters.

    Source:
        Elsayed & Mahmood, "Addressing Loss of Plasticity and Catastrophic Forgetting in Continual
        Learning" (UPGD), 2024.

    Example:
        >>> import torch
        >>> p, g, h = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0]), torch.tensor([4.0, 3.0])
        >>> utility({"w": p}, {"w": g}, {"w": h})
        {'w': tensor([1., 8.])}
    """
    pairs = _pairs(parameters, hess_diag)
    return {name: h * p.square() / 2 - grads[name] * p for name, (p, h) in pairs.items()}


def rounding_sensitivity(
    parameters: Named,
    hess_diag: Mapping[str, Tensor],
    rounding: torch.dtype | Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """How much the loss minds each tensor's rounding: give the most sensitive most bits.

    Args:
        parameters: ``net.named_parameters()``.
        hess_diag: parameter name -> Hessian diagonal.
        rounding: a dtype to round to, or a function from a tensor to its rounded values, e.g. a
            fake quantizer.

    Returns:
        Parameter name -> ``sum(h (p - rounded p)^2)``, in the loss's unit, twice the expected rise
        of the loss to second order.

    Raises:
        UnknownNameError: a diagonal belongs to none of the parameters.

    Source:
        Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", 2020,
        with the diagonal itself in place of its mean over a tensor.

    Example:
        >>> import torch
        >>> p, h = torch.tensor([1.25, -2.0]), torch.tensor([4.0, 3.0])
        >>> rounding_sensitivity({"w": p}, {"w": h}, torch.round)
        {'w': 0.25}
    """

    def rounded(p: Tensor) -> Tensor:
        return p.to(rounding) if isinstance(rounding, torch.dtype) else rounding(p)

    return {
        name: (h * (p.to(h.dtype) - rounded(p).to(h.dtype)).square()).sum().item()
        for name, (p, h) in _pairs(parameters, hess_diag).items()
    }
