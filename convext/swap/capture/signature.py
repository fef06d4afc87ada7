"""The form of one call to a container: which arguments are tensors, which hold tensors, which are plain values.

Two calls of the same signature take the same path through a traceable forward, so a plan is made per signature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Kind = Any  # hashable, of one argument: see `kind`
Signature = tuple[tuple[Kind, ...], tuple[tuple[str, Kind], ...]]  # of the arguments by position and by name

TENSOR = "tensor"
_PLAIN = (bool, int, float, str)
# A subclass may give conv2d, add or relu another meaning; only these are known not to.
TENSOR_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def kind(value: Any) -> Kind:
    """Hashable description of one argument, or None for what no plan can be made for."""
    if type(value) in TENSOR_TYPES:
        return TENSOR
    if value is None or type(value) in _PLAIN:
        return (type(value), value, math.copysign(1.0, value)) if type(value) is float else (type(value), value)
    if type(value) in (list, tuple) and all(type(item) in TENSOR_TYPES for item in value):
        return (type(value), len(value), TENSOR)
    return None


def of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature | None:
    """(kinds of args, names and kinds of kwargs), or None."""
    if not kwargs and len(args) == 1 and type(args[0]) in TENSOR_TYPES:
        return ONE_TENSOR
    kinds = tuple(map(kind, args))
    named = tuple((name, kind(value)) for name, value in kwargs.items())
    if None in kinds or any(k is None for _, k in named):
        return None
    given = tensors(args, kwargs)
    if len(set(map(id, given))) < len(given):
        return None  # a forward may ask whether two arguments are one object
    return kinds, named


ONE_TENSOR: Signature = ((TENSOR,), ())


def default(module: nn.Module) -> Signature:
    """The signature to plan for before any call has been seen: every argument without a default is a tensor."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ONE_TENSOR
    required = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return ((TENSOR,) * required, ())


def build(
    signature: Signature, new_tensor: Callable[[], Any], constant_list: Callable[[Iterable[Any]], Any] = list
) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) of the given signature with `new_tensor()` in the place of every tensor, `constant_list` in that
    of
    list."""

    def make(k: Kind) -> Any:
        if k == TENSOR:
            return new_tensor()
        if len(k) == 3 and k[-1] == TENSOR:
            return (constant_list if k[0] is list else tuple)(new_tensor() for _ in range(k[1]))
        return k[1]

    kinds, named = signature
    return [make(k) for k in kinds], {name: make(k) for name, k in named}


def tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a call, in the order in which `build` asked for them."""
    found = []
    for value in (*args, *kwargs.values()):
        if type(value) in TENSOR_TYPES:
            found.append(value)
        elif type(value) in (list, tuple):
            found.extend(value)
    return found
