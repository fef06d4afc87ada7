"""The table of costs of this machine (backends/costs.py): what it is measured on, how it is fitted, how good it is.

Measured are problems drawn at random: shapes of every kind, layers that networks are made of, and groups of few
channels, in turns. Of each, every kernel that takes it and ATen are timed in turns, by the thread's own clock, on one
thread.

A row of the table, a kernel's or a way of ATen's, is what makes

    sum over its samples of  rho(log(sum over terms of count * seconds) - log(measured))

least, where rho is quadratic within 20 % and linear beyond: an error of a factor counts the same whatever the size, and
a sample that was disturbed, or where the kernel does something that no term says, pulls no other. Seconds are the
exponentials of what is solved for, by Levenberg and Marquardt's method, so that none is negative; a weak pull to where
every term takes an equal part of the time decides what the samples do not.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import backends
from ..backends import aten, compiled_calls, costs, native, tuned
from ..functional import conv2d
from ..memory_format import memory_format
from ..problem import ConvProblem, DType, Geom, Layout, Pass, accumulate_dtype
from ..tune.measure import operands_of
from . import shapes
from .problems import title
from .tables import Grid
from .timing import interleave

BESIDE = "conv2d beside F.conv2d"  # the group of those in a file of results
VISIT = 0.0015  # seconds to each candidate in each round
ROUNDS, LEAST_ROUNDS = 7, 3
MOST_SECONDS = 0.6  # for a problem, once there are enough rounds
HOPELESS = 4.0  # times the fastest's time, from which on a candidate is not timed again
BEYOND_HOPE = 30.0  # times the least expected time, from which on it is not even run
_LEAST_SAMPLES = 8  # of a row
_KNEE = 0.2  # of log time: where rho becomes linear
_PULL = 1e-3  # in units of one sample
_STEPS = 200
GOOD = 0.9  # the best's time over the choice's


class Sample(NamedTuple):
    """What was measured of a pass over a problem: name of a kernel, or "aten" -> seconds of a call."""

    pass_: Pass
    problem: ConvProblem
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        p = self.problem
        return {"pass": self.pass_.name.lower(), "problem": list(p.image_extents()), "dtype": p.dtype.name,
                "layout": p.x_layout.name, "seconds": self.seconds}  # fmt: skip


def sample_of(found: dict[str, Any]) -> Sample:
    """What `Sample.as_json` said. Raises ValueError for anything else."""
    try:
        layout = Layout[found["layout"]]
        problem = ConvProblem(*map(int, found["problem"]), DType[found["dtype"]], layout, layout, "cpu")
        seconds = {str(name): float(value) for name, value in found["seconds"].items()}
        if not seconds or not all(0 < value < math.inf for value in seconds.values()):
            raise ValueError(f"seconds are {seconds}")
        return Sample(Pass[found["pass"].upper()], problem, seconds)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no sample ({type(error).__name__}: {error})") from None


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, one a line. Raises ValueError with the line that is none."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(sample_of(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found


# ---- measuring


def problems(seed: int) -> Iterator[tuple[Pass, ConvProblem]]:
    """Without end, the same for each seed: shapes of every kind, layers of networks and groups of few channels, in
    turns. Two of ten are in float64 and bfloat16."""
    dtypes = [*[torch.float32] * 4, torch.float64, *[torch.float32] * 4, torch.bfloat16]
    draws = shapes.draw, shapes.draw_layers, shapes.draw_groups
    by_dtype = {dtype: [draw(None, seed, dtype) for draw in draws] for dtype in dtypes}
    for pair in itertools.cycle([by_dtype[dtype] for dtype in dtypes]):
        for kind in pair:
            yield next(kind)


def _calls(pass_: Pass, problem: ConvProblem) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call with as little around it as can be. Weights are new at every call of dgrad, as training has them,
    and packed before in fprop. Kernels of this instruction set and of the next: those below are for other CPUs."""
    operands = operands_of(pass_, problem)
    isas = costs.compared_isas()
    expected = {
        native.kernels()[index]["name"]: seconds
        for index, seconds in native.ranked(pass_, problem)
        if costs.isa_class(native.kernels()[index]["isa"]) in isas
    }
    wanted = {name for name, seconds in expected.items() if seconds <= BEYOND_HOPE * min(expected.values())}
    found = native.bare_calls(pass_, problem, *operands).items()
    return {"aten": _aten_call(pass_, problem, operands), **{name: call for name, call in found if name in wanted}}


