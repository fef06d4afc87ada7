"""Random shapes, geometries, strides in memory, dtypes and backends against float64."""

import os
import zlib

import pytest
import torch
import torch.nn.functional as F
from cases import MEMORY, Case
from passes import DTYPES, EVEN_SAME, run
from places import on_gpu
from reference import Nest, unit_roundoff

import convext

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.filterwarnings(EVEN_SAME)
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
BACKENDS = st.sampled_from(["native", "native", "aten"])  # the one under test more often
# Triton compiles for every shape, which is too slow for random ones: the named cases are its share.
PLACES = pytest.mark.parametrize("only", [pytest.param(None, id="cpu"), *on_gpu("native")])
WAYS = st.sampled_from([way for way in MEMORY if way != "expanded"])


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw, kind):
    """A `Case` of some hundred thousand multiplications at most."""
    batch = draw(st.integers(0, 3))
    size = draw(pairs(1, 14))
    kernel = draw(pairs(1, 5))
    dilation = draw(pairs(1, 4)) if kind == "dilated" else draw(st.sampled_from([(1, 1), (1, 1), (2, 1)]))
    stride = draw(pairs(1, 3))
    padding = draw(pairs(0, 5))
    if stride == (1, 1) and draw(st.booleans()):
        padding = "same"
    if kind == "depthwise":
        groups, c_per_group, k_per_group = draw(st.integers(1, 40)), 1, draw(st.integers(1, 2))
    else:
        groups = 1 if kind == "dilated" else draw(st.sampled_from([1, 1, 2, 3, 5]))
        c_per_group, k_per_group = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    case = Case(
        name=f"fuzz {draw(st.integers(0, 99))}",  # the seed of the values
        x=(batch, groups * c_per_group, *size),
        w=(groups * k_per_group, c_per_group, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        x_memory=draw(WAYS),
        w_memory=draw(WAYS),
        dy_memory=draw(st.sampled_from(list(MEMORY))),
    )
    assume(min(case.y[-2:]) >= 1)
    return case


def moved(t, device):
    """t on the device, lying in memory there as it does here."""
    if t.device.type == device.type:
        return t
    whole = torch.empty(0, dtype=t.dtype, device=device).set_(t.untyped_storage().to(device=device))
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def compare(case, dtype, backend, conv2d):
    operands = case.operands(dtype)
    expected = Nest(case).expected(case.operands(dtype, "cpu"))
    with convext.backend(backend):
        results = run(case, operands, conv2d=conv2d)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        expected[name].check(result, dtype, f"{name} of {case}")


@PLACES
@FUZZ
@given(convolutions("any"), st.sampled_from(DTYPES), BACKENDS)
def test_conv2d(only, case, dtype, backend):
    compare(case, dtype, only or backend, convext.conv2d)


@PLACES
@FUZZ
@given(convolutions("depthwise"), st.sampled_from(DTYPES), BACKENDS)
def test_depthwise_conv2d(only, case, dtype, backend):
    def depthwise(x, w, bias, stride, padding, dilation, groups):
        return convext.depthwise_conv2d(x, w, bias, stride, padding, dilation)

    compare(case, dtype, only or backend, depthwise)


@PLACES
@FUZZ
@given(convolutions("dilated"), st.sampled_from(DTYPES), BACKENDS)
def test_dilated_conv2d(only, case, dtype, backend):
    def dilated(x, w, bias, stride, padding, dilation, groups):
        return convext.dilated_conv2d(x, w, bias, stride, padding, dilation)

    compare(case, dtype, only or backend, dilated)


ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


@PLACES
@FUZZ
@given(
    case=convolutions("any"),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    backend=BACKENDS,
    activation=st.sampled_from(list(ACTIVATIONS)),
    affine=st.booleans(),
    residual=st.sampled_from([None, *MEMORY]),
)
def test_conv_bn_relu_in_inference(only, case, dtype, backend, activation, affine, residual):
    """Error: that of the convolution times the scale, carried through an activation whose slope stays below 1.13, plus
    one rounding of the result and of the folded scale and shift. ATen does not fuse: it rounds to the dtype between."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(case.name.encode()))
    backend, device = only or backend, torch.get_default_device()

    def draw(shape):
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    operands = case.operands(dtype, "cpu")
    mean, gamma, beta, var = (draw(case.w[0]) for _ in range(4))
    var = var.abs() + 0.5
    added = None if residual is None else MEMORY[residual](draw(case.y))
    if not affine:
        gamma = beta = None
    with convext.backend(backend):
        tensors = operands.x, operands.w, operands.bias, mean, var, gamma, beta, added
        *parameters, there = (None if t is None else moved(t, device) for t in tensors)
        actual = convext.conv_bn_relu(
            *parameters,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            activation=activation,
            residual=there,
        ).cpu()
    assert actual.dtype == dtype and actual.shape == case.y
    if actual.numel() == 0:
        return
    convolved = Nest(case).expected(operands)["fprop"]
    scale = (var.double() + 1e-5).rsqrt() * (gamma.double() if affine else 1)
    shift = (beta.double() if affine else 0) - mean.double() * scale
    scale, shift = scale[:, None, None], shift[:, None, None]
    z = convolved.value * scale + shift + (0 if added is None else added.double())
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    terms = (convolved.value * scale).abs() + shift.abs() + z.abs()  # each is rounded a few times
    bound = convolved.tolerance(accumulate) * scale.abs() + 8 * unit_roundoff(accumulate) * terms
    if backend == "aten":
        bound = bound + 2 * unit_roundoff(dtype) * terms
    bound = 1.13 * bound + unit_roundoff(dtype) * ACTIVATIONS[activation](z).abs()
    error = (actual.double() - ACTIVATIONS[activation](z)).abs()
    worst = (error / bound.clamp_min(torch.finfo(dtype).tiny)).max()
    assert worst <= 1, f"{worst:.3g} times the error allowed"
