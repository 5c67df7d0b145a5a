"""Views of the emitted graph, against what a run of it does."""

from __future__ import annotations

import io
import itertools
import json
import math

import networkx as nx
import pytest
import torch
import torch.utils._pytree as pytree
from models import CASES, GPT
from test_models import build
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import hesscale_fx
from hesscale_fx import inspect
from hesscale_fx.errors import NotCapturedError, UnknownNameError


def mlp():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return net, nn.CrossEntropyLoss(), (torch.randn(5, 4), torch.randint(3, (5,)))


def conv():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    loss = lambda z, y: nn.functional.cross_entropy(z, y)  # noqa: E731
    return net, loss, (torch.randn(3, 3, 6, 6), torch.randint(4, (3,)))


def gpt():
    net = GPT(vocab=7, d=4, heads=2, layers=1, length=3)
    return net, None, (torch.randint(7, (2, 3)), torch.randint(7, (2, 3)))


def lstm():
    net = nn.LSTM(4, 5)
    return net, (lambda out: out[0].square().sum()), (torch.randn(3, 2, 4),)


MODELS = {f.__name__: f for f in (mlp, conv, gpt, lstm)}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    torch.manual_seed(0)
    net, loss, args = MODELS[request.param]()
    return hesscale_fx.transform(net, loss, args), args


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net, loss, args = mlp()
    return hesscale_fx.transform(net, loss, args)


# ------------------------------------------------------------------ networkx


def operand_count(node):
    found = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return len(found)


def test_every_node_and_operand_is_there(case):
    hs, _ = case
    graph = inspect.to_networkx(hs)
    assert list(graph.nodes) == [n.name for n in hs.graph.nodes]
    for node in hs.graph.nodes:
        assert graph.in_degree(node.name) == operand_count(node), node
        if node.op != "output" and isinstance(node.meta.get("val"), torch.Tensor):
            about = graph.nodes[node.name]
            value = node.meta["val"]
            assert about["shape"] == "[" + ", ".join(map(str, value.shape)) + "]"
            assert about["dtype"] == str(value.dtype).removeprefix("torch.")


def test_a_repeated_operand_has_two_edges():
    hs = hesscale_fx.transform(lambda x: torch.exp(x * x).sum(), None, wrt="inputs")
    hs.materialize(torch.randn(3))
    graph = inspect.to_networkx(hs)
    (square,) = [n for n, op in graph.nodes(data="op") if op == "aten.mul.Tensor"][:1]
    assert sorted(d["operand"] for d in graph["x"][square].values()) == ["0", "1"]


def test_attributes_say_what_a_node_is(small):
    graph = inspect.to_networkx(small)
    about = graph.nodes["_0_weight_hess"]
    assert (about["role"], about["rule"], about["structure"]) == ("curvature",) + 2 * (
        "contraction",
    )
    assert about["module"] == "0" and about["source"] == "0_weight" and not about["exact"]
    assert about["flops"] == 2 * 8 * 4 * 5 and about["bytes"] == 8 * 4 * 4
    assert graph.nodes["_2_weight_hess"]["exact"]
    assert graph.nodes["_0_weight"]["role"] == "parameter"
    assert graph.nodes["input_1"]["role"] == "input"
    assert graph.nodes["output"]["role"] == "output"
    (tanh,) = [n for n, op in graph.nodes(data="op") if op == "aten.tanh.default"]
    assert graph.nodes[tanh]["structure"] == "diagonal" and graph.nodes[tanh]["rule"] == ""
    regions = nx.get_node_attributes(graph, "region")
    same = {n for n, r in regions.items() if r == regions[tanh]}
    assert {tanh, "_0_hess", "_0_grad"} <= same and "_0_weight_hess" not in same
    where = [a["line"] for _, a in graph.nodes(data=True) if a["module"] == "loss"]
    assert where and all(isinstance(w, str) for w in where)


