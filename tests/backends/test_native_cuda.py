"""convext/backends/native_cuda.py without a GPU: convext/_CUDA built over the emulator, and tensors of the CPU.

Everything runs as on a GPU but the memory and the stream: selection, layouts, weight orders, workspaces, epilogues.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
import subprocess
import sysconfig
import threading
import time

import cuda_on_cpu as harness
import pytest
import torch
import torch.nn.functional as F

import convext
from convext import backends
from convext.backends import native_cuda, tuned
from convext.bench import host
from convext.bench.timing import Timing
from convext.problem import STATISTICS, ConvProblem, DType, Epilogue, Geom, Layout, Pass
from convext.tune import measure
from convext.tune.measure import candidates

pytestmark = [
    pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not())),
    pytest.mark.timeout(1200),
]  # the first test of a form waits for its build


@pytest.fixture(scope="session")
def emulated(shared):
    """The module convext._CUDA with its kernels on the CPU."""
    import pybind11

    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    flags = [f for f in harness.flags(harness.CSRC, "plain") if f != "-O2"]
    flags += ["-O1", "-fPIC", "-fvisibility=hidden", "-DCONVEXT_CUDA_LIBRARY"]
    sources = [
        *harness.kernel_sources(),
        "cuda/batch_norm/batch_norm_sm80.cu",
        "core/select.cpp",
        "python/bindings_cuda.cpp",
        *(f"{harness.EMULATOR}/{name}.cpp" for name in ("fiber", "emulator", "runtime")),
    ]
    with shared("cuda_module") as folder:
        objects = harness.compile_all(folder, harness.CSRC, [(s, [*flags, *python]) for s in sources])
        library = folder / "_CUDA.so"
        if not library.exists():
            subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_CUDA", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda(emulated, monkeypatch):
    monkeypatch.setattr(native_cuda, "_CUDA", emulated)
    monkeypatch.setattr(native_cuda, "_where", lambda t: (0, 0))
    native_cuda.forget_plans()
    yield native_cuda.BACKEND
    native_cuda.forget_plans()


CASES = {
    "direct": ((2, 16, 9, 8), (24, 16, 3, 3), Geom((1, 1), (1, 1))),
    "direct_stride_2": ((1, 16, 9, 10), (16, 16, 3, 3), Geom((2, 2), (1, 1))),
    "pointwise": ((2, 32, 5, 6), (16, 32, 1, 1), Geom()),
    "first_layer": ((1, 3, 12, 11), (16, 3, 5, 5), Geom((2, 2), (2, 2))),
    "odd_channels": ((1, 5, 7, 6), (7, 5, 3, 3), Geom((1, 1), (1, 1))),
    "grouped": ((1, 32, 6, 6), (32, 16, 3, 3), Geom((1, 1), (1, 1), (1, 1), 2)),
    "dilated": ((1, 16, 9, 9), (16, 16, 3, 3), Geom((1, 1), (4, 4), (4, 4))),
    "depthwise": ((2, 16, 9, 8), (16, 1, 3, 3), Geom((1, 1), (1, 1), (1, 1), 16)),
    "depthwise_stride_2": ((1, 24, 9, 9), (24, 1, 5, 5), Geom((2, 2), (2, 2), (1, 1), 24)),
    "depthwise_dilated": ((1, 16, 9, 8), (16, 1, 3, 3), Geom((1, 1), (2, 2), (2, 2), 16)),
    "depthwise_multiplier": ((1, 6, 7, 8), (12, 1, 3, 3), Geom((1, 1), (1, 1), (1, 1), 6)),
}
FORMATS = {Layout.NCHW: torch.contiguous_format, Layout.NHWC: torch.channels_last}


def make(name, dtype, layout):
    x_shape, w_shape, geom = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.rand(s, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype) for s in (x_shape, w_shape))
    x = x.contiguous(memory_format=FORMATS[layout])
    p, q = geom.output_size(x_shape[2:], w_shape[2:])
    dy = torch.rand(x_shape[0], w_shape[0], p, q, generator=generator).mul(2).sub(1).to(dtype)
    problem = ConvProblem.of_fprop(x, w, geom)
    return dataclasses.replace(problem, device="cuda", x_layout=layout, y_layout=layout), x, w, dy, geom


def reference(x, w, dy, geom):
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    y = F.conv2d(x, w, None, *geom)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy.double())


def assert_close(got, want, magnitude, gemm_k, dtype):
    """Within 4 sqrt(gemm_k) u sum|ab| (Higham and Mary, 2019) for either side, the rounding of the result, and, as
    float32 goes through tf32, 2^-11 for each operand below 1."""
    roundoff = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    bound = 8 * gemm_k**0.5 * roundoff * magnitude + 1.01 * torch.finfo(dtype).eps * want.abs()
    if dtype is torch.float32:
        bound += 4 * (2 * gemm_k) ** 0.5 * 2.0**-11
    assert got.shape == want.shape and got.dtype is dtype
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"off by {error.max():.3g}"


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_passes(cuda, name, dtype, layout):
    problem, x, w, dy, geom = make(name, dtype, layout)
    wanted = reference(x, w, dy, geom)
    magnitudes = reference(x.abs(), w.abs(), dy.abs(), geom)

    def check(pass_, got):
        assert_close(got, wanted[pass_], magnitudes[pass_], problem.gemm_shape(pass_).k, dtype)

    assert all(cuda.reject(pass_, problem) is None for pass_ in Pass)
    y = cuda.fprop(problem, x, w, Epilogue())
    check(Pass.FPROP, y)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    dx = cuda.dgrad(problem, dy, w)
    check(Pass.DGRAD, dx)
    assert dx.is_contiguous(memory_format=FORMATS[layout])
    check(Pass.WGRAD, cuda.wgrad(problem, dy, x))
    if problem.is_depthwise:
        dx, dw = cuda.depthwise_backward(problem, dy, x, w)
        check(Pass.DGRAD, dx)
        check(Pass.WGRAD, dw)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("depthwise")])
def test_one_pass_serves_depthwise(cuda, name, layout):
    assert native_cuda._plan(Pass.WGRAD, make(name, torch.bfloat16, layout)[0]).writes_dx
    assert not native_cuda._plan(Pass.WGRAD, make("direct", torch.bfloat16, layout)[0]).writes_dx


def test_depthwise_contiguous_tensors_are_read_as_they_are(cuda):
    problem, *_ = make("depthwise", torch.bfloat16, Layout.NCHW)
    large = dataclasses.replace(problem, n=32, h=56, w=56)
    for pass_ in Pass:
        assert "_planes_" in cuda.variant(pass_, large)


def test_direct_contiguous_tensors_are_transposed_where_that_pays(cuda):
    problem, *_ = make("direct", torch.bfloat16, Layout.NCHW)
    large = dataclasses.replace(problem, n=32, c=256, k=256, h=28, w=28)
    for pass_ in Pass:
        assert not native_cuda._plan(pass_, large).facts["gathers"]
    rgb = dataclasses.replace(problem, n=32, c=3, k=64, h=224, w=224, r=7, s=7, stride_h=2, stride_w=2)
    for pass_ in (Pass.FPROP, Pass.WGRAD):
        assert native_cuda._plan(pass_, rgb).facts["algorithm"] == "stem"
        assert native_cuda._plan(pass_, rgb).x_layout is Layout.NCHW  # the first layer reads images as they come


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", ["direct", "depthwise", "first_layer"])
def test_epilogue(cuda, name, layout):
    problem, x, w, _, geom = make(name, torch.float64, layout)
    k = problem.k
    bias, mean, gamma, beta = torch.rand(4, k, dtype=torch.float64)
    var = torch.rand(k, dtype=torch.float64) + 0.5
    residual = torch.rand(problem.y_shape, dtype=torch.float64)
    want = F.batch_norm(F.conv2d(x, w, bias, *geom), mean, var, gamma, beta, eps=1e-3) + residual
    got = cuda.fprop(problem, x, w, Epilogue(bias, mean, var, gamma, beta, residual, 1e-3, "silu"))
    torch.testing.assert_close(got, F.silu(want))
    got = cuda.fprop(problem, x, w, Epilogue(bias=bias))
    torch.testing.assert_close(got, F.conv2d(x, w, bias, *geom))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", CASES)
def test_batch_stats_out_of_the_convolution(cuda, name, layout):
    problem, x, w, _, geom = make(name, torch.float64, layout)
    bias = torch.rand(problem.k, dtype=torch.float64)
    y, mean, var = cuda.fprop_batch_stats(problem, x, w, bias)
    want = F.conv2d(x, w, bias, *geom)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(mean, want.mean((0, 2, 3)))
    torch.testing.assert_close(var, want.var((0, 2, 3), unbiased=False))
    assert y.is_contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("name", ["direct", "first_layer", "depthwise"])
def test_batch_stats_are_those_of_y_as_stored(cuda, name):
    problem, x, w, *_ = make(name, torch.bfloat16, Layout.NHWC)
    y, mean, var = cuda.fprop_batch_stats(problem, x, w, None)
    want_mean, want_var = cuda.batch_stats(y)
    torch.testing.assert_close((mean, var), (want_mean, want_var))


def test_training_takes_the_statistics_from_the_convolution(cuda, monkeypatch):
    """Conv + BN + ReLU in training through the public operator, with the emulated kernels as the CPU's native ones."""
    backend = backends.get("native")

    def on_cuda(problem):
        return dataclasses.replace(problem, device="cuda")

    def use(name, served):
        monkeypatch.setattr(backend, name, served)

    use("reject", lambda pass_, problem: cuda.reject(pass_, on_cuda(problem)))
    use("variant", lambda pass_, problem: cuda.variant(pass_, on_cuda(problem)))
    use("fprop_batch_stats", lambda problem, *tensors: cuda.fprop_batch_stats(on_cuda(problem), *tensors))
    use("dgrad", lambda problem, dy, w: cuda.dgrad(on_cuda(problem), dy, w))
    use("wgrad", lambda problem, dy, x, channels_last: cuda.wgrad(on_cuda(problem), dy, x, channels_last))
    use("bn_act", cuda.bn_act)
    use("bn_act_backward", cuda.bn_act_backward)
    use("unavailable", lambda device_type: None)
    use("batch_stats", None)  # y must not be read again
    problem, x, w, dy, geom = make("direct", torch.float64, Layout.NHWC)
    gamma, beta = torch.rand(2, problem.k, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, w, gamma, beta)]
    with convext.backend("native"):
        out, *_ = torch.ops.convext.conv_bn_act_train(*leaves[:2], *[None] * 3, *leaves[2:], None, 1e-3, "relu", *geom)
        got = torch.autograd.grad(out, leaves, dy)
    y = F.batch_norm(F.conv2d(*leaves[:2], None, *geom), None, None, *leaves[2:], True, eps=1e-3)
    torch.testing.assert_close(out, y.relu())
    for g, want in zip(got, torch.autograd.grad(y.relu(), leaves, dy)):
        torch.testing.assert_close(g, want)


