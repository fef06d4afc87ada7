"""The figures of README.md and docs/networks.md, out of the files in benchmarks/results: tables, sentences and
pictures, so that none of them is typed by hand.

Each part stands between `<!-- figures: NAME -->` and `<!-- end of NAME -->`; `convext bench figures` writes what is in
between anew, and the pictures in benchmarks/pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..options import UsageError
from . import calibrate, charts, coverage, page, results
from .page import Contents
from .problems import ROOT
from .shapes import NOISE
from .tables import Grid

NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "deeplabv3_resnet50": "DeepLabV3-ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_large": "MobileNetV3-Large",
    "efficientnet_b0": "EfficientNet-B0",
    "convnext_tiny": "ConvNeXt-T",
}
ENGINES = ("convext", "ONNX Runtime", "OpenVINO")


def contents(name: str, root: Path = ROOT) -> Contents:
    """A file of benchmarks/results."""
    return results.read(root / "benchmarks" / "results" / f"{name}.json")


def _rows(found: Contents, **wanted: Any) -> Iterator[dict[str, Any]]:
    return (row for row in found["results"] if all(row["case"][key] == value for key, value in wanted.items()))


def _models(found: Contents) -> list[str]:
    return list(dict.fromkeys(row["case"]["model"] for row in found["results"]))


def _times(row: dict[str, Any], name: str, over: str = "eager") -> float:
    """How many times as fast one contender is as another: the median over rounds beside eager, else of both medians."""
    candidates = row["candidates"]
    if over == "eager":
        return float(candidates[name]["times_eager"])
    return float(candidates[over]["median_s"] / candidates[name]["median_s"])


def inference(root: Path = ROOT) -> str:
    """Times as fast as eager, a row a network and batch, on one thread and on two; the fastest in bold."""
    found = contents("cpu_inference", root)
    two = [f"{ENGINES[0]}, 2 threads", *ENGINES[1:]]
    grid = Grid(["network", "batch", *ENGINES, *two])
    for model in _models(found):
        for batch in sorted({row["case"]["batch"] for row in _rows(found, model=model)}):
            cells = [NAMES[model], str(batch)]
            for threads in (1, 2):
                (row,) = _rows(found, model=model, batch=batch, threads=threads)
                ratios = [_times(row, name) if name in row["candidates"] else None for name in ENGINES]
                best = max(ratio for ratio in ratios if ratio is not None)
                bold = ["**" * (ratio == best) for ratio in ratios]
                cells += ["–" if r is None else f"{mark}{r:.2f}{mark}" for r, mark in zip(ratios, bold)]
            grid.rows.append(cells)
    return grid.markdown()


def training(root: Path = ROOT) -> str:
    """A step's times as fast as eager's in channels_last, a row a number of threads."""
    found = contents("cpu_training", root)
    grid = Grid(["threads", *(NAMES[model] for model in _models(found))], names=0)
    for threads in sorted({row["case"]["threads"] for row in found["results"]}):
        rows = [row for model in _models(found) for row in _rows(found, model=model, threads=threads)]
        grid.rows.append([str(threads), *(f"{_times(row, 'convext', 'eager channels-last'):.2f}" for row in rows)])
    return grid.markdown()


_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def compiled(root: Path = ROOT) -> str:
    found = contents("cpu_torch_compile", root)
    ratios = [_times(row, "convext", "torch.compile, freezing") for row in found["results"]]
    return (
        "On one thread, with one and eight images, "
        f"{_COUNTS[len(_models(found))]} of these networks are {statistics.geometric_mean(ratios):.2f} times as fast "
        f"as under `torch.compile` with freezing in geometric mean, each {min(ratios):.2f} to {max(ratios):.2f} times "
        "([figures](benchmarks/results/cpu_torch_compile.json))."
    )


def bfloat16(root: Path = ROOT) -> str:
    found, told = contents("cpu_bfloat16", root), []
    for model in _models(found):
        ratios = [_times(row, "convext", "OpenVINO") for row in _rows(found, model=model)]
        told.append(f"{NAMES[model]} at {min(ratios):.2f} to {max(ratios):.2f}")
    return (
        f"In `bfloat16`, on a CPU that multiplies it, convext runs {' and '.join(told)} times the speed of "
        "OpenVINO's `bfloat16`, over one and eight images and one and two threads "
        "([figures](benchmarks/results/cpu_bfloat16.json))."
    )


def choice(root: Path = ROOT) -> str:
    """Of `convext bench calibrate --check` and, of what is measured, `convext bench shapes`."""
    drawn = contents("cpu_choice", root)
    summary = drawn["machine"]["summary"]["shapes at random"]
    one, eight = (
        contents(f"cpu_choice_networks_{n}", root)["machine"]["summary"][f"{n} at a time"]["within"] * 100
        for n in (1, 8)
    )
    besides = [row for row in drawn["results"] if row["group"] == calibrate.BESIDE]
    slower = sum(row["speed"] < 1 - NOISE and row["upper"] < 1 for row in besides)
    tuned = []
    for row in contents("cpu_shapes", root)["results"]:
        seconds = row["seconds"]
        tuned.append(next(s for name, s in seconds.items() if name.startswith("aten ")) / seconds[row["tuned"]])
    return (
        "Which kernel computes, or ATen, is chosen by the time that is expected of each, from a table that was "
        "measured on the machine above. How good that is, `convext bench calibrate --check` measures, on one thread, "
        f"over other shapes than the table was fitted to. Of {summary['problems']} drawn at random, all three passes "
        f"and both memory formats, the choice is within 10 % of the best in {summary['within'] * 100:.0f} %, and "
        f"{summary['times_as_fast_as_aten']:.2f} times as fast as ATen in geometric mean; `convext.conv2d` is slower "
        f"than `F.conv2d` beyond noise in {slower} of {len(besides)}, at worst "
        f"{min(row['speed'] for row in besides):.2f} times as fast ([figures](benchmarks/results/cpu_choice.json)). Of "
        "every pass over the layers of ResNet-50, MobileNetV2, EfficientNet-B0, ConvNeXt-T, DeepLabV3 and a U-Net it "
        f"is within 10 % in {one:.0f} % at one image ([figures](benchmarks/results/cpu_choice_networks_1.json)) and in "
        f"{eight:.0f} % at eight ([figures](benchmarks/results/cpu_choice_networks_8.json)). `convext.tune` "
        f"measures the layers of a network themselves: of {len(tuned)} shapes drawn at random its choice was slower "
        f"than ATen by more than {NOISE * 100:.0f} % in {sum(ratio < 1 - NOISE for ratio in tuned)}, at worst "
        f"{min(tuned):.2f} times as fast ([figures](benchmarks/results/cpu_shapes.json))."
    )


def layers(root: Path = ROOT) -> str:
    """Of `convext bench layers`: each file's sums, losses counted."""
    told = []
    for model in ("resnet50", "mobilenet_v2"):
        found = contents(f"cpu_layers_{model}", root)
        link = f"[{NAMES[model]}](benchmarks/results/cpu_layers_{model}.json)"
        ratios, behind = {}, sum(before < after for before, after in map(page.before_after, found["results"]))
        for name in dict.fromkeys(row["pass"] for row in found["results"]):
            pairs = [(row["count"], *page.before_after(row)) for row in found["results"] if row["pass"] == name]
            ratios[name] = sum(n * before for n, before, _ in pairs) / sum(n * after for n, _, after in pairs)
        passes = ", ".join(f"{ratio:.2f} in {name}" for name, ratio in ratios.items())
        told.append(f"{link} {passes}, behind ATen on {behind} of {len(found['results'])}")
    return (
        "Layer by layer beside ATen, `convext bench layers`, one thread, times as fast over all layers as often as "
        f"they run: {'; '.join(told)}. The command prints each layer's share of the FMA units' or the memory's speed."
    )