def test_the_source_line_is_the_user_s():
    class Model(nn.Module):
        def forward(self, x):
            return x.sin().sum()  # the line

    hs = hesscale_fx.transform(Model(), None, (torch.randn(3),), wrt="inputs")
    graph = inspect.to_networkx(hs)
    lines = [a["line"] for _, a in graph.nodes(data=True) if "sin" in a["op"] or "cos" in a["op"]]
    assert len(lines) > 1
    assert all("test_inspect.py" in w and "x.sin().sum()" in w for w in lines)


@pytest.mark.parametrize("form", ["graphml", "gexf", "json"])
def test_writers_of_networkx_take_it(case, form):
    graph = inspect.to_networkx(case[0])
    if form == "json":
        data = json.loads(json.dumps(nx.node_link_data(graph, edges="edges")))
        again = nx.node_link_graph(data, edges="edges")
    else:
        file = io.BytesIO()
        getattr(nx, f"write_{form}")(graph, file)
        file.seek(0)
        again = getattr(nx, f"read_{form}")(
            file, **({} if form == "gexf" else {"force_multigraph": True})
        )
    assert set(again.nodes) == set(graph.nodes)
    assert again.number_of_edges() == graph.number_of_edges()
    for name, about in graph.nodes(data=True):
        kept = {k: v for k, v in again.nodes[name].items() if k != "label"}
        assert kept == about, name


def test_free_sizes_have_the_call_s_values(small):
    big = torch.randn(50, 4), torch.randint(3, (50,))
    tiny = inspect.to_networkx(small).nodes["_0_weight_hess"]
    large = inspect.to_networkx(small, *big).nodes["_0_weight_hess"]
    assert large["flops"] == 10 * tiny["flops"] and large["bytes"] == tiny["bytes"]


def test_without_a_graph_there_is_an_error():
    net, loss, args = mlp()
    hs = hesscale_fx.transform(net, loss)
    with pytest.raises(NotCapturedError):
        inspect.to_networkx(hs)
    assert len(inspect.to_networkx(hs, *args)) == len(hs.graph.nodes)


# ------------------------------------------------------------------ questions


def test_the_curvature_of_a_parameter_is_all_that_it_needs(case):
    hs, args = case
    graph = inspect.to_networkx(hs)
    name = next(iter(hs.report()))
    part = inspect.curvature_of(graph, name)
    kept = hs.graph.__class__()
    env = {}
    for node in hs.graph.nodes:
        if node.name in part or node.op == "placeholder":
            env[node] = kept.node_copy(node, env.__getitem__)
    kept.output(env[node_of(hs, name)])
    with torch.no_grad():
        buffers = {n: b.clone() for n, b in hs.named_buffers()}
        value = fx.Interpreter(hs, graph=kept).run(*args)
        for n, b in hs.named_buffers():
            b.copy_(buffers[n])
        assert torch.equal(value, hs(*args).hess_diag[name])
    with pytest.raises(UnknownNameError, match=name):
        inspect.curvature_of(graph, "nothing")


def node_of(hs, name):
    (output,) = hs.graph.find_nodes(op="output")
    return output.args[0][2][name]


def test_what_was_generated_from_what(small):
    graph = inspect.to_networkx(small)
    (tanh,) = [n for n, op in graph.nodes(data="op") if op == "aten.tanh.default"]
    made = inspect.generated_from(graph, tanh)
    assert {"_0_grad", "_0_hess"} <= set(made) and "_0_weight_hess" not in made
    assert all(tanh in inspect.origin_of(graph, n) for n in made)
    generated = [n for n, r in graph.nodes(data="role") if r in ("gradient", "curvature")]
    assert all(inspect.origin_of(graph, n) for n in generated)
    assert not inspect.origin_of(graph, tanh)
    with pytest.raises(UnknownNameError):
        inspect.generated_from(graph, "nothing")


def test_dependents(small):
    graph = inspect.to_networkx(small)
    after = set(inspect.dependents(graph, "_0_weight"))
    assert {"_0_weight", "_0_weight_hess", "output"} <= after and "input_1" not in after


