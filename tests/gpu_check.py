"""Everything to check on a GPU, building included, in under eight minutes and without a network: ./dev gpu-check

    build          the library in place, for this machine's GPU alone; the C++ tests of the CUDA kernels
    kernels        every CUDA variant against float64, from C++
    tests-native   the operator tests on CUDA tensors against float64, PyTorch's OpInfo among them
    tests-triton   the same under convext.backend("triton")
    memcheck       compute-sanitizer over the C++ tests: accesses out of bounds or misaligned
    racecheck      the same: races in shared memory
    resnet50, mobilenet_v2    times of every layer beside ATen's

It takes the Python it runs under as it is. Steps of one stage run at once, each with a time limit, and what fails takes
nothing else down with it. Results go to benchmarks/results/, or to $OUT where that is set; the output of all steps to
gpu_check.log there or in build/. Exits with 0 where every step passed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BUILD = ROOT / "build" / "gpu_check"
MINUTES = 8.0


@dataclasses.dataclass(frozen=True)
class Step:
    """Commands to run one after the other, and the seconds they may take together."""

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "passed", "failed" or "timed out"
    seconds: float
    told: str  # the last line that sums up
    output: str

    @property
    def ok(self) -> bool:
        return self.status == "passed"


def python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def test_files() -> list[str]:
    """The files with tests for a GPU: the others may import what is not installed here."""
    marks = re.compile(r"^from places import|mark\.gpu\b", re.M)
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{file.name}" for file in files if marks.search(file.read_text())]


def pytest(processes: int, keyword: str) -> tuple[str, ...]:
    """The tests with the mark `gpu` and that keyword, in several processes where pytest-xdist is there."""
    command = [*python("-m", "pytest", "-q", "-m", "gpu", "-k", keyword, "-p", "no:cacheprovider", *test_files())]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    if not importlib.util.find_spec("pytest_timeout"):
        command += ["-o", "addopts=-ra"]  # which would refuse the setting `timeout` of pyproject.toml
    return tuple(command)


def sanitizer() -> str | None:
    """compute-sanitizer, from the PATH or the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    found = next((str(place) for place in places if place.exists()), None)
    return shutil.which("compute-sanitizer") or found


