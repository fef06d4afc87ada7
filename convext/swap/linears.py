"""Linear layers beside the convolutions, in training: with the activation after them one call, a 1x1 convolution.

    z = x @ w.T + bias   [y = activation(z)]

The last dimension of x is channels and all others are pixels, so that x as it lies is a channels-last image of one row.
The kernels of convolutions then compute the product and both its gradients, and the activation's gradient and the
bias's come out of one pass. Without gradients torch's own layers run, here as where nothing is recorded at all.
"""
from dataclasses import dataclass

import torch

from .. import autograd, backends, functional, ops
from . import calls
from .chains import Chain, aliases_of, shorten

_LEAST_ROWS = 64  # of x: with fewer, packing the weights costs as much as multiplying by them


@dataclass
class Linear(Chain):
    """A linear layer, whose key is `conv`, and the activation after it."""


def find(graph, modules, opaque, chains):
    """The linear layers of a graph that nothing forbids to run as calls of convext's; `chains`: its convolutions'."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    taken = {node for chain in chains for node in chain.nodes}
    aliases, found = aliases_of(graph, modules), []
    for node in order:
        if node.op != "call_module" or not calls.is_linear(modules[node.target]) or node.target in opaque \
                or len(node.args) != 1 or node.kwargs or node.all_input_nodes != list(node.args):
            continue
        linear = Linear(node.target, node.args[0], [node])
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        if follower is not None and follower not in taken and follower.op != "output" \
                and not (follower.op == "call_module" and follower.target in opaque) \
                and follower.args[:1] == (node,) and follower.all_input_nodes == [node]:
            name = calls.activation(follower, modules)
            if name and name != "identity":
                linear.activation = name
                linear.nodes.append(follower)
                linear.activation_module = follower.target if follower.op == "call_module" else None
        shorten(linear, order, aliases, modules)
        taken.update(linear.nodes)
        found.append(linear)
    return found


def bind(module, activation, apart):
    """function(x) that stands in a plan for a linear layer and its activation; `apart(x)` runs the modules."""
    parameters = module._parameters

    def fused(x):
        w, bias = parameters.get("weight"), parameters.get("bias")
        if w is None or not _takes(x, w, bias):
            return apart(x)
        rows = x.numel() // x.shape[-1]
        image = x.view(1, 1, rows, x.shape[-1]).permute(0, 3, 1, 2)
        y = functional.conv_act(image, w.view(*w.shape, 1, 1), bias, activation=activation)
        return y.permute(0, 2, 3, 1).view(*x.shape[:-1], w.shape[0])

    return fused


def _takes(x, w, bias):
    """True where a recorded call on x runs faster as a convolution, and means the same."""
    if not autograd.needs_function(x, w, bias) or not ops.all_plain(x, w, bias) or autograd.carries_tangents():
        return False
    return all(t is None or t.dtype is torch.float32 and t.device.type == "cpu" for t in (x, w, bias)) \
        and x.dim() > 1 and x.is_contiguous() and w.is_contiguous() and x.shape[-1] == w.shape[1] \
        and x.numel() >= _LEAST_ROWS * max(1, x.shape[-1]) and min(w.shape) > 1 \
        and (bias is None or bias.shape == w.shape[:1]) \
        and backends.forced() in (None, "native") and backends.unavailable("native", "cpu") is None
