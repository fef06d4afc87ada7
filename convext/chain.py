"""Chains of elementwise operations as one call, and their gradients as another: float32 on the CPU.

A chain is what csrc/core/chain.h says: operations one after the other on a value, each with at most one operand.
Its gradients come from one saved tensor of the input's size, or none, and so never from more of them than PyTorch's
operators keep one by one:

    nothing      where every derivative is constant: sums, differences, and products with what wants no gradient
    the result   where that is so of all but the last operation, and PyTorch keeps that one's result: relu, sigmoid,
                 tanh, and leaky_relu and hardtanh where they write over what they get. Who writes over the result then
                 is refused by the backward pass, as by PyTorch's
    the input    else: there is an operation then whose operand or result PyTorch keeps, and that is no tensor that is
                 kept already for others, but the input itself or a value between the operations. It runs through all of
                 them again, a part at a time, in the pass that computes the gradients. Summands are kept beside it, as
                 copies, which have one value a channel at most
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import ops
from .autograd import _Function, _refuse_forward_mode
from .memory_format import laid_out

# In the order of CONVEXT_CHAIN_OPERATIONS in csrc/core/chain.h, which is the numbering: a test compares them.
OPERATIONS = (
    "add", "sub", "rsub", "mul", "div", "minimum", "maximum", "leaky_relu", "elu", "clamp_min", "clamp_max",
    "hardtanh_min", "hardtanh_max", "keep", "relu", "silu", "hardswish", "gelu", "gelu_tanh", "mish", "sigmoid",
    "hardsigmoid", "tanh", "softplus",
)  # fmt: skip
MOST = 8  # steps: kChainSteps of chain.h
VALUE, KEPT = -1, -2  # in the place of an operand's number: the step's value, and what "keep" has kept

_aten = torch.ops.aten
_SUMS = frozenset(("add", "sub", "rsub"))  # whose gradients read no value at all
_LINEAR = _SUMS | {"mul", "div"}
_BY_OUTPUT = frozenset(("relu", "sigmoid", "tanh"))
_BY_OUTPUT_IN_PLACE = _BY_OUTPUT | {"leaky_relu", "hardtanh_min", "hardtanh_max"}

# What each operation is: function(z, operand) of differentiable torch operations.
PLAIN: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "rsub": lambda z, b: b - z,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": lambda z, b: torch.minimum(z, b if isinstance(b, torch.Tensor) else z.new_tensor(b)),
    "maximum": lambda z, b: torch.maximum(z, b if isinstance(b, torch.Tensor) else z.new_tensor(b)),
    "leaky_relu": lambda z, b: F.prelu(z, b) if isinstance(b, torch.Tensor) else F.leaky_relu(z, b),
    "elu": lambda z, b: F.elu(z, b),
    "clamp_min": lambda z, b: torch.clamp(z, min=b),
    "clamp_max": lambda z, b: torch.clamp(z, max=b),
    "hardtanh_min": lambda z, b: F.hardtanh(z, b, math.inf),
    "hardtanh_max": lambda z, b: F.hardtanh(z, -math.inf, b),
    "relu": lambda z, _: torch.relu(z),
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "mish": lambda z, _: F.mish(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "hardsigmoid": lambda z, _: F.hardsigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
    "softplus": lambda z, _: F.softplus(z),
}

# What arrives at z where g arrives at `out`, by `out` alone, of differentiable torch operations.
_BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]] = {
    "add": lambda g, out, b: g,
    "sub": lambda g, out, b: g,
    "rsub": lambda g, out, b: -g,
    "mul": lambda g, out, b: g * b,
    "div": lambda g, out, b: g / b,
    "relu": lambda g, out, b: _aten.threshold_backward(g, out, 0),
    "leaky_relu": lambda g, out, b: torch.where(out > 0, g, g * b),
    "hardtanh_min": lambda g, out, b: torch.where(out > b, g, 0.0),
    "hardtanh_max": lambda g, out, b: torch.where(out < b, g, 0.0),
    "sigmoid": lambda g, out, b: g * (1 - out) * out,
    "tanh": lambda g, out, b: g * (1 - out * out),
}


class Program(NamedTuple):
    """A chain as the compiled library takes it.

    operations  names of OPERATIONS; codes: their numbers
    places      for each the number of its operand among the tensors, VALUE or KEPT
    values      for each its operand where that is a number, else 0
    in_place    whether the last operation is one that writes over what it gets; a leaky_relu's slope is 0 or more then
    """

    operations: tuple[str, ...]
    codes: list[int]
    places: list[int]
    values: list[float]
    in_place: bool

    @classmethod
    def of(cls, operations: Sequence[str], places: list[int], values: list[float], in_place: bool = False) -> Program:
        return cls(tuple(operations), [OPERATIONS.index(name) for name in operations], places, values, in_place)

    @property
    def steps(self) -> tuple[list[int], list[int], list[float]]:
        """As the compiled library takes them."""
        return self.codes, self.places, self.values

    def saves(self, wanted: Sequence[bool]) -> str:
        """What the gradients are computed from, "nothing", "output" or "input", where those of the operands are
        `wanted`."""
        *before, last = self.operations
        if before[-1:] == ["hardtanh_min"] and last == "hardtanh_max" and self.values[-2] <= self.values[-1]:
            before = before[:-1]
        for operation, place in zip(self.operations, self.places):
            if place == KEPT or place != VALUE and wanted[place] and operation not in _SUMS:
                return "input"
        if not _LINEAR.issuperset(before):
            return "input"
        if last in _LINEAR:
            return "nothing"
        return "output" if last in (_BY_OUTPUT_IN_PLACE if self.in_place else _BY_OUTPUT) else "input"

    def operand(self, step: int, operands: Sequence[torch.Tensor], kept: Any) -> Any:
        place = self.places[step]
        return kept if place == KEPT else self.values[step] if place == VALUE else operands[place]

    def plain(self, x: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """The chain of x as torch's operations, one by one."""
        z, kept = x, None
        for step, operation in enumerate(self.operations):
            if operation == "keep":
                kept = z
            else:
                z = PLAIN[operation](z, self.operand(step, operands, kept))
        return z


