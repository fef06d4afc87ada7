"""Modules over convext.functional, drop-in for those of torch.nn."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from . import checks, functional, transposed

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# What each layer was last called with by itself: shape, strides, dtype and device of its input. For convext.report.
LAST_INPUTS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def _note_input(layer: torch.nn.Module, input: torch.Tensor) -> None:
    if type(input) is torch.Tensor and not torch.compiler.is_compiling():
        LAST_INPUTS[layer] = input.shape, input.stride(), input.dtype, input.device


class Conv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d, computed by convext: same arguments, parameters, state dict and repr, every `padding_mode`.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: S, or a tuple of it alone.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in torch.nn.Conv1d.

    `forward(input)`: (N, C, W) -> (N, K, Q), or (C, W) -> (K, Q). Raises ValueError, RuntimeError and TypeError where
    torch.nn.Conv1d does.

    Example:
        >>> convext.nn.Conv1d(3, 8, 3, dilation=4, padding="same")(torch.randn(2, 3, 100)).shape
        torch.Size([2, 8, 100])
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        _note_input(self, input)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv1d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d, computed by convext: same arguments, parameters, state dict and repr, every `padding_mode`.

    It adds no state of its own, so an existing layer becomes one by `layer.__class__ = convext.nn.Conv2d`, and back.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: (R, S), or one int for both.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in torch.nn.Conv2d.

    `forward(input)`: (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q). Raises ValueError, RuntimeError and
    TypeError where torch.nn.Conv2d does.

    Example:
        >>> convext.nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 8, 32, 32])
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        _note_input(self, input)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv2d(input, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
        return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv3d(torch.nn.Conv3d):
    """torch.nn.Conv3d, computed by convext: same arguments, parameters, state dict and repr, every `padding_mode`.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: (T, R, S), or one int for all.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in torch.nn.Conv3d.

    `forward(input)`: (N, C, D, H, W) -> (N, K, Z, P, Q), or (C, D, H, W) -> (K, Z, P, Q). Raises ValueError,
    RuntimeError and TypeError where torch.nn.Conv3d does.

    Example:
        >>> convext.nn.Conv3d(3, 8, 3, padding="same")(torch.randn(2, 3, 4, 16, 16)).shape
        torch.Size([2, 8, 4, 16, 16])
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        _note_input(self, input)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv3d(input, weight, bias, self.stride, (0, 0, 0), self.dilation, self.groups)
        return functional.conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class DepthwiseConv2d(Conv2d):
    """A filter for each channel: Conv2d with groups = in_channels.

    Args:
        channels: C, input channels.
        kernel_size: (R, S), or one int for both.
        multiplier: filters for each channel; the output has C * multiplier channels. Default 1.
        stride, padding, dilation, bias, padding_mode, device, dtype: as in torch.nn.Conv2d.

    `forward(input)`: (N, C, H, W) -> (N, C * multiplier, P, Q), with or without N. Raises as `Conv2d`.

    Example:
        >>> convext.nn.DepthwiseConv2d(8, 3, multiplier=2, padding="same")(torch.randn(1, 8, 14, 14)).shape
        torch.Size([1, 16, 14, 14])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        multiplier: int = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            channels,
            bias,
            padding_mode,
            device,
            dtype,
        )


class DilatedConv2d(Conv2d):
    """Conv2d with groups = 1 and a dilation of 2 by default.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: (R, S), or one int for both.
        dilation: distance between the taps of the filter in pixels, an int or (height, width); default 2.
        stride, padding, bias, padding_mode, device, dtype: as in torch.nn.Conv2d.

    `forward(input)`: (N, C, H, W) -> (N, K, P, Q), with or without N. Raises as `Conv2d`.

    Example:
        >>> convext.nn.DilatedConv2d(8, 4, 3, padding=2)(torch.randn(1, 8, 14, 14)).shape
        torch.Size([1, 4, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 2,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, padding_mode, device, dtype
        )


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d, computed by convext: same arguments, parameters, state dict and repr.

    Args:
        in_channels, out_channels: K and C: the layer is the gradient of a convolution of C channels by its input.
        kernel_size: S, or a tuple of it alone.
        stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as in
            torch.nn.ConvTranspose1d, which knows no `padding_mode` but "zeros".

    `forward(input, output_size=None)`: (N, K, Q) -> (N, C, W), or (K, Q) -> (C, W); of the sizes W that the stride
    allows, `output_size`, W or (W) or (N, C, W), names one. Raises ValueError, RuntimeError and TypeError where
    torch.nn.ConvTranspose1d does.

    Example:
        >>> layer, x = convext.nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1), torch.randn(2, 8, 50)
        >>> layer(x).shape, layer(x, output_size=[101]).shape
        (torch.Size([2, 4, 100]), torch.Size([2, 4, 101]))
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _transposed_forward(self, transposed.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, computed by convext: same arguments, parameters, state dict and repr.

    Args:
        in_channels, out_channels: K and C: the layer is the gradient of a convolution of C channels by its input.
        kernel_size: (R, S), or one int for both.
        stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as in
            torch.nn.ConvTranspose2d, which knows no `padding_mode` but "zeros".

    `forward(input, output_size=None)`: (N, K, P, Q) -> (N, C, H, W), or (K, P, Q) -> (C, H, W); of the sizes that the
    stride allows, `output_size`, (H, W) or (N, C, H, W), names one. Raises ValueError, RuntimeError and TypeError where
    torch.nn.ConvTranspose2d does.

    Example:
        >>> layer, x = convext.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1), torch.randn(2, 8, 7, 7)
        >>> layer(x).shape, layer(x, output_size=[14, 14]).shape
        (torch.Size([2, 4, 13, 13]), torch.Size([2, 4, 14, 14]))
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _transposed_forward(self, transposed.conv_transpose2d, input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d, computed by convext: same arguments, parameters, state dict and repr.

    Args:
        in_channels, out_channels: K and C: the layer is the gradient of a convolution of C channels by its input.
        kernel_size: (T, R, S), or one int for all.
        stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as in
            torch.nn.ConvTranspose3d, which knows no `padding_mode` but "zeros".

    `forward(input, output_size=None)`: (N, K, Z, P, Q) -> (N, C, D, H, W), or (K, Z, P, Q) -> (C, D, H, W); of the
    sizes that the stride allows, `output_size`, (D, H, W) or (N, C, D, H, W), names one. Raises ValueError,
    RuntimeError and TypeError where torch.nn.ConvTranspose3d does.

    Example:
        >>> layer, x = convext.nn.ConvTranspose3d(8, 4, 3, stride=2, padding=1), torch.randn(2, 8, 3, 7, 7)
        >>> layer(x).shape, layer(x, output_size=[6, 14, 14]).shape
        (torch.Size([2, 4, 5, 13, 13]), torch.Size([2, 4, 6, 14, 14]))
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _transposed_forward(self, transposed.conv_transpose3d, input, output_size)


def _transposed_forward(
    layer: Any, function: Callable[..., torch.Tensor], input: torch.Tensor, output_size: list[int] | None
) -> torch.Tensor:
    """The forward of a torch.nn.ConvTranspose1d or 2d, by `function`."""
    if layer.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for {type(layer).__name__}")
    axes = len(layer.kernel_size)
    output_padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    )
    _note_input(layer, input)
    return function(
        input, layer.weight, layer.bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    )


