"""The Triton backend on a machine without a GPU: what it says of itself, how it chooses, what a compiler sees of it,
and its numbers in Triton's interpreter (triton_interpreter.py, run in a process of its own)."""

import contextlib
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
from importlib.metadata import requires
from types import SimpleNamespace

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

import convext
from convext.backends import triton as backend_module
from convext.problem import ACTIVATIONS, ConvProblem, Geom, Pass

BACKEND = backend_module.BACKEND
ROOT = pathlib.Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = backend_module._installed_version() is not None
needs_triton = pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="Triton is not installed, or interprets")
# Torch reads what a kernel writes out of the insides of the Triton that it names. Where another one's are not as it
# expects, it takes everything for written: right, but it is not what is tested.
TORCHS_TRITON = next(
    (r[2] for r in map(re.compile(r"triton\s*(==)\s*([\w.]+)").match, requires("torch") or []) if r), None
)
needs_torchs_triton = pytest.mark.skipif(
    TORCHS_TRITON not in (None, backend_module.release()),
    reason=f"torch looks into Triton {TORCHS_TRITON} and not into {backend_module.release()}",
)


class TestInTheInterpreter:
    """Each part of tests/triton/triton_interpreter.py as one test."""

    @pytest.mark.timeout(900)  # about a minute of one core's time each, on a machine that may be busy
    @pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
    @pytest.mark.parametrize(
        "part",
        [
            "cases_float32",
            "cases_in_other_dtypes or empty_batch",
            "TestNetworks",
            "not cases and not empty_batch and not TestNetworks",
        ],
    )
    def test_passes(self, part):
        program = ROOT / "tests/triton/triton_interpreter.py"
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", program, "-k", part]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert re.search(r"\d+ passed", done.stdout)


