"""What the arguments of a convolution must be, with messages that name the argument, what it is and what was expected.
Runs once for each new combination of shapes, dtypes and devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .problem import ACTIVATIONS, Geom


def _shape(t: torch.Tensor) -> str:
    return str(list(t.shape))


class InvalidArgument(RuntimeError):
    """What a convolution's checks raise. `functional` asks PyTorch then, and raises its error and these words."""


class InvalidType(InvalidArgument, TypeError):
    """The same for an argument of another type than those that a convolution takes."""


def check_tensor(name: str, value: object, optional: bool = False) -> None:
    if not isinstance(value, torch.Tensor) and not (optional and value is None):
        raise InvalidType(f"{name}: expected a Tensor{' or None' if optional else ''}, got {type(value).__name__}")


_BOUND = {0: "zero or greater", 1: "greater than zero"}


def check_geom(geom: Geom, axes: int) -> None:
    """`axes`: 3 for a volume, 2 for an image, 1 for a row, whose geom has its own values behind those of a height of
    one."""
    for name, values, least in (
        ("stride", geom.stride[-axes:], 1),
        ("padding", geom.padding[-axes:], 0),
        ("dilation", geom.dilation[-axes:], 1),
    ):
        for value in values:
            if abs(value) >= 2**63:
                raise InvalidArgument(f"{name}: expected ints of 64 bits, got {tuple(values)}")
            if value < least:
                what = "negative" if least == 0 else "non-positive"
                raise InvalidArgument(
                    f"{what} {name} is not supported, {name} should be {_BOUND[least]}: {name} is {tuple(values)}"
                )
    if geom.groups < 1:
        raise InvalidArgument(
            f"non-positive groups is not supported, groups should be greater than zero: groups is {geom.groups}"
        )


_SIZES = {
    3: ("(K, C/groups, T, R, S)", "4D (unbatched) or 5D"),
    2: ("(K, C/groups, R, S)", "3D (unbatched) or 4D"),
    1: ("(K, C/groups, S)", "2D (unbatched) or 3D"),
}


def _check_dims(name: str, x: torch.Tensor, w: torch.Tensor, axes: int) -> None:
    w_size, x_dims = _SIZES[axes]
    if w.dim() != axes + 2:
        raise InvalidArgument(f"weight: expected {axes + 2} dimensions {w_size}, got a weight of size {_shape(w)}")
    if x.dim() != axes + 2:
        raise InvalidArgument(f"input: expected {x_dims} (batched) input to {name}, but got {_shape(x)}")


def _check_filters(w: torch.Tensor, groups: int) -> None:
    k = w.shape[0]
    if k < groups:
        raise InvalidArgument(
            f"weight: given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {_shape(w)}"
        )
    if k % groups:
        raise InvalidArgument(
            f"weight: expected dimension 0 to be divisible by groups={groups}, but got weight of size {_shape(w)}"
        )


