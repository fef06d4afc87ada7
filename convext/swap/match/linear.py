"""Linear layers beside the convolutions, in training, and the activation after them: units/channels.py says how."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..units import Format, Unit
from ..units.channels import Linear

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if mode.direct:
        return
    for node in graph.nodes:
        linear = graph.linear(node)
        if linear is None or not graph.is_untaken(node):
            continue
        op, source, follower = Linear(linear), node.args[0], graph.follower(node)
        parameters = graph.parameters_read(node)
        unit = Unit(source, [op], [node], parameters=parameters, format=Format.AS_NODES)
        if (
            follower is not None
            and follower.args[:1] == (node,)
            and follower.all_input_nodes == [node]
            and not graph.crosses_a_write([node, follower], [source], parameters)
            and (name := graph.activation(follower))
            and name != "identity"
        ):
            op.activation = name
            unit.nodes.append(follower)
        yield unit
