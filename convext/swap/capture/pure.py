"""What is known to do nothing but compute from its arguments: of C functions, torch's and the standard library's."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

BUILTINS = frozenset(
    "len range isinstance issubclass getattr hasattr callable zip enumerate sum min max abs all any sorted reversed "
    "tuple list dict set frozenset int float bool complex str iter next map filter round divmod pow slice repr format "
    "chr ord super object property".split()
)
STDLIB = frozenset(
    "collections typing functools itertools math operator _operator abc enum numbers types dataclasses "
    "_collections_abc builtins".split()
)
# They see what a stand-in hides, or change what they are given.
_NOT_PURE = frozenset("is_ is_not call setitem delitem".split())
_STATE = ("is_", "get_", "set_", "initial_seed", "manual_seed", "seed", "default_generator", "_")
_LAYERS_METHODS = frozenset(
    "__getattr__ children named_children modules named_modules __hash__ __dir__ _get_name "
    "forward _conv_forward _check_input_dim".split()
)
VALUES: tuple[type, ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    str,
    int,
    float,
    bool,
    type({}.keys()),
    type({}.items()),
    type({}.values()),
    slice,
    range,
    type(None),
    types.GeneratorType,
)


def root_of(name: object) -> str:
    """The package of a module's name."""
    return name.partition(".")[0] if isinstance(name, str) else ""


def is_library(name: object) -> bool:
    """True of a module of torch's, convext's or the standard library's."""
    return root_of(name) in ("torch", "convext") or is_stdlib(name)


def is_stdlib(name: object) -> bool:
    return root_of(name) in sys.stdlib_module_names and name != "__main__"


def is_of_layers(module: str, name: str) -> bool:
    """True of methods of torch's layers that only look, and of their forwards, which only compute."""
    return module.startswith("torch.nn.modules.") and name in _LAYERS_METHODS


def is_torchs(owner: object) -> bool:
    """True of torch's modules of functions, and of its classes and their instances."""
    names = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(owner, "__module__", None)
    return any(root_of(name) == "torch" for name in (names, type(owner).__module__))


def why_impure(function: Any) -> str | None:
    """What a C function does besides computing, in words, or None."""
    if isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
        return None
    name, owner = getattr(function, "__name__", "?"), getattr(function, "__self__", None)
    if isinstance(owner, types.ModuleType) and owner.__name__ == "builtins":
        return None if name in BUILTINS else f"calls {name}()"
    if isinstance(owner, types.ModuleType) and root_of(owner.__name__) in STDLIB:
        return f"calls {owner.__name__}.{name}()" if name in _NOT_PURE else None
    if owner is None:
        module = getattr(function, "__module__", None) or "builtins"
        return None if root_of(module) in STDLIB or root_of(module) == "torch" else f"calls {module}.{name}"
    if isinstance(owner, VALUES) or isinstance(owner, type) and issubclass(owner, VALUES):
        return None
    if is_torchs(owner):
        if name.startswith(_STATE) and not name.startswith("__"):
            return f"calls torch's {name}(), which is state of the process"
        return None
    return f"calls {name}() of {type(owner).__name__}"
