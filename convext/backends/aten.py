"""The aten backend: PyTorch's own operations. Complete on every device and for every dtype, so it is the reference."""

from __future__ import annotations

import torch

from ..activation import BACKWARD, FORWARD_
from ..memory_format import laid_out, memory_format, suggests_channels_last
from ..problem import ConvProblem, Epilogue, Pass, accumulate_dtype

_aten = torch.ops.aten


def _batch_norm(y, mean, var, gamma, beta, eps):
    # ATen wants all parameters in one dtype: that of the statistics, which is the accumulate dtype or y's own.
    gamma, beta = (p if p is None else p.to(mean.dtype) for p in (gamma, beta))
    return _aten.native_batch_norm(y, gamma, beta, mean, var, False, 0.0, eps)[0]


def _convolution_backward(problem, dy, x, w, which):
    stride, padding, dilation, groups = problem.geom
    mask = [which == 0, which == 1, False]
    dtype = dy.dtype
    if dtype is torch.float16 and dy.device.type == "cpu":  # where ATen would accumulate in float16
        dy, x, w = dy.float(), x.float(), w.float()
    if which == 1 and problem.device == "cpu":
        if _leaves_parts_unwritten(problem, dtype):
            x = x.contiguous()
        if _writes_past_memory(problem):
            x, stride = x[:, :, ::problem.stride_h, ::problem.stride_w], (1, 1)
    grads = _aten.convolution_backward(dy, x, w, None, stride, padding, dilation, False, (0, 0), groups, mask)
    return grads[which].to(dtype)


def _leaves_parts_unwritten(problem, dtype):
    """True where ATen's weight gradient of channels-last bfloat16 may hold uninitialised memory on the CPU: with torch
    2.11 that was so for images narrower than a filter and a stride beyond 1 together, though not for all of them."""
    return dtype is torch.bfloat16 and problem.stride_w > 1 \
        and problem.w < problem.s * problem.dil_w + problem.stride_w


def _writes_past_memory(problem):
    """True where ATen's weight gradient may write outside its memory on the CPU: with torch 2.11 that was so for 1x1
    filters of a stride beyond 1 without padding, of one group, over channels-last x or w, on two threads or more, in
    float32 and bfloat16, though not for all of them. Such a filter reads every stride-th pixel and no other, so that
    the gradient over those alone, at stride 1, is the same. Neither format nor threads are asked, so that the sums do
    not depend on them."""
    return problem.is_pointwise and not problem.is_unit_stride and problem.pad_h == problem.pad_w == 0


class AtenBackend:
    name = "aten"

    def unavailable(self, device_type: str) -> str | None:
        return None

    def reject(self, pass_: Pass, problem: ConvProblem) -> str | None:
        return None

    def variant(self, pass_: Pass, problem: ConvProblem) -> str:
        return f"aten_{pass_.name.lower()}"

    def fprop(self, problem: ConvProblem, x, w, epilogue: Epilogue):
        stride, padding, dilation, groups = problem.geom
        y = torch.convolution(x, w, epilogue.bias, stride, padding, dilation, False, (0, 0), groups)
        if problem.y_layout and not y.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)  # it was asked for, and x and w do not suggest it
        if epilogue.mean is not None:
            stats = (t.to(accumulate_dtype(y.dtype)) for t in (epilogue.mean, epilogue.var))
            y = _batch_norm(y, *stats, epilogue.gamma, epilogue.beta, epilogue.eps)
        if epilogue.residual is not None:
            y.add_(epilogue.residual)
        return FORWARD_[epilogue.activation](y)

    def dgrad(self, problem: ConvProblem, dy, w):
        # Of x, ATen reads only the sizes and the format.
        x = torch.empty(problem.x_shape, dtype=dy.dtype, device=dy.device,
                        memory_format=memory_format(problem.x_layout))
        dx = _convolution_backward(problem, dy, x, w, 0)
        return laid_out(dx, bool(problem.x_layout))

    def wgrad(self, problem: ConvProblem, dy, x, channels_last=False):
        w = dy.new_empty(problem.w_shape)  # only its sizes are read
        return laid_out(_convolution_backward(problem, dy, x, w, 1), channels_last)

    def batch_stats(self, y):
        var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), (0, 2, 3), correction=0)
        return mean, var

    def bn_act(self, y, mean, var, gamma, beta, residual, eps, activation):
        out = _batch_norm(y, mean, var, gamma, beta, eps)
        if residual is not None:
            out.add_(residual)
        return FORWARD_[activation](out)

    def bn_act_backward(self, dout, y, mean, var, gamma, beta, residual, eps, activation, training):
        if y.numel() == 0:  # native_batch_norm_backward divides by the count of an empty batch
            channels = mean.new_zeros(y.shape[1])
            return (torch.empty_like(y), channels, channels.clone(),
                    y.new_empty(0) if residual is None else torch.empty_like(y))
        dz = dout
        if activation != "identity":
            z = _batch_norm(y, mean, var, gamma, beta, eps)
            dz = BACKWARD[activation](dout, z if residual is None else z.add_(residual))
        gamma = None if gamma is None else gamma.to(mean.dtype)
        dy, dgamma, dbeta = _aten.native_batch_norm_backward(
            dz, y, gamma, mean, var, mean, (var + eps).rsqrt_(), training, eps, [True, True, True])
        if residual is None:
            return dy, dgamma, dbeta, y.new_empty(0)
        dense = memory_format(suggests_channels_last(y))  # a new tensor, dense in the format of y
        return dy, dgamma, dbeta, dz.clone(memory_format=dense) if dz is dout else dz.contiguous(memory_format=dense)


BACKEND = AtenBackend()
