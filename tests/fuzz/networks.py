"""Networks as people write them, small, with settings drawn at random.

Every block takes (rng, c) and maps (N, c, H, W) to the same shape, unless its name says otherwise, so that blocks
follow each other in any order. All classes stand at module level: they pickle, and rules patch them.
"""

import collections
import dataclasses
import enum
import importlib.util

import helpers
import torch
import torch.nn.functional as F
from torch import nn

GAIN = 1.0  # read by forwards; rules change them
SETTINGS = {"scale": 1.0, "order": ["scale", "shift"], "nested": {"shift": 0.25}}
IN_CHANNELS = 3


def flag(rng):
    return rng.choice((False, True))


class Swish(nn.Module):
    """Without a convolution: a capture looks through it."""

    def __init__(self):
        super().__init__()
        self.slope, self.gate = 1.0, nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.slope * x)


class Scaled(nn.Module):
    """The same, with tensors of its own, and a layer inside it whose training flag counts."""

    def __init__(self, rng):
        super().__init__()
        self.scale, self.act, self.drop = nn.Parameter(torch.tensor([0.5, 1.0])), activation(rng), nn.Dropout(0.2)
        self.register_buffer("shift", torch.tensor(0.25) if flag(rng) else None)

    def forward(self, x):
        if self.shift is not None:
            x = x + self.shift
        return self.drop(self.act(x * self.scale.mean()))


def activation(rng):
    return rng.choice(
        (
            Swish,
            lambda: Scaled(rng),
            lambda: nn.ReLU(),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.ReLU6(),
            lambda: nn.SiLU(),
            lambda: nn.Hardswish(inplace=True),
            lambda: nn.GELU(),
            lambda: nn.GELU(approximate="tanh"),
            lambda: nn.LeakyReLU(0.2),
            lambda: nn.LeakyReLU(0.1, inplace=True),
            lambda: nn.Mish(),
            lambda: nn.ELU(0.5),
            lambda: nn.Tanh(),
            lambda: nn.PReLU(),
            lambda: nn.Hardtanh(0.0, 6.0),
            lambda: nn.Hardtanh(-1.0, 2.0),
            lambda: nn.Identity(),
            lambda: nn.SiLU(inplace=True),
        )
    )()


def function(rng):
    return rng.choice((F.relu, torch.relu, F.silu, F.gelu, F.hardswish, F.relu6, torch.sigmoid, helpers.squash))


def norm(rng, c):
    # No GroupNorm: torch 2.11 crashes in its backward where a channels-last input needs no gradient.
    return rng.choice(
        (
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c, eps=1e-3, momentum=0.3),
            lambda: nn.BatchNorm2d(c, affine=False),
            lambda: nn.BatchNorm2d(c, track_running_stats=False),
            lambda: nn.BatchNorm2d(c, momentum=None),
            lambda: nn.Identity(),
            lambda: nn.InstanceNorm2d(c, affine=True),
        )
    )()


