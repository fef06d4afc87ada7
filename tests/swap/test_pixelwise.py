"""LayerNorm and linear layers over the channels of each pixel, run as steps of a sequence
(convext/swap/match/channel_layers.py): what they compute, and that whatever changes is noticed."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt, LayerNorm2d

import convext

pytestmark = pytest.mark.skipif(
    convext.backends.unavailable("native", "cpu") is not None, reason="sequences are calls of the compiled library"
)


def _settled(model, seed=5):
    """The model in eval mode, every parameter of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        low, high = (0.5, 1.5) if parameter.dim() == 1 and name.endswith("weight") else (-0.5, 0.5)
        if parameter.dim() > 1 and name.endswith("weight"):
            high = (3.0 / parameter[0].numel()) ** 0.5  # keeps the variance of what it multiplies
            low = -high
        parameter.data.uniform_(low, high, generator=generator)
    return model.eval()


def _convnext():
    settings = [CNBlockConfig(24, 40, 2), CNBlockConfig(40, None, 2)]
    return _settled(ConvNeXt(settings, stochastic_depth_prob=0.1, num_classes=10))


class Block(nn.Module):
    """A block as timm and the paper's own code write it: `form` says where the scale and the sum stand."""

    def __init__(self, form, c=24, bias=True, affine=True, activation=nn.GELU):
        super().__init__()
        self.form = form
        self.dw = nn.Conv2d(c, c, 7, padding=3, groups=c, bias=bias)
        self.norm = nn.LayerNorm(c, eps=1e-3, elementwise_affine=affine)
        self.one, self.act, self.two = nn.Linear(c, 4 * c, bias), activation(), nn.Linear(4 * c, c, bias)
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x):
        y = self.dw(x).permute(0, 2, 3, 1)
        y = self.two(self.act(self.one(self.norm(y))))
        if self.form == "paper":
            return x + (self.gamma * y).permute(0, 3, 1, 2)
        y = torch.permute(y, (0, 3, 1, 2))
        if self.form == "timm":
            return y.mul(self.gamma.reshape(1, -1, 1, 1)) + x
        return y if self.form == "no sum" else y + x


