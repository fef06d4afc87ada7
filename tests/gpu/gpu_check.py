"""Everything to check on a GPU, building included, in six minutes and without a network: ./dev gpu-check

    build          the library in place, for this machine's GPU alone; the C++ tests of the CUDA kernels
    kernels        every CUDA variant against float64, from C++
    tests-native   the operator tests on CUDA tensors against float64, PyTorch's OpInfo among them
    tests-triton   the same under convext.backend("triton")
    memcheck       compute-sanitizer over the C++ tests: accesses out of bounds or misaligned
    racecheck      the same: races in shared memory
    host           what a call costs up to the launch, beside PyTorch's
    resnet50, mobilenet_v2    times of every layer beside ATen's, and what was predicted

It takes the Python it runs under as it is: a step that needs what is not installed is skipped, and said to be. Steps of
one stage run at once, each with a time limit, and what fails takes nothing else down with it. Results go to
benchmarks/results/, or to $OUT where that is set; the output of all steps to gpu_check.log there or in build/. Exits
with 0 where every step passed or was skipped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BUILD = ROOT / "build" / "gpu_check"
MINUTES = 6.0


@dataclasses.dataclass(frozen=True)
class Step:
    """Commands to run one after the other, or at once, and the seconds they may take together."""

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    at_once: bool = False
    needs: tuple[str, ...] = ()  # modules and programs without which it is skipped


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "passed", "failed", "timed out" or "skipped"
    seconds: float
    told: str  # the last line that sums up
    output: str

    @property
    def ok(self) -> bool:
        return self.status in ("passed", "skipped")


def python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def test_files() -> list[str]:
    """The files with tests for a GPU: the others may import what is not installed here."""
    marks = re.compile(r"^from places import|mark\.gpu\b", re.M)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files if marks.search(file.read_text())]


def pytest(processes: int, keyword: str) -> tuple[tuple[str, ...], ...]:
    """The tests with the mark `gpu` and that keyword, dealt out to so many processes: one command each. pytest-xdist
    would do the same, where it is installed."""
    command = [*python("-m", "pytest", "-q", "-m", "gpu", "-k", keyword, "-p", "no:cacheprovider",
                       "--continue-on-collection-errors", *test_files())]  # fmt: skip
    if not importlib.util.find_spec("pytest_timeout"):
        command += ["-o", "addopts=-ra"]  # which would refuse the setting `timeout` of pyproject.toml
    return tuple((*command, "--part", f"{index}/{processes}") for index in range(1, processes + 1))


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
    tests = functools.partial(Step, seconds=200.0, environment=environment, at_once=True)
    checks = [tests("tests-triton", commands=pytest(max(1, cores // 2), "gpu-triton"), needs=("triton",))]
    if cuda:
        checks.append(tests("tests-native", commands=pytest(max(1, cores // 3), "not gpu-triton")))
        checks.append(Step("kernels", 100.0, tuple((program,) for program in programs), environment))
        # fp16 shares its templates with bf16 instruction for instruction: one of them is enough for a slow check.
        slow = (programs[1],), (programs[0], "bf16", "f32", "f64")
        for tool in ("memcheck", "racecheck"):
            watched = (sanitizer() or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
            checks.append(
                Step(
                    tool,
                    200.0,
                    tuple((*watched, *command) for command in slow),
                    environment,
                    needs=("compute-sanitizer",),
                )
            )
    bench = ("-m", "convext", "bench", "layers", "--device", "cuda", "--dtype", "bfloat16", "--batch", "32",
             "--seconds", "0.1", "--json")  # fmt: skip
    tables = [Step(network, 90.0, (python(*bench, results / result_name(device_name, network), network),), environment,
                   needs=("torchvision", "typer", "rich")) for network in ("resnet50", "mobilenet_v2")]  # fmt: skip
    if cuda:
        host = python("-m", "convext", "bench", "host", "--device", "cuda", "--threads", "1", "--seconds", "0.5",
                      "--json", results / result_name(device_name, "host"))  # fmt: skip
        tables.insert(0, Step("host", 30.0, (host,), environment, needs=("typer", "rich")))
    return [[Step("build", 180.0, tuple(build), environment)], checks, *([table] for table in tables)]


def missing(step: Step) -> list[str]:
    """What the step needs and this machine lacks."""
    programs = {"compute-sanitizer": sanitizer}
    found = {name: programs[name]() if name in programs else importlib.util.find_spec(name) for name in step.needs}
    return [name for name, where in found.items() if where is None]


def result_name(device_name: str, what: str) -> str:
    """`nvidia_h200_resnet50.json`"""
    return re.sub(r"\W+", "_", device_name.lower()).strip("_") + f"_{what}.json"


def told(outputs: list[str]) -> str:
    """What sums a step's output up: the last line with words in it; of tests in parts, the counts of all of them."""
    counts = [re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last_line(output)) for output in outputs]
    if len(outputs) < 2 or not all(counts):
        return last_line(outputs[-1]) if outputs else ""
    sums = {}
    for number, what in (count for part in counts for count in part):
        sums[what.rstrip("s")] = sums.get(what.rstrip("s"), 0) + int(number)
    return ", ".join(f"{number} {what}" for what, number in sums.items()) + f" in {len(outputs)} processes"


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else ""


