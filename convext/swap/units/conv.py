"""A convolution with the batch norm, the sum and the activation behind it: its call, and its step in a sequence.

The call reads the modules' present state, then runs fused, or falls back on the modules. Parameters, buffers and
settings are looked up at every call, in the modules' own dictionaries, so that replacing or changing them after the
swap has the effect that it had before. Where no gradient is wanted it goes straight to the operator, and everything it
does counts.
"""

import contextlib
from operator import itemgetter

import torch
from torch.autograd import forward_ad

from ... import autograd, backends, checks, functional, nn, ops
from ...backends.native_sequence import Step
from ...memory_format import dense_strides, suggests_channels_last, where_copied
from ...problem import DTYPES, ConvProblem, Epilogue, Geom, Pass
from ..capture.signature import TENSOR_TYPES as PLAIN
from . import EMPTY, Op

settings_of = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_grad_enabled = torch.is_grad_enabled
_MOMENTA = frozenset((float, int, type(None)))


class Conv(Op):
    """conv, and what is fused with it: a batch norm or None, an activation. `excite`: the squeeze and excitation of its
    input, where it is computed together with that."""

    def __init__(self, conv, batch_norm=None, activation="identity"):
        self.module, self.batch_norm, self.activation = conv, batch_norm, activation
        self.channels_last = False  # whether the result is, whatever the input
        self.state = self.excite = None
        # torch's forward reads neither kernel_size nor in_channels: they may be gone.
        channels = getattr(conv, "in_channels", 0)
        self.is_pointwise = (
            getattr(conv, "kernel_size", None) == (1, 1) and conv.padding in ((0, 0), 0) and conv.groups == 1
        )
        self.in_strips = self.is_pointwise or conv.groups == channels > 1

    def words(self, adds):
        activation = [] if self.activation == "identity" else [self.activation]
        return ([] if self.batch_norm is None else ["bn"]) + super().words(adds) + activation

    def settle(self, last, layout, mode):
        self.channels_last = layout.in_seam and layout.is_free(last)
        return True

    def bind(self, fallback, mode):
        bn = self.batch_norm
        self.state = _Convolution(self.module, self.channels_last)
        fused = (_conv_act if bn is None else _conv_bn_act)(self, fallback)
        return _direct(self, fused, mode.autocast) if mode.direct and (bn is None or not bn.training) else fused

    @property
    def places(self):
        weights, bn = self.module._parameters, self.batch_norm
        affine, statistics = (EMPTY, EMPTY) if bn is None else (bn._parameters, bn._buffers)
        return (
            (weights, "weight"),
            (weights, "bias"),
            (statistics, "running_mean"),
            (statistics, "running_var"),
            (affine, "weight"),
            (affine, "bias"),
            *(self.excite.places if self.excite else ()),
        )

    @property
    def choice(self):
        return self.state.choice

    @property
    def eps(self):
        return 0.0 if self.batch_norm is None else self.batch_norm.__dict__["eps"]

    def step(self, before, residual):
        """Its own call has seen the problem."""
        if self.state.call is None:
            return None
        tensors = self.tensors()
        if self.batch_norm is not None and tensors[2] is None:  # the batch's own statistics are wanted
            return None
        if any(not t.is_contiguous() for t in tensors[6:] if t is not None):
            return None
        return Step(
            self.state.choice.problem,
            self.activation,
            residual,
            tuple(t is not None for t in tensors),
            excite=self.excite and self.excite.codes,
        )


class _Convolution:
    """A Conv2d module's dictionaries, the geometry of its present settings, and the last call.

    last     shape, strides, dtype and device of the last input
    weight   shape, strides and dtype of the weight then; y_shape: the result's shape, y_strides: its strides where a
             residual must have them too, else None; pixel: whether it is one pixel in channels-last strides, which an
             elementwise operation does not keep (`_one_pixel`)
    dtypes   of bias and batch norm then
    call     the prepared call of the choice made then, and counter its count; None until one is"""

    __slots__ = (
        "attributes",
        "parameters",
        "settings",
        "geom",
        "last",
        "channels_last",
        "weight",
        "y_shape",
        "y_strides",
        "pixel",
        "dtypes",
        "call",
        "counter",
        "choice",
    )

    def __init__(self, module, channels_last):
        self.channels_last = channels_last
        self.attributes, self.parameters = module.__dict__, module._parameters
        self.settings, self.geom = None, None
        self.last = self.weight = self.y_shape = self.y_strides = self.call = self.counter = self.choice = None
        self.pixel, self.dtypes = False, None

    def refresh(self, settings):
        """The Geom, or None where the settings take more than a Geom to say."""
        stride, padding, dilation, groups, mode = settings
        plain = mode == "zeros" and all(type(v) is tuple and len(v) == 2 for v in (stride, padding, dilation))
        self.settings, self.geom = settings, Geom(stride, padding, dilation, groups) if plain else None
        return self.geom

    def prepare(self, x, w, activation):
        """Chooses the kernel for calls like this one, which has just gone well. Under autocast x is in its dtype, and w
        may be as it was."""
        self.choice = choice = backends.select(Pass.FPROP, ConvProblem.of_fprop(x, w, self.geom, self.channels_last))
        self.last = x.shape, x.stride(), x.dtype, x.device
        self.weight = w.shape, w.stride(), w.dtype
        self.y_shape = torch.Size(choice.problem.y_shape)
        self.y_strides = None if self.channels_last else dense_strides(self.y_shape, bool(choice.problem.y_layout))
        self.pixel = not self.channels_last and bool(choice.problem.y_layout) and self.y_shape[2:] == (1, 1)
        self.counter = choice.counter
        self.call = choice.prepared_fprop(activation, rounds_weights=w.dtype is not x.dtype)