def stages(capability: str | None, results: Path, device_name: str, cores: int) -> list[list[Step]]:
    """Everything to do on a GPU of that compute capability ("90"; None for one that is not NVIDIA's)."""
    cuda = capability is not None
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "CONVEXT_BUILD_CUDA": str(int(cuda))}
    environment |= {"CONVEXT_CUDA_ARCHS": capability} if cuda else {}
    programs = [str(BUILD / "cuda" / "bin" / name) for name in ("cuda_variants", "cuda_batch_norm")]
    build = [python("setup.py", "build_ext", "--inplace", "--build-temp", BUILD)]
    if cuda:
        build.append(python("csrc/tests/run.py", "--gpu", "--only-build", "--folder", BUILD / "cuda"))
    checks = [("tests-triton", 200.0, (pytest(max(1, cores // 2), "gpu-triton"),))]
    if cuda:
        watched = (sanitizer() or "compute-sanitizer", "--error-exitcode", "9", "--tool")
        # fp16 shares its templates with bf16 instruction for instruction: one of them is enough for a slow check.
        families = ("bf16", "f32", "f64")
        checks += [
            ("tests-native", 200.0, (pytest(max(1, cores // 3), "not gpu-triton"),)),
            ("kernels", 100.0, tuple((program,) for program in programs)),
            ("memcheck", 200.0, tuple((*watched, "memcheck", program) for program in reversed(programs))),
            ("racecheck", 200.0, ((*watched, "racecheck", programs[1]),
                                  (*watched, "racecheck", programs[0], *families))),
        ]  # fmt: skip
    bench = ("-m", "convext", "bench", "layers", "--device", "cuda", "--dtype", "bfloat16", "--batch", "32",
             "--seconds", "0.1", "--json")  # fmt: skip
    tables = [(network, 75.0, (python(*bench, results / result_name(device_name, network), network),))
              for network in ("resnet50", "mobilenet_v2")]
    groups = [[("build", 180.0, tuple(build))], checks, *([table] for table in tables)]
    return [[Step(*step, environment) for step in group] for group in groups]


def result_name(device_name: str, what: str) -> str:
    """`nvidia_h200_resnet50.json`"""
    return re.sub(r"\W+", "_", device_name.lower()).strip("_") + f"_{what}.json"


def told(output: str) -> str:
    """The line of a step's output that sums it up: the last one with words in it."""
    lines = [line.strip() for line in output.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else ""


def run(step: Step, seconds: float) -> Outcome:
    """Runs the step's commands until one fails or the time is up; whatever they started is ended with them."""
    begin, output = time.monotonic(), []
    status = "passed"
    for command in step.commands:
        left = seconds - (time.monotonic() - begin)
        try:
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **step.environment}, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            output.append(f"{command[0]}: {error.strerror}\n")
            status = "failed"
            break
        try:
            output.append(process.communicate(timeout=max(left, 0.1))[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output.append(process.communicate()[0])
            status = "timed out"
            break
        if process.returncode:
            output.append(f"exit status {process.returncode}\n")
            status = "failed"
            break
    text = "".join(output)
    return Outcome(step.name, status, time.monotonic() - begin, told(text), text)


def run_all(groups: Iterable[list[Step]], seconds: float, report: Callable[[Outcome], object]) -> list[Outcome]:
    """Runs the groups one after the other, the steps of each at once, within so many seconds in all."""
    outcomes, end = [], time.monotonic() + seconds
    for group in groups:
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            left = max(0.0, end - time.monotonic())
            running = [pool.submit(run, step, min(step.seconds, left)) for step in group]
            for done in concurrent.futures.as_completed(running):
                outcomes.append(done.result())
                report(outcomes[-1])
    return outcomes


def line(outcome: Outcome) -> str:
    return f"{outcome.name:<14}{outcome.status:<10}{outcome.seconds:6.1f} s  {outcome.told}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default %(default)s)")
    parser.add_argument("--only", default="", help="names of steps, with commas; default: all")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here, so nothing was checked", file=sys.stderr)
        return 1
    out = os.environ.get("OUT")
    results, log = (Path(out), Path(out) / "gpu_check.log") if out else (
        ROOT / "benchmarks" / "results", ROOT / "build" / "gpu_check.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    properties = torch.cuda.get_device_properties(0)
    capability = None if torch.version.hip else f"{properties.major}{properties.minor}"
    groups = stages(capability, results, properties.name, len(os.sched_getaffinity(0)))
    wanted = set(options.only.split(",")) - {""}
    unknown = wanted - {step.name for group in groups for step in group}
    if unknown:
        parser.error(f"--only: no step {', '.join(sorted(unknown))}")
    chosen = [[step for step in group if not wanted or step.name in wanted] for group in groups]
    print(f"gpu-check: {properties.name}, torch {torch.__version__}; the output of all steps: {log}", flush=True)

    def report(outcome: Outcome) -> None:
        print(line(outcome), flush=True)
        with log.open("a") as file:
            file.write(f"==> {line(outcome)}\n{outcome.output}\n")

    outcomes = run_all([group for group in chosen if group], options.minutes * 60, report)
    if not wanted:
        write_results(results / result_name(properties.name, "check"), outcomes)
    for outcome in outcomes:
        if not outcome.ok:
            print(f"\n---- {outcome.name}: {outcome.status}\n" + "\n".join(outcome.output.splitlines()[-25:]))
    failed = [outcome.name for outcome in outcomes if not outcome.ok]
    print(f"gpu-check: {'FAILED ' + ', '.join(failed) if failed else 'passed'}")
    return 1 if failed else 0


def write_results(path: Path, outcomes: list[Outcome]) -> None:
    """What passed and what did not, with the machine and a hash of the kernels."""
    from convext.bench import machine, results

    fields = ("name", "status", "seconds", "told")
    results.write(path, machine.record(torch.device("cuda"), ROOT),
                  [{field: getattr(outcome, field) for field in fields} for outcome in outcomes])


if __name__ == "__main__":
    sys.exit(main())
