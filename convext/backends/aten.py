"""The aten backend: PyTorch's own operations. Complete on every device and for every dtype, so it is the reference.

What follows a convolution has up to three forms here, of which the first serves unless another was measured to be the
fastest: PyTorch's operations one by one; one pass over the convolution's result, by the backend that serves batch norms
(`_in_one_pass`); and cuDNN's fused convolution (`_fused_by_cudnn`). docs/design.md says how far their results may be
apart. In training the convolution alone is chosen, and the batch norm behind it is one pass already (ops.py)."""

from __future__ import annotations

import torch

from ..activation import BACKWARD, TABLE
from ..memory_format import laid_out, memory_format, suggests_channels_last
from ..problem import ConvProblem, DType, Epilogue, Pass, accumulate_dtype
from . import tuned
from .base import Backend, Candidate

_aten = torch.ops.aten


def _normalised(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The batch norm of an epilogue that has one, of y."""
    mean, var, gamma, beta = epilogue.norm
    assert mean is not None and var is not None
    # ATen wants all parameters in one dtype: that of the statistics, which is the accumulate dtype or y's own.
    gamma, beta = (p if p is None else p.to(mean.dtype) for p in (gamma, beta))
    return _aten.native_batch_norm(y, gamma, beta, mean, var, False, 0.0, epilogue.eps)[0]


def _convolution_backward(
    problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, which: int
) -> torch.Tensor:
    stride, padding, dilation, groups = problem.geom
    mask = [which == 0, which == 1, False]
    dtype = dy.dtype
    if dtype is torch.float16 and dy.device.type == "cpu":  # where ATen would accumulate in float16
        dy, x, w = dy.float(), x.float(), w.float()
    if which == 1 and problem.device == "cpu":
        if _leaves_parts_unwritten(problem, dtype):
            x = x.contiguous()
        if _writes_past_memory(problem):
            for axis, step in enumerate(stride, 2):
                x = x[(slice(None),) * axis + (slice(None, None, step),)]
            stride = (1,) * problem.axes
    none = (0,) * problem.axes
    grads = _aten.convolution_backward(dy, x, w, None, stride, padding, dilation, False, none, groups, mask)
    return grads[which].to(dtype)


def _leaves_parts_unwritten(problem: ConvProblem, dtype: torch.dtype) -> bool:
    """True where ATen's weight gradient of channels-last bfloat16 may hold uninitialised memory on the CPU: with torch
    2.11 that was so for images narrower than a filter and a stride beyond 1 together, though not for all of them."""
    return dtype is torch.bfloat16 and problem.stride_w > 1 and problem.w < problem.s * problem.dil_w + problem.stride_w


def _writes_past_memory(problem: ConvProblem) -> bool:
    """True where ATen's weight gradient may write outside its memory on the CPU: with torch 2.11 that was so for 1x1
    filters of a stride beyond 1 without padding, of one group, over channels-last x or w, on two threads or more, in
    float32 and bfloat16, though not for all of them. Such a filter reads every stride-th pixel and no other, so that
    the gradient over those alone, at stride 1, is the same. Neither format nor threads are looked at, so that the sums
    do not depend on them."""
    return problem.is_pointwise and not problem.is_unit_stride and problem.pad_d == problem.pad_h == problem.pad_w == 0


def works_around(pass_: Pass, problem: ConvProblem) -> bool:
    """True where this backend hands ATen other operands than its own, on the CPU."""
    if pass_ is Pass.FPROP:
        return False
    dtype = problem.dtype.torch
    if pass_ is Pass.WGRAD and (_leaves_parts_unwritten(problem, dtype) or _writes_past_memory(problem)):
        return True
    return dtype is torch.float16


# Kinds of epilogues that cuDNN fuses.
_CUDNN_KINDS = "relu", "add relu", "bn relu", "bn add relu"


def _cudnn_fuses(problem: ConvProblem, kind: str) -> bool:
    """A batch norm has to be folded into the weights for it. float16 is left out there: a weight times its scale may
    leave the range in which that type keeps its precision, 6e-5 to 65504, although the result does not. The range of
    float32 and bfloat16 is wide enough for any network that trains in them: 1e-38 to 3e38."""
    dtypes = (DType.FLOAT32, DType.BFLOAT16, *(() if "bn" in kind.split() else (DType.FLOAT16,)))
    return (
        problem.device == "cuda"
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cudnn.enabled
        and problem.axes == 2
        and kind in _CUDNN_KINDS
        and problem.dtype in dtypes
    )


def _folded(w: torch.Tensor, epilogue: Epilogue) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and bias of a convolution that is followed by what is left of the epilogue without its batch norm."""
    mean, var, gamma, beta = epilogue.norm
    if mean is None or var is None:
        return w, epilogue.bias
    acc = accumulate_dtype(w.dtype)
    scale = (var.to(acc) + epilogue.eps).rsqrt_()
    if gamma is not None:
        scale.mul_(gamma)
    shift = -mean.to(acc) if epilogue.bias is None else epilogue.bias.to(acc) - mean.to(acc)
    shift.mul_(scale)
    if beta is not None:
        shift.add_(beta)
    return (w.to(acc) * scale.view(-1, 1, 1, 1)).to(w.dtype), shift.to(w.dtype)


class AtenBackend(Backend):
    name = "aten"

    def candidates(self, pass_: Pass, problem: ConvProblem, kind: str = "") -> list[Candidate]:
        from . import row, unavailable

        found = super().candidates(pass_, problem, kind)
        others = [name for name in row(problem.device) if name != self.name]
        if pass_ is Pass.FPROP and "bn" in kind.split():
            if problem.axes == 2 and any(unavailable(name, problem.device) is None for name in others):
                found.append(Candidate(self.name, f"{self.name}_fprop_one_pass", None, self._in_one_pass))
        if pass_ is Pass.FPROP and _cudnn_fuses(problem, kind):
            found.append(Candidate(self.name, f"{self.name}_fprop_cudnn_fused", None, self._fused_by_cudnn))
        aside = tuned.aside(problem.device)
        return found[:1] + [candidate for candidate in found[1:] if candidate.variant not in aside]

    def _in_one_pass(self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """The convolution, and batch norm, residual and activation in one pass over its result."""
        from . import select_batch_norm

        mean, var = epilogue.mean, epilogue.var
        assert mean is not None and var is not None
        y = self.fprop(problem, x, w, Epilogue(epilogue.bias))
        acc = accumulate_dtype(y.dtype)
        out = select_batch_norm(y).bn_act(y, epilogue._replace(bias=None, mean=mean.to(acc), var=var.to(acc)))
        return out.contiguous(memory_format=memory_format(bool(problem.y_layout)))

    def _fused_by_cudnn(
        self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue
    ) -> torch.Tensor:
        """Convolution, bias, residual and ReLU as one kernel of cuDNN's, the batch norm folded into the weights."""
        stride, padding, dilation, groups = problem.geom
        form = memory_format(bool(problem.y_layout))
        w, bias = _folded(w, epilogue)
        x, w = x.contiguous(memory_format=form), w.contiguous(memory_format=form)
        if epilogue.residual is None:
            y = torch.cudnn_convolution_relu(x, w, bias, stride, padding, dilation, groups)
        else:
            residual = epilogue.residual.contiguous(memory_format=form)
            y = torch.cudnn_convolution_add_relu(x, w, residual, 1.0, bias, stride, padding, dilation, groups)
        return y.contiguous(memory_format=form)

    def fprop(self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        stride, padding, dilation, groups = problem.geom
        y = torch.convolution(x, w, epilogue.bias, stride, padding, dilation, False, (0,) * problem.axes, groups)
        # Either was asked for where x and w do not suggest it; contiguous of volumes alone.
        if problem.y_layout or problem.axes == 3:
            y = y.contiguous(memory_format=memory_format(bool(problem.y_layout), y.dim()))
        if epilogue.mean is not None and epilogue.var is not None:
            acc = accumulate_dtype(y.dtype)
            y = _normalised(y, epilogue._replace(mean=epilogue.mean.to(acc), var=epilogue.var.to(acc)))
        if epilogue.residual is not None:
            y.add_(epilogue.residual)
        return TABLE[epilogue.activation].overwrite(y)

    def dgrad(self, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # Of x, ATen reads only the sizes and the format.
        x = torch.empty(
            problem.x_shape,
            dtype=dy.dtype,
            device=dy.device,
            memory_format=memory_format(bool(problem.x_layout), dy.dim()),
        )
        dx = _convolution_backward(problem, dy, x, w, 0)
        return laid_out(dx, bool(problem.x_layout))

    def wgrad(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
    ) -> torch.Tensor:
        w = dy.new_empty(problem.w_shape)  # only its sizes are read
        return laid_out(_convolution_backward(problem, dy, x, w, 1), channels_last)

    def batch_stats(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), (0, *range(2, y.dim())), correction=0)
        return mean, var

    def bn_act(self, y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        out = _normalised(y, epilogue)
        if epilogue.residual is not None:
            out.add_(epilogue.residual)
        return TABLE[epilogue.activation].overwrite(out)

    def bn_act_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        _, mean, var, gamma, _, residual, eps, activation = epilogue
        assert mean is not None and var is not None
        if y.numel() == 0:  # native_batch_norm_backward divides by the count of an empty batch
            channels = mean.new_zeros(y.shape[1])
            return (
                torch.empty_like(y),
                channels,
                channels.clone(),
                y.new_empty(0) if residual is None else torch.empty_like(y),
            )
        dz = dout
        if activation != "identity":
            z = _normalised(y, epilogue)
            dz = BACKWARD[activation](dout, z if residual is None else z.add_(residual))
        gamma = None if gamma is None else gamma.to(mean.dtype)
        dy, dgamma, dbeta = _aten.native_batch_norm_backward(
            dz, y, gamma, mean, var, mean, (var + eps).rsqrt_(), training, eps, [True, True, True]
        )
        if residual is None:
            return dy, dgamma, dbeta, y.new_empty(0)
        dense = memory_format(suggests_channels_last(y), y.dim())  # a new tensor, dense in the format of y
        return dy, dgamma, dbeta, dz.clone(memory_format=dense) if dz is dout else dz.contiguous(memory_format=dense)


BACKEND = AtenBackend()
