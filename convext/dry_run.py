"""Who would serve each layer of a network on a device that need not be here: by the selection alone."""

from __future__ import annotations

import collections
import dataclasses

from .bench.problems import title
from .bench.tables import Grid
from .problem import ConvProblem, DType, Layout, Pass

DEVICES = {"cpu": 0, "cuda": 1}  # `Device` in conv_problem.h


def kernel(problem: ConvProblem, pass_: Pass) -> tuple[str | None, str]:
    """(name of the compiled kernel that takes the problem, ""), or (None, why not)."""
    from .backends import native_cuda

    if problem.device == "cuda":
        reason = native_cuda.not_built() or native_cuda.BACKEND.reject(pass_, problem)
        return (native_cuda.BACKEND.variant(pass_, problem), "") if reason is None else (None, reason)
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the compiled library does not load ({error})"
    image, depth = problem.image_extents(), problem.depth_extents()
    fields = [*image, problem.dtype, problem.x_layout, problem.y_layout, *depth]
    index = _C.select(DEVICES[problem.device], pass_, fields)
    if index >= 0:
        return _C.variants()[index]["name"], ""
    reasons = _C.reject_reasons(DEVICES[problem.device], pass_, fields)
    if not reasons:
        return None, f"no {problem.device} kernels are compiled into this build"
    return None, native_cuda.in_words(reasons)


def table(problems: dict[ConvProblem, int], device: str, dtypes: list[DType]) -> tuple[Grid, dict[str, int]]:
    """One row a layer and dtype, one column a pass, "none" where no compiled kernel serves; and why, each reason with
    how many entries it holds for."""
    grid = Grid(["layer", "n", "dtype", *(pass_.name.lower() for pass_ in Pass)], names=6)
    reasons: collections.Counter[str] = collections.Counter()
    for problem, count in problems.items():
        for dtype in dtypes:
            asked = dataclasses.replace(problem, device=device, dtype=dtype, x_layout=Layout.NHWC, y_layout=Layout.NHWC)
            found = [kernel(asked, pass_) for pass_ in Pass]
            reasons.update(reason for name, reason in found if name is None)
            grid.rows.append([title(problem), str(count), dtype.name.lower(), *(name or "none" for name, _ in found)])
    return grid, dict(reasons)
