"""Training: a convolution between two batch norms runs a piece of the batch at a time, and computes its input and its
gradient as it reads them (csrc/cpu/runtime/training.h); squeeze and excitation runs over what is not kept. The numbers
are the unswapped model's all the same."""

import copy

import pytest
import torch
import torch.nn as nn

import convext
from convext import autograd, backends, ops
from convext.backends import unavailable
from convext.bench.memory import saved_bytes

pytestmark = pytest.mark.skipif(unavailable("native", "cpu") is not None, reason="the library is not built")


class Excite(nn.Module):
    def __init__(self, c, gate, bias=True):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.act = nn.Conv2d(c, c // 4, 1, bias=bias), nn.SiLU()
        self.excite, self.gate = nn.Conv2d(c // 4, c, 1, bias=bias), gate()

    def forward(self, x):
        return x * self.gate(self.excite(self.act(self.squeeze(self.pool(x)))))


def normed(c, k, activation, size=1, stride=1, groups=1):
    conv = nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(k), *([] if activation is None else [activation()]))


class Inverted(nn.Module):
    """An inverted residual with what lies between its convolutions, and a sum where the shapes allow it."""

    def __init__(self, c, wide, k, activation=nn.ReLU6, size=3, stride=1, gate=None):
        super().__init__()
        middle = [] if gate is None else [Excite(wide, gate)]
        self.block = nn.Sequential(
            normed(c, wide, activation),
            normed(wide, wide, activation, size, stride, wide),
            *middle,
            normed(wide, k, None),
        )
        self.adds = c == k and stride == 1

    def forward(self, x):
        return x + self.block(x) if self.adds else self.block(x)


class Bottleneck(nn.Module):
    def __init__(self, c, narrow):
        super().__init__()
        self.block = nn.Sequential(
            normed(c, narrow, nn.ReLU), normed(narrow, narrow, nn.ReLU, 3), normed(narrow, c, None)
        )

    def forward(self, x):
        return torch.relu(x + self.block(x))


NETWORKS = {
    "inverted": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), Inverted(16, 48, 16), Inverted(16, 40, 24, stride=2)),
    "inverted_5x5_hardswish": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Inverted(8, 34, 8, nn.Hardswish, 5)),
    "sigmoid_gates": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Inverted(8, 36, 8, nn.SiLU, gate=nn.Sigmoid)),
    "hardsigmoid_gates": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), Inverted(8, 36, 12, nn.Hardswish, 5, 2, gate=nn.Hardsigmoid)
    ),
    "bottleneck": lambda: nn.Sequential(nn.Conv2d(3, 40, 1), Bottleneck(40, 32), Bottleneck(40, 16)),
}


def pair(network, dtype=torch.float64, recompute=False):
    torch.manual_seed(3)
    plain = NETWORKS[network]().to(dtype)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return plain.train(), convext.swap(copy.deepcopy(plain), recompute=recompute).train()


def image(dtype=torch.float64, n=5, size=33):
    return torch.randn(n, 3, size, size - 2, dtype=dtype, generator=torch.Generator().manual_seed(5)).requires_grad_()


def step(model, x):
    """The result, every gradient and every buffer."""
    model.zero_grad()
    x.grad = None
    y = model(x)
    (y.sin() * torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)).sum().backward()
    buffers = [b.clone().double() for b in model.buffers()]
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *buffers]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_in_several_pieces_is_the_unswapped_models(network, channels_last, recompute):
    plain, swapped = pair(network, recompute=recompute)
    x = image()
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(2):
        for a, b in zip(step(swapped, x), step(plain, x), strict=True):
            # Sums of up to 5,000 terms.
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("network", ["inverted", "inverted_5x5_hardswish", "bottleneck"])  # gates are ATen's products
def test_no_bit_depends_on_the_number_of_threads(network):
    _, swapped = pair(network, torch.float32)
    x, former, found = image(torch.float32), torch.get_num_threads(), []
    state = copy.deepcopy(swapped.state_dict())
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            swapped.load_state_dict(state)
            with convext.backend("native"):  # ATen's may
                found.append(step(swapped, x))
    finally:
        torch.set_num_threads(former)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("network", ["inverted", "sigmoid_gates"])
