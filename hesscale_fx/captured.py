"""The captured graph: what its placeholders and outputs mean, and what it may not hold."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._guards import detect_fake_mode
from torch.export.graph_signature import (
    ExportGraphSignature,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from hesscale_fx import structures
from hesscale_fx.decisions import Decision
from hesscale_fx.decomposing import decomposed
from hesscale_fx.errors import (
    MESSAGE,
    CaptureError,
    InvalidModelError,
    UnsupportedOperatorError,
    source_line,
)
from hesscale_fx.failures import explain, refuse_sparse_error
from hesscale_fx.inlining import write_in
from hesscale_fx.modes import no_autocast, quiet
from hesscale_fx.registered import refuse_computed
from hesscale_fx.signature import TENSOR
from hesscale_fx.simplify import merge_equal
from hesscale_fx.step import Step
from hesscale_fx.structures import definitions

aten = torch.ops.aten


@dataclass
class Leaf:
    """One tensor placeholder of the captured graph."""

    node: fx.Node
    kind: str  # "parameter", "buffer", "constant" or "input"
    name: str  # the user's qualified name; for inputs the argument's name
    value: torch.Tensor | None = None  # of a lifted constant


@dataclass
class Captured:
    """A functional forward graph with what its placeholders and outputs mean."""

    graph: fx.Graph
    leaves: list[Leaf]
    loss: fx.Node
    mutations: dict[str, fx.Node]  # buffer name -> its new value
    boundary: list[fx.Node]  # nodes that were marked as the model's output
    in_spec: pytree.TreeSpec
    in_leaves: list[Any]  # one an argument leaf: the name of its placeholder or a constant
    guards: list[Any]  # what the sizes must satisfy for the model to take the captured path
    position: int  # of the loss among the graph's outputs
    way: str = ""
    fixed: list[Decision] = field(default_factory=list)  # values from data; asserted in the graph


def from_program(program: Any, step: Step, names: list[str]) -> Captured:
    """Decompose an exported program to the pinned level and read off its signature."""
    detach_no_grad(program.graph_module)
    try:
        with quiet(), no_autocast():
            graph, signature = decompose(program)
            write_repeated(graph)
    except Exception as error:
        refuse_sparse_error(error, step)
        raise CaptureError(explain(error, step)) from error
    refuse_control_flow(graph)
    refuse_sparse(graph)
    ask_for_dense_gradients(graph)
    inputs = read_inputs(program, signature, graph, step, names)
    leaves = unify_tied(inputs, step, graph)
    for leaf in leaves:
        leaf.node.meta["hesscale_name"] = leaf.name.removeprefix("model.").lstrip("_")
    refuse_writes(signature, leaves, graph)
    outputs = graph.find_nodes(op="output")[0]
    kinds = [spec.kind.name for spec in signature.output_specs]
    check_loss([o for o, k in zip(outputs.args[0], kinds, strict=True) if k == "USER_OUTPUT"], step)
    drop_checks(graph)
    name_checks(graph)
    see_through_selections(graph)
    merge_equal(graph)
    boundary = strip_boundary(graph)  # may replace the outputs, so they are read after it
    results = outputs.args[0]
    return Captured(
        graph=graph,
        leaves=leaves,
        loss=results[kinds.index("USER_OUTPUT")],
        mutations={
            spec.target: results[i]
            for i, spec in enumerate(signature.output_specs)
            if spec.kind.name == "BUFFER_MUTATION"
        },
        boundary=boundary,
        in_spec=step.spec,  # type: ignore[arg-type]
        in_leaves=list(step.static),
        guards=guards_of(leaves),
        position=kinds.index("USER_OUTPUT"),
    )


def refuse_control_flow(graph: fx.Graph) -> None:
    """torch.cond, scan, while_loop, map: their bodies are graphs of their own."""
    found = [n for n in graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    if found:
        names = ", ".join(dict.fromkeys(f"torch.ops.higher_order.{n.target}" for n in found))
        where = (line for line in map(source_line, found) if line and not line.startswith("<"))
        lines = "".join(f"\n  at {line}" for line in where)
        raise UnsupportedOperatorError(
            f"No rule is known for control flow that stays in the graph: {names}.{lines}\nUnroll "
            "the loop in Python, take torch.where of both branches, or move it out of the model."
        )


def refuse_sparse(graph: fx.Graph) -> None:
    """Tensors whose layout has no strides."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            raise UnsupportedOperatorError(
                f"{node.target} gives a tensor of layout {value.layout}; only dense tensors are "
                "supported. Use to_dense() before the model."
            )


# Position of the argument that asks for a sparse gradient.
SPARSE = {
    aten.embedding.default: 4, aten.embedding_bag.default: 5, aten.embedding_bag.padding_idx: 5,
    aten._embedding_bag.default: 5,
}  # fmt: skip


