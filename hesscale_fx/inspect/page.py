"""One self-contained HTML file: the module tree, the graph, and the values of a result."""

from __future__ import annotations

import html as markup
import json
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscale_fx.inspect.drawing import RULES
from hesscale_fx.inspect.layout import readable_depth
from hesscale_fx.inspect.nodes import Record, records
from hesscale_fx.inspect.summary import of_records

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule, Result

# What the rules compute, by the structure of the Jacobian J of y = f(x).
GRADIENT = "g_x = Jᵀ g_y"
CURVATURE = {
    "diagonal": "s_x = f′(x)² s_y + f″(x) g_y",
    "row": "s_x = (J∘J)ᵀ s_y + Σₖ gₖ ∂²yₖ/∂x²,  J = diag(a) + B Cᵀ",
    "selection": "s_x = Jᵀ s_y  (entries of J are 0 or 1)",
    "scaled selection": "s_x = Jᵀ (scale · s_y)",
    "contraction": "s_x = (J∘J)ᵀ s_y  (the other operand squared)",
}
GENERAL = "s_x = (J∘J)ᵀ s_y + Σₖ gₖ ∂²yₖ/∂x²"
ROWS, COLUMNS, BINS, LARGEST = 48, 96, 40, 5


def html(
    hs: HesScaleModule,
    path: str | Path | None = None,
    values: Result | None = None,
    *args: Any,
    **kwargs: Any,
) -> str:
    """Write a page to look at the emitted graph in a browser; it needs no network and no server.

    It shows the modules and the graph, with search, zoom and collapsing; for each node its source
    line, rule, formula, operands, and what was generated from it. It is used with mouse or
    keyboard, in light and dark, and prints.

    Args:
        hs: what `hesscale_fx.transform` returned.
        path: where to write; None only returns the text.
        values: what a call returned; adds for each parameter a heat map of the diagonal, its
            histogram, the share that is negative, and the largest entries.
        *args: what a call would get; without, the graph that served last is shown.
        **kwargs: the model's keyword arguments.

    Returns:
        The page.

    Raises:
        NotCapturedError: there is no graph yet and no arguments are given.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> hs = hesscale_fx.transform(nn.Linear(4, 1), nn.MSELoss())
        >>> out = hs(torch.randn(5, 4), torch.randn(5, 1))
        >>> page = hesscale_fx.inspect.html(hs, values=out)
        >>> page.startswith("<!doctype html>"), "weight_hess" in page
        (True, True)
    """
    data = content(hs, values, args, kwargs)
    title = f"{type(hs._model).__name__.removeprefix('_')}, {hs._build.method.name}"
    page = asset("page.html")
    for mark, text in (
        ("{{title}}", markup.escape(title)),
        ("{{style}}", asset("page.css")),
        ("{{script}}", asset("page.js")),
        # No end tag or comment may appear inside the script element that holds the data.
        ("{{data}}", json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    ):
        page = page.replace(mark, text)  # the data last: it may hold anything
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def asset(name: str) -> str:
    """A part of the page."""
    return (resources.files("hesscale_fx.inspect") / "assets" / name).read_text(encoding="utf-8")


def content(
    hs: HesScaleModule, values: Result | None, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the page shows."""
    found = records(hs, args, kwargs)
    index = {r.name: i for i, r in enumerate(found)}
    table = of_records(found)
    return {
        "method": hs._build.method.name,
        "depth": readable_depth(found),
        "colors": RULES,
        "nodes": [node(r, index) for r in found],
        "modules": [
            {
                "path": row.module,
                "type": row.type,
                "parameters": row.parameters,
                "flops": [row.forward, row.gradient, row.curvature],
                "exact": [row.exact, row.differentiated],
            }
            for row in table
        ],
        "summary": str(table),
        "values": [] if values is None else [diagonal(n, h) for n, h in values.hess_diag.items()],
    }


def node(r: Record, index: dict[str, int]) -> dict[str, Any]:
    """A node for the page; other nodes by their number."""
    return {
        "name": r.name,
        "op": r.op,
        "role": r.role,
        "shape": r.shape,
        "dtype": r.dtype,
        "module": r.module,
        "regions": r.regions,
        "structure": r.structure,
        "formula": formula(r),
        "exact": r.exact,
        "line": r.line,
        "flops": r.flops,
        "bytes": r.bytes,
        "inputs": [[where, index[name]] for where, name in r.inputs],
        "forward": [index[name] for name in r.forward],
    }


def formula(r: Record) -> str:
    """What the rule that made a node computes."""
    if r.role == "gradient":
        return GRADIENT if r.rule else ""
    if r.role == "curvature":
        return CURVATURE.get(r.rule, GENERAL) if r.rule else ""
    return ""


# --- values -------------------------------------------------------------------------------------


def diagonal(name: str, value: Tensor) -> dict[str, Any]:
    """What the page shows of one Hessian diagonal; entries that are not finite are only counted."""
    flat = value.detach().double().cpu().flatten()
    good = flat[flat.isfinite()]
    top = good.abs().max().item() if len(good) else 0.0
    return {
        "name": name,
        "shape": list(value.shape),
        "numel": flat.numel(),
        "infinite": flat.numel() - len(good),
        "negative": (good < 0).double().mean().item() if len(good) else 0.0,
        "zero": (good == 0).double().mean().item() if len(good) else 0.0,
        "mean": good.mean().item() if len(good) else 0.0,
        "min": good.min().item() if len(good) else 0.0,
        "max": good.max().item() if len(good) else 0.0,
        "top": top,
        "map": heat_map(value.detach().double().cpu()),
        "histogram": histogram(good, top),
        "largest": largest(value.detach().double().cpu()),
    }


def heat_map(value: Tensor) -> list[list[float | None]]:
    """The diagonal as a matrix, its first dimension down; large ones by means of blocks."""
    if not value.numel():
        return []
    rows = value.reshape(value.shape[0] if value.dim() > 1 else 1, -1)
    # Blocks are full rectangles, so the mean of a block is the mean of its rows' means.
    bands = torch.stack([band.mean(0) for band in rows.tensor_split(min(ROWS, rows.shape[0]), 0)])
    blocks = bands.tensor_split(min(COLUMNS, rows.shape[1]), 1)
    parts = torch.stack([block.mean(1) for block in blocks], 1).tolist()
    return [[rounded(v) if math.isfinite(v) else None for v in row] for row in parts]


def rounded(value: float) -> float:
    """To what a colour shows, in a third of the characters."""
    return float(f"{value:.4g}")


def histogram(good: Tensor, top: float) -> dict[str, Any]:
    """Counts by magnitude over the upper twelve decades, positive and negative apart."""
    if not top:
        return {"low": 0.0, "high": 0.0, "positive": [], "negative": []}
    high = math.log10(top)
    used = good[good != 0]
    low = max(high - 12, used.abs().min().log10().item())
    low = min(low, high - 1)
    found: dict[str, Any] = {"low": low, "high": high}
    for side, part in (("positive", used[used > 0]), ("negative", -used[used < 0])):
        logs = part.log10().clamp(low, high)
        found[side] = [int(n) for n in torch.histc(logs, BINS, low, high)]
    return found


def largest(value: Tensor) -> list[list[Any]]:
    """Index and value of the entries of largest magnitude."""
    flat = value.flatten()
    sizes = torch.where(flat.isfinite(), flat.abs(), -1.0)
    count = min(LARGEST, int(flat.isfinite().sum()))
    places = sizes.topk(count).indices.tolist()
    return [
        [
            [int(i) for i in torch.unravel_index(torch.tensor(place), value.shape)],
            flat[place].item(),
        ]
        for place in places
    ]
