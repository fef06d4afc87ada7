"""The activations of the epilogue as torch operations. The kernels' definitions are in csrc/core/epilogue.h and
convext/triton/epilogue.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

_aten = torch.ops.aten


class Activation(NamedTuple):
    """One activation. What it computes differentiates again, so it serves the reference backend and the second backward
    pass as well.

    forward(z) -> out. backward(dout, z) -> dz.
    overwrite(z) -> out, over z where ATen can.
    functions, methods: of torch, that are it when called on one tensor.
    modules: torch's classes, each with the attributes for which it is.
    by_output: whether backward(dout, z) = backward(dout, out).
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    overwrite: Callable[[torch.Tensor], torch.Tensor]
    functions: tuple[Callable[..., torch.Tensor], ...] = ()
    methods: tuple[str, ...] = ()
    modules: Mapping[type[nn.Module], dict[str, Any]] = {}
    by_output: bool = False


def _silu_backward(dout: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        dz: torch.Tensor = _aten.silu_backward(dout, z)
        return dz
    sigmoid = torch.sigmoid(z)  # ATen's own silu_backward cannot be differentiated
    return dout * sigmoid * (1 + z * (1 - sigmoid))


# THE table, in the order of CONVEXT_ACTIVATIONS in epilogue.h, which is the numbering: a test compares them.
TABLE = {
    "identity": Activation(lambda z: z, lambda dout, z: dout, lambda z: z, modules={nn.Identity: {}}, by_output=True),
    "relu": Activation(
        torch.relu,
        lambda dout, z: _aten.threshold_backward(dout, z, 0),
        torch.relu_,
        (F.relu, F.relu_, torch.relu, torch.relu_),
        ("relu", "relu_"),
        {nn.ReLU: {}},
        by_output=True,
    ),
    "relu6": Activation(
        F.relu6,
        lambda dout, z: _aten.hardtanh_backward(dout, z, 0, 6),
        lambda z: F.hardtanh_(z, 0.0, 6.0),
        (F.relu6,),
        modules=dict.fromkeys((nn.ReLU6, nn.Hardtanh), {"min_val": 0, "max_val": 6}),
    ),
    "silu": Activation(F.silu, _silu_backward, lambda z: F.silu(z, inplace=True), (F.silu,), modules={nn.SiLU: {}}),
    "hardswish": Activation(
        F.hardswish,
        lambda dout, z: _aten.hardswish_backward(dout, z),
        lambda z: F.hardswish(z, inplace=True),
        (F.hardswish,),
        modules={nn.Hardswish: {}},
    ),
    "gelu": Activation(
        F.gelu,
        lambda dout, z: _aten.gelu_backward(dout, z),
        F.gelu,
        (F.gelu,),
        modules={nn.GELU: {"approximate": "none"}},
    ),
}

FORWARD = {name: entry.forward for name, entry in TABLE.items()}
BACKWARD = {name: entry.backward for name, entry in TABLE.items()}
