"""What the nodes of an emitted graph cost: sizes, FLOPs, bytes, memory at peak."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from hesscale_fx.signature import Signature


class Sizes:
    """Integers for the free sizes of a graph: those of a call, else those of the example.

    A size that only the values of a run give, such as the number of entries that a mask selects,
    counts as 1.

    Attributes:
        of_data: the symbols of such sizes that were asked for.
    """

    def __init__(self, bound: Mapping[sympy.Symbol, int] | None = None) -> None:
        self._bound = dict(bound or {})
        self._known: dict[Any, int] = {}
        self.of_data: set[str] = set()

    @classmethod
    def of_call(cls, signature: Signature, tensors: list[Any]) -> Sizes:
        """The sizes that the tensors of a call bind."""
        bound = {}
        for want, have in zip(signature.inputs, tensors, strict=True):
            for dim, size in zip(want.shape, have.shape, strict=True):
                if isinstance(dim, sympy.Symbol):
                    bound[dim] = int(size)
        return cls(bound)

    def __call__(self, size: Any) -> int:
        """`size` as an integer."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        if expr not in self._known:
            unknown = free_unbacked_symbols(size)
            self.of_data |= {str(s) for s in unknown}
            value = expr.subs({**self._bound, **dict.fromkeys(unknown, 1)})
            if not value.is_Integer:
                value = size.node.shape_env.create_symintnode(value, hint=None).node.hint
            self._known[expr] = int(value)
        return self._known[expr]

    def meta(self, value: Any) -> Any:
        """Tensors without data that have the sizes and strides of `value`'s."""
        if isinstance(value, Tensor):
            shape, stride = [*map(self, value.shape)], [*map(self, value.stride())]
            return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
        return self(value) if isinstance(value, torch.SymInt) else value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors among the outputs of a node."""
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def size_in_bytes(value: Any, sizes: Sizes) -> int:
    """Bytes that the tensors of a node's value hold."""
    total = 0
    for tensor in tensors_of(value):
        count = tensor.element_size()
        for size in tensor.shape:
            count *= sizes(size)
        total += count
    return total


def flops(node: fx.Node, sizes: Sizes) -> int:
    """FLOPs by the formulas of `torch.utils.flop_counter`.

    They count matrix products, convolutions and attention, 2 for each multiply-add; pointwise work
    is not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    formula = flop_registry.get(node.target.overloadpacket)
    views = any(r.alias_info is not None for r in node.target._schema.returns)
    if formula is None and (views or not node.target._can_decompose()):
        return 0
    args, kwargs, value = pytree.tree_map_only(
        (Tensor, torch.SymInt), sizes.meta, (*arguments(node), node.meta.get("val"))
    )
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=value))
    with FlopCounterMode(display=False) as counter:  # counts what it decomposes to
        node.target(*args, **kwargs)
    return int(counter.get_total_flops())


def arguments(node: fx.Node) -> tuple[Any, Any]:
    """`args` and `kwargs` with the values of the nodes in place of the nodes."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return tuple(args), dict(kwargs)


# --- memory -------------------------------------------------------------------------------------

Storage = tuple[fx.Node, int]  # the node that allocated it, which of its outputs


def storages(graph: fx.Graph, sizes: Sizes) -> dict[fx.Node, list[Storage]]:
    """For each node the memory behind its outputs; views share their operand's."""
    found: dict[fx.Node, list[Storage]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            base, index = node.args
            same = [s for s in found[base] if s[1] == index and s[0] is base]
            found[node] = same or found[base]  # or: the parts are views of one operand
            continue
        viewing = viewed(node, sizes)
        count = len(value) if isinstance(value, (tuple, list)) else 1
        own = [(node, i) for i in range(count) if isinstance(part_of(value, i), Tensor)]
        found[node] = found[viewing] if viewing is not None else own
    return found


def part_of(value: Any, index: int) -> Any:
    """One of several outputs, or the only one."""
    return value[index] if isinstance(value, (tuple, list)) else value


def viewed(node: fx.Node, sizes: Sizes) -> fx.Node | None:
    """The operand whose memory a node's value is, if it is a view or writes in place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    if not any(r.alias_info is not None for r in schema.returns):
        return None
    base = node.args[0]
    if not isinstance(base, fx.Node) or "val" not in base.meta:
        return None
    if node.target._can_decompose():  # reshape and its like: a view only where strides allow it
        args, kwargs = pytree.tree_map_only((Tensor, torch.SymInt), sizes.meta, arguments(node))
        out = node.target(*args, **kwargs)
        if out.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
            return None
    return base


@dataclass
class Peak:
    """The moment at which a run of a graph holds most memory.

    Attributes:
        total: bytes of the tensors that live then, besides arguments, parameters and buffers.
        at: name of the node that runs then.
        held: node name -> bytes of its value that live then.
    """

    total: int
    at: str
    held: dict[str, int]


def peak(graph: fx.Graph, sizes: Sizes) -> Peak:
    """Memory at peak by liveness: a value is freed after its last use, as fx's code does."""
    behind = storages(graph, sizes)
    order = {node: i for i, node in enumerate(graph.nodes)}
    last: dict[Storage, int] = {}
    for node in graph.nodes:
        until = max([order[node], *(order[u] for u in node.users)])
        for storage in behind[node]:
            last[storage] = max(last.get(storage, 0), until)
    free: dict[int, list[Storage]] = {}
    for storage, index in last.items():
        free.setdefault(index, []).append(storage)
    live: dict[Storage, int] = {}
    best, held, at = 0, dict(live), ""
    total = 0
    for index, node in enumerate(graph.nodes):
        if node.op == "call_function":
            for storage in behind[node]:
                if storage[0] is node:
                    live[storage] = size_in_bytes(part_of(node.meta["val"], storage[1]), sizes)
                    total += live[storage]
        if total > best:
            best, held, at = total, dict(live), node.name
        for storage in free.get(index, ()):
            total -= live.pop(storage, 0)
    return Peak(best, at, by_node(held.items()))


def by_node(held: Iterable[tuple[Storage, int]]) -> dict[str, int]:
    """Bytes by the name of the node that allocated them."""
    found: dict[str, int] = {}
    for (node, _), count in held:
        found[node.name] = found.get(node.name, 0) + count
    return found
