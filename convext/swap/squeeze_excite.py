"""Recognises squeeze and excitation (Hu, Shen and Sun, 2018) in the plan of a container:

    return x * gate(conv(activation(conv(mean of x over its pixels))))

with 1x1 convolutions, whatever the container is called.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import calls, chains
from .capture import signature as signatures

# Name of the gate -> what computes it; csrc/cpu/kernels/elementwise/squeeze_excite.h numbers them in this order.
_GATES = {"sigmoid": (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"),
          "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid)}
GATES = tuple(_GATES)


class SqueezeExcite(NamedTuple):
    """What one computes with."""

    squeeze: nn.Module
    excite: nn.Module
    activation: str
    gate: str


def match(plan):
    """SqueezeExcite of a container's plan for calls with one tensor, or None."""
    if plan is None or plan.signature is not signatures.ONE_TENSOR:
        return None
    graph, modules = plan.trace.graph, plan.trace.modules
    if plan.trace.opaque:
        return None
    found, _ = chains.find(graph, modules)
    nodes = list(graph.nodes)
    x, output = nodes[0], nodes[-1]
    if len(found) != 2 or x.op != "placeholder" or len(output.all_input_nodes) != 1:
        return None
    squeeze, excite = found
    product = output.args[0]
    if squeeze.source.args[:1] != (x,) or calls.mean_over_pixels(squeeze.source, modules) is not False \
            or excite.source is not squeeze.last \
            or excite.activation != "identity" or not calls.is_product(product) \
            or any(c.batch_norm is not None or c.residual is not None for c in found):
        return None
    gates = [a for a in product.args if a is not x]
    if len(product.args) != 2 or len(gates) != 1 or x not in product.args:
        return None
    gate = _gate(gates[0], modules)
    known = {x, squeeze.source, *squeeze.nodes, *excite.nodes, gates[0], product, output}
    if gate is None or gates[0].args[0] is not excite.last or set(nodes) != known:
        return None
    convs = modules[squeeze.conv], modules[excite.conv]
    if any(c.kernel_size != (1, 1) or c.stride != (1, 1) or c.groups != 1 or c.padding not in ((0, 0), 0)
           for c in convs):
        return None
    return SqueezeExcite(*convs, squeeze.activation, gate)


def _gate(node, modules):
    kind = type(modules[node.target]) if node.op == "call_module" else node.target
    if len(node.args) != 1 or node.kwargs:
        return None
    return next((name for name, kinds in _GATES.items() if kind in kinds), None)
