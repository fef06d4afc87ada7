"""A convolution with the batch norm, the sum and the activation behind it: its call, and its step in a sequence.

The call looks the tensors up in the dictionaries where they are found, so that replacing them after the swap has the
effect that it had before, then runs fused, or falls back on the functions one by one. Settings are facts of the plan.
Where no gradient is wanted it goes straight to the operator, and everything it does counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.autograd import forward_ad

from ... import autograd, backends, checks, functional, ops
from ...activation import TABLE
from ...autograd import Recomputable
from ...backends.native_sequence import Step
from ...memory_format import dense_strides, suggests_channels_last, where_copied
from ...problem import DTYPES, STATISTICS, ConvProblem, Epilogue, Geom, Pass, epilogue_kind
from ..capture.signature import TENSOR_TYPES as PLAIN
from . import AnyLayout, Call, Op
from .functions import NOWHERE, BatchNorm, Convolution, Place, found

if TYPE_CHECKING:
    from ..modes import Mode
    from .containers import SqueezeExcite

_grad_enabled, _strided = torch.is_grad_enabled, torch.strided


class Conv(Op):
    """A `Convolution`, and what is fused with it: a `BatchNorm` or None, an activation. `excite`: the squeeze and
    excitation of its input, where it is computed together with that."""

    takes_excitation = True
    takes = gives = "image"

    def __init__(self, convolution: Convolution, batch_norm: BatchNorm | None = None, activation: str = "identity"):
        self.convolution, self.batch_norm, self.activation = convolution, batch_norm, activation
        self.channels_last = False  # whether the result is, whatever the input
        self.in_seam = False  # whether the input may be, where the user's own calls would have a contiguous one
        self.module = convolution.layer
        self.state: _Calls = None  # type: ignore[assignment]  # until it is bound
        self.excite: SqueezeExcite | None = None
        self.eps = 0.0 if batch_norm is None else batch_norm.eps
        self.in_strips = convolution.is_pointwise or convolution.is_depthwise

    def words(self, adds: bool) -> list[str]:
        activation = [] if self.activation == "identity" else [self.activation]
        return ([] if self.batch_norm is None else ["bn"]) + super().words(adds) + activation

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        self.channels_last = layout.in_seam and layout.is_free(last)
        self.in_seam = self.channels_last or layout.in_seam and last in layout.free
        return True

    def output(self) -> tuple[int, float] | None:
        w, (stride_h, stride_w) = found(self.convolution.weight), self.convolution.geom.stride
        if w is None or w.dim() != 4 or not autograd.is_cheap(w, w.dtype):
            return None
        if self.batch_norm is None and TABLE[self.activation].by_output:
            return None
        return w.shape[0], 1 / (stride_h * stride_w)

    def bind(self, fallback: Call, mode: Mode) -> Call:
        self.state = _Calls(self.convolution.geom, self.channels_last)
        fused = _recorded_or_not(self, fallback)
        by_batch = self.batch_norm is not None and self.batch_norm.by_batch
        return _direct(self, fused, fallback, mode.autocast) if mode.direct and not by_batch else fused

    @property
    def places(self) -> tuple[Place, ...]:  # type: ignore[override]
        norm = (NOWHERE,) * 4 if self.batch_norm is None else self.batch_norm[:4]
        excite = self.excite.places if self.excite else ()
        return *self.convolution[:2], *norm, *excite

    @property
    def choice(self) -> Any:  # type: ignore[override]
        return self.state.choice

    def step(self, before: ConvProblem | None, residual: int | None) -> Step | None:
        """Its own call has seen the problem."""
        choice = self.choice
        if choice is None or self.batch_norm is not None and self.batch_norm.by_batch:
            return None
        tensors = self.tensors()
        if any(not t.is_contiguous() for t in tensors[6:] if t is not None):
            return None
        return Step(
            choice.problem,
            self.activation,
            residual,
            tuple(t is not None for t in tensors),
            excite=self.excite and self.excite.codes,
        )


class _Prepared:
    """What was looked up for calls like the last one. It does not change: threads that call at once each go by one.

    problem  shape, strides, dtype and device of the input
    weight   shape, strides and dtype of the weight; kinds: dtypes and shapes of bias and batch norm
    y_shape  the result's shape, y_strides: its strides where a residual must have them too, else None; pixel: whether
             it is one pixel in channels-last strides, which an elementwise operation does not keep (`_one_pixel`)
    choice   the backend's; call: its prepared call, and counter its count"""

    __slots__ = ("problem", "weight", "kinds", "y_shape", "y_strides", "pixel", "choice", "call", "counter")

    def __init__(
        self, x: torch.Tensor, w: torch.Tensor, given: Any, adds: bool, geom: Geom, channels_last: bool, activation: str
    ):
        """For calls like this one, which has gone well. Under autocast x is in its dtype, and w may be as it was."""
        problem, kind = ConvProblem.of_fprop(x, w, geom, channels_last), epilogue_kind(bool(given[1]), adds, activation)
        self.choice = choice = backends.select(Pass.FPROP, problem, kind=kind, device=x.device)
        self.problem = x.shape, x.stride(), x.dtype, x.device
        self.weight, self.kinds = (w.shape, w.stride(), w.dtype), given
        self.y_shape = torch.Size(choice.problem.y_shape)
        self.y_strides = None if channels_last else dense_strides(self.y_shape, bool(choice.problem.y_layout))
        self.pixel = not channels_last and bool(choice.problem.y_layout) and self.y_shape[2:] == (1, 1)
        self.counter = choice.counter
        self.call: Callable[..., torch.Tensor] = choice.prepared_fprop(
            activation, rounds_weights=w.dtype is not x.dtype
        )