# Kind of call in a file of `convext bench host` -> how the README calls it.
_CALLS = {
    "conv2d": "`conv2d`",
    "conv2d, recorded": "with its graph recorded",
    "conv2d and its backward": "and its backward pass run",
    "layer, recorded": "`Conv2d`, recorded",
    "swapped layer, recorded": "a swapped `torch.nn.Conv2d`, recorded",
    "swapped layer": "without gradients",
}


def host(root: Path = ROOT) -> str:
    """Of `convext bench host`: microseconds a call."""
    rows = {row["what"]: row for row in contents("cpu_host", root)["results"]}
    grid = Grid(["", "PyTorch", "convext", "times PyTorch's"])
    for what, told in _CALLS.items():
        pytorch, convext = (f"{rows[what][name]['seconds'] * 1e6:.2f}" for name in ("pytorch", "convext"))
        grid.rows.append([told, pytorch, convext, f"{rows[what]['ratio']:.2f}"])
    return grid.markdown()


def _networks(root: Path) -> list[coverage.Outcome]:
    known = {field.name for field in dataclasses.fields(coverage.Outcome)} - {"timings"}
    rows = contents("cpu_networks", root)["results"]
    return [coverage.Outcome(**{name: row[name] for name in known}) for row in rows]


def networks(root: Path = ROOT) -> str:
    """Of `convext bench networks`, in one sentence."""
    return (
        f"Of torchvision's and timm's networks, one of each family: {coverage.summary(_networks(root))} "
        "([each one](docs/networks.md))."
    )


