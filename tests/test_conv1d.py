"""convext.conv1d against float64's definition; causal rows. What it shares with conv3d is in test_conv1d_conv3d.py."""

import os

import pytest
import torch
import torch.nn.functional as F
from cases import MEMORY, Case
from passes import DTYPES, EVEN_SAME, run
from places import BACKENDS
from reference import Nest
from torch import nn

import convext

pytestmark = pytest.mark.filterwarnings(EVEN_SAME)


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def of_rows(x, w, bias, stride, padding, dilation, groups):
    """conv1d of images of height one."""
    padding = padding if isinstance(padding, str) else padding[1]
    y = convext.conv1d(x.squeeze(-2), w.squeeze(2), bias, stride[1], padding, dilation[1], groups)
    return y.unsqueeze(-2)


def row(name, x, w, stride=1, padding=0, dilation=1, **others):
    padding = padding if isinstance(padding, str) else (0, padding)
    return Case(name, (*x[:-1], 1, x[-1]), (*w[:2], 1, w[2]), (1, stride), padding, (1, dilation), **others)


ROWS = [
    row("plain", (2, 16, 40), (24, 16, 3), bias=True),
    row("one_tap", (2, 16, 40), (24, 16, 1), bias=True),
    row("stride_and_padding", (2, 8, 41), (16, 8, 5), 3, 4, bias=True),
    row("dilated", (1, 16, 70), (16, 16, 3), padding=16, dilation=16, bias=True),
    row("dilation_past_the_row", (1, 8, 10), (8, 8, 3), padding=32, dilation=32),
    row("depthwise", (2, 32, 50), (32, 1, 4), padding=3, groups=32, bias=True),
    row("depthwise_with_multiplier", (2, 6, 20), (12, 1, 4), stride=2, groups=6),
    row("groups", (2, 12, 20), (8, 3, 3), groups=4, bias=True),
    row("same_odd", (2, 4, 20), (6, 4, 5), padding="same", dilation=2, bias=True),
    row("same_even", (2, 4, 20), (6, 4, 4), padding="same"),
    row("valid", (2, 4, 20), (6, 4, 4), padding="valid"),
    row("unbatched", (8, 20), (6, 8, 3), padding=1, bias=True),
    row("no_rows", (0, 4, 20), (6, 4, 3), padding=1, bias=True),
    row("one_channel", (2, 1, 300), (16, 1, 9), 2, 4),
    row("one_pixel", (3, 8, 1), (8, 8, 3), padding=1),
    row("channels_together", (2, 16, 40), (24, 16, 3), bias=True, x_memory="channels_last"),
    row("part_of_more", (2, 8, 20), (24, 8, 3), bias=True, x_memory="stepped", w_memory="stepped", dy_memory="stepped"),
]


def check(case, dtype, backend):
    expected = Nest(case).expected(case.operands(dtype, "cpu"))
    with convext.backend(backend):
        results = run(case, case.operands(dtype), conv2d=of_rows)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        expected[name].check(result, dtype, f"{name} of {case}")


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_it_is_its_definition(case, dtype, backend):
    check(case, dtype, backend)


hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
WAYS = st.sampled_from([way for way in MEMORY if way != "expanded"])


@st.composite
def rows(draw):
    stride = draw(st.integers(1, 4))
    groups, c, k = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    if draw(st.booleans()):
        groups, c = draw(st.integers(1, 40)), 1
    case = row(
        f"fuzz {draw(st.integers(0, 99))}",
        (draw(st.integers(0, 3)), groups * c, draw(st.integers(1, 50))),
        (groups * k, c, draw(st.integers(1, 9))),
        stride,
        "same" if stride == 1 and draw(st.booleans()) else draw(st.integers(0, 9)),
        draw(st.sampled_from([1, 1, 2, 3, 8])),
        groups=groups,
        bias=draw(st.booleans()),
        x_memory=draw(WAYS),
        w_memory=draw(WAYS),
        dy_memory=draw(st.sampled_from(list(MEMORY))),
    )
    assume(min(case.y[-2:]) >= 1)
    return case


@FUZZ
@given(rows(), st.sampled_from(DTYPES), st.sampled_from(["native", "native", "aten"]))
def test_any_row(case, dtype, backend):
    check(case, dtype, backend)


# ---- causal ----------------------------------------------------------------------------------------------------------

X, W = rand(2, 4, 6), rand(6, 2, 3)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 8])
@pytest.mark.parametrize("groups, s", [(1, 3), (4, 4), (2, 1)])
def test_causal_is_padding_on_the_left(groups, s, dilation, stride):
    found = []
    for ours in (False, True):
        x, w, b = (t.clone().requires_grad_() for t in (rand(2, 4, 17), rand(8, 4 // groups, s), rand(8)))
        if ours:
            y = convext.conv1d(x, w, b, stride, dilation=dilation, groups=groups, causal=True)
            alone = convext.conv1d(x[0], w, b, stride, dilation=dilation, groups=groups, causal=True)
            torch.testing.assert_close(alone, y[0])
        else:
            y = F.conv1d(F.pad(x, (dilation * (s - 1), 0)), w, b, stride, 0, dilation, groups)
        found.append((y, *torch.autograd.grad(y, (x, w, b), rand(*y.shape))))
    torch.testing.assert_close(found[1], found[0])


def test_causal_outputs_do_not_see_what_is_behind_them():
    x, w = rand(1, 4, 30), rand(4, 1, 4)
    before = convext.conv1d(x, w, groups=4, dilation=2, causal=True)
    x[..., 20:] = float("nan")
    after = convext.conv1d(x, w, groups=4, dilation=2, causal=True)
    assert torch.equal(after[..., :20], before[..., :20]) and after[..., 20:].isnan().all()


def test_causal_takes_no_padding_and_raises_as_the_other_form():
    with pytest.raises(ValueError, match="padding.*causal.*1"):
        convext.conv1d(X, W, groups=2, padding=1, causal=True)
    for args, kwargs in (((X, W), {}), ((X, W), dict(groups=2, stride=0)), (([1.0], W), {}), ((rand(4), W), {})):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            F.conv1d(*args, **kwargs)
        with pytest.raises(type(theirs.value), match="\nconvext: "):
            convext.conv1d(*args, **kwargs, causal=True)


def test_filters_of_another_shape_of_the_same_memory_are_packed_anew():
    w, x = nn.Parameter(rand(32, 64, 3).float()), rand(1, 64, 50).float()
    with torch.no_grad(), convext.backend("native"):
        for _ in range(2):
            torch.testing.assert_close(convext.conv1d(x, w), F.conv1d(x, w), rtol=1e-4, atol=1e-3)
            other = convext.conv2d(x.unsqueeze(3), w.unsqueeze(3))
            torch.testing.assert_close(other, F.conv2d(x.unsqueeze(3), w.unsqueeze(3)), rtol=1e-4, atol=1e-3)