class _Calls:
    """A convolution's geometry, and its last call.

    last      shape, strides, dtype and device of the last input
    kind      what followed the convolution then (`Epilogue.kind`)
    prepared  what was looked up for calls like it, or None
    recorded  what a call that recorded a gradient, and went well, was of, or None"""

    __slots__ = ("geom", "channels_last", "last", "kind", "prepared", "recorded")

    def __init__(self, geom: Geom, channels_last: bool):
        self.geom, self.channels_last = geom, channels_last
        self.last: tuple[Any, ...] | None = None
        self.kind = ""
        self.prepared: _Prepared | None = None
        self.recorded: tuple[Any, ...] | None = None

    @property
    def choice(self) -> Any:
        prepared = self.prepared
        return prepared and prepared.choice


def _direct(op: Conv, fused: Call, fallback: Call, autocast: torch.dtype | None) -> Call:
    """`fused`, which a call like the one before passes by. `autocast`: what tensors on the CPU are cast to."""
    state, activation, eps = op.state, op.activation, op.eps
    (weights, weight), (biases, bias_), (means, mean_), (variances, var_), (gammas, gamma_), (betas, beta_) = op.places[
        :6
    ]

    def direct(x: Any, residual: torch.Tensor | None = None) -> Any:
        w: Any
        if x is None:  # a container's result: the layers raise
            return fallback(x, residual)
        if autocast is not None and x.dtype is not autocast:
            x = ops.autocast_cast(x, "cpu", autocast)
        w, bias = weights.get(weight), biases.get(bias_)
        mean, var, gamma, beta = means.get(mean_), variances.get(var_), gammas.get(gamma_), betas.get(beta_)
        given = kinds(bias, mean, var, gamma, beta)
        prepared = state.prepared
        if (
            prepared is not None
            and type(w) in PLAIN
            and w.layout is _strided
            and (x.shape, x.stride(), x.dtype, x.device) == prepared.problem
            and (w.shape, w.stride(), w.dtype) == prepared.weight
            and given == prepared.kinds
            and (
                residual is None
                or residual.shape == prepared.y_shape
                and residual.dtype is x.dtype
                and (prepared.y_strides is None or residual.stride() == prepared.y_strides)
            )
        ):
            prepared.counter[0] += 1
            y = prepared.call(x, w, bias, mean, var, gamma, beta, residual, eps)
            if prepared.pixel and (activation != "identity" or residual is not None):
                y.as_strided_(y.shape, (y.shape[1], 1, 1, 1))
            return y
        state.prepared = None
        y = fused(x, residual)
        if (
            type(w) in PLAIN
            and x.dim() == 4
            and x.shape[0] > 0
            and x.dtype in DTYPES
            and x.device == w.device
            and x.device.type in backends.PRIORITY
            and x.dtype is ops.autocast_dtype(w)
        ):
            adds = residual is not None
            state.prepared = _Prepared(x, w, given, adds, state.geom, state.channels_last, activation)
            state.last = state.prepared.problem
        return y

    return direct


