"""The program of a sequence: what several convolutions in one call are, for the compiled library."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..problem import ACTIVATIONS, ConvProblem, epilogue_kind


class StepKind(enum.Enum):
    """What a step computes: StepKind of csrc/cpu/runtime/sequence_program.h."""

    CONVOLUTION = "convolution"
    LAYER_NORM = "layer norm"
    MEAN = "mean"


class Step(NamedTuple):
    """One step of a sequence.

    problem, activation: what it computes. A LayerNorm over the channels of each pixel has the problem of a 1x1
        convolution, the mean over the pixels that of a depthwise one as large as the image.
    residual: the value that it adds (see `Block`), or None.
    present: which of its tensors are there: weight, bias, mean, var, gamma, beta (of a LayerNorm the last two alone)
        and, where it scales its input by squeeze and excitation first, weight and bias of each of that one's
        convolutions.
    excite: (numbers of the activation and of the gate) of that squeeze and excitation, or None.
    """

    problem: ConvProblem
    activation: str
    residual: int | None
    present: tuple[bool, ...]
    kind: StepKind = StepKind.CONVOLUTION
    excite: tuple[int, int] | None = None

    @property
    def epilogue_kind(self) -> str:
        """What follows a convolution (`Epilogue.kind`)."""
        return epilogue_kind(self.present[2], self.residual is not None, self.activation)


class Block(NamedTuple):
    """Steps, each read by the next alone. `source` is the value that the first one reads: 0 is the sequence's input,
    i the output of block i - 1."""

    source: int
    steps: tuple[Step, ...]


class Prepared(NamedTuple):
    """A sequence whose kernels are chosen.

    keep(tensors by step, eps by step, flat) -> CachedTensors, to be done anew where one of the tensors is another
        object. flat: y is (N, C), whose one pixel it is
    run(x, CachedTensors) -> y
    guards() -> Guards, empty ones (csrc/python/guards.h)
    """

    keep: Callable[[Sequence[Sequence[torch.Tensor | None]], list[float], bool], CachedTensors]
    run: Callable[[torch.Tensor, CachedTensors], torch.Tensor]
    guards: Callable[[], Any]


class CachedTensors:
    """The tensors of a sequence, and what the compiled library holds of them, which it lets go of with this object.

    tensors: all of them, those of a step after another. weights: each step's, or None. version(weight): its version
        counter.
    hand_over() -> Handed of the tensors as they are now, in these two lists.

    The library holds no tensor, only where it lies: torch refuses to exchange or to convert tensors that others hold
    (torch.utils.swap_tensors). So each call looks whether all of them lie where they did.
    """

    def __init__(
        self,
        tensors: list[torch.Tensor],
        weights: list[torch.Tensor | None],
        version: Callable[[torch.Tensor | None], int],
        hand_over: Callable[[], Handed],
    ):
        self.tensors, self.weights, self.version = tensors, weights, version
        self._hand_over = hand_over
        self._handed = hand_over()
        self._known, self._borrows = [*map(id, weights)], False

    def current(self) -> Handed:
        """What the library holds, handed over again where a tensor lies elsewhere now. To be kept while a call runs."""
        handed = self._handed
        if self._borrows:
            return handed
        if not (handed.places.still(self.tensors) and handed.packed_are_kept()):
            handed = self._handed = self._hand_over()
        return handed

    def borrow(self, weights: list[Any]) -> bool:
        """Takes the weights for one call, for which the caller knows that all tensors lie where they did; give_back()
        ends it. False where what the library holds does not serve it: another tensor over the same memory has a version
        counter of its own."""
        self.weights[:] = weights
        self._borrows = [*map(id, weights)] == self._known and self._handed.packed_are_kept()
        return self._borrows

    def give_back(self) -> None:
        """Lets go of all tensors between two calls."""
        self.tensors.clear()
        self.weights.clear()
        self._borrows = False


class Handed:
    """What the library holds of a sequence's tensors. number: its name for that. places: where they lie.
    packed_are_kept(): whether the packed weights are still those of the tensors' storages."""

    def __init__(self, number: int, places: Any, packed_are_kept: Callable[[], bool]):
        self.number, self.places, self.packed_are_kept = number, places, packed_are_kept
        weakref.finalize(self, torch.ops.convext_cpu.drop_sequence.default, number).atexit = False


class _PlacesInPython:
    """_C.Places (csrc/python/places.h) for a torch without DLPack's table of functions."""

    def __init__(self, tensors: list[torch.Tensor]):
        self._places = self._of(tensors)

    @staticmethod
    def _of(tensors: list[torch.Tensor]) -> list[tuple[object, ...]]:
        return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]

    def still(self, tensors: list[torch.Tensor]) -> bool:
        return self._of(tensors) == self._places


def places(compiled: Any, tensors: list[torch.Tensor]) -> Any:
    """Where the tensors lie: an object whose `still(tensors)` says whether they lie there still."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return _PlacesInPython(tensors) if exchange is None else compiled.Places(exchange, tensors)


def fill(program: Any, blocks: list[Block], plans: Iterable[Any]) -> None:
    """Adds the blocks to an empty program (csrc/cpu/runtime/sequence_program.h, which says in what order the op takes
    their tensors). `plans`: the call of each step's kernel, None of a step that is no convolution."""
    plans = iter(plans)
    for block in blocks:
        program.begin_block(block.source)
        for step, plan in zip(block.steps, plans):
            _ADD[step.kind](program, step, plan)


def _add_convolution(program: Any, step: Step, plan: Any) -> None:
    program.add_convolution(
        plan.variant,
        plan.geom,
        ACTIVATIONS[step.activation],
        packs=plan.pack_format is not None,
        residual=step.residual,
        present=step.present[1:],
        excite=step.excite,
    )


_ADD: dict[StepKind, Callable[[Any, Step, Any], None]] = {
    StepKind.CONVOLUTION: _add_convolution,
    StepKind.LAYER_NORM: lambda program, step, plan: program.add_layer_norm(*step.present[4:]),
    StepKind.MEAN: lambda program, step, plan: program.add_mean(),
}
