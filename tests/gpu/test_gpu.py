"""What only a GPU can show: streams, graphs, the same bits, tf32, offsets beyond 32 bits, tuning, whole networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from places import GPU, on_gpu

import convext
from convext.backends import native, tuned
from convext.problem import STATISTICS, ConvProblem, Geom, Pass
from convext.tune import measure

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU != "cuda", reason="there is no GPU")]
BACKENDS = pytest.mark.parametrize("backend", on_gpu("native", "triton"))
LAYERS = {
    "direct": ((4, 64, 14, 14), (64, 64, 3, 3), Geom((1, 1), (1, 1))),
    "strided": ((4, 64, 14, 14), (128, 64, 3, 3), Geom((2, 2), (1, 1))),
    "depthwise": ((4, 96, 14, 14), (96, 1, 3, 3), Geom((1, 1), (1, 1), (1, 1), 96)),
    "dilated": ((2, 32, 33, 33), (32, 32, 3, 3), Geom((1, 1), (12, 12), (12, 12))),
}


def layer(name, dtype=torch.bfloat16):
    x_shape, w_shape, geom = LAYERS[name]
    x = torch.randn(x_shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(w_shape, dtype=dtype), geom


def passes(x, w, geom, dy=None):
    y = convext.ops.fprop(x, w, None, geom)
    dy = y if dy is None else dy
    return y, convext.ops.dgrad(dy, w, tuple(x.shape[2:]), geom), convext.ops.wgrad(dy, x, tuple(w.shape[2:]), geom)


@BACKENDS
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_call_gives_the_same_bits(name, backend):
    with convext.backend(backend):
        first = passes(*layer(name))
        for _ in range(3):
            torch.manual_seed(0)
            assert all(torch.equal(a, b) for a, b in zip(first, passes(*first_operands(name)), strict=True))


def first_operands(name):
    torch.manual_seed(0)
    return layer(name)


@BACKENDS
@pytest.mark.parametrize("name", LAYERS)
def test_work_goes_to_the_current_stream(name, backend):
    """The default stream is kept busy: what ran there would come after the comparison."""
    x, w, geom = layer(name)
    stream = torch.cuda.Stream()

    def compare():
        with torch.cuda.stream(stream):
            actual = passes(x, w, geom)
            return [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)]  # waits for this stream alone

    with convext.backend(backend):
        expected = passes(x, w, geom)
        torch.cuda.synchronize()
        compare()  # kernels load and memory comes with the first call: both may wait for the whole device
        torch.cuda._sleep(1 << 31)  # about a second
        same = compare()
        assert not torch.cuda.default_stream().query(), "the default stream should still be busy"
    assert all(same)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@BACKENDS
@pytest.mark.parametrize("name", LAYERS)
def test_work_goes_to_the_device_of_its_tensors(name, backend):
    """Another device is current, and stays that."""
    x, w, geom = layer(name)
    with convext.backend(backend):
        expected = passes(x, w, geom)
        there = passes(x.to("cuda:1"), w.to("cuda:1"), geom)
    assert torch.cuda.current_device() == 0
    for a, b in zip(there, expected, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.to("cuda:0"), b)


@BACKENDS
@pytest.mark.parametrize("name", LAYERS)
def test_captured_in_a_graph_and_replayed(name, backend):
    x, w, geom = layer(name)
    with convext.backend(backend), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        passes(x, w, geom)  # compiles, and tunes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = passes(x, w, geom)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, passes(x, w, geom), strict=True))


@BACKENDS
def test_a_first_call_inside_a_capture_measures_nothing(backend):
    """A launch in several configurations, a wait for the device, or a kernel that CUDA does not let load would break
    the capture."""
    x, w, geom = layer("direct", torch.float16)
    with convext.backend(backend), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        convext.ops.fprop(x[:1].contiguous(), w[:16].contiguous(), None, geom)  # the context and libraries are there
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = convext.ops.fprop(x, w, None, geom)
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(y.double(), F.conv2d(x.double(), w.double(), None, *geom), rtol=2e-3, atol=2e-2)


@BACKENDS
@pytest.mark.parametrize("name", LAYERS)
def test_float32_through_tf32_where_that_is_allowed(name, backend):
    """Operands rounded to 11 bits, errors independent: 4 deviations of sqrt(2 sum (ab)^2) 2^-11, and the sum's own."""
    x, w, geom = layer(name, torch.float32)
    with convext.backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        y = convext.ops.fprop(x, w, None, geom)
    exact = F.conv2d(x.double(), w.double(), None, *geom)
    squares = F.conv2d(x.double() ** 2, w.double() ** 2, None, *geom)
    gemm_k = w[0].numel()
    bound = 4 * (2.0**-11 * (2 * squares).sqrt() + 2.0**-24 * gemm_k**0.5 * squares.max().sqrt())
    assert ((y - exact).abs() <= bound + 2.0**-24 * exact.abs()).all()


@BACKENDS
def test_offsets_beyond_32_bits(backend):
    """2.2e9 elements of x and y; the last image is compared."""
    x = torch.empty(33, 64, 1024, 1024, dtype=torch.bfloat16, memory_format=torch.channels_last)
    x[-1].normal_()
    w = torch.randn(64, 64, 1, 1, dtype=torch.bfloat16)
    with convext.backend(backend):
        y = convext.ops.fprop(x, w, None, Geom())
    expected = torch.einsum("kc,chw->khw", w[:, :, 0, 0].float(), x[-1].float())
    torch.testing.assert_close(y[-1].float(), expected, rtol=1.6e-2, atol=1e-3 * 64**0.5)


