"""Which elementwise operations a node is, as the steps of a chain (units/chain.py)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import calls
from ..units.chain import KEPT, ChainStep

if TYPE_CHECKING:
    from .graph import Graph

Steps = list[ChainStep] | None
_LARGEST = torch.finfo(torch.float32).max

# operator or function of two -> the operation, and that of its operands exchanged
_BINARY: dict[Any, tuple[str, str]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", "__add__"), ("add", "add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_", "__sub__"), ("sub", "rsub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_", "__mul__"), ("mul", "mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), ("div", "")),
    **dict.fromkeys((torch.minimum, torch.min, "minimum", "min"), ("minimum", "minimum")),
    **dict.fromkeys((torch.maximum, torch.max, "maximum", "max"), ("maximum", "maximum")),
}
# Which take no numbers: torch.min and torch.max take one for a dimension.
_OF_TENSORS = (
    *(torch.minimum, torch.min, "minimum", "min"),
    *(torch.maximum, torch.max, "maximum", "max"),
)
# function or method of one -> the operation
_UNARY: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    **{F.silu: "silu", F.hardswish: "hardswish", F.hardsigmoid: "hardsigmoid", F.mish: "mish"},
}
_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Mish: "mish",
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def step_of(graph: Graph, node: fx.Node, value: fx.Node) -> Steps:
    """The steps that a node does to `value`, which it reads once; None where it does anything else."""
    if node.all_input_nodes.count(value) != 1 or _occurrences(node, value) != 1:
        return None
    if node.op == "call_module":
        module = graph.module(node)
        return None if module is None else _of_module(module)
    if node.op not in ("call_function", "call_method"):
        return None
    return _of_two(graph, node, value) if node.target in _BINARY else _of_one(graph, node, value)


def _occurrences(node: fx.Node, value: fx.Node) -> int:
    """How often a value stands among the arguments of a node, other than in containers."""
    return [*node.args, *node.kwargs.values()].count(value)


def _number(value: Any) -> bool:
    """True of what torch takes for a number and float32 holds as it is, or rounds once; it refuses larger ones."""
    if type(value) is float:
        return not _LARGEST < abs(value) < math.inf
    return type(value) is int and abs(value) <= 1 << 24


def step_with(graph: Graph, node: fx.Node, value: fx.Node, kept: fx.Node) -> Steps:
    """The step of a node that reads `value` and what was kept, each once; None where it does anything else."""
    if node.op not in ("call_function", "call_method") or node.target not in _BINARY or node.kwargs:
        return None
    if len(node.args) != 2 or set(node.args) != {value, kept} or calls.writes_first_argument(node, graph.modules):
        return None
    operation = _BINARY[node.target][node.args[0] is not value]
    return [ChainStep(operation, KEPT)] if operation else None


def _of_two(graph: Graph, node: fx.Node, value: fx.Node) -> Steps:
    if node.kwargs or len(node.args) != 2:
        return None
    first = node.args[0] is value
    other: Any = node.args[1] if first else node.args[0]
    operation = _BINARY[node.target][not first]
    made = tensor_of_number(other, value)
    operand = made.args[0] if made else other if _number(other) else graph.place(other)
    writes = calls.writes_first_argument(node, graph.modules)
    if not operation or operand is None or writes and not first or node.target in _OF_TENSORS and _number(other):
        return None
    return [ChainStep(operation, operand)]


def tensor_of_number(node: Any, value: fx.Node) -> Any:
    """`node` where it is torch.tensor(number), with value.device, value.dtype, both or neither, and all of that is read
    for this alone: beside a float32 `value` that is the number. Else None."""
    if not isinstance(node, fx.Node) or node.target is not torch.tensor or len(node.users) != 1:
        return None
    if len(node.args) != 1 or not _number(node.args[0]) or set(node.kwargs) - {"device", "dtype"}:
        return None
    for name, asked in node.kwargs.items():
        if not isinstance(asked, fx.Node) or asked.target is not getattr or asked.args != (value, name):
            return None
        if len(asked.users) != 1:
            return None
    return node


def _of_module(module: nn.Module) -> Steps:
    """The steps of a layer of torch's; its settings are facts of the plan."""
    kind, has = type(module), module.__dict__.get
    if kind in _MODULES:
        return [ChainStep(_MODULES[kind])]
    if kind in (nn.Hardtanh, nn.ReLU6):
        return _bounded(has("min_val"), has("max_val"))
    if kind is nn.LeakyReLU and _number(has("negative_slope")):
        return [ChainStep("leaky_relu", module.negative_slope)]  # type: ignore[arg-type]
    if kind is nn.ELU and _number(has("alpha")):
        return [ChainStep("elu", module.alpha)]  # type: ignore[arg-type]
    if kind is nn.GELU and has("approximate") in _GELU:
        return [ChainStep(_GELU[module.approximate])]  # type: ignore[index]
    if kind is nn.Softplus and (has("beta"), has("threshold")) == (1, 20):
        return [ChainStep("softplus")]
    if kind is nn.PReLU:
        return [ChainStep("leaky_relu", (module._parameters, "weight"))]
    return None


