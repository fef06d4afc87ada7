"""Whether a layer is what its class says: the library's own code, and parameters where the class puts them.

A plan computes known layers (convolutions, batch norms, activations, ...) by itself instead of calling them. It may do
so only where a call would have run nothing but the library's code. `is_standard` says so now, and `note` notes all that
the answer rests on.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..conv_forward import own_method
from ..refusal import ForNow
from .facts import ABSENT, PLAIN, Facts

_LIBRARIES = ("torch", "torchvision", "timm", "convext")
_CODE = (
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
    "__getattribute__",
    "forward",
    "_conv_forward",
    "_check_input_dim",
)
# Where a layer's class puts its tensors: class -> (parameters, buffers), those of its bases included.
_TENSORS = {
    nn.modules.conv._ConvNd: (("weight", "bias"), ()),
    nn.Linear: (("weight", "bias"), ()),
    nn.modules.batchnorm._NormBase: (("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")),
    nn.LayerNorm: (("weight", "bias"), ()),
    nn.PReLU: (("weight",), ()),
}
_OTHER_NAMES: dict[tuple[type, str], str] = {
    (nn.Module, "__call__"): "Module._wrapped_call_impl",
    (nn.Module, "forward"): "_forward_unimplemented",
}
# What torch's layers go through, and plans pass by.
_FUNCTIONS = {
    F: "conv2d linear batch_norm layer_norm relu relu_ relu6 silu hardswish hardtanh hardsigmoid gelu sigmoid tanh "
    "leaky_relu elu mish softplus prelu dropout dropout2d max_pool2d avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d interpolate pad conv1d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm "
    "instance_norm max_pool1d max_pool3d avg_pool1d avg_pool3d",
    torch: "conv2d convolution batch_norm layer_norm relu relu_ sigmoid tanh add mul sub div mean flatten cat permute "
    "reshape",
}


def _folder(package: str) -> str:
    return os.path.dirname(cast(str, sys.modules[package].__file__)) + os.sep


def _is_torchs(found: object) -> bool:
    if isinstance(found, types.BuiltinFunctionType):
        return True
    return hasattr(found, "__code__") and found.__code__.co_filename.startswith(_folder("torch"))


# Methods of a tensor that a graph's functions stand for, by other names as well.
_METHODS = """__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__
__itruediv__ __neg__ __torch_function__ add add_ sub sub_ mul mul_ div div_ minimum maximum clamp clamp_ clip relu relu_
sigmoid sigmoid_ tanh tanh_ mean flatten reshape view permute contiguous""".split()

_AS_SHIPPED = {
    (place, name): getattr(place, name)
    for place, names in _FUNCTIONS.items()
    for name in names.split()
    if _is_torchs(getattr(place, name, None))
}
_TENSORS_METHODS = {name: getattr(torch.Tensor, name) for name in _METHODS}


@functools.lru_cache(maxsize=4096)
def _is_own(function: object, module: str, qualname: str) -> bool:
    """True of a function that a library defines there under that name."""
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__ == qualname.rpartition(".")[2]
    package = module.partition(".")[0]
    return (
        isinstance(function, types.FunctionType)
        and function.__module__ == module
        and function.__qualname__ == qualname
        and function.__closure__ is None
        and function.__code__.co_filename.startswith(_folder(package))
    )


MODULE_CALL = nn.Module.__call__  # what it is is checked in `is_original`


def is_original(kind: type) -> bool:
    """True of a class of a known library all of whose code is that library's."""
    for base in kind.__mro__:
        if base is object:
            continue
        package = base.__module__.partition(".")[0]
        if package in ("typing", "abc", "collections"):
            continue
        if package not in _LIBRARIES:
            return False
        for name in _CODE:
            found = base.__dict__.get(name)
            if found is None:
                continue
            qualname = _OTHER_NAMES.get((base, name), f"{base.__qualname__}.{name}")
            if not _is_own(found, base.__module__, qualname):
                return False
    return True


def is_standard(module: nn.Module, children: Iterable[str] = ()) -> bool:
    """True of a layer that does what its class does, and has its parameters where that class puts them. `children`: the
    names of those that its class has."""
    kind, attributes = type(module), module.__dict__
    if set(module._modules) - set(children) or not is_original(kind):
        return False
    if not _goes_by_its_library(kind):
        return False
    for name, value in attributes.items():
        if any(hasattr(type(base.__dict__.get(name)), "__set__") for base in kind.__mro__):
            return False  # a property of the class hides it
        if callable(value) and hasattr(kind, name) and not is_swaps(module, name, value):
            return False
    for base, (parameters, buffers) in _TENSORS.items():
        if isinstance(module, base):
            places: list[tuple[dict[str, Any], tuple[str, ...]]] = [
                (module._parameters, parameters),
                (module._buffers, buffers),
            ]
            return all(
                name in place and name not in attributes and not _class_has(kind, name)
                for place, names in places
                for name in names
            ) and not any(name in module._buffers for name in parameters)
    return True


