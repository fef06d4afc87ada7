"""One pass over one problem, with what follows it: which kernels could serve it, whether they are right, and how fast
they are here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import backends
from ..activation import FORWARD
from ..backends import aten, compiled_calls, costs, tuned
from ..backends.base import Candidate
from ..bench.timing import Timing, interleave, interleave_on_gpu
from ..memory_format import memory_format
from ..problem import STATISTICS, ConvProblem, DType, Epilogue, Layout, Pass, accumulate_dtype, tf32_is_allowed

SECONDS = 0.15  # for a pass over a problem
_VISIT = 0.003  # to each candidate in each round
_SAFETY = 8.0
_GAIN = 0.05  # by which one must be faster to take the place of who served before
_FAR_SLOWER = 10.0  # than the cost model expects, beside the fastest: something is wrong with that kernel
# An activation's slope is at most 1.5 (hardswish); an epilogue rounds to the stored type at most four times: the
# convolution's result or its folded weights, batch norm, sum, activation.
_SLOPE, _ROUNDINGS = 1.5, 4
_TF32 = 2.0**-9  # by which both operands, cut to tf32's 10 bits, may move a product


class Measured(NamedTuple):
    """What was found for a pass over a problem.

    kind     what follows an fprop (`Epilogue.kind`); "" where nothing does, and for the other passes
    choice   the fastest, as it is kept; before: who served without it, "backend variant"
    gain     how many times as fast the choice is; 1 where it is who served before
    timings  of the candidates that were right, by "backend variant"
    wrong    the others -> why, in words
    """

    pass_: Pass
    problem: ConvProblem
    choice: tuned.KeptChoice
    before: str
    gain: float
    timings: dict[str, Timing]
    wrong: dict[str, str]
    kind: str = ""


class OutOfMemory(RuntimeError):
    """There was not the memory for a measurement, which says nothing of a kernel."""


Timer = Callable[[dict[str, Callable[[], object]]], dict[str, Timing]]


def candidates(pass_: Pass, problem: ConvProblem, kind: str = "") -> list[Candidate]:
    """Whatever could serve: of each backend that may compute on the device by itself, and takes the problem, its most
    promising kernels. On the CPU, Triton is for checking only."""
    found = []
    for name in backends.row(problem.device):
        if problem.device == "cpu" and name == "triton" or backends.unavailable(name, problem.device) is not None:
            continue
        backend = backends.get(name, problem.device)
        if backend.reject(pass_, problem) is None:
            found += backend.candidates(pass_, problem, kind)
    return found


def measure(
    pass_: Pass,
    problem: ConvProblem,
    kind: str = "",
    *,
    seconds: float = SECONDS,
    among: Sequence[Candidate] | None = None,
    timer: Timer | None = None,
    device: torch.device | None = None,
    reference_dtype: torch.dtype = torch.float64,
) -> Measured:
    """Checks the candidates for a pass over a problem, times those that are right, in turns, and says who is fastest.

    A candidate's result is compared with ATen's in float64 before it is timed: it may be 8·√n·eps away, relative to
    the whole, where n is the length of its sums and eps of the type that they are taken in, plus eps of the type that
    it is stored in (docs/design.md, "What may differ"). What an fprop by itself takes on the CPU is told as of a call
    that was made before (`_as_called_again`).

    Args:
        pass_, problem: what is measured. Operands are drawn at random, the same for all.
        kind: what follows an fprop, as `Epilogue.kind` says it, or `STATISTICS`; default: nothing.
        seconds: to spend, about; default 0.15.
        among: candidates; default: `candidates(pass_, problem, kind)`.
        timer: function({name: call}) -> {name: Timing}; default: in turns, on the host's or the GPU's clock.
        device: where the operands are; default: the present device of the problem's type.
        reference_dtype: of what they are compared with; in another than float64 its own error counts, too.

    Raises RuntimeError where no candidate is right, OutOfMemory where the memory does not suffice.
    """
    among = candidates(pass_, problem, kind) if among is None else list(among)
    timer = timer or _timer(problem, seconds)
    choice = backends.would_serve(pass_, problem, kind)
    before = f"{choice.backend.name} {choice.variant}"
    case = _Case(pass_, problem, kind, device or torch.device(problem.device))
    with torch.no_grad():
        expected = _expected(case, reference_dtype)
        right, wrong = [], {}
        for candidate in among:
            why = _why_wrong(candidate, case, expected)
            if why is None:
                right.append(candidate)
            else:
                wrong[str(candidate)] = why
        if not right:
            raise RuntimeError(f"no kernel computes {pass_.name.lower()} of {problem} as ATen does: {wrong}")
        timings = timer({str(c): case.call(c) for c in right})
    wrong.update(_far_slower(right, timings, before))
    right = [candidate for candidate in right if str(candidate) not in wrong]
    if pass_ is Pass.FPROP and not kind and problem.device == "cpu":
        timings = _as_called_again(right, timings)
    best, gain = _fastest(right, before, timings)
    medians = {name: timing.median for name, timing in timings.items()}
    kept = tuned.KeptChoice(best.backend, best.variant, medians)
    return Measured(pass_, problem, kept, before, gain, timings, wrong, kind)


def keep(measured: Sequence[Measured]) -> None:
    """Keeps what was found, in this process and, where that can be, on disk; says once what is put aside. It counts
    from now on, also where another was used before."""
    for device in {found.problem.device for found in measured}:
        for found in measured:
            if found.problem.device == device:
                note(found)
        tuned.of(device).write()
    backends.native.forget_plans()
    backends.forget()


def note(found: Measured) -> bool:
    """Keeps it in this process's memory, and says what is put aside; True where something was."""
    stored, problem = tuned.of(found.problem.device), found.problem
    stored.choices[tuned.key(found.pass_, problem, found.kind)] = found.choice
    fresh = False
    for name, why in found.wrong.items():
        _, variant = name.split(" ", 1)
        if variant == f"aten_{found.pass_.name.lower()}" or variant in stored.aside:  # PyTorch's own is the reference
            continue
        stored.aside[variant] = why
        fresh = True
        tuned.say(
            f"{variant} is put aside on this machine: {why}. Please report it with the output of `convext doctor`."
        )
    return fresh


