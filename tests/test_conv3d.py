"""convext.conv3d against float64's definition; causal volumes, operators and kernels. What it shares with conv1d is in
test_conv1d_conv3d.py."""

import os

import pytest
import torch
import torch.nn.functional as F
from cases import MEMORY, Case
from passes import DTYPES, EVEN_SAME, run
from reference import Nest
from torch import nn

import convext
from convext import backends

pytestmark = pytest.mark.filterwarnings(EVEN_SAME)


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def volume(name, x, w, stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1), **others):
    return Case(name, x, w, stride, padding, dilation, **others)


VOLUMES = [
    volume("plain", (2, 16, 5, 7, 6), (24, 16, 3, 3, 3), padding=(1, 1, 1), bias=True),
    volume("stride", (1, 19, 7, 9, 8), (21, 19, 3, 3, 3), (2, 2, 2), (1, 1, 1), bias=True),
    volume("first_layer", (1, 3, 6, 15, 17), (20, 3, 3, 7, 7), (1, 2, 2), (1, 3, 3)),
    volume("patches", (2, 3, 4, 12, 8), (20, 3, 2, 4, 4), (2, 4, 4), bias=True),
    volume("one_tap", (2, 16, 3, 4, 5), (24, 16, 1, 1, 1), bias=True),
    volume("one_tap_stride", (2, 16, 5, 4, 5), (24, 16, 1, 1, 1), (2, 1, 2)),
    volume("planes_alone", (2, 33, 3, 7, 8), (34, 33, 1, 3, 3), padding=(0, 1, 1), bias=True),
    volume("depth_alone", (2, 18, 7, 5, 6), (21, 18, 3, 1, 1), padding=(1, 0, 0), bias=True),
    volume("depth_alone_stride", (2, 18, 7, 5, 6), (21, 18, 3, 1, 1), (2, 1, 1), padding=(1, 0, 0)),
    volume("one_plane", (2, 8, 1, 6, 7), (9, 8, 1, 3, 3), padding=(0, 1, 1)),
    volume("one_plane_inside_padding", (2, 8, 1, 6, 7), (9, 8, 3, 3, 3), padding=(1, 1, 1)),
    volume("planes_of_padding_alone", (1, 8, 2, 5, 5), (9, 8, 3, 3, 3), padding=(5, 1, 1), bias=True),
    volume("dilated", (1, 8, 9, 8, 7), (8, 8, 3, 3, 3), padding=(4, 2, 1), dilation=(4, 2, 1), bias=True),
    volume("dilated_depth_alone", (1, 8, 9, 4, 5), (8, 8, 3, 1, 1), padding=(3, 0, 0), dilation=(3, 1, 1)),
    volume("asymmetric", (2, 6, 6, 8, 11), (9, 6, 4, 3, 2), (3, 2, 1), (1, 2, 0), (1, 2, 3), bias=True),
    volume("stride_past_the_filter", (1, 6, 8, 7, 7), (7, 6, 2, 2, 2), (3, 3, 3)),
    volume("groups", (2, 12, 4, 5, 6), (8, 3, 3, 3, 3), padding=(1, 1, 1), groups=4, bias=True),
    volume("depthwise", (2, 20, 5, 6, 7), (20, 1, 3, 3, 3), padding=(1, 1, 1), groups=20, bias=True),
    volume("depthwise_stride", (1, 20, 6, 6, 7), (20, 1, 3, 5, 5), (2, 2, 2), (1, 2, 2), groups=20),
    volume("depthwise_with_multiplier", (2, 6, 4, 5, 4), (12, 1, 2, 3, 3), (1, 2, 1), groups=6),
    volume("same_odd", (2, 4, 5, 6, 4), (6, 4, 3, 5, 3), padding="same", dilation=(2, 1, 1), bias=True),
    volume("same_even", (2, 4, 5, 6, 4), (6, 4, 2, 4, 3), padding="same"),
    volume("valid", (2, 4, 5, 6, 4), (6, 4, 2, 4, 3), padding="valid"),
    volume("unbatched", (8, 4, 5, 6), (6, 8, 3, 3, 3), padding=(1, 1, 1), bias=True),
    volume("no_volumes", (0, 4, 4, 5, 5), (6, 4, 3, 3, 3), padding=(1, 1, 1), bias=True),
    volume("one_channel", (1, 1, 6, 8, 9), (16, 1, 3, 3, 3)),
    volume("one_pixel", (3, 8, 1, 1, 1), (8, 8, 3, 3, 3), padding=(1, 1, 1)),
    volume("channels_last", (2, 16, 4, 5, 6), (9, 16, 3, 3, 3), padding=(1, 1, 1), bias=True, x_memory="channels_last",
           w_memory="channels_last", dy_memory="channels_last"),
    volume("channels_last_planes_alone", (2, 33, 3, 7, 8), (34, 33, 1, 3, 3), padding=(0, 1, 1),
           x_memory="channels_last", dy_memory="channels_last"),
    volume("part_of_more", (2, 8, 4, 5, 6), (9, 8, 3, 3, 3), bias=True, x_memory="window", w_memory="stepped",
           dy_memory="window"),
    volume("planes_and_rows_exchanged", (2, 8, 4, 5, 6), (9, 8, 3, 3, 3), x_memory="transposed",
           w_memory="transposed", dy_memory="transposed"),
    volume("broadcast_gradient", (2, 8, 4, 5, 6), (9, 8, 3, 3, 3), dy_memory="expanded"),
]  # fmt: skip


