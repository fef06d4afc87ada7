"""Who computes is measured, kept from process to process, and explained: with real kernels, and with planted ones whose
times a table says."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from torch import nn

import convext
from convext import backends
from convext.backends import compiled_calls, costs, native, tuned
from convext.backends import triton as triton_backend
from convext.backends.base import Candidate
from convext.bench.timing import Timing
from convext.problem import DTYPES, ConvProblem, Geom, Layout, Pass
from convext.tune import explain, measure
from convext.tune.measure import candidates, keep

pytestmark = pytest.mark.skipif(
    backends.unavailable("native", "cpu") is not None, reason="what is chosen among are the compiled library's kernels"
)
PROBLEM = ConvProblem(
    2, 16, 12, 12, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1, DTYPES[torch.float32], Layout.NHWC, Layout.NHWC, "cpu"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test has a cache of its own, and leaves no choice behind."""
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["convext.tune.measure"], "_VISIT", 0.0)  # each candidate once a round
    _forget()
    yield tmp_path / "cache"
    tuned.mode = None
    monkeypatch.undo()
    _forget()


def _forget():
    tuned.forget()
    native.forget_plans()
    backends.forget()


def _kept(backend, variant, pass_=Pass.FPROP, problem=PROBLEM):
    tuned.of("cpu").choices[tuned.key(pass_, problem)] = tuned.KeptChoice(backend, variant, {})
    native.forget_plans()
    backends.forget()


def _by_the_model(pass_=Pass.FPROP, problem=PROBLEM):
    with convext.tuning("off"):
        return backends.select(pass_, problem)


# ---- which choice counts


def test_a_kept_choice_counts():
    names = [c.variant for c in native.BACKEND.candidates(Pass.FPROP, PROBLEM)]
    model = _by_the_model()
    assert model.backend.name == "native" and model.variant == names[0] and len(names) > 1
    _kept("native", names[1])
    choice = backends.select(Pass.FPROP, PROBLEM)
    assert (choice.backend.name, choice.variant, choice.passed_over) == ("native", names[1], {})
    _kept("aten", "aten_fprop")
    choice = backends.select(Pass.FPROP, PROBLEM)
    assert choice.backend.name == "aten" and choice.passed_over == {"native": "aten was measured to be faster"}
    with convext.tuning("off"):
        assert backends.select(Pass.FPROP, PROBLEM).variant == names[0]
    with convext.backend("native"):  # what a user asks for comes first
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"
    assert backends.select(Pass.FPROP, replace(PROBLEM, n=3)).variant == names[0]
    assert backends.select(Pass.DGRAD, PROBLEM).variant == _by_the_model(Pass.DGRAD).variant


def test_a_choice_is_for_its_number_of_threads():
    torch.set_num_threads(1)
    _kept("aten", "aten_fprop")
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    torch.set_num_threads(2)
    backends.forget()
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"


@pytest.mark.parametrize("choice", [("native", "a kernel that is gone"), ("triton", "x"), ("gone", "x"), ("aten", "y")])
def test_a_choice_that_no_longer_holds_is_passed_by(choice):
    _kept(*choice)
    assert backends.select(Pass.FPROP, PROBLEM).variant == _by_the_model().variant


def test_a_choice_that_a_setting_rules_out_is_passed_by():
    problem = replace(PROBLEM, c=64, k=64)
    winograd = next(c.variant for c in native.BACKEND.candidates(Pass.FPROP, problem) if "winograd" in c.variant)
    _kept("native", winograd, problem=problem)
    assert backends.select(Pass.FPROP, problem).variant == winograd
    with convext.accuracy("direct"):
        _kept("native", winograd, problem=problem)
        assert "winograd" not in backends.select(Pass.FPROP, problem).variant


