"""The command line: inspect, report, verify and bench a model of your own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from hesscale_fx import inspect as views
from hesscale_fx.api import transform
from hesscale_fx.errors import HesScaleError, InvalidArgumentError
from hesscale_fx.methods import METHODS
from hesscale_fx.module import HesScaleModule
from hesscale_fx.timing import compare
from hesscale_fx.workload import Workload, build

OK, FAILED, USAGE, UNSUPPORTED, MODEL = 0, 1, 2, 3, 4

HELP = """Gradients and Hessian diagonals of a PyTorch model, on the command line.

MODEL is package.module:factory or path/to/file.py:factory. The factory takes no arguments and
returns the model, (model, loss), or (model, loss, example_inputs) with the targets among the
inputs; an nn.Module itself will do as well.

\b
A first look, for net.py with a function make_net():
  hesscale-fx inspect net.py:make_net --loss CrossEntropyLoss --input 8,3,32,32
The same as a page for the browser, with the values of one run:
  hesscale-fx inspect net.py:make_net --loss CrossEntropyLoss --input 8,3,32,32 \\
      --html net.html --values
Which diagonals are exact, and how far off are the others?
  hesscale-fx report net.py:make_net --loss CrossEntropyLoss --input 8,3,32,32
  hesscale-fx verify net.py:make_net --loss CrossEntropyLoss --input 8,3,32,32
What does it cost?
  hesscale-fx bench net.py:make_net --loss CrossEntropyLoss --input 8,3,32,32

\b
Exit codes:
  0  done
  1  a limit that was asked for is exceeded (verify --max-error, bench --max-ratio)
  2  wrong usage
  3  the model is not supported; the message says why and what to do
  4  the model itself, or the machine, failed
"""


class Quiet(click.Group):
    """Turns exceptions into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            if isinstance(error, InvalidArgumentError):
                raise click.UsageError(str(error)) from error
            ours = isinstance(error, HesScaleError)
            what = str(error) if ours else f"{type(error).__name__}: {error}"
            click.echo(f"Error: {what}", err=True)
            if not ours:
                click.echo("hesscale-fx --traceback ... shows where.", err=True)
            ctx.exit(UNSUPPORTED if ours else MODEL)


@click.group(
    cls=Quiet,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
def cli(traceback: bool) -> None:
    """See HELP."""


def workload(command: Callable) -> Callable:
    """The arguments that say what to transform; the command gets `hs` and the workload."""

    def run(
        model: str,
        inputs: tuple[str, ...],
        targets: tuple[str, ...],
        loss: str | None,
        method: str,
        wrt: tuple[str, ...],
        train: bool,
        seed: int,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        work = build(model, inputs, targets, loss, train)
        hs = transform(work.model, work.loss, work.args, method=method, wrt=list(wrt) or None)
        command(hs, work, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for decorate in reversed(SHARED):
        decorate(run)
    return run


SHARED = [
    click.argument("model"),
    click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="SHAPE[:DTYPE[:HIGH]]",
        help="An input, e.g. 8,3,32,32 or, for integers below 1000, 8,16:int64:1000. Once for "
        "each input; values are random.",
    ),
    click.option(
        "--target",
        "targets",
        multiple=True,
        metavar="SHAPE[:DTYPE[:HIGH]]",
        help="A target of the loss, likewise. By default what a loss of torch.nn takes.",
    ),
    click.option("--loss", help="A loss of torch.nn, e.g. CrossEntropyLoss, or module:function."),
    click.option("--method", type=click.Choice(list(METHODS)), default="hesscale"),
    click.option("--wrt", multiple=True, help="Parameters by name, prefix or pattern; 'inputs'."),
    click.option("--train/--eval", "train", default=True, help="The model's mode."),
    click.option("--seed", default=0, help="Of the random values."),
]


@cli.command()
@click.option("--depth", type=int, help="How many levels of modules to show.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
@click.option("--values", is_flag=True, help="Run once and show the diagonals on the page.")
@click.option(
    "--draw",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a drawing: .svg, .pdf, .png (they need graphviz) or .dot.",
)
@click.option(
    "--graph",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the graph: .graphml, .gexf or .json.",
)
@workload
def inspect(
    hs: HesScaleModule,
    work: Workload,
    depth: int | None,
    html: Path | None,
    values: bool,
    draw: Path | None,
    graph: Path | None,
) -> None:
    """What each module costs and how exact it is; also as a page, a drawing, a graph."""
    show(hs.summary(depth=depth))
    if graph is not None:
        write_graph(hs, graph)
        click.echo(f"wrote {graph}")
    if draw is not None:
        views.draw(hs, draw)
        click.echo(f"wrote {draw}")
    if html is not None:
        views.html(hs, html, hs(*work.args) if values else None)
        click.echo(f"wrote {html}")


@cli.command()
@workload
def report(hs: HesScaleModule, work: Workload) -> None:
    """Which diagonals are exact, and where the others lost their off-diagonal part."""
    show(hs.report())


@cli.command()
@click.option("--samples", default=64, help="Coordinates of each parameter.")
@click.option("--max-error", type=float, help="Exit with 1 if the overall L1 error is larger.")
@workload
def verify(hs: HesScaleModule, work: Workload, samples: int, max_error: float | None) -> None:
    """Measure the diagonals' error against exact ones, at random coordinates."""
    found = hs.verify(*work.args, samples=samples)
    show(found)
    if max_error is not None and not found.overall.error <= max_error:
        click.echo(f"The error {found.overall.error:.2e} exceeds {max_error:.2e}.", err=True)
        raise click.exceptions.Exit(FAILED)


@cli.command()
@click.option("--compile", "compiled", is_flag=True, help="Time the same under torch.compile too.")
@click.option("--seconds", default=1.0, help="How long to time each.")
@click.option("--max-ratio", type=float, help="Exit with 1 if it costs more plain gradient steps.")
@workload
def bench(
    hs: HesScaleModule, work: Workload, compiled: bool, seconds: float, max_ratio: float | None
) -> None:
    """Time a call against the loss and gradient alone, by plain autograd."""
    found = compare(hs, work, seconds, compiled)
    show(found)
    if max_ratio is not None and not found.ratio <= max_ratio:
        click.echo(f"The ratio {found.ratio:.2f} exceeds {max_ratio:.2f}.", err=True)
        raise click.exceptions.Exit(FAILED)


def write_graph(hs: HesScaleModule, path: Path) -> None:
    """The graph in one of the formats of networkx."""
    import networkx as nx

    graph = views.to_networkx(hs)
    if path.suffix == ".graphml":
        nx.write_graphml(graph, path)
    elif path.suffix == ".gexf":
        nx.write_gexf(graph, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(nx.node_link_data(graph, edges="edges")))
    else:
        raise InvalidArgumentError(f"--graph {path}: end it in .graphml, .gexf or .json.")


def show(found: Any) -> None:
    """Print; with rich in a terminal, where it is installed."""
    fancy = isinstance(found, views.Summary) and importlib.util.find_spec("rich") is not None
    if fancy and sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        click.echo(str(found))
