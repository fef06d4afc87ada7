"""What the swap puts into a module's dictionary in the place of one of its class's methods.

To those who ask it is the bound method that it stands for: `__self__` is the module, `__func__` the class's function,
and so are code, name, defaults and signature. Whoever wraps, patches, unwraps or binds it anew therefore ends up with
the class's own function, never with one that is bound twice.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

_OF_THE_FUNCTION = frozenset(
    (
        "__code__",
        "__defaults__",
        "__kwdefaults__",
        "__closure__",
        "__qualname__",
        "__annotations__",
        "__type_params__",
        "__builtins__",
    )
)
_CALLS = frozenset(("_call_impl", "forward", "_conv_forward"))


class InstanceMethod:
    """Base class: the method `name` of a module, which it holds weakly. A deep copy belongs to the copied module, and a
    pickle to the unpickled one; of the rest `_settings` alone is kept. `copy.copy` of the module and the replicas of
    torch.nn.DataParallel share it, which a call through the copy notices: it raises RuntimeError."""

    name = "forward"

    def __init__(self, owner: nn.Module):
        self._attach(owner)

    def _attach(self, owner: nn.Module) -> None:
        # While unpickling, the owner may still be without its attributes: nothing of it is read here.
        self._owner = weakref.ref(owner)
        function = getattr(type(owner), self.name)
        self.__name__, self.__doc__, self.__module__ = self.name, function.__doc__, function.__module__

    @property
    def owner(self) -> nn.Module:
        """The module. Raises ReferenceError once it is gone."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"the module of this {self.name} is gone: keep the module, not only its {self.name}")
        return owner

    def is_of(self, module: nn.Module) -> bool:
        return self._owner() is module

    def called(self) -> nn.Module:
        """The owner, for a call of this object. Raises RuntimeError where another module makes the call."""
        owner = self.owner
        frame = sys._getframe(2)
        if frame.f_code.co_name in _CALLS:
            caller = frame.f_locals.get("self")
            if caller is not owner and isinstance(caller, nn.Module) and caller.__dict__.get(self.name) is self:
                raise RuntimeError(
                    f"this {type(caller).__name__} is a shallow copy (copy.copy, torch.nn.DataParallel) of a swapped "
                    "module, which shares the original's children and plans: use copy.deepcopy or "
                    "DistributedDataParallel, or convext.revert() the model first"
                )
        return owner

    @property
    def __self__(self) -> nn.Module:
        return self.owner

    @property
    def __func__(self) -> Any:
        return getattr(type(self.owner), self.name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__func__.__get__(self.owner))

    @property
    def __globals__(self) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.jit", "torch._jit_internal")):
            raise RuntimeError(
                f"torch.jit.script cannot read a swapped {type(self.owner).__name__}: "
                "convext.revert(model) first, and swap again afterwards"
            )
        return self.__func__.__globals__

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_FUNCTION:
            return getattr(self.__func__, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, **self._settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owner, settings = state["owner"], {name: value for name, value in state.items() if name != "owner"}
        self._attach(owner)
        self.__dict__.update(settings)

    def _settings(self) -> dict[str, Any]:
        """Attributes that copies and pickles have as well."""
        return {}

    def __copy__(self) -> InstanceMethod:
        return self  # as a bound method: that of the same module

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceMethod:
        owner = copy.deepcopy(self.owner, memo)  # the copy that is being made, or one for this method alone
        own = owner.__dict__.get(self.name)
        if isinstance(own, InstanceMethod) and own._owner() is owner:
            return own
        twin = type(self).__new__(type(self))
        twin.__setstate__({"owner": owner, **self._settings()})
        return twin


class ForwardMethod(InstanceMethod):
    """The forward of a container that has plans, as what lies below planned.py sees it.

    plan(owner, signature)        the plan for such calls, or None
    result_in_any_format(count)   what a call with so many tensors returns where it takes channels-last ones: "free" or
                                  "channels-last" (schedule/layout.py), else None
    in_any_format(*tensors)       that call
    whole(mode)                   what runs all of it as a member of a sequence, or None
    """

    if TYPE_CHECKING:

        def plan(self, owner: nn.Module, signature: Any) -> Any: ...
        def result_in_any_format(self, count: int) -> str | None: ...
        def in_any_format(self, *tensors: torch.Tensor) -> Any: ...
        def whole(self, mode: Any) -> Any: ...
