"""The public operators, torch.ops.convext.*: schemas, implementations through the selection, fake kernels, autocast,
vmap rules and FLOP formulas. Gradients are in autograd.py, which registers them here.

    fprop(x, w, bias?, *geom) -> y            dgrad(dy, w, input_size, *geom) -> dx
    wgrad(dy, x, kernel_size, *geom) -> dw    conv_bn_act(x, w, *epilogue, *geom) -> out
    conv_bn_act_train(x, w, *epilogue, *geom) -> out, y, mean, var
    batch_stats(y) -> mean, var               bn_act(y, *norm) -> out
    bn_act_backward(dout, y, *norm, training) -> dy, dgamma, dbeta, dresidual

with geom = stride, padding, dilation, groups, epilogue the fields of a `problem.Epilogue` and norm those behind its
bias. In training an epilogue has no mean and var: they are those of the batch.

Activations are (N, C, H, W) of any strides, and in the first three operators (N, C, D, H, W), with three numbers where
images have two. `channels_last=True` forces that format of a forward pass's output; False leaves it to the rule of
ATen, which looks at x and w; that for volumes is another, and False stands for contiguous
(`memory_format.volume_is_channels_last`). ATen's gradients have the format of the output, whatever that of
dy: dgrad and wgrad take it as an argument, and with None guess it from what they see.

The functions of the same names in this module are what convext itself calls: they go straight to the backend where the
dispatcher has nothing to add, and through the operator where it has.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import backends, checks, reference
from .activation import BACKWARD
from .backends import tuned
from .memory_format import fits_both_formats, memory_format, suggests_channels_last
from .problem import STATISTICS, ConvProblem, Epilogue, Geom, Pass, accumulate_dtype

LIBRARY = torch.library.Library("convext", "DEF")

_GEOM = "int[2] stride, int[2] padding, int[2] dilation, SymInt groups"
_AFFINE = "Tensor? gamma, Tensor? beta, Tensor? residual, float eps, str activation"
_EPILOGUE = f"Tensor? bias, Tensor? mean, Tensor? var, {_AFFINE}"
_SCHEMAS = (
    f"fprop(Tensor x, Tensor w, Tensor? bias, {_GEOM}, bool channels_last=False) -> Tensor",
    f"dgrad(Tensor dy, Tensor w, SymInt[2] input_size, {_GEOM}, bool? channels_last=None) -> Tensor",
    f"wgrad(Tensor dy, Tensor x, SymInt[2] kernel_size, {_GEOM}, bool? channels_last=None) -> Tensor",
    f"conv_bn_act(Tensor x, Tensor w, {_EPILOGUE}, {_GEOM}, bool channels_last=False) -> Tensor",
    f"conv_bn_act_train(Tensor x, Tensor w, {_EPILOGUE}, {_GEOM}) -> (Tensor out, Tensor y, Tensor mean, Tensor var)",
    "batch_stats(Tensor y) -> (Tensor mean, Tensor var)",
    f"bn_act(Tensor y, Tensor mean, Tensor var, {_AFFINE}) -> Tensor",
    f"bn_act_backward(Tensor dout, Tensor y, Tensor mean, Tensor var, {_AFFINE}, bool training) "
    "-> (Tensor dy, Tensor dgamma, Tensor dbeta, Tensor dresidual)",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)

NAMES = tuple(schema.split("(")[0] for schema in _SCHEMAS)
OPS = torch.ops.convext
_fprop, _dgrad, _wgrad = OPS.fprop.default, OPS.dgrad.default, OPS.wgrad.default
_conv_bn_act, _conv_bn_act_train = OPS.conv_bn_act.default, OPS.conv_bn_act_train.default
_batch_stats, _bn_act, _bn_act_backward = OPS.batch_stats.default, OPS.bn_act.default, OPS.bn_act_backward.default

# ---- straight to the backend -----------------------------------------------------------------------------------------

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
_is_compiling = torch.compiler.is_compiling
_jit_tracing = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_batched_the_older_way = torch._C._functorch.is_legacy_batchedtensor
_calls = backends.CALL_CACHE
_NO_EPILOGUE = Epilogue()


def _key_of_the_older_vmap():
    """The dispatch key that torch._vmap_internals switches on, which has no name in Python."""
    before = torch._C._dispatch_tls_local_include_set()
    torch._C._vmapmode_increment_nesting()
    try:
        return (torch._C._dispatch_tls_local_include_set() - before).highestPriorityTypeId()
    finally:
        torch._C._vmapmode_decrement_nesting()


_OLDER_VMAP = _key_of_the_older_vmap()


def batches_the_older_way() -> bool:
    """True inside the vmap that torch.func's replaced: torch.autograd.grad(is_grads_batched=True) and
    torch.autograd.functional's vectorize=True still run it. Its tensors do not look batched to Python, and none of
    torch.func's transforms is active."""
    return _key_included(_OLDER_VMAP)


