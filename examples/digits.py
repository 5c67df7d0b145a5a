"""Train a small convolutional network on handwritten digits, stepping by its Hessian diagonal.

`make demo` runs it. The curvature comes from `hesscale_fx.transform`, the optimizer is AdaHesScale,
the digits are those that ship with scikit-learn. After training the diagonal is compared with the
exact one, and a step is timed against a plain gradient step.
"""

import argparse
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import hesscale_fx
from hesscale_fx.optim import AdaHesScale

GRAPH_FILE = Path(__file__).resolve().parent.parent / "build" / "digits_graph.py"


def digits(seed: int) -> list[Tensor]:
    """Train images, test images [n, 1, 8, 8] in 0..1, train labels, test labels [n]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    return train_test_split(images, labels, stratify=labels, test_size=0.25, random_state=seed)


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, 3,818 parameters."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            act1=nn.Tanh(),
            conv2=nn.Conv2d(8, 16, 3, padding=1),
            act2=nn.Tanh(),
            pool=nn.AvgPool2d(2),
            flat=nn.Flatten(),
            linear=nn.Linear(16 * 4 * 4, 10),
        )
    )


def train(net: nn.Module, hs: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train in place on batches of 64; the last one of an epoch is smaller."""
    optimizer = AdaHesScale(net.named_parameters(), lr=0.01, betas=(0.9, 0.99))
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=epochs, loss=float("nan"))
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(x)).split(64):
                loss, grads, hess_diag = hs(x[batch], y[batch])
                optimizer.step(grads=grads, hess_diag=hess_diag)
                total += loss.item() * len(batch)
            progress.update(task, advance=1, loss=total / len(x))


def exact_diagonal(net: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The exact Hessian diagonal: one Hessian-vector product for each parameter element."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    flat = torch.cat([p.flatten() for p in params.values()])

    def loss(flat: Tensor) -> Tensor:
        parts = zip(params.items(), flat.split(sizes), strict=True)
        values = {name: part.view_as(p) for (name, p), part in parts}
        return loss_fn(torch.func.functional_call(net, values, (x,)), y)

    _, product = torch.func.vjp(torch.func.grad(loss), flat)  # H is symmetric: u^T H = H u
    entry = torch.func.vmap(lambda unit: product(unit)[0] @ unit, chunk_size=32)
    diagonal = entry(torch.eye(len(flat)))
    parts = zip(params.items(), diagonal.split(sizes), strict=True)
    return {name: part.view_as(p) for (name, p), part in parts}


def report(hess_diag: dict[str, Tensor], exact: dict[str, Tensor]) -> Table:
    """One row per parameter: its diagonal, and how far it is from the exact one."""
    table = Table(title="Hessian diagonal on a batch of 64")
    for heading in ("parameter", "shape", "smallest", "median", "largest", "negative", "error"):
        text = heading in ("parameter", "shape")
        table.add_column(heading, justify="left" if text else "right", no_wrap=True)

    def error(names) -> str:
        off = sum((hess_diag[n] - exact[n]).abs().sum() for n in names)
        return f"{off / sum(exact[n].abs().sum() for n in names):.1e}"

    for name, s in hess_diag.items():
        numbers = [f"{v:.1e}" for v in (s.min(), s.median(), s.max())]
        negative = f"{(s < 0).float().mean():.0%}"
        table.add_row(name, "x".join(map(str, s.shape)), *numbers, negative, error([name]))
    table.add_row("all", "", "", "", "", "", error(hess_diag), style="bold")
    table.caption = "error: sum |diagonal - exact| / sum |exact|"
    return table


def time_table(net: nn.Module, hs: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Table:
    """Median times of a plain gradient step and of one with the Hessian diagonal."""
    params = list(net.parameters())
    fast_net, fast_hs = torch.compile(net), torch.compile(hs, fullgraph=True)
    steps: dict[str, Callable] = {
        "gradient (autograd)": lambda: torch.autograd.grad(loss_fn(net(x), y), params),
        "gradient and Hessian diagonal": lambda: hs(x, y),
        "gradient, compiled": lambda: torch.autograd.grad(loss_fn(fast_net(x), y), params),
        "gradient and Hessian diagonal, compiled": lambda: fast_hs(x, y),
    }
    table = Table("step", title=f"Time of one step on {len(x)} images, median of 100")
    table.add_column("ms", justify="right")
    table.add_column("ratio", justify="right")
    try:
        for step in steps.values():  # compiles, and warms up
            step()
    except torch._inductor.exc.InductorError as why:  # say, no C++ compiler on this machine
        steps = dict(list(steps.items())[:2])
        table.caption = f"torch.compile failed here: {str(why).splitlines()[0]}"

    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(100):  # they take turns, so that all see the same machine
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(t) for name, t in times.items()}
    for name, ms in medians.items():
        table.add_row(name, f"{ms:.2f}", f"{ms / medians['gradient (autograd)']:.2f}")
    return table


def main(argv: list[str] | None = None) -> None:
    """Train, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    console = Console()

    x, x_test, y, y_test = digits(args.seed)
    net, loss_fn = network(), nn.CrossEntropyLoss()
    hs = hesscale_fx.transform(net, loss_fn)
    train(net, hs, x, y, args.epochs)

    with torch.no_grad():
        for name, images, labels in (("train", x, y), ("test", x_test, y_test)):
            logits = net(images)
            accuracy = (logits.argmax(1) == labels).float().mean()
            console.print(f"{name}: loss {loss_fn(logits, labels):.4f}, accuracy {accuracy:.2%}")

    batch = x[:64], y[:64]
    console.print(report(hs(*batch).hess_diag, exact_diagonal(net, loss_fn, *batch)))
    console.print(time_table(net, hs, loss_fn, *batch))

    GRAPH_FILE.parent.mkdir(exist_ok=True)
    GRAPH_FILE.write_text(hs.print_readable(print_output=False))
    console.print(f"The generated graph, readable: {os.path.relpath(GRAPH_FILE)}")


if __name__ == "__main__":
    main()
