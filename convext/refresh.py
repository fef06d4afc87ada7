"""Packed weights packed anew, where they changed in a way that is noticed late."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .backends import native

_Weights = TypeVar("_Weights", bound=nn.Module | torch.Tensor)


def refresh(model: _Weights) -> _Weights:
    """Has the weights of a model packed anew at their next use.

    Kernels on the CPU read weights in an order of their own, which is kept from call to call. That weights have changed
    is noticed by itself, at once where torch or the whole filter shows it, but where single elements are written behind
    torch's back (through `weight.data`, a NumPy array, shared memory) only after up to as many calls as a filter has
    lines of 64 bytes. After such a change, this makes the next call see it. It costs what packing costs, once. On CUDA
    nothing is kept, and nothing is to be done.

    Args:
        model: a module, whose parameters and buffers are meant, or one tensor. Swapped or not, it stays as it is.

    Returns: the model.

    Raises TypeError if it is neither.

    Example:
        >>> conv, x = convext.nn.Conv2d(64, 64, 3), torch.randn(1, 64, 16, 16)
        >>> y = conv(x)
        >>> conv.weight.data[0, 0, 0, 0] += 100
        >>> conv = convext.refresh(conv)
        >>> bool((conv(x) - y).abs().max() > 1)
        True
    """
    if isinstance(model, nn.Module):
        for t in (*model.parameters(), *model.buffers()):
            _forget(t)
    elif isinstance(model, torch.Tensor):
        _forget(model)
    else:
        raise TypeError(f"refresh: model must be an nn.Module or a Tensor, got {type(model).__name__}")
    return model


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A fused optimizer writes parameters behind torch's back: their version counters stay as they are (those of
    torch.optim with `fused=True`, those of others that step in a library of their own). And what it leaves alone,
    channels or taps without a gradient, may be the very lines that a call compares."""
    theirs = not type(optimizer).__module__.startswith("torch.optim.")
    for group in optimizer.param_groups:
        if theirs or group.get("fused"):
            for p in group["params"]:
                _forget(p)


register_optimizer_step_post_hook(_after_step)


def _forget(t: torch.Tensor) -> None:
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            _forget(getattr(t, name))
    elif t.layout is torch.strided and t.device.type == "cpu":
        native.forget_packed(t)
