"""The operation sequences of KernelBench's fused convolution problems (its level 2), at small sizes: a convolution and
what follows it, in training mode without gradients, swapped beside plain PyTorch in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convext

CHANNELS = 8

# What follows a convolution of so many dimensions: (z, dimensions, the model) -> z. The model's `p` is a tensor of one
# value a channel. "residual" and "times residual" take the convolution's result again.
OPERATIONS = {
    "relu": lambda z, d, m: torch.relu(z),
    "leaky_relu": lambda z, d, m: F.leaky_relu(z, 0.2),
    "gelu": lambda z, d, m: F.gelu(z),
    "mish": lambda z, d, m: F.mish(z),
    "tanh": lambda z, d, m: torch.tanh(z),
    "sigmoid": lambda z, d, m: torch.sigmoid(z),
    "hardswish": lambda z, d, m: F.hardswish(z),
    "swish": lambda z, d, m: torch.sigmoid(z) * z,
    "mish by hand": lambda z, d, m: torch.tanh(F.softplus(z)) * z,
    "hardswish by hand": lambda z, d, m: z * torch.clamp((z + 3) / 6, 0, 1),
    "logistic by hand": lambda z, d, m: z * torch.sigmoid(z + 3) / 6,
    "hardtanh": lambda z, d, m: F.hardtanh(z, -0.5, 0.5),
    "clamp": lambda z, d, m: torch.clamp(z, min=0.0, max=1.0),
    "clamp low": lambda z, d, m: torch.clamp(z, min=-0.25),
    "minimum": lambda z, d, m: torch.min(z, torch.tensor(0.5, dtype=z.dtype)),
    "add p": lambda z, d, m: z + m.p,
    "mul p": lambda z, d, m: z * m.p,
    "sub p": lambda z, d, m: z - m.p,
    "add": lambda z, d, m: z + 0.5,
    "sub": lambda z, d, m: z - 0.5,
    "mul": lambda z, d, m: z * 2.0,
    "div": lambda z, d, m: z / 2.0,
    "twice": lambda z, d, m: z * z,
    "batch norm": lambda z, d, m: m.bn(z),
    "group norm": lambda z, d, m: m.gn(z),
    "layer norm": lambda z, d, m: F.layer_norm(z, z.shape[-1:]),
    "instance norm": lambda z, d, m: F.instance_norm(z),
    "softmax": lambda z, d, m: torch.softmax(z, 1),
    "logsumexp": lambda z, d, m: torch.logsumexp(z, 1, keepdim=True),
    "least": lambda z, d, m: torch.min(z, 1, keepdim=True)[0],
    "greatest": lambda z, d, m: torch.max(z, 1, keepdim=True)[0],
    "sum": lambda z, d, m: torch.sum(z, 1, keepdim=True),
    "mean": lambda z, d, m: torch.mean(z, tuple(range(2, 2 + d)), keepdim=True),
    "max pool": lambda z, d, m: getattr(F, f"max_pool{d}d")(z, 2),
    "average pool": lambda z, d, m: getattr(F, f"avg_pool{d}d")(z, 2),
    "less mean": lambda z, d, m: z - torch.mean(z, tuple(range(2, 2 + d)), keepdim=True),
}
# KernelBench's number: convolution > operations.
SEQUENCES = """
1: Conv2d > relu > add p
2: ConvTranspose2d > add p > clamp > mul > clamp > div
3: ConvTranspose3d > add > layer norm > average pool > gelu
4: Conv2d > mish > mish
5: ConvTranspose2d > sub p > tanh
6: Conv3d > softmax > max pool > max pool
7: Conv3d > relu > leaky_relu > gelu > sigmoid > add p
8: Conv3d > div > max pool > mean > add p > sum
10: ConvTranspose2d > max pool > hardtanh > mean > tanh
11: ConvTranspose2d > batch norm > tanh > max pool > group norm
13: ConvTranspose3d > mean > add p > softmax > tanh > mul
15: ConvTranspose3d > batch norm > less mean
16: ConvTranspose2d > mish > add > hardtanh > mul
17: Conv2d > instance norm > div
19: ConvTranspose2d > gelu > group norm
20: ConvTranspose3d > add p > residual > times residual > residual
21: Conv2d > add p > mul p > sigmoid > group norm
23: Conv3d > group norm > mean
24: Conv3d > least > softmax
25: Conv2d > least > tanh > tanh
26: ConvTranspose3d > residual > hardswish > twice
27: Conv3d > hardswish > group norm > mean
31: Conv2d > minimum > add p > mul
32: Conv2d > mul > least
34: ConvTranspose3d > layer norm > gelu > mul
35: Conv2d > sub > hardswish > max pool > mish
36: ConvTranspose2d > least > sum > gelu > add p
38: ConvTranspose3d > average pool > clamp > softmax > mul
42: ConvTranspose2d > mean > add p > logsumexp > sum > mul
43: Conv3d > max pool > logsumexp > relu
44: ConvTranspose2d > mul > mean > mean
46: Conv2d > sub > tanh > sub > average pool
47: Conv3d > mish > tanh
48: Conv3d > mul p > tanh > mul p > sigmoid
49: ConvTranspose3d > softmax > sigmoid
50: ConvTranspose3d > mul > average pool > add p > mul
52: Conv2d > mish by hand > batch norm
54: Conv2d > mul p > leaky_relu > gelu
57: Conv2d > relu > hardswish by hand
58: ConvTranspose3d > logsumexp > logistic by hand > sub > clamp
60: ConvTranspose3d > swish > group norm > hardswish
61: ConvTranspose3d > relu > group norm
65: Conv2d > average pool > sigmoid > sum
67: Conv2d > gelu > mean
69: Conv2d > hardswish > relu
71: Conv2d > div > leaky_relu
72: ConvTranspose3d > batch norm > average pool > average pool
73: Conv2d > batch norm > mul
74: ConvTranspose3d > leaky_relu > mul p > leaky_relu > max pool
77: ConvTranspose3d > mul > batch norm > mean
78: ConvTranspose3d > max pool > max pool > sum
79: Conv3d > mul p > instance norm > clamp > mul p > greatest
82: Conv2d > tanh > mul > add p > max pool
83: Conv3d > group norm > minimum > clamp
85: Conv2d > group norm > mul p > max pool > clamp
87: Conv2d > sub > sub > mish
89: ConvTranspose3d > max pool > softmax > sub p > swish > greatest
90: Conv3d > leaky_relu > add p > clamp > gelu
91: ConvTranspose2d > softmax > add p > mul > sigmoid
92: Conv2d > group norm > tanh > hardswish > residual > logsumexp
93: ConvTranspose2d > add > minimum > gelu > mul
96: ConvTranspose3d > mul > max pool > mean > clamp
100: ConvTranspose3d > clamp low > div
"""
TABLE = dict(line.split(": ") for line in SEQUENCES.strip().splitlines())


class Sequence(nn.Module):
    def __init__(self, layer: str, operations: list[str]):
        super().__init__()
        self.dimensions, self.operations = int(layer[-2]), operations
        settings = {"stride": 2, "padding": 1} if "Transpose" in layer else {}
        self.layer = getattr(nn, layer)(4, CHANNELS, 3, **settings)
        self.bn = getattr(nn, f"BatchNorm{self.dimensions}d")(CHANNELS)
        self.gn = nn.GroupNorm(4, CHANNELS)
        self.p = nn.Parameter(torch.randn(CHANNELS, *[1] * self.dimensions))

    def forward(self, x):
        z = first = self.layer(x)
        for name in self.operations:
            if name == "residual":
                z = z + first
            elif name == "times residual":
                z = z * first
            else:
                z = OPERATIONS[name](z, self.dimensions, self)
        return z


@pytest.mark.parametrize("number", TABLE)
def test_sequence(number):
    layer, *operations = TABLE[number].split(" > ")
    torch.manual_seed(int(number))
    model = Sequence(layer, operations)
    x = torch.rand(3, 4, *[10 if model.dimensions < 3 else 8] * model.dimensions)
    exact, swapped = copy.deepcopy(model).double(), convext.swap(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(2):  # the second call goes by what the first one prepared
            expected, plain, found = exact(x.double()), model(x), swapped(x)
            assert found.shape == plain.shape and found.stride() == plain.stride()
            scale = expected.abs().max()
            # Sums of at most 216 products, and up to 8 operations that pass an error on at most twofold: 2^8 roundings.
            limit = max(256 * torch.finfo(torch.float32).eps * scale, 4 * (plain - expected).abs().max())
            assert (found - expected).abs().max() <= limit
    for value, there in zip(swapped.buffers(), exact.buffers()):
        torch.testing.assert_close(value.double(), there.double(), rtol=1e-5, atol=1e-6)
