"""Transposed convolutions with the meaning of torch.nn.functional: a dgrad, and the bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from . import autograd, checks, functional, ops
from .functional import Size
from .memory_format import volume_is_channels_last
from .problem import DTYPES, Geom

_TORCHS: dict[int, Callable[..., torch.Tensor]] = {
    1: torch.conv_transpose1d,
    2: torch.conv_transpose2d,
    3: torch.conv_transpose3d,
}
_SETTINGS = "stride", "padding", "output_padding", "groups", "dilation"
_Operand = torch.Tensor | None


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """1-D transposed convolution: torch.nn.functional.conv_transpose1d, argument for argument.

    Args:
        input: (N, K, Q), or (K, Q) for one row.
        weight: (K, C/groups, S), of input's dtype and on its device.
        bias: (C), or None, the default.
        stride: how far apart the inputs' contributions lie, an int or a sequence of one; default 1.
        padding: how much of the result is cut off on each side, an int or a sequence of one; default 0.
        output_padding: by how much the result is longer on its far side, an int or a sequence of one; default 0.
        groups: into how many independent convolutions the channels fall; default 1.
        dilation: distance between the taps of the filter, an int or a sequence of one; default 1.

    Returns: (N, C, W), or (C, W) for one row, with W as in `convext.problem.Geom.input_size`, of input's dtype.

    Raises what F.conv_transpose1d raises: an error of its type, that begins with its text and ends in a line from
        convext, which names the argument.

    Example:
        >>> convext.conv_transpose1d(torch.randn(2, 16, 50), torch.randn(16, 8, 4), stride=2, padding=1).shape
        torch.Size([2, 8, 100])
    """
    return _conv_transpose(conv_transpose1d, 1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """2-D transposed convolution: torch.nn.functional.conv_transpose2d, argument for argument.

    Args:
        input: (N, K, P, Q), or (K, P, Q) for one image.
        weight: (K, C/groups, R, S), of input's dtype and on its device.
        bias: (C), or None, the default.
        stride: how far apart the inputs' contributions lie in pixels, an int or (height, width); default 1.
        padding: how much of the result is cut off on each side in pixels, an int or (height, width); default 0.
        output_padding: by how much the result is larger at the bottom and on the right, an int or (height, width);
            default 0.
        groups: into how many independent convolutions the channels fall; default 1.
        dilation: distance between the taps of the filter in pixels, an int or (height, width); default 1.

    Returns: (N, C, H, W), or (C, H, W) for one image, with H and W as in `convext.problem.Geom.input_size`, of input's
        dtype, and channels-last where input or weight is.

    Raises what F.conv_transpose2d raises: an error of its type, that begins with its text and ends in a line from
        convext, which names the argument.

    Example:
        >>> convext.conv_transpose2d(torch.randn(2, 16, 7, 7), torch.randn(16, 8, 2, 2), stride=2).shape
        torch.Size([2, 8, 14, 14])
    """
    return _conv_transpose(conv_transpose2d, 2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    """3-D transposed convolution: torch.nn.functional.conv_transpose3d, argument for argument.

    Args:
        input: (N, K, Z, P, Q), or (K, Z, P, Q) for one volume.
        weight: (K, C/groups, T, R, S), of input's dtype and on its device.
        bias: (C), or None, the default.
        stride: how far apart the inputs' contributions lie, an int or (depth, height, width); default 1.
        padding: how much of the result is cut off on each side, an int or (depth, height, width); default 0.
        output_padding: by how much the result is longer on its far sides, an int or (depth, height, width); default 0.
        groups: into how many independent convolutions the channels fall; default 1.
        dilation: distance between the taps of the filter, an int or (depth, height, width); default 1.

    Returns: (N, C, D, H, W), or (C, D, H, W) for one volume, with the sizes of `convext.problem.Geom.input_size`, of
        input's dtype, and channels-last (torch.channels_last_3d) where ATen's would be.

    Raises what F.conv_transpose3d raises: an error of its type, that begins with its text and ends in a line from
        convext, which names the argument.

    Example:
        >>> convext.conv_transpose3d(torch.randn(2, 16, 4, 7, 7), torch.randn(16, 8, 2, 2, 2), stride=2).shape
        torch.Size([2, 8, 8, 14, 14])
    """
    return _conv_transpose(conv_transpose3d, 3, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv_transpose(
    function: Callable[..., torch.Tensor], axes: int, x: Any, w: Any, bias: Any, *settings: Any
) -> torch.Tensor:
    if has_torch_function((x, w, bias)):
        heard: torch.Tensor = handle_torch_function(
            function, (x, w, bias), x, w, bias, **dict(zip(_SETTINGS, settings))
        )
        return heard
    if torch.compiler.is_compiling():
        return traced(axes, x, w, bias, *settings)
    try:
        if functional.is_for_aten(x, w, bias):
            return _TORCHS[axes](x, w, bias, *settings)
        return _checked(axes, x, w, bias, *settings)
    except checks.InvalidArgument as error:
        return functional.as_pytorch(_TORCHS[axes], error, x, w, bias, **dict(zip(_SETTINGS, settings)))


def traced(axes: int, x: Any, w: Any, bias: Any, *settings: Any) -> torch.Tensor:
    """What a compiler sees: operators, which know their own gradients."""
    if x.dtype not in DTYPES or w.dtype not in DTYPES:
        return _TORCHS[axes](x, w, bias, *settings)
    stride, padding, output_padding, groups, dilation = settings
    return _checked(axes, x, w, bias, stride, padding, output_padding, groups, dilation, by_operator=True)


def _axes(axes: int, name: str, value: Any, of_height_one: int) -> tuple[int, ...]:
    if axes == 1:
        return of_height_one, functional.as_width(name, value)
    return functional.as_pair(name, value) if axes == 2 else functional.as_triple(name, value)


def _checked(
    axes: int,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: _Operand,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    by_operator: bool = False,
) -> torch.Tensor:
    geom = Geom(
        _axes(axes, "stride", stride, 1),
        _axes(axes, "padding", padding, 0),
        _axes(axes, "dilation", dilation, 1),
        functional.as_groups(groups),
    )
    longer = _axes(axes, "output_padding", output_padding, 0)
    if ops._autocast_active():
        x, w, bias = functional.autocast(x, w, bias)
    if x.dim() == axes + 1:
        return _batched(axes, x.unsqueeze(0), w, bias, geom, longer, by_operator).squeeze(0)
    return _batched(axes, x, w, bias, geom, longer, by_operator)


def _batched(
    axes: int,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: _Operand,
    geom: Geom,
    output_padding: tuple[int, ...],
    by_operator: bool,
) -> torch.Tensor:
    checks.check_conv_transpose(x, w, bias, geom, output_padding, axes)
    beyond = any(longer >= step for longer, step in zip(output_padding, geom.stride))
    if beyond or 0 in x.shape or 0 in w.shape:
        # Beyond a stride there are outputs that no input reaches, so that the result is no gradient of a convolution of
        # its size with an output of x's; and where nothing is to compute, ATen has rules of its own.
        stride, padding, dilation = (values[-axes:] for values in geom[:3])
        return _TORCHS[axes](x, w, bias, stride, padding, output_padding[-axes:], geom.groups, dilation)
    height_one = (1,) if axes == 1 else ()
    size = geom.input_size((*height_one, *x.shape[2:]), (*height_one, *w.shape[2:]), output_padding)
    if axes == 3:
        channels_last = volume_is_channels_last(x, w, geom, output_padding)
    else:
        channels_last = autograd.result_is_channels_last(x, w)
    if by_operator or ops.batched_the_older_way(x, w, bias):
        return _by_operator(axes, x, w, bias, size, geom, channels_last)
    if not functional.needs_function(x, w, bias):
        return autograd.conv_transpose(x, w, bias, size, geom, channels_last)
    y: torch.Tensor = autograd.ConvTransposeFunction.apply(x, w, bias, size, geom, channels_last)
    return y.clone() if ops._functorch_active() else y


def _by_operator(
    axes: int,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: _Operand,
    size: tuple[int, ...],
    geom: Geom,
    channels_last: bool,
) -> torch.Tensor:
    """An operator, which knows its own gradient, and a sum."""
    if axes == 1:
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    y: torch.Tensor = torch.ops.convext.dgrad(x, w, size, *geom, channels_last)
    y = y.squeeze(2) if axes == 1 else y
    return y if bias is None else y + bias.view(-1, *(1,) * axes)
