"""What is known of torch's functions, methods and modules: one table for each question that a plan asks."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import nn as convext_nn
from ..activation import TABLE as ACTIVATIONS
from .conv_forward import KINDS, own_method

Modules = Mapping[Any, Any]  # those that a graph's nodes call, by their targets; None is the owner of the graph
_CONV_TYPE = nn.Conv2d
_OURS = frozenset(KINDS.values())

# what computes an activation -> its name in the epilogue, and the attributes for which a module is it
_ACTIVATION_MODULES = {
    module: (name, attributes) for name, entry in ACTIVATIONS.items() for module, attributes in entry.modules.items()
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    function: name for name, entry in ACTIVATIONS.items() for function in entry.functions
}
_ACTIVATION_METHODS: dict[Any, str] = {method: name for name, entry in ACTIVATIONS.items() for method in entry.methods}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}
_PRODUCT_METHODS = {"mul", "__mul__"}

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# Same values whatever the strides of the input, and a contiguous result from contiguous inputs; none of them returns
# a view that user code could write through.
_ELEMENTWISE_MODULES = (
    *_ACTIVATION_MODULES,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Tanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Mish,
    nn.Softplus,
    nn.PReLU,
    nn.LogSigmoid,
    nn.Softsign,
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SPATIAL_MODULES = (
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d,
)
_ELEMENTWISE_FUNCTIONS = {
    *_ACTIVATION_FUNCTIONS,
    F.hardtanh,
    F.sigmoid,
    torch.sigmoid,
    F.hardsigmoid,
    torch.tanh,
    F.tanh,
    F.leaky_relu,
    F.elu,
    F.mish,
    F.softplus,
}
_ARITHMETIC = {
    operator.add,
    operator.iadd,
    operator.sub,
    operator.isub,
    operator.mul,
    operator.imul,
    operator.truediv,
    operator.itruediv,
    operator.neg,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
}
_POOLING = {F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_SPATIAL_FUNCTIONS = _POOLING | {F.interpolate}
_CAT = {torch.cat, torch.concat, torch.concatenate}
_ELEMENTWISE_METHODS = {
    "relu",
    "relu_",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "add",
    "add_",
    "sub",
    "sub_",
    "mul",
    "mul_",
    "div",
    "div_",
}
METADATA_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "get_device"}
METADATA_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}

_TENSOR_FUNCTIONS = (
    _ELEMENTWISE_FUNCTIONS
    | _ARITHMETIC
    | _SPATIAL_FUNCTIONS
    | _CAT
    | {
        torch.flatten,
        torch.mean,
        F.dropout,
        F.conv2d,
        F.linear,
        F.batch_norm,
        F.layer_norm,
        torch.stack,
        F.pad,
        torch.reshape,
        torch.permute,
        torch.transpose,
    }
)
_TENSOR_METHODS = _ELEMENTWISE_METHODS | {
    "view",
    "reshape",
    "flatten",
    "contiguous",
    "mean",
    "permute",
    "transpose",
    "to",
    "float",
    "half",
    "double",
    "detach",
    "clone",
    "unsqueeze",
    "squeeze",
}
_NOT_ONE_TENSOR = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.AdaptiveLogSoftmaxWithLoss)


def is_torch_module(module: nn.Module) -> bool:
    """True of torch's own layers, whose behaviour is known; False of user classes and containers."""
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def module_returns_tensor(module: nn.Module) -> bool:
    """True of a layer that returns one tensor for one."""
    if is_layer_norm_2d(module) or permutation_of(module) is not None or is_known_dropout(module):
        return True
    return (
        (is_torch_module(module) or type(module) in _OURS)
        and not isinstance(module, _NOT_ONE_TENSOR)
        and not getattr(module, "return_indices", False)
    )


def last_input(module: nn.Module) -> tuple[Any, ...] | None:
    """Shape, strides, dtype and device of the last input of a convolution called by itself, or None."""
    return convext_nn.LAST_INPUTS.get(module)


def is_swapped(module: nn.Module) -> bool:
    """True of a convolution that convext computes when it is called by itself."""
    return own_method(module)[1] is not None or type(module) in _OURS


def is_conv(module: nn.Module) -> bool:
    """A 2-D convolution that a plan computes: exactly torch's class, or already ours."""
    return type(module) is _CONV_TYPE or type(module) is convext_nn.Conv2d