# ---- measured


@pytest.fixture
def measurable(cuda, monkeypatch, tmp_path):
    """The emulated kernels and ATen serve "cuda", and are measured on tensors of the CPU."""
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_unavailable", {("native", "cuda"): None, ("triton", "cuda"): "not here"})
    monkeypatch.setattr(tuned, "is_here", lambda device_type: False)  # no file is looked for
    tuned.forget()
    yield cuda
    tuned.forget()


def times(fastest):
    return lambda calls: {name: Timing((1.0 if name == fastest else 2.0,) * 4) for name in calls}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", ["direct", "pointwise", "first_layer", "depthwise_stride_2", "odd_channels"])
def test_every_candidate_is_right(measurable, name, dtype, layout):
    problem = make(name, dtype, layout)[0]
    cpu = torch.device("cpu")
    asked = [*((pass_, "") for pass_ in Pass), (Pass.FPROP, "bn add silu"), (Pass.FPROP, STATISTICS)]
    for pass_, kind in asked:
        among = [str(candidate) for candidate in candidates(pass_, problem, kind)]
        assert among[0] == f"native {measurable.variant(pass_, problem)}" and among[-1].startswith("aten ")
        found = measure(pass_, problem, kind, timer=times(""), device=cpu)
        assert not found.wrong and [*found.timings] == among


