"""Batch norm with the sum and the activation behind it as one call, of rows, images and volumes, whoever computed them.

The passes over images serve all: rows (N, C, W) are images of height one, volumes (N, C, D, H, W) images of D * H rows,
and (N, C) images of one pixel, each the same memory. A fused 2-D convolution has this as a part of its own call
(autograd.ConvBNActFunction); behind a 1-D, a 3-D or a transposed one it is a call by itself, which reads the
convolution's output once for the statistics and once for the rest, and keeps that output alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import autograd, backends, ops, reference
from .activation import BACKWARD, TABLE
from .autograd import _cast, _Function, _refuse_forward_mode
from .memory_format import dense_strides, fits_both_formats, suggests_channels_last
from .problem import DTYPES, Epilogue, accumulate_dtype

Update = Callable[[torch.Tensor, torch.Tensor], None]


def _as_image(t):
    """(N, C, H, W) of the values of t, a view where t is dense."""
    dims = t.dim()
    if dims == 4:
        return t
    return t.flatten(2, 3) if dims == 5 else t.unsqueeze(2) if dims == 3 else t[:, :, None, None]


def _in_shape(fresh, shape: torch.Size):
    """A fresh image of `_as_image` in the shape that it was made of. It becomes no view, into which autograd would not
    let anybody write."""
    if len(shape) == 4:
        return fresh
    if len(shape) == 2:
        return fresh.as_strided_(shape, (shape[1], 1))
    return fresh.as_strided_(shape, dense_strides(shape, suggests_channels_last(fresh)))


@torch.no_grad()
def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    count: int,
) -> None:
    """Unseen by autograd, as F.batch_norm does it: where a graph of evaluation mode has saved the statistics, its
    backward pass must not refuse because they have moved. What records operators has to see the tensors themselves."""
    if not (torch.compiler.is_compiling() or ops._dispatch_modes()):
        if ops.update_running(running_mean, running_var, mean, var, momentum, count / (count - 1)):
            return
        running_mean, running_var = running_mean.data, running_var.data
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))


class BatchNormActFunction(_Function):
    """out = activation(batch_norm(y) + residual). Forward mode raises NotImplementedError.

    `apply(y, mean, var, gamma, beta, residual, eps, activation, update)` with the fields of an Epilogue: mean and var
    are the statistics to normalise by, or None for the batch's own. Returns (out,) or, in the second form, (out, mean,
    var), of which `out` alone is differentiable. `update(mean, var)`, or None, is called, in the second form, before
    anything is saved, as in ConvBNActFunction. Saved are y, vectors and, beside a residual, what that one saves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y, mean, var, gamma, beta, residual, eps, activation, update):
        image = _as_image(y)
        residual = None if residual is None else _as_image(residual)
        found: tuple[torch.Tensor, ...] = ()
        if mean is None:
            found = mean, var = ops.batch_stats(image)
            if update is not None:
                update(mean, var)
        else:
            acc = accumulate_dtype(y.dtype)
            mean, var = mean.to(acc), var.to(acc)
        out = ops.bn_act(image, Epilogue(None, mean, var, gamma, beta, residual, eps, activation))
        return _in_shape(out, y.shape), *found

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, mean, var, gamma, beta, residual, ctx.eps, ctx.activation, _ = inputs
        out, *found = output
        ctx.training = mean is None
        if ctx.training:
            mean, var = found
            ctx.mark_non_differentiable(mean, var)
        else:  # running statistics move in training, unseen by autograd; this graph keeps its own
            mean, var = mean.clone(), var.clone()
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (gamma, beta))
        ctx.by_output = residual is not None and TABLE[ctx.activation].by_output
        seen = residual if not ctx.by_output else out if ctx.activation != "identity" else None
        # PyTorch's backward pass does not read beta: who writes it behind torch's back changes no gradient.
        offset = None
        if beta is not None and not ctx.by_output and ctx.activation != "identity":
            offset = beta.detach().clone()
        ctx.save_for_backward(y, mean, var, gamma, beta, seen, offset)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * 9
        y, mean, var, gamma, beta, seen, offset = ctx.saved_tensors
        y_needed, _, _, gamma_needed, beta_needed, residual_needed = ctx.needs_input_grad[:6]
        recorded = torch.is_grad_enabled() or type(dout) not in ops._PLAIN or not ops.idle_but_for_autocast()
        shape, activation = y.shape, ctx.activation
        image, dout = _as_image(y), _as_image(dout)
        residual = None if seen is None else _as_image(seen)
        if ctx.by_output:  # the residual's gradient, of which the rest is that of a batch norm alone
            if residual is not None:
                dout = (
                    BACKWARD[activation](dout, residual)
                    if recorded
                    else ops.act_backward(dout, residual, activation)[0]
                )
            activation, residual = "identity", None
        if recorded:
            if ctx.training:
                mean, var = reference.batch_stats(image)
        else:
            if not ctx.training:
                acc = accumulate_dtype(y.dtype)
                mean, var = mean.to(acc), var.to(acc)
            beta = beta if offset is None else offset
        epilogue = Epilogue(None, mean, var, gamma, beta, residual, ctx.eps, activation)
        bn_act_backward = reference.bn_act_backward if recorded else ops.bn_act_backward
        dy, dgamma, dbeta, dresidual = bn_act_backward(dout, image, epilogue, ctx.training)
        if ctx.by_output:
            dresidual = dout

        def as_it_was(gradient):
            return gradient.reshape(shape) if recorded or gradient is dout else _in_shape(gradient, shape)

        return (
            as_it_was(dy) if y_needed else None,
            None,
            None,
            _cast(dgamma, ctx.dtypes[0]) if gamma_needed else None,
            _cast(dbeta, ctx.dtypes[1]) if beta_needed else None,
            as_it_was(dresidual) if residual_needed else None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode("BatchNormActFunction")


def takes(y: torch.Tensor, residual: torch.Tensor | None, by_batch: bool) -> bool:
    """True of what `bn_act` takes, parameters apart, where it also means what PyTorch's operations one by one do,
    strides included, and none of those raises or warns."""
    if (
        y.dtype not in DTYPES
        or y.dim() not in (2, 3, 4, 5)
        or not _is_usual(y)
        or y.numel() == 0
        or by_batch
        and y.numel() == y.shape[1]
        or not ops.idle_but_for_autocast()
        or autograd.carries_tangents()
    ):
        return False
    if y.dim() == 2:
        is_dense = y.stride() == (y.shape[1], 1)
    elif y.stride() == dense_strides(y.shape, False):
        is_dense = True
    else:  # where strides fit both formats, the operations one by one may change between them
        is_dense = y.dim() > 3 and y.stride() == dense_strides(y.shape, True) and not fits_both_formats(y.shape)
    if not is_dense or backends.select_batch_norm(_as_image(y)).name == "aten":  # which PyTorch calls in fewer passes
        return False
    return residual is None or (
        _is_usual(residual)
        and residual.dtype is y.dtype
        and residual.device == y.device
        and residual.shape == y.shape
        and residual.stride() == y.stride()
    )


def _is_usual(t: torch.Tensor) -> bool:
    """True of a tensor of torch's own that lies in memory as it reads, and may be saved."""
    return (
        type(t) in ops._PLAIN
        and t.layout is torch.strided
        and not t.is_neg()
        and (not t.is_inference() or torch.is_inference_mode_enabled())
    )


def bn_act(
    y: torch.Tensor,
    epilogue: Epilogue,
    by_batch: bool,
    momentum: float = 0.0,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(batch_norm(y) + residual) of an epilogue without a bias, outside transforms and forward mode.

    y is (N, C, ...) with none, one, two or three axes behind, of dense strides, contiguous or channels-last, and so is
    the residual; the parameters fit. `by_batch`: by the batch's own statistics, of which there must be more than one
    value a channel; those of the epilogue, where there are any, are updated with `momentum` then, and the count is
    counted up, as F.batch_norm and its layer do. The result has y's strides."""
    update: Update | None = None
    if by_batch:
        running_mean, running_var = epilogue.mean, epilogue.var

        def update(mean: torch.Tensor, var: torch.Tensor) -> None:
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            if running_mean is not None and running_var is not None:
                update_running(running_mean, running_var, mean, var, momentum, y.numel() // y.shape[1])

        epilogue = epilogue._replace(mean=None, var=None)
    _, mean, var, gamma, beta, residual, eps, activation = epilogue
    arguments = y, mean, var, gamma, beta, residual, eps, activation, update
    recorded = autograd.needs_function(y, gamma, beta, residual)
    out: torch.Tensor = (BatchNormActFunction.apply if recorded else BatchNormActFunction.forward)(*arguments)[0]
    return out
