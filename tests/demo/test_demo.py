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


@pytest.mark.parametrize("name", digits.NETWORKS)
def test_swapped_networks_learn_to_read_digits(name):
    assert digits.train(name, torch.device("cpu")).accuracy >= digits.TARGET


def test_training_that_misses_its_target_fails_the_demo(monkeypatch):
    monkeypatch.setattr(digits, "EPOCHS", 0)
    monkeypatch.setattr(
        digits, "train", lambda name, device, on_epoch: digits.Trained(name, digits.TARGET - 0.01, seconds=1.0)
    )
    failures = demo._train(torch.device("cpu"), Console(file=io.StringIO()))
    assert len(failures) == len(digits.NETWORKS) and "expected 97%" in failures[0]


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
