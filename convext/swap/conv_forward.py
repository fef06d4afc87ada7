"""ConvForward: what stands as `conv._conv_forward` after a swap; and TransposedForward, as `forward` of a transposed
convolution, whose class has no such method. The layer's class stays torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional
from .. import nn as convext_nn
from ..nn import LAST_INPUTS
from .method import InstanceMethod
from .modes import function_mode_watches
from .switches import export_ops

# torch's layers -> convext's
KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: convext_nn.Conv1d,
    nn.Conv2d: convext_nn.Conv2d,
    nn.Conv3d: convext_nn.Conv3d,
    nn.ConvTranspose1d: convext_nn.ConvTranspose1d,
    nn.ConvTranspose2d: convext_nn.ConvTranspose2d,
    nn.ConvTranspose3d: convext_nn.ConvTranspose3d,
}
# torch's method, the name of the function that it calls, that function, and convext's
_Seam = tuple[Any, str, Any, Any]
_CONV1D: _Seam = (nn.Conv1d._conv_forward, "conv1d", F.conv1d, functional.conv1d)
_CONV2D: _Seam = (nn.Conv2d._conv_forward, "conv2d", F.conv2d, functional.conv2d)
_CONV3D: _Seam = (nn.Conv3d._conv_forward, "conv3d", F.conv3d, functional.conv3d)
_TRANSPOSED: dict[type[nn.Module], _Seam] = {
    nn.ConvTranspose1d: (
        nn.ConvTranspose1d.forward,
        "conv_transpose1d",
        F.conv_transpose1d,
        convext_nn.ConvTranspose1d.forward,
    ),
    nn.ConvTranspose2d: (
        nn.ConvTranspose2d.forward,
        "conv_transpose2d",
        F.conv_transpose2d,
        convext_nn.ConvTranspose2d.forward,
    ),
    nn.ConvTranspose3d: (
        nn.ConvTranspose3d.forward,
        "conv_transpose3d",
        F.conv_transpose3d,
        convext_nn.ConvTranspose3d.forward,
    ),
}
_is_tracing = torch._C._get_tracing_state


class ConvForward(InstanceMethod):
    """`_conv_forward(input, weight, bias)` of an nn.Conv1d, Conv2d or Conv3d by convext's kernels. torch's own runs
    where TorchScript records it and, but for `export_ops`, torch.export, where a function mode watches, and where
    somebody has put another in the place of it or of F.conv1d, F.conv2d or F.conv3d."""

    name = "_conv_forward"

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        conv: Any = self.owner
        if isinstance(conv, nn.Conv2d):
            method, name, theirs, ours = _CONV2D
        else:
            method, name, theirs, ours = _CONV1D if isinstance(conv, nn.Conv1d) else _CONV3D
        if type(conv)._conv_forward is not method or getattr(F, name) is not theirs:
            return type(conv)._conv_forward(conv, input, weight, bias)
        if not torch.compiler.is_compiling():
            conv = self.called()
            if _is_tracing() is not None or function_mode_watches():
                return type(conv)._conv_forward(conv, input, weight, bias)
            if type(input) is torch.Tensor:
                LAST_INPUTS[conv] = input.shape, input.stride(), input.dtype, input.device
        elif torch.compiler._is_exporting_flag and not export_ops.on:  # is_exporting(): under torch.compile, too
            return type(conv)._conv_forward(conv, input, weight, bias)
        if conv.padding_mode != "zeros":
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            return ours(input, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
        return ours(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class TransposedForward(InstanceMethod):
    """`forward(input, output_size=None)` of an nn.ConvTranspose1d, 2d or 3d by convext's kernels. torch's own runs
    where `ConvForward` leaves it to run."""

    name = "forward"

    def __call__(self, input: torch.Tensor, output_size: list[int] | None = None) -> Any:
        conv: Any = self.owner
        kind = type(conv)
        method, name, theirs, ours = _TRANSPOSED[kind]
        if kind.forward is not method or getattr(F, name) is not theirs:
            return kind.forward(conv, input, output_size)
        if not torch.compiler.is_compiling():
            conv = self.called()
            if _is_tracing() is not None or function_mode_watches():
                return method(conv, input, output_size)
        elif torch.compiler._is_exporting_flag and not export_ops.on:
            return method(conv, input, output_size)
        return ours(conv, input, output_size)


def own_method(module: nn.Module) -> tuple[str, InstanceMethod | None]:
    """The method of a convolution that a swap exchanges, and what the module has in its dictionary in its place, where
    that is a swap's."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        own = module.__dict__.get("forward")
        return "forward", own if isinstance(own, TransposedForward) else None
    own = module.__dict__.get("_conv_forward")
    return "_conv_forward", own if isinstance(own, ConvForward) else None
