"""The mark between a model and its loss."""

from __future__ import annotations

import torch


@torch.library.custom_op("hesscale_fx::output", mutates_args=())
def _output(z: torch.Tensor) -> torch.Tensor:
    return z.clone()


@_output.register_fake
def _(z: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(z)


_output.register_autograd(lambda ctx, grad: grad)


def output(z: torch.Tensor) -> torch.Tensor:
    """Mark `z` as the output of the model, where the loss begins; the identity otherwise.

    Methods such as ``"hesscale_gn"`` treat the model and the loss differently. The boundary is
    known when `transform` is given a loss; a model that returns its own loss marks it.

    Args:
        z: a floating-point tensor of any shape.

    Returns:
        A tensor equal to `z`.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> class Regression(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(3, 1)
        ...     def forward(self, x, y):
        ...         z = hesscale_fx.output(self.fc(x))
        ...         return ((z - y) ** 2).mean()
        >>> hs = hesscale_fx.transform(Regression(), method="hesscale_gn")
        >>> sorted(hs(torch.ones(2, 3), torch.zeros(2, 1)).hess_diag)
        ['fc.bias', 'fc.weight']
    """
    return _output(z)
