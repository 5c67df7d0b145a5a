"""Names and metadata of emitted nodes: where each came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

CALIBRATION = "calibration"  # the buffer of the factors, in the module that is returned
ROLE = {
    "forward": "forward",
    "grad": "gradient",
    "hess": "curvature",
    "columns": "columns",
    "gauss": "Gauss-Newton",
    "mass": "mass",
    "factor": "factor",
}


@dataclass
class Origin:
    """Where a node of the emitted graph came from."""

    source: fx.Node  # of the captured graph
    role: str
    rule: str = ""
    is_result: bool = False  # the value of the source itself, not a step on the way
    exact: bool = True
    region: int = -1  # number of the unit whose rule made it; -1: none


def module_path(node: fx.Node) -> str:
    """The qualified name of the innermost module that a captured node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("model.").removeprefix("model")


def source_name(node: fx.Node) -> str:
    """``fc1_weight`` for a leaf, ``fc1`` for a node of that module, else the node's own name."""
    if node.op == "placeholder":
        return str(node.meta.get("hesscale_name", node.name)).replace(".", "_")
    path = module_path(node)
    return path.replace(".", "_") if path else node.name


def rename(graph: fx.Graph, origin: Mapping[fx.Node, Origin]) -> None:
    """Name nodes after their source: ``fc1``, ``fc1_grad``, ``fc1_hess``."""
    wanted: dict[fx.Node, str] = {}
    results: dict[str, fx.Node] = {}
    for node in graph.nodes:
        found = origin.get(node)
        if found is None or node.op not in ("call_function", "get_attr"):
            continue
        if found.role != "forward":
            wanted[node] = f"{source_name(found.source)}_{found.role}"
        elif node.op == "get_attr":
            wanted[node] = source_name(found.source)
        elif found.is_result:
            wanted[node] = found.source.name
        if found.is_result and node in wanted:
            results[wanted[node]] = node
    # First all out of the way, then the results, which get the plain names.
    for node in wanted:
        node._rename("hesscale_tmp")
    finals = set(results.values())
    for node, name in sorted(wanted.items(), key=lambda item: item[0] not in finals):
        node._rename(name)


def annotate(graph: fx.Graph, origin: Mapping[fx.Node, Origin]) -> None:
    """Carry over the user's source line and module, and say what each node is for."""
    for node in graph.nodes:
        found = origin.get(node)
        if found is None:
            continue
        source = found.source
        for key in ("stack_trace", "nn_module_stack"):
            if source.meta.get(key) is not None:
                node.meta[key] = source.meta[key]
            else:
                node.meta.pop(key, None)
        mark = {
            "source": source_name(source),
            "node": source.name,
            "region": found.region,
            "role": ROLE.get(found.role, found.role),
            "rule": found.rule,
            "exact": found.exact,
        }
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "hesscale": mark}
