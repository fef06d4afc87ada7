"""Every script in examples/ runs, shows what its header says, and stands in the README's table."""

import os
import re
import subprocess
import sys

import pytest
import torch
from project import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str, processes: int = 1) -> str:
    """What an example prints, on one thread, in a process that finds convext where the tests do, or under torchrun."""
    import convext

    package = os.path.dirname(os.path.dirname(convext.__file__))
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    python = [sys.executable, "-W", "error:::convext"]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*python, str(ROOT / "examples" / f"{name}.py"), *arguments]
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
    assert "13 convolutions, 13 by convext" in text


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


SMALL = "--model resnet18 --size 32 --batch 16 --images 256 --lr 0.01 --ema 0.8".split()


@pytest.mark.slow
def test_train_imagenet():
    text = run("train_imagenet", *SMALL, "--epochs", "2")
    assert [float(share) for share in re.findall(r"([\d.]+)% of held-out pictures", text)][-1] > 60, text
    assert "images/s" in run("train_imagenet", *SMALL, "--epochs", "1", "--no-swap", "--amp", "--images", "32")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_train_imagenet_goes_on_where_it_stopped(tmp_path):
    """Two processes, with gradients of two batches a step and in mixed precision: a run in one go, and one in two, end
    with the same weights, moving averages and momenta."""
    how = [*SMALL, "--images", "96", "--accumulate", "2", "--amp", "--epochs", "2", "--checkpoint"]
    whole, parts, first = tmp_path / "whole.pt", tmp_path / "parts.pt", tmp_path / "first.pt"
    assert "goes on" not in run("train_imagenet", *how, str(whole), processes=2)
    # The first epoch of the same run, as a process leaves it that is killed in the second.
    killer = f"""
import os, runpy, sys, torch
save = torch.save
def save_and_die(state, path):
    save(state, path)
    os.replace(path, {str(parts)!r})
    os.kill(os.getpid(), 9)
torch.save = save_and_die
sys.argv = ["train_imagenet.py", *{how!r}, {str(first)!r}]
runpy.run_path({str(ROOT / "examples" / "train_imagenet.py")!r}, run_name="__main__")
"""
    script = tmp_path / "killer.py"
    script.write_text(killer)
    with pytest.raises(AssertionError):
        run(str(script.with_suffix("")), processes=2)
    assert "goes on after epoch 1" in run("train_imagenet", *how, str(parts), processes=2)
    expected, found = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert expected["epoch"] == found["epoch"] == 2
    for name in ("model", "average"):
        assert expected[name].keys() == found[name].keys()
        assert all(torch.equal(expected[name][key], found[name][key]) for key in expected[name]), name
    momenta = [[entry["momentum_buffer"] for entry in s["optimizer"]["state"].values()] for s in (expected, found)]
    assert len(momenta[0]) == len(momenta[1]) and all(map(torch.equal, *momenta))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_says_what_to_expect_and_stands_in_the_readme_and_among_these_tests(file):
    header = file.read_text().partition('"""')[2].partition('"""')[0]
    assert f"    python examples/{file.name}" in header and "\nExpect: " in header
    assert f"](examples/{file.name})" in (ROOT / "README.md").read_text()
    assert f"test_{file.stem}" in globals()


def test_there_are_examples():
    assert len(EXAMPLES) >= 6
