"""Charts of results, drawn by matplotlib from what files of results hold: SVG for pages, whose colours follow the
page's, and pictures for documents."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

WIDTH = 4.2  # inches: on a phone of 375 pixels a point is then more than one
_FONT = 9.0


@dataclass(frozen=True)
class Theme:
    """ink, faint: text and lines; loss: what is slower; series: of the baseline, of convext, of who stands
    beside."""

    background: str
    ink: str
    faint: str
    loss: str
    series: tuple[str, ...]


LIGHT = Theme(
    *("#ffffff", "#1f2328", "#c9ced6", "#b3261e"),
    ("#9a6700", "#0b57d0", "#6e7781", "#1a7f37", "#8250df", "#bf3989", "#0e7490", "#57606a", "#953800", "#4d7c0f"),
)
DARK = Theme(
    *("#12161c", "#e6e9ee", "#3d444d", "#ff8a80"),
    ("#e3b341", "#7ab7ff", "#9aa4b0", "#56d364", "#c297ff", "#ff9bce", "#67d5e8", "#c9d1d9", "#ffb77c", "#b5e07a"),
)
# Stand-ins for the page's own colours, which differ by the reader's setting.
_VARIABLES = Theme("#010101", "#010102", "#010103", "#010104", tuple(f"#0102{n:02x}" for n in range(10)))
_OWN_COLOUR = {"ATen": 0, "eager": 0, "convext": 1, "selected": 1}  # the others take theirs in order


def variables(theme: Theme) -> dict[str, str]:
    """The CSS variables that a chart in a page uses, with a theme's colours."""
    named = {"background": theme.background, "ink": theme.ink, "faint": theme.faint, "loss": theme.loss}
    return named | {f"series-{n}": colour for n, colour in enumerate(theme.series)}


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: for each label one a series, None where there is none, and a note behind the group's last bar.

    spread: half of the distance between the quartiles of each, or None. losses: of labels whose note is one.
    """

    title: str
    unit: str
    labels: Sequence[str]
    series: dict[str, Sequence[float | None]]
    notes: Sequence[str] = ()
    losses: frozenset[int] = frozenset()
    spread: dict[str, Sequence[float | None]] | None = None
    line: float | None = None  # drawn through all groups

    def figure(self, theme: Theme) -> Figure:
        count, each = len(self.labels), len(self.series)
        height = 0.8 + count * (0.12 + 0.13 * each)
        figure, axes = _axes(theme, height)
        thick = 0.84 / each
        longest = max(v for values in self.series.values() for v in values if v is not None)
        others = [name for name in self.series if name not in _OWN_COLOUR]
        for index, (name, values) in enumerate(self.series.items()):
            colour = _OWN_COLOUR[name] if name in _OWN_COLOUR else 2 + others.index(name) % (len(theme.series) - 2)
            places = [row - 0.42 + thick * (index + 0.5) for row in range(count)]
            there = [row for row in range(count) if values[row] is not None]
            around: Sequence[float | None] = self.spread[name] if self.spread else [None] * count
            axes.barh(
                [places[row] for row in there],
                [values[row] for row in there],
                thick * 0.92,
                color=theme.series[colour],
                label=name,
                xerr=[around[row] or 0.0 for row in there] if self.spread else None,
                error_kw={"ecolor": theme.ink, "elinewidth": 0.8},
            )
        for row, note in enumerate(self.notes):
            end = max(values[row] or 0.0 for values in self.series.values())
            lost = row in self.losses
            style = {"color": theme.loss, "fontweight": "bold"} if lost else {"color": theme.ink}
            axes.text(end + 0.01 * longest, row, note, va="center", fontsize=_FONT - 1.5, **style)
        if self.line is not None:
            axes.axvline(self.line, color=theme.ink, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(count), self.labels)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(0, longest * (1.22 if self.notes else 1.08))
        axes.set_xlabel(self.unit)
        axes.grid(axis="x", color=theme.faint, linewidth=0.5)
        _finish(figure, axes, theme, self.title)
        return figure


@dataclass(frozen=True)
class Roofline:
    """GFLOP/s over FLOP a byte: a point for every layer and pass, of ATen hollow and of the selected kernel full."""

    title: str
    ceilings: dict[str, Any]  # of `machine.Ceilings`
    points: dict[str, Sequence[tuple[float, float, float]]]  # pass -> (FLOP a byte, of ATen FLOP/s, of the selected)

    def figure(self, theme: Theme) -> Figure:
        figure, axes = _axes(theme, 3.9)
        flops, copy = self.ceilings["flops"], self.ceilings["copy_bytes"]
        knee = flops / copy
        intensities = [knee, *(x for points in self.points.values() for x, _, _ in points)]
        low, high = min(intensities) / 2, max(intensities) * 1.6
        roof = sorted({low, knee, high})
        axes.plot(roof, [min(x * copy, flops) / 1e9 for x in roof], color=theme.ink, linewidth=1.2)
        for (name, points), marker in zip(self.points.items(), "o^sD"):
            x, before, after = zip(*points)
            kept = {"marker": marker, "s": 16, "linewidths": 0.9}
            hollow = {"facecolors": "none", "edgecolors": theme.series[0]}
            axes.scatter(x, [y / 1e9 for y in before], label=f"{name}, ATen", **kept, **hollow)
            axes.scatter(x, [y / 1e9 for y in after], label=f"{name}, selected", color=theme.series[1], **kept)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(low, high)
        axes.set_xlabel("FLOP a byte that must move")
        axes.set_ylabel("GFLOP/s")
        axes.grid(color=theme.faint, linewidth=0.5)
        _finish(figure, axes, theme, self.title, columns=2)
        return figure


Chart = Bars | Roofline


def _axes(theme: Theme, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    axes.tick_params(which="both", colors=theme.ink, labelsize=_FONT - 1, length=2)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, axes: Any, theme: Theme, title: str, columns: int = 3) -> None:
    axes.xaxis.label.set(color=theme.ink, fontsize=_FONT)
    axes.yaxis.label.set(color=theme.ink, fontsize=_FONT)
    figure.suptitle(title, color=theme.ink, fontsize=_FONT + 1)
    columns = min(columns, len(axes.get_legend_handles_labels()[1]))
    where = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(labelcolor=theme.ink, fontsize=_FONT - 1, columnspacing=1.0, handletextpad=0.5, **where)


def _drawn(figure: Figure, format_: str, metadata: dict[str, str | None], **how: Any) -> bytes:
    import matplotlib

    written = io.BytesIO()
    # The same figures give the same bytes: no date, and names of parts that follow from what they are.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "convext", "font.family": "sans-serif"}):
        figure.savefig(written, format=format_, metadata=metadata, facecolor=figure.get_facecolor(), **how)
    return written.getvalue()


def inline(chart: Chart, name: str, told: str) -> str:
    """An <svg> element for a page: `name` is in front of every id, and `told` is what it says to those who do not see
    it."""
    text = _drawn(chart.figure(_VARIABLES), "svg", {"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\b(id|href)="(#?)', rf'\1="\2{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"font: [\d.]+px[^;\"]*", lambda found: re.sub(r"'[^']*'.*$", "inherit", found[0]), text)
    for variable, colour in variables(_VARIABLES).items():
        text = text.replace(colour, f"var(--{variable})")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    heading = f'<title id="{name}-title">{_escaped(chart.title)}</title><desc id="{name}-desc">{_escaped(told)}</desc>'
    return re.sub(
        r"<svg[^>]*>",
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="0 0 {width} {height}">{heading}',
        text,
        count=1,
    ).strip()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write(chart: Chart, path: Path, theme: Theme, description: str) -> None:
    """A PNG, with a description that `description_of` reads."""
    path.write_bytes(_drawn(chart.figure(theme), "png", {"Software": None, "Description": description}, dpi=200))


def description_of(path: Path) -> str:
    """What `write` wrote into a picture besides the picture. Raises ValueError where there is nothing."""
    found = re.search(rb"tEXtDescription\0([0-9a-f]+)", path.read_bytes())
    if found is None:
        raise ValueError(f"{path} has no description")
    return found[1].decode()
