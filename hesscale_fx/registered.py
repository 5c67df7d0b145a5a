"""Parameters that a model reaches past its registry: through a list, a closure, another object."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesscale_fx.errors import InvalidModelError


class Registered(TorchFunctionMode):
    """Gives calls the registered parameter instead of the same one found elsewhere.

    A capture puts values of its own in the place of registered parameters alone. One that a
    regularizing loss or a list of the model still holds would be a constant, its gradient lost.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._places = {
            id(p): (owner, name)
            for owner in module.modules()
            for name, p in owner._parameters.items()
            if p is not None
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with what is now registered."""
        args, kwargs = pytree.tree_map_only(nn.Parameter, self._now, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _now(self, parameter: nn.Parameter) -> Any:
        place = self._places.get(id(parameter))
        return parameter if place is None else getattr(*place)


def refuse_computed(value: Any, module: nn.Module) -> None:
    """Refuse a constant of the captured program that was computed from a parameter before.

    Raises:
        InvalidModelError: the parameter's gradient would silently lack this path.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    waiting = [value.grad_fn] if isinstance(value, Tensor) and value.grad_fn is not None else []
    seen = set(waiting)
    while waiting:
        function = waiting.pop()
        name = names.get(id(getattr(function, "variable", None)))
        if name is not None:
            raise InvalidModelError(
                f"The model uses a tensor of shape {list(value.shape)} that was computed from its "
                f"parameter {name.removeprefix('model.')!r} before the call; it would be a constant"
                " here. Compute it in forward(), or detach() it if it is to be constant."
            )
        following = {f for f, _ in function.next_functions if f is not None} - seen
        seen |= following
        waiting += following
