"""One step of training: forward, loss, backward, SGD; contenders are compared by the step's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from .. import zoo
from .candidate import Candidate


def prepare(model: nn.Module, x: torch.Tensor, compiled: bool = False) -> Candidate:
    """A step of `model` on `x` and fixed labels. Dropout is off, so that contenders compute the same."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        output = zoo.tensor_of(forward(x)).float()
        labels = torch.arange(output.shape[0], device=output.device) % output.shape[1]
        if output.dim() == 4:  # segmentation: one label a pixel
            labels = labels.view(-1, 1, 1).expand(-1, *output.shape[2:])
        nn.functional.cross_entropy(output, labels).backward()
        optimizer.step()

    def gradients() -> torch.Tensor:
        before = copy.deepcopy(model.state_dict())
        step()
        flat = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        model.load_state_dict(before)
        return flat

    return Candidate(step, gradients)


def channels_last(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return prepare(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))


def compiled(model: nn.Module, x: torch.Tensor, threads: int) -> Candidate:
    return prepare(model, x, compiled=True)


PEERS: dict[str, Callable[[nn.Module, torch.Tensor, int], Candidate]] = {
    "eager channels-last": channels_last,
    "torch.compile": compiled,
}
