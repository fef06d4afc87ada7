"""The public functions against torch.nn.functional: values, memory formats, errors, autocast, and the fused form."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from reference import Nest

import convext
from convext import backends
from convext.activation import FORWARD
from convext.problem import ACTIVATIONS

CL = torch.channels_last


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_is_its_definition(case):
    operands = case.operands(torch.float64, device="cpu")
    expected = Nest(case).expected(operands)["fprop"]
    for _ in range(2):  # the second call takes the short way
        expected.check(convext.conv2d(operands.x, operands.w, operands.bias, *case.arguments))


def strides(t):
    """Strides, but for extents of 1, where any stride means the same."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]


def _formats():
    for dtype, x_cl, w_cl in itertools.product((torch.float32, torch.float64, torch.bfloat16), (0, 1), (0, 1)):
        for c, k, r, groups, hw in (
            (4, 6, 3, 1, 8),
            (4, 6, 1, 1, 8),
            (4, 4, 3, 4, 8),
            (1, 6, 3, 1, 8),
            (4, 6, 1, 1, 1),
            (4, 1, 3, 1, 8),
        ):
            yield pytest.param(
                dtype,
                x_cl,
                w_cl,
                (c, k, r, groups, hw),
                id=f"{str(dtype)[6:]}-x{'NHWC' if x_cl else 'NCHW'}-w{'NHWC' if w_cl else 'NCHW'}"
                f"-c{c}k{k}r{r}g{groups}hw{hw}",
            )


