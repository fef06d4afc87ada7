"""How far two runs of one network may be apart, and how far they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

SAFETY = 8.0  # covers what the model below leaves out: batch norms, activations, sums of branches


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative distance ||value - reference|| / ||reference||, taken in float64; inf where shapes differ or a value is
    not finite."""
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return float((value - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def bound(model: nn.Module, dtype: torch.dtype) -> float:
    """The relative distance that rounding explains between two correct runs of `model` in `dtype`.

    A convolution that adds gemm_k products in an accumulate type of precision eps errs by about eps*sqrt(gemm_k), and
    by half an eps of the storage type where that is narrower; errors of different layers add as independent ones do,
    which gives the root of the summed squares, times `SAFETY`.
    """
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    variance = 0.0
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            gemm_k = module.weight[0].numel()
            variance += gemm_k * torch.finfo(accumulate).eps ** 2
            if dtype != accumulate:
                variance += torch.finfo(dtype).eps ** 2
    return SAFETY * math.sqrt(variance)


@dataclass(frozen=True)
class Agreement:
    """One comparison: how far apart, how far is allowed."""

    distance: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.distance <= self.bound
