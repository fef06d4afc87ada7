"""The activations of the epilogue as torch operations: forward, and the gradient by what went in.

Both differentiate again, so the same functions serve the reference backend and the second backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_aten = torch.ops.aten


def _silu_backward(dout: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        dz: torch.Tensor = _aten.silu_backward(dout, z)
        return dz
    sigmoid = torch.sigmoid(z)  # ATen's own silu_backward cannot be differentiated
    return dout * sigmoid * (1 + z * (1 - sigmoid))


FORWARD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}

# dz from dout and z.
BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda dout, z: dout,
    "relu": lambda dout, z: _aten.threshold_backward(dout, z, 0),
    "relu6": lambda dout, z: _aten.hardtanh_backward(dout, z, 0, 6),
    "silu": _silu_backward,
    "hardswish": lambda dout, z: _aten.hardswish_backward(dout, z),
    "gelu": lambda dout, z: _aten.gelu_backward(dout, z),
}

# Overwrites its argument where ATen can.
FORWARD_: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu_,
    "relu6": lambda z: F.hardtanh_(z, 0.0, 6.0),
    "silu": lambda z: F.silu(z, inplace=True),
    "hardswish": lambda z: F.hardswish(z, inplace=True),
    "gelu": F.gelu,
}
