"""Every differentiable operator of PyTorch's own database, against the exact Hessian diagonal.

    python benchmarks/operators.py [--fallback exact] [--samples 2] [--match fft] [--inplace]
    python benchmarks/operators.py --table docs/operators.md

The entries are those of ``torch.testing._internal.common_methods_invocations.op_db`` that autograd
differentiates in float64 on CPU, each with the first of its own sample inputs that are small. Every
floating-point argument is differentiated alone, through `hesscale_fx.transform`, under a head of
random linear and diagonal quadratic terms, whose curvature the recursion must carry exactly
(`Head` in hesscale_fx/check.py; a complex output counts by its real and imaginary part). The
reference is double backward through PyTorch's own formulas.

Outcomes are kept in build/operators.json, so a run that was stopped goes on where it was; a change
to the package starts anew.

Each entry ends as one of

- correct: gradient and diagonal of every sample and argument agree;
- approximate: some diagonal differs and ``report()`` says so, naming where;
- refused: by an error that names the operator;
- wrong, or error: a bug.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscale_fx

sys.path.insert(0, str(Path(__file__).parent))

from kept import Kept, version

TOLERANCE = 1e-7
ROUGH = 1e-4  # of differences
# Elements of a differentiated argument, and of a result, where the entry has samples that small.
SMALL = 2000
LARGE = 20000  # where it has none
COORDINATES = 40  # of an argument, whose diagonal is compared
# Their autograd formula holds behind a log_softmax only (pytorch issue 52241).
NO_DERIVATIVE = {"nn.functional.ctc_loss"}
SECONDS = 60  # of processor time for one entry
SEED = 0


@dataclass
class Outcome:
    """What became of one entry."""

    name: str
    status: str
    cases: int  # pairs of a sample and an argument
    detail: str = ""
    twice: bool = True  # whether PyTorch has its second derivative
    seconds: float = 0.0  # of processor time


def entries(match: str = "") -> list[Any]:
    """The differentiable entries whose name contains `match`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    chosen = [
        op
        for op in op_db
        if op.supports_autograd and torch.float64 in op.supported_backward_dtypes("cpu")
    ]
    return [op for op in chosen if match in op.full_name]


def samples_of(op: Any, count: int, inplace: bool = False) -> list[Any]:
    """Some of the entry's own samples: small, and of different shapes first."""
    torch.manual_seed(SEED)
    found = itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), 200)
    fitting = [sample for sample in found if not (inplace and sample.broadcasts_input)]
    sized = [(size_of(op, sample), sample) for sample in fitting]
    small = [sample for size, sample in sized if 0 < size <= SMALL]
    small = small or [sample for size, sample in sized if 0 < size <= LARGE]
    # Evenly among all, so that options of every kind come up.
    step = max(1, math.ceil(len(small) / count))
    return small[step - 1 :: step][:count] if small else []


def size_of(op: Any, sample: Any) -> int:
    """Elements of the largest differentiated argument or result; zero if there is nothing."""
    tensors = tensors_of((sample.input, sample.args, sample.kwargs))
    sizes = [t.numel() for t in tensors if differentiated(t)]
    if not sizes or not max(sizes) or max(sizes) > LARGE:
        return 0
    own = pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone(), (sample.input, sample.args, sample.kwargs)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = real_outputs(op.op(own[0], *own[1], **own[2]))
    except RuntimeError:  # it reads what lies beside its argument, of which it is no function
        return 0
    return max([*sizes, *(y.numel() for y in results)])


