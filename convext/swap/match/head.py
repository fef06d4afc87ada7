"""The head of a classifier, as nearly every network for images ends:

    z = mean of x over its pixels   [z = layer_norm_2d(z)]   z = flatten(z)
    LayerNorm and linear layers, activations, dropout that does nothing in evaluation

The mean is a kernel of its own (csrc's mean.h), an image of one pixel the same memory flattened, and a linear layer a
1x1 convolution, whose kernel reads the weights once, by all threads. So the head is the last member of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from .. import calls
from ..units import Format, Unit
from ..units.channels import LayerNorm, Mean
from .channel_layers import ends_in_linear, layer_norm_2d, reads_alone, takes_layer

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph, Node


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if not mode.direct:
        return
    for node in graph.nodes:
        unit = _from(graph, node) if graph.is_untaken(node) and not graph.is_opaque(node) else None
        if unit is not None and (mode.casts_nothing or not any(isinstance(op, LayerNorm) for op in unit.ops)):
            yield unit


def _from(graph: Graph, node: Node) -> Unit | None:
    """The head that begins with a node, or None."""
    flat = calls.mean_over_pixels(node, graph.modules)
    if flat is None:
        return None
    unit = Unit(node.args[0], [Mean()], [node], format=Format.NO_IMAGE)
    while (node := graph.follower(unit.last)) is not None:
        if not reads_alone(graph, node, unit.last):
            break
        if not flat and _flattens(graph, node):
            flat = True
        elif not flat and (norm := layer_norm_2d(graph, node)) is not None:
            unit.ops += norm.ops
            unit.parameters += norm.parameters
            unit.nodes += norm.nodes[:-1]
            node = norm.last
        elif not (flat and takes_layer(graph, unit, node)):
            break
        unit.nodes.append(node)
    return unit if flat and ends_in_linear(unit.ops) else None


def _flattens(graph: Graph, node: fx.Node) -> bool:
    """True where a node makes (N, C) of (N, C, 1, 1)."""
    if node.op == "call_module":
        module = graph.module(node, nn.Flatten)
        return module is not None and (module.start_dim, module.end_dim) == (1, -1)
    if (node.op, node.target) in (("call_function", torch.flatten), ("call_method", "flatten")):
        return calls.argument(node, 1, "start_dim", 0) == 1 and calls.argument(node, 2, "end_dim", -1) == -1
    return False