class Norms(nn.Module):
    """A LayerNorm2d between convolutions, and a norm between permutations."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 20, 4, 4), LayerNorm2d(20, eps=1e-6)
        self.second, self.other = nn.Conv2d(20, 36, 2, 2), nn.LayerNorm(36, bias=False)
        self.third = nn.Conv2d(36, 16, 3, padding=1)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)))
        return self.third(self.other(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


NETWORKS = {
    "convnext": (_convnext, 23),
    "timm": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), Block("timm"), Block("timm"))), 9),
    "paper": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), LayerNorm2d(24), Block("paper"))), 6),
    "no scale": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), Block("sum"))), 5),
    "no sum": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), Block("no sum"))), 5),
    "no bias": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), Block("timm", bias=False))), 5),
    "no affine": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), Block("timm", affine=False))), 5),
    "relu": (lambda: _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), Block("timm", activation=nn.ReLU))), 5),
    "norms": (lambda: _settled(Norms()), 5),
}


def _exact(model, x):
    return copy.deepcopy(model).double()(x.double())


def _close(actual, model, x):
    """Within a few times eager's own distance from float64, or the rounding of a sum of a few hundred terms, whichever
    is more: sums in another order err as eager's do, but not by the same amounts."""
    exact = _exact(model, x)
    eager = (model(x) - exact).abs().max()
    allowed = max(4 * eager, 16 * torch.finfo(x.dtype).eps * exact.abs().max())
    assert (actual - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_a_network_runs_as_one_call_and_computes_the_same(name, channels_last, sequence_calls):
    build, steps = NETWORKS[name]
    model, x = build(), torch.randn(2, 3, 72, 56, generator=torch.Generator().manual_seed(1))
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    swapped = convext.swap(copy.deepcopy(model))
    apart = swapped(x)
    sequence_calls.clear()
    together = swapped(x)
    assert sequence_calls == [steps]
    assert together.stride() == apart.stride() == model(x).stride()
    _close(together, model, x)
    with convext.layer_by_layer():
        _close(swapped(x), model, x)
    assert torch.equal(model(x), convext.revert(swapped)(x))


@pytest.mark.parametrize("part", ["features", "features.1", "features.1.0"])
@torch.no_grad()
def test_a_part_called_by_itself_returns_the_strides_that_it_did(part):
    model = _convnext()
    swapped = convext.swap(copy.deepcopy(model))
    x = torch.randn(2, 24 if part != "features" else 3, 40, 48)
    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        for _ in range(3):
            y, expected = swapped.get_submodule(part)(given), model.get_submodule(part)(given)
            assert y.stride() == expected.stride()
            _close(y, model.get_submodule(part), given)


@torch.no_grad()
def test_results_do_not_depend_on_the_number_of_threads(sequence_calls):
    swapped, x = convext.swap(_convnext()), torch.randn(3, 3, 96, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            swapped(x)
            results.append(swapped(x))
    finally:
        torch.set_num_threads(threads)
    assert sequence_calls and torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@torch.no_grad()
def test_double_precision_runs_as_one_call(sequence_calls):
    model, x = _convnext().double(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(3):
        y = swapped(x)
    assert sequence_calls
    torch.testing.assert_close(y, model(x), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_bfloat16_and_autocast_run_layer_by_layer(sequence_calls):
    model, x = _convnext(), torch.randn(2, 3, 40, 40)
    swapped = convext.swap(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        for _ in range(3):
            y = swapped(x)
    assert not any(steps > 2 for steps in sequence_calls) and y.dtype is expected.dtype
    # bfloat16 has 8 bits, and rounds every layer's output.
    torch.testing.assert_close(y, expected, rtol=0, atol=0.1 * expected.abs().max().item())
    half = convext.swap(copy.deepcopy(model).bfloat16())
    for _ in range(3):
        y = half(x.bfloat16())
    torch.testing.assert_close(y.float(), model(x), rtol=0, atol=0.1 * expected.abs().max().item())


@torch.no_grad()
def test_a_mean_far_from_zero_costs_the_variance_no_accuracy(sequence_calls):
    model = _settled(Norms())
    model.first.bias.add_(3e3)
    x = torch.randn(2, 3, 72, 56)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(2):
        y = swapped(x)
    assert sequence_calls
    _close(y, model, x)


def _block(model):
    return model.features[1][0]


CHANGES = {
    "linear weight": lambda m: setattr(_block(m).block[3], "weight", nn.Parameter(torch.randn(96, 24) / 5)),
    "linear weight in place": lambda m: _block(m).block[5].weight.mul_(3),
    "linear weight through data": lambda m: setattr(_block(m).block[3].weight, "data", torch.randn(96, 24)),
    "linear bias": lambda m: _block(m).block[5].bias.add_(1),
    "no linear bias": lambda m: setattr(_block(m).block[5], "bias", None),
    "norm weight": lambda m: _block(m).block[2].weight.mul_(2),
    "norm bias": lambda m: setattr(_block(m).block[2], "bias", nn.Parameter(torch.randn(24))),
    "no norm weight": lambda m: setattr(_block(m).block[2], "weight", None),
    "eps": lambda m: setattr(_block(m).block[2], "eps", 2.0),
    "norm 2d": lambda m: setattr(m.features[2][0], "eps", 2.0),
    "layer scale": lambda m: setattr(_block(m), "layer_scale", nn.Parameter(torch.randn(24, 1, 1))),
    "layer scale in place": lambda m: _block(m).layer_scale.mul_(-2),
    "layer scale of one value": lambda m: setattr(_block(m), "layer_scale", nn.Parameter(torch.full((1, 1, 1), 2.0))),
    "hook on a linear layer": lambda m: _block(m).block[3].register_forward_hook(lambda module, args, out: out * 2),
    "hook on a norm": lambda m: m.features[2][0].register_forward_pre_hook(lambda module, args: (args[0] * args[0],)),
    "hook on the activation": lambda m: _block(m).block[4].register_forward_hook(lambda module, args, out: out + 1),
    "hook on a block": lambda m: _block(m).register_forward_hook(lambda module, args, out: out * 2),
    "activation": lambda m: _block(m).block.__setitem__(4, nn.ReLU()),
    "approximation": lambda m: setattr(_block(m).block[4], "approximate", "tanh"),
    "norm exchanged": lambda m: _block(m).block.__setitem__(2, nn.Identity()),
    "forward": lambda m: setattr(_block(m).block[3], "forward", lambda x: torch.cat([x] * 4, -1)),
    "stochastic depth": lambda m: _block(m).stochastic_depth.train() and setattr(_block(m).stochastic_depth, "p", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_the_model_is_noticed(change, swapped_and_changed):
    model, x = _convnext(), torch.randn(2, 3, 40, 40)
    swapped = swapped_and_changed(model, x, CHANGES[change], rtol=1e-5, atol=1e-6)
    for _ in range(3):
        if change == "stochastic depth":  # drops every row: nothing of the block is left
            torch.testing.assert_close(swapped(x), model(x), rtol=1e-4, atol=1e-4)
        else:
            _close(swapped(x), model, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_an_order_of_dimensions_changed_in_place_is_noticed(memory_format, sequence_calls):
    block = _settled(CNBlock(24, 1.0, 0.0))
    swapped = convext.swap(copy.deepcopy(block))
    x = torch.randn(2, 24, 24, 24).to(memory_format=memory_format)
    for _ in range(3):
        swapped(x)
    assert bool(sequence_calls) == (memory_format is torch.channels_last)  # one call then, in which no module runs
    for changed in (block, swapped):
        changed.block[6].dims[:] = [0, 3, 2, 1]
    for _ in range(3):
        _close(swapped(x), block, x)


def test_gradients_are_recorded_as_before(sequence_calls):
    model, x = _convnext(), torch.randn(1, 3, 40, 40)
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
def test_training_mode_runs_the_modules(sequence_calls):
    model, x = _convnext().train(), torch.randn(2, 3, 40, 40)
    swapped = convext.swap(copy.deepcopy(model))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(swapped(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_shared_between_blocks(sequence_calls):
    first, second = Block("timm"), Block("timm")
    second.one, second.norm = first.one, first.norm
    model = _settled(nn.Sequential(nn.Conv2d(3, 24, 4, 4), first, second))
    swapped, x = convext.swap(copy.deepcopy(model)), torch.randn(2, 3, 64, 64)
    for _ in range(3):
        y = swapped(x)
    assert sequence_calls[-1] == 9
    _close(y, model, x)


@torch.no_grad()
def test_a_run_alone_and_one_that_the_user_looks_into(sequence_calls):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.LayerNorm(16)
            self.one, self.two = nn.Linear(16, 48), nn.Linear(48, 16)

        def forward(self, x):
            y = self.conv(x).permute(0, 2, 3, 1)
            y = self.norm(y)
            z = self.two(F.relu(self.one(y)))
            return z.permute(0, 3, 1, 2) + x, y

    model = _settled(Mixer())
    swapped, x = convext.swap(copy.deepcopy(model)), torch.randn(2, 16, 20, 20)
    for _ in range(3):
        for ours, theirs in zip(swapped(x), model(x)):
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_report_tells_what_runs_over_the_channels():
    swapped = convext.swap(_convnext())
    for _ in range(2):
        swapped(torch.randn(1, 3, 64, 64))
    report = convext.report(swapped)
    assert report["features.1.0.block.0"].fused == "layer norm + linear + gelu + linear + scale + add"
    assert report["features.0.0"].fused == "layer norm"
    assert not report["features.1.0.block.0"].reason


@torch.no_grad()
def test_verify_and_copies():
    model, x = _settled(torchvision.models.convnext_tiny(weights=None)), torch.randn(1, 3, 64, 64)
    assert convext.verify(model, x)
    swapped = convext.swap(copy.deepcopy(model))
    for _ in range(2):
        swapped(x)
    twin = copy.deepcopy(swapped)
    twin.features[1][0].layer_scale.mul_(2)
    model.features[1][0].layer_scale.mul_(2)
    for _ in range(3):
        _close(twin(x), model, x)
