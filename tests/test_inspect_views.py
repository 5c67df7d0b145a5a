"""Drawings, differences and the page: what they say, and that the page works in a browser."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import time

import pytest
import torch
from models import GPT
from torch import nn

import hesscale_fx
from hesscale_fx import inspect
from hesscale_fx.errors import InvalidArgumentError, MissingPackageError
from hesscale_fx.inspect import drawing
from hesscale_fx.inspect.layout import LANES, Layout, levels
from hesscale_fx.inspect.nodes import records
from hesscale_fx.inspect.page import diagonal


def mlp(middle=None):
    net = nn.Sequential(nn.Linear(4, 8), middle or nn.Tanh(), nn.Linear(8, 3))
    args = torch.randn(5, 4), torch.randint(3, (5,))
    return net, nn.CrossEntropyLoss(), args


def gpt(layers=1):
    net = GPT(vocab=7, d=4, heads=2, layers=layers, length=3)
    args = torch.randint(7, (2, 3)), torch.randint(7, (2, 3))
    return hesscale_fx.transform(net, None, args), args


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net, loss, args = mlp()
    return hesscale_fx.transform(net, loss, args), args


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    return gpt()


# ------------------------------------------------------------------ layout


@pytest.mark.parametrize("depth", [0, 1, 2, 99])
def test_the_forward_runs_down_and_its_reverse_up(deep, depth):
    found = records(deep[0])
    layout = Layout(found, depth, 100)
    place = {(b.x, b.y) for b in layout.boxes}
    assert len(place) == len(layout.boxes), "boxes on top of each other"
    lanes = {lane: [b.x for b in layout.boxes if b.lane == lane] for lane in LANES}
    assert max(lanes["forward"]) < min(lanes["gradient"])
    assert max(lanes["gradient"]) < min(lanes["curvature"])
    missing = {r.name for r in found if r.shape and r.role not in ("parameter", "buffer", "output")}
    assert missing <= set(layout.box_of)
    up = down = 0
    for r in found:
        for _, name in r.inputs:
            a, b = layout.box_of.get(name), layout.box_of.get(r.name)
            if a is None or b is None or a is b or a.lane != b.lane:
                continue
            if a.lane == "forward":
                assert a.y < b.y, (name, r.name)
                down += 1
            else:
                up += a.y > b.y
                assert a.y >= b.y, (name, r.name)
    assert depth == 0 or (up > 2 and down > 2)
    beside = {b.module for b in layout.blocks}
    assert beside == {""} if depth == 0 else len(beside) > 5


def test_frames_hold_their_boxes(deep):
    found = records(deep[0])
    layout = Layout(found, 99, 100)
    for frame in layout.frames:
        assert frame.left < frame.right and frame.top < frame.bottom
        if frame.kind == "module":
            inside = [
                b
                for b in layout.boxes
                if b.members[0].module == frame.label and b.members[0].role == "forward"
            ]
            if len([f for f in layout.frames if f.label == frame.label]) == 1:
                assert all(frame.top < b.y < frame.bottom for b in inside), frame


# ------------------------------------------------------------------ drawings


def test_the_drawing_is_dot(small, tmp_path):
    hs, _ = small
    text = inspect.draw(hs, tmp_path / "g.dot")
    assert (tmp_path / "g.dot").read_text() == text
    names = {n.name for n in hs.graph.nodes if n.op != "output" and n.name != "sym_size"}
    sizes = {n.name for n in hs.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)}
    assert all(f'"{n}" [label=' in text for n in names - sizes)
    assert text.count("{") == text.count("}")
    weight = next(line for line in text.splitlines() if '"_0_weight_hess" [' in line)
    assert "dashed" in weight and "bold" in weight and drawing.RULES["contraction"] in weight
    assert "hess_diag['0.weight']" in weight
    last = next(line for line in text.splitlines() if '"_2_weight_hess" [' in line)
    assert "dashed" not in last
    by_exactness = inspect.draw(hs, color="exact")
    assert drawing.APPROXIMATE in by_exactness and drawing.EXACT in by_exactness


def test_a_large_model_is_collapsed_by_module(deep):
    hs, _ = deep
    text = inspect.draw(hs)
    boxes = re.findall(r'^  "(.*)" \[label="', text, re.MULTILINE)
    assert len([b for b in boxes if not b.startswith("name ")]) < 200 < len(hs.graph.nodes)
    assert '"blocks.0.attn"' in text
    coarse = inspect.draw(hs, depth=1)
    assert '"blocks.0"' not in coarse and '"blocks"' in coarse
    full = inspect.draw(hs, depth=levels(records(hs)))
    drawn = [r.name for r in records(hs) if r.shape and r.role != "output"]
    assert all(f'  "{name}" [label=' in full for name in drawn)
    assert len(boxes) < len(drawn) / 2


def test_a_long_shape_does_not_widen_every_box():
    norm = nn.BatchNorm2d(8)
    args = (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))
    text = inspect.draw(hesscale_fx.transform(norm, nn.MSELoss(), args))
    labels = re.findall(r'\[label="(.*?)", style', text)
    lines = [line for label in labels for line in label.split("\\n")]
    assert any(line.endswith("…") for line in lines)
    operators = [label.split("\\n")[1] for label in labels if "\\n" in label]
    assert max(map(len, operators)) <= drawing.LONGEST


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("suffix,head", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_graphviz_renders_it(small, tmp_path, suffix, head):
    path = tmp_path / f"g.{suffix}"
    inspect.draw(small[0], path)
    data = path.read_bytes()
    assert data.startswith(head)
    if suffix == "svg":
        assert data.count(b'class="node"') > 50 and data.count(b'class="edge"') > 50


def test_without_graphviz_there_is_a_message(small, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"Graphviz.*\.dot"):
        inspect.draw(small[0], tmp_path / "g.svg")
    with pytest.raises(InvalidArgumentError, match=r"\.svg"):
        inspect.draw(small[0], tmp_path / "g.jpeg")
    with pytest.raises(InvalidArgumentError, match="color"):
        inspect.draw(small[0], color="blue")


# ------------------------------------------------------------------ differences


def test_no_difference_from_a_copy(small, deep):
    for hs, args in (small, deep):
        other = copy.deepcopy(hs)
        other(*args)
        found = hs.diff(other)
        assert not found and str(found) == "no difference"


def test_another_capture_of_the_same_model_does_not_differ():
    net, loss, args = mlp()
    assert not hesscale_fx.transform(net, loss, args).diff(hesscale_fx.transform(net, loss, args))


def test_the_difference_of_methods(small):
    hs, args = small
    other = hesscale_fx.transform(hs._model, hs._loss_module, args, method="hesscale_gn")
    found = hs.diff(other)
    assert [(c.module, c.kind) for c in found] == [("", "changed"), ("1", "changed")]
    assert "hesscale_gn" in found[0].what and "curvature" in found[1].what
    back = other.diff(hs)
    assert len(back) == len(found) and "hesscale_gn -> hesscale" in back[0].what
    assert "tanh_backward" in str(found)


def test_the_difference_of_models(small):
    hs, _ = small
    torch.manual_seed(0)
    net, loss, args = mlp(nn.GELU())
    found = hs.diff(hesscale_fx.transform(net, loss, args))
    kinds = {(c.module, c.kind): c.what for c in found}
    assert "aten.tanh" in kinds["1", "removed"] and "aten.gelu" in kinds["1", "added"]
    assert {c.module for c in found} == {"1"}
    wide = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
    shapes = [c for c in hs.diff(hesscale_fx.transform(wide, loss, args)) if "shape" in c.what]
    assert {c.module for c in shapes} == {"0", "1", "2"}


def test_the_difference_of_what_is_differentiated(small):
    hs, args = small
    other = hesscale_fx.transform(hs._model, hs._loss_module, args, wrt="2")
    found = hs.diff(other)
    assert any("0.weight: approximate -> absent" in c.what for c in found)
    assert any(c.module == "1" and "nodes" in c.what for c in found)


# ------------------------------------------------------------------ the page


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_the_graph(small, tmp_path):
    hs, args = small
    page = inspect.html(hs, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    data = data_of(page)
    assert [n["name"] for n in data["nodes"]] == [n.name for n in hs.graph.nodes]
    node = next(n for n in data["nodes"] if n["name"] == "_0_weight_hess")
    assert "J∘J" in node["formula"] and not node["exact"] and node["flops"] == 2 * 8 * 4 * 5
    assert data["values"] == [] and "{{" not in page
    assert data["summary"] == str(hs.summary())


def test_the_page_loads_nothing(small):
    page = inspect.html(small[0])
    assert not re.search(r"https?:|@import|url\((?!#)|\bsrc=|<link|fetch\(|XMLHttp|import\(", page)


def test_hostile_names_stay_text():
    class Odd(nn.Module):
        def forward(self, x):
            return (x * x).sum()  # </script><script>alert(1)</script> {{script}}

    hs = hesscale_fx.transform(Odd(), None, (torch.randn(3),), wrt="inputs")
    page = inspect.html(hs)
    assert page.count("</script>") == 2
    assert any("</script>" in n["line"] for n in data_of(page)["nodes"])


def test_the_values_of_a_result(small):
    hs, args = small
    out = hs(*args)
    shown = {v["name"]: v for v in data_of(inspect.html(hs, values=out))["values"]}
    assert list(shown) == list(out.hess_diag)
    value, about = out.hess_diag["0.weight"].double(), shown["0.weight"]
    assert about["shape"] == [8, 4] and about["numel"] == 32
    assert about["negative"] == pytest.approx((value < 0).double().mean().item())
    assert about["map"] == [[float(f"{v:.4g}") for v in row] for row in value.tolist()]
    counts = about["histogram"]
    assert sum(counts["negative"]) == int((value < 0).sum())
    assert sum(counts["positive"]) == int((value > 0).sum())
    at, largest = about["largest"][0]
    assert abs(largest) == pytest.approx(value.abs().max().item()) == about["top"]
    assert value[tuple(at)].item() == largest


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3),
        torch.tensor(2.0),
        torch.empty(0, 4),
        torch.tensor([math.nan, math.inf, -1.0]),
        torch.full((2,), -math.inf),
        torch.randn(300, 5, 7),
    ],
    ids=["zero", "scalar", "empty", "some not finite", "none finite", "large"],
)
def test_values_of_every_kind(value):
    about = diagonal("w", value)
    json.dumps(about, allow_nan=False)
    assert about["infinite"] == int((~value.isfinite()).sum())
    finite = value[value.isfinite()]
    top = finite.abs().max().item() if finite.numel() else 0.0
    assert about["top"] == pytest.approx(top)
    assert sum(about["histogram"]["positive"]) == int((finite > 0).sum())
    assert len(about["map"]) <= 48 and all(len(row) <= 96 for row in about["map"])
    if value.numel() == 300 * 35:
        block = value.reshape(300, 35).double()[:7, 0].mean().item()
        assert about["map"][0][0] == float(f"{block:.4g}")
        wide = value.reshape(50, 210).double()  # blocks of two rows and two or three columns
        corner = wide[-1:, -2:].mean().item()
        assert diagonal("w", wide)["map"][-1][-1] == float(f"{corner:.4g}")


# ------------------------------------------------------------------ in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,900"]

# What a user does, and what is seen then.
USE = """
<script>
const seen = {}, errors = [];
window.addEventListener("error", (e) => errors.push(e.message));
const key = (target, name) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const boxes = () => document.querySelectorAll("#svg .box").length;
const labels = () => [...document.querySelectorAll("#svg .label")].map((e) => e.textContent);
const details = () => document.getElementById("details").textContent;
const box = (name) => document.querySelector(`#svg .box[data-box="${name}"]`);
const click = (e) => e.dispatchEvent(new MouseEvent("click", { bubbles: true }));
seen.start = boxes();
const search = document.getElementById("search");
search.value = "qkv.weight hess"; search.dispatchEvent(new Event("input"));
seen.found = [...document.querySelectorAll("#results button")].map((e) => e.textContent);
key(search, "Enter");
seen.details = details();
seen.chosen = document.querySelector("#svg .chosen").dataset.box;
click([...document.querySelectorAll("#details button")].find((e) => /^0: /.test(e.textContent)));
seen.operand = details();
key(document.getElementById("svg"), "ArrowUp");
seen.moved = document.querySelector("#svg .chosen").dataset.box;
click([...document.querySelectorAll("#svg .label")].find((e) => /blocks$/.test(e.textContent)));
seen.collapsed = labels();
click(box("module blocks curvature"));
seen.module = details();
key(document.getElementById("svg"), "Enter");
seen.opened = labels();
click(document.getElementById("open"));
seen.all = boxes();
click(document.getElementById("close"));
seen.few = boxes();
click(document.getElementById("color"));
seen.exact = document.getElementById("legend").textContent;
click(document.getElementById("theme"));
seen.theme = document.documentElement.dataset.theme;
seen.values = document.querySelectorAll(".diagonal canvas").length;
seen.errors = errors;
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
</script>
"""


@needs_browser
def test_the_page_in_a_browser(deep, tmp_path):
    hs, args = deep
    page = inspect.html(hs, values=hs(*args))
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", USE + "</body>"), encoding="utf-8")
    ran = subprocess.run(
        [CHROMIUM, *ARGUMENTS, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stdout[-500:]
    import html as markup

    seen = json.loads(markup.unescape(found[1]))
    assert seen["errors"] == []
    assert 20 < seen["start"] < 200
    first = "blocks_0_attn_qkv_weight_hess"
    assert any(first in text for text in seen["found"])
    assert seen["chosen"].endswith("_attn_qkv_weight_hess")
    assert "J∘J" in seen["details"] and "contraction" in seen["details"]
    assert "models.py" in seen["details"] and "aten.mm.default" in seen["details"]
    assert seen["operand"] != seen["details"] and "_qkv_hess" in seen["operand"]
    assert seen["moved"] != seen["chosen"]
    assert not any("blocks.0" in text for text in seen["collapsed"])
    assert "blocks: curvature" in seen["module"]
    assert any("blocks.0" in text for text in seen["opened"])
    drawn = [r for r in records(hs) if r.shape and r.role != "output"]
    assert seen["all"] == len(drawn)
    assert seen["few"] < seen["start"]
    assert "approximate curvature" in seen["exact"]
    assert seen["theme"] == "dark"
    assert seen["values"] == len(hs.report())


@pytest.mark.slow
@needs_browser
def test_five_thousand_nodes_open_in_two_seconds(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    hs, args = gpt(layers=18)
    assert len(hs.graph.nodes) > 5000
    inspect.html(hs, tmp_path / "page.html", hs(*args))
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        errors, requests = [], []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        start = time.perf_counter()
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("html[data-ready]")
        assert time.perf_counter() - start < 2
        page.keyboard.press("/")
        page.keyboard.type("blocks_17_ln1_weight_hess")
        page.keyboard.press("Enter")
        assert "hess_diag['blocks.17.ln1.weight']" in page.inner_text("#details")
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowDown")
        assert page.locator("#svg .chosen").count() == 1
        page.click("#open")
        assert page.locator("#svg .box").count() > 5000
        shot = page.screenshot()
        page.click("#theme")
        dark = page.screenshot()
        assert len(shot) > 20_000 and dark != shot
        page.keyboard.press("Escape")
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.is_visible("#search") and page.is_visible("#svg")
        assert not page.is_visible("#details .help")  # nobody clicks on paper
        style = "e => [getComputedStyle(e).printColorAdjust, getComputedStyle(document.body).color]"
        kept, ink = page.locator("#legend span").first.evaluate(style)
        assert kept == "exact" and ink == "rgb(0, 0, 0)"
        assert len(page.pdf()) > 10_000
        browser.close()
    assert errors == [] and len(requests) == 1