def _clamp(low: object, high: object) -> Steps:
    """z >= low, then z <= high, which is `high` where they cross, as torch's is."""
    bounds = [("clamp_min", low), ("clamp_max", high)]
    if all(bound is None for _, bound in bounds) or not all(b is None or _number(b) for _, b in bounds):
        return None
    return [ChainStep(operation, bound) for operation, bound in bounds if bound is not None]  # type: ignore[arg-type]


def _bounded(low: Any, high: Any) -> Steps:
    """hardtanh's, which raises where its bounds cross."""
    if not (_number(low) and _number(high) and low <= high):
        return None
    return [ChainStep("hardtanh_min", low), ChainStep("hardtanh_max", high)]


def _of_one(graph: Graph, node: fx.Node, value: fx.Node) -> Steps:
    """The steps of a function whose first argument is the value."""
    target, rest, given = node.target, list(node.args[1:]), dict(node.kwargs)
    if not node.args or node.args[0] is not value:
        return None
    if type(given.get("inplace")) is bool:
        del given["inplace"]
    if target in _UNARY:
        return [ChainStep(_UNARY[target])] if not rest and not given else None

    def settings(**defaults: Any) -> list[Any] | None:
        """What stands behind the first argument, by these names in this order."""
        if len(rest) > len(defaults) or set(given) - set(defaults):
            return None
        found = {**defaults, **dict(zip(defaults, rest)), **given}
        return list(found.values())

    reader = _SETTINGS.get(target)
    return None if reader is None else reader(settings)


def _leaky_relu(settings: Callable[..., list[Any] | None]) -> Steps:
    found = settings(negative_slope=0.01, inplace=False)
    return [ChainStep("leaky_relu", found[0])] if found and _number(found[0]) else None


def _elu(settings: Callable[..., list[Any] | None]) -> Steps:
    found = settings(alpha=1.0, inplace=False)
    return [ChainStep("elu", found[0])] if found and _number(found[0]) else None


def _gelu(settings: Callable[..., list[Any] | None]) -> Steps:
    found = settings(approximate="none")
    return [ChainStep(_GELU[found[0]])] if found and found[0] in _GELU else None


def _softplus(settings: Callable[..., list[Any] | None]) -> Steps:
    return [ChainStep("softplus")] if settings(beta=1, threshold=20) == [1, 20] else None


def _hardtanh(settings: Callable[..., list[Any] | None]) -> Steps:
    found = settings(min_val=-1.0, max_val=1.0, inplace=False)
    return _bounded(*found[:2]) if found else None


def _clamped(settings: Callable[..., list[Any] | None]) -> Steps:
    found = settings(min=None, max=None)
    return _clamp(*found) if found else None


_SETTINGS: dict[Any, Callable[..., Steps]] = {
    F.relu6: lambda settings: _bounded(0, 6) if settings(inplace=False) else None,
    **{F.leaky_relu: _leaky_relu, F.elu: _elu, F.gelu: _gelu, F.softplus: _softplus, F.hardtanh: _hardtanh},
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", "clip"), _clamped),
}
