"""swap and revert: what stands in the place of a model's methods, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backends import tuned
from .calls import is_swapped
from .capture import signature as signatures
from .conv_forward import KINDS, ConvForward, TransposedForward, own_method
from .eligible import left_alone, why_unplanned
from .planned import PlannedForward


def swap(model: nn.Module, *, tune: torch.Tensor | None = None, recompute: bool = False) -> nn.Module:
    """Exchanges the convolutions of a model for convext's, in place.

    Args:
        model: any torch.nn.Module, in training or evaluation, on any device.
        tune: a sample input, on which `convext.tune(model, tune)` then measures who computes each layer fastest on this
            machine, which takes a while where it is not known yet; of a model in training the gradients, too. Default:
            None, nothing is measured now.
        recompute: in training, fused convolutions of little arithmetic (depthwise ones, 1x1 ones of up to 256 channels
            in float32, a network's first) do not keep their output for the backward pass, which computes it again, with
            the same gradients. As in `convext.conv_bn_act`, weights must not be written in between. Where one such
            layer reads another's result alone, the larger of the two outputs is not kept. Default False.

    Returns: the model.

    The model keeps its class and those of its layers, module names, state-dict keys and Parameter objects, so
    checkpoints load both ways and optimizers built before keep working. Layers that are no plain torch.nn.Conv1d, 2d or
    3d, ConvTranspose1d, 2d or 3d (subclasses, parametrized, lazy, quantized) stay as they are; `report` says why.
    Chains of 2-D convolution, batch norm, residual add and activation run as one call wherever a container's forward
    calls them so, and what follows another convolution as one behind it; where one of them has hooks, is called twice
    or was replaced, that place runs its modules one by one, decided at every call. A swap of a swapped model changes
    nothing but what was added since, and `recompute`.

    `copy.copy` and torch.nn.DataParallel share a module's dictionary between objects and must not be used on a swapped
    model; use copy.deepcopy and DistributedDataParallel. torch.jit.script wants a reverted model.

    Raises TypeError if `model` is not an nn.Module, `tune` no tensor that `convext.tune` takes or `recompute` no bool.
    Whatever it raises, the model is as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> keys = list(model.state_dict())
        >>> convext.swap(model) is model, type(model[0]) is torch.nn.Conv2d, list(model.state_dict()) == keys
        (True, True, True)
    """
    _check(model)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected a bool, got {recompute!r} ({type(recompute).__name__})")
    convs = [m for m in model.modules() if type(m) in KINDS and left_alone(m) is None and not is_swapped(m)]
    before: dict[nn.Module, dict[str, Any]] = {}
    planned: list[PlannedForward] = []
    try:
        for module in model.modules():
            forward = module.__dict__.get("forward")
            if isinstance(forward, PlannedForward):
                planned.append(forward)
                forward.forget_refusals()
            elif why_unplanned(module) is None:
                before[module] = module.__dict__
                module.__dict__["forward"] = made = PlannedForward(module)
                made.recompute = recompute
        for conv in convs:
            name, _ = own_method(conv)
            conv.__dict__[name] = TransposedForward(conv) if name == "forward" else ConvForward(conv)
        for module in before:
            module.__dict__["forward"].plan(module, signatures.default(module))
        if tune is not None:
            assert tuned.tune is not None  # convext/__init__.py imports who sets it
            tuned.tune(model, tune, train=model.training)
    except BaseException:
        for conv in convs:
            conv.__dict__.pop(own_method(conv)[0], None)
        for attributes in before.values():
            attributes.pop("forward", None)
        raise
    for forward in planned:
        forward.set_recompute(recompute)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes `swap`, in place: torch's convolutions and the classes' own forwards.

    Every convext.nn.Conv1d, 2d, 3d and ConvTranspose1d, 2d, 3d becomes torch.nn's, whoever made it; a forward that the
    user put into an instance stays.

    Args:
        model: swapped or not; one that is not is left as it is, its layers of those classes apart.

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
        name, own = own_method(module)
        if own is not None:
            del module.__dict__[name]
        for theirs, ours in KINDS.items():
            if type(module) is ours:
                module.__class__ = theirs
    return model


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
