"""Find extremes that shift rows they are not of: ``x - x.max()`` before a softmax over each row.

Like a maximum of the row itself (cancel.py) they cancel. But a region has one row, so their
reduction and those of the softmax would be apart, and the cut between them lose what cancels. They
are taken for constants before regions are found, which they are: no value changes with them.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from hesscale_fx.analysis.cancel import ANALYTIC, PEAKS, cancels
from hesscale_fx.analysis.kinds import operands_of
from hesscale_fx.analysis.regions import region_of
from hesscale_fx.structures import table
from hesscale_fx.structures.region import Region

MOST = 32  # nodes that a shift may pass until it cancels


def find_shifts(graph: fx.Graph, active: set[fx.Node], loss: fx.Node) -> set[fx.Node]:
    """The extremes on whose value nothing depends, that are in no region with what they shift."""
    return {
        node
        for node in graph.nodes
        if node in active and node.target in PEAKS and is_shift(node, graph, active, loss)
    }


def is_shift(peak: fx.Node, graph: fx.Graph, active: set[fx.Node], loss: fx.Node) -> bool:
    region = shifted(peak, graph, active, loss)
    if region is None or region_of([peak, *region.nodes], active) is not None:
        return False
    return cancels(peak, region)


def shifted(peak: fx.Node, graph: fx.Graph, active: set[fx.Node], loss: fx.Node) -> Region | None:
    """What uses an extreme, as far as it is analytic and one region; None if not all uses are."""
    if peak is loss:
        return None
    members: dict[fx.Node, None] = {}
    found: Region | None = None
    for node in graph.nodes:
        used = node in active and any(a is peak or a in members for a in operands_of(node))
        if used and node.target in ANALYTIC | table.VIEWS | table.IDENTITIES:
            region = region_of([*members, node], active)
            if region is not None:
                members[node], found = None, region
        if len(members) == MOST:
            break
    if found is None or any(u in active and u not in members for u in peak.users):
        return None
    ends = [n for n in members if n is loss or any(u in active - members.keys() for u in n.users)]
    return dataclasses.replace(found, outputs=ends)
