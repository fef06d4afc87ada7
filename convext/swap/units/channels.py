"""Layers over the channels of each pixel, and the mean over the pixels: steps of sequences, and linear layers in
training.

Over a channels-last image a linear layer is a 1x1 convolution, and a LayerNorm a kernel of its own (csrc's
layer_norm.h), as is the mean (mean.h). With gradients a linear layer and the activation after it are one call, a 1x1
convolution:

    z = x @ w.T + bias   [y = activation(z)]

The last dimension of x is channels and all others are pixels, so that x as it lies is a channels-last image of one row.
The kernels of convolutions then compute the product and both its gradients, and the activation's gradient and the
bias's come out of one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ... import autograd, backends, functional, ops
from ...activation import TABLE
from ...autograd import Recomputable
from ...backends.native_sequence import Step, StepKind
from ...problem import ConvProblem, Epilogue, Geom, Layout, Pass, epilogue_kind
from . import AnyLayout, Call, Op, Tensors
from .functions import NOWHERE, Affine, LayerNormalization, Place, found

if TYPE_CHECKING:
    from ..modes import Mode

Filters = tuple[int, int, int, int, int, int, int, int, int, int]  # k, r, s, stride, padding, dilation, groups
Shapes = tuple[tuple[int, ...], ...]
_POINTWISE = Geom((1, 1), (0, 0), (1, 1), 1)
POINTWISE = 1, 1, 1, 1, 0, 0, 1, 1, 1  # filter, stride, padding, dilation, groups
_DTYPES: tuple[torch.dtype, ...] = torch.float32, torch.float64, torch.bfloat16
_NORM_DTYPES = torch.float32, torch.float64  # of the LayerNorm's kernel
_LEAST_ROWS = 64  # of x: with fewer, packing the weights costs as much as multiplying by them


class _ChannelOp(Op):
    kind, dtypes = StepKind.CONVOLUTION, _DTYPES

    def filters(self, before: ConvProblem, tensors: Tensors) -> Filters | None:
        """How many there are, and their extents, strides and groups as ConvProblem takes them; None where the tensors
        do not fit."""
        raise NotImplementedError

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        return not mode.direct or layout.is_free(last)

    def step(self, before: ConvProblem | None, residual: int | None) -> Step | None:
        tensors = self.tensors()
        if (
            before is None
            or before.dtype.torch not in self.dtypes
            or self.facts(tensors) is None
            or (filters := self.filters(before, tensors)) is None
        ):
            return None
        n, c, h, w = before.y_shape
        problem = ConvProblem(n, c, h, w, *filters, before.dtype, before.y_layout, Layout.NHWC, before.device)
        if self.kind is StepKind.CONVOLUTION:
            kind = epilogue_kind(False, residual is not None, self.activation)
            self.choice = backends.select(Pass.FPROP, problem, alone=False, kind=kind)
        return Step(problem, self.activation, residual, tuple(t is not None for t in tensors), self.kind)


class Mean(_ChannelOp):
    """The mean over all pixels."""

    kind = StepKind.MEAN
    places = (NOWHERE,) * 6
    in_strips = has_call = False

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        return True

    def filters(self, before: ConvProblem, tensors: Tensors) -> Filters | None:
        return before.k, before.p, before.q, 1, 1, 0, 0, 1, 1, before.k


class LayerNorm(_ChannelOp):
    """A LayerNorm over the channels."""

    kind, dtypes = StepKind.LAYER_NORM, _NORM_DTYPES
    has_call = False

    def __init__(self, norm: LayerNormalization):
        self.shape, self.eps = norm.shape, norm.eps
        self.places = (*(NOWHERE,) * 4, norm.weight, norm.bias)

    def words(self, adds: bool) -> list[str]:
        return ["layer norm", *super().words(adds)]

    def filters(self, before: ConvProblem, tensors: Tensors) -> Filters | None:
        return (before.k, *POINTWISE) if self.shape == (before.k,) else None


class Linear(_ChannelOp):
    """A linear layer, and the activation after it. `scale`: whether the output is multiplied by a tensor found by name;
    `scale_shapes`: those that it may have, where -1 stands for the channels."""

    takes = gives = "rows"

    def __init__(self, linear: Affine):
        self.scale = False
        self.scale_shapes: Shapes = ()
        self.places = (*linear, *(NOWHERE,) * 4)

    def scale_by(self, place: Place, shapes: Shapes) -> None:
        self.scale, self.scale_shapes = True, shapes
        self.places = (*self.places[:4], place, NOWHERE)

    def words(self, adds: bool) -> list[str]:
        activation = [] if self.activation == "identity" else [self.activation]
        return ["linear", *activation, *(["scale"] if self.scale else []), *super().words(adds)]

    def filters(self, before: ConvProblem, tensors: Tensors) -> Filters | None:
        weight, scale = tensors[0], tensors[4]
        if weight is None or weight.dim() != 2 or weight.shape[1] != before.k:
            return None
        shapes = [tuple(weight.shape[0] if extent == -1 else extent for extent in s) for s in self.scale_shapes]
        if self.scale and (scale is None or not scale.is_contiguous() or tuple(scale.shape) not in shapes):
            return None
        return weight.shape[0], *POINTWISE

    def output(self) -> tuple[int, float] | None:
        w = self.tensors()[0]
        if w is None or w.dim() != 2 or TABLE[self.activation].by_output or not autograd.is_cheap(w, w.dtype):
            return None
        return w.shape[0], 1.0

    def bind(self, fallback: Call, mode: Mode) -> Call:
        if mode.direct:
            return fallback
        (weight, offset), activation = self.places[:2], self.activation

        def fused(given: Any) -> Any:
            w, bias = found(weight), found(offset)
            kept = type(given) is not Recomputable
            x: Any = given if kept else given.values.permute(0, 2, 3, 1).view(given.rows)
            if w is None or x is None or not _takes(x, w, bias):
                return fallback(functional.ordinary(given))
            shape = *x.shape[:-1], w.shape[0]
            if kept:
                given = x.view(1, 1, x.numel() // x.shape[-1], x.shape[-1]).permute(0, 3, 1, 2)
            epilogue = Epilogue(bias, activation=activation)
            filters = w.view(*w.shape, 1, 1)
            y = functional.chained_conv_act(given, filters, epilogue, *_POINTWISE, not self.keeps, self.recompute)
            if isinstance(y, Recomputable):
                return y._replace(rows=shape)
            return y.permute(0, 2, 3, 1).view(shape)

        return fused


def _takes(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True where a recorded call on x runs faster as a convolution, and means the same."""
    if not autograd.needs_function(x, w, bias) or not ops.all_plain(x, w, bias) or autograd.carries_tangents():
        return False
    return (
        all(t is None or t.dtype is torch.float32 and t.device.type == "cpu" for t in (x, w, bias))
        and x.dim() > 1
        and x.is_contiguous()
        and w.is_contiguous()
        and x.shape[-1] == w.shape[1]
        and x.numel() >= _LEAST_ROWS * max(1, x.shape[-1])
        and min(w.shape) > 1
        and (bias is None or bias.shape == w.shape[:1])
        and backends.forced() in (None, "native")
        and backends.unavailable("native", "cpu") is None
    )
