"""Every script in examples/ runs, shows what its header says, and stands in the README's table."""

import os
import re
import subprocess
import sys

import pytest
from project import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str) -> str:
    """What an example prints, on one thread, in a process that finds convext where the tests do."""
    import convext

    package = os.path.dirname(os.path.dirname(convext.__file__))
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-W", "error:::convext", str(ROOT / "examples" / f"{name}.py"), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def percent(text: str, what: str) -> float:
    return float(re.search(rf"^([\d.]+)% {what}$", text, re.M)[1])


@pytest.mark.slow
def test_finetune():
    text = run("finetune", "--epochs", "2")
    swapped = percent(text, "of 360 held-out digits are read rightly")
    plain = percent(text, "by a plain ResNet-18 with the same weights")
    assert swapped > 80 and abs(swapped - plain) < 1  # rounding may decide of three digits


@pytest.mark.slow
def test_own_network():
    text = run("own_network")
    assert percent(text, "of 360 held-out digits are read rightly") > 95
    assert re.search(r"^  fprop_depthwise_f32_\w+$", text, re.M)


@pytest.mark.slow
def test_segmentation():
    text = run("segmentation")
    found = dict(re.findall(r"^(disc|square): intersection over union ([\d.]+)$", text, re.M))
    assert found.keys() == {"disc", "square"} and all(float(share) > 0.8 for share in found.values()), text
    assert "13 convolutions, 11 by convext" in text


def test_layer_benchmark():
    """That both sides agree the script asserts by itself."""
    text = run("layer_benchmark", "--seconds", "0.05")
    rows = re.findall(r"^(.{15}) +\d+ us, x *[\d.]+ +\d+ us, x *[\d.]+  (native|aten) \w+$", text, re.M)
    assert [name.strip() for name, _ in rows] == [
        "3x3", "3x3, stride 2", "pointwise", "depthwise", "dilated", "a first layer",
    ]  # fmt: skip


@pytest.mark.slow
def test_export_and_serve():
    text = run("export_and_serve")
    assert "exported: holds 52 aten convolutions and nothing of convext's, and agrees with the model" in text
    assert "served: 8 requests" in text


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_says_what_to_expect_and_stands_in_the_readme_and_among_these_tests(file):
    header = file.read_text().partition('"""')[2].partition('"""')[0]
    assert f"    python examples/{file.name}" in header and "\nExpect: " in header
    assert f"](examples/{file.name})" in (ROOT / "README.md").read_text()
    assert f"test_{file.stem}" in globals()


def test_there_are_examples():
    assert len(EXAMPLES) >= 5
