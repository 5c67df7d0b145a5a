"""One plain record for each node of an emitted graph; every view of the graph reads these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from hesscale_fx.errors import source_line
from hesscale_fx.inspect.costs import Sizes, flops, size_in_bytes, tensors_of

if TYPE_CHECKING:
    from hesscale_fx.module import HesScaleModule
    from hesscale_fx.program import Program

LEAF_ROLES = {"input": "input", "parameter": "parameter", "buffer": "buffer", "constant": "buffer"}
GENERATED = ("gradient", "curvature")


@dataclass(frozen=True)
class Record:
    """One node of the emitted graph.

    Attributes:
        name: the node's name, unique in the graph.
        op: the operator, e.g. ``aten.mm.default``; for leaves what they stand for.
        role: ``input``, ``parameter``, ``buffer``, ``forward``, ``gradient``, ``curvature`` or
            ``output``.
        shape: as captured, e.g. ``[s0, 3]``; free sizes are symbols.
        dtype: e.g. ``float32``; empty if it is no tensor.
        source: what the value belongs to, e.g. ``fc1`` for ``fc1_grad``.
        module: path of the module that it is computed in; a generated node's is the module whose
            rule made it. Empty at the top, ``loss`` in the loss.
        regions: numbers of the units that it belongs to; several if it is used at several levels.
        rule: the rule that generated it; empty for the forward.
        structure: the structure of the Jacobian of its unit.
        exact: whether the value is exact: always for forward and gradient.
        line: the user's source line, ``file:line: code``; may be empty.
        flops: by `torch.utils.flop_counter`.
        bytes: of its value.
        inputs: (position, node name) for each operand, a repeated one repeatedly.
        forward: names of the forward nodes that it was generated from.
    """

    name: str
    op: str
    role: str
    shape: str
    dtype: str
    source: str
    module: str
    regions: tuple[int, ...]
    rule: str
    structure: str
    exact: bool
    line: str
    flops: int
    bytes: int
    inputs: tuple[tuple[str, str], ...]
    forward: tuple[str, ...] = ()
    key: str = field(default="", repr=False)  # the captured node it belongs to


class Records:
    """The records of a graph, in its order, and what they were made of."""

    def __init__(self, hs: HesScaleModule, program: Program, sizes: Sizes) -> None:
        self.hs = hs
        self.program = program
        self.sizes = sizes
        self._leaves = {leaf.node.name: leaf for leaf in program.captured.leaves}
        source = program.primitives.source
        self._captured = [tuple(dict.fromkeys(source[n] for n in u.nodes)) for u in program.units]
        self._regions: dict[str, list[int]] = {}  # captured name -> its units
        for number, nodes in enumerate(self._captured):
            for node in nodes:
                self._regions.setdefault(node.name, []).append(number)
        self._structures = [u.structure for u in program.units]
        self._emitted: dict[str, list[str]] = {}  # captured name -> its forward nodes
        for node in program.graph.nodes:
            about = mark(node)
            if about and about["role"] == "forward":
                self._emitted.setdefault(about["node"], []).append(node.name)
        self._records = {n.name: self._record(n) for n in program.graph.nodes}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, name: str) -> Record:
        return self._records[name]

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def _record(self, node: fx.Node) -> Record:
        about = mark(node)
        key = str(about.get("node", ""))
        role = self._role(node, about)
        value = node.meta.get("val")
        made_by = int(about.get("region", -1))
        generated = role in GENERATED
        if generated:
            regions = [made_by] if made_by >= 0 else []
        else:
            regions = self._regions.get(key, []) if role == "forward" else []
        structures = dict.fromkeys(self._structures[i] for i in regions)
        return Record(
            name=node.name,
            op=op_name(node),
            role=role,
            shape=shape_of(value),
            dtype=dtype_of(value),
            source=str(about.get("source", "")),
            module=self._module(node, key, made_by),
            regions=tuple(regions),
            rule=str(about.get("rule", "")) if generated else "",
            structure=", ".join(structures),
            exact=bool(about.get("exact", True)),
            line=printable(self._line(node, made_by)),
            flops=flops(node, self.sizes),
            bytes=size_in_bytes(value, self.sizes),
            inputs=tuple(operands(node)),
            forward=tuple(self._forward(key, made_by)) if generated else (),
            key=key,
        )

    def _role(self, node: fx.Node, about: dict[str, Any]) -> str:
        if node.op == "output":
            return "output"
        if node.op in ("placeholder", "get_attr"):
            leaf = self._leaves.get(str(about.get("node")))
            return LEAF_ROLES[leaf.kind] if leaf else "input"
        return str(about.get("role", "forward"))

    def _forward(self, key: str, region: int) -> list[str]:
        """What a generated node came from: the nodes of its unit, else the node it belongs to."""
        keys = [n.name for n in self._captured[region]] if region >= 0 else [key]
        return list(dict.fromkeys(name for k in keys for name in self._emitted.get(k, [])))

    def _line(self, node: fx.Node, region: int) -> str:
        """The line of what the node belongs to; a leaf has none, then of the rule's operator."""
        line = source_line(node)
        return line if line or region < 0 else source_line(self._captured[region][-1])

    def _module(self, node: fx.Node, key: str, region: int) -> str:
        prefix = self.hs._build.prefix
        if region >= 0:  # of the rule that made it
            return self._path(self._captured[region][-1].meta, prefix)
        if key in self._leaves:
            leaf = self._leaves[key]
            name = leaf.name.removeprefix("model.").removeprefix(prefix)
            return name.rpartition(".")[0] if leaf.kind != "input" else ""
        return self._path(node.meta, prefix)

    def _path(self, meta: dict[str, Any], prefix: str) -> str:
        stack = meta.get("nn_module_stack") or {}
        known = [str(value[0]) for key, value in stack.items() if not str(key).startswith("_empty")]
        path = known[-1] if known else "model"
        if not path:  # outside the model: the loss is a function
            return "loss" if self.hs._build.loss is not None else ""
        path = path.removeprefix("model").removeprefix(".")
        return path.removeprefix(prefix) if path != prefix.rstrip(".") else ""


