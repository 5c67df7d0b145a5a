"""The rule of a unit at given values of the tensors that enter it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from hesscale_fx.analysis.primitives import Primitives
from hesscale_fx.analysis.units import Unit
from hesscale_fx.structures import Call, Evaluation, definitions
from hesscale_fx.structures.base import Tensors
from hesscale_fx.structures.closed import Named, closed_form_of
from hesscale_fx.structures.pushing import PushingAt, is_long
from hesscale_fx.structures.region import RegionAt
from hesscale_fx.structures.spelled import SpelledAt

Values = Callable[[fx.Node], Any]


def evaluate(unit: Unit, values: Values, native: Native) -> Evaluation:
    """The unit's three questions where the entering nodes have `values`."""
    if unit.region is not None:
        if unit.region.named is not None:
            op, options = unit.region.named
            return Named(Call.of(op, (values(unit.region.inputs[0]),), options, [0]))
        known = native.closed_form(unit, values)
        if known is not None:
            return known
        if unit.region.spelled is not None:
            return SpelledAt(unit.region, values, native.runner(unit, values))
        rule = PushingAt if is_long(unit.region) else RegionAt
        run = native.runner(unit, values)
        outputs = unit.region.outputs

        def results(inputs: Mapping[fx.Node, Tensor]) -> list[Tensor]:
            known = run(inputs)
            return [known[n] for n in outputs]

        return rule(unit.region, values, results)
    call = unit.call
    structure = unit.rule
    assert structure is not None, f"no structure for {call.target}"
    leaves, spec = pytree.tree_flatten((tuple(call.args), dict(call.kwargs)))
    wanted = {n for n, _ in unit.inputs}
    active = [i for i, v in enumerate(leaves) if isinstance(v, fx.Node) and v in wanted]
    leaves = [values(v) if isinstance(v, fx.Node) else v for v in leaves]
    inner = structure.at(Call(call.target, leaves, spec, active))  # type: ignore[arg-type]
    parts = [n.args[1] for n in unit.outputs if n.target is operator.getitem]
    return Parts(inner, parts) if parts else inner  # type: ignore[arg-type]


class Native:
    """Runs a region by the captured operators where it holds the whole of their definition.

    So the gradient of a layer norm is PyTorch's own kernel, not that of its definition.
    """

    def __init__(self, primitives: Primitives, units: list[Unit]) -> None:
        self._primitives = primitives
        self._written: dict[fx.Node, set[fx.Node]] = {}  # captured node -> its nodes in units
        for node in {n for u in units for n in u.nodes}:
            self._written.setdefault(primitives.source[node], set()).add(node)

    def sources(self, unit: Unit) -> dict[fx.Node, bool]:
        """The captured nodes behind a unit, and whether each can be called itself."""
        members = set(unit.nodes)
        found = dict.fromkeys(self._primitives.source[n] for n in unit.nodes)
        return {source: self._is_whole(source, members) for source in found}

    def _is_whole(self, source: fx.Node, members: set[fx.Node]) -> bool:
        return (
            source in self._primitives.defined
            and source.target not in definitions.READS_OUTPUTS
            and self._written[source] <= members
        )

    def closed_form(self, unit: Unit, values: Values) -> Evaluation | None:
        """The rule of a unit that is one call of an operator with a closed form."""
        (source, whole), *others = self.sources(unit).items()
        of = self._primitives.of
        if others or not whole or [of.get(part) for part in results_of(source)] != unit.outputs:
            return None
        leaves, spec = pytree.tree_flatten((tuple(source.args), dict(source.kwargs)))
        wanted = {n for n, _ in unit.inputs}
        nodes = [of[v] if isinstance(v, fx.Node) else None for v in leaves]
        active = [i for i, n in enumerate(nodes) if n in wanted]
        if [nodes[i] for i in active] != [n for n, _ in unit.inputs]:
            return None
        leaves = [v if n is None else values(n) for v, n in zip(leaves, nodes, strict=True)]
        return closed_form_of(Call(source.target, leaves, spec, active), len(unit.inputs))  # type: ignore[arg-type]

    def runner(
        self, unit: Unit, values: Values
    ) -> Callable[[Mapping[fx.Node, Tensor]], Mapping[fx.Node, Tensor]]:
        """Computes a region's outputs, and what lies on the way to them, from its inputs."""
        region = unit.region
        assert region is not None

        def run(inputs: Mapping[fx.Node, Tensor]) -> Mapping[fx.Node, Tensor]:
            local: dict[fx.Node, Any] = dict(inputs)

            def value(node: fx.Node) -> Any:
                return local[node] if node in local else values(node)

            whole = self.sources(unit)
            done: set[fx.Node] = set()
            for node in unit.nodes:
                source = self._primitives.source[node]
                if not whole[source]:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
                    local[node] = result.detach() if node in region.cancelled else result
                elif source not in done:
                    done.add(source)
                    local.update(self._call(source, value))
            return local

        return run

    def _call(self, source: fx.Node, value: Values) -> dict[fx.Node, Any]:
        of = self._primitives.of
        args, kwargs = fx.node.map_arg((source.args, source.kwargs), lambda n: value(of[n]))
        result = source.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, Tensor):
            return {of[source]: result}
        parts = [u for u in source.users if u.target is operator.getitem and u in of]
        return {of[u]: result[u.args[1]] for u in parts}


def results_of(source: fx.Node) -> list[fx.Node]:
    """The call itself, or the first of its several outputs."""
    if isinstance(source.meta["val"], Tensor):
        return [source]
    return [u for u in source.users if u.target is operator.getitem and u.args[1] == 0]


class Parts:
    """A multi-output operator seen through those of its outputs that are used."""

    def __init__(self, inner: Evaluation, parts: list[int]) -> None:
        self._inner = inner
        self._parts = parts

    def _all(self, values: Tensors) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * (max(self._parts) + 1)
        for part, value in zip(self._parts, values, strict=True):
            result[part] = value
        return result

    def vjp(self, u: Tensors) -> list[Tensor | None]:
        return self._inner.vjp(self._all(u))

    def squared_vjp(self, s: Tensors) -> list[Tensor | None]:
        return self._inner.squared_vjp(self._all(s))

    def curvature(self, g: Tensors) -> list[Tensor | None]:
        return self._inner.curvature(self._all(g))