class TestWhoServes:
    def test_missing_triton_is_one_line_that_names_the_substitute(self, monkeypatch):
        monkeypatch.setattr(backend_module, "_installed_version", lambda: None)
        reason = BACKEND.unavailable("cuda")
        assert "\n" not in reason and "pip install triton" in reason and "ATen serves cuda instead" in reason

    def test_old_triton_is_one_line_that_names_the_substitute(self, monkeypatch):
        monkeypatch.setattr(backend_module, "_installed_version", lambda: (2, 1))
        reason = BACKEND.unavailable("cuda")
        assert "\n" not in reason and "2.1 is older than 3.6" in reason and "ATen serves cuda instead" in reason

    @pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self):
        assert BACKEND.unavailable("cuda") == "torch sees no cuda device"

    @needs_triton
    def test_cpu_is_for_the_interpreter_only(self):
        assert "TRITON_INTERPRET=1" in BACKEND.unavailable("cpu")
        with convext.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            convext.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))

    @needs_triton
    def test_doctor_says_who_serves_and_why(self):
        from convext import doctor

        text = doctor.report()
        assert "triton on cpu: off, Triton has no compiler for the CPU" in text
        assert "aten on cpu: available" in text
        assert re.search(r"triton on cuda: (available|off, .+)", text)
        assert "serves cpu: native, aten what is left" in text

    def test_doctor_names_triton_for_a_gpu_without_the_compiled_library(self, monkeypatch):
        from convext import doctor

        monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(is_available=lambda: True))
        assert doctor._serving("cuda", ["triton", "aten"]) == "serves cuda: triton, aten what is left"

    @needs_triton
    def test_a_gpu_of_intels_is_told_of_too(self, monkeypatch):
        here = lambda check_available=False: torch.device("xpu")  # noqa: E731
        monkeypatch.setattr(torch.accelerator, "current_accelerator", here)
        monkeypatch.setattr(convext.backends, "_unavailable", {("triton", "xpu"): None})
        lines = [str(status) for status in convext.backends() if status.device == "xpu"]
        assert lines == ["triton on xpu: available", "aten on xpu: available"]

    def test_absent_cuda_library_leaves_triton_first(self, monkeypatch):
        """With a GPU, Triton, and no compiled CUDA library, every pass of every problem is Triton's."""
        monkeypatch.setattr(
            convext.backends,
            "_unavailable",
            {("native", "cuda"): "the CUDA library is not built", ("triton", "cuda"): None, ("aten", "cuda"): None},
        )
        monkeypatch.setattr(convext.backends, "_choices", {})
        for groups in (1, 4, 16):
            for dilation in (1, 3):
                problem = ConvProblem(2, 16, 9, 9, 32, 3, 3, 2, 1, 1, 1, dilation, dilation, groups, device="cuda")
                for pass_ in Pass:
                    choice = convext.backends.select(pass_, problem)
                    assert choice.backend.name == "triton"
                    assert choice.passed_over == {"native": "the CUDA library is not built"}
        with FakeTensorMode():
            y = torch.empty(2, 8, 5, 5, device="cuda", dtype=torch.bfloat16)
        monkeypatch.setattr(convext.backends, "_batch_norm", {})
        assert convext.backends.select_batch_norm(y).name == "triton"

    def test_what_the_cuda_library_rejects_is_tritons(self, monkeypatch):
        """More groups than a grid has blocks in y, and none of them depthwise."""
        reason = "there are more than 65535 groups"
        monkeypatch.setattr(
            convext.backends, "_unavailable", dict.fromkeys((name, "cuda") for name in ("native", "triton", "aten"))
        )
        monkeypatch.setattr(convext.backends, "_choices", {})
        monkeypatch.setattr(convext.backends.get("native", "cuda"), "reject", lambda pass_, problem: reason)
        problem = ConvProblem(1, 1 << 17, 4, 4, 1 << 17, 3, 3, 1, 1, 1, 1, 1, 1, 1 << 16, device="cuda")
        for pass_ in Pass:
            choice = convext.backends.select(pass_, problem)
            assert (choice.backend.name, choice.passed_over) == ("triton", {"native": reason})

    def test_a_launch_too_large_is_rejected_in_words(self):
        problem = ConvProblem(1 << 20, 1 << 10, 64, 64, 1 << 10, 7, 7, 1, 1, 3, 3, 1, 1, 1, device="cuda")
        assert "2^31 - 1" in BACKEND.reject(Pass.FPROP, problem)
        assert BACKEND.reject(Pass.FPROP, ConvProblem(1, 1, 3, 3, 1, 3, 3, 1, 1, 0, 0, 1, 1, 1)) is None


@needs_triton
class TestActivations:
    def test_every_activation_has_a_branch(self):
        from convext.triton import epilogue

        source = inspect.getsource(epilogue.activation.fn)
        assert re.findall(r'ACTIVATION == "(\w+)"', source) == [*list(ACTIVATIONS)[1:], "identity"]


