"""Selection of backends: forced, automatic, refused; and the counters."""

import threading

import pytest
import torch

import convext
from convext import backends
from convext.backends.aten import AtenBackend
from convext.problem import ConvProblem, Pass

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
    assert backends.counts() == {("native", "fprop", "picky_fprop"): 2, ("native", "dgrad", "picky_dgrad"): 2,
                                 ("native", "wgrad", "picky_wgrad"): 2, ("aten", "fprop", "aten_fprop"): 1}
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
