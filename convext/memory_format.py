"""Which memory format a tensor asks for, by the rule that ATen follows when it chooses the format of an output."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

_AS_IT_IS = contextlib.nullcontext()


def suggests_channels_last(t: torch.Tensor) -> bool:
    """What `at::Tensor::suggest_memory_format` returns: True when the strides grow in the order C, W, H, N.

    Where the strides fit both formats (one channel, or one pixel) it is False, as in ATen.
    """
    sizes, strides = t.shape, t.stride()
    if len(sizes) != 4 or strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d]
        if sizes[d] > 1:
            least = least * sizes[d]
    return True


def dense_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """The strides that `torch.empty(shape, memory_format=...)` has, extents of one included."""
    _, c, h, w = (max(n, 1) for n in shape)
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def laid_out(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t with exactly those strides: t itself or a copy. `contiguous` leaves the strides of extents of one as they are,
    and DistributedDataParallel compares them all."""
    if t.stride() == dense_strides(t.shape, channels_last):
        return t
    return torch.empty_like(t, memory_format=memory_format(channels_last)).copy_(t)


def where_copied(t: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """The context in which a copy that stands in t's place is made: an inference tensor's is one, too, as autograd
    would save any other for a backward that it refuses with t itself."""
    return torch.inference_mode() if t.is_inference() and not torch.is_inference_mode_enabled() else _AS_IT_IS


def weight_gradient_is_channels_last(w: torch.Tensor, channels_last: bool) -> bool:
    """The format of dw beside an output in that format, which follows x or w: as ATen's, the same. Only where w's own
    strides fit both formats (1x1 filters, one channel) dw has w's: the other's would mean the same order, and
    DistributedDataParallel warns of strides that are not w's, as it does beside ATen's where oneDNN computes them."""
    either = w.shape[1] == 1 or w.shape[2] == w.shape[3] == 1
    return channels_last and (not either or suggests_channels_last(w))


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
