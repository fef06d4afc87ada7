"""Time of every convolution of a network together with what follows it, without hooks (which would unfuse it)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..swap import layer_by_layer

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # on a machine without a GPU the profiler complains that there is none


@dataclass
class LayerTime:
    """Seconds of one convolution and of everything up to the next one."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    seconds: float = 0.0


def layer_times(model: nn.Module, x: torch.Tensor, repeats: int = 3) -> list[LayerTime]:
    """One entry a convolution, in the order in which they run; each the fastest of `repeats` passes."""
    passes = [_one_pass(model, x) for _ in range(repeats + 1)][1:]
    fastest = passes[0]
    for other in passes[1:]:
        for best, now in zip(fastest, other, strict=True):
            best.seconds = min(best.seconds, now.seconds)
    return fastest


def _one_pass(model: nn.Module, x: torch.Tensor) -> list[LayerTime]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if x.is_cuda else [])
    recording = profile(activities=activities, record_shapes=True, acc_events=True)
    with torch.no_grad(), layer_by_layer(), recording as profiler:
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    layers: list[LayerTime] = []
    end = float("-inf")
    # A parent starts before its children and ends after them: only outermost ops are counted.
    for event in sorted(profiler.events(), key=lambda event: (event.time_range.start, -event.time_range.end)):
        if "::" not in event.name or event.time_range.end <= end:
            continue
        end = event.time_range.end
        if _is_convolution(event.name):
            x_shape, w_shape, *_ = (tuple(shape) for shape in event.input_shapes if len(shape) == 4)
            layers.append(LayerTime(x_shape, w_shape))
        if layers:
            microseconds = event.device_time_total if x.is_cuda else event.cpu_time_total
            layers[-1].seconds += microseconds * 1e-6
    return layers


def _is_convolution(op: str) -> bool:
    return op.startswith(("aten::conv", "aten::_conv")) or op.startswith("convext") and "::fprop" in op
