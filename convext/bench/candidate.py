"""One contender of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


class Skipped(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """`call` is what is timed; `result` runs it once and returns the tensor by which contenders are compared."""

    call: Callable[[], object]
    result: Callable[[], torch.Tensor]
