"""convext's backend of torch.compile without Inductor, whose compilations take seconds each: what is left of a graph
runs as AOTAutograd traced it."""

import torch
from torch._dynamo.backends.debugging import aot_eager

from convext import dynamo

PLANNED = torch.ops.convext.planned.default


class Backend:
    """backend=Backend(): `graphs` has the functions of each graph that it was given, as convext left them, and `texts`
    those of its planned operators."""

    def __init__(self):
        self.graphs, self.texts = [], []

    def __call__(self, module, inputs):
        run = dynamo.compiled(module, inputs, aot_eager)
        nodes = [node for node in module.graph.nodes if node.op.startswith("call_")]
        self.graphs.append([getattr(node.target, "__name__", str(node.target)) for node in nodes])
        self.texts += [node.args[2] for node in nodes if node.target is PLANNED]
        return run

    def count(self, name):
        """How often a function stands in all graphs."""
        return sum(graph.count(name) for graph in self.graphs)


def compiled(model, **settings):
    """(the compiled model, its Backend)"""
    torch._dynamo.reset()
    backend = Backend()
    return torch.compile(model, backend=backend, **settings), backend
