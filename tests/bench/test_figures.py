"""The documents' figures and pictures are those of the files of results: what `convext bench figures` would write."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from convext import cli
from convext.bench import charts, figures
from convext.options import UsageError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="there is no source tree here")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what the command reads and writes, with no pictures."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for name in ("README.md", *figures.ELSEWHERE.values()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(figures.write, "__defaults__", (tmp_path,))
    return tmp_path


@pytest.mark.parametrize("name", [*figures.PARTS, *figures.PICTURES])
def test_the_documents_say_what_the_files_say(name):
    document = (ROOT / figures.ELSEWHERE.get(name, "README.md")).read_text(encoding="utf-8")
    assert f"<!-- figures: {name} -->\n{figures.parts(ROOT)[name]}\n<!-- end of {name} -->\n" in document


@pytest.mark.parametrize("theme", figures.THEMES)
@pytest.mark.parametrize("name", figures.PICTURES)
def test_the_pictures_are_of_the_files(name, theme):
    picture = ROOT / "benchmarks" / "pictures" / f"{name}_{theme}.png"
    assert charts.description_of(picture) == figures.digest(figures.PICTURES[name][1](ROOT))


def test_every_table_of_speeds_stands_between_marks():
    """What is left of the section holds no figure of two decimals: none is typed by hand."""
    section = re.search(r"^## How fast\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    rest = re.sub(r"<!-- figures: .*?<!-- end of .*?-->|torch 2\.\d+", "", section, flags=re.S)
    assert "convext bench figures" in rest
    assert not re.search(r"\d\.\d\d", rest) and "|" not in rest


def test_another_result_gives_another_figure_and_another_picture(tree, capsys):
    path = tree / "benchmarks" / "results" / "cpu_inference.json"
    found = json.loads(path.read_text())
    first = found["results"][0]["candidates"]
    first["convext"]["times_eager"] = 1.25
    path.write_text(json.dumps(found))
    assert cli.main(["bench", "figures"]) == 0
    readme = (tree / "README.md").read_text(encoding="utf-8")
    engines = [f"{first[name]['times_eager']:.2f}" for name in ("ONNX Runtime", "OpenVINO")]
    assert f"| ResNet-18 | 1 | 1.25 | {engines[0]} | **{engines[1]}** |" in readme
    unmarked = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line not in readme]
    assert len(unmarked) == 1  # nothing else has changed
    written = {path.name for path in (tree / "benchmarks" / "pictures").iterdir()}
    assert written == {f"{name}_{theme}.png" for name in figures.PICTURES for theme in figures.THEMES}
    assert str(tree / "README.md") in capsys.readouterr().out

    def described(root, name):
        return charts.description_of(root / "benchmarks" / "pictures" / f"{name}_dark.png")

    assert described(tree, "speed_up") != described(ROOT, "speed_up")
    assert described(tree, "roofline") == described(ROOT, "roofline")


def test_a_slower_kernel_is_counted(tree):
    path = tree / "benchmarks" / "results" / "cpu_layers_resnet50.json"
    found = json.loads(path.read_text())
    row = found["results"][0]
    row["seconds"]["aten"]["median_s"] = row["seconds"][row["selected"]]["median_s"] / 2
    path.write_text(json.dumps(found))
    assert "behind ATen on 1 of 69" in figures.layers(tree)


def test_a_readme_without_a_part_and_a_folder_without_sources_are_refused(tree):
    readme = tree / "README.md"
    readme.write_text(readme.read_text().replace("<!-- figures: training -->", ""))
    with pytest.raises(UsageError, match="README.md has 0 places for 'training', expected one"):
        figures.write(tree)
    readme.unlink()
    with pytest.raises(UsageError, match="run it in the source tree"):
        figures.write(tree)