def conv(rng, c, k=None, size=None):
    """A convolution that keeps the image's size."""
    k = k or c
    size = size or rng.choice((1, 1, 3, 3, 3, 5))
    dilation = rng.choice((1, 1, 2)) if size > 1 else 1
    groups = rng.choice([g for g in (1, 1, 1, 2, c) if c % g == 0 and k % g == 0])
    mode = rng.choice(("zeros",) * 6 + ("reflect", "circular")) if size == 3 and dilation == 1 else "zeros"
    padding = rng.choice((size // 2 * dilation, "same")) if mode == "zeros" else size // 2
    return nn.Conv2d(c, k, size, padding=padding, dilation=dilation, groups=groups, bias=flag(rng), padding_mode=mode)


class Tail(nn.Module):
    """Elementwise operations behind a layer, some of which take a value again, or that somebody else reads."""

    def __init__(self, rng, c):
        super().__init__()
        self.layer = rng.choice(
            (lambda: conv(rng, c), lambda: nn.ConvTranspose2d(c, c, 3, padding=1), lambda: norm(rng, c))
        )()
        self.scale, self.shift = nn.Parameter(torch.full((c, 1, 1), 0.75)), nn.Parameter(torch.full((1, c, 1, 1), 0.25))
        self.slope, self.bound, self.one = 0.2, 1.5, nn.Parameter(torch.tensor(1.25))
        self.kept = rng.randrange(4) == 0
        self.operations = rng.choices(
            ("scale", "shift", "one", "less", "square", "slope", "bound", "tanh", "gate", "sum", "half", "inplace"),
            k=rng.randint(1, 5),
        )

    def forward(self, x):
        y = first = self.layer(x)
        for name in self.operations:
            y = getattr(self, f"do_{name}")(y)
        return y + 0.1 * first if self.kept else y

    def do_scale(self, y):
        return y * self.scale

    def do_shift(self, y):
        return self.shift + y

    def do_one(self, y):
        return y / self.one

    def do_less(self, y):
        return 1 - y

    def do_square(self, y):
        return y * y.clamp(-self.bound, self.bound)

    def do_slope(self, y):
        return F.leaky_relu(y, self.slope)

    def do_bound(self, y):
        return torch.clamp(y, max=self.bound)

    def do_tanh(self, y):
        return torch.tanh(y)

    def do_gate(self, y):
        return y * torch.sigmoid(y)

    def do_sum(self, y):
        return y + torch.maximum(y, self.shift)

    def do_half(self, y):
        return y.sub(0.5)

    def do_inplace(self, y):
        return y.mul_(0.5) if not self.kept else y * 0.5


# ---- chains ----------------------------------------------------------------------------------------------------------


def chain(rng, c):
    layers = []
    for _ in range(rng.randint(1, 3)):
        layers.append(conv(rng, c))
        if flag(rng):
            layers.append(norm(rng, c))
        if flag(rng):
            layers.append(activation(rng))
        if rng.randrange(4) == 0:
            layers.append(
                rng.choice(
                    (
                        lambda: nn.Dropout(0.3),
                        lambda: nn.MaxPool2d(3, 1, 1),
                        lambda: nn.AvgPool2d(3, 1, 1),
                        lambda: nn.Dropout2d(0.2),
                        lambda: nn.Identity(),
                        lambda: nn.Sequential(),
                    )
                )()
            )
    if rng.randrange(3) == 0:
        named = collections.OrderedDict((f"part{i}", layer) for i, layer in enumerate(layers))
        return nn.Sequential(named)
    return nn.Sequential(*layers)


class ConvNormAct(nn.Module):
    """Parts that may be None."""

    def __init__(self, rng, c):
        super().__init__()
        self.conv = conv(rng, c)
        self.norm = norm(rng, c) if rng.randrange(4) else None
        self.act = activation(rng) if rng.randrange(4) else None

    def forward(self, x):
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.act is not None:
            x = self.act(x)
        return x


# ---- residual --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    expansion = 1

    def __init__(self, rng, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), norm(rng, c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, rng.choice((1, 3)), bias=False), norm(rng, c)
        self.conv2.padding = (self.conv2.kernel_size[0] // 2,) * 2
        self.relu = activation(rng)
        self.downsample = rng.choice(
            (lambda: None, lambda: nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)))
        )()
        self.add = rng.choice(("operator", "torch", "in place", "alpha", "reversed", "method"))
        self.activate_after = flag(rng)
        self.drop_path = None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        if self.drop_path is not None:
            out = self.drop_path(out)
        if not self.activate_after:
            out = self.relu(out)
        if self.add == "operator":
            out = out + identity
        elif self.add == "torch":
            out = torch.add(out, identity)
        elif self.add == "in place":
            out += identity
        elif self.add == "alpha":
            out = torch.add(out, identity, alpha=0.5)
        elif self.add == "method":
            out = out.add(identity)
        else:
            out = identity + out
        return self.relu(out) if self.activate_after else out


class PreActivation(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1, bias=flag(rng))
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)
        self.function = function(rng)
        self.scale = nn.Parameter(torch.full((1,), 0.5)) if flag(rng) else 0.5

    def forward(self, x):
        out = self.conv1(self.function(self.bn1(x)))
        out = self.conv2(self.function(self.bn2(out)))
        return x + out * self.scale


