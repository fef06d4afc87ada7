"""convext.conv1d and conv3d beside torch.nn.functional's: strides, errors, derivatives, compilers, layers. What each
computes is in test_conv1d.py and test_conv3d.py."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from passes import EVEN_SAME
from places import BACKENDS
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


@dataclass(frozen=True)
class Kind:
    """ours, theirs: the functions. operands: x, w, bias for two groups; small: smaller ones. functions: of three
    operands, the first of them as `plain` computes it with PyTorch. layer: the class's name."""

    axes: int
    ours: Callable
    theirs: Callable
    operands: tuple[torch.Tensor, ...]
    small: tuple[torch.Tensor, ...]
    functions: dict[str, Callable]
    plain: Callable
    layer: str

    def size(self, n):
        return (n,) * self.axes

    def memory(self, shape, form, dtype=torch.float64):
        """Random values: contiguous, the channels together, a part of something larger, or one image for all."""
        values = rand(*shape).to(dtype)
        if form == "last":
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        if form == "part":
            larger = torch.zeros(shape[0], *(n + 1 for n in shape[1:]), dtype=dtype)
            return larger[(slice(None), *map(slice, shape[1:]))].copy_(values)
        return values[:1].expand(shape) if form == "expanded" else values


KINDS = {
    "conv1d": Kind(
        1, convext.conv1d, F.conv1d,
        (rand(2, 4, 6), rand(6, 2, 3), rand(6)), (rand(2, 4, 6), rand(6, 2, 3), rand(6)),
        {
            "groups": lambda x, w, b: convext.conv1d(x, w, b, 2, 1, 1, 2),
            "same": lambda x, w, b: convext.conv1d(x, w, b, 1, "same", 2, 2),
            "causal": lambda x, w, b: convext.conv1d(x, w, b, 1, 0, 2, 2, causal=True),
            "unbatched": lambda x, w, b: convext.conv1d(x[0], w, b, 1, 0, 2, 2),
        },
        lambda x, w, b: F.conv1d(x, w, b, 2, 1, 1, 2), "Conv1d",
    ),
    "conv3d": Kind(
        3, convext.conv3d, F.conv3d,
        (rand(2, 4, 5, 4, 6), rand(6, 2, 3, 3, 3), rand(6)), (rand(2, 4, 3, 3, 3), rand(6, 2, 2, 2, 2), rand(6)),
        {
            "groups": lambda x, w, b: convext.conv3d(x, w, b, (1, 2, 1), 1, 1, 2),
            "same": lambda x, w, b: convext.conv3d(x, w, b, 1, "same", (2, 1, 1), 2),
            "causal": lambda x, w, b: convext.conv3d(x, w, b, 1, (0, 1, 0), 1, 2, causal=True),
            "unbatched": lambda x, w, b: convext.conv3d(x[0], w, b, 1, 1, (2, 1, 2), 2),
        },
        lambda x, w, b: F.conv3d(x, w, b, (1, 2, 1), 1, 1, 2), "Conv3d",
    ),
}  # fmt: skip
FORMS = pytest.mark.parametrize("form", ["first", "last"])
FUNCTIONS = pytest.mark.parametrize("function", ["groups", "same", "causal", "unbatched"])


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def leaves(*tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


# ---- as ATen's -------------------------------------------------------------------------------------------------------


def strides(t):
    """Strides, but for extents of 1, where any stride means the same."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


@pytest.mark.parametrize("backend", [None, "native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [1, 3])
def test_strides_of_results_and_gradients_are_atens(kind, backend, dtype, s):
    for (n, c, width), (k, groups) in itertools.product(((1, 1, 1), (2, 4, 3), (2, 4, 1)), ((1, 1), (4, 1), (4, 4))):
        if c % groups:
            continue
        for x_form, w_form, dy_form in itertools.product(
            ("first", "last", "part", "expanded"), ("first", "last"), ("first", "last", "expanded")
        ):
            x = kind.memory((n, c, *kind.size(width)), x_form, dtype)
            w = kind.memory((k, c // groups, *kind.size(s)), w_form, dtype)
            found = []
            for conv in (kind.theirs, kind.ours):
                given = x.detach().requires_grad_(), w.detach().requires_grad_(), rand(k).to(dtype).requires_grad_()
                with convext.backend(backend):
                    y = conv(*given, 1, s // 2, 1, groups)
                    gradients = torch.autograd.grad(y, given, kind.memory(y.shape, dy_form, dtype))
                    with torch.no_grad():
                        unrecorded = conv(*given, 1, s // 2, 1, groups)
                found.append([strides(t) for t in (y, unrecorded, *gradients)])
            assert found[0] == found[1], (x.shape, x_form, w.shape, w_form, dy_form)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_is_no_view_and_can_be_written(kind, recorded):
    """detach_ refuses views, and autograd those of what a Function returned, or of what was made without it."""
    x, w = rand(2, 4, 9, 4, 5)[(..., *[0] * (3 - kind.axes))], rand(6, 4, *kind.size(3)).requires_grad_()
    with torch.set_grad_enabled(recorded):
        y = kind.ours(x, w)
    with torch.no_grad():
        expected = F.relu(kind.theirs(x, w) + 1)
    assert not y._is_view()
    y.add_(torch.ones(1, dtype=torch.float64, requires_grad=True)).relu_()
    torch.testing.assert_close(y.detach(), expected)
    y.backward(torch.ones_like(y))
    assert w.grad is None if not recorded else not w.grad._is_view()
    y.detach_()


@pytest.mark.parametrize("mode", [FlopCounterMode, FakeTensorMode, None], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_result_under_a_mode_is_no_view(kind, recorded, mode):
    """With grad mode on, whether a gradient is wanted or not."""
    given = [t.clone().requires_grad_(recorded) for t in kind.operands]
    with nullcontext() if mode is None else mode(**{"display": False} if mode is FlopCounterMode else {}) as inside:
        if mode is FakeTensorMode:
            given = [inside.from_tensor(t) for t in given]
        y = kind.ours(*given, groups=2)
        assert not y._is_view()
        y.relu_()
        if recorded:
            assert not any(t._is_view() for t in torch.autograd.grad(y.sum(), given))


def test_floating_point_operations_are_counted_as_pytorchs(kind):
    counted = []
    for conv in (kind.theirs, kind.ours):
        x, w = kind.operands[0].clone().requires_grad_(), rand(6, 4, *kind.size(3)).requires_grad_()
        with FlopCounterMode(display=False) as mode:
            conv(x, w, padding=1).sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] > 0


def bad(kind):
    """Name -> (arguments, keywords, what the error says)."""
    x, w, b = kind.operands
    row = kind.axes == 1
    taps = [3] * kind.axes
    known = r"2D.*3D.*conv1d" if row else r"4D.*5D.*conv3d"
    zeros, minus = ("(0,)", "(-1,)") if row else ("(0, 0, 0)", "(-1, -1, -1)")
    zeros, minus = zeros.replace("(", r"\(").replace(")", r"\)"), minus.replace("(", r"\(").replace(")", r"\)")
    longer = rand(6, 4, kind.operands[0].shape[2] + 1, *taps[1:])
    extents = " x ".join(map(str, x.shape[2:]))

    def shape(*sizes):
        return str(list(sizes)).replace("[", r"\[").replace("]", r"\]")

    return {
        "padding_is_no_known_word": ((x, w, b), dict(groups=2, padding="full"), "padding.*'full'.*'same' or 'valid'"),
        "same_with_a_stride": ((x, w, b), dict(groups=2, padding="same", stride=2), r"same.*strid.*is \(?2"),
        "stride_0": ((x, w, b), dict(groups=2, stride=0), f"stride.*{zeros}"),
        "stride_float": ((x, w, b), dict(groups=2, stride=1.5), "stride.*1.5"),
        "stride_bool": ((x, w, b), dict(groups=2, stride=True), "stride.*True"),
        "stride_of_two": ((x, w, b), dict(groups=2, stride=(1, 1)), r"stride.*\[1, 1\]"),
        "stride_of_none": ((x, w, b), dict(groups=2, stride=()), r"stride.*\[\]"),
        "padding_negative": ((x, w, b), dict(groups=2, padding=-1), f"padding.*{minus}"),
        "padding_none": ((x, w, b), dict(groups=2, padding=None), "padding.*None"),
        "dilation_0": ((x, w, b), dict(groups=2, dilation=0), f"dilation.*{zeros}"),
        "groups_0": ((x, w, b), dict(groups=0), "groups is 0"),
        "groups_float": ((x, w, b), dict(groups=2.0), "groups.*2.0"),
        "k_not_multiple_of_groups":
            ((x, rand(5, 2, *taps)), dict(groups=2), f"weight.*groups=2.*{shape(5, 2, *taps)}"),
        "k_0": ((x, rand(0, 4, *taps)), {}, f"weight.*at least 1 .*{shape(0, 4, *taps)}"),
        "c_does_not_fit": ((x, rand(6, 3, *taps)), dict(groups=2), f"input.*{shape(*x.shape)}.*6 channels.*got 4"),
        "kernel_past_the_input":
            ((x, longer), {}, f"input.*channel: {extents}.*dilation: {longer.shape[2]}"),
        "kernel_past_the_input_by_dilation":
            ((x, w, b), dict(groups=2, dilation=3), f"input.*channel: {extents}.*dilation: 7"),
        "kernel_of_0":
            ((x, rand(6, 4, 0, *taps[1:])), {}, f"weight.*{shape(6, 4, 0, *taps[1:])}"),
        "bias_of_another_size": ((x, w, rand(5)), dict(groups=2), r"bias.*6.*\[5\]"),
        "bias_two_dimensional": ((x, w, rand(1, 6)), dict(groups=2), r"bias.*6.*\[1, 6\]"),
        "bias_of_another_dtype": ((x, w, b.float()), dict(groups=2), "bias.*float64.*float32.*should be the same"),
        "weight_of_another_dtype": ((x, w.float()), dict(groups=2), "weight.*float64.*float32.*should be the same"),
        "weight_two_dimensional": ((x, rand(6, 2)), dict(groups=2), r"weight.*\[6, 2\]"),
        "weight_of_an_image": ((x, rand(6, 2, 1, 3)), dict(groups=2), r"weight.*\[6, 2, 1, 3\]"),
        "input_one_dimensional": ((rand(4), w), dict(groups=2), rf"input.*{known}.*\[4\]"),
        "input_of_other_axes": (
            (rand(1, 4, 4, 4) if row else rand(4, 4, 4), w), dict(groups=2), f"input.*{known[:6]}.*4, 4, 4"
        ),
        "input_a_list": (([1.0], w), {}, "input.*Tensor.*list"),
        "weight_none": ((x, None), {}, "weight.*Tensor.*NoneType"),
        "bias_an_int": ((x, w, 3), dict(groups=2), "bias.*Tensor or None.*int"),
    }  # fmt: skip


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", bad(KINDS["conv1d"]))
def test_bad_input_raises_as_pytorch_and_names_the_argument(kind, name, gradient):
    args, kwargs, message = bad(kind)[name]
    if gradient:
        args = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    with pytest.raises(Exception) as theirs:
        kind.theirs(*args, **kwargs)
    for _ in range(2):  # nothing may be remembered of a call that failed
        with pytest.raises(type(theirs.value), match=f"(?s)\nconvext: .*{message}") as ours:
            kind.ours(*args, **kwargs)
        assert type(ours.value) is type(theirs.value)
        first = str(theirs.value).split(" - got ")[0]  # the list of arguments that follows counts keywords
        assert str(ours.value).startswith(first) and len(first) > 10


@pytest.mark.parametrize("on_meta", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_meta_tensors_beside_others_are_taken_as_pytorch_takes_them(kind, on_meta):
    args = [t.to("meta") if meta else t for t, meta in zip(kind.operands, on_meta)]
    theirs, ours = kind.theirs(*args, groups=2), kind.ours(*args, groups=2)
    assert (ours.shape, ours.device, ours.stride()) == (theirs.shape, theirs.device, theirs.stride())


# What is empty -> batch or None, channels, one extent; filters, their channels, one extent; groups
EMPTY = {
    "no_images": ((0, 4, 3), (6, 4, 3), 1), "no_input_channels": ((2, 0, 3), (6, 0, 3), 1),
    "no_input_channels_in_groups": ((2, 0, 3), (6, 0, 3), 2),
    "one_image_without_channels": ((None, 0, 3), (6, 0, 3), 1),
    "no_filters": ((2, 4, 3), (0, 4, 3), 1), "no_pixels": ((2, 4, 0), (6, 4, 1), 1),
    "no_taps": ((2, 4, 3), (6, 4, 0), 1), "nothing": ((0, 0, 0), (0, 0, 0), 1),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_convolve_is_as_in_pytorch(kind, name, bias):
    (n, c, extent), (k, of_group, taps), groups = EMPTY[name]
    others = (3,) * (kind.axes - 1)
    x_shape = (*(() if n is None else (n,)), c, extent, *others)
    w_shape = (k, of_group, taps, *((1,) * len(others) if taps == 1 else others))

    def outcome(function):
        given = [torch.ones(shape, requires_grad=True) for shape in (x_shape, w_shape, w_shape[:1])]
        try:
            y = function(*given[:2], given[2] if bias else None, 1, 1, 1, groups)
        except RuntimeError as error:
            return type(error)
        y.sum().backward()
        return [(t.shape, t.stride(), t.tolist()) for t in (y, *(t.grad for t in given[: 3 if bias else 2]))]

    assert outcome(kind.ours) == outcome(kind.theirs)


SPELLINGS = {
    "conv1d": [
        dict(stride=(2,)), dict(stride=[2]), dict(padding=torch.Size([1])), dict(stride=torch.tensor(2)),
        dict(padding="valid"), dict(dilation=(2,), padding=(2,)),
    ],
    "conv3d": [
        dict(stride=(2,)), dict(stride=[2, 1, 2]), dict(padding=torch.Size([1, 0, 1])), dict(stride=torch.tensor(2)),
        dict(padding="valid"), dict(dilation=(2, 1, 1), padding=(2,)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), [(name, each) for name, all in SPELLINGS.items() for each in all])
def test_every_spelling_of_sizes(name, arguments):
    kind = KINDS[name]
    ours, theirs = (conv(*kind.operands, groups=2, **arguments) for conv in (kind.ours, kind.theirs))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.int64])
def test_other_dtypes_are_atens(kind, dtype):
    x, w = torch.ones(1, 2, *kind.size(4), dtype=dtype), torch.ones(3, 2, *kind.size(2), dtype=dtype)
    assert torch.equal(kind.ours(x, w), kind.theirs(x, w))


def test_tensor_subclasses_are_heard(kind):
    class Listening(torch.Tensor):
        heard = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, w, b = kind.operands
    y = kind.ours(x.as_subclass(Listening), w, b, groups=2, causal=True)
    assert Listening.heard[0] is kind.ours and type(y) is Listening and y.shape[2] == x.shape[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_context(kind, dtype):
    x, w, b = (t.float().requires_grad_() for t in kind.operands)
    with torch.autocast("cpu", dtype):
        y = kind.ours(x, w, b, groups=2)
        assert y.dtype == dtype == kind.theirs(x, w, b, groups=2).dtype
        assert kind.ours(*kind.operands, groups=2).dtype == torch.float64
    y.sum().backward()
    assert {x.grad.dtype, w.grad.dtype, b.grad.dtype} == {torch.float32}
    assert kind.ours(x, w, b, groups=2).dtype == torch.float32


# ---- derivatives and compilers ---------------------------------------------------------------------------------------


@BACKENDS
@FUNCTIONS
def test_gradients_of_both_modes_and_second_order(kind, function, backend):
    if kind.axes == 3 and (backend not in ("native", "aten") or torch.get_default_device().type != "cpu"):
        pytest.skip("volumes are ATen's there")
    inputs, call = leaves(*kind.small), kind.functions[function]
    with convext.backend(backend):
        assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_alone(kind, needed):
    inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate(kind.small)]
    assert gradcheck(kind.functions["groups"], inputs, check_forward_ad=True)


@FORMS
def test_transforms(kind, form):
    one = kind.memory(kind.small[0].shape, form), *kind.small[1:]
    many = [torch.stack([t, -t, 2 * t]) for t in one]
    ours, theirs = kind.functions["groups"], kind.plain
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        for in_dims in itertools.product((0, None), repeat=3):
            operands = [several if d == 0 else single for d, several, single in zip(in_dims, many, one)]
            if in_dims != (None,) * 3:
                torch.testing.assert_close(vmap(ours, in_dims)(*operands), vmap(theirs, in_dims)(*operands))
        of_each = [
            vmap(grad(lambda x, w, f=f: f(x, w, one[2]).square().sum(), (0, 1)), (0, None))(many[0], one[1])
            for f in (theirs, ours)
        ]
        torch.testing.assert_close(*of_each)
    torch.testing.assert_close(*(jvp(f, one, tuple(t + 1 for t in one)) for f in (theirs, ours)))
    vmap(ours, (0, None, None))(many[0], *one[1:]).add_(1)  # no view of what a Function returned


@pytest.mark.parametrize("recorded", [False, True])
@FORMS
def test_no_tensor_needs_data(kind, form, recorded):
    x, w, b = kind.operands
    given = [kind.memory(x.shape, form, torch.float32), w.float(), b.float()]
    given = [t.requires_grad_(recorded) for t in given]
    expected = kind.theirs(*given, groups=2)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in given]
        y = kind.ours(*fake, groups=2)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not recorded or [t.shape for t in torch.autograd.grad(y.sum(), fake)] == [t.shape for t in fake]


@FORMS
@FUNCTIONS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(kind, function, form):
    torch._dynamo.reset()
    call = kind.functions[function]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for extent in (5, 7, 9):
        found = []
        for either in (call, compiled):
            x = kind.memory((2, 4, *(extent + n % 2 for n in range(kind.axes))), form)
            inputs = leaves(x, *kind.small[1:])
            y = either(*inputs)
            found.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
        torch.testing.assert_close(*found, check_stride=False)


def test_weights_that_change_between_calls_are_seen(kind):
    """The packing of filters is kept with the weight, of rows with the one that they are a view of."""
    w = nn.Parameter(rand(32, 64, *kind.size(3)).float())
    x = rand(1, 64, *((50,) if kind.axes == 1 else (4, 5, 6))).float()
    with torch.no_grad(), convext.backend("native"):
        kind.ours(x, w)
        kept = backends.native.packed_bytes()
        for change in (lambda: w.mul_(2), lambda: w.data.add_(1), lambda: w[3].zero_()):
            change()
            torch.testing.assert_close(kind.ours(x, w), kind.theirs(x, w), rtol=1e-4, atol=1e-3)
        for _ in range(3):
            kind.ours(x, w)
        assert backends.native.packed_bytes() == kept >= w.numel() * 4


# ---- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "each", "same", "valid"], ids=str)
def test_every_padding_mode(kind, padding_mode, padding):
    of_each = (2,) if kind.axes == 1 else (2, 1, 0)
    settings = dict(padding=of_each if padding == "each" else padding, padding_mode=padding_mode, groups=2)
    theirs = getattr(nn, kind.layer)(4, 6, 3, dilation=2 if kind.axes == 1 else (1, 2, 1), **settings).double()
    ours = copy.deepcopy(theirs)
    ours.__class__ = getattr(convext.nn, kind.layer)
    x = rand(2, 4, *((9,) if kind.axes == 1 else (5, 6, 5)))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))


def test_the_layer_is_torchs_in_all_but_who_computes(kind, tmp_path):
    ours, theirs = (getattr(module, kind.layer)(4, 6, 3) for module in (convext.nn, nn))
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    x = rand(2, 4, *kind.size(6)).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(again) is type(ours) and torch.equal(again(x), ours(x))
    torch.save(ours, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=True)(x), ours(x))