class ConvBNReLU(torch.nn.Module):
    """activation(batch_norm(conv(x)) + residual) as one layer.

    Holds a `conv` (convext.nn.Conv2d) and a `bn` (torch.nn.BatchNorm2d), so that its state dict reads like that of the
    two layers, and runs them as one `convext.conv_bn_act`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in torch.nn.Conv2d. Zero padding.
        bias: whether the convolution has a bias; default False, as the batch norm has one.
        activation: "relu" (default), "relu6", "silu", "hardswish", "gelu" or "identity".
        eps, momentum, affine, track_running_stats: as in torch.nn.BatchNorm2d; momentum=None averages cumulatively.
        device, dtype: of the parameters; default: torch's.
        recompute: whether the convolution's output is computed again in the backward pass instead of kept, as in
            `convext.conv_bn_act`; default False. The attribute of that name may be set at any time.

    `forward(x, residual=None)`: (N, C, H, W) -> (N, K, P, Q), or (C, H, W) -> (K, P, Q); residual, of a size that
    broadcasts to the output's, is added before the activation.

    Raises ValueError for an unknown activation, and where torch.nn.Conv2d and torch.nn.BatchNorm2d do. `forward` raises
    where `convext.conv_bn_act` does.

    Example:
        >>> layer = convext.nn.ConvBNReLU(8, 8, 3, padding=1, activation="hardswish")
        >>> x = torch.randn(2, 8, 14, 14)
        >>> layer(x, residual=x).shape
        torch.Size([2, 8, 14, 14])
        >>> sorted(layer.state_dict())[:2]
        ['bn.bias', 'bn.num_batches_tracked']
    """

    recompute = False  # of layers that were pickled before there was one

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        checks.check_activation(activation)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.bn = torch.nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation
        self.recompute = recompute

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return conv_bn_act(self.conv, self.bn, x, self.activation, residual, self.recompute)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")