# ---- squeeze and excitation, inverted residual -----------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, c, 1)
        self.act, self.gate = activation(rng), rng.choice((nn.Sigmoid, nn.Hardsigmoid, nn.Tanh))()
        self.by_mean = flag(rng)

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True) if self.by_mean else self.pool(x)
        scale = self.gate(self.expand(self.act(self.reduce(scale))))
        return x * scale


class InvertedResidual(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        wide = c * rng.choice((1, 2))
        act = activation(rng)
        kernel = rng.choice((3, 5))
        self.expand = nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), act)
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False), nn.BatchNorm2d(wide), act
        )
        self.se = SqueezeExcite(rng, wide) if flag(rng) else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c))
        self.use_res_connect = flag(rng)

    def forward(self, x):
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + out if self.use_res_connect else out


# ---- ConvNeXt --------------------------------------------------------------------------------------------------------


class PixelBlock(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.dwconv = nn.Conv2d(c, c, rng.choice((3, 7)), groups=c)
        self.dwconv.padding = (self.dwconv.kernel_size[0] // 2,) * 2
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c)
        self.gamma = nn.Parameter(torch.ones(c) * 0.5) if flag(rng) else None
        self.drop_path = nn.Identity()

    def forward(self, x):
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        if self.gamma is not None:
            x = self.gamma * x
        return shortcut + self.drop_path(x.permute(0, 3, 1, 2))


# ---- cat, interpolate, skips -----------------------------------------------------------------------------------------


class Dense(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c + 4 * i), nn.ReLU(inplace=True), nn.Conv2d(c + 4 * i, 4, 3, padding=1))
            for i in range(rng.randint(1, 2))
        )
        self.transition = nn.Conv2d(c + 4 * len(self.layers), c, 1)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.transition(torch.cat(features, dim=1))


class Pyramid(nn.Module):
    """DeepLab's ASPP: dilated branches, and one of a single pixel that is interpolated."""

    def __init__(self, rng, c):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(c, 4, 1), nn.Conv2d(c, 4, 3, padding=2, dilation=2)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(12, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.Dropout(0.5))
        self.mode = rng.choice(("bilinear", "nearest"))

    def forward(self, x):
        out = [branch(x) for branch in self.branches]
        corners = {"align_corners": False} if self.mode == "bilinear" else {}
        out.append(F.interpolate(self.pooled(x), size=x.shape[-2:], mode=self.mode, **corners))
        return self.project(torch.cat(out, dim=1))


class UNet(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(2 * c, 2 * c, 1), activation(rng))
        self.up = rng.choice(
            (
                lambda: nn.ConvTranspose2d(2 * c, c, 2, stride=2),
                lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(2 * c, c, 1)),
            )
        )()
        self.dec = nn.Conv2d(2 * c, c, 3, padding=1)

    def forward(self, x):
        low = self.middle(self.enc(x))
        up = self.up(low)[..., : x.shape[2], : x.shape[3]]
        return F.relu(self.dec(torch.cat([up, x], 1)))


class Shuffle(nn.Module):
    """User code that views and writes."""

    def __init__(self, rng, c):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(c, c, 3, padding=1, groups=2), nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c // 2, c // 2, 1)
        self.groups = 2
        self.writes = flag(rng)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        n, c, h, w = x.shape
        x = x.reshape(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, dim=1)
        right = self.conv2(right)
        if self.writes:
            right.mul_(2)
        return torch.cat((left, right), 1)


