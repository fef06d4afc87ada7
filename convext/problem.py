"""One convolution of images or volumes as plain data: the Python twin of csrc/core/conv_problem.h and
csrc/core/epilogue.h."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import activation
from .memory_format import suggests_channels_last


class Pass(enum.IntEnum):
    """The three operators of a convolution. Each one's gradients are the other two."""

    FPROP = 0  # y  from x, w
    DGRAD = 1  # dx from dy, w
    WGRAD = 2  # dw from dy, x


class Layout(enum.IntEnum):
    """Memory order of an activation tensor."""

    NCHW = 0  # torch.contiguous_format
    NHWC = 1  # torch.channels_last, and of volumes torch.channels_last_3d


class DType(enum.IntEnum):
    """The dtypes that have kernels; every other one goes to ATen."""

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3

    @property
    def torch(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.name.lower())
        return found


DTYPES = {dtype.torch: dtype for dtype in DType}

# The numbering of `Activation` in epilogue.h.
ACTIVATIONS = {name: number for number, name in enumerate(activation.TABLE)}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and per-channel statistics are kept in: float64 for float64, float32 for the others."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def tf32_is_allowed() -> bool:
    """Whether a convolution on CUDA may round its float32 operands to tf32: where PyTorch would let cuDNN do so, by
    torch.backends.cudnn.conv.fp32_precision, which torch.backends.cudnn.allow_tf32 sets too. Its default is on.

    That second one is not read: it raises an error where convolutions and recurrent networks are set differently.
    """
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # set as it is imported
    return precision == "tf32"


