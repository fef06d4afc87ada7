"""Convolutions with the meaning of torch.nn.functional: normalises arguments, decides who records a gradient, and calls
on. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import autograd, batch_norm, checks, fast_call, ops
from .activation import FORWARD
from .autograd import Recomputable
from .memory_format import volume_is_channels_last
from .problem import DTYPES, Epilogue, Geom

Size = int | Sequence[int]  # one for all axes, or (height, width), of volumes (depth, height, width)
_Fused = tuple[torch.Tensor, torch.Tensor, Epilogue, Geom]

_PLAIN = ops._PLAIN
_strided = torch.strided
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_conv2d_again = fast_call.conv2d
_jit_tracing = ops._jit_tracing  # a TorchScript trace gets ATen's operators: it runs without convext


def as_pair(name: str, value: Any) -> tuple[int, int]:
    """An int or a sequence of one or two ints as (height, width)."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    height, width = _unusual(name, value, 2)
    return height, width


def as_triple(name: str, value: Any) -> tuple[int, int, int]:
    """An int or a sequence of one or three ints as (depth, height, width)."""
    if type(value) is int:
        return value, value, value
    if type(value) is tuple and len(value) == 3 and all(type(v) is int for v in value):
        return value
    depth, height, width = _unusual(name, value, 3)
    return depth, height, width


def _is_int(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not (value.is_floating_point() or value.is_complex())
    return not isinstance(value, bool) and (isinstance(value, torch.SymInt) or hasattr(value, "__index__"))


def _as_int(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt)) else value.__index__()


_WORDS = {2: ("two", "one for height and one for width"), 3: ("three", "for depth, height and width")}


def _unusual(name: str, value: Any, axes: int) -> tuple[int, ...]:
    if _is_int(value):
        return (_as_int(value),) * axes
    many, what = _WORDS[axes]
    if not isinstance(value, (tuple, list)) or not all(_is_int(v) for v in value):
        raise checks.InvalidType(
            f"{name}: expected an int or a tuple of {many} ints, got {value!r} ({type(value).__name__})"
        )
    if len(value) not in (1, axes):
        raise checks.InvalidArgument(f"{name}: expected one int or {many}, {what}, got {list(value)}")
    values = tuple(_as_int(v) for v in value)
    return values if len(values) == axes else values * axes


def as_width(name: str, value: Any) -> int:
    """An int or a sequence of one."""
    if type(value) is int:
        return value
    if type(value) is tuple and len(value) == 1 and type(value[0]) is int:
        return value[0]
    if not isinstance(value, (tuple, list)):
        value = [value]
    if not all(_is_int(v) for v in value):
        raise checks.InvalidType(f"{name}: expected an int or a tuple of one, got {value!r}")
    if len(value) != 1:
        raise checks.InvalidArgument(f"{name}: expected one int, got {list(value)}")
    width: int = _as_int(value[0])
    return width


