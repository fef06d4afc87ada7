"""Every Triton kernel in every configuration that ships, compiled for sm_80, sm_90 and gfx942 on a machine without any.

Wanted are the matrix instructions: without them a kernel would still be right, and tens of times too slow.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton_compile import SHARED_MEMORY, TARGETS, aiming_at, compiled, spills_in_innermost_loop

from convext.problem import ACTIVATIONS, ConvProblem, Epilogue, Geom, accumulate_dtype
from convext.triton import batch_norm, depthwise, direct, wgrad

MATRIX = {"sm_80": r"mma\.sync\S+", "sm_90": r"wgmma\.mma_async\S+", "gfx942": r"v_mfma_\w+"}
OPERANDS = {
    ("sm_80", torch.bfloat16): "bf16.bf16",
    ("sm_90", torch.bfloat16): "bf16.bf16",
    ("gfx942", torch.bfloat16): "bf16",
    ("sm_80", torch.float16): "f16.f16",
    ("sm_90", torch.float16): "f16.f16",
    ("gfx942", torch.float16): "f16",
}


class Layer:
    """The operands of one convolution, without memory behind them."""

    def __init__(self, dtype, x=(8, 64, 56, 56), w=(128, 64, 3, 3), geom=((1, 1), (1, 1), (1, 1), 1), nhwc=True):
        self.geom = Geom(*geom)
        self.format = torch.channels_last if nhwc else torch.contiguous_format
        self.x, self.w = self.meta(x, dtype), torch.empty(w, dtype=dtype, device="meta")
        self.problem = ConvProblem.of_fprop(self.x, self.w, self.geom)
        self.y = self.meta(self.problem.y_shape, dtype)

    def meta(self, shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=self.format)

    def launches(self, pass_):
        problem = self.problem
        if pass_ == "fprop":
            return direct.fprop(problem, self.x, self.w, Epilogue(activation="relu"), self.y)
        if pass_ == "dgrad":
            return direct.dgrad(problem, self.y, self.w, self.x)
        return wgrad.wgrad(problem, self.y, self.x, self.w)

    def depthwise(self):
        problem = self.problem
        return [
            depthwise.fprop(problem, self.x, self.w, self.epilogue("hardswish"), self.y),
            *depthwise.backward(problem, self.y, self.x, self.w, self.x, self.w),
            depthwise.backward(problem, self.y, None, self.w, self.x, None)[0],
            depthwise.backward(problem, self.y, self.x, None, None, self.w)[0],
        ]

    def epilogue(self, activation):
        k = self.w.shape[0]
        statistics = torch.empty(k, device="meta", dtype=accumulate_dtype(self.x.dtype))
        return Epilogue(*[statistics] * 5, residual=self.y, activation=activation)


def configurations(launches, only_first=False):
    for launch in launches:
        for config in launch.configs[:1] if only_first else launch.configs:
            yield launch, config


# The configurations were chosen with this release. Another one may want a register more than there are, and keep a
# value in memory from before a loop to behind it.
SPARES_REGISTERS = triton.__version__.startswith("3.6.")


def check(target, launches, only_first=False, may_spill=False):
    """Compiles; yields the code of the GEMM kernels."""
    for launch, config in configurations(launches, only_first):
        code = compiled(launch, config, target)
        assert code.shared <= SHARED_MEMORY[target], f"{config} needs {code.shared} B of shared memory on {target}"
        assert not code.spills_in_loop or (may_spill and target == "gfx942"), f"{config} spills in a loop on {target}"
        assert may_spill or not SPARES_REGISTERS or not code.spills, f"{config} spills registers on {target}"
        if "BLOCK_N" in config.kwargs:
            yield code


SASS = """
        /*0010*/                   STL [R1], R23 ;                    /* 0x0000000000000000 */
        /*0020*/                   MOV R2, R3 ;                       /* 0x0000000000000000 */
        /*0030*/                   HMMA.16816.F32 R4, R8, R2, R4 ;    /* 0x0000000000000000 */
        /*0040*/              @!P0 BRA 0x30 ;                         /* 0x0000000000000000 */
        /*0050*/               @P1 BRA 0x20 ;                         /* 0x0000000000000000 */
        /*0060*/                   LDL.LU R43, [R1] ;                 /* 0x0000000000000000 */
        /*0070*/                   BRA 0x70 ;                         /* 0x0000000000000000 */