def test_calls_run_the_kept_kernel_and_agree():
    x, w = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last), torch.randn(24, 16, 3, 3)
    expected = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    for candidate in candidates(Pass.FPROP, PROBLEM):
        _kept(candidate.backend, candidate.variant)
        backends.reset_counts()
        y = convext.conv2d(x, w, padding=1)
        assert backends.counts() == {(candidate.backend, "fprop", candidate.variant): 1}
        # A sum of 144 products, by Winograd's transforms too.
        assert (y - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * 12 * expected.abs().max()


def test_no_kernel_that_was_put_aside_serves():
    first, second = [c.variant for c in native.BACKEND.candidates(Pass.FPROP, PROBLEM)][:2]
    tuned.of("cpu").aside[first] = "its result is wrong"
    _kept("native", first)
    assert backends.select(Pass.FPROP, PROBLEM).variant == second
    for kernel in native.kernels():
        tuned.of("cpu").aside[kernel["name"]] = "its result is wrong"
    native.forget_plans()
    backends.forget()
    choice = backends.select(Pass.FPROP, PROBLEM)
    assert choice.backend.name == "aten" and "it was put aside: its result is wrong" in choice.passed_over["native"]


def test_bad_mode():
    with pytest.raises(ValueError, match="tuning: unknown mode 'measured', expected one of 'measure', 'cached', 'off'"):
        convext.tuning("measured")
    assert repr(convext.tuning("off")) == "convext.tuning('off')" and tuned.mode == "off"


# ---- what is measured


def _planted(seconds, results=None):
    """Candidates and a timer: name -> seconds of each round; results: name -> what it computes."""

    def run(name):
        def fprop(problem, x, w, epilogue):
            y = torch.convolution(x, w, None, *problem.geom[:3], False, (0, 0), problem.groups)
            return (results or {}).get(name, lambda y: y)(y)

        return fprop

    among = [Candidate(*name.split(" "), cost, run(name)) for name, (cost, *_) in seconds.items()]

    def timer(calls):
        for call in calls.values():
            call()
        return {name: Timing(tuple(seconds[name][1])) for name in calls}

    return among, timer


def _raises(y):
    raise OSError("no such instruction")


BEFORE = "native fprop_direct_f32_avx512"


def _measured(seconds, results=None):
    with convext.tuning("off"):
        before = f"native {backends.select(Pass.FPROP, PROBLEM).variant}"
    seconds = {before if name == "before" else name: times for name, times in seconds.items()}
    among, timer = _planted(seconds, {before if name == "before" else name: f for name, f in (results or {}).items()})
    return measure(Pass.FPROP, PROBLEM, among=among, timer=timer), before


@pytest.mark.parametrize(
    ("other", "seconds", "wins"),
    [
        ("native other", [5.0] * 8, True),
        ("native other", [10.0] * 4 + [5.0] * 4, False),  # in half of the rounds
        ("native other", [9.7] * 8, False),  # by less than noise
        ("aten aten_fprop", [5.0] * 8, True),
        ("aten aten_fprop", [9.7] * 8, False),
    ],
)
def test_who_is_the_fastest(other, seconds, wins):
    found, before = _measured({"before": (1.0, [10.0] * 8), other: (1.5, seconds)})
    chosen = f"{found.choice.backend} {found.choice.variant}"
    assert chosen == (other if wins else before) and found.before == before
    assert found.gain == pytest.approx(2.0 if wins else 1.0, rel=1e-6) and not found.wrong
    assert found.choice.seconds[before] == pytest.approx(10.0, rel=1e-6)


def test_a_kernels_call_is_timed_as_what_was_called_before_costs():
    """Of so small a convolution the way through Python is most, which calls after the first do without."""
    saving = costs.table().limits["call_saving"] if compiled_calls.library is not None else 0.0
    took = {"before": (1.0, [5e-6] * 8), "aten aten_fprop": (None, [3.3e-6] * 8)}
    found, before = _measured(took)
    assert found.choice.seconds[before] == pytest.approx(5e-6 - saving)
    assert (found.choice.backend == "native") == (saving > 1.6e-6)
    found, _ = _measured({"before": (1.0, [1e-6] * 8), "aten aten_fprop": (None, [3e-6] * 8)})
    assert found.choice.seconds[before] == pytest.approx(max(1e-6 - saving, 5e-7))


def test_aten_alone_stands_for_nothing_that_follows(folder):
    """A kernel does, which computes what follows in its epilogue."""
    variant = native.BACKEND.candidates(Pass.FPROP, PROBLEM)[0].variant
    for backend, name in (("aten", "aten_fprop"), ("native", variant)):
        tuned.of("cpu").choices[tuned.key(Pass.FPROP, PROBLEM)] = tuned.KeptChoice(backend, name, {})
        assert tuned.lookup(Pass.FPROP, PROBLEM).backend == backend
        assert (tuned.lookup(Pass.FPROP, PROBLEM, "bn relu") is None) == (backend == "aten")


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda y: y + 1e-3, "away from ATen's in float64, expected at most"),
        (lambda y: y * float("nan"), "its result is nan away"),
        (lambda y: y[:, 1:], r"its result is \(2, 23, 12, 12\), expected \(2, 24, 12, 12\)"),
        (_raises, "it raised OSError: no such instruction"),
    ],
)
def test_a_kernel_that_is_wrong_or_raises_is_put_aside(result, said, folder):
    name = native.BACKEND.candidates(Pass.FPROP, PROBLEM)[0].variant
    times = {"before": (1.0, [1.0] * 8), "aten aten_fprop": (None, [9.0] * 8)}
    found, before = _measured(times, {"before": result})
    assert before == f"native {name}" and found.choice.backend == "aten" and list(found.wrong) == [before]
    with pytest.warns(UserWarning, match=f"{name} is put aside on this machine: .*{said}"):
        keep([found])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keep([found])
    assert not said  # once is enough
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    assert backends.select(Pass.FPROP, replace(PROBLEM, n=1)).variant != name
    _forget()  # another process
    assert name in tuned.aside("cpu") and backends.select(Pass.FPROP, replace(PROBLEM, n=1)).variant != name
    from convext.doctor import report

    assert f"put aside: {name}" in report()


