"""KernelBench's problems that hold a convolution: eager, torch.compile and the swapped model, in turns.

KernelBench (github.com/ScalingIntelligence/KernelBench) is a folder of small files, each a network with its sizes. The
checkout is the user's. Its rule of correctness is kept here: the same seed before both models are made, and before each
forward; models in training mode under `no_grad`; `torch.allclose` with both tolerances 1e-4 in float32 and 1e-2 in half
precision. Some problems amplify rounding until two correct results differ by more than that. There what counts is the
distance from a run in float64: a swapped model may be as far from it as eager is, within a factor.

Sizes are those of a large GPU. A file's batch size, and then its extents, are halved until the forward takes no more
memory and operations than asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import convext

from ..options import UsageError
from .agreement import distance
from .tables import Grid
from .timing import Timing, interleave

LEVELS = (1, 2, 3)
SEED = 42  # KernelBench's own
BATCH = "batch_size"
EXTENTS = ("depth", "height", "width", "length", "D", "H", "W", "depth_in", "height_in", "width_in")
CONVOLUTION = re.compile(r"Conv(Transpose)?[123]d|conv(_transpose)?[123]d")
FLOAT64_FACTOR = 4.0  # two correct float32 results may be that much apart in their distances from float64
BASELINE, COMPILED, OURS = "eager", "torch.compile", "convext"


@dataclass(frozen=True)
class Problem:
    """One file of KernelBench's: `level`, `number` and `name` are those of its path."""

    path: Path
    level: int
    number: int
    name: str

    def __str__(self) -> str:
        return f"{self.level}/{self.number} {self.name}"


@dataclass
class Outcome:
    """What one problem gave.

    `sizes`: those that differ from the file's. `far`: ||result - float64|| / ||float64|| of eager and convext. `ok`: by
    KernelBench's rule, or by the distances. `native`: how many of its `layers` convolutions convext's kernels ran.
    `error`: why there is no figure, else "".
    """

    problem: Problem
    sizes: dict[str, int] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    far: dict[str, float] = field(default_factory=dict)
    allclose: bool = False
    native: int = 0
    layers: int = 0
    error: str = ""
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.error and (self.allclose or self.far[OURS] <= FLOAT64_FACTOR * self.far[BASELINE])

    def ratio(self, *over: str) -> float:
        """How many times as fast convext is as the fastest of `over` that were timed."""
        return min(self.timings[OURS].times_faster_than(self.timings[name]) for name in over if name in self.timings)

    def as_json(self) -> dict[str, Any]:
        problem = {"level": self.problem.level, "number": self.problem.number, "name": self.problem.name}
        seconds = {name: timing.as_json() for name, timing in self.timings.items()}
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("problem", "timings")}
        ratios = {f"times_{name}": self.ratio(name) for name in self.timings if name != OURS}
        return problem | rest | {"ok": self.ok, "seconds": seconds} | ratios


def problems(folder: Path, levels: Sequence[int] = LEVELS, numbers: Sequence[int] = ()) -> list[Problem]:
    """The files with a convolution in a checkout, or in its folder `KernelBench`, by level and number.

    Raises UsageError where `folder` holds no such files, or no such numbers.
    """
    root = next((root for root in (folder, folder / "KernelBench") if (root / "level1").is_dir()), None)
    if root is None:
        raise UsageError(f"PATH: got {str(folder)!r}, expected a checkout of KernelBench (a folder with level1, ...)")
    found = []
    for level in levels:
        for path in (root / f"level{level}").glob("*_*.py"):
            number, _, name = path.stem.partition("_")
            if number.isdecimal() and CONVOLUTION.search(path.read_text()):
                found.append(Problem(path, level, int(number), name))
    if numbers:
        missing = set(numbers) - {problem.number for problem in found}
        if missing:
            told = ", ".join(map(str, sorted(missing)))
            raise UsageError(f"--number: no problem {told} with a convolution in level {', '.join(map(str, levels))}")
    return sorted(
        (problem for problem in found if not numbers or problem.number in numbers),
        key=lambda problem: (problem.level, problem.number),
    )


# ---- a file, at a size that fits ------------------------------------------------------------------------------------