def is_swaps(module: nn.Module, name: str, value: object) -> bool:
    """True of what a swap has put into this convolution's dictionary, and not into that of another whose it shares."""
    place, own = own_method(module)
    return own is not None and name == place and own is value and own.is_of(module)


def _goes_by_its_library(kind: type) -> bool:
    """True where the functions and modules that a layer's forward goes by are those of its library."""
    for name in ("forward", "_conv_forward"):
        function: Any = getattr(kind, name, None)
        for used in function.__code__.co_names if isinstance(function, types.FunctionType) else ():
            if used in function.__globals__ and not _is_of_the_library(function.__globals__[used], function):
                return False
    return True


def _is_of_the_library(found: object, function: types.FunctionType) -> bool:
    """True of what a library's function may find in its globals: a module, what the library itself or torch defines, a
    plain value."""
    if isinstance(found, types.ModuleType):
        return found is sys.modules.get(found.__name__)
    if isinstance(found, types.FunctionType):
        folders = _folder(function.__module__.partition(".")[0]), _folder("torch")
        return found.__code__.co_filename.startswith(folders)
    return isinstance(found, (type, types.BuiltinFunctionType, *PLAIN)) or type(found).__module__ == "typing"


def _class_has(kind: type, name: str) -> bool:
    return any(name in base.__dict__ for base in kind.__mro__)


def calls_forward(module: nn.Module, facts: Facts) -> bool:
    """Whether a call of a module is a call of its forward between its hooks, as nn.Module has it; notes that."""
    original = True
    for name in ("__call__", "_wrapped_call_impl", "_call_impl"):
        original &= facts.class_item(type(module), name) is nn.Module.__dict__[name]
        original &= facts.item_or_absent(module.__dict__, name) is ABSENT
    return original


def note_code(module: nn.Module, facts: Facts) -> None:
    """Notes whose code a call of a module runs, and which globals its forward goes by."""
    for name in _CODE:
        found = facts.class_item(type(module), name)
        facts.item_or_absent(module.__dict__, name)
        if name in ("forward", "_conv_forward") and isinstance(found, types.FunctionType):
            for used in found.__code__.co_names:
                if used in found.__globals__:
                    facts.item(found.__globals__, used, found.__globals__[used])


def is_of_a_library(module: nn.Module, facts: Facts) -> bool:
    """True of a module all of whose code, and of whose submodules' code, is a known library's, where nobody listens;
    notes that."""
    for part in module.modules():
        if (
            not is_original(type(part))
            or not calls_forward(part, facts)
            or any(callable(value) and hasattr(type(part), name) for name, value in part.__dict__.items())
            or any(part.__dict__[name] for name in _FORWARD_HOOKS)
        ):
            return False
        note_code(part, facts)
        facts.type(part)
        facts.contents(part._modules)
        for name in _FORWARD_HOOKS:
            facts.filled(part.__dict__, name)
    return True


_FORWARD_HOOKS = "_forward_hooks", "_forward_pre_hooks"


def note(module: nn.Module, facts: Facts) -> None:
    """Notes that a module stays as it is: its code, its settings, and which tensors it has. Which tensors they are is
    for the plan to look up in each call."""
    kind = type(module)
    note_code(module, facts)
    for name in module.__dict__:
        facts.class_item(kind, name)
    facts.contents(module.__dict__)
    for name, value in module.__dict__.items():
        if type(value) is list and name[0] != "_":  # a setting whose contents may change, such as Permute's dims
            facts.elements(value)
    facts.kinds(module._parameters)
    facts.kinds(module._buffers)
    for base, (parameters, buffers) in _TENSORS.items():
        if isinstance(module, base):
            for name in (*parameters, *buffers):
                facts.class_item(kind, name)


def note_functions(facts: Facts) -> None:
    """Notes that torch's functions are torch's. Raises ForNow where somebody has put others there."""
    for place, names in _FUNCTIONS.items():
        for name in names.split():
            found = facts.item_or_absent(place.__dict__, name)
            if found is not ABSENT and found is not _AS_SHIPPED.get((place, name)):
                raise ForNow(f"{place.__name__}.{name} has been replaced")
    for name, method in _TENSORS_METHODS.items():
        facts.class_item(torch.Tensor, name)
        if getattr(torch.Tensor, name) is not method and getattr(torch.Tensor, name) != method:
            raise ForNow(f"torch.Tensor.{name} has been replaced")
    if not is_original(nn.Module):
        raise ForNow("nn.Module's calls have been replaced")
    facts.class_item(nn.Module, "__call__")
    facts.class_item(nn.Module, "_call_impl")
