"""explain(model, name): why the kernel that computes a layer does, and the others do not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .. import backends
from ..backends import tuned
from ..backends.base import Candidate
from ..bench import problems
from ..bench.tables import Grid
from ..problem import ConvProblem, Pass
from ..swap.report import last_problem
from .measure import candidates


class Line(NamedTuple):
    """One kernel: what the cost model expects, relative to the cheapest of its backend, what was measured, and whether
    it serves, or why it does not."""

    backend: str
    variant: str
    expected: float | None
    seconds: float | None
    verdict: str


class Explanation:
    """Who computes one pass of a layer, and why: prints as a table; `lines` has one `Line` for each kernel."""

    def __init__(self, title: str, pass_: Pass, problem: ConvProblem, lines: list[Line], why: str, kind: str = ""):
        self.title, self.pass_, self.problem, self.lines, self.why = title, pass_, problem, lines, why
        self.kind = kind  # what follows an fprop, such as "bn relu"

    @property
    def serves(self) -> Line:
        return next(line for line in self.lines if line.verdict == "serves")

    def __str__(self) -> str:
        grid = Grid(["backend", "kernel", "expected, ×", "measured, ms", "verdict"])
        for line in self.lines:
            expected = "–" if line.expected is None else f"{line.expected:.2f}"
            seconds = "–" if line.seconds is None else f"{line.seconds * 1e3:.3f}"
            grid.rows.append([line.backend, line.variant, expected, seconds, line.verdict])
        about = f"{self.title}: {self.pass_.name.lower()} of {problems.title(self.problem)}, batch {self.problem.n}"
        about += f", with {self.kind}" if self.kind else ""
        return "\n".join([about, grid.text(), self.why])

    __repr__ = __str__


def explain(model: nn.Module, name: str, pass_: str = "fprop") -> Explanation:
    """Every kernel that could compute a layer's last call, what is expected and what was measured of it, who serves,
    and why.

    Args:
        model: a swapped model that has run.
        name: of one of its convolutions, as `model.named_modules()` has it.
        pass_: "fprop", the default, "dgrad" or "wgrad".

    Raises KeyError where there is no such convolution, ValueError for another pass, RuntimeError where the layer has
    not run by convext yet.

    Example:
        >>> model = convext.swap(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()).eval())
        >>> with torch.no_grad():
        ...     y = model(torch.randn(1, 8, 16, 16))
        >>> convext.explain(model, "0").serves.backend
        'native'
    """
    names = {p.name.lower(): p for p in Pass}
    if pass_ not in names:
        raise ValueError(f"pass_: unknown pass {pass_!r}, expected one of {', '.join(map(repr, names))}")
    last = last_problem(model, name)
    if last is None:
        raise RuntimeError(f"name: {name!r} has not run by convext yet: swap the model and run it first")
    problem, kind = last
    return explain_problem(name, names[pass_], problem, kind if names[pass_] is Pass.FPROP else "")


def explain_problem(title: str, pass_: Pass, problem: ConvProblem, kind: str = "") -> Explanation:
    """The same of a problem. `kind`: what follows an fprop (`Epilogue.kind`)."""
    choice, measured = backends.would_serve(pass_, problem, kind), tuned.lookup(pass_, problem, kind)
    seconds = measured.seconds if measured is not None else {}
    lines = []
    for name in backends.row(problem.device):
        reason = backends.unavailable(name, problem.device)
        if reason is None:
            reason = backends.get(name, problem.device).reject(pass_, problem)
        if reason is not None:
            lines.append(Line(name, "", None, None, reason))
    found = candidates(pass_, problem, kind)
    for candidate in found:
        costs = [other.cost for other in found if other.backend == candidate.backend and other.cost]
        expected = candidate.cost / min(costs) if candidate.cost else None
        serves = (candidate.backend, candidate.variant) == (choice.backend.name, choice.variant)
        verdict = (
            "serves" if serves else choice.passed_over.get(candidate.backend) or _beside(candidate, choice, seconds)
        )
        lines.append(Line(candidate.backend, candidate.variant, expected, seconds.get(str(candidate)), verdict))
    if not any(line.verdict == "serves" for line in lines):  # forced, or nothing to compute
        lines.append(Line(choice.backend.name, choice.variant, None, None, "serves"))
    return Explanation(title, pass_, problem, lines, _why(choice, measured is not None), kind)


def _beside(candidate: Candidate, choice: backends.Choice, seconds: dict[str, float]) -> str:
    """Why a candidate does not serve that nobody passed over."""
    served, own = seconds.get(f"{choice.backend.name} {choice.variant}"), seconds.get(str(candidate))
    if served is not None and own is not None:
        return f"takes {own / served:.2f} times as long" if own > 1.05 * served else "no faster beyond noise"
    return "expected to be slower" if candidate.backend == choice.backend.name else "comes after who serves"


def _why(choice: backends.Choice, was_measured: bool) -> str:
    name = f"{choice.backend.name} serves"
    if backends.forced() is not None:
        return f"{name}: convext.backend({backends.forced()!r}) is set"
    if was_measured:
        return f"{name}: it was measured to be the fastest on this machine"
    if choice.passed_over:
        return f"{name}: " + "; ".join(f"{other} {reason}" for other, reason in choice.passed_over.items())
    return f"{name}: it comes first and takes the problem; the cost model chose the kernel (convext.tune measures)"
