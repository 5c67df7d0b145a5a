"""The accuracy dial: error of the diagonal against columns, calibration and tail.

    python benchmarks/dial.py [--seeds 20] [--only mlp|pool|gpt] [--time]

Relative L1 error, sum |h - exact| / sum |exact|, mean over seeds. The classifiers are tanh networks
10-16-..-16-5 in float64, trained by full-batch Adam for 300 steps on 256 standard normal inputs
with the labels of a random teacher; the diagonal is that of the weights on the first 32 inputs.
`--time` measures what a call costs instead, in processor time over that of plain HesScale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hesscale_fx

from workloads import WORKLOADS, Block

SETTINGS: dict[str, dict] = {
    "HesScale": {},
    "columns=1": {"columns": 1},
    "columns=4": {"columns": 4},
    'columns="exact"': {"columns": "exact"},
    "calibrated": {"calibrate": True},
    "GGN": {"method": "ggn"},
}


def classifier(hidden: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """10-16-..-16-5 with so many hidden layers."""
    sizes = [10] + [16] * hidden + [5]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).double()


def teacher_data() -> tuple[Tensor, Tensor]:
    """Inputs, and the labels of a teacher with doubled parameters."""
    x = torch.randn(256, 10, dtype=torch.float64)
    teacher = classifier(1)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2)
        return x, teacher(x).argmax(1)


def pooled(activation: type[nn.Module]) -> nn.Module:
    """Two convolutions and global average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), activation(), nn.Conv2d(6, 8, 3), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double()  # fmt: skip


def images(activation: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Images of noise, and the labels of a teacher with doubled parameters."""
    x = torch.randn(256, 1, 8, 8, dtype=torch.float64)
    teacher = pooled(activation)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2)
        return x, teacher(x).argmax(1)


class TinyGPT(nn.Module):
    """Two blocks of width 16; the logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 16), nn.Embedding(8, 16)
        self.blocks = nn.Sequential(Block(16, 2), Block(16, 2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` of shape (batch, tokens)."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def sentences() -> tuple[Tensor, Tensor]:
    """Arithmetic progressions modulo 11."""
    first, step = torch.randint(11, (16, 1)), torch.randint(1, 4, (16, 1))
    ids = (first + step * torch.arange(9)) % 11
    return ids[:, :-1], ids[:, 1:]


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Full-batch Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def error(got: dict[str, Tensor], want: dict[str, Tensor], names: Iterable[str]) -> float:
    """Relative L1 error over all entries of these parameters."""
    pairs = [(got[n], want[n]) for n in names]
    return float(sum((a - b).abs().sum() for a, b in pairs) / sum(b.abs().sum() for _, b in pairs))


def errors(
    make: Callable[[], nn.Module],
    data: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    seeds: int,
    batch: int,
    weights: bool,
    settings: dict[str, dict],
) -> dict[str, float]:
    """Mean error of each setting."""
    net = make()
    x, y = data()
    x, y = x[:batch], y[:batch]
    modules = {
        name: hesscale_fx.transform(net, F.cross_entropy, (x, y), **options)
        for name, options in {**settings, "exact": {"method": "exact"}}.items()
    }
    found: dict[str, list[float]] = {name: [] for name in settings}
    for seed in tqdm(range(seeds), leave=False):
        torch.manual_seed(seed)
        net.load_state_dict(make().state_dict())
        x, y = data()
        train(net, x, y, steps)
        x, y = x[:batch], y[:batch]
        names = [n for n, p in net.named_parameters() if p.dim() > 1 or not weights]
        want = modules["exact"](x, y).hess_diag
        for name in settings:
            found[name].append(error(modules[name](x, y).hess_diag, want, names))
    return {name: statistics.mean(values) for name, values in found.items()}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title:<28}" + "".join(f"{c:>17}" for c in columns))
    for name, row in rows.items():
        print(f"{name:<28}" + "".join(f"{row[c]:>17.2g}" for c in columns), flush=True)


def times(rounds: int) -> dict[str, dict[str, float]]:
    """Processor time of a call over plain HesScale's, median of rounds in turns."""
    rows = {}
    for name in ("mlp-4x1024", "gpt"):
        work = WORKLOADS[name]()
        calls = {
            label: hesscale_fx.transform(work.model, work.loss, work.args, **options)
            for label, options in {
                "HesScale": {},
                "columns=1": {"columns": 1},
                "calibrate=10": {"calibrate": 10},
            }.items()
        }
        taken: dict[str, list[float]] = {label: [] for label in calls}
        for _ in tqdm(range(rounds + 1), leave=False):
            for label, call in calls.items():
                start = time.process_time()
                for _ in range(10 if "calibrate" in label else 1):
                    call(*work.args)
                count = 10 if "calibrate" in label else 1
                taken[label].append((time.process_time() - start) / count)
        medians = {label: statistics.median(t[1:]) for label, t in taken.items()}
        rows[name] = {label: m / medians["HesScale"] for label, m in medians.items()}
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", choices=["mlp", "pool", "gpt"])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.time:
        show("time over HesScale's", times(args.rounds))
        return
    if args.only in (None, "mlp"):
        rows = {
            f"{hidden} hidden": errors(
                lambda h=hidden: classifier(h), teacher_data, 300, args.seeds, 32, True, SETTINGS
            )
            for hidden in (1, 2, 3, 5)
        }
        show("tanh classifier, weights", rows)
    if args.only in (None, "pool"):
        rows = {
            f"pooled, {kind.__name__}": errors(
                lambda k=kind: pooled(k),
                lambda k=kind: images(k),
                150,
                args.seeds,
                32,
                False,
                SETTINGS,
            )
            for kind in (nn.Tanh, nn.ReLU)
        }
        show("global average pooling", rows)
    if args.only in (None, "gpt"):
        rows = {
            f"GPT, {steps} steps": errors(
                lambda: TinyGPT().double(), sentences, steps, args.seeds, 8, False, SETTINGS
            )
            for steps in (0, 100)
        }
        show("GPT", rows)


if __name__ == "__main__":
    main()
