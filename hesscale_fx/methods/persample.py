"""Pull several columns back at once, and squares per sample out of them.

A value with columns has one dimension in front. For a tensor without samples (a parameter, or what
is computed of parameters alone) it runs over columns times samples, for every other over columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_fx.methods.base import Output, Place
from hesscale_fx.structures import Evaluation
from hesscale_fx.structures.base import Tensors, add, several, widen

# Columns are squared for each sample in so many parts, lest all of them are there at once.
CHUNKS = 8


def squares(u: Tensor | None) -> Tensor | None:
    """Summed over columns (and samples)."""
    if u is None:
        return None
    u = widen(u)
    return (u * u).sum(0)


def pull_columns(at: Evaluation, u: Tensors, place: Place) -> list[Tensor | None]:
    """``J^T u`` for every column; where a tensor without samples is used by samples, for each.

    Inputs of use ``"own"`` and ``"once"`` get None: their squares flow in their place; those of
    use ``"exact"`` too: s does.
    """
    result: list[Tensor | None] = [None] * len(place.uses)
    inner = [None if rows is not None else v for v, rows in zip(u, place.rows, strict=True)]
    outer = [v if rows is not None else None for v, rows in zip(u, place.rows, strict=True)]
    if any(v is not None for v in inner):
        result = batched(at, inner, [use != "exact" for use in place.uses])
    if any(v is not None for v in outer):
        for use, pull in (("rows", batched), ("shared", None)):
            wanted = [w == use for w in place.uses]
            if not any(wanted):
                continue
            found = pull(at, outer, wanted) if pull else per_sample(at, outer, place.rows, wanted)
            for i, (value, mine) in enumerate(zip(found, wanted, strict=True)):
                if mine:
                    result[i] = add(result[i], value)
    return result


def batched(at: Evaluation, u: Tensors, wanted: list[bool]) -> list[Tensor | None]:
    """``J^T u`` for every column."""
    count = next(v.shape[0] for v in u if v is not None)
    if isinstance(count, int) and count == 1:
        found = at.vjp([None if v is None else v[0] for v in u])
        return [
            v.unsqueeze(0) if v is not None and w else None
            for v, w in zip(found, wanted, strict=True)
        ]
    found = at.vjp(u)
    return [v if w else None for v, w in zip(found, wanted, strict=True)]


def per_sample(
    at: Evaluation, u: Tensors, rows: tuple[tuple[int, int] | None, ...], wanted: list[bool]
) -> list[Tensor | None]:
    """``J^T u`` for every column and sample: all but one sample of u are zero in each."""
    quick = quickly(at, u, rows, wanted)
    if quick is not None:
        return quick
    apart = [
        None if v is None or place is None else select_samples(v, *place)
        for v, place in zip(u, rows, strict=True)
    ]
    return batched(at, apart, wanted)


def quickly(
    at: Evaluation, u: Tensors, rows: tuple[tuple[int, int] | None, ...], wanted: list[bool]
) -> list[Tensor | None] | None:
    """The same where the unit has a rule for each sample, or None."""
    rule = getattr(at, "per_sample", None)
    if rule is None or len(u) != 1 or u[0] is None or rows[0] is None:
        return None
    place = rows[0]
    found = several(lambda one: rule(one, *place), [u[0]])
    if any(w and f is None for w, f in zip(wanted, found, strict=True)):
        return None
    return [
        f.flatten(0, 1) if f is not None and w else None for w, f in zip(wanted, found, strict=True)
    ]


def squares_per_sample(at: Evaluation, u: Tensors, place: Place) -> list[Tensor | None]:
    """Squares of ``J^T u`` summed over columns and samples, for inputs of use ``"once"``."""
    wanted = [use == "once" for use in place.uses]
    result: list[Tensor | None] = [None] * len(wanted)
    columns = next(v.shape[0] for v in u if v is not None)
    step = -(-columns // CHUNKS) if isinstance(columns, int) else columns
    for k in range(0, columns, step) if isinstance(columns, int) else (0,):
        chunk = [None if v is None else v[k : k + step] for v in u]
        found = per_sample(at, chunk, place.rows, wanted)
        result = [add(r, squares(f)) for r, f in zip(result, found, strict=True)]
    return result


def norms_per_sample(at: Evaluation, u: Tensors, place: Place) -> list[Tensor | None]:
    """Sums of those squares over the elements too, where the unit has a rule for that.

    For leaves only: what lies between a leaf and another tensor may scale the squares.
    """
    nothing: list[Tensor | None] = [None] * len(place.uses)
    rule = getattr(at, "norms_per_sample", None)
    if rule is None or len(u) != 1 or u[0] is None or place.rows[0] is None:
        return nothing
    (dim, inner), columns = place.rows[0], u[0]
    found = several(lambda one: rule(one, dim, inner), [columns])
    uses = zip(found, place.uses, place.leaves, strict=True)
    return [
        f.sum(0) if f is not None and leaf and use in ("own", "once") else None
        for f, use, leaf in uses
    ]


def totals_of(at: Evaluation, s: Tensors, wanted: list[bool]) -> list[Tensor | None]:
    """The sum of the elements of ``(J o J)^T s`` for each input that is wanted."""
    nothing: list[Tensor | None] = [None] * len(wanted)
    if not any(wanted) or all(v is None for v in s):
        return nothing
    rule = getattr(at, "totals", None)
    known = nothing if rule is None else rule(s)
    missing = any(w and k is None for w, k in zip(wanted, known, strict=True))
    passed = at.squared_vjp(s) if missing else nothing
    found = zip(wanted, known, passed, strict=True)
    return [
        (k if k is not None else None if p is None else p.sum()) if w else None for w, k, p in found
    ]


def select_samples(u: Tensor, dim: int, inner: int) -> Tensor:
    """(columns, *shape) -> (columns * samples, *shape), one sample of u in each."""
    size = u.shape[dim + 1]
    own = torch.arange(size, device=u.device)
    own = own.div(inner, rounding_mode="floor") if inner != 1 else own
    count = size // inner
    mask = own.unsqueeze(0) == torch.arange(count, device=u.device).unsqueeze(1)
    shape = [1] * u.dim()
    shape[dim + 1] = size
    mask = mask.reshape(count, *shape[1:])
    return (u.unsqueeze(1) * mask).flatten(0, 1)


def spread_out(columns: Tensor, output: Output) -> Tensor:
    """One column for each place of z at which the loss's Hessian is a block of its own.

    Entries of one column at different places belong to different blocks; the model may mix them
    unless they are different samples.
    """
    for d in range(columns.dim() - 1):
        if d in output.coupled:
            continue
        size = columns.shape[d + 1]
        place = torch.arange(size, device=columns.device)
        if output.rows is not None and output.rows[0] == d:
            size = output.rows[1]
            place = place % size
        if isinstance(size, int) and size == 1:
            continue
        mask = place.unsqueeze(0) == torch.arange(size, device=columns.device).unsqueeze(1)
        shape = [1] * columns.dim()
        shape[d + 1] = columns.shape[d + 1]
        columns = (columns.unsqueeze(1) * mask.reshape(size, *shape[1:])).flatten(0, 1)
    return columns
