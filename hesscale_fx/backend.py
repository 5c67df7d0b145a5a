"""``torch.compile(loss_fn, backend="hesscale")``: a loss whose backward fills ``.hesscale`` too.

Registered through the entry point ``torch_dynamo_backends``, so it needs no import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from hesscale_fx.accumulate import add_curvature
from hesscale_fx.api import transform
from hesscale_fx.errors import CallError, InvalidArgumentError, InvalidModelError
from hesscale_fx.layouts import channels_last

OPTIONS = ("method", "curvature_dtype")
COMPILER = "inductor"  # what compiles the emitted graph


def hesscale(
    graph: fx.GraphModule, inputs: list[Any], *, options: Mapping[str, Any] | None = None
) -> Callable:
    """A backend of `torch.compile` for functions that return a scalar loss.

    The loss is that of the Inductor backend. After ``loss.backward()`` every leaf tensor that
    requires grad has ``.grad`` and ``.hesscale``, both accumulated; clear both between steps, e.g.
    with ``zero_grad()`` of an optimizer of `hesscale_fx.optim`. Both are computed together with the
    loss, in one compiled graph, and scale with the gradient that arrives at it: what is done with
    the loss before ``backward()`` must be linear. Under `torch.no_grad` it is the Inductor backend.

    Args:
        graph: what Dynamo has traced; `torch.compile` gives it.
        inputs: the example inputs, likewise.
        options: ``method`` and ``curvature_dtype``, as for `hesscale_fx.transform`.

    Returns:
        What Dynamo calls in place of the function.

    Raises:
        HesScaleError: the function does not return one scalar loss in one graph, or the loss has
            no curvature; see `hesscale_fx.transform`.

    Example:
        >>> import torch, hesscale_fx
        >>> from torch import nn
        >>> net, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> step = torch.compile(lambda x, y: loss_fn(net(x), y), backend="hesscale")
        >>> step(torch.randn(5, 4), torch.randint(3, (5,))).backward()
        >>> net.weight.grad.shape, net.weight.hesscale.shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """
    unknown = set(options or {}) - set(OPTIONS)
    if unknown:
        raise InvalidArgumentError(
            f"The backend has no option {', '.join(map(repr, sorted(unknown)))}; it takes "
            f"{' and '.join(OPTIONS)}."
        )
    outputs = graph.graph.output_node().args[0]
    values = [n.meta["example_value"] for n in outputs if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    if not any(isinstance(v, Tensor) and v.requires_grad for v in values):
        return torch._dynamo.lookup_backend(COMPILER)(graph, inputs)
    check_outputs(values)
    return CompiledLoss(graph, inputs, dict(options or {}))


def check_outputs(values: list[Any]) -> None:
    """One scalar loss and nothing else."""
    if len(values) == 1 and values[0].dim() == 0:
        return
    shapes = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values]
    raise InvalidModelError(
        f"The backend 'hesscale' compiles functions that return one scalar loss; this graph "
        f"returns {shapes}. If the function does return a loss and nothing else, a graph break has "
        "split it: torch.compile(..., fullgraph=True) says where."
    )


class CompiledLoss:
    """Serves the calls of one graph of Dynamo's; its guards hold for them all."""

    def __init__(self, graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> None:
        self._graph = graph
        self._options = options
        self._constants = constant_inputs(graph)
        self._tensors = [
            i for i, v in enumerate(inputs) if i not in self._constants and isinstance(v, Tensor)
        ]
        self._steps: dict[tuple, Callable] = {}

    def __call__(self, *inputs: Any) -> tuple[Tensor]:
        """What the graph returns."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CallError(
                "The backend 'hesscale' does not see an autocast around the call: put it inside "
                "the compiled function."
            )
        key = tuple(number(inputs[i]) for i in self._constants)
        tensors = [inputs[i] for i in self._tensors]
        if key not in self._steps:
            self._steps[key] = self._build(dict(zip(self._constants, key, strict=True)), tensors)
        return (Loss.apply(self._steps[key], *tensors),)

    def _build(self, constants: dict[int, Any], tensors: list[Tensor]) -> Callable:
        """Transform and compile; with `constants` in place of these inputs."""
        graph = copy.deepcopy(self._graph)
        placeholders = graph.graph.find_nodes(op="placeholder")
        dynamic = sizes_from_tensors(graph.graph)
        for i, value in constants.items():
            bake(placeholders[i], value)
        enter_plainly(graph.graph)
        graph.recompile()
        names = [placeholders[i].name for i in self._tensors]
        module = Bound(graph, dict(zip(names, tensors, strict=True)))
        wanted = [n for n, p in module.named_parameters() if p.requires_grad]
        hs = transform(module, None, module.rest, wrt=wanted, dynamic=dynamic, **self._options)
        run = functional(hs, names, module.names_of_rest)
        return torch.compile(run, fullgraph=True, backend=COMPILER)


class Loss(torch.autograd.Function):
    """The loss with its gradients and diagonals, which its backward hands out."""

    @staticmethod
    def forward(ctx: Any, step: Callable, *tensors: Tensor) -> Tensor:
        """Compute all three; `step` gives the gradients and diagonals as lists."""
        ctx.leaves = [t for t, need in zip(tensors, ctx.needs_input_grad[1:], strict=True) if need]
        if not all(t.is_leaf for t in ctx.leaves):
            raise CallError(
                "An argument of the compiled loss was computed from other tensors that require "
                "grad, and they would get no .hesscale. Compile the whole function from the "
                "parameters to the loss, or pass x.detach()."
            )
        loss, ctx.grads, ctx.hess_diag = step(*tensors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Hand out the gradients, and put the diagonals where they belong."""
        for leaf, diag in zip(ctx.leaves, torch._foreach_mul(ctx.hess_diag, grad), strict=True):
            add_curvature(leaf, diag)
        scaled = iter(torch._foreach_mul(ctx.grads, grad))
        return tuple(next(scaled) if need else None for need in ctx.needs_input_grad)


class Bound(nn.Module):
    """Dynamo's graph as a module: what it reads of the user's modules is its own state again.

    `rest` are the other tensors, which it is called with.
    """

    def __init__(self, graph: fx.GraphModule, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph_module = [graph]  # in a list: no submodule
        self._order = [n.name for n in graph.graph.find_nodes(op="placeholder")]
        rest = {}
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif value.requires_grad:
                self.register_parameter(name, nn.Parameter(value.detach()))
            elif hasattr(value, "_dynamo_static_input_type"):
                self.register_buffer(name, value)
            else:
                rest[name] = value
        self.names_of_rest = list(rest)
        self.rest = tuple(rest.values())

    def forward(self, *rest: Tensor) -> Tensor:
        """The loss."""
        known = {
            **dict(zip(self.names_of_rest, rest, strict=True)),
            **self._parameters,
            **self._buffers,
        }
        (loss,) = self.graph_module[0](*(known.get(name) for name in self._order))
        return loss


def functional(hs: fx.GraphModule, names: list[str], rest: list[str]) -> fx.GraphModule:
    """The emitted graph as a function of all its tensors, in the order of `names`.

    `rest` are the names of those that it already takes as inputs.

    Dynamo may call it with other modules of the same kind.
    """
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in names}
    env: dict[fx.Node, Any] = {}
    bound = dict(zip(hs.graph.find_nodes(op="placeholder"), rest, strict=True))
    for node in hs.graph.nodes:
        if node.op == "placeholder":
            env[node] = inputs[bound[node]]
            env[node].meta.update(node.meta)
        elif node.op == "get_attr" and node.target in inputs:
            env[node] = inputs[node.target]
        elif node.op == "output":
            loss, grads, hess = fx.node.map_arg(node.args[0], env.__getitem__)
            graph.output(
                (loss, *([found[n] for n in names if n in found] for found in (grads, hess)))
            )
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    channels_last(graph)
    return fx.GraphModule(hs, graph)


def number(value: Any) -> Any:
    """A number that Dynamo may have wrapped in a tensor."""
    return value.item() if isinstance(value, Tensor) else value


def constant_inputs(graph: fx.GraphModule) -> list[int]:
    """The positions of numbers among the inputs: a graph is made for each of their values."""
    found = []
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        wrapped = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        is_number = wrapped or not isinstance(node.meta["example_value"], Tensor)
        if is_number and size_of(node) is None:
            found.append(i)
    return found


def size_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor input and its dimension that have the size of a symbolic input."""
    wanted = node.meta["example_value"]
    if not isinstance(wanted, torch.SymInt):
        return None
    for other in node.graph.find_nodes(op="placeholder"):
        value = other.meta["example_value"]
        for d, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if str(size) == str(wanted):
                return other, d
    return None


def sizes_from_tensors(graph: fx.Graph) -> bool:
    """Read symbolic sizes off the tensors instead of taking them as inputs; whether there are."""
    placeholders = graph.find_nodes(op="placeholder")
    sources = {node: found for node in placeholders if (found := size_of(node)) is not None}
    for node, source in sources.items():
        with graph.inserting_after(placeholders[-1]):
            node.replace_all_uses_with(graph.call_method("size", source))
    return bool(sources)


def enter_plainly(graph: fx.Graph) -> None:
    """Let an autocast of the function be one while it is traced, and no call in the trace."""
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            node.target = enter_autocast
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            node.target = exit_autocast


def enter_autocast(*args: Any) -> torch.autocast:
    """Enter and give the context."""
    context = torch.autocast(*args)
    context.__enter__()
    return context


def exit_autocast(context: torch.autocast) -> None:
    """Leave it."""
    context.__exit__(None, None, None)


def bake(node: fx.Node, value: Any) -> None:
    """Put a number in the place of an input."""
    for user in list(node.users):
        if user.op == "call_method" and user.target == "item":
            user.replace_all_uses_with(value)
            node.graph.erase_node(user)
    node.replace_all_uses_with(value)