def _direct(op, fused, autocast):
    """`fused`, which a call like the one before passes by. `autocast`: what tensors on the CPU are cast to."""
    state, batch_norm, activation = op.state, op.batch_norm, op.activation
    attributes, parameters = state.attributes, state.parameters
    no_batch_norm = batch_norm is None
    if no_batch_norm:
        bn_attributes, affine, statistics = {"eps": 0.0}, EMPTY, EMPTY
    else:
        bn_attributes, affine, statistics = batch_norm.__dict__, batch_norm._parameters, batch_norm._buffers

    def direct(x, residual=None):
        if autocast is not None and x.dtype is not autocast:
            x = ops.autocast_cast(x, "cpu", autocast)
        w = parameters.get("weight")
        mean, var = statistics.get("running_mean"), statistics.get("running_var")
        given = dtypes(parameters.get("bias"), mean, var, affine.get("weight"), affine.get("bias"))
        if (
            state.call is not None
            and type(w) in PLAIN
            and settings_of(attributes) == state.settings
            and (x.shape, x.stride(), x.dtype, x.device) == state.last
            and (w.shape, w.stride(), w.dtype) == state.weight
            and (no_batch_norm or mean is not None is not var)
            and given == state.dtypes
            and (
                residual is None
                or residual.shape == state.y_shape
                and residual.dtype is x.dtype
                and (state.y_strides is None or residual.stride() == state.y_strides)
            )
        ):
            state.counter[0] += 1
            y = state.call(
                x,
                w,
                parameters.get("bias"),
                mean,
                var,
                affine.get("weight"),
                affine.get("bias"),
                residual,
                bn_attributes["eps"],
            )
            if state.pixel and (activation != "identity" or residual is not None):
                y.as_strided_(y.shape, (y.shape[1], 1, 1, 1))
            return y
        state.call = None
        y = fused(x, residual)
        if (
            type(w) in PLAIN
            and state.geom is not None
            and x.dim() == 4
            and x.shape[0] > 0
            and x.dtype in DTYPES
            and x.device == w.device
            and x.device.type in backends.PRIORITY
            and x.dtype is ops.autocast_dtype(w)
            and bn_attributes["eps"] >= 0
            and (no_batch_norm or bn_attributes["eps"] > 0)
        ):
            state.prepare(x, w, activation)
            state.dtypes = given
        return y

    return direct


def _conv_act(op, fallback):
    state, activation, channels_last = op.state, op.activation, op.channels_last
    ends_elementwise = activation != "identity"
    attributes, parameters = state.attributes, state.parameters

    def fused(x, residual=None):
        w, bias = parameters.get("weight"), parameters.get("bias")
        settings = settings_of(attributes)
        geom = state.geom if settings == state.settings else state.refresh(settings)
        if not _is_usual(x, w, geom, residual, channels_last, ends_elementwise):
            return fallback(x, residual)
        state.last = x.shape, x.stride(), x.dtype, x.device
        if (
            (
                _grad_enabled()
                and (
                    w.requires_grad
                    or x.requires_grad
                    or bias is not None
                    and bias.requires_grad
                    or residual is not None
                    and residual.requires_grad
                )
            )
            or residual is not None
            or forward_ad._current_level >= 0
        ):
            with _recorded(channels_last):
                return functional.conv_act(
                    _in_format(x, channels_last),
                    w,
                    bias,
                    stride=geom.stride,
                    padding=geom.padding,
                    dilation=geom.dilation,
                    groups=geom.groups,
                    activation=activation,
                    residual=_summand(residual, channels_last),
                )
        try:
            return ops.conv_bn_act(x, w, Epilogue(bias, activation=activation), geom, channels_last)
        except checks.InvalidArgument:  # which the layers refuse in their own words, or take
            return fallback(x, residual)

    return fused


