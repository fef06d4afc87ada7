"""ConvForward: what stands as `conv._conv_forward` after a swap. The layer's class and its `forward` stay torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional
from ..nn import LAST_INPUTS
from .method import InstanceMethod
from .modes import function_mode_watches

_TORCHS, _CONV2D = nn.Conv2d._conv_forward, F.conv2d
_is_tracing = torch._C._get_tracing_state


class ConvForward(InstanceMethod):
    """nn.Conv2d._conv_forward(input, weight, bias) by convext's kernels. torch's own runs where torch.export and
    TorchScript record it, where a function mode watches, and where somebody has put another in the place of it or of
    F.conv2d."""

    name = "_conv_forward"

    def is_of(self, module: nn.Module) -> bool:
        return self._owner() is module

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        conv: Any = self.owner
        if type(conv)._conv_forward is not _TORCHS or F.conv2d is not _CONV2D:
            return type(conv)._conv_forward(conv, input, weight, bias)
        if not torch.compiler.is_compiling():
            conv = self.called()
            if _is_tracing() is not None or function_mode_watches():
                return type(conv)._conv_forward(conv, input, weight, bias)
            if type(input) is torch.Tensor:
                LAST_INPUTS[conv] = input.shape, input.stride(), input.dtype, input.device
        elif torch.compiler._is_exporting_flag:  # is_exporting() is True under every torch.compile
            return type(conv)._conv_forward(conv, input, weight, bias)
        if conv.padding_mode != "zeros":
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            return functional.conv2d(input, weight, bias, conv.stride, (0, 0), conv.dilation, conv.groups)
        return functional.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