def test_the_kernel_that_was_measured_to_be_the_fastest_serves(measurable):
    problem, x, w, dy, geom = make("direct", torch.bfloat16, Layout.NHWC)
    names = [candidate.variant for candidate in measurable.candidates(Pass.FPROP, problem)]
    assert len(names) > 1 and names[0] == backends.would_serve(Pass.FPROP, problem).variant
    assert len(names) == len(set(names)) <= 4
    for kind in ("", "bn relu", STATISTICS):
        tuned.of("cuda").choices[tuned.key(Pass.FPROP, problem, kind)] = tuned.KeptChoice("native", names[1], {})
        native_cuda.forget_plans()
        choice = backends.would_serve(Pass.FPROP, problem, kind)
        assert choice.variant == names[1] == native_cuda._plan(Pass.FPROP, problem, kind).name
        y = choice.run(problem, x, w, Epilogue())
        assert_close(y, F.conv2d(x.double(), w.double(), None, *geom), 144.0, 144, torch.bfloat16)
    assert native_cuda._plan(Pass.FPROP, problem, "relu").name == names[0]
    assert backends.would_serve(Pass.FPROP, problem, "relu").variant == names[0]


def test_no_kernel_that_was_put_aside_serves(measurable):
    problem = make("direct", torch.bfloat16, Layout.NHWC)[0]
    first = measurable.variant(Pass.FPROP, problem)
    tuned.of("cuda").aside[first] = "its result is wrong"
    native_cuda.forget_plans()
    assert measurable.variant(Pass.FPROP, problem) != first
    assert first not in [candidate.variant for candidate in measurable.candidates(Pass.FPROP, problem)]
    tuned.of("cuda").aside.update({facts["name"]: "its result is wrong" for facts in native_cuda._variants()})
    native_cuda.forget_plans()
    assert f"it was put aside: its result is wrong ({first}" in measurable.reject(Pass.FPROP, problem)
    assert backends.would_serve(Pass.FPROP, problem).backend.name == "aten"


