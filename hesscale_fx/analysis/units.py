"""Cut the active graph into units, each with one rule.

Contractions, selections and other operators that mix axes are units by themselves. Between them
lie regions (pointwise, reductions, views), inside which the recursion is exact. A region ends where
a path leaves it through another unit; to make that canonical every node has levels, the numbers of
such units on its longest way to the loss, and belongs to one region at each level, as if it were
recomputed there. What regions of different rows read alike (a temperature, under one loss along
rows and one along columns) belongs to each of them in the same way.

A region need not be one rule. Cutting it at a tensor u drops the off-diagonal part of the Hessian
of u, which no one misses unless

- two paths from one tensor part and meet again across the cut (reconvergence), or
- what comes before u spreads an element along an axis along which what comes after couples.

So a region is split into the finest units that cut neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from hesscale_fx import structures
from hesscale_fx.analysis.axes import Axes
from hesscale_fx.analysis.cancel import find_cancelled
from hesscale_fx.analysis.groups import Groups, Reconvergence
from hesscale_fx.analysis.kinds import flat_nodes, is_linear, is_part, is_region_node, operands_of
from hesscale_fx.analysis.recognize import recognize
from hesscale_fx.analysis.regions import axes_of, reduced_axes, region_of, source_of, twins_of
from hesscale_fx.analysis.rowfunctions import recognize_row
from hesscale_fx.structures import Structure, table
from hesscale_fx.structures.region import Region


@dataclass(eq=False)
class Unit:
    """What one rule covers.

    `inputs` are the differentiated nodes that enter, each with the unit that made it (None for
    leaves); `outputs` the nodes that other units use.
    """

    nodes: list[fx.Node]
    inputs: list[tuple[fx.Node, Unit | None]]
    outputs: list[fx.Node]
    region: Region | None = None  # else nodes[0] is the one call
    fallback: Structure | None = None  # what serves a call that has no structure of its own
    levels: list[int] = field(default_factory=list)

    @property
    def call(self) -> fx.Node:
        return self.nodes[0]

    @property
    def rule(self) -> Structure | None:
        """The structure of a unit of one call, or None if it has none."""
        call = self.call
        return self.fallback or structures.structure_of(call.target, call.args, call.kwargs)

    @property
    def structure(self) -> str:
        if self.region is not None:
            return self.region.name
        return self.rule.name if self.rule is not None else "unknown"


class Partition:
    """Computes the units of one graph; `units` lists producers before consumers."""

    def __init__(
        self,
        graph: fx.Graph,
        loss: fx.Node,
        active: set[fx.Node],
        source: dict[fx.Node, fx.Node],
        inside: set[fx.Node] | None = None,
    ) -> None:
        """`inside`: the nodes before the boundary, if regions must not cross it."""
        self._order = {n: i for i, n in enumerate(graph.nodes)}
        self._active = active
        self._source = source
        self._inside = inside
        self._loss = loss
        self._users = {n: [u for u in n.users if u in active] for n in graph.nodes if n in active}
        self._nodes = [n for n in graph.nodes if n in active and n.op == "call_function"]
        self._flat = flat_nodes(graph, loss, active)
        self._outer = self._outer_nodes()
        self._inner = {n for n in self._nodes if n not in self._outer and is_region_node(n)}
        self._levels = self._find_levels()
        self._unit_at: dict[tuple[fx.Node, int], Unit] = {}
        self._alone: dict[fx.Node, Unit] = {}
        self._known: dict[tuple, Unit] = {}
        self.units = self._build()

    # --- levels -------------------------------------------------------------------------------

    def _outer_nodes(self) -> set[fx.Node]:
        """Nodes that no region needs: linear ones whose Hessian is zero.

        An operator with a definition is one of them as a whole or not at all.
        """
        outer = {n for n in self._flat if is_part(n) or self.is_linear(n)}
        curved = {self._source[n] for n in self._nodes if n not in outer}
        return {n for n in outer if self._source[n] not in curved}

    def is_flat(self, node: fx.Node) -> bool:
        """Whether the Hessian of a node is zero."""
        return node in self._flat

    def is_linear(self, node: fx.Node) -> bool:
        """Whether an operator is linear in all its differentiated operands jointly."""
        return is_linear(node, self._active)

    def _in_region(self, node: fx.Node) -> bool:
        return node in self._inner

    def _find_levels(self) -> dict[fx.Node, set[int]]:
        levels: dict[fx.Node, set[int]] = {}
        for node in reversed(self._nodes):
            if node in self._outer or node is self._loss:
                levels[node] = {0}
                continue
            found: set[int] = set()
            for user in self._users[node]:
                if self._in_region(user) or user in self._outer or is_part(user):
                    found |= levels[user]
                else:
                    found.add(max(levels[user]) + 1)
            levels[node] = found
        return levels

    def _use_level(self, user: fx.Node) -> int:
        """The level at which a unit of one operator uses its operands."""
        return 0 if user in self._outer else max(self._levels[user]) + 1

    # --- units --------------------------------------------------------------------------------

    def _build(self) -> list[Unit]:
        for node in self._nodes:  # units of one operator; their inputs are linked below
            if not self._in_region(node) and not is_part(node):
                parts = [u for u in self._users[node] if is_part(u)]
                unit = Unit([node, *parts], [], parts or [node])
                for member in unit.nodes:
                    self._alone[member] = unit
        top = max((max(v) for v in self._levels.values() if v), default=0)
        at: dict[int, list[fx.Node]] = {level: [] for level in range(top + 1)}
        for node in self._nodes:
            if self._in_region(node):
                for level in self._levels[node]:
                    at[level].append(node)
        branches = [
            (branch, level)
            for level, nodes in at.items()
            for component in self._components(nodes)
            for branch in self._branches(component, level)
        ]
        split = self._split([branch.nodes for branch, _ in branches])
        for branch, level in branches:
            for members in split[frozenset(branch.nodes)]:
                self._add_region(members, level, branch)
        for node, unit in self._alone.items():
            if node is unit.call:
                level = self._use_level(node)
                unit.levels = [level]
                unit.inputs = [
                    (a, self._producer(a, level)) for a in operands_of(node) if a in self._active
                ]
                if node in self._outer and is_region_node(node):
                    unit.region = self._region([node])
                    unit.inputs = list(dict.fromkeys(unit.inputs))
        units = set(self._alone.values()) | set(self._unit_at.values())
        for unit in units:
            if unit.region is not None:
                unit.region.cancelled = find_cancelled(unit.region)
                unit.region.named = recognize(unit.region)
                unit.region.spelled = recognize_row(unit.region)
        return self._sorted(units)

    def _producer(self, node: fx.Node, level: int) -> Unit | None:
        if node.op != "call_function":
            return None
        return self._alone.get(node) or self._unit_at[node, level]

    def _same_side(self, a: fx.Node, b: fx.Node) -> bool:
        return self._inside is None or (a in self._inside) == (b in self._inside)

    def _components(self, nodes: list[fx.Node]) -> list[list[fx.Node]]:
        members = set(nodes)
        groups = Groups(nodes)
        for node in nodes:
            for user in self._users[node]:
                if user in members and self._same_side(node, user):
                    groups.join([node, user])
        return groups.sets()

    def _branches(self, component: list[fx.Node], level: int) -> list[Branch]:
        """A component once for each region that reads what others, along other rows, read too.

        What units outside of it read of that comes last, by itself.
        """
        shared = self._shared(component)
        own = [n for n in component if n not in shared]
        groups = self._components(own)
        if not shared or len(groups) < 2:
            return [Branch(component)]
        read = {n for n in shared for u in self._users[n] if self._uses(u, level)}
        read = {n for n in read if not set(self._users[n]) <= set(component)}
        branches = []
        for group in [*groups, sorted(read, key=self._order.__getitem__)]:
            nodes = set(group)
            for node in reversed(component):
                if node in shared and any(u in nodes for u in self._users[node]):
                    nodes.add(node)
            if nodes:
                inside = [n for n in component if n in nodes]
                branches.append(Branch(inside, set(component) - nodes, shared, last=False))
        branches[-1].last = True
        return branches

    def _shared(self, component: list[fx.Node]) -> set[fx.Node]:
        """Nodes before any reduction from which different rows are reduced first."""
        if sum(n.target in table.REDUCTIONS for n in component) < 2:
            return set()
        axes = axes_of(component)
        first: dict[fx.Node, set[frozenset[int]]] = {}
        for node in reversed(component):
            row = frozenset(reduced_axes(node, axes))
            below = [first[u] for u in self._users[node] if u in first]
            first[node] = {row} if row else set().union(*below)
        reduced: set[fx.Node] = set()
        for node in component:
            if reduced_axes(node, axes) or any(a in reduced for a in operands_of(node)):
                reduced.add(node)
        return {n for n in component if n not in reduced and len(first[n]) > 1}

    def _add_region(self, group: list[fx.Node], level: int, branch: Branch) -> None:
        members = set(group)
        inputs = [
            (a, self._producer(a, level))
            for a in dict.fromkeys(a for n in group for a in operands_of(n))
            if a in self._active and a not in members
        ]
        region = None
        if len({source_of(a)[0] for a, _ in inputs}) < len(inputs):
            region = self._region_with_twins(group)
            entering = [] if region is None else region.inputs
            added = [a for a in entering if all(a is not b for b, _ in inputs)]
            inputs += [(a, self._producer(a, level)) for a in added]
        key = (tuple(group), tuple((a, id(p)) for a, p in inputs))
        unit = self._known.get(key)
        if unit is None:
            region = region or self._region_with_twins(group)
            unit = self._known[key] = Unit(group, inputs, [], region)
            if region is not None:
                region.outputs = unit.outputs  # one list: what other units use
        if level not in unit.levels:
            unit.levels.append(level)
        for node in group:
            self._unit_at[node, level] = unit
            used = node is self._loss or any(
                self._uses(u, level) and u not in members and branch.serves(node, u)
                for u in self._users[node]
            )
            if used and node not in unit.outputs:
                unit.outputs.append(node)

    def _region_with_twins(self, nodes: list[fx.Node]) -> Region | None:
        """The region of a unit, with what of its inputs is the same tensor.

        None for a single view whose sizes have no common factors.
        """
        region = self._region(nodes)
        if region is None or region.name == "selection":
            return region  # a selection has no products of two entries
        for first, second in itertools.combinations(list(region.inputs), 2):
            twins = twins_of(region, first, second)
            if twins is None or twins.source not in self._active:
                continue
            if not self._same_side(first, nodes[0]):
                continue
            region.twins.append(twins)
            if twins.source not in region.dims:
                region.dims[twins.source] = twins.dims
                region.inputs.append(twins.source)
        return region

    def _uses(self, user: fx.Node, level: int) -> bool:
        if self._in_region(user):
            return level in self._levels[user]
        return self._use_level(user) == level

    def _sorted(self, units: set[Unit]) -> list[Unit]:
        """Producers before consumers, otherwise in the order of the graph."""
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_nodes_from(units)
        graph.add_edges_from((p, unit) for unit in units for _, p in unit.inputs if p is not None)
        return list(
            nx.lexicographical_topological_sort(
                graph, key=lambda u: (max(self._order[n] for n in u.nodes), u.levels[0])
            )
        )

    # --- splitting a region -------------------------------------------------------------------

    def _split(self, components: list[list[fx.Node]]) -> dict[frozenset, list[list[fx.Node]]]:
        """The units of each component; one may be there at several levels."""
        finest: dict[frozenset, Groups] = {}
        for component in components:
            if frozenset(component) not in finest:
                finest[frozenset(component)] = self._finest(component)
        coupled: dict[frozenset, list[list[fx.Node]]] = {}
        for key, groups in finest.items():
            larger = groups.copy()
            self._join_reconverging(larger, self._active)
            self._join_coupled(larger)
            coupled[key] = [s for s in larger.sets() if s != groups.set_of(s[0])]
        apart = too_often([s for c in components for s in coupled[frozenset(c)]])
        for key, groups in finest.items():
            for members in coupled[key]:
                if apart.isdisjoint(members):
                    groups.join(members)
        return {key: groups.sets(topological=True) for key, groups in finest.items()}

    def _finest(self, component: list[fx.Node]) -> Groups:
        """The smallest units that no two paths from one tensor, but for leaves, leave apart."""
        groups = Groups(component)
        by_source: dict[fx.Node, list[fx.Node]] = {}
        for node in component:
            by_source.setdefault(self._source[node], []).append(node)
        for members in by_source.values():
            if len(members) > 1:
                self._try(groups, members)
        self._join_reconverging(groups, {n for n in self._active if n.op == "call_function"})
        return groups

    def _join_reconverging(self, groups: Groups, tensors: set[fx.Node]) -> None:
        """Join units that hold two paths from one of `tensors` to one place."""
        if len(groups.elements) > 1:
            for members in Reconvergence(groups.elements, tensors).groups():
                self._try(groups, members)

    def _try(self, groups: Groups, members: Iterable[fx.Node]) -> bool:
        """Make one unit of the groups of `members` if there is a rule for it."""
        union = self._between(groups.union(members), groups)
        if self._region(union) is None:  # one axis twice, perhaps, because it is read so
            views = [n for n in self._first_views(union) if groups.set_of(n) == [n]]
            union = self._between([n for n in union if n not in views], groups)
            several = any(groups.set_of(n) is not groups.set_of(union[0]) for n in union)
            if not views or not several or self._region(union) is None:
                return False
        groups.join(union)
        return True

    def _first_views(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """The views of what enters."""
        rest = set(nodes)
        for node in nodes:
            if node.target in table.VIEWS and rest.isdisjoint(operands_of(node)):
                rest.remove(node)
        return [n for n in nodes if n not in rest]

    def _between(self, members: list[fx.Node], groups: Groups) -> list[fx.Node]:
        """Add what lies on paths from one member to another, so that the unit is convex."""
        while True:
            inside = set(members)
            component = groups.elements
            below: set[fx.Node] = set()
            for node in component:
                if node in inside or any(a in below for a in operands_of(node)):
                    below.add(node)
            above: set[fx.Node] = set()
            for node in reversed(component):
                if node in inside or any(u in above for u in self._users[node]):
                    above.add(node)
            grown = groups.union([n for n in component if n in below and n in above])
            if len(grown) == len(members):
                return members
            members = grown

    def _join_coupled(self, groups: Groups) -> None:
        """Join units that spread elements along an axis to those that couple it later."""
        if not any(n.target in table.REDUCTIONS for n in groups.elements):
            return  # nothing couples along an axis
        axes = axes_of(groups.elements)
        if any(len(set(axes.atoms(n))) < len(axes.atoms(n)) for n in groups.elements):
            axes = axes_of(groups.elements, apart=set(self._first_views(groups.elements)))
        failed: set[tuple[fx.Node, fx.Node]] = set()
        changed = True
        while changed:
            changed = False
            # First node of a group -> axes that it or what follows couples -> the groups that do.
            couples: dict[fx.Node, dict[int, dict[fx.Node, None]]] = {}
            for group in reversed(groups.sets(topological=True)):
                row = {a for n in group for a in reduced_axes(n, axes)}
                after: dict[int, dict[fx.Node, None]] = {}
                for head in self._consumers(group, groups):
                    for axis, heads in couples[head].items():
                        after.setdefault(axis, {}).update(heads)
                spread = row | self._spread(group, axes)
                met = {h: None for a in sorted(spread) for h in after.get(a, {})}
                # The nearest first; those that lie further on may still join the larger group.
                for head in sorted(met, key=self._order.__getitem__):
                    if (group[0], head) in failed:
                        continue
                    if self._try(groups, [*group, *groups.set_of(head)]):
                        changed = True
                        break
                    failed.add((group[0], head))
                if changed:
                    break
                couples[group[0]] = after
                for axis in row:
                    couples[group[0]].setdefault(axis, {})[group[0]] = None

    def _consumers(self, group: list[fx.Node], groups: Groups) -> list[fx.Node]:
        """The first nodes of the groups that use this one."""
        members = set(group)
        users = [u for n in group for u in self._users[n] if u in groups and u not in members]
        return list(dict.fromkeys(groups.set_of(u)[0] for u in users))

    def _spread(self, group: list[fx.Node], axes: Axes) -> set[int]:
        """The axes along which an element of an input reaches several of the group."""
        members = set(group)
        outer = {a for n in group for a in axes.atoms(n)}
        entering = {a for n in group for a in operands_of(n)} - members
        return {x for a in entering if a in self._active for x in outer - set(axes.atoms(a))}

    def _region(self, nodes: list[fx.Node]) -> Region | None:
        return region_of(nodes, self._active)


@dataclass
class Branch:
    """Nodes of a component that are split into units together."""

    nodes: list[fx.Node]
    hidden: set[fx.Node] = field(default_factory=set)  # the rest of the component
    shared: set[fx.Node] = field(default_factory=set)  # nodes that are in several branches
    last: bool = True  # whether units outside of the component read what is shared from this one

    def serves(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a user that is not in the node's unit reads it from this branch."""
        if user in self.hidden:
            return False
        return self.last or node not in self.shared or user in self.nodes


# A region may have any number of reductions. But along the residual stream of a deep post-norm
# transformer each level has a region of its own with all norms from there on. This is how many
# reductions there may be besides those of the largest of such regions.
MAX_REPEATED = 64


def too_often(regions: list[list[fx.Node]]) -> set[fx.Node]:
    """The nodes of regions that would be computed at too many levels."""
    shared: nx.Graph = nx.Graph((i, n) for i, members in enumerate(regions) for n in members)
    found: set[fx.Node] = set()
    for linked in nx.connected_components(shared):
        counts = [
            sum(n.target in table.REDUCTIONS for n in regions[i])
            for i in linked
            if isinstance(i, int)
        ]
        if sum(counts) - max(counts) > MAX_REPEATED:
            found |= {n for n in linked if isinstance(n, fx.Node)}
    return found
