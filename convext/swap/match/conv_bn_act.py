"""A convolution and what is fused with it:

    y = conv(x)   [y = batch_norm(y)]   [y = y + residual]   [y = activation(y)]

Each is the only reader of the one before. It runs at the place of its last node, so nothing between its ends may write
what it reads: it ends before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .. import calls
from ..units import Unit
from ..units.conv import Conv

if TYPE_CHECKING:
    from torch import fx

    from ..modes import Mode
    from ..units.functions import Convolution, Place
    from .graph import Graph, Node


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    for node in graph.nodes:
        convolution = graph.convolution(node)
        if convolution is None:
            if node.op == "call_module" and calls.is_conv(graph.modules[node.target]):
                graph.reasons[graph.modules[node.target]] = _why_by_itself(graph, node)
        elif graph.is_untaken(node):
            unit = unit_of(graph, node, convolution)
            if not unit.words:
                graph.reasons[convolution.layer] = "nothing follows that can be fused"
            yield unit


def _why_by_itself(graph: Graph, node: fx.Node) -> str:
    """Why a layer's call is no Convolution."""
    if graph.uses[node.target] > 1:
        return "called more than once in one forward"
    if graph.is_opaque(node):
        return "has hooks or a forward of its own"
    if graph.module(node) is None:
        return "called with other arguments than one tensor"
    return "its padding is no number of zeros on both sides"


def unit_of(graph: Graph, node: Node, convolution: Convolution) -> Unit:
    """The longest unit from a convolution on that crosses no write, and no other use of its batch norm's statistics."""
    nodes, source = [node], node.args[0]
    residual: fx.Node | None = None
    parts: dict[str, Any] = {}
    norm_at: fx.Node | None = None
    distinct: list[tuple[Place, Place]] = []

    def tensors() -> list[fx.Node]:
        read = dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value.op == "get_attr")
        return [value for value in read if value not in (source, residual)]

    def unit() -> Unit:
        op = Conv(convolution, parts.get("batch_norm"), parts.get("activation", "identity"))
        return Unit(source, [op], nodes, residual, parameters=tensors(), distinct=distinct)

    longest = unit()
    for nodes, stage, found in followers(graph, node, ("batch_norm", "residual", "activation")):
        residual = found if stage == "residual" else residual
        if graph.crosses_a_write(nodes, [source] if residual is None else [source, residual], tensors()):
            break
        if norm_at is not None:
            pairs = graph.statistics_between(parts["batch_norm"], norm_at, nodes)
            if pairs is None:
                break
            distinct = pairs
        parts[stage] = found
        norm_at = nodes[-1] if stage == "batch_norm" else norm_at
        longest = unit()
    return longest


def followers(graph: Graph, node: fx.Node, wanted: Sequence[str]) -> Iterator[tuple[list[fx.Node], str, Any]]:
    """(nodes up to and with this one, what is fused, with what) of each node that can be fused behind a node, in the
    order of the `wanted` stages."""
    nodes, stages = [node], [*wanted]
    while stages and (follower := graph.follower(node)) is not None:
        first = bool(follower.args) and follower.args[0] is node and follower.all_input_nodes.count(node) == 1
        stage, found = _fused(graph, node, follower, first)
        if stage not in stages:
            return
        nodes, stages, node = [*nodes, follower], stages[stages.index(stage) + 1 :], follower
        yield nodes, stage, found


def _fused(graph: Graph, node: fx.Node, follower: fx.Node, first: bool) -> tuple[str | None, Any]:
    if first and (batch_norm := graph.batch_norm(follower)) is not None:
        return "batch_norm", batch_norm
    if (pair := calls.summands(follower)) and (first or not calls.writes_first_argument(follower, graph.modules)):
        other = pair[1] if pair[0] is node else pair[0]
        return (None, None) if other.op == "get_attr" else ("residual", other)  # a parameter is broadcast (chain.py)
    if first and (name := graph.activation(follower)):
        return "activation", name
    return None, None
