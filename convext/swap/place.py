"""The call that stands in a plan for one chain: reads the modules' present state, then runs fused, or apart.

Parameters, buffers and settings are looked up at every call, in the modules' own dictionaries, so that replacing or
changing them after the swap has the effect that it had before. `fused` is what a plan calls for each layer: where no
gradient is wanted it goes straight to the operator, and everything it does counts.
"""
from operator import itemgetter

import torch
from torch.autograd import forward_ad

from .. import functional, nn, ops
from ..problem import Geom

_settings = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_grad_enabled = torch.is_grad_enabled


class _Convolution:
    """A Conv2d module's dictionaries, and the geometry of its present settings."""

    __slots__ = ("attributes", "parameters", "settings", "geom", "last", "channels_last")

    def __init__(self, module, channels_last):
        self.channels_last = channels_last
        self.attributes, self.parameters = module.__dict__, module._parameters
        self.settings, self.geom = None, None
        self.last = None    # shape, strides, dtype and device of the last input, for the report

    def refresh(self, settings):
        """The Geom, or None where the settings take more than a Geom to say."""
        stride, padding, dilation, groups, mode = settings
        plain = mode == "zeros" and all(type(v) is tuple and len(v) == 2 for v in (stride, padding, dilation))
        self.settings, self.geom = settings, Geom(stride, padding, dilation, groups) if plain else None
        return self.geom


def bind(conv, batch_norm, activation, apart, channels_last):
    """function(x, residual=None) of one chain. `apart(x, residual)` runs its modules one by one; `channels_last` asks
    for a channels-last result whatever x is."""
    if batch_norm is None:
        return _conv_act(conv, activation, apart, channels_last)
    return _conv_bn_act(conv, batch_norm, activation, apart, channels_last)


def _conv_act(conv, activation, apart, channels_last):
    state = _Convolution(conv, channels_last)
    attributes, parameters = state.attributes, state.parameters

    def fused(x, residual=None):
        w, bias = parameters.get("weight"), parameters.get("bias")
        settings = _settings(attributes)
        geom = state.geom if settings == state.settings else state.refresh(settings)
        if w is None or geom is None or x.dim() != 4:
            return apart(x, residual)
        state.last = x.shape, x.stride(), x.dtype, x.device
        if (_grad_enabled() and (w.requires_grad or x.requires_grad or bias is not None and bias.requires_grad
                                 or residual is not None and residual.requires_grad)) \
                or residual is not None or forward_ad._current_level >= 0:
            x = _in_format(x, channels_last)
            return functional.conv_act(x, w, bias, stride=geom.stride, padding=geom.padding, dilation=geom.dilation,
                                       groups=geom.groups, activation=activation, residual=residual)
        return ops.fprop_bn_act(x, w, bias, None, None, None, None, None, geom, 0.0, activation, channels_last)

    fused.state = state
    return fused


def _conv_bn_act(conv, batch_norm, activation, apart, channels_last):
    state = _Convolution(conv, channels_last)
    attributes, parameters = state.attributes, state.parameters
    bn_attributes, affine, statistics = batch_norm.__dict__, batch_norm._parameters, batch_norm._buffers

    def fused(x, residual=None):
        w, bias = parameters.get("weight"), parameters.get("bias")
        gamma, beta = affine.get("weight"), affine.get("bias")
        mean, var = statistics.get("running_mean"), statistics.get("running_var")
        settings = _settings(attributes)
        geom = state.geom if settings == state.settings else state.refresh(settings)
        if w is None or geom is None or x.dim() != 4 or gamma is None and affine.get("bias") is not None \
                or (mean is None) is not (var is None):
            return apart(x, residual)
        state.last = x.shape, x.stride(), x.dtype, x.device
        if bn_attributes["training"] or mean is None or forward_ad._current_level >= 0 or (_grad_enabled() and (
                w.requires_grad or x.requires_grad or gamma is not None and gamma.requires_grad
                or beta is not None and beta.requires_grad or bias is not None and bias.requires_grad
                or residual is not None and residual.requires_grad)):
            return nn.conv_bn_act(conv, batch_norm, _in_format(x, channels_last), activation, residual)
        if residual is not None and not _fits(residual, x, w, geom):
            return apart(x, residual)
        return ops.fprop_bn_act(x, w, bias, mean, var, gamma, beta, residual, geom, bn_attributes["eps"], activation,
                                channels_last)

    fused.state = state
    return fused


def _fits(residual, x, w, geom):
    """True where a residual needs neither broadcasting nor another dtype."""
    shape = residual.shape
    return residual.dtype is x.dtype is w.dtype and len(shape) == 4 and shape[0] == x.shape[0] \
        and shape[1] == w.shape[0] and tuple(shape[2:]) == geom.output_size(x.shape[2:], w.shape[2:])


def _in_format(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
