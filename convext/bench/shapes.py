"""Convolutions of shapes drawn at random: how good the choice of who computes them is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence

import torch

from ..problem import DTYPES, ConvProblem, Layout, Pass
from ..tune import Measured
from .problems import title
from .tables import Grid

MOST_FLOPS, MOST_LAYER_FLOPS = 1.5e9, 4e9
MOST_ELEMENTS = 1 << 23  # of a layer's input and output
NOISE = 0.05  # what two measurements of one kernel may be apart


def draw(count: int | None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Pass, ConvProblem]]:
    """As many problems on the CPU, without end for None, of 1 to 512 channels, 4² to 56² pixels, 1 to 8 groups, 1 to 8
    images, filters of 1² to 7², strides, dilations and both memory formats, each with one of the passes; the same for
    each seed."""
    rng, drawn = random.Random(seed), 0
    widths = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
    while count is None or drawn < count:
        groups = rng.choice((1, 1, 1, 1, 2, 4, 8))
        c, k = groups * rng.choice(widths), groups * rng.choice(widths)
        n, side, taps = (
            rng.choice((1, 4, 8)),
            rng.choice((4, 7, 8, 14, 16, 28, 32, 56)),
            rng.choice((1, 1, 3, 3, 3, 5, 7)),
        )
        stride, dilation = rng.choice((1, 1, 1, 2)), rng.choice((1, 1, 1, 2)) if taps > 1 else 1
        layout, pass_, padding = rng.choice((Layout.NCHW, Layout.NHWC)), rng.choice(list(Pass)), taps // 2 * dilation
        problem = ConvProblem(
            n, c, side, side, k, taps, taps, stride, stride, padding, padding, dilation, dilation, groups,
            DTYPES[dtype], layout, layout, "cpu",
        )  # fmt: skip
        if max(c, k) <= 512 and problem.flops <= MOST_FLOPS:
            drawn += 1
            yield pass_, problem


# Kinds of layers, as often as networks have them, about.
_LAYERS = ("pointwise",) * 4 + ("plain",) * 3 + ("depthwise",) * 3 + ("dilated", "patches", "stem")


def draw_layers(
    count: int | None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Pass, ConvProblem]]:
    """The same of layers as networks have them: 8 to 2048 channels, 7² to 256² pixels, one and eight images; pointwise,
    plain, depthwise and dilated filters, patches that do not overlap, and stems of three channels."""
    rng, drawn = random.Random(seed), 0
    while count is None or drawn < count:
        kind, n, side = rng.choice(_LAYERS), rng.choice((1, 8)), rng.choice((7, 8, 14, 16, 28, 32, 56, 64, 112, 128))
        c, k = (8 * round(2 ** rng.uniform(0, 8)) for _ in range(2))
        groups, taps, stride, dilation, padding = 1, 3, 1, 1, 1
        if kind == "pointwise":
            taps, padding, stride = 1, 0, rng.choice((1, 1, 1, 1, 2))
            side = 1 if rng.random() < 0.15 else side  # behind a mean over an image
        elif kind == "plain":
            stride = rng.choice((1, 1, 1, 2))
        elif kind == "depthwise":
            k = groups = c
            taps, stride = rng.choice((3, 3, 5, 7)), rng.choice((1, 1, 2))
            padding = taps // 2
        elif kind == "dilated":
            dilation = padding = rng.choice((2, 4, 12, 24))
        elif kind == "patches":
            taps = stride = rng.choice((2, 4))
            padding = 0
        else:
            c, k, taps, stride, side = 3, rng.choice((16, 32, 64)), rng.choice((3, 7)), rng.choice((1, 2)), 224
            padding = taps // 2
        layout, pass_ = rng.choice((Layout.NCHW, Layout.NHWC, Layout.NHWC)), rng.choice(list(Pass))
        problem = ConvProblem(
            n, c, side, side, k, taps, taps, stride, stride, padding, padding, dilation, dilation, groups,
            DTYPES[dtype], layout, layout, "cpu",
        )  # fmt: skip
        if problem.flops <= MOST_LAYER_FLOPS and max(problem.x_size, problem.y_size) <= MOST_ELEMENTS:
            drawn += 1
            yield pass_, problem


def draw_groups(
    count: int | None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Pass, ConvProblem]]:
    """The same of 2 to 32 groups of one to 16 channels, which have kernels of their own."""
    rng, drawn = random.Random(seed), 0
    while count is None or drawn < count:
        groups, n, side = rng.choice((2, 4, 8, 16, 32)), rng.choice((1, 4, 8)), rng.choice((4, 7, 14, 28, 56))
        c, k = (groups * rng.choice((1, 2, 4, 4, 8, 8, 16)) for _ in range(2))
        taps, stride, dilation = rng.choice((1, 3, 3, 5, 7)), rng.choice((1, 1, 1, 2)), rng.choice((1, 1, 1, 2))
        layout, pass_, padding = rng.choice((Layout.NCHW, Layout.NHWC)), rng.choice(list(Pass)), taps // 2 * dilation
        problem = ConvProblem(
            n, c, side, side, k, taps, taps, stride, stride, padding, padding, dilation, dilation, groups,
            DTYPES[dtype], layout, layout, "cpu",
        )  # fmt: skip
        if problem.flops <= MOST_FLOPS:
            drawn += 1
            yield pass_, problem


def _shares(measured: Sequence[Measured]) -> list[tuple[float, float, float]]:
    """Of each problem: the best's time over that of who serves without tuning, ATen's over that, ATen's over the tuned
    choice's."""
    found = []
    for one in measured:
        seconds = one.choice.seconds
        if one.before not in seconds:
            continue
        now = seconds[one.choice.name]
        aten = next(value for name, value in seconds.items() if name.startswith("aten "))
        found.append((min(seconds.values()) / seconds[one.before], aten / seconds[one.before], aten / now))
    return found


def summary(measured: Sequence[Measured]) -> str:
    shares = _shares(measured)
    within = sum(best >= 0.9 for best, _, _ in shares) / len(shares)
    lines = [f"{len(shares)} problems; the cost model's choice is within 10 % of the best in {within:.0%}"]
    for name, place in (("by the cost model", 1), ("tuned", 2)):
        ratios = [share[place] for share in shares]
        lines.append(
            f"{name}: {statistics.geometric_mean(ratios):.2f} times as fast as ATen in geometric mean, slower beyond "
            f"noise in {sum(ratio < 1 - NOISE for ratio in ratios)}, least {min(ratios):.2f}"
        )
    return "\n".join(lines)


def table(measured: Sequence[Measured]) -> Grid:
    """Those where another than who served before is faster by 10 %."""
    grid = Grid(["problem", "pass", "n", "by the cost model", "ms", "best", "ms"])
    for one in measured:
        seconds = one.choice.seconds
        fastest = min(seconds, key=seconds.__getitem__)
        if one.before in seconds and seconds[fastest] < 0.9 * seconds[one.before]:
            grid.rows.append(
                [title(one.problem), one.pass_.name.lower(), str(one.problem.n), one.before.split(" ", 1)[1]]
                + [f"{seconds[one.before] * 1e3:.3f}", fastest.split(" ", 1)[1], f"{seconds[fastest] * 1e3:.3f}"]
            )
    return grid


def as_json(one: Measured) -> dict[str, object]:
    return {
        "problem": str(one.problem),
        "layout": one.problem.x_layout.name,
        "pass": one.pass_.name.lower(),
        "by the cost model": one.before,
        "tuned": one.choice.name,
        "seconds": one.choice.seconds,
    }