class BatchNormOf:
    """function(x) of a layer that is a batch norm and more: the batch norm, by the layer's own code and not that of
    nn.BatchNorm2d, which somebody may replace. `key`: of the layer."""

    __name__ = "batch_norm_of"

    def __init__(self, layer: nn.BatchNorm2d, key: str):
        self.layer, self.key = layer, key

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # As the layer says it.
        if x.dim() != 4:  # as the layer says it
            raise AssertionError(f"expected 4D input (got {x.dim()}D input)")
        mean, var, by_batch, momentum, count = convext_nn._batch_norm_arguments(self.layer)
        if count is not None:
            count.add_(1)
        return F.batch_norm(x, mean, var, self.layer.weight, self.layer.bias, by_batch, momentum, self.layer.eps)


def is_batch_norm_act(module: nn.Module) -> bool:
    """True of timm's BatchNorm2d with a dropout and an activation in it, as children of these names."""
    return (
        type(module).__name__ == "BatchNormAct2d"
        and type(module).__module__.startswith("timm.layers")
        and set(module._modules) == {"drop", "act"}
    )


# Functions that take parameters -> names and defaults of what they take after their first argument.
NEEDED = object()
_PARAMETERS: dict[Any, dict[str, Any]] = {
    F.conv2d: {"weight": NEEDED, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    F.batch_norm: {
        "running_mean": NEEDED,
        "running_var": NEEDED,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
    },
    F.linear: {"weight": NEEDED, "bias": None},
    F.layer_norm: {"normalized_shape": NEEDED, "weight": None, "bias": None, "eps": 1e-5},
}


def takes_parameters(function: Any) -> bool:
    """True of a function of `_PARAMETERS`."""
    return function in _PARAMETERS


def arguments_of(node: fx.Node, function: Callable[..., torch.Tensor]) -> list[Any] | None:
    """What a node that calls one of these functions on another node gives it besides, or None of any other node."""
    if node.op != "call_function" or node.target is not function or not node.args:
        return None
    wanted, (first, *given) = _PARAMETERS[function], node.args
    if not isinstance(first, fx.Node) or len(given) > len(wanted) or set(node.kwargs) - set(wanted):
        return None
    values = {**wanted, **dict(zip(wanted, given)), **node.kwargs}
    return None if NEEDED in values.values() or first in values.values() else list(values.values())


def returns_tensor(node: fx.Node) -> bool:
    """True where the result of a call_function or call_method node is one tensor for certain."""
    if node.op == "call_function":
        known = node.target in _TENSOR_FUNCTIONS or type(node.target) is BatchNormOf
        return known and not node.kwargs.get("return_indices", False)
    return node.target in _TENSOR_METHODS


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def activation(node: fx.Node, modules: Modules) -> str | None:
    """The epilogue's name of the activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        module = modules[node.target]
        name, attributes = _ACTIVATION_MODULES.get(type(module), (None, {}))
        if any(getattr(module, attribute) != value for attribute, value in attributes.items()):
            return None
        return name if len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(node.target) if len(node.args) == 1 and not node.kwargs else None
    if node.op != "call_function":
        return None
    if node.target is F.hardtanh:
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
        return "relu6" if (low, high) == (0, 6) else None
    if node.target is F.gelu and node.kwargs.get("approximate", "none") != "none":
        return None
    return _ACTIVATION_FUNCTIONS.get(node.target)


def summands(node: fx.Node) -> tuple[Any, ...] | None:
    """(a, b) of a node that computes a + b of two nodes, else None."""
    known = (
        node.target in _ADD_FUNCTIONS
        if node.op == "call_function"
        else node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not known or node.kwargs or len(node.args) != 2 or len(node.all_input_nodes) != 2:
        return None
    return tuple(node.args)


def is_product(node: fx.Node) -> bool:
    """True of a node that computes a * b of two arguments."""
    return not node.kwargs and (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "mul"
        or node.op == "call_method"
        and node.target in _PRODUCT_METHODS
    )


def mean_over_pixels(node: fx.Node, modules: Modules) -> bool | None:
    """True where a node computes the mean over the pixels of its only tensor as (N, C), False where as (N, C, 1, 1),
    None of another node."""
    if not node.args or len(node.all_input_nodes) != 1 or node.args[0] is not node.all_input_nodes[0]:
        return None
    if node.op == "call_module":
        module = modules[node.target]
        known = type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)) and len(node.args) == 1
        return False if known else None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        return False if argument(node, 1, "output_size") in (1, (1, 1), [1, 1]) else None
    if (node.op, node.target) not in (("call_function", torch.mean), ("call_method", "mean")):
        return None
    if not _mean_over_space(node) or set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
        return None
    return not argument(node, 2, "keepdim", False)


def is_layer_norm_2d(module: nn.Module) -> bool:
    """True of torchvision's and timm's LayerNorm over the channels of an image, (N, C, H, W) in and out."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).__name__ == "LayerNorm2d"
        and type(module).__module__.startswith(("torchvision.models.convnext", "timm.layers"))
    )


