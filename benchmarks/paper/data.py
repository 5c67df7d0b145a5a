"""Data that packages bring along: nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Data:
    """Inputs and labels for training and testing; the leading dimension is the sample's."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> Data:
    """scikit-learn's handwritten digits: 1,347 and 450 images of 64 values in 0..1, ten classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, stratify=y, test_size=0.25, random_state=0)
    x, x_test, y, y_test = map(torch.tensor, parts)
    return Data(x.float(), y, x_test.float(), y_test)


def mnist1d() -> Data:
    """MNIST-1D: 4,000 and 1,000 signals of shape (1, 40), ten classes.

    Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D", 2020, by their generator.
    """
    from mnist1d.data import make_dataset

    made = make_dataset()
    x, x_test = (
        torch.tensor(made[name], dtype=torch.float32).unsqueeze(1) for name in ("x", "x_test")
    )
    return Data(x, torch.tensor(made["y"]), x_test, torch.tensor(made["y_test"]))


def text(tokens: int) -> tuple[Data, int]:
    """Windows of the language reference that Python's `help` shows, and the size of the alphabet.

    Letters are small and everything that is not ASCII is one character. The labels are the next
    characters; the last tenth is for testing.
    """
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics)).lower()
    codes = torch.tensor([c if c < 128 else 0 for c in map(ord, whole)])
    alphabet, ids = codes.unique(return_inverse=True)
    windows = ids[: len(ids) // (tokens + 1) * (tokens + 1)].view(-1, tokens + 1)
    x, y = windows[:, :-1], windows[:, 1:]
    cut = len(windows) * 9 // 10
    return Data(x[:cut], y[:cut], x[cut:], y[cut:]), len(alphabet)
