"""The order of things in gpu_check.py, on a machine without a GPU: steps, limits, what is written, what is said."""

import dataclasses
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Outcome, Step


def step(name, *code, seconds=60.0):
    return Step(name, seconds, tuple((sys.executable, "-c", text) for text in code), {"STEP": name})


def run_all(groups, seconds=60.0):
    reported = []
    outcomes = gpu_check.run_all(groups, seconds, reported.append)
    assert reported == outcomes
    return {outcome.name: outcome for outcome in outcomes}


def test_one_failing_step_takes_nothing_else_down():
    outcomes = run_all(
        [
            [step("a", "print('x')", "import sys; print('no luck'); sys.exit(3)", "print('never')")],
            [step("b", "import os; print('b is', os.environ['STEP'])")],
        ]
    )
    assert (outcomes["a"].status, outcomes["b"].status) == ("failed", "passed")
    assert outcomes["a"].output == "x\nno luck\nexit status 3\n"
    assert outcomes["b"].told == "b is b"


def test_a_step_ends_at_its_limit_with_all_that_it_started_and_keeps_its_output():
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    begin = time.monotonic()
    outcome = run_all([[step("slow", child, seconds=5.0)]])["slow"]
    assert time.monotonic() - begin < 60  # a child left alone would hold the pipe open for ten minutes
    assert (outcome.status, outcome.output, outcome.ok) == ("timed out", "begun\n", False)


