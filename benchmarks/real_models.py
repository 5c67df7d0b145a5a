"""Real models: captured how, how fast, and how far from autograd and from the exact diagonal.

    python benchmarks/real_models.py [--only PATTERN] [--samples 4] [--seconds 60] [--write FILE]
    python benchmarks/real_models.py --list

Every model of `benchmarks/zoo` has random weights, a tiny configuration and its own loss, runs in
float64 in train mode, and is held to plain autograd. The diagonal is compared with an independent
brute force of the recursion (`tests/reference.py`) where that finishes, and with the exact one on
coordinates drawn at random. Needs `pip install .[models]`.

Rows are kept in build/models.json as long as neither the package nor this file changes, so the
table can be made in pieces: a row that is there is not measured again without ``--again``.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import math
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscale_fx
from hesscale_fx.step import count_targets

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from reference import autograd, reference  # noqa: E402

from kept import Kept, version  # noqa: E402
from zoo import CASES, Case  # noqa: E402

SEED = 3
BRUTE_FORCE_PARAMETERS = 4000


@dataclass
class Row:
    """What was measured of one model; ``failure`` says why there is nothing."""

    name: str
    way: str = ""
    fixed: int = 0
    parameters: int = 0
    nodes_in: int = 0
    nodes_out: int = 0
    seconds: float = math.nan
    loss_error: float = math.nan
    grad_error: float = math.nan
    finite: bool = False
    brute_force: float = math.nan
    l1_error: float = math.nan
    correlation: float = math.nan
    dynamic: str = ""
    double_backward: str = ""
    failure: str = ""

    @property
    def right(self) -> bool:
        """Loss and gradients are autograd's, and every diagonal is finite."""
        return self.finite and self.loss_error < 1e-6 and self.grad_error < 1e-6

    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        way = f"{self.way} ({self.fixed} fixed)" if self.fixed else self.way
        if self.failure:
            way = re.sub(r"[|\s]+", " ", re.sub(r"/\S+/", "", self.failure))[:120]
        cells = (
            self.name, way, f"{self.parameters:,}", f"{self.nodes_in}",
            f"{self.nodes_out}", f"{self.seconds:.1f}", number(self.loss_error),
            number(self.grad_error), number(self.brute_force), number(self.l1_error),
            "" if math.isnan(self.correlation) else f"{self.correlation:.3f}", self.dynamic,
            self.double_backward,
        )  # fmt: skip
        return tuple("" if cell == "nan" else cell for cell in cells)


HEAD = (
    "model", "captured by", "parameters", "nodes in", "nodes out", "transform s", "loss error",
    "gradient error", "brute force", "L1 to exact", "correlation", "free batch", "double backward",
)  # fmt: skip


def number(x: float) -> str:
    """Short, and empty for what was not measured."""
    return "" if math.isnan(x) else "0" if x == 0 else f"{x:.0e}"


def measure(name: str, samples: int, seconds: float) -> Row:
    """Run one model of the zoo through everything."""
    row = Row(name)
    try:
        torch.manual_seed(0)
        case = CASES[name]()
        row.parameters = sum(p.numel() for p in case.model.parameters())
        compare(row, case, samples, seconds)
    except Exception as error:  # the table says what failed
        row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return row
    if seconds and row.parameters <= BRUTE_FORCE_PARAMETERS:
        row.brute_force = against_brute_force(case, seconds)
    return row


