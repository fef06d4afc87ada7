"""What a plan calls in the place of units: one by itself, or several cooperatively."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from ... import ops
from ...problem import DTYPES
from ..schedule.sequence import inputs_of
from ..switches import layer_by_layer
from ..units.functions import found
from .program import Program, prepared

if TYPE_CHECKING:
    import torch

    from ..capture.captured import Lender
    from ..match.graph import Graph
    from ..modes import Mode
    from ..units import Call, Op, Unit

    Member: TypeAlias = "UnitCall | CooperativeCall"


class UnitCall:
    """A unit by itself: function(x[, residual]). As a member of a cooperative call it adds its steps to the program."""

    def __init__(self, unit: Unit, graph: Graph, mode: Mode):
        self.unit, self.inputs, self.last = unit, unit.inputs, unit.last
        modules = fallback(unit, graph)
        self.function = unit.first.bind(modules, mode) if len(unit.ops) == 1 else modules
        self.runs_modules = self.function is modules

    def emit(self, program: Program, values: list[int]) -> int | None:
        return self.unit.first.emit(self.unit, program, values)


class CooperativeCall:
    """function(*inputs) of members in order: prepared as one call of the compiled library where they can be, else one
    by one. `autocast`: the dtype that the first input is cast to, or None. `lender`: as in Captured.

    Where the kernels refuse, it is tried without the first member: that is often the network's first layer, whose input
    is the caller's, in whatever layout."""

    def __init__(
        self, inputs: list[fx.Node], members: Sequence[Member], autocast: torch.dtype | None, lender: Lender | None
    ):
        self.inputs, self.members, self.autocast, self.lender = inputs, members, autocast, lender
        self.last: fx.Node = members[-1].last
        numbers = {node: number for number, node in enumerate(inputs)}
        # Of each member: function, numbers of its inputs and of those that none reads after it.
        self.steps: list[tuple[Call, list[int], list[int]]] = []
        for member in members:
            self.steps.append((member.function, [numbers[node] for node in member.inputs], []))
            numbers[member.last] = len(numbers)
        for number in numbers.values():
            for _, read, done in reversed(self.steps):
                if number in read:
                    done.append(number)
                    break
        self.prepared: Call | None = None
        self.refused: tuple[Any, ...] | None = None
        self.rest: CooperativeCall | None = None

    @property
    def function(self) -> Call:
        return self

    def __call__(self, x: Any, *others: Any) -> Any:
        if x is None:  # a container's result: the layers raise
            return self.fallback(x, *others)
        if self.autocast is not None and x.dtype is not self.autocast:
            x = ops.autocast_cast(x, "cpu", self.autocast)
        if layer_by_layer.on:
            return self.fallback(x, *others)
        if self.prepared is not None and not others:
            y = self.prepared(x)
            if y is not None:
                return y
            self.prepared = None
        y = self.fallback(x, *others)
        signature = x.shape, x.stride(), x.dtype, x.device
        if not others and signature != self.refused:
            self.prepared = self._prepare(x, signature)
            self.refused = None if self.prepared is not None else signature
        return y

    def _prepare(self, x: torch.Tensor, signature: tuple[Any, ...]) -> Call | None:
        program = Program(x)
        if x.dtype not in DTYPES or self.emit(program, [0]) is None:
            return None
        return prepared(program, signature, self.lender)

    def fallback(self, *given: Any) -> Any:
        if self.refused is not None and self.rest is not None and not layer_by_layer.on:
            return self.rest(self.steps[0][0](*given))
        values = list(given)
        for function, inputs, done in self.steps:
            values.append(function(*[values[i] for i in inputs]))
            for i in done:
                values[i] = None
        return values[-1]

    def emit(self, program: Program, values: list[int]) -> int | None:
        """Adds the steps; returns the number of the result, or None where a step has no kernel yet."""
        numbers = list(values)
        for member, (_, inputs, _) in zip(self.members, self.steps):
            number = member.emit(program, [numbers[i] for i in inputs])
            if number is None:
                return None
            numbers.append(number)
        return numbers[-1]


class BlockCall(CooperativeCall):
    """The units of one block, with squeeze and excitation as part of the convolution behind it."""

    def __init__(
        self, block: list[Unit], members: Sequence[Member], autocast: torch.dtype | None, lender: Lender | None
    ):
        super().__init__(inputs_of(block), members, autocast, lender)
        for before, unit in zip(block, block[1:]):
            first: Any = unit.first
            first.excite = before.first.excitation
        self.block = [
            (unit, inputs) for unit, (_, inputs, _) in zip(block, self.steps) if unit.first.excitation is None
        ]

    def emit(self, program: Program, values: list[int]) -> int | None:
        steps: list[Op] = []
        residuals: list[int | None] = []
        for unit, inputs in self.block:
            steps += unit.ops
            residuals += [None] * (len(unit.ops) - 1) + [None if unit.residual is None else values[inputs[1]]]
        return program.add_block(steps, values[0], residuals)


def block_call(block: list[Unit], graph: Graph, mode: Mode) -> Member:
    """The call of a block: the unit's, where there is one and it has a kernel of its own or cannot run in strips."""
    members = [UnitCall(unit, graph, mode) for unit in block]
    if len(block) == 1 and not (members[0].runs_modules and block[0].in_strips):
        return members[0]
    return BlockCall(block, members, mode.autocast, graph.lender)


class RowCall(CooperativeCall):
    """The blocks of one row."""

    def __init__(self, source: fx.Node, members: Sequence[Member], autocast: torch.dtype | None, lender: Lender | None):
        super().__init__([source], members, autocast, lender)
        first, *rest = members
        if len(rest) > 1 and all(source not in member.inputs for member in rest):
            self.rest = RowCall(first.last, rest, autocast, lender)


def fallback(unit: Unit, graph: Graph) -> Call:
    """function(x, residual) that runs the nodes of a unit one by one, each as the forward wrote it."""
    tensors: dict[Any, Any] = {node: graph.place(node) for node in unit.parameters if node.op == "get_attr"}

    def step(node: fx.Node) -> Callable[[dict[Any, Any]], Any]:
        target: Any = node.target
        function = target
        if node.op == "call_module":
            function = graph.modules[node.target]
        elif node.op == "call_method":

            def function(value: Any, *others: Any, **named: Any) -> Any:
                return operator.methodcaller(target, *others, **named)(value)

        def run(values: dict[Any, Any]) -> Any:
            def given(argument):  # type: ignore[no-untyped-def]  # made anew by each call
                if argument in values:
                    return values[argument]
                if argument in tensors:
                    return found(tensors[argument])
                return reshaped[argument](values)

            return function(*fx.map_arg(node.args, given), **fx.map_arg(node.kwargs, given))

        return run

    reshaped = {node: step(node) for node in unit.parameters if node not in tensors}
    steps = []
    for position, node in enumerate(unit.nodes):
        later = {value for reader in unit.nodes[position + 1 :] for value in reader.all_input_nodes}
        steps.append((node, step(node), [value for value in node.all_input_nodes if value not in later]))

    def run_all(x: Any, residual: Any = None) -> Any:
        values: dict[Any, Any] = {unit.source: x}
        x = None  # what no node reads any more is to be free
        for node, run, done in steps:
            x = run(values)
            values[node] = x
            for value in done:
                values.pop(value, None)
            if residual is not None:  # after the first node: where it is the source, that may have been cast
                values[unit.residual], residual = residual, None
        return x

    return run_all
