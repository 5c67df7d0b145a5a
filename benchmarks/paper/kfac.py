"""The diagonal of KFAC, for networks of linear layers under the mean cross-entropy.

For a layer with inputs a and outputs z the Gauss-Newton block is ``E[a a^T (x) g g^T]``, over
samples and over gradients g whose mean square is the Hessian of the loss. KFAC puts the product of
the means in place of the mean of the product (Martens & Grosse 2015, "Optimizing Neural Networks
with Kronecker-factored Approximate Curvature"); its diagonal is ``E[a^2] E[g^2]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def diagonal(net: nn.Module, x: Tensor, columns: int | None = None) -> dict[str, Tensor]:
    """KFAC's diagonal for every linear layer.

    Args:
        net: its parameters are those of its `nn.Linear`s, each used once.
        x: inputs, of shape (batch, features).
        columns: how many labels are sampled from the model's distribution for each input; by
            default all columns of the root of the loss's Hessian, which has no noise and costs one
            backward pass for each class.

    Returns:
        Parameter name -> diagonal, of the parameter's shape.
    """
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, z, n=name: seen.update({n: (a[0].detach(), z)}))
        for name, layer in layers.items()
    ]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    outputs = [seen[name][1] for name in layers]
    squares = [torch.zeros_like(z[0]) for z in outputs]
    roots = root(logits.detach()) if columns is None else sampled(logits.detach(), columns)
    for column in roots:
        grads = torch.autograd.grad(logits, outputs, column, retain_graph=True)
        for total, g in zip(squares, grads, strict=True):
            total += g.square().mean(0)
    found = {}
    for (name, layer), g in zip(layers.items(), squares, strict=True):
        found[f"{name}.weight"] = torch.outer(g, seen[name][0].square().mean(0))
        if layer.bias is not None:
            found[f"{name}.bias"] = g
    return found


def root(logits: Tensor) -> list[Tensor]:
    """Columns of ``diag(sqrt p) - p sqrt(p)^T``, whose square is ``diag(p) - p p^T``."""
    p = logits.softmax(1)
    s = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    return list(s.unbind(2))


def sampled(logits: Tensor, columns: int) -> list[Tensor]:
    """Gradients for labels drawn from the model, divided by the root of their number."""
    p = logits.softmax(1)
    labels = torch.multinomial(p, columns, replacement=True)
    one_hot = nn.functional.one_hot(labels, p.shape[1])
    return list(((p.unsqueeze(1) - one_hot) / columns**0.5).unbind(1))
