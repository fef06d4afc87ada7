"""Linear layers of a swapped network in training: run as 1x1 convolutions, with the activation after them."""

import copy

import pytest
import torch
from torch import nn

import convext
from convext import ops
from convext.activation import BACKWARD
from convext.backends import native
from convext.problem import ACTIVATIONS

pytestmark = pytest.mark.smoke
EPS = torch.finfo(torch.float32).eps


def depthwise_kernels():
    return {kernel["name"] for kernel in native.kernels() if kernel["algorithm"] == "depthwise"}


class Mixer(nn.Module):
    """ConvNeXt's block: a depthwise convolution, then linear layers over channels in NHWC."""

    def __init__(self, activation=nn.GELU, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 40, bias=bias), activation(), nn.Linear(40, 16, bias=bias)

    def forward(self, x):
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.down(self.act(self.up(y))).permute(0, 3, 1, 2)


def make(**arguments):
    torch.manual_seed(3)
    model = Mixer(**arguments)
    return model, convext.swap(copy.deepcopy(model))


def sample(size=6):
    return torch.randn(3, 16, size, size, generator=torch.Generator().manual_seed(4))


def gradients(model, x):
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Tanh])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_as_close_to_float64_as_torchs(activation, bias, count_native):
    model, swapped = make(activation=activation, bias=bias)
    exact = gradients(copy.deepcopy(model).double(), sample().double())
    theirs, ours = gradients(model, sample()), gradients(swapped, sample())
    for right, other, mine in zip(exact, theirs, ours, strict=True):
        # Sums of up to 3 * 6 * 6 products, of factors that carry the rounding of three layers before them.
        limit = 4 * EPS * (3 * 36) ** 0.5 * right.abs().max() + 2 * (other - right).abs().max()
        assert (mine - right).abs().max() <= limit
    wgrads = {name: calls for (pass_, name), calls in count_native().items() if pass_ == "wgrad"}
    assert sum(calls for name, calls in wgrads.items() if name not in depthwise_kernels()) == 2


@pytest.mark.parametrize("case", ["no gradients", "few rows", "float64", "autocast"])
def test_what_stays_with_torch(case, count_native):
    model, swapped = make()
    x = sample(4 if case == "few rows" else 6)
    if case == "float64":
        model, swapped, x = model.double(), swapped.double(), x.double()
    with torch.set_grad_enabled(case != "no gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        expected, got = model(x), swapped(x)
    torch.testing.assert_close(got, expected, rtol=1e-5 if case != "autocast" else 1e-2, atol=1e-5)
    assert {name for pass_, name in count_native() if pass_ == "fprop"} <= depthwise_kernels()


def test_hooked_layer_is_called_as_it_is():
    model, swapped = make()
    heard = []
    swapped.up.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    swapped.act.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    torch.testing.assert_close(swapped(sample()), model(sample()), rtol=1e-5, atol=1e-5)
    assert heard == [(3, 6, 6, 40)] * 2


def test_input_written_before_the_activation_is_read_before():
    class Writes(Mixer):
        def forward(self, x):
            y = self.norm(self.conv(x).permute(0, 2, 3, 1))
            z = self.up(y)
            y.mul_(2)
            return self.act(z).sum() + y.sum()

    torch.manual_seed(3)
    model = Writes()
    with torch.no_grad():
        expected = model(sample())
    swapped = convext.swap(model)
    torch.testing.assert_close(swapped(sample()), expected)


def test_parameter_replaced_after_the_swap_is_the_one_that_counts():
    model, swapped = make()
    swapped(sample())
    for one in (model, swapped):
        one.up.weight = nn.Parameter(torch.full((40, 16), 0.25))
    torch.testing.assert_close(swapped(sample()), model(sample()), rtol=1e-5, atol=1e-5)


def test_gradient_of_the_gradient():
    model, swapped = make()

    def twice(model):
        x = sample().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, model.up.weight])

    for ours, theirs in zip(twice(swapped), twice(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_and_its_sum_from_one_pass(activation, dtype):
    generator = torch.Generator().manual_seed(6)
    shape = 2, 5, 9, 11
    z, dout = ((4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
    z[z.abs() == 3] = 3.5  # hardswish has no derivative there
    exact = BACKWARD[activation](dout.double(), z.double())
    dz, sums = ops.act_backward(dout, z, activation)
    eps, count = torch.finfo(dtype).eps, shape[0] * shape[2] * shape[3]
    compute = max(eps * 0.5, 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    assert ((dz - exact).abs() <= compute * (exact.abs() + dout.abs().double())).all()
    limit = (eps + compute * count**0.5) * dout.abs().double().sum((0, 2, 3))
    assert ((sums - exact.sum((0, 2, 3))).abs() <= limit).all()