def _aten_call(
    pass_: Pass, problem: ConvProblem, operands: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[], torch.Tensor]:
    a, b = operands
    if pass_ is Pass.FPROP:
        stride, padding, dilation, groups = problem.geom
        return lambda: torch.conv2d(a, b, None, stride, padding, dilation, groups)
    if aten.works_around(pass_, problem):
        run = getattr(aten.BACKEND, pass_.name.lower())
        return lambda: run(problem, a, b)
    dgrad = pass_ is Pass.DGRAD
    stride, padding, dilation, groups = ([*value] if isinstance(value, tuple) else value for value in problem.geom)
    # Of what it does not compute from, ATen reads nothing but size and layout.
    other = torch.empty(problem.x_shape if dgrad else problem.w_shape, dtype=a.dtype, device="cpu")
    other = other.contiguous(memory_format=memory_format(dgrad and problem.x_layout == Layout.NHWC))
    x, w = (other, b) if dgrad else (b, other)
    backward, mask, none = torch.ops.aten.convolution_backward.default._op, [dgrad, not dgrad, False], [0, 0]
    place = 0 if dgrad else 1

    def call() -> torch.Tensor:
        found: torch.Tensor = backward(a, x, w, None, stride, padding, dilation, False, none, groups, mask)[place]
        return found

    return call


def call_saving() -> float:
    """Seconds by which a forward pass that convext/_call serves (csrc/call/call.cpp) takes a kernel less than the bare
    calls that are measured, beside what it takes ATen less: of the smallest convolution. 0 where it does not serve."""
    if compiled_calls.library is None:
        return 0.0
    x, w = torch.ones(1, 1, 1, 1, device="cpu"), torch.ones(1, 1, 1, 1, device="cpu")
    problem = ConvProblem.of_fprop(x, w, Geom())
    saved = {}
    for name in ("native", "aten"):
        with backends.backend(name), torch.no_grad():
            bare = native.bare_calls(Pass.FPROP, problem, x, w)
            call = bare[native.BACKEND.variant(Pass.FPROP, problem)]
            call = call if name == "native" else _aten_call(Pass.FPROP, problem, (x, w))
            calls = {"bare": call, "served": lambda: conv2d(x, w)}
            timed = interleave(calls, seconds=0.3, min_rounds=20, visit=VISIT, clock=time.thread_time)
        saved[name] = timed["bare"].median - timed["served"].median
    return float(f"{max(0.0, saved['native'] - saved['aten']):.3g}")


def _bound(pass_: Pass, problem: ConvProblem) -> float:
    """How far two results may be apart, relative to the whole: each 8·√n·eps, where n is the length of its sums and eps
    of the type that they are taken in, and a rounding to the type that it is stored in (docs/design.md)."""
    stored = problem.dtype.torch
    summed = torch.finfo(accumulate_dtype(stored)).eps * math.sqrt(problem.gemm_shape(pass_)[2])
    return 2 * (8 * summed + torch.finfo(stored).eps)


def measure(pass_: Pass, problem: ConvProblem, clock: Callable[[], float] = time.thread_time) -> Sample:
    """Times ATen and every kernel that takes the problem, in turns. A kernel whose result is further from ATen's than
    rounding explains is left out."""
    calls, first, right = _calls(pass_, problem), {}, {}
    with torch.no_grad():
        reference, bound = calls["aten"]().double(), _bound(pass_, problem)
        norm = float(reference.norm()) or 1.0
        for name, call in calls.items():
            if float((call().double() - reference).norm()) > bound * norm:
                continue
            start = clock()
            call()
            first[name] = max(clock() - start, 1e-7)
            if first[name] <= HOPELESS * min(first.values()) + VISIT / 100:
                right[name] = call
        taken: dict[str, list[float]] = {name: [] for name in right}
        names, begin = list(right), clock()
        for round_ in range(ROUNDS):
            if round_ >= LEAST_ROUNDS and clock() - begin > MOST_SECONDS:
                break
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                call, repeats = right[name], max(1, round(VISIT / first[name]))
                if first[name] < VISIT:
                    call()  # brings the candidate's weights back into the caches
                start = clock()
                for _ in range(repeats):
                    call()
                taken[name].append((clock() - start) / repeats)
    return Sample(pass_, problem, {name: statistics.median(found) for name, found in taken.items()})