def test_a_kernel_that_takes_far_longer_than_expected_is_put_aside():
    times = {"before": (1.0, [1.0] * 8), "native other": (1.2, [13.0] * 8)}
    found, _ = _measured(times)
    assert found.wrong == {"native other": f"it took 13 times as long as {found.choice.variant}, not 1.2"}
    found, _ = _measured({"before": (1.0, [1.0] * 8), "native other": (2.0, [13.0] * 8)})
    assert not found.wrong  # the cost model expected that it takes longer
    found, _ = _measured({"before": (1.0, [1.0] * 8), "native other": (1.2, [2.0] + [13.0] * 7, [1.0] * 8)})
    assert not found.wrong  # in one round it did not: the others were disturbed


def test_no_right_kernel():
    with pytest.raises(RuntimeError, match="no kernel computes fprop of x 2x16x12x12"):
        _measured({"before": (1.0, [1.0], [1.0])}, {"before": _raises})


@pytest.mark.parametrize("pass_", Pass)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extents", [(16, 24, 3, 1, 1), (64, 64, 3, 1, 1), (16, 16, 3, 2, 16), (8, 8, 1, 2, 2)])
def test_every_candidate_is_right(pass_, dtype, extents):
    c, k, r, stride, groups = extents
    geom = Geom((stride, stride), (r // 2, r // 2), (1, 1), groups)
    problem = ConvProblem.of_fprop(torch.empty(2, c, 12, 12, dtype=dtype), torch.empty(k, c // groups, r, r), geom)
    problem = replace(problem, dtype=DTYPES[dtype])
    found = measure(pass_, problem, timer=lambda calls: {name: Timing((1.0,) * 4) for name in calls})
    assert not found.wrong and set(found.timings) == {str(c) for c in candidates(pass_, problem)}


# ---- tune


def _network():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
    )


def test_what_was_measured_is_known_to_every_process(folder):
    model, x, said = _network(), torch.randn(1, 8, 10, 10), []
    tuned_now = convext.tune(model, x, train=True, seconds=0.0, on_progress=lambda *progress: said.append(progress))
    total = len(tuned_now.measured)
    assert (
        total == 3 * 3 * 3 and tuned_now.known == 0
    )  # layers, passes; contiguous, from that to channels-last, and that
    assert [done for done, _, _ in said] == list(range(total + 1)) and said[0][1:] == (
        total,
        "fprop 8×10×10 -> 16, 3×3",
    )
    assert f"{total} measured, 0 known before" in str(tuned_now) and str(folder) in str(tuned_now)
    again = convext.tune(model, x, train=True)
    assert not again.measured and again.known == total and "0 measured" in again.summary()
    assert len(convext.tune(model, x, again=True, seconds=0.0).measured) == 9
    code = (
        "import torch, convext; from convext.backends import tuned\n"
        "m = torch.nn.Conv2d(16, 4, 1); print(len(tuned.of('cpu').choices), "
        "convext.tune(m, torch.randn(1, 16, 10, 10)).known)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert run.stdout.split() == [str(total), "3"], run.stderr


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr(sys.modules["convext.tune.tuner"], "_KEEP_EVERY", 2)

    def stop(done, total, what):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convext.tune(_network(), torch.randn(1, 8, 10, 10), seconds=0.0, on_progress=stop)
    _forget()
    assert convext.tune(_network(), torch.randn(1, 8, 10, 10), seconds=0.0).known == 5


def test_a_swapped_network_is_measured_as_it_calls(monkeypatch):
    """Each convolution with what is fused with it, and by itself; a 1-D and a transposed one are among them."""
    network = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.ConvTranspose2d(16, 8, 3), nn.Conv2d(8, 4, 1)
    )
    model, x = convext.swap(network.eval()), torch.randn(1, 8, 10, 10)
    with torch.no_grad():
        model(x)  # what is cached of the selection hides nothing
    found = convext.tune(model, x, seconds=0.0)
    kinds = [(one.pass_, one.problem.c, one.kind) for one in found.measured if one.kind or one.pass_ is not Pass.FPROP]
    assert kinds == [(Pass.FPROP, 8, "bn silu"), (Pass.DGRAD, 8, "")]
    assert "8×10×10 -> 16, 3×3, bn silu" not in found.summary() and convext.tune(model, x).measured == []
    choice = tuned.lookup(Pass.FPROP, found.measured[0].problem, "bn silu")
    assert found.measured[0].kind == "bn silu" and {f"{choice.backend} {choice.variant}"} <= set(choice.seconds)
    assert "aten aten_fprop_one_pass" in choice.seconds
    # What runs with something behind it counts once in the sum.
    per_call = {one.problem: one for one in found.measured if one.kind}
    counted = sum(
        one.timings[one.choice.name].median
        for one in found.measured
        if one.kind or one.pass_ is not Pass.FPROP or one.problem not in per_call
    )
    assert found.seconds()[1] == pytest.approx(counted)


def test_swap_tunes_on_a_sample():
    x = torch.randn(1, 8, 10, 10)
    model = convext.swap(_network().eval(), tune=x)
    assert {key.split()[0] for key in tuned.of("cpu").choices} == {"fprop"}
    assert convext.tune(model, x).measured == [] and not model.training
    trained = convext.swap(_network(), tune=x)
    assert {key.split()[0] for key in tuned.of("cpu").choices} == {"fprop", "dgrad", "wgrad"} and trained.training
    assert convext.tune(trained, x, train=True).measured == []


@pytest.mark.parametrize("sample", [torch.ones(1, 8, 10, 10, dtype=torch.int64), "x", torch.randn(1, 3, 10, 10)])
def test_a_swap_whose_tuning_fails_leaves_the_model_as_it_was(sample):
    model = _network().eval()
    with pytest.raises((TypeError, RuntimeError)):
        convext.swap(model, tune=sample)
    assert not any("forward" in m.__dict__ or "_conv_forward" in m.__dict__ for m in model.modules())
    convext.swap(model)
    with pytest.raises((TypeError, RuntimeError)):
        convext.swap(model, tune=sample)
    assert all("_conv_forward" in m.__dict__ for m in model if isinstance(m, nn.Conv2d))


def test_a_swapped_network_is_tuned_as_it_runs():
    plain = _network().eval()
    model, x = convext.swap(_network().eval()), torch.randn(1, 8, 10, 10)
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        model(x)
        convext.tune(model, x, seconds=0.0)
        found = model(x)
        # Three layers in a row, of up to 144 products; rounding errors of each pass through the next.
        expected = plain.double()(x.double())
        assert (found - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * 12 * expected.abs().max()
        for name in "0", "2", "3":
            explanation = convext.explain(model, name)
            assert explanation.serves.seconds is not None and "was measured" in explanation.why


def test_bad_arguments_of_tune():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        convext.tune("resnet50", torch.randn(1))
    with pytest.raises(TypeError, match="x: expected a tensor, got tuple"):
        convext.tune(_network(), (1, 8, 10, 10))
    with pytest.raises(TypeError, match="x: expected a tensor of float32, .*, got torch.int64"):
        convext.tune(_network(), torch.ones(1, 8, 10, 10, dtype=torch.int64))


def test_tune_leaves_the_model_and_random_numbers_as_they_were():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()), torch.randn(2, 3, 8, 8)
    model[1].eval()
    state, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    convext.tune(model, x, seconds=0.0)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model] == [True, False, True]


# ---- files


def _written(folder):
    _kept("aten", "aten_fprop")
    path = tuned.of("cpu").write()
    assert path.parent == folder and json.loads(path.read_text())["format"] == 1
    _forget()
    return path


def _changed(**changes):
    return lambda found: {**found, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        (lambda found: [found], "its format is not 1"),
        (_changed(format=2), "its format is not 1"),
        (_changed(machine={"device": "cpu"}), "it was measured elsewhere: name, isa, build, torch differ"),
        (_changed(machine=None), "it was measured elsewhere"),
        (_changed(choices=[]), "it lacks choices"),
        (_changed(aside={"a": 1}), "its reasons are no text"),
        (_changed(choices={"a": {"backend": "aten"}}), "no choice stands at 'a'"),
        (_changed(choices={"a": {"backend": "aten", "variant": 3, "seconds": {}}}), "no choice stands at 'a'"),
        (_changed(choices={"a": {"backend": "aten", "variant": "x", "seconds": {"x": -1.0}}}), "no choice stands"),
    ],
)
def test_a_file_that_does_not_hold_is_put_aside_with_one_warning(folder, change, said):
    path = _written(folder)
    text = change or "{"
    if callable(change):
        text = json.dumps(change(json.loads(path.read_text())))
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"holds no choices .{said}") as warned:
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"
    assert len(warned) == 1
    assert not path.exists() and path.with_suffix(".broken").read_text() == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _forget()
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"
    _written(folder)
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"


