"""Elementwise operations behind a layer, in one pass over its result and in its memory.

Where nobody else holds that result, no gradient is wanted, and it is a float32 image of an order that torch keeps, the
compiled library takes a part of it at a time through all of them (csrc/cpu/kernels/elementwise/chain.h). Each rounds as
torch's operator does; the transcendental ones are within a few units in the last place (tests/swap/test_chain.py).
"""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from ... import backends
from ...memory_format import dense_strides
from ..capture.signature import TENSOR_TYPES as PLAIN
from . import AnyLayout, Call, Op
from .functions import Place, found

if TYPE_CHECKING:
    from ..modes import Mode

# In the order of CONVEXT_CHAIN_OPERATIONS in csrc/core/chain.h, which is the numbering: a test compares them.
OPERATIONS = (
    "add", "sub", "rsub", "mul", "div", "minimum", "maximum", "leaky_relu", "elu", "keep", "relu", "silu", "hardswish",
    "gelu", "gelu_tanh", "mish", "sigmoid", "hardsigmoid", "tanh", "softplus",
)  # fmt: skip
MOST = 8  # steps: kChainSteps of chain.h


class _Kept:
    """What a step "keep" has kept, as an operand."""


KEPT = _Kept()


class ChainStep(NamedTuple):
    """One operation of OPERATIONS, and its operand: a number, a tensor that is found by name, KEPT, or none (0)."""

    operation: str
    operand: float | Place | _Kept = 0.0


class Chain(Op):
    """One step after the other."""

    in_strips, by_itself = False, True

    def __init__(self, steps: list[ChainStep], behind: nn.Module | None = None):
        self.steps, self.behind = steps, behind

    def words(self, adds: bool) -> list[str]:
        return [step.operation for step in self.steps if step.operation != "keep"]

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        return backends.unavailable("native", "cpu") is None

    @property
    def places(self) -> tuple[Place, ...]:  # type: ignore[override]
        return tuple(step.operand for step in self.steps if isinstance(step.operand, tuple))

    def bind(self, fallback: Call, mode: Mode) -> Call:
        codes = [OPERATIONS.index(step.operation) for step in self.steps]
        operands = [step.operand for step in self.steps]
        values = [0.0 if isinstance(operand, (tuple, _Kept)) else float(operand) for operand in operands]
        tensors = iter(range(len(self.places)))
        numbers = [next(tensors) if isinstance(o, tuple) else -2 if o is KEPT else -1 for o in operands]
        places = self.places
        slopes = {n for n, step in zip(numbers, self.steps) if step.operation == "leaky_relu" and n >= 0}

        def chained(x: Any) -> Any:
            order = _order(x)
            if order is None or backends.forced() not in (None, "native"):
                return fallback(x)
            given = [found(place) for place in places]
            if not all(_fits(t, x, number in slopes) for number, t in enumerate(given)):
                return fallback(x)
            torch.ops.convext_cpu.chain_.default(x, given, codes, numbers, values, order)
            return x

        return chained


def _order(x: Any) -> bool | None:
    """Whether x is channels-last; None where the kernel does not take it. Where its strides fit both orders, torch's
    result may have other ones than x."""
    if type(x) not in PLAIN or x.dtype is not torch.float32 or x.device.type != "cpu" or x.dim() < 3 or x.numel() == 0:
        return None
    if x.is_neg() or x.is_conj() or x.requires_grad or x.shape[1] == 1 or x.shape[2:].numel() == 1:
        return None
    if x.stride() == _contiguous_strides(x.shape):
        return False
    return True if x.dim() == 4 and x.stride() == dense_strides(x.shape, True) else None


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]


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
