"""What convext/_call (csrc/call/call.cpp) needs of Python: the plan of a problem that it meets for the first time, and
the backward pass of what it recorded where that is not one of its own.

`conv2d(input, weight, bias, stride, padding, dilation, groups)` returns the result, or None where functional.py has to
compute it: `call.cpp` says which calls it serves, and why those may go without the checks that the others need.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext

from . import autograd, backends, checks
from .backends import aten, compiled_calls, native
from .memory_format import memory_format, weight_gradient_is_channels_last
from .problem import DTYPES, ConvProblem, Geom, Pass

_Pair = tuple[int, int]
_PassPlan = tuple[bool, int, bool, list[int]]  # native and not ATen; variant; whether it packs; its counter
_X, _W = 1, 2  # of `needs`


class Plan(NamedTuple):
    """As `learn` in call.cpp takes it apart. A pass without a plan runs in Python."""

    fprop: _PassPlan
    dgrad: _PassPlan | None
    wgrad: _PassPlan | None
    y_channels_last: bool
    dx_channels_last: bool
    dw_channels_last: bool
    y_shape: tuple[int, ...]


def _pass_plan(pass_: Pass, problem: ConvProblem) -> _PassPlan | None:
    """Where the choice is one that call.cpp can carry out as its backend would, bit for bit."""
    choice = backends.select(pass_, problem)
    if choice.backend is native.BACKEND:
        variant, packs = native.launched(pass_, problem)
        return True, variant, packs, choice.counter
    if choice.backend is aten.BACKEND and not aten.works_around(pass_, problem):
        return False, 0, False, choice.counter
    return None


def plan(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, settings: tuple[_Pair, _Pair, _Pair, int], needs: int
) -> Plan | None:
    """The plan of a plain call on dense tensors of the CPU, or None where none is made. `needs`: the sum of 1, 2 and 4
    where gradients of x, w, bias are to be recorded. `settings`: stride, padding, dilation, groups. Raises what
    the checks raise."""
    geom = Geom(*settings)
    if x.dtype not in DTYPES or 0 in x.shape or 0 in w.shape:
        return None
    checks.check_conv(x, w, bias, geom)
    problem = ConvProblem.of_fprop(x, w, geom)
    fprop = _pass_plan(Pass.FPROP, problem)
    if fprop is None:
        return None
    channels_last = bool(problem.y_layout)
    dy = torch.empty(problem.y_shape, dtype=x.dtype, device="meta", memory_format=memory_format(channels_last))
    dgrad = wgrad = None
    if needs & _X:
        of_dgrad = ConvProblem.of_dgrad(dy, w, x.shape[2:], geom, channels_last)
        dgrad = _pass_plan(Pass.DGRAD, dataclasses.replace(of_dgrad, device=problem.device))
    if needs & _W:
        wgrad = _pass_plan(Pass.WGRAD, ConvProblem.of_wgrad(dy, x, w.shape[2:], geom))
    dw_channels_last = weight_gradient_is_channels_last(w, channels_last)
    return Plan(fprop, dgrad, wgrad, channels_last, channels_last, dw_channels_last, problem.y_shape)


def _computed_in_python(*arguments: Any) -> None:
    return None


conv2d = _computed_in_python
if compiled_calls.library is not None:
    compiled_calls.library.set_hooks(
        native.direct_calls(), plan, autograd.backward_of_call, native.packed_number, DeviceContext
    )
    conv2d = compiled_calls.library.conv2d
