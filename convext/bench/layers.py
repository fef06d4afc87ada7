"""Single convolutions: every distinct one of a network, convext's own kernel beside ATen's, pass by pass.

This is how the selection is checked: it must take the faster of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .. import backends
from ..memory_format import memory_format
from ..problem import ConvProblem, Epilogue, Layout, Pass
from .machine import Ceilings
from .problems import title
from .tables import Grid
from .timing import Timing, interleave


@dataclass(frozen=True)
class Measurement:
    """One pass over one problem: timings by backend, whom the selection takes, and why native is off if it is."""

    problem: ConvProblem
    count: int
    pass_: Pass
    timings: dict[str, Timing]
    selected: str
    variant: str
    native_off: str | None

    @property
    def ratio(self) -> float | None:
        """How many times faster native is than ATen; None where native does not serve the problem."""
        return self.timings["native"].times_faster_than(self.timings["aten"]) if "native" in self.timings else None

    @property
    def regret(self) -> float:
        """By how much the selected backend is slower than the faster one, as a share: 0 where it is the faster."""
        return self.timings[self.selected].median / min(t.median for t in self.timings.values()) - 1.0

    def gflops(self, backend: str) -> float:
        """GFLOP/s, taps in the padding counted as if they were computed."""
        return self.problem.flops / self.timings[backend].median / 1e9

    def bytes_(self) -> float:
        """Bytes that must move: each operand and the result once."""
        p = self.problem
        return float((p.x_size + p.y_size + p.w_size) * p.dtype.torch.itemsize)

    def as_json(self) -> dict:
        seconds = {name: {"median_s": timing.median, "iqr_s": timing.iqr} for name, timing in self.timings.items()}
        return {
            "problem": str(self.problem),
            "count": self.count,
            "pass": self.pass_.name.lower(),
            "seconds": seconds,
            "selected": self.selected,
            "variant": self.variant,
            "native_off": self.native_off,
        }


def measure(problem: ConvProblem, count: int, pass_: Pass, seconds: float) -> Measurement:
    """Times one pass with the native backend and with ATen, in turns, on seeded operands."""
    operands = _operands(problem, pass_)
    native = backends.get("native")
    native_off = backends.unavailable("native", problem.device) or native.reject(pass_, problem)
    names = ["aten"] if native_off else ["aten", "native"]
    choice = backends.select(pass_, problem)
    if choice.backend.name not in names:
        names.append(choice.backend.name)
    with torch.no_grad():
        timings = interleave(
            {name: _call(name, pass_, problem, operands) for name in names},
            seconds=seconds,
            min_rounds=3,
            synchronize=torch.cuda.synchronize if problem.device == "cuda" else lambda: None,
        )
    return Measurement(problem, count, pass_, timings, choice.backend.name, choice.variant, native_off)


def _operands(problem: ConvProblem, pass_: Pass) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def operand(shape: tuple[int, ...], layout: Layout) -> torch.Tensor:
        values = torch.randn(shape, generator=generator).to(problem.device, problem.dtype.torch)
        return values.contiguous(memory_format=memory_format(layout == Layout.NHWC))

    x, dy = operand(problem.x_shape, problem.x_layout), operand(problem.y_shape, problem.y_layout)
    w = operand(problem.w_shape, Layout.NCHW)
    return {Pass.FPROP: (x, w), Pass.DGRAD: (dy, w), Pass.WGRAD: (dy, x)}[pass_]


def _call(name: str, pass_: Pass, problem: ConvProblem, operands: tuple) -> Callable[[], object]:
    run = getattr(backends.get(name), pass_.name.lower())
    extra = (Epilogue(),) if pass_ == Pass.FPROP else ()
    return lambda: run(problem, *operands, *extra)


def table(measurements: Iterable[Measurement], ceilings: Ceilings | None = None) -> Grid:
    """One row a measurement: milliseconds, ratio, native's (else ATen's) GFLOP/s and, with `ceilings`, its share of the
    one that binds; and who is selected, marked where that loses over 5 %."""
    grid = Grid(["layer", "n", "pass", "aten, ms", "native, ms", "native, ×", "GFLOP/s", "of ceiling", "selected"])
    for m in measurements:
        cells = [title(m.problem), str(m.count), m.pass_.name.lower(), f"{m.timings['aten'].median * 1e3:.3f}"]
        shown = "aten" if m.ratio is None else "native"
        cells += ["–", "–"] if m.ratio is None else [f"{m.timings['native'].median * 1e3:.3f}", f"{m.ratio:.2f}"]
        cells.append(f"{m.gflops(shown):.0f}")
        if ceilings is None:
            cells.append("–")
        else:
            share, which = ceilings.share(m.problem.flops, m.bytes_(), m.timings[shown].median)
            cells.append(f"{share:.0%} {which}")
        cells.append(m.variant + (f" (loses {m.regret:.0%})" if m.regret > 0.05 else ""))
        grid.rows.append(cells)
    return grid


def summary(measurements: list[Measurement]) -> str:
    """The whole network's time by pass, every layer counted as often as it runs."""
    lines = []
    for pass_ in Pass:
        of_pass = [m for m in measurements if m.pass_ == pass_]
        if not of_pass:
            continue
        aten = sum(m.count * m.timings["aten"].median for m in of_pass)
        chosen = sum(m.count * m.timings[m.selected].median for m in of_pass)
        best = sum(m.count * min(t.median for t in m.timings.values()) for m in of_pass)
        lines.append(
            f"{pass_.name.lower()}: ATen {aten * 1e3:.2f} ms, selected {chosen * 1e3:.2f} ms ({aten / chosen:.2f}×), "
            f"always the faster {best * 1e3:.2f} ms"
        )
    return "\n".join(lines)
