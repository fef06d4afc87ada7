"""The differentiable operators: torch.autograd.Function classes, and the Autograd kernels of torch.ops.convext.

fprop, dgrad and wgrad are bilinear and closed under differentiation, so three Functions that call each other in their
backward and jvp give derivatives of every order, in both modes:

    y  = fprop(x, w)     dx  = dgrad(dy, w)      dw = wgrad(dy, x)
    dx = dgrad(dy, w)    ddy = fprop(g, w)       dw = wgrad(dy, g)       g: the gradient that arrives, shaped like x
    dw = wgrad(dy, x)    ddy = fprop(x, g)       dx = dgrad(dy, g)       g: shaped like w

The fused Functions run fused kernels backward. Where the backward pass is itself differentiated (create_graph=True)
they compute the same gradient from x, w and the parameters out of differentiable operations instead.

What lies between two fused layers need not be kept: the first keeps its convolution's output y for its own backward
pass, and the second can compute its input from that again (`Recomputable`). With `recompute`, a layer with little
arithmetic does not keep y either: it computes it again from its input (`Convolved`).
"""

from __future__ import annotations

import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import ops, reference
from .activation import BACKWARD, FORWARD, TABLE
from .backends import compiled_calls, tuned
from .memory_format import (
    fits_both_formats,
    memory_format,
    suggests_channels_last,
    weight_gradient_is_channels_last,
)
from .problem import Epilogue, Geom, accumulate_dtype


class _Level(threading.local):
    """Whether this thread is in the forward or jvp of a Function that records on one level of torch.func's stack. Those
    run with recording off, and the levels below must have it on again."""

    recording = False
    nchw_weights = False  # the weights' gradients are contiguous, whatever the format of the activations


_level = _Level()


def _lower_levels_record(jvp):
    """For a jvp: what it calls has derivatives of its own on the lower levels of torch.func's stack."""

    @functools.wraps(jvp)
    def wrapped(*args):
        former = _level.recording
        _level.recording = ops._functorch_active()
        try:
            return jvp(*args)
        finally:
            _level.recording = former

    return wrapped


def _save_for_jvp(ctx, *tensors) -> None:
    if forward_ad._current_level >= 0:  # only then: the reference would keep the tensors alive
        ctx.save_for_forward(*tensors)


def _needed(needed: bool, t):
    """What to save: nothing where no gradient wants it."""
    return t if needed else None


def _add(a, b):
    return b if a is None else a if b is None else a + b


def _fprop(x, w, bias, geom, channels_last=False):
    """fprop inside a derivative: recorded where a graph of it is wanted, through the operator's own Autograd kernel."""
    if torch.is_grad_enabled():
        return torch.ops.convext.fprop(x, w, bias, *geom, channels_last)
    return ops.fprop(x, w, bias, geom, channels_last)


def _dgrad(dy, w, input_size, geom, channels_last=None):
    if torch.is_grad_enabled():
        return torch.ops.convext.dgrad(dy, w, input_size, *geom, channels_last)
    return ops.dgrad(dy, w, input_size, geom, channels_last)


def _wgrad(dy, x, kernel_size, geom, channels_last=None):
    if torch.is_grad_enabled():
        return torch.ops.convext.wgrad(dy, x, kernel_size, *geom, channels_last)
    return ops.wgrad(dy, x, kernel_size, geom, channels_last)


def _y_is_channels_last(x, w, y) -> bool:
    if not suggests_channels_last(y) and fits_both_formats(y.shape):  # it may look the same in both
        return suggests_channels_last(x) or suggests_channels_last(w)
    return suggests_channels_last(y)


def _keep_formats(ctx, x, w, y) -> None:
    """The formats of dx and dw: that of y, which x and w decide, whatever that of dy."""
    ctx.channels_last = _y_is_channels_last(x, w, y)
    ctx.dw_channels_last = not _level.nchw_weights and weight_gradient_is_channels_last(w, ctx.channels_last)


def _keep_given_format(ctx, w, channels_last) -> None:
    ctx.channels_last = channels_last
    ctx.dw_channels_last = not _level.nchw_weights and weight_gradient_is_channels_last(w, channels_last)


def _dgrad_and_wgrad(ctx, dy, x, w, x_needed, w_needed):
    """dx and dw of a Function's convolution, None where not needed."""
    if x_needed and w_needed and not torch.is_grad_enabled():
        return ops.dgrad_and_wgrad(dy, x, w, ctx.geom, ctx.channels_last, ctx.dw_channels_last)
    return (
        _dgrad(dy, w, ctx.input_size, ctx.geom, ctx.channels_last) if x_needed else None,
        _wgrad(dy, x, ctx.kernel_size, ctx.geom, ctx.dw_channels_last) if w_needed else None,
    )


def _channel_sum(dy):
    return dy.sum((0, *range(2, dy.dim())))


class _Function(Function):
    """A Function whose `apply` costs a fifth: without torch.func, the base class would look up the signature of
    `forward` on every call, or have its C code do so, only to fill in defaults that the call below fills in by itself.

    `on_one_level` is the class that the call below is one of: the same methods without what torch.func adds to a
    Function, as torch.func itself makes them (torch/_functorch/autograd_function.py). It goes straight to the graph,
    under the same name.
    """

    on_one_level: ClassVar[Any]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.on_one_level = type(cls)(
            cls.__name__,
            (_SingleLevelFunction,),
            {  # type: ignore[misc]
                "__doc__": cls.__doc__,
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                **{
                    name: staticmethod(getattr(cls, name))
                    for name in ("forward", "setup_context", "backward", "jvp", "_compiled_autograd_key")
                },
            },
        )

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if ops._functorch_active():
            with tuned.unmeasured():
                return super().apply(*args)
        return cls.on_one_level.apply(*unwrap_dead_wrappers(args))


class contiguous_weight_gradients:
    """What is recorded inside, on this thread, has contiguous gradients of weights: activations are channels-last then
    although the user's tensors are not."""

    def __enter__(self) -> None:
        self._former = _level.nchw_weights
        self._set(True)

    def __exit__(self, *exc: object) -> None:
        self._set(self._former)

    def _set(self, nchw_weights: bool) -> None:
        _level.nchw_weights = nchw_weights
        compiled_calls.record_weights(not nchw_weights)


