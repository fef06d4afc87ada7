"""Whole networks: swapped convext beside unswapped eager PyTorch and, where asked for, its peers, in one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

import convext

from .. import zoo
from ..options import DType, MemoryFormat
from . import inference, memory, training
from .agreement import Agreement, bound, distance
from .candidate import Skipped
from .tables import Grid
from .timing import Timing, interleave

BASELINE = "eager"
OURS = "convext"
RECOMPUTED = "convext, recompute"


@dataclass(frozen=True)
class Case:
    """One network in one setting. `recompute`: of a training step, that of a model swapped so as well."""

    model: str
    batch: int
    threads: int
    dtype: DType = DType.float32
    memory_format: MemoryFormat = MemoryFormat.contiguous
    train: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        mode = "training step" if self.train else "eval"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.model}, batch {self.batch}, {threads}, {self.dtype.value}, {self.memory_format.value}, {mode}"


@dataclass
class Outcome:
    """What one case gave: timings and distances from eager's result by candidate, who was skipped and why, and what
    memory eager and convext's candidates need."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    memory: dict[str, memory.Memory] = field(default_factory=dict)

    def ratio(self, name: str, over: str = BASELINE) -> float:
        """How many times faster `name` is than `over`."""
        return self.timings[name].times_faster_than(self.timings[over])

    def as_json(self) -> dict:
        candidates = {
            name: {
                **timing.as_json(),
                "rounds": len(timing.seconds),
                "times_eager": self.ratio(name),
                "distance": self.agreement[name].distance if name in self.agreement else 0.0,
            }
            for name, timing in self.timings.items()
        }
        found = {"case": asdict(self.case), "candidates": candidates, "skipped": self.skipped}
        if self.memory:
            found["memory"] = {
                name: {"saved_bytes": needed.saved, "peak_bytes": needed.peak} for name, needed in self.memory.items()
            }
        return found


class Disagreement(RuntimeError):
    """Two candidates computed different results, so timing them would mean nothing."""


def cases(names: Iterable[str], batches: list[int], threads: list[int], **setting) -> Iterator[Case]:
    """Every combination, networks outermost."""
    return (Case(name, batch, count, **setting) for name in names for batch in batches for count in threads)


def peers(train: bool) -> tuple[str, ...]:
    """Names of all that a swapped network can be measured against, in inference or in a training step."""
    return tuple((training if train else inference).PEERS)


