"""Networks as people write them by hand: the blocks of the usual tutorials, and forwards that are awkward to trace."""

import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


def vgg():
    layers, channels = [], 3
    for width in (8, 8, "pool", 16, 16, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class PreActivation(nn.Module):
    """relu(x, inplace) of a batch norm, the shortcut from the activated value."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(8, 16, 1, 2, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(self.stem(x)))
        shortcut = self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class BasicBlock(nn.Module):
    def __init__(self, channels=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(nn.Conv2d(3, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = F.silu(self.bn(self.conv(x)))
        scale = torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))
        return x * scale


class DenseLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 4 * i), nn.ReLU(inplace=True), nn.Conv2d(3 + 4 * i, 4, 3, padding=1))
            for i in range(3)
        )

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, dim=1)


class SharedReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + x)


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        return x


class ControlFlow(nn.Module):
    """Decides by values, so cannot be traced; the block inside can."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.block = BasicBlock()

    def forward(self, x):
        if x.sum() > 0:
            x = torch.relu(self.conv(x))
        else:
            x = self.conv(x)
        return self.block(x)


class Blocks(nn.Module):
    """A loop over a ModuleList, and a ModuleDict by name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU6()) for _ in range(3)
        )
        self.heads = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 2, 1)})

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {name: head(x) for name, head in self.heads.items()}


class Reshapes(nn.Module):
    """User code that looks at strides: views, a permutation, a write through a view."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)  # channel shuffle
        x = self.conv2(x)
        flat = x.view(n, -1)
        flat.mul_(2)  # writes x
        x = x.relu()
        y = F.hardswish(self.conv3(x))
        return y, x, y.permute(0, 2, 3, 1)


class Activations(nn.Module):
    """Every activation of the epilogue, as module, function, method, in place or not."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(14))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(14))
        self.modules_ = nn.ModuleList([nn.ReLU6(), nn.SiLU(inplace=True), nn.Hardswish(), nn.GELU(), nn.Hardtanh(0, 6)])

    def forward(self, x):
        functions = [
            F.relu,
            torch.relu,
            torch.relu_,
            F.relu6,
            F.silu,
            F.hardswish,
            F.gelu,
            lambda v: v.relu(),
            lambda v: F.relu(v, inplace=True),
            *self.modules_,
        ]
        for function, conv, bn in zip(functions, self.convs, self.bns):
            x = function(bn(conv(x)))
        return x


class Inverted(nn.Module):
    """Inverted residuals with squeeze and excitation, and a classifier."""

    def __init__(self, gate=nn.Hardsigmoid):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.squeeze, self.excite, self.gate = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1), gate()
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        scale = self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(scale * y)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class NextBlock(nn.Module):
    """ConvNeXt's block, behind a stem that normalises over channels. `by_hand`: by functions of its layers' weights."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.by_hand = by_hand
        self.stem, self.norm0 = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16, eps=1e-6)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.LayerNorm(16, eps=1e-6)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.5))

    def forward(self, x):
        x = self.norm0(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        if self.by_hand:
            y = F.layer_norm(y, (16,), self.norm.weight, self.norm.bias, 1e-6)
            y = F.linear(F.gelu(F.linear(y, self.up.weight, self.up.bias)), self.down.weight, bias=self.down.bias)
        else:
            y = self.down(F.gelu(self.up(self.norm(y))))
        return x + self.scale * y.permute(0, 3, 1, 2)


class NextNet(NextBlock):
    """A classifier behind it, that normalises the means."""

    def __init__(self):
        super().__init__()
        self.last_norm, self.classifier = nn.LayerNorm(16, eps=1e-6), nn.Linear(16, 5)

    def forward(self, x):
        x = super().forward(x).mean((2, 3), keepdim=True)
        x = self.last_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(x.flatten(1))


# name -> (maker, input size, chains that fuse something in evaluation)
TUTORIAL = {
    "lenet": (LeNet, 32, ["relu", "relu"]),
    "vgg": (vgg, 16, ["relu"] * 4),
    "pre_activation": (PreActivation, 12, ["bn + relu", "bn + relu", "add"]),
    "basic_block": (BasicBlock, 12, ["bn + relu", "bn + add + relu", "bn"]),
    "squeeze_excite": (SqueezeExcite, 12, ["bn + silu", "relu"]),
    "dense_cat": (DenseLayers, 10, []),
    "shared_relu": (SharedReLU, 10, ["bn + relu", "bn + add + relu"]),
    "conv_called_twice": (CalledTwice, 10, []),
    "control_flow": (ControlFlow, 10, ["bn + relu", "bn + add + relu", "bn"]),
    "module_list": (Blocks, 10, ["bn + relu6"] * 3),
    "view_on_features": (Reshapes, 8, ["bn + relu", "hardswish"]),
    "every_activation": (Activations, 8, None),
}
