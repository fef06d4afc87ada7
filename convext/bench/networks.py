"""The shape files that convext brings, from the networks whose layers they hold: on the device "meta", nothing is
computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from . import kernelbench
from .problems import Layer, collect_layers, placed


class _UNet(nn.Module):
    """(N, 3, H, W) -> (N, 2, H, W) with H and W multiples of 16: that of 2015, padded, with a batch norm's layers left
    out, as they have no convolution."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)):
        super().__init__()
        self.down = nn.ModuleList(self.double(*pair) for pair in zip((3, *widths), widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, c // 2, 2, stride=2) for c in widths[:0:-1])
        self.join = nn.ModuleList(self.double(c, c // 2) for c in widths[:0:-1])
        self.classes = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for step in self.down:
            x = step(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = kept.pop()
        for up, join in zip(self.up, self.join):
            x = join(torch.cat([kept.pop(), up(x)], dim=1))
        return self.classes(x)


def _replknet() -> nn.Module:
    """RepLKNet-31B (arXiv:2203.06717) as it runs in inference, the small filters merged into the large ones: its
    convolutions in order. Residual sums, batch norms and activations change no shape."""

    def depthwise(c: int, taps: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(c, c, taps, stride, taps // 2, groups=c)

    def pointwise(c: int, k: int) -> nn.Conv2d:
        return nn.Conv2d(c, k, 1)

    widths, blocks, taps = (128, 256, 512, 1024), (2, 2, 18, 2), (31, 29, 27, 13)
    layers: list[nn.Module] = [nn.Conv2d(3, 128, 3, 2, 1), depthwise(128, 3), pointwise(128, 128), depthwise(128, 3, 2)]
    for stage, (c, count, large) in enumerate(zip(widths, blocks, taps)):
        if stage:
            layers += [pointwise(widths[stage - 1], c), depthwise(c, 3, 2)]
        for _ in range(count):
            layers += [pointwise(c, c), depthwise(c, large), pointwise(c, c), pointwise(c, 4 * c), pointwise(4 * c, c)]
    return nn.Sequential(*layers)


def _torchvisions(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return build


def _aspp() -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import ASPP

    return ASPP(2048, [12, 24, 36])


# Short name -> (what it is, how it is built, its input).
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": ("ResNet-50, torchvision's", _torchvisions("resnet50"), (1, 3, 224, 224)),
    "mobilenet_v2": ("MobileNetV2, torchvision's", _torchvisions("mobilenet_v2"), (1, 3, 224, 224)),
    "efficientnet_b0": ("EfficientNet-B0, torchvision's", _torchvisions("efficientnet_b0"), (1, 3, 224, 224)),
    "convnext_tiny": ("ConvNeXt-T, torchvision's", _torchvisions("convnext_tiny"), (1, 3, 224, 224)),
    "replknet31b": ("RepLKNet-31B in inference, small filters merged into large ones", _replknet, (1, 3, 224, 224)),
    "aspp": ("DeepLabV3's ASPP behind a ResNet, images of 520x520, torchvision's", _aspp, (1, 2048, 65, 65)),
    "unet": ("U-Net, padded, images of 256x256", _UNet, (1, 3, 256, 256)),
}
KERNELBENCH = "kernelbench_level1"


def layers_of(name: str) -> dict[Layer, int]:
    """Those of one of `NETWORKS`."""
    _, build, shape = NETWORKS[name]
    with torch.device("meta"):
        return _plain(collect_layers(build().eval(), torch.empty(shape)))


def layers_of_kernelbench(folder: Path) -> dict[Layer, int]:
    """Those of level 1 of a checkout of KernelBench, at its full sizes. Raises UsageError where it is none."""
    found: dict[Layer, int] = {}
    for problem in kernelbench.problems(folder, [1]):
        with torch.device("meta"):
            module = kernelbench.load(problem)
            model = module.Model(*module.get_init_inputs())
            for layer, count in _plain(collect_layers(model, *module.get_inputs())).items():
                found[layer] = found.get(layer, 0) + count
    return found


def _plain(layers: dict[Layer, int]) -> dict[Layer, int]:
    """As `parse` has them: on the CPU, contiguous."""
    found: dict[Layer, int] = {}
    for layer, count in layers.items():
        one = placed(layer, batch=None, dtype=torch.float32, device="cpu", channels_last=False)
        found[one] = found.get(one, 0) + count
    return found


def text(about: str, layers: dict[Layer, int]) -> str:
    """A shape file."""
    lines = [f"# {about}.", "# How often a layer runs, and what it is. Written by `convext bench shape-files`."]
    return "\n".join([*lines, *(f"{count}: {layer}" for layer, count in layers.items())]) + "\n"


def files(kernelbench_folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """(name of a shape file, its text), of all networks, and of KernelBench where there is a checkout."""
    for name, (about, _, _) in NETWORKS.items():
        yield f"{name}.txt", text(about, layers_of(name))
    if kernelbench_folder is not None:
        about = "The convolutions of KernelBench's level 1 (github.com/ScalingIntelligence/KernelBench), shapes alone"
        yield f"{KERNELBENCH}.txt", text(about, layers_of_kernelbench(kernelbench_folder))
