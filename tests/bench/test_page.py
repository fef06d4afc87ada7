"""The page of results: well-formed, accessible and self-contained by its text, and without errors in a real browser."""

import copy
import csv
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from convext import cli
from convext.bench import charts, page, results

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "device": "cpu",
    "gpu": None,
    "cpu": "a <CPU> & more",
    "cores": 2,
    "time": "then",
    "versions": {"torch": "2"},
}
CEILINGS = {"where": "1 thread", "unit": "float32 FMA", "flops": 1e11, "copy_bytes": 1e10}


def timing(median):
    return {"median_s": median, "iqr_s": median / 10, "quartiles_s": [median * 0.95, median * 1.05]}


def layers_contents():
    setting = {"model": "unet", "batch": 2, "dtype": "float32", "caches": "warm"}
    rows = [
        ("x 2x8x9x9, w 8x8x3x3, float32, cpu", False, "fprop", 2e-6, 1e-6),
        ("x 2x8x9x9, w 8x8x3x3, float32, cpu", False, "dgrad", 1e-6, 4e-6),
        ("x 2x4x18x18, w 8x4x2x2, stride 2, float32, cpu", True, "fprop", 5e-6, 4e-6),
    ]
    found = [
        {"problem": problem, "transposed": transposed, "count": 3, "pass": pass_, "selected": "native", "variant": "v",
         "seconds": {"aten": timing(aten), "native": timing(native)}, "off": {}}
        for problem, transposed, pass_, aten, native in rows
    ]  # fmt: skip
    return {"machine": MACHINE | {"setting": setting, "ceilings": CEILINGS}, "results": found}


def model_contents():
    case = {"model": "resnet18", "batch": 8, "threads": 1, "dtype": "float32", "train": False}
    candidates = {
        "eager": timing(0.1) | {"times_eager": 1.0, "distance": 0.0},
        "convext": timing(0.2) | {"times_eager": 0.5, "distance": 1e-6},
        "OpenVINO": timing(0.05) | {"times_eager": 2.0, "distance": 1e-6},
    }
    memory = {"eager": {"saved_bytes": 0, "peak_bytes": 3 << 20}}
    first = {"case": case, "candidates": candidates, "skipped": {"ncnn": "not <installed>"}, "memory": memory}
    second = copy.deepcopy(first)
    second["case"]["model"] = "resnet50"
    del second["candidates"]["OpenVINO"]
    return {"machine": MACHINE, "results": [first, second]}


def kernelbench_contents():
    row = {"level": 1, "number": 50, "name": "a_convolution", "ok": True, "error": ""}
    times = {"times_eager": 1.5, "times_torch.compile": 0.8, "seconds": {"eager": timing(0.3), "convext": timing(0.2)}}
    broken = {**row, "number": 51, "ok": False, "error": "RuntimeError: no", "seconds": {}}
    return {"machine": MACHINE, "results": [row | times, broken]}


VOID = {"meta", "link", "br", "img", "input", "hr"}