class ChannelsLastFunction(_Function):
    """x.contiguous(memory_format=torch.channels_last), whose gradient is contiguous as x is. `apply(x)`"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy.contiguous()

    @staticmethod
    def jvp(ctx, x_t):
        return x_t.contiguous(memory_format=torch.channels_last)


class Conv2dFunction(_Function):
    """y = x * w + bias. `apply(x, w, bias, geom, channels_last=False)` with x (N, C, H, W), w (K, C/groups, R, S),
    bias (K) or None, geom a `convext.problem.Geom`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, geom, channels_last=False):
        return ops.fprop(x, w, bias, geom, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _, geom = inputs[:4]
        x_needed, w_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(_needed(w_needed, x), _needed(x_needed, w))
        _save_for_jvp(ctx, x, w)
        ctx.geom = geom
        ctx.input_size, ctx.kernel_size = x.shape[2:], w.shape[2:]
        if geom.axes == 2:
            _keep_formats(ctx, x, w, output)
        else:
            _keep_given_format(ctx, w, inputs[4:] == (True,))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None, None
        x, w = ctx.saved_tensors
        x_needed, w_needed, bias_needed = ctx.needs_input_grad[:3]
        dx, dw = _dgrad_and_wgrad(ctx, dy, x, w, x_needed, w_needed)
        db = _channel_sum(dy) if bias_needed else None
        return dx, dw, db, None, None

    @staticmethod
    @_lower_levels_record
    def jvp(ctx, x_t, w_t, bias_t, *_):
        x, w = ctx.saved_tensors
        y_t = None if x_t is None else _fprop(x_t, w, bias_t, ctx.geom)
        if w_t is not None:
            y_t = _add(y_t, _fprop(x, w_t, bias_t if y_t is None else None, ctx.geom))
        if y_t is None and bias_t is not None:
            size = ctx.geom.output_size(ctx.input_size, ctx.kernel_size)
            y_t = _per_channel(bias_t, x.dim()).expand(x.shape[0], w.shape[0], *size).clone()
        return y_t


class Conv3dFunction(Conv2dFunction):
    """Conv2dFunction of volumes: x (N, C, D, H, W), w (K, C/groups, T, R, S), a geom of three axes. `channels_last`
    says the format of the result and of its gradients."""


def backward_of_call(dy, x, w, geom, input_size, kernel_size, channels_last, dw_channels_last, needed):
    """Conv2dFunction.backward of what convext/_call recorded: `needed` says whose gradients are wanted, x, w, bias."""
    ctx = types.SimpleNamespace(
        geom=Geom(*geom),
        input_size=input_size,
        kernel_size=kernel_size,
        channels_last=channels_last,
        dw_channels_last=dw_channels_last,
    )
    return *_dgrad_and_wgrad(ctx, dy, x, w, *needed[:2]), _channel_sum(dy) if needed[2] else None


class DepthwiseConv2dFunction(Conv2dFunction):
    """Conv2dFunction with groups = C: the name under which depthwise convolutions stand in a graph."""


class DilatedConv2dFunction(Conv2dFunction):
    """Conv2dFunction with dilation: the name under which dilated convolutions stand in a graph."""


# ---- rows, which are images of height one, and transposed convolutions -----------------------------------------------


def _image(t):
    """(N, C, W) as (N, C, 1, W), a filter likewise; and an image, or None, as it is."""
    return t.unsqueeze(2) if t is not None and t.dim() == 3 else t


def _as_it_was(y, dims: int):
    """A fresh image of height one as rows, where `dims` is 3. Nobody has recorded it, and it becomes no view, as ATen's
    is none: autograd refuses to write into views that a Function returns, and `detach_` into any. Where a transform
    holds it, `functional` copies it."""
    if dims != 3:
        return y
    return y.squeeze(2) if ops._functorch_active() or ops.batches_the_older_way() else y.squeeze_(2)


def _gradient_as_it_was(t, dims: int):
    """The same of a gradient, which may be recorded."""
    return _as_it_was(t, dims) if dims != 3 or not torch.is_grad_enabled() else t.squeeze(2)


def result_is_channels_last(x: torch.Tensor, w: torch.Tensor) -> bool:
    """The format of the result of a convolution of x, rows or images, and of its gradients: as in ATen, which first
    makes rows contiguous. Volumes: `memory_format.volume_is_channels_last`."""
    rows = x.dim() == 3
    return (not rows or x.is_contiguous()) and suggests_channels_last(_image(x)) or suggests_channels_last(_image(w))


def _in_format(y, channels_last):
    """What fprop returned in the format that it was asked for: it takes channels-last tensors as asking for that."""
    return y if channels_last or not suggests_channels_last(y) else y.contiguous()


def conv1d(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geom: Geom) -> torch.Tensor:
    """Rows x (N, C, W) * w (K, C/groups, S) + bias. Not differentiable: Conv1dFunction is.

    Rows whose channels lie together are read as they lie, and the result is copied instead: ATen copies x."""
    y = ops.fprop(_image(x), _image(w), bias, geom)
    return _as_it_was(y if x.is_contiguous() else _in_format(y, suggests_channels_last(_image(w))), 3)


class Conv1dFunction(_Function):
    """y = x * w + bias of rows. `apply(x, w, bias, geom)` with x (N, C, W), w (K, C/groups, S), bias (K) or None, geom
    that of images of height one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, geom):
        return conv1d(x, w, bias, geom)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _, geom = inputs
        x_needed, w_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(_needed(w_needed, x), _needed(x_needed, w))
        _save_for_jvp(ctx, x, w)
        ctx.geom = geom
        ctx.input_size, ctx.kernel_size = (1, x.shape[2]), (1, w.shape[2])
        _keep_given_format(ctx, _image(w), result_is_channels_last(x, w))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None
        x, w = map(_image, ctx.saved_tensors)
        x_needed, w_needed, bias_needed = ctx.needs_input_grad[:3]
        dy = _image(dy)
        dx, dw = _dgrad_and_wgrad(ctx, dy, x, w, x_needed, w_needed)
        return (
            _gradient_as_it_was(dx, 3) if x_needed else None,
            _gradient_as_it_was(dw, 3) if w_needed else None,
            _channel_sum(dy) if bias_needed else None,
            None,
        )

    @staticmethod
    @_lower_levels_record
    def jvp(ctx, x_t, w_t, bias_t, _):
        x, w = map(_image, ctx.saved_tensors)
        y_t = None if x_t is None else _fprop(_image(x_t), w, bias_t, ctx.geom)
        if w_t is not None:
            y_t = _add(y_t, _fprop(x, _image(w_t), bias_t if y_t is None else None, ctx.geom))
        if y_t is None and bias_t is not None:
            q = ctx.geom.output_size(ctx.input_size, ctx.kernel_size)[1]
            return bias_t[:, None].expand(x.shape[0], w.shape[0], q).clone()
        return None if y_t is None else y_t.squeeze(2)


def conv_transpose(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, ...], geom: Geom, channels_last: bool
) -> torch.Tensor:
    """dgrad(x, w) + bias, of `size`, (H, W) or (D, H, W): x (N, K, P, Q), rows (N, K, Q) or volumes (N, K, Z, P, Q).
    Not differentiable: ConvTransposeFunction is."""
    y = ops.conv_transpose(_image(x), _image(w), bias, size, geom, channels_last)
    return _as_it_was(y, x.dim())


def _per_channel(bias, dims: int):
    return bias.view(-1, *(1,) * (dims - 2))


class ConvTransposeFunction(_Function):
    """y = dgrad(x, w) + bias, the transposed convolution of images, rows or volumes: its gradients are fprop and wgrad.
    `apply(x, w, bias, size, geom, channels_last)` with x (N, K, P, Q), w (K, C/groups, R, S), bias (C) or None, size
    that of y, and the format of y and of the gradients; rows lack the height of x and w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, size, geom, channels_last):
        return conv_transpose(x, w, bias, size, geom, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _, size, geom, channels_last = inputs
        x_needed, w_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(_needed(w_needed, x), _needed(x_needed, w))
        _save_for_jvp(ctx, x, w)
        ctx.geom, ctx.size, ctx.dims = geom, size, x.dim()
        ctx.shape, ctx.kernel_size = output.shape, _image(w).shape[2:]
        _keep_given_format(ctx, _image(w), channels_last)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 6
        x, w = map(_image, ctx.saved_tensors)
        x_needed, w_needed, bias_needed = ctx.needs_input_grad[:3]
        dy = _image(dy)
        dx = dw = None
        if x_needed:
            dx = _in_format(_fprop(dy, w, None, ctx.geom, ctx.channels_last), ctx.channels_last)
            dx = _gradient_as_it_was(dx, ctx.dims)
        if w_needed:
            dw = _gradient_as_it_was(_wgrad(x, dy, ctx.kernel_size, ctx.geom, ctx.dw_channels_last), ctx.dims)
        return dx, dw, _channel_sum(dy) if bias_needed else None, None, None, None

    @staticmethod
    @_lower_levels_record
    def jvp(ctx, x_t, w_t, bias_t, *_):
        x, w = map(_image, ctx.saved_tensors)
        y_t = _add(
            None if x_t is None else _dgrad(_image(x_t), w, ctx.size, ctx.geom, ctx.channels_last),
            None if w_t is None else _dgrad(x, _image(w_t), ctx.size, ctx.geom, ctx.channels_last),
        )
        y_t = y_t.squeeze(2) if y_t is not None and ctx.dims == 3 else y_t
        if bias_t is None:
            return y_t
        bias_t = _per_channel(bias_t, ctx.dims)
        return bias_t.expand(ctx.shape).clone() if y_t is None else y_t + bias_t


class DgradFunction(_Function):
    """dx from dy and w: `apply(dy, w, input_size, geom, channels_last=None)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, w, input_size, geom, channels_last=None):
        return ops.dgrad(dy, w, input_size, geom, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, w, input_size, geom = inputs[:4]
        dy_needed, w_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(_needed(w_needed, dy), _needed(dy_needed, w))
        _save_for_jvp(ctx, dy, w)
        ctx.geom, ctx.channels_last = geom, suggests_channels_last(output)
        ctx.input_size, ctx.kernel_size = input_size, w.shape[2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None, None, None, None
        dy, w = ctx.saved_tensors
        dy_needed, w_needed = ctx.needs_input_grad[:2]
        ddy = _fprop(g, w, None, ctx.geom) if dy_needed else None
        dw = _wgrad(dy, g, ctx.kernel_size, ctx.geom) if w_needed else None
        return ddy, dw, None, None, None

    @staticmethod
    @_lower_levels_record
    def jvp(ctx, dy_t, w_t, *_):
        dy, w = ctx.saved_tensors
        return _add(
            None if dy_t is None else _dgrad(dy_t, w, ctx.input_size, ctx.geom, ctx.channels_last),
            None if w_t is None else _dgrad(dy, w_t, ctx.input_size, ctx.geom, ctx.channels_last),
        )


class WgradFunction(_Function):
    """dw from dy and x: `apply(dy, x, kernel_size, geom, channels_last=None)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, kernel_size, geom, channels_last=None):
        return ops.wgrad(dy, x, kernel_size, geom, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, kernel_size, geom = inputs[:4]
        dy_needed, x_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(_needed(x_needed, dy), _needed(dy_needed, x))
        _save_for_jvp(ctx, dy, x)
        ctx.geom, ctx.channels_last = geom, suggests_channels_last(output)
        ctx.input_size, ctx.kernel_size = x.shape[2:], kernel_size
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None, None, None, None
        dy, x = ctx.saved_tensors
        dy_needed, x_needed = ctx.needs_input_grad[:2]
        ddy = _fprop(x, g, None, ctx.geom) if dy_needed else None
        dx = _dgrad(dy, g, ctx.input_size, ctx.geom) if x_needed else None
        return ddy, dx, None, None, None

    @staticmethod
    @_lower_levels_record
    def jvp(ctx, dy_t, x_t, *_):
        dy, x = ctx.saved_tensors
        return _add(
            None if dy_t is None else _wgrad(dy_t, x, ctx.kernel_size, ctx.geom, ctx.channels_last),
            None if x_t is None else _wgrad(dy, x_t, ctx.kernel_size, ctx.geom, ctx.channels_last),
        )


def _cast(grad, like_dtype):
    return None if grad is None or like_dtype is None else grad.to(like_dtype)


def _refuse_forward_mode(name: str):
    raise NotImplementedError(
        f"{name} has no forward-mode derivative: call convext.conv_bn_act, which takes a path "
        "that has one when a tensor carries a tangent"
    )


_MOST_PRODUCTS_A_BYTE = 64
_Sums = tuple[int | None, ...]  # what `_sums_of_bits` returns


def is_cheap(w: torch.Tensor, dtype: torch.dtype) -> bool:
    """The rule by which `recompute` drops the output of a convolution with filters w (K, C/groups, R, S), in `dtype`:
    an element of it takes no more than 64 products for each of its bytes, in float32 so 256. That is any usual
    depthwise convolution, a 1x1 convolution of up to 256 channels, and a network's first layer."""
    return w.numel() <= _MOST_PRODUCTS_A_BYTE * dtype.itemsize * w.shape[0]


class Convolved(NamedTuple):
    """How y = x * w + bias is computed again where nobody keeps it: x is a tensor, or the recipe of one whose own y is
    kept. `sums` and `versions` tell whether the tensors are still those that y was computed of."""

    x: Any  # torch.Tensor | Recipe, which mypy cannot have
    w: torch.Tensor
    bias: torch.Tensor | None
    geom: Geom
    channels_last: bool
    sums: _Sums
    versions: tuple[int, ...]

    def was_written(self) -> bool:
        """Whether one of the tensors was written since, so that a reader must keep its input itself."""
        return _versions(self.x, self.w, self.bias) != self.versions

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (*(self.x.tensors() if isinstance(self.x, Recipe) else (self.x,)), self.w, self.bias)

    def holding(self, tensors: Iterator[Any]) -> Convolved:
        x = self.x.holding(tensors) if isinstance(self.x, Recipe) else next(tensors)
        return self._replace(x=x, w=next(tensors), bias=next(tensors))

    def values(self) -> torch.Tensor:
        x = self.x.values() if isinstance(self.x, Recipe) else self.x
        return _convolved_again(x, self.w, self.bias, self.geom, self.channels_last, self.sums)


def _versions(*tensors: Any) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if isinstance(t, torch.Tensor))


def _sums_of_bits(*tensors: torch.Tensor | None) -> _Sums:
    """Of each tensor that no dispatcher has to see, on the CPU, the sum of its elements' bits, else None."""
    return tuple(
        t.detach().view(_BITS[t.dtype.itemsize]).sum(dtype=torch.int64).item()  # type: ignore[misc]
        if t is not None and t.device.type == "cpu" and not t.is_neg() and ops.all_plain(t)
        else None
        for t in tensors
    )


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _convolved_again(x, w, bias, geom, channels_last, sums):
    """x * w + bias in a backward pass, as it was computed in the forward pass: by the same kernel, if the backend is
    the same, and in the same dtype, whatever autocast is on now. `sums`: the _sums_of_bits of w and bias at that time.

    Tensors that torch knows to be written are refused as they are unpacked, by the error that any saved tensor raises.
    What is written behind torch's back (a fused optimizer's step, `weight.data`) would give an output that never was.
    """
    if any(a is not None and b is not None and a != b for a, b in zip(sums, _sums_of_bits(w, bias))):
        raise RuntimeError(
            f"recompute=True: the weight or the bias of a convolution with weight {list(w.shape)} was modified between "
            "its forward and its backward pass, behind autograd (by a fused optimizer or through .data), so that its "
            "output cannot be computed again; call backward before the change, or keep the output (recompute=False)"
        )
    with torch._C._ExcludeDispatchKeyGuard(ops._AUTOCAST_KEYS):
        return ops.fprop(x, w, bias, geom, channels_last)


class Handoff:
    """From a reader of a Recomputable to the layer that computed it, within a backward pass: what the reader's pass
    over y found about the gradient that it returns, and y, where it had to compute that.

    sums_up  whether the layer begins with such sums: where mean and var are y's own
    output   y, from the first reader that computes it until the layer takes it
    """

    __slots__ = ("_given", "output", "sums_up")

    def __init__(self, sums_up: bool) -> None:
        self._given: tuple[Any, ...] | None = None
        self.output: torch.Tensor | None = None
        self.sums_up = sums_up

    def take_output(self) -> torch.Tensor | None:
        output, self.output = self.output, None
        return output

    def put(self, gradient: torch.Tensor, sums: Any) -> None:
        self._given = weakref.ref(gradient), gradient._version, sums

    def take(self, gradient: torch.Tensor) -> Any:
        """The sums of a gradient if it is the very tensor, unchanged, that they are of, else None: where there are two
        readers, or a hook on a node of the graph changes it, others arrive."""
        given, self._given = self._given, None
        if given is None or given[0]() is not gradient or given[1] != gradient._version:
            return None
        return given[2]


class Recipe(NamedTuple):
    """How a layer's result is computed again from what the layer keeps for its backward pass:
    activation(batch_norm(y)), or activation(y) where mean is None. All are (C) but for y (N, C, H, W), or what it is
    computed from. gamma and beta are copies, so that who writes the parameters afterwards changes nothing, as where the
    result itself is kept. handoff: to that layer, or None where nothing is to be handed on."""

    y: torch.Tensor | Convolved
    mean: torch.Tensor | None
    var: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    eps: float
    activation: str
    handoff: Handoff | None

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(None, self.mean, self.var, self.gamma, self.beta, None, self.eps, self.activation)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those to be saved."""
        return (*(self.y.tensors() if isinstance(self.y, Convolved) else (self.y,)), *self[1:5])

    def holding(self, tensors: Iterator[Any]) -> Recipe:
        """The same of other tensors, given in the order of `tensors()`."""
        y = self.y.holding(tensors) if isinstance(self.y, Convolved) else next(tensors)
        return Recipe(y, next(tensors), next(tensors), next(tensors), next(tensors), *self[5:])

    def with_output(self, for_the_layer: bool) -> Recipe:
        """With y, computed again where it is not kept. `for_the_layer`: the layer's own backward pass follows, and
        takes it."""
        if not isinstance(self.y, Convolved):
            return self
        handoff = self.handoff
        y = None if handoff is None else handoff.output
        if y is None:
            y = self.y.values()
        if handoff is not None and for_the_layer:
            handoff.output = y
        return self._replace(y=y)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """The result, by the very call of the forward pass, whose kernel does not depend on the number of threads: so
        the same to the last bit, the sign that ReLU goes by among them, as long as the backend is the same."""
        y = self.with_output(for_the_layer=False).y
        assert isinstance(y, torch.Tensor)
        if self.mean is None:
            return FORWARD[self.activation](y)
        return ops.bn_act(y, self.epilogue)


class Recomputable(NamedTuple):
    """A layer's result for readers that do not keep it, but the recipe.

    computed  the `values`, or nothing before a reader asks for them: one that computes by the recipe does not
    handle    of their shape and of a single element in memory, never read: gradients of the result are those of this
    rows      where the values stand for a linear layer's result, as an image of one row: the shape of that
    output    the recipe's y where that is not kept and the values are not computed yet, else nothing
    """

    computed: list[torch.Tensor]
    handle: torch.Tensor
    recipe: Recipe
    rows: tuple[int, ...] | None = None
    output: list[torch.Tensor] = []  # nothing is added to it

    @property
    def values(self) -> torch.Tensor:
        """The result (N, C, H, W), through which no gradient goes, in memory that nobody else sees."""
        if not self.computed:
            self.computed.append(self.recipe._replace(y=self.like).values())
            self.output.clear()
        return self.computed[0]

    @property
    def like(self) -> torch.Tensor:
        """A tensor like `values`, to be asked for anything but its elements: where it `is_deferred`, y."""
        if self.computed:
            return self.computed[0]
        y = self.recipe.y
        return y if isinstance(y, torch.Tensor) else self.output[0]

    @property
    def is_deferred(self) -> bool:
        """Whether nobody has computed the values yet."""
        return not self.computed

    def tensor(self) -> torch.Tensor:
        """The result as any other tensor, for any reader."""
        result: torch.Tensor = ReattachFunction.apply(self.values, self.handle)
        return result if self.rows is None else result.permute(0, 2, 3, 1).view(self.rows)


class ReattachFunction(_Function):
    """values, whose gradient is that of `handle`: `apply(values, handle)`"""

    generate_vmap_rule = True

    @staticmethod
    def forward(values, handle):
        return values.data  # no view, which autograd would not let be written

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return None, dy

    @staticmethod
    def jvp(ctx, _, handle_t):
        return handle_t


def _handle(out):
    return out.new_empty_strided(out.shape, (0,) * out.dim())


class Chain(NamedTuple):
    """What a fused Function knows of its neighbours, and what it keeps.

    recipe   that of the Recomputable whose values are x, or None of any other x
    keeps    whether the result is to be the values of a Recomputable
    handoff  that of its recipe
    sums     None where it keeps its convolution's output, else the _sums_of_bits of weight and bias, of which the
             output is computed again; swap/schedule/kept.py sees to it that the recipe of x is of a y that is kept
             then, so that no layer computes another's output again in order to compute its own
    offset   a copy of beta, where there is one already
    source   the Recomputable where x is not its values but its `like`, which are to be computed as x is read
    defers   whether the values of the Recomputable that the result becomes are left to its readers
    """

    recipe: Recipe | None = None
    keeps: bool = False
    handoff: Handoff | None = None
    sums: _Sums | None = None
    offset: torch.Tensor | None = None
    source: Recomputable | None = None
    defers: bool = False


_ALONE = Chain()


def _keep_input(ctx, x, handle, recipe) -> tuple[torch.Tensor | None, ...]:
    """What to save for x: itself, or its recipe. The handle holds no data, and so is nothing for hooks to see."""
    ctx.handle, ctx.recipe = handle, None if recipe is None else recipe.holding(itertools.repeat(None))
    return (x,) if recipe is None else recipe.tensors()


def _kept_input(ctx, saved):
    """x, recorded, out of what was saved for it; or None where no graph is wanted and it is to be computed again."""
    if ctx.recipe is None:
        return saved[0]
    if not torch.is_grad_enabled():
        return None
    return ReattachFunction.apply(ctx.recipe.holding(iter(saved)).values(), ctx.handle)


def _dropped_output(ctx, x, saved, w, bias):
    """The convolution's output that was not kept, and x, where it had to be computed for that: a reader of the result
    may just have computed it."""
    y = None if ctx.handoff is None else ctx.handoff.take_output()
    if y is None:
        x = ctx.recipe.holding(iter(saved)).values() if x is None else x
        y = _convolved_again(x, w, bias, ctx.geom, ctx.channels_last, ctx.sums)
    return y, x


class _Reading(NamedTuple):
    """What a backward pass reads of a Recomputable: its recipe, with y, and whether the pass is to sum up for the layer
    before."""

    recipe: Recipe
    sums_up: bool


def _reading(ctx, x, saved, x_needed, w_needed):
    """What follows of what was saved for x, which is None as `_kept_input` has it; None where there is x."""
    if x is not None or not w_needed:
        return None
    recipe = ctx.recipe.holding(iter(saved))
    followed = recipe.handoff is not None and x_needed and torch._C._will_engine_execute_node(ctx.handle.grad_fn)
    return _Reading(recipe.with_output(for_the_layer=followed), followed and recipe.handoff.sums_up)


def _gradients(ctx, dy, x, reading, w, x_needed, w_needed):
    """dx and dw of a Function's convolution, of x or what `_reading` found for it."""
    if reading is None:
        return _dgrad_and_wgrad(ctx, dy, x, w, x_needed, w_needed)
    recipe = reading.recipe
    if reading.sums_up:
        # The pass that computes x again meets y and has dx at hand: it sums up for the batch norm before as well.
        dx = ops.dgrad(dy, w, ctx.input_size, ctx.geom, ctx.channels_last)
        found = ops.bn_act_and_sums(dx, recipe.y, recipe.epilogue)
        if found is not None:
            x, sums = found
            recipe.handoff.put(dx, sums)
        else:
            x = recipe.values()
        return dx, ops.wgrad(dy, x, ctx.kernel_size, ctx.geom, ctx.dw_channels_last)
    return _dgrad_and_wgrad(ctx, dy, recipe.values(), w, x_needed, w_needed)


def _gradients_in_one(ctx, dout, y, epilogue, sums, x, reading, w):
    """dx, dw, dgamma, dbeta of a batch norm in training and its convolution, or None where no backend has them in one
    call. x or `reading` as in `_gradients`."""
    before, sums_up = None, False
    if reading is not None:
        if reading.recipe.mean is None:
            return None
        x, before, sums_up = reading.recipe.y, reading.recipe.epilogue, reading.sums_up
    found = ops.bn_conv_backward(
        dout, y, epilogue, sums, x, before, w, ctx.geom, ctx.channels_last, ctx.dw_channels_last, sums_up
    )
    if found is None:
        return None
    dx, dw, dgamma, dbeta, sums_of_dx = found
    if sums_up:
        reading.recipe.handoff.put(dx, sums_of_dx)
    return dx, dw, dgamma, dbeta


def _deferring(x, w, epilogue, geom, chain):
    """out, y, mean, var of conv_bn_act_train without what a Chain leaves out: x's values, unless no kernel computes
    them as it reads, and out, in whose place is an empty tensor then."""
    found = None
    if chain.source is not None:
        found = ops.fprop_batch_stats(x, w, epilogue, geom, chain.recipe.epilogue)
        x = chain.source.values if found is None else x
    if found is None:
        found = ops.fprop_batch_stats(x, w, epilogue, geom)
        assert found is not None
    y, mean, var = found
    out = y.new_empty(0) if chain.defers else ops.bn_act(y, epilogue._replace(bias=None, mean=mean, var=var))
    return out, y, mean, var


class ConvBNActFunction(_Function):
    """out = activation(batch_norm(x * w + bias) + residual). Forward mode raises NotImplementedError.

    `apply(x, w, *epilogue, geom, update)` with the fields of a `convext.problem.Epilogue`: mean and var are the
    statistics to normalise by, or None for the batch's own. Returns (out, y) or, in the second form, (out, y, mean,
    var): y is the convolution's output and var is biased. Only `out` is differentiable.

    `update(y, mean, var)`, or None, is called, in the second form, when all is computed and before anything is saved:
    what is saved may go to a hook that raises, as that of torch.utils.checkpoint does when it has recomputed enough,
    and by then F.batch_norm has updated its running statistics.

    `handle, chain` behind these: that of a Recomputable whose values are x, or None, and a Chain. With `chain.keeps`
    there is no residual, mean and var are its own to keep, the last of what it returns is a handle of `out`, and that
    alone is differentiable.

    Saved are y, unless it is dropped, and vectors, besides the parameters and x or its recipe: z, which the activation
    saw, follows from them but for the residual. A ReLU's derivative follows from `out`, which PyTorch's keeps as well;
    others keep the residual.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x,
        w,
        bias,
        mean,
        var,
        gamma,
        beta,
        residual,
        eps,
        activation,
        geom,
        update,
        handle=None,
        chain=_ALONE,
    ):
        found: tuple[torch.Tensor, ...]
        if mean is None:
            epilogue = Epilogue(bias, None, None, gamma, beta, residual, eps, activation)
            if chain.source is None and not chain.defers:
                found = ops.conv_bn_act_train(x, w, epilogue, geom)
            else:
                found = _deferring(x, w, epilogue, geom, chain)
            if update is not None:
                update(*found[1:])
        else:
            y = ops.fprop(x, w, bias, geom)
            acc = accumulate_dtype(y.dtype)
            epilogue = Epilogue(None, mean.to(acc), var.to(acc), gamma, beta, residual, eps, activation)
            found = ops.bn_act(y, epilogue), y
        return (*found, _handle(found[1])) if chain.keeps else found

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, mean, var, gamma, beta, residual, ctx.eps, ctx.activation, ctx.geom, _, *kept = inputs
        handle, chain = kept or (None, _ALONE)
        ctx.keeps, ctx.handoff, ctx.sums = chain.keeps, chain.handoff, chain.sums
        out, y = output[:2]
        ctx.training = mean is None
        ctx.mark_non_differentiable(*(output[:-1] if ctx.keeps else output[1:]))
        if ctx.training:
            mean, var = output[2:4]
        elif not ctx.keeps:  # running statistics move in training, unseen by autograd; this graph keeps its own
            mean, var = mean.clone(), var.clone()
        ctx.input_size, ctx.kernel_size = x.shape[2:], w.shape[2:]
        _keep_formats(ctx, x, w, y)
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (gamma, beta))
        ctx.by_output = residual is not None and TABLE[ctx.activation].by_output
        if ctx.by_output:
            seen = _needed(ctx.activation != "identity", out)
        else:
            seen = residual
        # PyTorch's backward pass does not read beta: who writes it behind torch's back changes no gradient.
        offset = chain.offset
        if offset is None and beta is not None and not ctx.by_output and ctx.activation != "identity":
            offset = beta.detach().clone()
        kept = _keep_input(ctx, x, handle, chain.recipe)
        y = _needed(ctx.sums is None, y)
        ctx.save_for_backward(w, bias, mean, var, gamma, beta, seen, y, offset, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, *others):
        if ctx.keeps:
            dout = others[-1]
        if dout is None:
            return (None,) * 14
        w, bias, mean, var, gamma, beta, seen, y, offset, *kept = ctx.saved_tensors
        x_needed, w_needed, bias_needed, _, _, gamma_needed, beta_needed, residual_needed = ctx.needs_input_grad[:8]
        x_needed = x_needed or ctx.handle is not None and ctx.needs_input_grad[12]
        x = _kept_input(ctx, kept)
        activation, residual = ctx.activation, seen
        if ctx.by_output:  # the residual's gradient, of which the rest is that of a batch norm alone
            if seen is not None:
                recorded = torch.is_grad_enabled()
                dout = BACKWARD[activation](dout, seen) if recorded else ops.act_backward(dout, seen, activation)[0]
            activation, residual = "identity", None
        if torch.is_grad_enabled():
            y = _fprop(x, w, bias, ctx.geom)
            if ctx.training:
                mean, var = reference.batch_stats(y)
            bn_act_backward = reference.bn_act_backward
        else:
            if ctx.sums is not None:
                y, x = _dropped_output(ctx, x, kept, w, bias)
            if not ctx.training:
                acc = accumulate_dtype(y.dtype)
                mean, var = mean.to(acc), var.to(acc)
            beta = beta if offset is None else offset
            bn_act_backward = ops.bn_act_backward
        epilogue = Epilogue(None, mean, var, gamma, beta, residual, ctx.eps, activation)
        sums = None if ctx.handoff is None or torch.is_grad_enabled() else ctx.handoff.take(dout)
        reading = _reading(ctx, x, kept, x_needed, w_needed)
        dy = dresidual = found = None
        if x_needed and w_needed and not bias_needed and ctx.training and residual is None:
            if not torch.is_grad_enabled():
                found = _gradients_in_one(ctx, dout, y, epilogue, sums, x, reading, w)
        if found is not None:
            dx, dw, dgamma, dbeta = found
        else:
            if sums is not None:
                dy, dgamma, dbeta = ops.bn_act_from_sums(dout, y, epilogue, sums)
            else:
                dy, dgamma, dbeta, dresidual = bn_act_backward(dout, y, epilogue, ctx.training)
            dx, dw = _gradients(ctx, dy, x, reading, w, x_needed, w_needed)
        if ctx.by_output:
            dresidual = dout
        return (
            dx if ctx.handle is None else None,
            dw,
            _channel_sum(dy) if bias_needed else None,
            None,
            None,
            _cast(dgamma, ctx.dtypes[0]) if gamma_needed else None,
            _cast(dbeta, ctx.dtypes[1]) if beta_needed else None,
            dresidual if residual_needed else None,
            None,
            None,
            None,
            None,
            None if ctx.handle is None else dx,
            None,
        )

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode("ConvBNActFunction")


def _hardsigmoid_backward(dgate, z):
    if not torch.is_grad_enabled():
        return torch.ops.aten.hardsigmoid_backward(dgate, z)
    return dgate * ((z > -3) & (z < 3)) / 6  # ATen's own cannot be differentiated


# Of squeeze and excitation: gate(z), and the gradient of z from that of the gate.
GATES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sigmoid": (torch.sigmoid, lambda dgate, z: dgate * torch.sigmoid(z) * (1 - torch.sigmoid(z))),
    "hardsigmoid": (torch.nn.functional.hardsigmoid, _hardsigmoid_backward),
}


class SqueezeExciteFunction(_Function):
    """Squeeze and excitation of a Recomputable's values a, which are (N, C, H, W) and not written:

        out = a * gate(w2 activation(w1 mean(a) + b1) + b2)

    `apply(x, handle, w1, b1, w2, b2, activation, gate, recipe, epilogue)` with its handle and recipe, and x of which a
    is bn_act(x, epilogue); w1 (S, C, 1, 1), w2 (C, S, 1, 1), b1 (S) and b2 (C) or None, the names of activation and
    gate. Returns (out, means, z1, z2), of which out is differentiable. Forward mode raises NotImplementedError."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, handle, w1, b1, w2, b2, activation, gate, recipe, epilogue):
        linear = torch.nn.functional.linear
        means = ops.bn_act_image_sums(x, epilogue, factor=1 / (x.shape[2] * x.shape[3]))
        z1 = linear(means, w1.flatten(1), b1)
        z2 = linear(FORWARD[activation](z1), w2.flatten(1), b2)
        return ops.bn_act_gated(x, epilogue, GATES[gate][0](z2)), means, z1, z2

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, handle, w1, b1, w2, b2, ctx.activation, ctx.gate, recipe, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.pixels = x.shape[2] * x.shape[3]
        ctx.save_for_backward(w1, b1, w2, b2, *output[1:], *_keep_input(ctx, x, handle, recipe))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * 10
        w1, b1, w2, b2, means, z1, z2, *kept = ctx.saved_tensors
        activation, (gate, gate_backward) = ctx.activation, GATES[ctx.gate]
        a, reading = _kept_input(ctx, kept), None
        if a is None:
            reading = _reading(ctx, a, kept, True, True)
            y, epilogue = reading.recipe.y, reading.recipe.epilogue
            dgates = ops.bn_act_image_sums(y, epilogue, dout)
        else:
            means = a.mean((2, 3))
            z1 = torch.nn.functional.linear(means, w1.flatten(1), b1)
            z2 = torch.nn.functional.linear(FORWARD[activation](z1), w2.flatten(1), b2)
            dgates = (dout * a).sum((2, 3))
        dz2 = gate_backward(dgates, z2)
        dz1 = BACKWARD[activation](dz2 @ w2.flatten(1), z1)
        gates, shifts = gate(z2), dz1 @ w1.flatten(1) / ctx.pixels
        if reading is None:
            da = dout * gates[:, :, None, None] + shifts[:, :, None, None]
        else:
            da, sums = ops.bn_act_gated_backward(dout, y, epilogue, gates, shifts)
            if reading.sums_up:
                reading.recipe.handoff.put(da, sums)
        dw1, dw2 = dz1.t() @ means, dz2.t() @ FORWARD[activation](z1)
        return (
            None,
            da,
            dw1.as_strided(w1.shape, w1.stride()),
            None if b1 is None else dz1.sum(0),
            dw2.as_strided(w2.shape, w2.stride()),
            None if b2 is None else dz2.sum(0),
            *(None,) * 4,
        )

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode("SqueezeExciteFunction")


def squeeze_excite(
    x: Recomputable,
    w1: torch.Tensor | None,
    b1: torch.Tensor | None,
    w2: torch.Tensor | None,
    b2: torch.Tensor | None,
    activation: str,
    gate: str,
) -> torch.Tensor | None:
    """SqueezeExciteFunction, or None where it does not serve."""
    given = _Given.of(x, reads_recipes=True)
    if w1 is None or w2 is None or given.recipe is None:
        return None
    squeezed, channels = w1.shape[0], given.x.shape[1]
    if (
        x.rows is not None
        or carries_tangents()
        or not ops.takes_gates(given.x, w1, b1, w2, b2)
        or w1.shape != (squeezed, channels, 1, 1)
        or w2.shape != (channels, squeezed, 1, 1)
        or not (w1.flatten(1).is_contiguous() and w2.flatten(1).is_contiguous())
        or any(b is not None and b.shape != w.shape[:1] for b, w in ((b1, w1), (b2, w2)))
    ):
        return None
    epilogue = Epilogue() if given.source is None else given.recipe.epilogue
    out: torch.Tensor
    out, *_ = SqueezeExciteFunction.apply(
        given.x, given.handle, w1, b1, w2, b2, activation, gate, given.recipe, epilogue
    )
    return out


class MaxPool2dFunction(_Function):
    """F.max_pool2d of a Recomputable's values: `apply(values, handle, *settings)` with kernel size, stride, padding,
    dilation and ceil mode as F.max_pool2d takes them, stride [] for None. Returns (out, indices), of which out is
    differentiable. Forward mode raises NotImplementedError.

    ATen's keeps its input, too, but reads nothing of it in the backward pass besides sizes and memory format."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values, handle, *settings):
        return torch.ops.aten.max_pool2d_with_indices(values, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, _, *ctx.settings = inputs
        ctx.shape, ctx.channels_last = values.shape, suggests_channels_last(values)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 7
        (indices,) = ctx.saved_tensors
        like = torch.empty(
            ctx.shape, dtype=dout.dtype, device=dout.device, memory_format=memory_format(ctx.channels_last)
        )
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dout, like, *ctx.settings, indices)
        return None, dx, *(None,) * 5

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode("MaxPool2dFunction")


class ConvActFunction(_Function):
    """out = activation(x * w + bias + residual), for a convolution without a batch norm. Forward mode raises
    NotImplementedError. `apply(x, w, bias, residual, geom, activation)` returns (out, z): z is what the activation saw,
    or `out` again where its derivative follows from that; it is not differentiable.

    `handle, chain` behind these as in ConvBNActFunction; what keeps, or drops z, has an activation that needs z and no
    residual."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, residual, geom, activation, handle=None, chain=_ALONE):
        if TABLE[activation].by_output:  # PyTorch keeps the output as well: who writes into it is refused
            return ops.conv_bn_act(x, w, Epilogue(bias, None, None, None, None, residual, 0.0, activation), geom), None
        z = ops.conv_bn_act(x, w, Epilogue(bias, residual=residual), geom)
        out = FORWARD[activation](z)
        return (out, z, _handle(out)) if chain.keeps else (out, z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, residual, ctx.geom, ctx.activation, *kept = inputs
        handle, chain = kept or (None, _ALONE)
        ctx.keeps, ctx.handoff, ctx.sums = chain.keeps, chain.handoff, chain.sums
        out, z = output[:2]
        if ctx.keeps:
            ctx.mark_non_differentiable(out, z)
        elif z is not None:
            ctx.mark_non_differentiable(z)
        ctx.by_output = z is None
        ctx.input_size, ctx.kernel_size = x.shape[2:], w.shape[2:]
        _keep_formats(ctx, x, w, out)
        residual = _needed(not ctx.by_output, residual)
        seen = None if ctx.activation == "identity" else out if ctx.by_output else z
        seen = _needed(ctx.sums is None, seen)
        ctx.save_for_backward(w, bias, residual, seen, *_keep_input(ctx, x, handle, chain.recipe))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _, *others):
        if ctx.keeps:
            dout = others[0]
        if dout is None:
            return (None,) * 8
        w, bias, residual, z, *kept = ctx.saved_tensors
        x_needed, w_needed, bias_needed, residual_needed = ctx.needs_input_grad[:4]
        x_needed = x_needed or ctx.handle is not None and ctx.needs_input_grad[6]
        x = _kept_input(ctx, kept)
        if torch.is_grad_enabled() and not ctx.by_output:
            z = _add(_fprop(x, w, bias, ctx.geom), residual)
        elif ctx.sums is not None:
            z, x = _dropped_output(ctx, x, kept, w, bias)
        if ctx.activation == "identity" or torch.is_grad_enabled():
            dy, db = BACKWARD[ctx.activation](dout, z), None
        else:
            dy, db = ops.act_backward(dout, z, ctx.activation)
        if bias_needed and db is None:
            db = _channel_sum(dy)
        dx, dw = _gradients(ctx, dy, x, _reading(ctx, x, kept, x_needed, w_needed), w, x_needed, w_needed)
        return (
            dx if ctx.handle is None else None,
            dw,
            db if bias_needed else None,
            dy if residual_needed else None,
            None,
            None,
            None if ctx.handle is None else dx,
            None,
        )

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode("ConvActFunction")


# ---- Autograd kernels: the operators themselves are differentiable too -----------------------------------------------


def carries_tangents() -> bool:
    """True inside a forward-mode level, except where a Function computes its own forward."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def needs_function(*tensors: torch.Tensor | None) -> bool:
    """True when a call on these tensors must be recorded, for reverse or forward mode."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return carries_tangents()


def _apply_at_this_level(function, *args):
    """`function.apply` inside an Autograd kernel: by then the dispatcher has dealt with torch.func's stack of
    transforms, and it is on its present level alone that `function` has to record."""
    former = _level.recording
    _level.recording = ops._functorch_active()
    try:
        with enable_single_level_autograd_function():
            return function.on_one_level.apply(*args)
    finally:
        _level.recording = former


def _run_below(op, args, kwargs):
    """op without its Autograd kernel; what is below on torch.func's stack still records, as it would have if this level
    had not been there."""
    if not _level.recording:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)
    _level.recording = False
    try:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)
    finally:
        _level.recording = True


def _register(name: str, differentiable, tensor_count: int) -> None:
    op = getattr(torch.ops.convext, name).default

    def run(*args, **kwargs):
        if needs_function(*args[:tensor_count]):
            return differentiable(*args, **kwargs)
        return _run_below(op, args, kwargs)

    def kernel(*args, **kwargs):
        if not (ops._functorch_active() or _level.recording):
            return run(*args, **kwargs)
        with tuned.unmeasured():
            return run(*args, **kwargs)

    ops.LIBRARY.impl(name, kernel, "Autograd")


def _geom(stride, padding, dilation, groups) -> Geom:
    return Geom(tuple(stride), tuple(padding), tuple(dilation), groups)


def _differentiable_fprop(x, w, bias, stride, padding, dilation, groups, channels_last=False):
    if x.dim() in (4, 5) and x.shape[1] == 0:  # y has no channels then, and does not say how many filters there are
        return torch.convolution(x, w, bias, stride, padding, dilation, False, (0,) * len(stride), groups)
    function = Conv2dFunction if len(stride) == 2 else Conv3dFunction
    return _apply_at_this_level(function, x, w, bias, _geom(stride, padding, dilation, groups), channels_last)


def _differentiable_dgrad(dy, w, input_size, stride, padding, dilation, groups, channels_last=None):
    geom = _geom(stride, padding, dilation, groups)
    return _apply_at_this_level(DgradFunction, dy, w, torch.Size(input_size), geom, channels_last)


def _differentiable_wgrad(dy, x, kernel_size, stride, padding, dilation, groups, channels_last=None):
    geom = _geom(stride, padding, dilation, groups)
    return _apply_at_this_level(WgradFunction, dy, x, torch.Size(kernel_size), geom, channels_last)


def _differentiable_conv_bn_act(x, w, *arguments):
    epilogue, geom, _ = ops.take_apart(arguments)
    if epilogue.mean is None:
        return conv_act(x, w, epilogue, geom, _apply_at_this_level)
    return conv_bn_act(x, w, epilogue, geom, _apply_at_this_level)[0]


def _differentiable_conv_bn_act_train(x, w, *arguments):
    epilogue, geom, _ = ops.take_apart(arguments)
    ops.check_of_the_batch(epilogue)
    out, y, mean, var = conv_bn_act(x, w, epilogue, geom, _apply_at_this_level)
    return out, y, mean.to(var.dtype), var


def _apply(function, *args):
    return function.apply(*args)


def conv_act(
    x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom, apply: Callable[..., Any] = _apply
) -> torch.Tensor:
    """ConvActFunction of an epilogue without a batch norm, or in forward mode what it stands for."""
    bias, residual, activation = epilogue.bias, epilogue.residual, epilogue.activation
    if carries_tangents():
        return reference.act(apply(Conv2dFunction, x, w, bias, geom), residual, activation)
    return apply(ConvActFunction, x, w, bias, residual, geom, activation)[0]


def conv_bn_act(
    x: torch.Tensor,
    w: torch.Tensor,
    epilogue: Epilogue,
    geom: Geom,
    apply: Callable[..., Any] = _apply,
    update: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """ConvBNActFunction, or in forward mode, without `update`, what it stands for."""
    if not carries_tangents():
        return apply(ConvBNActFunction, x, w, *epilogue, geom, update)
    y = apply(Conv2dFunction, x, w, epilogue.bias, geom)
    stats = () if epilogue.mean is not None else reference.batch_stats(y)
    if stats:
        epilogue = epilogue._replace(mean=stats[0], var=stats[1])
    return reference.bn_act(y, epilogue), y, *stats


class _Given(NamedTuple):
    """What a chained call takes from an x that may be Recomputable: its values, its handle and its recipe, or itself
    alone. source: the Recomputable where x is not its values but its `like`."""

    x: torch.Tensor
    handle: torch.Tensor | None = None
    recipe: Recipe | None = None
    source: Recomputable | None = None

    @classmethod
    def of(cls, x: torch.Tensor | Recomputable, reads_recipes: bool = False) -> _Given:
        """`reads_recipes`: the call may compute the values as it reads them."""
        if not isinstance(x, Recomputable):
            return cls(x)
        y = x.recipe.y
        if isinstance(y, Convolved) and y.was_written():
            return cls(x.tensor())
        if reads_recipes and x.is_deferred and x.recipe.mean is not None:
            return cls(x.like, x.handle, x.recipe, x)
        return cls(x.values, x.handle, x.recipe)

    def sums_if_dropped(self, recompute: bool, w: torch.Tensor, bias: torch.Tensor | None) -> _Sums | None:
        """`Chain.sums` for a layer that is asked to recompute."""
        return _sums_of_bits(w, bias) if recompute and is_cheap(w, self.x.dtype) else None

    def output(
        self,
        y: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        geom: Geom,
        sums: _Sums | None,
    ) -> torch.Tensor | Convolved:
        """`Recipe.y`"""
        if sums is None:
            return y
        x = self.x if self.recipe is None else self.recipe
        versions = _versions(x, w, bias)
        return Convolved(x, w, bias, geom, _y_is_channels_last(self.x, w, y), sums, versions)


def chained_conv_act(
    x: torch.Tensor | Recomputable, w: torch.Tensor, epilogue: Epilogue, geom: Geom, keeps: bool, recompute: bool
) -> torch.Tensor | Recomputable:
    """conv_act outside forward mode of an x that may be Recomputable, as its result is with `keeps`. `recompute`: what
    the activation sees is not kept where `is_cheap`."""
    given = _Given.of(x)
    _, _, _, _, _, residual, _, activation = epilogue
    bias = epilogue.bias
    needs_z = residual is None and not TABLE[activation].by_output
    keeps = keeps and needs_z
    sums = given.sums_if_dropped(recompute and needs_z, w, bias)
    handoff = None if sums is None or not keeps else Handoff(sums_up=False)
    chain = Chain(given.recipe, keeps, handoff, sums)
    out, z, *others = ConvActFunction.apply(given.x, w, bias, residual, geom, activation, given.handle, chain)
    if not keeps:
        return out
    y = given.output(z, w, bias, geom, sums)
    return Recomputable([out], others[0], Recipe(y, None, None, None, None, 0.0, activation, handoff))


def chained_conv_bn_act(
    x: torch.Tensor | Recomputable,
    w: torch.Tensor,
    epilogue: Epilogue,
    geom: Geom,
    update: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None,
    keeps: bool,
    recompute: bool,
) -> torch.Tensor | Recomputable:
    """The first of conv_bn_act outside forward mode of an x that may be Recomputable, as its result is with `keeps`.
    `recompute`: the convolution's output is not kept where `is_cheap`."""
    bias, mean, var, gamma, beta, residual, eps, activation = epilogue
    plain = mean is None and ops.all_plain(x.like if isinstance(x, Recomputable) else x, w, *epilogue[:6])
    given = _Given.of(x, reads_recipes=plain)
    keeps = keeps and residual is None
    if keeps and mean is not None and var is not None:  # they may move before the backward pass
        acc = accumulate_dtype(given.x.dtype)
        mean, var = mean.to(acc, copy=True), var.to(acc, copy=True)
    sums = given.sums_if_dropped(recompute, w, bias)
    handoff = Handoff(sums_up=mean is None) if keeps and (mean is None or sums is not None) else None
    scale, offset = (t.detach().clone() if keeps and t is not None else None for t in (gamma, beta))
    defers = plain and keeps
    chain = Chain(given.recipe, keeps, handoff, sums, offset, given.source, defers)
    out, y, *others = ConvBNActFunction.apply(
        given.x, w, bias, mean, var, gamma, beta, residual, eps, activation, geom, update, given.handle, chain
    )
    if not keeps:
        return out
    *found, handle = others
    mean, var = found or (mean, var)
    recipe = Recipe(given.output(y, w, bias, geom, sums), mean, var, scale, offset, eps, activation, handoff)
    return Recomputable([] if defers else [out], handle, recipe, output=[y] if defers and sums is not None else [])


_register("fprop", _differentiable_fprop, 3)
_register("dgrad", _differentiable_dgrad, 2)
_register("wgrad", _differentiable_wgrad, 2)
_register("conv_bn_act", _differentiable_conv_bn_act, 8)
_register("conv_bn_act_train", _differentiable_conv_bn_act_train, 8)
_register("batch_stats", reference.batch_stats, 1)
_register("bn_act", lambda y, *norm: reference.bn_act(y, Epilogue(None, *norm)), 6)
_register(
    "bn_act_backward", lambda dout, y, *norm: reference.bn_act_backward(dout, y, Epilogue(None, *norm[:7]), norm[7]), 7
)
