"""The Triton kernels as operators, torch.ops.convext_triton.*, that torch.compile sees through.

They are what torch.ops.convext.* become under torch.compile where Triton serves them (convext/compiling.py). Inductor
finds the kernel launches inside (torch.library.triton_op), plans their memory along with the rest of the graph, and
calls the kernels from its own wrapper without the dispatcher in between. They have no gradient of their own and take
and return what the methods of `convext.backends.triton.BACKEND` do.

In the interpreter there is nothing to see through, and they are closed boxes as well. Importing this module registers
them.
"""

import types
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.triton import BACKEND
from ..memory_format import memory_format, suggests_channels_last, weight_gradient_is_channels_last
from ..problem import ConvProblem, Epilogue, Geom
from .interpreter import interpreting


def _operator(fake):
    """Registers a function as convext_triton::<its name>; `fake` gives its results' shapes where nothing is traced."""

    def register(function):
        name = f"convext_triton::{function.__name__}"
        if not interpreting():
            return torch.library.triton_op(name, function, mutates_args=())
        operator = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(fake)
        return operator

    return register


def _geom(stride, padding, dilation, groups) -> Geom:
    return Geom(tuple(map(int, stride)), tuple(map(int, padding)), tuple(map(int, dilation)), int(groups))


def _concrete(t: Tensor):
    """What a ConvProblem reads of a tensor, sizes as plain numbers: launches are laid out for one shape, and a compiler
    that asks for any shape specialises on it here."""
    sizes, strides = tuple(map(int, t.shape)), tuple(map(int, t.stride()))
    return types.SimpleNamespace(shape=sizes, stride=lambda: strides, dtype=t.dtype, device=t.device)


def _fprop_problem(x, w, *geom, channels_last=False) -> ConvProblem:
    return ConvProblem.of_fprop(_concrete(x), _concrete(w), _geom(*geom), channels_last)


def _dgrad_problem(dy, w, input_size, *geom, channels_last=None) -> ConvProblem:
    return ConvProblem.of_dgrad(_concrete(dy), _concrete(w), tuple(map(int, input_size)), _geom(*geom), channels_last)


def _wgrad_problem(dy, x, kernel_size, *geom) -> ConvProblem:
    return ConvProblem.of_wgrad(_concrete(dy), _concrete(x), tuple(map(int, kernel_size)), _geom(*geom))


def _fake_fprop(x, w, *arguments):
    *geom, channels_last = (*arguments[8:], False)[:5]
    return BACKEND.empty_y(_fprop_problem(x, w, *geom, channels_last=channels_last), x)


def _fake_dgrad(dy, w, input_size, stride, padding, dilation, groups, channels_last=None):
    problem = _dgrad_problem(dy, w, input_size, stride, padding, dilation, groups, channels_last=channels_last)
    return BACKEND.empty_x(problem, dy)


def _fake_wgrad(dy, x, kernel_size, stride, padding, dilation, groups, channels_last=False):
    return torch.empty(
        (dy.shape[1], x.shape[1] // groups, *kernel_size),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(channels_last),
    )


def _fake_depthwise_backward(dy, x, w, stride, padding, dilation, groups):
    channels_last = suggests_channels_last(x) or suggests_channels_last(w)
    return (
        _fake_dgrad(dy, w, x.shape[2:], stride, padding, dilation, groups, channels_last),
        torch.empty(
            w.shape,
            dtype=w.dtype,
            device=w.device,
            memory_format=memory_format(weight_gradient_is_channels_last(w, channels_last)),
        ),
    )


def _fake_bn_act_backward(dout, y, mean, var, gamma, beta, residual, eps, activation, training):
    dresidual = y.new_empty(0) if residual is None else BACKEND.empty_like(y)
    return BACKEND.empty_like(y), BACKEND.empty_statistics(y), BACKEND.empty_statistics(y), dresidual


@_operator(_fake_fprop)
def fprop(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> Tensor:
    problem = _fprop_problem(x, w, stride, padding, dilation, groups, channels_last=channels_last)
    return BACKEND.fprop(problem, x, w, Epilogue(bias, mean, var, gamma, beta, residual, eps, activation))


@_operator(_fake_dgrad)
def dgrad(
    dy: Tensor,
    w: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool | None = None,
) -> Tensor:
    problem = _dgrad_problem(dy, w, input_size, stride, padding, dilation, groups, channels_last=channels_last)
    return BACKEND.dgrad(problem, dy, w)


@_operator(_fake_wgrad)
def wgrad(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> Tensor:
    problem = _wgrad_problem(dy, x, kernel_size, stride, padding, dilation, groups)
    return BACKEND.wgrad(problem, dy, x, channels_last)


@_operator(_fake_depthwise_backward)
def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    channels_last = suggests_channels_last(x) or suggests_channels_last(w)
    problem = _dgrad_problem(dy, w, x.shape[2:], stride, padding, dilation, groups, channels_last=channels_last)
    return BACKEND.depthwise_backward(problem, dy, x, w, weight_gradient_is_channels_last(w, channels_last))


@_operator(lambda y: (BACKEND.empty_statistics(y), BACKEND.empty_statistics(y)))
def batch_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    return BACKEND.batch_stats(y)


@_operator(lambda y, *_: BACKEND.empty_like(y))
def bn_act(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    return BACKEND.bn_act(y, Epilogue(None, mean, var, gamma, beta, residual, eps, activation))


@_operator(_fake_bn_act_backward)
def bn_act_backward(
    dout: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    epilogue = Epilogue(None, mean, var, gamma, beta, residual, eps, activation)
    return BACKEND.bn_act_backward(dout, y, epilogue, training)
