"""One pass over one problem: which kernels could serve it, whether they are right, and how fast they are here."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import backends
from ..backends import tuned
from ..backends.base import Candidate
from ..bench.timing import Timing, interleave, interleave_on_gpu
from ..memory_format import memory_format
from ..problem import ConvProblem, Epilogue, Layout, Pass, accumulate_dtype, tf32_is_allowed

SECONDS = 0.15  # for a pass over a problem
_VISIT = 0.003  # to each candidate in each round
_SAFETY = 8.0
_GAIN = 0.05  # by which one must be faster to take the place of who served before
_FAR_SLOWER = 10.0  # than the cost model expects, beside the fastest: something is wrong with that kernel


class Measured(NamedTuple):
    """What was found for a pass over a problem.

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


def candidates(pass_: Pass, problem: ConvProblem) -> list[Candidate]:
    """Whatever could serve: of each backend that may compute on the device by itself, and takes the problem, its most
    promising kernels. On the CPU, Triton is for checking only."""
    found = []
    for name in backends.row(problem.device):
        if problem.device == "cpu" and name == "triton" or backends.unavailable(name, problem.device) is not None:
            continue
        backend = backends.get(name, problem.device)
        if backend.reject(pass_, problem) is None:
            found += backend.candidates(pass_, problem)
    return found


def measure(
    pass_: Pass,
    problem: ConvProblem,
    *,
    seconds: float = SECONDS,
    among: Sequence[Candidate] | None = None,
    timer: Callable[[dict[str, Callable[[], object]]], dict[str, Timing]] | None = None,
) -> Measured:
    """Checks the candidates for a pass over a problem, times those that are right, in turns, and says who is fastest.

    A candidate's result is compared with ATen's in float64 before it is timed: it may be 8·√n·eps away, relative to
    the whole, where n is the length of its sums and eps of the type that they are taken in, plus eps of the type that
    it is stored in (docs/design.md, "What may differ"). An fprop is timed alone and with a batch norm and a ReLU: ATen
    and a kernel of convext's change places only where that is faster in both, because ATen runs what is fused as passes
    of its own.

    Args:
        pass_, problem: what is measured. Operands are drawn at random, the same for all.
        seconds: to spend, about; default 0.15.
        among: candidates; default: `candidates(pass_, problem)`.
        timer: function({name: call}) -> {name: Timing}; default: in turns, on the host's or the GPU's clock.

    Raises RuntimeError where no candidate is right.
    """
    among = candidates(pass_, problem) if among is None else list(among)
    timer = timer or _timer(problem, seconds)
    choice = backends.select(pass_, problem)
    before = f"{choice.backend.name} {choice.variant}"
    operands = operands_of(pass_, problem)
    with torch.no_grad():
        reference, bound = reference_of(pass_, problem, operands), bound_of(pass_, problem)
        right, wrong = [], {}
        for candidate in among:
            why = _why_wrong(candidate, pass_, problem, operands, reference, bound)
            if why is None:
                right.append(candidate)
            else:
                wrong[str(candidate)] = why
        if not right:
            raise RuntimeError(f"no kernel computes {pass_.name.lower()} of {problem} as ATen does: {wrong}")
        plain = timer({str(c): _call(c, pass_, problem, operands) for c in right})
        fused = (
            timer({str(c): _call(c, pass_, problem, operands, True) for c in right}) if pass_ is Pass.FPROP else plain
        )
    wrong.update(_far_slower(right, plain))
    right = [candidate for candidate in right if str(candidate) not in wrong]
    best, gain = _fastest(right, before, plain, fused)
    medians = {name: timing.median for name, timing in plain.items()}
    return Measured(pass_, problem, tuned.KeptChoice(best.backend, best.variant, medians), before, gain, plain, wrong)


def keep(measured: Sequence[Measured]) -> None:
    """Keeps what was found, in this process and, where that can be, on disk; says once what is put aside."""
    for device in {found.problem.device for found in measured}:
        stored = tuned.of(device)
        for found in measured:
            if found.problem.device != device:
                continue
            stored.choices[tuned.key(found.pass_, found.problem)] = found.choice
            for name, why in found.wrong.items():
                backend, variant = name.split(" ", 1)
                if backend != "aten" and variant not in stored.aside:
                    stored.aside[variant] = why
                    warnings.warn(
                        f"convext: {variant} is put aside on this machine: {why}. Please report it with the output of "
                        "`convext doctor`.",
                        stacklevel=3,
                    )
        stored.write()
    backends.native.forget_plans()
    backends.forget()


def _timer(problem: ConvProblem, seconds: float) -> Callable[[dict[str, Callable[[], object]]], dict[str, Timing]]:
    if problem.device == "cpu":
        # One thread's own time knows nothing of who else wants the processor.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        return lambda calls: interleave(calls, seconds=seconds, min_rounds=8, visit=_VISIT, clock=clock)
    return lambda calls: interleave_on_gpu(calls, torch.device(problem.device), seconds=seconds)