def batched_the_older_way(*tensors: torch.Tensor | None) -> bool:
    """True where one of them, or maybe a tangent, is batched by that vmap. What a checkpoint computes again inside of
    it is not, and must save for backward what it saved before."""
    return _key_included(_OLDER_VMAP) and (
        forward_ad._current_level >= 0 or any(t is not None and _is_batched_the_older_way(t) for t in tensors)
    )


def dispatcher_is_idle() -> bool:
    """True when no compiler, tracer, mode, transform or autocast stands between a call and its kernel."""
    return not _autocast_active() and idle_but_for_autocast()


def idle_but_for_autocast() -> bool:
    """dispatcher_is_idle(), whatever autocast does."""
    return not (
        _is_compiling() or _jit_tracing() or _dispatch_modes() or _functorch_active() or _key_included(_OLDER_VMAP)
    )


def all_plain(*tensors: object) -> bool:
    """True when a call on these tensors can go straight to the backend."""
    return _PLAIN.issuperset(map(type, tensors)) and dispatcher_is_idle()


def _remember(key: tuple[Any, ...], choice: backends.Choice) -> backends.Choice:
    if len(_calls) >= backends.CACHE_LIMIT:
        _calls.clear()
    _calls[key] = choice
    return choice


def _fprop_choice(x, w, bias, geom, channels_last, kind="") -> backends.Choice:
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        geom,
        channels_last,
        kind,
    )
    choice = _calls.get(key)
    if choice is None:
        checks.check_conv(x, w, bias, geom)
        problem = ConvProblem.of_fprop(x, w, geom, channels_last)
        choice = _remember(key, backends.select(Pass.FPROP, problem, kind=kind, device=x.device))
    choice.counter[0] += 1
    return choice


def _run_fprop(x, w, bias, geom, channels_last):
    choice = _fprop_choice(x, w, bias, geom, channels_last)
    return choice.run(choice.problem, x, w, _NO_EPILOGUE if bias is None else Epilogue(bias))


def _run_fprop_batch_stats(x, w, bias, geom, before=None):
    """fprop, and batch_stats of what it returns. `before`: fprop of bn_act(x, before), or None where that is to be
    computed by itself."""
    choice = _fprop_choice(x, w, bias, geom, False, STATISTICS)
    found = choice.backend.fprop_batch_stats(choice.problem, x, w, bias, before)
    if before is not None and found is None:
        choice.counter[0] -= 1
        return None
    if found is not None:
        backends.counter(choice.backend.name, "batch_stats", choice.variant)[0] += 1
        return found
    y = choice.run(choice.problem, x, w, _NO_EPILOGUE if bias is None else Epilogue(bias))
    return y, *_run_batch_stats(y)


def _signature(t):
    return None if t is None else (t.shape, t.dtype, t.device)


def _conv_bn_act_key(x, w, epilogue, geom, channels_last):
    bias, mean, var, gamma, beta, residual, _, activation = epilogue
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        _signature(bias),
        _signature(mean),
        _signature(var),
        _signature(gamma),
        _signature(beta),
        _signature(residual),
        geom,
        activation,
        channels_last,
    )


def _run_conv_bn_act(x, w, epilogue, geom, channels_last):
    key = _conv_bn_act_key(x, w, epilogue, geom, channels_last)
    choice = _calls.get(key)
    if choice is None:
        checks.check_activation(epilogue.activation)
        checks.check_conv(x, w, epilogue.bias, geom)
        problem = ConvProblem.of_fprop(x, w, geom, channels_last)
        checks.check_batch_norm(x.dtype, w.shape[0], *epilogue.norm)
        _check_residual(epilogue.residual, problem.y_shape, x.dtype)
        choice = backends.select(Pass.FPROP, problem, kind=epilogue.kind, device=x.device)
        _remember(key, choice)
    choice.counter[0] += 1
    return choice.run(choice.problem, x, w, epilogue)


def conv_bn_act_again(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom) -> torch.Tensor | None:
    """conv_bn_act of plain tensors where such a call went well before, or None: it needs no checks then."""
    choice = _calls.get(_conv_bn_act_key(x, w, epilogue, geom, False))
    if choice is None:
        return None
    choice.counter[0] += 1
    return choice.run(choice.problem, x, w, epilogue)


def _check_residual(residual, y_shape, dtype) -> None:
    if residual is not None and (residual.shape != torch.Size(y_shape) or residual.dtype is not dtype):
        raise RuntimeError(
            f"residual: expected size {list(y_shape)} and {dtype}, got {list(residual.shape)} and {residual.dtype}"
        )