def test_steps_of_a_group_run_at_once_and_the_whole_has_a_limit_too(tmp_path):
    meet = (
        "import time, pathlib\nme, other = map(pathlib.Path, {})\nme.touch()\nwhile not other.exists(): time.sleep(.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    outcomes = run_all([[step("a", meet.format((a, b))), step("b", meet.format((b, a)))]])
    assert all(outcome.ok for outcome in outcomes.values())
    groups = [[step(name, f"import time; time.sleep({seconds})")] for name, seconds in (("first", 2), ("second", 600))]
    late = run_all(groups, seconds=2.0)
    assert late["second"].status == "timed out"


def test_a_program_that_is_not_there_fails_in_one_line():
    outcome = run_all([[Step("memcheck", 9.0, (("no-such-sanitizer", "x"),))]])["memcheck"]
    assert (outcome.status, outcome.told) == ("failed", "no-such-sanitizer: No such file or directory")


def test_commands_at_once_meet_and_the_slow_one_keeps_its_output(tmp_path):
    meet = (
        "import time, pathlib\nme, other = map(pathlib.Path, {})\nme.touch()\n"
        "while not other.exists(): time.sleep(.01)\nprint('1 passed', flush=True)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    both = dataclasses.replace(step("tests", meet.format((a, b)), meet.format((b, a))), at_once=True)
    assert run_all([[both]])["tests"].told == "2 passed in 2 processes"
    slow = "import time; print('x', flush=True); time.sleep(600)"
    late = dataclasses.replace(step("tests", "print('1 passed')", slow, seconds=5.0), at_once=True)
    outcome = run_all([[late]])["tests"]
    assert (outcome.status, outcome.output) == ("timed out", "1 passed\nx\n")


def test_what_is_not_installed_is_skipped_in_words():
    lacking = dataclasses.replace(step("resnet50", "print('never')"), needs=("json", "no_such_module"))
    outcome = run_all([[lacking]])["resnet50"]
    assert (outcome.status, outcome.told, outcome.ok) == ("skipped", "not installed here: no_such_module", True)


def test_parts_hold_every_test_once():
    """--part, of conftest.py."""
    import conftest

    tests = [types.SimpleNamespace(nodeid=f"tests/test_x.py::test[{i}]") for i in range(100)]

    def kept(part):
        items, hook = list(tests), types.SimpleNamespace(pytest_deselected=lambda items: None)
        conftest.pytest_collection_modifyitems(types.SimpleNamespace(getoption=lambda name: part, hook=hook), items)
        return [test.nodeid for test in items]

    parts = kept("1/3"), kept("2/3"), kept("3/3")
    assert sorted(sum(parts, [])) == sorted(kept("1/1")) == sorted(test.nodeid for test in tests)
    assert min(map(len, parts)) > 20


class TestStages:
    def steps(self, capability="90"):
        groups = gpu_check.stages(capability, Path("out"), "NVIDIA H200", 16)
        return groups, {step.name: step for group in groups for step in group}

    def test_tables_are_measured_alone_and_everything_fits_into_the_time(self):
        groups, _ = self.steps()
        assert [[step.name for step in group] for group in groups[2:]] == [["host"], ["resnet50"], ["mobilenet_v2"]]
        assert sum(max(step.seconds for step in group) for group in groups) < 10 * 60 and gpu_check.MINUTES == 6

    def test_only_the_gpu_at_hand_is_compiled_for(self):
        _, steps = self.steps()
        assert {step.environment["CONVEXT_CUDA_ARCHS"] for step in steps.values()} == {"90"}

    def test_runner_shares_the_objects_of_the_library(self):
        _, steps = self.steps()
        (*_, temporary), (*_, folder) = steps["build"].commands
        assert Path(folder) == Path(temporary) / "cuda"

    def test_files_of_results_are_named_after_the_gpu(self):
        _, steps = self.steps()
        assert "out/nvidia_h200_resnet50.json" in steps["resnet50"].commands[0]

    def test_a_gpu_of_another_make_has_triton_alone(self):
        _, steps = self.steps(None)
        assert set(steps) == {"build", "tests-triton", "resnet50", "mobilenet_v2"}
        assert steps["build"].environment["CONVEXT_BUILD_CUDA"] == "0"


def test_files_with_tests_for_a_gpu_are_found():
    files = gpu_check.test_files()
    assert {"tests/test_cases.py", "tests/conformance/test_conformance_opinfo.py"} <= set(files)
    assert "tests/house/test_packaging.py" not in files


def test_what_sums_up_is_the_last_line_with_words():
    assert gpu_check.told(["a\n3 passed in 2 s\n====\n\n"]) == "3 passed in 2 s"
    assert gpu_check.told([""]) == gpu_check.told([]) == ""


def test_parts_of_a_suite_are_summed_up():
    parts = ["x\n3 passed, 1 skipped, 9 deselected in 2 s\n", "1 failed, 2 passed, 2 errors in 1 s", "1 error in 1 s"]
    assert gpu_check.told(parts) == "5 passed, 1 skipped, 1 failed, 3 error in 3 processes"
    assert gpu_check.told(["4 passed in 1 s", "Segmentation fault"]) == "Segmentation fault"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_fails():
    done = subprocess.run([sys.executable, gpu_check.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "sees no GPU here, so nothing was checked" in done.stderr


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as main() looks, and $OUT."""
    from convext.bench import machine

    properties = type("Properties", (), {"name": "Stand-in 1", "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "gpu", lambda device: {"name": properties.name})
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("broken", [False, True])
def test_results_and_log_are_written_whatever_happens(gpu, monkeypatch, capsys, broken):
    groups = [[step("build", "print('built')")], [step("kernels", f"print('ran'); raise SystemExit({int(broken)})")]]
    monkeypatch.setattr(gpu_check, "stages", lambda capability, *rest: groups if capability == "90" else [])
    assert gpu_check.main([]) == int(broken)
    written = json.loads((gpu / "stand_in_1_check.json").read_text())
    assert [(r["name"], r["status"]) for r in written["results"]] == [
        ("build", "passed"),
        ("kernels", "failed" if broken else "passed"),
    ]
    assert written["machine"]["gpu"] == {"name": "Stand-in 1"} and written["machine"]["kernels"]
    assert "built\n" in (gpu / "gpu_check.log").read_text()
    assert capsys.readouterr().out.strip().endswith("FAILED kernels" if broken else "gpu-check: passed")


def test_some_steps_alone_write_no_results(gpu, monkeypatch):
    groups = [[step("build", "raise SystemExit(1)")], [step("kernels", "print('ran')"), step("host", "print('ran')")]]
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: groups)
    assert gpu_check.main(["--only", "kernels"]) == 0
    assert not (gpu / "stand_in_1_check.json").exists()
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "carnels"])
    with pytest.raises(SystemExit):
        gpu_check.main(["--skip", "carnels"])
    assert gpu_check.main(["--skip", "build"]) == 0  # it lies there compiled, and all else ran
    assert (gpu / "stand_in_1_check.json").exists()


def test_outcome_is_told_in_one_line():
    text = gpu_check.line(Outcome("memcheck", "passed", 12.34, "0 errors", "..."))
    assert text.split() == ["memcheck", "passed", "12.3", "s", "0", "errors"]
