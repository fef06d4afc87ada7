"""ConvForward: what stands as `conv._conv_forward` after a swap. The layer's class and its `forward` stay torch's."""

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

# torch's layers -> convext's: those that a swap exchanges, and all
KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: convext_nn.Conv1d, nn.Conv2d: convext_nn.Conv2d}
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    **KINDS,
    nn.ConvTranspose1d: convext_nn.ConvTranspose1d,
    nn.ConvTranspose2d: convext_nn.ConvTranspose2d,
}
# torch's method, the name of the function that it calls, that function, and convext's
_CONV1D = nn.Conv1d._conv_forward, "conv1d", F.conv1d, functional.conv1d
_CONV2D = nn.Conv2d._conv_forward, "conv2d", F.conv2d, functional.conv2d
_is_tracing = torch._C._get_tracing_state


class ConvForward(InstanceMethod):
    """`_conv_forward(input, weight, bias)` of an nn.Conv1d or nn.Conv2d by convext's kernels. torch's own runs where
    torch.export and TorchScript record it, where a function mode watches, and where somebody has put another in the
    place of it or of F.conv1d or F.conv2d."""

    name = "_conv_forward"

    def is_of(self, module: nn.Module) -> bool:
        return self._owner() is module

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        conv: Any = self.owner
        method, name, theirs, ours = _CONV1D if isinstance(conv, nn.Conv1d) else _CONV2D
        if type(conv)._conv_forward is not method or getattr(F, name) is not theirs:
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
            return ours(input, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
        return ours(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
