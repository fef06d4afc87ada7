"""Selection of backends: forced, automatic, refused; and the counters."""

import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

import convext
from convext import backends
from convext.backends import costs
from convext.backends.aten import AtenBackend
from convext.problem import ConvProblem, Geom, Pass

X, W = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
PROBLEM = ConvProblem(1, 2, 5, 5, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1)


class Picky(AtenBackend):
    """Stands in for the native backend: serves on the CPU, rejects and yields as told."""

    name = "native"
    off = rejects = yields = None

    def unavailable(self, device_type):
        return self.off

    def reject(self, pass_, problem):
        return self.rejects

    def slower(self, pass_, problem):
        return self.yields

    def reject_batch_norm(self, y):
        return self.rejects

    def variant(self, pass_, problem):
        return f"picky_{pass_.name.lower()}"


@pytest.fixture
def picky(monkeypatch):
    backend = Picky()
    monkeypatch.setitem(backends._loaded, "native", backend)
    backends.forget()
    backends.reset_counts()
    yield backend
    convext.backend(None)


def test_lists_every_backend_with_a_reason_where_it_is_off():
    statuses = convext.backends()
    assert [s.name for s in statuses if s.device == "cpu"][:2] == ["native", "aten"]
    assert [s.name for s in statuses if s.device == "cuda"] == ["native", "triton", "aten"]
    for status in statuses:
        assert status.available == (status.reason is None)
        assert status.name in str(status) and (status.available or status.reason in str(status))
    assert all(s.available for s in statuses if s.name == "aten")


def test_a_backend_that_does_not_load_is_off_and_says_why(monkeypatch):
    def broken(name):
        raise ImportError("libnothing.so.1 is missing")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    monkeypatch.delitem(backends._loaded, "native", raising=False)
    backends.forget()
    try:
        reason = backends.unavailable("native", "cpu")
        assert "libnothing.so.1 is missing" in reason and "reinstall" in reason
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    finally:
        backends._loaded.pop("native", None)
        backends.forget()


def test_takes_the_first_that_does_not_reject(picky):
    choice = backends.select(Pass.DGRAD, PROBLEM)
    assert (choice.backend, choice.variant, choice.passed_over) == (picky, "picky_dgrad", {})


@pytest.mark.parametrize("attribute", ["off", "rejects", "yields"])
def test_passes_over_with_the_reason(picky, attribute):
    setattr(picky, attribute, "for a reason")
    backends.forget()
    choice = backends.select(Pass.FPROP, PROBLEM)
    assert choice.backend.name == "aten" and choice.passed_over == {"native": "for a reason"}


def test_a_forced_backend_serves_even_where_it_is_slower(picky):
    picky.yields = "ATen was measured faster"
    with convext.backend("native"):
        assert backends.select(Pass.FPROP, PROBLEM).backend is picky
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"


@pytest.mark.parametrize("attribute", ["off", "rejects"])
def test_a_forced_backend_that_cannot_serve_raises_with_the_reason(picky, attribute):
    setattr(picky, attribute, "the moon is full")
    with convext.backend("native"), pytest.raises(RuntimeError, match="native: the moon is full"):
        convext.conv2d(X, W)
    if attribute == "rejects":
        with convext.backend("native"), pytest.raises(RuntimeError, match="native: the moon is full"):
            torch.ops.convext.batch_stats(X)


def test_nothing_to_compute_is_never_refused(picky):
    picky.rejects = "no"
    with convext.backend("native"):
        assert convext.conv2d(X[:0], W).shape == (0, 3, 3, 3)


def test_setting_and_context_manager():
    assert backends.forced() is None
    convext.backend("aten")
    assert backends.forced() == "aten"
    with convext.backend("native"):
        assert backends.forced() == "native"
        with convext.backend(None):
            assert backends.forced() is None
        assert backends.forced() == "native"
    assert backends.forced() == "aten"
    convext.backend(None)
    with pytest.raises(ZeroDivisionError), convext.backend("aten"):
        raise ZeroDivisionError
    assert backends.forced() is None


def test_setting_holds_for_other_threads():
    seen = []
    with convext.backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
    assert seen == ["aten"]


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="'cudnn'.*'native', 'triton', 'aten'"):
        convext.backend("cudnn")
    with pytest.raises(ValueError, match="native, triton, aten"):
        backends.get("cudnn")
    assert backends.forced() is None