def load(problem: Problem, sizes: dict[str, int] | None = None) -> ModuleType:
    """The file, executed anew as a module, with other values for some of its sizes."""
    name = f"convext_kernelbench_{problem.level}_{problem.number}"
    spec = importlib.util.spec_from_file_location(name, problem.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where torch.compile looks for what a class's code names
    spec.loader.exec_module(module)
    module.__dict__.update(sizes or {})
    return module


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


def cost(problem: Problem, sizes: dict[str, int]) -> tuple[int, int] | None:
    """(operations, bytes of all results) of one forward at such sizes; None where these sizes do not fit together."""
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = load(problem, sizes)
            model, inputs = module.Model(*module.get_init_inputs()), module.get_inputs()
            with FlopCounterMode(display=False) as flops, _Memory() as memory:
                model(*inputs)
    except Exception:
        return None
    return flops.get_total_flops(), memory.total


def fitting(problem: Problem, most_flops: float, most_bytes: float) -> dict[str, int]:
    """The sizes to change so that a forward stays within both: the batch is halved down to 2, then the extents.

    A file that does not say its sizes in the usual names, or takes no other ones, keeps what it has.
    """
    full = {name: value for name, value in _constants(problem).items() if name == BATCH or name in EXTENTS}
    sizes: dict[str, int] = {}

    found = cost(problem, sizes)
    while found is None or found[0] > most_flops or found[1] > most_bytes:
        batch = sizes.get(BATCH, full.get(BATCH, 1))
        extents = {name: sizes.get(name, value) for name, value in full.items() if name != BATCH}
        if batch > 2:
            smaller = {BATCH: max(batch // 2, 2)}
        elif extents and max(extents.values()) >= 16:
            smaller = {name: value if value < 16 else value // 2 for name, value in extents.items()}
        else:
            break
        found = cost(problem, sizes | smaller)
        if found is None:
            break
        sizes |= smaller
    return sizes


def _constants(problem: Problem) -> dict[str, int]:
    """The integers that the file assigns to names of its own."""
    tree = ast.parse(problem.path.read_text())
    names = {n.id for s in tree.body if isinstance(s, ast.Assign) for n in ast.walk(s) if isinstance(n, ast.Name)}
    module = load(problem)
    return {name: value for name in sorted(names) if isinstance(value := getattr(module, name, None), int)}


# ---- running --------------------------------------------------------------------------------------------------------


def run(
    problem: Problem,
    *,
    device: torch.device,
    dtype: torch.dtype,
    most_flops: float,
    most_bytes: float,
    compiled: bool,
    seconds: float,
) -> Outcome:
    """Checks the swapped model of a problem by KernelBench's rule, then times it beside eager and, where `compiled`,
    torch.compile, in turns for about `seconds`. What raises is told in `Outcome.error`."""
    outcome = Outcome(problem, fitting(problem, most_flops, most_bytes))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(outcome, device, dtype, compiled, seconds)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return outcome


def _run(outcome: Outcome, device: torch.device, dtype: torch.dtype, compiled: bool, seconds: float) -> None:
    module = load(outcome.problem, outcome.sizes)

    def make() -> nn.Module:
        torch.manual_seed(SEED)
        arguments = module.get_init_inputs()
        torch.manual_seed(SEED)
        model: nn.Module = module.Model(*arguments)
        return model.to(device, dtype)

    torch.manual_seed(SEED)
    inputs = [value.to(device, dtype) if isinstance(value, torch.Tensor) else value for value in module.get_inputs()]

    def result(model: nn.Module, values: Sequence[Any]) -> torch.Tensor:
        torch.manual_seed(SEED)
        out: torch.Tensor = model(*values)
        return out

    eager, ours = make(), convext.swap(make())
    expected, found = result(eager, inputs), result(ours, inputs)
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 1e-2
    outcome.allclose = torch.allclose(found, expected, atol=tolerance, rtol=tolerance)
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in inputs]
    exact = result(make().double(), wide)
    outcome.far = {BASELINE: distance(expected, exact), OURS: distance(found, exact)}
    del wide, exact, expected, found
    rows = convext.report(ours)
    outcome.layers, outcome.native = len(rows), sum(row.backend.startswith(("native", "triton")) for row in rows)
    calls: dict[str, Callable[[], object]] = {BASELINE: lambda: eager(*inputs), OURS: lambda: ours(*inputs)}
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(make())
        try:
            fast(*inputs)
            calls[COMPILED] = lambda: fast(*inputs)
        except Exception as error:
            outcome.skipped[COMPILED] = (str(error).splitlines() or [type(error).__name__])[0][:120]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    outcome.timings = interleave(calls, seconds=seconds, min_rounds=3, synchronize=wait)


# ---- telling --------------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> Grid:
    """One row a problem: how far from float64, and times as fast as eager and torch.compile."""
    contenders = [name for name in (BASELINE, COMPILED) if any(name in outcome.timings for outcome in outcomes)]
    columns = ["problem", "sizes", "native", "eager's error", "convext's", "eager, ms", *(f"× {n}" for n in contenders)]
    grid = Grid(columns, names=2)
    for outcome in outcomes:
        sizes = ", ".join(f"{name} {value}" for name, value in outcome.sizes.items()) or "as they are"
        row = [str(outcome.problem), sizes]
        if outcome.error:
            grid.rows.append([*row, outcome.error, *[""] * (len(columns) - 3)])
            continue
        row += [f"{outcome.native}/{outcome.layers}", f"{outcome.far[BASELINE]:.0e}"]
        row += [f"{outcome.far[OURS]:.0e}" + ("" if outcome.ok else " WRONG")]
        row += [f"{outcome.timings[BASELINE].median * 1e3:.2f}"]
        row += [f"{outcome.ratio(name):.2f}" if name in outcome.timings else "–" for name in contenders]
        grid.rows.append(row)
    return grid


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line a level: right, geometric means, the least."""
    return "\n".join(_level(level, outcomes) for level in sorted({outcome.problem.level for outcome in outcomes}))


def _level(level: int, outcomes: Sequence[Outcome]) -> str:
    here = [outcome for outcome in outcomes if outcome.problem.level == level]
    timed = [outcome for outcome in here if outcome.timings]
    line = f"level {level}: {sum(outcome.ok for outcome in here)} of {len(here)} right"
    if not timed:
        return line
    for told, over in (("eager", (BASELINE,)), ("the faster of eager and torch.compile", (BASELINE, COMPILED))):
        if any(name in outcome.timings for outcome in timed for name in over[-1:]):
            ratios = {outcome.problem.number: outcome.ratio(*over) for outcome in timed}
            least = min(ratios, key=ratios.__getitem__)
            mean = statistics.geometric_mean(ratios.values())
            line += f"; {mean:.2f} times as fast as {told}, least {ratios[least]:.2f} (no. {least})"
    return line


def skipped(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each that could not be timed beside the others, and why."""
    return [f"{outcome.problem}, {name}: {why}" for outcome in outcomes for name, why in outcome.skipped.items()]
