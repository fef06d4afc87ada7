"""Single convolutions: every distinct one of a network, convext's backends beside ATen, pass by pass.

This is how the selection is checked: it must take the fastest. On a GPU each pass stands beside ATen's through cuDNN,
which has measured its algorithms for the layer (`torch.backends.cudnn.benchmark`), and fprop is there once more with
batch norm and ReLU: fused here, three calls there.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .. import backends
from ..memory_format import memory_format
from ..problem import ConvProblem, Epilogue, Layout, Pass, accumulate_dtype, tf32_is_allowed
from ..tune.measure import bound_of, operands_of, reference_of
from . import sass
from .agreement import Agreement, distance
from .machine import Ceilings
from .problems import Layer, title
from .tables import Grid
from .timing import Timing, interleave, interleave_on_gpu

FUSED = "relu"  # the activation of the fused rows


@dataclass(frozen=True)
class Measurement:
    """One pass of one layer: timings by backend, whom the selection takes, and why backends are off if they are."""

    problem: ConvProblem
    count: int
    pass_: Pass
    timings: dict[str, Timing]
    selected: str
    variant: str
    off: dict[str, str]
    fused: bool = False  # fprop with batch norm and activation
    transposed: bool = False
    predicted: float | None = None  # seconds that the model of the CUDA kernels expects of native on an H200

    @property
    def title(self) -> str:
        return title(self.problem, self.transposed)

    @property
    def name(self) -> str:
        return f"{self.pass_.name.lower()}{' + bn + ' + FUSED if self.fused else ''}"

    def ratio(self, backend: str) -> float | None:
        """How many times faster a backend is than ATen; None where it does not serve the problem."""
        return self.timings[backend].times_faster_than(self.timings["aten"]) if backend in self.timings else None

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
        seconds = {name: timing.as_json() for name, timing in self.timings.items()}
        return {
            "problem": str(self.problem),
            "transposed": self.transposed,
            "count": self.count,
            "pass": self.name,
            "seconds": seconds,
            "selected": self.selected,
            "variant": self.variant,
            "off": self.off,
            **({} if self.predicted is None else {"predicted_s": self.predicted}),
        }


def jobs(layers: dict[Layer, int], passes: list[Pass]) -> Iterator[tuple[Layer, int, Pass, bool]]:
    """What to measure of a network: (layer, count, pass, fused)."""
    for layer, count in layers.items():
        for pass_ in passes:
            yield layer, count, pass_, False
            if pass_ == Pass.FPROP and layer.problem.device != "cpu" and not layer.transposed:
                yield layer, count, pass_, True


def contenders(problem: ConvProblem, pass_: Pass) -> tuple[list[str], dict[str, str]]:
    """Backends that serve the pass, ATen first, and why the others do not; on the CPU, Triton is for checking only."""
    names, off = ["aten"], {}
    for name in ("native",) if problem.device == "cpu" else ("native", "triton"):
        reason = backends.unavailable(name, problem.device) or backends.get(name, problem.device).reject(pass_, problem)
        if reason is None:
            names.append(name)
        else:
            off[name] = reason
    return names, off


class WrongResult(RuntimeError):
    """A kernel computed something else than ATen, so timing it would mean nothing."""


def measure(layer: Layer, count: int, pass_: Pass, seconds: float, fused: bool = False) -> Measurement:
    """Times one pass of a layer with every backend that serves it, in turns, on seeded operands.

    Each result is checked first, against ATen's in float64 and within the bound of `convext.tune`. Raises WrongResult
    where one is further away.
    """
    problem, computes = layer.problem, layer.computes(pass_)
    operands = operands_of(computes, problem)
    names, off = contenders(problem, computes)
    choice = backends.would_serve(computes, problem)
    selected, variant = choice.backend.name, choice.variant
    if layer.transposed and pass_ == Pass.FPROP and choice.backend.slower_transposed(problem) is not None:
        selected, variant = "aten", "aten_conv_transpose"
    if selected not in names:
        names.append(selected)
    calls = {name: _call(name, pass_, layer, operands, fused) for name in names}
    with torch.no_grad():
        _check(calls, computes, problem, operands, fused)
        if problem.device == "cpu":
            timings = interleave(calls, seconds=seconds, min_rounds=3)
        else:
            cudnn = torch.backends.cudnn  # the flag is for ATen alone: Triton would measure for minutes by it
            calls["aten"] = _with_flag(calls["aten"], cudnn.flags, benchmark=True, allow_tf32=tf32_is_allowed())
            timings = interleave_on_gpu(calls, torch.device(problem.device), seconds=seconds)
    modelled = problem.device == "cuda" and "native" in names
    predicted = sass.predicted_seconds(computes, problem) if modelled else None
    return Measurement(problem, count, pass_, timings, selected, variant, off, fused, layer.transposed, predicted)


# The batch norm of the fused rows multiplies each channel by 0.5 to 1.5 over the square root of as much, which are at
# most 5.2 apart, and ReLU leaves half of what is summed: 5.2·√2 is as much as the relative error may grow.
_FUSED_FACTOR = 8.0


def _check(calls: dict[str, Callable[[], object]], pass_: Pass, problem: ConvProblem, operands: tuple, fused: bool):
    reference, bound = reference_of(pass_, problem, operands), bound_of(pass_, problem)
    if fused:
        mean, var, gamma, beta, eps = _batch_norm_values(problem)
        wide = (t.double() for t in (mean, var, gamma, beta))
        reference, bound = torch.relu_(F.batch_norm(reference, *wide, False, 0.0, eps)), _FUSED_FACTOR * bound
    for name, call in calls.items():
        if name == "aten":
            continue
        agreement = Agreement(distance(call(), reference), bound)
        if not agreement.ok:
            raise WrongResult(
                f"{pass_.name.lower()} of {problem} by {name} is {agreement.distance:.1e} away from ATen's in float64, "
                f"rounding explains {bound:.1e}"
            )


def compile_ahead(layers: dict[Layer, int], passes: list[Pass], processes: int = 8) -> None:
    """Runs every Triton kernel that `measure` will want, in several processes, so that they lie compiled on disk."""
    wanted = [job for job in jobs(layers, passes) if "triton" in contenders(job[0].problem, job[0].computes(job[2]))[0]]
    if not wanted:
        return
    context = multiprocessing.get_context("spawn")
    processes = min(processes, len(wanted), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(_run_triton, wanted))


def _run_triton(job: tuple[Layer, int, Pass, bool]) -> None:
    layer, _, pass_, fused = job
    with torch.no_grad():
        _call("triton", pass_, layer, operands_of(layer.computes(pass_), layer.problem), fused)()
    torch.get_device_module(layer.problem.device).synchronize()


def _with_flag(call: Callable[[], object], flags: Callable, **values) -> Callable[[], object]:
    def run():
        with flags(enabled=True, **values):
            return call()

    return run


def _call(name: str, pass_: Pass, layer: Layer, operands: tuple, fused: bool = False) -> Callable[[], object]:
    problem = layer.problem
    if name == "aten" and (problem.device != "cpu" or layer.transposed):
        return _aten_call(pass_, layer, operands, fused)
    backend = backends.get(name, problem.device)
    if layer.transposed and pass_ == Pass.FPROP:
        return lambda: backend.conv_transpose(problem, *operands, None)
    computes = layer.computes(pass_)
    run = getattr(backend, computes.name.lower())
    if computes != Pass.FPROP:
        return lambda: run(problem, *operands)
    epilogue = Epilogue(**_batch_norm(problem), activation=FUSED) if fused else Epilogue()
    return lambda: run(problem, *operands, epilogue)


def _aten_call(pass_: Pass, layer: Layer, operands: tuple, fused: bool) -> Callable[[], object]:
    """What PyTorch itself calls, its results in the layouts that it chooses."""
    problem, transposed = layer
    a, b = operands
    stride, padding, dilation, groups = problem.geom
    longer = layer.output_padding if transposed else (0,) * problem.axes
    setting = stride, padding, dilation, transposed, longer, groups
    if pass_ == Pass.FPROP and not fused:
        return lambda: torch.convolution(a, b, None, *setting)
    if pass_ == Pass.FPROP:
        mean, var, gamma, beta, eps = _batch_norm_values(problem)
        activation = getattr(F, FUSED)

        def three_calls():
            y = torch.convolution(a, b, None, *setting)
            return activation(F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps), inplace=True)

        return three_calls
    # The layer's own input and output: a transposed one's are the convolution's output and input.
    shape = problem.y_shape if transposed else problem.x_shape
    if pass_ == Pass.DGRAD:
        dy, x, w = a, _empty(problem, shape), b
    else:
        (dy, x), w = ((b, a) if transposed else (a, b)), _empty(problem, problem.w_shape)
    mask = [pass_ == Pass.DGRAD, pass_ == Pass.WGRAD, False]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(dy, x, w, None, *setting, mask)


def _empty(problem: ConvProblem, shape: tuple[int, ...]) -> torch.Tensor:
    """Of which ATen reads nothing but size and layout."""
    layout = memory_format(problem.x_layout == Layout.NHWC, len(shape))
    return torch.empty(shape, dtype=problem.dtype.torch, device=problem.device, memory_format=layout)


def _batch_norm(problem: ConvProblem) -> dict:
    generator = torch.Generator().manual_seed(1)
    names = ("mean", "var", "gamma", "beta")
    values = torch.rand(len(names), problem.k, generator=generator, dtype=torch.float64).add(0.5)
    drawn = values.to(problem.device, accumulate_dtype(problem.dtype.torch))
    return {**dict(zip(names, drawn)), "eps": 1e-5}


def _batch_norm_values(problem: ConvProblem) -> tuple:
    norm = _batch_norm(problem)
    return tuple(norm[name] for name in ("mean", "var", "gamma", "beta", "eps"))


def table(measurements: Iterable[Measurement], ceilings: Ceilings | None = None) -> Grid:
    """One row a measurement: milliseconds and ratios by backend, beside what was predicted of native where it was;
    GFLOP/s and GB/s of native (else Triton, else ATen) and, with `ceilings`, its share of the one that binds; and who
    is selected, marked where that loses over 5 %."""
    measurements = list(measurements)
    others = [n for n in ("native", "triton") if any(n in m.timings or n in m.off for m in measurements)]
    columns = [column for name in others for column in (f"{name}, ms", f"{name}, ×")]
    predicted = ["predicted, ms"] if any(m.predicted is not None for m in measurements) else []
    grid = Grid(["layer", "n", "pass", "aten, ms", *columns, *predicted, "GFLOP/s", "GB/s", "of ceiling", "selected"])
    for m in measurements:
        cells = [m.title, str(m.count), m.name, f"{m.timings['aten'].median * 1e3:.3f}"]
        for name in others:
            there = name in m.timings
            cells += [f"{m.timings[name].median * 1e3:.3f}", f"{m.ratio(name):.2f}"] if there else ["–", "–"]
        if predicted:
            cells.append("–" if m.predicted is None else f"{m.predicted * 1e3:.3f}")
        shown = next((name for name in others if name in m.timings), "aten")
        cells += [f"{m.gflops(shown):.0f}", f"{m.bytes_() / m.timings[shown].median / 1e9:.1f}"]
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
    for name in dict.fromkeys(m.name for m in measurements):
        of_pass = [m for m in measurements if m.name == name]
        aten = sum(m.count * m.timings["aten"].median for m in of_pass)
        chosen = sum(m.count * m.timings[m.selected].median for m in of_pass)
        best = sum(m.count * min(t.median for t in m.timings.values()) for m in of_pass)
        behind = sum(m.timings[m.selected].median > m.timings["aten"].median for m in of_pass)
        lines.append(
            f"{name}: ATen {aten * 1e3:.2f} ms, selected {chosen * 1e3:.2f} ms ({aten / chosen:.2f}×, behind ATen on "
            f"{behind} of {len(of_pass)} layers), always the fastest {best * 1e3:.2f} ms"
        )
    return "\n".join(lines)
