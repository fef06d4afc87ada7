"""`convext bench kernelbench`: which problems it finds, at which sizes it runs them, what it says of the results."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import convext
from convext import cli
from convext.bench import kernelbench
from convext.options import UsageError

CONVOLUTION = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))

batch_size = 64
in_channels = 8
height, width = 64, 32

def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]

def get_init_inputs():
    return [in_channels, 16]
"""
FIXED_EXTENTS = CONVOLUTION.replace(
    "return torch.relu(self.bn(self.conv(x)))", "return self.conv(x).view(-1, 16, 62 * 30)"
)
RAISES = CONVOLUTION.replace("return torch.relu(self.bn(self.conv(x)))", "raise RuntimeError('no such luck')")
MATMUL = "import torch\nbatch_size = 4\ndef get_inputs():\n    return [torch.rand(4, 4)]\n"
EVERYTHING = dict(
    device=torch.device("cpu"), dtype=torch.float32, most_flops=1e7, most_bytes=1e9, compiled=False, seconds=0.0
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in {
        "level1/9_a_convolution.py": CONVOLUTION,
        "level1/10_matmul.py": MATMUL,
        "level2/3_fixed_extents.py": FIXED_EXTENTS,
        "level3/1_raises.py": RAISES,
    }.items():
        path = tmp_path / "KernelBench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def only(checkout: Path, level: int) -> kernelbench.Problem:
    (found,) = kernelbench.problems(checkout, [level])
    return found


def test_problems_are_the_files_with_a_convolution_in_order(checkout):
    found = kernelbench.problems(checkout)
    assert [str(problem) for problem in found] == ["1/9 a_convolution", "2/3 fixed_extents", "3/1 raises"]
    assert kernelbench.problems(checkout / "KernelBench") == found
    with pytest.raises(UsageError, match="PATH: got .*, expected a checkout of KernelBench"):
        kernelbench.problems(checkout / "KernelBench" / "level1")
    with pytest.raises(UsageError, match="--number: no problem 10 with a convolution in level 1"):
        kernelbench.problems(checkout, [1], [9, 10])


def test_sizes_are_halved_until_operations_and_bytes_fit(checkout):
    problem = only(checkout, 1)

    def flops(batch: int, height: int, width: int) -> int:
        return 2 * batch * (height - 2) * (width - 2) * 16 * 8 * 9

    full, total = kernelbench.cost(problem, {})
    assert full == flops(64, 64, 32)
    assert total >= 3 * 4 * 64 * 16 * 62 * 30  # of the convolution, batch norm and ReLU
    assert kernelbench.fitting(problem, full, math.inf) == {}
    assert kernelbench.fitting(problem, full - 1, math.inf) == {"batch_size": 32}
    assert kernelbench.fitting(problem, math.inf, total - 1) == {"batch_size": 32}
    assert kernelbench.fitting(problem, flops(2, 32, 16), math.inf) == {"batch_size": 2, "height": 32, "width": 16}


def test_extents_that_a_network_insists_on_stay(checkout):
    assert kernelbench.fitting(only(checkout, 2), 1, math.inf) == {"batch_size": 2}


def test_a_right_result_is_timed_beside_eager(checkout):
    outcome = kernelbench.run(only(checkout, 1), **EVERYTHING)
    assert (outcome.error, outcome.ok, outcome.allclose) == ("", True, True)
    assert (outcome.layers, outcome.native) == (1, 1)
    assert set(outcome.timings) == {"eager", "convext"}
    eager, ours = (outcome.timings[name].seconds for name in ("eager", "convext"))
    assert min(b / a for a, b in zip(ours, eager)) <= outcome.ratio("eager") <= max(b / a for a, b in zip(ours, eager))
    assert all(far < 1e-5 for far in outcome.far.values())


class Wrong(nn.Module):
    """What the model computes, off by a thousandth."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * 1.001


def test_a_wrong_result_is_called_wrong(checkout, monkeypatch):
    monkeypatch.setattr(convext, "swap", Wrong)
    outcome = kernelbench.run(only(checkout, 1), **EVERYTHING)
    assert not outcome.ok
    assert outcome.far["convext"] == pytest.approx(1e-3, rel=0.01)
    assert "WRONG" in kernelbench.table([outcome]).markdown()
    assert kernelbench.summary([outcome]).startswith("level 1: 0 of 1 right")


def test_what_amplifies_rounding_is_judged_by_its_distance_from_float64(checkout):
    outcome = kernelbench.Outcome(only(checkout, 1), far={"eager": 3e-4, "convext": 5e-4})
    assert outcome.ok
    outcome.far["convext"] = 5 * 3e-4
    assert not outcome.ok


def test_what_raises_is_told_and_the_rest_goes_on(checkout):
    outcomes = [kernelbench.run(problem, **EVERYTHING) for problem in kernelbench.problems(checkout, [1, 3])]
    assert [outcome.error for outcome in outcomes] == ["", "RuntimeError: no such luck"]
    assert [outcome.ok for outcome in outcomes] == [True, False]
    assert "no such luck" in kernelbench.table(outcomes).markdown()
    assert "level 3: 0 of 1 right" in kernelbench.summary(outcomes)


def test_the_command_prints_a_table_and_writes_what_it_found(checkout, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["bench", "kernelbench", str(checkout), "--scale", "0.01", "--seconds", "0", "--json", str(figures)]
    assert cli.main([*arguments, "--level", "1", "--no-compile", "--threads", "1"]) == 0
    assert "1/9 a_convolution" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["machine"]["threads"] == 1
    (result,) = found["results"]
    assert (result["name"], result["ok"], result["sizes"]) == ("a_convolution", True, {"batch_size": 2})
    assert result["times_eager"] > 0
    assert cli.main([*arguments[:-2], "--level", "3", "--no-compile"]) == 1
    assert cli.main(["bench", "kernelbench", str(checkout), "--level", "4"]) == 2
    assert "--level: got '4', expected some of 1, 2, 3" in capsys.readouterr().err