def _recorded_or_not(op: Conv, fallback: Call) -> Call:
    """function(x, residual=None): the operator, or what records a gradient of it."""
    state, norm, channels_last, activation = op.state, op.batch_norm, op.channels_last, op.activation
    geom, places = op.convolution.geom, op.places[:6]
    by_batch = norm is not None and norm.by_batch

    def recorded(given: Any, x: Any, w: Any, epilogue: Epilogue) -> Any:
        assert norm is not None
        with _recorded(op.in_seam):
            if x is given:
                given = _in_format(x, channels_last)
            elif channels_last and not x.is_contiguous(memory_format=torch.channels_last):
                given = _in_format(given.tensor(), channels_last)
            epilogue = epilogue._replace(residual=_summand(epilogue.residual, channels_last))
            count = found(norm.count)
            return functional.recorded_conv_bn_act(
                given, w, epilogue, geom, by_batch, norm.factor(), count, not op.keeps, op.recompute
            )

    def fused(given: Any, residual: torch.Tensor | None = None) -> Any:
        x: Any = given.like if type(given) is Recomputable else given
        w: Any
        tensors = w, bias, mean, var, gamma, beta = tuple(map(found, places))
        key: tuple[Any, ...] | None = None
        if by_batch and _can_be_known(x, w, bias, mean, var, gamma, beta, residual):
            # What a call like the last one has passed depends on nothing else.
            key = (x.shape, x.stride(), x.dtype, w.shape, w.stride(), kinds(w, bias, mean, var, gamma, beta, residual))
            key = (*key, None if residual is None else residual.stride(), x is given)
            if key == state.recorded and (x is not given or _requires_grad(x, w, bias, gamma, beta, residual)):
                return recorded(given, x, w, Epilogue(bias, mean, var, gamma, beta, residual, op.eps, activation))
        if not is_usual(op, x, tensors, residual):
            return fallback(functional.ordinary(given), residual)
        state.last = x.shape, x.stride(), x.dtype, x.device
        state.kind = STATISTICS if by_batch else epilogue_kind(norm is not None, residual is not None, activation)
        if (
            not by_batch
            and forward_ad._current_level < 0
            and (norm is not None or residual is None)
            and x is given
            and not (_grad_enabled() and _requires_grad(x, w, bias, gamma, beta, residual))
        ):
            try:
                epilogue = Epilogue(bias, mean, var, gamma, beta, residual, op.eps, activation)
                return ops.conv_bn_act(x, w, epilogue, geom, channels_last)
            except checks.InvalidArgument:  # which the layers refuse in their own words, or take
                return fallback(x, residual)
        with _recorded(op.in_seam):
            if x is given:
                given = _in_format(x, channels_last)
            elif channels_last and not x.is_contiguous(memory_format=torch.channels_last):
                given = _in_format(given.tensor(), channels_last)
            residual = _summand(residual, channels_last)
            epilogue = Epilogue(bias, mean, var, gamma, beta, residual, op.eps, activation)
            if norm is None:
                return functional.chained_conv_act(given, w, epilogue, *geom, not op.keeps, op.recompute)
            y = functional.chained_conv_bn_act(
                given, w, epilogue, *geom, by_batch, norm.factor(), found(norm.count), not op.keeps, op.recompute
            )
            if key is not None:
                image = given.like if isinstance(given, Recomputable) else given
                state.recorded = key if functional.takes_as_they_are(image, w, epilogue, geom) else None
            return y

    return fused


def _can_be_known(x: Any, w: Any, *others: torch.Tensor | None) -> bool:
    """True of a call that records a gradient, with tensors of the CPU about which their shapes, strides and dtypes say
    whether the fused call takes them."""
    if x is None or w is None or not _grad_enabled() or forward_ad._current_level >= 0:
        return False
    if torch.is_inference_mode_enabled() or not ops.all_plain(x, w, *others):
        return False
    for t in (x, w, *others):
        if t is not None and (t.layout is not _strided or t.device.type != "cpu" or t.is_inference() or t.is_neg()):
            return False
    _, mean, var, *_ = others
    return all([t is None or t.is_contiguous() and not t.requires_grad for t in (mean, var)])


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any([t is not None and t.requires_grad for t in tensors])