class Rows(nn.Module):
    """An image as one row: one-dimensional convolutions."""

    def __init__(self, rng, c):
        super().__init__()
        size, dilation = rng.choice((1, 3, 3, 4)), rng.choice((1, 1, 2))
        self.groups = rng.choice((1, 2, c))
        self.conv1 = nn.Conv1d(c, c, size, padding="same", dilation=dilation, groups=self.groups, bias=flag(rng))
        self.bn, self.act = nn.BatchNorm1d(c), activation(rng)
        self.conv2 = nn.Conv1d(c, c, 3, padding=1, padding_mode=rng.choice(("zeros", "zeros", "replicate")))

    def forward(self, x):
        y = self.act(self.bn(self.conv1(x.flatten(2))))
        return self.conv2(y).reshape(x.shape) + x


# ---- loops, dictionaries, empty containers ---------------------------------------------------------------------------


class Loops(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.blocks = nn.ModuleList(conv(rng, c) for _ in range(rng.randint(0, 2)))
        self.named = nn.ModuleDict({name: nn.BatchNorm2d(c) for name in ("a", "b")[: rng.randint(0, 2)]})
        self.tail = nn.Sequential(*[activation(rng) for _ in range(rng.randint(0, 1))])
        self.last = nn.Conv2d(c, c, 1)

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) if i != 1 else x + block(x)
        for name, layer in self.named.items():
            x = layer(x) * (1.0 if name == "a" else 0.5)
        return self.last(self.tail(x))


# ---- values that a forward reads -------------------------------------------------------------------------------------


class Mode(enum.Enum):
    PLAIN = 0
    SCALED = 1
    SHIFTED = 2


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    mode: Mode = Mode.PLAIN
    steps: list = dataclasses.field(default_factory=lambda: [1.0, 0.5])


class Holder:
    level = 1.0

    def __init__(self):
        self.value = 0.5
        self.table = {"a": {"b": 1.5}}


class Reads(nn.Module):
    """Attributes of every kind."""

    slope = 0.25  # a class attribute

    def __init__(self, rng, c):
        super().__init__()
        self.conv, self.bn = conv(rng, c), norm(rng, c)
        self.act = function(rng)  # a function
        self.mode = rng.choice(list(Mode))  # an enum member
        self.options, self.holder = Options(), Holder()
        self.table = {"scale": 1.0, "inner": {"shift": [0.0, 0.5]}}
        self.weights = [1.0, 0.5]
        self.name = rng.choice(("relu", "silu"))
        self.use = rng.choice(("attributes", "holder", "table", "options"))
        self.scaler = helpers.Scaler(1.0)
        self.register_buffer("mask", None)
        self.register_parameter("gamma", None)
        self.register_buffer("shift", torch.full((1, c, 1, 1), 0.25) if flag(rng) else None)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        if self.mode is Mode.SCALED:
            x = x * self.slope
        elif self.mode == Mode.SHIFTED:
            x = x + self.slope
        if self.use == "holder":
            x = x * self.holder.value + self.holder.table["a"]["b"] * self.holder.level
        elif self.use == "table":
            x = x * self.table["scale"] + self.table["inner"]["shift"][1]
        elif self.use == "options":
            x = x * self.options.scale + sum(self.options.steps)
            if self.options.mode is Mode.SHIFTED:
                x = x + 1
        else:
            for weight in self.weights:
                x = x * (1 + weight)
        x = getattr(F, self.name)(self.scaler(x))
        if self.mask is not None:
            x = x * self.mask
        if self.gamma is not None:
            x = x * self.gamma
        return x if self.shift is None else x + self.shift


class Base(nn.Module):
    limit = 4.0
    activation = staticmethod(F.relu)

    def __init__(self, rng, c):
        super().__init__()
        self.conv = conv(rng, c)

    def features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.features(x)

    @property
    def gain(self):
        return 0.5 * GAIN

    @staticmethod
    def clip(x):
        return x.clamp(-6, 6)

    @classmethod
    def bounded(cls, x):
        return x.clamp(max=cls.limit)