def _check_operands(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, channels: int, biases: int, groups: int
) -> None:
    if x.shape[1] != channels:
        raise InvalidArgument(
            f"input: given groups={groups} and weight of size {_shape(w)}, expected input "
            f"{_shape(x)} to have {channels} channels, but got {x.shape[1]} channels "
            "instead"
        )
    if min(w.shape[2:]) < 1:
        raise InvalidArgument(f"weight: expected a kernel of at least 1 x 1, got weight of size {_shape(w)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != biases):
        raise InvalidArgument(
            f"bias: given weight of size {_shape(w)}, expected bias to be 1-dimensional with {biases} "
            f"elements, but got bias of size {_shape(bias)}"
        )


def _check_types(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, t in (("weight", w), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise InvalidArgument(f"{name}: input type ({x.dtype}) and {name} type ({t.dtype}) should be the same")
        if t.device != x.device:
            raise InvalidArgument(f"{name}: expected to be on the device of input, {x.device}, got {t.device}")


def _extents(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))


def check_conv(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geom: Geom, axes: int = 0) -> None:
    """RuntimeError unless fprop(x, w, bias) is a convolution of a batched x, of as many axes as geom has; of rows with
    `axes` = 1."""
    axes = axes or geom.axes
    check_geom(geom, axes)
    _check_dims(f"conv{axes}d", x, w, axes)
    groups = geom.groups
    _check_filters(w, groups)
    _check_operands(x, w, bias, w.shape[1] * groups, w.shape[0], groups)
    padding, dilation = geom.padding[-axes:], geom.dilation[-axes:]
    padded = [n + 2 * p for n, p in zip(x.shape[2:], padding)]
    extent = [d * (n - 1) + 1 for n, d in zip(w.shape[2:], dilation)]
    for size, kernel in zip(padded, extent):
        if size < kernel:
            raise InvalidArgument(
                f"input: calculated padded input size per channel: {_extents(padded)}. "
                f"Kernel size with dilation: {_extents(extent)}. The kernel can't be greater "
                "than the padded input"
            )
    _check_types(x, w, bias)


def check_conv_transpose(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geom: Geom, output_padding: Sequence[int], axes: int
) -> None:
    """RuntimeError unless dgrad(x, w) + bias is a transposed convolution of a batched x, of rows, images or volumes."""
    check_geom(geom, axes)
    if min(output_padding[-axes:]) < 0:
        raise InvalidArgument(
            "negative output_padding is not supported, output_padding should be zero or greater: output_padding is "
            f"{tuple(output_padding[-axes:])}"
        )
    _check_dims(f"conv_transpose{axes}d", x, w, axes)
    groups = geom.groups
    _check_filters(w, groups)
    _check_operands(x, w, bias, w.shape[0], w.shape[1] * groups, groups)
    size = geom.input_size(_with_height(x.shape[2:]), _with_height(w.shape[2:]), output_padding)
    if min(size) < 1:
        raise InvalidArgument(
            f"input: given input size per channel {_extents(x.shape[2:])}, the calculated output size per channel is "
            f"{_extents(size[-axes:])}, which is too small"
        )
    _check_types(x, w, bias)


def _with_height(size: Sequence[int]) -> Sequence[int]:
    return (1, *size) if len(size) == 1 else size


def check_batch_norm(
    dtype: torch.dtype,
    k: int,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
) -> None:
    """RuntimeError unless the parameters fit a batch norm over K channels of `dtype`, as F.batch_norm has it."""
    if (mean is None) != (var is None):
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None, got "
            f"running_mean {'None' if mean is None else 'a Tensor'} and "
            f"running_var {'None' if var is None else 'a Tensor'}"
        )
    all_named = {"running_mean": mean, "running_var": var, "bn_weight": gamma, "bn_bias": beta}
    named = {name: t for name, t in all_named.items() if t is not None}
    for name, t in named.items():
        if t.dim() != 1 or t.shape[0] != k:
            raise RuntimeError(
                f"{name}: should contain {k} elements, one for each output channel, got size {_shape(t)}"
            )
    reduced = dtype in (torch.float16, torch.bfloat16)
    expected = torch.float32 if reduced and any(t.dtype is torch.float32 for t in named.values()) else dtype
    for name, t in named.items():
        if t.dtype is not expected:
            raise RuntimeError(f"{name}: expected dtype {expected} beside values of {dtype}, got {t.dtype}")


def check_more_than_one_value(y_shape: Sequence[int]) -> None:
    """ValueError when a training batch norm would see one value per channel: its variance would be 0 of 0."""
    if y_shape[0] * math.prod(y_shape[2:]) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got an output of the convolution of "
            f"size {list(y_shape)}"
        )


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_residual(residual: torch.Tensor, y_shape: Sequence[int]) -> None:
    """RuntimeError unless residual + y has the shape of y."""
    try:
        broadcast: torch.Size = torch.broadcast_shapes(residual.shape, y_shape)  # type: ignore[no-untyped-call]
        fits = broadcast == torch.Size(y_shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(
            f"residual: expected a size that broadcasts to that of the output, {list(y_shape)}, got {_shape(residual)}"
        )
