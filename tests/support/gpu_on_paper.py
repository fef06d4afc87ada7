"""A GPU that is a clock and a memory: what measures on a GPU runs as it would there, on tensors of the CPU.

`GpuOnPaper(monkeypatch)` stands for torch in the modules that measure: what they make on the device "cuda" is made on
the CPU, and torch's module of that device is one whose events tell `now`. Kernels are planted: each takes so many
seconds of that clock and computes what ATen does, or what a test says.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import torch

from convext import backends
from convext.backends import aten, tuned
from convext.backends.base import Backend, Candidate
from convext.problem import Pass

MODULES = (
    "convext.tune.measure",
    "convext.tune.first_sight",
    "convext.bench.memory",
    "convext.bench.timing",
    "convext.backends.tuned",
)
CUDA = torch.device("cuda", 0)


class _Planted(Backend):
    """Kernels of a backend: variant -> (seconds, what it makes of ATen's result, cost)."""

    def __init__(self, gpu, name, kernels):
        self.gpu, self.name, self.kernels = gpu, name, kernels

    def variant(self, pass_, problem):
        return self.candidates(pass_, problem)[0].variant

    def reject(self, pass_, problem):
        return None if self.candidates(pass_, problem) else "all its kernels were put aside"

    def candidates(self, pass_, problem, kind=""):
        return [
            Candidate(self.name, variant, cost, self._run(pass_, variant))
            for variant, (_, _, cost) in self.kernels.items()
            if variant not in tuned.aside(problem.device)
        ]

    def fprop(self, problem, *arguments):
        return self._run(Pass.FPROP, self.variant(Pass.FPROP, problem))(problem, *arguments)

    def dgrad(self, problem, *arguments):
        return self._run(Pass.DGRAD, self.variant(Pass.DGRAD, problem))(problem, *arguments)

    def wgrad(self, problem, *arguments):
        return self._run(Pass.WGRAD, self.variant(Pass.WGRAD, problem))(problem, *arguments)

    def _run(self, pass_, variant):
        def run(problem, *arguments):
            seconds, result, _ = self.kernels[variant]
            self.gpu.now += seconds
            self.gpu.calls.append(variant)
            return result(getattr(aten.BACKEND, pass_.name.lower())(problem, *arguments))

        return run


class _Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class GpuOnPaper:
    """now: seconds. free: bytes. capturing: whether the stream is captured. calls: variants in the order of their runs.
    made: bytes of each `empty` on the device. current: devices that were made current. autocasts_off: how often
    autocast was switched off."""

    def __init__(self, monkeypatch):
        self.now, self.free, self.capturing, self.calls, self.made = 0.0, 1 << 34, False, [], []
        self.current, self.autocasts_off = [], 0
        self.module = SimpleNamespace(
            Event=lambda enable_timing: _Event(self),
            synchronize=lambda device=None: None,
            is_available=lambda: True,
            is_current_stream_capturing=lambda: self.capturing,
            get_device_properties=lambda index: SimpleNamespace(name="a GPU on paper"),
            mem_get_info=lambda device: (self.free, 1 << 37),
            memory_reserved=lambda device: 3 << 20,
            memory_allocated=lambda device: 1 << 20,
            device=self._device,
        )
        for name in MODULES:
            monkeypatch.setattr(sys.modules[name], "torch", _Torch(self))
        monkeypatch.setattr(backends, "_loaded", dict(backends._loaded))
        monkeypatch.setitem(backends._loaded, "triton", _Planted(self, "triton", {}))
        self._monkeypatch = monkeypatch

    def plant(self, name, kernels):
        """name: "native", "triton" or "aten". kernels: variant -> (seconds, result, cost), the first one serves."""
        module = backends.row("cuda")[name]
        self._monkeypatch.setitem(backends._loaded, module, _Planted(self, name, kernels))

    @contextlib.contextmanager
    def _device(self, device):
        self.current.append(device)
        yield


class _Torch:
    """torch, where "cuda" is the GPU on paper and its tensors are the CPU's."""

    def __init__(self, gpu):
        self._gpu = gpu

    def __getattr__(self, name):
        return getattr(torch, name)

    def get_device_module(self, device):
        assert torch.device(device).type == "cuda"
        return self._gpu.module

    def Generator(self, device):
        return torch.Generator()

    def autocast(self, device_type, enabled):
        assert device_type == "cuda" and not enabled
        self._gpu.autocasts_off += 1
        return contextlib.nullcontext()

    def empty(self, size, dtype, device):
        self._gpu.made.append(size * dtype.itemsize)
        return torch.empty(min(size, 64), dtype=dtype)

    def randn(self, shape, *, generator, device, dtype):
        return torch.randn(shape, generator=generator, dtype=dtype)

    def rand(self, shape, *, generator, device, dtype):
        return torch.rand(shape, generator=generator, dtype=dtype)
