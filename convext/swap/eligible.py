"""Why a layer or a container is left as it is."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from .conv_forward import KINDS, own_method
from .method import ForwardMethod


def left_alone(module: nn.Module) -> str | None:
    """Why a convolution is not exchanged, or None."""
    kind, (name, own) = type(module), own_method(module)
    if own is None and module.__dict__.get(name) is not None:
        return f"it has a {name} of its own in the instance"
    if kind in KINDS or kind in KINDS.values():
        if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
            return "its weight is not initialised yet"
        return None
    known = next((known for known in KINDS if isinstance(module, known)), None)
    if known is None:
        return f"{kind.__name__} is no convolution of torch.nn"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: swap again after the first call"
    return f"{kind.__module__}.{kind.__name__} is a subclass of torch.nn.{known.__name__}"


def why_unplanned(module: nn.Module) -> str | None:
    """Why a container gets no planned forward, or None."""
    kind = type(module)
    if not module._modules:
        return "it has no submodules"
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], ForwardMethod):
        return "it has a forward of its own in the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a torch.fx.GraphModule, which writes its own forward"
    if kind.__module__.partition(".")[0] in ("torch", "convext") and kind is not nn.Sequential:
        return f"{kind.__name__} is a class of {kind.__module__.partition('.')[0]}"
    forward = inspect.getattr_static(kind, "forward")
    if hasattr(type(forward), "__set__"):
        return "its forward is a property"
    if inspect.iscoroutinefunction(forward) or inspect.isasyncgenfunction(forward):
        return "its forward is a coroutine"
    if getattr(kind.forward, "__name__", "") == "_forward_unimplemented":
        return "its class has no forward"
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        return "it has no convolution"
    return None