def kinds(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The dtype and the shape of each, None where there is none."""
    return tuple([None if t is None else (t.dtype, t.shape) for t in tensors])


def _are_vectors(length: int, *tensors: torch.Tensor | None) -> bool:
    """True where each has one element for each output channel: what else PyTorch takes or says is for the layers."""
    return all([t is None or t.dim() == 1 and t.shape[0] == length for t in tensors])


def _are_odd_statistics(mean: torch.Tensor | None, var: torch.Tensor | None, by_batch: bool) -> bool:
    """True of statistics for which PyTorch raises where a gradient is recorded, and of such as are to be updated and do
    not lie in memory as they are read."""
    return any(
        [
            t is not None
            and (t.requires_grad and _grad_enabled() or by_batch and (not t.is_contiguous() or t.is_neg()))
            for t in (mean, var)
        ]
    )


def is_usual(op: Conv, x: Any, tensors: tuple[torch.Tensor | None, ...], residual: torch.Tensor | None) -> bool:
    """True where the fused call means what its modules one by one do, strides included. `tensors`: those of the first
    six places."""
    (w, *vectors), norm, geom = tensors, op.batch_norm, op.convolution.geom
    _, mean, var, _, _ = vectors
    by_batch = norm is not None and norm.by_batch
    recorded = norm is not None and (by_batch or _grad_enabled())
    elementwise = op.activation != "identity" or recorded  # a batch norm is where it is recorded
    return (
        _is_usual(x, w, geom, residual, op.channels_last, elementwise)
        and w is not None
        and _are_vectors(w.shape[0], *vectors)
        and not (recorded and (_is_for_the_layers(x, w, geom, by_batch) or _are_odd_statistics(mean, var, by_batch)))
    )


def _is_usual(
    x: Any, w: Any, geom: Geom, residual: torch.Tensor | None, channels_last: bool, elementwise: bool
) -> bool:
    """The same of the convolution and the sum. `elementwise`: an elementwise operation follows."""
    if (
        w is None
        or x is None
        or x.dim() != 4
        or w.dim() != 4
        or w.layout is not _strided
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


def _is_for_the_layers(x: torch.Tensor, w: torch.Tensor, geom: Geom, by_batch: bool) -> bool:
    """True where the layers may raise, each with what those before it have left behind."""
    return (
        x.is_inference()
        and not torch.is_inference_mode_enabled()
        or by_batch
        and x.shape[0] == 1
        and geom.output_size(x.shape[2:], w.shape[2:]) == (1, 1)
    )


def _fits(residual: torch.Tensor, x: torch.Tensor, w: torch.Tensor, geom: Geom) -> bool:
    """True where a residual has the shape and the dtype of the convolution's result."""
    shape = residual.shape
    return (
        residual.dtype is ops.autocast_dtype(x) is ops.autocast_dtype(w)
        and len(shape) == 4
        and shape[0] == x.shape[0]
        and shape[1] == w.shape[0]
        and tuple(shape[2:]) == geom.output_size(x.shape[2:], w.shape[2:])
    )


def _in_another_format(residual: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> bool:
    """True where a residual that fits has other strides than the convolution's result: then those of the sum depend on
    which of the two comes first."""
    result = dense_strides(residual.shape, suggests_channels_last(x) or suggests_channels_last(w))
    return residual.stride() != result


def _one_pixel(x: torch.Tensor, w: torch.Tensor, geom: Geom) -> bool:
    """True where the result is one pixel in channels-last strides. To torch's elementwise operations it is contiguous
    as well, and their result has a contiguous tensor's strides, which an interpolation after them goes by."""
    asks = suggests_channels_last(x) or suggests_channels_last(w)
    return asks and geom.output_size(x.shape[2:], w.shape[2:]) == (1, 1)


_AS_IS = contextlib.nullcontext()


def _recorded(in_seam: bool) -> contextlib.AbstractContextManager[Any]:
    return autograd.contiguous_weight_gradients() if in_seam else _AS_IS


def _in_format(x: torch.Tensor, channels_last: bool) -> Any:
    if not channels_last or x.is_contiguous(memory_format=torch.channels_last):
        return x
    if autograd.needs_function(x) and not ops._functorch_active() and not ops.batched_the_older_way(x):
        return autograd.ChannelsLastFunction.apply(x)
    with where_copied(x):
        return x.contiguous(memory_format=torch.channels_last)


def _summand(residual: Any, channels_last: bool) -> Any:
    """A residual for a channels-last result, whose gradient comes back in its own format."""
    recorded = residual is not None and autograd.needs_function(residual)
    return _in_format(residual, channels_last) if recorded else residual
