"""What one state of a container's modules compiles to, and whether it still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import backends
from ..backends import native
from . import calls
from .capture.trace import Trace
from .lower import Compiled, lower
from .match import match
from .match.graph import Graph
from .refusal import Untraceable
from .schedule.layout import Layout, weights_to_ask
from .schedule.sequence import schedule
from .units.functions import found

if TYPE_CHECKING:
    from torch import nn

    from .capture.captured import Captured
    from .capture.facts import Facts
    from .capture.signature import Signature
    from .modes import Mode
    from .schedule.layout import Asked


class _Guarded:
    """What stands as long as the facts do that it rests on."""

    def __init__(self, facts: Facts):
        self.guards = facts.fill(native.new_guards())

    def holds(self, owner: nn.Module) -> bool:
        return self.guards.holds(owner)  # type: ignore[no-any-return]


class Refusal(_Guarded):
    """Why there is no plan."""

    def __init__(self, reason: Untraceable):
        super().__init__(reason.facts)
        self.reason = str(reason)


class Compilation:
    """A captured forward, compiled for each mode in which it is called. `recompute`: as `swap` was told."""

    def __init__(self, captured: Captured, recompute: bool = False):
        self.captured, self.recompute = captured, recompute
        self.by_mode: dict[tuple[Mode, bool], Compiled] = {}
        self._epoch = backends.epoch

    def compiled(self, mode: Mode) -> Compiled:
        if self._epoch is not backends.epoch:  # prepared calls hold the backends' choices
            self.by_mode.clear()
            self._epoch = backends.epoch
        compiled = self._compiled(mode)
        if compiled.distinct and any(shares(found(a), found(b)) for a, b in compiled.distinct):
            compiled = self._compiled(mode, strict=True)
        return compiled

    def _compiled(self, mode: Mode, strict: bool = False) -> Compiled:
        compiled = self.by_mode.get((mode, strict))
        if compiled is None:
            graph = match(self.captured, mode, strict)
            layout = Layout(graph, mode)
            rows = schedule(graph, layout, mode, self.recompute)
            compiled = self.by_mode[mode, strict] = lower(graph, rows, layout, mode)
        return compiled


class Plan(_Guarded, Compilation):
    """The compilation of a container's own forward, as long as it holds."""

    def __init__(self, owner: nn.Module, signature: Signature, recompute: bool):
        self.trace, self.signature = Trace(owner, signature), signature
        _Guarded.__init__(self, self.trace.facts)
        Compilation.__init__(self, self.trace, recompute)
        self.facts = self.trace.facts
        self.weights = weights_of(self.trace) + self.trace.nested_weights


def weights_of(captured: Captured) -> list[Asked]:
    """What `contiguous_weights` takes of the convolutions that a graph computes."""
    places = [(m._parameters, "weight") for m in captured.modules.values() if m is not None and calls.is_conv(m)]
    graph = Graph(captured)
    functions = [graph.convolution(node) for node in graph.nodes if node.op == "call_function"]
    return weights_to_ask(places + [function.weight for function in functions if function is not None])


def shares(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """True of tensors over one storage."""
    return a is not None and b is not None and (a is b or torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]
