"""The second way of capture: run the step, below autograd, and record what it runs.

torch.export traces above autograd, where a loss that differentiates (a physics-informed network,
a gradient penalty, torch.func) cannot be followed, and it takes no step that needs a tensor's value
where only a shape is known. Here the step runs under make_fx, on fake tensors with a free batch if
that goes and on the example's own values if not; the result is a module without any control flow,
which torch.export takes.

Below autograd nothing tells a ``detach`` of the user from one that autograd makes for itself, so
what the model cuts off (detach, no_grad, a gradient without create_graph) is marked while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
    is_concrete_int,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hesscale_fx.calls import NoteCalls
from hesscale_fx.decisions import ARRAYS, NUMPY, Decision, Reads, fixing
from hesscale_fx.errors import Refusal

aten = torch.ops.aten
PACK = "_pack_padded_sequence"
PACKED = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@torch.library.custom_op("hesscale_fx::cut", mutates_args=())
def cut(x: Tensor) -> Tensor:
    """Marks a tensor through which the model lets no gradient pass."""
    return x.clone()


@cut.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hesscale_fx::as_array", mutates_args=())
def as_array(x: Tensor) -> Tensor:
    """Marks a tensor that the model has turned into a numpy array."""
    return x.clone()


@as_array.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class MarkCuts(TorchFunctionMode):
    """Mark what does not require grad though something it is made of does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; mark its results where autograd was cut off."""
        kwargs = kwargs or {}
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)  # torch.func's own levels say what depends on what
        inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        depends = any(v.requires_grad for v in inputs)
        if getattr(func, "__name__", "") in PACKED and isinstance(args[1], Tensor):
            args[1].tolist()  # the kernel reads the sizes of the packed batches by itself
        if getattr(func, "__name__", "") == PACK and type(args[1]) is Tensor:
            func = packed
        out = func(*args, **kwargs)
        if not depends or getattr(func, "__name__", "") in ARRAYS:
            return out
        return pytree.tree_map_only(Tensor, lambda t: marked(t, inputs), out)


def packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """What aten._pack_padded_sequence computes, whose shapes a trace does not get right.

    Args:
        x: (time, batch, ...), or with batch and time exchanged.
        lengths: of the sequences, in descending order; they are fixed to the example's.
        batch_first: whether they are exchanged.
    """
    known = lengths.tolist()
    steps = x.transpose(0, 1) if batch_first else x
    sizes = [sum(n > t for n in known) for t in range(known[0])]
    data = torch.cat([steps[t, :size] for t, size in enumerate(sizes)])
    return data, torch.tensor(sizes)


def marked(out: Tensor, inputs: list[Tensor]) -> Tensor:
    """`out`, marked if autograd was cut off between it and `inputs`."""
    if out.requires_grad or not out.is_floating_point():
        return out
    if any(out is v for v in inputs):
        raise Refusal(
            "The model detaches a tensor in place, which cannot be followed.\n"
            "Write x = x.detach() instead of x.detach_()."
        )
    return cut(out)


@dataclass
class Path:
    """What the step ran, as a module of the same tensor inputs, parameters and buffers."""

    module: nn.Module
    guards: list[Any] = field(default_factory=list)  # sympy conditions on the symbols below
    sizes: dict[Any, tuple[int, int]] = field(default_factory=dict)  # symbol -> (input, dimension)


def trace(
    step: nn.Module, tensors: list[Tensor], reads: Reads | None, fixed: list[Decision]
) -> Path:
    """Record what the step runs, on symbolic sizes if `reads` are given, else on values."""
    parameters = dict(step.named_parameters())
    buffers = dict(step.named_buffers())
    states = [
        *(p.detach().requires_grad_(p.requires_grad) for p in parameters.values()),
        *(b.detach().clone() for b in buffers.values()),
    ]
    names = [*parameters, *buffers]
    flat = [*states, *(t.detach().clone() for t in tensors)]
    arrays: list[Tensor] = []
    env = None
    sizes: dict[Any, tuple[int, int]] = {}
    if reads is not None:
        env = ShapeEnv(duck_shape=False)
        flat = fake(flat, len(states), env, sizes)
        steering: Any = reads.replaying(fixed, symbolic=False)
    else:
        steering = fixing(fixed, arrays)

    def run(*values: Tensor) -> Any:
        state = dict(zip(names, values[: len(names)], strict=True))
        with NoteCalls(), MarkCuts():
            inputs = [differentiable(v) for v in values[len(names) :]]
            out = torch.func.functional_call(step, state, tuple(inputs))
            for array in arrays:
                as_array(array)
            return out

    tracer = make_fx(run, record_stack_traces=True, _error_on_data_dependent_ops=False)
    with whole_kernels(), torch.random.fork_rng(), steering, module_paths(step):
        recorded = tracer(*flat)
    refuse_arrays(recorded.graph)
    clean(recorded)
    guards = [env.simplify(g.expr) for g in env.guards] if env is not None else []
    return Path(Replay(step, recorded, names), guards, sizes)


@contextmanager
def module_paths(step: nn.Module) -> Iterator[None]:
    """Have the recorded nodes say which modules they ran in, in the words of torch.export."""
    names = {id(module): name for name, module in step.named_modules()}
    running: list[dict[str, tuple[str, str]]] = [{}]

    def say() -> None:
        fx.traceback.current_meta["nn_module_stack"] = running[-1]

    def enter(module: nn.Module, args: Any) -> None:
        name, kind = names.get(id(module)), type(module)
        own = {}
        if name is not None:
            own = {name: (name, f"{kind.__module__}.{kind.__qualname__}")}
        running.append({**running[-1], **own})
        say()

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()
        say()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with fx.traceback.preserve_node_meta():
            yield
    finally:
        for handle in handles:
            handle.remove()


def differentiable(x: Tensor) -> Tensor:
    """An input that may be differentiated, but is no leaf, so that the model may write to it."""
    if not x.is_floating_point():
        return x
    return x.requires_grad_().view_as(x)


def fake(flat: list[Tensor], states: int, env: ShapeEnv, sizes: dict) -> list[Tensor]:
    """Fake copies, the leading size of every input free."""
    mode = FakeTensorMode(shape_env=env)
    made: list[Tensor] = []
    for i, tensor in enumerate(flat):
        free = i >= states
        dims = [
            DimDynamic.DYNAMIC if free and d == 0 else DimDynamic.STATIC
            for d in range(tensor.dim())
        ]
        copy = mode.from_tensor(
            tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims)
        )
        if free and tensor.dim() and not is_concrete_int(copy.shape[0]):
            sizes[copy.shape[0].node.expr] = (i - states, 0)  # type: ignore[attr-defined]
        made.append(copy)
    return made


@contextmanager
def whole_kernels() -> Iterator[None]:
    """Have the operators run that are made of known ones, not the fused kernels of a device."""
    before = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns about others' GPUs
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def refuse_arrays(graph: fx.Graph) -> None:
    """Numpy may see constants only."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.hesscale_fx.as_array.default):
        seen, pending = set(), [node]
        while pending:
            n = pending.pop()
            if n.op == "placeholder":
                raise Refusal(NUMPY)
            pending += [m for m in n.all_input_nodes if m not in seen]
            seen.update(n.all_input_nodes)


