"""Calls of containers with plans of their own, which may be sequences themselves, and among them such as do nothing but
squeeze and excitation (match/squeeze_excite.py), whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..capture.signature import ONE_TENSOR
from ..units import Format, Unit
from ..units.containers import Container, RecordedExcitation, SqueezeExcite
from . import squeeze_excite
from .graph import Graph

if TYPE_CHECKING:
    from ..modes import Mode


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    results = {unit.last for unit in graph.units if unit.runs and unit.first.gives == "image"}
    for node in graph.nodes:
        forward = graph.container(node)
        if forward is None or len(node.args) != 1:
            continue
        if mode.direct:
            found = _squeeze_excite(forward.plan(forward.owner, ONE_TENSOR), mode)
            op = Container(graph.modules[node.target], found)
        elif node.args[0] in results and (plan := forward.plan(forward.owner, ONE_TENSOR)) is not None:
            found = _squeeze_excite(plan, mode)
            if found is None:
                continue
            op = RecordedExcitation(graph.modules[node.target], found, plan)
        else:
            continue
        yield Unit(node.args[0], [op], [node], format=Format.AS_NODES)


def _squeeze_excite(plan: Any, mode: Mode) -> SqueezeExcite | None:
    """SqueezeExcite of a container's plan for calls with one tensor, or None."""
    if plan is None or plan.signature is not ONE_TENSOR or plan.trace.opaque:
        return None
    graph = Graph(plan.trace)
    x, result = graph.nodes[0], graph.result
    found = next((f for node in graph.nodes if (f := squeeze_excite.beginning_with(graph, node))), None)
    if found is None or x.op != "placeholder" or found.source is not x or found.nodes[-1] is not result:
        return None
    known = {x, *found.nodes, *found.parameters, graph.nodes[-1]}
    return found.excitation if set(graph.nodes) == known else None