def ask_for_dense_gradients(graph: fx.Graph) -> None:
    """Gradients and diagonals are dense, also where an embedding asks for sparse ones."""
    for node in graph.nodes:
        position = SPARSE.get(node.target)
        if position is not None and len(node.args) > position:
            node.update_arg(position, False)
        if position is not None and "sparse" in node.kwargs:
            node.update_kwarg("sparse", False)


def detach_no_grad(module: fx.GraphModule) -> None:
    """Detach what the model computes under torch.no_grad(); decomposing forgets the mode."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and not node.args[0]:
            for part in list(node.users):
                with module.graph.inserting_after(part):
                    constant = module.graph.call_function(aten.detach.default, (part,))
                constant.meta.update(part.meta)
                part.replace_all_uses_with(constant, lambda user, new=constant: user is not new)
        elif node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                detach_no_grad(inner)


def read_inputs(
    program: Any, signature: Any, graph: fx.Graph, step: Step, names: list[str]
) -> list[Leaf]:
    """What each placeholder is."""
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    inputs = iter([n for n, v in zip(names, step.static, strict=True) if v is TENSOR])
    buffers = dict(step.named_buffers(remove_duplicate=False))
    leaves: list[Leaf] = []
    constants = 0
    for spec in signature.input_specs:
        node, kind = placeholders[spec.arg.name], spec.kind.name
        if kind == "USER_INPUT":
            leaves.append(Leaf(node, "input", next(inputs)))
        elif kind == "PARAMETER" or (kind == "BUFFER" and spec.target in buffers):
            leaves.append(Leaf(node, kind.lower(), spec.target))
        elif kind in ("CONSTANT_TENSOR", "BUFFER"):  # a buffer of the recorded module is none's
            value = program.constants.get(spec.target, program.state_dict.get(spec.target))
            refuse_computed(value, step)
            leaves.append(Leaf(node, "constant", f"_constant_{constants}", value))
            constants += 1
        else:
            raise CaptureError(f"The captured program has an input of kind {kind}: {spec.target}.")
    return leaves


def guards_of(leaves: list[Leaf]) -> list[Any]:
    """Conditions on symbolic sizes that the trace relied on, as sympy expressions."""
    fake_mode = detect_fake_mode([leaf.node.meta["val"] for leaf in leaves])
    env = getattr(fake_mode, "shape_env", None)
    if env is None:
        return []
    found = [env.simplify(guard.expr) for guard in env.guards]
    return list(dict.fromkeys(g for g in found if g.free_symbols))


def unify_tied(leaves: list[Leaf], step: Step, graph: fx.Graph) -> list[Leaf]:
    """Export lists a tied parameter under each of its names; keep the first."""
    tensors = dict(step.named_parameters(remove_duplicate=False))
    first: dict[int, Leaf] = {}
    kept = []
    for leaf in leaves:
        if leaf.kind == "parameter":
            known = first.setdefault(id(tensors[leaf.name]), leaf)
            if known is not leaf:
                leaf.node.replace_all_uses_with(known.node)
                graph.erase_node(leaf.node)
                continue
        kept.append(leaf)
    return kept


def refuse_writes(signature: Any, leaves: list[Leaf], graph: fx.Graph) -> None:
    """A model may write into its buffers, and into nothing else that was there before."""
    buffers = {leaf.name for leaf in leaves if leaf.kind == "buffer"}
    names = {leaf.node.name: leaf.name for leaf in leaves}
    results = graph.find_nodes(op="output")[0].args[0]
    for spec, result in zip(signature.output_specs, results, strict=True):
        line = source_line(result) if isinstance(result, fx.Node) else ""
        where = f" at {line}" if line else ""
        if spec.kind.name == "BUFFER_MUTATION" and spec.target not in buffers:
            raise InvalidModelError(
                "The model writes into a tensor that is neither a buffer of it nor made by it. "
                "Register it: module.register_buffer(name, tensor)."
            )
        if spec.kind.name == "USER_INPUT_MUTATION":
            raise InvalidModelError(
                f"The model writes into its input {names.get(spec.target, spec.target)!r}{where}. "
                "Let it work on a copy: x = x.clone()."
            )
        if spec.kind.name == "PARAMETER_MUTATION":
            name = spec.target.removeprefix("model.")
            raise InvalidModelError(
                f"The model writes into its parameter {name!r}{where}; "
                "then the loss is no function of the parameters. Make it a buffer."
            )


def check_loss(outputs: list[Any], step: Step) -> None:
    """The program must return one real floating-point scalar."""
    who = "The loss" if step.loss_fn is not None else "The model"
    way = "Pass the loss: transform(model, loss), e.g. transform(model, lambda out: out.loss)."
    if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
        what = f"{len(outputs)} values" if len(outputs) != 1 else "no tensor"
        raise InvalidModelError(f"{who} returns {what}, not one scalar loss. {way}")
    value = outputs[0].meta["val"]
    if not isinstance(value, torch.Tensor):
        raise InvalidModelError(f"{who} returns a {type(value).__name__}, no tensor. {way}")
    if value.dim() > 0:
        if step.loss_fn is not None:
            way = "Reduce it, e.g. with .mean() or reduction='mean'."
        raise InvalidModelError(
            f"{who} returns a tensor of shape {list(value.shape)}, not a scalar. {way}"
        )
    if not value.is_floating_point():
        way = "Take its real part or abs()." if value.is_complex() else "Convert it to float."
        raise InvalidModelError(
            f"{who} returns {value.dtype}; it must be a real floating-point scalar. {way}"
        )


CHECKS = {
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def drop_checks(graph: fx.Graph) -> None:
    """Export's checks of shapes and dtypes: the module checks its arguments itself."""
    for node in reversed(graph.nodes):
        if node.target in CHECKS:
            graph.erase_node(node)


