"""Finds, in the graph of a container's forward, what one fused call can compute.

    y = conv(x)   [y = batch_norm(y)]   [y = y + residual]   [y = activation(y)]

A chain is a convolution and the nodes after it, in this order, each the only reader of the one before. It runs at the
place of its last node, so nothing between its ends may write what it reads.
"""
from dataclasses import dataclass, field

from torch import fx

from . import calls


@dataclass
class Chain:
    """conv, batch_norm and activation_module are keys of the trace's modules; the latter two may be None."""
    conv: str
    source: fx.Node
    nodes: list = field(default_factory=list)         # in order, the convolution first
    batch_norm: str | None = None
    residual: fx.Node | None = None
    activation: str = "identity"
    activation_module: str | None = None

    @property
    def last(self):
        return self.nodes[-1]

    @property
    def inputs(self):
        """What it reads: the source, and the residual if there is one."""
        return [self.source] if self.residual is None else [self.source, self.residual]

    @property
    def parts(self):
        """What was fused with the convolution, in words."""
        parts = ["bn"] if self.batch_norm is not None else []
        parts += ["add"] if self.residual is not None else []
        return parts + ([self.activation] if self.activation != "identity" else [])


def find(graph, modules, opaque=frozenset()):
    """(chains, {key of a convolution: why nothing is fused with it}).

    A chain may be a convolution alone. `opaque`: keys of the modules that must be called as they are."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    times = {}
    for node in order:
        if node.op == "call_module":
            times[node.target] = times.get(node.target, 0) + 1
        elif node.op == "get_attr":
            key = node.target.partition(".")[0]
            times[key] = times.get(key, 0) + 2   # its parameters are used outside its call
    aliases = aliases_of(graph, modules)
    chains, alone, taken = [], {}, set()
    for node in order:
        if node.op != "call_module" or not calls.is_conv(modules[node.target]):
            continue
        if times[node.target] > 1:
            alone[node.target] = "called more than once in one forward"
        elif node.target in opaque:
            alone[node.target] = "has hooks or a forward of its own"
        elif len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            alone[node.target] = "called with other arguments than one tensor"
        else:
            chain = _grow(node, modules, opaque, times, taken)
            shorten(chain, order, aliases, modules)
            taken.update(chain.nodes)
            chains.append(chain)
            if not chain.parts:
                alone[node.target] = "nothing follows that can be fused"
    return chains, alone


def _grow(node, modules, opaque, times, taken):
    chain = Chain(node.target, node.args[0], [node])
    stage, pending = 0, []       # 1 after the batch norm, 2 after the add, 3 after the activation
    while stage < 3 and len(node.users) == 1:
        follower = next(iter(node.users))
        if follower in taken or follower.op == "output":
            break
        if follower.op == "call_module" and follower.target in opaque:
            break
        first = bool(follower.args) and follower.args[0] is node and follower.all_input_nodes.count(node) == 1
        if first and calls.passes_through(follower, modules):
            pending.append(follower)
        elif first and stage < 1 and follower.op == "call_module" and calls.is_batch_norm(modules[follower.target]) \
                and len(follower.args) == 1 and not follower.kwargs and times[follower.target] == 1:
            chain.batch_norm, stage = follower.target, 1
            chain.nodes += [*pending, follower]
            pending = []
        elif stage < 2 and (pair := calls.summands(follower)) and \
                (first or not calls.writes_first_argument(follower, modules)):
            chain.residual, stage = pair[1] if pair[0] is node else pair[0], 2
            chain.nodes += [*pending, follower]
            pending = []
        elif first and (name := calls.activation(follower, modules)):
            chain.activation, stage = name, 3
            chain.activation_module = follower.target if follower.op == "call_module" else None
            chain.nodes += [*pending, follower]
            pending = []
        else:
            break
        node = follower
    return chain


def shorten(chain, order, aliases, modules):
    """Drops nodes off the end until nothing in between writes what the fused call reads at its end."""
    while len(chain.nodes) > 1 and crosses_a_write(chain, order, aliases, modules):
        dropped = chain.nodes.pop()
        if dropped.op == "call_module" and dropped.target == chain.batch_norm:
            chain.batch_norm = None
        elif chain.residual is not None and calls.summands(dropped):
            chain.residual = None
        elif chain.activation != "identity":
            chain.activation, chain.activation_module = "identity", None


def crosses_a_write(chain, order, aliases, modules):
    """True where a node between the ends of a chain, or of another unit that runs at its end, writes what it reads."""
    reads = set(aliases[chain.source])
    if chain.residual is not None:
        reads |= aliases[chain.residual]
    members = set(chain.nodes)
    start, end = order[chain.nodes[0]], order[chain.last]
    for node, position in order.items():
        if start < position < end and node not in members:
            if any(aliases[target] & reads or any(alias.op == "get_attr" for alias in aliases[target])
                   for target in calls.written(node, modules)):
                return True  # a tensor that a module holds may share its memory with a parameter
    return False


def aliases_of(graph, modules):
    """For each node, the nodes whose memory its value may share."""
    aliases = {}
    for node in graph.nodes:
        aliases[node] = {node}
        if node.op != "placeholder":
            for source in calls.shared_arguments(node, modules):
                aliases[node] |= aliases[source]
    return aliases
