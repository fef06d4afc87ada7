"""Fair timing: what is compared runs in turns, in one process, and is told by medians and quartiles.

Machines drift: they warm up, share cores, change clocks. So candidates take turns within every round, each round gives
one ratio per candidate, and the ratio reported is the median of those. The clock is the host's (`interleave`), or on a
GPU the device's own (`interleave_on_gpu`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

VISIT_SECONDS = 0.02  # a visit repeats short calls until it is this long, so that the clock's grain does not matter


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, one figure a round (the mean of that round's calls)."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, in seconds; of a single round its figure."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def iqr(self) -> float:
        """Distance between the quartiles, in seconds; 0 for a single round."""
        low, high = self.quartiles
        return high - low

    def as_json(self) -> dict[str, Any]:
        """Median, distance between the quartiles, and both of them, in seconds."""
        return {"median_s": self.median, "iqr_s": self.iqr, "quartiles_s": list(self.quartiles)}

    def times_faster_than(self, other: Timing) -> float:
        """Median over rounds of other's seconds / own seconds: above 1 means faster."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 10.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    synchronize: Callable[[], object] = lambda: None,
    on_round: Callable[[int], object] = lambda rounds: None,
    visit: float = VISIT_SECONDS,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Times `calls` in turns for about `seconds` in all, at least `min_rounds` rounds, each of visits of `visit`
    seconds to every call. `clock`: what each call's time is told by; the default is the host's.

    Every call is warmed up first. A visit begins with one call that is not timed, which brings the candidate's weights
    back into the caches. The order rotates from round to round. `synchronize` waits for the device.
    """
    clock = clock or time.perf_counter
    repeats = {}
    for name, call in calls.items():
        call()
        synchronize()
        start = clock()
        call()
        synchronize()
        repeats[name] = max(1, round(visit / max(clock() - start, 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    begin = time.perf_counter()
    for rounds in range(max_rounds):
        if rounds >= min_rounds and time.perf_counter() - begin > seconds:
            break
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            call = calls[name]
            call()
            synchronize()
            start = clock()
            for _ in range(repeats[name]):
                call()
            synchronize()
            taken[name].append((clock() - start) / repeats[name])
        on_round(rounds + 1)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


# Overwritten before each call on a GPU: many times its second-level cache (60 MB on an H200), so that operands come
# from memory, and long enough to write that the host has queued the whole call meanwhile.
FLUSH_BYTES = 1 << 30


def gpu_clock(device: torch.device, flush_bytes: int | None = None) -> Callable[[Callable[[], object]], float]:
    """time(call) -> seconds of one call on the device, its caches cold, by events on the present stream."""
    gpu = torch.get_device_module(device)
    flush = torch.empty(FLUSH_BYTES if flush_bytes is None else flush_bytes, dtype=torch.uint8, device=device)

    def seconds(call: Callable[[], object]) -> float:
        start, end = gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
        flush.fill_(0)
        start.record()
        call()
        end.record()
        gpu.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3

    return seconds


def interleave_on_gpu(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 0.3,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Times `calls` in turns by events on the device's stream, for about `seconds` of the host's time.

    A figure is one call's time on the device, its caches cold. What the host spends on launching does not count, as it
    does not in a network that keeps the device busy.
    """
    clock = gpu_clock(device)
    for call in calls.values():
        call()  # compiles, tunes, loads
    torch.get_device_module(device).synchronize(device)
    names, begin = list(calls), time.perf_counter()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for rounds in range(max_rounds):
        if rounds >= min_rounds and time.perf_counter() - begin > seconds:
            break
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(clock(calls[name]))
    return {name: Timing(tuple(values)) for name, values in taken.items()}
