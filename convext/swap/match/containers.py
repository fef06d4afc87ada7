"""Calls of containers with plans of their own, which may be sequences themselves, and among them squeeze and excitation
(Hu, Shen and Sun, 2018), whatever the container is called:

    return x * gate(conv(activation(conv(mean of x over its pixels))))

with 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import calls
from ..capture.signature import ONE_TENSOR
from ..units import Format, Unit
from ..units.containers import GATES, Container, SqueezeExcite
from . import conv_bn_act
from .graph import Graph

if TYPE_CHECKING:
    from torch import fx

    from ..modes import Mode


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if not mode.direct:
        return
    for node in graph.nodes:
        forward = graph.container(node)
        if forward is not None and len(node.args) == 1:
            found = _squeeze_excite(forward.plan(forward.owner, ONE_TENSOR), mode)
            op = Container(graph.modules[node.target], found)
            yield Unit(node.args[0], [op], [node], format=Format.AS_NODES)


def _squeeze_excite(plan: Any, mode: Mode) -> SqueezeExcite | None:
    """SqueezeExcite of a container's plan for calls with one tensor, or None."""
    if plan is None or plan.signature is not ONE_TENSOR or plan.trace.opaque:
        return None
    graph = Graph(plan.trace)
    for unit in conv_bn_act.match(graph, mode):
        graph.take(unit)
    x, product = graph.nodes[0], graph.result
    units: list[Any] = graph.units
    if len(units) != 2 or x.op != "placeholder" or graph.nodes[-1].all_input_nodes != [product]:
        return None
    squeeze, excite = units
    if (
        squeeze.source.args[:1] != (x,)
        or calls.mean_over_pixels(squeeze.source, graph.modules) is not False
        or excite.source is not squeeze.last
        or excite.words
        or not calls.is_product(product)
        or squeeze.first.batch_norm is not None
        or squeeze.residual is not None
    ):
        return None
    gates = [a for a in product.args if a is not x]
    if len(product.args) != 2 or len(gates) != 1 or x not in product.args:
        return None
    gate = _gate(gates[0], graph.modules)
    known = {x, squeeze.source, *squeeze.all_nodes, *excite.all_nodes, gates[0], product, graph.nodes[-1]}
    if gate is None or gates[0].args[0] is not excite.last or set(graph.nodes) != known:
        return None
    convs = squeeze.first.convolution, excite.first.convolution
    if any(not conv.is_pointwise or conv.geom.stride != (1, 1) for conv in convs):
        return None
    return SqueezeExcite(*convs, squeeze.first.activation, gate)


def _gate(node: fx.Node, modules: calls.Modules) -> str | None:
    kind = type(modules[node.target]) if node.op == "call_module" else node.target
    if len(node.args) != 1 or node.kwargs:
        return None
    return next((name for name, kinds in GATES.items() if kind in kinds), None)
