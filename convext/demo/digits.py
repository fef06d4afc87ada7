"""Training: a LeNet-5, a small residual network and a small MobileNet on scikit-learn's 1,797 scanned digits, before
and after the swap."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import convext

SEED = 7
EPOCHS = 16


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in He et al. 2015."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def residual_network() -> nn.Module:
    """Three residual blocks on 8x8 scans."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class InvertedResidual(nn.Module):
    """A 1x1 convolution to six times the channels, a depthwise 3x3 and a 1x1 back, as in Sandler et al. 2018."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.adds = stride == 1 and channels == filters
        wide = 6 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, filters, 1, bias=False),
            nn.BatchNorm2d(filters),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet() -> nn.Module:
    """Four inverted residuals on 8x8 scans."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(inplace=True),
        InvertedResidual(16, 16, 1),
        InvertedResidual(16, 24, 2),
        InvertedResidual(24, 24, 1),
        InvertedResidual(24, 32, 2),
        nn.Conv2d(32, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU6(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def lenet5() -> nn.Module:
    """LeCun et al. 1998, with ReLU and max pooling, on scans enlarged to its 32x32."""
    return nn.Sequential(
        nn.Upsample(size=(32, 32), mode="bilinear", align_corners=False),
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet-5": lenet5,
    "residual network": residual_network,
    "MobileNet": mobilenet,
}
TARGETS = {"LeNet-5": 0.97, "residual network": 0.98, "MobileNet": 0.98}  # least accuracy on held-out digits


@dataclass(frozen=True)
class Trained:
    """How a training run ended."""

    name: str
    accuracy: float  # on held-out digits
    seconds: float
    losses: tuple[float, ...]  # of each step


def data(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(train images, train labels, held-out images, held-out labels): a fixed split of 1,437 and 360 scans, images
    (n, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images[:, None] / 16.0, digits.target, test_size=360, stratify=digits.target, random_state=SEED
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part).to(device) for part in parts)
    return train_x.float(), train_y, test_x.float(), test_y


def train(
    name: str,
    device: torch.device,
    *,
    swapped: bool = True,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
    epochs: int = EPOCHS,
    batch: int = 48,
    on_epoch: Callable[[], object] = lambda: None,
) -> Trained:
    """Trains network `name` and returns how well it reads digits that it has not seen. `swapped`: whether convext
    computes it, and `recompute` as `convext.swap` takes it; weights and batches are the same either way."""
    train_x, train_y, test_x, test_y = data(device)
    train_x, test_x = train_x.to(dtype), test_x.to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = NETWORKS[name]().to(device, dtype).train()
        if swapped:
            convext.swap(model, recompute=recompute)
        order = torch.Generator().manual_seed(SEED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = epochs * -(-len(train_x) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        losses = []
        start = time.perf_counter()
        for _ in range(epochs):
            for picked in torch.randperm(len(train_x), generator=order).to(device).split(batch):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(train_x[picked]), train_y[picked])
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            on_epoch()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean().item()
    return Trained(name, accuracy, seconds, tuple(torch.stack(losses).tolist() if losses else ()))
