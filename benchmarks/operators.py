"""Every differentiable operator of PyTorch's own database, against the exact Hessian diagonal.

    python benchmarks/operators.py [--fallback exact] [--samples 3] [--match fft] [--out FILE]

The entries are those of ``torch.testing._internal.common_methods_invocations.op_db`` that autograd
differentiates in float64 on CPU, each with the first of its own sample inputs that are small. Every
floating-point argument is differentiated alone, through `hesscale_fx.transform`, under a head of
random linear and diagonal quadratic terms, whose curvature the recursion must carry exactly
(`Head` in hesscale_fx/check.py; a complex output counts by its real and imaginary part). The
reference is double backward through PyTorch's own formulas.

Each entry ends as one of

- correct: gradient and diagonal of every sample and argument agree;
- approximate: some diagonal differs and ``report()`` says so, naming where;
- refused: by an error that names the operator;
- wrong, or error: a bug.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscale_fx

TOLERANCE = 1e-7
LARGEST = 400  # elements of a differentiated argument
WIDEST = 2000  # elements of an output
SECONDS = 60  # for one entry
SEED = 0


@dataclass
class Outcome:
    """What became of one entry."""

    name: str
    status: str
    cases: int  # pairs of a sample and an argument
    detail: str = ""
    twice: bool = True  # whether PyTorch has its second derivative


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


def samples_of(op: Any, count: int) -> list[Any]:
    """Some of the entry's own samples: small, and of different shapes first."""
    torch.manual_seed(SEED)
    small = []
    for sample in itertools.islice(
        op.sample_inputs("cpu", torch.float64, requires_grad=True), 200
    ):
        tensors = tensors_of((sample.input, sample.args, sample.kwargs))
        sizes = [t.numel() for t in tensors if t.is_floating_point() and t.requires_grad]
        if sizes and 0 < max(sizes) <= LARGEST:
            small.append(sample)
    # Evenly among all, so that options of every kind come up.
    step = max(1, math.ceil(len(small) / count))
    return small[step - 1 :: step][:count] if small else []


def tensors_of(tree: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]


