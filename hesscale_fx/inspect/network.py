"""The emitted graph as a networkx MultiDiGraph, and questions to ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import networkx as nx

from hesscale_fx.errors import UnknownNameError
from hesscale_fx.inspect.nodes import records

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule

OUTPUT = "output"


def to_networkx(hs: HesScaleModule, *args: Any, **kwargs: Any) -> nx.MultiDiGraph:
    """The emitted graph as a networkx graph, from operands to results.

    There is one edge for each operand, so ``mul(x, x)`` has two; its attribute ``operand`` says
    which. All attributes are strings, integers and booleans, so every writer of networkx takes
    them (GraphML, GEXF, JSON).

    Args:
        hs: what `hesscale_fx.transform` returned.
        *args: what a call would get. The graph is the one that serves it, and sizes that are free
            have its values; without, the graph that served last at the sizes of its example.
        **kwargs: the model's keyword arguments.

    Returns:
        A MultiDiGraph whose nodes are in the order in which they run. Node attributes are ``op``,
        ``role`` (input, parameter, buffer, forward, gradient, curvature, output), ``shape``,
        ``dtype``, ``source``, ``module``, ``region`` (numbers of the units that it belongs to),
        ``rule``, ``structure``, ``exact``, ``line``, ``flops`` (by `torch.utils.flop_counter`),
        ``bytes`` (of the value), and ``forward`` (the forward nodes that it was generated from);
        lists are joined by blanks. Sizes that only data give (``u0``) count as 1 in both.

    Raises:
        NotCapturedError: there is no graph yet and no arguments are given.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> hs = hesscale_fx.transform(net, nn.CrossEntropyLoss(), (x, y))
        >>> graph = hesscale_fx.inspect.to_networkx(hs)
        >>> graph.nodes["_0_weight_hess"]["op"], graph.nodes["_0_weight_hess"]["shape"]
        ('aten.mm.default', '[8, 4]')
        >>> graph.nodes["_0_weight_hess"]["rule"], graph.nodes["_0_weight_hess"]["exact"]
        ('contraction', False)
    """
    graph = nx.MultiDiGraph()
    for r in records(hs, args, kwargs):
        graph.add_node(
            r.name,
            op=r.op,
            role=r.role,
            shape=r.shape,
            dtype=r.dtype,
            source=r.source,
            module=r.module,
            region=" ".join(map(str, r.regions)),
            rule=r.rule,
            structure=r.structure,
            exact=r.exact,
            line=r.line,
            flops=r.flops,
            bytes=r.bytes,
            forward=" ".join(r.forward),
        )
        graph.add_edges_from((name, r.name, {"operand": where}) for where, name in r.inputs)
    return graph


def curvature_of(graph: nx.MultiDiGraph, parameter: str) -> nx.MultiDiGraph:
    """The subgraph that computes the Hessian diagonal of one parameter.

    Args:
        graph: from `to_networkx`.
        parameter: its name in ``hess_diag``.

    Returns:
        A view: the diagonal's node and all that it depends on.

    Raises:
        UnknownNameError: no diagonal has this name.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> hs = hesscale_fx.transform(nn.Linear(4, 1), nn.MSELoss())
        >>> _ = hs.materialize(torch.randn(5, 4), torch.randn(5, 1))
        >>> graph = hesscale_fx.inspect.to_networkx(hs)
        >>> "bias_grad" in hesscale_fx.inspect.curvature_of(graph, "bias")
        False
    """
    wanted = f"hess_diag[{parameter!r}]"
    diagonals = {where: name for name, _, where in graph.in_edges(OUTPUT, data="operand")}
    if wanted not in diagonals:
        names = [w[len("hess_diag['") : -2] for w in diagonals if w.startswith("hess_diag[")]
        raise UnknownNameError(f"No diagonal is named {parameter!r}; there are {', '.join(names)}.")
    end = diagonals[wanted]
    return graph.subgraph({end, *nx.ancestors(graph, end)})


def dependents(graph: nx.MultiDiGraph, node: str) -> nx.MultiDiGraph:
    """The subgraph of a node and all that depends on it.

    Args:
        graph: from `to_networkx`.
        node: a node's name.

    Raises:
        UnknownNameError: there is no such node.
    """
    _known(graph, node)
    return graph.subgraph({node, *nx.descendants(graph, node)})


def generated_from(graph: nx.MultiDiGraph, node: str) -> list[str]:
    """The gradient and curvature nodes that were generated from a forward node, in running order.

    A rule covers a whole region, so the nodes of one region share what it generated.

    Args:
        graph: from `to_networkx`.
        node: name of a forward node or a leaf.

    Raises:
        UnknownNameError: there is no such node.
    """
    _known(graph, node)
    return [n for n, forward in graph.nodes(data="forward") if node in forward.split()]


def origin_of(graph: nx.MultiDiGraph, node: str) -> list[str]:
    """The forward nodes that a gradient or curvature node was generated from.

    Args:
        graph: from `to_networkx`.
        node: name of a generated node.

    Raises:
        UnknownNameError: there is no such node.
    """
    _known(graph, node)
    return graph.nodes[node]["forward"].split()


def critical_path(
    graph: nx.MultiDiGraph, weight: str | Callable[[dict[str, Any]], float] | None = None
) -> list[str]:
    """The heaviest path: how short a run could be if all else ran beside it.

    Args:
        graph: from `to_networkx`, or a subgraph of it.
        weight: a node attribute such as ``"flops"`` or ``"bytes"``, or a function of the
            attributes; None counts nodes.

    Returns:
        Names of the nodes on the path, in running order.
    """

    def cost(node: str) -> float:
        if weight is None:
            return 1.0
        attributes = graph.nodes[node]
        return float(weight(attributes) if callable(weight) else attributes[weight])

    best: dict[str, tuple[float, str | None]] = {}
    for node in nx.topological_sort(graph):
        before = max(graph.predecessors(node), key=lambda n: best[n][0], default=None)
        best[node] = (cost(node) + (best[before][0] if before is not None else 0.0), before)
    end: str | None = max(best, key=lambda n: best[n][0], default=None)
    path = []
    while end is not None:
        path.append(end)
        end = best[end][1]
    return path[::-1]


def dominators(
    graph: nx.MultiDiGraph, node: str, *, entries: Iterable[str] | None = None, post: bool = False
) -> list[str]:
    """The nodes that every path to a node runs through, nearest first.

    Args:
        graph: from `to_networkx`, or a subgraph of it.
        node: a node's name.
        entries: where paths begin; by default at every node without operands.
        post: instead the nodes that every path from `node` to the end runs through.

    Returns:
        Names without `node` itself; empty if no path from an entry reaches it.

    Raises:
        UnknownNameError: there is no such node.
    """
    _known(graph, node)
    flow = nx.DiGraph(graph.reverse(copy=False) if post else graph)
    root = object()
    if entries is None:
        entries = [n for n, degree in flow.in_degree() if not degree]
    flow.add_edges_from((root, _known(graph, n)) for n in list(entries))
    above = nx.immediate_dominators(flow, root)
    found: list[str] = []
    if node not in above:
        return found
    node = above[node]
    while node is not root and node is not None:
        found.append(node)
        node = above[node]
    return found


def _known(graph: nx.MultiDiGraph, node: str) -> str:
    if node not in graph:
        raise UnknownNameError(f"No node is named {node!r}; names are those of hs.graph.nodes.")
    return node
