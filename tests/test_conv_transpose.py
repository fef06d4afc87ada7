"""convext.conv_transpose1d, 2d and 3d against float64's definition and torch.nn.functional: values, strides, errors,
derivatives; and the layers."""

import copy
import dataclasses
import itertools
import os
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import MEMORY, Case
from passes import DTYPES
from places import BACKENDS
from reference import Expected, Nest, unit_roundoff
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import convext
from convext import backends


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---- its definition: the gradient of a convolution by its input ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WithBias(Expected):
    """A sum that is rounded to the result's dtype before the bias is added, and again behind it."""

    before: torch.Tensor

    def tolerance(self, dtype):
        return super().tolerance(dtype) + unit_roundoff(dtype) * self.before.abs()


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A transposed convolution: `case` is the convolution whose dgrad it is."""

    case: Case
    output_padding: tuple[int, ...] = (0, 0)
    bias: bool = False
    row: bool = False

    def __str__(self):
        return self.case.name

    def operands(self, dtype):
        """x (what the convolution has as dy), w, bias, dy (what it has as x)."""
        o, case = self.case.operands(dtype, "cpu"), self.case
        return o.dy, o.w, rand(case.w[1] * case.groups).to(dtype) if self.bias else None, o.x

    def expected(self, x, w, bias, dy):
        nest, case = Nest(self.case), self.case
        y, squares = nest.dgrad(x, w), nest.dgrad(x.double() ** 2, w.double() ** 2)
        results = [Expected(y, case.gemm_k("dgrad"), squares)]
        if bias is not None:
            b = bias.double().view(-1, *(1,) * case.axes)
            results = [WithBias(y + b, case.gemm_k("dgrad"), squares, y)]
        x2, w2, dy2 = x.double() ** 2, w.double() ** 2, dy.double() ** 2
        results.append(Expected(nest.fprop(dy, w), case.gemm_k("fprop"), nest.fprop(dy2, w2)))
        results.append(Expected(nest.wgrad(x, dy), case.gemm_k("wgrad"), nest.wgrad(x2, dy2)))
        if bias is not None:
            pixels = nest.batched(dy).double().flatten(2)
            results.append(Expected(pixels.sum((0, 2)), pixels[:, 0].numel(), (pixels**2).sum((0, 2))))
        return results

    def call(self, x, w, bias):
        stride, padding, dilation, groups = self.case.arguments
        settings = stride, padding, self.output_padding, groups, dilation
        if not self.row:
            return getattr(convext, f"conv_transpose{self.case.axes}d")(x, w, bias, *settings)
        settings = [value if isinstance(value, int) else value[1] for value in settings]
        return convext.conv_transpose1d(x.squeeze(-2), w.squeeze(2), bias, *settings).unsqueeze(-2)

    def run(self, x, w, bias, dy):
        x, w, bias = (None if t is None else t.detach().requires_grad_() for t in (x, w, bias))
        y = self.call(x, w, bias)
        return [y, *torch.autograd.grad(y, [t for t in (x, w, bias) if t is not None], dy)]

    def check(self, dtype, backend):
        operands = self.operands(dtype)
        with convext.backend(backend):
            y, *gradients = self.run(*operands)
            with torch.no_grad():
                assert torch.equal(self.call(*operands[:3]), y)
        names = ["y", "dx", "dw", *(["dbias"] if self.bias else [])]
        for name, result, expected in zip(names, (y, *gradients), self.expected(*operands), strict=True):
            expected.check(result, dtype, f"{name} of {self}")


def image(
    name, x, w, stride=(1, 1), padding=(0, 0), output_padding=(0, 0), dilation=(1, 1), groups=1, bias=True, **memory
):
    """Of x (N, K, P, Q) and w (K, C/groups, R, S), or volumes."""
    axes = len(w) - 2
    size = [
        (n - 1) * step - 2 * pad + d * (taps - 1) + longer + 1
        for n, step, pad, d, taps, longer in zip(x[-axes:], stride, padding, dilation, w[2:], output_padding)
    ]
    y = (*x[: -axes - 1], w[1] * groups, *size)
    return Transposed(Case(name, y, w, stride, padding, dilation, groups, **memory), output_padding, bias)


def row(name, x, w, stride=1, padding=0, output_padding=0, dilation=1, **others):
    pairs = (1, stride), (0, padding), (0, output_padding), (1, dilation)
    found = image(name, (*x[:-1], 1, x[-1]), (*w[:2], 1, w[2]), *pairs, **others)
    return dataclasses.replace(found, row=True)


def volume(name, x, w, stride=(1, 1, 1), padding=(0, 0, 0), output_padding=(0, 0, 0), dilation=(1, 1, 1), **others):
    return image(name, x, w, stride, padding, output_padding, dilation, **others)


TRANSPOSED = [
    image("unet_up", (2, 16, 7, 7), (16, 8, 2, 2), (2, 2)),
    image("dcgan", (2, 16, 4, 4), (16, 8, 4, 4), (2, 2), (1, 1)),
    image("dcgan_first", (2, 32, 1, 1), (32, 16, 4, 4), bias=False),
    image("output_padding", (2, 8, 5, 6), (8, 6, 3, 3), (2, 3), (1, 0), (1, 2)),
    image("dilated", (1, 8, 6, 6), (8, 8, 3, 3), (2, 1), (2, 1), (1, 0), (2, 3)),
    image("groups", (2, 12, 5, 5), (12, 2, 3, 3), (2, 2), (1, 1), groups=3),
    image("depthwise", (2, 12, 6, 6), (12, 1, 4, 4), (2, 2), (1, 1), groups=12),
    image("one_tap", (2, 8, 5, 5), (8, 8, 1, 1), (2, 2), (0, 0), (1, 1)),
    image("unbatched", (8, 5, 5), (8, 4, 3, 3), (2, 2)),
    image("one_filter", (2, 1, 6, 6), (1, 16, 3, 3)),
    image("channels_last", (2, 16, 7, 7), (16, 8, 3, 3), (2, 2), dy_memory="channels_last", x_memory="channels_last"),
    image("part_of_more", (2, 8, 7, 7), (8, 8, 3, 3), dy_memory="stepped", x_memory="stepped", w_memory="stepped"),
    row("vocoder", (1, 16, 20), (16, 8, 16), 8, 4),
    row("row_output_padding", (2, 8, 9), (8, 6, 5), 3, 1, 2),
    row("row_dilated", (2, 8, 9), (8, 6, 3), 2, 2, 1, 4),
    row("row_groups", (2, 12, 9), (12, 3, 4), 2, 1, groups=4),
    row("row_depthwise", (2, 12, 9), (12, 1, 4), 2, 1, groups=12, bias=False),
    row("row_unbatched", (8, 9), (8, 4, 4), 2, 1),
    volume("volume_unet_up", (1, 16, 3, 4, 5), (16, 8, 2, 2, 2), (2, 2, 2)),
    volume("volume_output_padding", (2, 8, 3, 4, 3), (8, 6, 3, 3, 3), (2, 3, 2), (1, 0, 1), (1, 2, 0)),
    volume("volume_dilated", (1, 8, 3, 4, 4), (8, 8, 2, 3, 3), (2, 1, 2), (1, 2, 1), (1, 0, 1), (2, 2, 3)),
    volume("volume_groups", (2, 12, 2, 4, 3), (12, 2, 3, 3, 3), (2, 2, 2), (1, 1, 1), groups=3),
    volume("volume_depthwise", (1, 20, 3, 4, 4), (20, 1, 4, 4, 4), (2, 2, 2), (1, 1, 1), groups=20),
    volume("volume_depthwise_multiplier", (1, 12, 3, 4, 4), (12, 1, 2, 3, 3), (3, 3, 3), groups=12),
    volume("volume_planes_alone", (2, 8, 3, 4, 5), (8, 6, 1, 3, 3), bias=False),
    volume("volume_depth_alone", (2, 8, 3, 4, 5), (8, 6, 3, 1, 1), (2, 1, 1)),
    volume("volume_unbatched", (8, 2, 4, 3), (8, 4, 3, 3, 3), (1, 2, 2)),
    volume("volume_channels_last", (2, 16, 3, 4, 3), (16, 8, 3, 3, 3), (2, 2, 2), dy_memory="channels_last",
           x_memory="channels_last"),
    volume("volume_part_of_more", (2, 8, 3, 4, 3), (8, 8, 3, 3, 3), dy_memory="window", x_memory="transposed"),
    row("row_channels_together", (2, 8, 9), (8, 4, 4), 2, 1, dy_memory="channels_last"),
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_it_is_its_definition(case, dtype, backend):
    case.check(dtype, backend)


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
def transposed(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    stride, dilation = pair(1, 3), pair(1, 3)
    longer = tuple(draw(st.integers(0, step - 1)) for step in stride)
    groups, c, k = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 16)), draw(st.integers(1, 16))
    if draw(st.booleans()):
        groups, c = draw(st.integers(1, 20)), 1
    size = pair(1, 8)
    depth = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 2))  # its stride, extent, padding
    others = dict(
        groups=groups,
        bias=draw(st.booleans()),
        dy_memory=draw(WAYS),
        w_memory=draw(WAYS),
        x_memory=draw(st.sampled_from(list(MEMORY))),
    )
    x, w = (draw(st.integers(1, 3)), groups * k, *size), (groups * k, c, *pair(1, 5))
    name, padding = f"fuzz {draw(st.integers(0, 99))}", pair(0, 4)
    axes = draw(st.integers(1, 3))
    if axes == 1:
        x, w = (*x[:2], x[3]), (*w[:2], w[3])
        case = row(name, x, w, stride[1], padding[1], longer[1], dilation[1], **others)
    elif axes == 2:
        case = image(name, x, w, stride, padding, longer, dilation, **others)
    else:
        step, taps, pad = depth
        x, w = (*x[:2], draw(st.integers(1, 4)), *x[2:]), (*w[:2], taps, *w[2:])
        longer = draw(st.integers(0, step - 1)), *longer
        case = volume(name, x, w, (step, *stride), (pad, *padding), longer, (1, *dilation), **others)
    assume(min(case.case.x[2:]) >= 1)
    return case


@FUZZ
@given(transposed(), st.sampled_from(DTYPES), st.sampled_from(["native", "native", "aten"]))
def test_any(case, dtype, backend):
    case.check(dtype, backend)


# ---- as ATen's -------------------------------------------------------------------------------------------------------

NAMES = ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


def both(name):
    return getattr(F, name), getattr(convext, name)


def strides(t):
    """Strides, but for extents of 1, where any stride means the same."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def _dense(shape, form, dtype):
    """Random values: contiguous, the channels together, a part of something larger, or one image for all."""
    values = rand(*shape).to(dtype)
    if form == "nhwc":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if form == "part":
        larger = torch.zeros(shape[0], *(n + 1 for n in shape[1:]), dtype=dtype)
        part = larger[(slice(None), *(slice(n) for n in shape[1:]))]
        return part.copy_(values)
    return values[:1].expand(shape) if form == "expanded" else values