def permutation_of(module: Any) -> tuple[int, ...] | None:
    """The order in which torchvision's Permute puts the dimensions of its argument; None of another module."""
    known = type(module).__name__ == "Permute" and type(module).__module__.startswith("torchvision.ops")
    return tuple(module.dims) if known else None


def writes_first_argument(node: fx.Node, modules: Modules) -> bool:
    """True where a node changes its first argument in place (or may, as far as is known)."""
    target: Any = node.target
    if node.op == "call_method":
        return (
            target.endswith("_")
            and not target.endswith("__")
            or target.startswith("__i")
            or target in ("__setitem__", "__delitem__")
        )
    if node.op == "call_function":
        return (
            "out" in node.kwargs or _name(target).endswith("_") or _is_inplace_operator(target) or _inplace_flag(node)
        )
    if node.op == "call_module":
        module = modules[node.target]
        if not is_torch_module(module) and type(module) not in _OURS:
            return True
        return bool(getattr(module, "inplace", False))
    return False


def _name(function: object) -> str:
    return getattr(function, "__name__", "_")


def _is_inplace_operator(function: object) -> bool:
    return (
        getattr(function, "__module__", "") == "_operator"
        and _name(function).startswith("i")
        and hasattr(operator, f"__{_name(function)}__")
    )


def _inplace_flag(node: fx.Node) -> bool:
    target: Any = node.target
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace", False))
    position = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return bool(argument(node, position, "inplace", False))


def written(node: fx.Node, modules: Modules) -> list[fx.Node]:
    """The nodes whose values a node changes or may change."""
    if node.op == "call_function" and node.target is F.batch_norm and argument(node, 5, "training", False) is not False:
        statistics = argument(node, 1, "running_mean"), argument(node, 2, "running_var")
        return [value for value in statistics if isinstance(value, fx.Node)]
    if node.op == "call_function" and _mutates(node.target):
        return node.all_input_nodes
    if not writes_first_argument(node, modules):
        return []
    if node.op == "call_module" and not is_torch_module(modules[node.target]) or "out" in node.kwargs:
        return node.all_input_nodes
    return node.all_input_nodes[:1]


def _mutates(function: Any) -> bool:
    """True of an operator whose schema says that it writes an argument: of torch.ops, or of torch.library.custom_op."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        names: list[str] = function.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(function, name) for name in names]
    else:
        overloads = [
            function if isinstance(function, torch._ops.OpOverload) else getattr(function, "_opoverload", None)
        ]
    return any(overload is not None and overload._schema.is_mutable for overload in overloads)


def is_known(node: fx.Node) -> bool:
    """True of the call of a function that is known to write nothing but what `written` says."""
    function: Any = node.target
    return (
        function in _TENSOR_FUNCTIONS
        or getattr(function, "__module__", "") in ("_operator", "builtins", "collections")
        or type(function) is BatchNormOf
        or function in (torch.matmul, torch.einsum, F.group_norm, F.prelu)
    )


def shared_arguments(node: fx.Node, modules: Modules) -> list[Any]:
    """The arguments of a node with which its result may share memory: none where it makes a new tensor, the first alone
    where it is known to write a tensor and to return it, else all."""
    if makes_new_tensor(node, modules):
        return []
    known = (
        node.op == "call_function"
        and node.target in _ELEMENTWISE_FUNCTIONS | _ARITHMETIC
        or node.op == "call_method"
        and node.target in _ELEMENTWISE_METHODS
    )
    if known and "out" not in node.kwargs and node.args and _is_tensor(node.args[0], modules):
        return list(node.args[:1])
    return node.all_input_nodes


def _is_tensor(value: object, modules: Modules) -> bool:
    """True of a node whose value is one tensor whatever the containers do that the graph calls."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_module":
        return modules[value.target] is not None and module_returns_tensor(modules[value.target])
    return value.op in ("placeholder", "get_attr") or returns_tensor(value)


