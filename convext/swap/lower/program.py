"""What runs together becomes the program of one call of the compiled library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...backends.native_sequence import Block, CachedTensors
from ...memory_format import suggests_channels_last
from ...problem import DTYPES, ConvProblem, Layout
from ..units.channels import POINTWISE
from ..units.functions import EMPTY

if TYPE_CHECKING:
    from ..capture.captured import Lender
    from ..units import Op, Unit

Residuals = Sequence[int | None]


class Program:
    """The blocks of a sequence whose input is x, while it is put together. Values are numbered: 0 is x, i the output of
    block i - 1."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.blocks: list[Block] = []
        self.ops: list[Op] = []
        self.flat = False  # whether the result is (N, C), not an image

    def add_block(self, ops: Sequence[Op], source: int, residuals: Residuals) -> int | None:
        """Adds a block and returns the number of its value; None where a step has no kernel yet."""
        before, steps = self.problem(source), []
        for op, residual in zip(ops, residuals):
            step = op.step(before, residual)
            if step is None:
                return None
            steps.append(step)
            before = step.problem
        self.ops += ops
        self.blocks.append(Block(source, tuple(steps)))
        return len(self.blocks)

    def add_unit(self, unit: Unit, values: list[int]) -> int | None:
        """Adds the steps of a unit, as one block where they can run in strips. values: the numbers of its inputs."""
        value: int | None = values[0]
        residuals: Residuals = [None] * (len(unit.ops) - 1) + [values[1] if len(values) > 1 else None]
        self.flat = self.flat or not unit.is_image
        if unit.in_strips:
            return self.add_block(unit.ops, values[0], residuals)
        for op, residual in zip(unit.ops, residuals):
            value = value if value is None else self.add_block([op], value, [residual])
        return value

    def problem(self, value: int) -> ConvProblem | None:
        """A problem whose output is like a value, or None."""
        if value > 0:
            return self.blocks[value - 1].steps[-1].problem
        x = self.x
        if x.dim() != 4:
            return None
        layout = Layout(suggests_channels_last(x))
        n, c, h, w = x.shape
        return ConvProblem(n, c, h, w, c, *POINTWISE, DTYPES[x.dtype], layout, layout, x.device.type)


def prepared(
    program: Program, signature: tuple[Any, ...], lender: Lender | None
) -> Callable[[torch.Tensor], torch.Tensor | None] | None:
    """call(x) -> y for calls of a signature, or None where the kernels cannot run it; it returns None where something
    is not as it was. `lender`: as in Captured."""
    ops, x = program.ops, program.x
    choices = [op.choice for op in ops if op.choice is not None]
    backend = choices[0].backend if choices else None
    if (
        backend is None
        or any(choice.backend is not backend for choice in choices)
        or not x.is_contiguous()
        and not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return None
    sequence = backend.prepared_sequence(program.blocks)
    if sequence is None:
        return None
    present = [step.present for block in program.blocks for step in block.steps]
    expected = [(op, op.facts(op.tensors()), there) for op, there in zip(ops, present)]
    counters = {id(choice.counter): choice.counter for choice in choices}  # one for each kernel
    times = Counter(id(choice.counter) for choice in choices)
    counts = [(counter, times[key]) for key, counter in counters.items()]
    run, flat, guards = sequence.run, program.flat, None
    handed: CachedTensors | None = None
    lent, time = [op.places[0] for op in ops], None

    def look_up() -> CachedTensors | None:
        """The tensors and eps of every op, handed over, or None where something is not as it was."""
        tensors = []
        for op, facts, there in expected:
            given = op.tensors()
            if facts is None or tuple(t is not None for t in given) != there or op.facts(given) != facts:
                return None
            tensors.append(given)
        return sequence.keep(tensors, [op.eps for op in ops], flat)

    def as_before() -> CachedTensors | None:
        """What was handed over, where the dictionaries hold what they held."""
        nonlocal guards, handed
        if guards is None or not guards.holds():
            handed = look_up()
            guards = None if handed is None else _guards(sequence.guards(), ops)
        return handed

    def borrowed(time_now: object) -> CachedTensors | None:
        """The same where they are lent the tensors of each call: of those that lie where they lay nothing is new."""
        nonlocal handed, time
        if handed is None or time is not time_now or not handed.borrow([values.get(name) for values, name in lent]):
            handed, time = look_up(), time_now
        return handed

    def again(x: torch.Tensor) -> torch.Tensor | None:
        if (x.shape, x.stride(), x.dtype, x.device) != signature:
            return None
        given = as_before() if lender is None else borrowed(lender.time)
        if given is None:
            return None
        for counter, calls in counts:
            counter[0] += calls
        try:
            return run(x, given)
        except RuntimeError:  # a weight of another shape through `.data`, which no dictionary shows
            return None
        finally:
            if lender is not None:
                given.give_back()

    return again


def _guards(guards: Any, ops: list[Op]) -> Any:
    """Notes which tensors the ops have. Everything else that `look_up` looks at is among the facts of the plan that
    holds the sequence."""
    for op in ops:
        for values, name in op.places:
            if name in values:
                guards.item(values, name, values[name])
            elif values is not EMPTY:
                guards.absent(values, name)
    return guards
