"""The edge cases of a convolution that every suite, backend and device shares. A case's name says which edge it hits.

    for case in CASES:
        operands = case.operands(torch.float32)   # seeded by the case's name, lying in memory as it says
        y = convext.conv2d(operands.x, operands.w, operands.bias, *case.arguments)

`reference.py` computes the expected values in float64. PROBLEMS is the part of CASES that is one `ConvProblem`
as it stands, for tests that talk to an operator or a kernel and not to the public functions.
"""

import math
import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Operands:
    x: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, ...]  # (N, C, H, W), or (C, H, W) for an unbatched input; of volumes (N, C, D, H, W), (C, D, H, W)
    w: tuple[int, ...]  # (K, C/groups, R, S), of volumes (K, C/groups, T, R, S)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)  # or "same", "valid"
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = False
    # How each operand lies in memory: a key of MEMORY. The values are the same whichever it is, but for "expanded".
    x_memory: str = "contiguous"
    w_memory: str = "contiguous"
    dy_memory: str = "contiguous"

    def __str__(self):
        return self.name

    @property
    def axes(self):
        return len(self.w) - 2

    @property
    def arguments(self):
        """What follows (input, weight, bias) in F.conv2d: stride, padding, dilation, groups."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def borders(self):
        """Zeros (before, behind) along each axis. An odd number under "same" puts one more behind."""
        if self.padding == "valid":
            return ((0, 0),) * self.axes
        if self.padding == "same":
            reach = [d * (extent - 1) for d, extent in zip(self.dilation, self.w[2:], strict=True)]
            return tuple((n // 2, n - n // 2) for n in reach)
        return tuple((n, n) for n in self.padding)

    @property
    def symmetric(self):
        return all(before == behind for before, behind in self.borders)

    @property
    def geom(self):
        """(stride, padding, dilation, groups) with the padding as numbers. Defined where `symmetric`."""
        assert self.symmetric, f"{self.name} pads its two sides differently: it is no single problem"
        return self.stride, tuple(before for before, _ in self.borders), self.dilation, self.groups

    @property
    def batched_x(self):
        return self.x if len(self.x) == self.axes + 2 else (1, *self.x)

    @property
    def y(self):
        """Shape of the output, unbatched if the input is."""
        axes = zip(self.x[-self.axes :], self.borders, self.w[2:], self.stride, self.dilation, strict=True)
        size = [(n + sum(border) - d * (taps - 1) - 1) // step + 1 for n, border, taps, step, d in axes]
        return (*self.x[: -self.axes - 1], self.w[0], *size)

    def gemm_k(self, pass_):
        """Length of the sum behind one element of the result of `pass_`: "fprop", "dgrad", "wgrad" or "dbias"."""
        k, c_per_group, *taps = self.w
        pixels = self.batched_x[0] * math.prod(self.y[-self.axes :])
        lengths = {
            "fprop": math.prod(taps) * c_per_group,
            "dgrad": math.prod(taps) * (k // self.groups),
            "wgrad": pixels,
            "dbias": pixels,
        }
        return lengths[pass_]

    def operands(self, dtype=torch.float32, device=None):
        """Standard normal values, drawn in float64 from a seed that is the name's, rounded to `dtype`; on the default
        device where none is named."""
        device = device or torch.get_default_device()
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(self.name.encode()))

        def draw(shape, memory):
            values = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
            return MEMORY[memory](values.to(device=device, dtype=dtype), self.axes)

        return Operands(
            x=draw(self.x, self.x_memory),
            w=draw(self.w, self.w_memory),
            bias=draw(self.w[:1], "contiguous") if self.bias else None,
            dy=draw(self.y, self.dy_memory),
        )


# Ways for a tensor to lie in memory: each takes a contiguous tensor, and how many axes its pixels have, and returns one
# of the same shape.


def _channels_last(t, axes=2):
    """NHWC or NDHWC, also for one that is unbatched."""
    return t.movedim(-axes - 1, -1).contiguous().movedim(-1, -axes - 1)


def _transposed(t, axes=2):
    """Width and height exchanged in memory: neither NCHW nor NHWC."""
    return t.mT.contiguous().mT


def _stepped(t, axes=2):
    """Every other column of a wider image: no dimension has stride 1."""
    wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))
    wide[..., ::2] = t
    return wide[..., ::2]


def _misaligned(t, axes=2):
    """Starts one element past an aligned address."""
    flat = t.new_zeros(t.numel() + 1)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def _window(t, axes=2):
    """The inside of a larger channels-last image: rows are further apart than they are long."""
    margin = t.new_zeros((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 2))
    margin = _channels_last(margin, axes)
    margin[..., 1:-2, 1:-1] = t
    return margin[..., 1:-2, 1:-1]


def _expanded(t, axes=2):
    """One value at every place, all strides 0: the gradient that y.sum().backward() sends."""
    return t.new_full((), 0.75).expand(t.shape)


MEMORY = {
    "contiguous": lambda t, axes=2: t,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "stepped": _stepped,
    "misaligned": _misaligned,
    "window": _window,
    "expanded": _expanded,
}

CASES = [
    # Channels: vectors hold 4, 8 or 16 of them, tiles some multiple.
    Case("pointwise", (2, 16, 7, 7), (32, 16, 1, 1)),
    Case("pointwise_strided", (2, 16, 9, 8), (24, 16, 1, 1), stride=(2, 2)),
    Case("pointwise_padded", (2, 16, 5, 6), (16, 16, 1, 1), padding=(1, 2), bias=True),
    Case("three_by_three", (2, 16, 10, 9), (32, 16, 3, 3), padding=(1, 1), bias=True),
    Case("c_not_multiple_of_vector", (2, 19, 8, 8), (16, 19, 3, 3), padding=(1, 1)),
    Case("k_not_multiple_of_vector", (2, 16, 8, 8), (21, 16, 3, 3), padding=(1, 1), bias=True),
    Case("one_channel_one_filter", (2, 1, 9, 9), (1, 1, 3, 3), padding=(1, 1), bias=True),
    Case("one_filter", (2, 20, 6, 6), (1, 20, 3, 3)),
    Case("one_channel", (2, 1, 12, 12), (20, 1, 5, 5), bias=True),
    Case("three_channel_stem", (1, 3, 30, 31), (24, 3, 7, 7), stride=(2, 2), padding=(3, 3)),
    Case("patchify_stem", (2, 3, 16, 20), (40, 3, 4, 4), stride=(4, 4), bias=True),
    Case("channels_last_stem", (2, 3, 17, 22), (32, 3, 3, 3), stride=(2, 2), padding=(1, 1), bias=True,
         x_memory="channels_last", dy_memory="channels_last"),
    Case("more_channels_than_a_block", (1, 200, 5, 5), (152, 200, 3, 3), padding=(1, 1)),
    Case("long_reduction", (1, 520, 4, 4), (40, 520, 3, 3), padding=(1, 1)),
    # Pixels: tiles hold a handful, blocks up to some hundreds.
    Case("more_pixels_than_a_block", (2, 8, 37, 41), (12, 8, 3, 3), padding=(1, 1)),
    Case("pixels_not_multiple_of_tile", (1, 32, 13, 11), (32, 32, 3, 3), padding=(1, 1)),
    Case("pointwise_one_pixel_left_over", (1, 64, 15, 15), (64, 64, 1, 1)),
    Case("one_row", (2, 8, 1, 40), (8, 8, 1, 3), padding=(0, 1)),
    Case("one_column", (2, 8, 40, 1), (8, 8, 3, 1), padding=(1, 0)),
    Case("one_pixel_image", (3, 24, 1, 1), (16, 24, 1, 1)),
    Case("one_pixel_image_inside_padding", (2, 8, 1, 1), (8, 8, 3, 3), padding=(1, 1)),
    Case("one_by_one_output", (2, 12, 5, 4), (18, 12, 5, 4)),
    Case("odd_batch", (5, 8, 6, 6), (16, 8, 3, 3), padding=(1, 1)),
    # Geometry.
    Case("kernel_not_square", (2, 8, 9, 11), (16, 8, 2, 5), padding=(0, 2)),
    Case("row_kernel", (2, 16, 7, 12), (16, 16, 1, 7), padding=(0, 3)),
    Case("column_kernel", (2, 16, 12, 7), (16, 16, 7, 1), padding=(3, 0)),
    Case("stride_not_square", (2, 8, 11, 13), (8, 8, 3, 3), stride=(1, 3), padding=(1, 1)),
    Case("padding_not_square", (2, 8, 7, 6), (8, 8, 3, 3), padding=(2, 0)),
    Case("dilation_not_square", (2, 8, 12, 11), (8, 8, 3, 3), padding=(2, 3), dilation=(2, 3)),
    Case("pad_larger_than_kernel", (2, 8, 5, 5), (8, 8, 3, 3), padding=(4, 5), bias=True),
    Case("pad_larger_than_kernel_strided", (2, 8, 5, 5), (8, 8, 3, 3), stride=(2, 2), padding=(5, 4), bias=True),
    Case("kernel_larger_than_input", (2, 8, 3, 4), (8, 8, 5, 7), padding=(1, 2)),
    Case("kernel_larger_than_input_one_output", (2, 8, 3, 3), (8, 8, 7, 7), padding=(2, 2)),
    Case("even_kernel", (2, 8, 9, 9), (8, 8, 4, 2), padding=(1, 1)),
    Case("even_kernel_same", (2, 8, 7, 8), (8, 8, 4, 2), padding="same", bias=True),
    Case("odd_kernel_same", (2, 8, 7, 8), (8, 8, 3, 5), padding="same"),
    Case("dilated_even_kernel_same", (2, 8, 9, 8), (8, 8, 2, 4), padding="same", dilation=(3, 1)),
    Case("valid", (2, 8, 7, 7), (8, 8, 3, 3), padding="valid", stride=(2, 1)),
    Case("strided", (2, 16, 10, 12), (24, 16, 3, 3), stride=(2, 2), padding=(1, 1), bias=True),
    Case("strided_rows_left_over", (2, 8, 12, 14), (8, 8, 3, 3), stride=(3, 3)),
    Case("strided_dgrad_hole", (2, 8, 11, 10), (8, 8, 2, 2), stride=(3, 4)),
    Case("strided_dgrad_hole_pointwise", (2, 16, 8, 7), (16, 16, 1, 1), stride=(3, 2)),
    Case("stride_larger_than_input", (2, 8, 4, 4), (8, 8, 3, 3), stride=(7, 9), padding=(1, 1)),
    # Dilation.
    Case("dilated", (2, 16, 14, 13), (16, 16, 3, 3), padding=(2, 2), dilation=(2, 2), bias=True),
    Case("dilated_shrinking", (2, 8, 14, 13), (12, 8, 3, 3), dilation=(3, 2)),
    Case("dilation_past_border", (2, 8, 7, 7), (16, 8, 3, 3), padding=(6, 6), dilation=(6, 6)),
    Case("dilation_centre_tap_only", (2, 8, 5, 6), (16, 8, 3, 3), padding=(9, 9), dilation=(9, 9)),
    Case("dilated_strided", (2, 8, 15, 14), (8, 8, 3, 3), stride=(2, 3), padding=(2, 2), dilation=(2, 2)),
    Case("dilation_and_stride_share_a_factor", (1, 8, 17, 16), (8, 8, 3, 3), (4, 4), (4, 4), (2, 2)),
    Case("dilation_of_one_tap", (2, 8, 6, 6), (8, 8, 1, 1), dilation=(5, 5)),
    # Groups.
    Case("groups", (2, 32, 8, 8), (32, 8, 3, 3), padding=(1, 1), groups=4, bias=True),
    Case("groups_of_four_channels", (1, 32, 9, 9), (32, 4, 3, 3), padding=(1, 1), groups=8),
    Case("groups_of_eight_channels", (2, 40, 9, 11), (40, 8, 3, 3), padding=(1, 1), groups=5, bias=True),
    Case("groups_of_two_strided", (1, 20, 12, 9), (20, 2, 3, 5), stride=(2, 1), padding=(1, 2), groups=10),
    Case("groups_not_multiple_of_vector", (2, 15, 7, 7), (21, 5, 3, 3), padding=(1, 1), groups=3, bias=True),
    Case("groups_with_multiplier", (2, 12, 8, 8), (36, 3, 3, 3), padding=(1, 1), groups=4),
    Case("groups_with_fewer_filters", (2, 24, 8, 8), (6, 8, 3, 3), padding=(1, 1), groups=3),
    Case("groups_pointwise", (2, 24, 6, 6), (40, 6, 1, 1), groups=4),
    Case("groups_dilated", (2, 16, 11, 11), (16, 8, 3, 3), padding=(3, 3), dilation=(3, 3), groups=2),
    Case("groups_strided", (2, 16, 11, 10), (16, 8, 3, 3), stride=(2, 2), padding=(1, 1), groups=2),
    # Depthwise.
    Case("depthwise", (2, 32, 15, 14), (32, 1, 3, 3), padding=(1, 1), groups=32, bias=True),
    Case("depthwise_strided", (2, 32, 14, 15), (32, 1, 3, 3), stride=(2, 2), padding=(1, 1), groups=32),
    Case("depthwise_c_not_multiple_of_vector", (2, 21, 9, 9), (21, 1, 3, 3), padding=(1, 1), groups=21, bias=True),
    Case("depthwise_one_pixel_image", (2, 16, 1, 1), (16, 1, 3, 3), padding=(1, 1), groups=16),
    Case("depthwise_five_by_five", (2, 20, 11, 12), (20, 1, 5, 5), padding=(2, 2), groups=20),
    Case("depthwise_five_by_five_strided", (2, 16, 12, 11), (16, 1, 5, 5), (2, 2), (2, 2), groups=16),
    Case("depthwise_seven_by_seven", (1, 16, 13, 12), (16, 1, 7, 7), padding=(3, 3), groups=16),
    Case("depthwise_pointwise", (2, 16, 6, 6), (16, 1, 1, 1), groups=16),
    Case("depthwise_no_padding", (2, 16, 9, 8), (16, 1, 3, 3), groups=16),
    Case("depthwise_pad_larger_than_kernel", (2, 16, 5, 5), (16, 1, 3, 3), padding=(4, 4), groups=16),
    Case("depthwise_kernel_larger_than_input", (2, 16, 3, 2), (16, 1, 7, 7), padding=(3, 3), groups=16),
    Case("depthwise_even_kernel_same", (2, 16, 7, 7), (16, 1, 2, 4), padding="same", groups=16),
    Case("depthwise_kernel_not_square", (2, 16, 9, 10), (16, 1, 3, 5), stride=(1, 2), padding=(1, 2), groups=16),
    Case("depthwise_dilated", (2, 16, 13, 12), (16, 1, 3, 3), padding=(2, 2), dilation=(2, 2), groups=16),
    Case("depthwise_dilated_strided", (1, 16, 13, 12), (16, 1, 3, 3), (2, 2), (3, 2), (3, 2), groups=16),
    Case("depthwise_strided_dgrad_hole", (2, 16, 10, 9), (16, 1, 2, 2), stride=(3, 3), groups=16),
    Case("depthwise_multiplier", (2, 12, 8, 8), (36, 1, 3, 3), padding=(1, 1), groups=12, bias=True),
    Case("depthwise_multiplier_dilated", (2, 8, 9, 9), (16, 1, 3, 3), padding=(2, 2), dilation=(2, 2), groups=8),
    # Memory.
    Case("channels_last_input", (2, 16, 9, 8), (24, 16, 3, 3), padding=(1, 1), bias=True, x_memory="channels_last"),
    Case("channels_last_weight", (2, 16, 9, 8), (24, 16, 3, 3), padding=(1, 1), w_memory="channels_last"),
    Case("channels_last_everything", (2, 16, 9, 8), (16, 16, 3, 3), (2, 2), (1, 1), (1, 1), 1, True,
         "channels_last", "channels_last", "channels_last"),
    Case("channels_last_gradient", (2, 16, 9, 8), (16, 16, 3, 3), padding=(1, 1), dy_memory="channels_last"),
    Case("channels_last_depthwise", (2, 24, 9, 8), (24, 1, 3, 3), padding=(1, 1), groups=24,
         x_memory="channels_last", dy_memory="channels_last"),
    Case("channels_last_groups", (2, 24, 9, 8), (24, 6, 3, 3), padding=(1, 1), groups=4, x_memory="channels_last"),
    Case("channels_last_one_channel", (2, 1, 9, 8), (8, 1, 3, 3), padding=(1, 1), x_memory="channels_last"),
    Case("transposed_strides", (2, 8, 9, 7), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1, False,
         "transposed", "transposed", "transposed"),
    Case("stepped_strides", (2, 8, 9, 7), (8, 8, 3, 3), (2, 1), (1, 1), (1, 1), 1, False,
         "stepped", "stepped", "stepped"),
    Case("misaligned_storage", (2, 16, 8, 8), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1, False,
         "misaligned", "misaligned", "misaligned"),
    Case("window_of_larger_image", (2, 16, 9, 8), (16, 16, 3, 3), padding=(1, 1),
         x_memory="window", dy_memory="window"),
    Case("broadcast_gradient_stride_0", (2, 16, 8, 8), (16, 16, 3, 3), padding=(1, 1), dy_memory="expanded"),
    Case("broadcast_gradient_stride_0_depthwise", (2, 16, 8, 8), (16, 1, 3, 3), padding=(1, 1), groups=16,
         dy_memory="expanded"),
    Case("broadcast_input_stride_0", (2, 16, 8, 8), (16, 16, 3, 3), padding=(1, 1), x_memory="expanded"),
    # Batch.
    Case("unbatched", (16, 9, 8), (24, 16, 3, 3), padding=(1, 1), bias=True),
    Case("unbatched_channels_last", (16, 9, 8), (24, 16, 3, 3), padding=(1, 1), x_memory="channels_last"),
    Case("unbatched_depthwise", (16, 9, 8), (16, 1, 3, 3), padding=(1, 1), groups=16),
    Case("empty_batch", (0, 8, 7, 7), (16, 8, 3, 3), padding=(1, 1), bias=True),
    Case("empty_batch_depthwise", (0, 8, 7, 7), (8, 1, 3, 3), padding=(1, 1), groups=8),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"

PROBLEMS = [case for case in CASES if case.symmetric and len(case.x) == 4]
