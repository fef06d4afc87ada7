"""Elementwise operations behind a layer whose result nobody else holds:

    y = layer(x)   y = f(y)   y = g(y)   ...

each the only reader of the one before, with numbers or tensors that are found by name as their other operands, or with
a value from before, as in y * sigmoid(y). They run in the memory of y, so a layer that returns what others may hold has
none. What is fused with a convolution or a batch norm already is no part of it (match/conv_bn_act.py, norm_act.py).

With gradients a single cheap operation is left to torch, which makes one pass over y, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ...chain import MOST
from .. import calls
from ..units import Unit
from ..units.chain import Chain, ChainStep
from ..units.conv import Conv
from ..units.norm import Norm
from .elementwise import step_of, step_with, tensor_of_number

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph

_RETURN_NEW = (
    *(_ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)
# Operations of which one alone, with its gradient, takes torch hardly longer than reading and writing memory does. The
# gates of squeeze and excitation, of one pixel, are among them.
_CHEAP = frozenset(
    "add sub rsub mul div minimum maximum leaky_relu clamp_min clamp_max hardtanh_min hardtanh_max relu sigmoid "
    "hardsigmoid".split()
)


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if mode.direct and not mode.casts_nothing:
        return
    computed = {unit.last for unit in graph.units if isinstance(unit.ops[-1], (Conv, Norm))}
    for node in graph.nodes:
        if node in computed or _returns_new(graph, node):
            source: fx.Node | None = node
            while source is not None and (unit := _behind(graph, source, mode.direct)) is not None:
                yield unit
                source = None if graph.is_untaken(unit.last) else unit.last


def _returns_new(graph: Graph, node: fx.Node) -> bool:
    """True of a layer of torch's whose result is a tensor of its own."""
    module = graph.module(node)
    return module is not None and isinstance(module, _RETURN_NEW) and type(module).__module__.startswith("torch.nn.")


def _behind(graph: Graph, source: fx.Node, direct: bool) -> Unit | None:
    """The longest unit of what follows a node. `direct`: without gradients."""
    nodes: list[fx.Node] = []
    steps: list[ChainStep] = []
    made: list[fx.Node] = []
    longest: Unit | None = None
    last = source
    while (added := _next(graph, last)) is not None:
        if len(steps) + len(added.steps) > MOST or not direct and not _keeps_no_more(graph, added):
            break
        nodes, steps, last = nodes + added.nodes, steps + added.steps, added.nodes[-1]
        made += added.made
        parameters = [value for node in nodes for value in node.all_input_nodes if value.op == "get_attr"]
        if graph.crosses_a_write(nodes, [source], parameters) or parameters and not graph.are_neighbours(nodes):
            break  # what stands between might write what an operation before it reads, as a batch norm its statistics
        if direct or len(nodes) > 1 or not _CHEAP.issuperset(step.operation for step in steps):
            writes, in_place = [calls.writes_first_argument(node, graph.modules) for node in (nodes[0], last)]
            op = Chain(steps, graph.module(source), writes, in_place, any(_is_anywhere(node) for node in made))
            longest = Unit(source, [op], nodes, parameters=[*parameters, *made])
    return longest


def _is_anywhere(node: fx.Node) -> bool:
    """True of a tensor that is made where new ones are made by default."""
    return node.target is torch.tensor and "device" not in node.kwargs


def _keeps_no_more(graph: Graph, added: _Links) -> bool:
    """True of what convext/chain.py computes gradients of from no more than torch keeps. Where ELU is written over what
    it gets, torch goes by the result alone, as it does with a leaky ReLU, whose slope must not be negative then."""
    if not calls.writes_first_argument(added.nodes[0], graph.modules):
        return True
    return not any(
        step.operation == "elu" or step.operation == "leaky_relu" and _is_negative(step.operand) for step in added.steps
    )


def _is_negative(operand: object) -> bool:
    return isinstance(operand, (int, float)) and operand < 0


class _Links(NamedTuple):
    """Nodes that follow a value, one or more, and the steps that they are. `made`: nodes of tensors that they take and
    that are made of numbers for that."""

    nodes: list[fx.Node]
    steps: list[ChainStep]
    made: tuple[fx.Node, ...] = ()


def _next(graph: Graph, value: fx.Node) -> _Links | None:
    """What takes a value alone: one operation, or several between which it is kept, as z * sigmoid(z)."""
    readers = [user for user in value.users if user.target is not getattr]
    if len(readers) == 2 and len(value.users) == 2:
        return next((found for reader in readers if (found := _rejoined(graph, value, reader))), None)
    node = readers[0] if len(readers) == 1 and graph.may_join(readers[0]) else None
    steps = None if node is None else step_of(graph, node, value)
    if node is None or steps is None:
        return None
    made = tuple(other for other in node.all_input_nodes if tensor_of_number(other, value))
    asked = tuple(asked for other in made for asked in other.all_input_nodes)  # the value, for its device and its type
    return _Links([node], steps, (*asked, *made)) if len(value.users) == 1 + len(asked) else None


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
