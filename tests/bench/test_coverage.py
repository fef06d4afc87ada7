"""`convext bench networks`: what is counted, and that a wrong or raising network is told."""

import json

import pytest
import torch
from typer.testing import CliRunner

import convext
from convext import cli, zoo
from convext.bench import coverage
from convext.options import OptionError

pytest.importorskip("timm")
SMALL = "timm/mobilenetv3_small_050"


def test_networks_of_both_libraries_are_served_and_right(tmp_path):
    file = tmp_path / "networks.json"
    ran = CliRunner().invoke(
        cli.app,
        ["bench", "networks", SMALL, "squeezenet1_1", "--threads", "1", "--seconds", "0.01", "--json", str(file)],
    )
    assert ran.exit_code == 0, ran.output
    assert "2 of 2 networks right" in ran.output and "of 79 convolutions native" in " ".join(ran.output.split())
    found = {row["network"]: row for row in json.loads(file.read_text())["results"]}
    assert found[SMALL]["layers"] == 53 >= found[SMALL]["fused"] > 40 and 53 >= found[SMALL]["native"] > 45
    assert found["squeezenet1_1"]["times_eager"] > 0


def test_detectors_are_compared_by_what_boxes_are_made_of():
    outcome = coverage.run("ssdlite320_mobilenet_v3_large")
    assert outcome.ok and outcome.layers == 98 >= outcome.native > 90


def test_a_wrong_network_is_told(monkeypatch):
    swap = convext.swap

    def wrong(model):
        swap(model)
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)
        return model

    monkeypatch.setattr(convext, "swap", wrong)
    outcome = coverage.run(SMALL)
    assert not outcome.ok and not outcome.error
    (row,) = coverage.table([outcome]).rows
    assert row[5].endswith("WRONG") and coverage.summary([outcome]).startswith("0 of 1 networks right")


def test_a_network_that_raises_is_told(monkeypatch):
    def raises(model):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(convext, "swap", raises)
    outcome = coverage.run(SMALL)
    assert outcome.error == "RuntimeError: no such luck" and not outcome.ok
    assert coverage.table([outcome]).rows[0][1] == outcome.error
    assert CliRunner().invoke(cli.app, ["bench", "networks", SMALL]).exit_code == 1


@pytest.mark.parametrize("name", ["resnet1", "timm/resnet1", "timm/"])
def test_unknown_networks_are_named(name):
    with pytest.raises(OptionError, match=name):
        zoo.check(name)


def test_the_chosen_networks_exist():
    names = [*coverage.TORCHVISION, *coverage.TIMM]
    for name in names:
        zoo.check(name)
    assert len(coverage.TIMM) >= 60 and len(set(names)) == len(names)
