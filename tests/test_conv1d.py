"""convext.conv1d against float64's definition and torch.nn.functional.conv1d: values, strides, errors, derivatives."""

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


# ---- as ATen's -------------------------------------------------------------------------------------------------------


def strides(t):
    """Strides, but for extents of 1, where any stride means the same."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def _dense(shape, form, dtype):
    """Random values: contiguous, the channels together, a part of something larger, or one row for all."""
    values = rand(*shape).to(dtype)
    if form == "nwc":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "part":
        larger = torch.zeros(shape[0], shape[1] + 1, shape[2] + 2, dtype=dtype)
        larger[:, : shape[1], : shape[2]] = values
        return larger[:, : shape[1], : shape[2]]
    return values[:1].expand(shape) if form == "expanded" else values


@pytest.mark.parametrize("backend", [None, "native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [1, 3])
def test_strides_of_results_and_gradients_are_atens(backend, dtype, s):
    for (n, c, width), (k, groups) in itertools.product(((1, 1, 1), (2, 4, 5), (2, 4, 1)), ((1, 1), (4, 1), (4, 4))):
        if c % groups:
            continue
        for x_form, w_form, dy_form in itertools.product(
            ("ncw", "nwc", "part", "expanded"), ("ncw", "nwc"), ("ncw", "nwc", "expanded")
        ):
            x, w = _dense((n, c, width), x_form, dtype), _dense((k, c // groups, s), w_form, dtype)
            found = []
            for conv1d in (F.conv1d, convext.conv1d):
                leaves = x.detach().requires_grad_(), w.detach().requires_grad_(), rand(k).to(dtype).requires_grad_()
                with convext.backend(backend):
                    y = conv1d(*leaves, 1, s // 2, 1, groups)
                    gradients = torch.autograd.grad(y, leaves, _dense(y.shape, dy_form, dtype))
                    with torch.no_grad():
                        unrecorded = conv1d(*leaves, 1, s // 2, 1, groups)
                found.append([strides(t) for t in (y, unrecorded, *gradients)])
            assert found[0] == found[1], (x.shape, x_form, w.shape, w_form, dy_form)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_is_no_view_and_can_be_written(recorded):
    """detach_ refuses views, and autograd those of what a Function returned, or of what was made without it."""
    x, w = rand(2, 4, 9), rand(6, 4, 3).requires_grad_()
    with torch.set_grad_enabled(recorded):
        y = convext.conv1d(x, w)
    with torch.no_grad():
        expected = F.relu(F.conv1d(x, w) + 1)
    assert not y._is_view()
    y.add_(torch.ones(1, dtype=torch.float64, requires_grad=True)).relu_()
    torch.testing.assert_close(y.detach(), expected)
    y.backward(torch.ones_like(y))
    assert w.grad is None if not recorded else not w.grad._is_view()
    y.detach_()


@pytest.mark.parametrize("mode", [FlopCounterMode, FakeTensorMode, None], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_under_a_mode_is_no_view(recorded, mode):
    """With grad mode on, whether a gradient is wanted or not."""
    given, ours = [rand(*s).requires_grad_(recorded) for s in ((2, 4, 9), (6, 4, 3), (6,))], convext.conv1d
    with nullcontext() if mode is None else mode(**{"display": False} if mode is FlopCounterMode else {}) as inside:
        if mode is FakeTensorMode:
            given = [inside.from_tensor(t) for t in given]
        y = ours(*given)
        assert not y._is_view()
        y.relu_()
        if recorded:
            assert not any(t._is_view() for t in torch.autograd.grad(y.sum(), given))


X, W, B = rand(2, 4, 6), rand(6, 2, 3), rand(6)
BAD = {
    "padding_is_no_known_word": ((X, W, B), dict(groups=2, padding="full"), "padding.*'full'.*'same' or 'valid'"),
    "same_with_a_stride": ((X, W, B), dict(groups=2, padding="same", stride=2), "same.*strid.*is 2"),
    "stride_0": ((X, W, B), dict(groups=2, stride=0), r"stride.*\(0,\)"),
    "stride_float": ((X, W, B), dict(groups=2, stride=1.5), "stride.*1.5"),
    "stride_bool": ((X, W, B), dict(groups=2, stride=True), "stride.*True"),
    "stride_of_two": ((X, W, B), dict(groups=2, stride=(1, 1)), r"stride.*\[1, 1\]"),
    "stride_of_none": ((X, W, B), dict(groups=2, stride=()), r"stride.*\[\]"),
    "padding_negative": ((X, W, B), dict(groups=2, padding=-1), r"padding.*\(-1,\)"),
    "padding_none": ((X, W, B), dict(groups=2, padding=None), "padding.*None"),
    "dilation_0": ((X, W, B), dict(groups=2, dilation=0), r"dilation.*\(0,\)"),
    "groups_0": ((X, W, B), dict(groups=0), "groups is 0"),
    "groups_float": ((X, W, B), dict(groups=2.0), "groups.*2.0"),
    "k_not_multiple_of_groups": ((X, rand(5, 2, 3)), dict(groups=2), r"weight.*groups=2.*\[5, 2, 3\]"),
    "k_0": ((X, rand(0, 4, 3)), {}, r"weight.*at least 1 .*\[0, 4, 3\]"),
    "c_does_not_fit": ((X, rand(6, 3, 3)), dict(groups=2), r"input.*\[2, 4, 6\].*6 channels.*got 4"),
    "kernel_past_the_row": ((X, rand(6, 4, 7)), {}, "input.*channel: 6.*dilation: 7"),
    "kernel_past_the_row_by_dilation": ((X, W, B), dict(groups=2, dilation=3), "input.*channel: 6.*dilation: 7"),
    "kernel_of_0": ((X, rand(6, 4, 0)), {}, r"weight.*\[6, 4, 0\]"),
    "bias_of_another_size": ((X, W, rand(5)), dict(groups=2), r"bias.*6.*\[5\]"),
    "bias_two_dimensional": ((X, W, rand(1, 6)), dict(groups=2), r"bias.*6.*\[1, 6\]"),
    "bias_of_another_dtype": ((X, W, B.float()), dict(groups=2), "bias.*float64.*float32.*should be the same"),
    "weight_of_another_dtype": ((X, W.float()), dict(groups=2), "weight.*float64.*float32.*should be the same"),
    "weight_two_dimensional": ((X, rand(6, 2)), dict(groups=2), r"weight.*\[6, 2\]"),
    "weight_of_an_image": ((X, rand(6, 2, 1, 3)), dict(groups=2), r"weight.*\[6, 2, 1, 3\]"),
    "input_one_dimensional": ((rand(4), W), dict(groups=2), r"input.*2D.*3D.*conv1d.*\[4\]"),
    "input_an_image": ((rand(1, 4, 4, 4), W), dict(groups=2), r"input.*2D.*3D.*\[1, 4, 4, 4\]"),
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
        F.conv1d(*args, **kwargs)
    for _ in range(2):  # nothing may be remembered of a call that failed
        with pytest.raises(type(theirs.value), match=f"(?s)\nconvext: .*{message}") as ours:
            convext.conv1d(*args, **kwargs)
        assert type(ours.value) is type(theirs.value)
        first = str(theirs.value).split(" - got ")[0]  # the list of arguments that follows counts keywords
        assert str(ours.value).startswith(first) and len(first) > 10


@pytest.mark.parametrize("on_meta", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_meta_tensors_beside_others_are_taken_as_pytorch_takes_them(on_meta):
    args = [t.to("meta") if meta else t for t, meta in zip((X, W, B), on_meta)]
    theirs, ours = F.conv1d(*args, groups=2), convext.conv1d(*args, groups=2)
    assert (ours.shape, ours.device, ours.stride()) == (theirs.shape, theirs.device, theirs.stride())


EMPTY = {
    "no_rows": ((0, 4, 6), (6, 4, 3), 1), "no_input_channels": ((2, 0, 6), (6, 0, 3), 1),
    "no_input_channels_in_groups": ((2, 0, 6), (6, 0, 3), 2), "one_row_without_channels": ((0, 6), (6, 0, 3), 1),
    "no_filters": ((2, 4, 6), (0, 4, 3), 1), "no_pixels": ((2, 4, 0), (6, 4, 1), 1),
    "no_taps": ((2, 4, 6), (6, 4, 0), 1), "nothing": ((0, 0, 0), (0, 0, 0), 1),
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
    assert _outcome(convext.conv1d, name, bias) == _outcome(F.conv1d, name, bias)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(stride=(2,)), dict(stride=[2]), dict(padding=torch.Size([1])), dict(stride=torch.tensor(2)),
        dict(padding="valid"), dict(dilation=(2,), padding=(2,)),
    ],
    ids=str,
)  # fmt: skip
def test_every_spelling_of_an_int(arguments):
    torch.testing.assert_close(convext.conv1d(X, W, B, groups=2, **arguments), F.conv1d(X, W, B, groups=2, **arguments))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.int64])
def test_other_dtypes_are_atens(dtype):
    x, w = torch.ones(1, 2, 5, dtype=dtype), torch.ones(3, 2, 3, dtype=dtype)
    assert torch.equal(convext.conv1d(x, w), F.conv1d(x, w))


def test_tensor_subclasses_are_heard():
    class Listening(torch.Tensor):
        heard = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    y = convext.conv1d(X.as_subclass(Listening), W, B, groups=2)
    assert Listening.heard[0] is convext.conv1d and type(y) is Listening


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_context(dtype):
    x, w, b = X.float().requires_grad_(), W.float().requires_grad_(), B.float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = convext.conv1d(x, w, b, groups=2)
        assert y.dtype == dtype == F.conv1d(x, w, b, groups=2).dtype
        assert convext.conv1d(X, W, B, groups=2).dtype == torch.float64
    y.sum().backward()
    assert {x.grad.dtype, w.grad.dtype, b.grad.dtype} == {torch.float32}
    assert convext.conv1d(x, w, b, groups=2).dtype == torch.float32


# ---- causal ----------------------------------------------------------------------------------------------------------


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


# ---- derivatives and compilers ---------------------------------------------------------------------------------------

FUNCTIONS = {
    "groups": lambda x, w, b: convext.conv1d(x, w, b, 2, 1, 1, 2),
    "same": lambda x, w, b: convext.conv1d(x, w, b, 1, "same", 2, 2),
    "causal": lambda x, w, b: convext.conv1d(x, w, b, 1, 0, 2, 2, causal=True),
    "unbatched": lambda x, w, b: convext.conv1d(x[0], w, b, 1, 0, 2, 2),
}


def leaves(*tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


@BACKENDS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_both_modes_and_second_order(name, backend):
    inputs = leaves(X, W, B)
    with convext.backend(backend):
        assert gradcheck(FUNCTIONS[name], inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(FUNCTIONS[name], inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_alone(needed):
    inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate((X, W, B))]
    assert gradcheck(FUNCTIONS["groups"], inputs, check_forward_ad=True)


def test_transforms():
    xs, ws, bs = (torch.stack([t, -t, 2 * t]) for t in (X, W, B))

    def theirs(x, w, b):
        return F.conv1d(x, w, b, 2, 1, 1, 2)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        for in_dims in itertools.product((0, None), repeat=3):
            operands = [many if d == 0 else one for d, many, one in zip(in_dims, (xs, ws, bs), (X, W, B))]
            if in_dims != (None,) * 3:
                close = torch.testing.assert_close
                close(vmap(FUNCTIONS["groups"], in_dims)(*operands), vmap(theirs, in_dims)(*operands))
        of_each = [
            vmap(grad(lambda x, w, f=f: f(x, w, B).square().sum(), (0, 1)), (0, None))(xs, W)
            for f in (theirs, FUNCTIONS["groups"])
        ]
        torch.testing.assert_close(*of_each)
    tangents = [jvp(f, (X, W, B), (X + 1, W - 1, B + 2)) for f in (theirs, FUNCTIONS["groups"])]
    torch.testing.assert_close(*tangents)
    forced = vmap(FUNCTIONS["groups"], (0, None, None))(xs, W, B)
    forced.add_(1)  # no view of what a Function returned


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("form", ["ncw", "nwc"])
def test_no_tensor_needs_data(form, recorded):
    given = [_dense((2, 4, 6), form, torch.float32), W.float(), B.float()]
    given = [t.requires_grad_(recorded) for t in given]
    expected = F.conv1d(*given, groups=2)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in given]
        y = convext.conv1d(*fake, groups=2)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not recorded or [t.shape for t in torch.autograd.grad(y.sum(), fake)] == [t.shape for t in fake]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True, dynamic=True)
    for width in (6, 9, 13):
        found = []
        for function in (FUNCTIONS[name], compiled):
            inputs = leaves(rand(2, 4, width), W, B)
            y = function(*inputs)
            found.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
        torch.testing.assert_close(*found)


def test_weights_that_change_between_calls_are_seen():
    """The packing of filters is kept with the weight that they are a view of."""
    w, x = nn.Parameter(rand(32, 64, 3).float()), rand(1, 64, 50).float()
    with torch.no_grad(), convext.backend("native"):
        convext.conv1d(x, w)
        kept = backends.native.packed_bytes()
        for change in (lambda: w.mul_(2), lambda: w.data.add_(1), lambda: w[3].zero_()):
            change()
            torch.testing.assert_close(convext.conv1d(x, w), F.conv1d(x, w), rtol=1e-4, atol=1e-3)
        for _ in range(3):
            convext.conv1d(x, w)
        assert backends.native.packed_bytes() == kept >= w.numel() * 4
        other = convext.conv2d(x.unsqueeze(3), w.unsqueeze(3))  # filters of another shape of the same memory
        torch.testing.assert_close(other, F.conv2d(x.unsqueeze(3), w.unsqueeze(3)), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(convext.conv1d(x, w), F.conv1d(x, w), rtol=1e-4, atol=1e-3)


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2,), "same", "valid"], ids=str)
def test_every_padding_mode(padding_mode, padding):
    theirs = nn.Conv1d(4, 6, 3, padding=padding, groups=2, padding_mode=padding_mode, dilation=2).double()
    ours = copy.deepcopy(theirs)
    ours.__class__ = convext.nn.Conv1d
    x = rand(2, 4, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))


def test_the_layer_is_torchs_in_all_but_who_computes(tmp_path):
    layer, theirs = convext.nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3)
    assert isinstance(layer, nn.Conv1d) and repr(layer) == repr(theirs)
    theirs.load_state_dict(layer.state_dict())
    x = rand(2, 4, 9).float()
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is convext.nn.Conv1d and torch.equal(again(x), layer(x))
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=True)(x), layer(x))
