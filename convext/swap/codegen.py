"""Turns the graph of a container into one Python function, with a fused call in the place of each chain.

The function reads as the forward would with everything looked up beforehand:

    def planned(owner, x0):
        v1 = fused_0(x0); x0 = None
        v2 = pool(v1); v1 = None
        return v2
"""
import math

from torch import fx

_PLAIN = (int, str, bool, type(None))


def generate(graph, units, layout, call_leaf, fused, attribute, contiguous):
    """The compiled function of (owner, *tensors).

    units: the chains, blocks and sequences, each called at its last node with its inputs; call_leaf(node) -> callable
    of a call_module node; fused(unit) -> callable of its inputs; attribute(node) -> callable of (owner) for a get_attr
    node; contiguous(tensor) -> the same, contiguous. `layout` is None outside the seam.
    """
    writer = _Writer()
    last = {unit.last: (position, unit) for position, unit in enumerate(units)}
    skipped = {node for unit in units for node in unit.nodes}
    reads = _last_reads(graph, {unit.last: unit for unit in units}, skipped)
    for node in graph.nodes:
        if node.op == "placeholder":
            writer.arguments.append(node.name)
        if node.op == "output":
            writer.lines.append(f"return {writer.text(node.args[0])}")
            break
        if node in last:
            position, unit = last[node]
            value = f"{writer.name(f'fused_{position}', fused(unit))}({', '.join(n.name for n in unit.inputs)})"
        elif node in skipped or node.op == "placeholder":
            value = None
        elif node.op == "call_module":
            value = writer.call(writer.name(f"module_{node.target}", call_leaf(node)), node.args, node.kwargs)
        elif node.op == "get_attr":
            value = f"{writer.name(node.name + '_of', attribute(node))}(owner)"
        elif node.op == "call_method":
            value = writer.call(f"{writer.text(node.args[0])}.{node.target}", node.args[1:], node.kwargs)
        elif node.target is getattr:
            value = f"{writer.text(node.args[0])}.{node.args[1]}"
        else:
            value = writer.call(writer.name("f_" + getattr(node.target, "__name__", "call"), node.target),
                                node.args, node.kwargs)
        pinned = layout is not None and node in layout.pinned
        if value is None and pinned:
            value = node.name
        if value is not None:
            done = reads.get(node, ())
            line = f"{node.name} = {writer.name('contiguous', contiguous) + f'({value})' if pinned else value}"
            writer.lines.append("; ".join([line, *(f"{name} = None" for name in done)]))
    return writer.compile()


def _last_reads(graph, units, skipped):
    """{node: names of the values that nobody reads after it}"""
    last = {}
    for node in graph.nodes:
        if node in units:
            inputs = units[node].inputs
        elif node in skipped or node.op == "placeholder":
            continue
        else:
            inputs = node.all_input_nodes
        for value in inputs:
            last[value] = node
    dead = {}
    for value, node in last.items():
        if node.op != "output":
            dead.setdefault(node, []).append(value.name)
    return dead


class _Writer:
    def __init__(self):
        self.arguments, self.lines, self.names = ["owner"], [], {}

    def name(self, wish, value):
        wish = "_g_" + "".join(c if c.isalnum() else "_" for c in wish)   # no local has such a name
        name = wish
        while name in self.names and self.names[name] is not value:
            name = f"{wish}_{len(self.names)}"
        self.names[name] = value
        return name

    def call(self, function, args, kwargs):
        given = [self.text(a) for a in args] + [f"{name}={self.text(a)}" for name, a in kwargs.items()]
        return f"{function}({', '.join(given)})"

    def text(self, value):
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

    def compile(self):
        source = f"def planned({', '.join(self.arguments)}):\n" + "".join(f"    {line}\n" for line in self.lines)
        exec(compile(source, "<convext plan>", "exec"), self.names)
        function = self.names.pop("planned")
        function.source = source
        return function