def test_what_an_older_build_measured_is_ignored(folder, monkeypatch):
    """Its file stays, for that build may run again; the new one's stands beside it."""
    old = _written(folder)
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    text = old.read_text()
    monkeypatch.setattr(tuned, "_build", lambda: "a newer one")
    _forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"
    new = _written(folder)
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    assert new != old and old.read_text() == text and "a newer one" in new.read_text()
    old.replace(new)  # under the name that the new build looks for, too
    _forget()
    with pytest.warns(UserWarning, match="holds no choices .it was measured elsewhere: build differ"):
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"


def test_a_build_is_known_by_its_libraries_and_on_gpus_by_tritons_kernels(monkeypatch, tmp_path):
    package = tmp_path / "convext"
    libraries = [package / file.name for file in Path(convext.__file__).parent.glob("*.so")]
    kernels = package / "triton" / "direct.py"
    kernels.parent.mkdir(parents=True)
    for file in (*libraries, kernels):
        file.write_text("as it was")
    monkeypatch.setattr(tuned, "__file__", str(package / "backends" / "tuned.py"))
    gpu = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(name="a GPU"))
    monkeypatch.setattr(torch, "get_device_module", lambda device_type: gpu)

    def builds():
        return tuple(tuned.machine(device_type)["build"] for device_type in ("cpu", "cuda"))

    known = [builds()]
    for file in libraries:
        file.write_text("as it is now")
    known.append(builds())
    kernels.write_text("as it is now")
    known.append(builds())
    monkeypatch.setattr(triton_backend, "release", lambda: "9.9.9")
    known.append(builds())
    cpu, cuda = zip(*known)
    assert cpu[0] != cpu[1] == cpu[2] == cpu[3]  # what Triton compiles is none of the CPU's
    assert len(set(cuda)) == 4