def makes_new_tensor(node: fx.Node, modules: Modules) -> bool:
    """True where the result surely shares no memory with the arguments."""
    if writes_first_argument(node, modules):
        return False
    if node.op == "call_module":
        module = modules[node.target]
        return (
            type(module) in KINDS
            or type(module) in _OURS
            or type(module) is not nn.Identity
            and type(module) in _ELEMENTWISE_MODULES
            or type(module) in (*_SPATIAL_MODULES, *BATCH_NORMS)
            or type(module) in (nn.Linear, nn.LayerNorm)
            or is_layer_norm_2d(module)
        )
    if node.op == "call_function":
        known = _ELEMENTWISE_FUNCTIONS | _ARITHMETIC | _CAT | _SPATIAL_FUNCTIONS | _PARAMETERS.keys()
        return node.target in known or type(node.target) is BatchNormOf
    return node.op == "call_method" and node.target in _ELEMENTWISE_METHODS


def is_dropout(module: nn.Module) -> bool:
    return (
        isinstance(module, _DROPOUT)
        and type(module).__module__.startswith("torch.nn.modules.")
        or type(module).__name__ in ("StochasticDepth", "DropPath", "DropBlock2d", "DropBlock2D")
    )


def is_known_dropout(module: nn.Module) -> bool:
    """Dropout that is certain to return its very argument in evaluation."""
    return (
        type(module) in _DROPOUT
        or type(module).__module__.startswith(("torchvision.ops", "timm.layers"))
        and is_dropout(module)
    )


def passes_through(node: fx.Node, modules: Modules) -> bool:
    """True of a dropout that returns its first argument as it is; its training flag is part of what a plan is for.
    Dropout1d does not: it minds the number of dimensions. Identities are no nodes (capture/trace.py)."""
    if node.op == "call_module":
        module = modules[node.target]
        if len(node.args) != 1 or node.kwargs:
            return False
        passes = is_known_dropout(module) and type(module) is not nn.Dropout1d and not module.training
        return passes and _is_share(_probability(module))
    return (
        node.op == "call_function"
        and node.target in (F.dropout, F.dropout2d)
        and len(node.args) > 0
        and argument(node, 2, "training", True) is False
        and _is_share(argument(node, 1, "p", 0.5))
    )


def _probability(module: nn.Module) -> Any:
    """That by which a dropout drops; None where it raises for another reason."""
    if type(module).__name__ == "DropPath":
        return 0.0  # which in evaluation looks at nothing
    if type(module).__name__ == "StochasticDepth" and module.mode not in ("batch", "row"):
        return None
    return next((getattr(module, name) for name in ("p", "drop_prob") if hasattr(module, name)), None)


def _is_share(value: Any) -> bool:
    """True of what dropout takes: a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def reads_any_strides(node: fx.Node, modules: Modules) -> bool:
    """True where a node does the same to a channels-last tensor as to a contiguous one (see layout.py)."""
    if node.op == "call_module":
        module = modules[node.target]
        return (  # no dropout's: it draws its mask in the order of memory
            type(module) in _ELEMENTWISE_MODULES
            or is_conv(module)
            or type(module) in _SPATIAL_MODULES
            and not getattr(module, "return_indices", False)
        )
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] in METADATA_ATTRIBUTES
        if node.target in _CAT:
            return argument(node, 1, "dim", 0) == 1
        if node.target is torch.mean:
            return _mean_over_space(node)
        return (
            "out" not in node.kwargs
            and not node.kwargs.get("return_indices", False)
            and node.target in _ELEMENTWISE_FUNCTIONS | _ARITHMETIC | _SPATIAL_FUNCTIONS
            or type(node.target) is BatchNormOf
        )
    if node.op == "call_method":
        return (
            node.target in _ELEMENTWISE_METHODS | METADATA_METHODS or node.target == "mean" and _mean_over_space(node)
        )
    return False


def _mean_over_space(node: fx.Node) -> bool:
    dims = argument(node, 1, "dim")
    return isinstance(dims, (list, tuple)) and sorted(dims) in ([2, 3], [-2, -1])