def records(hs: HesScaleModule, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Records:
    """The records of the graph that serves such a call, or that served last if there are none."""
    if args or kwargs:
        program, tensors = hs._find(args, kwargs or {})
        return Records(hs, program, Sizes.of_call(program.signature, tensors))
    return Records(hs, hs._program(), Sizes())


def mark(node: fx.Node) -> dict[str, Any]:
    """What `names.annotate` left on a node."""
    return (node.meta.get("custom") or {}).get("hesscale", {})


def op_name(node: fx.Node) -> str:
    """E.g. ``aten.mm.default``, ``getitem``; for leaves and the output their kind."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def shape_of(value: Any) -> str:
    """E.g. ``[s0, 3]``; several outputs are joined."""
    return " ".join("[" + ", ".join(map(str, t.shape)) + "]" for t in tensors_of(value))


def dtype_of(value: Any) -> str:
    """E.g. ``float32``."""
    names = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors_of(value))
    return " ".join(names)


def operands(node: fx.Node) -> list[tuple[str, str]]:
    """Position and name of every operand; the output's positions are those of a `Result`."""
    if node.op == "output":
        results: Any = node.args[0]
        loss, *parts = results
        found = [("loss", loss)]
        for field_name, part in zip(("grads", "hess_diag"), parts, strict=True):
            found += [(f"{field_name}[{k!r}]", v) for k, v in part.items()]
        return [(where, v.name) for where, v in found]
    leaves, _ = pytree.tree_flatten_with_path((list(node.args), dict(node.kwargs)))
    return [(position(path), value.name) for path, value in leaves if isinstance(value, fx.Node)]


def position(path: tuple[Any, ...]) -> str:
    """E.g. ``0`` for the first argument, ``1[2]`` within a list, ``dim`` for a keyword."""
    first, *rest = path[1:]
    name = getattr(first, "idx", None)
    return str(first.key if name is None else name) + "".join(f"[{p.idx}]" for p in rest)


def printable(text: str) -> str:
    """Without control characters, which XML does not hold."""
    return "".join(c if c.isprintable() else " " for c in text)
