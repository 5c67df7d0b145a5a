"""Find each parameter's gradient and diagonal: on the parameter, or in a result by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hesscale_fx.errors import CallError, CallTypeError, InvalidArgumentError, UnknownNameError

ByName = Mapping[str, Tensor] | Sequence[Tensor | None] | None
ATTRIBUTE = {"grads": "grad", "hess_diag": "hesscale"}


def curvature_dtype(parameter: Tensor) -> torch.dtype:
    """That of a diagonal: float32 for parameters of lower precision."""
    return torch.promote_types(parameter.dtype, torch.float32)


def parameters(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """What to call each parameter in a message, and the parameter, in the order of the groups."""
    for g, group in enumerate(groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            yield names[i] if names else f"parameter {i} of group {g}", p


def find(groups: list[dict[str, Any]], given: ByName, what: str) -> list[Tensor | None]:
    """The gradient or diagonal of each parameter, in the order of the groups.

    Args:
        groups: an optimizer's ``param_groups``.
        given: a mapping by parameter name, a sequence in the order of the groups, or None for what
            `hs.backward` has left on the parameters.
        what: ``"grads"`` or ``"hess_diag"``.

    Raises:
        HesScaleError: names are unknown, or a tensor is sparse or of another shape.
    """
    if given is None:
        found = [getattr(p, ATTRIBUTE[what], None) for _, p in parameters(groups)]
    elif isinstance(given, Mapping):
        found = _by_name(groups, given, what)
    else:
        found = list(given)
        count = sum(len(group["params"]) for group in groups)
        if len(found) != count:
            raise CallError(f"{what} has {len(found)} tensors for {count} parameters.")
    for (name, p), value in zip(parameters(groups), found, strict=True):
        if value is not None:
            _check(name, p, value, what)
    return found


def _by_name(groups: list[dict[str, Any]], given: Mapping[str, Tensor], what: str) -> list:
    if not all("param_names" in group for group in groups):
        raise InvalidArgumentError(
            f"{what} is by name, and this optimizer does not know the names of its parameters. "
            "Build it from net.named_parameters() instead of net.parameters()."
        )
    names = [name for name, _ in parameters(groups)]
    if given and not any(name in given for name in names):
        raise UnknownNameError(
            f"None of the names in {what} ({', '.join(list(given)[:3])}, ...) is one of the "
            f"optimizer's ({', '.join(names[:3])}, ...). Build it from the named_parameters() of "
            "the model that was transformed."
        )
    return [given.get(name) for name in names]


def _check(name: str, parameter: Tensor, value: Tensor, what: str) -> None:
    if value.layout != torch.strided:
        raise CallTypeError(
            f"The {ATTRIBUTE[what]} of {name!r} is sparse, and its curvature is dense. Use "
            "sparse=False in the embedding, or give that parameter to an optimizer of its own, "
            "such as torch.optim.SparseAdam."
        )
    if value.shape != parameter.shape:
        raise CallError(
            f"The {ATTRIBUTE[what]} of {name!r} has shape {list(value.shape)}, the parameter "
            f"{list(parameter.shape)}."
        )


def no_curvature(name: str) -> CallError:
    """The error for a parameter with a gradient and no diagonal."""
    return CallError(
        f"{name!r} has a gradient and no Hessian diagonal. Fill both with hs.backward(...), pass "
        "hess_diag=out.hess_diag, select it with wrt=... of transform, or leave the parameter to "
        "another optimizer."
    )


def restore_curvature(
    optimizer: Optimizer, state_dict: dict[str, Any], keys: tuple[str, ...]
) -> None:
    """Load curvature in the dtype of diagonals.

    `Optimizer.load_state_dict` casts state to the parameter's dtype, and squares of a diagonal
    need more range than those of lower precision have.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for index, (_, p) in zip(saved, parameters(optimizer.param_groups), strict=True):
        for key in keys:
            if key in state_dict["state"].get(index, {}):
                value = state_dict["state"][index][key]
                optimizer.state[p][key] = value.to(p.device, curvature_dtype(p))