def test_a_measured_kernel_of_tf32_serves_only_while_that_is_allowed(measurable):
    problem, x, w, *_ = make("direct", torch.float32, Layout.NHWC)
    with torch.backends.cudnn.flags(allow_tf32=True):
        found = measurable.candidates(Pass.FPROP, problem)
        (name, run), *_ = [(c.variant, c.run) for c in found if "tf32" in c.variant]
        rounded = run(problem, x, w, Epilogue())
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert name not in [c.variant for c in measurable.candidates(Pass.FPROP, problem)]
        exact = run(problem, x, w, Epilogue())
    want = F.conv2d(x.double(), w.double(), None, *problem.geom)
    assert (exact - want).abs().max() < 1e-5 < (rounded - want).abs().max()


def test_what_kernels_say_of_themselves_is_what_their_names_say(emulated):
    arithmetic = {"bf16": "bfloat16", "f16": "float16", "tf32": "tf32"}
    for facts in emulated.variants():
        pass_, family, dtype, *rest = facts["name"].split("_")
        assert Pass(facts["pass"]).name.lower() == pass_ and facts["isa"] == rest[-1]
        assert facts["algorithm"] == (family if family in ("depthwise", "stem") else "direct")
        assert facts["arithmetic"] == (
            arithmetic[dtype] if family in ("igemm", "stem") else "float64" if dtype == "f64" else "float32"
        )
        assert facts["gathers"] == (family in ("simt", "stem") or "gather" in rest)
        assert facts["block"] == ([0, 0, 0] if family == "depthwise" else [int(n) for n in rest[0].split("x")])


def test_tf32_only_where_it_is_allowed(cuda):
    problem, *_ = make("direct", torch.float32, Layout.NHWC)
    with torch.backends.cudnn.flags(allow_tf32=True):  # not the attribute: OpInfo's suite, once imported, forbids it
        assert native_cuda._plan(Pass.FPROP, problem).facts["arithmetic"] == "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert native_cuda._plan(Pass.FPROP, problem).facts["arithmetic"] == "float32"


