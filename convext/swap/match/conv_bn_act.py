"""A convolution and what is fused with it:

    y = conv(x)   [y = batch_norm(y)]   [y = y + residual]   [y = activation(y)]

Each is the only reader of the one before. It runs at the place of its last node, so nothing between its ends may write
what it reads: it ends before that.
"""

from .. import calls
from ..units import Unit
from ..units.conv import Conv


def match(graph, mode):
    for node in graph.nodes:
        if node.op != "call_module" or not calls.is_conv(graph.modules[node.target]):
            continue
        conv = graph.modules[node.target]
        if graph.uses[node.target] > 1:
            graph.reasons[conv] = "called more than once in one forward"
        elif graph.is_opaque(node):
            graph.reasons[conv] = "has hooks or a forward of its own"
        elif graph.module(node) is None:
            graph.reasons[conv] = "called with other arguments than one tensor"
        elif graph.is_untaken(node):
            unit = _unit(graph, node, conv)
            if not unit.words:
                graph.reasons[conv] = "nothing follows that can be fused"
            yield unit


def _unit(graph, node, conv):
    """The longest unit from a convolution on that crosses no write."""
    nodes, source, residual = [node], node.args[0], None
    parts = {}
    unit = Unit(source, [Conv(conv)], nodes)
    for nodes, stage, found in _followers(graph, node):
        residual = found if stage == "residual" else residual
        if graph.crosses_a_write(nodes, [source] if residual is None else [source, residual]):
            break
        parts[stage] = found
        unit = Unit(source, [Conv(conv, parts.get("batch_norm"), parts.get("activation", "identity"))], nodes, residual)
    return unit


def _followers(graph, node):
    """(nodes up to and with this one, what is fused, with what) of each node that can be fused, in order."""
    nodes, passed = [node], []  # passed: nodes that return their argument, fused if something behind them is
    stages = ["batch_norm", "residual", "activation"]
    while stages and (follower := graph.follower(node)) is not None:
        first = bool(follower.args) and follower.args[0] is node and follower.all_input_nodes.count(node) == 1
        stage, found = None, None
        if not (first and graph.passes_through(follower)):
            stage, found = _fused(graph, node, follower, first)
            if stage not in stages:
                return
        passed.append(follower)
        if stage is not None:
            nodes, passed, stages = nodes + passed, [], stages[stages.index(stage) + 1 :]
            yield nodes, stage, found
        node = follower


def _fused(graph, node, follower, first):
    if (
        first
        and (module := graph.module(follower)) is not None
        and calls.is_batch_norm(module)
        and graph.uses[follower.target] == 1
    ):
        return "batch_norm", module
    if (pair := calls.summands(follower)) and (first or not calls.writes_first_argument(follower, graph.modules)):
        return "residual", pair[1] if pair[0] is node else pair[0]
    if first and (name := graph.activation(follower)):
        return "activation", name
    return None, None
