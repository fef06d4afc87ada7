"""convext: convolutions for PyTorch.

convext.conv2d(x, w, ...)            functions, with the meaning of torch.nn.functional: conv1d, conv_transpose2d, ...
convext.causal_conv1d(x, w)          depthwise, with an activation, a state and causal_conv1d_update for streams
convext.nn.Conv2d(...)               layers, drop-in for torch.nn
convext.swap(model)                  a whole model, in place
convext.backend("native"), backends  who computes, and why
convext.accuracy("strict")           which algorithms may
convext.refresh(model)               after weights were changed behind torch's back
convext.tune(model, x)               who computes is measured here, and kept; tuning("off"), explain(model, layer)
convext.output_pool(0)               how much memory of dropped results is kept for the next
convext.layer_by_layer()             no two layers of a swapped model in one call, for profilers
torch.compile(m, backend="convext")  the fusions of a swap in a compiled graph
convext.export_ops()                 torch.export records convext's operators for a swapped model
torch.ops.convext.*                  the operators
"""

from __future__ import annotations

from . import (
    autograd,
    backends,
    compiling,  # noqa: F401 (registers what a compiler sees)
    dynamo,  # noqa: F401 (registers the backend of torch.compile)
    functional,
    nn,
    ops,
    problem,
)
from .accuracy import accuracy
from .backends import backend
from .causal import causal_conv1d, causal_conv1d_update
from .functional import conv1d, conv2d, conv3d, conv_act, conv_bn_act, conv_bn_relu, depthwise_conv2d, dilated_conv2d
from .output_pool import output_pool
from .refresh import refresh

# From here on `convext.swap` and `convext.tune` are the functions, not the packages.
from .swap import export_ops, layer_by_layer, report, revert, swap, verify
from .transposed import conv_transpose1d, conv_transpose2d, conv_transpose3d
from .tune import explain, tune
from .tuning import tuning

__version__ = "0.1.0"

__all__ = [
    "accuracy",
    "autograd",
    "backend",
    "backends",
    "causal_conv1d",
    "causal_conv1d_update",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_act",
    "conv_bn_act",
    "conv_bn_relu",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "depthwise_conv2d",
    "dilated_conv2d",
    "explain",
    "export_ops",
    "functional",
    "layer_by_layer",
    "nn",
    "ops",
    "output_pool",
    "problem",
    "refresh",
    "report",
    "revert",
    "swap",
    "tune",
    "tuning",
    "verify",
]