@needs_triton
class TestChoice:
    def test_large_layers_take_large_tiles_and_small_ones_fill_the_gpu(self):
        from convext.triton.configs import cheapest, gemm_configs

        def tile(*gemm):
            return tuple(cheapest(gemm_configs("half", "cuda"), *gemm, processors=132).kwargs.values())

        assert tile(64 * 56 * 56, 256, 64 * 9, 1) == (128, 128, 64)
        assert tile(7 * 7, 512, 512 * 9, 1) == (64, 64, 64)
        assert tile(32 * 112 * 112, 16, 32, 1)[1] == 32

    def test_loops_are_split_where_tiles_leave_the_gpu_idle(self):
        from convext.triton.direct import split_count

        assert split_count(tiles=8, steps=72, result_bytes=1 << 17, processors=132) == 16  # 7x7, 512 channels, 3x3
        assert split_count(tiles=8, steps=8, result_bytes=1 << 17, processors=132) == 2  # a short reduction
        assert split_count(tiles=132, steps=72, result_bytes=1 << 17, processors=132) == 1  # busy anyway
        assert split_count(tiles=8, steps=72, result_bytes=1 << 25, processors=132) == 2  # slabs cost memory

    def test_buckets_are_powers_of_two(self):
        from convext.triton.configs import bucket

        assert bucket(33, 100) == bucket(64, 128) != bucket(65, 100)
        assert bucket(1, 2) != bucket(2, 1)

    def test_amd_keeps_to_its_shared_memory(self):
        from convext.triton.configs import gemm_configs

        assert all(config.num_stages <= 2 for config in gemm_configs("half", "hip"))

    def test_tile_counts_cover_the_image(self):
        from convext.triton.tile import patch_shape, tile_count

        assert tile_count(128, 0, 0, 2, 7, 7) == 1
        assert patch_shape(128, 64, 8) == (1, 16, 8) and patch_shape(128, 4, 8) == (4, 4, 8)
        assert tile_count(128, 8, 16, 1, 33, 33) == 5 * 3

    def test_tunes_only_where_told_to(self):
        from convext.triton import launch

        assert not launch.tuning_is_wanted()
        with torch.backends.cudnn.flags(benchmark=True):
            assert launch.tuning_is_wanted()
            with torch.backends.cudnn.flags(benchmark=True, deterministic=True):
                assert not launch.tuning_is_wanted()
            torch.use_deterministic_algorithms(True)
            try:
                assert not launch.tuning_is_wanted()
            finally:
                torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("measured_before", [False, True])
    @pytest.mark.parametrize("capturing", [False, True])
    def test_nothing_is_measured_while_a_graph_is_captured(self, capturing, measured_before, monkeypatch):
        """What was measured before is used; otherwise the model's choice is."""
        from test_triton_compile import Layer

        from convext.triton import launch

        class Kernel:
            """Stands for a kernel, or for its tuner."""

            def __init__(self, name):
                self.name, self.fn, self.arg_names = name, self, []

            def __getitem__(self, grid):
                return lambda **arguments: launched.append((self.name, "BLOCK_M" in arguments))

        launched = []
        planned, *_ = Layer(torch.bfloat16).launches("fprop")
        planned.kernel = Kernel("plain")
        monkeypatch.setattr(launch, "_tuned", lambda kernel, configs: Kernel("tuned"))
        monkeypatch.setattr(launch, "was_measured", lambda tuner, arguments: measured_before)
        monkeypatch.setattr(launch, "on_device", lambda device: contextlib.nullcontext())
        module = SimpleNamespace(is_current_stream_capturing=lambda: capturing)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        with torch.backends.cudnn.flags(benchmark=True):
            planned.run()
        assert launched == [("plain", True) if capturing and not measured_before else ("tuned", False)]

    @pytest.mark.parametrize("captured", [False, True])
    def test_a_kernel_may_load_while_a_graph_is_captured(self, captured, monkeypatch):
        """CUDA forbids loading to a thread in the strict modes: it is in the relaxed one for that long, and then as
        before."""
        from test_triton_compile import Layer

        from convext.triton import launch

        strict, relaxed = 0, 2
        mode, seen = [strict], []

        def exchange(reference):
            mode[0], reference._obj.value = reference._obj.value, mode[0]

        class Kernel:
            def __getitem__(self, grid):
                return lambda **arguments: seen.append(mode[0])

        planned, *_ = Layer(torch.bfloat16).launches("fprop")
        planned.kernel = Kernel()
        monkeypatch.setattr(launch, "_capture_mode_exchange", lambda target: exchange)
        monkeypatch.setattr(launch, "capturing", lambda device: captured)
        monkeypatch.setattr(launch, "on_device", lambda device: contextlib.nullcontext())
        planned.run()
        assert seen == [relaxed if captured else strict] and mode == [strict]

    def test_tuned_kernels_keep_their_timings_on_disk(self):
        from convext.triton import direct, launch
        from convext.triton.configs import gemm_configs

        tuned = launch._tuned(direct.fprop_kernel, gemm_configs("half", "cuda"))
        assert tuned.cache_results and len(tuned.configs) == 4
        assert {"tuning_key", "R", "STRIDE_H", "PATCH_Q"} <= set(tuned.keys)

    @needs_triton
    def test_what_was_timed_of_another_build_is_ignored(self, monkeypatch, tmp_path):
        """Triton's files are keyed by the kernel's source, the configurations and its own release."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime import autotuner

        from convext.triton import launch

        gpu = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
        monkeypatch.setattr(autotuner, "driver", gpu)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        measured = []

        def ask(name, source, *blocks):
            """The fastest block, of what is on disk or is measured now, in the package as `source` has it."""
            file = tmp_path / f"{name}.py"
            file.write_text(f"import triton\n\n\n@triton.jit\ndef kernel(x, tuning_key, BLOCK):\n    {source}\n")
            spec = importlib.util.spec_from_file_location("kernels", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            tuner = launch._tuned(module.kernel, tuple(triton.Config({"BLOCK": block}) for block in blocks))

            def measure():
                measured.append(name)
                tuner.configs_timings = {config: float(config.kwargs["BLOCK"]) for config in tuner.configs}
                tuner.cache["key",] = min(tuner.configs_timings, key=tuner.configs_timings.get)

            tuner.check_disk_cache(("key",), list(tuner.configs), measure)
            return tuner.cache["key",].kwargs["BLOCK"]

        assert ask("old", "x + BLOCK", 64, 32) == 32
        assert ask("again", "x + BLOCK", 64, 32) == 32 and measured == ["old"]
        ask("other_source", "x - BLOCK", 64, 32)
        ask("other_configurations", "x + BLOCK", 64, 32, 16)
        monkeypatch.setattr(autotuner, "triton_key", lambda: "another release")
        ask("other_triton", "x + BLOCK", 64, 32)
        assert measured == ["old", "other_source", "other_configurations", "other_triton"]

    @pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
    def test_is_measured_once_for_each_bucket_of_shapes_dtype_and_layout(self, pass_, monkeypatch):
        """Triton's own tuner with its stopwatch and its launches stubbed, on tensors without memory."""
        import triton
        from test_triton_compile import Layer

        timed = []
        kernels = {}

        def tune(dtype=torch.bfloat16, size=28, k=128, nhwc=True, stride=1):
            layer = Layer(dtype, (8, 64, size, size), (k, 64, 3, 3), ((stride, stride), (1, 1), (1, 1), 1), nhwc)
            planned = layer.launches(pass_)[0]
            if planned.kernel not in kernels:
                keys = list(launch_module._tuned(planned.kernel, planned.configs).keys)
                tuner = kernels[planned.kernel] = triton.autotune(list(planned.configs), keys)(planned.kernel)
                tuner.fn = SimpleNamespace(run=lambda *a, **k: None)
                tuner._bench = lambda *a, config, **k: timed.append(config) or [1.0]
            before = len(timed)
            known = launch_module.was_measured(kernels[planned.kernel], planned.arguments)
            kernels[planned.kernel].run(grid=planned.grid, **planned.arguments)
            assert known == (len(timed) == before)
            assert launch_module.was_measured(kernels[planned.kernel], planned.arguments)
            return len(timed) - before

        from convext.triton import launch as launch_module

        everything = tune()
        assert everything == 4  # every configuration
        assert tune() == 0
        assert tune(size=27) == 0  # 8*27*27 and 8*28*28 pixels lie between the same powers of two
        assert tune(size=56) == everything
        assert tune(k=512) == everything
        assert tune(dtype=torch.float16) == everything
        assert tune(nhwc=False) == everything
        assert tune(stride=2) == everything


