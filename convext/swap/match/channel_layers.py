"""Layers over the channels of each pixel, as ConvNeXt (Liu et al., 2022) has them behind its depthwise convolutions:

    y = permute(y, NHWC)   linear and LayerNorm layers, activations   y = permute(y, NCHW)
    [y = scale * y]   [y = y + residual]

Over a channels-last image a permutation is a view, and so the layers are steps of a sequence like any convolution's. A
LayerNorm2d, which permutes by itself, is a unit of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import calls
from ..units import Format, Op, Unit
from ..units.channels import LayerNorm, Linear, Shapes
from ..units.functions import LayerNormalization

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph, Node

_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    for node in graph.nodes:
        unit = _from(graph, node) if graph.is_untaken(node) else None
        if unit is not None:
            unit.format, unit.runs = Format.CHANNELS_LAST, mode.casts_nothing
            yield unit


def _from(graph: Graph, node: Node) -> Unit | None:
    """The unit that begins with a node, or None."""
    module = graph.module(node)
    if module is not None and calls.is_layer_norm_2d(module) and (norm := LayerNormalization.of_layer(module)):
        return Unit(node.args[0], [LayerNorm(norm)], [node])
    if _permutation(graph, node) != _TO_NHWC:
        return None
    unit = Unit(node.args[0], [], [node])
    if not _inside(graph, unit):
        return None
    _outside(graph, unit)
    return unit


def _inside(graph: Graph, unit: Unit) -> bool:
    """Follows a unit while its values are in the order NHWC; False where it does not come back."""
    while (node := graph.follower(unit.last)) is not None:
        first = reads_alone(graph, node, unit.last)
        if first and unit.ops and _permutation(graph, node) == _TO_NCHW:
            unit.nodes.append(node)
            return True
        if not (first and takes_layer(graph, unit, node) or _takes_scale(graph, unit, node, ((-1,),))):
            return False
        unit.nodes.append(node)
    return False


def _outside(graph: Graph, unit: Unit) -> None:
    """What follows in the order NCHW: a scale by channels, and a sum."""
    while ends_in_linear(unit.ops) and (node := graph.follower(unit.last)) is not None:
        first = bool(node.args) and node.args[0] is unit.last
        if (pair := calls.summands(node)) and (first or not calls.writes_first_argument(node, graph.modules)):
            unit.residual, unit.comes_second = pair[1] if first else pair[0], not first
            unit.nodes.append(node)
            return
        if not _takes_scale(graph, unit, node, ((-1, 1, 1), (1, -1, 1, 1))):
            return
        unit.nodes.append(node)


def layer_norm_2d(graph: Graph, node: Node) -> Unit | None:
    """The unit of a LayerNorm over the channels of an image that begins with a node: of a LayerNorm2d, or of what it
    does, a permutation, a LayerNorm and the permutation back."""
    unit = _from(graph, node)
    return unit if unit is not None and len(unit.ops) == 1 and isinstance(unit.first, LayerNorm) else None


def reads_alone(graph: Graph, node: fx.Node, value: fx.Node) -> bool:
    """True of a node that reads a value as its first argument, and nothing else that is not found by name."""
    return node.args[:1] == (value,) and graph.values_read(node) == [value]


def takes_layer(graph: Graph, unit: Unit, node: fx.Node) -> bool:
    """True of a LayerNorm or linear layer, and of an activation behind the latter, that reads the unit's last node
    alone; adds it to the ops."""
    linear, norm = graph.linear(node), graph.layer_norm(node)
    if linear is not None:
        unit.ops.append(Linear(linear))
    elif norm is not None:
        unit.ops.append(LayerNorm(norm))
    if linear is not None or norm is not None:
        unit.parameters += graph.parameters_read(node)
        return True
    if ends_in_linear(unit.ops) and (name := graph.activation(node)):
        unit.ops[-1].activation = name
        return True
    return False


def ends_in_linear(ops: list[Op]) -> bool:
    """True where the last op is a linear layer that nothing but a scale follows so far."""
    return bool(ops) and isinstance(ops[-1], Linear) and ops[-1].activation == "identity"


def _takes_scale(graph: Graph, unit: Unit, node: fx.Node, shapes: Shapes) -> bool:
    """True of a node that multiplies the unit's last by a tensor found by name, of one of the shapes, where -1 stands
    for the channels; notes it as the scale of the last op."""
    ops: list[Any] = unit.ops
    if (
        not ends_in_linear(ops)
        or ops[-1].scale
        or not calls.is_product(node)
        or len(node.args) != 2
        or unit.last not in node.args
    ):
        return False
    factor: Any = next((a for a in node.args if a is not unit.last), None)
    between: list[fx.Node] = []
    if (
        isinstance(factor, fx.Node)
        and factor.op == "call_method"
        and factor.target in ("reshape", "view")
        and len(factor.users) == 1
        and (1, -1, 1, 1) in shapes
        and factor.args[1:] in ((1, -1, 1, 1), ((1, -1, 1, 1),), ([1, -1, 1, 1],))
    ):
        between, factor, shapes = [factor], factor.args[0], ((-1,),)
    place = graph.place(factor)
    if place is None or len(factor.users) != 1:
        return False
    ops[-1].scale_by(place, shapes)
    unit.parameters += [factor, *between]
    return True


def _permutation(graph: Graph, node: fx.Node) -> tuple[Any, ...] | None:
    """The order in which a node permutes its first argument's dimensions, or None."""
    if node.op == "call_module":
        module = graph.module(node)
        return None if module is None else calls.permutation_of(module)
    if (
        node.kwargs
        or not node.args
        or not (
            node.op == "call_method"
            and node.target == "permute"
            or node.op == "call_function"
            and node.target is torch.permute
        )
    ):
        return None
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    return tuple(dims) if all(type(d) is int for d in dims) else None
