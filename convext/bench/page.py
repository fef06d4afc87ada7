"""One self-contained page of results: charts and tables, light or dark by the reader's setting, without scripts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from . import charts, problems
from .charts import Bars, Chart, Roofline
from .tables import Grid

Contents = dict[str, Any]  # of a file of results, as `results.read` gives it


@dataclass
class Section:
    """A part of the page: sentences, charts each with what it says in words, and a table."""

    title: str
    lines: list[str] = field(default_factory=list)
    charts: list[tuple[Chart, str]] = field(default_factory=list)
    grid: Grid | None = None
    losses: frozenset[int] = frozenset()  # rows of the grid where convext is behind


def sections(contents: Contents) -> list[Section]:
    """What a page says of a file of results: of `bench layers`, `bench model` or `bench kernelbench`. Raises ValueError
    for any other."""
    first = next(iter(contents["results"]), {})
    if "case" in first:
        return _models(contents)
    if "selected" in first:
        return _layers(contents)
    if "level" in first:
        return _kernelbench(contents)
    raise ValueError("expected results of bench layers, bench model or bench kernelbench")


# ---- single layers --------------------------------------------------------------------------------------------------


def layer_of(row: dict[str, Any]) -> problems.Layer:
    """The layer that a row of `bench layers` measured."""
    return problems.Layer(problems.parse(row["problem"]).problem, row.get("transposed", False))


def before_after(row: dict[str, Any]) -> tuple[float, float]:
    """Seconds that ATen took for a row of `bench layers`, and those of the selected kernel."""
    return row["seconds"]["aten"]["median_s"], row["seconds"][row["selected"]]["median_s"]


def _bytes(p: Any) -> float:
    return float((p.x_size + p.y_size + p.w_size) * p.dtype.torch.itemsize)


def roofline(contents: Contents) -> Roofline:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in contents["results"]:
        problem, (before, after) = layer_of(row).problem, before_after(row)
        point = problem.flops / _bytes(problem), problem.flops / before, problem.flops / after
        points.setdefault(row["pass"], []).append(point)
    return Roofline(f"Roofline: {_setting(contents)}", contents["machine"]["ceilings"], points)


def bars_by_layer(contents: Contents, pass_: str) -> Bars:
    rows = [row for row in contents["results"] if row["pass"] == pass_]
    pairs = [before_after(row) for row in rows]
    labels = [problems.title(*layer_of(row)).replace("->", "→") for row in rows]
    return Bars(
        f"{pass_} by layer: {contents['machine']['setting']['model']}",
        "ms a call",
        labels,
        {"ATen": [before * 1e3 for before, _ in pairs], "selected": [after * 1e3 for _, after in pairs]},
        notes=[f"{before / after:.2f}×" for before, after in pairs],
        losses=frozenset(n for n, (before, after) in enumerate(pairs) if before < after),
    )


def _setting(contents: Contents) -> str:
    told = contents["machine"]["setting"]
    images = f", batch {told['batch']}" if told.get("batch") else ""
    return f"{told['model']}{images}, {told['dtype']}, {contents['machine']['ceilings']['where']}"


def _layers(contents: Contents) -> list[Section]:
    rows, machine = contents["results"], contents["machine"]
    section = Section(f"Layers: {_setting(contents)}")
    section.lines += [_sum_of_pass(name, rows) for name in dict.fromkeys(row["pass"] for row in rows)]
    ceilings = machine["ceilings"]
    section.lines.append(
        f"Ceilings of this machine, measured in the same run: {ceilings['where']}: {ceilings['unit']} "
        f"{ceilings['flops'] / 1e9:.0f} GFLOP/s, copy {ceilings['copy_bytes'] / 1e9:.1f} GB/s. A point above the roof "
        "is no error: taps in the padding count but need not be computed, fast algorithms multiply less, and what "
        f"stays in the caches is not bound by the copy. Caches are {_caches(machine)}."
    )
    told = (
        "GFLOP/s over FLOP a byte of every layer and pass, ATen's hollow, the selected kernel's full, under the roof "
    )
    section.charts.append((roofline(contents), told + "of this machine. The table below has every figure."))
    for name in dict.fromkeys(row["pass"] for row in rows):
        chart = bars_by_layer(contents, name)
        behind = len(chart.losses)
        words = (
            f"Milliseconds of {len(chart.labels)} layers, ATen's and the selected kernel's; behind ATen in {behind}."
        )
        section.charts.append((chart, words))
    columns = ["layer", "runs", "pass", "ATen, ms", "selected, ms", "times as fast", "GFLOP/s", "GB/s", "of ceiling"]
    section.grid = Grid([*columns, "kernel"])
    lost = set()
    for number, row in enumerate(rows):
        layer, (before, after) = layer_of(row), before_after(row)
        flops, moved = layer.problem.flops / after, _bytes(layer.problem) / after
        share, which = max((flops / ceilings["flops"], "FLOP"), (moved / ceilings["copy_bytes"], "copy"))
        if after > before:
            lost.add(number)
        section.grid.rows.append(
            [problems.title(*layer), str(row["count"]), row["pass"], _ms(row["seconds"]["aten"])]
            + [_ms(row["seconds"][row["selected"]]), f"{before / after:.2f}" + " (slower)" * (after > before)]
            + [f"{flops / 1e9:.0f}", f"{moved / 1e9:.1f}", f"{share:.0%} {which}", row["variant"]]
        )
    section.losses = frozenset(lost)
    return [section]


def _caches(machine: dict[str, Any]) -> str:
    known = machine["setting"].get("caches") or ("warm" if machine["device"] == "cpu" else "cold")
    return str(known)


def _ms(timing: dict[str, Any]) -> str:
    """Median, and between which quartiles where they are known."""
    median, quartiles = timing["median_s"] * 1e3, timing.get("quartiles_s")
    if quartiles is None:
        return f"{median:.3f} ± {timing['iqr_s'] * 1e3:.3f}"
    return f"{median:.3f} ({quartiles[0] * 1e3:.3f}–{quartiles[1] * 1e3:.3f})"


def _sum_of_pass(name: str, rows: Sequence[dict[str, Any]]) -> str:
    pairs = [(row["count"], *before_after(row)) for row in rows if row["pass"] == name]
    before, after = (sum(pair[0] * pair[place] for pair in pairs) for place in (1, 2))
    behind = sum(b < a for _, b, a in pairs)
    return (
        f"{name}: all layers, as often as they run: ATen {before * 1e3:.2f} ms, selected {after * 1e3:.2f} ms, "
        f"{before / after:.2f} times as fast; behind ATen on {behind} of {len(pairs)}."
    )


# ---- whole networks -------------------------------------------------------------------------------------------------


def _key(case: dict[str, Any]) -> tuple[int, int, str, bool]:
    return case["threads"], case["batch"], case["dtype"], case["train"]


def bars_by_network(contents: Contents, names: dict[str, str] | None = None) -> Iterator[Bars]:
    """Times as fast as eager: a chart for each batch, number of threads and type. names: what networks are called."""
    rows = contents["results"]
    for threads, batch, dtype, train in sorted({_key(row["case"]) for row in rows}):
        here = [row for row in rows if _key(row["case"]) == (threads, batch, dtype, train)]
        contenders = list(dict.fromkeys(name for row in here for name in row["candidates"] if name != "eager"))
        series: dict[str, list[float | None]] = {name: [] for name in contenders}
        spread: dict[str, list[float | None]] = {name: [] for name in contenders}
        for row in here:
            for name in contenders:
                found = row["candidates"].get(name)
                series[name].append(found and found["times_eager"])
                share = found and found["iqr_s"] / found["median_s"] / 2
                spread[name].append(share and share * found["times_eager"])
        what = "Training step" if train else "Inference"
        setting = f"{what}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}, {dtype}"
        labels = [(names or {}).get(row["case"]["model"], row["case"]["model"]) for row in here]
        yield Bars(
            setting,
            "times as fast as eager PyTorch",
            labels,
            series,
            spread=spread,
            line=1.0,
        )


def _models(contents: Contents) -> list[Section]:
    section = Section("Networks")
    for chart in bars_by_network(contents):
        ours = [value for value in chart.series.get("convext", ()) if value is not None]
        words = f"Times as fast as eager PyTorch of {len(chart.labels)} networks"
        words += f"; convext {min(ours):.2f} to {max(ours):.2f}." if ours else "."
        section.charts.append((chart, words))
    for threads, batch, dtype, train in sorted({_key(row["case"]) for row in contents["results"]}):
        ratios = [
            row["candidates"]["convext"]["times_eager"]
            for row in contents["results"]
            if _key(row["case"]) == (threads, batch, dtype, train) and "convext" in row["candidates"]
        ]
        if ratios:
            section.lines.append(
                f"Batch {batch}, {threads} thread{'s' if threads > 1 else ''}, {dtype}: convext is "
                f"{statistics.geometric_mean(ratios):.2f} times as fast as eager in geometric mean over {len(ratios)} "
                f"networks, least {min(ratios):.2f}, slower on {sum(r < 1 for r in ratios)}."
            )
    columns = ["network", "batch", "threads", "type", "contender", "ms", "images/s", "times eager", "error"]
    section.grid = Grid([*columns, "peak, MiB"])
    lost, skipped = set(), {}
    for row in contents["results"]:
        case = row["case"]
        setting = [case["model"], str(case["batch"]), str(case["threads"]), case["dtype"]]
        for name, found in row["candidates"].items():
            peak = row.get("memory", {}).get(name, {}).get("peak_bytes")
            slower = name == "convext" and found["times_eager"] < 1
            if slower:
                lost.add(len(section.grid.rows))
            section.grid.rows.append(
                [*setting, name, _ms(found), f"{case['batch'] / found['median_s']:.1f}"]
                + [f"{found['times_eager']:.2f}" + " (slower)" * slower, f"{found['distance']:.0e}"]
                + ["–" if peak is None else f"{peak / 2**20:.1f}"]
            )
        skipped |= {f"Not timed: {name}: {why}": None for name, why in row["skipped"].items()}
    section.lines += list(skipped)
    section.losses = frozenset(lost)
    return [section]


# ---- KernelBench ----------------------------------------------------------------------------------------------------


def _kernelbench(contents: Contents) -> list[Section]:
    found = []
    for level in sorted({row["level"] for row in contents["results"]}):
        rows = [row for row in contents["results"] if row["level"] == level]
        timed = [row for row in rows if row["seconds"]]
        section = Section(f"KernelBench, level {level}")
        section.lines.append(f"{sum(row['ok'] for row in rows)} of {len(rows)} right by its rule.")
        if timed:
            over = [name for name in ("eager", "torch.compile") if any(f"times_{name}" in row for row in timed)]
            chart = Bars(
                f"KernelBench, level {level}",
                "how many times as fast convext is",
                [f"{row['number']} {row['name'][:28]}" for row in timed],
                {f"over {name}": [row.get(f"times_{name}") for row in timed] for name in over},
                line=1.0,
            )
            section.charts.append((chart, f"How many times as fast as {' and '.join(over)}, of {len(timed)} problems."))
        columns = ["problem", "right", "convext, ms", "eager, ms", "times eager", "times torch.compile", "error"]
        section.grid = Grid(columns)
        for row in rows:
            times = [f"{row[key]:.2f}" if key in row else "–" for key in ("times_eager", "times_torch.compile")]
            both = [_ms(row["seconds"][n]) if n in row["seconds"] else "–" for n in ("convext", "eager")]
            section.grid.rows.append(
                [f"{row['number']} {row['name']}", "yes" if row["ok"] else "no", *both, *times, row["error"] or "–"]
            )
        section.losses = frozenset(n for n, row in enumerate(rows) if not row["ok"] or row.get("times_eager", 1) < 1)
        found.append(section)
    return found


# ---- the page -------------------------------------------------------------------------------------------------------

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; {% for name, value in light %}--{{ name }}: {{ value }}; {% endfor %}}
@media (prefers-color-scheme: dark) {
  :root { {% for name, value in dark %}--{{ name }}: {{ value }}; {% endfor %}}
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--background); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
a { color: var(--series-1); }
a:focus-visible, [tabindex]:focus-visible, summary:focus-visible { outline: 3px solid var(--series-1);
  outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--background); padding: .25rem .5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  align-items: start; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; border: 1px solid var(--faint); border-radius: .5rem; padding: .5rem; }
figure svg { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto; }
figcaption { font-size: .875rem; padding: .25rem .5rem; }
.scroll { overflow-x: auto; border: 1px solid var(--faint); border-radius: .5rem; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: .5rem .75rem; font-weight: 600; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--faint); }
th:first-child { text-align: left; }
th[scope=row] { font-weight: 400; }
tr.loss td, tr.loss th { color: var(--loss); font-weight: 600; }
footer { font-size: .875rem; padding-bottom: 2rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
{% if sections|length > 1 %}<nav aria-label="Contents"><ul>
{% for section in sections %}<li><a href="#section-{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}</ul></nav>
{% endif %}</header>
<main id="content">
{% for section in sections %}{% set number = loop.index %}
<section id="section-{{ number }}" aria-labelledby="heading-{{ number }}">
<h2 id="heading-{{ number }}">{{ section.title }}</h2>
{% if section.lines %}<ul>
{% for line in section.lines %}<li>{{ line }}</li>
{% endfor %}</ul>{% endif %}
<div class="charts">
{% for svg, told, wide in section.drawn %}<figure{% if wide %} class="wide"{% endif %}>
{{ svg }}
<figcaption>{{ told }}</figcaption>
</figure>
{% endfor %}</div>
{% if section.grid %}<div class="scroll" role="region" tabindex="0" aria-label="Table: {{ section.title }}">
<table>
<caption>{{ section.title }}: every figure{% if section.losses %}; in red where convext is behind{% endif %}</caption>
<thead><tr>{% for column in section.grid.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.grid.rows %}<tr{% if loop.index0 in section.losses %} class="loss"{% endif %}>\
{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}</tbody>
</table>
</div>{% endif %}
</section>
{% endfor %}
</main>
<footer>
{% for line in machines %}<p>{{ line }}</p>
{% endfor %}</footer>
</body>
</html>
"""


