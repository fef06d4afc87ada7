"""The one intermediate form: units are what patterns find in a graph, and what schedule and calls are made of."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...backends.native_sequence import Step
from ...problem import ConvProblem
from ..capture.signature import TENSOR_TYPES
from .functions import Place, found

if TYPE_CHECKING:
    from ...backends import Choice
    from ..modes import Mode

Call = Callable[..., Any]  # function(x, residual=None)
Tensors = Sequence[torch.Tensor | None]
AnyLayout = Any  # Layout of schedule/layout.py, which stands above
AnyProgram = Any  # Program of lower/program.py, as well


class Op:
    """One step of a unit: it owns what it computes with, and knows how to prepare it. Units and their ops are made anew
    for each mode that a forward is compiled for.

    places      of its tensors, in the order in which the compiled library takes them
    module      the convolution whose row in the report tells of it, or None
    in_strips   it may be computed a strip of rows at a time, together with its neighbours
    has_call    it is worth a call by itself; else, alone, it is left to its module
    excitation  of a call that is squeeze and excitation, what the convolution behind it may do for it, else None
    by_itself   it is no member of a row
    behind      the layer whose result it takes, where that runs as it is and the report is to say so, or None
    takes_excitation  as such a convolution can: the other steps scale no input
    takes, gives  with gradients, what its call takes and returns of what is not kept (autograd.Recomputable): "image",
                "rows" of a linear layer, or None
    keeps       False where all who read its result take what is not kept, once that is known
    recompute   True where it is not to keep its convolution's output either, once that is known
    choice      the backend's choice of a kernel, where there is a choice, once it is prepared
    """

    places: tuple[Place, ...] = ()
    module: nn.Module | None = None
    excitation: Any = None
    choice: Choice | None = None
    behind: nn.Module | None = None
    in_strips, has_call, takes_excitation, by_itself = True, True, False, False
    takes: str | None = None
    gives: str | None = None
    keeps = True
    recompute = False
    activation, eps = "identity", 0.0

    def words(self, adds: bool) -> list[str]:
        """For the report: what of it is fused with the layer before. `adds`: it adds a residual."""
        return ["add"] if adds else []

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        """Called once the memory formats are known; `last` is the unit's. Returns whether the op may stand there."""
        return True

    def output(self) -> tuple[int, float] | None:
        """The channels of a convolution's output that it may compute again instead of keeping it, and its pixels as a
        share of the input's; None where there is none or that takes too much."""
        return None

    def joins(self) -> bool:
        """Whether it may be a member of a row now."""
        return True

    def bind(self, fallback: Call, mode: Mode) -> Call:
        """function(x, residual=None) of a unit of this op alone. `fallback(x, residual)` runs its nodes one by one."""
        return fallback

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(map(found, self.places))

    def facts(self, tensors: Tensors) -> list[Any] | None:
        """What a prepared call relies on; None where the tensors are none of torch's own."""
        if any(t is not None and type(t) not in TENSOR_TYPES for t in tensors):
            return None
        return [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]

    def step(self, before: ConvProblem | None, residual: int | None) -> Step | None:
        """The step that reads the output of the problem `before`; None where it cannot be one."""
        return None

    def emit(self, unit: Unit, program: AnyProgram, values: list[int]) -> int | None:
        """Adds the steps of a unit of this op to a program; returns the number of its value, or None."""
        number: int | None = program.add_unit(unit, values)
        return number


class Format(enum.Enum):
    """The memory format of a unit's result, whose inputs may be channels-last."""

    AS_INPUTS = "theirs"
    CHANNELS_LAST = "channels-last, whatever theirs is"
    NO_IMAGE = "the result is no image"
    AS_NODES = "what the calls of its nodes, one by one, would make of theirs"


@dataclass(eq=False)
class Unit:
    """What runs as one.

    source         the value that its first op reads
    ops            in order, each the only reader of the one before
    nodes          those of the graph that it stands for, in order
    residual       what its last op adds, or None
    comes_second   the sum is `residual + y`, and so in the memory format of the residual
    parameters     nodes besides, which read tensors that are found by name
    format         of its result
    distinct       places of tensors, in pairs, that must not share memory where it runs
    runs           False where it is known for its format alone, and its modules run
    """

    source: fx.Node
    ops: list[Op]
    nodes: list[fx.Node]
    residual: fx.Node | None = None
    comes_second: bool = False
    parameters: list[fx.Node] = field(default_factory=list)
    format: Format = Format.AS_INPUTS
    runs: bool = True
    distinct: list[tuple[Place, Place]] = field(default_factory=list)

    @property
    def first(self) -> Op:
        return self.ops[0]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def all_nodes(self) -> list[fx.Node]:
        """Those that nobody outside reads, but for the last one."""
        members = {*self.nodes, *self.parameters}
        return self.nodes + [node for node in self.parameters if members.issuperset(node.users)]

    @property
    def inputs(self) -> list[fx.Node]:
        return [self.source] if self.residual is None else [self.source, self.residual]

    @property
    def is_image(self) -> bool:
        return self.format is not Format.NO_IMAGE

    @property
    def in_strips(self) -> bool:
        return self.is_image and all(op.in_strips for op in self.ops)

    @property
    def has_call(self) -> bool:
        return self.is_image and any(op.has_call for op in self.ops)

    @property
    def words(self) -> list[str]:
        """For the report: what it computes besides its convolution."""
        return [word for op in self.ops for word in op.words(self.residual is not None and op is self.ops[-1])]