def overwrite(x: torch.Tensor, program: Program, channels_last: bool, operands: list[torch.Tensor]) -> torch.Tensor:
    """The chain of x, in its memory. x is dense, contiguous or channels-last; operands have one value, or one for each
    channel. Not differentiable."""
    torch.ops.convext_cpu.chain_.default(x, operands, *program.steps, channels_last)
    return x


class ChainFunction(_Function):
    """`apply(x, program, channels_last, overwrites, *operands)`: as `overwrite`, in x's memory only where `overwrites`,
    for which the program must not save its input. Forward mode raises NotImplementedError."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, program, channels_last, overwrites, *operands):
        if overwrites:
            return overwrite(x, program, channels_last, list(operands))
        return torch.ops.convext_cpu.chain.default(x, list(operands), *program.steps, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.program, ctx.channels_last, overwrites, *operands = inputs
        if overwrites:
            ctx.mark_dirty(x)
        ctx.saves = ctx.program.saves(ctx.needs_input_grad[4:])
        saved = {"input": x, "output": output, "nothing": None}[ctx.saves]
        # A sum's operand PyTorch does not keep: who writes it before the backward pass changes no gradient. Its values
        # are asked for where the input goes through the chain again.
        ctx.summands = {
            place: (operands[place], operands[place]._version)
            for operation, place in zip(ctx.program.operations, ctx.program.places)
            if place >= 0 and operation in _SUMS
        }
        kept: list[Any] = list(operands)
        for place in ctx.summands:
            kept[place] = kept[place].detach().clone() if ctx.saves == "input" else None
        ctx.save_for_backward(saved, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout):
        x_needed, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        if dout is None:
            return (None,) * (4 + len(wanted))
        saved, *kept = ctx.saved_tensors
        operands = [ctx.summands[place][0] if t is None else t for place, t in enumerate(kept)]
        if torch.is_grad_enabled() or not ops.all_plain(dout):
            dx, *gradients = _plain_gradients(ctx, dout, saved, operands, x_needed, wanted)
            return dx, None, None, None, *gradients
        dout = laid_out(dout, ctx.channels_last)
        program = ctx.program
        dx, sums = torch.ops.convext_cpu.chain_backward.default(
            dout,
            dout if saved is None else laid_out(saved, ctx.channels_last),  # hooks may have it come back otherwise
            operands,
            *program.steps,
            ctx.channels_last,
            ctx.saves != "input",
            [int(place >= 0 and wanted[place]) for place in program.places],
        )
        gradients = [None] * len(wanted)
        for step, place in enumerate(program.places):
            if place >= 0 and wanted[place]:
                operand = operands[place]
                found = sums[step] if operand.numel() > 1 else sums[step].sum()
                gradients[place] = found.to(operand.dtype).view(operand.shape)
        return dx if x_needed else None, None, None, None, *gradients

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode("ChainFunction")


def _plain_gradients(ctx, dout, saved, operands, x_needed, wanted):
    """The gradients by x and the operands out of differentiable operations."""
    for place, (operand, version) in ctx.summands.items():
        if ctx.saves == "input" and operand._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"summand of size {list(operand.shape)} behind a layer, in a backward pass that is itself recorded"
            )
        operands[place] = operand
    program = ctx.program
    if ctx.saves == "input":
        with torch.enable_grad():
            # Views of them: a tensor that is two operands gets the gradient of each.
            inputs = [t.view_as(t) for t in (saved, *operands)]
            out = program.plain(inputs[0], inputs[1:])
        asked = [t for t, needed in zip(inputs, (x_needed, *wanted)) if needed]
        found = iter(torch.autograd.grad(out, asked, dout, create_graph=torch.is_grad_enabled()))
        return [next(found) if needed else None for needed in (x_needed, *wanted)]
    gradients: list[Any] = [None] * len(wanted)
    g = dout
    for step in reversed(range(len(program.operations))):
        operation, place = program.operations[step], program.places[step]
        if place >= 0 and wanted[place]:  # a summand
            gradients[place] = (-g if operation == "sub" else g).sum_to_size(operands[place].shape)
        g = _BACKWARD[operation](g, saved, program.operand(step, operands, None))
    return [g if x_needed else None, *gradients]
