"""Emit one graph: the forward nodes, then gradient and curvature in reverse order.

Rules are functions on tensors; the tracer turns their calls into nodes. This file gives each unit
its values and marks every node with where it came from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from hesscale_fx import structures
from hesscale_fx.analysis.exactness import State
from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.units import Unit
from hesscale_fx.backward import reverse
from hesscale_fx.capture import Captured, Leaf
from hesscale_fx.methods import Method
from hesscale_fx.simplify import Constants, simplify
from hesscale_fx.structures import Call, Evaluation, definitions
from hesscale_fx.structures.base import wide, zero_test
from hesscale_fx.structures.region import RegionAt
from hesscale_fx.trace import Tracer


@dataclass
class Origin:
    """Where a generated node came from."""

    source: fx.Node  # of the captured graph
    role: str
    unit: Unit | None
    is_result: bool = False  # the value of the source itself, not a step on the way
    exact: bool = True


class Emission:
    """One run of emission; `run` gives the finished graph."""

    def __init__(
        self,
        captured: Captured,
        primitives: Primitives,
        units: list[Unit],
        exactness: Mapping[tuple[fx.Node, Unit | None], State],
        inside: set[fx.Node],
        method: Method,
        fake_mode: Any,
    ) -> None:
        self._captured = captured
        self._primitives = primitives
        self._units = units
        self._exactness = exactness
        self._inside = inside
        self._method = method
        self._tracer = Tracer(fake_mode)
        self._values: dict[fx.Node, Any] = {}  # of captured nodes
        self._inner: dict[fx.Node, Any] = {}  # of primitive nodes that are no captured node
        self._captured_of = {p: s for s, p in primitives.of.items()}
        self._origin: dict[fx.Node, Origin] = {}
        self._forward: dict[fx.Node, fx.Node] = {}
        self._attributes: list[fx.Node] = []
        self._written: dict[fx.Node, set[fx.Node]] = {}  # captured node -> its nodes in units
        for node in {n for u in units for n in u.nodes}:
            self._written.setdefault(primitives.source[node], set()).add(node)

    def run(self, outputs: dict[str, Leaf]) -> fx.Graph:
        """Emit; `outputs` maps each name of the result to the leaf that is differentiated."""
        graph = self._tracer.graph
        constants = Constants()
        token = zero_test.set(
            lambda t: self._tracer.has(t) and constants.is_zero(self._tracer.node(t))
        )
        try:
            with self._tracer.recording():
                self._emit_forward()
                loss = self._captured.loss
                results = reverse(
                    self._units,
                    (self._primitives.of[loss], self._values[loss]),
                    self._method,
                    self._evaluate,
                    lambda unit: unit.nodes[-1] in self._inside,
                    self._scope,
                    self._mark_result,
                )
                found = self._read_out(outputs, results)
                self._write_buffers()
        finally:
            zero_test.reset(token)
        node = self._tracer.node
        graph.output(
            (
                node(self._values[self._captured.loss]),
                *({k: node(v) for k, v in found[r].items()} for r in found),
            )
        )
        self._finish(graph)
        return graph

    # --- forward --------------------------------------------------------------------------------

    def _emit_forward(self) -> None:
        leaves = {leaf.node: leaf for leaf in self._captured.leaves}
        for node in self._captured.graph.nodes:
            if node.op == "output":
                continue
            with self._marked(Origin(node, "forward", None)):
                self._values[node] = self._forward_value(node, leaves.get(node))
            value = self._values[node]
            if isinstance(value, Tensor):
                self._forward[self._tracer.node(value)] = node

    def _forward_value(self, node: fx.Node, leaf: Leaf | None) -> Any:
        if leaf is not None:
            # The tracer wants attributes to exist on its root, so they are placeholders for now.
            proxy = self._tracer.create("placeholder", leaf.name)
            if leaf.kind != "input":
                self._attributes.append(proxy.node)
            return self._tracer.track(node.meta["val"], proxy)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)):  # sizes, scalars and checks of them
            self._tracer.call(node.target, args, kwargs, value)  # type: ignore[arg-type]
            return value
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, node: fx.Node) -> Any:
        """The value of a primitive node."""
        source = self._captured_of.get(node)
        source = self._primitives.whole.get(node, source) if source is None else source
        if source is not None:
            return self._values[source]
        if node not in self._inner:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            self._inner[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._inner[node]

    # --- rules ----------------------------------------------------------------------------------

    def _evaluate(self, unit: Unit) -> Evaluation:
        if unit.region is not None:
            return RegionAt(unit.region, self._value, self._runner(unit))
        call = unit.call
        structure = structures.structure_of(call.target, call.args, call.kwargs)
        assert structure is not None
        leaves, spec = pytree.tree_flatten((tuple(call.args), dict(call.kwargs)))
        wanted = {n for n, _ in unit.inputs}
        active = [i for i, v in enumerate(leaves) if isinstance(v, fx.Node) and v in wanted]
        leaves = [self._value(v) if isinstance(v, fx.Node) else v for v in leaves]
        inner = structure.at(Call(call.target, leaves, spec, active))  # type: ignore[arg-type]
        parts = [n for n in unit.outputs if n.target is operator.getitem]
        if not parts:
            return inner
        return _Parts(inner, [n.args[1] for n in parts])  # type: ignore[misc]

    def _runner(self, unit: Unit) -> Callable[[dict[fx.Node, Tensor]], list[Tensor]]:
        """Computes a region's outputs from its inputs, by native operators where it is one."""

        def run(inputs: dict[fx.Node, Tensor]) -> list[Tensor]:
            local: dict[fx.Node, Any] = dict(inputs)

            def value(node: fx.Node) -> Any:
                return local[node] if node in local else self._value(node)

            members = set(unit.nodes)
            done: set[fx.Node] = set()
            for node in unit.nodes:
                source = self._primitives.source[node]
                if self._is_native(source, members):
                    if source not in done:
                        done.add(source)
                        local.update(self._run_native(source, value))
                elif node not in local:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                    local[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return [local[n] for n in unit.region.outputs]  # type: ignore[union-attr]

        return run

    def _is_native(self, source: fx.Node, members: set[fx.Node]) -> bool:
        """Whether the captured operator can be called in place of its definition."""
        if source not in self._primitives.defined:
            return False
        if source.target in definitions.READS_OUTPUTS:
            return False
        return self._written[source] <= members

    def _run_native(self, source: fx.Node, value: Callable) -> dict[fx.Node, Any]:
        def operand(node: fx.Node) -> Any:
            primitive = self._primitives.of.get(node)
            return self._values[node] if primitive is None else value(primitive)

        args, kwargs = fx.node.map_arg((source.args, source.kwargs), operand)
        result = source.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, Tensor):
            return {self._primitives.of[source]: result}
        return {
            self._primitives.of[u]: result[u.args[1]]
            for u in source.users
            if u.target is operator.getitem and u in self._primitives.of
        }

    # --- results --------------------------------------------------------------------------------

    def _read_out(
        self, outputs: dict[str, Leaf], results: dict[fx.Node, dict[str, Tensor | None]]
    ) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {role: {} for role in self._method.roles}
        for name, leaf in outputs.items():
            values = results.get(self._primitives.of[leaf.node], {})
            for role in self._method.roles:
                value = values.get(role)
                with self._scope(self._primitives.of[leaf.node], None, role):
                    if value is None:
                        like = self._values[leaf.node]
                        dtype = like.dtype if role == "grad" else wide(like.dtype)
                        value = torch.zeros_like(like, dtype=dtype)
                    found[role][name] = value
        return found

    def _write_buffers(self) -> None:
        by_name = {leaf.name: leaf for leaf in self._captured.leaves}
        for name, node in self._captured.mutations.items():
            with self._marked(Origin(node, "forward", None)):
                buffer = self._values[by_name[name].node]
                torch.ops.aten.copy_.default(buffer, self._values[node])

    # --- marks ----------------------------------------------------------------------------------

    @contextmanager
    def _marked(self, origin: Origin) -> Iterator[None]:
        before = self._last()
        yield
        node = before.next if before is not None else next(iter(self._tracer.graph.nodes), None)
        while node is not None and node.op != "root":
            self._origin.setdefault(node, origin)
            node = node.next

    def _last(self) -> fx.Node | None:
        nodes = self._tracer.graph.nodes
        return next(iter(reversed(nodes)), None)

    def _scope(self, node: fx.Node, unit: Unit | None, role: str) -> Any:
        exact = (
            role == "grad" or unit is None or all(self._is_exact((n, unit)) for n in unit.outputs)
        )
        return self._marked(Origin(self._primitives.source[node], role, unit, exact=exact))

    def _mark_result(self, node: fx.Node, unit: Unit | None, role: str, value: Tensor) -> None:
        """`value` is what `unit` gives to `node`: name it after that node."""
        made = self._tracer.node(value)
        found = self._origin.get(made)
        if found is not None and found.unit is unit and found.role == role:
            slot = next((s for s in unit.inputs if s[0] is node), None) if unit else None
            exact = role == "grad" or slot is None or self._is_exact(slot)
            self._origin[made] = Origin(self._primitives.source[node], role, unit, True, exact)

    def _is_exact(self, slot: tuple[fx.Node, Unit | None]) -> bool:
        return self._exactness.get(slot, State()).exact

    def _finish(self, graph: fx.Graph) -> None:
        for node in self._attributes:
            node.op = "get_attr"
        generated = {n for n, o in self._origin.items() if o.role != "forward"}
        simplify(graph, generated)
        rename(graph, self._origin, self._forward)
        annotate(graph, self._origin)


