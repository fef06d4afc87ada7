"""Swapped against unswapped in float64: outputs, all gradients and running statistics, and what was fused."""

import copy
from collections import Counter

import pytest
import torch
from swap_models import TUTORIAL
from torch import nn
from torch.utils import _pytree as pytree

import convext

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(model):
    """Statistics and affine parameters that a wrong batch norm could not survive."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.5, 1.5),
                (m.weight, 0.5, 1.5),
                (m.bias, -0.3, 0.3),
            ):
                t.data.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
    return model


def run(model, x):
    """{what: value} of a forward and backward pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    outputs = [t for t in pytree.tree_leaves(model(x)) if isinstance(t, torch.Tensor)]
    strides = [t.stride() for t in outputs]
    generator = torch.Generator().manual_seed(3)
    torch.autograd.backward(outputs, [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs])
    values = {f"output {i}": t for i, t in enumerate(outputs)} | {"gradient of x": x.grad}
    values |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return values | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}, strides


def assert_same(model, x):
    plain, swapped = copy.deepcopy(model), convext.swap(copy.deepcopy(model))
    for mode in (False, True):
        expected, strides = run(plain.train(mode), x)
        found, found_strides = run(swapped.train(mode), x)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if value is None:
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        assert found_strides == strides
    plain.eval(), swapped.eval()  # on statistics that training has moved
    with torch.no_grad():
        for a, b in zip(pytree.tree_leaves(swapped(x)), pytree.tree_leaves(plain(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
            assert a.stride() == b.stride()
    return swapped


TORCHVISION = {
    "resnet18": {"bn + relu": 9, "bn + add + relu": 8, "bn": 3},
    "resnet50": {"bn + relu": 33, "bn + add + relu": 16, "bn": 4},
    "mobilenet_v2": {"bn + relu6": 35, "bn + add": 10, "bn": 7},
    "mobilenet_v3_small": {"bn + hardswish": 18, "bn + relu": 5, "bn + add": 6, "bn": 5, "relu": 9, "hardsigmoid": 9},
    "mobilenet_v3_large": {"bn + hardswish": 20, "bn + relu": 11, "bn + add": 10, "bn": 5, "relu": 8, "hardsigmoid": 8},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_network(name):
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name).double())
    swapped = assert_same(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert Counter(row.fused for row in convext.report(swapped)) == TORCHVISION[name]


@pytest.mark.parametrize("name", TUTORIAL)
def test_hand_written_network(name):
    maker, size, fused = TUTORIAL[name]
    torch.manual_seed(0)
    swapped = assert_same(randomise(maker().double()), torch.randn(2, 3, size, size, dtype=torch.float64))
    if fused is not None:
        assert sorted(filter(None, (row.fused for row in convext.report(swapped)))) == sorted(fused)
    else:
        assert all(row.fused.startswith("bn + ") for row in convext.report(swapped))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_channels_last_network(name):
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name).double()).to(memory_format=torch.channels_last)
    assert_same(model, torch.randn(2, 3, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inception_v3", {"bn + relu": 94}),
        ("vgg11", {"relu": 8}),
        ("efficientnet_b0", {"bn + silu": 33}),
        ("googlenet", {"bn + relu": 57}),
        ("densenet121", {"bn + relu": 59}),
        ("regnet_y_400mf", {"bn + add + relu": 16}),
    ],
)
def test_chains_found(name, expected):
    options = {"init_weights": False, "aux_logits": False} if name in ("inception_v3", "googlenet") else {}
    model = convext.swap(torchvision.models.get_model(name, **options).eval())
    found = Counter(row.fused for row in convext.report(model))
    for parts, count in expected.items():
        assert found[parts] == count, found
