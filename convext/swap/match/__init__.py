"""Patterns: what of a captured forward runs as one.

`PATTERNS` lists the modules of this folder that hold one each, in the order in which they take nodes: a node belongs to
one unit. A pattern is a function

    match(graph, mode) -> the units that it finds, one by one

of a `Graph` whose units are those of the patterns before it and its own so far. To add one, write it into a file of its
own here and enter it into the list.
"""
from . import channel_layers, containers, conv_bn_act, head, linear
from .graph import Graph

PATTERNS = [
    conv_bn_act,
    head,
    channel_layers,
    linear,
    containers,
]


def match(trace, mode) -> Graph:
    """The graph of a trace with the units that run in calls of a mode."""
    graph = Graph(trace)
    for pattern in PATTERNS:
        for unit in pattern.match(graph, mode):
            if not graph.crosses_a_write(unit.nodes, unit.inputs):
                graph.take(unit)
    return graph