def _dgrad_choice(dy, w, input_size, geom, channels_last) -> backends.Choice:
    key = (1, dy.shape, dy.stride(), dy.dtype, dy.device, w.shape, w.stride(), w.dtype, input_size, geom, channels_last)
    choice = _calls.get(key)
    if choice is None:
        _check_gradient("dgrad", dy, w, "w")
        problem = ConvProblem.of_dgrad(dy, w, input_size, geom, channels_last)
        _check_y_shape("dgrad", dy, problem)
        choice = _remember(key, backends.select(Pass.DGRAD, problem, device=dy.device))
    return choice


def _run_dgrad(dy, w, input_size, geom, channels_last):
    choice = _dgrad_choice(dy, w, input_size, geom, channels_last)
    choice.counter[0] += 1
    return choice.run(choice.problem, dy, w)


def _wgrad_choice(dy, x, kernel_size, geom) -> backends.Choice:
    key = (2, dy.shape, dy.stride(), dy.dtype, dy.device, x.shape, x.stride(), x.dtype, kernel_size, geom)
    choice = _calls.get(key)
    if choice is None:
        _check_gradient("wgrad", dy, x, "x")
        problem = ConvProblem.of_wgrad(dy, x, kernel_size, geom)
        _check_y_shape("wgrad", dy, problem)
        choice = _remember(key, backends.select(Pass.WGRAD, problem, device=dy.device))
    return choice


def _run_wgrad(dy, x, kernel_size, geom, channels_last):
    choice = _wgrad_choice(dy, x, kernel_size, geom)
    choice.counter[0] += 1
    if channels_last is None:
        channels_last = guess_dw_format(x, choice.problem.w_shape)
    return choice.run(choice.problem, dy, x, channels_last)


def guess_dw_format(x, w_shape) -> bool:
    """Whether dw is channels-last for a w that is not, or whose strides fit both formats."""
    return not fits_both_formats(w_shape) and suggests_channels_last(x)


def _run_dgrad_and_wgrad(dy, x, w, geom, dx_channels_last, dw_channels_last):
    input_size, kernel_size = tuple(x.shape[2:]), tuple(w.shape[2:])
    if geom.groups == x.shape[1] > 1:
        problem = ConvProblem.of_dgrad(dy, w, input_size, geom, dx_channels_last)
        choice = backends.select(Pass.DGRAD, problem, device=dy.device)
        if problem.is_depthwise:
            other = backends.select(Pass.WGRAD, problem, device=dy.device)
            if other.backend is choice.backend:
                choice.counter[0] += 1
                other.counter[0] += 1
                return choice.backend.depthwise_backward(problem, dy, x, w, dw_channels_last)
    return (
        _run_dgrad(dy, w, input_size, geom, dx_channels_last),
        _run_wgrad(dy, x, kernel_size, geom, dw_channels_last),
    )


def _check_gradient(name, dy, other, other_name) -> None:
    if dy.dim() not in (4, 5) or other.dim() != dy.dim():
        raise RuntimeError(
            f"{name}: expected dy and {other_name} both of 4 dimensions or both of 5, got {list(dy.shape)} and "
            f"{list(other.shape)}"
        )
    if dy.dtype is not other.dtype or dy.device != other.device:
        raise RuntimeError(
            f"{name}: expected dy and {other_name} of one dtype on one device, "
            f"got {dy.dtype} on {dy.device} and {other.dtype} on {other.device}"
        )


def _check_y_shape(name, dy, problem) -> None:
    checks.check_geom(problem.geom, problem.axes)
    if tuple(dy.shape) != problem.y_shape:
        raise RuntimeError(f"{name}: expected dy of size {list(problem.y_shape)} for {problem}, got {list(dy.shape)}")


def _read_by(backend, epilogue, y):
    """The epilogue with a mean that the backend reads: of y in float32 or narrower, one alone takes a float64 mean."""
    mean = epilogue.mean
    if mean is None or mean.dtype is not torch.float64 or y.dtype is torch.float64 or backend.reads_exact_mean:
        return epilogue
    return epilogue._replace(mean=mean.to(accumulate_dtype(y.dtype)))


def _counted(backend, name):
    backends.counter(backend.name, name, f"{backend.name}_{name}")[0] += 1
    return getattr(backend, name)


def _run_batch_stats(y):
    return _counted(backends.select_batch_norm(y), "batch_stats")(y)


def _run_bn_act(y, epilogue):
    checks.check_activation(epilogue.activation)
    _check_residual(epilogue.residual, y.shape, y.dtype)
    backend = backends.select_batch_norm(y)
    return _counted(backend, "bn_act")(y, _read_by(backend, epilogue, y))


def _run_bn_act_backward(dout, y, epilogue, training):
    backend = backends.select_batch_norm(y)
    return _counted(backend, "bn_act_backward")(dout, y, _read_by(backend, epilogue, y), training)


