"""A batch norm of rows, images or volumes that no convolution's call takes, and what is fused with it:

    y = batch_norm(x)   [y = y + residual]   [y = activation(y)]

Each is the only reader of the one before. Behind a 2-D convolution it is part of that one's call (conv_bn_act.py); here
stand those behind 1-D, 3-D and transposed convolutions, and behind anything else: a concatenation, a sum, a pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import calls
from ..units import Unit
from ..units.norm import Norm
from .conv_bn_act import followers

if TYPE_CHECKING:
    from torch import fx

    from ..modes import Mode
    from ..units.functions import BatchNorm, Place
    from .graph import Graph, Node


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if mode.direct and not mode.casts_nothing:
        return
    for node in graph.nodes:
        norm = graph.batch_norm(node, calls.BATCH_NORMS) if graph.is_untaken(node) else None
        if norm is not None:
            yield _unit(graph, node, norm)


def _unit(graph: Graph, node: Node, norm: BatchNorm) -> Unit:
    """The longest unit from a batch norm on that crosses no write, and no other use of its statistics."""
    nodes, source = [node], node.args[0]
    residual: fx.Node | None = None
    activation = "identity"
    distinct: list[tuple[Place, Place]] = []
    behind = None if source.op != "call_module" else graph.modules[source.target]

    def unit() -> Unit:
        read = dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value.op == "get_attr")
        tensors = [value for value in read if value not in (source, residual)]
        op = Norm(norm, activation, graph.dimensions(node), behind)
        return Unit(source, [op], nodes, residual, parameters=tensors, distinct=distinct)

    longest = unit()
    for nodes, stage, found in followers(graph, node, ("residual", "activation")):
        residual = found if stage == "residual" else residual
        inputs: list[Any] = [source] if residual is None else [source, residual]
        if graph.crosses_a_write(nodes, inputs, unit().parameters):
            break
        pairs = graph.statistics_between(norm, node, nodes)
        if pairs is None:
            break
        distinct = pairs
        activation = found if stage == "activation" else activation
        longest = unit()
    return longest
