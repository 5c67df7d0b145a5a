"""The command line: inspect, report, verify and bench a model of your own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import networkx as nx
import torch

from hesscale_fx import inspect as views
from hesscale_fx.api import FALLBACKS, transform
from hesscale_fx.errors import (
    HesScaleError,
    InvalidArgumentError,
    InvalidModelError,
    UnknownNameError,
)
from hesscale_fx.inspect.drawing import FORMATS
from hesscale_fx.methods import METHODS
from hesscale_fx.module import HesScaleModule
from hesscale_fx.timing import compare
from hesscale_fx.workload import Workload, build


def write_json(graph: nx.MultiDiGraph, path: Path) -> None:
    """In the node-link form of networkx."""
    path.write_text(json.dumps(nx.node_link_data(graph, edges="edges")), encoding="utf-8")


WRITERS = {".graphml": nx.write_graphml, ".gexf": nx.write_gexf, ".json": write_json}

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
            if isinstance(error, (InvalidArgumentError, UnknownNameError)):
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
        columns: int | str | None,
        calibrate: int | None,
        fallback: str | None,
        seed: int,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        work = build(model, inputs, targets, loss, train)
        try:
            hs = transform(
                work.model,
                work.loss,
                work.args,
                method=method,
                wrt=list(wrt) or None,
                columns=columns,
                calibrate=calibrate,
                fallback=fallback,
            )
        except InvalidModelError as error:
            if work.loss is not None:
                raise
            raise InvalidModelError(f"{error} {NO_LOSS}") from error
        command(hs, work, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for decorate in reversed(SHARED):
        decorate(run)
    return run


NO_LOSS = "On the command line: --loss CrossEntropyLoss, or a factory that returns (model, loss)."


class Columns(click.ParamType):
    """A number or the word exact."""

    name = "columns"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """From text."""
        if value == "exact":
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither a number nor exact.", param, ctx)
        return int(value)


class Output(click.Path):
    """A file to write, refused before anything is computed if it cannot be."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """From text."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        if path.suffix.lower() not in self.suffixes:
            self.fail(f"{path}: end it in {' or '.join(self.suffixes)}.", param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"{path}: there is no folder {path.absolute().parent}.", param, ctx)
        return path


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
    click.option(
        "--columns",
        type=Columns(),
        metavar="N|exact",
        help="Columns of the loss's Hessian that are pulled back exactly.",
    ),
    click.option(
        "--calibrate",
        type=click.IntRange(1),
        metavar="N",
        help="Give each parameter's diagonal the Gauss-Newton trace, anew every N calls.",
    ),
    click.option(
        "--fallback",
        type=click.Choice(list(FALLBACKS)),
        help="What serves an operator without a structure.",
    ),
    click.option("--train/--eval", "train", default=True, help="The model's mode."),
    click.option("--seed", default=0, help="Of the random values."),
]


@cli.command(short_help="What each module costs; also as a page or a drawing.")
@click.option("--depth", type=click.IntRange(1), help="How many levels of modules to show.")
@click.option("--html", type=Output(".html", ".htm"), help="Write a page for the browser.")
@click.option("--values", is_flag=True, help="Run once; the page shows the diagonals (--html).")
@click.option(
    "--draw",
    type=Output(*(f".{s}" for s in (*FORMATS, "dot", "gv"))),
    help="Write a drawing: .svg, .pdf, .png (they need graphviz) or .dot.",
)
@click.option("--graph", type=Output(*WRITERS), help="Write the graph: .graphml, .gexf or .json.")
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
    if values and html is None:
        raise InvalidArgumentError("--values are shown on the page: say where with --html.")
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


@cli.command(short_help="Which diagonals are exact.")
@workload
def report(hs: HesScaleModule, work: Workload) -> None:
    """Which diagonals are exact, and where the others lost their off-diagonal part."""
    show(hs.report())


@cli.command(short_help="How far off the others are, on random inputs.")
@click.option(
    "--samples", type=click.IntRange(1), default=64, help="Coordinates of each parameter."
)
@click.option("--max-error", type=float, help="Exit with 1 if the overall L1 error is larger.")
@workload
def verify(hs: HesScaleModule, work: Workload, samples: int, max_error: float | None) -> None:
    """Measure the diagonals' error against exact ones, at random coordinates."""
    found = hs.verify(*work.args, samples=samples)
    show(found)
    if max_error is not None and not found.overall.error <= max_error:
        click.echo(f"The error {found.overall.error:.2e} exceeds {max_error:.2e}.", err=True)
        raise click.exceptions.Exit(FAILED)


@cli.command(short_help="The time of a call against a plain gradient's.")
@click.option("--compile", "compiled", is_flag=True, help="Time the same under torch.compile too.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="How long to time each.",
)
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
    WRITERS[path.suffix.lower()](views.to_networkx(hs), path)


def show(found: Any) -> None:
    """Print; with rich in a terminal, where it is installed."""
    fancy = isinstance(found, views.Summary) and importlib.util.find_spec("rich") is not None
    if fancy and sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        click.echo(str(found))