def _run_conv_bn_act_train(x, w, epilogue, geom):
    check_of_the_batch(epilogue)
    y, mean, var = _run_fprop_batch_stats(x, w, epilogue.bias, geom)
    checks.check_batch_norm(y.dtype, y.shape[1], *epilogue.norm)
    _, _, _, gamma, beta, residual, eps, activation = epilogue
    return _run_bn_act(y, Epilogue(None, mean, var, gamma, beta, residual, eps, activation)), y, mean, var


def check_of_the_batch(epilogue: Epilogue) -> None:
    """ValueError unless the epilogue leaves the statistics to the batch."""
    if epilogue.mean is not None or epilogue.var is not None:
        raise ValueError("mean and var: expected None where the batch's own are taken, got a Tensor")


def fprop(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geom: Geom, channels_last: bool = False
) -> torch.Tensor:
    """y = x * w + bias. Not differentiable: autograd.Conv2dFunction is."""
    if type(x) in _PLAIN and type(w) in _PLAIN and type(bias) in _PLAIN and dispatcher_is_idle():
        return _run_fprop(x, w, bias, geom, channels_last)
    return _fprop(x, w, bias, *geom, channels_last)


def dgrad(
    dy: torch.Tensor, w: torch.Tensor, input_size: Sequence[int], geom: Geom, channels_last: bool | None = None
) -> torch.Tensor:
    """dx, of height and width, or depth, height and width `input_size`, from dy and w."""
    if type(dy) in _PLAIN and type(w) in _PLAIN and dispatcher_is_idle():
        return _run_dgrad(dy, w, input_size, geom, channels_last)
    return _dgrad(dy, w, input_size, *geom, channels_last)


def conv_transpose(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: tuple[int, ...],
    geom: Geom,
    channels_last: bool,
) -> torch.Tensor:
    """dgrad(x, w) + bias, of height and width, or depth, height and width `size`. Not differentiable."""
    if all_plain(x, w, bias):
        choice = _dgrad_choice(x, w, size, geom, channels_last)
        if backends.forced() is None and choice.backend.slower_transposed(choice.problem) is not None:
            backends.counter("aten", "conv_transpose", "aten_conv_transpose")[0] += 1
            least = geom.input_size(x.shape[2:], w.shape[2:], (0, 0))
            output_padding = tuple(n - m for n, m in zip(size, least))
            return torch.convolution(x, w, bias, *geom[:3], True, output_padding, geom.groups)
        choice.counter[0] += 1
        return choice.backend.conv_transpose(choice.problem, x, w, bias)
    y: torch.Tensor = _dgrad(x, w, size, *geom, channels_last)
    return y if bias is None else y + bias.view(-1, *(1,) * geom.axes)


def wgrad(
    dy: torch.Tensor, x: torch.Tensor, kernel_size: Sequence[int], geom: Geom, channels_last: bool | None = None
) -> torch.Tensor:
    """dw, of a filter of `kernel_size`, from dy and x."""
    if type(dy) in _PLAIN and type(x) in _PLAIN and dispatcher_is_idle():
        return _run_wgrad(dy, x, kernel_size, geom, channels_last)
    return _wgrad(dy, x, kernel_size, *geom, channels_last)