@needs_triton
def test_no_kernel_uses_atomics():
    for file in (ROOT / "convext" / "triton").glob("*.py"):
        assert "tl.atomic" not in file.read_text(), file


@needs_triton
class TestCompilerSeesThrough:
    """Dynamo and AOTAutograd, which torch.compile goes through, on tensors of a GPU that need not exist."""

    class Block(torch.nn.Module):
        """The passes forward and backward, by the operators of one namespace."""

        def __init__(self, ops):
            super().__init__()
            self.ops = ops

        def forward(self, x, w, dw):
            ops, geom, depthwise = self.ops, ([2, 2], [1, 1], [1, 1], 1), ([2, 2], [1, 1], [1, 1], 64)
            if ops is torch.ops.convext:
                y = ops.fprop(x, w, None, *geom)
                z = ops.conv_bn_act(x, dw, *[None] * 6, 0.0, "relu", *depthwise)
                gradients = ops.dgrad(z, dw, [56, 56], *depthwise), ops.wgrad(z, x, [3, 3], *depthwise)
            else:
                y = ops.fprop(x, w, *[None] * 6, 0.0, "relu", *geom)
                z = ops.fprop(x, dw, *[None] * 6, 0.0, "relu", *depthwise)
                gradients = ops.depthwise_backward(z, x, dw, *depthwise)
            mean, var = ops.batch_stats(y)
            out = ops.bn_act(y, mean, var, None, None, None, 1e-5, "silu")
            dy = ops.bn_act_backward(out, y, mean, var, None, None, y, 1e-5, "silu", True)
            return out, dy, ops.dgrad(y, w, [56, 56], *geom), ops.wgrad(y, x, [3, 3], *geom), gradients

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        from triton.runtime import driver

        from convext.triton import direct, launch, ops, wgrad

        assert ops.fprop is not None
        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: TARGET))
        for module in (direct, launch, wgrad):
            monkeypatch.setattr(module, "processors", lambda device: 132)
        self.served_by("triton", monkeypatch)
        torch._dynamo.reset()
        yield
        convext.backends.forget()

    @staticmethod
    def served_by(name, monkeypatch):
        reasons = {"native": "the CUDA library is not built", "triton": None if name == "triton" else "", "aten": None}
        monkeypatch.setattr(convext.backends, "_unavailable", {(n, "cuda"): reason for n, reason in reasons.items()})
        for cache in ("_choices", "_batch_norm"):
            monkeypatch.setattr(convext.backends, cache, {})

    def operands(self, batch=2):
        shapes = (batch, 64, 56, 56), (64, 64, 3, 3), (64, 1, 3, 3)
        with FakeTensorMode():
            return tuple(torch.empty(shape, device="cuda:0", dtype=torch.bfloat16) for shape in shapes)

    @staticmethod
    def compiled(model, shape, dynamic=False):
        """The graphs that `torch.compile(model, fullgraph=True)` hands to its compiler, with their inputs and mode."""
        from torch._dynamo.backends.common import aot_autograd

        graphs = []

        def keep(graph, inputs):
            graphs.append((graph, inputs))
            return graph.forward

        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model = model.to("cuda")
            x = torch.empty(shape, device="cuda")
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x)
        return graphs, mode

    @needs_torchs_triton
    @pytest.mark.parametrize("namespace", ["convext", "convext_triton"])
    def test_it_finds_the_kernels_and_what_they_write(self, namespace):
        graph, _ = aot_export_module(self.Block(getattr(torch.ops, namespace)), self.operands(), trace_joint=False)
        assert boxes(graph) == []
        kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        assert {kernel_of(node) for node in kernels} == set(WRITTEN)
        for node in kernels:
            written = set(node.kwargs["tensors_to_clone"])
            expected = WRITTEN[kernel_of(node)]
            assert written == expected & {name for name, value in node.kwargs["kwargs"].items() if value is not None}

    @pytest.mark.parametrize("training", [True, False])
    def test_a_fused_layer_is_one_graph_of_kernels(self, training):
        layer = convext.nn.ConvBNReLU(32, 64, 3, padding=1).train(training)
        ((graph, _),), _ = self.compiled(layer, (4, 32, 28, 28))
        assert boxes(graph) == []
        expected = ["fprop_kernel", "finish_kernel", "stats_tile_kernel", "stats_merge_kernel", "bn_act_kernel"]
        assert [kernel_of(n) for n in graph.graph.nodes if kernel_of(n)] == (expected if training else expected[:2])

    @pytest.mark.parametrize("training", [True, False])
    def test_a_swapped_network_is_one_graph_of_kernels(self, training):
        torchvision = pytest.importorskip("torchvision")
        model = convext.swap(torch.nn.Sequential(*torchvision.models.mobilenet_v2().features[:4]).train(training))
        ((graph, _),), _ = self.compiled(model, (2, 3, 32, 32))
        assert boxes(graph) == []
        found = [kernel_of(node) for node in graph.graph.nodes if kernel_of(node)]
        assert (found.count("fprop_kernel"), found.count("depthwise_fprop_kernel")) == (6, 3)

    @pytest.mark.parametrize("training", [True, False])
    def test_what_inductor_writes_stands_on_its_own(self, training, tmp_path):
        """The kernels' sources that it copies into its module compile from there."""
        from inductor_on_paper import compile_kernels, written

        model = torch.nn.Sequential(
            convext.nn.ConvBNReLU(32, 64, 3, padding=1, activation="gelu"),
            convext.nn.DepthwiseConv2d(64, 3, dilation=2),
        ).train(training)
        ((graph, inputs),), mode = self.compiled(model, (4, 32, 28, 28))
        module = written(graph, inputs, mode)
        assert "convext" not in re.sub("#.*", "", module)
        wanted = {"fprop_kernel", "finish_kernel", "depthwise_fprop_kernel"}
        wanted |= {"stats_tile_kernel", "stats_merge_kernel", "bn_act_kernel"} if training else set()
        assert set(compile_kernels(module, TARGET, tmp_path)) == wanted

    def test_boxes_stay_closed_where_another_backend_serves(self, monkeypatch):
        self.served_by("aten", monkeypatch)
        ((graph, _),), _ = self.compiled(convext.nn.ConvBNReLU(32, 64, 3), (4, 32, 28, 28))
        assert boxes(graph) and not any(kernel_of(node) for node in graph.graph.nodes)

    def test_boxes_stay_closed_where_sizes_are_symbolic(self):
        ((graph, _),), _ = self.compiled(convext.nn.ConvBNReLU(32, 64, 3).eval(), (4, 32, 28, 28), dynamic=True)
        assert boxes(graph) == ["convext.conv_bn_act.default"]

    def test_boxes_stay_closed_for_an_empty_batch_and_for_export(self):
        block = self.Block(torch.ops.convext)
        graph, _ = aot_export_module(block, self.operands(batch=0), trace_joint=False)
        assert len(boxes(graph)) == 9
        with torch._functorch.config.patch(decompose_custom_triton_ops=False):
            graph, _ = aot_export_module(block, self.operands(), trace_joint=False)
        assert len(boxes(graph)) == 9

    def test_bad_arguments_are_refused_while_compiling(self):
        layer = convext.nn.ConvBNReLU(32, 64, 3)
        with pytest.raises(Exception, match="input.*32 channels.*got 31"):
            self.compiled(layer, (4, 31, 28, 28))