def run(
    case: Case, *, peers: Collection[str] = (), seconds: float, on_round: Callable[[int], object] = lambda n: None
) -> Outcome:
    """Builds the network, checks every candidate's result against eager's, then times them in turns.

    `peers`: names of who takes part besides eager and convext (see the function of that name). Raises `Disagreement`
    where convext's result is further from eager's than rounding explains; a peer whose result is, is skipped with that
    reason.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return _run(case, peers, seconds, on_round)
    finally:
        torch.set_num_threads(threads_before)


def _run(case: Case, peers: Collection[str], seconds: float, on_round: Callable[[int], object]) -> Outcome:
    outcome = Outcome(case)
    model = zoo.build(case.model)[0].to(case.dtype.torch, memory_format=case.memory_format.torch)
    x = zoo.sample(case.model, case.batch).to(case.dtype.torch, memory_format=case.memory_format.torch)
    mode = training if case.train else inference
    models = {BASELINE: copy.deepcopy(model), OURS: convext.swap(copy.deepcopy(model))}
    if case.train and case.recompute:
        models[RECOMPUTED] = convext.swap(copy.deepcopy(model), recompute=True)
    candidates = {name: mode.prepare(network, x) for name, network in models.items()}
    reference, limit = candidates[BASELINE].result(), bound(model, case.dtype.torch)
    if case.train and case.dtype is not DType.float64:
        # Gradients through batch norm and ReLU amplify rounding by a factor that only a measurement tells: eager's own
        # distance from float64.
        exact = training.prepare(copy.deepcopy(model).double(), x.double()).result()
        limit, reference = max(limit, 10 * distance(reference, exact)), exact
    for name in models:
        if name != BASELINE:
            found = distance(candidates[name].result(), reference)
            outcome.agreement[name] = agreement = Agreement(found, limit)
            if not agreement.ok:
                raise Disagreement(
                    f"{case}: {name} is {found:.1e} away from the reference, rounding explains {limit:.1e}"
                )
    if case.train:
        outcome.memory = {n: memory.of_step(network, x, candidates[n].call) for n, network in models.items()}
    else:
        outcome.memory = {n: memory.of_inference(candidates[n].call) for n in models}
    if peers:
        torch._dynamo.reset()  # compiled code bakes in the number of threads
        for name in peers:
            prepare = mode.PEERS[name]
            try:
                candidate = prepare(copy.deepcopy(model), x, case.threads)
                found = candidate.result()
            except Skipped as reason:
                outcome.skipped[name] = str(reason)
                continue
            except Exception as error:  # whatever an engine raises: the others go on
                said = (str(error).strip().splitlines() or [""])[0][:100]
                outcome.skipped[name] = f"it raised {type(error).__name__}: {said} (torch {torch.__version__})"
                continue
            outcome.agreement[name] = agreement = Agreement(distance(found, reference), limit)
            if agreement.ok:
                candidates[name] = candidate
            else:
                outcome.skipped[name] = f"its result is {agreement.distance:.1e} away from the reference"
    calls = {name: candidate.call for name, candidate in candidates.items()}
    outcome.timings = interleave(calls, seconds=seconds, on_round=on_round)
    return outcome


def table(outcomes: Sequence[Outcome]) -> Grid:
    """One row a case: median milliseconds of eager, then times faster than eager of every contender."""
    contenders = list(dict.fromkeys(name for outcome in outcomes for name in outcome.timings if name != BASELINE))
    grid = Grid(["network", "batch", "threads", "eager, ms", *(f"{name}, ×" for name in contenders)])
    for outcome in outcomes:
        eager = outcome.timings[BASELINE]
        cells = [outcome.case.model, str(outcome.case.batch), str(outcome.case.threads)]
        cells.append(f"{eager.median * 1e3:.1f} ± {eager.iqr * 1e3:.1f}")
        for name in contenders:
            if name not in outcome.timings:
                cells.append("–")
                continue
            spread = outcome.timings[name].iqr / outcome.timings[name].median
            cells.append(f"{outcome.ratio(name):.2f} ± {outcome.ratio(name) * spread:.2f}")
        grid.rows.append(cells)
    return grid


def memory_table(outcomes: Sequence[Outcome]) -> Grid:
    """One row a case: what eager and convext save for the backward pass where it is a training step, and the most that
    its tensors take at once, in MiB, and convext's share of eager's."""
    contenders = list(dict.fromkeys(name for outcome in outcomes for name in outcome.memory if name != BASELINE))
    figures = ("saved", "peak") if any(outcome.case.train for outcome in outcomes) else ("peak",)
    grid = Grid(["network", "batch"])
    for what in figures:
        grid.columns += [f"{what}, MiB, {BASELINE}", *contenders]
    for outcome in outcomes:
        if not outcome.memory:
            continue
        cells = [outcome.case.model, str(outcome.case.batch)]
        for what in figures:
            before = getattr(outcome.memory[BASELINE], what)
            cells.append(f"{before / 2**20:.1f}")
            for name in contenders:
                after = getattr(outcome.memory[name], what)
                cells.append(f"{after / 2**20:.1f} ({after / before:.2f}×)")
        grid.rows.append(cells)
    return grid


def images_per_second(outcome: Outcome) -> str:
    """One line: images/s before and after, with the ratio."""
    before, after = (outcome.case.batch / outcome.timings[name].median for name in (BASELINE, OURS))
    return f"{outcome.case}: {before:.1f} -> {after:.1f} images/s ({outcome.ratio(OURS):.2f}×)"
