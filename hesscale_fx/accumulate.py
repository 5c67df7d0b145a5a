"""Gradients and diagonals onto the tensors they belong to: `.grad` and `.hesscale`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hesscale_fx.errors import CallError


def hesscale(tensor: Tensor) -> Tensor | None:
    """What `hs.backward` has accumulated beside ``tensor.grad``, or None."""
    return getattr(tensor, "hesscale", None)


def clear(tensors: Iterable[Tensor], set_to_none: bool = True) -> None:
    """Reset ``.hesscale``, as `zero_grad` resets ``.grad``."""
    for tensor in tensors:
        found = hesscale(tensor)
        if found is not None and set_to_none:
            tensor.hesscale = None  # type: ignore[attr-defined]
        elif found is not None:
            found.zero_()


@torch.no_grad()
def accumulate(
    leaves: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    hess_diag: Mapping[str, Tensor],
    others: Iterable[Tensor],
    scheduled: bool = False,
) -> None:
    """Add a result to ``.grad`` and ``.hesscale`` of the tensors that it belongs to.

    Args:
        leaves: name -> tensor; may have more names than the result.
        grads: name -> gradient.
        hess_diag: name -> Hessian diagonal, the same names; or nothing at all.
        others: tensors whose memory a result may be a view of, e.g. the arguments of the call.
        scheduled: some results come without diagonals, and must not be added to those with.

    Raises:
        CallError: a tensor is not a leaf, its gradient was cleared and its diagonal was not, or
            what there is has a diagonal and the result has none, or the other way round.
    """
    for name in grads:
        _check(name, leaves[name])
        if scheduled:
            _check_alike(name, leaves[name], name in hess_diag)
    taken = {t.untyped_storage().data_ptr() for t in [*leaves.values(), *others]}
    for name, grad in grads.items():
        leaf = leaves[name]
        leaf.grad = _sum(leaf.grad, grad, taken)
        if name in hess_diag:
            leaf.hesscale = _sum(hesscale(leaf), hess_diag[name], taken)  # type: ignore[attr-defined]


@torch.no_grad()
def add_curvature(leaf: Tensor, diag: Tensor) -> None:
    """Add to ``leaf.hesscale`` while autograd, which adds to ``leaf.grad``, runs backward."""
    task = torch._C._current_graph_task_id()
    before = hesscale(leaf)
    # Within one backward pass the gradients may arrive later than the diagonals.
    if before is not None and getattr(before, "_hesscale_task", None) != task:
        _check("a parameter", leaf)
    leaf.hesscale = _sum(before, diag, set())  # type: ignore[attr-defined]
    leaf.hesscale._hesscale_task = task  # type: ignore[attr-defined]


def _check(name: str, leaf: Tensor) -> None:
    if not leaf.is_leaf:
        raise CallError(
            f"{name!r} was computed from other tensors, so it has no .grad of its own. Pass "
            "x.detach(), or take the result of hs(...) instead of calling hs.backward(...)."
        )
    if leaf.grad is None and hesscale(leaf) is not None:
        raise CallError(
            f"The .grad of {name!r} was cleared, but its .hesscale was not, so the diagonal would "
            "add up over steps. Clear both with hs.zero_grad(), or with zero_grad() of an "
            "optimizer of hesscale_fx.optim."
        )


def _check_alike(name: str, leaf: Tensor, has_curvature: bool) -> None:
    """A sum of gradients with the diagonals of some of them only would be a wrong number."""
    if leaf.grad is not None and has_curvature != (hesscale(leaf) is not None):
        have, lack = (".grad alone", "has") if has_curvature else (".grad and .hesscale", "lacks")
        raise CallError(
            f"{name!r} holds {have} of earlier calls, and this one {lack} a diagonal (every=...), "
            "so the sums would not be of the same calls. Clear both between steps; to accumulate "
            "over the calls of one step, set hs.calls to the step's number before each of them."
        )


def _sum(old: Tensor | None, new: Tensor, taken: set[int]) -> Tensor:
    """``old + new``, in place as autograd does; the first one in memory of its own."""
    if old is not None:
        return new + old if old.is_sparse else old.add_(new)
    storage = new.untyped_storage()
    pointer = storage.data_ptr()
    # Two results may be one tensor, or a view of an input: in-place arithmetic would hit both.
    own = pointer not in taken and storage.nbytes() == new.numel() * new.element_size()
    taken.add(pointer)
    return new if own else new.clone(memory_format=torch.contiguous_format)