def test_what_lies_between_is_not_computed_by_itself(network, monkeypatch):
    """Neither the activated tensor, in both passes, nor the batch norm's gradient."""
    swapped, x = pair(network, torch.float32)[1], image(torch.float32)

    def values(*_):
        raise AssertionError("it was computed")

    monkeypatch.setattr(autograd.Recipe, "values", values)
    monkeypatch.setattr(ops, "bn_act_from_sums", values)
    monkeypatch.setattr(ops, "bn_act_and_sums", values)
    monkeypatch.setattr(ops, "bn_act_backward", values)
    backends.reset_counts()
    with convext.backend("native"):
        step(swapped, x)
    counts = {name: count for (_, name, _), count in backends.counts().items()}
    blocks = sum(isinstance(m, Inverted) for m in swapped)
    assert counts["bn_conv_backward"] == counts["bn_act"] + 2 * blocks == 3 * blocks  # the blocks' results are written


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize("bias", [False, True])
def test_gates_are_differentiated(gate, bias):
    """Twice, too, where PyTorch can."""
    torch.manual_seed(0)
    plain = nn.Sequential(normed(3, 8, nn.SiLU, 3), Excite(8, gate, bias), normed(8, 4, None)).double().train()
    swapped = convext.swap(copy.deepcopy(plain)).train()
    x = torch.randn(3, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for model in (swapped, plain) if gate is nn.Sigmoid else ():
        (dx,) = torch.autograd.grad((model(x) ** 3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((dx**2).sum(), [x, *model.parameters()]))
    for a, b in zip(*found, strict=True) if found else ():
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    parameters = dict(swapped.named_parameters())
    names = [name for name in parameters if "squeeze" in name or "excite" in name]

    def call(x, *tensors):
        return torch.func.functional_call(swapped, dict(zip(names, tensors)), (x,))

    assert torch.autograd.gradcheck(call, (x, *(parameters[name] for name in names)))


def test_gates_keep_neither_their_input_nor_their_product_twice():
    """PyTorch's keeps besides the batch norms' results and the activations', for the depthwise convolution and the
    product."""
    plain, swapped = pair("sigmoid_gates", torch.float32)
    x = image(torch.float32)
    wide = 5 * 33 * 31 * 36 * 4  # bytes of the widened image
    step(swapped, x)
    assert saved_bytes(plain, x) - saved_bytes(swapped, x) > 3.9 * wide


@pytest.mark.parametrize("what", ["hook", "layer", "forward"])
def test_gates_that_are_not_what_they_were_run_as_they_are(what):
    plain, swapped = pair("sigmoid_gates")
    x, seen = image(n=2, size=9), []
    step(swapped, x)
    for model in (plain, swapped):
        excite = model[1].block[2]
        if what == "hook":
            excite.pool.register_forward_hook(lambda module, given, result: seen.append(given[0].detach().clone()))
        elif what == "layer":
            excite.gate = nn.Tanh()
        else:
            excite.register_forward_hook(lambda module, given, result: 2 * result)
    swapped.load_state_dict(plain.state_dict())
    for a, b in zip(step(swapped, x), step(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert len(seen) == (2 if what == "hook" else 0)
    if seen:
        torch.testing.assert_close(*seen, rtol=1e-8, atol=1e-8)


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def strided_statistics(model, x):
    for m in batch_norms(model):
        m.running_mean = torch.stack([m.running_mean, m.running_mean], 1)[:, 0]
    return x


def statistics_with_a_gradient(model, x):
    for m in batch_norms(model):
        m.running_var.requires_grad_()
    return x


def short_statistics(model, x):
    for m in batch_norms(model):
        m.running_mean = m.running_mean[:-1].clone()
    return x


def another_dtype(model, x):
    model[1].block[1][0].weight.data = model[1].block[1][0].weight.data.float()
    return x


def one_pixel(model, x):
    return x[:1, :, :1, :1].detach().requires_grad_()


def nothing_learns(model, x):
    model.requires_grad_(False)
    return x.detach()


CHANGES = strided_statistics, statistics_with_a_gradient, short_statistics, another_dtype, one_pixel, nothing_learns


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_call_unlike_the_last_one_is_looked_at_anew(change):
    """Whatever else changes than the elements of its tensors."""
    found = []
    for model in pair("inverted"):
        x = image(n=2, size=9)
        for _ in range(2):
            step(model, x)
        x = change(model, x)
        try:
            y = model(x)
            gradients = torch.autograd.grad(y.sin().sum(), x) if y.requires_grad else ()
        except Exception as error:
            y, gradients = type(error), ()
        found.append([y, *gradients, *(b.clone().double() for b in model.buffers())])
    plain, swapped = found
    if isinstance(plain[0], type):
        assert plain.pop(0) is swapped.pop(0)
    for a, b in zip(swapped, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