def _timer(problem: ConvProblem, seconds: float) -> Timer:
    if problem.device == "cpu":
        return lambda calls: interleave(calls, seconds=seconds, min_rounds=8, visit=_VISIT, clock=cpu_clock())
    return lambda calls: interleave_on_gpu(calls, torch.device(problem.device), seconds=seconds)


def cpu_clock() -> Callable[[], float]:
    """One thread's own time knows nothing of who else wants the processor."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def operands_of(
    pass_: Pass, problem: ConvProblem, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w of fprop, dy and w of dgrad, dy and x of wgrad, drawn at random from a fixed seed."""
    device = device or torch.device(problem.device)
    generator = torch.Generator(device).manual_seed(0)
    x, dy = problem.x_layout, problem.y_layout
    # As `model.to(memory_format=torch.channels_last)` leaves them; on the CPU no kernel cares.
    w = Layout.NCHW if problem.device == "cpu" else x
    wanted = {
        Pass.FPROP: ((problem.x_shape, x), (problem.w_shape, w)),
        Pass.DGRAD: ((problem.y_shape, dy), (problem.w_shape, w)),
        Pass.WGRAD: ((problem.y_shape, dy), (problem.x_shape, x)),
    }[pass_]
    a, b = (_drawn(problem, generator, shape).contiguous(memory_format=_form(shape, at)) for shape, at in wanted)
    return a, b


