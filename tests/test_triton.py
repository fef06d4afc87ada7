"""The Triton backend on a machine without a GPU: what it says of itself, how it chooses, what a compiler sees of it,
and its numbers in Triton's interpreter (triton_interpreter.py, run in a process of its own)."""

import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

import convext
from convext.backends import triton as backend_module
from convext.problem import ACTIVATIONS, ConvProblem, Geom, Pass

BACKEND = backend_module.BACKEND
ROOT = pathlib.Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = backend_module._installed_version() is not None
needs_triton = pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="Triton is not installed, or interprets")


class TestInTheInterpreter:
    """Each part of tests/triton_interpreter.py as one test."""

    @pytest.mark.timeout(900)  # about a minute of one core's time each, on a machine that may be busy
    @pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
    @pytest.mark.parametrize("part", ["cases_float32", "cases_in_other_dtypes or empty_batch", "TestNetworks",
                                      "not cases and not empty_batch and not TestNetworks"])
    def test_passes(self, part):
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreter.py", "-k", part]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
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

    def test_absent_cuda_library_leaves_triton_first(self, monkeypatch):
        """With a GPU, Triton, and no compiled CUDA library, every pass of every problem is Triton's."""
        monkeypatch.setattr(convext.backends, "_unavailable", {
            ("native", "cuda"): "the CUDA library is not built", ("triton", "cuda"): None, ("aten", "cuda"): None})
        monkeypatch.setattr(convext.backends, "_choices", {})
        for groups in (1, 4, 16):
            for dilation in (1, 3):
                problem = ConvProblem(2, 16, 9, 9, 32, 3, 3, 2, 1, 1, 1, dilation, dilation, groups, device="cuda")
                for pass_ in Pass:
                    choice = convext.backends.select(pass_, problem)
                    assert choice.backend.name == "triton"
                    assert choice.passed_over == {"native": "the CUDA library is not built"}

    def test_a_launch_too_large_is_rejected_in_words(self):
        problem = ConvProblem(1 << 20, 1 << 10, 64, 64, 1 << 10, 7, 7, 1, 1, 3, 3, 1, 1, 1, device="cuda")
        assert "2^31 - 1" in BACKEND.reject(Pass.FPROP, problem)
        assert BACKEND.reject(Pass.FPROP, ConvProblem(1, 1, 3, 3, 1, 3, 3, 1, 1, 0, 0, 1, 1, 1)) is None


@needs_triton
class TestActivations:
    def test_list_is_that_of_epilogue_h_in_its_order(self):
        from convext.triton import epilogue

        header = (ROOT / "csrc" / "epilogue.h").read_text()
        names = re.search(r"#define CONVEXT_ACTIVATIONS\(X\)(.*)", header)[1]
        assert epilogue.ACTIVATIONS == tuple(re.findall(r"X\((\w+)\)", names))
        assert {name: i for i, name in enumerate(epilogue.ACTIVATIONS)} == ACTIVATIONS


@needs_triton
class TestChoice:
    def test_large_layers_take_large_tiles_and_small_ones_fill_the_gpu(self):
        from convext.triton.configs import cheapest, gemm_configs

        def tile(*gemm):
            return tuple(cheapest(gemm_configs("half", "cuda"), *gemm, processors=132).kwargs.values())

        assert tile(64 * 56 * 56, 256, 64 * 9, 1) == (128, 128, 64)
        assert tile(7 * 7, 512, 512 * 9, 1) == (64, 64, 64)
        assert tile(32 * 112 * 112, 16, 32, 1)[1] == 32

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

    def test_measures_only_where_told_to_and_never_while_capturing(self):
        from convext.triton import launch

        device = torch.device("cuda", 0)
        capturing = SimpleNamespace(is_current_stream_capturing=lambda: True)
        idle = SimpleNamespace(is_current_stream_capturing=lambda: False)
        with mock.patch.object(torch, "get_device_module", lambda device: idle):
            assert not launch.may_measure(device)
            with torch.backends.cudnn.flags(benchmark=True):
                assert launch.may_measure(device)
                with torch.backends.cudnn.flags(benchmark=True, deterministic=True):
                    assert not launch.may_measure(device)
        with mock.patch.object(torch, "get_device_module", lambda device: capturing), torch.backends.cudnn.flags(
                benchmark=True):
            assert not launch.may_measure(device)

    def test_tuned_kernels_keep_their_timings_on_disk(self):
        from convext.triton import direct, launch
        from convext.triton.configs import gemm_configs

        tuned = launch._tuned(direct.fprop_kernel, gemm_configs("half", "cuda"))
        assert tuned.cache_results and len(tuned.configs) == 4
        assert {"tuning_key", "R", "STRIDE_H", "PATCH_Q"} <= set(tuned.keys)


