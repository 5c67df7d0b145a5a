"""Freed memory that the C library keeps for the next call."""

from __future__ import annotations

import functools

import torch

# glibc returns freed memory to the system above a threshold, and each page of it is cleared again
# when the next call asks for it, which took a quarter of a small network's step. The threshold
# adapts: to twice the largest block of its own that a program has freed, of at most 32 MiB
# (mallopt(3), M_MMAP_THRESHOLD). A step frees more than the gradient step that the threshold came
# from: squared weights, and diagonals beside gradients.
BLOCK = 2**25 - 2**16


@functools.cache
def keep_freed() -> None:
    """Free one such block, once a process, which then keeps up to 64 MiB at the end of its heap.

    Any program that frees a tensor of 32 MiB has had the same. Elsewhere than under glibc, or where
    MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is set, it does nothing.
    """
    torch.empty(BLOCK, dtype=torch.uint8, device="cpu")
