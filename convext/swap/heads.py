"""The head of a classifier, as nearly every network for images ends:

    z = mean of x over its pixels   [z = layer_norm_2d(z)]   z = flatten(z)
    LayerNorm and linear layers, activations, dropout that does nothing in evaluation

The mean is a kernel of its own (csrc's mean.h), an image of one pixel the same memory flattened, and a linear layer a
1x1 convolution, whose kernel reads the weights once, by all threads. So the head is the last member of a sequence.
"""
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from . import calls, chains, pixelwise


@dataclass
class Head:
    """Layers from the mean of `source` to the last linear layer, in order; `core`: its nodes in order; `constants` as
    those of pixelwise.Run."""
    source: fx.Node
    layers: list = field(default_factory=list)
    core: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    residual = None

    @property
    def nodes(self):
        return self.core

    @property
    def last(self):
        return self.core[-1]

    @property
    def inputs(self):
        return [self.source]

    def readers(self, parameters):
        return {}


def find(graph, modules, opaque, taken):
    """The heads in a graph. `taken`: nodes that belong to others already."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    aliases = chains.aliases_of(graph, modules)
    heads = [_head_from(node, modules, opaque, taken) for node in order if node not in taken]
    return [h for h in heads if h is not None and not chains.crosses_a_write(h, order, aliases, modules)]


def _head_from(node, modules, opaque, taken):
    """The head that begins with a node, or None."""
    if node.op == "call_module" and node.target in opaque:
        return None
    flat = calls.mean_over_pixels(node, modules)
    if flat is None:
        return None
    head = Head(node.args[0], [pixelwise.Layer(None, "mean")], [node])
    grown = pixelwise.Grower(head, modules, opaque, taken)
    if node.op == "call_module":
        grown.note(node, "output_size")
    while (node := grown.follower()) is not None:
        alone = node.args[:1] == (head.last,) and node.all_input_nodes == [head.last]
        if alone and not flat and _flattens(node, modules):
            flat = True
            if node.op == "call_module":
                grown.note(node, "start_dim")
                grown.note(node, "end_dim")
        elif alone and not flat and node.op == "call_module" and calls.is_layer_norm_2d(modules[node.target]):
            head.layers.append(pixelwise.Layer(node.target, "layer norm"))
        elif not (alone and (flat and grown.takes_layer(node) or calls.passes_through(node, modules))):
            break
        head.core.append(node)
    return head if flat and pixelwise.ends_in_linear(head.layers) else None


def _flattens(node, modules):
    """True where a node makes (N, C) of (N, C, 1, 1)."""
    if node.op == "call_module":
        module = modules[node.target]
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if (node.op, node.target) in (("call_function", torch.flatten), ("call_method", "flatten")):
        return calls.argument(node, 1, "start_dim", 0) == 1 and calls.argument(node, 2, "end_dim", -1) == -1
    return False
