"""convext.conv3d against float64's definition and torch.nn.functional.conv3d: values, strides, errors, derivatives; and
the layer."""

import copy
import itertools
import os
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import MEMORY, Case
from passes import DTYPES, EVEN_SAME, run
from places import BACKENDS
from reference import Nest
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

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


# ---- as ATen's -------------------------------------------------------------------------------------------------------


def strides(t):
    """Strides, but for extents of 1, where any stride means the same."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def _dense(shape, form, dtype):
    """Random values: contiguous, the channels together, a part of something larger, or one volume for all."""
    values = rand(*shape).to(dtype)
    if form == "ndhwc":
        return values.contiguous(memory_format=torch.channels_last_3d)
    if form == "part":
        larger = torch.zeros(shape[0], *(n + 1 for n in shape[1:]), dtype=dtype)
        return larger[(slice(None), *(slice(n) for n in shape[1:]))].copy_(values)
    return values[:1].expand(shape) if form == "expanded" else values


@pytest.mark.parametrize("backend", [None, "native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [1, 3])
def test_strides_of_results_and_gradients_are_atens(backend, dtype, s):
    for (n, c, width), (k, groups) in itertools.product(((1, 1, 1), (2, 4, 3), (2, 4, 1)), ((1, 1), (4, 1), (4, 4))):
        if c % groups:
            continue
        for x_form, w_form, dy_form in itertools.product(
            ("ncdhw", "ndhwc", "part", "expanded"), ("ncdhw", "ndhwc"), ("ncdhw", "ndhwc", "expanded")
        ):
            x = _dense((n, c, *(width,) * 3), x_form, dtype)
            w = _dense((k, c // groups, *(s,) * 3), w_form, dtype)
            found = []
            for conv3d in (F.conv3d, convext.conv3d):
                leaves = x.detach().requires_grad_(), w.detach().requires_grad_(), rand(k).to(dtype).requires_grad_()
                with convext.backend(backend):
                    y = conv3d(*leaves, 1, s // 2, 1, groups)
                    gradients = torch.autograd.grad(y, leaves, _dense(y.shape, dy_form, dtype))
                    with torch.no_grad():
                        unrecorded = conv3d(*leaves, 1, s // 2, 1, groups)
                found.append([strides(t) for t in (y, unrecorded, *gradients)])
            assert found[0] == found[1], (x.shape, x_form, w.shape, w_form, dy_form)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_is_no_view_and_can_be_written(recorded):
    x, w = rand(2, 4, 3, 4, 5), rand(6, 4, 3, 3, 3).requires_grad_()
    with torch.set_grad_enabled(recorded):
        y = convext.conv3d(x, w)
    with torch.no_grad():
        expected = F.relu(F.conv3d(x, w) + 1)
    assert not y._is_view()
    y.add_(torch.ones(1, dtype=torch.float64, requires_grad=True)).relu_()
    torch.testing.assert_close(y.detach(), expected)
    y.backward(torch.ones_like(y))
    assert w.grad is None if not recorded else not w.grad._is_view()
    y.detach_()


@pytest.mark.parametrize("mode", [FlopCounterMode, FakeTensorMode, None], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_under_a_mode_is_no_view(recorded, mode):
    shapes = (2, 4, 3, 4, 5), (6, 4, 3, 3, 3), (6,)
    given, ours = [rand(*s).requires_grad_(recorded) for s in shapes], convext.conv3d
    with nullcontext() if mode is None else mode(**{"display": False} if mode is FlopCounterMode else {}) as inside:
        if mode is FakeTensorMode:
            given = [inside.from_tensor(t) for t in given]
        y = ours(*given)
        assert not y._is_view()
        y.relu_()
        if recorded:
            assert not any(t._is_view() for t in torch.autograd.grad(y.sum(), given))


def test_floating_point_operations_are_counted_as_pytorchs():
    counted = []
    for conv3d in (F.conv3d, convext.conv3d):
        x, w = rand(2, 4, 3, 4, 5).requires_grad_(), rand(6, 4, 3, 3, 3).requires_grad_()
        with FlopCounterMode(display=False) as mode:
            conv3d(x, w, padding=1).sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] > 0


X, W, B = rand(2, 4, 5, 4, 6), rand(6, 2, 3, 3, 3), rand(6)
BAD = {
    "padding_is_no_known_word": ((X, W, B), dict(groups=2, padding="full"), "padding.*'full'.*'same' or 'valid'"),
    "same_with_a_stride": ((X, W, B), dict(groups=2, padding="same", stride=2), r"same.*strid.*is \(2, 2, 2\)"),
    "stride_0": ((X, W, B), dict(groups=2, stride=0), r"stride.*\(0, 0, 0\)"),
    "stride_float": ((X, W, B), dict(groups=2, stride=1.5), "stride.*1.5"),
    "stride_bool": ((X, W, B), dict(groups=2, stride=True), "stride.*True"),
    "stride_of_two": ((X, W, B), dict(groups=2, stride=(1, 1)), r"stride.*three.*\[1, 1\]"),
    "stride_of_none": ((X, W, B), dict(groups=2, stride=()), r"stride.*\[\]"),
    "padding_negative": ((X, W, B), dict(groups=2, padding=(0, -1, 0)), r"padding.*\(0, -1, 0\)"),
    "padding_none": ((X, W, B), dict(groups=2, padding=None), "padding.*None"),
    "dilation_0": ((X, W, B), dict(groups=2, dilation=(0, 1, 1)), r"dilation.*\(0, 1, 1\)"),
    "groups_0": ((X, W, B), dict(groups=0), "groups is 0"),
    "groups_float": ((X, W, B), dict(groups=2.0), "groups.*2.0"),
    "k_not_multiple_of_groups": ((X, rand(5, 2, 3, 3, 3)), dict(groups=2), r"weight.*groups=2.*\[5, 2, 3, 3, 3\]"),
    "k_0": ((X, rand(0, 4, 3, 3, 3)), {}, r"weight.*at least 1 .*\[0, 4, 3, 3, 3\]"),
    "c_does_not_fit": ((X, rand(6, 3, 3, 3, 3)), dict(groups=2), r"input.*\[2, 4, 5, 4, 6\].*6 channels.*got 4"),
    "kernel_past_the_depth": ((X, rand(6, 4, 6, 3, 3)), {}, "input.*channel: 5 x 4 x 6.*dilation: 6 x 3 x 3"),
    "kernel_past_the_depth_by_dilation": ((X, W, B), dict(groups=2, dilation=(3, 1, 1)), "5 x 4 x 6.*7 x 3 x 3"),
    "kernel_of_0": ((X, rand(6, 4, 0, 3, 3)), {}, r"weight.*\[6, 4, 0, 3, 3\]"),
    "bias_of_another_size": ((X, W, rand(5)), dict(groups=2), r"bias.*6.*\[5\]"),
    "bias_two_dimensional": ((X, W, rand(1, 6)), dict(groups=2), r"bias.*6.*\[1, 6\]"),
    "bias_of_another_dtype": ((X, W, B.float()), dict(groups=2), "bias.*float64.*float32.*should be the same"),
    "weight_of_another_dtype": ((X, W.float()), dict(groups=2), "weight.*float64.*float32.*should be the same"),
    "weight_two_dimensional": ((X, rand(6, 2)), dict(groups=2), r"weight.*\[6, 2\]"),
    "weight_of_an_image": ((X, rand(6, 2, 1, 3)), dict(groups=2), r"weight.*\[6, 2, 1, 3\]"),
    "input_one_dimensional": ((rand(4), W), dict(groups=2), r"input.*4D.*5D.*conv3d.*\[4\]"),
    "input_an_image": ((rand(4, 4, 4), W), dict(groups=2), r"input.*4D.*5D.*\[4, 4, 4\]"),
    "input_a_list": (([1.0], W), {}, "input.*Tensor.*list"),
    "weight_none": ((X, None), {}, "weight.*Tensor.*NoneType"),
    "bias_an_int": ((X, W, 3), dict(groups=2), "bias.*Tensor or None.*int"),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_as_pytorch_and_names_the_argument(name, gradient):
    args, kwargs, message = BAD[name]
    if gradient:
        args = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    with pytest.raises(Exception) as theirs:
        F.conv3d(*args, **kwargs)
    for _ in range(2):  # nothing may be remembered of a call that failed
        with pytest.raises(type(theirs.value), match=f"(?s)\nconvext: .*{message}") as ours:
            convext.conv3d(*args, **kwargs)
        assert type(ours.value) is type(theirs.value)
        first = str(theirs.value).split(" - got ")[0]  # the list of arguments that follows counts keywords
        assert str(ours.value).startswith(first) and len(first) > 10


@pytest.mark.parametrize("on_meta", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_meta_tensors_beside_others_are_taken_as_pytorch_takes_them(on_meta):
    args = [t.to("meta") if meta else t for t, meta in zip((X, W, B), on_meta)]
    theirs, ours = F.conv3d(*args, groups=2), convext.conv3d(*args, groups=2)
    assert (ours.shape, ours.device, ours.stride()) == (theirs.shape, theirs.device, theirs.stride())


EMPTY = {
    "no_volumes": ((0, 4, 3, 3, 3), (6, 4, 3, 3, 3), 1), "no_input_channels": ((2, 0, 3, 3, 3), (6, 0, 3, 3, 3), 1),
    "no_input_channels_in_groups": ((2, 0, 3, 3, 3), (6, 0, 3, 3, 3), 2),
    "one_volume_without_channels": ((0, 3, 3, 3), (6, 0, 3, 3, 3), 1),
    "no_filters": ((2, 4, 3, 3, 3), (0, 4, 3, 3, 3), 1), "no_planes": ((2, 4, 0, 3, 3), (6, 4, 1, 1, 1), 1),
    "no_taps": ((2, 4, 3, 3, 3), (6, 4, 0, 3, 3), 1), "nothing": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), 1),
}  # fmt: skip


def _outcome(function, name, bias):
    x_shape, w_shape, groups = EMPTY[name]
    leaves = [torch.ones(shape, requires_grad=True) for shape in (x_shape, w_shape, w_shape[:1])]
    try:
        y = function(*leaves[:2], leaves[2] if bias else None, 1, 1, 1, groups)
    except RuntimeError as error:
        return type(error)
    y.sum().backward()
    return [(t.shape, t.stride(), t.tolist()) for t in (y, *(t.grad for t in leaves[: 3 if bias else 2]))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_convolve_is_as_in_pytorch(name, bias):
    assert _outcome(convext.conv3d, name, bias) == _outcome(F.conv3d, name, bias)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(stride=(2,)), dict(stride=[2, 1, 2]), dict(padding=torch.Size([1, 0, 1])), dict(stride=torch.tensor(2)),
        dict(padding="valid"), dict(dilation=(2, 1, 1), padding=(2,)),
    ],
    ids=str,
)  # fmt: skip
def test_every_spelling_of_three_ints(arguments):
    torch.testing.assert_close(convext.conv3d(X, W, B, groups=2, **arguments), F.conv3d(X, W, B, groups=2, **arguments))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_other_dtypes_are_atens(dtype):
    x, w = torch.ones(1, 2, 3, 4, 5, dtype=dtype), torch.ones(3, 2, 2, 2, 2, dtype=dtype)
    assert torch.equal(convext.conv3d(x, w), F.conv3d(x, w))


def test_tensor_subclasses_are_heard():
    class Listening(torch.Tensor):
        heard = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    y = convext.conv3d(X.as_subclass(Listening), W, B, groups=2, causal=True)
    assert Listening.heard[0] is convext.conv3d and type(y) is Listening and y.shape[2] == X.shape[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_context(dtype):
    x, w, b = X.float().requires_grad_(), W.float().requires_grad_(), B.float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = convext.conv3d(x, w, b, groups=2)
        assert y.dtype == dtype == F.conv3d(x, w, b, groups=2).dtype
        assert convext.conv3d(X, W, B, groups=2).dtype == torch.float64
    y.sum().backward()
    assert {x.grad.dtype, w.grad.dtype, b.grad.dtype} == {torch.float32}
    assert convext.conv3d(x, w, b, groups=2).dtype == torch.float32


# ---- causal ----------------------------------------------------------------------------------------------------------


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


# ---- derivatives and compilers ---------------------------------------------------------------------------------------

FUNCTIONS = {
    "groups": lambda x, w, b: convext.conv3d(x, w, b, (1, 2, 1), 1, 1, 2),
    "same": lambda x, w, b: convext.conv3d(x, w, b, 1, "same", (2, 1, 1), 2),
    "causal": lambda x, w, b: convext.conv3d(x, w, b, 1, (0, 1, 0), 1, 2, causal=True),
    "unbatched": lambda x, w, b: convext.conv3d(x[0], w, b, 1, 1, (2, 1, 2), 2),
}


def leaves(*tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


SMALL = rand(2, 4, 3, 3, 3), rand(6, 2, 2, 2, 2), rand(6)


@BACKENDS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_both_modes_and_second_order(name, backend):
    if backend not in ("native", "aten") or torch.get_default_device().type != "cpu":
        pytest.skip("volumes are ATen's there")
    inputs = leaves(*SMALL)
    with convext.backend(backend):
        assert gradcheck(FUNCTIONS[name], inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(FUNCTIONS[name], inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_alone(needed):
    inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate(SMALL)]
    assert gradcheck(FUNCTIONS["groups"], inputs, check_forward_ad=True)


@pytest.mark.parametrize("form", ["ncdhw", "ndhwc"])
def test_transforms(form):
    x = SMALL[0] if form == "ncdhw" else SMALL[0].contiguous(memory_format=torch.channels_last_3d)
    one = x, *SMALL[1:]
    many = [torch.stack([t, -t, 2 * t]) for t in one]

    def theirs(x, w, b):
        return F.conv3d(x, w, b, (1, 2, 1), 1, 1, 2)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        for in_dims in itertools.product((0, None), repeat=3):
            operands = [several if d == 0 else single for d, several, single in zip(in_dims, many, one)]
            if in_dims != (None,) * 3:
                close = torch.testing.assert_close
                close(vmap(FUNCTIONS["groups"], in_dims)(*operands), vmap(theirs, in_dims)(*operands))
        of_each = [
            vmap(grad(lambda x, w, f=f: f(x, w, one[2]).square().sum(), (0, 1)), (0, None))(many[0], one[1])
            for f in (theirs, FUNCTIONS["groups"])
        ]
        torch.testing.assert_close(*of_each)
    tangents = [jvp(f, one, tuple(t + 1 for t in one)) for f in (theirs, FUNCTIONS["groups"])]
    torch.testing.assert_close(*tangents)
    vmap(FUNCTIONS["groups"], (0, None, None))(many[0], *one[1:]).add_(1)  # no view of what a Function returned


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("form", ["ncdhw", "ndhwc"])
def test_no_tensor_needs_data(form, recorded):
    given = [_dense((2, 4, 5, 4, 6), form, torch.float32), W.float(), B.float()]
    given = [t.requires_grad_(recorded) for t in given]
    expected = F.conv3d(*given, groups=2)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in given]
        y = convext.conv3d(*fake, groups=2)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not recorded or [t.shape for t in torch.autograd.grad(y.sum(), fake)] == [t.shape for t in fake]


@pytest.mark.parametrize("form", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(name, form):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True, dynamic=True)
    for width in (3, 5, 8):
        found = []
        for function in (FUNCTIONS[name], compiled):
            inputs = leaves(_dense((2, 4, width, width + 1, width), form, torch.float64), *SMALL[1:])
            y = function(*inputs)
            found.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
        torch.testing.assert_close(*found, check_stride=False)


def test_the_operators_pass_opcheck():
    x, w, b = (t.clone().requires_grad_() for t in SMALL)
    geom = (1, 2, 1), (1, 1, 0), (1, 1, 1), 2
    y = convext.conv3d(x, w, b, *geom).detach()
    for op, args in (
        (torch.ops.convext.fprop, (x, w, b, *geom)),
        (torch.ops.convext.fprop, (x, w, b, *geom, True)),
        (torch.ops.convext.dgrad, (y.requires_grad_(), w, x.shape[2:], *geom)),
        (torch.ops.convext.wgrad, (y, x, w.shape[2:], *geom)),
    ):
        torch.library.opcheck(op.default, args)


def test_weights_that_change_between_calls_are_seen():
    w, x = nn.Parameter(rand(32, 64, 3, 3, 3).float()), rand(1, 64, 4, 5, 6).float()
    with torch.no_grad(), convext.backend("native"):
        convext.conv3d(x, w)
        kept = backends.native.packed_bytes()
        for change in (lambda: w.mul_(2), lambda: w.data.add_(1), lambda: w[3].zero_()):
            change()
            torch.testing.assert_close(convext.conv3d(x, w), F.conv3d(x, w), rtol=1e-4, atol=1e-3)
        for _ in range(3):
            convext.conv3d(x, w)
        assert backends.native.packed_bytes() == kept >= w.numel() * 4


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


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1, 0), "same", "valid"], ids=str)
def test_every_padding_mode(padding_mode, padding):
    theirs = nn.Conv3d(4, 6, 3, padding=padding, groups=2, padding_mode=padding_mode, dilation=(1, 2, 1)).double()
    ours = copy.deepcopy(theirs)
    ours.__class__ = convext.nn.Conv3d
    x = rand(2, 4, 5, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))


def test_the_layer_is_torchs_in_all_but_who_computes(tmp_path):
    layer, theirs = convext.nn.Conv3d(4, 6, 3), nn.Conv3d(4, 6, 3)
    assert isinstance(layer, nn.Conv3d) and repr(layer) == repr(theirs)
    theirs.load_state_dict(layer.state_dict())
    x = rand(2, 4, 4, 5, 6).float()
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is convext.nn.Conv3d and torch.equal(again(x), layer(x))
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=True)(x), layer(x))