class Read(HTMLParser):
    """The elements of a page, each with its attributes and its text; raises where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [name for name, _ in self.open], []))
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self.open.append((tag, self.elements[-1][3]))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, text in self.open:
            text.append(data)

    def all(self, tag):
        return [
            (attributes, parents, "".join(text)) for name, attributes, parents, text in self.elements if name == tag
        ]


@pytest.fixture(scope="module")
def text():
    return page.render([layers_contents(), model_contents(), kernelbench_contents()])


@pytest.fixture(scope="module")
def read(text):
    return Read(text)


def test_the_page_needs_nothing_from_elsewhere(text, read):
    assert "://" not in text and not read.all("script")
    assert all(a["href"].startswith(("#", "data:")) for tag in ("a", "link", "use") for a, _, _ in read.all(tag))
    assert re.findall(r"url\((?!#)", text) == []


def test_ids_are_unique_and_every_reference_is_there(read):
    ids = [attributes["id"] for _, attributes, _, _ in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag in ("a", "use") for a, _, _ in read.all(tag)]
    for _, attributes, _, _ in read.elements:
        targets += attributes.get("aria-labelledby", "").split()
        targets += re.findall(r"url\(#([^)]*)\)", " ".join(value or "" for value in attributes.values()))
    assert set(targets) <= set(ids)


def test_every_chart_says_what_it_shows(read):
    drawn = read.all("svg")
    assert len(drawn) == 1 + 2 + 1 + 1  # a roofline, bars of two passes, networks, problems
    for attributes, parents, said in drawn:
        assert attributes["role"] == "img" and len(attributes["aria-labelledby"].split()) == 2 and "figure" in parents
        assert "viewbox" in attributes and "width" not in attributes
        assert said.strip()
    assert [said for _, _, said in read.all("desc")] == [said for _, _, said in read.all("figcaption")]
    assert not read.all("img")


def test_structure_for_screen_readers_and_keyboards(read):
    ((document, _, _),) = read.all("html")
    assert document["lang"] == "en" and len(read.all("main")) == len(read.all("h1")) == len(read.all("title")) - 5 == 1
    assert read.all("a")[0][0] == {"class": "skip", "href": "#content"}
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for a, _, _ in read.all("meta"))
    tables = read.all("table")
    assert len(tables) == len(read.all("caption")) == 3
    assert all(a.get("scope") == ("col" if "thead" in parents else "row") for a, parents, _ in read.all("th"))
    regions = [a for a, _, _ in read.all("div") if "scroll" in a.get("class", "")]
    assert [(a["role"], a["tabindex"], bool(a["aria-label"])) for a in regions] == [("region", "0", True)] * 3


def test_every_figure_is_in_a_table_and_losses_are_as_plain_as_wins(read):
    rows = [(a.get("class"), said) for a, parents, said in read.all("tr") if "tbody" in parents]
    assert len(rows) == 3 + 5 + 2
    assert [cls for cls, _ in rows] == [None, "loss", None, None, "loss", None, None, "loss", None, "loss"]
    assert "0.25 (slower)" in rows[1][1] and "0.50 (slower)" in rows[4][1]
    said = [line for _, _, line in read.all("li")]
    assert any(line.startswith("dgrad: ") and "0.25 times as fast; behind ATen on 1 of 1" in line for line in said)
    assert any("least 0.50, slower on 2." in line for line in said)
    assert "Not timed: ncnn: not <installed>" in said
    assert "a <CPU> & more" in read.all("footer")[0][2]
    assert "8×9×9 -> 4, 2×2 /2 transposed" in rows[2][1]


def test_figures_of_a_layer_are_its_own():
    """2·2·7·7·8·8·9 operations in a microsecond, and each of x, y and w once."""
    (section,) = page.sections(layers_contents())
    row = dict(zip(section.grid.columns, section.grid.rows[0]))
    flops, moved = 2 * 2 * 49 * 64 * 9, 4 * (2 * 8 * 81 + 2 * 8 * 49 + 8 * 8 * 9)
    assert row["GFLOP/s"] == f"{flops / 1e-6 / 1e9:.0f}" and row["GB/s"] == f"{moved / 1e-6 / 1e9:.1f}"
    assert row["of ceiling"] == f"{max(flops / 1e-6 / 1e11, moved / 1e-6 / 1e10):.0%} FLOP"
    assert row["ATen, ms"] == "0.002 (0.002–0.002)" and row["times as fast"] == "2.00"
    chart = page.roofline(layers_contents())
    assert chart.points["fprop"][0] == pytest.approx((flops / moved, flops / 2e-6, flops / 1e-6))
    bars = page.bars_by_layer(layers_contents(), "dgrad")
    assert (bars.notes, bars.losses) == (["0.25×"], frozenset([0]))


def test_a_charts_bars_have_the_lengths_of_their_figures():
    (bars,) = page.bars_by_network(model_contents())
    assert bars.labels == ["resnet18", "resnet50"]
    assert bars.series == {"convext": [0.5, 0.5], "OpenVINO": [2.0, None]}
    assert bars.spread["convext"] == [pytest.approx(0.025)] * 2  # a tenth of 0.5, half to each side
    (axes,) = bars.figure(charts.LIGHT).axes
    assert [patch.get_width() for patch in axes.patches] == [0.5, 0.5, 2.0]


def luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
               for w, p in zip((0.2126, 0.7152, 0.0722), parts))  # fmt: skip


@pytest.mark.parametrize("theme", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
def test_contrasts_are_those_that_wcag_wants(theme):
    def contrast(a):
        low, high = sorted((luminance(a), luminance(theme.background)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(theme.ink) >= 7
    assert min(map(contrast, (theme.loss, theme.series[1]))) >= 4.5  # text, links
    assert min(map(contrast, theme.series)) >= 3  # bars
    assert len({*theme.series}) == len(theme.series)


def test_charts_follow_the_readers_colours(text):
    assert "prefers-color-scheme: dark" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--series-0)" in drawn and "var(--ink)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()


def test_a_page_of_the_same_figures_is_the_same(text):
    assert page.render([layers_contents(), model_contents(), kernelbench_contents()]) == text


def test_the_table_has_a_column_for_each_value_and_every_result():
    rows = list(csv.DictReader(io.StringIO(results.as_csv(layers_contents()["results"]))))
    assert [row["pass"] for row in rows] == ["fprop", "dgrad", "fprop"]
    assert float(rows[1]["seconds.native.median_s"]) == 4e-6 and float(rows[1]["seconds.aten.quartiles_s.1"]) == 1.05e-6
    rows = list(csv.DictReader(io.StringIO(results.as_csv(model_contents()["results"]))))
    assert rows[0]["candidates.OpenVINO.times_eager"] == "2.0" and rows[1]["candidates.OpenVINO.times_eager"] == ""


def test_the_commands_write_table_and_page(tmp_path, capsys):
    shapes, figures, table, drawn = (tmp_path / name for name in ("few.txt", "f.json", "t.csv", "p.html"))
    shapes.write_text("1: x 1x8x9x9, w 8x8x3x3\n")
    arguments = ["bench", "layers", str(shapes), "--seconds", "0", "--threads", "1", "--json", str(figures)]
    assert cli.main([*arguments, "--csv", str(table), "--html", str(drawn)]) == 0
    assert len(table.read_text().splitlines()) == 4
    assert drawn.read_text() == page.render([json.loads(figures.read_text())])
    assert cli.main(["bench", "page", str(figures), "--html", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == drawn.read_text()
    assert cli.main(["bench", "page", str(shapes), "--html", str(drawn)]) == 2
    assert "FILE: got" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["cpu_layers_resnet50.json", "cpu_inference.json", "cpu_training.json"])
def test_the_files_of_results_that_are_kept_can_be_drawn(file):
    path = ROOT / "benchmarks" / "results" / file
    if not path.exists():
        pytest.skip("there is no source tree here")
    contents = results.read(path)
    (section,) = page.sections(contents)
    assert len(section.grid.rows) >= len(contents["results"])


def test_other_files_of_results_are_refused():
    with pytest.raises(ValueError, match="expected results of bench layers, bench model or bench kernelbench"):
        page.sections({"machine": MACHINE, "results": [{"by the cost model": "x"}]})


# ---- in a browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

# Puts the page in a frame of a phone's width and one of a desktop's, and what it measures of them into the document.
FRAMES = """<!doctype html><meta charset="utf-8"><title>frames</title><body>
<iframe width="375" height="800" srcdoc="{page}"></iframe><iframe width="1280" height="800" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const measured = [...document.querySelectorAll("iframe")].map(frame => {{
    const inner = frame.contentDocument, view = frame.contentWindow;
    const drawn = [...inner.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
    const bar = inner.querySelector("svg [style*='fill: var(--series-1)']");
    const small = Math.min(...[...inner.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height));
    inner.querySelector(".scroll").focus();
    return {{
      overflow: inner.documentElement.scrollWidth - view.innerWidth,
      drawn: drawn.every(box => box.width > 300 && box.height > 60 && box.right <= view.innerWidth),
      small,
      dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
      background: view.getComputedStyle(inner.body).backgroundColor,
      bar: view.getComputedStyle(bar).fill,
      focused: inner.activeElement.className,
    }};
  }});
  document.body.dataset.measured = JSON.stringify(measured);
}});
</script>"""


def opened(file, tmp_path, *more):
    """(what the browser's console said, the document as it is once loaded)"""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=5000", "--dump-dom",
        f"--user-data-dir={tmp_path / 'user'}",
        *more, file.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return [line for line in ran.stderr.splitlines() if ":CONSOLE" in line], ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_without_errors_on_a_phone_and_a_desktop(text, tmp_path, dark):
    file = tmp_path / "frames.html"
    file.write_text(FRAMES.format(page=html.escape(text)), encoding="utf-8")
    said, document = opened(file, tmp_path, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert said == []
    measured = json.loads(html.unescape(re.search(r'data-measured="(.*?)"', document)[1]))
    theme = charts.DARK if dark else charts.LIGHT

    def rgb(colour):
        return "rgb({}, {}, {})".format(*(int(colour[n : n + 2], 16) for n in (1, 3, 5)))

    for found in measured:
        assert found["small"] >= 8  # pixels, of a line of the smallest text in a chart
        del found["small"]
        assert found == {
            "overflow": 0, "drawn": True, "dark": dark, "background": rgb(theme.background),
            "bar": rgb(theme.series[1]), "focused": "scroll",
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (apt-get install chromium)")
def test_an_error_in_the_browsers_console_would_be_seen(text, tmp_path):
    file = tmp_path / "broken.html"
    file.write_text(text.replace("</main>", "<script>nothing.there()</script></main>"), encoding="utf-8")
    said, _ = opened(file, tmp_path)
    assert len(said) == 1 and "nothing is not defined" in said[0]
