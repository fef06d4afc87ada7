"""A problem that the selection has not seen before is measured where it is first seen (`convext.tuning("measure")`), in
the middle of a user's call, which must not notice but by the time that it takes.

About 20 ms a problem: a check of each candidate against ATen and `_SECONDS` of timing. Where single calls are long it
is what two to five calls of each candidate take. Memory: a quarter of what is free, by an estimate that counts
operands, results, copies and the reference, and a sixteenth that is written to empty the caches; a larger problem is
left to the cost model.

Not measured, and left to the model for as long as the process lives: what is first seen under
`torch.use_deterministic_algorithms` (the choice would depend on a clock), in a CUDA graph capture (events and
synchronisation end one), while anything traces or transforms (its tensors are none), and what comes after the first
`_MOST` problems of a process (a service with ever new shapes would measure for ever). Triton's kernels, which are
compiled first, for seconds, are measured here only where Triton would serve; `convext.tune` measures them always, and
problems that were measured without them again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch

from .. import backends, ops
from ..backends import tuned
from ..backends.base import Candidate
from ..bench.memory import free_memory
from ..bench.timing import FLUSH_BYTES, Timing, gpu_clock
from ..problem import ConvProblem, Pass, accumulate_dtype
from .measure import Measured, Timer, candidates, cpu_clock, measure, note

_SECONDS = 0.012
_SHARE = 4  # of the free memory, one part of as many
_MOST = 1024
_ROUNDS = 20
# Than the fastest in the first round: timed no more; timed thrice, to put it aside or not.
_SLOW, _FAR_SLOWER = 2.0, 8.0
_VISIT = 2e-4  # on the CPU, whose clock is too coarse for the shortest calls

_lock = threading.RLock()
_count = 0
_failed: set[str] = set()  # types of device of which it was said that a measurement failed


def first_sight(pass_: Pass, problem: ConvProblem, kind: str, device: torch.device) -> None:
    """Measures and keeps, or does nothing. Never raises but what a user's signal does."""
    global _count
    if not may_measure(device):
        return
    with _lock:  # who meets a problem that is being measured waits for the result
        if _count >= _MOST or tuned.is_settled(pass_, problem, kind):
            return
        try:
            among = _among(pass_, problem, kind)
            if len(among) < 2 or needed_memory(problem) * _SHARE > free_memory(device):
                return
            _count += 1
            with _apart(device):
                found = _measured(pass_, problem, kind, device, among)
            _keep(found)
        except Exception as error:  # whatever it is: the model chooses
            if device.type not in _failed:
                _failed.add(device.type)
                tuned.say(
                    f"measuring {pass_.name.lower()} of {problem} failed ({type(error).__name__}: {error}); the cost "
                    'model chooses in its place. convext.tuning("cached") measures nothing.'
                )


def may_measure(device: torch.device) -> bool:
    """Whether nothing is going on that a measurement would end, or that would make the choice depend on a clock."""
    if torch.are_deterministic_algorithms_enabled() or not ops.idle_but_for_autocast():
        return False
    if not tuned.is_here(device.type):  # its kernels can be asked about without
        return False
    if device.type == "cpu":
        return True
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is None or not capturing()


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """What a measurement runs in: no autocast, none of the user's modes, the tensors' device. Random numbers come from
    generators of its own, and it runs on the user's stream, as the call itself will."""
    on_device = contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with (
        torch._C.DisableTorchFunction(),
        torch.autocast(device.type, enabled=False),
        on_device,
    ):
        yield


def _measured(pass_: Pass, problem: ConvProblem, kind: str, device: torch.device, among: list[Candidate]) -> Measured:
    reference = accumulate_dtype(problem.dtype.torch)
    timed = timer(device, free_memory(device))
    return measure(pass_, problem, kind, among=among, timer=timed, device=device, reference_dtype=reference)


def _among(pass_: Pass, problem: ConvProblem, kind: str) -> list[Candidate]:
    found = candidates(pass_, problem, kind)
    if backends.would_serve(pass_, problem, kind).backend.name == "triton":
        return found
    return [candidate for candidate in found if candidate.backend != "triton"]


def _keep(found: Measured) -> None:
    put_aside = note(found)
    backends.native.forget_measured()
    if put_aside:  # others may run by that kernel
        backends.native.forget_plans()
        backends.forget()
    tuned.of(found.problem.device).write_later()


def needed_memory(problem: ConvProblem) -> int:
    """Bytes: operands, residual and result, as much again for copies in another layout; the same in the reference's
    type, and three of its results' size to compare."""
    p, size = problem, problem.dtype.torch.itemsize
    reference = accumulate_dtype(p.dtype.torch).itemsize
    elements = p.x_size + p.w_size + p.y_size
    return 2 * size * (elements + p.y_size) + reference * (elements + 3 * max(p.x_size, p.y_size, p.w_size))


def timer(device: torch.device, free: int) -> Timer:
    """The timer of `measure` for calls that each ran before."""
    if device.type == "cpu":
        return lambda calls: race(calls, _host_seconds(cpu_clock()))
    flush = min(FLUSH_BYTES, free // (4 * _SHARE))
    return lambda calls: race(calls, gpu_clock(device, flush))


def _host_seconds(clock: Callable[[], float]) -> Callable[[Callable[[], object]], float]:
    def seconds(call: Callable[[], object]) -> float:
        repeats, start = 0, clock()
        while True:
            call()
            repeats += 1
            taken = clock() - start
            if taken >= _VISIT:
                return taken / repeats

    return seconds


def race(
    calls: dict[str, Callable[[], object]],
    seconds_of: Callable[[Callable[[], object]], float],
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Times calls in turns for about `seconds`; default `_SECONDS`. Who was `_SLOW` in the first round runs no more, or
    where it is to be put aside for that, three times in all: one disturbed call must not do it."""
    begin, seconds = time.perf_counter(), _SECONDS if seconds is None else seconds
    taken = {name: [seconds_of(call)] for name, call in calls.items()}
    first = min(times[0] for times in taken.values())
    for name, times in taken.items():
        if times[0] > _FAR_SLOWER * first:
            times += [seconds_of(calls[name]) for _ in range(2)]
    going = [name for name, times in taken.items() if times[0] <= _SLOW * first]
    least = 3 if first * len(going) < seconds / 4 else 2
    for rounds in range(1, _ROUNDS):
        if rounds >= least and time.perf_counter() - begin > seconds:
            break
        shift = rounds % len(going)
        for name in going[shift:] + going[:shift]:
            taken[name].append(seconds_of(calls[name]))
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def _forget_lock() -> None:
    """A process that another thread's measurement was copied into by fork."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
tuned.measure_at_first_sight = first_sight