@pytest.mark.parametrize("backend", on_gpu("triton"))
def test_tuning_measures_once_and_keeps_the_same_choice(backend):
    from convext.triton import direct, launch

    x, w, geom = layer("direct")
    with convext.backend(backend), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        first = convext.ops.fprop(x, w, None, geom)
        problem = ConvProblem.of_fprop(x, w, geom)
        planned, *_ = direct.fprop(problem, x, w, convext.problem.Epilogue(), torch.empty_like(first))
        tuned = launch._tuned(direct.fprop_kernel, tuple(sorted(planned.configs, key=str)))
        kept = dict(tuned.cache)
        assert kept, "nothing was measured"
        assert torch.equal(first, convext.ops.fprop(x, w, None, geom)) and tuned.cache == kept
    exact = F.conv2d(x.double(), w.double(), None, *geom)
    torch.testing.assert_close(first.double(), exact, rtol=1.6e-2, atol=0.05)


@pytest.mark.parametrize("backend", on_gpu("triton"))
def test_inductor_calls_the_kernels_itself(backend):
    """One graph, no operator of convext's left in it, the results of eager mode."""
    from torch._inductor.utils import run_and_get_code

    model = convext.nn.ConvBNReLU(32, 64, 3, padding=1).to(torch.bfloat16).eval()
    x = torch.randn(4, 32, 28, 28, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with convext.backend(backend), torch.no_grad():
        expected = model(x)
        actual, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert "fprop_kernel" in code and "ops.convext" not in code
    torch.testing.assert_close(actual, expected)


@pytest.mark.timeout(400)
@BACKENDS
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
class TestNetworks:
    def network(self, name):
        models = pytest.importorskip("torchvision").models
        return getattr(models, name)(weights=None, num_classes=10)

    def test_swapped_is_unswapped(self, name, backend):
        """In float64, so that the comparison tells rounding from mistakes."""
        model, x = self.network(name).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
        with convext.backend(backend):
            for training in (False, True):
                result = convext.verify(copy.deepcopy(model).train(training), x)
                assert result.ok, result

    def test_trains_in_mixed_precision(self, name, backend, served_by):
        model = self.network(name).to(memory_format=torch.channels_last)
        convext.swap(model)
        x = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(8) % 10
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        with convext.backend(backend), served_by(backend):
            for _ in range(8):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert min(losses[4:]) < losses[0]


def test_every_layer_of_a_network_is_served_by_the_compiled_library():
    """Nothing is left to the substitutes where the library was built."""
    for name in LAYERS:
        x, w, geom = layer(name)
        for pass_ in Pass:
            with convext.tuning("off"):
                choice = convext.backends.select(pass_, ConvProblem.of_fprop(x, w, geom))
            assert choice.backend.name == "native", choice.passed_over


@pytest.fixture
def unmeasured(tmp_path, monkeypatch):
    """A cache of the test's own, in which nothing is known yet."""
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget():
    tuned.forget()
    native.forget_plans()
    convext.backends.forget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_a_problem_is_measured_at_first_sight(name, dtype, unmeasured):
    """By the default of the device: every pass, every kernel right, and nothing of the caller's state moved."""
    x, w, geom = layer(name, dtype)
    state, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
    first = passes(x, w, geom)
    assert torch.equal(state, torch.cuda.get_rng_state()) and stream == torch.cuda.current_stream()
    kept = tuned.of("cuda")
    assert {key.split()[0] for key in kept.choices} == {"fprop", "dgrad", "wgrad"} and not kept.aside
    for choice in kept.choices.values():
        assert {variant.split()[0] for variant in choice.seconds} >= {"native", "aten"}
    known = dict(kept.choices)
    for a, b in zip(first, passes(x, w, geom), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(a.abs().max()))
    assert kept.choices == known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["bn relu", "bn add relu", "bn add silu", STATISTICS])
def test_every_form_of_a_fused_call_is_right(kind, dtype, unmeasured):
    """cuDNN's fused convolutions among them, which must pass NaN on."""
    x, w, geom = layer("direct", dtype)
    found = measure(Pass.FPROP, ConvProblem.of_fprop(x, w, geom), kind, seconds=0.05)
    assert not found.wrong
    names = [name.split()[1] for name in found.timings]
    assert ("aten_fprop_cudnn_fused" in names) == kind.endswith("relu")
    assert ("aten_fprop_one_pass" in names) == kind.startswith("bn")


def test_nothing_is_measured_in_a_capture(unmeasured):
    x, w, geom = layer("direct")
    convext.ops.fprop(x[:1].contiguous(), w[:16].contiguous(), None, geom)
    known, graph = len(tuned.of("cuda").choices), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = convext.ops.fprop(x, w, None, geom)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y.double(), F.conv2d(x.double(), w.double(), None, *geom), rtol=2e-2, atol=0.1)
    assert len(tuned.of("cuda").choices) == known
    convext.ops.fprop(x, w, None, geom)
    assert len(tuned.of("cuda").choices) == known  # what was used stays
