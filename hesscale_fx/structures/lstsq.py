"""Least squares as one unit, whose shapes do not depend on data.

The second output of aten.linalg_lstsq, the residuals, is empty where a matrix has no full rank, so
no graph can hold the operator. Its derivative is that of ``pinv(A) B`` (Golub & Pereyra 1973),
which PyTorch's own formula is too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_fx.errors import MESSAGE
from hesscale_fx.structures.whole import replaces


@torch.library.custom_op("hesscale_fx::lstsq", mutates_args=())
def lstsq(a: Tensor, b: Tensor, rcond: float | None) -> tuple[Tensor, Tensor]:
    """Stands for torch.linalg.lstsq in a captured graph; the emitted one holds `by_pinv`."""
    solution, residuals = by_pinv(a, b, rcond)
    return solution.clone(), residuals.clone()


@lstsq.register_fake
def _(a: Tensor, b: Tensor, rcond: float | None) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    columns = b.shape[-1]
    solution = a.new_empty((*batch, a.shape[-1], columns))
    return solution, a.new_empty((*batch, columns), dtype=a.real.dtype)


def by_pinv(a: Tensor, b: Tensor, rcond: float | None) -> tuple[Tensor, Tensor]:
    """The solution of least norm, and the sum of its squared errors for each column of b."""
    solution = torch.linalg.pinv(a, rtol=rcond) @ b
    errors = a @ solution - b
    return solution, (errors * errors.conj()).real.sum(-2)


@replaces(torch.linalg, "lstsq")
def whole(
    input: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> Any:
    """torch.linalg.lstsq; the rank decides on the residuals, so a full one is asserted."""
    driver = driver or ("gelsy" if input.device.type == "cpu" else "gels")
    rows, columns = input.shape[-2:]
    vectors = b.dim() == 1 or (b.dim() == input.dim() - 1 and b.shape == input.shape[:-1])
    solution, residuals = lstsq(input, b.unsqueeze(-1) if vectors else b, rcond)
    empty = solution.real.new_empty(0)
    rank, values = torch.empty(0, dtype=torch.int64, device=input.device), empty
    if driver != "gels":  # which takes the rank to be full
        rank = torch.linalg.matrix_rank(input.detach(), rtol=rcond)
    if driver in ("gelsd", "gelss"):
        values = torch.linalg.svdvals(input.detach())
    if driver == "gelsy" or rows <= columns:
        residuals = empty
    elif driver != "gels":
        full = (rank == columns).all().cpu()
        torch._assert_async(full, f"{MESSAGE}: torch.linalg.lstsq of matrices of full rank")
    if vectors:
        solution = solution.squeeze(-1)
        residuals = residuals.squeeze(-1) if residuals.dim() else residuals
    make: Any = torch.return_types.linalg_lstsq  # type: ignore[attr-defined]
    return make((solution, residuals, rank, values))
