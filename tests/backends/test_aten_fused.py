"""The forms in which the aten backend computes what follows a convolution: one pass, and cuDNN's fused convolutions,
which stand here as functions of the CPU with the arithmetic that they promise."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import convext
from convext import backends
from convext.backends import aten, native, tuned
from convext.backends.base import Candidate
from convext.bench.timing import Timing
from convext.problem import DTYPES, STATISTICS, ConvProblem, Epilogue, Geom, Layout, Pass
from convext.tune import measure
from convext.tune.measure import bound_of, candidates

pytestmark = pytest.mark.skipif(
    backends.unavailable("native", "cpu") is not None, reason="the one pass is the compiled library's"
)
GEOM = Geom((1, 1), (1, 1))
DTYPES_TRIED = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget():
    tuned.forget()
    native.forget_plans()
    backends.forget()


def _case(dtype, size=(9, 8), channels_last=True, adds=True, bias=True, affine=True):
    """x, w, epilogue and problem of a batch norm, and what it is in float64."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    acc = torch.float64 if dtype is torch.float64 else torch.float32
    x, w, residual = drawn(2, 16, *size).to(dtype), drawn(24, 16, 3, 3).to(dtype), drawn(2, 24, *size).to(dtype)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, residual = x.contiguous(memory_format=form), residual.contiguous(memory_format=form)
    mean, gamma, beta = (drawn(24).to(acc) for _ in range(3))
    norm = (mean, (drawn(24).abs() + 0.5).to(acc), *((gamma, beta) if affine else (None, None)))
    epilogue = Epilogue(drawn(24).to(dtype) if bias else None, *norm, residual if adds else None, 1e-3, "relu")
    doubles = [None if t is None else t.double() for t in epilogue[:6]]
    z = F.batch_norm(F.conv2d(x.double(), w.double(), doubles[0], padding=1), *doubles[1:5], eps=1e-3)
    expected = torch.relu(z if residual is None or not adds else z + residual.double())
    return x, w, epilogue, ConvProblem.of_fprop(x, w, GEOM), expected


def _assert_close(y, expected, epilogue, problem):
    """Within the bound by which candidates are judged, relative to what is summed: here at least the result itself."""
    scale = (epilogue.var + epilogue.eps).rsqrt() * (1.0 if epilogue.gamma is None else epilogue.gamma.abs())
    size = math.sqrt(problem.gemm_shape(Pass.FPROP).k) * scale + epilogue.mean.abs() * scale + 3.0
    bound = bound_of(Pass.FPROP, problem, epilogue.kind) * size.double().view(1, -1, 1, 1) * 4  # 4 deviations
    assert ((y.double() - expected).abs() <= bound).all(), (y.double() - expected).abs().max()


@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(9, 8), (1, 1), (1, 5)])
@pytest.mark.parametrize(("adds", "bias", "affine"), [(True, True, True), (False, False, True), (True, False, False)])
def test_one_pass_is_what_the_others_compute(dtype, channels_last, size, adds, bias, affine):
    x, w, epilogue, problem, expected = _case(dtype, size, channels_last, adds, bias, affine)
    y = aten.BACKEND._in_one_pass(problem, x, w, epilogue)
    _assert_close(y, expected, epilogue, problem)
    plain = aten.BACKEND.fprop(problem, x, w, epilogue)
    assert y.dtype is plain.dtype and y.stride() == native.BACKEND.fprop(problem, x, w, epilogue).stride()


def test_one_pass_in_float32_rounds_as_often_as_native():
    """The convolution's result is stored as it was summed; the pass behind it is the arithmetic of the epilogue."""
    x, w, epilogue, problem, _ = _case(torch.float32)
    y = F.conv2d(x, w, epilogue.bias, padding=1)
    found = aten.BACKEND._in_one_pass(problem, x, w, epilogue)
    assert torch.equal(found, native.BACKEND.bn_act(y, epilogue._replace(bias=None)))


def test_which_forms_there_are():
    problem = _case(torch.float32)[3]
    names = {kind: [c.variant for c in aten.BACKEND.candidates(Pass.FPROP, problem, kind)] for kind in KINDS}
    assert names == {
        "": ["aten_fprop"],
        "relu": ["aten_fprop"],
        "bn": ["aten_fprop", "aten_fprop_one_pass"],
        "bn relu": ["aten_fprop", "aten_fprop_one_pass"],
        "bn add silu": ["aten_fprop", "aten_fprop_one_pass"],
        STATISTICS: ["aten_fprop"],
    }
    assert [c.variant for c in aten.BACKEND.candidates(Pass.DGRAD, problem)] == ["aten_dgrad"]
    tuned.of("cpu").aside["aten_fprop_one_pass"] = "it was wrong"
    assert [c.variant for c in aten.BACKEND.candidates(Pass.FPROP, problem, "bn relu")] == ["aten_fprop"]


