"""Emit one graph: the forward nodes, then gradient and curvature in reverse order.

Each captured call and each unit's rule is traced once for operands of its kind and copied into the
graph wherever it occurs; every node remembers where it came from.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from hesscale_fx import structures
from hesscale_fx.analysis.exactness import State
from hesscale_fx.analysis.join import sources_of
from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.samples import Rows, Samples
from hesscale_fx.analysis.units import Unit
from hesscale_fx.backward import Flow, Slot, reverse
from hesscale_fx.captured import Captured, Leaf
from hesscale_fx.errors import UnsupportedOperatorError, source_line
from hesscale_fx.evaluate import Native, evaluate
from hesscale_fx.lossroot import LossRoot
from hesscale_fx.methods import Calibrated, Hutchinson, Method, Output, Place
from hesscale_fx.names import CALIBRATION, Origin, annotate, rename
from hesscale_fx.ownership import own_results
from hesscale_fx.recompute import Recomputed
from hesscale_fx.simplify import Constants, simplify
from hesscale_fx.structures.base import wide, zero_test
from hesscale_fx.structures.composite import Composite
from hesscale_fx.trace import Template, Tracer, inline, kind_of, trace

aten = torch.ops.aten

# What tracing raises for a formula whose course depends on values.
DATA_DEPENDENT = (
    GuardOnDataDependentSymNode,
    DynamicOutputShapeException,
    DataDependentOutputException,
)


# The trace of a diagonal that arrives, and of one that does not.
SPLIT: dict[str, Callable[[list[Any], Tracer], list[Any]]] = {
    "sum": lambda given, tracer: [given[0].sum()],
    "nothing": lambda given, tracer: [torch.zeros_like(given[0])],
}


class Inseparable(Exception):
    """Autograd cannot differentiate a composite; `sources` are the captured nodes behind it."""

    def __init__(self, name: str, sources: frozenset[fx.Node]) -> None:
        super().__init__(name)
        self.sources = sources


class Emission:
    """One run of emission; `run` gives the finished graph."""

    def __init__(
        self,
        captured: Captured,
        primitives: Primitives,
        units: list[Unit],
        exactness: Mapping[Slot, State],
        inside: set[fx.Node],
        method: Method,
        fake_mode: Any,
        samples: Samples | None = None,
        loss_root: LossRoot | None = None,
        linear: set[Unit] | None = None,
        folding: set[Unit] | None = None,
    ) -> None:
        self._captured = captured
        self._primitives = primitives
        self._units = units
        self._number = {unit: i for i, unit in enumerate(units)}
        self._exactness = exactness
        self._inside = inside
        self._method = method
        self._samples = samples
        self._loss_root = loss_root
        self._linear = linear or set()
        self._folding = folding or set()  # at whose outputs a tail of columns begins
        self._factors: list[fx.Node] = []  # of a calibrated method, one a result
        self._position: dict[fx.Node, int] = {}  # differentiated leaf -> its place among them
        self.random: list[fx.Node] = []  # placeholders of random signs
        self._fake_mode = fake_mode
        self._native = Native(primitives, units)
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}  # captured node -> emitted node (or nodes)
        self._inner: dict[fx.Node, fx.Node] = {}  # the same of other primitive nodes
        self._captured_of = {p: s for s, p in primitives.of.items()}
        self._templates: dict[Any, Template] = {}
        self._origin: dict[fx.Node, Origin] = {}

    def run(self, outputs: dict[str, Leaf]) -> fx.Graph:
        """Emit; `outputs` maps each name of the result to the leaf that is differentiated."""
        self._emit_forward()
        if isinstance(self._method, Calibrated):
            self._read_factors(outputs)
        loss = self._captured.loss
        results = reverse(
            self._units,
            self._primitives.of[loss],
            self._seed(loss),
            self._pull,
            self._add,
            self._arrive if self._loss_root is not None else None,
        )
        found = self._read_out(outputs, results)
        if isinstance(self._method, Calibrated):
            found["hess"] = self._calibrate(outputs, results)
        elif isinstance(self._method, Hutchinson):
            found["hess"] = self._by_products(self._method, outputs)
        self._write_buffers()
        self._graph.output((self._values[loss], found["grad"], found["hess"]))
        generated = {n for n, o in self._origin.items() if o.role != "forward"}
        for moved, before in simplify(self._graph, generated).items():
            self._origin[moved] = dataclasses.replace(self._origin[before], is_result=False)
        self._name_copies(own_results(self._graph), outputs)
        self._mark_outputs(outputs)
        rename(self._graph, self._origin)
        annotate(self._graph, self._origin)
        return self._graph

    def split(self) -> fx.Graph:
        """Emit the traces of the positive and the negative part of the loss's Hessian, no more."""
        self._emit_forward()
        entered: dict[str, Any] = {}

        def stop(slot: Slot, values: dict[str, Any]) -> dict[str, Any]:
            if self._loss_root is None or slot[0] is not self._loss_root.node:
                return values
            if slot == self._loss_root.slot:
                entered.update(self._begin(slot, values))
            return {}

        loss = self._captured.loss
        reverse(
            self._units, self._primitives.of[loss], self._seed(loss), self._pull, self._add, stop
        )
        totals = []
        for role in ("gauss", "hess"):
            origin = Origin(loss, role)
            found = entered.get(role)
            run = "sum" if found is not None else "nothing"
            inputs = [self._values[loss] if found is None else found]
            (total,) = self._emit((run, role), SPLIT[run], inputs, origin)
            totals.append(total)
        self._graph.output(tuple(totals))
        simplify(self._graph, {n for n, o in self._origin.items() if o.role != "forward"})
        annotate(self._graph, self._origin)
        return self._graph

    # --- forward --------------------------------------------------------------------------------

    def _emit_forward(self) -> None:
        leaves = {leaf.node: leaf for leaf in self._captured.leaves}
        for node in self._captured.graph.nodes:
            if node.op == "output":
                continue
            origin = Origin(node, "forward")
            value = self._values[node] = self._forward(node, leaves.get(node), origin)
            if isinstance(value, fx.Node):
                self._origin[value] = Origin(node, "forward", is_result=True)

    def _forward(self, node: fx.Node, leaf: Leaf | None, origin: Origin) -> Any:
        value = node.meta.get("val")
        if leaf is not None:
            op = "placeholder" if leaf.kind == "input" else "get_attr"
            made = self._graph.create_node(op, leaf.name)
            made.meta["val"] = value
            return made
        if node.target is operator.getitem and isinstance(self._values[node.args[0]], list):  # type: ignore[index]
            return self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        if not isinstance(value, (Tensor, tuple, list)):  # sizes, scalars and checks of them
            made = self._graph.node_copy(node, self._values.__getitem__)
            self._origin[made] = origin
            return made
        outputs = self._call(node.target, node.args, node.kwargs, self._values.__getitem__, origin)
        return outputs[0] if isinstance(value, Tensor) else outputs

    def _call(
        self, target: Any, args: Any, kwargs: Any, value: Callable[[fx.Node], Any], origin: Origin
    ) -> list[fx.Node | None]:
        """Emit one call as PyTorch executes it, below autograd."""
        implementation = structures.implementation_of(target)
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        inputs = [value(v) for v in leaves if isinstance(v, fx.Node)]
        constants = [None if isinstance(v, fx.Node) else v for v in leaves]

        def run(values: list[Any], tracer: Tracer) -> list[Any]:
            rest = iter(values)
            filled = [next(rest) if isinstance(v, fx.Node) else v for v in leaves]
            inner_args, inner_kwargs = pytree.tree_unflatten(filled, spec)
            out = implementation(*inner_args, **inner_kwargs)
            return list(out) if isinstance(out, (tuple, list)) else [out]

        return self._emit((target, repr(constants), repr(spec)), run, inputs, origin)

    def _emit(
        self,
        key: Any,
        run: Callable[[list[Any], Tracer], list[Any]],
        inputs: list[fx.Node],
        origin: Origin,
    ) -> list[fx.Node | None]:
        """Inline the template of `key`, tracing `run` if it is the first of its kind."""
        key = (key, tuple(kind_of(n) for n in inputs))
        if key not in self._templates:
            values = [n.meta["val"] for n in inputs]
            self._templates[key] = trace(run, values, self._fake_mode)

        def mark(node: fx.Node, role: str) -> None:
            exact = origin.exact or role == "grad"
            self._origin[node] = Origin(
                origin.source, role or origin.role, origin.rule, exact=exact, region=origin.region
            )

        return inline(self._graph, self._templates[key], inputs, mark)

    def _value(self, node: fx.Node) -> Any:
        """The emitted node that has the value of a primitive node."""
        source = self._captured_of.get(node)
        if source is not None:
            return self._values[source]
        if node in self._primitives.stands_for:
            return self._value(self._primitives.stands_for[node])
        if node not in self._inner:
            origin = Origin(self._primitives.source[node], "forward")
            if node.target is operator.getitem and node.args[0] in self._primitives.whole:
                whole = self._primitives.whole[node.args[0]]  # type: ignore[index]
                return self._values[whole][node.args[1]]
            if not isinstance(node.meta["val"], Tensor):
                made = self._graph.node_copy(node, self._value)
                self._origin[made] = origin
            else:
                (found,) = self._call(node.target, node.args, node.kwargs, self._value, origin)
                assert found is not None
                made = found
            self._inner[node] = made
        return self._inner[node]

    # --- backward -------------------------------------------------------------------------------

    def _seed(self, loss: fx.Node) -> dict[str, Any]:
        roles = self._method.roles

        def run(values: list[Any], tracer: Tracer) -> list[Any]:
            with tracer.role("grad"):
                seed = self._method.seed(values[0])
            return [seed[role] for role in roles]

        found = self._emit("seed", run, [self._values[loss]], Origin(loss, "grad"))
        for node, role in zip(found, roles, strict=True):
            if node is not None:
                self._origin[node] = Origin(loss, role, is_result=True)
        return dict(zip(roles, found, strict=True))

    def _pull(self, unit: Unit, y: Flow) -> Flow:
        """Emit the rule of a unit."""
        entering, key = signature(unit, self._native, self._primitives)
        present = [(role, i) for role in y for i, v in enumerate(y[role]) if v is not None]
        place = self._place(unit)
        signs = self._signs(unit.inputs[0][0]) if place.is_root else None
        roles = self._method.roles
        factors = self._factors_of(unit, place)

        def run(values: list[Any], tracer: Tracer) -> list[Any]:
            constants = Constants()
            token = zero_test.set(lambda t: tracer.has(t) and constants.is_zero(tracer.node(t)))
            known = dict(zip(entering, values, strict=False))
            arrived: dict[str, list[Any]] = {role: [None] * len(unit.outputs) for role in roles}
            for (role, i), value in zip(present, values[len(entering) :], strict=False):
                arrived[role][i] = value
            arrived["signs"] = [None if signs is None else values[-1]]
            after = iter(values[len(entering) + len(present) :])
            arrived["factors"] = [None if f is None else next(after) for f in factors]
            try:
                at = evaluate(unit, known.__getitem__, self._native)
                results: list[Any] = []
                for role in roles:
                    with tracer.role(role):
                        found = self._method.pull(role, at, arrived, place)
                    check_shapes(unit, role, found)
                    results += found
                return results
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(unit.call.target, Composite):
                    sources = sources_of(unit.call.target.nodes, self._primitives)
                    raise Inseparable(unit.call.target.name, sources) from error
                told = ("derivative", "not implemented", "ata-dependent")
                reads_data = isinstance(error, DATA_DEPENDENT)
                if not reads_data and not any(word in str(error) for word in told):
                    raise
                raise self._underivable(unit, error) from error
            finally:
                zero_test.reset(token)

        exact = all(self._is_exact((n, unit)) for n in unit.outputs)
        source = self._primitives.source[unit.nodes[-1]]
        inputs = [self._value(n) for n in entering] + [y[role][i] for role, i in present]
        inputs += [f for f in factors if f is not None]
        inputs += [] if signs is None else [signs]
        known = tuple(f is not None for f in factors)
        found = self._emit(
            (key, tuple(present), place, known),
            run,
            inputs,
            Origin(source, "grad", unit.structure, exact=exact, region=self._number[unit]),
        )
        count = len(unit.inputs)
        flow = {role: found[k * count : (k + 1) * count] for k, role in enumerate(roles)}
        for role, values in flow.items():
            for slot, node in zip(unit.inputs, values, strict=True):
                if node is not None and node not in inputs:
                    self._mark_result(node, slot, role, unit.structure)
        return flow

    def _place(self, unit: Unit) -> Place:
        inside = unit.nodes[-1] in self._inside
        curved_row = unit.region is not None and unit.region.name == "row"
        is_row = curved_row and not inside and unit not in self._linear
        if self._samples is None:
            return Place(inside, is_row=is_row)
        rows = [self._samples.rows((n, unit)) for n in unit.outputs]
        is_root = self._loss_root is not None and self._loss_root.root is unit
        uses = self._samples.uses(unit)
        exact: tuple[bool, ...] = ()
        if inside and self._serves_exact():
            exact = tuple(map(self._is_exact, unit.inputs))
            uses = tuple(map(exact_use, uses, exact, unit.inputs))
        leaves = tuple(producer is None for _, producer in unit.inputs)
        return Place(inside, tuple(map(pair, rows)), uses, exact, leaves, is_row, is_root)

    def _serves_exact(self) -> bool:
        """Whether the recursion serves where it is exact, in the place of columns."""
        root = self._loss_root
        return root is not None and root.kind != "full" and "gauss" in self._method.roles

    # --- where the model ends ---------------------------------------------------------------------

    def _arrive(self, slot: Slot, values: dict[str, Any]) -> dict[str, Any]:
        """What columns do between two units: begin at the output, end where the tail begins."""
        values = self._begin(slot, values)
        if slot[1] not in self._folding or values.get("columns") is None:
            return values
        roles = self._method.roles
        present = [role for role in roles if values.get(role) is not None]

        def run(given: list[Any], tracer: Tracer) -> list[Any]:
            with tracer.role("hess"):
                found = self._method.fold(dict(zip(present, given, strict=True)))
            return [found.get(role) for role in roles]

        inputs = [values[role] for role in present]
        origin = Origin(self._primitives.source[slot[0]], "hess")
        found = self._emit(("fold", tuple(present)), run, inputs, origin)
        folded = dict(zip(roles, found, strict=True))
        if folded["hess"] is not None:
            self._mark_result(folded["hess"], slot, "hess", "")
        return folded

    def _begin(self, slot: Slot, values: dict[str, Any]) -> dict[str, Any]:
        """Enter the model at its output with the columns of its method."""
        loss_root = self._loss_root
        assert loss_root is not None and self._samples is not None
        if slot[0] is not loss_root.node:
            return values
        if slot != loss_root.slot:  # the same tensor at another level; its columns are in the other
            return {role: v for role, v in values.items() if role == "grad"}
        roles = self._method.roles
        present = [role for role in roles if values.get(role) is not None]
        signs = self._signs(loss_root.node) if loss_root.kind != "root" else None
        entering = loss_root.again.entering if loss_root.kind == "full" else []
        inputs = [self._value(loss_root.node), *(values[role] for role in present)]
        inputs += [self._value(n) for n in entering]
        inputs += [] if signs is None else [signs]
        output = Output(
            loss_root.kind, pair(self._samples.rows(slot)), loss_root.coupled, loss_root.convex
        )

        def run(given: list[Any], tracer: Tracer) -> list[Any]:
            z, *rest = given
            arrived: dict[str, Any] = dict.fromkeys(roles)
            arrived.update(zip(present, rest, strict=False))
            rest = rest[len(present) :]
            with tracer.role("columns"):
                hessian = loss_root.hessian(z, rest, output) if loss_root.kind == "full" else None
                random = rest[-1] if signs is not None else None
                if loss_root.kind == "root" and self._method.columns is not None:
                    random = z  # the signs were in at the root
                found = self._method.begin(z, arrived, output, (random, hessian))
            return [found[role] for role in roles]

        origin = Origin(self._primitives.source[loss_root.node], "columns")
        found = self._emit(("begin", loss_root.node, output), run, inputs, origin)
        return dict(zip(roles, found, strict=True))

    def _signs(self, like: fx.Node) -> fx.Node | None:
        """A placeholder for the random signs of the columns, if there are any."""
        count = self._method.columns
        if not count or "columns" not in self._method.roles:
            return None
        value = like.meta["val"]
        return self._placeholder("signs", (count, *value.shape), wide(value.dtype), value.device)

    def _placeholder(self, name: str, shape: Any, dtype: torch.dtype, device: Any) -> fx.Node:
        first = next(n for n in self._graph.nodes if n.op not in ("placeholder", "get_attr"))
        with self._graph.inserting_before(first):
            made = self._graph.placeholder(f"random_{name}_{len(self.random)}")
        with self._fake_mode:
            made.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        self.random.append(made)
        return made

    # --- calibration ------------------------------------------------------------------------------

    def _read_factors(self, outputs: dict[str, Leaf]) -> None:
        """One factor for each result, from the module's buffer."""
        values = [leaf.node.meta["val"] for leaf in outputs.values()]
        origin = Origin(self._captured.loss, "hess")
        buffer = self._graph.create_node("get_attr", CALIBRATION)
        with self._fake_mode:
            shape, dtype = (len(values),), wide(values[0].dtype)
            buffer.meta["val"] = torch.empty(shape, dtype=dtype, device=values[0].device)
        self._buffer = buffer
        self._origin[buffer] = Origin(self._captured.loss, "forward")
        for i, leaf in enumerate(outputs.values()):
            select = ("factor", i)

            def pick(values: list[Any], tracer: Tracer, i: int = i) -> list[Any]:
                return [values[0][i]]

            (node,) = self._emit(select, pick, [buffer], origin)
            assert node is not None
            self._factors.append(node)
            self._position[self._primitives.of[leaf.node]] = i

    def _factors_of(self, unit: Unit, place: Place) -> list[fx.Node | None]:
        """The factor of each input that is a parameter used here alone, if it is known."""
        method = self._method
        if not isinstance(method, Calibrated) or not place.inside:
            return [None] * len(unit.inputs)
        return [
            self._factors[self._position[node]]
            if producer is None and use in ("own", "once") and node in self._position
            else None
            for (node, producer), use in zip(unit.inputs, place.uses, strict=True)
        ]

    def _calibrate(
        self, outputs: dict[str, Leaf], results: dict[fx.Node, dict[str, Any]]
    ) -> dict[str, fx.Node]:
        """The diagonals, each by its factor; writes new factors into the buffer."""
        method = self._method
        assert isinstance(method, Calibrated)
        found, factors = {}, list(self._factors)
        for i, (name, leaf) in enumerate(outputs.items()):
            values = results.get(self._primitives.of[leaf.node], {})
            present = [r for r in values if r != "grad" and values[r] is not None]

            def run(given: list[Any], tracer: Tracer, present: list[str] = present) -> list[Any]:
                known, *rest = given
                at = dict(zip(present, rest, strict=True))
                with tracer.role("hess"):
                    factor = method.factor(at, known) if method.refresh else known
                    return [method.scaled(at, factor), factor]

            inputs = [self._factors[i], *(values[role] for role in present)]
            origin = Origin(leaf.node, "hess")
            node, factor = self._emit(("calibrate", tuple(present)), run, inputs, origin)
            found[name] = node or self._zeros(leaf, "hess")
            factors[i] = factor or factors[i]
        if method.refresh:
            origin = Origin(self._captured.loss, "hess")
            (new,) = self._emit("factors", lambda v, tracer: [torch.stack(v)], factors, origin)
            written = self._graph.call_function(aten.copy_.default, (self._buffer, new))
            written.meta["val"] = self._buffer.meta["val"]
            self._origin[written] = origin
        return found

    def _by_products(self, method: Hutchinson, outputs: dict[str, Leaf]) -> dict[str, fx.Node]:
        """Emit Hessian-vector products with random signs, and what they say of each diagonal."""
        leaves = [self._primitives.of[leaf.node] for leaf in outputs.values()]
        again = Recomputed.of(self._primitives.graph, leaves)
        values = [n.meta["val"] for n in leaves]
        signs = [
            self._placeholder("signs", (method.samples, *v.shape), wide(v.dtype), v.device)
            for v in values
        ]
        loss = self._primitives.of[self._captured.loss]
        entering = [self._value(n) for n in again.entering]
        inputs = [*map(self._value, leaves), *signs, *entering]

        def run(given: list[Any], tracer: Tracer) -> list[Any]:
            n = len(leaves)
            known = dict(zip(again.entering, given[2 * n :], strict=True))

            def value(at: list[Tensor]) -> Tensor:
                return again.run({**known, **dict(zip(leaves, at, strict=True))}, loss)

            with tracer.role("hess"):
                return method.estimate(value, given[:n], given[n : 2 * n])

        origin = Origin(self._captured.loss, "hess", exact=False)
        found = self._emit("products", run, inputs, origin)
        results = {}
        for node, (name, leaf) in zip(found, outputs.items(), strict=True):
            results[name] = node or self._zeros(leaf, "hess")
            self._origin[results[name]] = Origin(leaf.node, "hess", is_result=True, exact=False)
        return results

    def _underivable(self, unit: Unit, error: Exception) -> UnsupportedOperatorError:
        sources = dict.fromkeys(self._primitives.source[n] for n in unit.nodes)
        where = "; ".join(filter(None, dict.fromkeys(map(source_line, sources))))
        names = ", ".join(dict.fromkeys(str(s.target) for s in sources))
        return UnsupportedOperatorError(
            f"PyTorch cannot differentiate {names} as curvature needs it"
            f"{f' (at {where})' if where else ''}: {str(error).splitlines()[0]}\nGive the operator "
            "a rule of its own with hesscale_fx.register(op, hesscale_fx.Rule(...)), or write it "
            "in other operators."
        )

    def _add(self, slot: Slot, role: str, a: fx.Node, b: fx.Node) -> fx.Node:
        source = self._primitives.source[slot[0]]
        (node,) = self._emit("add", lambda v, tracer: [v[0] + v[1]], [a, b], Origin(source, role))
        assert node is not None
        self._mark_result(node, slot, role, "")
        return node

    def _mark_result(self, node: fx.Node, slot: Slot, role: str, rule: str) -> None:
        """`node` is the value of a slot's tensor: name it after that tensor."""
        exact = role == "grad" or self._is_exact(slot)
        region = self._origin[node].region if node in self._origin else -1
        source = self._primitives.source[slot[0]]
        self._origin[node] = Origin(source, role, rule, True, exact, region)

    def _is_exact(self, slot: Slot) -> bool:
        return self._exactness.get(slot, State()).exact

    # --- results --------------------------------------------------------------------------------

    def _read_out(
        self, outputs: dict[str, Leaf], results: dict[fx.Node, dict[str, Any]]
    ) -> dict[str, dict[str, fx.Node]]:
        """For each role the value of each name; zeros for what the loss does not reach."""
        found: dict[str, dict[str, fx.Node]] = {"grad": {}, "hess": {}}
        for name, leaf in outputs.items():
            values = results.get(self._primitives.of[leaf.node], {})
            found["grad"][name] = values.get("grad") or self._zeros(leaf, "grad")
            found["hess"][name] = self._diagonal(leaf, values) or self._zeros(leaf, "hess")
        return found

    def _diagonal(self, leaf: Leaf, values: dict[str, Any]) -> fx.Node | None:
        """What the method makes of the values at a leaf."""
        if isinstance(self._method, Calibrated):
            return None
        if set(values) <= {"grad", "hess"}:
            return values.get("hess")
        present = [role for role, value in values.items() if value is not None]

        def run(given: list[Any], tracer: Tracer) -> list[Any]:
            with tracer.role("hess"):
                return [self._method.read_out(dict(zip(present, given, strict=True)))]

        origin = Origin(leaf.node, "hess")
        inputs = [values[role] for role in present]
        (node,) = self._emit(("read out", tuple(present)), run, inputs, origin)
        return node

    def _name_copies(self, copies: list[fx.Node], outputs: dict[str, Leaf]) -> None:
        self._origin.update({node: Origin(self._captured.loss, "forward") for node in copies})
        (results,) = self._graph.find_nodes(op="output")
        for role, found in zip(("grad", "hess"), results.args[0][1:], strict=True):
            for name, node in found.items():
                if node in copies:
                    self._origin[node] = Origin(outputs[name].node, role, is_result=True)

    def _mark_outputs(self, outputs: dict[str, Leaf]) -> None:
        """Simplifying may have put a step on the way in the place of a result."""
        (results,) = self._graph.find_nodes(op="output")
        for role, found in zip(("grad", "hess"), results.args[0][1:], strict=True):
            for name, node in found.items():
                if self._origin[node].role == role:
                    slot = (self._primitives.of[outputs[name].node], None)
                    self._mark_result(node, slot, role, self._origin[node].rule)

    def _zeros(self, leaf: Leaf, role: str) -> fx.Node:
        like = leaf.node.meta["val"].dtype
        dtype = like if role == "grad" else wide(like)
        origin = Origin(leaf.node, role)
        (node,) = self._emit(
            ("zeros", dtype, role),
            lambda v, tracer: [torch.zeros_like(v[0], dtype=dtype)],
            [self._values[leaf.node]],
            origin,
        )
        assert node is not None
        self._origin[node] = Origin(leaf.node, role, is_result=True)
        return node

    def _write_buffers(self) -> None:
        by_name = {leaf.name: leaf for leaf in self._captured.leaves}
        for name, node in self._captured.mutations.items():
            pair = (self._values[by_name[name].node], self._values[node])
            written = self._graph.call_function(aten.copy_.default, pair)
            written.meta["val"] = pair[0].meta["val"]
            self._origin[written] = Origin(node, "forward")


