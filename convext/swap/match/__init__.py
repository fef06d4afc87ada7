"""Patterns: what of a captured forward runs as one.

`PATTERNS` names the files of this folder that hold one each, in the order in which they take nodes: a node belongs to
one unit. A pattern is a function

    match(graph, mode) -> the units that it finds, one by one

of a `Graph` whose units are those of the patterns before it and its own so far. What runs as one runs at the place of
its last node: `match` leaves out a unit between whose ends something else may write what it reads. To add a pattern,
write it into a file of its own here and enter it into the list.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .graph import Graph

if TYPE_CHECKING:
    from ..capture.captured import Captured
    from ..modes import Mode

PATTERNS = [
    import_module(f"{__name__}.{name}")
    for name in (
        "squeeze_excite",
        "conv_bn_act",
        "head",
        "channel_layers",
        "linear",
        "pooling",
        "containers",
        "norm_act",
        "chain",
    )
]


def match(trace: Captured, mode: Mode, strict: bool = False) -> Graph:
    """The graph of a captured forward with the units that run in calls of a mode. `strict`: batch norms whose
    statistics others may share run at their own places."""
    graph = Graph(trace, strict)
    for pattern in PATTERNS:
        for unit in pattern.match(graph, mode):
            if not graph.crosses_a_write(unit.nodes, unit.inputs, unit.parameters):
                graph.take(unit)
    return graph