class Head:
    """``sum of w (y - y0) + d (y - y0)^2 / 2`` over the real parts of the outputs."""

    def __init__(self, outputs: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(SEED)

        def draw(y: Tensor) -> Tensor:
            return torch.randn(y.shape, generator=generator, dtype=y.dtype)

        self.terms = [(y, draw(y), draw(y)) for y in outputs]

    def __call__(self, outputs: list[Tensor]) -> Tensor:
        total: Any = 0.0
        for y, (y0, w, d) in zip(outputs, self.terms, strict=True):
            total = total + (w * (y - y0)).sum() + 0.5 * (d * (y - y0) ** 2).sum()
        return total


def real_outputs(result: Any) -> list[Tensor]:
    found = [y for y in tensors_of(result) if y.is_floating_point() or y.is_complex()]
    found = [y.to_dense() if y.layout is not torch.strided else y for y in found]
    return [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in found]


@dataclass
class Case:
    """One argument of one sample: the scalar function of it alone, and the point."""

    loss: Callable[[Tensor], Tensor]
    point: Tensor


def cases_of(op: Any, sample: Any, variant: Callable | None = None) -> Iterator[Case]:
    """One case for each floating-point argument of the sample that requires grad."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    plain = [v.detach() if isinstance(v, Tensor) else v for v in leaves]
    function = variant or op.op

    def run(position: int, x: Tensor) -> list[Tensor]:
        inner = list(plain)
        inner[position] = x
        first, args, kwargs = pytree.tree_unflatten(inner, spec)
        result = sample.output_process_fn_grad(function(first, *args, **kwargs))
        return real_outputs(result)

    for position, value in enumerate(leaves):
        if not (isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()):
            continue
        torch.manual_seed(SEED)
        with torch.enable_grad():
            x = value.detach().clone().requires_grad_()
            outputs = run(position, x)
        used = [i for i, y in enumerate(outputs) if y.requires_grad]
        if not used or sum(outputs[i].numel() for i in used) > WIDEST:
            continue
        head = Head([outputs[i].detach() for i in used])

        def loss(
            x: Tensor, position: int = position, head: Head = head, used: list[int] = used
        ) -> Tensor:
            found = run(position, x)
            return head([found[i] for i in used])

        yield Case(loss, value.detach().clone())


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian diagonal by double backward."""
    x = case.point.clone().requires_grad_()
    diagonal = torch.zeros(x.numel(), dtype=x.dtype)
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        value = case.loss(x)
        (grad,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        if grad.requires_grad:
            flat = grad.reshape(-1)
            for i in range(x.numel()):
                (row,) = torch.autograd.grad(flat[i], x, retain_graph=True, materialize_grads=True)
                diagonal[i] = row.reshape(-1)[i]
    return grad.detach(), diagonal.reshape(x.shape)


def by_differences(case: Case) -> tuple[Tensor, Tensor]:
    """The same where autograd has no second derivative: central differences of the gradient."""

    def grad_at(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        torch.manual_seed(SEED)
        (grad,) = torch.autograd.grad(case.loss(x), x, materialize_grads=True)
        return grad.detach()

    x, step = case.point, 1e-5
    diagonal = torch.zeros(x.numel(), dtype=x.dtype)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).reshape(-1)
        shift[i] = step
        shift = shift.reshape(x.shape)
        diagonal[i] = ((grad_at(x + shift) - grad_at(x - shift)) / (2 * step)).reshape(-1)[i]
    return grad_at(x), diagonal.reshape(x.shape)


def difference(value: Tensor, reference: Tensor) -> float:
    """The largest, over the largest entry of the reference or 1."""
    if not value.numel():
        return 0.0
    same = (value == reference) | (value.isnan() & reference.isnan())
    gap = torch.where(same, 0.0, (value - reference).abs())
    finite = reference[reference.isfinite()]
    scale = max(finite.abs().max().item() if finite.numel() else 0.0, 1e-3)
    worst = gap.max().item()
    return math.inf if math.isnan(worst) else worst / scale


def run_case(case: Case, fallback: str | None, twice: bool) -> tuple[str, str]:
    """Status and detail of one case."""
    options = {"fallback": fallback} if fallback else {}
    try:
        hs = hesscale_fx.transform(
            case.loss, None, (case.point,), wrt="inputs", dynamic=False, **options
        )
        torch.manual_seed(SEED)
        out = hs(case.point)
        says_exact = all(entry.exact for entry in hs.report().values())
    except hesscale_fx.HesScaleError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        return "refused", f"{type(error).__name__}: " + " ".join(lines)[:300]
    grad, diagonal = exact(case) if twice else by_differences(case)
    tolerance = TOLERANCE if twice else 1e-4
    off = difference(next(iter(out.grads.values())), grad)
    if off > TOLERANCE:
        return "wrong", f"gradient {off:.1e}"
    off = difference(next(iter(out.hess_diag.values())), diagonal)
    if off > tolerance:
        lost = "; ".join(str(loss) for e in hs.report().values() for loss in e.lost)
        return ("wrong" if says_exact else "approximate"), f"diagonal {off:.1e} {lost}"
    return "correct", ""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


SEVERITY = ["correct", "approximate", "refused", "wrong", "error"]


def run_entry(op: Any, fallback: str | None, count: int) -> Outcome:
    """All cases of one entry; the worst status counts."""
    worst, detail, cases = "correct", "", 0
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in samples_of(op, count):
                for case in cases_of(op, sample):
                    cases += 1
                    status, why = run_case(case, fallback, op.supports_gradgrad)
                    if SEVERITY.index(status) > SEVERITY.index(worst):
                        worst, detail = status, why
    except Exception as error:  # anything but a HesScaleError is a bug to list
        text = str(error).strip().splitlines()
        worst, detail = "error", f"{type(error).__name__}: {text[0][:200] if text else ''}"
    if not cases and worst == "correct":
        worst, detail = "skipped", "no small sample with a differentiable real argument"
    return Outcome(op.full_name, worst, cases, detail, op.supports_gradgrad)


def run_index(index: int, match: str, fallback: str | None, count: int) -> Outcome:
    return run_entry(entries(match)[index], fallback, count)


def run_all(match: str, fallback: str | None, count: int, workers: int) -> list[Outcome]:
    """Every entry, in the order of the database, with a log line now and then."""
    total = len(entries(match))
    start = last = time.perf_counter()
    outcomes = []
    torch.set_num_threads(1)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(run_index, i, match, fallback, count) for i in range(total)]
        for i, job in enumerate(jobs):
            outcomes.append(job.result())
            now = time.perf_counter()
            if now - last > 10:
                last = now
                print(f"{i + 1}/{total} entries in {now - start:.0f} s", file=sys.stderr)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only entries whose name contains this")
    parser.add_argument("--fallback", choices=["exact", "estimate"])
    parser.add_argument("--samples", type=int, default=3, help="of each entry")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    arguments = parser.parse_args()
    outcomes = run_all(
        arguments.match, arguments.fallback, arguments.samples, arguments.workers
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    for outcome in outcomes:
        if outcome.status != "correct":
            print(f"{outcome.status:12} {outcome.name:40} {outcome.detail}")
    print(Counter(o.status for o in outcomes), f"{sum(o.cases for o in outcomes)} cases")


if __name__ == "__main__":
    main()