def differentiated(value: Any) -> bool:
    """Of some samples a tensor of weights is in float32, where nothing is equal to 1e-7."""
    return isinstance(value, Tensor) and value.requires_grad and value.dtype == torch.float64


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in a tree."""
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]


def is_constant(value: Any) -> bool:
    """A tensor of numbers that is not differentiated."""
    return isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad


class Head:
    """``sum of w (y - y0) + d (y - y0)^2 / 2`` over the real parts of the outputs."""

    def __init__(self, outputs: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(SEED)

        def draw(y: Tensor) -> Tensor:
            return torch.randn(y.shape, generator=generator, dtype=y.dtype)

        self.terms = [(y, draw(y), draw(y)) for y in outputs]

    def __call__(self, outputs: list[Tensor]) -> Tensor:
        """The scalar."""
        total: Any = 0.0
        for y, (y0, w, d) in zip(outputs, self.terms, strict=True):
            total = total + (w * (y - y0)).sum() + 0.5 * (d * (y - y0) ** 2).sum()
        return total


def real_outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result, dense, complex ones as pairs."""
    found = [y for y in tensors_of(result) if y.is_floating_point() or y.is_complex()]
    found = [y.to_dense() if y.layout is not torch.strided else y for y in found]
    return [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in found]


@dataclass
class Case:
    """One argument of one sample: the scalar function of it alone, and the point."""

    loss: Callable[[Tensor], Tensor]
    point: Tensor
    times: int  # that autograd differentiates it

    def coordinates(self) -> list[int]:
        """Flat indices of the entries whose diagonal is compared."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randperm(self.point.numel(), generator=generator)[:COORDINATES].tolist()


def cases_of(op: Any, sample: Any, inplace: bool = False) -> Iterator[Case]:
    """One case for each floating-point argument of the sample that requires grad."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    # A constant may be running statistics, into which the operator writes.
    copied = [is_constant(v) for v in leaves]
    plain = [v.detach() if isinstance(v, Tensor) else v for v in leaves]

    def function(first: Any, *args: Any, **kwargs: Any) -> Any:
        return op.inplace_variant(first.clone(), *args, **kwargs)

    def run(position: int, x: Tensor, process: bool = True) -> list[Tensor]:
        inner = [v.clone() if c else v for v, c in zip(plain, copied, strict=True)]
        inner[position] = x
        first, args, kwargs = pytree.tree_unflatten(inner, spec)
        result = (function if inplace else op.op)(first, *args, **kwargs)
        return real_outputs(sample.output_process_fn_grad(result) if process else result)

    for position, value in enumerate(leaves):
        if not differentiated(value):
            continue
        process = needs_processing(lambda x, p, at=position: run(at, x, p), value)
        torch.manual_seed(SEED)
        with torch.enable_grad():
            outputs = run(position, value.detach().clone().requires_grad_(), process)
        used = [i for i, y in enumerate(outputs) if y.requires_grad]
        if not used:
            continue
        head = Head([outputs[i].detach() for i in used])

        def loss(
            x: Tensor,
            position: int = position,
            head: Head = head,
            used: list[int] = used,
            process: bool = process,
        ) -> Tensor:
            found = run(position, x, process)
            return head([found[i] for i in used])

        times = 0 if op.full_name in NO_DERIVATIVE else 1 + op.supports_gradgrad
        yield Case(loss, value.detach().clone(), times)


def needs_processing(run: Callable[[Tensor, bool], list[Tensor]], value: Tensor) -> bool:
    """Whether the outputs as they are have no derivative (the phase of an eigenvector)."""
    x = value.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            found = [y for y in run(x, False) if y.requires_grad]
            if not found:
                return True
            # Complex weights: a real part alone may hide the dependence on a phase.
            torch.autograd.grad(sum((torch.rand_like(y) * y).sum() for y in found), x)
    except (RuntimeError, TypeError, AttributeError):
        return True
    return False


