"""Which memory format a tensor asks for, by the rule that ATen follows when it chooses the format of an output."""

from __future__ import annotations

import torch


def suggests_channels_last(t: torch.Tensor) -> bool:
    """What `at::Tensor::suggest_memory_format` answers: True when the strides grow in the order C, W, H, N.

    Where the strides fit both formats (one channel, or one pixel) the answer is False, as in ATen.
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


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
