"""A batch norm with the sum and the activation behind it, whatever is in front: convext/batch_norm.py computes it.

Its tensors are looked up as a convolution's are (conv.py); what the kernels do not take, or means anything else, runs
as the forward has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ... import batch_norm, checks
from ...problem import Epilogue
from ..capture.signature import TENSOR_TYPES as PLAIN
from . import Call, Op
from .conv import _are_odd_statistics, _are_vectors
from .functions import BatchNorm, Place, found

if TYPE_CHECKING:
    from ..modes import Mode


class Norm(Op):
    """A `BatchNorm` of tensors of so many dimensions, and an activation."""

    in_strips, by_itself = False, True

    def __init__(
        self, batch_norm: BatchNorm, activation: str, dimensions: tuple[int, ...], behind: nn.Module | None = None
    ):
        self.batch_norm, self.activation, self.dimensions, self.behind = batch_norm, activation, dimensions, behind
        self.eps = batch_norm.eps

    def words(self, adds: bool) -> list[str]:
        return ["bn", *super().words(adds), *([] if self.activation == "identity" else [self.activation])]

    @property
    def places(self) -> tuple[Place, ...]:  # type: ignore[override]
        return self.batch_norm[:4]

    def bind(self, fallback: Call, mode: Mode) -> Call:
        norm, activation, dimensions, places, eps = (
            self.batch_norm,
            self.activation,
            self.dimensions,
            self.places,
            self.eps,
        )
        by_batch = norm.by_batch

        def normed(y: Any, residual: Any = None) -> Any:
            tensors = mean, var, gamma, beta = [found(place) for place in places]
            if (
                y is None
                or y.dim() not in dimensions
                or not batch_norm.takes(y, residual, by_batch)
                or not _fit(y, tensors, by_batch)
            ):
                return fallback(y, residual)
            epilogue = Epilogue(None, mean, var, gamma, beta, residual, eps, activation)
            return batch_norm.bn_act(y, epilogue, by_batch, norm.factor() if by_batch else 0.0, found(norm.count))

        return normed


def _fit(y: torch.Tensor, tensors: list[torch.Tensor | None], by_batch: bool) -> bool:
    """True of statistics and parameters that PyTorch takes beside y, without a word."""
    if not _are_vectors(y.shape[1], *tensors) or _are_odd_statistics(tensors[0], tensors[1], by_batch):
        return False
    if any(t is not None and (type(t) not in PLAIN or t.device != y.device) for t in tensors):
        return False
    try:
        checks.check_batch_norm(y.dtype, y.shape[1], *tensors)
    except (RuntimeError, ValueError):
        return False
    return True