def compare(row: Row, case: Case, samples: int, seconds: float) -> None:
    """Against autograd, against the exact diagonal, at another batch."""
    row.double_backward = double_backward(case)
    inputs, labels = split(case.args, targets_of(case))
    loss, grads = autograd(
        copy.deepcopy(case.model), case.loss, inputs, labels, case.kwargs, seed=SEED
    )
    start = time.process_time()
    hs = hesscale_fx.transform(case.model, case.loss, case.args, case.kwargs)
    row.seconds = time.process_time() - start
    program = hs._program()
    row.way, row.fixed = hs.report().way, len(hs.report().fixed)
    row.nodes_in, row.nodes_out = len(program.captured.graph.nodes), len(hs.graph.nodes)
    torch.manual_seed(SEED)
    out = hs(*case.args, **case.kwargs)
    row.loss_error = abs((out.loss - loss) / loss.abs().clamp(min=1e-30)).item()
    row.grad_error = largest_error(out.grads, grads)
    row.finite = all(bool(h.isfinite().all()) for h in out.hess_diag.values())
    row.dynamic = another_batch(hs, case)
    if samples:
        torch.manual_seed(SEED)
        try:
            with limit(seconds or math.inf):
                overall = hs.verify(*case.args, samples=samples, **case.kwargs).overall
        except TimeoutError as error:
            print(f"    not verified: {error}", file=sys.stderr)
        else:
            row.l1_error, row.correlation = overall.error, overall.correlation


def targets_of(case: Case) -> int:
    """How many of the arguments are the loss's."""
    return 0 if case.loss is None else count_targets(case.loss)


def split(args: tuple, targets: int) -> tuple[tuple, tuple]:
    """Inputs and targets."""
    cut = len(args) - targets
    return args[:cut], args[cut:]


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest over the parameters, each relative to its own size.

    A gradient that is zero but for rounding (a bias before a normalization) is held to a
    thousandth of the largest.
    """
    least = 1e-3 * max(float(w.abs().max()) for w in want.values() if w.numel())
    return max(
        float((got[n] - w).abs().max()) / max(float(w.abs().max()), least, 1e-300)
        for n, w in want.items()
        if w.numel()
    )


def another_batch(hs: Any, case: Case) -> str:
    """Whether the same graph serves twice the batch, with the model's own loss."""
    inputs = iter(hs._program().signature.inputs)
    free = []

    def double(tensor: Tensor) -> Tensor:
        shape = next(inputs).shape
        if not shape or not getattr(shape[0], "free_symbols", None):
            return tensor
        free.append(shape[0])
        return torch.cat([tensor, tensor])

    args, kwargs = pytree.tree_map_only(Tensor, double, (case.args, dict(case.kwargs)))
    if not free:
        return "no"
    given, labels = split(args, targets_of(case))
    try:
        want, _ = autograd(copy.deepcopy(case.model), case.loss, given, labels, kwargs, seed=SEED)
    except Exception:  # a first dimension that is no batch
        return "no batch"
    torch.manual_seed(SEED)
    try:
        have = hs(*args, **kwargs).loss
    except hesscale_fx.HesScaleError as error:
        print(f"    another batch: {error}", file=sys.stderr)
        return "refused"
    return "yes" if torch.allclose(have, want, rtol=1e-6) else "WRONG"


def double_backward(case: Case) -> str:
    """Whether autograd differentiates the model twice, as written or without fused attention."""
    for label, context in (
        ("yes", nullcontext()),
        ("math attention", sdpa_kernel(SDPBackend.MATH)),
    ):
        model = copy.deepcopy(case.model)
        inputs, labels = split(case.args, targets_of(case))
        parameters = [p for p in model.parameters() if p.requires_grad]
        try:
            with context:
                out = model(*inputs, **case.kwargs)
                loss = out if case.loss is None else case.loss(out, *labels)
                grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                total = sum((g.square().sum() for g in grads if g is not None), loss * 0)
                torch.autograd.grad(total, parameters, allow_unused=True)
        except RuntimeError:
            continue
        return label
    return "no"