def _drawn(problem: ConvProblem, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = accumulate_dtype(problem.dtype.torch)
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return values.to(problem.dtype.torch)


def _form(shape: tuple[int, ...], layout: Layout) -> torch.memory_format:
    return memory_format(layout == Layout.NHWC, len(shape))


class _Case:
    """A pass over a problem with what follows it, and operands."""

    def __init__(self, pass_: Pass, problem: ConvProblem, kind: str, device: torch.device):
        self.pass_, self.problem, self.kind, self.device = pass_, problem, kind, device
        self.operands = operands_of(pass_, problem, device)
        self.epilogue = self._epilogue()

    def _epilogue(self) -> Epilogue:
        problem, words = self.problem, [] if self.kind == STATISTICS else self.kind.split()
        if not words:
            return Epilogue()
        generator = torch.Generator(self.device).manual_seed(1)
        acc = accumulate_dtype(problem.dtype.torch)
        mean, beta = torch.randn((2, problem.k), generator=generator, device=self.device, dtype=acc)
        var, gamma = torch.rand((2, problem.k), generator=generator, device=self.device, dtype=acc) + 0.5
        residual = None
        if "add" in words:
            residual = _drawn(problem, generator, problem.y_shape)
            residual = residual.contiguous(memory_format=_form(problem.y_shape, problem.y_layout))
        activation = words[-1] if words[-1] in FORWARD else "identity"
        if "bn" not in words:
            return Epilogue(residual=residual, activation=activation)
        return Epilogue(None, mean, var, gamma, beta, residual, activation=activation)

    def call(self, candidate: Candidate) -> Callable[[], torch.Tensor]:
        """What is timed, and gives y or the gradient."""
        if self.pass_ is not Pass.FPROP:
            return lambda: candidate.run(self.problem, *self.operands)
        if self.kind == STATISTICS:
            return lambda: self.with_statistics(candidate)[0]
        return lambda: candidate.run(self.problem, *self.operands, self.epilogue)

    def with_statistics(self, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ops.py has it in training."""
        if candidate.with_statistics is not None:
            return candidate.with_statistics(self.problem, *self.operands, None)
        y = candidate.run(self.problem, *self.operands, Epilogue())
        return y, *backends.select_batch_norm(y).batch_stats(y)


class _Expected(NamedTuple):
    """What a candidate is held against: `away` of a result is at most `bound`.

    value      the result in another type; size: of what was summed in each of its elements
    statistics mean, and mean of the squares, of each channel
    """

    value: torch.Tensor
    size: torch.Tensor
    statistics: tuple[torch.Tensor, torch.Tensor] | None
    bound: float

    def away(self, result: torch.Tensor) -> float:
        return float((result.to(self.value.dtype) - self.value).norm() / self.size.norm().clamp_min(1e-300))


def _expected(case: _Case, dtype: torch.dtype) -> _Expected:
    problem = case.problem
    if problem.dtype is DType.FLOAT64:
        dtype = torch.float64
    value = reference_of(case.pass_, problem, case.operands, dtype)
    size, statistics = value, None
    if case.kind == STATISTICS:
        axes = (0, *range(2, value.dim()))
        statistics = value.mean(axes), value.square().mean(axes)
    elif case.kind:
        value, size = _followed(value, case.epilogue)
    return _Expected(value, size, statistics, bound_of(case.pass_, problem, case.kind, dtype))


def _followed(y: torch.Tensor, epilogue: Epilogue) -> tuple[torch.Tensor, torch.Tensor]:
    """The epilogue of y, and the size of what it sums up."""
    mean, var, gamma, beta = (
        None if t is None else t.to(y.dtype).view(-1, *(1,) * (y.dim() - 2)) for t in epilogue.norm
    )
    z, size = y, y.abs()
    if mean is not None and var is not None and gamma is not None and beta is not None:
        scale = gamma * (var + epilogue.eps).rsqrt()
        z, size = (y - mean) * scale + beta, (size + mean.abs()) * scale + beta.abs()
    if epilogue.residual is not None:
        z, size = z + epilogue.residual.to(y.dtype), size + epilogue.residual.to(y.dtype).abs()
    return FORWARD[epilogue.activation](z), size


def reference_of(
    pass_: Pass,
    problem: ConvProblem,
    operands: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What ATen computes of the operands in a type: by the backend, which knows what ATen gets wrong."""
    a, b = (t.to(dtype) for t in operands)
    if pass_ is Pass.FPROP:
        return aten.BACKEND.fprop(problem, a, b, Epilogue())
    return (aten.BACKEND.dgrad if pass_ is Pass.DGRAD else aten.BACKEND.wgrad)(problem, a, b)


def bound_of(pass_: Pass, problem: ConvProblem, kind: str = "", reference: torch.dtype = torch.float64) -> float:
    """How far a right result may be from a reference of that type, relative to the whole (docs/design.md, "What may
    differ")."""
    stored = problem.dtype.torch
    length = problem.gemm_shape(pass_)[2]
    fused = kind not in ("", STATISTICS)
    summing = _SAFETY * math.sqrt(length + (_ROUNDINGS if fused else 0))
    summed = accumulate_dtype(stored)
    bound = summing * torch.finfo(summed).eps + torch.finfo(stored).eps * (_ROUNDINGS if fused else 1)
    if reference is not torch.float64:
        bound += summing * torch.finfo(reference).eps
    if problem.device == "cuda" and tf32_is_allowed():
        bound += _TF32 * (problem.dtype is DType.FLOAT32) + _TF32 * (reference is torch.float32)
    return bound * (_SLOPE if fused else 1.0)


def _why_wrong(candidate: Candidate, case: _Case, expected: _Expected) -> str | None:
    try:
        if case.kind == STATISTICS:
            result, *statistics = case.with_statistics(candidate)
        else:
            result, statistics = case.call(candidate)(), []
        if result.shape != expected.value.shape:
            return f"its result is {tuple(result.shape)}, expected {tuple(expected.value.shape)}"
        away = expected.away(result)  # on a GPU, here at the latest it raises
        if not away <= expected.bound:
            return f"its result is {away:.1e} away from ATen's in {_name(expected)}, expected at most " + (
                f"{expected.bound:.1e}"
            )
        if case.kind == STATISTICS:
            return _why_wrong_statistics(statistics, expected, case.problem)
        return _swallows_nan(candidate, case) if case.kind else None
    except Exception as error:  # whatever a kernel raises: it is not to be used
        if is_out_of_memory(error):
            raise OutOfMemory(str(error)) from None
        return f"it raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _name(expected: _Expected) -> str:
    return str(expected.value.dtype).removeprefix("torch.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it tells of memory that was not there, on a GPU or on the host: which is no fault of who raises it."""
    said = str(error).lower()
    told = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in told)


def _why_wrong_statistics(found: Sequence[torch.Tensor], expected: _Expected, problem: ConvProblem) -> str | None:
    """Mean and variance are sums over npq values of the size of their root mean square, each as far away as y is."""
    assert expected.statistics is not None
    mean, squares = expected.statistics
    acc = torch.finfo(accumulate_dtype(problem.dtype.torch)).eps
    bound = 2 * (expected.bound + _SAFETY * math.sqrt(problem.npq) * acc)
    off = (
        (found[0].to(mean.dtype) - mean).norm() / squares.sqrt().norm().clamp_min(1e-300),
        (found[1].to(mean.dtype) - (squares - mean.square())).norm() / squares.norm().clamp_min(1e-300),
    )
    for name, distance in zip(("mean", "variance"), map(float, off), strict=True):
        if not distance <= bound:
            return f"its {name} is {distance:.1e} away from ATen's in {_name(expected)}, expected at most {bound:.1e}"
    return None


def _swallows_nan(candidate: Candidate, case: _Case) -> str | None:
    """An activation that makes a number of NaN hides from a user that his network has diverged."""
    x, w = case.operands
    poisoned = x.clone()
    poisoned[0] = float("nan")
    result = candidate.run(case.problem, poisoned, w, case.epilogue)
    return None if bool(torch.isnan(result[0]).any()) else "it makes numbers of NaN"


def _far_slower(right: list[Candidate], timings: dict[str, Timing], before: str) -> dict[str, str]:
    """Kernels that take far longer than is expected, in every round: than their cost says, beside the fastest of their
    backend; and who would serve, and so is expected to be the fastest, beside ATen."""
    slower = {}
    for backend in {candidate.backend for candidate in right}:
        own = [candidate for candidate in right if candidate.backend == backend and candidate.cost]
        if not own:
            continue
        fastest = min(own, key=lambda candidate: timings[str(candidate)].median)
        for candidate in own:
            took = min(_ratios(timings[str(candidate)], timings[str(fastest)]))
            expected = (candidate.cost or 1.0) / (fastest.cost or 1.0)
            if took > _FAR_SLOWER * max(1.0, expected):
                slower[str(candidate)] = f"it took {took:.0f} times as long as {fastest.variant}, not {expected:.1f}"
    atens = [str(candidate) for candidate in right if candidate.backend == "aten"]
    if before in timings and before not in slower and atens and not before.startswith("aten "):
        fastest_aten = min(atens, key=lambda name: timings[name].median)
        took = min(_ratios(timings[before], timings[fastest_aten]))
        if took > _FAR_SLOWER:
            slower[before] = f"it took {took:.0f} times as long as ATen, and was expected to be faster"
    return slower


def _ratios(a: Timing, b: Timing) -> list[float]:
    """a's seconds over b's in the rounds that both ran in."""
    return [x / y for x, y in zip(a.seconds, b.seconds)]


def _as_called_again(right: list[Candidate], timings: dict[str, Timing]) -> dict[str, Timing]:
    """What calls take that convext/_call serves, as it does a convolution that was called before: of a kernel of
    convext's less, beside ATen, by what was measured (`costs.LIMITS`); at most half."""
    if compiled_calls.library is None:
        return timings
    saving = costs.table().limits["call_saving"]
    own = {str(candidate) for candidate in right if candidate.backend == "native"}
    return {
        name: Timing(tuple(max(s - saving, s / 2) for s in timing.seconds)) if name in own else timing
        for name, timing in timings.items()
    }


def _fastest(right: list[Candidate], before: str, timings: dict[str, Timing]) -> tuple[Candidate, float]:
    """(the fastest, how many times as fast as who served before), the latter by the median over rounds.

    Who served before goes on, but where another is faster by `_GAIN` in three rounds of four: machines are shared, and
    a round that was disturbed tells nothing."""
    by_name = {str(candidate): candidate for candidate in right}
    if before not in by_name:
        return min(right, key=lambda candidate: timings[str(candidate)].median), 1.0
    best, gain = before, 1.0
    for name in by_name:
        ratios = _ratios(timings[before], timings[name])
        median = statistics.median(ratios)
        if _lower_quartile(ratios) > 1 + _GAIN and median > gain:
            best, gain = name, median
    return by_name[best], gain


def _lower_quartile(ratios: list[float]) -> float:
    return statistics.quantiles(ratios, n=4, method="inclusive")[0] if len(ratios) > 1 else ratios[0]