def test_counts_calls_by_backend_pass_and_variant(picky):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    for _ in range(2):
        convext.conv2d(x, w).sum().backward()
    with convext.backend("aten"):
        convext.conv2d(X, W)
    assert backends.counts() == {
        ("native", "fprop", "picky_fprop"): 2,
        ("native", "dgrad", "picky_dgrad"): 2,
        ("native", "wgrad", "picky_wgrad"): 2,
        ("aten", "fprop", "aten_fprop"): 1,
    }
    backends.reset_counts()
    assert backends.counts() == {}


def test_caches_stay_bounded(picky, monkeypatch):
    monkeypatch.setattr(backends, "CACHE_LIMIT", 8)
    for n in range(1, 30):
        convext.conv2d(X.expand(n, -1, -1, -1), W)
    assert len(backends._choices) <= 8 and len(backends.CALL_CACHE) <= 8
    assert backends.counts() == {("native", "fprop", "picky_fprop"): 29}


def test_a_device_without_kernels_has_aten():
    problem = ConvProblem(1, 2, 5, 5, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1, device="meta")
    assert backends.select(Pass.FPROP, problem).backend.name == "aten"
    assert convext.conv2d(X.to("meta"), W.to("meta")).shape == (1, 3, 3, 3)


@pytest.mark.parametrize("width", [1, 2])
def test_aten_writes_all_of_a_bfloat16_weight_gradient(width):
    """torch 2.11 leaves parts of it as the memory was, where channels-last images are narrow and the stride not 1."""
    for _ in range(100):
        x = torch.randn(1, 2, 2, width).bfloat16().to(memory_format=torch.channels_last)
        w = torch.randn(1, 2, 1, 3).bfloat16().requires_grad_()
        wanted = w.detach().double().requires_grad_()
        with convext.backend("aten"):
            y = convext.conv2d(x, w, stride=(1, 2), padding=(0, 1))
            dy = torch.randn_like(y)
            y.backward(dy)
        torch.full((1000,), 1e30)  # what the next gradient's memory may hold
        torch.nn.functional.conv2d(x.double(), wanted, stride=(1, 2), padding=(0, 1)).backward(dy.double())
        # Two products, each of at most 5 * 5, rounded once.
        assert (w.grad - wanted.grad).abs().max() <= 50 * torch.finfo(torch.bfloat16).eps


_STRIDED_1X1 = """
import torch, convext
torch.set_num_threads(3)
for dtype in (torch.float32, torch.bfloat16):
    for n, c, h, w, k, stride in ((4, 3, 28, 56, 1, (2, 2)), (3, 5, 14, 28, 8, (2, 2)), (3, 8, 28, 56, 4, (1, 2)),
                                  (4, 5, 14, 28, 8, (2, 1)), (4, 16, 15, 27, 8, (3, 2)), (1, 3, 14, 56, 17, (1, 2))):
        torch.manual_seed(0)
        x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(k, c, 1, 1).to(dtype).requires_grad_()
        wanted = weight.detach().double().requires_grad_()
        for backend in ("aten", None):
            weight.grad = wanted.grad = None
            with convext.backend(backend):
                y = convext.conv2d(x, weight, stride=stride)
                dy = torch.randn_like(y)
                y.backward(dy)
            torch.nn.functional.conv2d(x.double(), wanted, stride=stride).backward(dy.double())
            error = (weight.grad - wanted.grad).abs()
            wanted.grad = None
            torch.nn.functional.conv2d(x.double().abs(), wanted, stride=stride).backward(dy.double().abs())
            products = y.numel() // k  # summed in float32 and rounded once
            limit = torch.finfo(dtype).eps + products * torch.finfo(torch.float32).eps
            assert (error <= limit * wanted.grad).all(), (x.shape, dtype)
"""


def test_aten_does_not_write_past_its_memory_in_a_strided_1x1_weight_gradient():
    """torch 2.11 does, over channels-last images and on two threads or more. glibc's checks see it at the next call."""
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", _STRIDED_1X1],
            capture_output=True,
            text=True,
            timeout=250,
            env={**os.environ, "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "3"},
        )
        assert ran.returncode == 0, ran.stderr


