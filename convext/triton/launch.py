"""Launching: on whose device, with which configuration, in Triton proper or in its interpreter.

A launch is described before it happens (`Launch`), so that what would be compiled can be compiled, and looked at, on a
machine without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..problem import tf32_is_allowed
from .configs import cheapest, gemm_configs
from .interpreter import interpreting

_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake tensors, proxies, functional tensors


@dataclasses.dataclass
class Launch:
    """One kernel launch: `grid` takes the configuration's constants, `configs` begins with the one to use where
    nothing is measured, `arguments` holds everything else by name."""

    kernel: Any
    grid: Callable[[dict], tuple[int, ...]]
    configs: tuple[triton.Config, ...]
    arguments: dict[str, Any]

    def run(self) -> None:
        """Launches on the device of its tensors."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        kernel, config, loading = self.kernel, self.configs[0], contextlib.nullcontext()
        with on_device(device):
            if tracing():
                # A traced launch takes its configuration from the kernel. One alone: Inductor would measure them all.
                kernel, config = torch.library.wrap_triton(_tuned(kernel, (config,))), None
            else:
                captured = capturing(device)
                if captured:
                    loading = loading_while_capturing(device)
                if len(self.configs) > 1 and tuning_is_wanted():
                    tuner = _tuned(kernel, tuple(sorted(self.configs, key=str)))
                    if not captured or was_measured(tuner, self.arguments):
                        kernel, config = tuner, None
            with loading:
                kernel[self.grid](**self.arguments, **(config.all_kwargs() if config else {}))


def tracing() -> bool:
    """Whether the launch is recorded for a compiler, and not done. Other modes, a FLOP counter say, look at operators
    and do not reach in here."""
    return not interpreting() and any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS)


@functools.cache
def _tuned(kernel, configs):
    """Measures once for each tuning key, filter, stride, dtype and layout; Triton keeps the timings with its compiled
    kernels on disk."""
    key = [
        name
        for name in ("tuning_key", "R", "S", "STRIDE_H", "STRIDE_W", "DIL_H", "DIL_W", "FLAT", "PATCH_Q")
        if name in kernel.arg_names
    ]
    return triton.autotune(list(configs), key, cache_results=True)(kernel)


def tuning_is_wanted() -> bool:
    """Whether launches are to be timed in several configurations: PyTorch's own switch for that is on, and it does not
    promise the same bits in every process."""
    if not torch.backends.cudnn.benchmark or torch.backends.cudnn.deterministic or interpreting():
        return False
    return not torch.are_deterministic_algorithms_enabled()


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured: nothing can be timed then."""
    if device.type == "cpu":
        return False
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return asked is not None and asked()


@contextlib.contextmanager
def loading_while_capturing(device: torch.device):
    """Lets a kernel load inside: its first launch does that, and CUDA forbids it to a thread whose capture is strict,
    as torch.cuda.graph's is, unless the thread relaxes its mode for that long, as torch's allocator does. A driver for
    CUDA 12.3 or later allows it then."""
    exchange = _capture_mode_exchange(target(device.type))
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; the call puts the former one in its place
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _capture_mode_exchange(target: str):
    """The driver's function that swaps the calling thread's capture mode, or None where there is none."""
    library, name = {
        "cuda": ("libcuda.so.1", "cuThreadExchangeStreamCaptureMode"),
        "hip": ("libamdhip64.so", "hipThreadExchangeStreamCaptureMode"),
    }.get(target, (None, None))
    try:
        return library and getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None


def was_measured(tuner, arguments: dict[str, Any]) -> bool:
    """Whether the tuner has a result for such arguments, by the key that triton.autotune makes of them."""
    named = [arguments[name] for name in tuner.keys if name in arguments]
    dtypes = [str(arguments[n].dtype) for n in tuner.arg_names if hasattr(arguments.get(n), "dtype")]
    return (*named, *dtypes) in tuner.cache


def on_device(device: torch.device):
    """A guard that makes `device` current: Triton launches on the current one. None while tracing, nor on the CPU."""
    if device.type == "cpu" or device.index is None or tracing():
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device.index)


@functools.cache
def target(device_type: str) -> str:
    """Triton's name of the compiler for a type of device: "cuda", "hip", "xpu"; "cpu" in the interpreter."""
    return "hip" if device_type == "cuda" and torch.version.hip else device_type


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors, compute units or Xe cores of the device."""
    if device.type in ("cpu", "meta"):
        return 1  # the interpreter runs one program after the other
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64


def precision(dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """(family of configurations, PRECISION of `multiply_accumulate`) for a dtype. Float32 goes through tf32 on CUDA,
    where that is allowed."""
    if dtype is torch.float64:
        return "sum", "sum"
    if dtype is torch.float32 and interpreting():
        return "interpreter", "ieee"
    if dtype is torch.float32:
        tf32 = target(device.type) == "cuda" and tf32_is_allowed()
        return ("tf32", "tf32") if tf32 else ("ieee", "ieee")
    return "half", "widen" if dtype is torch.bfloat16 and interpreting() else "ieee"


def gemm_choice(dtype, device, m: int, n: int, k: int, batch: int, flat: bool):
    """(configs, PRECISION) for a GEMM, the configuration of least modelled cost first."""
    family, how = precision(dtype, device)
    family = "flat" if flat and family == "half" else family
    configs = gemm_configs(family, target(device.type))
    best = cheapest(configs, m, n, k, batch, processors(device))
    return (best, *(config for config in configs if config is not best)), how


def accumulate(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


def index_type(*tensors: torch.Tensor | None) -> tl.dtype:
    """32-bit offsets unless an element of some tensor lies further out, measured in elements."""
    for t in tensors:
        if t is not None and sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) >= 2**31 - 2**16:
            return tl.int64
    return tl.int32


def strides(name: str, axes: str, t: torch.Tensor | None) -> dict[str, int]:
    """{name_stride_axis: stride} for the letters of `axes`; zeros for a tensor that is not there."""
    values = (0,) * len(axes) if t is None else t.stride()
    return {f"{name}_stride_{axis}": value for axis, value in zip(axes, values, strict=True)}


def power_of_2_at_least(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()
