"""What is known of the Hessian of the loss at the model's output, and how to take its root.

Three cases, the first that holds:

- diagonal: no two entries of the output have a common second derivative (mean squared error, binary
  cross-entropy, Poisson, ...); its root is that of the diagonal, which the recursion has there.
- root: all of the loss is linear but for one log-softmax (cross-entropy with weights, ignored
  targets, smoothing, over any dimension); the root is known in closed form.
- full: anything else, from the Hessian of each sample by its eigenvectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.analysis.exactness import Slot, State
from hesscale_fx.analysis.signs import is_convex
from hesscale_fx.analysis.units import Partition, Unit
from hesscale_fx.errors import InvalidArgumentError
from hesscale_fx.evaluate import Native
from hesscale_fx.recompute import Recomputed, reached
from hesscale_fx.structures.base import several
from hesscale_fx.structures.closed import CLOSED, LogSoftmax


@dataclass
class LossRoot:
    """The loss seen from the model's output."""

    node: fx.Node  # the output
    slot: Slot  # where its columns start
    kind: str  # "diagonal", "root" or "full"
    coupled: tuple[int, ...]  # dimensions along which the Hessian is not diagonal
    root: Unit | None  # the unit of the log-softmax
    again: Recomputed  # what the loss computes from the output
    loss: fx.Node
    convex: bool = False  # surely, so that there is no negative part

    def describe(self) -> str:
        """How columns come from it, for a report."""
        way = {
            "diagonal": "its Hessian at the output is diagonal",
            "root": "the root of its Hessian at the output in closed form",
            "full": "its Hessian at the output split by eigenvectors in each sample",
        }[self.kind]
        if self.convex:
            return f"{way}; convex"
        return f"{way}; a negative part is left to the recursion, see hs.loss_curvature"

    def hessian(self, z: Tensor, entering: list[Tensor], output: Any) -> Tensor:
        """The Hessian of the loss for each sample, (samples, n, n)."""
        from hesscale_fx.methods.columns import flatten, unflatten

        known = dict(zip(self.again.entering, entering, strict=False))
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.again.run({**known, self.node: leaf}, self.loss)
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        samples, n = flatten(z, output).shape
        eye = torch.eye(n, dtype=z.dtype, device=z.device).unsqueeze(1).expand(n, samples, n)
        if not grad.requires_grad:
            return torch.zeros_like(eye).movedim(0, 1)
        tangents = unflatten_all(eye, z, output, unflatten)

        def pull(one: Any) -> Any:
            return torch.autograd.grad(grad, leaf, one[0], True, allow_unused=True)

        (rows,) = several(pull, [tangents])
        if rows is None:
            return torch.zeros_like(eye).movedim(0, 1)
        found = torch.vmap(lambda r: flatten(r, output))(rows).movedim(0, 1)
        return 0.5 * (found + found.transpose(1, 2))


def unflatten_all(eye: Tensor, z: Tensor, output: Any, unflatten: Any) -> Tensor:
    """Each tangent in the shape of z."""
    return torch.vmap(lambda e: unflatten(e, z, output))(eye)


def loss_root_of(
    graph: fx.Graph,
    units: list[Unit],
    partition: Partition,
    states: Mapping[Slot, State],
    native: Native,
    boundary: list[fx.Node],
    loss: fx.Node,
    what: str,
) -> LossRoot:
    """Look at the loss.

    Raises:
        InvalidArgumentError: the model has several outputs.
    """
    if len(boundary) != 1:
        raise InvalidArgumentError(
            f"{what} needs one tensor as the output of the model, and this model has "
            f"{len(boundary)}. Let the model return their concatenation."
        )
    node = boundary[0]
    slots = list(dict.fromkeys((n, u) for u in units for n in u.outputs if n is node))
    if not slots:
        raise InvalidArgumentError(
            f"{what} differentiates the parameters of the model through its output, but the output "
            "does not depend on any that is differentiated, or the loss not on the output."
        )
    dependent = reached(graph, [node])
    state = states.get(slots[-1], State())
    bent = [
        u
        for u in units
        if any(n in dependent for n in u.nodes)
        and not (all(partition.is_linear(n) for n in u.nodes))
    ]
    kind, root, convex = "full", None, False
    if len(slots) == 1:
        if state.exact and not state.coupled:
            kind = "diagonal"
        elif len(bent) == 1 and is_root(bent[0], partition, native) and len(state.coupled) == 1:
            kind, root = "root", bent[0]
        convex = is_convex_in(kind, bent, partition, graph, loss)
    return LossRoot(
        node,
        slots[-1],
        kind,
        tuple(sorted(state.coupled)),
        root,
        Recomputed.of(graph, [node]),
        loss,
        convex,
    )


def is_convex_in(
    kind: str, bent: list[Unit], partition: Partition, graph: fx.Graph, loss: fx.Node
) -> bool:
    """Whether the Hessian at the output surely has no negative part."""
    if kind == "root":
        return is_convex(graph, loss, bent[0].outputs)
    nodes = [n for u in bent for n in u.nodes if not partition.is_linear(n)]
    squares = ("aten.pow.Tensor_Scalar", "aten.square.default")
    return (
        kind == "diagonal"
        and all(str(n.target) in squares for n in nodes)
        and is_convex(graph, loss, nodes)
    )


def is_root(unit: Unit, partition: Partition, native: Native) -> bool:
    """Whether a unit is a call of log-softmax above which all is linear."""
    if unit.region is None or not all(partition.is_flat(n) for n in unit.outputs):
        return False
    (source, whole), *others = native.sources(unit).items()
    args = [*source.args, None, None]
    dtype = args[2] or source.kwargs.get("dtype")
    value: Any = source.args[0].meta["val"] if source.args else None  # type: ignore[union-attr]
    same = isinstance(dtype, bool) or dtype in (None, value.dtype)
    return not others and whole and CLOSED.get(source.target) is LogSoftmax and same