@needs_triton
def test_no_kernel_uses_atomics():
    for file in (ROOT / "convext" / "triton").glob("*.py"):
        assert "tl.atomic" not in file.read_text(), file


@needs_triton
class TestCompilerSeesThrough:
    """AOTAutograd, which torch.compile goes through, on tensors of a GPU that need not exist."""

    class Block(torch.nn.Module):
        def forward(self, x, w, dw):
            ops = torch.ops.convext_triton
            geom = [2, 2], [1, 1], [1, 1], 1
            y = ops.fprop(x, w, None, None, None, None, None, None, *geom, 0.0, "relu")
            mean, var = ops.batch_stats(y)
            out = ops.bn_act(y, mean, var, None, None, None, 1e-5, "silu")
            dx = ops.dgrad(y, w, [56, 56], *geom)
            z = ops.fprop(x, dw, None, None, None, None, None, None, *geom[:3], 64, 0.0, "relu")
            return out, dx, ops.wgrad(y, x, [3, 3], *geom), ops.depthwise_backward(z, x, dw, *geom[:3], 64)

    def test_it_finds_the_kernels_and_what_they_write(self, monkeypatch):
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
        from triton.runtime import driver

        from convext.triton import launch, ops, wgrad

        assert ops.fprop is not None
        gpu = SimpleNamespace(get_current_target=lambda: TARGET)
        monkeypatch.setattr(driver, "_active", gpu)
        for module in (launch, wgrad):
            monkeypatch.setattr(module, "processors", lambda device: 132)
        with FakeTensorMode():
            x = torch.empty(2, 64, 56, 56, device="cuda:0", dtype=torch.bfloat16)
            w = torch.empty(64, 64, 3, 3, device="cuda:0", dtype=torch.bfloat16)
            dw = torch.empty(64, 1, 3, 3, device="cuda:0", dtype=torch.bfloat16)
        graph, _ = aot_export_module(self.Block(), (x, w, dw), trace_joint=False)
        assert not any("convext_triton" in str(node.target) for node in graph.graph.nodes), "a closed box is left"
        kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        assert len(kernels) == 10
        for node in kernels:
            name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.fn.__name__
            assert set(node.kwargs["tensors_to_clone"]) == WRITTEN[name]


if HAVE_TRITON:
    from triton.backends.compiler import GPUTarget

    TARGET = GPUTarget("cuda", 90, 32)

WRITTEN = {
    "fprop_kernel": {"y_ptr"}, "dgrad_kernel": {"dx_ptr"}, "wgrad_kernel": {"dw_ptr"}, "reduce_kernel": {"out_ptr"},
    "depthwise_fprop_kernel": {"y_ptr"}, "depthwise_backward_kernel": {"dx_ptr", "slab_ptr"},
    "stats_tile_kernel": {"slab_ptr"}, "stats_merge_kernel": {"mean_ptr", "var_ptr"}, "bn_act_kernel": {"out_ptr"},
}


def test_problem_of_the_reference_is_served_by_name():
    geom = Geom((1, 1), (2, 2), (2, 2), 1)
    x, w = torch.empty(1, 8, 9, 9), torch.empty(8, 8, 3, 3)
    assert BACKEND.variant(Pass.WGRAD, ConvProblem.of_fprop(x, w, geom)) == "wgrad_dilated_float32_triton"