class Derived(Base):
    """super(), properties, static and class methods, methods that others call, globals, closures, defaults."""

    def __init__(self, rng, c):
        super().__init__(rng, c)
        self.bn = nn.BatchNorm2d(c)
        self.scale = helpers.make_scaler(0.5)

    def features(self, x, by=1.0):
        return self.bn(super().features(x)) * by

    def forward(self, x):
        x = super().forward(x)
        x = self.activation(self.clip(x)) * self.gain
        x = self.bounded(self.scale(x))
        return self.head(x)

    def head(self, x):
        for name in SETTINGS["order"]:
            x = x * SETTINGS["scale"] if name == "scale" else helpers.shifted(x) + SETTINGS["nested"]["shift"]
        return x


class ReadsChildren(nn.Module):
    """The parent reads its children's settings."""

    def __init__(self, rng, c):
        super().__init__()
        self.conv, self.bn, self.drop = conv(rng, c), nn.BatchNorm2d(c), nn.Dropout(0.25)

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.conv.groups > 1:
            y = y * 2
        if self.conv.bias is not None:
            y = y + self.conv.bias.mean()
        if self.bn.eps > 1e-4:
            y = y - 1
        return F.relu(y * (1 - self.drop.p) + len(self.conv._forward_hooks))


# ---- sharing ---------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), activation(rng)
        self.again = self.conv if flag(rng) else nn.Conv2d(c, c, 1)
        self.bn2 = self.bn if flag(rng) else nn.BatchNorm2d(c)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.act(self.bn2(self.again(x)) + x)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, rng, c):
        super().__init__()
        self.first, self.second = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=2, dilation=2)
        self.second.weight = self.first.weight
        self.transposed = flag(rng)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.second(x))
        return F.conv2d(x, self.first.weight.transpose(0, 1), padding=1) if self.transposed else x


