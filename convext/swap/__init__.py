"""convext.swap: a whole model's convolutions, in place.

    swap(model)            exchanges them and plans fused calls
    revert(model)          puts everything back
    report(model)          what became of each layer, and why
    verify(model, sample)  runs it both ways and says how far apart they are

A swap changes two things only. A layer whose type is exactly torch.nn.Conv2d gets a `_conv_forward` in its instance
dictionary that calls convext's kernels: class, parameters, hooks and keys stay. A container gets a `forward` there that
runs the same calls as its class's with each chain of convolution, batch norm, add and activation as one.
"""
import sys
import types

import torch
from torch import nn

from . import calls
from .capture import signature as signatures
from .conv_forward import ConvForward
from .planned import PlannedForward
from .report import Report, report
from .sequences import layer_by_layer
from .verify import Verification, verify

__all__ = ["Report", "Verification", "layer_by_layer", "report", "revert", "swap", "verify"]


def swap(model: nn.Module) -> nn.Module:
    """Exchanges the convolutions of a model for convext's, in place.

    Args:
        model: any torch.nn.Module, in training or evaluation, on any device.

    Returns: the model.

    The model keeps its class and those of its layers, module names, state-dict keys and Parameter objects, so
    checkpoints load both ways and optimizers built before keep working. Layers that are no plain torch.nn.Conv2d
    (subclasses, parametrized, lazy, quantized ones) stay as they are; `report` says why. Chains of convolution, batch
    norm, residual add and activation run as one call wherever a container's forward calls them so; where one of them
    has hooks, is called twice or was replaced, that place runs its modules one by one, decided at every call. A swap of
    a swapped model changes nothing but what was added since.

    `copy.copy` and torch.nn.DataParallel share a module's dictionary between objects and must not be used on a swapped
    model; use copy.deepcopy and DistributedDataParallel. torch.jit.script wants a reverted model.

    Raises TypeError if `model` is not an nn.Module. Whatever it raises, the model is as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> keys = list(model.state_dict())
        >>> convext.swap(model) is model, type(model[0]) is torch.nn.Conv2d, list(model.state_dict()) == keys
        (True, True, True)
    """
    _check(model)
    convs = [m for m in model.modules() if type(m) is nn.Conv2d and left_alone(m) is None and not calls.is_swapped(m)]
    before = {}
    try:
        for module in model.modules():
            forward = module.__dict__.get("forward")
            if isinstance(forward, PlannedForward):
                forward.forget_refusals()
            elif why_unplanned(module) is None:
                before[module] = module.__dict__
                module.__dict__["forward"] = PlannedForward(module)
        for conv in convs:
            conv.__dict__["_conv_forward"] = ConvForward(conv)
        for module in before:
            module.__dict__["forward"].plan(module, signatures.default(module))
    except BaseException:
        for conv in convs:
            conv.__dict__.pop("_conv_forward", None)
        for attributes in before.values():
            attributes.pop("forward", None)
        raise
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes `swap`, in place: torch's convolutions and the classes' own forwards.

    Every convext.nn.Conv2d becomes a torch.nn.Conv2d, whoever made it; a forward that the user put into an instance
    stays.

    Args:
        model: swapped or not; one that is not is left as it is, its layers of convext.nn.Conv2d apart.

    Returns: the model.

    Raises TypeError if `model` is not an nn.Module.

    Example:
        >>> model = convext.revert(torch.nn.Sequential(convext.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
        >>> type(model[0]) is torch.nn.Conv2d
        True
    """
    _check(model)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PlannedForward):
            del module.__dict__["forward"]
        if isinstance(module.__dict__.get("_conv_forward"), ConvForward):
            del module.__dict__["_conv_forward"]
        if type(module) is calls.convext_conv():
            module.__class__ = nn.Conv2d
    return model


def _check(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def left_alone(module):
    """Why a convolution is not exchanged, or None."""
    kind, own = type(module), module.__dict__.get("_conv_forward")
    if own is not None and not isinstance(own, ConvForward):
        return "it has a _conv_forward of its own in the instance"
    if kind in (nn.Conv2d, calls.convext_conv()):
        if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedTensorMixin):
            return "its weight is not initialised yet"
        return None
    if not isinstance(module, nn.Conv2d):
        return f"{kind.__name__} is no 2-D convolution"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if isinstance(module, nn.LazyConv2d):
        return "it is lazy: swap again after the first call"
    return f"{kind.__module__}.{kind.__name__} is a subclass of torch.nn.Conv2d"


def why_unplanned(module):
    """Why a container gets no planned forward, or None."""
    kind = type(module)
    if not module._modules:
        return "it has no submodules"
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], PlannedForward):
        return "it has a forward of its own in the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a torch.fx.GraphModule, which writes its own forward"
    if kind.__module__.partition(".")[0] in ("torch", "convext") and kind is not nn.Sequential:
        return f"{kind.__name__} is a class of {kind.__module__.partition('.')[0]}"
    if getattr(kind.forward, "__name__", "") == "_forward_unimplemented":
        return "its class has no forward"
    if not any(isinstance(m, nn.Conv2d) for m in module.modules()):
        return "it has no convolution"
    return None


torch.serialization.add_safe_globals([ConvForward, PlannedForward])  # nothing but who their module is


class _CallableModule(types.ModuleType):
    """`convext.swap` is the function; the import system puts this module there when somebody imports a part of it."""

    def __call__(self, model):
        return swap(model)


sys.modules[__name__].__class__ = _CallableModule