KINDS = ("", "relu", "bn", "bn relu", "bn add silu", STATISTICS)


def test_a_kept_form_serves_its_kind_alone():
    x, w, epilogue, problem, expected = _case(torch.float32)
    tuned.of("cpu").choices[tuned.key(Pass.FPROP, problem, "bn add relu")] = tuned.KeptChoice(
        "aten", "aten_fprop_one_pass", {}
    )
    backends.reset_counts()
    y = torch.ops.convext.conv_bn_act(x, w, *epilogue, *GEOM)
    _assert_close(y, expected, epilogue, problem)
    torch.ops.convext.conv_bn_act(x, w, *epilogue._replace(activation="silu"), *GEOM)
    counts = backends.counts()
    assert counts.pop(("aten", "fprop", "aten_fprop_one_pass")) == 1
    assert [backend for backend, *_ in counts] == ["native"]
    with convext.backend("aten"):  # asked for by name, it is PyTorch's own operations
        torch.ops.convext.conv_bn_act(x, w, *epilogue, *GEOM)
    assert backends.counts()["aten", "fprop", "aten_fprop"] == 1


def test_a_swapped_network_runs_a_kept_form():
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 24, 3, padding=1), torch.nn.BatchNorm2d(24), torch.nn.ReLU()).eval()
    x = torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    problem = ConvProblem.of_fprop(x, model[0].weight, GEOM)
    expected = model(x)
    tuned.of("cpu").choices[tuned.key(Pass.FPROP, problem, "bn relu")] = tuned.KeptChoice(
        "aten", "aten_fprop_one_pass", {}
    )
    convext.swap(model)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)
    (row,) = convext.report(model).rows
    assert (row.backend, row.variant) == ("aten", "aten_fprop_one_pass")
    assert convext.explain(model, "0").serves.variant == "aten_fprop_one_pass"
    assert "with bn relu" in str(convext.explain(model, "0"))


# ---- cuDNN's fused convolutions, on the CPU


@pytest.fixture
def cudnn(monkeypatch):
    """torch's functions, which note their calls."""
    called = []

    def relu(x, w, bias, stride, padding, dilation, groups):
        called.append("relu")
        return torch.relu(F.conv2d(x, w, bias, stride, padding, dilation, groups))

    def add_relu(x, w, z, alpha, bias, stride, padding, dilation, groups):
        called.append("add relu")
        y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
        assert z.stride() == y.stride()  # cuDNN's operands have one layout
        return torch.relu(y + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("adds", "bias", "affine"), [(True, True, True), (False, False, True), (False, True, False)])
def test_a_batch_norm_folds_into_cudnns_convolution(cudnn, dtype, channels_last, adds, bias, affine):
    x, w, epilogue, problem, expected = _case(dtype, (9, 8), channels_last, adds, bias, affine)
    y = aten.BACKEND._fused_by_cudnn(problem, x, w, epilogue)
    _assert_close(y, expected, epilogue, problem)
    assert cudnn == ["add relu" if adds else "relu"]
    assert y.dtype is dtype and y.stride() == native.BACKEND.fprop(problem, x, w, epilogue).stride()


def test_a_residual_of_another_format_is_brought_into_cudnns(cudnn):
    x, w, epilogue, problem, expected = _case(torch.float32)
    y = aten.BACKEND._fused_by_cudnn(problem, x, w, epilogue._replace(residual=epilogue.residual.contiguous()))
    _assert_close(y, expected, epilogue, problem)


def test_without_a_batch_norm_nothing_is_folded(cudnn):
    x, w, epilogue, problem, _ = _case(torch.float16)
    epilogue = Epilogue(epilogue.bias, residual=epilogue.residual, activation="relu")
    y = aten.BACKEND._fused_by_cudnn(problem, x, w, epilogue)
    assert torch.equal(y, torch.relu(F.conv2d(x, w, epilogue.bias, padding=1) + epilogue.residual))


@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize(
    "kind", ["relu", "add relu", "bn relu", "bn add relu", "bn", "silu", "bn silu", "", STATISTICS]
)
def test_what_cudnn_fuses(cudnn, dtype, kind):
    problem = replace(_case(torch.float32)[3], dtype=DTYPES[dtype], device="cuda")
    there = any(c.variant == "aten_fprop_cudnn_fused" for c in aten.BACKEND.candidates(Pass.FPROP, problem, kind))
    # A scaled weight may leave float16's range, though no result does.
    folds = dtype in (torch.float32, torch.bfloat16)
    assert there == (kind.endswith("relu") and (folds if "bn" in kind else dtype is not torch.float64))
    on_cpu = replace(problem, device="cpu")
    assert "aten_fprop_cudnn_fused" not in [c.variant for c in aten.BACKEND.candidates(Pass.FPROP, on_cpu, kind)]
    with torch.backends.cudnn.flags(enabled=False):
        assert len(aten.BACKEND.candidates(Pass.FPROP, problem, kind)) <= 2


