"""Heads of classifiers as members of a sequence (convext/swap/match/head.py): what they compute, and that whatever
changes is noticed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.convnext import LayerNorm2d

import convext

pytestmark = pytest.mark.skipif(
    convext.backends.unavailable("native", "cpu") is not None, reason="sequences are calls of the compiled library"
)

CHANNELS, CLASSES = 37, 11


class Net(nn.Module):
    """Two convolutions and a head: `pool` makes (N, C, 1, 1) or (N, C), `flatten` (N, C)."""

    def __init__(self, pool, flatten, *layers):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, CHANNELS, 1), nn.ReLU())
        self.pool, self.flatten = pool, flatten
        self.classifier = nn.Sequential(*(layers or (nn.Linear(CHANNELS, CLASSES),)))

    def forward(self, x):
        return self.classifier(self.flatten(self.pool(self.features(x))))


def _pooled():
    return nn.AdaptiveAvgPool2d(1)


def _flat():
    return nn.Flatten(1)


HEADS = {
    "modules": lambda: Net(_pooled(), _flat()),
    "functions": lambda: Net(lambda x: F.adaptive_avg_pool2d(x, (1, 1)), lambda x: torch.flatten(x, 1)),
    "methods": lambda: Net(lambda x: x.mean((2, 3), keepdim=True), lambda x: x.flatten(start_dim=1)),
    "flat mean": lambda: Net(lambda x: torch.mean(x, dim=[-2, -1]), lambda x: x),
    "no bias": lambda: Net(_pooled(), _flat(), nn.Linear(CHANNELS, CLASSES, bias=False)),
    "dropout": lambda: Net(_pooled(), _flat(), nn.Dropout(0.5), nn.Linear(CHANNELS, CLASSES)),
    "two linear layers": lambda: Net(_pooled(), _flat(), nn.Linear(CHANNELS, 50), nn.Hardswish(), nn.Dropout(0.2),
                                     nn.Linear(50, CLASSES)),
    "layer norm before": lambda: Net(_pooled(), nn.Sequential(LayerNorm2d(CHANNELS), nn.Flatten(1))),
    "layer norm behind": lambda: Net(_pooled(), _flat(), nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 20), nn.GELU(),
                                     nn.Linear(20, CLASSES)),
}  # fmt: skip
STEPS = {"two linear layers": 5, "layer norm before": 5, "layer norm behind": 6}  # of the others 4


def _close(actual, model, x):
    """Within the rounding of four layers in the type of x, each of sums of at most 20 * 20 pixels or 37 channels, each
    error scaled by what the layers after it do to values: less than 4 a layer."""
    exact = copy.deepcopy(model).double()(x.double())
    bound = 4 * 4 * 40**0.5 * torch.finfo(x.dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_a_head_runs_with_the_layers_before_it(head, dtype, sequence_calls):
    model, x = HEADS[head]().eval().to(dtype), torch.randn(3, 3, 39, 21, dtype=dtype)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(4):
        y = swapped(x)
    first_apart = dtype == torch.float64  # whose kernel of three channels does not read NCHW
    assert sequence_calls[-1] == STEPS.get(head, 4) - first_apart
    assert y.shape == (3, CLASSES) and y.is_contiguous() and not y._is_view()
    _close(y, model, x)
    with convext.layer_by_layer():
        _close(swapped(x), model, x)


@pytest.mark.skipif(not convext.backends.native._has_bf16_dot(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head", [head for head in HEADS if "layer norm" not in head])
@torch.no_grad()
def test_a_bfloat16_head_runs_with_the_layers_before_it(head, autocast, sequence_calls):
    model, x = HEADS[head]().eval(), torch.randn(3, 3, 39, 21)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    swapped = convext.swap(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(4):
            y = swapped(x)
    assert sequence_calls[-1] == STEPS.get(head, 4) - 1  # the kernel of three channels does not read NCHW
    assert y.shape == (3, CLASSES) and y.dtype is torch.bfloat16
    for parameter in model.parameters():  # under autocast they are rounded on their way to the kernels
        parameter.copy_(parameter.bfloat16())
    _close(y, model, x.bfloat16())


@torch.no_grad()
def test_results_do_not_depend_on_the_number_of_threads_or_the_batch(sequence_calls):
    model = Net(_pooled(), _flat(), nn.Linear(CHANNELS, 300), nn.ReLU(), nn.Linear(300, CLASSES)).eval()
    swapped, x, results = convext.swap(model), torch.randn(4, 3, 60, 60), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            results.append(swapped(x))
    assert len(sequence_calls) == 5
    assert all(torch.equal(results[1], result) for result in results[2:])


@pytest.mark.parametrize("model", [
    lambda: Net(nn.AdaptiveAvgPool2d(2), _flat(), nn.Linear(4 * CHANNELS, CLASSES)),
    lambda: Net(nn.AdaptiveMaxPool2d(1), _flat()),
    lambda: Net(lambda x: x.mean((1, 2), keepdim=True), _flat(), nn.Linear(20, CLASSES)),
    lambda: Net(_pooled(), nn.Flatten(0)),
    lambda: Net(_pooled(), _flat(), nn.Tanh()),
], ids=["four pixels", "maximum", "over channels", "one vector", "no linear layer"])  # fmt: skip
@torch.no_grad()
def test_what_is_no_head_is_left_to_torch(model, sequence_calls):
    model, x = model().eval(), torch.randn(1, 3, 40, 40)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        y = swapped(x)
    assert set(sequence_calls) <= {2}  # the convolutions, where the one behind them reads channels-last
    _close(y, model, x)


def _replace_weight(model):
    model.classifier[1].weight = nn.Parameter(torch.randn_like(model.classifier[1].weight))


def _change_weight_in_place(model):
    model.classifier[1].weight.mul_(1.5)


def _change_weight_through_data(model):
    model.classifier[1].weight.data = torch.randn_like(model.classifier[1].weight)


def _change_bias(model):
    model.classifier[1].bias.add_(1)


def _remove_bias(model):
    model.classifier[1].bias = None


def _other_pixels(model):
    model.pool.output_size = (1, 2)
    model.classifier[1].weight = nn.Parameter(torch.randn(CLASSES, 2 * CHANNELS))


def _hook_of_the_pooling(model):
    model.pool.register_forward_hook(lambda module, args, out: out + 1)


def _hook_of_the_linear_layer(model):
    model.classifier[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _hook_of_the_dropout(model):
    model.classifier[0].register_forward_hook(lambda module, args, out: out * 2)


def _training_dropout(model):
    model.classifier[0].train()
    model.classifier[0].p = 1.0


def _exchange_module(model):
    model.classifier[1] = nn.Sequential(nn.Linear(CHANNELS, CLASSES), nn.ReLU())


CHANGES = [_replace_weight, _change_weight_in_place, _change_weight_through_data, _change_bias, _remove_bias,
           _other_pixels, _hook_of_the_pooling, _hook_of_the_linear_layer, _hook_of_the_dropout, _training_dropout,
           _exchange_module]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_a_change_of_the_head_is_noticed(change, swapped_and_changed):
    model, x = HEADS["dropout"]().eval(), torch.randn(2, 3, 40, 40)
    swapped = swapped_and_changed(model, x, change, rtol=1e-3)
    expected = model(x)
    for _ in range(3):
        y = swapped(x)
        assert y.shape == expected.shape
        _close(y, model, x)


def test_gradients_are_recorded_and_training_runs_the_modules(sequence_calls):
    model, x = HEADS["dropout"]().double(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    swapped = convext.swap(copy.deepcopy(model))
    for network in (model, swapped):
        network.train()
        torch.manual_seed(3)
        network(x).sum().backward()
    assert not sequence_calls
    for theirs, ours in zip(model.parameters(), swapped.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_user_who_looks_into_the_head_sees_tensors(sequence_calls):
    class Looking(Net):
        def forward(self, x):
            pooled = self.pool(self.features(x))
            return self.classifier(self.flatten(pooled)), pooled

    model, x = Looking(_pooled(), _flat()).eval(), torch.randn(2, 3, 40, 40)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        y, pooled = swapped(x)
    expected = model(x)[1]
    assert pooled.shape == expected.shape and pooled.is_contiguous()
    assert set(sequence_calls) == {2}
    _close(pooled, _up_to_the_pooling(model), x)


def _up_to_the_pooling(model):
    """The part of a network that ends with its pooling."""
    return nn.Sequential(model.features, model.pool)