def _conv_bn_act(op, fallback):
    state, conv, batch_norm, channels_last = op.state, op.module, op.batch_norm, op.channels_last
    activation, ends_elementwise = op.activation, op.activation != "identity"
    attributes, parameters = state.attributes, state.parameters
    bn_attributes, affine, statistics = batch_norm.__dict__, batch_norm._parameters, batch_norm._buffers

    def fused(x, residual=None):
        w, bias = parameters.get("weight"), parameters.get("bias")
        gamma, beta = affine.get("weight"), affine.get("bias")
        mean, var = statistics.get("running_mean"), statistics.get("running_var")
        settings = settings_of(attributes)
        geom = state.geom if settings == state.settings else state.refresh(settings)
        recorded = _grad_enabled() or bn_attributes["training"]  # then a batch norm is elementwise, too
        if (
            gamma is None
            and beta is not None
            or (mean is None) is not (var is None)
            or bn_attributes["eps"] <= 0
            or not _is_usual(x, w, geom, residual, channels_last, ends_elementwise or recorded)
            or recorded
            and _is_for_the_layers(x, w, geom, bn_attributes)
        ):
            return fallback(x, residual)
        state.last = x.shape, x.stride(), x.dtype, x.device
        if (
            bn_attributes["training"]
            or mean is None
            or forward_ad._current_level >= 0
            or (
                _grad_enabled()
                and (
                    w.requires_grad
                    or x.requires_grad
                    or gamma is not None
                    and gamma.requires_grad
                    or beta is not None
                    and beta.requires_grad
                    or bias is not None
                    and bias.requires_grad
                    or residual is not None
                    and residual.requires_grad
                )
            )
        ):
            with _recorded(channels_last):
                summand = _summand(residual, channels_last)
                return nn.conv_bn_act(conv, batch_norm, _in_format(x, channels_last), activation, summand)
        try:
            epilogue = Epilogue(bias, mean, var, gamma, beta, residual, bn_attributes["eps"], activation)
            return ops.conv_bn_act(x, w, epilogue, geom, channels_last)
        except checks.InvalidArgument:
            return fallback(x, residual)

    return fused


def dtypes(*tensors):
    """The dtype of each, None where there is none."""
    return tuple([None if t is None else t.dtype for t in tensors])


def _is_usual(x, w, geom, residual, channels_last, elementwise):
    """True where the fused call means what its modules one by one do, strides included. `elementwise`: an elementwise
    operation follows the convolution."""
    if (
        w is None
        or geom is None
        or x.dim() != 4
        or w.dim() != 4
        or x.dtype not in DTYPES
        or x.device != w.device
        or x.shape[0] == 0
        or residual is not None
        and not _fits(residual, x, w, geom)
    ):
        return False
    return channels_last or not (
        residual is not None and _in_another_format(residual, x, w) or elementwise and _one_pixel(x, w, geom)
    )


def _is_for_the_layers(x, w, geom, batch_norm):
    """True where the layers may raise, each with what those before it have left behind, or where they take a momentum
    that is no number."""
    return (
        x.is_inference()
        and not torch.is_inference_mode_enabled()
        or batch_norm["training"]
        and (
            type(batch_norm["momentum"]) not in _MOMENTA
            or x.shape[0] == 1
            and geom.output_size(x.shape[2:], w.shape[2:]) == (1, 1)
        )
    )


def _fits(residual, x, w, geom):
    """True where a residual has the shape and the dtype of the convolution's result."""
    shape = residual.shape
    return (
        residual.dtype is ops.autocast_dtype(x) is ops.autocast_dtype(w)
        and len(shape) == 4
        and shape[0] == x.shape[0]
        and shape[1] == w.shape[0]
        and tuple(shape[2:]) == geom.output_size(x.shape[2:], w.shape[2:])
    )


def _in_another_format(residual, x, w):
    """True where a residual that fits has other strides than the convolution's result: then those of the sum depend on
    which of the two comes first."""
    result = dense_strides(residual.shape, suggests_channels_last(x) or suggests_channels_last(w))
    return residual.stride() != result


def _one_pixel(x, w, geom):
    """True where the result is one pixel in channels-last strides. To torch's elementwise operations it is contiguous
    as well, and their result has a contiguous tensor's strides, which an interpolation after them goes by."""
    asks = suggests_channels_last(x) or suggests_channels_last(w)
    return asks and geom.output_size(x.shape[2:], w.shape[2:]) == (1, 1)


_AS_IS = contextlib.nullcontext()


def _recorded(channels_last):
    return autograd.contiguous_weight_gradients() if channels_last else _AS_IS


def _in_format(x, channels_last):
    if not channels_last or x.is_contiguous(memory_format=torch.channels_last):
        return x
    if autograd.needs_function(x) and not ops._functorch_active() and not ops.batched_the_older_way(x):
        return autograd.ChannelsLastFunction.apply(x)
    with where_copied(x):
        return x.contiguous(memory_format=torch.channels_last)


def _summand(residual, channels_last):
    """A residual for a channels-last result, whose gradient comes back in its own format."""
    recorded = residual is not None and autograd.needs_function(residual)
    return _in_format(residual, channels_last) if recorded else residual
