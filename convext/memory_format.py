"""Which memory format a tensor asks for, by the rule that ATen follows when it chooses the format of an output."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .problem import Geom

_AS_IT_IS = contextlib.nullcontext()


_ORDERS = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def suggests_channels_last(t: torch.Tensor) -> bool:
    """What `at::Tensor::suggest_memory_format` returns: True when the strides grow in the order C, W, H, N of an image,
    C, W, H, D, N of a volume.

    Where the strides fit both formats (one channel, or one pixel) it is False, as in ATen.
    """
    sizes, strides = t.shape, t.stride()
    order = _ORDERS.get(len(sizes))
    if order is None or strides[1] == 0:
        return False
    least = 0
    for d in order:
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
    _, c, *size = (max(n, 1) for n in shape)
    axes = len(size)
    steps = [math.prod(size[axis + 1 :]) for axis in range(axes)]  # from a pixel to the next along each axis
    pixels = steps[0] * size[0]
    return (c * pixels, 1, *(c * step for step in steps)) if channels_last else (c * pixels, pixels, *steps)


def laid_out(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t with exactly those strides: t itself or a copy. `contiguous` leaves the strides of extents of one as they are,
    and DistributedDataParallel compares them all."""
    if t.stride() == dense_strides(t.shape, channels_last):
        return t
    return torch.empty_like(t, memory_format=memory_format(channels_last, t.dim())).copy_(t)


def where_copied(t: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """The context in which a copy that stands in t's place is made: an inference tensor's is one, too, as autograd
    would save any other for a backward that it refuses with t itself."""
    return torch.inference_mode() if t.is_inference() and not torch.is_inference_mode_enabled() else _AS_IT_IS


def weight_gradient_is_channels_last(w: torch.Tensor, channels_last: bool) -> bool:
    """The format of dw beside an output in that format, which follows x or w: as ATen's, the same. Only where w's own
    strides fit both formats (1x1 filters, one channel) dw has w's: the other's would mean the same order, and
    DistributedDataParallel warns of strides that are not w's, as it does beside ATen's where oneDNN computes them."""
    return channels_last and (not fits_both_formats(w.shape) or suggests_channels_last(w))


def fits_both_formats(shape: Sequence[int]) -> bool:
    """Of one channel, or of one pixel: dense tensors are in both formats."""
    return shape[1] == 1 or all(n == 1 for n in shape[2:])


def memory_format(channels_last: bool, dims: int = 4) -> torch.memory_format:
    """Of an image, or with 5 dimensions of a volume."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def volume_is_channels_last(
    x: torch.Tensor, w: torch.Tensor, geom: Geom, output_padding: Sequence[int] | None = None
) -> bool:
    """The format of the result of a convolution of volumes, and of its gradients; of a transposed one with
    `output_padding`. ATen's kernels for those disagree, so that it follows from which of them ATen would take: oneDNN's
    keep the format of x or w, its own return contiguous tensors. A compiler and torch.func see the former rule."""
    if not (suggests_channels_last(x) or suggests_channels_last(w)):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    stride, padding, dilation, groups = geom
    transposed = output_padding is not None
    longer = output_padding if transposed else (0,) * len(stride)
    try:
        backend = torch._C._select_conv_backend(x, w, None, stride, padding, dilation, transposed, longer, groups)
        chosen = torch._C._conv_determine_backend_memory_format(x, w, backend)
    except RuntimeError:  # no convolution, as the checks are going to explain
        return True
    return bool(chosen == torch.channels_last_3d)
