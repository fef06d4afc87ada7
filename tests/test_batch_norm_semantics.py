"""`conv_bn_relu` and `ConvBNReLU` mean what F.conv2d, F.batch_norm and nn.BatchNorm2d mean, to the letter."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from places import BACKENDS, backends, default_device

import convext
from convext.backends import unavailable


def operands(dtype=torch.float64, k=5, n=3):
    generator = torch.Generator("cpu").manual_seed(1)

    def draw(*shape):
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
        return drawn.to(torch.get_default_device(), dtype)

    return dict(
        x=draw(n, 4, 6, 5), w=draw(k, 4, 3, 3), bias=draw(k), mean=draw(k), var=draw(k).square() + 0.5, gamma=draw(k),
        beta=draw(k), residual=draw(n, k, 6, 5),
    )  # fmt: skip


def ours(o, **arguments):
    return convext.conv_bn_relu(
        o["x"], o["w"], o["bias"], o["mean"], o["var"], o["gamma"], o["beta"], padding=1, **arguments
    )


def theirs(o, training=False, momentum=0.1, eps=1e-5, residual=None):
    y = F.conv2d(o["x"], o["w"], o["bias"], padding=1)
    z = F.batch_norm(y, o["mean"], o["var"], o["gamma"], o["beta"], training, momentum, eps)
    return F.relu(z if residual is None else z + residual)


def copied(o):
    return {name: None if t is None else t.clone() for name, t in o.items()}


@BACKENDS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    "absent", [(), ("bias",), ("gamma",), ("beta",), ("gamma", "beta"), ("bias", "gamma", "beta")], ids=str
)
def test_absent_parts(absent, training, backend):
    o = {name: None if name in absent else t for name, t in operands().items()}
    a, b = copied(o), copied(o)
    with convext.backend(backend):
        torch.testing.assert_close(ours(a, training=training), theirs(b, training))
    assert torch.equal(a["mean"], o["mean"]) == (not training)
    torch.testing.assert_close((a["mean"], a["var"]), (b["mean"], b["var"]))


@BACKENDS
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_variance_is_unbiased_and_moves_by_momentum(momentum, backend):
    o = operands()
    a, b = copied(o), copied(o)
    with convext.backend(backend):
        ours(a, training=True, momentum=momentum)
    theirs(b, True, momentum)
    torch.testing.assert_close((a["mean"], a["var"]), (b["mean"], b["var"]))
    y = F.conv2d(o["x"], o["w"], o["bias"], padding=1)
    unbiased = y.transpose(0, 1).flatten(1).var(1, unbiased=True)
    torch.testing.assert_close(a["var"], (1 - momentum) * o["var"] + momentum * unbiased)


@BACKENDS
def test_no_tracked_statistics_uses_those_of_the_batch(backend):
    o = operands() | dict(mean=None, var=None)
    with convext.backend(backend):
        torch.testing.assert_close(ours(o, training=True), theirs(o, True))


def test_statistics_must_be_there_in_inference():
    o = operands() | dict(mean=None, var=None)
    with pytest.raises(RuntimeError) as raised:
        theirs(o)
    with pytest.raises(raised.type, match="running_mean"):
        ours(o)


@BACKENDS
def test_residual_is_added_before_the_activation(backend):
    o = operands()
    with convext.backend(backend):
        for training in (False, True):
            a, b = copied(o), copied(o)
            torch.testing.assert_close(
                ours(a, training=training, residual=a["residual"]), theirs(b, training, residual=b["residual"])
            )


@BACKENDS
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
def test_eps(eps, backend):
    o = operands() | dict(var=torch.zeros(5, dtype=torch.float64))
    with convext.backend(backend):
        for training in (False, True):
            expected = theirs(copied(o), training, eps=eps)
            torch.testing.assert_close(ours(copied(o), training=training, eps=eps), expected)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_in_float32_beside_images_in_half_precision(dtype, backend):
    """Mixed, as `model.half()` with the batch norms kept in float32 leaves it."""
    o = operands()
    low = {name: t.to(dtype if name in ("x", "w", "bias", "residual") else torch.float32) for name, t in o.items()}
    expected = theirs({name: t.double() for name, t in low.items()})
    with convext.backend(backend):
        actual = ours(copied(low))
        assert actual.dtype == dtype
        # Three roundings to `dtype` at most: of the convolution, the normalised value and the result.
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=3 * torch.finfo(dtype).eps * 16)
        trained = copied(low)
        ours(trained, training=True)
    assert trained["mean"].dtype == trained["var"].dtype == torch.float32
    reference = {name: t.double() for name, t in low.items()}
    theirs(reference, True)
    torch.testing.assert_close(trained["var"].double(), reference["var"], rtol=4 * torch.finfo(dtype).eps, atol=0)


@BACKENDS
def test_one_value_per_channel_in_training_is_refused(backend):
    x, w = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 3, 3)
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        F.batch_norm(F.conv2d(x, w), mean, var, training=True)
    with convext.backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
        convext.conv_bn_relu(x, w, None, mean, var, None, None, training=True)
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))


@backends()
@pytest.mark.parametrize(
    "broken",
    [
        dict(gamma=torch.ones(4, dtype=torch.float64)),
        dict(beta=torch.ones(7, dtype=torch.float64)),
        dict(bias=torch.ones(6, dtype=torch.float64)),
        dict(var=torch.ones(4, dtype=torch.float64)),
        dict(mean=torch.ones(4, dtype=torch.float64)),
        dict(w=torch.ones(5, 3, 3, 3, dtype=torch.float64)),
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_running_statistics_stay_as_they_were_on_error(broken, backend):
    o = operands()
    before = o["mean"].clone(), o["var"].clone()
    with convext.backend(backend), pytest.raises(RuntimeError) as raised:
        ours(o | broken, training=True)
    argument = {"gamma": "bn_weight", "beta": "bn_bias", "mean": "running_mean", "var": "running_var"}
    (name,) = broken
    assert argument.get(name, {"w": "weight"}.get(name, name)) in str(raised.value)
    assert torch.equal(o["mean"], before[0]) and torch.equal(o["var"], before[1])


@BACKENDS
def test_wrong_residual_leaves_the_statistics_alone(backend):
    o = operands()
    before = o["mean"].clone(), o["var"].clone()
    with convext.backend(backend), pytest.raises(RuntimeError, match="residual"):
        ours(o, training=True, residual=torch.ones(3, 5, 7, 7, dtype=torch.float64))
    assert torch.equal(o["mean"], before[0]) and torch.equal(o["var"], before[1])


def test_unknown_activation_names_those_there_are():
    with pytest.raises(ValueError, match="relu6.*silu.*hardswish.*gelu"):
        ours(operands(), activation="tanh")


# The module.


class Plain(nn.Module):
    """What ConvBNReLU(4, 5, 3, padding=1, ...) stands for."""

    def __init__(self, bias=False, **arguments):
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(5, **arguments)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def both(**arguments):
    """ConvBNReLU and its unfused twin in float64, with the same parameters in the same order."""
    torch.manual_seed(0)
    fused = convext.nn.ConvBNReLU(4, 5, 3, padding=1, **arguments).double()
    plain = Plain(**arguments).double()
    mine, other = fused.state_dict(), plain.state_dict()
    assert [t.shape for t in mine.values()] == [t.shape for t in other.values()]
    plain.load_state_dict(dict(zip(other, mine.values(), strict=True)))
    return fused, plain


def same_state(fused, plain):
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@BACKENDS
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(momentum=None),
        dict(momentum=0.5, eps=1e-3),
        dict(affine=False),
        dict(track_running_stats=False),
        dict(affine=False, track_running_stats=False),
        dict(bias=True),
    ],
    ids=str,
)
def test_module_trains_and_infers_as_batch_norm_does(arguments, backend):
    fused, plain = both(**arguments)
    with convext.backend(backend):
        for _ in range(3):
            x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = fused(a), plain(b)
            torch.testing.assert_close(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad)
            for mine, other in zip(fused.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, other.grad)
            same_state(fused, plain)
        fused.eval(), plain.eval()
        x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
        torch.testing.assert_close(fused(x), plain(x))
        same_state(fused, plain)
    if arguments.get("track_running_stats", True):
        (count,) = [t for name, t in fused.state_dict().items() if name.endswith("num_batches_tracked")]
        assert count.item() == 3


@BACKENDS
def test_frozen_batch_norm_inside_a_training_model(backend):
    """The batch norm alone in eval(): statistics are used, not moved; gamma and beta still learn."""
    fused, plain = both()
    with convext.backend(backend):
        model = nn.Sequential(fused)
        fused(torch.randn(2, 4, 6, 5, dtype=torch.float64))
        plain.load_state_dict(dict(zip(plain.state_dict(), fused.state_dict().values(), strict=True)))
        model.train()
        fused.eval()
        plain.eval()
        x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
        y, expected = model(x), plain(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        for mine, other in zip(fused.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
        same_state(fused, plain)


@BACKENDS
def test_module_counts_no_batch_that_failed(backend):
    fused, _ = both()
    before = copy.deepcopy(fused.state_dict())
    with convext.backend(backend), pytest.raises(RuntimeError):
        fused(torch.randn(2, 3, 6, 5, dtype=torch.float64))
    for name, t in fused.state_dict().items():
        assert torch.equal(t, before[name]), name


# NaN and infinity.


# Without gelu in float32: ATen's vectorised one makes NaN of +infinity, where its own in float64 keeps it.
NOT_FINITE = [
    (activation, dtype)
    for activation in ("identity", "relu", "relu6", "silu", "hardswish", "gelu")
    for dtype in (torch.float32, torch.float64)
    if (activation, dtype) != ("gelu", torch.float32)
]


@BACKENDS
@pytest.mark.parametrize(("activation", "dtype"), NOT_FINITE, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_pass_as_they_do_in_pytorch(value, activation, dtype, backend):
    function = {"identity": lambda z: z}.get(activation) or getattr(F, activation)
    o = operands(dtype)
    o["x"][1, 2, 3, 3] = value
    on_cpu = {name: t.cpu() for name, t in o.items()}  # cuDNN's algorithms may spread what is not finite
    z = F.conv2d(on_cpu["x"], on_cpu["w"], on_cpu["bias"], padding=1)
    expected = function(F.batch_norm(z, *(on_cpu[name] for name in ("mean", "var", "gamma", "beta"))))
    with convext.backend(backend):
        actual = ours(o, activation=activation).cpu()
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        y = convext.conv2d(o["x"], o["w"], o["bias"], padding=1).cpu()
    assert not y.isfinite().all()
    assert torch.equal(y.isnan(), z.isnan()) and torch.equal(y.isinf(), z.isinf())


@BACKENDS
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_in_the_gradient_and_the_weight_passes(groups, backend):
    x, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 4 // groups, 3, 3, requires_grad=True)
    dy = torch.randn(2, 4, 5, 5)
    dy[0, 1, 2, 2] = float("nan")
    with convext.backend(backend):
        actual = torch.autograd.grad(convext.conv2d(x, w, padding=1, groups=groups), (x, w), dy)
    x, w, dy = x.cpu(), w.cpu(), dy.cpu()
    expected = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=groups), (x, w), dy)
    for a, b in zip(actual, expected, strict=True):
        assert b.isnan().any() and torch.equal(a.isnan().cpu(), b.isnan())


# Autocast.


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_the_dtype_of_the_context(dtype, backend):
    o = {name: t.requires_grad_(name not in ("mean", "var")) for name, t in operands(torch.float32).items()}
    with convext.backend(backend), torch.autocast(default_device(), dtype=dtype):
        y = convext.conv2d(o["x"], o["w"], o["bias"], padding=1)
        expected = F.conv2d(o["x"], o["w"], o["bias"], padding=1)
        assert y.dtype == expected.dtype == dtype
        z = ours(o, training=True)
        theirs_z = theirs(copied({name: t.detach() for name, t in operands(torch.float32).items()}), True)
        assert z.dtype == theirs_z.dtype == dtype
        assert convext.conv2d(o["x"].double(), o["w"].double(), padding=1).dtype == torch.float64
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(z, theirs_z, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    z.float().square().sum().backward()
    for name in ("x", "w", "gamma", "beta"):
        assert o[name].grad.dtype == torch.float32 and o[name].grad.isfinite().all() and o[name].grad.any()


# Errors.


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "input has too few dimensions": ("input", (f(4, 5), f(2, 4, 3, 3)), {}),
    "input has too many dimensions": ("input", (f(1, 1, 4, 5, 5), f(2, 4, 3, 3)), {}),
    "weight has too few dimensions": ("weight", (f(1, 4, 5, 5), f(2, 4, 3)), {}),
    "weight is of another dtype": ("weight", (f(1, 4, 5, 5), f(2, 4, 3, 3, dtype=torch.float64)), {}),
    "bias is of another dtype": ("bias", (f(1, 4, 5, 5), f(2, 4, 3, 3), f(2, dtype=torch.float64)), {}),
    "bias has another length": ("bias", (f(1, 4, 5, 5), f(2, 4, 3, 3), f(3)), {}),
    "bias has two dimensions": ("bias", (f(1, 4, 5, 5), f(2, 4, 3, 3), f(2, 1)), {}),
    "channels do not match": ("input", (f(1, 3, 5, 5), f(2, 4, 3, 3)), {}),
    "channels do not match under groups": ("groups", (f(1, 4, 5, 5), f(4, 4, 3, 3)), dict(groups=2)),
    "filters not divisible by groups": ("groups", (f(1, 4, 5, 5), f(3, 2, 3, 3)), dict(groups=2)),
    "groups is zero": ("groups", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(groups=0)),
    "groups is negative": ("groups", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(groups=-1)),
    "groups is a float": ("groups", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(groups=1.0)),
    "stride is zero": ("stride", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(stride=0)),
    "stride is negative": ("stride", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(stride=(1, -1))),
    "stride has three numbers": ("stride", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(stride=(1, 1, 1))),
    "stride is a float": ("stride", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(stride=1.5)),
    "stride is a string": ("stride", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(stride="2")),
    "padding is negative": ("padding", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(padding=-1)),
    "padding is no word": ("padding", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(padding="full")),
    "padding is same under a stride": ("stride", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(padding="same", stride=2)),
    "dilation is zero": ("dilation", (f(1, 4, 5, 5), f(2, 4, 3, 3)), dict(dilation=0)),
    "kernel larger than padded input": ("input", (f(1, 4, 5, 5), f(2, 4, 7, 3)), {}),
    "input is integer beside a float weight": ("input|weight", (f(1, 4, 5, 5, dtype=torch.int64), f(2, 4, 3, 3)), {}),
    "input is no tensor": ("input", ([1.0], f(2, 4, 3, 3)), {}),
    "weight is None": ("weight", (f(1, 4, 5, 5), None), {}),
}


@backends()
@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_as_conv2d_does_and_names_the_argument(what, backend):
    argument, operands, arguments = BAD[what]
    with pytest.raises(Exception) as theirs:
        F.conv2d(*operands, **arguments)
    with convext.backend(backend), pytest.raises(theirs.type, match=argument):
        convext.conv2d(*operands, **arguments)


def test_bad_depthwise_input_names_the_argument():
    with pytest.raises(RuntimeError, match="weight"):
        convext.depthwise_conv2d(f(1, 4, 5, 5), f(4, 2, 3, 3))
    with pytest.raises(RuntimeError, match="weight"):
        convext.depthwise_conv2d(f(1, 4, 5, 5), f(6, 1, 3, 3))


def far_from_zero(channels_last, n=6, c=20, height=37):
    """Data of mean 1e4 and deviation 1 in float32, and filters that turn signs and order of its channels round: each
    product is exact, so that what errs is the batch norm."""
    generator = torch.Generator("cpu").manual_seed(3)
    x = torch.randn(n, c, height, 11, generator=generator, device="cpu") + 1e4
    w = (torch.eye(c, device="cpu").flip(0) * torch.tensor([1.0, -1.0], device="cpu").repeat(c // 2)).view(c, c, 1, 1)
    gamma, beta = torch.randn(2, c, generator=generator, device="cpu")
    dout = torch.randn(x.shape, generator=generator, device="cpu")
    place = torch.get_default_device()
    x = x.to(place, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x, *(t.to(place) for t in (w, gamma, beta, dout))


@BACKENDS
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_of_a_mean_far_from_zero_are_within_1e_5_of_float64(channels_last, backend):
    x, w, gamma, beta, _ = far_from_zero(channels_last)
    mean, var = torch.zeros(2, len(gamma))
    with convext.backend(backend):
        convext.conv_bn_relu(x, w, None, mean, var, gamma, beta, training=True, momentum=1.0)
    y = F.conv2d(x.double(), w.double()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), y.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(var.double(), y.var(1), rtol=1e-5, atol=0)


@pytest.mark.skipif(unavailable("native", "cpu") is not None, reason="the library is not built")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_of_a_mean_far_from_zero_are_within_1e_5_of_float64(channels_last, activation, recompute):
    """In float32 the mean itself is rounded by 5e-4, and PyTorch's float32 results are that far off."""
    x, w, gamma, beta, dout = (t.cpu() for t in far_from_zero(channels_last))
    found = []
    for dtype in (torch.float32, torch.float64):
        given = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, gamma, beta)]
        if dtype is torch.float32:
            with convext.backend("native"):
                out = convext.conv_bn_act(
                    *given[:2], None, None, None, *given[2:], training=True, activation=activation, recompute=recompute
                )
        else:
            z = F.batch_norm(F.conv2d(*given[:2]), None, None, *given[2:], training=True)
            out = z if activation == "identity" else getattr(F, activation)(z)
        out.backward(dout.to(dtype))
        found.append([out.detach(), *(t.grad for t in given)])
    for ours, exact in zip(*found, strict=True):
        if ours is found[0][2]:
            continue  # of the filters: a sum of products with x, each 1e4 times as large as what they come to
        assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