def _same_padding(
    x: torch.Tensor, w: torch.Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """x and the padding of padding="same". Where the sides differ, x is padded on its far side first, as in ATen."""
    if any(step != 1 for step in stride):
        raise checks.InvalidArgument(f"padding='same' is not supported for strided convolutions: stride is {stride}")
    total = [d * (n - 1) for d, n in zip(dilation, w.shape[2:])]
    if any(n % 2 for n in total):
        x = F.pad(x, [side for n in reversed(total) for side in (0, n % 2)])
    return x, tuple(n // 2 for n in total)


def as_groups(groups: Any) -> int:
    if type(groups) is not int:
        if not _is_int(groups):
            raise checks.InvalidType(f"groups: expected an int, got {groups!r} ({type(groups).__name__})")
        groups = _as_int(groups)
    number: int = groups
    return number


def normalised(
    x: torch.Tensor, w: torch.Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int, axes: int = 2
) -> tuple[torch.Tensor, Geom]:
    """x (padded where "same" asks for it) and geom, of images, or with `axes` = 3 of volumes."""
    as_axes: Callable[[str, Any], tuple[int, ...]] = as_pair if axes == 2 else as_triple
    stride, dilation = as_axes("stride", stride), as_axes("dilation", dilation)
    groups = as_groups(groups)
    if isinstance(padding, str):
        if padding == "same":
            if min(dilation) > 0 and w.dim() == axes + 2:
                x, padding = _same_padding(x, w, stride, dilation)
            else:
                padding = (0,) * axes  # which the checks report
        elif padding == "valid":
            padding = (0,) * axes
        else:
            raise checks.InvalidArgument(f"padding: invalid padding string {padding!r}, expected 'same' or 'valid'")
    else:
        padding = as_axes("padding", padding)
    return x, Geom(stride, padding, dilation, groups)


def _check_tensors(x: object, w: object, bias: object) -> None:
    checks.check_tensor("input", x)
    checks.check_tensor("weight", w)
    checks.check_tensor("bias", bias, optional=True)


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """The operands in the dtype that autocast asks for, if it is on for x's device."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type):
        return x, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(ops.autocast_cast(t, device_type, dtype) for t in (x, *others))


def _is_foreign(*tensors: object) -> bool:
    """True for tensor subclasses that bring their own dispatch (sharded, quantized, ...): ATen's operators are the ones
    that they know."""
    for t in tensors:
        if type(t) not in _PLAIN and torch.utils._python_dispatch.is_traceable_wrapper_subclass(t):
            if not isinstance(t, torch._subclasses.functional_tensor.FunctionalTensor):
                return True
    return False


_TORCHS: dict[int, Callable[..., torch.Tensor]] = {2: torch.conv2d, 3: torch.conv3d}


def _conv(
    axes: int,
    function: type[autograd.Conv2dFunction],
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> torch.Tensor:
    """The one path of the convolutions of images and volumes; `function` records the gradient."""
    if torch.compiler.is_compiling():
        return _conv_traced(axes, x, w, bias, stride, padding, dilation, groups)
    try:
        return _checked_conv(axes, function, x, w, bias, stride, padding, dilation, groups)
    except checks.InvalidArgument as error:
        return as_pytorch(_TORCHS[axes], error, x, w, bias, stride, padding, dilation, groups)


def as_pytorch(
    function: Callable[..., torch.Tensor], error: checks.InvalidArgument, *arguments: Any, **settings: Any
) -> torch.Tensor:
    """What PyTorch makes of arguments that a check refused: its own error, with the check's words behind it, or its
    result where it takes what convext does not: tensors on the meta device beside others."""
    try:
        return function(*arguments, **settings)
    except (RuntimeError, TypeError, ValueError) as theirs:
        if type(theirs) not in (RuntimeError, TypeError, ValueError, NotImplementedError):
            raise
        raise type(theirs)(f"{theirs}\nconvext: {error}") from None


def _checked_conv(
    axes: int,
    function: type[autograd.Conv2dFunction],
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> torch.Tensor:
    if is_for_aten(x, w, bias):
        return _TORCHS[axes](x, w, bias, stride, padding, dilation, groups)
    x, geom = normalised(x, w, stride, padding, dilation, groups, axes)
    if ops._autocast_active():
        x, w, bias = autocast(x, w, bias)
    if x.dim() == axes + 1:
        return _record(axes, function, x.unsqueeze(0), w, bias, geom).squeeze(0)
    return _record(axes, function, x, w, bias, geom)


def is_for_aten(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True of tensors of which ATen's operators know more: other dtypes and layouts, subclasses; and in a TorchScript
    trace. Raises InvalidType where they are no tensors."""
    if not (type(x) in _PLAIN and type(w) in _PLAIN and type(bias) in _PLAIN) or x is None or w is None:
        _check_tensors(x, w, bias)
    known = x.dtype in DTYPES or w.dtype in DTYPES  # one alone is an error, which the checks explain
    if not known or x.layout is not _strided or w.layout is not _strided:
        return True
    return _is_foreign(x, w, bias) or _jit_tracing() is not None


def _record(
    axes: int,
    function: type[autograd.Conv2dFunction],
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    geom: Geom,
) -> torch.Tensor:
    if x.dim() == axes + 2 and (x.shape[0] == 0 or x.shape[1] == 0):
        # Nothing to compute. Strides of an empty batch follow rules of ATen's own, and without channels y does not
        # say how many filters there are.
        checks.check_conv(x, w, bias, geom)
        return torch.convolution(x, w, bias, *geom[:3], False, (0,) * axes, geom.groups)
    channels_last = axes == 3 and volume_is_channels_last(x, w, geom)
    if needs_function(x, w, bias):
        if ops.batched_the_older_way(x, w, bias):  # the operator, which each slice gets, records for itself
            return torch.ops.convext.fprop(x, w, bias, *geom, channels_last)
        y = function.apply(x, w, bias, geom, channels_last)
        # Under vmap it is a view of what the operator returned, which autograd would not let anybody write into.
        return y.clone() if ops._functorch_active() else y
    return ops.fprop(x, w, bias, geom, channels_last)


def needs_function(*tensors: torch.Tensor | None) -> bool:
    return autograd.needs_function(*tensors) or ops._functorch_active()


def _conv_traced(
    axes: int,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> torch.Tensor:
    """What a compiler sees: one operator, which knows its own gradient."""
    if x.dtype not in DTYPES or w.dtype not in DTYPES:
        return _TORCHS[axes](x, w, bias, stride, padding, dilation, groups)
    x, geom = normalised(x, w, stride, padding, dilation, groups, axes)
    if x.dim() == axes + 1:
        return _fprop_traced(x.unsqueeze(0), w, bias, geom).squeeze(0)
    return _fprop_traced(x, w, bias, geom)


def _fprop_traced(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geom: Geom) -> torch.Tensor:
    channels_last = geom.axes == 3 and volume_is_channels_last(x, w, geom)
    y: torch.Tensor = torch.ops.convext.fprop(x, w, bias, *geom, channels_last)
    return y


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    """2-D convolution: torch.nn.functional.conv2d, argument for argument.

    Args:
        input: (N, C, H, W), or (C, H, W) for one image.
        weight: (K, C/groups, R, S), of input's dtype and on its device.
        bias: (K), or None, the default.
        stride: step of the filter in pixels, an int or (height, width); default 1.
        padding: zeros on each side in pixels, an int or (height, width); or "same" (an output of the input's size, at
            stride 1) or "valid" (none). Default 0.
        dilation: distance between the taps of the filter in pixels, an int or (height, width); default 1.
        groups: into how many independent convolutions the channels fall; default 1.

    Returns: (N, K, P, Q), or (K, P, Q) for one image, with P and Q as in `convext.problem.Geom.output_size`, of input's
        dtype, and channels-last where input or weight is.

    Raises what F.conv2d raises: an error of its type, that begins with its text and ends in a line from convext, which
        names the argument.

    Example:
        >>> x, w = torch.randn(2, 16, 32, 32), torch.randn(8, 16, 3, 3)
        >>> convext.conv2d(x, w, stride=2, padding=1).shape
        torch.Size([2, 8, 16, 16])
    """
    if not _is_dynamo_compiling():
        y: torch.Tensor | None = _conv2d_again(input, weight, bias, stride, padding, dilation, groups)
        if y is not None:
            return y
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            conv2d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    return _conv(2, autograd.Conv2dFunction, input, weight, bias, stride, padding, dilation, groups)


def depthwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
) -> torch.Tensor:
    """Depthwise convolution: every input channel has filters of its own, groups = C.

    Args:
        weight: (C*m, 1, R, S) with a multiplier m >= 1: filters c*m to c*m + m - 1 see channel c.
        input, bias, stride, padding, dilation: as in `conv2d`.

    Returns: (N, C*m, P, Q), or (C*m, P, Q) for one image; else as `conv2d`.

    Raises RuntimeError where weight does not fit, and else as `conv2d`.

    Example:
        >>> convext.depthwise_conv2d(torch.randn(1, 16, 32, 32), torch.randn(32, 1, 3, 3), padding="same").shape
        torch.Size([1, 32, 32, 32])
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            depthwise_conv2d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
    _check_tensors(input, weight, bias)
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input: expected 3D (unbatched) or 4D (batched) input, got {list(input.shape)}")
    channels = input.shape[-3]
    if weight.dim() != 4 or weight.shape[1] != 1 or channels < 1 or weight.shape[0] % channels:
        raise RuntimeError(
            f"weight: expected size (C*m, 1, R, S) with C={channels} for input {list(input.shape)}, "
            f"got {list(weight.shape)}"
        )
    return _conv(2, autograd.DepthwiseConv2dFunction, input, weight, bias, stride, padding, dilation, channels)


def dilated_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 2,
) -> torch.Tensor:
    """Dilated (atrous) convolution: `conv2d` with groups = 1 and a dilation of 2 by default.

    Args:
        dilation: distance between the taps of the filter in pixels, an int or (height, width); default 2.
        input, weight, bias, stride, padding: as in `conv2d`.

    Returns: as `conv2d`. Raises RuntimeError and TypeError where F.conv2d does.

    Example:
        >>> convext.dilated_conv2d(torch.randn(1, 16, 32, 32), torch.randn(8, 16, 3, 3), dilation=(2, 4)).shape
        torch.Size([1, 8, 28, 24])
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            dilated_conv2d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
    return _conv(2, autograd.DilatedConv2dFunction, input, weight, bias, stride, padding, dilation, 1)


def conv3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """3-D convolution: torch.nn.functional.conv3d, argument for argument.

    Args:
        input: (N, C, D, H, W), or (C, D, H, W) for one volume.
        weight: (K, C/groups, T, R, S), of input's dtype and on its device.
        bias: (K), or None, the default.
        stride: step of the filter, an int or (depth, height, width); default 1.
        padding: zeros on each side, an int or (depth, height, width); or "same" (an output of the input's size, at
            stride 1) or "valid" (none). Default 0.
        dilation: distance between the taps of the filter, an int or (depth, height, width); default 1.
        groups: into how many independent convolutions the channels fall; default 1.
        causal: pad the depth with dilation * (T - 1) zeros in front alone, so that no output sees a plane behind its
            own, and at stride 1 there are as many as input's; the depth's `padding` must be 0: 0 or (0, height, width).
            No padded copy is made: dilation * (T - 1) / stride planes too many are computed, at the end, and the result
            is a view of those before them. Default False.

    Returns: (N, K, Z, P, Q), or (K, Z, P, Q) for one volume, with the sizes of `convext.problem.Geom.output_size`, of
        input's dtype, and channels-last (torch.channels_last_3d) where ATen's would be.

    Raises what F.conv3d raises: an error of its type, that begins with its text and ends in a line from convext, which
        names the argument. ValueError for a padding of the depth, or a string, beside `causal`.

    Example:
        >>> x, w = torch.randn(2, 3, 8, 32, 32), torch.randn(8, 3, 3, 3, 3)
        >>> convext.conv3d(x, w, stride=(1, 2, 2), padding=1).shape
        torch.Size([2, 8, 8, 16, 16])
        >>> convext.conv3d(x, w, padding=(0, 1, 1), causal=True).shape
        torch.Size([2, 8, 8, 32, 32])
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            conv3d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            causal=causal,
        )
    if causal:
        return _causal_conv3d(input, weight, bias, stride, padding, dilation, groups)
    return _conv(3, autograd.Conv3dFunction, input, weight, bias, stride, padding, dilation, groups)


def _causal_conv3d(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.Tensor:
    if isinstance(padding, str):
        raise ValueError(f"padding: expected ints beside causal=True, which pads the depth in front, got {padding!r}")
    try:
        _check_tensors(x, w, bias)
        step, distance, pad = (
            as_triple("stride", stride),
            as_triple("dilation", dilation),
            as_triple("padding", padding),
        )
    except checks.InvalidArgument:
        return _conv(3, autograd.Conv3dFunction, x, w, bias, stride, padding, dilation, groups)  # which raises
    if pad[0] != 0:
        raise ValueError(
            f"padding: expected 0 for the depth beside causal=True, which pads it in front, got {padding!r}"
        )
    if w.dim() != 5 or x.dim() not in (4, 5) or step[0] < 1 or distance[0] < 1 or w.shape[2] < 1:
        return _conv(3, autograd.Conv3dFunction, x, w, bias, step, pad, distance, groups)  # which raises
    front = distance[0] * (w.shape[2] - 1)
    y = _conv(3, autograd.Conv3dFunction, x, w, bias, step, (front, *pad[1:]), distance, groups)
    return y.narrow(-3, 0, (x.shape[-3] - 1) // step[0] + 1) if front else y


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """1-D convolution: torch.nn.functional.conv1d, argument for argument. The kernels see an image of height one, which
    is a view.

    Args:
        input: (N, C, W), or (C, W) for one row.
        weight: (K, C/groups, S), of input's dtype and on its device.
        bias: (K), or None, the default.
        stride: step of the filter, an int or a sequence of one; default 1.
        padding: zeros on each side, an int or a sequence of one; or "same" (an output of the input's size, at stride 1)
            or "valid" (none). Default 0.
        dilation: distance between the taps of the filter, an int or a sequence of one; default 1.
        groups: into how many independent convolutions the channels fall; default 1.
        causal: pad with dilation * (S - 1) zeros on the left alone, so that no output sees what comes behind it, and an
            output at stride 1 is of the input's size; `padding` must be 0. No padded copy is made: dilation * (S - 1) /
            stride outputs too many are computed, at the end, and the result is a view of those before them. Default
            False.

    Returns: (N, K, Q), or (K, Q) for one row, with Q as in `convext.problem.Geom.output_size`, of input's dtype.

    Raises what F.conv1d raises: an error of its type, that begins with its text and ends in a line from convext, which
        names the argument. ValueError for a padding beside `causal`.

    Example:
        >>> x, w = torch.randn(2, 16, 100), torch.randn(8, 16, 3)
        >>> convext.conv1d(x, w, stride=2, padding=1).shape, convext.conv1d(x, w, dilation=8, causal=True).shape
        (torch.Size([2, 8, 50]), torch.Size([2, 8, 100]))
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            conv1d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            causal=causal,
        )
    if causal:
        return _causal_conv1d(input, weight, bias, stride, padding, dilation, groups)
    return _conv1d(input, weight, bias, stride, padding, dilation, groups)


def _causal_conv1d(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.Tensor:
    if padding not in (0, (0,), [0]):
        raise ValueError(f"padding: expected 0 beside causal=True, which pads on the left, got {padding!r}")
    try:
        step, distance = as_width("stride", stride), as_width("dilation", dilation)
        _check_tensors(x, w, bias)
    except checks.InvalidArgument:
        step = 0
    if step < 1 or w.dim() != 3 or x.dim() not in (2, 3) or w.shape[2] < 1 or distance < 1:
        return _conv1d(x, w, bias, stride, 0, dilation, groups)  # which raises
    left = distance * (w.shape[2] - 1)
    y = _conv1d(x, w, bias, stride, left, dilation, groups)
    return y.narrow(-1, 0, (x.shape[-1] - 1) // step + 1) if left else y


def _conv1d(*arguments: Any) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _conv1d_traced(*arguments)
    try:
        return _checked_conv1d(*arguments)
    except checks.InvalidArgument as error:
        return as_pytorch(torch.conv1d, error, *arguments)


def _checked_conv1d(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.Tensor:
    if is_for_aten(x, w, bias):
        return torch.conv1d(x, w, bias, stride, padding, dilation, groups)
    x, geom = normalised_row(x, w, stride, padding, dilation, groups)
    if ops._autocast_active():
        x, w, bias = autocast(x, w, bias)
    if x.dim() == 2:
        return _record_row(x.unsqueeze(0), w, bias, geom).squeeze(0)
    return _record_row(x, w, bias, geom)


def normalised_row(
    x: torch.Tensor, w: torch.Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[torch.Tensor, Geom]:
    """x (padded where "same" asks for it) and the geom of images of height one."""
    step, distance = as_width("stride", stride), as_width("dilation", dilation)
    groups = as_groups(groups)
    if not isinstance(padding, str):
        pad = as_width("padding", padding)
    elif padding == "valid" or padding == "same" and (distance < 1 or w.dim() != 3):  # which the checks report
        pad = 0
    elif padding == "same":
        if step != 1:
            raise checks.InvalidArgument(f"padding='same' is not supported for strided convolutions: stride is {step}")
        total = distance * (w.shape[2] - 1)
        if total % 2:
            x = F.pad(x, (0, 1))  # on its far side, as in ATen
        pad = total // 2
    else:
        raise checks.InvalidArgument(f"padding: invalid padding string {padding!r}, expected 'same' or 'valid'")
    return x, Geom((1, step), (0, pad), (1, distance), groups)


def _record_row(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geom: Geom) -> torch.Tensor:
    if x.dim() != 3 or w.dim() != 3 or x.shape[0] == 0 or x.shape[1] == 0:
        checks.check_conv(x, w, bias, geom, axes=1)
        (_, step), (_, pad), (_, distance), groups = geom
        return torch.convolution(x, w, bias, (step,), (pad,), (distance,), False, (0,), groups)  # as in `_record`
    try:
        if not needs_function(x, w, bias):
            return autograd.conv1d(x, w, bias, geom)
        if ops.batched_the_older_way(x, w, bias):
            return torch.ops.convext.fprop(x.unsqueeze(2), w.unsqueeze(2), bias, *geom).squeeze(2)
        y = autograd.Conv1dFunction.apply(x, w, bias, geom)
    except checks.InvalidArgument:
        checks.check_conv(x, w, bias, geom, axes=1)  # the same of the rows
        raise
    return y.clone() if ops._functorch_active() else y


def _conv1d_traced(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.Tensor:
    if x.dtype not in DTYPES or w.dtype not in DTYPES or x.dim() not in (2, 3) or w.dim() != 3:
        return torch.conv1d(x, w, bias, stride, padding, dilation, groups)
    x, geom = normalised_row(x, w, stride, padding, dilation, groups)
    if x.dim() == 2:
        return torch.ops.convext.fprop(x[None, :, None], w.unsqueeze(2), bias, *geom).squeeze(2).squeeze(0)
    return torch.ops.convext.fprop(x.contiguous().unsqueeze(2), w.unsqueeze(2), bias, *geom).squeeze(2)


def conv_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    activation: str = "relu",
    residual: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """activation(conv2d(input, weight, bias) + residual) in one call: `conv_bn_act` without a batch norm.

    Args:
        input, weight, bias, stride, padding, dilation, groups, activation, residual: as in `conv_bn_act`. Of rows and
            volumes the sum and the activation are calls of their own.
        recompute: as in `conv_bn_act`, of what an activation other than ReLU and identity sees; with a residual, that
            is kept. Default False.

    Returns: (N, K, P, Q), or (K, P, Q) for one image; else as `conv2d`, `conv1d` or `conv3d`.

    Raises RuntimeError and TypeError where F.conv2d does, ValueError for an unknown activation, RuntimeError for a
    residual that does not fit.

    Example:
        >>> x, w = torch.randn(2, 8, 32, 32), torch.randn(8, 8, 3, 3)
        >>> convext.conv_act(x, w, padding=1, activation="silu", residual=x).shape
        torch.Size([2, 8, 32, 32])
    """
    tensors = input, weight, bias, residual
    if has_torch_function(tensors):
        return handle_torch_function(
            conv_act,
            tensors,
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            activation=activation,
            residual=residual,
            recompute=recompute,
        )
    epilogue = Epilogue(bias, None, None, None, None, residual, 0.0, activation)
    if _of_filters(weight) is not conv2d:
        return _unfused_act(input, weight, epilogue, stride, padding, dilation, groups)
    if _is_simple(*tensors) and (geom := plain_geom(stride, padding, dilation, groups)) is not None:
        out = ops.conv_bn_act_again(input, weight, epilogue, geom)
        if out is not None:
            return out
    return ordinary(chained_conv_act(input, weight, epilogue, stride, padding, dilation, groups, recompute=recompute))


def ordinary(input: torch.Tensor | Recomputable) -> torch.Tensor:
    """A tensor for any reader."""
    return input.tensor() if isinstance(input, Recomputable) else input


def chained_conv_act(
    input: torch.Tensor | Recomputable,
    weight: torch.Tensor,
    epilogue: Epilogue,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    keeps: bool = False,
    recompute: bool = False,
) -> torch.Tensor | Recomputable:
    """conv_act with an epilogue, whose `input` may be Recomputable. `keeps`: so may be the result, where a gradient is
    recorded."""
    activation = epilogue.activation
    checks.check_activation(activation)
    x = input.like if isinstance(input, Recomputable) else input
    fused = _prepare_fused(x, weight, epilogue, stride, padding, dilation, groups)
    if isinstance(input, Recomputable) and (fused is None or fused[0] is not x):
        tensor = input.tensor()
        return chained_conv_act(tensor, weight, epilogue, stride, padding, dilation, groups, keeps, recompute)
    if fused is None:
        y = conv2d(x, weight, epilogue.bias, stride, padding, dilation, groups)
        return FORWARD[activation](y if epilogue.residual is None else y + epilogue.residual)
    prepared, w, epilogue, geom = fused
    if isinstance(input, Recomputable):
        return autograd.chained_conv_act(input, w, epilogue, geom, keeps, recompute)
    if torch.compiler.is_compiling() or not needs_function(prepared, w, epilogue.bias, epilogue.residual):
        out = ops.conv_bn_act(prepared, w, epilogue, geom)
    elif keeps and x.dim() == 4:
        return autograd.chained_conv_act(prepared, w, epilogue, geom, keeps, recompute)
    elif recompute:
        out = ordinary(autograd.chained_conv_act(prepared, w, epilogue, geom, False, recompute))
    else:
        out = autograd.conv_act(prepared, w, epilogue, geom)
    return out.squeeze(0) if x.dim() == 3 else out


def conv_bn_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    residual: torch.Tensor | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """activation(batch_norm(conv2d(input, weight, bias)) + residual) in one call. `conv_bn_relu` is the same function:
    its activation is ReLU unless another is named.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d`; with a weight (K, C/groups, S) as in
            `conv1d`, with one of (K, C/groups, T, R, S) as in `conv3d`.
        running_mean, running_var: (K), or None for both. With `training` they are updated in place, as F.batch_norm
            updates them: running = (1 - momentum) * running + momentum * batch, by the unbiased variance.
        bn_weight, bn_bias: (K), the scale and shift after normalising, or None for 1 and 0.
        training: normalise by the batch's own mean and variance instead of the running ones; default False.
        momentum: weight of this batch in the running statistics, a float; default 0.1.
        eps: added to the variance; default 1e-5.
        activation: "relu" (the default), "relu6", "silu", "hardswish", "gelu" (the exact one) or "identity".
        residual: added after the batch norm and before the activation, of a size that broadcasts to the output's; or
            None, the default.
        num_batches_tracked: a tensor of one integer, which a call with `training` counts up in place; or None, the
            default.
        recompute: the convolution's output is not kept for the backward pass, which computes it again from input and
            weight, if an element of it takes at most 64 products for each of its bytes: depthwise convolutions, 1x1
            ones of up to 256 channels in float32. Gradients are the same, bit for bit as long as the same kernel
            serves. Weight and bias must not be written before the backward pass, which raises RuntimeError otherwise.
            It changes nothing for rows and volumes, under torch.compile and transforms of torch.func. Default False.

    Returns: (N, K, P, Q), or (K, P, Q) for one image, which is normalised as a batch of one; rows and volumes likewise.

    Raises RuntimeError, TypeError and ValueError where F.conv2d and F.batch_norm do, ValueError for an unknown
    activation, RuntimeError for a residual that does not fit. The running statistics and the count are as before then.

    Example:
        >>> x, w, gamma, beta = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.ones(4), torch.zeros(4)
        >>> mean, var = torch.zeros(4), torch.ones(4)
        >>> y = convext.conv_bn_act(x, w, None, mean, var, gamma, beta, padding=1, training=True)
        >>> y.shape, bool(mean.any())
        (torch.Size([2, 4, 8, 8]), True)
    """
    tensors = input, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual
    if has_torch_function(tensors):
        return handle_torch_function(
            conv_bn_act,
            tensors,
            *tensors[:7],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
            recompute=recompute,
        )
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: expected a float, got {momentum!r}; convext.nn.ConvBNReLU takes None")
    epilogue = Epilogue(bias, running_mean, running_var, bn_weight, bn_bias, residual, eps, activation)
    if _of_filters(weight) is not conv2d:
        checks.check_activation(activation)
        settings = stride, padding, dilation, groups, training, momentum, num_batches_tracked
        return _unfused(input, weight, epilogue, *settings)
    if (
        not training
        and running_mean is not None
        and _is_simple(*tensors)
        and (geom := plain_geom(stride, padding, dilation, groups)) is not None
    ):
        out = ops.conv_bn_act_again(input, weight, epilogue, geom)
        if out is not None:
            return out
    return ordinary(
        chained_conv_bn_act(
            input,
            weight,
            epilogue,
            stride,
            padding,
            dilation,
            groups,
            training,
            momentum,
            num_batches_tracked,
            recompute=recompute,
        )
    )


def chained_conv_bn_act(
    input: torch.Tensor | Recomputable,
    weight: torch.Tensor,
    epilogue: Epilogue,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    training: bool,
    momentum: float,
    num_batches_tracked: torch.Tensor | None,
    keeps: bool = False,
    recompute: bool = False,
) -> torch.Tensor | Recomputable:
    """conv_bn_act with an epilogue, whose `input` may be Recomputable. `keeps`: so may be the result, where a gradient
    is recorded."""
    checks.check_activation(epilogue.activation)
    x = input.like if isinstance(input, Recomputable) else input
    fused = _prepare_fused(x, weight, epilogue, stride, padding, dilation, groups)
    rest = stride, padding, dilation, groups, training, momentum, num_batches_tracked
    if isinstance(input, Recomputable) and (fused is None or fused[0] is not x):
        return chained_conv_bn_act(input.tensor(), weight, epilogue, *rest, keeps, recompute)
    if fused is None:
        return _unfused(x, weight, epilogue, *rest)
    prepared, w, epilogue, geom = fused
    _check_batch_norm(prepared, w, epilogue, geom, training)
    if isinstance(input, Recomputable) or (
        not torch.compiler.is_compiling()
        and needs_function(prepared, w, epilogue.bias, epilogue.gamma, epilogue.beta, epilogue.residual)
    ):
        given = input if isinstance(input, Recomputable) else prepared
        keeps = keeps and x.dim() == 4
        recorded = recorded_conv_bn_act(
            given, w, epilogue, geom, training, momentum, num_batches_tracked, keeps, recompute
        )
        return recorded.squeeze(0) if x.dim() == 3 and isinstance(recorded, torch.Tensor) else recorded
    if training:
        out, *statistics = ops.conv_bn_act_train(prepared, w, epilogue._replace(mean=None, var=None), geom)
        _updating(epilogue, momentum, num_batches_tracked)(*statistics)
    else:
        out = ops.conv_bn_act(prepared, w, epilogue, geom)
    return out.squeeze(0) if x.dim() == 3 else out


def recorded_conv_bn_act(
    given: torch.Tensor | Recomputable,
    w: torch.Tensor,
    epilogue: Epilogue,
    geom: Geom,
    training: bool,
    momentum: float,
    num_batches_tracked: torch.Tensor | None,
    keeps: bool,
    recompute: bool,
) -> torch.Tensor | Recomputable:
    """chained_conv_bn_act of images, where a gradient is recorded and the arguments are known to be as they should."""
    update = None
    if training:
        update = _updating(epilogue, momentum, num_batches_tracked)
        epilogue = epilogue._replace(mean=None, var=None)
    if keeps or isinstance(given, Recomputable):
        return autograd.chained_conv_bn_act(given, w, epilogue, geom, update, keeps, recompute)
    if recompute:
        return ordinary(autograd.chained_conv_bn_act(given, w, epilogue, geom, update, False, recompute))
    return autograd.conv_bn_act(given, w, epilogue, geom, update=update)[0]


def takes_as_they_are(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom) -> bool:
    """Whether `recorded_conv_bn_act` may be called with these in the place of chained_conv_bn_act."""
    fused = _prepare_fused(x, w, epilogue, *geom)
    return fused is not None and fused[0] is x and fused[1] is w


def _updating(
    epilogue: Epilogue, momentum: float, num_batches_tracked: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """function(y, mean, var) that counts a batch and moves the epilogue's statistics, which are the running ones."""
    running_mean, running_var = epilogue.mean, epilogue.var

    def update(y: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None:
            count = y.shape[0] * y.shape[2] * y.shape[3]
            batch_norm.update_running(running_mean, running_var, mean, var, momentum, count)  # type: ignore[arg-type]

    return update


conv_bn_relu = conv_bn_act


def _of_filters(weight: object) -> Callable[..., torch.Tensor]:
    """conv1d, conv2d or conv3d, by the filters' dimensions."""
    return {3: conv1d, 5: conv3d}.get(weight.dim(), conv2d) if isinstance(weight, torch.Tensor) else conv2d


def _unfused_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> torch.Tensor:
    checks.check_activation(epilogue.activation)
    y = _of_filters(weight)(input, weight, epilogue.bias, stride, padding, dilation, groups)
    if epilogue.residual is not None:
        checks.check_residual(epilogue.residual, y.shape)
        y = y + epilogue.residual
    return FORWARD[epilogue.activation](y)


def plain_geom(stride: Size, padding: Size | str, dilation: Size, groups: int) -> Geom | None:
    """geom where nothing has to be interpreted: ints, and pairs of them."""
    if type(groups) is not int:
        return None
    pairs = tuple((v, v) if type(v) is int else v for v in (stride, padding, dilation))
    for pair in pairs:
        if type(pair) is not tuple or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) is not int:
            return None
    return Geom(*pairs, groups)  # type: ignore[call-arg, arg-type]


def _is_simple(*tensors: torch.Tensor | None) -> bool:
    """True for tensors that neither dispatcher nor autograd has to see."""
    return ops.all_plain(*tensors) and not autograd.needs_function(*tensors)


def _prepare_fused(*arguments: Any) -> _Fused | None:
    """(x, w, epilogue, geom) for the fused operators, batched and cast, or None where the parts run one by one:
    other dtypes, empty tensors, a residual that must broadcast or promote, subclasses, transforms, and what conv2d
    refuses or takes as PyTorch does."""
    try:
        return _prepared_fused(*arguments)
    except checks.InvalidArgument:
        return None


def _prepared_fused(
    input: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> _Fused | None:
    residual = epilogue.residual
    if not torch.compiler.is_compiling():
        plain = _PLAIN.issuperset(map(type, (input, weight, *epilogue[:6]))) and input is not None
        if not plain or weight is None:
            _check_tensors(input, weight, epilogue.bias)
            for t in epilogue[1:6]:
                checks.check_tensor("residual and the batch norm's parameters", t, optional=True)
        tensors = input, weight, *epilogue[:6]
        if (
            ops._functorch_active()
            or ops.batched_the_older_way(*tensors)
            or autograd.carries_tangents()
            or not plain
            and _is_foreign(*tensors)
            or _jit_tracing()
        ):
            return None
    x, w, b = input, weight, epilogue.bias
    if x.dtype not in DTYPES or w.dtype not in DTYPES or x.layout is not _strided or w.layout is not _strided:
        return None
    if ops._autocast_active():
        x, w, b = autocast(x, w, b)
    x, geom = normalised(x, w, stride, padding, dilation, groups)
    if x.dim() == 3:
        x = x.unsqueeze(0)
        residual = residual.unsqueeze(0) if residual is not None and residual.dim() == 3 else residual
    checks.check_conv(x, w, b, geom)
    y_shape = (x.shape[0], w.shape[0], *geom.output_size(x.shape[2:], w.shape[2:]))
    if residual is not None:
        checks.check_residual(residual, y_shape)
        if residual.dtype is not x.dtype or residual.device != x.device or tuple(residual.shape) != y_shape:
            return None
    if 0 in x.shape or 0 in w.shape:
        return None
    if b is not epilogue.bias or residual is not epilogue.residual:
        epilogue = epilogue._replace(bias=b, residual=residual)
    return x, w, epilogue, geom


def _check_batch_norm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom, training: bool) -> None:
    if training:
        checks.check_more_than_one_value((x.shape[0], w.shape[0], *geom.output_size(x.shape[2:], w.shape[2:])))
    checks.check_batch_norm(x.dtype, w.shape[0], *epilogue.norm)
    if epilogue.mean is None and not training:
        raise RuntimeError(
            "running_mean must be defined in evaluation mode: it is None, expected "
            f"{w.shape[0]} elements, or training=True to normalise by the batch"
        )


def _unfused(
    input: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    training: bool,
    momentum: float,
    num_batches_tracked: torch.Tensor | None,
) -> torch.Tensor:
    bias, mean, var, gamma, beta, residual, eps, activation = epilogue
    conv = _of_filters(weight)
    y = conv(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None and not _jit_tracing():  # before anything is updated
        checks.check_residual(residual, y.shape)
    unbatched = y.dim() == weight.dim() - 1
    y = y.unsqueeze(0) if unbatched else y
    if conv is not conv2d and not unbatched and (training or mean is not None):
        checks.check_batch_norm(y.dtype, y.shape[1], *epilogue.norm)
        if batch_norm.takes(y, residual, training):
            return batch_norm.bn_act(y, epilogue._replace(bias=None), training, momentum, num_batches_tracked)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    y = F.batch_norm(y, mean, var, gamma, beta, training, momentum, eps)
    y = y.squeeze(0) if unbatched else y
    return FORWARD[activation](y if residual is None else y + residual)
