"""Convolutions in a row that run as one call: what they compute, and that whatever changes is noticed."""

import copy
import gc
import weakref

import pytest
import torch
import torchvision
from torch import nn

import convext

pytestmark = pytest.mark.skipif(
    convext.backends.unavailable("native", "cpu") is not None, reason="sequences are calls of the compiled library"
)


def _settled(model):
    """The model in eval mode, its batch norms far from the identity."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def _mobile(*settings):
    """Inverted residuals as torchvision builds them, behind a first layer."""
    from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

    blocks = [
        InvertedResidual(InvertedResidualConfig(*s, dilation=1, width_mult=1.0), nn.BatchNorm2d) for s in settings
    ]
    first = [nn.Conv2d(3, settings[0][0], 3, 2, 1, bias=False), nn.BatchNorm2d(settings[0][0]), nn.Hardswish()]
    return _settled(nn.Sequential(*first, *blocks))


NETWORKS = {
    "inverted residuals": lambda: _mobile((16, 3, 64, 16, False, "RE", 1), (16, 3, 72, 24, False, "HS", 2)),
    "squeeze and excitation": lambda: _mobile((16, 5, 64, 16, True, "RE", 1), (16, 3, 72, 24, True, "HS", 2)),
    "residual network": lambda: _settled(torchvision.models.resnet18()),
}


def _close(actual, expected):
    # Two float32 networks of tens of layers, whose sums are ordered differently: each layer adds a few roundings of
    # its largest output.
    bound = 200 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_a_network_runs_as_one_call_and_computes_the_same(name, channels_last, sequence_calls):
    model, x = NETWORKS[name](), torch.randn(2, 3, 64, 48)
    expected = model(x)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    swapped = convext.swap(copy.deepcopy(model))
    apart = swapped(x)  # the first call runs layer by layer, and prepares
    assert not sequence_calls
    together = swapped(x)
    assert sequence_calls and max(sequence_calls) >= 6
    assert together.stride() == apart.stride() == model(x).stride()
    _close(apart, expected)
    _close(together, expected)
    if name == "inverted residuals":  # gates and classifiers sum in another order
        assert torch.equal(together, apart)


@torch.no_grad()
def test_results_do_not_depend_on_the_number_of_threads():
    swapped, x = convext.swap(_mobile((16, 5, 64, 16, True, "RE", 1))), torch.randn(1, 3, 96, 96)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            swapped(x)
            results.append(swapped(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def _large_images_then_large_weights():
    """Images of 6 MB, that go best through the layers one at a time, before layers with weights of 9 MB."""
    from torchvision.models.resnet import BasicBlock

    def down(c, k, stride):
        return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    return _settled(
        nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.ReLU(),
            BasicBlock(64, 64),
            BasicBlock(64, 64),
            BasicBlock(64, 96, 2, down(64, 96, 2)),
            BasicBlock(96, 96),
            BasicBlock(96, 512, 8, down(96, 512, 8)),
            BasicBlock(512, 512),
            BasicBlock(512, 512),
        )
    )


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_phases_of_a_batch_compute_what_the_whole_batch_does(threads, sequence_calls):
    swapped, x = convext.swap(_large_images_then_large_weights()), torch.randn(4, 3, 160, 160)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (4, 3, 1):  # 3: two threads cannot take the same number of images
            apart = swapped(x[:batch])  # the first call of a shape runs layer by layer
            calls = len(sequence_calls)
            assert torch.equal(swapped(x[:batch]), apart) and len(sequence_calls) > calls
    finally:
        torch.set_num_threads(before)


def _replace_weight(model):
    conv = model[3].block[1][0]
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def _change_weight_in_place(model):
    model[3].block[0][0].weight.mul_(1.5)


def _change_weight_through_data(model):
    model[3].block[0][0].weight.data = torch.randn_like(model[3].block[0][0].weight)


def _load(model):
    model.load_state_dict(
        {key: value * 1.1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    )


def _change_eps(model):
    model[4].block[0][1].eps = 0.5


def _change_statistics(model):
    model[4].block[1][1].running_var.mul_(2)


def _replace_statistics(model):
    model[4].block[1][1].running_mean = torch.randn_like(model[4].block[1][1].running_mean)


def _hook(model):
    model[4].block[0].register_forward_hook(lambda module, args, out: out * 2)


def _hook_inside_squeeze_and_excitation(model):
    model[3].block[2].fc1.register_forward_hook(lambda module, args, out: out + 1)


def _replace_forward(model):
    model[4].forward = lambda x, forward=model[4].forward: forward(x) + 1


def _exchange_module(model):
    model[4].block[0][2] = nn.ReLU()


def _training_statistics(model):
    model[3].block[0][1].train()
    model[3].block[0][1].momentum = 0.0


def _wider_dilation(model):
    conv = model[3].block[1][0]
    conv.dilation, conv.padding = (2, 2), (4, 4)


def _gate(model):
    model[3].block[2].scale_activation = nn.Sigmoid()


CHANGES = [
    _replace_weight,
    _change_weight_in_place,
    _change_weight_through_data,
    _load,
    _change_eps,
    _change_statistics,
    _replace_statistics,
    _hook,
    _hook_inside_squeeze_and_excitation,
    _replace_forward,
    _exchange_module,
    _training_statistics,
    _wider_dilation,
    _gate,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_a_change_of_the_model_is_noticed(change, swapped_and_changed):
    model = _mobile((16, 5, 64, 16, True, "RE", 1), (16, 3, 72, 24, False, "HS", 1))
    x = torch.randn(2, 3, 40, 40)
    swapped = swapped_and_changed(model, x, change, rtol=1e-3)
    expected = model(x)
    for _ in range(3):
        _close(swapped(x), expected)


@torch.no_grad()
def test_inputs_of_other_shapes_dtypes_and_layouts_in_turns():
    model = NETWORKS["squeeze and excitation"]()
    swapped = convext.swap(copy.deepcopy(model))
    inputs = [torch.randn(1, 3, 32, 32), torch.randn(3, 3, 32, 32), torch.randn(1, 3, 33, 47)]
    inputs.append(inputs[0].to(memory_format=torch.channels_last))
    inputs.append(torch.randn(1, 32, 32, 6).permute(0, 3, 1, 2)[:, ::2])
    for _ in range(3):
        for x in inputs:
            y, expected = swapped(x), model(x)
            assert y.stride() == expected.stride()
            _close(y, expected)


@torch.no_grad()
def test_a_squeeze_of_another_width_through_data_is_noticed():
    """What follows from extents is kept from call to call, the memory for the squeezed channels among it."""
    model, x = NETWORKS["squeeze and excitation"](), torch.randn(1, 3, 32, 32)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        swapped(x)
    wide = 1 << 18  # a row of them is larger than all that was taken
    weights = torch.randn(wide, 64, 1, 1) / 8, torch.randn(wide), torch.randn(64, wide, 1, 1) / 512
    for network in (model, swapped):
        [excite] = [m for m in network[3].modules() if type(m).__name__ == "SqueezeExcitation"]
        excite.fc1.weight.data, excite.fc1.bias.data, excite.fc2.weight.data = weights
    for _ in range(3):
        _close(swapped(x), model(x))


@torch.no_grad()
def test_layer_by_layer_runs_them_apart(sequence_calls):
    swapped, x = convext.swap(NETWORKS["inverted residuals"]()), torch.randn(1, 3, 32, 32)
    for _ in range(3):
        together = swapped(x)
    calls = len(sequence_calls)
    with convext.layer_by_layer():
        assert torch.equal(swapped(x), together) and len(sequence_calls) == calls
        with convext.layer_by_layer(False):
            swapped(x)
        assert len(sequence_calls) > calls
    with pytest.raises(TypeError, match="layer_by_layer: expected True or False, got 1"):
        convext.layer_by_layer(1)


@torch.no_grad()
def test_double_precision_runs_as_one_call(sequence_calls):
    model, x = NETWORKS["inverted residuals"]().double(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        y = swapped(x)
    assert sequence_calls
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_recorded_as_before(sequence_calls):
    model, x = NETWORKS["inverted residuals"](), torch.randn(1, 3, 32, 32)
    swapped = convext.swap(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            swapped(x)
    calls = len(sequence_calls)
    assert calls
    swapped(x).sum().backward()
    model(x).sum().backward()
    assert len(sequence_calls) == calls
    for ours, theirs in zip(swapped.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_result_of_the_user_between_layers_stays_a_tensor(sequence_calls):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.third = nn.Conv2d(16, 8, 1)

        def forward(self, x):
            a = self.first(x)
            b = self.second(a)
            return self.third(b), a

    model, x = Network().eval(), torch.randn(2, 8, 20, 20)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        for ours, theirs in zip(swapped(x), model(x)):
            _close(ours, theirs)


@torch.no_grad()
def test_a_container_that_is_no_sequence_leaves_those_around_it(sequence_calls):
    from torchvision.models.resnet import BasicBlock

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.three = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, x):
            return torch.cat([self.one(x), self.three(x)], 1)

    model = _settled(
        nn.Sequential(nn.Conv2d(3, 16, 3), BasicBlock(16, 16), BasicBlock(16, 16), Branches(), BasicBlock(16, 16))
    )
    swapped, x = convext.swap(copy.deepcopy(model)), torch.randn(2, 3, 20, 20)
    expected, apart = model(x), swapped(x)
    swapped(x)
    sequence_calls.clear()
    together = swapped(x)
    assert sequence_calls == [5, 2]
    assert torch.equal(together, apart)
    _close(together, expected)


# What follows squeeze and excitation -> the steps of the calls: a pointwise convolution takes it in, and no other step.
BEHIND_SQUEEZE_AND_EXCITATION = {
    "convolution": lambda: nn.Conv2d(64, 64, 1),
    "layer norm": lambda: torchvision.models.convnext.LayerNorm2d(64),
    "linear": lambda: nn.Sequential(
        torchvision.ops.Permute([0, 2, 3, 1]), nn.Linear(64, 64), torchvision.ops.Permute([0, 3, 1, 2])
    ),
}


@pytest.mark.parametrize("name", BEHIND_SQUEEZE_AND_EXCITATION)
@torch.no_grad()
def test_squeeze_and_excitation_is_computed_whatever_follows(name, sequence_calls):
    depthwise, squeeze_and_excitation = nn.Conv2d(64, 64, 3, 1, 1, groups=64), torchvision.ops.SqueezeExcitation(64, 16)
    behind, last = BEHIND_SQUEEZE_AND_EXCITATION[name](), nn.Conv2d(64, 64, 1)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), depthwise, squeeze_and_excitation, behind, last).eval()
    x, swapped = torch.randn(1, 3, 56, 56), convext.swap(copy.deepcopy(model))
    for _ in range(3):
        _close(swapped(x), model(x))
    assert (max(sequence_calls) >= 4) is (name == "convolution"), sequence_calls


@torch.no_grad()
def test_a_batch_norm_that_keeps_no_statistics_runs_by_itself(sequence_calls):
    layers = [
        nn.Conv2d(8, 32, 1),
        nn.BatchNorm2d(32, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 16, 1),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 8, 24, 24)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        _close(swapped(x), model(x))
    assert not sequence_calls


@torch.no_grad()
def test_a_swapped_network_is_freed():
    model = convext.swap(NETWORKS["squeeze and excitation"]())
    for _ in range(3):
        model(torch.randn(1, 3, 32, 32))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
