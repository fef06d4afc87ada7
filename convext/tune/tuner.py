"""tune(model, x): the convolutions of a network are measured, and the choices kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import backends
from ..backends import tuned
from ..bench import problems
from ..bench.tables import Grid
from ..problem import DTYPES, STATISTICS, ConvProblem, Layout, Pass
from .measure import SECONDS, Measured, candidates, keep, measure


@dataclasses.dataclass
class Tuned:
    """What `tune` did: prints as a table of what changed and a line that sums up.

    measured  one for each pass over a problem, with what follows it, that was not kept yet
    counts    how often a forward pass runs each problem
    known     how many were kept already
    path      the file that they are kept in, or None: then they live as long as the process
    """

    measured: list[Measured]
    counts: dict[ConvProblem, int]
    known: int
    path: str | None

    @property
    def changed(self) -> list[Measured]:
        """Those for which another than before serves now."""
        return [found for found in self.measured if found.before != found.choice.name]

    def seconds(self) -> tuple[float, float]:
        """(before, after): what all calls of what was measured take together, of each as often as a pass runs it; of a
        convolution that was measured with what follows it, that alone."""
        before = after = 0.0
        fused = {found.problem for found in self.measured if found.kind}
        for found in self.measured:
            if not found.kind and found.pass_ is Pass.FPROP and found.problem in fused:
                continue
            times = self.counts.get(found.problem, 1)
            now = found.timings[found.choice.name].median
            after += times * now
            before += times * now * found.gain
        return before, after

    def table(self) -> Grid:
        grid = Grid(["layer", "pass", "before", "now", "ms", "×"])
        for found in sorted(self.changed, key=lambda found: -found.gain):
            now = found.timings[found.choice.name].median
            name, choice = _title(found.problem, found.kind), found.choice
            grid.rows.append(
                [name, found.pass_.name.lower(), found.before.split(" ", 1)[1], choice.variant]
                + [f"{now * 1e3:.3f}", f"{found.gain:.2f}"]
            )
        return grid

    def summary(self) -> str:
        before, after = self.seconds()
        gained = f": {before * 1e3:.2f} ms before, {after * 1e3:.2f} ms now" if self.measured else ""
        where = f"kept in {self.path}" if self.path else "kept as long as this process lives"
        return (
            f"{len(self.measured)} measured, {self.known} known before, {len(self.changed)} served by another "
            f"now{gained}; {where}"
        )

    def __str__(self) -> str:
        return "\n".join([*([self.table().text()] if self.changed else []), self.summary()])


def tune(
    model: nn.Module,
    x: torch.Tensor,
    *,
    train: bool = False,
    again: bool = False,
    seconds: float = SECONDS,
    on_progress: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> Tuned:
    """Measures who computes each convolution of a network fastest on this machine, and keeps it for every process.

    Args:
        model: swapped or not; its forward runs twice, in evaluation. What it computes does not change, but by rounding.
            Of a swapped one, each call is measured as the forward makes it, with the batch norm, sum and activation
            that are fused with it, besides each convolution by itself.
        x: a sample input, (N, C, H, W): the extents, type, memory format and device count, and so does the number of
            threads that torch uses now. In the seam of a swapped network values are channels-last, so the problems of
            one that is not swapped are measured in that format besides, and those of one that is as they run in it.
        train: whether both gradients are measured, too, and on a GPU the forward pass with the statistics of a batch
            norm, which come out of some kernels; default False.
        again: whether what is kept already is measured again; default False.
        seconds: for each pass over a problem, about; default 0.15.
        on_progress: function(done, total, what is measured next); the default does nothing.

    Returns a `Tuned`; print it. What is measured is kept as soon as it is known, so that an interrupted run goes on
    where it stopped. `convext.tuning("off")` switches it off.

    Raises TypeError where `model` is no nn.Module or `x` no tensor of a type that there are kernels for.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> tuned = convext.tune(model, torch.randn(1, 3, 16, 16), seconds=0.01)
        >>> len(tuned.measured) + tuned.known  # contiguous, from that to channels-last, channels-last
        3
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"x: expected a tensor of {known}, got {x.dtype}")
    with _evaluating(model), tuned.recorded():
        found = problems.collect(model, x)
        runs = _as_it_runs(model, x)
    counts = _as_they_run(found, {problem for _, problem, _ in runs})
    jobs = [(pass_, problem, "") for problem in counts for pass_ in (Pass if train else (Pass.FPROP,))]
    if train and x.device.type != "cpu":
        jobs += [(Pass.FPROP, problem, STATISTICS) for problem in counts]
    return _tuned(list(dict.fromkeys([*runs, *jobs])), counts, x.device, again, seconds, on_progress)


