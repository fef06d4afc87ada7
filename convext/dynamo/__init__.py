"""torch.compile(model, backend="convext"): the fusions of a swap in the graphs of Dynamo, and Inductor for the rest.

    graph.py       one of Dynamo's graphs as the swap's patterns see it (swap/match/)
    rewrite.py     what they find becomes operators in that graph, in the memory formats that swap/schedule/ says
    planned.py     torch.ops.convext.planned, a part of a graph that runs by a plan of the swap's
    recorded.py    what stands in a graph with gradients
    registry.py    makes the name known to torch.compile

Weights are inputs of the graph and of the operators, and nothing is taken from them when it is compiled but dtypes and
extents, which Dynamo guards. What is not certain to mean the same is left as it was, for Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .. import autograd
from . import registry
from .rewrite import rewrite


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """A compiler of Dynamo's graphs, as `torch.compile` takes it: `backend="convext"`, or this function.

    Args:
        graph_module, example_inputs: what Dynamo gives. The graph may be changed.
        mode, options: those of `torch.compile`, for Inductor.

    Returns: what runs the graph.

    Raises what Inductor raises, RuntimeError for an unknown mode or option among it.
    """
    inductor: Any = torch._TorchCompileInductorWrapper
    return compiled(graph_module, example_inputs, inductor(mode, options, None))


def compiled(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], rest: Callable[..., Callable[..., Any]]
) -> Callable[..., Any]:
    """What runs a graph. `rest`: a compiler of Dynamo's graphs, that of what convext leaves."""
    rewritten = rewrite(graph_module, example_inputs)
    if rewritten.whole is not None:
        return rewritten.whole
    if not rewritten.in_seam:
        return rest(graph_module, example_inputs)
    with autograd.contiguous_weight_gradients():
        return rest(graph_module, example_inputs)


registry.register()