def collect(
    jobs: Iterable[tuple[Pass, ConvProblem]],
    seconds: float,
    path: Path | None = None,
    on_progress: Callable[[float, int], None] = lambda share, count: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Sample]:
    """Samples of the jobs until `seconds` have gone by or they end. With a path, samples are added to that file, and
    those that stand there already count as the first of the jobs: an interrupted run goes on where it stopped."""
    found = read_samples(path) if path is not None and path.exists() else []
    begin = clock()
    for pass_, problem in itertools.islice(jobs, len(found), None):
        spent = clock() - begin
        if spent >= seconds:
            break
        on_progress(spent / seconds, len(found))
        found.append(measure(pass_, problem))
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(found[-1].as_json()) + "\n")
    return found


# ---- fitting


def fit_row(counts: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
    """Seconds of one of each term, (terms,): counts is (samples, terms), seconds (samples,), both float64. Terms whose
    counts are all 0 take 0. See the top of the file."""
    used = (counts > 0).any(0)
    result = torch.zeros(counts.shape[1], dtype=torch.float64)
    scaled = counts[:, used]
    parts = used.sum()
    # Where every term takes an equal part of the samples' time, in geometric mean over those that have it.
    logs = torch.where(scaled > 0, (seconds[:, None] / scaled.clamp_min(1e-300)).log(), torch.nan)
    start = logs.nanmedian(0).values - parts.double().log()
    goal, u, damping = seconds.log(), start.clone(), 1e-2

    def loss(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shares = scaled * u.exp()
        total = shares.sum(1)
        away = total.log() - goal
        value = (2 * _KNEE**2 * ((1 + (away / _KNEE) ** 2).sqrt() - 1)).sum() + _PULL * ((u - start) ** 2).sum()
        return value, away, shares / total[:, None]

    value, away, slopes = loss(u)
    for _ in range(_STEPS):
        weight = 1 / (1 + (away / _KNEE) ** 2).sqrt()
        matrix = slopes.T @ (weight[:, None] * slopes) + _PULL * torch.eye(len(u), dtype=torch.float64)
        gradient = slopes.T @ (weight * away) + _PULL * (u - start)
        step = torch.linalg.solve(matrix + damping * torch.diag(matrix.diagonal()), -gradient)
        tried = loss(u + step.clamp(-3, 3))
        if tried[0] < value:
            gained = value - tried[0]
            u = u + step.clamp(-3, 3)
            value, away, slopes = tried
            damping = max(damping / 5, 1e-9)
            if gained < 1e-10 * value:
                break
        else:
            damping *= 5
            if damping > 1e12:
                break
    result[used] = u.exp()
    return result


def _rows(samples: Iterable[Sample]) -> tuple[dict[str, list], dict[str, list]]:
    """Of kernels by name and of ATen by row: (counts by term, seconds) of each sample."""
    terms = costs.native_terms()
    indices = {kernel["name"]: index for index, kernel in enumerate(native.kernels())}
    kernels, aten = defaultdict(list), defaultdict(list)
    for sample in samples:
        for name, seconds in sample.seconds.items():
            if name == "aten":
                row, work = costs.aten_work(sample.pass_, sample.problem)
                aten[row].append((work, seconds))
            elif name in indices:
                counts = native.work(indices[name], sample.problem)
                kernels[name].append((dict(zip(terms, counts, strict=True)), seconds))
    return kernels, aten


def fit(samples: Iterable[Sample], limits: dict[str, float]) -> costs.Table:
    """The table of what was measured here, with limits, which are not fitted. A row of too few samples is left to the
    tables that come after."""
    fitted = []
    for rows in _rows(samples):
        part = {}
        for name, found in rows.items():
            if len(found) < _LEAST_SAMPLES:
                continue
            terms = list(found[0][0])
            counts = torch.tensor([[work[term] for term in terms] for work, _ in found], dtype=torch.float64)
            seconds = torch.tensor([taken for _, taken in found], dtype=torch.float64)
            solved = fit_row(counts, seconds).tolist()
            part[name] = {term: float(f"{value:.4g}") for term, value in zip(terms, solved, strict=True) if value > 0}
        fitted.append(part)
    machine = {
        "cpu": tuned.cpu_name(),
        "isa": costs.isa_class(native.isa()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return costs.Table(machine, limits, *fitted)


def write(table: costs.Table, path: Path) -> None:
    """Writes a table as a whole, or leaves the file as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(table.as_json(), indent=1) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- checking


class Checked(NamedTuple):
    """A sample beside the choice that is made of it, "aten" or the name of a kernel."""

    sample: Sample
    choice: str

    @property
    def seconds(self) -> dict[str, float]:
        """What was measured, of forward passes as they are served: less what that saves a kernel (`call_saving`)."""
        found = self.sample.seconds
        if self.sample.pass_ is not Pass.FPROP:
            return found
        saving = costs.table().limits["call_saving"]
        return {name: s if name == "aten" else max(s - saving, s / 4) for name, s in found.items()}

    @property
    def regret(self) -> float:
        """The choice's time over the best's. One that took too long to be timed has `HOPELESS`, at least."""
        seconds = self.seconds
        return seconds[self.choice] / min(seconds.values()) if self.choice in seconds else HOPELESS

    @property
    def speed(self) -> float:
        """ATen's time over the choice's."""
        return self.seconds["aten"] / min(self.seconds.values()) / self.regret

    def as_json(self) -> dict[str, Any]:
        return self.sample.as_json() | {"choice": self.choice}


def check(samples: Iterable[Sample]) -> list[Checked]:
    """What the tables that count here make of each."""
    checked = []
    for sample in samples:
        choice = backends.select(sample.pass_, sample.problem)
        checked.append(Checked(sample, "aten" if choice.backend.name == "aten" else choice.variant))
    return checked


class Beside(NamedTuple):
    """F.conv2d's time over convext.conv2d's: the median over rounds, and their upper quartile."""

    problem: ConvProblem
    speed: float
    upper: float

    @property
    def slower(self) -> bool:
        """Beyond noise: by more than 5 %, and in three rounds of four."""
        return self.speed < 1 - shapes.NOISE and self.upper < 1

    def as_json(self) -> dict[str, Any]:
        return {"problem": list(self.problem.image_extents()), "layout": self.problem.x_layout.name,
                "speed": self.speed, "upper": self.upper}  # fmt: skip


def beside(problem: ConvProblem) -> Beside:
    """Times convext.conv2d beside F.conv2d, whole calls in turns, without gradients, by the thread's own clock."""
    x, w = operands_of(Pass.FPROP, problem)
    rest = None, *problem.geom
    calls = {"torch": lambda: torch.nn.functional.conv2d(x, w, *rest), "convext": lambda: conv2d(x, w, *rest)}
    with torch.no_grad():
        timed = interleave(calls, seconds=0.1, min_rounds=8, visit=VISIT, clock=time.thread_time)
    speeds = [a / b for a, b in zip(timed["torch"].seconds, timed["convext"].seconds, strict=True)]
    return Beside(problem, statistics.median(speeds), statistics.quantiles(speeds, n=4, method="inclusive")[2])


def said_of(found: Sequence[Beside]) -> str:
    """How convext.conv2d fares beside F.conv2d, in a line."""
    speeds, slower = [one.speed for one in found], [one for one in found if one.slower]
    least = min(found, key=lambda one: one.speed)
    where = f"{title(least.problem)}, batch {least.problem.n}, {least.problem.x_layout.name}"
    return (
        f"convext.conv2d beside F.conv2d, {len(found)} shapes at random: {statistics.geometric_mean(speeds):.2f} times "
        f"as fast in geometric mean, slower beyond noise in {len(slower)}, least {least.speed:.2f} ({where})"
    )


def summary(checked: Sequence[Checked]) -> dict[str, float]:
    """How good choices are: "within" is the share whose regret is at most 1 / 0.9."""
    regrets, speeds = sorted(one.regret for one in checked), [one.speed for one in checked]

    def quantile(share: float) -> float:
        return regrets[min(len(regrets) - 1, int(share * len(regrets)))]

    return {
        "problems": len(checked),
        "within": sum(regret <= 1 / GOOD for regret in regrets) / len(regrets),
        "median": quantile(0.5),
        "q90": quantile(0.9),
        "q99": quantile(0.99),
        "most": regrets[-1],
        "slower_than_aten": sum(speed < 1 - shapes.NOISE for speed in speeds),
        "least_speed": min(speeds),
        "times_as_fast_as_aten": statistics.geometric_mean(speeds),
    }


def table(groups: Mapping[str, Sequence[Checked]]) -> Grid:
    """A line for each group of problems that is not empty."""
    grid = Grid(
        ["", "problems", "within 10 %", "regret: median", "9 of 10", "99 of 100", "most", "× ATen", "slower than ATen"]
    )
    for name, checked in groups.items():
        if not checked:
            continue
        s = summary(checked)
        grid.rows.append(
            [name, f"{s['problems']}", f"{s['within']:.1%}"]
            + [f"{s[key]:.2f}" for key in ("median", "q90", "q99", "most", "times_as_fast_as_aten")]
            + [f"{s['slower_than_aten']}, least {s['least_speed']:.2f}"]
        )
    return grid
