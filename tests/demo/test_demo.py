"""The demo: pictures in, a picture out, training that reaches its target or says that it did not."""

import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from convext import cli, demo, options, zoo
from convext.demo import digits, photos, picture
from convext.demo.profile import LayerTime, layer_times


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks on several threads spend their time waiting where a machine runs other work."""
    torch.set_num_threads(1)


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    """A demo of one small network without time to spend, and the settings for it."""
    monkeypatch.setattr(demo, "NETWORKS", ("resnet18",))
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(zoo, "_pretrained_state", lambda url: None)
    return demo.Settings(torch.device("cpu"), torch.float32, 1, None, False, tmp_path / "demo.png")


def run(settings, **console) -> tuple[int, str]:
    output = io.StringIO()
    return demo.run(settings, Console(file=output, width=200, **console)), output.getvalue()


def test_without_an_image_there_are_two_photographs():
    assert [p.shape for p in photos.load(None)] == [(427, 640, 3)] * 2


def test_a_batch_repeats_photographs_without_repeating_crops():
    batch = photos.batch_of(photos.load(None), 4, size=32)
    assert batch.shape == (4, 3, 32, 32)
    assert not torch.equal(batch[0], batch[2])
    assert torch.isfinite(batch).all()


def test_a_picture_of_ones_own_in_any_mode(tmp_path):
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.fromarray(np.full((5, 9), 128, np.uint8), "L").save(path)
    (photo,) = photos.load(path)
    assert photo.shape == (5, 9, 3)
    assert photos.batch_of([photo], 1, size=224).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("content", [None, b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_missing_or_broken_image_gives_one_line(content, tmp_path, capsys):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["demo", "--image", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convext: --image: got '{path}', expected ") and error.count("\n") == 1


def test_a_truncated_image_gives_one_line(tmp_path):
    from PIL import Image

    path = tmp_path / "cut.jpg"
    Image.fromarray(photos.load(None)[0]).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(options.OptionError, match="that Pillow can read"):
        photos.load(path)


def test_the_demo_says_where_weights_come_from_and_how_outputs_agree(small_demo):
    status, printed = run(small_demo)
    assert status == 0
    assert "seeded weights" in printed
    assert re.search(r"[\d.]+ -> [\d.]+ images/s, [\d.]+×; outputs \S+ apart", printed)
    assert small_demo.output.stat().st_size > 10_000


def test_in_a_dumb_terminal_nothing_is_redrawn(small_demo, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    _, printed = run(small_demo, force_terminal=True)
    assert "\x1b[" not in re.sub(r"\x1b\[[\d;]*m", "", printed)


def test_outputs_that_disagree_fail_the_demo(small_demo, monkeypatch):
    monkeypatch.setattr(demo, "bound", lambda *_: -1.0)
    status, printed = run(small_demo)
    assert status == 1
    assert "FAILED: resnet18: outputs before and after the swap disagree" in printed


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", digits.NETWORKS)
def test_networks_learn_to_read_digits_with_and_without_the_swap(name, swapped):
    assert digits.train(name, torch.device("cpu"), swapped=swapped).accuracy >= digits.TARGETS[name]


@pytest.mark.parametrize("name", ["residual network", "MobileNet"])
def test_loss_curves_lie_on_one_another(name):
    """As close to those in float64 as rounding brings the unswapped network's; and with recompute the very same."""

    def losses(**how):
        return np.array(digits.train(name, torch.device("cpu"), epochs=1, **how).losses)

    exact, before, after = losses(swapped=False, dtype=torch.float64), losses(swapped=False), losses()
    assert len(after) == 30
    assert abs(after - exact).max() <= 10 * abs(before - exact).max()
    assert (losses(recompute=True) == after).all()


def test_the_demo_draws_loss_curves_and_fails_where_training_misses_its_target(monkeypatch, small_demo):
    def train(name, device, swapped=True, on_epoch=None):
        return digits.Trained(name, digits.TARGETS[name] - 0.01, 1.0, (2.0, 1.0, 0.5))

    monkeypatch.setattr(digits, "train", train)
    output = io.StringIO()
    failures = demo._train(small_demo, Console(file=output, width=200))
    assert len(failures) == len(digits.NETWORKS) == 3
    assert ["expected 97%" in failures[0], "expected 98%" in failures[1], "expected 98%" in failures[2]] == [True] * 3
    path = small_demo.output.with_name("demo-digits.png")
    assert path.stat().st_size > 10_000 and str(path) in output.getvalue()


def test_the_split_is_fixed_and_held_out_digits_are_not_trained_on():
    train_x, train_y, test_x, test_y = digits.data(torch.device("cpu"))
    assert (len(train_x), len(test_x)) == (1437, 360) == (len(train_y), len(test_y))
    assert torch.equal(digits.data(torch.device("cpu"))[3], test_y)
    assert test_y.bincount(minlength=10).min() >= 34  # every digit in its share


def test_layer_times_gives_one_entry_a_convolution():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    first, second = layer_times(network, torch.randn(1, 3, 8, 8), repeats=1)
    assert (first.x_shape, first.w_shape) == ((1, 3, 8, 8), (4, 3, 3, 3))
    assert (second.x_shape, second.w_shape) == ((1, 4, 6, 6), (2, 4, 1, 1))
    assert first.seconds > 0 and second.seconds > 0


def test_layers_are_paired_by_shape_where_fusing_changed_the_order():
    a, b, c = (LayerTime((1, n), (n,), float(n)) for n in (1, 2, 3))
    again = LayerTime((1, 1), (1,), 9.0)
    assert picture.paired([a, b, c, again], [a, c, again, b]) == [(a, a), (b, b), (c, c), (again, again)]