class _Parts:
    """A multi-output operator seen through those of its outputs that are used."""

    def __init__(self, inner: Evaluation, parts: list[int]) -> None:
        self._inner = inner
        self._parts = parts

    def _all(self, values: Any) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * (max(self._parts) + 1)
        for part, value in zip(self._parts, values, strict=True):
            result[part] = value
        return result

    def vjp(self, u: Any) -> list[Tensor | None]:
        return self._inner.vjp(self._all(u))

    def squared_vjp(self, s: Any) -> list[Tensor | None]:
        return self._inner.squared_vjp(self._all(s))

    def curvature(self, g: Any) -> list[Tensor | None]:
        return self._inner.curvature(self._all(g))


# --- names and metadata ---------------------------------------------------------------------------

SUFFIX = {"grad": "grad", "hess": "hess"}
ROLE = {"forward": "forward", "grad": "gradient", "hess": "curvature"}


def module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("model.").removeprefix("model")


def rename(graph: fx.Graph, origin: dict[fx.Node, Origin], forward: dict[fx.Node, fx.Node]) -> None:
    """Name generated nodes after their source: ``fc1_grad``, ``fc1_hess``."""
    wanted: dict[fx.Node, str] = {}
    results: dict[str, fx.Node] = {}
    for node in graph.nodes:
        found = origin.get(node)
        if node.op == "get_attr" and found is not None:
            wanted[node] = source_name(found.source)
            results[wanted[node]] = node
        if found is None or node.op != "call_function":
            continue
        if found.role == "forward":
            if node in forward:
                wanted[node] = forward[node].name
                results[wanted[node]] = node
            continue
        wanted[node] = f"{source_name(found.source)}_{SUFFIX.get(found.role, found.role)}"
        if found.is_result:
            results[wanted[node]] = node
    # First all out of the way, then the results, which get the plain names.
    for node in wanted:
        node._rename("hesscale_tmp")
    finals = set(results.values())
    for node, name in sorted(wanted.items(), key=lambda item: item[0] not in finals):
        node._rename(name)


def source_name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.meta.get("hesscale_name", node.name)).replace(".", "_")
    path = module_path(node)
    return path.replace(".", "_") if path else node.name


def annotate(graph: fx.Graph, origin: dict[fx.Node, Origin]) -> None:
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
        unit = found.unit
        mark = {
            "source": source_name(source),
            "role": ROLE.get(found.role, found.role),
            "rule": unit.structure if unit is not None else "",
            "exact": found.exact,
        }
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "hesscale": mark}
