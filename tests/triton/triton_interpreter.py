"""The Triton kernels' numbers, in Triton's interpreter. Runs with TRITON_INTERPRET=1 alone, so test_triton.py starts it
in a process of its own; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/triton/triton_interpreter.py
"""

import math
import os
import zlib

import pytest
import torch
import triton.language as tl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"

from cases import BY_NAME, PROBLEMS
from reference import Nest, unit_roundoff

import convext
from convext.backends.aten import BACKEND as ATEN
from convext.backends.triton import BACKEND as TRITON
from convext.problem import ACTIVATIONS, ConvProblem, Epilogue, Geom, Pass, accumulate_dtype
from convext.triton import configs, direct, launch, wgrad

RUNNABLE = [case for case in PROBLEMS if case.x[0] > 0]
# Every fifth case, a different fifth for each dtype: the geometry is float32's business.
FIFTHS = {
    dtype: [case for case in RUNNABLE if (zlib.crc32(case.name.encode()) + i) % 5 == 0]
    for i, dtype in enumerate((torch.float16, torch.bfloat16, torch.float64))
}
BATCH_NORM_SHAPES = [(2, 5, 6, 7), (2, 70, 5, 3), (1, 3, 60, 50)]


@pytest.fixture(scope="module", autouse=True)
def language_replaced_once():
    """The interpreter puts functions of its own in the place of the language's as a launch begins, and looks through
    all of them again whenever one kernel function calls another, which takes a third of the time. What the launch has
    replaced, nothing puts back before its end."""
    replace, modules = interpreter._patch_lang, set()

    def replace_once(fn):
        wanted = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and wanted <= modules:
            return None  # a call inside the launch, which asks for nothing
        began = not modules
        scope = replace(fn)
        modules.update(wanted)
        if began:
            restore = scope.restore

            def restored():
                modules.clear()
                restore()

            scope.restore = restored
        return scope

    interpreter._patch_lang = replace_once
    yield
    interpreter._patch_lang = replace


@pytest.fixture(autouse=True)
def triton_alone():
    """Triton serves every call of a test, or the test fails."""
    with convext.backend("triton"):
        convext.backends.reset_counts()
        yield


def served():
    """(pass, variant) of all calls so far; every one of them Triton's."""
    counts = convext.backends.counts()
    assert {name for name, *_ in counts} <= {"triton"}
    return {(pass_, variant) for _, pass_, variant in counts}


def passes(case, operands):
    geom = Geom(*case.geom)
    return {
        "fprop": convext.ops.fprop(operands.x, operands.w, operands.bias, geom),
        "dgrad": convext.ops.dgrad(operands.dy, operands.w, case.x[2:], geom),
        "wgrad": convext.ops.wgrad(operands.dy, operands.x, case.w[2:], geom),
    }


def check_case(case, dtype):
    operands = case.operands(dtype)
    expected = Nest(case).expected(operands)
    results = passes(case, operands)
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        shapes = passes(case, case.operands(dtype))
    for name, result in results.items():
        assert result.stride() == shapes[name].stride()
        if dtype is torch.bfloat16:
            # The interpreter cuts a float32 off where a GPU rounds it: another half of the last place at the most.
            away = (result.double() - expected[name].value).abs()
            allowed = expected[name].tolerance(dtype) + unit_roundoff(dtype) * expected[name].value.abs()
            assert (away <= allowed).all()
        else:
            expected[name].check(result, dtype, name)
    assert {pass_ for pass_, _ in served()} == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_cases_float32(case):
    check_case(case, torch.float32)


@pytest.mark.parametrize("dtype, case", [(d, c) for d, cases in FIFTHS.items() for c in cases], ids=str)
def test_cases_in_other_dtypes(dtype, case):
    check_case(case, dtype)


@pytest.mark.parametrize("name", ["empty_batch", "empty_batch_depthwise"])
def test_empty_batch_needs_no_kernel(name):
    case = BY_NAME[name]
    results = passes(case, case.operands())
    assert results["fprop"].shape == case.y and not results["wgrad"].any()


