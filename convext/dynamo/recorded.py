"""What stands in a graph in the place of a convolution, and what is fused with it, where gradients are recorded or no
plan serves: functions that call convext's operators, for AOTAutograd to trace."""

from __future__ import annotations

from typing import Any

import torch

from .. import batch_norm, functional, transposed

_fused, _of_the_batch = torch.ops.convext.conv_bn_act.default, torch.ops.convext.conv_bn_act_train.default


def conv_bn_act(x: torch.Tensor, w: torch.Tensor, *arguments: Any, channels_last: bool) -> torch.Tensor:
    """torch.ops.convext.conv_bn_act, whose result and gradients are channels-last where x is made so. `arguments`:
    those of the operator."""
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y: torch.Tensor = _fused(x, w, *arguments)
    return y


def conv_bn_act_train(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *arguments: Any,
    momentum: float,
    channels_last: bool,
) -> torch.Tensor:
    """The same by the batch's own mean and variance, with which the running ones are updated."""
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    out: torch.Tensor
    out, y, mean, var = _of_the_batch(x, w, bias, None, None, *arguments)
    if running_mean is not None and running_var is not None:
        count = y.shape[0] * y.shape[2] * y.shape[3]
        batch_norm.update_running(running_mean, running_var, mean, var, momentum, count)
    return out


def conv1d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> torch.Tensor:
    return functional._conv1d_traced(input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> torch.Tensor:
    return functional._conv_traced(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> torch.Tensor:
    return functional._conv_traced(3, input, weight, bias, stride, padding, dilation, groups)


def _transposed(axes: int) -> Any:
    def conv_transpose(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> torch.Tensor:
        return transposed.traced(axes, input, weight, bias, stride, padding, output_padding, groups, dilation)

    conv_transpose.__name__ = conv_transpose.__qualname__ = f"conv_transpose{axes}d"
    return conv_transpose


conv_transpose1d, conv_transpose2d, conv_transpose3d = map(_transposed, (1, 2, 3))

# torch's function -> what a compiler is to see of it.
TRACED = {
    torch.conv1d: conv1d,
    torch.conv2d: conv2d,
    torch.conv3d: conv3d,
    torch.conv_transpose1d: conv_transpose1d,
    torch.conv_transpose2d: conv_transpose2d,
    torch.conv_transpose3d: conv_transpose3d,
}
