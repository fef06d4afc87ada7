"""convext.swap: a whole model's convolutions, in place.

    swap(model)            exchanges them and plans fused calls
    revert(model)          puts everything back
    report(model)          what became of each layer, and why
    verify(model, sample)  runs it both ways and says how far apart they are

A swap changes two things only. A layer whose type is exactly torch.nn.Conv1d, 2d or 3d gets a `_conv_forward` in its
instance dictionary that calls convext's kernels, and one of torch.nn.ConvTranspose1d, 2d or 3d a `forward`: class,
parameters, hooks and keys stay. A container gets a `forward` there that runs the same calls as its class's with each
2-D convolution, batch norm, add and activation as one, and what follows another convolution as one.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from .conv_forward import ConvForward, TransposedForward
from .planned import PlannedForward
from .report import Report, report
from .swapping import revert, swap
from .switches import export_ops, layer_by_layer
from .verify import Verification, verify

__all__ = ["Report", "Verification", "export_ops", "layer_by_layer", "report", "revert", "swap", "verify"]

# Nothing but who their module is.
torch.serialization.add_safe_globals([ConvForward, PlannedForward, TransposedForward])


class _CallableModule(types.ModuleType):
    """`convext.swap` is the function; the import system puts this module there when somebody imports a part of it."""

    def __call__(self, model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
        return swap(model, **settings)


sys.modules[__name__].__class__ = _CallableModule
