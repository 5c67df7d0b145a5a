"""Which dimensions of what enters some calls stay in place until what leaves them.

Such as the batch and the heads of attention: an entry of the output at one place of them depends
on entries of an operand at that place alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from hesscale_fx.analysis.axes import Axes, AxesError
from hesscale_fx.analysis.exactness import passage_of
from hesscale_fx.analysis.kinds import is_part, operands_of
from hesscale_fx.analysis.regions import assign, reduced_axes
from hesscale_fx.structures import table


def carried(
    nodes: list[fx.Node],
    active: set[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
) -> dict[tuple[int, int], dict[int, int]]:
    """For the i-th input and k-th output, at (i, k): dimension of the output -> of the input.

    `active`: the nodes on which the outputs depend differentiably, `inputs` among them.
    """
    axes = Axes()
    mixed: list[int] = []  # along which entries meet or move
    for node in inputs:
        axes.fresh(node)
    for node in nodes:
        if isinstance(node.meta["val"], Tensor):  # else its parts follow
            try:
                mixed += step(node, axes, active)
            except AxesError:
                mixed += [a for n in tensors_of(node) for a in axes.atoms(n)]
                axes.fresh(node)
    for node in axes.nodes():
        atoms = axes.atoms(node)
        mixed += [a for a in atoms if atoms.count(a) > 1]  # as in x + x.T
    lost = set(axes.resolve(mixed))

    def same(x: fx.Node, y: fx.Node) -> dict[int, int]:
        of, to = axes.dims(x), axes.dims(y)
        return {
            d: e
            for d, one in enumerate(to)
            for e, other in enumerate(of)
            if one == other and (one or d == e) and not lost & set(one)
        }

    return {(i, k): same(x, y) for i, x in enumerate(inputs) for k, y in enumerate(outputs)}


def step(node: fx.Node, axes: Axes, active: set[fx.Node]) -> list[int]:
    """Give a tensor its axes; return those along which it mixes entries of its operands."""
    if table.is_region(node.target) and not table.any_complex((node.args, node)):
        assign(node, axes)
        return reduced_axes(node, axes)
    call = node.args[0] if is_part(node) else node
    assert isinstance(call, fx.Node)
    operands = [n for n in tensors_of(call) if n in active]
    for operand in operands:
        if operand not in axes:
            axes.fresh(operand)
    by, mixed = [], []
    for operand in operands:
        passage = passage_of(call, node, operand)
        rank, own = node.meta["val"].dim(), operand.meta["val"].dim()  # without pairs
        kept = {
            d: e
            for d, e in passage.through.items()
            if d < rank and e < own and d not in passage.moved
        }
        by.append((operand, kept))
        dims = axes.dims(operand)
        mixed += [a for e in range(own) if e not in kept.values() for a in dims[e]]
    axes.carry(node, by)
    return mixed


def tensors_of(node: fx.Node) -> Iterable[fx.Node]:
    """The tensors that a call takes, each once."""
    call = node.args[0] if is_part(node) else node
    assert isinstance(call, fx.Node)
    return dict.fromkeys(n for n in operands_of(call) if isinstance(n.meta["val"], Tensor))
