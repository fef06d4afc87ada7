"""The seam between layers: which values of a plan may be channels-last although the caller's tensors are contiguous.

The kernels like channels-last; user code may look at strides, `view`, or write through views. So a value is *free*
when a contiguous input would have made it contiguous, and every reader does the same to either format. A free value
may be in either format; any other is made contiguous where it is computed, once, before anybody can alias it.
"""

import torch
from torch import fx

from .. import backends
from ..memory_format import suggests_channels_last
from . import calls

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def wanted(tensors):
    """True where the native backend would serve, and the caller's tensors are contiguous and not channels-last."""
    forced = backends.forced()
    if forced is not None and forced != "native" or torch._C._are_functorch_transforms_active():
        return False
    for t in tensors:
        if t.dtype not in _DTYPES or backends.unavailable("native", t.device.type) is not None \
                or not t.is_contiguous() or suggests_channels_last(t):
            return False
    return bool(tensors)


def contiguous_weights(convs):
    """True when no weight asks for a channels-last output."""
    for attributes in convs:
        weight = attributes["_parameters"].get("weight")
        if weight is None or not weight.is_contiguous() or weight.stride()[-1] != 1:
            return False
    return True


class Layout:
    """free: nodes that may be channels-last; pinned: nodes to make contiguous where they are computed.

    accepts       no argument of the container is pinned
    returns_free  its result is one tensor, and free"""

    def __init__(self, graph, modules, chains, aliases, opaque, takes_any):
        self.modules, self.opaque, self.takes_any = modules, opaque, takes_any
        self.last = {chain.last: chain for chain in chains}
        self.inside = {node for chain in chains for node in chain.nodes} - set(self.last)
        self.free, self.pinned, self.plain = set(), set(), set()
        output = None
        for node in graph.nodes:
            if node.op == "output":
                output = node
            elif node not in self.inside:
                self._visit(node)
        result = output.args[0]
        self.returns_free = isinstance(result, fx.Node) and result in self.free
        if not self.returns_free:
            self.pinned |= self.free.intersection(output.all_input_nodes)
        self._pin_aliases(aliases)
        self.returns_free = self.returns_free and result not in self.pinned
        del self.takes_any, self.modules   # the plan, which holds this
        self.accepts = not any(node.op == "placeholder" for node in self.pinned)

    def _visit(self, node):
        if node.op == "placeholder":
            self.free.add(node)
            return
        if node.op == "get_attr":
            self.plain.add(node)
            return
        chain = self.last.get(node)
        inputs = node.all_input_nodes if chain is None else chain.inputs
        if chain is None and self._is_metadata(node, inputs):
            self.plain.add(node)
            return
        known = all(i in self.free or i in self.plain for i in inputs)
        if known and any(i in self.free for i in inputs) and (chain is not None or self._reads_any_strides(node)):
            self.free.add(node)
        else:
            self.pinned |= self.free.intersection(inputs)

    def _is_metadata(self, node, inputs):
        """Sizes and numbers made of them."""
        if inputs and all(i in self.plain and i.op != "get_attr" for i in inputs):
            return node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "builtins")
        if not any(i in self.free for i in inputs):
            return False
        return node.op == "call_method" and node.target in calls.METADATA_METHODS or \
            node.op == "call_function" and node.target is getattr and node.args[1] in calls.METADATA_ATTRIBUTES

    def _reads_any_strides(self, node):
        if node.op == "call_module":
            if node.target in self.opaque:
                return False
            return calls.reads_any_strides(node, self.modules) or self.takes_any(node)
        return calls.reads_any_strides(node, self.modules)

    def _pin_aliases(self, aliases):
        grown = True
        while grown:
            more = {alias for node in self.free if not self.pinned.isdisjoint(aliases[node]) or node in self.pinned
                    for alias in aliases[node] if alias in self.free}
            grown = not more <= self.pinned
            self.pinned |= more
