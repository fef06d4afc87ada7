"""Shape files: what they say, that they are in step with the networks, and that `convext bench layers` reads them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from convext import cli
from convext.bench import networks, problems
from convext.options import OptionError
from convext.problem import ConvProblem, DType, Pass

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
pytestmark = pytest.mark.skipif(not SHAPES.is_dir(), reason="there is no source tree here")


@pytest.mark.parametrize(
    "kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
)
def test_a_layers_line_says_all_of_it(kind):
    """Read again it is the same; and built from what the line says, a layer gives results of the same sizes."""
    transposed, axes = kind.__name__.startswith("ConvT"), int(kind.__name__[-2])
    each = lambda *values: values[:axes]  # noqa: E731
    more = {"output_padding": each(1, 0, 1)} if transposed else {}
    layer = kind(4, 6, each(3, 2, 4), each(2, 1, 3), each(1, 0, 2), groups=2, dilation=each(2, 3, 1), **more)
    x = torch.zeros(2, 4, *each(11, 9, 10))
    (found,) = problems.collect_layers(nn.Sequential(layer), x)
    assert problems.parse(str(found)) == found
    given, made = (2, 4, *each(11, 9, 10)), tuple(layer(x).shape)
    p = found.problem
    shapes = (p.y_shape, p.x_shape) if transposed else (p.x_shape, p.y_shape)
    assert tuple(s[:2] + s[2:][-axes:] for s in shapes) == (given, made)
    assert str(found).startswith(
        "transposed x" if transposed else "x "
    ) and f"x 2x4x{'x'.join(map(str, given[2:]))}" in str(found)


def test_a_problems_own_text_is_read_as_well():
    for problem in (
        ConvProblem(1, 8, 7, 7, 8, 3, 3, 2, 1, 1, 0, 1, 1, 2, DType.BFLOAT16, device="cuda"),
        ConvProblem(2, 8, 7, 5, 8, 3, 1, 1, 1, 0, 0, 2, 1, 8),
        ConvProblem(1, 4, 6, 5, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, d=9, t=2, stride_d=3, axes=3),
    ):
        assert problems.parse(str(problem)) == problems.Layer(problem)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x 1x3x8x8, w 4x3x3x3", "expected how often it runs, a colon, and a layer"),
        ("0: x 1x3x8x8, w 4x3x3x3", "expected how often it runs"),
        ("1: x 1x3x8x8", "expected x and w with 3, 4 or 5 extents each"),
        ("1: x 1x3x8x8, w 4x3x3", "expected x and w with 3, 4 or 5 extents each"),
        ("1: x 1x3x8x8, w 4x3x3x3, stride two", "got 'stride two', expected such as"),
        ("1: x 1x3x8x8, w 4x3x3x3, stride 1, stride 2", "got 'stride 2', expected such as"),
        ("1: x 1x3x8x8, w 4x3x3x3, stride 1x2x3", "stride: got 1x2x3, expected one number, or one for each of 2 axes"),
        ("1: x 1x3x8x8, w 4x3x3x3, stride 0", "expected extents, strides and dilations of at least 1"),
        ("1: x 1x4x8x8, w 4x3x3x3", "w: got 4x3x3x3 with 1 groups and x 1x4x8x8"),
        ("1: x 1x4x8x8, w 3x2x3x3, groups 2", "w: got 3x2x3x3 with 2 groups"),
        ("1: x 1x3x8x8, w 4x3x9x9", "which leave no result"),
        ("1: x 1x3x8x8, w 4x3x3x3, output padding 1", "output padding: only a transposed layer has it"),
        ("1: transposed x 1x3x8x8, w 3x4x3x3, output padding 1", "output padding: got 1x1, expected less"),
        ("# nothing", "a shape file with at least one layer"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_with_what_was_expected(tmp_path, line, said):
    path = tmp_path / "wrong.txt"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(OptionError, match="FILE: got ") as raised:
        problems.read(path)
    assert said in str(raised.value)
    assert line.startswith("#") or f"{path}:2" in str(raised.value)


def test_lines_of_the_same_layer_add_up(tmp_path):
    (tmp_path / "two.txt").write_text("2: x 1x3x8x8, w 4x3x3x3\n\n3: x 1x3x8x8, w 4x3x3x3  # again\n")
    assert list(problems.read(tmp_path / "two.txt").values()) == [5]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_shape_file_is_in_step_with_its_network(name):
    pytest.importorskip("torchvision")
    found = networks.layers_of(name)
    assert problems.read(SHAPES / f"{name}.txt") == found
    assert (SHAPES / f"{name}.txt").read_text() == networks.text(networks.NETWORKS[name][0], found)


def test_every_file_has_a_network_but_that_of_kernelbench():
    assert set(problems.names()) == {*networks.NETWORKS, networks.KERNELBENCH}
    assert problems.find("resnet50").read_text() == (SHAPES / "resnet50.txt").read_text()  # an installed one has a copy
    assert problems.find(str(SHAPES / "unet.txt")) == SHAPES / "unet.txt"


def test_kernelbenchs_file_has_its_35_problems():
    """Problem 86 has two convolutions. By kind, with the number of elements of all results, as KernelBench's sizes
    give it."""
    layers = problems.read(SHAPES / f"{networks.KERNELBENCH}.txt")
    kinds = {}
    for layer, count in layers.items():
        axes = 1 if layer.is_row else layer.problem.axes
        kinds[axes, layer.transposed] = kinds.get((axes, layer.transposed), 0) + count
    assert kinds == {(1, False): 2, (1, True): 3, (2, False): 13, (2, True): 7, (3, False): 4, (3, True): 7}
    assert sum(layers.values()) == 36


def test_kernelbenchs_file_comes_from_a_checkout(tmp_path):
    level = tmp_path / "KernelBench" / "level1"
    level.mkdir(parents=True)
    (level / "64_conv_transposed_1D.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, c):\n        super().__init__()\n        self.conv = nn.ConvTranspose1d(c, 6, 3)\n"
        "    def forward(self, x):\n        return self.conv(x)\n"
        "def get_inputs():\n    return [torch.rand(64, 4, 65536)]\n"
        "def get_init_inputs():\n    return [4]\n"
    )
    assert [f"{n}: {layer}" for layer, n in networks.layers_of_kernelbench(tmp_path).items()] == [
        "1: transposed x 64x4x65536, w 4x6x3"
    ]


def test_replknets_layers_are_those_of_its_paper():
    """31 taps at 56x56; 79 million parameters, of which the classifier's 1.025 million are no convolution's."""
    layers = problems.read(SHAPES / "replknet31b.txt")
    large = {(p.r, p.h): count for (p, _), count in layers.items() if p.is_depthwise and p.r > 5}
    assert large == {(31, 56): 2, (29, 28): 2, (27, 14): 18, (13, 7): 2}
    assert sum(p.w_size * count for (p, _), count in layers.items()) / 1e6 == pytest.approx(79 - 1.025, abs=0.5)


def test_the_command_measures_a_file_at_another_batch(tmp_path, capsys):
    shapes, figures = tmp_path / "few.txt", tmp_path / "figures.json"
    shapes.write_text("2: x 4x8x9x9, w 8x8x3x3\n1: transposed x 4x8x9, w 8x4x2, stride 2\n")
    arguments = ["bench", "layers", str(shapes), "--seconds", "0", "--threads", "1", "--json", str(figures)]
    assert cli.main([*arguments, "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert "8×9×9 -> 8, 3×3" in printed and "8×1×9 -> 4, 1×2 /2 transposed" in printed and "caches warm" in printed
    found = json.loads(figures.read_text())
    assert found["machine"]["setting"] == {
        "model": "few", "batch": 2, "dtype": "float32", "memory_format": "channels-last", "threads": 1, "caches": "warm"
    }  # fmt: skip
    assert [(r["problem"][:12], r["count"], r["pass"], r["transposed"]) for r in found["results"]] == [
        *(("x 2x8x9x9, w", 2, p.name.lower(), False) for p in Pass),
        *(("x 2x4x1x18, ", 1, p.name.lower(), True) for p in Pass),
    ]
    assert all(len(r["seconds"]["aten"]["quartiles_s"]) == 2 for r in found["results"])
    assert cli.main([*arguments, "--passes", "wgrad"]) == 0
    assert {r["problem"][:4] for r in json.loads(figures.read_text())["results"]} == {"x 4x"}


def test_the_command_writes_the_files_anew(tmp_path, capsys):
    pytest.importorskip("torchvision")
    assert cli.main(["bench", "shape-files", str(tmp_path)]) == 0
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        f"{name}.txt": (SHAPES / f"{name}.txt").read_text() for name in networks.NETWORKS
    }
    assert f"{tmp_path / 'aspp.txt'}: 6 layers" in capsys.readouterr().out
