"""How long a transformation takes, against torch.export of the same model.

    python benchmarks/transform_time.py [--only PATTERN] [--profile] [--static]

For a GPT of 12 layers, a ResNet-50 and an LSTM of 4 layers over 64 steps: the seconds of
`torch.export.export(...).run_decompositions({})` and those of `hesscale_fx.transform`, which is to
stay below 1.5 times that plus 3 ms for each node of the captured graph. The stages are logged.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import re
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscale_fx


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Embeddings, blocks and a tied head."""

    def __init__(self, layers: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(100, width), nn.Embedding(32, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of shape (batch, vocabulary, time)."""
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight).transpose(1, 2)


class Sequence(nn.Module):
    """A recurrent classifier."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(16, 32, layers, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        return self.head(self.rnn(x)[0][:, -1])


def resnet() -> tuple[nn.Module, tuple]:
    """timm's, as published."""
    from zoo.vision import import_torchvision  # timm needs it

    import_torchvision()
    import timm

    return timm.create_model("resnet50", num_classes=10), (
        torch.randn(2, 3, 64, 64),
        torch.randint(10, (2,)),
    )


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "GPT, 12 layers": lambda: (
        GPT(12),
        (torch.randint(100, (2, 32)), torch.randint(100, (2, 32))),
    ),
    "ResNet-50": resnet,
    "LSTM, 4 layers, 64 steps": lambda: (
        Sequence(4),
        (torch.randn(2, 64, 16), torch.randint(5, (2,))),
    ),
}


class Whole(nn.Module):
    """Model and loss, for torch.export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.model(x), y)


def exporting(model: nn.Module, args: tuple, dynamic: bool) -> float:
    """Seconds of torch.export and its decompositions."""
    free = {0: torch.export.Dim.AUTO}
    shapes = (free, free) if dynamic else None
    start = time.perf_counter()
    program = torch.export.export(Whole(model), args, dynamic_shapes=shapes, strict=False)
    program.run_decompositions({})
    return time.perf_counter() - start


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=".", help="a regular expression for names")
    parser.add_argument("--profile", action="store_true", help="where the transformation spends it")
    parser.add_argument("--static", action="store_true", help="with every size fixed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="    %(message)s")
    warnings.simplefilter("ignore")
    hesscale_fx.transform(nn.Linear(2, 2), F.mse_loss, (torch.ones(2, 2), torch.ones(2, 2)))
    for name in filter(lambda n: re.search(options.only, n), MODELS):
        model, args = MODELS[name]()
        export = exporting(model, args, not options.static)
        profile = cProfile.Profile()
        start = time.perf_counter()
        if options.profile:
            profile.enable()
        hs = hesscale_fx.transform(model, nn.CrossEntropyLoss(), args, dynamic=not options.static)
        profile.disable()
        seconds = time.perf_counter() - start
        nodes = len(hs._program().captured.graph.nodes)
        limit = 1.5 * export + 0.003 * nodes
        print(
            f"{name}: {nodes} nodes; torch.export {export:.1f} s, transform {seconds:.1f} s, "
            f"limit {limit:.1f} s, {seconds / limit:.2f} of it",
            flush=True,
        )
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
