"""The networks that the benchmarks time: each name gives a model, a loss and one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Workload:
    """A training step: ``loss(model(*inputs), *targets)``."""

    model: nn.Module
    loss: Callable
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    @property
    def args(self) -> tuple[Tensor, ...]:
        """What the transformed module is called with."""
        return (*self.inputs, *self.targets)

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Workload:
        """The same on another device, what is a floating-point number in another precision."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None)

        self.model.to(device, dtype)
        inputs, targets = (tuple(map(moved, v)) for v in (self.inputs, self.targets))
        return Workload(self.model, self.loss, inputs, targets)


def mlp(sizes: list[int], batch: int) -> Workload:
    """Linear layers with relu between them, and a classifier."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    x, y = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
    return Workload(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), (x,), (y,))


def cnn(batch: int) -> Workload:
    """Two convolutions with max-pooling and two linear layers, on images of 28 x 28."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    return Workload(net, nn.CrossEntropyLoss(), (x,), (y,))


class Residual(nn.Module):
    """The basic block of He et al. 2016, or their bottleneck: an output four times as wide."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool = False) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width

        def convolution(a: int, b: int, size: int, stride: int = 1) -> list[nn.Module]:
            padding = size // 2
            return [nn.Conv2d(a, b, size, stride, padding, bias=False), nn.BatchNorm2d(b)]

        self.body = nn.Sequential(
            *(*convolution(channels, width, 1), nn.ReLU()),
            *(*convolution(width, width, 3, stride), nn.ReLU()),
            *convolution(width, out, 1),
        ) if bottleneck else nn.Sequential(
            *(*convolution(channels, width, 3, stride), nn.ReLU()),
            *convolution(width, out, 3),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(*convolution(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, channels, height, width)."""
        return F.relu(self.body(x) + self.skip(x))


def resnet18(batch: int, width: int = 64) -> Workload:
    """ResNet-18 as it is used on images of 32 x 32: no stem pooling."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
    ]
    channels = width
    for stage in range(4):
        out = width * 2**stage
        layers += [Residual(channels, out, 1 if stage == 0 else 2), Residual(out, out, 1)]
        channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return Workload(nn.Sequential(*layers).train(), nn.CrossEntropyLoss(), (x,), (y,))


def resnet50(batch: int = 32, size: int = 224) -> Workload:
    """ResNet-50 (He et al. 2016, with the stride in the middle convolution) on random images."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for i in range(blocks):
            width = 64 * 2**stage
            layers.append(Residual(channels, width, 2 if stage and not i else 1, bottleneck=True))
            channels = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    return Workload(nn.Sequential(*layers).train(), nn.CrossEntropyLoss(), (x,), (y,))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, tokens, width)."""
        n, t, c = x.shape
        q, k, v = (
            part.view(n, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(c, 2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Returns the logits of the next token at every position, shape (batch * tokens, vocab)."""

    def __init__(
        self, layers: int, width: int, heads: int, vocab: int, tokens: int, tied: bool = False
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` of shape (batch, tokens)."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def gpt(
    layers: int = 6,
    width: int = 256,
    heads: int = 8,
    vocab: int = 512,
    tokens: int = 128,
    batch: int = 8,
    tied: bool = False,
) -> Workload:
    """Next-token prediction on random tokens."""
    ids, y = torch.randint(vocab, (batch, tokens)), torch.randint(vocab, (batch * tokens,))
    model = GPT(layers, width, heads, vocab, tokens, tied)
    return Workload(model, nn.CrossEntropyLoss(), (ids,), (y,))


class LSTMClassifier(nn.Module):
    """Classifies a sequence by the last hidden state."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, layers, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, steps, features)."""
        return self.head(self.lstm(x)[0][:, -1])


def lstm(batch: int = 32, steps: int = 16, width: int = 128) -> Workload:
    """Two layers over 16 steps."""
    x, y = torch.randn(batch, steps, 32), torch.randint(10, (batch,))
    return Workload(LSTMClassifier(32, width, 2), nn.CrossEntropyLoss(), (x,), (y,))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp-784-512-512-10": lambda: mlp([784, 512, 512, 10], 128),
    "mlp-4x1024": lambda: mlp([1024, 1024, 1024, 1024, 10], 256),
    "cnn": lambda: cnn(64),
    "resnet18": lambda: resnet18(32),
    "gpt": gpt,
    "lstm": lstm,
    "mlp-64-32-32-10": lambda: mlp([64, 32, 32, 10], 32),
}

# For an accelerator: 26 and 124 million parameters.
LARGE: dict[str, Callable[[], Workload]] = {
    "resnet50": resnet50,
    "gpt2-small": lambda: gpt(12, 768, 12, 50257, 1024, 4, tied=True),
}
