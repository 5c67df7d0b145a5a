"""Drawings of the emitted graph through Graphviz: forward and its mirrored reverse side by side."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesscale_fx.errors import InvalidArgumentError, MissingPackageError
from hesscale_fx.inspect.layout import HEIGHT, Box, Frame, Layout, readable_depth
from hesscale_fx.inspect.nodes import Records, records
from hesscale_fx.inspect.summary import in_units

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule

FORMATS = ("svg", "pdf", "png")
LONGEST = 36  # characters of an operator with its shape
# Fills that black text is readable on, told apart by the usual kinds of colour blindness.
RULES = {
    "diagonal": "#fde2a7",
    "row": "#f7b6a1",
    "selection": "#d5e8c3",
    "scaled selection": "#b3d9c6",
    "contraction": "#b5d3f0",
}
OTHER, PLAIN = "#e0cdf0", "#f4f4f4"
EXACT, APPROXIMATE = "#b9e0c0", "#f6c08a"


def draw(
    hs: HesScaleModule,
    path: str | Path | None = None,
    *args: Any,
    depth: int | None = None,
    color: str = "rule",
    **kwargs: Any,
) -> str:
    """Draw the emitted graph: modules and regions as boxes, gradient and curvature mirrored.

    Time runs down in the forward and up beside it in the reverse, so what was generated from an
    operator lies next to it. A dashed outline is an approximate curvature, a bold one a result.

    Args:
        hs: what `hesscale_fx.transform` returned.
        path: where to write; its suffix says what: ``.svg``, ``.pdf``, ``.png`` (through the
            program ``dot`` of Graphviz) or ``.dot``. None only returns the text.
        *args: what a call would get; without, the graph that served last is drawn.
        depth: modules at this depth are collapsed to one box for each role; 0 collapses all. By
            default as deep as stays readable.
        color: fill by ``"rule"`` or by ``"exact"``.
        **kwargs: the model's keyword arguments.

    Returns:
        The drawing in the DOT language.

    Raises:
        InvalidArgumentError: an unknown suffix or colour.
        MissingPackageError: Graphviz is not installed and the suffix needs it.
        NotCapturedError: there is no graph yet and no arguments are given.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> hs = hesscale_fx.transform(nn.Linear(4, 1), nn.MSELoss())
        >>> _ = hs.materialize(torch.randn(5, 4), torch.randn(5, 1))
        >>> text = hesscale_fx.inspect.draw(hs)
        >>> text.splitlines()[0], "weight_hess" in text
        ('digraph hesscale {', True)
    """
    if color not in ("rule", "exact"):
        raise InvalidArgumentError(f"color={color!r}: choose 'rule' or 'exact'.")
    suffix = Path(path).suffix.removeprefix(".").lower() if path is not None else "dot"
    if suffix not in (*FORMATS, "dot", "gv"):
        raise InvalidArgumentError(f"{path}: end it in .svg, .pdf, .png or .dot.")
    text = "\n".join(Drawing(records(hs, args, kwargs), depth, color).lines())
    if path is not None and suffix in FORMATS:
        render(text, Path(path), suffix)
    elif path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def render(text: str, path: Path, suffix: str) -> None:
    """Let Graphviz lay the drawing out."""
    dot = shutil.which("dot")
    if dot is None:
        raise MissingPackageError(
            f"Writing {path} needs the program dot of Graphviz, which is not installed (package "
            "graphviz of Debian, Homebrew and conda). Write a .dot file instead, or use "
            "hesscale_fx.inspect.html, which needs nothing."
        )
    made = subprocess.run(
        [dot, "-Kneato", "-n2", f"-T{suffix}"],
        input=text.encode(),
        capture_output=True,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(f"dot failed: {made.stderr.decode(errors='replace').strip()}")
    path.write_bytes(made.stdout)


class Drawing:
    """The boxes and lines of one drawing; Graphviz renders them where they are."""

    def __init__(self, found: Records, depth: int | None, color: str) -> None:
        self._records = found
        self._color = color
        self._results = {name: where for where, name in found["output"].inputs}
        depth = readable_depth(found) if depth is None else depth
        self._layout = Layout(found, depth, 0)
        longest = max(len(s) for b in self._layout.boxes for s in self._label(b).split("\n"))
        self._layout = Layout(found, depth, 10 + 5.3 * longest)

    def lines(self) -> Iterable[str]:
        """The drawing in DOT."""
        yield "digraph hesscale {"
        yield "  graph [splines=true, outputorder=edgesfirst, labelloc=t, fontname=Helvetica,"
        yield f"    label={self._legend()}]"
        yield '  node [shape=box, fontname=Helvetica, fontsize=9, color="#555555", fixedsize=true,'
        yield f"    width={inches(self._layout.width)}, height={inches(HEIGHT)}]"
        yield '  edge [color="#777777", arrowsize=0.5]'
        for i, frame in enumerate(self._layout.frames):
            yield from self._frame(i, frame)
        for box in self._layout.boxes:
            yield f"  {quoted(box.id)} [{self._attributes(box)}]"
        yield from self._edges()
        yield "}"

    # --- boxes ----------------------------------------------------------------------------------

    @staticmethod
    def _frame(number: int, frame: Frame) -> Iterable[str]:
        width, height = frame.right - frame.left, frame.bottom - frame.top
        module = frame.kind == "module"
        color, style = ("#999999", "solid") if module else ("#bbbbbb", "dashed")
        yield (
            f'  frame{number} [label="", width={inches(width)}, height={inches(height)}, '
            f'color="{color}", style={style}, '
            f"pos={place(frame.left + width / 2, frame.top + height / 2)}]"
        )
        # Module names on the left, structures of regions on the right.
        x = frame.left + 4 if module else frame.right - 4
        text = frame.label.replace("&", "&amp;")
        side = 3.2 * len(text) * (1 if module else -1)
        yield (
            f'  "name {number}" [shape=plain, fixedsize=false, label={quoted(frame.label)}, '
            f'fontsize={11 if module else 8}, fontcolor="{"#333333" if module else "#888888"}", '
            f"pos={place(x + side, frame.top + (9 if module else 5))}]"
        )

    def _attributes(self, box: Box) -> str:
        first = box.members[0]
        styles = ["filled", "rounded"]
        if box.lane == "curvature" and not box.exact:
            styles.append("dashed")
        if self._result(box):
            styles.append("bold")
        found = {
            "label": self._label(box),
            "style": ",".join(styles),
            "fillcolor": self._fill(box),
            "tooltip": first.line or f"{short(first.op)} {first.shape}".strip() or first.name,
        }
        text = ", ".join(f"{k}={quoted(v)}" for k, v in found.items())
        return f"{text}, pos={place(box.x, box.y)}"

    def _result(self, box: Box) -> str:
        """What a node is in the result of a call, if anything."""
        return "" if len(box.members) > 1 else self._results.get(box.members[0].name, "")

    def _label(self, box: Box) -> str:
        if len(box.members) == 1:
            r = box.members[0]
            return "\n".join(
                filter(None, (r.name, cut(f"{short(r.op)} {r.shape}"), self._result(box)))
            )
        cost = sum(r.flops for r in box.members)
        counted = f"{len(box.members)} node{'s' if len(box.members) > 1 else ''}"
        return "\n".join(
            filter(
                None,
                (
                    box.lane,
                    counted + (f", {in_units(cost)} FLOPs" if cost else ""),
                    "approximate" if box.lane == "curvature" and not box.exact else "",
                ),
            )
        )

    def _fill(self, box: Box) -> str:
        if self._color == "exact":
            if box.lane != "curvature":
                return PLAIN
            return EXACT if box.exact else APPROXIMATE
        structures = {r.structure for r in box.members if r.structure}
        if len(structures) != 1:
            return PLAIN
        return RULES.get(structures.pop(), OTHER)

    def _legend(self) -> str:
        if self._color == "exact":
            shown = {"exact curvature": EXACT, "approximate curvature": APPROXIMATE}
        else:
            present = {r.structure for r in self._records}
            shown = {k: v for k, v in RULES.items() if k in present}
        cells = "".join(f'<td bgcolor="{v}">{escape(k)}</td>' for k, v in shown.items())
        note = "<td>dashed: approximate curvature</td><td>bold: a result</td>"
        return f'<<table border="0" cellspacing="4"><tr>{cells}{note}</tr></table>>'

    # --- edges ----------------------------------------------------------------------------------

    def _edges(self) -> Iterable[str]:
        box_of = self._layout.box_of
        drawn: dict[tuple[Box, Box], int] = {}
        for record in self._records:
            end = box_of.get(record.name)
            for _, name in record.inputs:
                begin = box_of.get(name)
                if begin is not None and end is not None and begin is not end:
                    drawn[begin, end] = drawn.get((begin, end), 0) + 1
        for (a, b), count in drawn.items():
            style = f"penwidth={min(1 + count // 4, 3)}"
            if a.lane == "forward" != b.lane:  # what the reverse reads of the forward
                style = 'color="#cccccc", style=dotted'
            yield f"  {quoted(a.id)} -> {quoted(b.id)} [{style}, pos={self._spline(a, b)}]"

    def _spline(self, a: Box, b: Box) -> str:
        """A curve from the side of one box to the side of another, with an arrowhead."""
        half = self._layout.width / 2
        if a.y == b.y:  # sideways
            sign = 1 if b.x > a.x else -1
            points = [(a.x + sign * half, a.y), (b.x - sign * (half + 5), b.y)]
            points[1:1] = [((2 * points[0][0] + points[1][0]) / 3, a.y)] * 2
            tip = (b.x - sign * half, b.y)
        else:
            sign = 1 if b.y > a.y else -1
            y0, y1 = a.y + sign * HEIGHT / 2, b.y - sign * (HEIGHT / 2 + 5)
            bend = (y1 - y0) / 2
            points = [(a.x, y0), (a.x, y0 + bend), (b.x, y1 - bend), (b.x, y1)]
            tip = (b.x, b.y - sign * HEIGHT / 2)
        curve = " ".join(f"{x:.1f},{-y:.1f}" for x, y in points)
        return f'"e,{tip[0]:.1f},{-tip[1]:.1f} {curve}"'


def inches(points: float) -> str:
    """What Graphviz measures boxes in."""
    return f"{points / 72:.3f}"


def place(x: float, y: float) -> str:
    """A fixed place; Graphviz counts y upwards."""
    return f'"{x:.1f},{-y:.1f}!"'


def short(op: str) -> str:
    """``mm`` for ``aten.mm.default``."""
    parts = op.split(".")
    return parts[1] if len(parts) == 3 else op


def cut(text: str) -> str:
    """No wider than most names: the longest label is the width of every box."""
    text = text.strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def quoted(text: str) -> str:
    """As a string of DOT."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