def check(case, dtype, backend):
    expected = Nest(case).expected(case.operands(dtype, "cpu"))
    with convext.backend(backend):
        results = run(case, case.operands(dtype), conv2d=convext.conv3d)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        expected[name].check(result, dtype, f"{name} of {case}")


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VOLUMES, ids=str)
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
def volumes(draw):
    def triple(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(3))

    stride = triple(1, 3)
    groups, c, k = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    if draw(st.booleans()):
        groups, c = draw(st.integers(1, 40)), 1
    case = volume(
        f"fuzz {draw(st.integers(0, 99))}",
        (draw(st.integers(0, 2)), groups * c, *triple(1, 7)),
        (groups * k, c, *triple(1, 4)),
        stride,
        "same" if stride == (1, 1, 1) and draw(st.booleans()) else triple(0, 4),
        triple(1, 3),
        groups=groups,
        bias=draw(st.booleans()),
        x_memory=draw(WAYS),
        w_memory=draw(WAYS),
        dy_memory=draw(st.sampled_from(list(MEMORY))),
    )
    assume(min(case.y[-3:]) >= 1)
    return case


@FUZZ
@given(volumes(), st.sampled_from(DTYPES), st.sampled_from(["native", "native", "aten"]))
def test_any_volume(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["plain", "stride", "depthwise", "planes_alone", "depth_alone"])
def test_results_do_not_depend_on_the_number_of_threads(name, threads):
    (case,) = (case for case in VOLUMES if case.name == name)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            with convext.backend("native"):
                found.append(run(case, case.operands(torch.float32), conv2d=convext.conv3d))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# ---- causal ----------------------------------------------------------------------------------------------------------

X, W = rand(2, 4, 5, 4, 6), rand(6, 2, 3, 3, 3)


