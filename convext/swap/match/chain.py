"""Elementwise operations behind a layer whose result nobody else holds:

    y = layer(x)   y = f(y)   y = g(y)   ...

each the only reader of the one before, with numbers or tensors that are found by name as their other operands, or with
a value from before, as in y * sigmoid(y). They run
in the memory of y, so a layer that returns what others may hold has none. What is fused with a convolution already is
no part of it (match/conv_bn_act.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .. import calls
from ..units import Unit
from ..units.chain import MOST, Chain, ChainStep
from ..units.conv import Conv
from .elementwise import step_of, step_with

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph

_RETURN_NEW = (
    *(_ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


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
    longest: Unit | None = None
    last = source
    while (added := _next(graph, last)) is not None:
        if len(steps) + len(added.steps) > MOST:
            break
        nodes, steps, last = nodes + added.nodes, steps + added.steps, added.nodes[-1]
        parameters = [value for node in nodes for value in node.all_input_nodes if value.op == "get_attr"]
        if graph.crosses_a_write(nodes, [source], parameters) or parameters and not graph.are_neighbours(nodes):
            break  # what stands between might write what an operation before it reads, as a batch norm its statistics
        longest = Unit(source, [Chain(steps, graph.module(source))], nodes, parameters=parameters)
    return longest


class _Links(NamedTuple):
    """Nodes that follow a value, one or more, and the steps that they are."""

    nodes: list[fx.Node]
    steps: list[ChainStep]


def _next(graph: Graph, value: fx.Node) -> _Links | None:
    """What takes a value alone: one operation, or several between which it is kept, as z * sigmoid(z)."""
    if len(value.users) == 2:
        return next((found for reader in value.users if (found := _rejoined(graph, value, reader))), None)
    node = graph.follower(value)
    steps = None if node is None else step_of(graph, node, value)
    return None if node is None or steps is None else _Links([node], steps)


def _rejoined(graph: Graph, value: fx.Node, reader: fx.Node) -> _Links | None:
    """The operations from one of two readers of a value on, up to the other one, which reads their result as well."""
    (other,) = [user for user in value.users if user is not reader]
    nodes: list[fx.Node] = []
    steps = [ChainStep("keep")]
    node: fx.Node | None = reader
    last = value
    while node is not None and node is not other:
        added = step_of(graph, node, last)
        if added is None or not graph.may_join(node) or calls.writes_first_argument(node, graph.modules):
            return None
        nodes, steps, last = [*nodes, node], steps + added, node
        node = graph.follower(node)
    joins = None if node is None or not nodes or not graph.may_join(node) else step_with(graph, node, last, value)
    return None if joins is None else _Links([*nodes, other], steps + joins)