def run(step: Step, seconds: float) -> Outcome:
    """Runs the step's commands until one fails or the time is up; whatever they started is ended with them."""
    begin, outputs, statuses = time.monotonic(), [], []
    if lacking := missing(step):
        text = f"not installed here: {', '.join(lacking)}"
        return Outcome(step.name, "skipped", 0.0, text, f"{text}\n")
    for commands in [step.commands] if step.at_once else [(command,) for command in step.commands]:
        for status, output in run_at_once(commands, step.environment, seconds - (time.monotonic() - begin)):
            statuses.append(status)
            outputs.append(output)
        if set(statuses) != {"passed"}:
            break
    status = next((worst for worst in ("failed", "timed out") if worst in statuses), "passed")
    summing = outputs if step.at_once else outputs[-1:]
    return Outcome(step.name, status, time.monotonic() - begin, told(summing), "".join(outputs))


def run_at_once(commands: Iterable[tuple[str, ...]], environment: dict[str, str],
                seconds: float) -> list[tuple[str, str]]:  # fmt: skip
    """(status, output) of each command."""
    end, running, done = time.monotonic() + max(seconds, 0.1), [], []
    for command in commands:
        file = tempfile.TemporaryFile("w+", errors="replace")  # a pipe that nobody reads would stop who fills it
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{command[0]}: {error.strerror}\n")
            process = None
        running.append((process, file))
    for process, file in running:
        status = "failed"
        if process is not None:
            try:
                status = "failed" if process.wait(max(end - time.monotonic(), 0)) else "passed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = "timed out"
            if status == "failed":
                file.seek(0, os.SEEK_END)
                file.write(f"exit status {process.returncode}\n")
        file.seek(0)
        done.append((status, file.read()))
        file.close()
    return done


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
    parser.add_argument(
        "--skip", default="", help="names of steps to leave out, with commas: build, where all is compiled and there"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here, so nothing was checked", file=sys.stderr)
        return 1
    out = os.environ.get("OUT")
    results, log = (
        (Path(out), Path(out) / "gpu_check.log")
        if out
        else (ROOT / "benchmarks" / "results", ROOT / "build" / "gpu_check.log")
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    properties = torch.cuda.get_device_properties(0)
    capability = None if torch.version.hip else f"{properties.major}{properties.minor}"
    groups = stages(capability, results, properties.name, len(os.sched_getaffinity(0)))
    names = {step.name for group in groups for step in group}
    only, skip = (set(text.split(",")) - {""} for text in (options.only, options.skip))
    for option, given in (("--only", only), ("--skip", skip)):
        if given - names:
            parser.error(f"{option}: no step {', '.join(sorted(given - names))}")
    wanted = (only or names) - skip
    chosen = [[step for step in group if step.name in wanted] for group in groups]
    print(f"gpu-check: {properties.name}, torch {torch.__version__}; the output of all steps: {log}", flush=True)

    def report(outcome: Outcome) -> None:
        print(line(outcome), flush=True)
        with log.open("a") as file:
            file.write(f"==> {line(outcome)}\n{outcome.output}\n")

    outcomes = run_all([group for group in chosen if group], options.minutes * 60, report)
    if wanted >= names - {"build"}:
        write_results(results / result_name(properties.name, "check"), outcomes)
    for outcome in outcomes:
        if not outcome.ok:
            print(f"\n---- {outcome.name}: {outcome.status}\n" + "\n".join(outcome.output.splitlines()[-25:]))
    failed = [outcome.name for outcome in outcomes if not outcome.ok]
    skipped = [outcome.name for outcome in outcomes if outcome.status == "skipped"]
    print(
        f"gpu-check: {'FAILED ' + ', '.join(failed) if failed else 'passed'}"
        + (f"; skipped {', '.join(skipped)}" if skipped else "")
    )
    return 1 if failed else 0


def write_results(path: Path, outcomes: list[Outcome]) -> None:
    """What passed and what did not, with the machine and a hash of the kernels."""
    from convext.bench import machine, results

    fields = ("name", "status", "seconds", "told")
    results.write(
        path,
        machine.record(torch.device("cuda"), ROOT),
        [{field: getattr(outcome, field) for field in fields} for outcome in outcomes],
    )


if __name__ == "__main__":
    sys.exit(main())
