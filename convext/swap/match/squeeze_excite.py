"""Squeeze and excitation (Hu, Shen and Sun, 2018) between two convolutions of a block, in the forward that calls them:

    y = conv(x)   y = y * gate(conv(activation(conv(mean of y over its pixels))))   z = pointwise conv(y)

with 1x1 convolutions. What stands in a container with a plan of its own is found there (match/containers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx

from .. import calls
from ..units import Unit
from ..units.containers import GATES, Excitation, SqueezeExcite
from . import conv_bn_act

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph


class Found(NamedTuple):
    """A squeeze and excitation: what it computes with, of which value, and its nodes, from the mean to the product."""

    excitation: SqueezeExcite
    source: fx.Node
    nodes: list[fx.Node]
    parameters: list[fx.Node]


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if not mode.direct:
        return
    for node in graph.nodes:
        found = beginning_with(graph, node)
        if found is not None and _stands_in_a_block(graph, found):
            yield Unit(found.source, [Excitation(found.excitation)], found.nodes, parameters=found.parameters)


def _stands_in_a_block(graph: Graph, found: Found) -> bool:
    """True between convolutions: by themselves its two are better left to be units of their own."""
    reader = graph.follower(found.nodes[-1])
    convolution = None if reader is None else graph.convolution(reader)
    computed = found.source.op not in ("placeholder", "get_attr") and set(found.source.users) <= set(found.nodes)
    return computed and convolution is not None and convolution.is_pointwise


def beginning_with(graph: Graph, mean: Any) -> Found | None:
    """The squeeze and excitation that begins with a node, or None."""
    if not graph.may_join(mean) or calls.mean_over_pixels(mean, graph.modules) is not False:
        return None
    source = mean.args[0]
    squeeze = _convolution(graph, mean)
    excite = None if squeeze is None else _convolution(graph, squeeze.last)
    node: Any = None if excite is None else graph.follower(excite.last)
    product = None if node is None else graph.follower(node)
    if squeeze is None or excite is None or product is None or excite.words or not calls.is_product(product):
        return None
    first, second = squeeze.first, excite.first
    gate = _gate(node, graph.modules)
    if gate is None or node.args[0] is not excite.last or first.batch_norm is not None or squeeze.residual is not None:
        return None
    if product.args not in ((source, node), (node, source)):
        return None
    convolutions = first.convolution, second.convolution
    if any(not conv.is_pointwise or conv.geom.stride != (1, 1) for conv in convolutions):
        return None
    nodes = [mean, *squeeze.nodes, *excite.nodes, node, product]
    excitation = SqueezeExcite(*convolutions, first.activation, gate)
    return Found(excitation, source, nodes, squeeze.parameters + excite.parameters)


def _convolution(graph: Graph, source: fx.Node) -> Any:
    """The unit of the convolution that alone reads a node, or None."""
    node = graph.follower(source)
    convolution = None if node is None else graph.convolution(node)
    if node is None or convolution is None or node.args[0] is not source:
        return None
    return conv_bn_act.unit_of(graph, node, convolution)


def _gate(node: fx.Node, modules: calls.Modules) -> str | None:
    kind = type(modules[node.target]) if node.op == "call_module" else node.target
    if [*node.args[1:], *node.kwargs.values()] not in ([], [False]) or set(node.kwargs) - {"inplace"}:
        return None
    return next((name for name, kinds in GATES.items() if kind in kinds), None)
