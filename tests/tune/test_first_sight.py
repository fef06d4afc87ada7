"""convext.tuning("measure"): what a problem that is seen for the first time costs, finds and leaves alone. On the CPU
with real kernels and planted ones, and on a GPU on paper, whose clock tells what a test says."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import filelock
import gpu_on_paper
import pytest
import torch
from gpu_on_paper import CUDA
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import backends
from convext.backends import aten, native, tuned
from convext.backends.base import Candidate
from convext.bench.timing import FLUSH_BYTES, Timing
from convext.doctor import report
from convext.problem import DTYPES, STATISTICS, ConvProblem, Layout, Pass
from convext.tune import Measured, measure
from convext.tune.measure import OutOfMemory, keep

pytestmark = pytest.mark.skipif(
    backends.unavailable("native", "cpu") is not None, reason="what is chosen among are the compiled library's kernels"
)
PROBLEM = ConvProblem(
    2, 16, 12, 12, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, DTYPES[torch.float32], Layout.NHWC, Layout.NHWC, "cpu"
)
ON_GPU = replace(PROBLEM, device="cuda")
module = sys.modules["convext.tune.first_sight"]


def _forget():
    tuned.forget()
    native.forget_plans()
    backends.forget()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test has a cache of its own, and leaves no choice behind."""
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_count", 0)
    monkeypatch.setattr(module, "_failed", set())
    _forget()
    yield tmp_path / "cache"
    tuned.mode = None
    monkeypatch.undo()
    _forget()


@pytest.fixture
def measured(monkeypatch):
    """`seen`: (pass, problem, kind) of what is measured, by a timer of which ATen's candidates are the fastest, or
    those whose names begin as `fastest` is told."""
    seen = []
    real = module.measure

    def noting(pass_, problem, kind="", **how):
        seen.append((pass_, problem, kind))
        return real(pass_, problem, kind, **how)

    def timer(device, free):
        fast = noting.fastest
        return lambda calls: {name: Timing((1.0 if name.startswith(fast) else 5.0,) * 3) for name in calls}

    noting.fastest = "aten "
    monkeypatch.setattr(module, "measure", noting)
    monkeypatch.setattr(module, "timer", timer)
    return _Seen(seen, noting)


class _Seen:
    def __init__(self, seen, noting):
        self.seen, self._noting = seen, noting

    def fastest(self, name):
        self._noting.fastest = name

    def __len__(self):
        return len(self.seen)


def _tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((2, 16, 12, 12), (24, 16, 3, 3)))
    return x.to(dtype).contiguous(memory_format=torch.channels_last), w.to(dtype)


def _kept():
    return tuned.of("cpu").choices.get(tuned.key(Pass.FPROP, PROBLEM))


# ---- what is measured, and once


def test_on_the_cpu_nothing_is_measured_until_it_is_asked_for(measured):
    convext.conv2d(*_tensors(), padding=1)
    assert not measured.seen and tuned.mode_on("cpu") == "cached" and tuned.mode_on("cuda") == "measure"
    with convext.tuning("measure"):
        convext.conv2d(*_tensors(), padding=1)
    assert measured.seen == [(Pass.FPROP, PROBLEM, "")]