"""


@pytest.mark.parametrize(
    "line, costs", [("MOV R2, R3", False), ("HMMA.16816.F32 R4, R8, R2, R4", True)], ids=["outer loop", "inner loop"]
)
def test_a_spill_in_an_innermost_loop_is_found(line, costs):
    assert not spills_in_innermost_loop(SASS)
    assert spills_in_innermost_loop(SASS.replace(line, "LDL R2, [R1]")) == costs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
class TestMatrixInstructions:
    def test_bfloat16_in_every_configuration(self, target, pass_):
        with aiming_at(target):
            codes = list(check(target, Layer(torch.bfloat16).launches(pass_)))
        assert len(codes) == 4
        for code in codes:
            found = code.instructions(MATRIX[target])
            assert found and all(OPERANDS[target, torch.bfloat16] in name for name in found)

    def test_float16(self, target, pass_):
        with aiming_at(target):
            codes = list(check(target, Layer(torch.float16, nhwc=False).launches(pass_), only_first=True))
        for code in codes:
            found = code.instructions(MATRIX[target])
            assert found and all(OPERANDS[target, torch.float16] in name for name in found)

    def test_tf32_only_where_the_flag_allows(self, target, pass_):
        for allowed in (False, True):
            with aiming_at(target, tf32=allowed):
                launches = Layer(torch.float32).launches(pass_)
                # PyTorch has no tf32 convolution on AMD's GPUs, and float32 has matrix instructions there.
                tf32 = allowed and target != "gfx942"
                assert launches[0].arguments["PRECISION"] == ("tf32" if tf32 else "ieee")
                for code in check(target, launches, only_first=not tf32):
                    assert bool(code.instructions(MATRIX[target])) == (tf32 or target == "gfx942")
                    assert bool(code.instructions("tf32")) == tf32

    def test_float64_by_plain_sums(self, target, pass_):
        with aiming_at(target):
            for code in check(target, Layer(torch.float64).launches(pass_)):
                assert code.instructions(r"fma\.rn\.f64|v_fma_f64|v_fmac_f64")

    def test_dilated_strided_grouped_and_few_channels(self, target, pass_):
        cases = [
            dict(x=(2, 64, 33, 33), w=(64, 64, 3, 3), geom=((2, 2), (12, 12), (12, 12), 1)),
            dict(x=(2, 64, 28, 28), w=(64, 4, 3, 3), geom=((1, 1), (1, 1), (1, 1), 16), nhwc=False),
            dict(x=(2, 3, 64, 64), w=(64, 3, 7, 7), geom=((2, 2), (3, 3), (1, 1), 1)),
        ]
        with aiming_at(target):
            for case in cases:
                for code in check(target, Layer(torch.bfloat16, **case).launches(pass_)):
                    # wgmma takes tiles of 64 rows, and A and B as shared memory holds them: mma elsewhere.
                    assert code.instructions(r"(?:wgmma\.mma_async|mma\.sync)\S+|v_mfma_\w+")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_loop_split_over_programs(target, pass_, monkeypatch):
    """On sm_80 two of the tiles, at their limit of 128 registers a thread, keep 8 or 16 bytes in memory then."""
    monkeypatch.setattr(direct, "processors", lambda device: 132)
    layer = Layer(torch.bfloat16, (1, 512, 14, 14), (512, 512, 3, 3), ((2, 2), (1, 1), (1, 1), 1))
    with aiming_at(target):
        launches = layer.launches(pass_)
        assert launches[0].arguments["split_k"] > 1 and len(launches) == 2
        code, *_ = check(target, launches, may_spill=target == "sm_80")
    assert code.instructions(MATRIX[target])


@pytest.mark.parametrize("target", TARGETS)
class TestMemoryBoundKernels:
    @pytest.mark.parametrize("dtype, nhwc", [(torch.bfloat16, False), (torch.float64, True)], ids=str)
    def test_depthwise(self, target, dtype, nhwc):
        layer = Layer(dtype, (4, 96, 56, 56), (96, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 96), nhwc)
        with aiming_at(target):
            assert list(check(target, layer.depthwise())) == []

    def test_depthwise_that_loops_over_taps(self, target):
        layer = Layer(torch.float16, (4, 96, 28, 28), (192, 1, 3, 3), ((1, 1), (6, 6), (6, 6), 96))
        with aiming_at(target):
            assert list(check(target, layer.depthwise()[:2])) == []

    @pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
    def test_batch_norm(self, target, nhwc):
        layer = Layer(torch.bfloat16, nhwc=nhwc)
        y, e = layer.y, layer.epilogue("relu")
        with aiming_at(target):
            launches = [
                *batch_norm.batch_stats(y, e.mean, e.var),
                batch_norm.bn_act(y, e.mean, e.var, e.gamma, e.beta, y, 1e-5, "relu", y),
                *batch_norm.bn_act_backward(
                    y, y, e.mean, e.var, e.gamma, e.beta, y, 1e-5, "silu", True, y, e.gamma, e.beta, y
                ),
            ]
            assert list(check(target, launches)) == []

    def test_batch_norm_of_one_pixel_and_of_one_image(self, target):
        """Triton makes constants of sizes that are 1."""
        layer = Layer(torch.float32, (8, 64, 1, 1), (64, 64, 1, 1), ((1, 1), (0, 0), (1, 1), 1), nhwc=False)
        y, e = layer.y, layer.epilogue("relu")
        with aiming_at(target):
            launches = [
                *batch_norm.batch_stats(y, e.mean, e.var),
                *batch_norm.bn_act_backward(
                    y, y, e.mean, e.var, e.gamma, e.beta, None, 1e-5, "silu", True, y, e.gamma, e.beta, None
                ),
            ]
            assert list(check(target, launches)) == []

    def test_every_activation(self, target):
        """bn_act and fprop share the epilogue's code; the smaller kernel compiles sooner. All of it with gelu over a
        large tile may spill: after the loop, once a tile."""
        layer = Layer(torch.bfloat16)
        y, e = layer.y, layer.epilogue("gelu")
        with aiming_at(target):
            fused = direct.fprop(layer.problem, layer.x, layer.w, e, y)
            assert len(list(check(target, fused, only_first=True, may_spill=True))) == 1
            launches = [
                batch_norm.bn_act(y, e.mean, e.var, None, None, None, 1e-5, activation, y) for activation in ACTIVATIONS
            ]
            assert list(check(target, launches)) == []

    def test_offsets_beyond_32_bits(self, target):
        layer = Layer(torch.bfloat16, (700, 256, 112, 112), (64, 256, 1, 1), ((1, 1), (0, 0), (1, 1), 1))
        with aiming_at(target):
            for pass_ in ("fprop", "dgrad", "wgrad"):
                launches = layer.launches(pass_)
                assert str(launches[0].arguments["INDEX"]) == "int64"
                list(check(target, launches, only_first=True))
