"""NaN, infinity and overflow stay where PyTorch's convolution has them, although Winograd's transforms spread them over
tiles: winograd_direct.h says how. csrc/tests/cpu_variants.cpp tries the kernels one by one; here they are
reached as a user reaches them.

The expected values are oneDNN's, which sums directly. Infinite weights meet no padding here: what becomes of them there
depends in PyTorch on the size of the image, and only the C++ tests say what this library's kernels promise.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convext
from convext import backends
from convext.problem import ConvProblem, Geom, Pass

pytestmark = pytest.mark.skipif(
    backends.unavailable("native", "cpu") is not None, reason="Winograd's kernels are in the compiled library"
)

INF, NAN, HUGE = math.inf, math.nan, 3e38
# Extents at which the cost model takes the tile of m x m.
EXTENTS = {2: 16, 3: 18, 4: 16}


def served(m, pass_, problem):
    name = backends.select(pass_, problem).variant
    assert f"winograd{m}x{m}" in name, name


@pytest.fixture(params=[2, 3, 4])
def m(request):
    with convext.backend("native"), convext.accuracy("strict" if request.param == 2 else "fast"):
        yield request.param


def operands(m, dtype=torch.float32):
    generator, extent = torch.Generator().manual_seed(m), EXTENTS[m]
    x = torch.randn(2, 64, extent, extent, generator=generator)
    w = torch.randn(64, 64, 3, 3, generator=generator) / 24
    return x.to(dtype), w.to(dtype)


def check(found, expected, dtype=torch.float32):
    """The same NaN, the same infinities with their signs; elsewhere a sum of 64 * 9 products of Winograd's, whose error
    is relative to the largest in the tensor (docs/design.md: 26.3 / 9 of a plain sum's), and the epilogue."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    infinite = expected.isinf()
    assert torch.equal(found[infinite], expected[infinite])
    finite = expected.isfinite()
    eps = torch.finfo(dtype).eps
    difference = (found[finite].double() - expected[finite].double()).abs()
    assert difference.max() <= 26.3 / 9 * 4 * eps * (64 * 9) ** 0.5 * expected[finite].double().abs().max()


def plant_pixels(x, what):
    h, w = x.shape[2] // 2, x.shape[3] // 2
    if what == "nan":
        x[0, 5, 0, 0] = x[1, 20, h, w] = NAN
    elif what == "infinity":
        x[0, 5, 0, 0], x[1, 20, h, w], x[1, 21, h, w], x[1, 20, h - 1, w - 1] = -INF, INF, INF, -INF
    elif what == "both":
        x[0, 63, -1, -1], x[1, 1, h, w], x[1, 2, h, w + 1] = -INF, NAN, INF
    elif what == "everywhere":
        x[:] = NAN
    elif what == "huge":  # a sum of two overflows, a product with a weight below 0.1 does not
        x[1, 3, h, w] = x[1, 3, h, w + 2] = HUGE
        x[0, 3, 0, 0], x[0, 4, 0, 0] = HUGE, -HUGE
    return x


PIXELS = ["nan", "infinity", "both", "everywhere", "huge"]


@pytest.mark.parametrize("what", PIXELS)
def test_pixels_reach_the_outputs_that_a_plain_sum_reaches(what, m):
    x, w = operands(m)
    plant_pixels(x, what)
    if what == "huge":
        w = w.clamp(-0.05, 0.05)
    served(m, Pass.FPROP, ConvProblem.of_fprop(x, w, Geom((1, 1), (1, 1))))
    if what == "everywhere":
        assert convext.conv2d(x, w, padding=1).isnan().all()
        return
    check(convext.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("what", PIXELS[:3])
def test_tiles_that_see_no_such_pixel_are_computed_as_before(what, m):
    x, w = operands(m)
    before = convext.conv2d(x, w, padding=1)
    x[1, 20, 1, 1] = {"nan": NAN, "infinity": INF, "both": -INF}[what]
    after = convext.conv2d(x, w, padding=1)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, :, m + 2 :], before[1, :, m + 2 :])
    check(after, F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_makes_all_of_its_filter_what_a_plain_sum_makes_it(value, m):
    x, w = operands(m)
    x = F.pad(x, (1, 1, 1, 1), value=0.5)
    w[3, 7, 1, 2] = w[60, 0, 0, 0] = value
    served(m, Pass.FPROP, ConvProblem.of_fprop(x, w, Geom()))
    expected = F.conv2d(x, w)
    assert expected[:, [3, 60]].isfinite().sum() == 0
    check(convext.conv2d(x, w), expected)


@pytest.mark.parametrize("what", PIXELS[:3])
@pytest.mark.parametrize("padding", [0, 2, 5])
def test_dilated(what, padding, m):
    x, w = operands(m)
    x = plant_pixels(x.repeat(1, 1, 2, 2), what)
    with convext.accuracy("strict" if m == 2 else "fast"):
        problem = ConvProblem.of_fprop(x, w, Geom((1, 1), (padding, padding), (2, 2)))
        assert "winograd" in backends.select(Pass.FPROP, problem).variant
        check(convext.conv2d(x, w, padding=padding, dilation=2), F.conv2d(x, w, padding=padding, dilation=2))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu", "identity"])
@pytest.mark.parametrize("what", PIXELS[:3])
def test_an_epilogue_does_not_hide_that_a_sum_was_not_finite(what, activation, m):
    """relu6 makes 6 of infinity, relu 0 of what is below: the test on finite outputs must come before."""
    x, w = operands(m)
    plant_pixels(x, what)
    k, generator = w.shape[0], torch.Generator().manual_seed(9)
    bias, mean, gamma, beta = (torch.randn(k, generator=generator) for _ in range(4))
    var = torch.rand(k, generator=generator) + 0.5
    residual = torch.randn(2, k, *x.shape[2:], generator=generator)
    residual[0, 2, 3, 3], residual[0, 2, 9, 9], bias[11] = NAN, -INF, INF
    sums = F.batch_norm(F.conv2d(x, w, bias, padding=1), mean, var, gamma, beta) + residual
    if activation == "gelu":  # F.gelu makes NaN of infinity in one memory order, infinity in the other
        expected = sums * torch.special.ndtr(sums)
    else:
        expected = sums if activation == "identity" else getattr(F, activation)(sums)
    found = convext.conv_bn_relu(
        x, w, bias, mean, var, gamma, beta, padding=1, activation=activation, residual=residual
    )
    check(found, expected)


@pytest.mark.parametrize("what", PIXELS[:3])
def test_bias_alone(what, m):
    x, w = operands(m)
    bias = torch.zeros(64)
    bias[[2, 5, 9]] = torch.tensor([NAN, INF, -INF])
    plant_pixels(x, what)
    check(convext.conv2d(x, w, bias, padding=1), F.conv2d(x, w, bias, padding=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", PIXELS[:3])
def test_half_precision(what, dtype, m):
    x, w = operands(m, dtype)
    plant_pixels(x, what)
    problem = ConvProblem.of_fprop(x, w, Geom((1, 1), (1, 1)))
    if m == 2 and dtype is torch.bfloat16 and "direct" in backends.select(Pass.FPROP, problem).variant:
        pytest.skip("F(2x2) is no faster than direct kernels that multiply pairs of bfloat16")
    served(m, Pass.FPROP, problem)
    check(convext.conv2d(x, w, padding=1), F.conv2d(x.float(), w.float(), padding=1), dtype)


@pytest.mark.parametrize("weight", ["channels_last", "a view with gaps", "float32 under autocast"])
def test_the_weights_are_found_however_they_lie(weight, m):
    x, w = operands(m)
    plant_pixels(x, "infinity")
    expected = F.conv2d(x, w, padding=1)
    if weight == "channels_last":
        check(convext.conv2d(x, w.contiguous(memory_format=torch.channels_last), padding=1), expected)
    elif weight == "a view with gaps":
        check(convext.conv2d(x, torch.stack([w, w * 0], 1)[:, 0], padding=1), expected)
    else:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = convext.conv2d(x, w, padding=1)
        expected = F.conv2d(x.bfloat16().float(), w.bfloat16().float(), padding=1)
        check(found, expected, torch.bfloat16)


@pytest.mark.parametrize("what", PIXELS[:3] + PIXELS[4:])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_gradient_of_the_input(what, padding, m):
    x, w = operands(m)
    w = w.clamp(-0.05, 0.05)
    dy = torch.randn(F.conv2d(x, w, padding=padding).shape, generator=torch.Generator().manual_seed(1))
    plant_pixels(dy, what)
    problem = ConvProblem.of_fprop(x, w, Geom((1, 1), (padding, padding)))
    assert "winograd" in backends.select(Pass.DGRAD, problem).variant
    x.requires_grad_()
    (found,) = torch.autograd.grad(convext.conv2d(x, w, padding=padding), x, dy)
    (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=padding), x, dy)
    check(found, expected)


@pytest.mark.parametrize("where", ["x", "dy", "x and dy"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("row", [0, 8, 15])
def test_the_gradient_of_the_weights(where, value, row):
    """At a border a pixel meets some of the nine taps: only those may change."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(20, 40, 16, 16, generator=generator) for _ in range(2))
    w = torch.randn(40, 40, 3, 3, generator=generator, requires_grad=True)
    if "x" in where:
        x[3, 7, row, 0] = value
    if "dy" in where:
        dy[5, 9, 0, row] = value
    with convext.backend("native"):
        served(4, Pass.WGRAD, ConvProblem.of_wgrad(dy, x, (3, 3), Geom((1, 1), (1, 1))))
        (found,) = torch.autograd.grad(convext.conv2d(x, w, padding=1), w, dy)
    (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=1), w, dy)
    if row == 8:
        assert expected.isfinite().sum() <= expected.numel() - 6 * 40
    else:
        assert 0 < (~expected.isfinite()).sum() < 2 * 40 * 9
    for part in (found, expected):  # 20 * 16 * 16 products, not 64 * 9
        part /= (20 * 16 * 16 / (64 * 9)) ** 0.5
    check(found, expected)


def test_large_values_in_the_gradient_of_the_weights():
    """The transforms add them up to infinity; the sums are finite."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(20, 40, 16, 16, generator=generator) for _ in range(2))
    x[3, 7, 4, 4], x[3, 7, 4, 6], x[9, 30, 0, 0] = HUGE, HUGE, -HUGE
    dy *= 0.01
    w = torch.zeros(40, 40, 3, 3, requires_grad=True)
    with convext.backend("native"):
        served(4, Pass.WGRAD, ConvProblem.of_wgrad(dy, x, (3, 3), Geom((1, 1), (1, 1))))
        (found,) = torch.autograd.grad(convext.conv2d(x, w, padding=1), w, dy)
    (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=1), w, dy)
    assert expected.isfinite().all()
    check(found, expected)


@pytest.mark.parametrize("images", [1, 2, 4])
@torch.no_grad()
def test_within_a_row_of_convolutions(images, sequence_calls):
    """A call that runs several layers hands the kernels their weights by another way."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2)]
    net = nn.Sequential(convs[0], nn.BatchNorm2d(64), nn.ReLU6(), convs[1], nn.BatchNorm2d(64), nn.ReLU()).eval()
    x = torch.randn(images, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    x[0, 3, 13, 13], x[-1, 5, 2, 20] = NAN, INF
    expected = net(torch.cat([x, x, x]))[:images]  # as large as oneDNN takes
    swapped = convext.swap(copy.deepcopy(net))
    served(4, Pass.FPROP, ConvProblem.of_fprop(x, convs[1].weight, Geom((1, 1), (1, 1))))
    swapped(x)  # the first call runs layer by layer, and prepares
    found = swapped(x)
    assert sequence_calls == [2]
    assert 0 < expected.isnan().sum() < expected.numel() / 2
    check(found, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_statistics_of_a_batch_norm_are_pytorchs(value, channels_last):
    x = torch.randn(3, 5, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for place in ((0, 1, 0, 0), (2, 3, 4, 5)):
        x[place] = value
    x[1, 2, 0, 0], x[1, 2, 0, 1] = value, -value
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    mean, var = torch.ops.convext.batch_stats(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), equal_nan=True)
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_at_kinks_are_those_of_pytorch(activation, dtype):
    """Where an activation has no derivative, its backward takes one side's."""
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=dtype).repeat(32)
    x, plain = (kinks.expand(16, 128).reshape(1, 16, 8, 16).clone().requires_grad_() for _ in range(2))
    w = torch.ones(16, 1, 1, 1, dtype=dtype)
    with convext.backend("native"):
        y = convext.functional.conv_act(x, w, groups=16, activation=activation)
        y.backward(torch.ones_like(y))
    expected = getattr(F, activation)(plain)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(y, expected) and torch.equal(x.grad, plain.grad)
