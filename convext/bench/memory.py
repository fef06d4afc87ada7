"""What a training step needs of memory besides parameters: bytes that the forward pass saves for the backward pass, and
the most that tensors take at once; and how much of it a device has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..output_pool import output_pool


@dataclass(frozen=True)
class Memory:
    """saved: bytes kept from the forward pass for the backward pass; peak: the most bytes at once, over the step, of
    tensors made in it."""

    saved: int
    peak: int


def of_step(model: nn.Module, x: torch.Tensor, step: Callable[[], object]) -> Memory:
    """That of one step of training a model on x on the CPU. It begins without gradients of parameters."""
    step()  # what is made once does not count
    model.zero_grad()
    peak = peak_bytes(step)
    model.zero_grad()
    return Memory(saved_bytes(model, x), peak)


def of_inference(call: Callable[[], object]) -> Memory:
    """That of one call without gradients, which saves nothing."""
    call()
    return Memory(0, peak_bytes(call))


def saved_bytes(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that model(*inputs) saves for its backward pass, as hooks on saved tensors see it: each storage once, those
    of parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = model(*inputs)
    del result  # until here it kept what is saved, so that no address came up twice
    return sum(saved.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes at once that tensors on the CPU take in a call more than before it, as torch's allocator counts
    them. Results come from it meanwhile, and not from convext's pool."""
    activities = [ProfilerActivity.CPU]
    with output_pool(0), profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        call()
    events: Any = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    taken = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor on the device could have: free ones, and those that torch keeps for the next tensors."""
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.get_device_module(device)
    kept: int = gpu.memory_reserved(device) - gpu.memory_allocated(device)
    return int(gpu.mem_get_info(device)[0]) + kept