def dgrad_and_wgrad(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, geom: Geom, dx_channels_last: bool, dw_channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dw. Depthwise, they come out of one pass over dy and x where the backend has a kernel for that."""
    if all_plain(dy, x, w):
        return _run_dgrad_and_wgrad(dy, x, w, geom, dx_channels_last, dw_channels_last)
    return _dgrad(dy, w, x.shape[2:], *geom, dx_channels_last), _wgrad(dy, x, w.shape[2:], *geom, dw_channels_last)


def conv_bn_act(
    x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom, channels_last: bool = False
) -> torch.Tensor:
    """fprop with bias, batch norm by given statistics, residual and activation in its epilogue."""
    if all_plain(x, w, *epilogue[:6]):
        return _run_conv_bn_act(x, w, epilogue, geom, channels_last)
    return _conv_bn_act(x, w, *epilogue, *geom, channels_last)


def conv_bn_act_train(
    x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, y, mean, var of fprop and a batch norm by the batch's own statistics, residual and activation. The mean may
    be in float64 where the operator's is in float32: `bn_act` and the passes after it take it so."""
    if all_plain(x, w, *epilogue[:6]):
        return _run_conv_bn_act_train(x, w, epilogue, geom)
    return _conv_bn_act_train(x, w, *epilogue, *geom)


def batch_stats(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of y; the mean as in `conv_bn_act_train`. Not differentiable."""
    if all_plain(y):
        return _run_batch_stats(y)
    return _batch_stats(y)


def bn_act(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The epilogue, which has a mean and no bias, of y."""
    if all_plain(y, *epilogue[:6]):
        return _run_bn_act(y, epilogue)
    return _bn_act(y, *epilogue[1:])


def bn_act_backward(
    dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, dgamma, dbeta, dresidual of bn_act. `training`: mean and var are y's own."""
    if all_plain(dout, y, *epilogue[:6]):
        return _run_bn_act_backward(dout, y, epilogue, training)
    return _bn_act_backward(dout, y, *epilogue[1:], training)


def fprop_batch_stats(
    x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, geom: Geom, before: Epilogue | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """y, mean, var of conv_bn_act_train with this epilogue, of plain tensors that have been checked. `before`: of
    bn_act(x, before), which is not written, or None where the backend does not compute that on the way. Not
    differentiable."""
    return _run_fprop_batch_stats(x, w, epilogue.bias, geom, before)


def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    unbiased: float,
) -> bool:
    """running = (1 - momentum) * running + momentum * batch, var taken times `unbiased`, unseen by autograd, in
    one call; or False where the native backend has none, or is not to serve, and nothing was done."""
    if not all_plain(running_mean, running_var, mean, var) or running_mean.requires_grad or running_var.requires_grad:
        return False
    device = running_mean.device.type
    if backends.forced() not in (None, "native") or backends.unavailable("native", device) is not None:
        return False
    return backends.get("native", device).update_running(running_mean, running_var, mean, var, momentum, unbiased)


def bn_conv_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue,
    sums: tuple[Any, ...] | None,
    x: torch.Tensor,
    before: Epilogue | None,
    w: torch.Tensor,
    geom: Geom,
    dx_channels_last: bool,
    dw_channels_last: bool,
    sums_up: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[Any, ...] | None] | None:
    """dx, dw, dgamma, dbeta of bn_act(y, epilogue) in training, without a residual, where y = x * w, and what
    bn_act_and_sums would find of dx where `sums_up` says so; None where the backend does not do it in one call.
    `before`: of bn_act(x, before). `sums`: what bn_act_and_sums found of dout. Not differentiable."""
    if not all_plain(dout, y, *epilogue[:6], x, w) or before is not None and not all_plain(*before[:6]):
        return None
    dgrad = _dgrad_choice(y, w, x.shape[2:], geom, dx_channels_last)
    wgrad = _wgrad_choice(y, x, w.shape[2:], geom)
    backend = dgrad.backend
    if wgrad.backend is not backend or backends.select_batch_norm(y) is not backend:
        return None
    if sums is not None and sums[0] is not backend:
        return None
    given = None if sums is None else sums[1]
    found = backend.bn_conv_backward(
        dgrad.problem, wgrad.problem, dout, y, epilogue, given, x, before, w, dw_channels_last, sums_up
    )
    if found is None:
        return None
    for choice in (dgrad, wgrad):
        choice.counter[0] += 1
    backends.counter(backend.name, "bn_conv_backward", f"{backend.name}_bn_conv_backward")[0] += 1
    *gradients, sums_of_dx = found
    return *gradients, (backend, sums_of_dx, sums_of_dx.new_empty(0)) if sums_up else None  # type: ignore[return-value]


def bn_act_and_sums(
    dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue
) -> tuple[torch.Tensor, tuple[Any, ...]] | None:
    """bn_act of y, without a residual, and in the same pass the sums that bn_act_backward in training begins with, for
    `bn_act_from_sums`; None where the backend has no such pass. Not differentiable."""
    if not all_plain(dout, y, *epilogue[:6]):
        return None
    backend = backends.select_batch_norm(y)
    found = backend.bn_act_and_sums(dout, y, epilogue)
    if found is None:
        return None
    backends.counter(backend.name, "bn_act_and_sums", f"{backend.name}_bn_act_and_sums")[0] += 1
    out, *sums = found
    return out, (backend, *sums)


def bn_act_from_sums(
    dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, sums: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, dgamma, dbeta of bn_act_backward in training, out of what bn_act_and_sums found with the same arguments."""
    backend, *found = sums
    backends.counter(backend.name, "bn_act_from_sums", f"{backend.name}_bn_act_from_sums")[0] += 1
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = backend.bn_act_from_sums(dout, y, epilogue, *found)
    return gradients


def takes_gates(y: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the three functions below serve a call on these tensors, of y (N, C, H, W)."""
    return (
        all_plain(y, *others)
        and backends.select_batch_norm(y).reject_gates(y) is None
        and all(t is None or t.dtype is y.dtype and t.device == y.device for t in others)
    )


def bn_act_image_sums(
    y: torch.Tensor, epilogue: Epilogue, dout: torch.Tensor | None = None, factor: float = 1.0
) -> torch.Tensor:
    """(N, C), factor times the sum over each image's pixels of bn_act(y, epilogue), or of that times dout."""
    backend = backends.select_batch_norm(y)
    return _counted(backend, "bn_act_image_sums")(y, epilogue, dout, factor)


def bn_act_gated(y: torch.Tensor, epilogue: Epilogue, gates: torch.Tensor) -> torch.Tensor:
    """bn_act(y, epilogue) times gates (N, C)."""
    return _counted(backends.select_batch_norm(y), "bn_act_gated")(y, epilogue, gates)


def bn_act_gated_backward(
    dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, gates: torch.Tensor, shifts: torch.Tensor
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """dout * gates + shifts, both (N, C), and what bn_act_and_sums would find of that."""
    backend = backends.select_batch_norm(y)
    da, sums = _counted(backend, "bn_act_gated_backward")(dout, y, epilogue, gates.contiguous(), shifts.contiguous())
    return da, (backend, sums, sums.new_empty(0))


def act_backward(dout: torch.Tensor, z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dz = dout * activation'(z) and, from the same pass where the backend has one, its sum by channel, else None. Not
    differentiable."""
    if all_plain(dout, z):
        backend = backends.select_batch_norm(z)
        found = backend.act_backward(dout, z, activation)
        if found is not None:
            backends.counter(backend.name, "act_backward", f"{backend.name}_act_backward")[0] += 1
            return found
    return BACKWARD[activation](dout, z), None


# ---- implementations -------------------------------------------------------------------------------------------------


def _geom(stride, padding, dilation, groups) -> Geom:
    return Geom(tuple(stride), tuple(padding), tuple(dilation), groups)


def _impl(name):
    def register(function):
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


@_impl("fprop")
def _(x, w, bias, stride, padding, dilation, groups, channels_last=False):
    return _run_fprop(x, w, bias, _geom(stride, padding, dilation, groups), channels_last)


@_impl("dgrad")
def _(dy, w, input_size, stride, padding, dilation, groups, channels_last=None):
    return _run_dgrad(dy, w, tuple(input_size), _geom(stride, padding, dilation, groups), channels_last)


@_impl("wgrad")
def _(dy, x, kernel_size, stride, padding, dilation, groups, channels_last=None):
    return _run_wgrad(dy, x, tuple(kernel_size), _geom(stride, padding, dilation, groups), channels_last)


def take_apart(arguments):
    """epilogue, geom and what follows of an operator's arguments behind x and w."""
    return Epilogue._make(arguments[:8]), _geom(*arguments[8:12]), arguments[12:]


@_impl("conv_bn_act")
def _(x, w, *arguments):
    epilogue, geom, channels_last = take_apart(arguments)
    return _run_conv_bn_act(x, w, epilogue, geom, *(channels_last or (False,)))


@_impl("conv_bn_act_train")
def _(x, w, *arguments):
    epilogue, geom, _ = take_apart(arguments)
    out, y, mean, var = _run_conv_bn_act_train(x, w, epilogue, geom)
    return out, y, mean.to(var.dtype), var


@_impl("bn_act")
def _(y, *norm):
    return _run_bn_act(y, Epilogue(None, *norm))


@_impl("bn_act_backward")
def _(dout, y, *norm_and_training):
    *norm, training = norm_and_training
    return _run_bn_act_backward(dout, y, Epilogue(None, *norm), training)


@_impl("batch_stats")
def _(y):
    mean, var = _run_batch_stats(y)
    return mean.to(var.dtype), var


# ---- fake kernels: shapes, dtypes and strides without data -----------------------------------------------------------


def _fake(name):
    return torch.library.register_fake(f"convext::{name}", lib=LIBRARY)


def _empty(like, shape, channels_last):
    form = memory_format(channels_last, len(shape))
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)


@_fake("fprop")
def _(x, w, bias, stride, padding, dilation, groups, channels_last=False):
    geom = _geom(stride, padding, dilation, groups)
    checks.check_conv(x, w, bias, geom)
    nhwc = channels_last or geom.axes == 2 and (suggests_channels_last(x) or suggests_channels_last(w))
    k = 0 if x.shape[1] == 0 else w.shape[0]  # as ATen has it
    return _empty(x, (x.shape[0], k, *geom.output_size(x.shape[2:], w.shape[2:])), nhwc)


@_fake("dgrad")
def _(dy, w, input_size, stride, padding, dilation, groups, channels_last=None):
    if channels_last is None:
        channels_last = suggests_channels_last(dy) or suggests_channels_last(w)
    return _empty(dy, (dy.shape[0], w.shape[1] * groups, *input_size), channels_last)


@_fake("wgrad")
def _(dy, x, kernel_size, stride, padding, dilation, groups, channels_last=None):
    w_shape = dy.shape[1], x.shape[1] // groups, *kernel_size
    return _empty(dy, w_shape, guess_dw_format(x, w_shape) if channels_last is None else channels_last)


@_fake("conv_bn_act")
def _(x, w, *arguments):
    epilogue, geom, channels_last = take_apart(arguments)
    checks.check_activation(epilogue.activation)
    checks.check_batch_norm(x.dtype, w.shape[0], *epilogue.norm)
    return _fprop(x, w, epilogue.bias, *geom, *channels_last)


def _fake_stats(y):
    return tuple(torch.empty(y.shape[1], dtype=accumulate_dtype(y.dtype), device=y.device) for _ in range(2))


@_fake("conv_bn_act_train")
def _(x, w, *arguments):
    epilogue, geom, _ = take_apart(arguments)
    checks.check_activation(epilogue.activation)
    check_of_the_batch(epilogue)
    y = _fprop(x, w, epilogue.bias, *geom)
    return _empty_dense(y), y, *_fake_stats(y)


def _empty_dense(y):
    return _empty(y, y.shape, suggests_channels_last(y))


_fake("batch_stats")(_fake_stats)


@_fake("bn_act")
def _(y, *norm):
    return _empty_dense(y)


@_fake("bn_act_backward")
def _(dout, y, mean, var, gamma, beta, residual, eps, activation, training):
    return _empty_dense(y), *_fake_stats(y), _empty_dense(y) if residual is not None else y.new_empty(0)


# ---- autocast: for those who call the operators themselves -----------------------------------------------------------

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def autocast_cast(t: torch.Tensor | None, device_type: str, dtype: torch.dtype) -> torch.Tensor | None:
    """t as an operation on autocast's lower-precision list sees it: float64 and integers stay as they are."""
    if t is None or not t.is_floating_point() or t.dtype is torch.float64 or t.device.type != device_type:
        return t
    return t.to(dtype)


def autocast_dtype(t: torch.Tensor) -> torch.dtype:
    """The dtype in which a convolution sees t: autocast's, where it is on for t's device and concerns t."""
    device_type = t.device.type
    if (
        not _autocast_active()
        or not torch.is_autocast_enabled(device_type)
        or not t.is_floating_point()
        or t.dtype is torch.float64
    ):
        return t.dtype
    return torch.get_autocast_dtype(device_type)


def _register_autocast(name: str, op, cast_positions: tuple[int, ...]) -> None:
    for device_type in ("cpu", "cuda"):

        def kernel(*args, device_type=device_type, **kwargs):
            dtype = torch.get_autocast_dtype(device_type)
            args = tuple(autocast_cast(a, device_type, dtype) if i in cast_positions else a for i, a in enumerate(args))
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return op(*args, **kwargs)

        LIBRARY.impl(name, kernel, f"Autocast{device_type.upper()}")


_register_autocast("fprop", _fprop, (0, 1, 2))
_register_autocast("dgrad", _dgrad, (0, 1))
_register_autocast("wgrad", _wgrad, (0, 1))
_register_autocast("conv_bn_act", _conv_bn_act, (0, 1, 2, 7))  # the batch norm's parameters stay as they are
_register_autocast("conv_bn_act_train", _conv_bn_act_train, (0, 1, 2, 7))

# ---- vmap: one more batch dimension goes into N, or into the groups --------------------------------------------------


def _vmap(name):
    def register(function):
        @functools.wraps(function)
        def rule(*arguments):
            with tuned.unmeasured():
                return function(*arguments)

        torch.library.register_vmap(f"convext::{name}", rule, lib=LIBRARY)
        return rule

    return register


def _front(t, dim, size):
    """The vmapped dimension in front; where there is none, one of stride 0."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_batch(t):
    """(B, N, ...) -> (B*N, ...)"""
    return t.reshape(-1, *t.shape[2:])


def _into_channels(t):
    """(B, N, C, ...) -> (N, B*C, ...): channels of B*groups groups."""
    t = t.movedim(0, 1)
    return t.reshape(t.shape[0], -1, *t.shape[3:])


def _out_of_channels(t, size):
    """(N, B*C, ...) -> (N, B, C, ...)"""
    return t.reshape(t.shape[0], size, -1, *t.shape[2:])


def _vmap_fprop(info, in_dims, x, w, bias, stride, padding, dilation, groups, channels_last=False):
    size = info.batch_size
    x_dim, w_dim, bias_dim = in_dims[:3]
    shared_bias = bias if bias_dim is None else None
    if w_dim is None:
        if x_dim is None:  # the bias alone
            y = _fprop(x, w, None, stride, padding, dilation, groups, channels_last)
            y = y.expand(size, *y.shape)
        else:
            y = _fprop(
                _into_batch(x.movedim(x_dim, 0)), w, shared_bias, stride, padding, dilation, groups, channels_last
            )
            y = y.reshape(size, -1, *y.shape[1:])
        if bias_dim is not None:
            y = y + bias.movedim(bias_dim, 0).reshape(size, 1, -1, *(1,) * len(stride))
        return y, 0
    bias = None if bias is None else _front(bias, bias_dim, size).reshape(-1)
    w = w.movedim(w_dim, 0)
    if x_dim is None and groups == 1:  # more filters over the same input
        y = _fprop(x, _into_batch(w), bias, stride, padding, dilation, groups, channels_last)
    else:
        y = _fprop(
            _into_channels(_front(x, x_dim, size)),
            _into_batch(w),
            bias,
            stride,
            padding,
            dilation,
            size * groups,
            channels_last,
        )
    return _out_of_channels(y, size), 1


_vmap("fprop")(_vmap_fprop)


@_vmap("dgrad")
def _(info, in_dims, dy, w, input_size, stride, padding, dilation, groups, channels_last=None):
    size = info.batch_size
    dy_dim, w_dim = in_dims[:2]
    if w_dim is None:
        dx = _dgrad(_into_batch(dy.movedim(dy_dim, 0)), w, input_size, stride, padding, dilation, groups, channels_last)
        return dx.reshape(size, -1, *dx.shape[1:]), 0
    dx = _dgrad(
        _into_channels(_front(dy, dy_dim, size)),
        _into_batch(w.movedim(w_dim, 0)),
        input_size,
        stride,
        padding,
        dilation,
        size * groups,
        channels_last,
    )
    return _out_of_channels(dx, size), 1


@_vmap("wgrad")
def _(info, in_dims, dy, x, kernel_size, stride, padding, dilation, groups, channels_last=None):
    size = info.batch_size
    dy_dim, x_dim = in_dims[:2]
    if x_dim is None and groups == 1:  # more filters over the same input
        dw = _wgrad(
            _into_channels(dy.movedim(dy_dim, 0)), x, kernel_size, stride, padding, dilation, groups, channels_last
        )
    else:
        dw = _wgrad(
            _into_channels(_front(dy, dy_dim, size)),
            _into_channels(_front(x, x_dim, size)),
            kernel_size,
            stride,
            padding,
            dilation,
            size * groups,
            channels_last,
        )
    return dw.reshape(size, -1, *dw.shape[1:]), 0


def _fronts(info, in_dims, *tensors):
    return tuple(t if t is None else _front(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims))


def _vmap_parts(info, in_dims, x, w, arguments, *channels_last):
    """y of the convolution, and the epilogue that is left, the vmapped dimension of both in front."""
    epilogue, geom, _ = take_apart(arguments)
    if all(dim is None for dim in in_dims[:3]):
        y = _fprop(x, w, epilogue.bias, *geom, *channels_last)
        y = y.expand(info.batch_size, *y.shape)
    else:
        y, dim = _vmap_fprop(info, in_dims, x, w, epilogue.bias, *geom, *channels_last)
        y = y.movedim(dim, 0)
    return y, Epilogue(None, *_fronts(info, in_dims[3:8], *epilogue[1:6]), *epilogue[6:])


@_vmap("conv_bn_act")
def _(info, in_dims, x, w, *arguments):
    y, epilogue = _vmap_parts(info, in_dims, x, w, arguments, *arguments[12:])
    if epilogue.mean is None:
        return reference.act(y, epilogue.residual, epilogue.activation), 0
    return reference.bn_act(y, epilogue), 0


@_vmap("conv_bn_act_train")
def _(info, in_dims, x, w, *arguments):
    y, epilogue = _vmap_parts(info, in_dims, x, w, arguments)
    check_of_the_batch(epilogue)
    mean, var = reference.batch_stats(y)
    return (reference.bn_act(y, epilogue._replace(mean=mean, var=var)), y, mean, var), (0, 0, 0, 0)


@_vmap("batch_stats")
def _(info, in_dims, y):
    return reference.batch_stats(y.movedim(in_dims[0], 0)), (0, 0)


@_vmap("bn_act")
def _(info, in_dims, *args):
    y, *norm = _fronts(info, in_dims, *args[:6])
    return reference.bn_act(y, Epilogue(None, *norm, *args[6:])), 0


@_vmap("bn_act_backward")
def _(info, in_dims, *args):
    dout, y, *norm = _fronts(info, in_dims, *args[:7])
    return reference.bn_act_backward(dout, y, Epilogue(None, *norm, *args[7:9]), args[9]), (0, 0, 0, 0)


# ---- FLOPs, as torch.utils.flop_counter counts a convolution's -------------------------------------------------------


@register_flop_formula([OPS.fprop, OPS.conv_bn_act])
def _(x_shape, w_shape, *args, out_shape, **kwargs) -> int:
    return conv_flop_count(list(x_shape), list(w_shape), list(out_shape))


@register_flop_formula(OPS.conv_bn_act_train)
def _(x_shape, w_shape, *args, out_shape, **kwargs) -> int:
    return conv_flop_count(list(x_shape), list(w_shape), list(out_shape[0]))


@register_flop_formula(OPS.dgrad)
def _(dy_shape, w_shape, *args, out_shape, **kwargs) -> int:
    return conv_flop_count(list(out_shape), list(w_shape), list(dy_shape))


@register_flop_formula(OPS.wgrad)
def _(dy_shape, x_shape, *args, out_shape, **kwargs) -> int:
    return conv_flop_count(list(x_shape), list(out_shape), list(dy_shape))