def signature(
    unit: Unit, native: Native, primitives: Primitives
) -> tuple[list[fx.Node], tuple[Any, ...]]:
    """The nodes that enter a unit, and what its rule depends on besides their kinds."""
    number: dict[fx.Node, int] = {}
    entering: list[fx.Node] = []
    members = set(unit.nodes)

    def reference(node: fx.Node) -> int:
        if node not in number:
            number[node] = len(number)
            if node not in members:
                entering.append(node)
        return number[node]

    def describe(target: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        shown = [f"%{reference(v)}" if isinstance(v, fx.Node) else repr(v) for v in leaves]
        return (target, tuple(shown), repr(spec))

    nodes = [(describe(n.target, n.args, n.kwargs), reference(n), kind(n)) for n in unit.nodes]
    sources = []
    if unit.region is not None:
        for source, whole in native.sources(unit).items():
            if whole:
                args, kwargs = fx.node.map_arg(
                    (source.args, source.kwargs), primitives.of.__getitem__
                )
                sources.append(describe(source.target, args, kwargs))
            else:
                sources.append(None)
    ends = (tuple(map(reference, unit.outputs)), tuple(reference(n) for n, _ in unit.inputs))
    twins = [] if unit.region is None else unit.region.twins
    same = tuple((reference(t.first), reference(t.second), repr(t.axes)) for t in twins)
    return entering, (tuple(nodes), tuple(sources), ends, same)


def exact_use(use: str, exact: bool, slot: Slot) -> str:
    """The use of an input where the recursion serves if it is exact.

    Squares of columns flow on from inner tensors that are not leaves, unless nothing can add to
    them on the way to one.
    """
    return "exact" if exact and (slot[1] is None or use in ("own", "once")) else use


def pair(rows: Rows | None) -> tuple[int, int] | None:
    return None if rows is None else (rows.dim, rows.inner)


def kind(node: fx.Node) -> Any:
    return kind_of(node) if isinstance(node.meta.get("val"), Tensor) else None


def check_shapes(unit: Unit, role: str, values: list[Tensor | None]) -> None:
    """A rule that gives another shape than its input's is a bug; never let it broadcast."""
    for (node, _), value in zip(unit.inputs, values, strict=True):
        if value is not None:
            want, have = () if role == "factor" else node.meta["val"].shape, value.shape
            have = have[1:] if role == "columns" else have
            fits = len(want) == len(have) and all(
                not isinstance(a, int) or not isinstance(b, int) or a == b
                for a, b in zip(want, have, strict=True)
            )
            assert fits, f"{role} of {node.name}: shape {tuple(have)}, expected {tuple(want)}"