def test_the_critical_path_is_the_longest(small):
    graph = inspect.to_networkx(small)
    path = inspect.critical_path(graph)
    assert len(path) - 1 == nx.dag_longest_path_length(nx.DiGraph(graph))
    assert all(graph.has_edge(a, b) for a, b in itertools.pairwise(path))
    weighted = inspect.critical_path(graph, "flops")
    line = nx.DiGraph()
    line.add_weighted_edges_from((a, b, graph.nodes[b]["flops"]) for a, b in graph.edges())
    total = sum(graph.nodes[n]["flops"] for n in weighted)
    assert total == nx.dag_longest_path_length(line) > 0
    assert inspect.critical_path(graph, lambda a: a["flops"]) == weighted


@pytest.mark.parametrize("post", [False, True])
def test_dominators_cut_every_path(small, post):
    graph = inspect.to_networkx(small)
    entries = ["_0_weight"]
    ends = ["output"] if post else entries
    for node in ("_0_hess", "_2_grad"):
        found = inspect.dominators(graph, node, **({"post": True} if post else {"entries": ends}))
        flow = graph.reverse() if post else graph
        want = set()
        for other in set(graph.nodes) - {node}:
            rest = flow.subgraph(set(flow) - {other})
            cut = other in ends or not any(nx.has_path(rest, e, node) for e in ends if e in rest)
            if cut:
                want.add(other)
        assert set(found) == want and found, node


# ------------------------------------------------------------------ costs


def test_flops_are_those_of_a_run(case):
    hs, args = case
    buffers = {n: b.clone() for n, b in hs.named_buffers()}
    with FlopCounterMode(display=False) as counter:
        hs(*args)
    with torch.no_grad():
        for n, b in hs.named_buffers():
            b.copy_(buffers[n])
    total = hs.summary().total
    assert total.forward + total.gradient + total.curvature == counter.get_total_flops() > 0


# Bytes of which a kernel tells nothing: embedding_bag allocates one more index than it returns.
MORE_ROOM = {"embedding-bag-max": 8}


class Meter(fx.Interpreter):
    """Runs a graph; notes the most bytes that its own tensors held after any node."""

    most = 0

    def run_node(self, node):
        value = super().run_node(node)
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        if node.op in ("placeholder", "get_attr"):
            self.given = getattr(self, "given", set()) | {
                t.untyped_storage().data_ptr() for t in tensors
            }
        live = [*tensors, *pytree.tree_leaves(list(self.env.values()))]
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in live
            if isinstance(t, torch.Tensor)
        }
        self.most = max(self.most, sum(n for p, n in held.items() if p not in self.given))
        return value


def test_memory_at_peak_is_that_of_a_run(case):
    hs, args = case
    meter = Meter(hs, graph=hs.graph)
    with torch.no_grad():
        meter.run(*args)
    assert hs.summary().peak == meter.most > 0


def test_the_rows_of_the_summary(case):
    hs, _ = case
    found = hs.summary()
    total = found.total
    assert total.parameters == sum(p.numel() for p in hs.parameters())
    assert total.exact == sum(e.exact for e in hs.report().values())
    assert total.differentiated == len(hs.report())
    assert total.memory == found.peak
    assert found.overhead == pytest.approx(1 + total.curvature / (total.forward + total.gradient))
    own = [r for r in found if r.module and "." not in r.module]
    for cost in ("forward", "gradient", "curvature", "exact", "parameters"):
        assert sum(getattr(r, cost) for r in own) <= getattr(total, cost)
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["module", "type", "params"]
    assert len(lines) > len(found) + 3


def test_the_rows_of_a_plain_model():
    net, loss, args = mlp()
    found = hesscale_fx.transform(net, loss, args).summary()
    assert [r.module for r in found] == ["0", "1", "2", "loss"]
    first, last = found["0"], found["2"]
    assert (first.type, first.parameters) == ("Linear", 40)
    n = 2 * 5
    assert (first.forward, first.gradient) == (n * 32, n * 32)  # nothing flows to the input
    assert (last.forward, last.gradient, last.curvature) == (n * 24, 2 * n * 24, 2 * n * 24)
    assert last.ratio == 1 and math.isnan(found["1"].ratio)
    assert (first.exact, last.exact) == (0, 2)
    assert sum(r.memory for r in found) == found.peak
    assert len(hesscale_fx.transform(*gpt()).summary(depth=1)) == 6


