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


def title(problem: ConvProblem) -> str:
    """The problem in a few characters: `64×56×56 -> 64, 3×3 /2 d1 g1`, ones left out."""
    text = f"{problem.c}×{problem.h}×{problem.w} -> {problem.k}, {problem.r}×{problem.s}"
    text += f" /{problem.stride_h}" if not problem.is_unit_stride else ""
    text += f" d{max(problem.dil_h, problem.dil_w)}" if problem.is_dilated else ""
    return text + (f" g{problem.groups}" if problem.groups > 1 else "")