def name_checks(graph: fx.Graph) -> None:
    """Let torch's assertions of numbers that come from data say what they are."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        condition, text = node.args
        reason = str(text).removeprefix("Runtime assertion failed for expression ")
        read = condition
        while isinstance(read, fx.Node) and not isinstance(read.target, torch._ops.OpOverload):
            read = next(iter(read.all_input_nodes), None)
        where = source_line(read) if isinstance(read, fx.Node) else ""
        at = f" at {where}" if where else ""
        node.args = (condition, f"{MESSAGE}: {reason.split(' on node ')[0]}{at}")


def see_through_selections(graph: fx.Graph) -> None:
    """Views, to which a region does not end, instead of selections of all there is.

    ``x[:]`` is x; export writes one for every ``:`` next to a None or an index. ``x[:, 0]`` of a
    dimension of one entry drops it.
    """
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and takes_all(*node.args):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.select.int and size_of(*node.args[:2]) == 1:
            node.target, node.args = aten.squeeze.dim, node.args[:2]


def takes_all(x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether a slice is of all entries."""
    size = size_of(x, dim)
    ends = end in (None, sys.maxsize) or (isinstance(end, int) and size is not None and end >= size)
    return start in (None, 0) and ends and step == 1


def size_of(x: fx.Node, dim: int) -> int | None:
    """The number of entries along a dimension, where it is no symbol."""
    size = x.meta["val"].shape[dim]
    return size if isinstance(size, int) else None


def strip_boundary(graph: fx.Graph) -> list[fx.Node]:
    """Remove the identity operators that marked the model's output; return what they marked."""
    marked: dict[fx.Node, None] = {}
    for node in list(graph.nodes):
        if node.target == torch.ops.hesscale_fx.output.default:
            source = node.args[0]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            marked[source] = None
    return list(marked)


@functools.cache
def _core_table() -> dict[Any, Callable]:
    return dict(torch.export.default_decompositions().items())


def decompositions() -> dict[Any, Callable]:
    """PyTorch's decompositions, without those of operators that have a structure here."""
    table = {op: f for op, f in _core_table().items() if not structures.is_known(op)}
    table.update(structures.definitions_for_capture())
    for op in definitions.REPEATED:
        table.pop(op, None)
    return table


def decompose(program: Any) -> tuple[fx.Graph, Any]:
    """The functional graph at the pinned level, and a program's signature that it has."""
    table = decompositions()
    signature = program.graph_signature
    values = [n.meta.get("val") for n in program.graph.nodes]
    found = decomposed(program.graph, table, detect_fake_mode(pytree.tree_leaves(values)))
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    if found is None or any(kinds[n.name].kind.name != "BUFFER" for n in found.written):
        program = program.run_decompositions(table)
        return program.graph_module.graph, program.graph_signature
    mutations = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(new.name), kinds[old.name].target)
        for old, new in found.written.items()
    ]
    return found.graph, ExportGraphSignature(
        signature.input_specs, [*mutations, *signature.output_specs]
    )


def write_repeated(graph: fx.Graph) -> None:
    """Write out the operators of which one definition serves many equal layers."""
    written = structures.definitions_for_capture()
    repeated = {op: written[of] for op, of in definitions.REPEATED.items() if of in written}
    values = [n.meta["val"] for n in graph.nodes if n.target in repeated]
    if values:
        with no_autocast():
            write_in(graph, repeated, detect_fake_mode(pytree.tree_leaves(values)))
