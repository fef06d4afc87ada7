"""The convolutions that a network consists of, as problems."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..problem import ConvProblem, Geom


def collect(model: nn.Module, x: torch.Tensor) -> dict[ConvProblem, int]:
    """Every distinct convolution that `model(x)` runs, in order of first use, with the number of times it runs.

    `model` must be unswapped: the hooks set here would unfuse a swapped one. `padding="same"` counts as the symmetric
    padding that it amounts to for odd kernels.
    """
    seen: Counter[ConvProblem] = Counter()

    def note(module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        padding = module.padding
        if isinstance(padding, str):
            same = padding == "same"
            padding = tuple(d * (k - 1) // 2 * same for d, k in zip(module.dilation, module.kernel_size, strict=True))
        geom = Geom(module.stride, tuple(padding), module.dilation, module.groups)
        seen[ConvProblem.of_fprop(inputs[0], module.weight, geom)] += 1

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(seen)


def unet(images: int, dtype: torch.dtype = torch.float32) -> list[ConvProblem]:
    """The distinct convolutions of a U-Net in channels_last, over pictures of 256x256: four levels of 64 filters and
    twice as many each, two 3x3 a level and side, padded."""
    filters, found = (64, 128, 256, 512, 1024), []
    down = [(c, k, level) for level, (c, k) in enumerate(zip((3, *filters), filters))]
    up = [(2 * k, k, level) for level, k in reversed([*enumerate(filters[:-1])])]
    for channels, k, level in down + up:
        for c in (channels, k):
            x = torch.empty(images, c, 256 >> level, 256 >> level, dtype=dtype, device="cpu")
            w = torch.empty(k, c, 3, 3, dtype=dtype, device="cpu")
            found.append(ConvProblem.of_fprop(x.to(memory_format=torch.channels_last), w, Geom((1, 1), (1, 1))))
    return list(dict.fromkeys(found))


def title(problem: ConvProblem) -> str:
    """The problem in a few characters: `64×56×56 -> 64, 3×3 /2 d1 g1`, ones left out."""
    text = f"{problem.c}×{problem.h}×{problem.w} -> {problem.k}, {problem.r}×{problem.s}"
    text += f" /{problem.stride_h}" if not problem.is_unit_stride else ""
    text += f" d{max(problem.dil_h, problem.dil_w)}" if problem.is_dilated else ""
    return text + (f" g{problem.groups}" if problem.groups > 1 else "")
