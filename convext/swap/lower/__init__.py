"""Units become calls, and the graph one Python function of them.

A unit is called by itself, or cooperatively with its neighbours, in one call of the compiled library; where that cannot
be, its modules run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..schedule.layout import Layout, contiguous, contiguous_unrecorded
from .calls import RowCall, block_call
from .codegen import generate

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from ..match.graph import Graph
    from ..modes import Mode
    from ..schedule.sequence import Row
    from ..units import Unit
    from ..units.functions import Place
    from .calls import Member


class Compiled(NamedTuple):
    """A forward compiled for calls of one mode.

    function     of (owner, *tensors)
    units        those that run; reasons: {convolution: why nothing is fused with it}
    layout       schedule/layout.py
    contiguous   function(tensor) -> the same, contiguous
    distinct     places of tensors, in pairs, that must not share memory
    whole        what runs all of the forward as a member of a sequence, where one call does, else None
    """

    function: Callable[..., Any]
    units: list[Unit]
    reasons: dict[nn.Module | None, str]
    layout: Layout
    contiguous: Callable[[torch.Tensor], torch.Tensor]
    distinct: list[tuple[Place, Place]]
    whole: Any

    def result(self, owner: nn.Module, tensors: Sequence[torch.Tensor], in_seam: bool) -> Any:
        """The forward's, for the caller of the module."""
        result = self.function(owner, *tensors)
        return self.contiguous(result) if in_seam and self.layout.returns == "free" else result

    @property
    def works_in_any_format(self) -> bool:
        return self.layout.accepts and self.layout.returns is not None


def lower(graph: Graph, rows: list[Row], layout: Layout, mode: Mode) -> Compiled:
    """The call of a schedule's rows, and of what is in none of them."""
    made = [_row_call([block_call(block, graph, mode) for block in row], graph, mode) for row in rows]
    units = [unit for row in rows for block in row for unit in block]
    inside = {node for unit in units for node in unit.all_nodes}
    made_contiguous = contiguous_unrecorded if mode.direct else contiguous
    function = generate(
        graph.graph,
        {call.last: (call.inputs, call.function) for call in made},
        inside,
        lambda node: _leaf(graph, node, layout),
        graph.attribute,
        layout.must_be_contiguous,
        made_contiguous,
    )
    whole = made[0] if mode.direct and len(made) == 1 and _is_all(made[0], inside, graph) else None
    distinct = [pair for unit in units for pair in unit.distinct]
    return Compiled(function, units, graph.reasons, layout, made_contiguous, distinct, whole)


def _row_call(members: list[Member], graph: Graph, mode: Mode) -> Member:
    return members[0] if len(members) == 1 else RowCall(members[0].inputs[0], members, mode.autocast, graph.lender)


def _is_all(call: Member, inside: set[fx.Node], graph: Graph) -> bool:
    """True where a call is all that a forward of one tensor does."""
    first, *inner, _ = graph.nodes
    return first.op == "placeholder" and set(inner) == inside and call.inputs == [first] and graph.result is call.last


def _leaf(graph: Graph, node: fx.Node, layout: Layout) -> Any:
    """What stands for a call of a module in no unit."""
    if node in layout.any_format:
        return graph.container(node).in_any_format  # type: ignore[union-attr]  # it is a container
    return graph.modules[node.target]
