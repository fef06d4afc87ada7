"""The accuracy setting, and how far Winograd's results may be from exact."""

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import convext
from convext import backends
from convext.backends import native
from convext.problem import ConvProblem, Geom, Pass

# The finite points of csrc/cpu/kernels/winograd/winograd.cpp.
POINTS = {2: (0.0, 1.0, -1.0), 3: (0.5, -0.5, 1.25, -1.25), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


def transforms(m):
    """A^T (m, m + 2), G (m + 2, 3), B^T (m + 2, m + 2) in float64, from the points (Toom-Cook)."""
    points = POINTS[m]

    def others(i):
        return [x for j, x in enumerate(points) if j != i]

    a = torch.tensor([[x**k for x in points] + [float(k == m - 1)] for k in range(m)], dtype=torch.float64)
    g = torch.zeros(m + 2, 3, dtype=torch.float64)
    b = torch.zeros(m + 2, m + 2, dtype=torch.float64)
    for i, x in enumerate(points):
        g[i] = torch.tensor([1.0, x, x * x], dtype=torch.float64) / torch.tensor([x - y for y in others(i)]).prod()
        b[i, : m + 1] = _coefficients(others(i))
    g[m + 1, 2] = 1
    b[m + 1] = _coefficients(points)
    return a, g, b


def _coefficients(roots):
    """Of the monic polynomial with these roots, the lowest power first."""
    poly = torch.ones(1, dtype=torch.float64)
    for root in roots:
        zero = torch.zeros(1, dtype=torch.float64)
        poly = torch.cat([zero, poly]) - root * torch.cat([poly, zero])
    return poly


def winograd(x, w, a, g, b):
    """F(m x m, 3x3) with padding 1 in float64; x (N, C, m * i, m * j)."""
    m = a.shape[0]
    tiles = F.pad(x, (1, 1, 1, 1)).unfold(2, m + 2, m).unfold(3, m + 2, m)  # (N, C, i, j, m + 2, m + 2)
    v = b @ tiles @ b.T
    u = g @ w @ g.T
    y = a @ torch.einsum("ncijpq,kcpq->nkijpq", v, u) @ a.T  # (N, K, i, j, m, m)
    return y.permute(0, 1, 2, 4, 3, 5).reshape(x.shape[0], w.shape[0], *x.shape[2:])


def operands(c, k, m=4):
    """An image of whole tiles of m x m, of which larger ones would be cut."""
    generator, extent = torch.Generator().manual_seed(0), 18 if m == 3 else 16
    return (torch.randn(2, c, extent, extent, generator=generator), torch.randn(k, c, 3, 3, generator=generator))


def tile(problem, pass_):
    """m of the F(m x m, 3x3) that serves the problem, 0 where the direct form does."""
    name = backends.select(pass_, problem).variant
    (facts,) = [kernel for kernel in native.kernels() if kernel["name"] == name]
    assert facts["algorithm"] == ("winograd" if facts["tile"] else "direct")
    return facts["tile"]


def chosen(x, w, pass_=Pass.FPROP):
    return tile(ConvProblem.of_fprop(x, w, Geom((1, 1), (1, 1))), pass_)


@contextmanager
def running(m):
    """F(m x m, 3x3) where m is 2, 3 or 4, the direct form where it is 0; on operands of 64 channels and more."""
    with convext.backend("native"), convext.accuracy({4: "fast", 3: "fast", 2: "strict", 0: "direct"}[m]):
        assert chosen(*operands(64, 64, m)) == m
        yield


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_transforms_of_this_file_compute_a_convolution(m):
    x, w = (t.double() for t in operands(5, 3, m))
    torch.testing.assert_close(winograd(x, w, *transforms(m)), F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("c", [64, 200])
def test_winograd_error_within_the_bound_of_its_transforms(m, c):
    """Every product and sum rounds once, relative to its size. The sizes are bounded by the same computation on
    absolute values; rounding errors of a chain of n operations add up like a random walk, eps * sqrt(n) (Higham and
    Mary, 2019), with a factor of 4 for the largest of many outputs. A chain is the sum over c and at most 6 operations
    in each of two dimensions of three transforms."""
    x, w = operands(c, 64, m)
    with running(m):
        y = convext.conv2d(x, w, padding=1)
    size = winograd(x.double().abs(), w.double().abs(), *(t.abs() for t in transforms(m)))
    bound = 4 * torch.finfo(torch.float32).eps / 2 * (c + 36) ** 0.5 * size
    error = (y.double() - F.conv2d(x.double(), w.double(), padding=1)).abs()
    assert (error <= bound).all(), (error / bound).max().item()


def test_the_factors_of_the_accuracy_policy_follow_from_the_transforms():
    """The figures of docs/design.md: for each output of a tile, what the variance of a sum's rounding errors is
    multiplied by in one dimension (3 for plain sums, which are 9 times as long), and the same for sizes."""
    for m, variance, size in [(2, 5.0, 8.0), (3, 11.03, 16.79), (4, 26.32, 27.42)]:
        a, g, b = transforms(m)
        assert (a**2 @ ((g**2).sum(1) * (b**2).sum(1))).max().item() == pytest.approx(variance, abs=0.005)
        assert (a.abs() @ (g.abs().sum(1) * b.abs().sum(1))).max().item() == pytest.approx(size, abs=0.005)


def test_the_weight_gradients_factor_follows_from_the_transforms():
    """As above, for each tap of the filter; a plain sum has 4 in one dimension of a tile, and is 16 times as long."""
    a, g, b = transforms(4)
    assert (g.T**2 @ ((a**2).sum(0) * (b**2).sum(1))).max().item() == pytest.approx(28.73, abs=0.005)
    assert (g.T.abs() @ (a.abs().sum(0) * b.abs().sum(1))).max().item() == pytest.approx(33.10, abs=0.005)


def plain_weight_gradient(dy, x):
    """In float32, one product after the other."""
    p, q = dy.shape[2:]
    x, dw = F.pad(x, (1, 1, 1, 1)), torch.zeros(dy.shape[1], x.shape[1], 3, 3)
    for n, i, j in itertools.product(range(dy.shape[0]), range(p), range(q)):
        dw += dy[n, :, i, j, None, None, None] * x[n, :, i : i + 3, j : j + 3]
    return dw


@pytest.mark.parametrize("n", [2, 20])
def test_rms_error_of_the_weight_gradient(n):
    """docs/design.md: 28.73 / 16 of a plain sum's over the 16 * n tiles' outputs, and the transforms' own."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(n, 40, 16, 16, generator=generator) for _ in range(2))
    exact = torch.ops.convext.wgrad(dy.double(), x.double(), [3, 3], [1, 1], [1, 1], [1, 1], 1)

    def rms(dw):
        return (dw - exact).square().mean().sqrt().item()

    problem = ConvProblem.of_wgrad(dy, x, (3, 3), Geom((1, 1), (1, 1)))
    with convext.backend("native"), convext.accuracy("strict"):
        assert tile(problem, Pass.WGRAD) == 0
    with convext.backend("native"), convext.accuracy("fast"):
        assert tile(problem, Pass.WGRAD) == 4
        dw = torch.ops.convext.wgrad(dy, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    bound = 1.1 * 28.73 / 16 * (1 + 2 * 17 / (16 * n)) ** 0.5 * rms(plain_weight_gradient(dy, x))
    assert rms(dw) <= bound


def test_too_few_tiles_for_the_bound_are_summed_directly():
    problem = ConvProblem.of_wgrad(torch.zeros(1, 64, 16, 16), torch.zeros(1, 64, 16, 16), (3, 3), Geom((1, 1), (1, 1)))
    with convext.backend("native"), convext.accuracy("fast"):
        assert tile(problem, Pass.WGRAD) == 0


def plain_sum(x, w):
    """conv2d with padding 1 in float32, one product after the other."""
    n, c, h, width = x.shape
    x, y = F.pad(x, (1, 1, 1, 1)), torch.zeros(n, w.shape[0], h, width)
    for i in range(c):
        for r in range(3):
            for s in range(3):
                y += w[:, i, r, s].view(-1, 1, 1) * x[:, i : i + 1, r : r + h, s : s + width]
    return y


@pytest.mark.parametrize("c", [32, 64, 256])
def test_rms_error_beside_that_of_plain_sums(c):
    """docs/design.md: factor / 9 of a plain sum's, times sqrt(1 + 2 * roundings / c) for the transforms' own."""
    for m, factor, roundings in [(2, 5.0, 7), (3, 11.03, 17), (4, 26.32, 17)]:
        x, w = operands(c, 64, m)
        exact = F.conv2d(x.double(), w.double(), padding=1)

        def rms(y, exact=exact):
            return (y - exact).square().mean().sqrt().item()

        plain, (height, width) = rms(plain_sum(x, w)), x.shape[2:]
        with running(m):
            y = convext.conv2d(x, w, padding=1)
            # The gradient of a convolution with the transposed filters turned by half a turn is the same convolution.
            dx = torch.ops.convext.dgrad(x, w.flip(2, 3).transpose(0, 1), [height, width], [1, 1], [1, 1], [1, 1], 1)
        bound = 1.1 * factor / 9 * (1 + 2 * roundings / c) ** 0.5 * plain
        assert rms(y) <= bound and rms(dx) <= bound
        if m == 2:
            assert rms(y) < plain and rms(dx) < plain


def test_the_setting_chooses_and_is_put_back():
    x, w = operands(64, 64)
    with convext.backend("native"), convext.accuracy("fast"):
        for pass_ in (Pass.FPROP, Pass.DGRAD):
            with convext.accuracy("strict"):
                assert chosen(x, w, pass_) == 2
                with convext.accuracy("direct"):
                    assert chosen(x, w, pass_) == 0
                assert chosen(x, w, pass_) == 2
            assert chosen(x, w, pass_) == 4
            assert chosen(*operands(64, 64, 3), pass_) == 3


def test_too_few_channels_for_the_bound_are_summed_directly():
    with convext.backend("native"), convext.accuracy("strict"):
        assert chosen(*operands(31, 64)) == 0


@pytest.mark.parametrize("accuracy", ["fast", "strict"])
def test_float64_never_runs_winograd(accuracy):
    x, w = (t.double() for t in operands(64, 64))
    with convext.backend("native"), convext.accuracy(accuracy):
        for pass_ in Pass:
            assert chosen(x, w, pass_) == 0


def test_an_unknown_name_is_refused_and_changes_nothing():
    x, w = operands(64, 64)
    with convext.backend("native"), convext.accuracy("direct"):
        with pytest.raises(ValueError, match="unknown name 'exact', expected one of 'fast', 'strict', 'direct'"):
            convext.accuracy("exact")
        assert chosen(x, w) == 0