def test_plans_keep_whether_tf32_was_allowed(cuda):
    """A plan made under one wish launches under it again after another was in force: the selection is what is kept."""
    problem, x, w, dy, _ = make("direct", torch.float32, Layout.NHWC)
    run = {
        Pass.FPROP: lambda: cuda.fprop(problem, x, w, Epilogue()),
        Pass.DGRAD: lambda: cuda.dgrad(problem, dy, w),
        Pass.WGRAD: lambda: cuda.wgrad(problem, dy, x),
    }
    for pass_, call in run.items():
        for first in (True, False):
            native_cuda.forget_plans()
            results = {}
            for allowed in (first, not first, first, not first):
                with torch.backends.cudnn.flags(allow_tf32=allowed):
                    assert cuda.reject(pass_, problem) is None
                    assert (native_cuda._plan(pass_, problem).facts["arithmetic"] == "tf32") == allowed
                    got = call()
                assert torch.equal(results.setdefault(allowed, got), got)
            assert not torch.equal(results[True], results[False])  # the one was rounded


def test_the_reason_that_tf32_is_not_allowed_is_told_where_it_is_one(cuda):
    problem, *_ = make("direct", torch.float32, Layout.NHWC)
    fields = native_cuda._fields(problem, Layout.NHWC, Layout.NHWC)
    for allowed in (True, False):
        reasons = {why for _, why in native_cuda._CUDA.reject_reasons(int(Pass.FPROP), fields, allowed)}
        assert ("rounding to tf32 is not allowed" in reasons) != allowed


@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v2"])
def test_every_layer_pass_and_dtype_has_a_kernel(cuda, model, capsys):
    pytest.importorskip("torchvision")
    from convext import cli

    assert cli.main(["report", "--model", model, "--device", "cuda", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "all served" in printed
    names = set(re.findall(r"\b(?:[fdw]prop|dgrad|wgrad)_[a-z]+_(?:bf16|f16|tf32|f32|f64)_\w+", printed))
    for pass_ in ("fprop", "dgrad", "wgrad"):
        assert {n.split("_")[2] for n in names if n.startswith(pass_)} >= {"bf16", "f16", "tf32", "f64"}
        assert any(n.startswith(f"{pass_}_igemm_bf16") for n in names)
        assert model == "resnet50" or f"{pass_}_depthwise_bf16_window_sm80" in names


def test_the_cost_model_takes_every_tile_somewhere(cuda):
    """A tile that no layer at a batch of 32 wants would be dead weight."""
    pytest.importorskip("torchvision")
    from convext import zoo
    from convext.bench import problems

    taken = {pass_: set() for pass_ in Pass}
    for model in ("resnet50", "mobilenet_v2"):
        for problem in problems.collect(zoo.build(model)[0], zoo.sample(model, 1)):
            problem = dataclasses.replace(
                problem, n=32, device="cuda", dtype=DType.BFLOAT16, x_layout=Layout.NHWC, y_layout=Layout.NHWC
            )
            for pass_ in Pass:
                taken[pass_].add(tuple(native_cuda._plan(pass_, problem).facts["block"]))
    for pass_ in Pass:
        assert {(m, n) for m, n, _ in taken[pass_]} >= {(256, 128), (128, 128), (128, 64), (64, 64), (64, 32)}, taken


def test_views_that_are_not_aligned_are_copied(cuda):
    problem, x, w, _, geom = make("direct", torch.bfloat16, Layout.NHWC)
    raw = torch.empty(x.numel() + 1, dtype=x.dtype)
    shifted = raw[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert shifted.data_ptr() % 16
    torch.testing.assert_close(cuda.fprop(problem, shifted, w, Epilogue()), cuda.fprop(problem, x, w, Epilogue()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", Layout)
def test_batch_norm(cuda, layout, training):
    generator = torch.Generator().manual_seed(2)
    y, dout, residual = (
        torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64).contiguous(memory_format=FORMATS[layout])
        for _ in range(3)
    )
    gamma, beta = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    mean, var = cuda.batch_stats(y)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), unbiased=False))
    leaves = [t.clone().requires_grad_() for t in (y, gamma, beta, residual)]
    statistics = (None, None) if training else (mean, var)
    want = F.silu(F.batch_norm(leaves[0], *statistics, leaves[1], leaves[2], training, eps=1e-3) + leaves[3])
    epilogue = Epilogue(None, mean, var, gamma, beta, residual, 1e-3, "silu")
    torch.testing.assert_close(cuda.bn_act(y, epilogue), want.detach())
    got = cuda.bn_act_backward(dout, y, epilogue, training)
    for g, w in zip(got, torch.autograd.grad(want, leaves, dout)):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_pixel_reaches_only_what_meets_it(cuda, dtype):
    """Reductions that are padded with zeros of one operand alone would make NaN of it."""
    problem, x, w, dy, geom = make("first_layer", dtype, Layout.NHWC)
    x[0, 1, 4, 5] = x[0, 0, -1, -1] = torch.inf
    want_y, _, want_dw = reference(x, w, dy, geom)
    for pass_, operands, want in ((Pass.FPROP, (x, w, Epilogue()), want_y), (Pass.WGRAD, (dy, x), want_dw)):
        (stem,) = [c for c in cuda.candidates(pass_, problem) if "_stem_" in c.variant][:1]
        got = stem.run(problem, *operands).double()
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isposinf(), want.isposinf())
        assert torch.equal(got.isneginf(), want.isneginf()) and 0 < want.isfinite().sum() < want.numel()