@pytest.mark.parametrize("dtype, x_cl, w_cl, sizes", list(_formats()))
def test_memory_format_of_the_output_and_of_leaf_gradients_is_atens(dtype, x_cl, w_cl, sizes):
    c, k, r, groups, hw = sizes
    found = []
    for conv2d in (F.conv2d, convext.conv2d):
        x, w = torch.ones(2, c, hw, hw, dtype=dtype), torch.ones(k, c // groups, r, r, dtype=dtype)
        x = (x.contiguous(memory_format=CL) if x_cl else x).requires_grad_()
        w = (w.contiguous(memory_format=CL) if w_cl else w).requires_grad_()
        y = conv2d(x, w, None, 1, 0, 1, groups)
        y.sum().backward()
        found.append((strides(y), strides(x.grad), strides(w.grad)))
    assert found[0] == found[1]


def _dense(shape, form, dtype):
    """Random values: contiguous, channels-last in all strides, a part of something larger, or one image for all."""
    n, c, h, w = shape
    values = rand(*shape).to(dtype)
    if form == "nhwc":
        return torch.empty_strided(shape, (h * w * c, 1, w * c, c), dtype=dtype).copy_(values)
    if form == "part":
        larger = torch.zeros(n, c + 1, h + 1, w + 2, dtype=dtype)
        larger[:, :c, :h, :w] = values
        return larger[:, :c, :h, :w]
    return values[:1].expand(shape) if form == "expanded" else values


@pytest.mark.parametrize("backend", [None, "native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r, s", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_strides_of_results_and_gradients_are_atens(backend, dtype, r, s):
    """Whatever x, w and dy look like. Of w's gradient those of extents of 1 are w's wherever the others are, or
    DistributedDataParallel would warn."""
    if backend == "native" and backends.unavailable("native", "cpu"):
        pytest.skip("the compiled library is not there")
    for (n, c, hw), (k, groups) in itertools.product(((1, 1, 1), (2, 4, 5), (2, 4, 1)), ((1, 1), (4, 1), (4, 4))):
        if c % groups:
            continue
        for x_form, w_form, dy_form in itertools.product(
            ("nchw", "nhwc", "part", "expanded"), ("nchw", "nhwc"), ("nchw", "nhwc", "expanded")
        ):
            x, w = _dense((n, c, hw, hw), x_form, dtype), _dense((k, c // groups, r, s), w_form, dtype)
            found = []
            for conv2d in (F.conv2d, convext.conv2d):
                leaves = x.detach().requires_grad_(), w.detach().requires_grad_(), rand(k).to(dtype).requires_grad_()
                with convext.backend(backend):
                    y = conv2d(*leaves, 1, (r // 2, s // 2), 1, groups)
                    gradients = torch.autograd.grad(y, leaves, _dense(y.shape, dy_form, dtype))
                found.append([strides(t) for t in (y, *gradients)])
            assert found[0] == found[1], (x.shape, x_form, w.shape, w_form, dy_form)
            if found[1][2] == strides(w):
                assert gradients[1].stride() == w.stride()


@pytest.mark.parametrize("x_form, w_form", list(itertools.product(("nchw", "nhwc"), repeat=2)))
@pytest.mark.parametrize("r, groups", [(1, 1), (3, 1), (3, 4)])
def test_strides_without_data_are_those_with(x_form, w_form, r, groups):
    x, w, dy = (
        _dense(shape, form, torch.float32)
        for shape, form in (((2, 4, 5, 5), x_form), ((4, 4 // groups, r, r), w_form), ((2, 4, 5, 5), "nhwc"))
    )
    geom = (1, 1), (r // 2, r // 2), (1, 1), groups
    for op, args in (
        (torch.ops.convext.dgrad, (dy, w, [5, 5], *geom)),
        (torch.ops.convext.wgrad, (dy, x, [r, r], *geom)),
    ):
        for channels_last in (None, False, True):
            torch.library.opcheck(op.default, (*args, channels_last), test_utils="test_faketensor")
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                fake = op(*args, channels_last)
            assert fake.stride() == op(*args, channels_last).stride()


def _run_everything(x, w, b):
    parameters = [torch.full((w.shape[0],), 0.5, dtype=x.dtype, device=x.device) for _ in range(4)]
    x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
    results = [
        convext.conv2d(x, w, b),
        convext.conv_act(x, w, b, activation="silu"),
        convext.conv_bn_relu(x, w, b, *parameters),
        convext.conv_bn_relu(x, w, b, None, None, *parameters[2:], training=True),
    ]
    results += torch.autograd.grad(sum(y.sum() for y in results), (x, w, b))

    def of_w(w):
        return convext.conv_bn_relu(x, w, b, *parameters)

    results += [torch.func.jvp(of_w, (w.detach(),), (w.detach(),))[1], torch.func.vmap(of_w)(w[None])]
    with torch.no_grad():
        results += [convext.conv2d(x, w, b), convext.conv_bn_relu(x, w, b, *parameters)]
    return results


@pytest.mark.parametrize("backend", [None, "native", "aten"])
def test_the_default_device_and_dtype_are_not_asked(backend):
    if backend == "native" and backends.unavailable("native", "cpu"):
        pytest.skip("the compiled library is not there")
    x, w, b = rand(2, 8, 9, 9).float(), rand(16, 8, 3, 3).float(), rand(16).float()
    with convext.backend(backend):
        expected = _run_everything(x, w, b)
        backends.forget()
        w = w.clone()  # whose packing is not there yet
        former = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                inside = _run_everything(x, w, b)
        finally:
            torch.set_default_dtype(former)
        for results in (inside, _run_everything(x, w, b)):
            for actual, wanted in zip(results, expected, strict=True):
                assert actual.dtype is torch.float32
                torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


X, W, B = rand(2, 4, 4, 4), rand(6, 2, 3, 3), rand(6)
BAD = {
    "padding_is_no_known_word": ((X, W, B), dict(groups=2, padding="full"), "padding.*'full'.*'same' or 'valid'"),
    "same_with_a_stride": ((X, W, B), dict(groups=2, padding="same", stride=2), r"same.*strid.*\(2, 2\)"),
    "stride_0": ((X, W, B), dict(groups=2, stride=0), r"stride.*\(0, 0\)"),
    "stride_float": ((X, W, B), dict(groups=2, stride=1.5), "stride.*1.5"),
    "stride_bool": ((X, W, B), dict(groups=2, stride=True), "stride.*True"),
    "stride_of_three": ((X, W, B), dict(groups=2, stride=(1, 1, 1)), r"stride.*\[1, 1, 1\]"),
    "stride_of_none": ((X, W, B), dict(groups=2, stride=()), r"stride.*\[\]"),
    "padding_negative": ((X, W, B), dict(groups=2, padding=-1), r"padding.*\(-1, -1\)"),
    "padding_none": ((X, W, B), dict(groups=2, padding=None), "padding.*None"),
    "dilation_0": ((X, W, B), dict(groups=2, dilation=0), r"dilation.*\(0, 0\)"),
    "groups_0": ((X, W, B), dict(groups=0), "groups is 0"),
    "groups_negative": ((X, W, B), dict(groups=-1), "groups is -1"),
    "groups_float": ((X, W, B), dict(groups=2.0), "groups.*2.0"),
    "k_not_multiple_of_groups": ((X, rand(5, 2, 3, 3)), dict(groups=2), r"weight.*groups=2.*\[5, 2, 3, 3\]"),
    "k_0": ((X, rand(0, 4, 3, 3)), {}, r"weight.*at least 1 .*\[0, 4, 3, 3\]"),
    "c_does_not_fit": ((X, rand(6, 3, 3, 3)), dict(groups=2), "input.*6 channels.*got 4"),
    "kernel_past_the_image": ((X, rand(6, 4, 5, 3)), {}, "input.*4 x 4.*5 x 3"),
    "kernel_past_the_image_by_dilation": ((X, W, B), dict(groups=2, dilation=2), "input.*4 x 4.*5 x 5"),
    "kernel_of_0": ((X, rand(6, 4, 0, 1)), {}, r"weight.*\[6, 4, 0, 1\]"),
    "bias_of_another_size": ((X, W, rand(5)), dict(groups=2), r"bias.*6.*\[5\]"),
    "bias_two_dimensional": ((X, W, rand(1, 6)), dict(groups=2), r"bias.*6.*\[1, 6\]"),
    "bias_of_another_dtype": ((X, W, B.float()), dict(groups=2), "bias.*float64.*float32.*should be the same"),
    "weight_of_another_dtype": ((X, W.float()), dict(groups=2), "weight.*float64.*float32.*should be the same"),
    "weight_three_dimensional": ((X, rand(6, 2, 3)), dict(groups=2), r"weight.*\[6, 2, 3\]"),
    "input_two_dimensional": ((rand(4, 4), W), dict(groups=2), r"input.*3D.*4D.*\[4, 4\]"),
    "input_five_dimensional": ((rand(1, 2, 4, 4, 4), W), dict(groups=2), r"input.*3D.*4D.*\[1, 2, 4, 4, 4\]"),
    "input_a_list": (([1.0], W), {}, "input.*Tensor.*list"),
    "weight_none": ((X, None), {}, "weight.*Tensor.*NoneType"),
    "bias_an_int": ((X, W, 3), dict(groups=2), "bias.*Tensor or None.*int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_as_pytorch_and_names_the_argument(name):
    args, kwargs, message = BAD[name]
    with pytest.raises(Exception) as theirs:
        F.conv2d(*args, **kwargs)
    for _ in range(2):  # nothing may be remembered of a call that failed
        with pytest.raises(type(theirs.value), match=f"(?s)\nconvext: .*{message}") as ours:
            convext.conv2d(*args, **kwargs)
        assert type(ours.value) is type(theirs.value)
        first = str(theirs.value).split(" - got ")[0]  # the list of arguments that follows counts keywords
        assert str(ours.value).startswith(first) and len(first) > 10


ODD = {
    "bool_input": ((X > 0, W), dict(groups=2)),
    "bool": ((X > 0, W > 0), dict(groups=2)),
    "complex_input": ((X.cfloat(), W), dict(groups=2)),
    "int_weight": ((X, W.long()), dict(groups=2)),
    "int_bias": ((X, W, B.long()), dict(groups=2)),
    "more_than_64_bits": ((X, W), dict(groups=2, stride=2**70)),
    "padding_beyond_memory": ((X, W), dict(groups=2, padding=2**40)),
    "weight_without_dimensions": ((X, W[0, 0, 0, 0]), {}),
    "same_with_negative_dilation": ((X, W), dict(groups=2, padding="same", dilation=-1)),
    "same_with_a_weight_of_three": ((X, W[0]), dict(padding="same")),
    "no_rows": ((X[:, :, :0], W), dict(groups=2, padding=2)),
    "zero_batch_that_does_not_fit": ((X[:0, :3], W), dict(groups=2)),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_input_raises_as_pytorch(name, gradient):
    args, kwargs = ODD[name]
    args = [t.detach().requires_grad_(gradient and t.is_floating_point()) for t in args]
    with pytest.raises(Exception) as theirs:
        F.conv2d(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        convext.conv2d(*args, **kwargs)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value).split("\n")[0] == str(theirs.value).split("\n")[0]


@pytest.mark.parametrize("on_meta", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_meta_tensors_beside_others_are_taken_as_pytorch_takes_them(on_meta):
    args = [t.to("meta") if meta else t for t, meta in zip((X, W, B), on_meta)]
    theirs, ours = F.conv2d(*args, groups=2), convext.conv2d(*args, groups=2)
    assert (ours.shape, ours.device, ours.stride()) == (theirs.shape, theirs.device, theirs.stride())
    assert convext.conv_act(*args, groups=2).device == theirs.device


EMPTY = {
    "no_images": ((0, 4, 6, 6), (6, 4, 3, 3), 1), "no_input_channels": ((2, 0, 6, 6), (6, 0, 3, 3), 1),
    "no_input_channels_in_groups": ((2, 0, 6, 6), (6, 0, 3, 3), 2),
    "no_images_and_no_input_channels": ((0, 0, 6, 6), (6, 0, 3, 3), 1),
    "one_image_without_channels": ((0, 6, 6), (6, 0, 3, 3), 1), "no_filters": ((2, 4, 6, 6), (0, 4, 3, 3), 1),
    "no_rows": ((2, 4, 0, 6), (6, 4, 1, 1), 1), "no_taps": ((2, 4, 6, 6), (6, 4, 0, 3), 1),
    "nothing": ((0, 0, 0, 0), (0, 0, 0, 0), 1),
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
    """Zero images, channels, filters, rows or taps: the same result and gradients, or the same error."""
    assert _outcome(convext.conv2d, name, bias) == _outcome(F.conv2d, name, bias)


@pytest.mark.parametrize("name", ["no_images", "no_input_channels", "no_input_channels_in_groups"])
def test_nothing_to_convolve_without_data_and_compiled(name):
    x_shape, w_shape, groups = EMPTY[name]
    arguments = (1, 1), (1, 1), (1, 1), groups
    x, w, b = (torch.ones(shape, requires_grad=True) for shape in (x_shape, w_shape, w_shape[:1]))
    for op in (torch.ops.convext.fprop.default, lambda *args: convext.conv2d(*args[:3], 1, 1, 1, groups)):
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*map(mode.from_tensor, (x, w, b)), *arguments)
        assert fake.shape == F.conv2d(x, w, b, 1, 1, 1, groups).shape
    torch.library.opcheck(torch.ops.convext.fprop.default, (x, w, b, *arguments))
    compiled = torch.compile(lambda *t: convext.conv2d(*t, 1, 1, 1, groups), backend="aot_eager", fullgraph=True)
    assert _outcome(lambda *args: compiled(*args[:3]), name, True) == _outcome(F.conv2d, name, True)


def test_a_good_call_does_not_let_a_bad_one_of_equal_hash_pass():
    convext.conv2d(X, W, B, groups=2)
    with pytest.raises(TypeError):
        convext.conv2d(X, W, B, groups=2.0)
    parameters = rand(6), rand(6).abs(), None, None
    convext.conv_bn_relu(X, W, B, *parameters, groups=2)
    with pytest.raises(TypeError):
        convext.conv_bn_relu(X, W, B, *parameters, groups=2.0)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(stride=(2,)),
        dict(stride=[2, 1]),
        dict(padding=torch.Size([1, 0])),
        dict(stride=torch.tensor(2)),
        dict(padding="valid"),
    ],
    ids=str,
)
def test_every_spelling_of_a_pair(arguments):
    torch.testing.assert_close(convext.conv2d(X, W, B, groups=2, **arguments), F.conv2d(X, W, B, groups=2, **arguments))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.int64])
def test_other_dtypes_are_atens(dtype):
    x, w = torch.ones(1, 2, 5, 5, dtype=dtype), torch.ones(3, 2, 3, 3, dtype=dtype)
    assert torch.equal(convext.conv2d(x, w), F.conv2d(x, w))


def test_other_layouts_are_atens():
    x = X.float()
    w = rand(6, 4, 3, 3).float()
    torch.testing.assert_close(convext.conv2d(x.to_mkldnn(), w).to_dense(), F.conv2d(x, w))


def test_tensor_subclasses_are_heard():
    class Listening(torch.Tensor):
        heard = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    y = convext.conv2d(X.as_subclass(Listening), W, B, groups=2)
    assert Listening.heard[0] is convext.conv2d and type(y) is Listening


def test_depthwise():
    w, b = rand(8, 1, 3, 3), rand(8)
    torch.testing.assert_close(convext.depthwise_conv2d(X, w, b, 1, 1, 2), F.conv2d(X, w, b, 1, 1, 2, 4))
    torch.testing.assert_close(convext.depthwise_conv2d(X[0], w), F.conv2d(X[0], w, groups=4))
    for bad in (rand(6, 1, 3, 3), rand(8, 2, 3, 3), rand(8, 1, 3)):
        with pytest.raises(RuntimeError, match="weight.*C=4"):
            convext.depthwise_conv2d(X, bad)
    with pytest.raises(RuntimeError, match="input"):
        convext.depthwise_conv2d(X[0, 0], w)


def test_dilated():
    w, b = rand(3, 4, 2, 2), rand(3)
    torch.testing.assert_close(convext.dilated_conv2d(X, w, b), F.conv2d(X, w, b, dilation=2))
    torch.testing.assert_close(convext.dilated_conv2d(X, w, b, 2, 1, (1, 3)), F.conv2d(X, w, b, 2, 1, (1, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_context(dtype):
    x, w, b = X.float().requires_grad_(), W.float().requires_grad_(), B.float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = convext.conv2d(x, w, b, groups=2)
        assert y.dtype == dtype == F.conv2d(x, w, b, groups=2).dtype
        assert torch.ops.convext.fprop(x, w, b, (1, 1), (0, 0), (1, 1), 2).dtype == dtype
        assert convext.conv2d(X, W, B, groups=2).dtype == torch.float64
        out = convext.conv_bn_relu(x, w, b, torch.zeros(6), torch.ones(6), None, None, groups=2)
        assert out.dtype == dtype
        mixed = convext.conv_bn_relu(x, w, b, torch.zeros(6), torch.ones(6), None, None, groups=2, residual=out.float())
        assert mixed.dtype == torch.float32  # as `bn(conv(x)) + residual` promotes
    y.sum().backward()
    assert {x.grad.dtype, w.grad.dtype, b.grad.dtype} == {torch.float32}
    assert convext.conv2d(x, w, b, groups=2).dtype == torch.float32


# ---- the fused form --------------------------------------------------------------------------------------------------


def unfused(
    x, w, b, mean, var, gamma, beta, *, training=False, momentum=0.1, eps=1e-5, activation="relu", residual=None, **geom
):
    y = F.batch_norm(F.conv2d(x, w, b, **geom), mean, var, gamma, beta, training, momentum, eps)
    return FORWARD[activation](y if residual is None else y + residual)


def parameters(dtype=torch.float64):
    return (
        rand(6, dtype=dtype),
        rand(6, seed=1, dtype=dtype).abs() + 0.5,
        rand(6, seed=2, dtype=dtype),
        rand(6, seed=3, dtype=dtype),
    )


@pytest.mark.parametrize("training, gradient", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_bn_relu_is_the_three_parts(activation, training, gradient):
    geom = dict(stride=(2, 1), padding=1, groups=2)
    results = []
    for function in (unfused, convext.conv_bn_relu):
        mean, var, gamma, beta = parameters()
        leaves = [t.clone().requires_grad_(gradient) for t in (X, W, B, gamma, beta, rand(2, 6, 2, 4, seed=5))]
        x, w, b, gamma, beta, residual = leaves
        for _ in range(2):  # the second call takes the short way
            out = function(
                x,
                w,
                b,
                mean,
                var,
                gamma,
                beta,
                training=training,
                momentum=0.3,
                eps=1e-3,
                activation=activation,
                residual=residual,
                **geom,
            )
        gradients = torch.autograd.grad(out, leaves, rand(2, 6, 2, 4, seed=6)) if gradient else ()
        results.append((out, mean, var, *gradients))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean, var", [(None, None), parameters()[:2]], ids=["untracked", "tracked"])
def test_training_without_affine(mean, var):
    theirs = [None if t is None else t.clone() for t in (mean, var)]
    expected = unfused(X, W, None, *theirs, None, None, training=True, groups=2)
    actual = convext.conv_bn_relu(X, W, None, mean, var, None, None, training=True, groups=2)
    torch.testing.assert_close(actual, expected)
    if mean is not None:
        torch.testing.assert_close((mean, var), tuple(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("param_dtype", [None, torch.float32])
def test_reduced_precision_takes_parameters_of_either_dtype(dtype, param_dtype):
    mean, var, gamma, beta = parameters(param_dtype or dtype)
    x, w = X.to(dtype), W.to(dtype)
    for training in (False, True):
        theirs, ours = (
            function(x, w, None, mean.clone(), var.clone(), gamma, beta, training=training, groups=2)
            for function in (unfused, convext.conv_bn_relu)
        )
        assert ours.dtype == theirs.dtype == dtype
        # The parts round the convolution's output, the normalised value and the sum; the fused form once.
        torch.testing.assert_close(
            ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps * float(theirs.abs().max())
        )


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 2, 2), (2,), (2, 6, 2, 1)], ids=str)
def test_residual_broadcasts(shape):
    arguments = (X, W, B, *parameters())
    torch.testing.assert_close(
        convext.conv_bn_relu(*arguments, groups=2, residual=rand(*shape)),
        unfused(*arguments, groups=2, residual=rand(*shape)),
    )


def test_residual_of_another_dtype_promotes():
    x, w, b, *rest = (t.float() for t in (X, W, B, *parameters()))
    residual = rand(2, 6, 2, 2)
    theirs = unfused(x, w, b, *rest, groups=2, residual=residual)
    ours = convext.conv_bn_relu(x, w, b, *rest, groups=2, residual=residual)
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_image_is_a_batch_of_one():
    for training in (False, True):
        out = convext.conv_bn_relu(X[0], W, B, *parameters(), groups=2, training=training, residual=rand(6, 2, 2))
        batched = convext.conv_bn_relu(
            X[:1], W, B, *parameters(), groups=2, training=training, residual=rand(6, 2, 2)[None]
        )
        assert torch.equal(out, batched[0])


def test_empty_batch():
    mean, var, gamma, beta = parameters()
    before = mean.clone()
    assert convext.conv_bn_relu(X[:0], W, B, mean, var, gamma, beta, groups=2).shape == (0, 6, 2, 2)
    assert torch.equal(mean, before)


FUSED_BAD = {
    "no_statistics_in_evaluation": (dict(mean=None, var=None), RuntimeError, "running_mean.*None"),
    "one_statistic_of_two": (dict(var=None), ValueError, "running_mean and running_var"),
    "statistics_of_another_size": (dict(mean=rand(5)), RuntimeError, r"running_mean.*6 elements.*\[5\]"),
    "statistics_of_another_dtype": (dict(var=rand(6).float()), RuntimeError, "running_var.*float64.*float32"),
    "weight_of_another_size": (dict(gamma=rand(5)), RuntimeError, r"bn_weight.*6 elements.*\[5\]"),
    "one_value_per_channel": (
        dict(x=X[:1, :, :3, :3], training=True),
        ValueError,
        r"1 value per channel.*\[1, 6, 1, 1\]",
    ),
    "residual_does_not_fit": (
        dict(residual=rand(2, 5, 2, 2), training=True),
        RuntimeError,
        r"residual.*\[2, 6, 2, 2\].*\[2, 5, 2, 2\]",
    ),
    "residual_widens": (dict(residual=rand(3, 2, 6, 2, 2), training=True), RuntimeError, "residual"),
    "activation_unknown": (dict(activation="tanh", training=True), ValueError, "activation.*relu6.*'tanh'"),
    "momentum_none": (dict(momentum=None, training=True), TypeError, "momentum"),
    "bias_of_another_size": (dict(b=rand(5), training=True), RuntimeError, "bias"),
}


@pytest.mark.parametrize("name", FUSED_BAD)
def test_bad_input_of_the_fused_form_raises_and_leaves_the_statistics(name):
    changes, error, message = FUSED_BAD[name]
    arguments = dict(zip(("x", "w", "b", "mean", "var", "gamma", "beta"), (X, W, B, *parameters())))
    keywords = {key: value for key, value in changes.items() if key not in arguments}
    arguments.update((key, value) for key, value in changes.items() if key in arguments)
    statistics = [arguments[name] for name in ("mean", "var") if arguments[name] is not None]
    before = [t.clone() for t in statistics]
    with pytest.raises(error, match=message):
        convext.conv_bn_relu(*arguments.values(), groups=2, **keywords)
    assert all(map(torch.equal, statistics, before))


def test_conv_act_is_its_parts():
    residual = rand(2, 6, 2, 2)
    for activation in ACTIVATIONS:
        expected = FORWARD[activation](F.conv2d(X, W, B, groups=2) + residual)
        for _ in range(2):
            torch.testing.assert_close(
                convext.conv_act(X, W, B, groups=2, activation=activation, residual=residual), expected
            )
    with pytest.raises(ValueError, match="activation"):
        convext.conv_act(X, W, B, groups=2, activation="tanh")


def test_a_nan_in_the_input_comes_through_the_fused_form():
    x = X.clone()
    x[0, 0, 0, 0] = float("nan")
    for activation in ACTIVATIONS:
        out = convext.conv_bn_relu(x, W, B, *parameters(), groups=2, activation=activation)
        assert out[0, :3, 0, 0].isnan().all() and not out[1].isnan().any()


def test_every_call_is_counted():
    backends.reset_counts()
    for _ in range(3):
        convext.conv_bn_relu(X, W, B, *parameters(), groups=2)
    assert sum(n for (_, pass_, _), n in backends.counts().items() if pass_ == "fprop") == 3
