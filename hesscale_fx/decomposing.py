"""Decompose an exported program, tracing one call of each kind.

`ExportedProgram.run_decompositions` runs the whole program twice and traces every call anew. Here
each call is decomposed on its own, so that of a model of many equal layers only one is traced. A
write becomes the new value of the tensor and of all that is the same tensor; where it would reach
others (it, or they, are views), and where a call holds a graph or has sizes from data, the program
is left to `run_decompositions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch import _functionalize_has_metadata_mutation as has_new_shape
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation
from torch._subclasses import fake_impls
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.export import exported_program
from torch.fx.experimental.proxy_tensor import decompose
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from hesscale_fx.simplify import is_write
from hesscale_fx.trace import Template, Tracer, inline, kind_of, trace


@dataclass
class Decomposed:
    """The functional graph, whose first outputs are new values of the placeholders in `written`."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)  # old placeholder -> new value


class _Apart(Exception):
    """A call cannot be decomposed on its own."""


def decomposed(graph: fx.Graph, table: dict[Any, Callable], fake_mode: Any) -> Decomposed | None:
    """The graph with the decompositions of `table`, or None where calls are not on their own."""
    if fake_mode is None or not all(map(is_plain, graph.nodes)):
        return None
    operators = len(torch._C._dispatch_get_all_op_names())
    rules = rules_of(frozenset(table.items()), operators)
    try:
        with rules.registered():
            return _Decomposing(rules.below, fake_mode).run(graph)
    except _Apart:
        return None


@dataclass
class Rules:
    """A table of decompositions, as the dispatcher takes it."""

    below: dict[Any, Callable]  # of operators that are not composite
    kernels: dict[Any, dict]  # of those that are: their kernels in Python
    fakes: dict[Any, Callable]  # and what they do with fake tensors

    @contextmanager
    def registered(self) -> Iterator[None]:
        """What torch.export registers while it decomposes, all at once."""
        before = {op: dict(op.py_kernels) for op in self.kernels}
        known = dict(fake_impls.op_implementations_dict)
        fake_impls.op_implementations_dict.update(self.fakes)
        replace(self.kernels)
        try:
            yield
        finally:
            replace(before)
            fake_impls.op_implementations_dict.clear()
            fake_impls.op_implementations_dict.update(known)


def replace(kernels: dict[Any, dict]) -> None:
    """Give operators these kernels in Python and no others."""
    for op, own in kernels.items():
        op.py_kernels.clear()
        op.py_kernels.update(own)
        op._dispatch_cache.clear()


@functools.lru_cache(maxsize=2)
def rules_of(table: frozenset, operators: int) -> Rules:
    """What torch.export makes of a table, as long as no operator is new."""
    composite, below = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(table))
    known = set(fake_impls.op_implementations_dict)
    with exported_program._override_composite_implicit_decomp(composite):
        kernels = {op: dict(op.py_kernels) for op in composite}
        registered = fake_impls.op_implementations_dict.items()
        fakes = {op: rule for op, rule in registered if op not in known}
    return Rules(below, kernels, fakes)


def is_plain(node: fx.Node) -> bool:
    """Whether a node is a call without a graph of its own, and without sizes from data."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function" or is_higher(node):
        return False
    value = node.meta.get("val")
    kinds = {isinstance(v, Tensor) for v in pytree.tree_leaves(value)}
    return len(kinds) < 2 and not free_unbacked_symbols(value)


def is_higher(node: fx.Node) -> bool:
    """Whether a node holds graphs of its own."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def functionally(call: Callable[[list[Any]], Any], values: list[Any]) -> list[Any]:
    """What `call` returns, then for each of `values` its new value if it has been written into."""
    with FunctionalTensorMode(export=True):
        wrapped = pytree.tree_map_only(Tensor, FunctionalTensor.to_functional, values)
        results = pytree.tree_map(from_fun, call(wrapped))
        if any(isinstance(v, FunctionalTensor) and has_new_shape(v.elem) for v in wrapped):
            raise _Apart
        written = [from_fun(v) if has_data_mutation(v) else None for v in wrapped]
    return [*(results if isinstance(results, (tuple, list)) else [results]), *written]


class _Decomposing:
    """One graph, its templates, and which tensors share memory."""

    def __init__(self, table: dict[Any, Callable], fake_mode: Any) -> None:
        self._table = table
        self._fake_mode = fake_mode
        self._result = Decomposed()
        self._templates: dict[Any, Template] = {}
        self._values: dict[fx.Node, Any] = {}  # old node -> new node, or a list of them
        self._sharing: dict[int, list[fx.Node]] = {}  # memory -> the old nodes that are in it

    def run(self, graph: fx.Graph) -> Decomposed:
        """Write every call."""
        for node in graph.nodes:
            self._values[node] = self._written(node)
            for memory in memories(node):
                self._sharing.setdefault(memory, []).append(node)
        (outputs,) = self._result.graph.find_nodes(op="output")
        outputs.args = ((*self._result.written.values(), *outputs.args[0]),)
        self._result.graph.eliminate_dead_code()
        return self._result

    def _written(self, node: fx.Node) -> Any:
        source = node.args[0] if node.args else None
        several = self._values.get(source) if isinstance(source, fx.Node) else None
        if isinstance(several, list):  # a getitem of them
            return several[node.args[1]]  # type: ignore[index]
        leaves = pytree.tree_leaves(node.meta.get("val"))
        if node.op != "call_function" or not all(isinstance(v, Tensor) for v in leaves):
            return self._result.graph.node_copy(node, self._values.__getitem__)
        found = self._inlined(node)
        return found[0] if isinstance(node.meta["val"], Tensor) else found

    def _inlined(self, node: fx.Node) -> list[Any]:
        leaves, spec = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
        operands = [v for v in leaves if isinstance(v, fx.Node)]
        inputs = [self._values[v] for v in operands]
        constants = [None if isinstance(v, fx.Node) else v for v in leaves]
        key = (node.target, repr(constants), repr(spec), tuple(map(kind_of, inputs)))

        def call(values: list[Any]) -> Any:
            rest = iter(values)
            filled = [next(rest) if isinstance(v, fx.Node) else v for v in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        def run(values: list[Any], tracer: Tracer) -> list[Any]:
            with decompose(self._table):
                return functionally(call, values)

        if key not in self._templates:
            template = trace(run, [n.meta["val"] for n in inputs], self._fake_mode)
            if any(is_write(n) or is_higher(n) for n in template.graph.nodes):
                raise _Apart
            self._templates[key] = template

        def mark(made: fx.Node, role: str) -> None:
            for name in ("stack_trace", "nn_module_stack", "torch_fn", "custom"):
                if name in node.meta:
                    made.meta[name] = node.meta[name]

        found = inline(self._result.graph, self._templates[key], inputs, mark)
        count = len(found) - len(operands)
        for operand, new in zip(operands, found[count:], strict=True):
            if new is not None:
                self._write(operand, new)
        return found[:count]

    def _write(self, operand: fx.Node, new: fx.Node) -> None:
        """Let all that is the same tensor as `operand` have its new value."""
        before = self._values[operand]
        (memory,) = memories(operand)
        for same in self._sharing[memory]:
            if self._values[same] is not before:
                raise _Apart
            self._values[same] = new
            if same.op == "placeholder":
                self._result.written[same] = new


def memories(node: fx.Node) -> set[int]:
    """What tells the memory of a node's tensors from that of others."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {v.untyped_storage()._cdata for v in leaves if isinstance(v, Tensor)}