# ---- functional, parametrized ----------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.groups, self.stride = rng.choice((1, 2)), 1
        self.weight = nn.Parameter(torch.randn(c, c // self.groups, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.zeros(c)) if flag(rng) else None
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("var", torch.ones(c))
        self.eps = 1e-5
        self.standardize = flag(rng)

    def forward(self, x):
        weight = self.weight
        if self.standardize:
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 0.1)
        x = F.conv2d(x, weight, self.bias, self.stride, padding=1, groups=self.groups)
        return F.relu(F.batch_norm(x, self.mean, self.var, training=self.training, eps=self.eps))


class Standardized(nn.Conv2d):
    """A convolution of the user's own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def own_convolution(rng, c):
    return nn.Sequential(Standardized(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())


def parametrized(rng, c):
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(c, c, 3, padding=1))
    return nn.Sequential(layer, activation(rng), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU())


class Rounded(torch.autograd.Function):
    """A straight-through estimator: a backward that is not the forward's."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


class OwnFunction(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)
        self.rounds = False

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = Rounded.apply(x) if self.rounds else Doubled.apply(x)
        return self.last(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 3


# ---- decorated, overridden -------------------------------------------------------------------------------------------


class _Decorated(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.act = activation(rng)

    def body(self, x):
        return self.act(self.bn(self.conv(x)))


class NoGrad(_Decorated):
    @torch.no_grad()
    def forward(self, x):
        return self.body(x)


class WithGrad(_Decorated):
    @torch.enable_grad()
    def forward(self, x):
        return self.body(x)


class Inference(_Decorated):
    @torch.inference_mode()
    def forward(self, x):
        return self.body(x)


class Autocast(_Decorated):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.body(x)


class NoAutocast(_Decorated):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.body(x)


class UserDecorated(_Decorated):
    @helpers.scaled_result
    def forward(self, x):
        return self.body(x)


class GradInside(_Decorated):
    """Contexts inside the forward."""

    def forward(self, x):
        with torch.no_grad():
            scale = self.conv(x).mean()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            x = self.conv(x)
        return self.act(self.bn(x)) * scale


class AutocastInside(_Decorated):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return self.act(self.bn(y.to(x.dtype)))


def decorated(rng, c):
    kind = rng.choice((NoGrad, WithGrad, Inference, Autocast, NoAutocast, UserDecorated, GradInside, AutocastInside))
    return kind(rng, c)


class OwnCall(_Decorated):
    """A __call__ of its own."""

    factor = 0.5

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.factor + 1

    def forward(self, x):
        return self.body(x)


class OwnGetattr(_Decorated):
    """Attributes that a dictionary answers for."""

    def __init__(self, rng, c):
        super().__init__(rng, c)
        self.config = {"scale": 0.5}

    def __getattr__(self, name):
        config = self.__dict__.get("config")
        if config is not None and name in config:
            return config[name]
        return super().__getattr__(name)

    def forward(self, x):
        return self.body(x) * self.scale


class Counts(_Decorated):
    """A forward that writes its own state."""

    def __init__(self, rng, c):
        super().__init__(rng, c)
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = self.body(x)
        with torch.no_grad():
            self.total.add_(1)
        return y * (1 + self.calls % 2)


# ---- torchvision's ---------------------------------------------------------------------------------------------------


def torchvision_block(rng, c):
    from torchvision.models.convnext import CNBlock
    from torchvision.models.mobilenetv2 import InvertedResidual as MobileBlock
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

    return rng.choice(
        (
            lambda: BasicBlock(c, c),
            lambda: Bottleneck(c, c // 4),
            lambda: MobileBlock(c, c, 1, 2),
            lambda: CNBlock(c, 0.5, 0.0),
            lambda: Conv2dNormActivation(c, c),
            lambda: SqueezeExcitation(c, 4),
        )
    )()


# ---- timm's ----------------------------------------------------------------------------------------------------------


def timm_block(rng, c):
    from timm.layers import BatchNormAct2d, ConvNormAct, SqueezeExcite
    from timm.models._efficientnet_blocks import InvertedResidual

    return rng.choice(
        (
            lambda: ConvNormAct(c, c, 3, act_layer=rng.choice((nn.ReLU, nn.SiLU))),
            lambda: nn.Sequential(conv(rng, c), BatchNormAct2d(c, act_layer=rng.choice((nn.ReLU6, nn.Hardswish)))),
            lambda: SqueezeExcite(c),
            lambda: InvertedResidual(c, c, 3, norm_layer=BatchNormAct2d, se_layer=rng.choice((None, SqueezeExcite))),
        )
    )()


# ---- whole networks --------------------------------------------------------------------------------------------------

BLOCKS = {
    "chain": chain,
    "conv norm act": ConvNormAct,
    "residual": Residual,
    "pre-activation": PreActivation,
    "squeeze excite": SqueezeExcite,
    "inverted residual": InvertedResidual,
    "pixel block": PixelBlock,
    "dense": Dense,
    "pyramid": Pyramid,
    "unet": UNet,
    "shuffle": Shuffle,
    "rows": Rows,
    "tail": Tail,
    "more tail": Tail,
    "loops": Loops,
    "reads": Reads,
    "derived": Derived,
    "reads children": ReadsChildren,
    "shared": Shared,
    "tied": Tied,
    "functional": Functional,
    "own convolution": own_convolution,
    "parametrized": parametrized,
    "own function": OwnFunction,
    "decorated": decorated,
    "own call": OwnCall,
    "own getattr": OwnGetattr,
    "counts": Counts,
}
if importlib.util.find_spec("torchvision") is not None:
    BLOCKS["torchvision"] = torchvision_block
if importlib.util.find_spec("timm") is not None:
    BLOCKS["timm"] = timm_block


def stem(rng, c):
    return nn.Sequential(
        nn.Conv2d(IN_CHANNELS, c, 3, rng.choice((1, 1, 2)), 1, bias=flag(rng)), norm(rng, c), activation(rng)
    )


class Head(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(c, 5)
        self.way = rng.choice(("pool", "mean", "torch", "two"))
        self.fc2 = nn.Linear(5, 5) if self.way == "two" else None

    def forward(self, x):
        if self.way == "mean":
            x = x.mean((2, 3))
        elif self.way == "torch":
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        else:
            x = self.flatten(self.pool(x))
        x = self.fc(self.drop(x))
        return x if self.fc2 is None else self.fc2(F.relu(x))


class Tower(nn.Module):
    def __init__(self, rng, c, blocks):
        super().__init__()
        self.stem, self.blocks = stem(rng, c), nn.Sequential(*blocks)
        self.head = Head(rng, c) if flag(rng) else nn.Identity()

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Features(nn.Module):
    """Blocks in a loop, and what each returned."""

    def __init__(self, rng, c, blocks):
        super().__init__()
        self.stem, self.blocks = stem(rng, c), nn.ModuleList(blocks)
        self.keep = [0]

    def forward(self, x):
        x, kept = self.stem(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.keep:
                kept.append(x)
        return x, kept


Result = collections.namedtuple("Result", ["y", "features"])


@dataclasses.dataclass
class Wrapped:
    y: torch.Tensor


class ExtraArguments(nn.Module):
    """A tensor, a flag and a list besides x; the kind of result is a setting."""

    def __init__(self, rng, c, blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(IN_CHANNELS, c, 3, padding=1), nn.Sequential(*blocks)
        self.result = rng.choice(("tensor", "tuple", "dict", "namedtuple", "dataclass", "list"))

    def forward(self, x, skip=None, *, flag=True, scales=(1.0,)):
        y = self.stem(x)
        if skip is not None:
            y = y + skip
        features = y
        y = self.blocks(y) if flag else F.relu(y)
        for scale in scales:
            y = y * scale
        if self.result == "tuple":
            return y, features
        if self.result == "list":
            return [y, None, flag]
        if self.result == "dict":
            return {"out": y, "features": features}
        if self.result == "namedtuple":
            return Result(y, features)
        return Wrapped(y) if self.result == "dataclass" else y


def sequential(rng, c, blocks):
    parts = [*stem(rng, c), *blocks] if flag(rng) else [stem(rng, c), *blocks]
    if flag(rng):
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)]
    return nn.Sequential(*parts)


NETWORKS = {"tower": Tower, "features": Features, "extra arguments": ExtraArguments, "sequential": sequential}


def randomize(model, seed):
    """No value at a kink, no statistic at its start: no ReLU's input is exactly zero, where rounding would decide."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t, low, high):
        return torch.rand(t.shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).to(t.dtype)

    with torch.no_grad():
        for module in model.modules():
            for name, t in [*module._parameters.items(), *module._buffers.items()]:
                if t is None or not t.is_floating_point():
                    continue
                if name == "running_var" or name == "var":
                    t.copy_(draw(t, 0.5, 1.5))
                elif t.dim() == 1 and name == "weight":
                    t.copy_(draw(t, 0.5, 1.5))
                elif t.dim() <= 1 and t.numel() > 1:
                    t.copy_(draw(t, -0.5, 0.5))
    return model


def build(rng):
    """(what it is, the model)"""
    c = rng.choice((8, 8, 12, 16, 24))
    names = [rng.choice(list(BLOCKS)) for _ in range(rng.randint(1, 2))]
    seed = rng.randrange(1 << 16)
    torch.manual_seed(seed)
    kind = rng.choice(list(NETWORKS))
    model = NETWORKS[kind](rng, c, [BLOCKS[name](rng, c) for name in names])
    return f"{kind} of {', '.join(names)}, {c} channels, seed {seed}", randomize(model, seed)