@pytest.mark.parametrize("backend", [None, "native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_strides_of_results_and_gradients_are_atens(name, dtype, backend):
    axes = int(name[-2])
    for (n, k, width), (c, groups), s in itertools.product(
        ((1, 1, 1), (2, 4, 5 if axes < 3 else 3), (2, 4, 1)), ((1, 1), (3, 1), (4, 4)), (1, 3)
    ):
        if k % groups:
            continue
        for x_form, w_form, dy_form in itertools.product(
            ("nchw", "nhwc", "part", "expanded"), ("nchw", "nhwc"), ("nchw", "nhwc", "expanded")
        ):
            x = _dense((n, k, *(width,) * axes), x_form, dtype)
            w = _dense((k, c // groups, *(s,) * axes), w_form, dtype)
            found = []
            for function in both(name):
                leaves = x.detach().requires_grad_(), w.detach().requires_grad_(), rand(c).to(dtype).requires_grad_()
                with convext.backend(backend):
                    y = function(*leaves, 1, s // 2, 0, groups)
                    gradients = torch.autograd.grad(y, leaves, _dense(y.shape, dy_form, dtype))
                    with torch.no_grad():
                        unrecorded = function(*leaves, 1, s // 2, 0, groups)
                found.append([strides(t) for t in (y, unrecorded, *gradients)])
            assert found[0] == found[1], (x.shape, x_form, w.shape, w_form, dy_form)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_no_view_and_can_be_written(name, recorded):
    axes = int(name[-2])
    x, w = rand(2, 4, *(5,) * axes), rand(4, 6, *(3,) * axes).requires_grad_()
    theirs, ours = both(name)
    with torch.set_grad_enabled(recorded):
        y = ours(x, w)
    with torch.no_grad():
        expected = F.relu(theirs(x, w) + 1)
    assert not y._is_view()
    y.add_(torch.ones(1, dtype=torch.float64, requires_grad=True)).relu_()
    torch.testing.assert_close(y.detach(), expected)
    y.backward(torch.ones_like(y))
    assert w.grad is None if not recorded else not w.grad._is_view()
    y.detach_()


@pytest.mark.parametrize("mode", [FlopCounterMode, FakeTensorMode, None], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_under_a_mode_is_no_view(name, recorded, mode):
    """With grad mode on, whether a gradient is wanted or not."""
    axes, ours = int(name[-2]), both(name)[1]
    shapes = (2, 4, *(5,) * axes), (4, 6, *(3,) * axes), (6,)
    given = [rand(*shape).requires_grad_(recorded) for shape in shapes]
    with nullcontext() if mode is None else mode(**{"display": False} if mode is FlopCounterMode else {}) as inside:
        if mode is FakeTensorMode:
            given = [inside.from_tensor(t) for t in given]
        y = ours(*given)
        assert not y._is_view()
        y.relu_()
        if recorded:
            assert not any(t._is_view() for t in torch.autograd.grad(y.sum(), given))


BAD = {
    "padding_a_word": (dict(padding="same"), "padding.*'same'"),
    "stride_0": (dict(stride=0), r"stride.*\(0,"),
    "stride_float": (dict(stride=1.5), "stride.*1.5"),
    "stride_of_four": (dict(stride=(1, 1, 1, 1)), r"stride.*\[1, 1, 1, 1\]"),
    "padding_negative": (dict(padding=-1), r"padding.*\(-1,"),
    "output_padding_negative": (dict(output_padding=-1), r"output_padding.*\(-1,"),
    "output_padding_float": (dict(output_padding=0.5), "output_padding.*0.5"),
    "dilation_0": (dict(dilation=0), r"dilation.*\(0,"),
    "groups_0": (dict(groups=0), "groups is 0"),
    "groups_float": (dict(groups=2.0), "groups.*2.0"),
    "k_not_multiple_of_groups": (dict(weight=(5, 2), groups=2), r"weight.*groups=2.*\[5, 2, 3"),
    "k_does_not_fit": (dict(weight=(6, 2)), r"input.*\[2, 4, 5.*6 channels.*got 4"),
    "kernel_of_0": (dict(weight=(4, 2, 0)), r"weight.*\[4, 2, 0"),
    "padding_beyond_the_result": (dict(padding=4), r"input.*size per channel.*-1.*too small"),
    "bias_of_another_size": (dict(bias=(5,)), r"bias.*2.*\[5\]"),
    "bias_two_dimensional": (dict(bias=(1, 2)), r"bias.*2.*\[1, 2\]"),
    "weight_of_another_dtype": (dict(weight=torch.float32), "weight.*float64.*float32.*should be the same"),
    "input_a_list": (dict(input=[1.0]), "input.*Tensor.*list"),
    "weight_none": (dict(weight=None), "weight.*Tensor.*NoneType"),
    "weight_flat": (dict(weight=rand(4, 2)), r"weight.*\[4, 2\]"),
    "input_flat": (dict(input=rand(4)), r"input.*\(batched\).*\[4\]"),
}


def operands(axes, input=None, weight=(4, 2), bias=(2,), **others):
    def of(value, shape):
        if isinstance(value, torch.dtype):
            return rand(*shape).to(value)
        return rand(*value) if isinstance(value, tuple) else value

    if isinstance(weight, tuple):
        weight = (*weight[:2], *(weight[2:] * axes or (3,) * axes))
    return (
        rand(2, 4, *(5,) * axes) if input is None else input,
        of(weight, (4, 2, *(3,) * axes)),
        of(bias, (2,)),
    ), others


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_raises_as_pytorch_and_names_the_argument(name, bad, gradient):
    changes, message = BAD[bad]
    args, kwargs = operands(int(name[-2]), **changes)
    args = [t.detach().requires_grad_(gradient) if isinstance(t, torch.Tensor) else t for t in args]
    theirs, ours = both(name)
    with pytest.raises(Exception) as expected:
        theirs(*args, **kwargs)
    for _ in range(2):
        with pytest.raises(type(expected.value), match=f"(?s)\nconvext: .*{message}") as found:
            ours(*args, **kwargs)
        assert type(found.value) is type(expected.value)
        first = str(expected.value).split(" - got ")[0]  # the list of arguments that follows counts keywords
        assert str(found.value).startswith(first) and len(first) > 10


def outcome(function, shapes, *settings, dtype=torch.float32):
    """The result with its gradients, or the error's type and text."""
    leaves = [rand(*shape).to(dtype).requires_grad_() for shape in shapes]
    try:
        y = function(*leaves, *settings)
    except RuntimeError as error:
        return type(error), str(error).split("\nconvext")[0]
    gradients = torch.autograd.grad(y.sum(), leaves)
    return [(t.shape, strides(t)) for t in (y, *gradients)], y.detach(), *gradients


ODD = {
    "no_images": (((0, 4, 5), (4, 2, 3), (2,)), ()),
    "no_channels": (((2, 0, 5), (0, 2, 3), (2,)), ()),
    "no_outputs": (((2, 4, 5), (4, 0, 3), (0,)), ()),
    "no_pixels": (((2, 4, 0), (4, 2, 3), (2,)), ()),
    "no_taps": (((2, 4, 5), (4, 2, 0), (2,)), ()),
    "output_padding_of_a_stride": (((2, 4, 5), (4, 2, 3), (2,)), (1, 0, 1, 1, 1)),
    "output_padding_within_the_dilation": (((2, 4, 5), (4, 2, 3), (2,)), (1, 0, 1, 1, 2)),
    "output_padding_beyond_both": (((2, 4, 5), (4, 2, 3), (2,)), (2, 0, 3, 1, 2)),
    "nothing_left": (((2, 4, 5), (4, 2, 3), (2,)), (1, 4)),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", NAMES)
def test_odd_input_is_as_in_pytorch(name, odd):
    """Zero extents, and outputs that no input reaches: the same result and gradients, or the same error."""
    shapes, settings = ODD[odd]
    more = int(name[-2]) - 1
    shapes = [(*shape, *shape[-1:] * more) if len(shape) == 3 else shape for shape in shapes]
    theirs, ours = (outcome(function, shapes, *settings) for function in both(name))
    assert type(theirs) is type(ours) and theirs[0] == ours[0]
    if isinstance(theirs[0], list):
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-5)
    else:
        assert theirs == ours


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling(name):
    args, _ = operands(int(name[-2]))
    theirs, ours = both(name)
    n = int(name[-2])
    for arguments in (
        dict(stride=(2,)), dict(stride=[2] * n), dict(padding=torch.Size([1] * n)), dict(stride=torch.tensor(2)),
        dict(stride=2, output_padding=[1] * n), dict(dilation=(2,), padding=(2,)),
    ):  # fmt: skip
        torch.testing.assert_close(ours(*args, **arguments), theirs(*args, **arguments))


@pytest.mark.parametrize("on_meta", list(itertools.product((0, 1), repeat=3)), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_beside_others_are_taken_as_pytorch_takes_them(name, on_meta):
    args = [t.to("meta") if meta else t for t, meta in zip(operands(int(name[-2]))[0], on_meta)]
    theirs, ours = (outcome_of_meta(function, args) for function in both(name))
    assert theirs == ours


def outcome_of_meta(function, args):
    try:
        y = function(*args)
    except (RuntimeError, NotImplementedError) as error:
        return type(error)
    return y.shape, y.device, y.stride()


def test_a_bias_of_another_dtype_is_taken_as_pytorch_takes_it():
    (x, w, b), _ = operands(1)
    assert torch.equal(convext.conv_transpose1d(x, w, b.float()), F.conv_transpose1d(x, w, b.float()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_other_dtypes_are_atens(dtype):
    x, w = torch.ones(1, 2, 5, dtype=dtype), torch.ones(2, 3, 3, dtype=dtype)
    assert torch.equal(convext.conv_transpose1d(x, w), F.conv_transpose1d(x, w))


@pytest.mark.parametrize("name", NAMES)
def test_tensor_subclasses_are_heard(name):
    class Listening(torch.Tensor):
        heard = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    (x, w, b), _ = operands(int(name[-2]))
    theirs, ours = both(name)
    y = ours(x.as_subclass(Listening), w, b, stride=2, output_padding=1)
    assert Listening.heard[0] is ours and type(y) is Listening
    torch.testing.assert_close(y.as_subclass(torch.Tensor), theirs(x, w, b, stride=2, output_padding=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_follows_the_context(name, dtype):
    tensors = operands(int(name[-2]))[0]
    leaves = [t.float().requires_grad_() for t in tensors]
    function = both(name)[1]
    with torch.autocast("cpu", dtype):
        y = function(*leaves, stride=2)
        assert y.dtype == dtype == both(name)[0](*leaves, stride=2).dtype
        assert function(*tensors).dtype == torch.float64
    y.sum().backward()
    assert {t.grad.dtype for t in leaves} == {torch.float32}


@pytest.mark.parametrize("recorded", [False, True])
def test_results_of_few_channels_are_atens(recorded):
    """Whose vectors would be mostly empty; not where a backend is asked for, nor of more channels."""
    if backends.unavailable("native", "cpu"):
        pytest.skip("the compiled library is not there")
    settings = dict(stride=2, padding=1, output_padding=(1, 0))
    for channels, form, name, expected in (
        (3, "nhwc", None, "aten"), (3, "nhwc", "native", "native"), (3, "nchw", None, "native"),
        (8, "nhwc", None, "native"),
    ):  # fmt: skip
        w, b = rand(16, channels, 3, 3).float().requires_grad_(recorded), rand(channels).float()
        x = _dense((2, 16, 9, 8), form, torch.float32)
        backends.reset_counts()
        with convext.backend(name):
            y = convext.conv_transpose2d(x, w, b, **settings)
        ((backend, _, _),) = backends.counts()
        assert backend == expected
        torch.testing.assert_close(y, F.conv_transpose2d(x, w, b, **settings), rtol=1e-5, atol=1e-4)
        assert strides(y) == strides(F.conv_transpose2d(x, w, b, **settings))


# ---- derivatives and compilers ---------------------------------------------------------------------------------------

SETTINGS = dict(stride=2, padding=1, output_padding=1, groups=2)
FUNCTIONS = {
    "rows": (lambda x, w, b: convext.conv_transpose1d(x, w, b, **SETTINGS), 1),
    "dilated_rows": (lambda x, w, b: convext.conv_transpose1d(x[0], w, b, groups=2, dilation=2), 1),
    "images": (lambda x, w, b: convext.conv_transpose2d(x, w, b, **SETTINGS), 2),
    "dilated_images": (lambda x, w, b: convext.conv_transpose2d(x[0], w, b, groups=2, dilation=(1, 2)), 2),
    "volumes": (lambda x, w, b: convext.conv_transpose3d(x, w, b, **SETTINGS), 3),
    "dilated_volumes": (lambda x, w, b: convext.conv_transpose3d(x[0], w, b, groups=2, dilation=(2, 1, 2)), 3),
}


def tensors(axes):
    return rand(2, 4, *(3 if axes < 3 else 2,) * axes), rand(4, 3, *(3,) * axes), rand(6)


def leaves(axes):
    return tuple(t.clone().requires_grad_() for t in tensors(axes))


@BACKENDS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_both_modes_and_second_order(name, backend):
    function, axes = FUNCTIONS[name]
    inputs = leaves(axes)
    with convext.backend(backend):
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("name", ["rows", "images", "volumes"])
def test_gradients_of_some_inputs_alone(name, needed):
    function, axes = FUNCTIONS[name]
    inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors(axes))]
    assert gradcheck(function, inputs, check_forward_ad=True)


@pytest.mark.parametrize("name", ["rows", "images", "volumes"])
def test_transforms(name):
    function, axes = FUNCTIONS[name]
    one = tensors(axes)
    many = [torch.stack([t, -t, 2 * t]) for t in one]

    def theirs(x, w, b):
        return getattr(F, f"conv_transpose{axes}d")(x, w, b, **SETTINGS)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        for in_dims in itertools.product((0, None), repeat=3):
            given = [several if d == 0 else single for d, several, single in zip(in_dims, many, one)]
            if in_dims != (None,) * 3:
                torch.testing.assert_close(vmap(function, in_dims)(*given), vmap(theirs, in_dims)(*given))
        of_each = [
            vmap(grad(lambda x, w, f=f: f(x, w, one[2]).square().sum(), (0, 1)), (0, None))(many[0], one[1])
            for f in (theirs, function)
        ]
        torch.testing.assert_close(*of_each)
    tangents = [jvp(f, one, tuple(t + 1 for t in one)) for f in (theirs, function)]
    torch.testing.assert_close(*tangents)
    vmap(function, (0, None, None))(many[0], *one[1:]).add_(1)  # no view of what a Function returned


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_needs_data(name, form, recorded):
    axes = int(name[-2])
    given = [_dense((2, 4, *(5,) * axes), form, torch.float32), rand(4, 6, *(3,) * axes).float(), rand(6).float()]
    given = [t.requires_grad_(recorded) for t in given]
    theirs, ours = both(name)
    expected = theirs(*given, stride=2)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in given]
        y = ours(*fake, stride=2)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not recorded or [t.shape for t in torch.autograd.grad(y.sum(), fake)] == [t.shape for t in fake]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(name, autocast):
    torch._dynamo.reset()
    function, axes = FUNCTIONS[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for width in (5, 8, 11):
        found = []
        for f in (function, compiled):
            inputs = [t.clone().requires_grad_() for t in (rand(2, 4, *(width,) * axes), *tensors(axes)[1:])]
            if autocast:
                inputs = [t.detach().float().requires_grad_() for t in inputs]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = f(*inputs)
            found.append((y, *torch.autograd.grad(y.float().sin().sum() if autocast else y.sin().sum(), inputs)))
        torch.testing.assert_close(*found)


# ---- the layers ------------------------------------------------------------------------------------------------------

LAYERS = [
    (nn.ConvTranspose1d, convext.nn.ConvTranspose1d, 1),
    (nn.ConvTranspose2d, convext.nn.ConvTranspose2d, 2),
    (nn.ConvTranspose3d, convext.nn.ConvTranspose3d, 3),
]


@pytest.mark.parametrize("theirs, ours, axes", LAYERS, ids=NAMES)
def test_the_layer_is_torchs_in_all_but_who_computes(theirs, ours, axes, tmp_path):
    layer = ours(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    plain = theirs(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    assert isinstance(layer, theirs) and repr(layer) == repr(plain)
    plain.load_state_dict(layer.state_dict())
    x = rand(2, 4, *(9,) * axes).float()
    for call in ((x,), (x[0],), (x, [17] * axes), (x, [18] * axes), (x, [2, 6, *(17,) * axes])):
        torch.testing.assert_close(layer(*call), plain(*call), rtol=1e-5, atol=1e-5)
    for wrong in ([16] * axes, [19] * axes, [17] * 6):
        with pytest.raises(ValueError) as expected:
            plain(x, wrong)
        with pytest.raises(ValueError) as found:
            layer(x, wrong)
        assert str(found.value) == str(expected.value)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is ours and torch.equal(again(x), layer(x))
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=True)(x), layer(x))
    plain.__class__ = ours
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("theirs, ours, axes", LAYERS, ids=NAMES)
def test_another_padding_mode_raises_as_torchs(theirs, ours, axes):
    for kind in (theirs, ours):
        with pytest.raises(ValueError, match='Only "zeros" padding mode is supported for ConvTranspose'):
            kind(4, 6, 3, padding_mode="circular")
        layer = kind(4, 6, 3)
        layer.padding_mode = "circular"
        with pytest.raises(ValueError, match=rf"Only `zeros` padding mode is supported for {theirs.__name__}"):
            layer(rand(1, 4, *(5,) * axes).float())
