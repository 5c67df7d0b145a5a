"""Put several nodes together that would lose by being cut: one composite operator in their place.

A composite is exact by the columns of its Jacobian, so it must be small. Which nodes those are is
said by joined.py; here is what holds of any: that no other path leaves the set and comes back, that
the recursion through its own units would drop something, and that its columns are few.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from hesscale_fx.analysis.activity import active_nodes
from hesscale_fx.analysis.carried import carried
from hesscale_fx.analysis.exactness import exactness
from hesscale_fx.analysis.kinds import flat_nodes, is_part, operands_of
from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.units import Partition
from hesscale_fx.structures import definitions
from hesscale_fx.structures.columns import CHUNK, SMALL, Columns
from hesscale_fx.structures.composite import Composite, Step
from hesscale_fx.trace import kind_of

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


class Joiner:
    """Rewrites the primitive graph and the set of its active nodes.

    Args:
        primitives: the graph.
        active: nodes that a derivative passes.
        loss: the node that is differentiated.
        ends: other nodes whose values are asked for.
        failed: sets of captured nodes and how often autograd could not differentiate them as one:
            once by the captured operators, and then written out.
    """

    def __init__(
        self,
        primitives: Primitives,
        active: set[fx.Node],
        loss: fx.Node,
        ends: Iterable[fx.Node],
        failed: Mapping[frozenset[fx.Node], int],
    ) -> None:
        self.primitives = primitives
        self.active = active
        self._made: list[fx.Node] = []
        self._ends = {loss, *ends}
        self._flat = flat_nodes(primitives.graph, loss, active)
        self._failed = failed
        self._captured = {p: c for c, p in primitives.of.items()}
        self._loses: dict[Any, bool] = {}

    @property
    def joined(self) -> list[fx.Node]:
        """The composite operators, without those that others have taken in."""
        return [n for n in self._made if n in self.active]

    def join(self, name: str, members: Iterable[fx.Node]) -> bool:
        """Make one operator of active nodes if it is worth it and may be."""
        chosen = self._with_parts(members)
        nodes = [n for n in self.primitives.graph.nodes if n in chosen]
        if len(nodes) < 2 or self._failures(nodes) > 1 or not self._is_convex(nodes):
            return False
        found = self._composite(name, nodes)
        if found is None or not self._would_lose(found):
            return False
        self._replace(found)
        return True

    def _failures(self, nodes: list[fx.Node]) -> int:
        return self._failed.get(sources_of(nodes, self.primitives), 0)

    def _with_parts(self, members: Iterable[fx.Node]) -> set[fx.Node]:
        """No call of several outputs is apart from them."""
        calls = {n.args[0] if is_part(n) else n for n in members}
        parts = {u for n in calls for u in n.users if is_part(u) and u in self.active}  # type: ignore
        return calls | parts  # type: ignore[return-value]

    def _is_convex(self, nodes: list[fx.Node]) -> bool:
        """Whether no path that a derivative takes leaves the nodes and comes back."""
        members, below = set(nodes), set()
        for node in self.primitives.graph.nodes:
            operands = operands_of(node) if node in self.active else []
            if node in members and any(a in below for a in operands):
                return False
            if node not in members and any(a in members or a in below for a in operands):
                below.add(node)
        return True

    def _composite(self, name: str, nodes: list[fx.Node]) -> Composite | None:
        """The nodes as one operator; None if that is too large."""
        members = set(nodes)
        steps = steps_of(nodes, self.primitives, self.active, whole=not self._failures(nodes))
        entering = entering_of(steps)
        outputs = [
            n
            for n in nodes
            if n in self._ends or any(u in self.active and u not in members for u in n.users)
        ]
        inputs = [a for a in entering if a in self.active]
        values = [n.meta["val"] for n in (*inputs, *nodes)]
        single = not any(
            isinstance(n.meta.get("val"), (tuple, list)) for n in (*entering, *outputs)
        )
        if not single or any(isinstance(v, Tensor) and v.dtype in HALF for v in values):
            return None  # casts in between would round what is computed in float32
        through = carried(nodes, self.active, inputs, outputs)
        ranks = [
            min(leading(through[i, k]) for k in range(len(outputs))) for i in range(len(inputs))
        ]
        rule = Columns(blocks=tuple(ranks))
        operands, results = ([n.meta["val"] for n in some] for some in (inputs, outputs))
        if rule.count(operands, results) > SMALL or rule.numbers(operands, results) > CHUNK:
            return None
        place = {x: entering.index(x) for x in inputs}
        at = {(place[inputs[i]], k): dims for (i, k), dims in through.items()}
        return Composite(name, nodes, steps, entering, outputs, rule, at)

    def _would_lose(self, found: Composite) -> bool:
        """Whether the recursion through the nodes is not exact where what they give is diagonal."""
        kinds = tuple(
            (n in self.active, kind_of(n) if isinstance(n.meta.get("val"), Tensor) else None)
            for n in found.entering
        )
        flat = {n for n in found.outputs if n in self._flat}
        key = (found.calls, kinds, tuple(n in flat for n in found.outputs))
        if key not in self._loses:
            self._loses[key] = loses(found, self.active, self.primitives.source, flat)
        return self._loses[key]

    def _replace(self, found: Composite) -> None:
        graph, members = self.primitives.graph, set(found.nodes)
        with graph.inserting_after(found.nodes[-1]):
            call = graph.call_function(found, tuple(found.entering))
        values = tuple(n.meta["val"] for n in found.outputs)
        call.meta["val"] = values if len(values) > 1 else values[0]
        self.primitives.source[call] = self.primitives.source[found.nodes[-1]]
        parts = [call]
        if len(values) > 1:
            with graph.inserting_after(call):
                parts = [
                    graph.call_function(operator.getitem, (call, k)) for k in range(len(values))
                ]
        self.active -= members
        for output, part in zip(found.outputs, parts, strict=True):
            part.meta["val"] = output.meta["val"]
            self.primitives.source[part] = self.primitives.source[output]
            self.primitives.stands_for[part] = output
            for user in list(output.users):
                if user in self.active:
                    user.replace_input_with(output, part)
            captured = self._captured.get(output)
            if captured is not None:
                self.primitives.of[captured] = part
                self._captured[part] = captured
            for some in (self._ends, self._flat):
                if output in some:
                    some.add(part)
        self._made.append(call)
        self.active |= {call, *parts}
        sort(graph)


def sources_of(nodes: Iterable[fx.Node], primitives: Primitives) -> frozenset[fx.Node]:
    """The captured nodes behind primitive ones."""
    return frozenset(primitives.source[n] for n in nodes)


def steps_of(
    nodes: list[fx.Node], primitives: Primitives, active: set[fx.Node], *, whole: bool
) -> list[Step]:
    """The calls that compute some nodes.

    `whole`: by the captured operators where all that is active of their definition is there.
    """
    members, of = set(nodes), primitives.of
    written: dict[fx.Node, set[fx.Node]] = {}
    for node in active:
        written.setdefault(primitives.source[node], set()).add(node)
    steps: dict[fx.Node, Step] = {}
    for node in nodes:
        source = primitives.source[node]
        native = source in primitives.defined and source.target not in definitions.READS_OUTPUTS
        if not (whole and native and written[source] <= members):
            steps[node] = Step(node.target, node.args, node.kwargs, {node: None})
        elif source not in steps:
            args, kwargs = fx.node.map_arg((source.args, source.kwargs), of.__getitem__)
            results: dict[fx.Node, int | None] = {of[source]: None}
            if not isinstance(source.meta["val"], Tensor):
                parts = [u for u in source.users if u.target is operator.getitem and u in of]
                results = {of[u]: u.args[1] for u in parts}  # type: ignore[misc]
            steps[source] = Step(source.target, args, kwargs, results)
    return in_turn(list(steps.values()))


def in_turn(steps: list[Step]) -> list[Step]:
    """The steps such that each comes after those whose results it takes."""
    waiting = {n for step in steps for n in step.results}
    found: list[Step] = []
    while steps:
        ready = next(s for s in steps if not waiting.intersection(s.operands()))
        waiting.difference_update(ready.results)
        found.append(ready)
        steps = [s for s in steps if s is not ready]
    return found


def entering_of(steps: list[Step]) -> list[fx.Node]:
    """What the steps take that none of them gives."""
    given = {n for step in steps for n in step.results}
    return list(dict.fromkeys(n for step in steps for n in step.operands() if n not in given))


def leading(through: dict[int, int]) -> int:
    """How many leading dimensions stay the leading ones."""
    rank = 0
    while through.get(rank) == rank:
        rank += 1
    return rank


def loses(
    found: Composite,
    active: set[fx.Node],
    source: dict[fx.Node, fx.Node],
    flat: set[fx.Node],
) -> bool:
    """Whether the recursion through the nodes drops something under a diagonal quadratic.

    `flat`: the outputs whose Hessian is zero.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    entering = dict.fromkeys(a for n in found.nodes for a in n.all_input_nodes)
    for node in (a for a in entering if a not in set(found.nodes)):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in found.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)

    def call(target: Any, *args: fx.Node) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta["val"] = target(*(a.meta["val"] for a in args))
        return made

    loss: fx.Node | None = None
    for output in found.outputs:
        y = copies[output]
        y = call(aten.view_as_real.default, y) if y.meta["val"].is_complex() else y
        term = call(aten.sum.default, y if output in flat else call(aten.mul.Tensor, y, y))
        loss = term if loss is None else call(aten.add.Tensor, loss, term)
    assert loss is not None
    leaves = [copies[n] for n in copies if n in active and n not in set(found.nodes)]
    of = {copy: source[n] for n, copy in copies.items()}
    sources = {n: of.get(n, n) for n in graph.nodes}
    partition = Partition(graph, loss, active_nodes(graph, loss, leaves), sources)
    return not all(state.exact for state in exactness(partition)[1].values())


def sort(graph: fx.Graph) -> None:
    """Put every node after those it uses, otherwise in the order they have."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    nodes = list(place)
    if all(place[a] < place[n] for n in nodes for a in n.all_input_nodes):
        return
    waiting = {n: len(n.all_input_nodes) for n in nodes}
    ready = [place[n] for n in nodes if not waiting[n]]
    heapq.heapify(ready)
    end = nodes[-1]
    done = 0
    while ready:
        node = nodes[heapq.heappop(ready)]
        if node is not end:
            end.append(node)
        end, done = node, done + 1
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, place[user])
    assert done == len(nodes), "a composite in a circle"
