"""The demo's pictures: what each layer cost before and after the swap, and what the first layer sees; and how networks
learnt to read digits before and after it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .digits import Trained
from .profile import LayerTime

BEFORE, AFTER = "#9aa5b1", "#e4572e"
MAPS = 12


def paired(before: list[LayerTime], after: list[LayerTime]) -> list[tuple[LayerTime, LayerTime]]:
    """Layers of both lists by shape: fusing a residual branch changes the order in which layers run."""
    waiting: dict[tuple, list[LayerTime]] = defaultdict(list)
    for layer in after:
        waiting[layer.x_shape, layer.w_shape].append(layer)
    return [(layer, waiting[layer.x_shape, layer.w_shape].pop(0)) for layer in before]


def feature_maps(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """(MAPS, P, Q): what the first convolution of `model` makes of the first picture of `x`."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        return first(x[:1])[0, :MAPS].float().cpu().numpy()


def draw(
    path: Path,
    times: dict[str, tuple[list[LayerTime], list[LayerTime]]],
    photo: np.ndarray,
    maps: np.ndarray,
) -> None:
    """Saves the picture: one row of bars a network, then the photograph beside the feature maps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.1 * len(times) + 3.4), layout="constrained")
    rows = figure.subfigures(len(times) + 1, 1, height_ratios=[3.1] * len(times) + [3.4])
    for row, (name, (before, after)) in zip(rows, times.items(), strict=False):
        axes = row.subplots()
        pairs = paired(before, after)
        at = np.arange(len(pairs))
        for shift, label, color, index in ((-0.2, "before", BEFORE, 0), (0.2, "after", AFTER, 1)):
            axes.bar(at + shift, [pair[index].seconds * 1e3 for pair in pairs], 0.4, label=label, color=color)
        axes.set(
            title=f"{name}: each convolution with what follows it", ylabel="ms", xlabel="layer, in order of running"
        )
        axes.set_xlim(-0.8, len(pairs) - 0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left, right = rows[-1].subfigures(1, 2, width_ratios=[1, 2.4])
    axes = left.subplots()
    axes.imshow(photo)
    axes.set(title="photograph")
    axes.axis("off")
    right.suptitle("feature maps of the first layer, after the swap", fontsize="large")
    for axes, feature in zip(right.subplots(2, MAPS // 2).flat, maps, strict=False):
        axes.imshow(feature, cmap="magma")
        axes.axis("off")
    figure.savefig(path, dpi=110)


def draw_losses(path: Path, runs: dict[str, tuple[Trained, Trained]]) -> None:
    """Saves a picture of how networks were trained before and after the swap: the loss of each step, on one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(runs), 3.2), layout="constrained")
    for axes, (name, (before, after)) in zip(
        figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True
    ):
        axes.semilogy(before.losses, color=BEFORE, linewidth=3, label=f"before: {before.accuracy:.1%} right")
        axes.semilogy(after.losses, color=AFTER, linewidth=0.8, label=f"after: {after.accuracy:.1%} right")
        axes.set(title=f"{name} on digits", xlabel="step", ylabel="loss")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