@pytest.mark.parametrize("stride", [1, (2, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("dilation", [1, (2, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("groups, t", [(1, 3), (4, 4), (2, 1)])
def test_causal_is_padding_in_front(groups, t, dilation, stride):
    found = []
    distance = dilation if isinstance(dilation, int) else dilation[0]
    for ours in (False, True):
        x, w, b = (v.clone().requires_grad_() for v in (rand(2, 4, 6, 5, 7), rand(8, 4 // groups, t, 3, 3), rand(8)))
        if ours:
            y = convext.conv3d(x, w, b, stride, (0, 1, 2), dilation, groups, causal=True)
            alone = convext.conv3d(x[0], w, b, stride, (0, 1, 2), dilation, groups, causal=True)
            torch.testing.assert_close(alone, y[0])
        else:
            y = F.conv3d(F.pad(x, (0, 0, 0, 0, distance * (t - 1), 0)), w, b, stride, (0, 1, 2), dilation, groups)
        found.append((y, *torch.autograd.grad(y, (x, w, b), rand(*y.shape))))
    torch.testing.assert_close(found[1], found[0])


def test_causal_outputs_do_not_see_what_is_behind_them():
    x, w = rand(1, 4, 8, 4, 4), rand(4, 4, 3, 3, 3)
    before = convext.conv3d(x, w, padding=(0, 1, 1), causal=True)
    x[:, :, 5:] = float("nan")
    after = convext.conv3d(x, w, padding=(0, 1, 1), causal=True)
    assert torch.equal(after[:, :, :5], before[:, :, :5]) and after[:, :, 5:].isnan().all()


def test_causal_takes_no_padding_of_the_depth_and_raises_as_the_other_form():
    for padding in (1, (1, 0, 0), "same"):
        with pytest.raises(ValueError, match=f"padding.*causal.*{str(padding)[:2].strip('(')}"):
            convext.conv3d(X, W, groups=2, padding=padding, causal=True)
    for args, kwargs in (
        ((X, W), {}), ((X, W), dict(groups=2, stride=0)), (([1.0], W), {}), ((rand(4), W), {}),
        ((X, W), dict(groups=2, padding=1.5)), ((X, rand(6, 2, 3)), dict(groups=2)),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            F.conv3d(*args, **kwargs)
        with pytest.raises(type(theirs.value), match="\nconvext: "):
            convext.conv3d(*args, **kwargs, causal=True)


# ---- operators and kernels ------------------------------------------------------------------------------------------


def test_the_operators_pass_opcheck():
    x, w, b = (t.clone().requires_grad_() for t in (rand(2, 4, 3, 3, 3), rand(6, 2, 2, 2, 2), rand(6)))
    geom = (1, 2, 1), (1, 1, 0), (1, 1, 1), 2
    y = convext.conv3d(x, w, b, *geom).detach()
    for op, args in (
        (torch.ops.convext.fprop, (x, w, b, *geom)),
        (torch.ops.convext.fprop, (x, w, b, *geom, True)),
        (torch.ops.convext.dgrad, (y.requires_grad_(), w, x.shape[2:], *geom)),
        (torch.ops.convext.wgrad, (y, x, w.shape[2:], *geom)),
    ):
        torch.library.opcheck(op.default, args)


def test_filters_of_other_planes_of_the_same_memory_are_packed_anew():
    """Planes and rows are one axis to who keeps packed filters: 2 x 3 and 3 x 2 of them are not the same."""
    w, x = rand(32, 16, 2, 3, 3).float(), rand(1, 16, 5, 5, 5).float()
    base = nn.Parameter(w.flatten(2).contiguous())
    with torch.no_grad(), convext.backend("native"):
        for _ in range(2):
            for size in ((2, 3, 3), (3, 2, 3), (2, 3, 3)):
                view = base.view(32, 16, *size)
                torch.testing.assert_close(convext.conv3d(x, view), F.conv3d(x, view), rtol=1e-4, atol=1e-3)


def test_the_kernels_serve_and_name_what_they_reject():
    x, w = rand(1, 8, 4, 5, 6).float(), rand(8, 8, 3, 3, 3).float()
    backends.reset_counts()
    with convext.backend("native"):
        convext.conv3d(x, w)
    assert [*backends.counts()][0][:2] == ("native", "fprop")
    problem = convext.problem.ConvProblem.of_fprop(x, w, convext.problem.Geom((1,) * 3, (0,) * 3, (1,) * 3))
    reasons = dict(backends.native._C.reject_reasons(0, 0, backends.native._fields(problem)))
    assert all("not volumes" in why for name, why in reasons.items() if "winograd" in name and "f32_portable" in name)
    for name in ("native", "triton"):
        why = backends.get(name, "cuda").reject(convext.problem.Pass.FPROP, problem)
        assert "not for volumes" in why


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size, stride", [((1, 3, 3), (2, 1, 1)), ((1, 3, 3), (3, 1, 1)), ((2, 5, 5), (3, 1, 1))])
def test_gradients_of_planes_that_no_tap_reaches_are_zero(size, stride, memory_format):
    """Depthwise, whose rows are computed in pairs; in memory that held something else before."""
    x = rand(1, 18, 9, 17, 16, dtype=torch.float32).contiguous(memory_format=memory_format).requires_grad_()
    w, padding = rand(18, 1, *size, dtype=torch.float32), (0, size[1] // 2, size[2] // 2)

    def gradient(stride, value):
        y = convext.conv3d(x, w, stride=stride, padding=padding, groups=18)
        return torch.autograd.grad(y, x, torch.full_like(y, value))[0]

    with convext.backend("native"):
        for _ in range(3):
            before = gradient((1, 1, 1), float("nan"))  # whose memory the next result takes
            assert before.isnan().any()
            del before
            got = gradient(stride, 1.0)
            y = F.conv3d(x.double(), w.double(), None, stride, padding, 1, 18)
            (want,) = torch.autograd.grad(y, x, torch.ones_like(y))
            torch.testing.assert_close(got, want.float())
            assert not got[:, :, size[0]].any()  # between two planes that taps reach
