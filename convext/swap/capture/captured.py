"""What a captured forward is to those who compile it, whoever captured it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import fx

from .. import calls

Place = tuple[Any, Any]  # a dictionary or list, and the key of a tensor in it


class Lender:
    """Of tensors that are found in their places for the time of a call alone. time: another object since a call had
    tensors that did not lie, all of them, where those of the call before lay, with the same extents, strides and types.
    """

    time = object()


class Captured:
    """A forward as a graph.

    graph       call_module targets and the first part of a get_attr target are keys of `modules`
    modules     every module that the graph calls or that owns a tensor it reads; key "0", the owner, holds None
    places      (dictionary or list, key) of tensors that are neither parameters nor buffers of these: get_attr targets
                "at.i". The dictionary is None for the owner's own
    opaque      keys of the modules that must be called as they are
    planned     the nodes that call a container with a plan for that call
    contiguous  nodes whose values are known to be contiguous where the forward runs as it is written
    barriers    nodes that may do anything, over which nothing is moved
    lender      says whether tensors are others than before, where the places hold them for the time of a call alone
    """

    graph: fx.Graph
    modules: dict[Any, Any]
    places: list[Place]
    opaque: Set[str] = frozenset()
    planned: Set[fx.Node] = frozenset()
    contiguous: Set[fx.Node] = frozenset()
    barriers: Set[fx.Node] = frozenset()
    lender: Lender | None = None

    def tensors_of(self, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and the buffers of a module, two dictionaries."""
        module = self.modules[key]
        return (module._parameters, module._buffers) if module is not None else ({}, {})

    def drop_dropouts(self) -> None:
        """Takes out those that return their argument as it is."""
        for node in list(self.graph.nodes):
            is_opaque = node.op == "call_module" and node.target in self.opaque
            if not is_opaque and calls.passes_through(node, self.modules) and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