def boxes(graph):
    return [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("convext")]


def kernel_of(node):
    """Name of the kernel that a node launches, or None."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    if "triton_kernel_wrapper" not in str(node.target):
        return None
    return kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.fn.__name__


if HAVE_TRITON:
    from triton.backends.compiler import GPUTarget

    TARGET = GPUTarget("cuda", 90, 32)

WRITTEN = {
    "fprop_kernel": {"y_ptr"},
    "finish_kernel": {"y_ptr"},
    "dgrad_kernel": {"dx_ptr"},
    "wgrad_kernel": {"dw_ptr"},
    "reduce_kernel": {"out_ptr"},
    "depthwise_fprop_kernel": {"y_ptr"},
    "depthwise_backward_kernel": {"dx_ptr", "slab_ptr"},
    "stats_tile_kernel": {"slab_ptr"},
    "stats_merge_kernel": {"mean_ptr", "var_ptr"},
    "bn_act_kernel": {"out_ptr"},
    "bn_act_backward_sums_kernel": {"slab_ptr"},
    "bn_act_backward_kernel": {"dy_ptr", "dz_ptr"},
}


def test_problem_of_the_reference_is_served_by_name():
    geom = Geom((1, 1), (2, 2), (2, 2), 1)
    x, w = torch.empty(1, 8, 9, 9), torch.empty(8, 8, 3, 3)
    assert BACKEND.variant(Pass.WGRAD, ConvProblem.of_fprop(x, w, geom)) == "wgrad_dilated_float32_triton"