def _batch_norm_arguments(
    bn: torch.nn.modules.batchnorm._BatchNorm,
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool, float, torch.Tensor | None]:
    """(running mean, running variance, whether it normalises by the batch, momentum, the count that a call counts up),
    as a batch norm's forward goes by its settings; None for what a call neither reads nor updates."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    count = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    if count is not None and bn.momentum is None:
        momentum = 1.0 / (float(count) + 1.0)
    by_batch = bn.training or bn.running_mean is None and bn.running_var is None
    update = not bn.training or bn.track_running_stats
    mean, var = (bn.running_mean, bn.running_var) if update else (None, None)
    return mean, var, by_batch, momentum, count


def conv_bn_act(
    conv: torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d,
    bn: torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d,
    x: torch.Tensor,
    activation: str,
    residual: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """activation(bn(conv(x)) + residual) of two layers as one call, counting the batch as the second's forward does.

    Whoever hooks or replaces the layers' forward is not heard here; convext.swap looks after that.

    Args:
        conv, bn: the layers; their own settings count, `bn.training` among them.
        x: (N, C, H, W) or (C, H, W); with layers of rows or volumes what those take.
        activation: as in `convext.conv_bn_act`.
        residual: added before the activation, of a size that broadcasts to the output's; or None, the default.
        recompute: as in `convext.conv_bn_act`; default False.

    Returns: (N, K, P, Q), or (K, P, Q) for one image; else as that. Raises where `convext.conv_bn_act` does.

    Example:
        >>> conv, bn = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        >>> convext.nn.conv_bn_act(conv, bn, torch.randn(2, 3, 14, 14), "relu").shape, int(bn.num_batches_tracked)
        (torch.Size([2, 8, 12, 12]), 1)
    """
    mean, var, by_batch, momentum, count = _batch_norm_arguments(bn)
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0,) * len(conv.kernel_size)
    return functional.conv_bn_act(
        x,
        conv.weight,
        conv.bias,
        mean,
        var,
        bn.weight,
        bn.bias,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        training=by_batch,
        momentum=momentum,
        eps=bn.eps,
        activation=activation,
        residual=residual,
        num_batches_tracked=count,
        recompute=recompute,
    )


# Whole modules load with torch.load(weights_only=True) where the user allows torch's own classes: these hold nothing
# that runs code when it is unpickled.
torch.serialization.add_safe_globals(
    [
        Conv1d,
        Conv2d,
        Conv3d,
        ConvTranspose1d,
        ConvTranspose2d,
        ConvTranspose3d,
        DepthwiseConv2d,
        DilatedConv2d,
        ConvBNReLU,
    ]
)
