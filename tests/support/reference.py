"""What a convolution is, in float64 and straight from csrc/core/conv_problem.h's definition, and how far a float may be
from it.

Each pass is the loop nest of its formula. The loop over the taps (r, s) is written out; the sums over pixels and
channels under it are one einsum. No convolution of PyTorch's takes part.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad


def _grouped(t, groups):
    """(N, groups * channels, H, W) -> (N, groups, channels, H, W), and the same of volumes."""
    return t.unflatten(1, (groups, t.shape[1] // groups))


@dataclass(frozen=True)
class Nest:
    """The three passes of one case over given operands (any dtype; computed and returned in float64)."""

    case: object

    def batched(self, t):
        return t if t.dim() == self.case.axes + 2 else t.unsqueeze(0)

    def taps(self):
        """Every tap (r, s) or (t, r, s) behind an ellipsis, and behind another the places of the padded image that it
        meets, one for each output pixel."""
        case = self.case
        for tap in itertools.product(*map(range, case.w[2:])):
            axes = zip(tap, case.dilation, case.y[-case.axes :], case.stride, strict=True)
            meets = [slice(at * d, at * d + (n - 1) * step + 1, step) for at, d, n, step in axes]
            yield (..., *tap), (..., *meets)

    def padded(self, x):
        borders = [n for border in reversed(self.case.borders) for n in border]
        return _grouped(pad(self.batched(x).double(), borders), self.case.groups)

    def fprop(self, x, w, bias=None):
        case = self.case
        x = self.padded(x)
        w = w.double().unflatten(0, (case.groups, -1))  # (G, K/G, C/G, R, S)
        y = x.new_zeros((x.shape[0], *w.shape[:2], *case.y[-case.axes :]))
        for tap, meets in self.taps():
            y += torch.einsum("ngc...,gkc->ngk...", x[meets], w[tap])
        y = y.flatten(1, 2)
        if bias is not None:
            y = y + bias.double().view(-1, *(1,) * case.axes)
        return y.reshape(case.y)

    def dgrad(self, dy, w):
        case = self.case
        dy = _grouped(self.batched(dy).double(), case.groups)
        w = w.double().unflatten(0, (case.groups, -1))
        n, c, *size = case.batched_x
        wide = [extent + sum(border) for extent, border in zip(size, case.borders, strict=True)]
        dx = dy.new_zeros((n, case.groups, c // case.groups, *wide))
        for tap, meets in self.taps():
            dx[meets] += torch.einsum("ngk...,gkc->ngc...", dy, w[tap])
        inside = [slice(before, before + extent) for extent, (before, _) in zip(size, case.borders, strict=True)]
        return dx[(..., *inside)].reshape(case.x)

    def wgrad(self, dy, x):
        case = self.case
        x = self.padded(x)
        dy = _grouped(self.batched(dy).double(), case.groups)
        dw = x.new_zeros((case.groups, case.w[0] // case.groups, *case.w[1:]))
        for tap, meets in self.taps():
            dw[tap] = torch.einsum("ngkp,ngcp->gkc", dy.flatten(3), x[meets].flatten(3))
        return dw.reshape(case.w)

    def dbias(self, dy):
        return self.batched(dy).double().sum((0, *range(2, self.case.axes + 2)))

    def expected(self, operands):
        """{pass: Expected} for fprop (with the bias), dgrad, wgrad, and dbias where the case has one."""
        x, w, bias, dy = operands.x, operands.w, operands.bias, operands.dy
        case = self.case
        x2, w2, dy2 = x.double() ** 2, w.double() ** 2, dy.double() ** 2
        bias2 = None if bias is None else bias.double() ** 2
        values = {
            "fprop": (self.fprop(x, w, bias), self.fprop(x2, w2, bias2)),
            "dgrad": (self.dgrad(dy, w), self.dgrad(dy2, w2)),
            "wgrad": (self.wgrad(dy, x), self.wgrad(dy2, x2)),
        }
        if bias is not None:
            values["dbias"] = (self.dbias(dy), self.dbias(dy2))
        return {name: Expected(value, case.gemm_k(name), squares) for name, (value, squares) in values.items()}


@dataclass(frozen=True)
class Expected:
    """A result in float64, with what its error bound is made of.

    A sum of gemm_k products a_i b_i, added up in any order with unit roundoff u, has partial sums of about
    sqrt(sum (a_i b_i)^2) and takes gemm_k roundings of random sign: the error is about
    u * sqrt(gemm_k) * sqrt(sum (a_i b_i)^2). `squares` is that inner sum for each element; its maximum over the tensor
    stands for all, since algorithms such as Winograd's spread the error of one element over its tile. On top comes one
    rounding to the dtype of the result.

    Factor 4: errors are taken as normally distributed, and the largest of 1e4 elements lies about 4 deviations out.
    """

    value: torch.Tensor
    gemm_k: int
    squares: torch.Tensor

    def tolerance(self, dtype):
        if self.value.numel() == 0:
            return torch.zeros_like(self.value)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        summing = 4 * unit_roundoff(accumulate) * math.sqrt(max(self.gemm_k, 1)) * self.squares.max().sqrt()
        # Float64 is compared with float64, which has errors of its own.
        return (2 if dtype == torch.float64 else 1) * summing + unit_roundoff(dtype) * self.value.abs()

    def check(self, actual, dtype=None, what=""):
        """Raises AssertionError where `actual` has another shape or dtype, or is further off than the bound."""
        dtype = dtype or actual.dtype
        assert actual.dtype == dtype, f"{what}: dtype {actual.dtype}, expected {dtype}"
        assert actual.shape == self.value.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(self.value.shape)}"
        if self.value.numel() == 0:
            return
        actual = actual.detach().double().cpu()
        expected = self.value.cpu()
        excess = ((actual - expected).abs() / self.tolerance(dtype).cpu()).masked_fill(actual == expected, 0)
        worst = excess.nan_to_num(nan=math.inf).max().item()
        assert worst <= 1, f"{what}: {worst:.3g} times the error that {dtype} and gemm_k = {self.gemm_k} allow"


def unit_roundoff(dtype):
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2