def test_scaled_weights_would_leave_float16(cudnn):
    """Why its batch norms are not folded: the result is within the range, and the folded weights are not."""
    x, w, epilogue, problem, _ = _case(torch.float16, adds=False, bias=False)
    tiny = epilogue._replace(gamma=torch.full((24,), 2e-8), beta=torch.zeros(24), mean=torch.zeros(24))
    expected = native.BACKEND.fprop(problem, x * 2**6, w, tiny)
    assert expected.abs().max() > 0
    assert not (aten._folded(w, tiny)[0] != 0).all()


# ---- how candidates with something behind them are judged


def _measured(kind, run, dtype=torch.float32):
    problem = _case(dtype)[3]
    among = [*candidates(Pass.FPROP, problem, kind), Candidate("native", "planted", 1.0, run)]
    return measure(Pass.FPROP, problem, kind, among=among, timer=_one_second_each)


def _one_second_each(calls):
    return {name: Timing((1.0,) * 4) for name in calls}


EVERY_KIND = [
    "relu",
    "add",
    "bn",
    "bn relu",
    "bn add relu",
    "bn hardswish",
    "bn add gelu",
    "silu",
    "bn relu6",
    STATISTICS,
]


@pytest.mark.parametrize("dtype", DTYPES_TRIED)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_candidate_is_right_of_every_kind(kind, dtype):
    problem = _case(dtype)[3]
    for reference in (torch.float64, torch.float32):
        found = measure(Pass.FPROP, problem, kind, timer=_one_second_each, reference_dtype=reference)
        assert not found.wrong and set(found.timings) == {str(c) for c in candidates(Pass.FPROP, problem, kind)}


def _relu_of_numbers(y):
    return torch.where(torch.isnan(y), 0.0, y)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e._replace(eps=0.3), "away from ATen's"),
        (lambda e: e._replace(gamma=None), "away from ATen's"),
        (lambda e: e._replace(residual=None), "away from ATen's"),
        (lambda e: e._replace(activation="identity"), "away from ATen's"),
        (lambda e: e._replace(mean=e.mean + 0.01), "away from ATen's"),
    ],
)
def test_a_wrong_epilogue_is_found(change, said):
    def run(problem, x, w, epilogue):
        return aten.BACKEND.fprop(problem, x, w, change(epilogue))

    assert said in _measured("bn add relu", run).wrong["native planted"]


def test_an_activation_that_makes_numbers_of_nan_is_found():
    found = _measured("bn relu", lambda *arguments: _relu_of_numbers(aten.BACKEND.fprop(*arguments)))
    assert found.wrong == {"native planted": "it makes numbers of NaN"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y, mean, var: (y, mean + 0.01, var), "its mean is"),
        (lambda y, mean, var: (y, mean, var * 1.01), "its variance is"),
        (lambda y, mean, var: (y, mean, var * 143 / 144), "its variance is"),  # unbiased in its place
        (lambda y, mean, var: (y * 1.01, mean, var), "its result is"),
        (lambda y, mean, var: (y, mean.fill_(math.nan), var), "its mean is nan away"),
    ],
)
def test_wrong_statistics_are_found(change, said):
    problem = _case(torch.float32)[3]

    def statistics(problem, x, w, bias):
        y = aten.BACKEND.fprop(problem, x, w, Epilogue(bias))
        return change(y, *aten.BACKEND.batch_stats(y))

    planted = Candidate("native", "planted", 1.0, aten.BACKEND.fprop, statistics)
    among = [*candidates(Pass.FPROP, problem, STATISTICS), planted]
    found = measure(Pass.FPROP, problem, STATISTICS, among=among, timer=_one_second_each)
    assert found.wrong["native planted"].startswith(said)


def test_the_bound_knows_of_tf32():
    problem = replace(_case(torch.float32)[3], device="cuda")
    half, double = replace(problem, dtype=DTYPES[torch.bfloat16]), replace(problem, dtype=DTYPES[torch.float64])
    for other in (problem, half, double):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            without = bound_of(Pass.FPROP, other), bound_of(Pass.FPROP, other, "", torch.float32)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            allowed = bound_of(Pass.FPROP, other), bound_of(Pass.FPROP, other, "", torch.float32)
        own = 2.0**-9 if other is problem else 0.0
        assert allowed == pytest.approx((without[0] + own, without[1] + own + 2.0**-9))


def test_layouts_of_results_of_every_form_are_the_problems():
    x, w, epilogue, problem, _ = _case(torch.float32, channels_last=False)
    asked = replace(problem, y_layout=Layout.NHWC)
    for candidate in candidates(Pass.FPROP, asked, epilogue.kind):
        assert candidate.run(asked, x, w, epilogue).is_contiguous(memory_format=torch.channels_last), candidate