def against_brute_force(case: Case, seconds: float) -> float:
    """The largest error over the parameters; NaN where the brute force does not finish."""
    inputs, labels = split(case.args, targets_of(case))
    hs = hesscale_fx.transform(copy.deepcopy(case.model), case.loss, case.args, case.kwargs)
    torch.manual_seed(SEED)
    have = hs(*case.args, **case.kwargs).hess_diag
    try:
        with limit(seconds):
            found = reference(
                copy.deepcopy(case.model), case.loss, inputs, labels, dict(case.kwargs), seed=SEED
            ).hess_diag
    except Exception as error:  # its own capture is stricter than ours
        print(f"    no brute force: {type(error).__name__}: {str(error)[:100]!r}", file=sys.stderr)
        return math.nan
    return largest_error(have, {n: found[n] for n in have})


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside when so much processor time is used up."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"{seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds if math.isfinite(seconds) else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def summary(rows: list[tuple[str, ...]]) -> str:
    """What the table shows, counted."""
    cells = [dict(zip(HEAD, row, strict=True)) for row in rows]
    measured = [c for c in cells if c["loss error"]]
    ways = Counter(re.sub(r" \(\d+ fixed\)", "", c["captured by"]) for c in measured)
    right = [c for c in measured if max(map(float, (c["loss error"], c["gradient error"]))) < 1e-6]
    forced = [float(c["brute force"]) for c in measured if c["brute force"]]
    twice = Counter(c["double backward"] for c in measured)
    return (
        f"{len(cells)} models, {len(right)} with autograd's loss and gradients (relative 1e-6). "
        f"Captured by {', '.join(f'{way}: {n}' for way, n in ways.most_common())}. Brute force: "
        f"{len(forced)} compared, {sum(e < 1e-6 for e in forced)} equal (1e-6). Free batch: "
        f"{sum(c['free batch'] == 'yes' for c in measured)}. Autograd differentiates "
        f"{twice['yes']} of them twice as they are written, {twice['math attention']} more with "
        f"attention forced to its math path, {twice['no']} not at all."
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write(path: Path, rows: dict[str, Row]) -> None:
    """Put summary and table behind the marker; a row not measured now stays as an earlier one."""
    head, marker, old = path.read_text().partition(MARKER)
    lines = [line[2:-2].split(" | ") for line in old.splitlines() if line.startswith("| ")]
    found: dict[str, tuple[str, ...]] = {}
    for line in lines[1:]:
        name = line[0].strip().removesuffix(EARLIER)
        found[name] = (name + EARLIER, *(cell.strip() for cell in line[1:]))
    found.update((name, row.cells()) for name, row in rows.items())
    kept = [found[name] for name in CASES if name in found]
    stale = sum(row[0].endswith(EARLIER) for row in kept)
    note = f" Measured with an earlier version of the package, marked{EARLIER}: {stale}."
    text = summary(kept) + (note if stale else "")
    path.write_text(f"{head}{marker}\n\n{text}\n\n{table(kept)}\n")


EARLIER = " †"
MARKER = "<!-- generated below -->"


def selected(pattern: str) -> list[str]:
    """Names that a shell pattern or a regular expression finds."""
    return [n for n in CASES if fnmatch.fnmatch(n, pattern) or re.search(pattern, n)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=".", help="a regular expression for names")
    parser.add_argument("--samples", type=int, default=4, help="coordinates of each parameter")
    parser.add_argument(
        "--seconds", type=float, default=60, help="limit of a brute force, and of a verification"
    )
    parser.add_argument("--again", action="store_true", help="measure rows that are kept too")
    parser.add_argument("--list", action="store_true", help="print the names only")
    parser.add_argument("--write", type=Path, help="put the table into this document")
    options = parser.parse_args()
    if options.list:
        print("\n".join(selected(options.only)))
        return
    warnings.simplefilter("ignore")
    kept = Kept("models", version(Path(__file__)))
    for name in selected(options.only):
        if options.again or name not in kept or kept[name]["failure"]:
            kept[name] = asdict(measure(name, options.samples, options.seconds))
        row = Row(**kept[name])
        print(" | ".join(row.cells()), row.failure, flush=True)
    rows = {name: Row(**found) for name, found in kept.rows.items()}
    print("\n" + summary([row.cells() for row in rows.values()]))
    if options.write:
        write(options.write, rows)


if __name__ == "__main__":
    main()