def test_files_of_other_builds_are_left_alone(folder):
    folder.mkdir()
    other = folder / "cpu-0123456789abcdef.json"
    other.write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(Pass.FPROP, PROBLEM).backend.name == "native"
    assert other.read_text() == "{}"


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    folder.write_text("a file stands in its place")
    with pytest.warns(UserWarning, match="cannot be written, choices live as long as this process"):
        found = convext.tune(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 10, 10), seconds=0.0)
    assert found.path is None and "as long as this process lives" in str(found)
    assert not convext.tune(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 10, 10)).measured


def test_a_file_that_another_process_holds(folder, monkeypatch):
    path = _written(folder)
    monkeypatch.setattr(tuned, "_LOCK_SECONDS", 0.1)
    _kept("aten", "aten_fprop", Pass.DGRAD)
    with filelock.FileLock(f"{path}.lock"), pytest.warns(UserWarning, match="cannot be written"):
        assert tuned.of("cpu").write() is None
    assert tuned.of("cpu").write() == path


def test_two_processes_that_write_lose_nothing(folder):
    code = (
        "import sys; from convext.backends import tuned\n"
        "for i in range(20):\n"
        "    tuned.of('cpu').choices[f'{sys.argv[1]} {i}'] = tuned.KeptChoice('aten', 'x', {})\n"
        "    assert tuned.of('cpu').write()\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [process.wait(200) for process in running] == [0, 0]
    assert len(tuned.of("cpu").choices) == 40 and not list(folder.glob("*.part"))


def test_without_a_place_for_files(monkeypatch):
    monkeypatch.delenv("CONVEXT_CACHE")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert tuned.cache_folder() is None and tuned.of("cpu").write() is None
    _kept("aten", "aten_fprop")
    assert backends.select(Pass.FPROP, PROBLEM).backend.name == "aten"
    from convext.doctor import report

    assert "platformdirs is not installed" in report()


# ---- explain


def test_explain_names_every_kernel_and_why():
    model = convext.swap(nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()).eval())
    with pytest.raises(RuntimeError, match="'0' has not run by convext yet"):
        convext.explain(model, "0")
    with torch.no_grad():
        model(torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last))
    found = convext.explain(model, "0")
    assert found.problem == PROBLEM and found.serves.variant == _by_the_model().variant and found.serves.expected == 1.0
    verdicts = {line.variant: line.verdict for line in found.lines}
    assert {c.variant for c in candidates(Pass.FPROP, PROBLEM)} < set(verdicts) | {""}
    assert verdicts["aten_fprop"] == "comes after who serves" and "expected to be slower" in verdicts.values()
    assert "fprop of 16×12×12 -> 24, 3×3, batch 2" in str(found) and "the cost model chose" in str(found)
    assert convext.explain(model, "0", "wgrad").pass_ is Pass.WGRAD
    keep([measure(Pass.FPROP, PROBLEM, seconds=0.0)])
    assert all(line.seconds for line in convext.explain(model, "0").lines if line.variant)
    with convext.backend("aten"):
        assert convext.explain(model, "0").serves.backend == "aten"
        assert "convext.backend('aten') is set" in convext.explain(model, "0").why


def test_explain_says_why_a_backend_is_passed_over():
    """By a table in which what ATen does for it takes no time."""
    model = convext.swap(nn.Sequential(nn.Conv2d(16, 4, 1, groups=2), nn.ReLU()).eval())
    x = torch.randn(1, 16, 2, 2)
    row = costs.aten_row(Pass.FPROP, ConvProblem.of_fprop(x, model[0].weight, Geom(groups=2)))
    costs.use(costs.Table({}, {"call_saving": 0.0}, {}, {row: {"call": 0.0}}))
    try:
        with torch.no_grad():
            model(x)
        found = convext.explain(model, "0")
    finally:
        costs.use(None)
    assert found.serves.backend == "aten" and "µs expected, ATen's 0.0" in found.why


def test_bad_arguments_of_explain():
    model = convext.swap(nn.Sequential(nn.Conv2d(16, 2, 1), nn.ReLU()))
    with pytest.raises(KeyError, match="no convolution '1'; there are 0"):
        convext.explain(model, "1")
    with pytest.raises(ValueError, match="pass_: unknown pass 'forward', expected one of 'fprop', 'dgrad', 'wgrad'"):
        explain(model, "0", "forward")
