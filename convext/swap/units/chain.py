"""Elementwise operations behind a layer, in one pass over its result: in its memory, where that is right.

Where nobody else holds that result, and it is a float32 tensor of an order that torch keeps, the compiled library takes
a part of it at a time through all of them (csrc/cpu/kernels/elementwise/chain.h). Each rounds as torch's operator does;
the transcendental ones are within a few units in the last place (tests/swap/test_chain.py). With gradients the result
is a tensor of its own, but where the forward itself writes over what it got: convext/chain.py says what is kept then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from ... import autograd, backends, ops
from ...chain import KEPT as KEPT_PLACE
from ...chain import VALUE, ChainFunction, Program, overwrite
from ...memory_format import dense_strides
from ..capture.signature import TENSOR_TYPES as PLAIN
from . import AnyLayout, Call, Op
from .functions import Place, found

if TYPE_CHECKING:
    from ..modes import Mode

_function_modes = torch._C._len_torch_function_stack


class _Kept:
    """What a step "keep" has kept, as an operand."""


KEPT = _Kept()


class ChainStep(NamedTuple):
    """One operation of OPERATIONS, and its operand: a number, a tensor that is found by name, KEPT, or none (0)."""

    operation: str
    operand: float | Place | _Kept = 0.0


class Chain(Op):
    """One step after the other.

    writes      the forward's first operation writes over what it gets
    in_place    and so does the last one
    by_default  the forward makes a tensor of a number where new tensors are made by default"""

    in_strips, by_itself = False, True

    def __init__(
        self,
        steps: list[ChainStep],
        behind: nn.Module | None = None,
        writes: bool = False,
        in_place: bool = False,
        by_default: bool = False,
    ):
        self.steps, self.behind = steps, behind
        self.writes, self.in_place, self.by_default = writes, in_place, by_default

    def words(self, adds: bool) -> list[str]:
        return [step.operation for step in self.steps if step.operation != "keep"]

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        return backends.unavailable("native", "cpu") is None

    @property
    def places(self) -> tuple[Place, ...]:  # type: ignore[override]
        return tuple(step.operand for step in self.steps if isinstance(step.operand, tuple))

    def bind(self, fallback: Call, mode: Mode) -> Call:
        operands = [step.operand for step in self.steps]
        values = [0.0 if isinstance(operand, (tuple, _Kept)) else float(operand) for operand in operands]
        tensors = iter(range(len(self.places)))
        numbers = [next(tensors) if isinstance(o, tuple) else KEPT_PLACE if o is KEPT else VALUE for o in operands]
        program = Program.of([step.operation for step in self.steps], numbers, values, self.in_place)
        places, writes, by_default = self.places, self.writes, self.by_default
        slopes = {n for n, step in zip(numbers, self.steps) if step.operation == "leaky_relu" and n >= 0}

        def chained(x: Any) -> Any:
            channels_last = _order(x)
            if channels_last is None or backends.forced() not in (None, "native"):
                return fallback(x)
            if by_default and _function_modes() > 0:  # torch.device's, as a context or by torch.set_default_device
                return fallback(x)
            given: Any = [found(place) for place in places]
            if not all(_fits(t, x, number in slopes) for number, t in enumerate(given)):
                return fallback(x)
            if mode.direct:
                if x.requires_grad:
                    return fallback(x)
            else:
                if not ops.dispatcher_is_idle() or autograd.carries_tangents():
                    return fallback(x)
                if autograd.needs_function(x, *given):
                    if x.is_inference():  # which cannot be saved
                        return fallback(x)
                    wanted = [t.requires_grad for t in given]
                    overwrites = writes and program.saves(wanted) != "input"
                    return ChainFunction.apply(x, program, channels_last, overwrites, *given)
            return overwrite(x, program, channels_last, given)

        return chained


def _order(x: Any) -> bool | None:
    """Whether x is channels-last; None where the kernel does not take it. Where its strides fit both orders, torch's
    result may have other ones than x."""
    if type(x) not in PLAIN or x.dtype is not torch.float32 or x.device.type != "cpu" or x.dim() < 3 or x.numel() == 0:
        return None
    if x.is_neg() or x.is_conj() or x.layout is not torch.strided or x.shape[1] == 1 or x.shape[2:].numel() == 1:
        return None
    if x.stride() == dense_strides(x.shape, False):
        return False
    return True if x.dim() in (4, 5) and x.stride() == dense_strides(x.shape, True) else None


def _fits(t: torch.Tensor | None, x: torch.Tensor, is_slope: bool) -> bool:
    """True of an operand that has one value, or one for each channel of x, and is broadcast to x's shape. `is_slope`:
    that of a PReLU, which lies along the channels by itself."""
    if type(t) not in PLAIN or t is None or t.dtype is not torch.float32 or t.device.type != "cpu":
        return False
    if t.layout is not torch.strided:
        return False
    if not t.is_contiguous() or t.is_neg() or t.is_conj():
        return False
    if is_slope:
        return t.dim() == 1 and t.shape[0] in (1, x.shape[1])
    if t.dim() > x.dim():
        return False
    shape = (1,) * (x.dim() - t.dim()) + tuple(t.shape)
    return shape[1] in (1, x.shape[1]) and all(extent == 1 for axis, extent in enumerate(shape) if axis != 1)