def tune_layers(
    layers: dict[problems.Layer, int],
    device: torch.device,
    *,
    train: bool = False,
    again: bool = False,
    seconds: float = SECONDS,
    on_progress: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> Tuned:
    """The same of layers by themselves, with how often each runs (`bench.problems.read`), as they are."""
    passes = Pass if train else (Pass.FPROP,)
    jobs = [(layer.computes(pass_), layer.problem, "") for layer in layers for pass_ in passes]
    counts = {layer.problem: count for layer, count in layers.items()}
    return _tuned(list(dict.fromkeys(jobs)), counts, device, again, seconds, on_progress)


def _tuned(
    jobs: list[Job],
    counts: dict[ConvProblem, int],
    device: torch.device,
    again: bool,
    seconds: float,
    on_progress: Callable[[int, int, str], object],
) -> Tuned:
    new = [job for job in jobs if again or not _is_known(*job)]
    measured: list[Measured] = []
    unkept = 0
    try:
        for done, (pass_, problem, kind) in enumerate(new):
            on_progress(done, len(new), f"{pass_.name.lower()} {_title(problem, kind)}")
            measured.append(measure(pass_, problem, kind, seconds=seconds, device=device))
            unkept += 1
            if unkept == _KEEP_EVERY:
                keep(measured[-unkept:])
                unkept = 0
    finally:  # also where a user stops it
        keep(measured[len(measured) - unkept :])
    on_progress(len(new), len(new), "")
    path = tuned.of(device.type).path()
    written = path is not None and path.exists()
    return Tuned(measured, counts, len(jobs) - len(new), str(path) if written else None)


Job = tuple[Pass, ConvProblem, str]
_KEEP_EVERY = 8  # measurements, so that little is lost where a run is interrupted


def _is_known(pass_: Pass, problem: ConvProblem, kind: str) -> bool:
    """Whether every candidate was measured: at first sight some are left out (first_sight.py)."""
    found = tuned.of(problem.device).choices.get(tuned.key(pass_, problem, kind))
    return found is not None and {*map(str, candidates(pass_, problem, kind))} <= found.seconds.keys()


def _title(problem: ConvProblem, kind: str) -> str:
    return problems.title(problem) + (f", {kind}" if kind else "")


def _as_it_runs(model: nn.Module, x: torch.Tensor) -> list[Job]:
    """What a forward pass asks the selection for: of a swapped network."""
    backends.forget()
    with torch.no_grad(), tuned.recorded() as seen:
        model(x)
    return list(seen)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Leaves statistics, training flags and random numbers as they were."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _as_they_run(counts: dict[ConvProblem, int], ran: set[ConvProblem]) -> dict[ConvProblem, int]:
    """The problems in the formats in which a swapped network ran them; those that it did not, as they are and
    channels-last, as the seam of one would have them."""
    formats = {p: [p, *_channels_last(p)] for p in counts}
    return {
        problem: counts[p]
        for p, every in formats.items()
        for problem in dict.fromkeys(every)
        if problem in ran or ran.isdisjoint(every)
    }


def _channels_last(problem: ConvProblem) -> Iterator[ConvProblem]:
    for x_layout in dict.fromkeys((problem.x_layout, Layout.NHWC)):
        yield dataclasses.replace(problem, x_layout=x_layout, y_layout=Layout.NHWC)


tuned.tune = tune