def test_a_problem_is_measured_once_and_goes_to_the_fastest(measured):
    x, w = _tensors()
    expected = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    with convext.tuning("measure"):
        backends.reset_counts()
        for _ in range(3):
            y = convext.conv2d(x, w, padding=1)
            # A sum of 144 products.
            assert (y - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * 12 * expected.abs().max()
        assert backends.counts() == {("aten", "fprop", "aten_fprop"): 3}  # the first call is served by the choice
        with convext.backend("aten"):
            convext.conv2d(x, w, padding=1)
        convext.conv2d(x, w, padding=1)
        convext.conv2d(x[:1], w, padding=1)
    assert measured.seen == [(Pass.FPROP, PROBLEM, ""), (Pass.FPROP, replace(PROBLEM, n=1), "")]


def test_real_kernels_are_measured_by_the_real_clock():
    with convext.tuning("measure"):
        convext.conv2d(*_tensors(), padding=1)
    seconds = _kept().seconds
    assert {"aten aten_fprop", f"native {native.BACKEND.candidates(Pass.FPROP, PROBLEM)[0].variant}"} <= set(seconds)
    assert all(0 < s < 1 for s in seconds.values())


def test_each_pass_and_kind_is_a_choice_of_its_own(measured):
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
    x = _tensors()[0].requires_grad_()
    convext.swap(model)
    with convext.tuning("measure"):
        model(x).sum().backward()
        assert [(p.name, kind) for p, _, kind in measured.seen] == [("FPROP", STATISTICS), ("DGRAD", ""), ("WGRAD", "")]
        measured.fastest("native ")
        with torch.no_grad():
            model.eval()(x.detach())
        assert measured.seen[3:] == [(Pass.FPROP, PROBLEM, "bn relu")]
    assert tuned.lookup(Pass.FPROP, PROBLEM, STATISTICS).backend == "aten"
    assert tuned.lookup(Pass.FPROP, PROBLEM, "bn relu").backend == "native"
    assert tuned.lookup(Pass.FPROP, PROBLEM) is None


def test_what_is_measured_of_a_kind_is_not_what_stands_for_another(measured):
    with convext.tuning("measure"):
        convext.conv2d(*_tensors(), padding=1)
        assert tuned.lookup(Pass.FPROP, PROBLEM).backend == "aten"
        assert tuned.lookup(Pass.FPROP, PROBLEM, "relu") is None  # it is measured when it is seen
    with convext.tuning("cached"):
        assert tuned.lookup(Pass.FPROP, PROBLEM, "relu") is None  # ATen alone says nothing of what it takes with that


def test_reports_measure_nothing_and_use_nothing(measured):
    with convext.tuning("measure"):
        before = backends.would_serve(Pass.FPROP, PROBLEM)
        assert before.backend.name == "native" and not measured.seen
        convext.conv2d(*_tensors(), padding=1)
        assert len(measured) == 1 and backends.would_serve(Pass.FPROP, PROBLEM).backend.name == "aten"


def test_a_recorded_call_of_the_compiled_path_follows_its_measurement(measured):
    """convext/_call keeps what the selection said: of the forward pass and both gradients."""
    x, w = _tensors()
    w.requires_grad_()
    with convext.tuning("measure"):
        backends.reset_counts()
        for _ in range(3):
            convext.conv2d(x, w, padding=1).sum().backward()
    assert [p for p, *_ in measured.seen] == [Pass.FPROP, Pass.WGRAD]
    assert backends.counts() == {("aten", "fprop", "aten_fprop"): 3, ("aten", "wgrad", "aten_wgrad"): 3}


def test_nothing_to_compute_is_not_measured(measured):
    with convext.tuning("measure"):
        assert convext.conv2d(torch.randn(0, 3, 8, 8), torch.randn(4, 3, 3, 3)).shape == (0, 4, 6, 6)
    assert not measured.seen


# ---- where nothing is measured


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        convext.conv2d(*_tensors(), padding=1)
    finally:
        torch.use_deterministic_algorithms(False)


def _fake():
    with torch._subclasses.FakeTensorMode() as mode:
        x, w = map(mode.from_tensor, _tensors())
        convext.conv2d(x, w, padding=1)


def _in_a_mode():
    with _Mode():
        backends.select(Pass.FPROP, PROBLEM)


def _exported():
    torch.export.export(_Layer(), (_tensors()[0],))


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = convext.nn.Conv2d(16, 24, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


TRANSFORMS = {
    "vmap": lambda x, w: torch.func.vmap(lambda x: convext.conv2d(x, w, padding=1))(x),
    "vmap_of_weights": lambda x, w: torch.func.vmap(lambda w: convext.conv2d(x, w, padding=1))(w.unsqueeze(0)),
    "grad": lambda x, w: torch.func.grad(lambda w: convext.conv2d(x, w, padding=1).sum())(w),
    "jvp": lambda x, w: torch.func.jvp(lambda w: convext.conv2d(x, w, padding=1), (w,), (w,)),
    "operator": lambda x, w: torch.func.grad(
        lambda w: torch.ops.convext.fprop(x, w, None, (1, 1), (1, 1), (1, 1), 1).sum()
    )(w),
    "operator_in_vmap": lambda x, w: torch.func.vmap(
        lambda w: torch.ops.convext.fprop(x, w, None, (1, 1), (1, 1), (1, 1), 1)
    )(w.unsqueeze(0)),
    "dgrad_in_vmap": lambda x, w: torch.func.vmap(
        lambda dy: torch.ops.convext.dgrad(dy, w, (12, 12), (1, 1), (1, 1), (1, 1), 1)
    )(torch.randn(3, 2, 24, 12, 12)),
    "hessian": lambda x, w: torch.func.hessian(lambda s: convext.conv2d(x * s, w, padding=1).sum())(torch.ones(())),
}


@pytest.mark.parametrize("what", [_deterministic, _fake, _in_a_mode, _exported])
def test_where_nothing_is_measured(what, measured):
    with convext.tuning("measure"):
        what()
    assert not measured.seen


def test_a_compiled_call_is_measured_where_it_runs_not_where_it_is_compiled(measured):
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(measured))
        return graph

    call = torch.compile(lambda x, w: convext.conv2d(x, w, padding=1), backend=backend)
    with convext.tuning("measure"):
        for _ in range(2):
            call(*_tensors())
    assert compiled == [0] and measured.seen == [(Pass.FPROP, PROBLEM, "")]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nothing_is_measured_in_transforms(transform, measured):
    with convext.tuning("measure"):
        TRANSFORMS[transform](*_tensors())
        assert not measured.seen and not tuned._thread.transforms


def test_what_was_used_unmeasured_stays(measured):
    with convext.tuning("measure"):
        _deterministic()
        model = backends.would_serve(Pass.FPROP, PROBLEM).variant
        backends.forget()
        for _ in range(2):
            convext.conv2d(*_tensors(), padding=1)
        assert not measured.seen and backends.would_serve(Pass.FPROP, PROBLEM).variant == model
    with convext.tuning("cached"), convext.tuning("measure"):  # also when it was left in between
        convext.conv2d(*_tensors(), padding=1)
        assert not measured.seen


def test_a_choice_that_was_used_stays_whatever_others_find(folder, measured):
    """Another process writes its own into the file; a later measurement of another problem adds to it."""
    with convext.tuning("measure"):
        _deterministic()
        model = backends.would_serve(Pass.FPROP, PROBLEM).variant
        convext.conv2d(_tensors()[0][:1], _tensors()[1], padding=1)
        tuned.of("cpu").flush(1.0)
        path = tuned.of("cpu").path()
        content = json.loads(path.read_text())
        (theirs,) = content["choices"].values()
        content["choices"][tuned.key(Pass.FPROP, PROBLEM)] = theirs
        path.write_text(json.dumps(content))
        tuned.of("cpu").write()
        in_file = json.loads(path.read_text())["choices"]
        assert tuned.key(Pass.FPROP, PROBLEM) in in_file and len(in_file) == 2
        native.forget_plans()
        backends.forget()
        convext.conv2d(*_tensors(), padding=1)
        assert backends.would_serve(Pass.FPROP, PROBLEM).variant == model
    tuned.forget()  # another process
    backends.forget()
    with convext.tuning("measure"):
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    assert len(measured) == 1


def test_what_tune_finds_changes_what_was_used(measured):
    with convext.tuning("measure"):
        _deterministic()
        keep([Measured(Pass.FPROP, PROBLEM, tuned.KeptChoice("aten", "aten_fprop", {}), "", 1.0, {}, {})])
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"


def test_a_process_measures_so_many_problems_and_no_more(measured, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 2)
    x, w = _tensors()
    with convext.tuning("measure"):
        for n in (8, 9, 10, 11):
            convext.conv2d(x[..., :n], w, padding=1)
    assert len(measured) == 2


def test_what_does_not_fit_into_a_quarter_of_the_free_memory_is_not_measured(measured, monkeypatch):
    needed = module.needed_memory(PROBLEM)
    # Operands, residual and result twice, and the reference: at least six tensors of the size of x.
    assert 6 * 4 * PROBLEM.x_size < needed < 30 * 4 * PROBLEM.x_size
    monkeypatch.setattr(module, "free_memory", lambda device: 4 * needed - 1)
    with convext.tuning("measure"):
        convext.conv2d(*_tensors(), padding=1)
        assert not measured.seen
        tuned.forget()
        backends.forget()
        monkeypatch.setattr(module, "free_memory", lambda device: 4 * needed)
        convext.conv2d(*_tensors(), padding=1)
    assert len(measured) == 1


def test_a_measurement_needs_no_more_memory_than_it_says():
    """The most bytes of tensors at once, as the profiler tells of allocations."""
    from convext.bench.memory import peak_bytes

    problem = replace(PROBLEM, n=8, h=56, w=56)  # large beside the scratch memory of a kernel
    how = {"timer": lambda calls: {name: Timing((1.0,)) for name in calls}, "reference_dtype": torch.float32}
    cases = [*((pass_, "") for pass_ in Pass), (Pass.FPROP, "bn add relu"), (Pass.FPROP, STATISTICS)]
    for pass_, kind in cases:
        peak = peak_bytes(functools.partial(measure, pass_, problem, kind, **how))
        assert 0 < peak <= module.needed_memory(problem), (pass_, kind)


# ---- what a measurement leaves alone


def _fails(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("given", ["plain", "no_grad", "inference", "autocast", "default_device", "default_dtype"])
def test_a_measurement_leaves_the_callers_state_alone(given, failing, measured, monkeypatch):
    around = {
        "plain": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "default_device": lambda: torch.device("meta"),
        "default_dtype": torch.enable_grad,
    }[given]
    x, w = _tensors()
    with convext.tuning("off"), around():
        expected = convext.conv2d(x, w, padding=1)
    if failing:
        measure_before = module.measure
        monkeypatch.setattr(module, "measure", lambda *args, **how: _raise(measure_before(*args, **how)))
    measured.fastest("native ")  # so that the same kernel serves
    state = torch.get_rng_state()
    if given == "default_dtype":
        torch.set_default_dtype(torch.float64)
    try:
        with convext.tuning("measure"), around(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            before = _state()
            y = convext.conv2d(x, w, padding=1)
            assert _state() == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, expected) and y.is_inference() == expected.is_inference()
    assert torch.equal(state, torch.get_rng_state())
    assert len(said) == failing and len(measured) == 1
    if failing:
        assert "measuring fprop of x 2x16x12x12" in str(said[0].message) and "the cost model chooses" in str(
            said[0].message
        )


def _raise(found):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch._C._len_torch_function_stack(),
        torch._C._is_torch_function_all_disabled(),
        torch.get_num_threads(),
    )


class _Functions(torch.overrides.TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_users_mode_sees_nothing_of_a_measurement(measured):
    cpu = torch.device("cpu")
    with convext.tuning("measure"), _Functions() as functions:
        backends.select(Pass.FPROP, PROBLEM, device=cpu)
    assert len(measured) == 1 and functions.seen == []


def test_a_failed_measurement_is_said_once_and_puts_nothing_aside(monkeypatch):
    monkeypatch.setattr(module, "measure", _fails)
    x, w = _tensors()
    with convext.tuning("measure"), pytest.warns(UserWarning, match="measuring fprop of .* failed") as said:
        for n in (8, 9, 10):
            y = convext.conv2d(x[..., :n], w, padding=1)
            torch.testing.assert_close(y, torch.nn.functional.conv2d(x[..., :n], w, padding=1), rtol=1e-4, atol=1e-4)
        backends.forget()
        convext.conv2d(x[..., :8], w, padding=1)
    assert len(said) == 1 and not tuned.of("cpu").choices and not tuned.aside("cpu")


def test_warnings_that_are_errors_do_not_break_the_call(monkeypatch):
    monkeypatch.setattr(module, "measure", _fails)
    with convext.tuning("measure"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convext.conv2d(*_tensors(), padding=1).shape == (2, 24, 12, 12)


def test_memory_that_runs_out_is_no_kernels_fault():
    def run(problem, *arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        measure(Pass.FPROP, PROBLEM, among=[Candidate("native", "fprop_direct_f32_avx2", 1.0, run)])


def test_threads_that_meet_a_problem_at_once_measure_it_once_and_agree(measured, monkeypatch):
    real = module.measure

    def slowly(*arguments, **how):
        time.sleep(0.05)
        return real(*arguments, **how)

    monkeypatch.setattr(module, "measure", slowly)
    x, w = _tensors()
    results, ready = [], threading.Barrier(6)

    def call():
        ready.wait()
        results.append(convext.conv2d(x, w, padding=1))

    with convext.tuning("measure"):
        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(measured) == 1 and len(results) == 6 and all(torch.equal(y, results[0]) for y in results)


def test_a_child_of_a_fork_in_the_middle_of_a_measurement_measures(tmp_path):
    code = (
        "import os, sys, threading, time, torch, convext\n"
        "module = sys.modules['convext.tune.first_sight']\n"
        "real, begun = module.measure, threading.Event()\n"
        "def slowly(*args, **how):\n"
        "    begun.set(); time.sleep(1.0)\n"
        "    return real(*args, **how)\n"
        "module.measure = slowly\n"
        "convext.tuning('measure')\n"
        "torch.set_num_threads(1)\n"
        "x, w = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)\n"
        "thread = threading.Thread(target=convext.conv2d, args=(x, w)); thread.start(); begun.wait()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    module.measure = real; convext.conv2d(x[..., :7], w); os._exit(0)\n"
        "thread.join(); print(os.waitpid(child, 0)[1])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["0"], run.stderr


# ---- what is kept


def test_the_second_process_pays_nothing(folder):
    code = (
        "import sys, torch, convext\n"
        "module = sys.modules['convext.tune.first_sight']\n"
        "real, count = module.measure, []\n"
        "module.measure = lambda *args, **how: (count.append(1), real(*args, **how))[1]\n"
        "torch.set_num_threads(1)\n"
        "with convext.tuning('measure'):\n"
        "    for n in (8, 9, 10): convext.conv2d(torch.randn(1, 8, n, 8), torch.randn(8, 8, 3, 3))\n"
        "print(len(count))\n"
    )
    for expected in ("3", "0"):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert run.stdout.split() == [expected] and not run.stderr


def test_choices_are_written_in_batches(folder, measured, monkeypatch):
    monkeypatch.setattr(tuned, "_BATCH", 2)
    monkeypatch.setattr(tuned, "_BATCH_SECONDS", 1e9)
    x, w = _tensors()
    written = []
    with convext.tuning("measure"):
        for n in (8, 9, 10):
            convext.conv2d(x[..., :n], w, padding=1)
            files = list(folder.glob("*.json"))
            written.append(len(json.loads(files[0].read_text())["choices"]) if files else 0)
    assert written == [0, 2, 2]
    tuned._at_exit()
    assert len(json.loads(next(folder.glob("*.json")).read_text())["choices"]) == 3


def test_a_forked_child_leaves_what_waits_to_its_parent(folder, measured):
    with convext.tuning("measure"):
        convext.conv2d(*_tensors(), padding=1)
    child = os.fork()
    if child == 0:
        os._exit(tuned.of("cpu").unwritten)
    assert os.waitpid(child, 0)[1] == 0 and tuned.of("cpu").unwritten == 1


def test_a_file_that_another_process_holds_delays_nothing(folder, measured, monkeypatch):
    monkeypatch.setattr(tuned, "_BATCH", 1)
    monkeypatch.setattr(tuned, "_LOCK_SECONDS", 1e9)
    path = tuned.of("cpu").path()
    folder.mkdir()
    x, w = _tensors()
    with warnings.catch_warnings(), convext.tuning("measure"):
        warnings.simplefilter("error")
        with filelock.FileLock(f"{path}.lock"):
            convext.conv2d(x, w, padding=1)
            assert len(measured) == 1 and not path.exists()
        convext.conv2d(x[:1], w, padding=1)
    assert len(json.loads(path.read_text())["choices"]) == 2


def test_a_folder_that_cannot_be_written_is_said_once(folder, measured, monkeypatch):
    monkeypatch.setattr(tuned, "_BATCH", 1)
    folder.write_text("a file stands in its place")
    x, w = _tensors()
    with convext.tuning("measure"), pytest.warns(UserWarning, match="cannot be written, choices live as long") as said:
        for n in (8, 9, 10):
            convext.conv2d(x[..., :n], w, padding=1)
        backends.forget()
        convext.conv2d(x[..., :8], w, padding=1)
    assert len(said) == 1 and len(measured) == 3


# ---- kernels that are wrong


def _plant(monkeypatch, run, cost=0.5):
    """Another kernel of the native backend's, the one that the cost model takes."""
    real = native.BACKEND.candidates

    def candidates(pass_, problem, kind=""):
        found = real(pass_, problem, kind)
        planted = Candidate("native", "fprop_planted", cost * found[0].cost, run)
        return [planted, *found] if "fprop_planted" not in tuned.aside("cpu") else found

    monkeypatch.setattr(native.BACKEND, "candidates", candidates)


def _right(problem, *arguments):
    return aten.BACKEND.fprop(problem, *arguments)


def _raises(problem, *arguments):
    raise OSError("no such instruction")


def _wrong(problem, *arguments):
    return _right(problem, *arguments) * 1.001


def _slow(problem, *arguments):
    begin = time.thread_time()
    while time.thread_time() < begin + 0.02:
        pass
    return _right(problem, *arguments)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (_wrong, "its result is 1.0e-03 away from ATen's in float32, expected at most"),
        (_raises, "it raised OSError: no such instruction"),
        (_slow, r"it took \d+ times as long as fprop_direct_f32_\w+, not"),
    ],
)
def test_a_planted_kernel_is_put_aside_at_first_sight(run, said, monkeypatch):
    torch.set_num_threads(1)
    _plant(monkeypatch, run)
    x, w = _tensors()
    with convext.tuning("measure"), pytest.warns(UserWarning) as warned:
        for n in (12, 11, 10):
            y = convext.conv2d(x[..., :n], w, padding=1)
            torch.testing.assert_close(y, torch.nn.functional.conv2d(x[..., :n], w, padding=1), rtol=1e-4, atol=1e-4)
    reason = tuned.aside("cpu")["fprop_planted"]
    assert re.match(said, reason)
    assert len(warned) == 1 and str(warned[0].message).startswith(
        f"convext: fprop_planted is put aside on this machine: {reason}. Please report it"
    )
    assert {choice.variant for choice in tuned.of("cpu").choices.values()}.isdisjoint({"fprop_planted"})
    text = report()
    assert f"  put aside: fprop_planted, {reason}" in text
    about = tuned.machine("cpu")
    assert (
        f"please report this line: fprop_planted on {about['name']} ({about['isa']}), build {about['build']}, "
        f"torch {torch.__version__}: {reason}"
    ) in text
    tuned.of("cpu").flush(1.0)
    _forget()  # another process
    assert "fprop_planted" in tuned.aside("cpu")


def test_a_kernel_that_is_put_aside_serves_no_other_problem_any_more(measured):
    x, w = _tensors()
    with convext.tuning("measure"):
        measured.fastest("native ")
        convext.conv2d(x, w, padding=1)
        used = backends.would_serve(Pass.FPROP, PROBLEM).variant
        other = replace(PROBLEM, n=1)
        wrong = {f"native {used}": "its result is wrong"}
        choice = tuned.KeptChoice("aten", "aten_fprop", {})
        with pytest.warns(UserWarning, match=f"{used} is put aside"):
            module._keep(Measured(Pass.FPROP, other, choice, "", 1.0, {}, wrong))
        assert backends.select(Pass.FPROP, PROBLEM).variant != used


# ---- the race


def _raced(seconds, budget, monkeypatch):
    """How often each call ran, and what all took, where each takes so many seconds of the clock of the budget."""
    clock, ran = [0.0], dict.fromkeys(seconds, 0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(name):
        def run():
            ran[name] += 1
            clock[0] += seconds[name]

        return run

    def seconds_of(run):
        begin = clock[0]
        run()
        return clock[0] - begin

    timings = module.race({name: call(name) for name in seconds}, seconds_of, budget)
    assert {name: len(t.seconds) for name, t in timings.items()} == ran
    return ran, clock[0]


def test_a_race_of_short_calls_ends_with_its_time(monkeypatch):
    ran, took = _raced({"a": 1e-3, "b": 1.5e-3, "c": 3e-3, "d": 9e-3}, 0.05, monkeypatch)
    assert ran["c"] == 1 and ran["d"] == 3  # too slow to win; slow enough to look at again
    assert ran["a"] == ran["b"] >= 3 and took <= 0.05 + 2.5e-3


def test_a_race_of_long_calls_is_two_rounds(monkeypatch):
    ran, took = _raced({"a": 1.0, "b": 1.5, "c": 5.0}, 0.012, monkeypatch)
    assert ran == {"a": 2, "b": 2, "c": 1} and took == 10.0


def test_a_race_of_the_shortest_calls_has_a_most(monkeypatch):
    ran, _ = _raced({"a": 1e-9, "b": 1e-9}, 10.0, monkeypatch)
    assert ran == {"a": 20, "b": 20}


# ---- a GPU, on paper


def _same(y):
    return y


@pytest.fixture
def gpu(monkeypatch):
    gpu = gpu_on_paper.GpuOnPaper(monkeypatch)
    monkeypatch.setattr(backends, "_unavailable", {})
    gpu.plant("native", {"fprop_a": (4e-3, _same, 1.0), "fprop_b": (2e-3, _same, 2.0)})
    gpu.plant("aten", {"aten_fprop": (3e-3, _same, None)})
    yield gpu
    _forget()


def test_on_a_gpu_a_problem_is_measured_without_being_asked(gpu):
    choice = backends.select(Pass.FPROP, ON_GPU, device=CUDA)
    assert (choice.backend.name, choice.variant) == ("native", "fprop_b")
    kept = tuned.of("cuda").choices[tuned.key(Pass.FPROP, ON_GPU)]
    assert kept.seconds == pytest.approx({"native fprop_a": 4e-3, "native fprop_b": 2e-3, "aten aten_fprop": 3e-3})
    assert gpu.current == [CUDA]  # the tensors' own, whichever is current
    assert gpu.autocasts_off == 1  # CUDA's would cast the operands of torch.convolution
    ran = len(gpu.calls)
    backends.forget()
    assert backends.select(Pass.FPROP, ON_GPU, device=CUDA).variant == "fprop_b" and len(gpu.calls) == ran
    # Caches are emptied between calls, with a sixteenth of the free memory at most.
    assert set(gpu.made) == {FLUSH_BYTES}
    gpu.free = 1 << 28
    backends.select(Pass.FPROP, replace(ON_GPU, n=1), device=CUDA)
    assert gpu.made[-1] == ((1 << 28) + (2 << 20)) // 16
    y = choice.run(ON_GPU, *_tensors(), convext.problem.Epilogue())
    torch.testing.assert_close(y, torch.nn.functional.conv2d(*_tensors(), padding=1))


def test_a_few_milliseconds_of_a_gpus_time_are_spent_on_a_problem(gpu):
    """Of calls of 20 to 40 µs, on its own clock: as many rounds as there may be, besides the checks."""
    gpu.plant("native", {"fprop_a": (40e-6, _same, 1.0), "fprop_b": (20e-6, _same, 2.0)})
    gpu.plant("aten", {"aten_fprop": (30e-6, _same, None)})
    backends.select(Pass.FPROP, ON_GPU, kind="bn relu", device=CUDA)
    # 20 rounds of those that are within twice of the fastest; a check of each, and one for NaN.
    assert gpu.now <= (20 + 2) * (40e-6 + 20e-6 + 30e-6) + 1e-9


def test_who_serves_goes_on_where_nobody_is_faster(gpu):
    gpu.plant("native", {"fprop_a": (2.9e-3, _same, 1.0)})
    assert backends.select(Pass.FPROP, ON_GPU, device=CUDA).variant == "fprop_a"


def test_cudnn_serves_where_it_is_faster(gpu):
    gpu.plant("native", {"fprop_a": (4e-3, _same, 1.0)})
    choice = backends.select(Pass.FPROP, ON_GPU, device=CUDA)
    assert choice.backend.name == "aten" and choice.passed_over["native"] == "aten was measured to be faster"


def test_in_a_capture_nothing_is_measured_and_the_choice_stays(gpu):
    gpu.capturing = True
    assert backends.select(Pass.FPROP, ON_GPU, device=CUDA).variant == "fprop_a" and not gpu.calls
    gpu.capturing = False
    backends.forget()
    assert backends.select(Pass.FPROP, ON_GPU, device=CUDA).variant == "fprop_a" and not gpu.calls
    backends.select(Pass.FPROP, replace(ON_GPU, n=1), device=CUDA)
    assert gpu.calls
    # What is known before a capture serves in it.
    gpu.capturing = True
    assert backends.select(Pass.FPROP, replace(ON_GPU, n=1), device=CUDA).variant == "fprop_b"


def test_a_gpu_without_memory_measures_nothing(gpu):
    gpu.free = 1 << 16
    assert backends.select(Pass.FPROP, replace(ON_GPU, n=4096), device=CUDA).variant == "fprop_a" and not gpu.calls


def test_triton_is_compiled_for_a_measurement_only_where_it_serves(gpu):
    gpu.plant("triton", {"fprop_direct_float32_triton": (1e-3, _same, None)})
    assert backends.select(Pass.FPROP, ON_GPU, device=CUDA).variant == "fprop_b"
    assert "fprop_direct_float32_triton" not in gpu.calls
    gpu.plant("native", {})
    assert backends.select(Pass.FPROP, replace(ON_GPU, n=1), device=CUDA).backend.name == "triton"
    assert gpu.calls.count("fprop_direct_float32_triton") > 2


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ((1e-3, lambda y: y * 1.1, 1.0), "its result is 1.0e-01 away from ATen's in float32"),
        ((1e-3, lambda y: y[:1], 1.0), "its result is (1, 24, 12, 12), expected (2, 24, 12, 12)"),
        ((1.0, _same, 1.0), "it took 500 times as long as fprop_b, not 0.5"),
    ],
)
def test_a_kernel_that_no_developer_could_run_is_put_aside(gpu, kernel, said):
    gpu.plant("native", {"fprop_a": kernel, "fprop_b": (2e-3, _same, 2.0)})
    with pytest.warns(UserWarning, match="fprop_a is put aside on this machine") as warned:
        choices = [backends.select(Pass.FPROP, replace(ON_GPU, n=n), device=CUDA) for n in (2, 3)]
    assert len(warned) == 1 and [choice.variant for choice in choices] == ["fprop_b", "fprop_b"]
    assert tuned.aside("cuda")["fprop_a"].startswith(said)
    ran = gpu.calls.count("fprop_a")
    backends.select(Pass.FPROP, replace(ON_GPU, n=5), device=CUDA)
    assert gpu.calls.count("fprop_a") == ran
    # Only the one kernel there is: then ATen is who serves.
    gpu.plant("native", {"fprop_a": kernel})
    assert backends.select(Pass.FPROP, replace(ON_GPU, n=6), device=CUDA).backend.name == "aten"


def test_who_was_expected_to_be_faster_than_aten_and_takes_ten_times_as_long_is_put_aside(gpu):
    gpu.plant("native", {"fprop_a": (31e-3, _same, 1.0)})
    with pytest.warns(UserWarning, match="it took 10 times as long as ATen, and was expected to be faster"):
        assert backends.select(Pass.FPROP, ON_GPU, device=CUDA).backend.name == "aten"


def test_one_disturbed_call_puts_nothing_aside(gpu):
    ran = []

    def disturbed(y):
        ran.append(1)
        gpu.now += 1.0 if len(ran) == 2 else 0.0  # the first call is the check
        return y

    gpu.plant("native", {"fprop_a": (1e-3, disturbed, 1.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select(Pass.FPROP, ON_GPU, device=CUDA)
    assert not tuned.aside("cuda")


def test_a_gpus_choice_depends_on_what_torch_lets_cudnn_do(gpu):
    keys = set()
    for benchmark in (True, False):
        for allow_tf32 in (True, False):
            with torch.backends.cudnn.flags(benchmark=benchmark, allow_tf32=allow_tf32):
                keys.add(tuned.key(Pass.FPROP, ON_GPU))
    assert len(keys) == 4
    half = replace(ON_GPU, dtype=DTYPES[torch.bfloat16])
    with torch.backends.cudnn.flags(allow_tf32=True):
        key = tuned.key(Pass.FPROP, half)
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert tuned.key(Pass.FPROP, half) == key


def test_a_gpus_choices_are_kept_by_driver_and_libraries(gpu, monkeypatch):
    before = tuned.machine("cuda")
    monkeypatch.setattr(tuned, "_driver", lambda: "999.1")
    assert "driver 999.1" in tuned.machine("cuda")["isa"] and tuned.machine("cuda") != before
    assert f"cuDNN {torch.backends.cudnn.version()}" in before["isa"]


def test_tune_measures_what_first_sight_left_out(gpu):
    """Triton's kernels, which are compiled first."""
    gpu.plant("triton", {"fprop_direct_float32_triton": (1e-3, _same, None)})
    job = (Pass.FPROP, ON_GPU, "")
    is_known = sys.modules["convext.tune.tuner"]._is_known
    assert not is_known(*job)
    backends.select(Pass.FPROP, ON_GPU, device=CUDA)
    assert not is_known(*job)
    gpu.plant("triton", {})
    assert is_known(*job)


def test_tune_is_disturbed_by_no_first_sight(measured):
    """The forwards that it makes to see what runs measure nothing themselves."""
    model = convext.swap(nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()).eval())
    with convext.tuning("measure"):
        found = convext.tune(model, _tensors()[0], seconds=0.0)
        assert not measured.seen and found.known == 0
        assert {one.kind for one in found.measured} == {"", "bn relu"}
        with torch.no_grad():
            model(_tensors()[0])
    assert not measured.seen
