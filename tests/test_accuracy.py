"""The accuracy setting, and how far Winograd's results may be from exact."""

import pytest
import torch
import torch.nn.functional as F

import convext
from convext import backends
from convext.problem import ConvProblem, Geom, Pass

P, Q = 0.75, 1.5  # the points of csrc/cpu/winograd_fprop.cpp: 0, +-P, +-Q, infinity
POINTS = (0.0, P, -P, Q, -Q)


def transforms():
    """A^T (4, 6), G (6, 3), B^T (6, 6) in float64, from the points (Toom-Cook)."""
    def others(i):
        return [x for j, x in enumerate(POINTS) if j != i]

    a = torch.tensor([[x**k for x in POINTS] + [float(k == 3)] for k in range(4)], dtype=torch.float64)
    g = torch.zeros(6, 3, dtype=torch.float64)
    b = torch.zeros(6, 6, dtype=torch.float64)
    for i, x in enumerate(POINTS):
        g[i] = torch.tensor([1.0, x, x * x], dtype=torch.float64) / torch.tensor([x - y for y in others(i)]).prod()
        b[i, :5] = _coefficients(others(i))
    g[5, 2] = 1
    b[5] = _coefficients(POINTS)
    return a, g, b


def _coefficients(roots):
    """Of the monic polynomial with these roots, the lowest power first."""
    poly = torch.ones(1, dtype=torch.float64)
    for root in roots:
        zero = torch.zeros(1, dtype=torch.float64)
        poly = torch.cat([zero, poly]) - root * torch.cat([poly, zero])
    return poly


def winograd(x, w, a, g, b):
    """F(4x4, 3x3) with padding 1 in float64; x (N, C, 4i, 4j)."""
    tiles = F.pad(x, (1, 1, 1, 1)).unfold(2, 6, 4).unfold(3, 6, 4)  # (N, C, i, j, 6, 6)
    v = b @ tiles @ b.T
    u = g @ w @ g.T
    y = a @ torch.einsum("ncijpq,kcpq->nkijpq", v, u) @ a.T  # (N, K, i, j, 4, 4)
    return y.permute(0, 1, 2, 4, 3, 5).reshape(x.shape[0], w.shape[0], *x.shape[2:])


def operands(c, k):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, c, 16, 16, generator=generator), torch.randn(k, c, 3, 3, generator=generator))


def variant(x, w):
    return backends.select(Pass.FPROP, ConvProblem.of_fprop(x, w, Geom((1, 1), (1, 1)))).variant


def test_the_transforms_of_this_file_compute_a_convolution():
    x, w = (t.double() for t in operands(5, 3))
    torch.testing.assert_close(winograd(x, w, *transforms()), F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("c", [16, 64, 200])
def test_winograd_error_within_the_bound_of_its_transforms(c):
    """Every product and sum rounds once, relative to its size. The sizes are bounded by the same computation on
    absolute values; rounding errors of a chain of n operations add up like a random walk, eps * sqrt(n) (Higham and
    Mary, 2019), with a factor of 4 for the largest of many outputs. A chain is the sum over c and at most 6 operations
    in each of two dimensions of three transforms."""
    x, w = operands(c, 48)
    with convext.backend("native"), convext.accuracy("fast"):
        assert "winograd" in variant(x, w)
        y = convext.conv2d(x, w, padding=1)
    size = winograd(x.double().abs(), w.double().abs(), *(t.abs() for t in transforms()))
    bound = 4 * torch.finfo(torch.float32).eps / 2 * (c + 36) ** 0.5 * size
    error = (y.double() - F.conv2d(x.double(), w.double(), padding=1)).abs()
    assert (error <= bound).all(), (error / bound).max().item()


def test_strict_takes_the_direct_form_and_the_setting_is_put_back():
    x, w = operands(64, 64)
    with convext.backend("native"), convext.accuracy("fast"):
        with convext.accuracy("strict"):
            assert "direct" in variant(x, w)
            strict = convext.conv2d(x, w, padding=1)
        assert "winograd" in variant(x, w)
        fast = convext.conv2d(x, w, padding=1)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    assert (strict.double() - exact).abs().max() < (fast.double() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_float64_never_runs_winograd():
    x, w = (t.double() for t in operands(64, 64))
    with convext.backend("native"), convext.accuracy("fast"):
        assert "winograd" not in variant(x, w)


def test_an_unknown_name_is_refused_and_changes_nothing():
    x, w = operands(64, 64)
    with convext.backend("native"), convext.accuracy("strict"):
        with pytest.raises(ValueError, match="accuracy: unknown name 'exact', expected one of 'fast', 'strict'"):
            convext.accuracy("exact")
        assert "direct" in variant(x, w)