def clean(recorded: fx.GraphModule) -> None:
    """Leave ``detach`` where the model cuts off, and nowhere else."""
    graph = recorded.graph
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is torch.ops.hesscale_fx.cut.default:
            node.target = aten.detach.default
            if is_written(node):  # which a view of what was cut off must not be
                with graph.inserting_after(node):
                    own = graph.call_function(aten.clone.default, (node,))
                own.meta.update(node.meta)
                node.replace_all_uses_with(own, lambda user, new=own: user is not new)
    graph.eliminate_dead_code(is_impure_node=is_effect)
    recorded.recompile()


def is_written(node: fx.Node) -> bool:
    """Whether some call writes into a tensor, or into a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        for argument, value in zip(schema.arguments, user.args, strict=False):
            alias = argument.alias_info if value is node else None
            if alias is not None and (alias.is_write or is_written(user)):
                return True
    return False


def is_effect(node: fx.Node) -> bool:
    """Reads and markers whose results nothing uses may go; writes and assertions stay."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.target is aten._assert_async.msg or bool(schema and schema.is_mutable)


class Replay(nn.Module):
    """The recorded calls on the step's own parameters and buffers."""

    def __init__(self, step: nn.Module, recorded: fx.GraphModule, names: list[str]) -> None:
        super().__init__()
        for name, child in step.named_children():  # so that names stay what they are
            self.add_module(name, child)
        self.recorded = recorded
        self._names = names
        self.training = step.training

    def forward(self, *tensors: Tensor) -> Any:
        """Run the recorded calls."""
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        flat = [*(state[name] for name in self._names), *tensors]
        with fx.traceback.preserve_node_meta():
            return FixedSizes(self.recorded, garbage_collect_values=False).run(*flat)


class FixedSizes(fx.Interpreter):
    """Sizes that depend on data are those of the example, asserted at each call."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one call and fix the sizes of what it returns."""
        out = super().run_node(n)
        known = pytree.tree_leaves(n.meta.get("val"))
        leaves, spec = pytree.tree_flatten(out)
        if len(known) != len(leaves):
            return out
        return pytree.tree_unflatten(map(with_sizes, leaves, known), spec)


def with_sizes(value: Any, like: Any) -> Any:
    """`value` with the sizes of `like` where its own depend on data."""
    if not isinstance(value, Tensor) or not isinstance(like, Tensor):
        return value
    fixed = [
        bool(free_unbacked_symbols(size)) and not free_unbacked_symbols(was)
        for size, was in zip(value.shape, like.shape, strict=True)
    ]
    if not any(fixed):
        return value
    for size, was in zip(value.shape, like.shape, strict=True):
        torch._check(size == was)
    shape = [
        was if f else size for f, size, was in zip(fixed, value.shape, like.shape, strict=True)
    ]
    if value.is_floating_point():
        return value.reshape(shape)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return value.contiguous().as_strided(shape, strides)  # of whose size no trace asks again