@dataclass
class _Drawn:
    title: str
    lines: list[str]
    drawn: list[tuple[Any, str, bool]]  # an <svg>, what it says, whether it has a row of its own
    grid: Grid | None
    losses: frozenset[int]


def machine_line(record: dict[str, Any]) -> str:
    """On what a file's figures were measured, in a sentence."""
    where = record["gpu"]["name"] if record.get("gpu") else f"{record.get('cpu')}, {record.get('cores')} cores"
    versions = ", ".join(f"{name} {found}" for name, found in record.get("versions", {}).items() if found)
    return f"Measured on {where}, {record['time']}; {versions}; commit {record.get('commit') or 'unknown'}."


def render(files: Sequence[Contents], title: str = "convext: what was measured") -> str:
    """The page of one or several files of results. Raises ValueError where one is of another kind."""
    from markupsafe import Markup

    shown = []
    for contents in files:
        for section in sections(contents):
            number = len(shown) + 1
            drawn = [
                (Markup(charts.inline(chart, f"chart-{number}-{n}", told)), told, isinstance(chart, Roofline))
                for n, (chart, told) in enumerate(section.charts, 1)
            ]
            shown.append(_Drawn(section.title, section.lines, drawn, section.grid, section.losses))
    about = (
        "What is compared ran in turns in one process. Figures are medians, with the distance between the quartiles "
        "behind ±, or both quartiles in brackets; a thin line at the end of a bar is as long as that distance."
    )
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        about=about,
        sections=shown,
        machines=list(dict.fromkeys(machine_line(contents["machine"]) for contents in files)),
        light=list(charts.variables(charts.LIGHT).items()),
        dark=list(charts.variables(charts.DARK).items()),
    )