def test_a_strided_1x1_weight_gradient_reads_only_what_the_filter_reads(monkeypatch):
    """The form in which torch 2.11 writes outside its memory never reaches it."""
    aten = importlib.import_module("convext.backends.aten")
    seen = []

    class Aten:
        def convolution_backward(self, dy, x, w, bias, stride, *others):
            seen.append((tuple(x.shape), stride))
            return torch.ops.aten.convolution_backward(dy, x, w, bias, stride, *others)

    monkeypatch.setattr(aten, "_aten", Aten())
    for stride, shape in (((2, 2), (1, 2, 3, 3)), ((1, 3), (1, 2, 5, 2)), ((1, 1), (1, 2, 5, 5))):
        w = torch.ones(3, 2, 1, 1, requires_grad=True)
        with convext.backend("aten"):
            convext.dilated_conv2d(X, w, stride=stride, dilation=1).sum().backward()  # in Python
        assert seen.pop() == (shape, (1, 1))
        assert torch.equal(w.grad, torch.full_like(w, shape[2] * shape[3]))


def _over_threads(x, w, stride, padding, groups, backend):
    """(y, dx, dw) on one to four threads, and which backend ran each pass."""
    found = []
    former = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            backends.reset_counts()
            leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
            with convext.backend(backend):
                y = convext.conv2d(*leaves, None, stride, padding, 1, groups)
                dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
                found.append((y, *torch.autograd.grad(y, leaves, dy)))
            ran = {pass_: name for name, pass_, _ in backends.counts()}
    finally:
        torch.set_num_threads(former)
    return found, [ran["fprop"], ran["dgrad"], ran["wgrad"]]


@pytest.mark.skipif(backends.unavailable("native", "cpu") is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [None, "native"])
def test_results_of_our_kernels_do_not_depend_on_the_number_of_threads(backend, dtype):
    """Bit for bit. Under the automatic choice some passes are ATen's, whose sums may."""
    ours = 0
    for n, c, h, w, k, r, stride, groups in (
        (1, 8, 56, 28, 2, 1, 1, 2),
        (8, 32, 14, 14, 64, 3, 1, 1),
        (2, 3, 33, 31, 16, 3, 2, 1),
        (3, 24, 19, 17, 24, 5, 1, 24),
        (2, 64, 14, 14, 96, 1, 1, 1),
        (2, 64, 15, 15, 32, 1, 2, 1),
        (1, 16, 28, 28, 16, 3, 1, 4),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(n, c, h, w, generator=generator).to(dtype).contiguous(memory_format=memory_format)
            weight = torch.randn(k, c // groups, r, r, generator=generator).to(dtype)
            found, ran = _over_threads(x, weight, stride, r // 2, groups, backend)
            for i, name in enumerate(ran):
                if name == "native":
                    ours += 1
                    assert all(torch.equal(found[0][i], other[i]) for other in found[1:]), (x.shape, weight.shape, i)
                else:
                    assert backend is None
    assert ours == 42 if backend else ours >= 14


def test_a_cuda_library_that_was_not_built_is_said_to_be_so(tmp_path):
    """And not that a module is circular, as the interpreter has it. In a process where neither library is there."""
    for name in ("_CUDA", "_C"):
        program = f"""
import importlib, importlib.machinery, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "convext.{name}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import convext
for status in convext.backends():
    print(status)
"""
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        (line,) = [
            line for line in ran.stdout.splitlines() if "native" in line and ("cuda" in line) == (name == "_CUDA")
        ]
        assert "circular" not in ran.stdout and "not built" in line, line
        assert "from source" in line if name == "_CUDA" else "pip install ." in line


@pytest.mark.parametrize("served_in_cpp", [True, False])
def test_a_small_convolution_is_atens_where_calls_go_through_python(monkeypatch, served_in_cpp):
    """The way through C++ saves a kernel more than ATen: 2 µs, where ATen is expected to be faster by 1."""
    if backends.unavailable("native", "cpu"):
        pytest.skip("the compiled library is not there")
    monkeypatch.setattr(backends.compiled_calls, "library", object() if served_in_cpp else None)
    problem = ConvProblem.of_fprop(torch.empty(1, 16, 8, 8), torch.empty(16, 16, 1, 1), Geom())
    row, _ = costs.aten_work(Pass.FPROP, problem)
    slow = {name["name"]: {"call": 4e-6} for name in backends.native.kernels()}
    limits = {**dict.fromkeys(costs.LIMITS, 0.0), "call_saving": 2e-6}
    monkeypatch.setattr(backends.compiled_calls, "forget", lambda: None)
    costs.use(costs.Table({}, limits, slow, {row: {"call": 3e-6}}))
    try:
        assert (backends.get("native").slower(Pass.FPROP, problem) is None) == served_in_cpp
    finally:
        costs.use(None)