class Geom(tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]):
    """How the filter walks over the input: stride, padding, dilation, (height, width) or (depth, height, width) each,
    and groups. The one value in which they travel.

    A tuple and not a NamedTuple, because torch.func takes those apart, and fails on nested ones in forward mode.
    """

    __slots__ = ()

    def __new__(
        cls,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
    ) -> Geom:
        return tuple.__new__(cls, (stride, padding, dilation, groups))

    def __getnewargs__(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self[0], self[1], self[2], self[3]

    @property
    def axes(self) -> int:
        return len(self[0])

    @property
    def stride(self) -> tuple[int, ...]:
        return self[0]

    @property
    def padding(self) -> tuple[int, ...]:
        return self[1]

    @property
    def dilation(self) -> tuple[int, ...]:
        return self[2]

    @property
    def groups(self) -> int:
        return self[3]

    def __repr__(self) -> str:
        return f"Geom(stride={self[0]}, padding={self[1]}, dilation={self[2]}, groups={self[3]})"

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
        """(P, Q) for an input (H, W) and a filter (R, S), (Z, P, Q) for (D, H, W) and (T, R, S): PyTorch's formula."""
        return tuple(
            (n + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for n, taps, stride, pad, dilation in zip(input_size, kernel_size, *self[:3])
        )

    def input_size(
        self, output_size: Sequence[int], kernel_size: Sequence[int], output_padding: Sequence[int]
    ) -> tuple[int, ...]:
        """(H, W) for an output (P, Q) and a filter (R, S), (D, H, W) for (Z, P, Q) and (T, R, S): the result of a
        transposed convolution, as PyTorch has it. Of the `stride` sizes with that output, `output_padding` chooses
        one."""
        return tuple(
            (n - 1) * stride - 2 * pad + dilation * (taps - 1) + longer + 1
            for n, taps, longer, stride, pad, dilation in zip(output_size, kernel_size, output_padding, *self[:3])
        )


class GemmShape(NamedTuple):
    """The matrix product that a pass amounts to, per group."""

    m: int
    n: int
    k: int


class Epilogue(NamedTuple):
    """What happens to an output element of fprop on its way to memory, from `functional` down to the kernel one value:
    the operators' schemas alone spell it out, in this order. Every part may be absent.

    out = activation((y + bias - mean) / sqrt(var + eps) * gamma + beta + residual)

    `bias`, `mean`, `var`, `gamma`, `beta` are (K); the batch norm is there when `mean` and `var` are. `residual` has
    the shape of y.
    """

    bias: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    eps: float = 1e-5
    activation: str = "identity"

    @property
    def norm(self) -> tuple[torch.Tensor | None, ...]:
        """mean, var, gamma, beta."""
        return self[1:5]

    @property
    def kind(self) -> str:
        """What follows the convolution, in words: "bn add relu"; "" where nothing does but a bias."""
        return epilogue_kind(self.mean is not None, self.residual is not None, self.activation)


def epilogue_kind(normalises: bool, adds: bool, activation: str) -> str:
    """`Epilogue.kind` of what it is made of."""
    words = "bn" * normalises, "add" * adds, "" if activation == "identity" else activation
    return " ".join(filter(None, words))


STATISTICS = "statistics"  # the kind of an fprop in training, which gives mean and variance of its channels besides


_IMAGE = (1, 1, 1, 0, 1)  # d, t, stride, padding, dilation


@dataclasses.dataclass(frozen=True, slots=True)
class ConvProblem:
    """Sizes, geometry, dtype and layouts of one convolution. Field for field `ConvProblem` in conv_problem.h; besides,
    the type of the device, which the C++ side keeps in the variant, and whether tensors have two axes or three."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    groups: int
    dtype: DType = DType.FLOAT32
    x_layout: Layout = Layout.NCHW
    y_layout: Layout = Layout.NCHW
    device: str = "cpu"
    d: int = 1
    t: int = 1
    stride_d: int = 1
    pad_d: int = 0
    dil_d: int = 1
    axes: int = 2
    # Both from the fields above, kept because they are asked for on every call.
    geom: Geom = dataclasses.field(init=False, repr=False, compare=False)
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stride, padding = (self.stride_d, self.stride_h, self.stride_w), (self.pad_d, self.pad_h, self.pad_w)
        dilation, axes = (self.dil_d, self.dil_h, self.dil_w), self.axes
        object.__setattr__(self, "geom", Geom(stride[-axes:], padding[-axes:], dilation[-axes:], self.groups))
        fields = (*self.extents(), self.dtype, self.x_layout, self.y_layout, self.device, axes)
        object.__setattr__(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of_fprop(cls, x: torch.Tensor, w: torch.Tensor, geom: Geom, channels_last: bool = False) -> ConvProblem:
        """The problem of y = fprop(x, w). y is channels-last when asked for, and of images when x or w suggests it, as
        in ATen; whose rule for volumes is another (memory_format.py)."""
        x_nhwc = suggests_channels_last(x)
        y_nhwc = channels_last or geom.axes == 2 and (x_nhwc or suggests_channels_last(w))
        return cls._of(x.shape, w.shape, geom, x, x_nhwc, y_nhwc)

    @classmethod
    def of_dgrad(
        cls, dy: torch.Tensor, w: torch.Tensor, input_size: Sequence[int], geom: Geom, channels_last: bool | None = None
    ) -> ConvProblem:
        """The problem of dx = dgrad(dy, w). dx is channels-last as given, and with None when dy or w suggests it."""
        dy_nhwc = suggests_channels_last(dy)
        dx_nhwc = dy_nhwc or suggests_channels_last(w) if channels_last is None else channels_last
        x_shape = (dy.shape[0], w.shape[1] * geom.groups, *input_size)
        return cls._of(x_shape, w.shape, geom, dy, dx_nhwc, dy_nhwc)

    @classmethod
    def of_wgrad(cls, dy: torch.Tensor, x: torch.Tensor, kernel_size: Sequence[int], geom: Geom) -> ConvProblem:
        """The problem of dw = wgrad(dy, x)."""
        w_shape = (dy.shape[1], x.shape[1] // geom.groups, *kernel_size)
        return cls._of(x.shape, w_shape, geom, x, suggests_channels_last(x), suggests_channels_last(dy))

    @classmethod
    def _of(
        cls, x_shape: Sequence[int], w_shape: Sequence[int], geom: Geom, like: torch.Tensor, x_nhwc: bool, y_nhwc: bool
    ) -> ConvProblem:
        *stride_d, stride_h, stride_w = geom.stride
        *pad_d, pad_h, pad_w = geom.padding
        *dil_d, dil_h, dil_w = geom.dilation
        n, c, *d, h, w = x_shape
        k, _, *t, r, s = w_shape
        return cls(
            n,
            c,
            h,
            w,
            k,
            r,
            s,
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            dil_h,
            dil_w,
            geom.groups,
            DTYPES[like.dtype],
            Layout(x_nhwc),
            Layout(y_nhwc),
            like.device.type,
            *((d[0], t[0], stride_d[0], pad_d[0], dil_d[0]) if geom.axes == 3 else _IMAGE),
            axes=geom.axes,
        )

    @property
    def z(self) -> int:
        return (self.d + 2 * self.pad_d - self.dil_d * (self.t - 1) - 1) // self.stride_d + 1

    @property
    def p(self) -> int:
        return (self.h + 2 * self.pad_h - self.dil_h * (self.r - 1) - 1) // self.stride_h + 1

    @property
    def q(self) -> int:
        return (self.w + 2 * self.pad_w - self.dil_w * (self.s - 1) - 1) // self.stride_w + 1

    @property
    def is_volume(self) -> bool:
        """Whether it is more than images of one plane, whatever the tensors' dimensions."""
        return not (self.d == self.t == 1 and self.pad_d == 0)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.n, self.c, *(self.d, self.h, self.w)[-self.axes :]

    @property
    def w_shape(self) -> tuple[int, ...]:
        return self.k, self.c_per_group, *(self.t, self.r, self.s)[-self.axes :]

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.n, self.k, *(self.z, self.p, self.q)[-self.axes :]

    @property
    def c_per_group(self) -> int:
        return self.c // self.groups

    @property
    def k_per_group(self) -> int:
        return self.k // self.groups

    @property
    def npq(self) -> int:
        """Pixels of the output, of all planes."""
        return self.n * self.z * self.p * self.q

    @property
    def nhw(self) -> int:
        return self.n * self.d * self.h * self.w

    @property
    def taps(self) -> int:
        return self.t * self.r * self.s

    @property
    def x_size(self) -> int:
        return self.nhw * self.c

    @property
    def y_size(self) -> int:
        return self.npq * self.k

    @property
    def w_size(self) -> int:
        return self.k * self.taps * self.c_per_group

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.c and self.c_per_group == 1 and self.k % self.c == 0

    @property
    def is_pointwise(self) -> bool:
        return self.taps == 1

    @property
    def is_dilated(self) -> bool:
        return (self.t > 1 and self.dil_d > 1) or (self.r > 1 and self.dil_h > 1) or (self.s > 1 and self.dil_w > 1)

    @property
    def is_unit_stride(self) -> bool:
        return self.stride_d == self.stride_h == self.stride_w == 1

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.dtype.torch)

    def extents(self) -> tuple[int, ...]:
        """n, c, h, w, k, r, s, stride, padding, dilation and groups in the order of the fields; and of volumes d, t,
        stride, padding and dilation of that axis."""
        return (*self.image_extents(), *(self.depth_extents() if self.axes == 3 else ()))

    def depth_extents(self) -> tuple[int, ...]:
        return self.d, self.t, self.stride_d, self.pad_d, self.dil_d

    def image_extents(self) -> tuple[int, ...]:
        return (
            self.n,
            self.c,
            self.h,
            self.w,
            self.k,
            self.r,
            self.s,
            self.stride_h,
            self.stride_w,
            self.pad_h,
            self.pad_w,
            self.dil_h,
            self.dil_w,
            self.groups,
        )

    def gemm_shape(self, pass_: Pass) -> GemmShape:
        """gemm_m, gemm_n, gemm_k of a pass, per group."""
        c, k, taps = self.c_per_group, self.k_per_group, self.taps
        if pass_ == Pass.FPROP:
            return GemmShape(self.npq, k, taps * c)
        if pass_ == Pass.DGRAD:
            return GemmShape(self.nhw, c, taps * k)
        return GemmShape(k, taps * c, self.npq)

    @property
    def flops(self) -> float:
        """Multiplies and adds of any of the passes, taps in the padding counted."""
        return 2.0 * self.npq * self.k * self.taps * self.c_per_group

    def __str__(self) -> str:
        text = f"x {'x'.join(map(str, self.x_shape))}, w {'x'.join(map(str, self.w_shape))}"
        for name, value, plain in zip(("stride", "padding", "dilation"), self.geom[:3], (1, 0, 1)):
            if any(v != plain for v in value):
                text += f", {name} {value[0]}" + ("" if len({*value}) == 1 else "".join(f"x{v}" for v in value[1:]))
        if self.groups != 1:
            text += f", groups {self.groups}"
        return f"{text}, {self.dtype.name.lower()}, {self.device}"
