"""Turns the graph of a container into one Python function, with one call in the place of each unit or row.

The function reads as the forward would with everything looked up beforehand:

    def planned(owner, x0):
        v1 = fused_0(x0); x0 = None
        v2 = pool(v1); v1 = None
        return v2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

Function = Callable[..., Any]
Calls = dict[fx.Node, tuple[list[fx.Node], Function]]

_PLAIN = (int, str, bool, type(None))


def generate(
    graph: fx.Graph,
    calls: Calls,
    inside: set[fx.Node],
    leaf: Callable[[fx.Node], Function],
    attribute: Callable[[fx.Node], Function],
    must_be_contiguous: set[fx.Node],
    contiguous: Function,
) -> Any:
    """The compiled function of (owner, *tensors).

    calls: {node: (inputs, function)} of what stands for several nodes, at the last one's place; inside: all of those
    nodes; leaf(node) -> callable of a call_module node; attribute(node) -> callable of (owner) for a get_attr node;
    contiguous(tensor) -> the same, contiguous, for the nodes of `must_be_contiguous`."""
    writer = _Writer()
    reads = _last_reads(graph, calls, inside)
    for node in graph.nodes:
        if node.op == "output":
            writer.lines.append(f"return {writer.text(node.args[0])}")
            break
        value = None
        if node.op == "placeholder":
            writer.arguments.append(node.name)
        elif node in calls:
            inputs, function = calls[node]
            value = f"{writer.name(f'fused_{node.name}', function)}({', '.join(n.name for n in inputs)})"
        elif node not in inside:
            value = _value(writer, node, leaf, attribute)
        if node in must_be_contiguous:
            value = f"{writer.name('contiguous', contiguous)}({value or node.name})"
        if value is not None:
            writer.lines.append("; ".join([f"{node.name} = {value}", *(f"{name} = None" for name in reads[node])]))
    return writer.compile()


def _value(writer: _Writer, node: fx.Node, leaf: Function, attribute: Function) -> str:
    if node.op == "call_module":
        return writer.call(writer.name(f"module_{node.target}", leaf(node)), node.args, node.kwargs)
    if node.op == "get_attr":
        return f"{writer.name(node.name + '_of', attribute(node))}(owner)"
    if node.op == "call_method":
        return writer.call(f"{writer.text(node.args[0])}.{node.target}", node.args[1:], node.kwargs)
    if node.target is getattr:
        return f"{writer.text(node.args[0])}.{node.args[1]}"
    name = "f_" + getattr(node.target, "__name__", "call")
    return writer.call(writer.name(name, node.target), node.args, node.kwargs)


def _last_reads(graph: fx.Graph, calls: Calls, inside: set[fx.Node]) -> dict[fx.Node, list[str]]:
    """{node: names of the values that nobody reads after it}"""
    last: dict[fx.Node, fx.Node] = {}
    dead: dict[fx.Node, list[str]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        if node.op != "placeholder" and (node in calls or node not in inside):
            for value in calls[node][0] if node in calls else node.all_input_nodes:
                last[value] = node
    for value, node in last.items():
        dead[node].append(value.name)
    return dead


class _Writer:
    def __init__(self) -> None:
        self.arguments = ["owner"]
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}

    def name(self, wish: str, value: object) -> str:
        wish = "_g_" + "".join(c if c.isalnum() else "_" for c in wish)  # no local has such a name
        name = wish
        while name in self.names and self.names[name] is not value:
            name = f"{wish}_{len(self.names)}"
        self.names[name] = value
        return name

    def call(self, function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        given = [self.text(a) for a in args] + [f"{name}={self.text(a)}" for name, a in kwargs.items()]
        return f"{function}({', '.join(given)})"

    def text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if type(value) in _PLAIN or type(value) is float and math.isfinite(value):
            return repr(value)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return "(" + "".join(f"{self.text(v)}, " for v in value) + ")"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.text, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.text(k)}: {self.text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        return self.name("constant", value)

    def compile(self) -> Any:
        source = f"def planned({', '.join(self.arguments)}):\n" + "".join(f"    {line}\n" for line in self.lines)
        exec(compile(source, "<convext plan>", "exec"), self.names)
        function = self.names.pop("planned")
        function.source = source
        return function