def test_the_summary_of_functions():
    net, loss, (x, y) = mlp()
    plain = hesscale_fx.transform(net, loss, (x, y)).summary().total
    hs = hesscale_fx.transform(lambda a, b: loss(net(a), b), None, (x, y))
    found = hs.summary()
    assert found.total.curvature == plain.curvature
    assert found["net.0"].curvature > 0


def test_the_summary_shows_in_notebooks_and_in_rich(small):
    found = small.summary()
    page = found._repr_html_()
    assert page.count("<tr>") == len(found) + 2 and "Linear" in page
    rows = [inspect.Row("a", "A"), inspect.Row("a.b", "B")]
    nested = inspect.Summary(rows, inspect.Row("total", "A"), 0, "", 0, "hesscale")._repr_html_()
    assert "white-space:pre'>  b</td>" in nested  # the blanks are shown
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    console.Console(file=out, width=120).print(found)
    assert "Linear" in out.getvalue() and "at peak" in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_model_can_be_looked_at(name):
    """Costs are those of a run, and no view fails."""
    made = build(name, torch.float32)
    args, kwargs = (*made.inputs, *made.targets), made.kwargs
    hs = hesscale_fx.transform(made.model, made.loss, args, kwargs or None)
    graph = inspect.to_networkx(hs)
    generated = [n for n, r in graph.nodes(data="role") if r in ("gradient", "curvature")]
    assert all(inspect.origin_of(graph, n) for n in generated)
    assert "digraph" in inspect.draw(hs) and not hs.diff(hs)
    inspect.html(hs, None, hs(*args, **kwargs))
    found = hs.summary()
    meter = Meter(hs, graph=hs.graph)
    _, tensors = hs._find(args, kwargs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meter.run(*tensors)
    total = found.total
    assert total.forward + total.gradient + total.curvature == counter.get_total_flops()
    assert found.peak == meter.most - MORE_ROOM.get(name, 0)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        out = self.net(x)
        return (out[x[:, 0] > 0] @ self.net.weight).square().mean()


def test_sizes_that_depend_on_data_count_as_one():
    hs = hesscale_fx.transform(Masked(), None, (torch.randn(5, 4),))
    for found in (hs.summary(), hs.summary(torch.randn(6, 4))):
        assert found.of_data and "depend on data count as 1" in str(found)
    rows = 6  # the linear layer's rows are known, those that the mask selects are not
    assert found.total.forward == 2 * 4 * 3 * rows + 2 * 3 * 4 * 1
    assert not hesscale_fx.transform(*mlp()).summary().of_data
    graph = inspect.to_networkx(hs)
    nx.write_graphml(graph, io.BytesIO())
    assert "<html" in inspect.html(hs) and not hs.diff(hs)


def test_without_flops_there_is_no_ratio():
    hs = hesscale_fx.transform(lambda x: x.square().sum(), wrt="inputs")
    assert "nan" not in str(hs.summary(torch.randn(3)))


class Penalized(nn.Module):
    """A loss that differentiates: captured below autograd."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
        return slope.square().sum()


def test_modules_are_known_below_autograd():
    hs = hesscale_fx.transform(Penalized(), None, (torch.randn(5, 4),))
    assert hs.report().way == "make_fx"
    graph = inspect.to_networkx(hs)
    modules = {d["module"] for _, d in graph.nodes(data=True) if d["role"] == "forward"}
    assert {"critic.0", "critic.1", "critic.2", ""} >= modules >= {"critic.0", "critic.1"}
    rows = hs.summary()
    assert rows["critic.0"].forward >= 2 * 4 * 8 * 5
    assert 0 < rows["critic"].gradient <= rows.total.gradient