def exact(
    loss: Callable[[Tensor], Tensor], point: Tensor, chosen: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradient, and entries of the Hessian diagonal, by double backward."""
    x = point.clone().requires_grad_()
    diagonal = torch.zeros(len(chosen), dtype=x.dtype)
    torch.manual_seed(SEED)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss(x)
        if not value.requires_grad:
            return torch.zeros_like(point), diagonal
        (grad,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        if grad.requires_grad:
            flat = grad.reshape(-1)
            for k, i in enumerate(chosen):
                (row,) = torch.autograd.grad(flat[i], x, retain_graph=True, materialize_grads=True)
                diagonal[k] = row.reshape(-1)[i]
    return grad.detach(), diagonal


def by_differences(
    loss: Callable[[Tensor], Tensor], point: Tensor, chosen: list[int]
) -> tuple[Tensor, Tensor]:
    """The same where autograd has no second derivative: central differences of the gradient."""

    def grad_at(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        torch.manual_seed(SEED)
        (grad,) = torch.autograd.grad(loss(x), x, materialize_grads=True)
        return grad.detach()

    step = 1e-5
    diagonal = torch.zeros(len(chosen), dtype=point.dtype)
    for k, i in enumerate(chosen):
        shift = torch.zeros_like(point).reshape(-1)
        shift[i] = step
        shift = shift.reshape(point.shape)
        change = grad_at(point + shift) - grad_at(point - shift)
        diagonal[k] = (change / (2 * step)).reshape(-1)[i]
    return grad_at(point), diagonal


def by_values(
    loss: Callable[[Tensor], Tensor], point: Tensor, chosen: list[int], own: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where autograd's gradient is none: differences of the loss.

    The gradient has `own` where it is not computed.
    """

    def loss_at(x: Tensor) -> float:
        torch.manual_seed(SEED)
        return loss(x).item()

    step, middle = 1e-3, loss_at(point)
    grad, diagonal = own.clone(), torch.zeros(len(chosen), dtype=point.dtype)
    for k, i in enumerate(chosen):
        shift = torch.zeros_like(point)
        shift.view(-1)[i] = step
        above, below = loss_at(point + shift), loss_at(point - shift)
        grad.view(-1)[i] = (above - below) / (2 * step)
        diagonal[k] = (above - 2 * middle + below) / step**2
    return grad, diagonal


def reference(case: Case, loss: Callable[[Tensor], Tensor], own: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient, and entries of the diagonal; how often autograd differentiates is found out."""
    chosen = case.coordinates()
    if case.times == 2:
        try:
            return exact(loss, case.point, chosen)
        except RuntimeError as error:  # the database does not know it of every entry
            if "is not implemented" not in str(error):
                raise
            case.times = 1
    if case.times == 1:
        return by_differences(loss, case.point, chosen)
    return by_values(loss, case.point, chosen, own)


def forward_of(hs: Any) -> fx.GraphModule:
    """The loss alone as the graph computes it: it draws the random numbers that the graph does."""
    graph = fx.Graph()
    values = graph.graph_copy(hs.graph, {}, return_output_node=False)
    graph.output(values[0])
    graph.eliminate_dead_code()
    return fx.GraphModule(hs, graph)


def draws(module: fx.GraphModule) -> bool:
    """Whether it draws random numbers (the database's own wrappers hide that behind a seed)."""
    tags = [getattr(n.target, "tags", ()) for n in module.graph.nodes]
    return any(torch.Tag.nondeterministic_seeded in t for t in tags)


def difference(value: Tensor, reference: Tensor) -> float:
    """The largest, over the largest entry of the reference (or 1e-3)."""
    if not value.numel():
        return 0.0
    same = (value == reference) | (value.isnan() & reference.isnan())
    gap = torch.where(same, 0.0, (value - reference).abs())
    finite = reference[reference.isfinite()]
    scale = max(finite.abs().max().item() if finite.numel() else 0.0, 1e-3)
    worst = gap.max().item()
    return math.inf if math.isnan(worst) else worst / scale


def run_case(case: Case, fallback: str | None) -> tuple[str, str]:
    """Status and detail of one case."""
    options = {"fallback": fallback} if fallback else {}
    try:
        hs = hesscale_fx.transform(
            case.loss, None, (case.point,), wrt="inputs", dynamic=False, **options
        )
        torch.manual_seed(SEED)
        out = hs(case.point)
        (entry,) = hs.report().values()
    except hesscale_fx.HesScaleError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        return "refused", f"{type(error).__name__}: " + " ".join(lines)[:300]
    forward = forward_of(hs)
    loss = forward if draws(forward) else case.loss
    ((_, own_grad),), ((_, own),) = out.grads.items(), out.hess_diag.items()
    grad, diagonal = reference(case, loss, own_grad)
    off = difference(own_grad, grad)
    if off > (TOLERANCE if case.times else ROUGH):
        return "wrong", f"gradient {off:.1e}"
    off = difference(own.reshape(-1)[case.coordinates()], diagonal)
    if off > (TOLERANCE if case.times == 2 else ROUGH):
        lost = "; ".join(map(str, entry.lost))
        return ("wrong" if entry.exact else "approximate"), f"diagonal {off:.1e} {lost}"
    return "correct", ""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds of processor time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


SEVERITY = ["correct", "approximate", "refused", "wrong", "error"]


def run_entry(
    op: Any, fallback: str | None = None, count: int = 2, inplace: bool = False
) -> Outcome:
    """All cases of one entry; the worst status counts."""
    worst, detail, cases, twice = "correct", "", 0, op.supports_gradgrad
    start = time.process_time()
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in samples_of(op, count, inplace):
                for case in cases_of(op, sample, inplace):
                    cases += 1
                    status, why = run_case(case, fallback)
                    twice = twice and case.times == 2
                    if SEVERITY.index(status) > SEVERITY.index(worst):
                        worst, detail = status, why
    except Exception as error:  # anything but a HesScaleError is a bug to list
        text = str(error).strip().splitlines()
        if inplace and text and "derivative for 'inplace version" in text[0]:
            return Outcome(op.full_name, "skipped", cases, text[0], False)  # PyTorch has none
        worst, detail = "error", f"{type(error).__name__}: {text[0][:200] if text else ''}"
    if not cases and worst == "correct":
        worst, detail = "skipped", "no small sample with a differentiable real argument"
    seconds = round(time.process_time() - start, 2)
    return Outcome(op.full_name, worst, cases, detail, twice, seconds)


def run_named(name: str, fallback: str | None, count: int, inplace: bool) -> Outcome:
    """In a worker, which has the database from its parent."""
    op = next(op for op in entries(name) if op.full_name == name)
    return run_entry(op, fallback, count, inplace)


def run_all(
    names: list[str],
    fallback: str | None = None,
    count: int = 2,
    inplace: bool = False,
    workers: int = 2,
    kept: Any = None,
) -> list[Outcome]:
    """The named entries, with a log line now and then; `kept` has some already and gets all."""
    start = last = time.perf_counter()
    found: Any = {} if kept is None else kept
    torch.set_num_threads(1)

    def key(name: str) -> str:
        return f"{name}, {fallback or 'plain'}, {count}{', in place' if inplace else ''}"

    left = [name for name in names if key(name) not in found]
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(run_named, name, fallback, count, inplace): name for name in left}
        for i, job in enumerate(as_completed(jobs)):
            found[key(jobs[job])] = asdict(job.result())
            now = time.perf_counter()
            if now - last > 10:
                last = now
                print(f"{i + 1}/{len(left)} entries in {now - start:.0f} s", file=sys.stderr)
    return [Outcome(**found[key(name)]) for name in names]


def share(outcomes: list[Outcome]) -> str:
    """How many of those that PyTorch differentiates twice are correct."""
    twice = [o for o in outcomes if o.twice and o.status != "skipped"]
    right = sum(o.status == "correct" for o in twice)
    return f"{right} of {len(twice)} ({right / max(len(twice), 1):.1%})"


def counts(outcomes: list[Outcome]) -> str:
    """How many end in each way."""
    found = Counter(o.status for o in outcomes)
    return ", ".join(f"{found[s]} {s}" for s in [*SEVERITY, "skipped"] if found[s])


def rows(outcomes: list[Outcome]) -> list[str]:
    """Those that are not correct, as rows of a Markdown table."""
    lines = ["| Operator | Ends | |", "|---|---|---|"]
    for o in outcomes:
        if o.status != "correct":
            detail = o.detail.split(" Register one")[0].replace("|", "\\|")
            detail = re.sub(r" at \S*:\d+: .*?(?=: |$)", "", detail)
            lines.append(f"| `{o.name}` | {o.status} | {detail[:160]} |")
    return lines


def share_of_units(outcomes: list[Outcome]) -> str:
    """The same of those that are one unit of the recursion."""
    return share([o for o in outcomes if o.status != "approximate"])


def processor_minutes(outcomes: list[Outcome]) -> str:
    """What a run took."""
    return f"{sum(o.seconds for o in outcomes) / 60:.1f} minutes of processor time on one thread"


def document(results: dict[str, list[Outcome]], samples: int) -> str:
    """The contents of docs/operators.md."""
    plain = results["plain"]
    rest = {o.name: o for o in results["exact"]}
    together = [rest.get(o.name, o) for o in plain]
    head = __doc__.split("\n\n", 2)
    return "\n".join(
        [
            "# Operators",
            "",
            f"Generated by `make operators ARGS='--samples {samples}'` with torch "
            f"{torch.__version__.split('+')[0]}; do not edit.",
            "",
            head[2].strip(),
            "",
            "An entry is one of the database, an operator or a variant of one; a case is one "
            "argument of one sample.",
            "",
            f"- No fallback: {counts(plain)}; {sum(o.cases for o in plain)} cases, "
            f"{processor_minutes(plain)}. Of the entries that PyTorch differentiates twice "
            f"{share(plain)} are correct.",
            f'- `fallback="exact"` besides: {counts(together)}; {share(together)}.',
            f"- In-place variants, on a copy: {counts(results['inplace'])}. (PyTorch does not "
            "differentiate calls with `out=`.)",
            "",
            "What is approximate is several units of the recursion, such as attention or a linear "
            "layer with its loss: between units the recursion drops off-diagonal parts by "
            "definition, and `report()` says where. Of the entries that are one unit "
            f'{share_of_units(plain)} are correct. `fallback="exact"` makes one unit of each call '
            "that is small, by the columns of its Jacobian; then the rest are operators on sparse "
            "layouts.",
            "",
            "## Not correct without a fallback",
            "",
            *rows(plain),
            "",
            '## Not correct with `fallback="exact"`',
            "",
            *rows(together),
            "",
            "## In-place variants that are not correct",
            "",
            *rows(results["inplace"]),
            "",
            "## Correct",
            "",
            *textwrap.wrap(
                ", ".join(f"`{o.name}`" for o in plain if o.status == "correct"),
                100,
                break_on_hyphens=False,
            ),
            "",
        ]
    )


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only entries whose name contains this")
    parser.add_argument("--fallback", choices=["exact", "estimate"])
    parser.add_argument("--inplace", action="store_true", help="the in-place variants")
    parser.add_argument("--samples", type=int, default=2, help="of each entry")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, help="run everything, write the document here")
    arguments = parser.parse_args()

    kept = Kept("operators", version(Path(__file__)))

    def run(names: list[str], fallback: str | None, inplace: bool) -> list[Outcome]:
        return run_all(names, fallback, arguments.samples, inplace, arguments.workers, kept)

    chosen = entries(arguments.match)
    names = [op.full_name for op in chosen]
    within = [op.full_name for op in chosen if op.inplace_variant is not None]
    if arguments.table:
        plain = run(names, None, False)
        left = [o.name for o in plain if o.status != "correct"]
        results = {"plain": plain, "exact": run(left, "exact", False)}
        results["inplace"] = run(within, None, True)
        arguments.table.write_text(document(results, arguments.samples))
        outcomes = plain
    else:
        listed = within if arguments.inplace else names
        outcomes = run(listed, arguments.fallback, arguments.inplace)
        for outcome in outcomes:
            if outcome.status != "correct":
                print(f"{outcome.status:12} {outcome.name:40} {outcome.detail}")
    print(f"{counts(outcomes)}; of those with second derivatives {share(outcomes)} correct")


if __name__ == "__main__":
    main()