def channels(count, dtype):
    generator = torch.Generator().manual_seed(count)
    mean, beta = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    var, gamma = (torch.rand(count, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    acc = accumulate_dtype(dtype)
    return mean.to(acc), var.to(acc), gamma.to(acc), beta.to(acc)


def double(t):
    return t.double() if isinstance(t, torch.Tensor) else t


@pytest.mark.parametrize(
    "activation, dtype",
    [(activation, torch.float32) for activation in ACTIVATIONS] + [("silu", torch.float16), ("gelu", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("name", ["three_by_three", "depthwise", "channels_last_everything"])
class TestFusedEpilogue:
    def test_bias_batch_norm_residual_and_activation(self, name, activation, dtype):
        case = BY_NAME[name]
        o = case.operands(dtype)
        geom = Geom(*case.geom)
        mean, var, gamma, beta = channels(case.w[0], dtype)
        y = Nest(case).fprop(o.x, o.w, o.bias)
        residual = torch.linspace(-2, 2, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
        out = convext.ops.conv_bn_act(
            o.x, o.w, Epilogue(o.bias, mean, var, gamma, beta, residual, 1e-3, activation), geom
        )
        expected = ATEN.bn_act(y, Epilogue(None, *map(double, (mean, var, gamma, beta, residual)), 1e-3, activation))
        self.close(out, expected, y, case)
        assert len(served()) == 1, "one kernel for all of it"

    def test_bias_and_activation_alone(self, name, activation, dtype):
        case = BY_NAME[name]
        o = case.operands(dtype)
        bias = channels(case.w[0], dtype)[0].to(dtype)
        out = convext.ops.conv_bn_act(o.x, o.w, Epilogue(bias, activation=activation), Geom(*case.geom))
        y = Nest(case).fprop(o.x, o.w, bias)
        nothing = Epilogue(None, y.new_zeros(y.shape[1]), y.new_ones(y.shape[1]), eps=0.0, activation=activation)
        self.close(out, ATEN.bn_act(y, nothing), y, case)

    @staticmethod
    def close(out, expected, y, case):
        # The error of y, times gamma / sqrt(var) <= 2.2 and the activations' slopes <= 1.2; some roundings more, of
        # numbers no larger than the largest; and the rounding to the dtype.
        unit = unit_roundoff(accumulate_dtype(out.dtype))
        largest = max(y.abs().max(), expected.abs().max()).item()
        allowed = 4 * unit * (case.gemm_k("fprop") ** 0.5 + 8) * largest * 2.7
        away = (out.double() - expected).abs()
        assert (away <= allowed + unit_roundoff(out.dtype) * expected.abs()).all(), away.max()


class TestBatchNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", BATCH_NORM_SHAPES, ids=str)
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_statistics_of_a_large_mean_do_not_cancel(self, shape, memory_format, dtype):
        generator = torch.Generator().manual_seed(0)
        y = (1000 + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        y = y.contiguous(memory_format=memory_format)
        mean, var = convext.ops.OPS.batch_stats(y)
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        # A mean is rounded on each of log2(count) + 2 levels of sums, at about 1000. The variance is that within tiles,
        # to which a mean e off adds e^2, and that between the means m_i of tiles, sum share_i (m_i - m)^2, which
        # changes by no more than sum share_i 2 |m_i - m| 2 e <= 4 e sd. A sum of squares would be off by 1000 times
        # as much.
        unit, levels = unit_roundoff(accumulate_dtype(dtype)), math.log2(y.numel() / shape[1]) + 2
        error = unit * levels * 1000
        margin = 2 if dtype is torch.float64 else 1  # which is compared with float64 again
        assert ((mean - exact_mean).abs() <= margin * error).all()
        allowed = levels * unit * exact_var + 4 * error * exact_var.sqrt() + error**2
        assert ((var - exact_var).abs() <= margin * allowed).all()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_forward_and_backward(self, activation, residual, training):
        for i, shape in enumerate(BATCH_NORM_SHAPES):
            generator = torch.Generator().manual_seed(i)
            format_ = (torch.contiguous_format, torch.channels_last)[(i + training) % 2]
            y, dout, z = (
                torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=format_)
                for _ in range(3)
            )
            z = z if residual else None
            parameters = channels(shape[1], torch.float64)
            if training:
                parameters = (*ATEN.batch_stats(y), *parameters[2:])
            epilogue = Epilogue(None, *parameters, z, 1e-5, activation)
            out = convext.ops.bn_act(y, epilogue)
            torch.testing.assert_close(out, ATEN.bn_act(y, epilogue), rtol=1e-12, atol=1e-12)
            got = convext.ops.bn_act_backward(dout, y, epilogue, training)
            want = ATEN.bn_act_backward(dout, y, epilogue, training)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    def test_rows_that_are_not_evenly_spaced(self):
        y = torch.randn(2, 4, 6, 10)[..., :7]
        mean, var = convext.ops.OPS.batch_stats(y)
        torch.testing.assert_close(mean, y.mean((0, 2, 3)))
        epilogue = Epilogue(None, mean, var, residual=y, activation="relu")
        torch.testing.assert_close(convext.ops.bn_act(y, epilogue), ATEN.bn_act(y, epilogue))


@pytest.mark.parametrize(
    "name",
    [
        "depthwise",
        "depthwise_strided",
        "depthwise_dilated_strided",
        "depthwise_multiplier",
        "depthwise_seven_by_seven",
        "depthwise_strided_dgrad_hole",
    ],
)
def test_depthwise_backward_in_one_pass_is_the_two_passes(name):
    case = BY_NAME[name]
    o, geom = case.operands(), Geom(*case.geom)
    problem = ConvProblem.of_dgrad(o.dy, o.w, case.x[2:], geom)
    dx, dw = TRITON.depthwise_backward(problem, o.dy, o.x, o.w)
    assert torch.equal(dx, TRITON.dgrad(problem, o.dy, o.w))
    assert torch.equal(dw, TRITON.wgrad(problem, o.dy, o.x))


def test_depthwise_layers_train_in_one_pass(monkeypatch):
    calls = []
    both = TRITON.depthwise_backward
    monkeypatch.setattr(TRITON, "depthwise_backward", lambda *a: (calls.append(1), both(*a))[1], raising=False)
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8, 7, 7), (8, 1, 3, 3)))
    convext.depthwise_conv2d(x, w, padding=1).square().sum().backward()
    got = x.grad, w.grad
    x.grad = w.grad = None
    nn.functional.conv2d(x, w, padding=1, groups=8).square().sum().backward()
    torch.testing.assert_close(got, (x.grad, w.grad), rtol=1e-12, atol=1e-11)
    assert calls == [1] and {"dgrad", "wgrad"} <= {pass_ for pass_, _ in served()}


def test_infinite_x_beside_no_gradient_is_no_nan():
    x, w = torch.full((1, 2, 4, 4), torch.inf), torch.ones(2, 1, 3, 3)
    problem = ConvProblem.of_fprop(x, w, Geom((1, 1), (1, 1), (1, 1), 2))
    dw = TRITON.wgrad(problem, torch.ones_like(x), x)
    assert (dw == torch.inf).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through(activation):
    x = torch.zeros(1, 16, 3, 3)
    x[0, 0, 1, 1] = torch.nan
    w = torch.ones(16, 16, 1, 1)
    out = convext.ops.conv_bn_act(x, w, Epilogue(activation=activation), Geom())
    assert torch.equal(out.isnan(), x[:, :1].isnan().expand_as(out))


class TestDeterminism:
    def test_split_reductions_give_the_same_bits(self, monkeypatch):
        monkeypatch.setattr(wgrad, "LEAST_PIXELS", 16)
        monkeypatch.setattr(wgrad, "processors", lambda device: 40)
        case = BY_NAME["more_pixels_than_a_block"]
        o = case.operands()
        problem = ConvProblem.of_wgrad(o.dy, o.x, case.w[2:], Geom(*case.geom))
        launches = wgrad.wgrad(problem, o.dy, o.x, o.w.clone())
        assert [each.kernel.fn.__name__ for each in launches] == ["wgrad_kernel", "reduce_kernel"]
        assert launches[0].arguments["split_k"] > 4
        first = TRITON.wgrad(problem, o.dy, o.x)
        Nest(case).expected(o)["wgrad"].check(first)
        assert torch.equal(first, TRITON.wgrad(problem, o.dy, o.x))

    @pytest.mark.parametrize(
        "name", ["long_reduction", "strided", "groups_strided", "dilation_past_border", "channels_last_everything"]
    )
    def test_split_loops_give_the_same_bits_and_the_right_ones(self, name, monkeypatch):
        """Split as on a GPU with many multiprocessors, into more parts than some tiles have steps."""
        monkeypatch.setattr(direct, "processors", lambda device: 1000)
        monkeypatch.setattr(direct, "LEAST_STEPS", 1)
        monkeypatch.setattr(configs, "_GEMM", {**configs._GEMM, "interpreter": configs._GEMM["ieee"]})
        configs.gemm_configs.cache_clear()
        case = BY_NAME[name]
        o, geom = case.operands(), Geom(*case.geom)
        problem = ConvProblem.of_fprop(o.x, o.w, geom)
        launches = direct.fprop(problem, o.x, o.w, Epilogue(o.bias), torch.empty(case.y))
        assert [each.kernel.fn.__name__ for each in launches] == ["fprop_kernel", "finish_kernel"]
        assert launches[0].arguments["split_k"] > 2
        launches = direct.dgrad(problem, o.dy, o.w, torch.empty(case.x))
        assert [each.kernel.fn.__name__ for each in launches] == ["dgrad_kernel", "reduce_kernel"]
        check_case(case, torch.float32)
        first, again = passes(case, o), passes(case, o)
        assert all(torch.equal(first[name], again[name]) for name in first)
        mean, var, gamma, beta = channels(case.w[0], torch.float32)
        y = Nest(case).expected(o)["fprop"]
        z = (y.value - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt() * gamma[:, None, None]
        z = z + beta[:, None, None].double() + o.dy
        out = convext.ops.conv_bn_act(o.x, o.w, Epilogue(o.bias, mean, var, gamma, beta, o.dy, 1e-3, "relu"), geom)
        slope = (gamma / (var + 1e-3).sqrt()).abs().max()
        allowed = y.tolerance(torch.float32) * slope + 8 * unit_roundoff(torch.float32) * (z.abs() + y.value.abs() + 4)
        assert ((out - z.relu()).abs() <= allowed).all()
        configs.gemm_configs.cache_clear()

    def test_nothing_is_measured(self):
        with torch.backends.cudnn.flags(benchmark=True):
            assert not launch.tuning_is_wanted()


@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_dilation_skips_the_taps_that_only_meet_padding(pass_, monkeypatch):
    """At dilation 18 of a 33 x 33 image, a patch of 8 x 16 pixels needs one or two of three rows of taps, and of three
    columns. Counted are the steps that the kernel's loop really takes."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    multiply, steps = builder.create_dot, []
    monkeypatch.setattr(builder, "create_dot", lambda *args: (steps.append(1), multiply(*args))[1], raising=False)
    x, w = torch.randn(1, 32, 33, 33), torch.randn(32, 32, 3, 3)
    problem = ConvProblem.of_fprop(x, w, Geom((1, 1), (18, 18), (18, 18), 1))
    configs = direct.gemm_choice(x.dtype, x.device, 1, 1, 1, 1, False)
    tile = next(config for config in configs[0] if config.kwargs["BLOCK_M"] == 128)
    (each,) = direct.fprop(problem, x, w, Epilogue(), x) if pass_ == "fprop" else direct.dgrad(problem, x, w, x.clone())
    each.configs = (tile,)
    patches = each.grid(tile.kwargs)[0]
    assert patches == 5 * 3
    each.run()

    def taps(first, last):
        return sum(first + offset < 33 and last + offset >= 0 for offset in (-18, 0, 18))

    needed_rows = sum(taps(p, min(p + 7, 32)) for p in range(0, 33, 8))
    needed_columns = sum(taps(q, min(q + 15, 32)) for q in range(0, 33, 16))
    assert len(steps) == needed_rows * needed_columns < 0.6 * 9 * patches


class TestOperators:
    """torch.ops.convext_triton.*"""

    def samples(self):
        from convext.triton import ops

        case = BY_NAME["groups_strided"]
        o = case.operands()
        geom = case.geom
        mean, var, gamma, beta = channels(case.w[0], torch.float32)
        yield ops.fprop, (o.x, o.w, None, mean, var, gamma, beta, torch.ones(case.y), 1e-5, "silu", *geom)
        yield ops.dgrad, (o.dy, o.w, case.x[2:], *geom)
        yield ops.wgrad, (o.dy, o.x, case.w[2:], *geom)
        case = BY_NAME["channels_last_depthwise"]
        d = case.operands()
        yield ops.depthwise_backward, (d.dy, d.x, d.w, *case.geom)
        yield ops.batch_stats, (o.dy,)
        yield ops.bn_act, (o.dy, mean, var, gamma, beta, None, 1e-5, "relu")
        yield ops.bn_act_backward, (o.dy, o.dy * 2, mean, var, gamma, beta, None, 1e-5, "relu", True)
        yield ops.bn_act_backward, (o.dy, o.dy * 2, mean, var, gamma, None, o.dy * 3, 1e-5, "gelu", False)

    def test_opcheck(self):
        for operator, arguments in self.samples():
            torch.library.opcheck(operator, arguments)

    def test_they_are_the_backend(self):
        from convext.triton import ops

        case = BY_NAME["strided"]
        o, geom = case.operands(), Geom(*case.geom)
        y = ops.fprop(o.x, o.w, o.bias, *[None] * 5, 0.0, "identity", *geom)
        assert torch.equal(y, convext.ops.fprop(o.x, o.w, o.bias, geom))
        assert torch.equal(ops.dgrad(o.dy, o.w, case.x[2:], *geom), convext.ops.dgrad(o.dy, o.w, case.x[2:], geom))
        assert torch.equal(ops.wgrad(o.dy, o.x, case.w[2:], *geom), convext.ops.wgrad(o.dy, o.x, case.w[2:], geom))


class NoConvolution(TorchDispatchMode):
    """Fails where ATen's convolution or batch norm runs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("convolution", "batch_norm")), function
        return function(*args, **(kwargs or {}))


def resnet50_cut():
    """The stem and the first blocks of the first two stages, of which the second strides and widens."""
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet50(num_classes=10)
    return nn.Sequential(
        net.conv1,
        net.bn1,
        net.relu,
        net.maxpool,
        net.layer1[0],
        net.layer2[0],
        net.avgpool,
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def mobilenet_v2_cut():
    """The stem, a block without expansion, one that strides, and one with a residual."""
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.mobilenet_v2(num_classes=10)
    return nn.Sequential(*net.features[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


@pytest.mark.parametrize("network", [resnet50_cut, mobilenet_v2_cut])
class TestNetworks:
    @pytest.fixture
    def model(self, network):
        torch.manual_seed(0)
        return network()

    @pytest.fixture
    def images(self):
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("training", [True, False])
    def test_swapped_is_unswapped(self, model, images, training):
        result = convext.verify(model.train(training), images)
        assert result.ok, result
        assert any("fprop" in pass_ for pass_, _ in served())

    def test_runs_and_trains_without_aten(self, model, images):
        convext.swap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        labels = torch.tensor([3, 7])
        losses = []
        with NoConvolution():
            for _ in range(2):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            model.eval()
            with torch.no_grad():
                assert model(images).isfinite().all()
        assert losses[1] < losses[0]
        assert {"fprop", "dgrad", "wgrad", "batch_stats", "bn_act", "bn_act_backward"} <= {p for p, _ in served()}


def test_variants_name_their_family():
    names = {
        name: TRITON.variant(Pass.FPROP, ConvProblem.of_fprop(o.x, o.w, Geom(*BY_NAME[name].geom)))
        for name in ("pointwise", "dilated", "depthwise_dilated")
        for o in [BY_NAME[name].operands()]
    }
    assert names == {
        "pointwise": "fprop_direct_float32_triton",
        "dilated": "fprop_dilated_float32_triton",
        "depthwise_dilated": "fprop_depthwise_float32_triton",
    }