def test_a_reason_is_given_once_with_all_its_kernels():
    reasons = [
        ("a_bf16", "it computes in another dtype"),
        ("b_f32", "the filter is dilated"),
        ("c_f64", "it is late"),
        ("d_f32", "the filter is dilated"),
    ]
    assert native_cuda.in_words(reasons) == "the filter is dilated (b_f32, d_f32); it is late (c_f64)"
    assert native_cuda.in_words(reasons[:1]) == "no kernel is compiled for its dtype"
    assert native_cuda.in_words([]) == "no kernel is compiled for it"


def test_what_no_kernel_takes_is_said_in_words(cuda):
    """A grid has at most 65535 blocks in y, where the groups are; a depthwise kernel has none there."""
    problem = ConvProblem(1, 1 << 17, 4, 4, 1 << 17, 3, 3, 1, 1, 1, 1, 1, 1, 1 << 16, device="cuda")
    for pass_ in Pass:
        reason = cuda.reject(pass_, problem)
        assert "there are more than 65535 groups (" in reason and reason.count("it serves depthwise") == 1
        assert cuda.reject(pass_, dataclasses.replace(problem, groups=1 << 17)) is None


def test_a_kernel_that_rejects_says_so(emulated):
    names = [v["name"] for v in emulated.variants()]
    index = names.index("fprop_depthwise_bf16_window_sm80")
    fields = [1, 8, 4, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="fprop_depthwise_bf16_window_sm80 rejects the problem: it serves depthwise"):
        emulated.Prepared(index, fields)


class Recorder:
    """A CUDA graph as far as convext's launches go: keeps them, and runs them again with the addresses of then."""

    def __init__(self, library):
        self.library, self.launches = library, []

    def __getattr__(self, name):
        found = getattr(self.library, name)
        if not name.startswith("launch"):
            return found

        def launch(*arguments):
            self.launches.append((found, arguments))
            found(*arguments)

        return launch

    def replay(self):
        for launch, arguments in self.launches:
            launch(*arguments)


