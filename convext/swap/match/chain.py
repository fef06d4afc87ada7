"""Elementwise operations behind a layer whose result nobody else holds:

    y = layer(x)   y = f(y)   y = g(y)   ...

each the only reader of the one before, with numbers or tensors that are found by name as their other operands. They run
in the memory of y, so a layer that returns what others may hold has none. What is fused with a convolution already is
no part of it (match/conv_bn_act.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..units import Unit
from ..units.chain import MOST, Chain, ChainStep
from ..units.conv import Conv
from .elementwise import step_of

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph

_RETURN_NEW = (_ConvNd, _BatchNorm, nn.GroupNorm, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if not mode.casts_nothing:
        return
    convolutions = {unit.last for unit in graph.units if isinstance(unit.ops[-1], Conv)}
    for node in graph.nodes:
        if node in convolutions or _returns_new(graph, node):
            source: fx.Node | None = node
            while source is not None and (unit := _behind(graph, source)) is not None:
                yield unit
                source = None if graph.is_untaken(unit.last) else unit.last


def _returns_new(graph: Graph, node: fx.Node) -> bool:
    """True of a layer of torch's whose result is a tensor of its own."""
    module = graph.module(node)
    return module is not None and isinstance(module, _RETURN_NEW) and type(module).__module__.startswith("torch.nn.")


def _behind(graph: Graph, source: fx.Node) -> Unit | None:
    """The longest unit of what follows a node."""
    nodes: list[fx.Node] = []
    steps: list[ChainStep] = []
    parameters: list[fx.Node] = []
    longest: Unit | None = None
    last = source
    while (node := graph.follower(last)) is not None and (added := step_of(graph, node, last)) is not None:
        if len(steps) + len(added) > MOST:
            break
        nodes, steps, last = [*nodes, node], steps + added, node
        parameters += [value for value in node.all_input_nodes if value.op == "get_attr"]
        if graph.crosses_a_write(nodes, [source], parameters):
            break
        longest = Unit(source, [Chain(steps)], nodes, parameters=list(parameters))
    return longest