def every_network(root: Path = ROOT) -> str:
    grid = coverage.table(_networks(root))
    grid.columns.pop()  # they were not timed
    for row in grid.rows:
        row.pop()
    return grid.markdown()


PARTS: dict[str, Callable[[Path], str]] = {
    "inference": inference,
    "torch.compile": compiled,
    "training": training,
    "bfloat16": bfloat16,
    "layers": layers,
    "choice": choice,
    "host": host,
    "networks": networks,
    "every network": every_network,
}
ELSEWHERE = {"every network": "docs/networks.md"}  # than in the README


def _between(name: str) -> re.Pattern[str]:
    name = re.escape(name)
    return re.compile(rf"(<!-- figures: {name} -->\n)(.*?)(\n<!-- end of {name} -->)", re.S)


def parts(root: Path = ROOT) -> dict[str, str]:
    """What stands between the marks of each name."""
    made = {name: make(root) for name, make in PARTS.items()}
    filled = {name: text if text.startswith("|") else _filled(text) for name, text in made.items()}
    return filled | {name: _embedded(name) for name in PICTURES}


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


# Name of a picture -> (what it says to those who do not see it, the chart).
PICTURES: dict[str, tuple[str, Callable[[Path], charts.Chart]]] = {
    "speed_up": (
        "Times as fast as eager PyTorch of seven networks, batch 1, one thread: convext, ONNX Runtime, OpenVINO, and "
        "eager channels-last; the figures are those of the table below",
        lambda root: next(page.bars_by_network(contents("cpu_inference", root), NAMES)),
    ),
    "roofline": (
        "GFLOP/s of every layer and pass of ResNet-50, ATen's and the selected kernel's, under the roof of the machine",
        lambda root: page.roofline(contents("cpu_layers_resnet50", root)),
    ),
}
THEMES = {"light": charts.LIGHT, "dark": charts.DARK}


def _embedded(name: str) -> str:
    place, told = f"benchmarks/pictures/{name}", PICTURES[name][0]
    return "\n".join(
        (
            "<picture>",
            f'<source media="(prefers-color-scheme: dark)" srcset="{place}_dark.png">',
            f'<img alt="{told}" src="{place}_light.png" width="560">',
            "</picture>",
        )
    )


def digest(chart: charts.Chart) -> str:
    """Of all that a chart says: a picture carries it, so that one that is out of date is found."""
    return hashlib.sha256(repr(chart).encode()).hexdigest()[:16]


def write(root: Path = ROOT) -> list[Path]:
    """Writes the documents and the pictures anew; returns the files. Raises UsageError where there is no source tree,
    or a part has no place in its document."""
    if not (root / "benchmarks" / "results").is_dir() or not (root / "README.md").exists():
        raise UsageError(
            "bench figures: README.md and benchmarks/results are in the sources: run it in the source tree"
        )
    texts = {name: (root / name).read_text(encoding="utf-8") for name in ("README.md", *set(ELSEWHERE.values()))}
    for name, part in parts(root).items():
        document = ELSEWHERE.get(name, "README.md")
        replaced = _between(name).subn(lambda found, part=part: found[1] + part + found[3], texts[document])
        texts[document], count = replaced
        if count != 1:
            raise UsageError(f"bench figures: {document} has {count} places for {name!r}, expected one")
    written = [root / document for document in texts]
    for path, text in zip(written, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    (root / "benchmarks" / "pictures").mkdir(exist_ok=True)
    for name, (_, make) in PICTURES.items():
        chart = make(root)
        for theme, colours in THEMES.items():
            written.append(root / "benchmarks" / "pictures" / f"{name}_{theme}.png")
            charts.write(chart, written[-1], colours, digest(chart))
    return written