def operands_of(pass_: Pass, problem: ConvProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w of fprop, dy and w of dgrad, dy and x of wgrad, drawn at random from a fixed seed."""
    generator = torch.Generator(problem.device).manual_seed(0)

    def drawn(shape: tuple[int, ...], layout: Layout) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype.torch)
        return values.contiguous(memory_format=memory_format(layout == Layout.NHWC, len(shape)))

    x, dy = drawn(problem.x_shape, problem.x_layout), drawn(problem.y_shape, problem.y_layout)
    # As `model.to(memory_format=torch.channels_last)` leaves them; on the CPU no kernel cares.
    w = drawn(problem.w_shape, Layout.NCHW if problem.device == "cpu" else problem.x_layout)
    return {Pass.FPROP: (x, w), Pass.DGRAD: (dy, w), Pass.WGRAD: (dy, x)}[pass_]


def _call(
    candidate: Candidate,
    pass_: Pass,
    problem: ConvProblem,
    operands: tuple[torch.Tensor, torch.Tensor],
    fused: bool = False,
) -> Callable[[], torch.Tensor]:
    if pass_ is not Pass.FPROP:
        return lambda: candidate.run(problem, *operands)
    epilogue = Epilogue()
    if fused:
        ones = torch.ones(problem.k, dtype=accumulate_dtype(problem.dtype.torch), device=problem.device)
        epilogue = Epilogue(None, ones, ones, ones, ones, None, 1e-5, "relu")
    return lambda: candidate.run(problem, *operands, epilogue)


def reference_of(pass_: Pass, problem: ConvProblem, operands: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What ATen computes of the operands in float64."""
    a, b = (t.to(torch.float64) for t in operands)
    stride, padding, dilation, groups = problem.geom
    none = (0,) * problem.axes
    if pass_ is Pass.FPROP:
        return torch.convolution(a, b, None, stride, padding, dilation, False, none, groups)
    shapes = (problem.x_shape, b.shape) if pass_ is Pass.DGRAD else (b.shape, problem.w_shape)
    x = b if pass_ is Pass.WGRAD else a.new_empty(shapes[0])
    w = b if pass_ is Pass.DGRAD else a.new_empty(shapes[1])
    mask = [pass_ is Pass.DGRAD, pass_ is Pass.WGRAD, False]
    grads = torch.ops.aten.convolution_backward(a, x, w, None, stride, padding, dilation, False, none, groups, mask)
    found: torch.Tensor = grads[0 if pass_ is Pass.DGRAD else 1]
    return found


def bound_of(pass_: Pass, problem: ConvProblem) -> float:
    """How far a right result may be from that, relative to the whole."""
    stored = problem.dtype.torch
    length = problem.gemm_shape(pass_)[2]
    summed = torch.finfo(accumulate_dtype(stored)).eps
    if problem.device == "cuda" and stored is torch.float32 and tf32_is_allowed():
        stored = torch.float16  # operands are rounded to tf32, which has as many bits
    return _SAFETY * (summed * math.sqrt(length)) + torch.finfo(stored).eps


def _why_wrong(
    candidate: Candidate,
    pass_: Pass,
    problem: ConvProblem,
    operands: tuple[torch.Tensor, torch.Tensor],
    reference: torch.Tensor,
    bound: float,
) -> str | None:
    try:
        result = _call(candidate, pass_, problem, operands)()
    except Exception as error:  # whatever a kernel raises: it is not to be used
        return f"it raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if result.shape != reference.shape:
        return f"its result is {tuple(result.shape)}, expected {tuple(reference.shape)}"
    away = float((result.double() - reference).norm() / reference.norm().clamp_min(1e-300))
    return (
        None if away <= bound else f"its result is {away:.1e} away from ATen's in float64, expected at most {bound:.1e}"
    )


def _far_slower(right: list[Candidate], timings: dict[str, Timing]) -> dict[str, str]:
    """Kernels that take far longer than their cost says, beside the fastest of their backend, in every round."""
    slower = {}
    for backend in {candidate.backend for candidate in right}:
        own = [candidate for candidate in right if candidate.backend == backend and candidate.cost]
        if not own:
            continue
        fastest = min(own, key=lambda candidate: timings[str(candidate)].median)
        beside = timings[str(fastest)].seconds
        for candidate in own:
            took = min(a / b for a, b in zip(timings[str(candidate)].seconds, beside, strict=True))
            expected = (candidate.cost or 1.0) / (fastest.cost or 1.0)
            if took > _FAR_SLOWER * max(1.0, expected):
                slower[str(candidate)] = f"it took {took:.0f} times as long as {fastest.variant}, not {expected:.1f}"
    return slower


def _fastest(
    right: list[Candidate], before: str, plain: dict[str, Timing], fused: dict[str, Timing]
) -> tuple[Candidate, float]:
    """(the fastest, how many times as fast as who served before), the latter by the median over rounds.

    Who served before goes on, but where another is faster by `_GAIN` in three rounds of four: machines are shared, and
    a round that was disturbed tells nothing. ATen has to be so alone and with what is fused."""
    by_name = {str(candidate): candidate for candidate in right}
    if before not in by_name:
        return min(right, key=lambda candidate: plain[str(candidate)].median), 1.0
    best, gain = before, 1.0
    for name, candidate in by_name.items():
        timings = [plain, fused] if "aten" in (candidate.backend, by_name[before].backend) else [plain]
        ratios = [[b / a for a, b in zip(t[name].seconds, t[before].seconds, strict=True)] for t in timings]
        surely = min(statistics.quantiles(found, n=4, method="inclusive")[0] for found in ratios)
        median = min(statistics.median(found) for found in ratios)
        if surely > 1 + _GAIN and median > gain:
            best, gain = name, median
    return by_name[best], gain
