"""The accuracy dial: error of the diagonal against columns, calibration and tail.

    python benchmarks/dial.py [--seeds 20] [--only mlp|pool|gpt|tail] [--time]

Relative L1 error, sum |h - exact| / sum |exact|, mean over seeds. The classifiers are tanh networks
10-16-..-16-5 in float64, trained by full-batch Adam for 300 steps on 256 standard normal inputs
with the labels of a random teacher; the diagonal is that of the weights on the first 32 inputs.
Networks with global average pooling learn a teacher's labels too ("pooled"), or those of 32 images
"by heart"; of them, and of the GPT, the diagonal is that of all parameters.
`--time` measures what a call costs instead, in processor time over that of plain HesScale;
`--only tail` shows both against the number of contractions that all columns are carried through.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hesscale_fx

from workloads import WORKLOADS, Block, Workload

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


def random_labels() -> tuple[Tensor, Tensor]:
    """Images of noise, as many as the diagonal is computed on, and labels to learn by heart."""
    return torch.randn(32, 1, 8, 8, dtype=torch.float64), torch.randint(5, (32,))


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


@dataclass
class Family:
    """Networks of one kind, trained on data of one kind."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    steps: int  # of training
    batch: int  # on which the diagonal is computed
    weights: bool = False  # leave out vectors


FAMILIES = {
    **{f"{n} hidden": Family(partial(classifier, n), teacher_data, 300, 32, True)
       for n in (1, 2, 3, 5)},
    **{f"pooled, {kind.__name__}": Family(partial(pooled, kind), partial(images, kind), 150, 32)
       for kind in (nn.Tanh, nn.ReLU)},
    **{f"by heart, {kind.__name__}": Family(partial(pooled, kind), random_labels, 150, 32)
       for kind in (nn.Tanh, nn.ReLU)},
    **{f"GPT, {n} steps": Family(lambda: TinyGPT().double(), sentences, n, 8) for n in (0, 100)},
}  # fmt: skip


def errors(family: Family, seeds: int, settings: dict[str, dict]) -> dict[str, float]:
    """Mean error of each setting."""
    net, batch = family.make(), family.batch
    x, y = (part[:batch] for part in family.data())
    modules = {
        name: hesscale_fx.transform(net, F.cross_entropy, (x, y), **options)
        for name, options in settings.items()
    }
    reference = hesscale_fx.transform(net, F.cross_entropy, (x, y), method="exact")
    found: dict[str, list[float]] = {name: [] for name in settings}
    for seed in tqdm(range(seeds), leave=False):
        torch.manual_seed(seed)
        net.load_state_dict(family.make().state_dict())
        x, y = family.data()
        train(net, x, y, family.steps)
        x, y = x[:batch], y[:batch]
        names = [n for n, p in net.named_parameters() if p.dim() > 1 or not family.weights]
        want = reference(x, y).hess_diag
        for name in settings:
            found[name].append(error(modules[name](x, y).hess_diag, want, names))
    return {name: statistics.mean(values) for name, values in found.items()}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title:<28}" + "".join(f"{c:>17}" for c in columns))
    for name, row in rows.items():
        print(f"{name:<28}" + "".join(f"{row[c]:>17.2g}" for c in columns), flush=True)


def ratios(work: Workload, settings: dict[str, dict], rounds: int) -> dict[str, float]:
    """Processor time of a call over that of the first setting, median of rounds in turns.

    Of a calibrated one the mean over the calls from one refresh to the next.
    """
    calls = {
        label: hesscale_fx.transform(work.model, work.loss, work.args, **options)
        for label, options in settings.items()
    }
    taken: dict[str, list[float]] = {label: [] for label in calls}
    for _ in tqdm(range(rounds + 1), leave=False):
        for label, call in calls.items():
            count = settings[label].get("calibrate", 1)
            start = time.process_time()
            for _ in range(count):
                call(*work.args)
            taken[label].append((time.process_time() - start) / count)
    medians = {label: statistics.median(t[1:]) for label, t in taken.items()}
    first = medians[next(iter(settings))]
    return {label: m / first for label, m in medians.items()}


def times(rounds: int) -> dict[str, dict[str, float]]:
    """What the settings cost on networks of the other benchmarks."""
    settings: dict[str, dict] = {
        "HesScale": {},
        "columns=1": {"columns": 1},
        "calibrate=1": {"calibrate": 1},
        "calibrate=10": {"calibrate": 10},
    }
    names = ("mlp-4x1024", "gpt")
    return {name: ratios(WORKLOADS[name](), settings, rounds) for name in names}


def tails(title: str, family: Family, lengths: Iterable[int], seeds: int, rounds: int) -> None:
    """Print error and time against the length of the tail."""
    settings: dict[str, dict] = {f"tail={n}": {"tail": n} for n in lengths}
    found = errors(family, seeds, settings)
    x, y = (part[: family.batch] for part in family.data())
    cost = ratios(Workload(family.make(), F.cross_entropy, (x,), (y,)), settings, rounds)
    show(f"tail, {title}", {"error": found, "time": cost})


TITLES: dict[str, tuple[str, Sequence[str]]] = {
    "mlp": ("tanh classifier, weights", ("1 hidden", "2 hidden", "3 hidden", "5 hidden")),
    "pool": (
        "global average pooling",
        [f"{labels}, {kind}" for labels in ("pooled", "by heart") for kind in ("Tanh", "ReLU")],
    ),
    "gpt": ("GPT", ("GPT, 0 steps", "GPT, 100 steps")),
}
TAILS = {
    "3 hidden": range(5),
    "5 hidden": range(7),
    "pooled, Tanh": range(4),
    "pooled, ReLU": range(4),
    "GPT, 0 steps": (0, 1, 2, 3, 5, 7, 13),
    "GPT, 100 steps": (0, 1, 2, 3, 5, 7, 13),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", choices=[*TITLES, "tail"])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.time:
        show("time over HesScale's", times(args.rounds))
        return
    for kind, (title, names) in TITLES.items():
        if args.only in (None, kind):
            show(title, {n: errors(FAMILIES[n], args.seeds, SETTINGS) for n in names})
    if args.only in (None, "tail"):
        for name, lengths in TAILS.items():
            tails(name, FAMILIES[name], lengths, args.seeds, args.rounds)


if __name__ == "__main__":
    main()