def test_recorded_launches_compute_the_network_again(cuda, emulated, monkeypatch):
    """What a replay of a captured graph does: it sees new images, and what was written into weights and statistics,
    behind torch's back, too. Everything between the layers is in their launches."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), torch.nn.BatchNorm2d(16), torch.nn.Hardswish(),
        torch.nn.Conv2d(16, 24, 1)).eval().double().to(memory_format=torch.channels_last)  # fmt: skip
    swapped = convext.swap(copy.deepcopy(net))
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    held, empty = [], torch.empty
    monkeypatch.setitem(backends.PRIORITY, "cpu", backends.PRIORITY["cuda"])
    backends.forget()
    monkeypatch.setitem(backends._unavailable, ("native", "cpu"), None)
    try:
        with torch.no_grad():
            for _ in range(3):
                swapped(x)
            recorder = Recorder(emulated)
            with monkeypatch.context() as capture:
                capture.setattr(native_cuda, "_CUDA", recorder)
                # The pool of a graph keeps what was allocated during the capture.
                capture.setattr(torch, "empty", lambda *args, **kwargs: held.append(empty(*args, **kwargs)) or held[-1])
                y = swapped(x)
            assert [launch.__name__ for launch, _ in recorder.launches] == ["launch_folded", "launch_folded", "launch"]
            torch.testing.assert_close(y, net(x))
            x.copy_(torch.randn_like(x))
            for module, other in zip(net, swapped):
                for t, same in zip(module.state_dict().values(), other.state_dict().values()):
                    for one in (t, same):
                        one.data.mul_(2).add_(1)
            former = y.clone()
            recorder.replay()
            torch.testing.assert_close(y, net(x))
            assert not torch.allclose(y, former)
    finally:
        monkeypatch.undo()
        backends.forget()


def test_other_threads_go_on_during_a_launch(cuda):
    """A launch may wait for the driver, and here it computes: without the interpreter's lock."""
    problem, x, w, *_ = make("direct", torch.float64, Layout.NHWC)
    problem = dataclasses.replace(problem, n=160)
    x = x.repeat(80, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    took = []

    def call():
        begin = time.perf_counter()
        cuda.fprop(problem, x, w, Epilogue())
        took.append(time.perf_counter() - begin)

    call()
    thread = threading.Thread(target=call)
    longest, before = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    assert longest < took[-1] / 2, took


def test_a_call_is_timed_up_to_its_launch_without_a_gpu(cuda):
    problem, x, w, _, geom = make("direct", torch.bfloat16, Layout.NHWC)
    right = cuda.fprop(problem, x, w, Epilogue())
    before = backends.PRIORITY["cpu"]
    with host.cuda_on_paper():
        counts = backends.counts()
        y = convext.conv2d(x, w, None, *geom)
        ran = {key for key, calls in backends.counts().items() if calls > counts.get(key, 0)}
        assert ran == {("native", "fprop", cuda.variant(Pass.FPROP, problem))}
        assert y.shape == right.shape and cuda.fprop(problem, x, w, Epilogue()).fill_(7).eq(7).all()
    assert backends.PRIORITY["cpu"] is before
    assert torch.equal(cuda.fprop(problem, x, w, Epilogue()), right)  # launches run again
    found = host.measure(0.0, None)
    assert {cost.what for cost in found} == {*host.calls(), "conv_bn_act", "conv_bn_act, recorded"}
    assert all(cost.pytorch is None and cost.ratio is None and cost.convext.median > 0 for cost in found)
    assert [row[2] for row in host.table(found).rows] and {row[1] for row in host.table(found).rows} == {""}
    assert "pytorch" in found[0].as_json()
    late = [host.Cost("conv2d", None, Timing((13e-6,))), host.Cost("conv_bn_act, recorded", None, Timing((1.0,)))]
    assert host.summary_on_gpu(late) == "Longer than wanted: conv2d (at most 12 µs)"
    assert "No call" in host.summary_on_gpu(late[1:])


def test_a_launch_that_fails_names_kernel_problem_and_reason(cuda, monkeypatch):
    problem, x, w, dy, _ = make("depthwise_stride_2", torch.bfloat16, Layout.NHWC)
    monkeypatch.setattr(native_cuda, "_where", lambda t: (7, 0))  # a device that is not there
    said = (
        r"convext: {}_depthwise_bf16_window_sm80 failed on n=1 c=24 h=9 w=9 k=24 r=5 s=5 stride_h=2 stride_w=2 "
        r"pad_h=2 pad_w=2 dil_h=1 dil_w=1 groups=24: invalid device ordinal"
    )
    for name, call in (
        ("fprop", lambda: cuda.fprop(problem, x, w, Epilogue())),
        ("dgrad", lambda: cuda.dgrad(problem, dy, w)),
        ("wgrad", lambda: cuda.wgrad(problem, dy, x)),
    ):
        with pytest.raises(RuntimeError, match=said.format(name)):
            call()
    with pytest.raises(RuntimeError, match=r"convext: batch_stats failed on n=1 c=24 h=5 w=5: invalid device ordinal"):
        cuda.batch_stats(dy)
