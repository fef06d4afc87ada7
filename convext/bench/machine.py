"""What a figure depends on: machine, versions, commit, sources of the kernels; and the machine's ceilings, measured."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backends.tuned import cpu_name
from ..output_pool import output_pool
from ..problem import DType

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

# Distributions of the engines that people measure against, besides those of the extra `bench`.
PEERS = ("zentorch", "ncnn", "pnnx", "MNN", "executorch")

# What the figures of a type of device depend on: the library's kernels and their selection. For a GPU, Triton's too.
KERNEL_SOURCES = {
    "cpu": ("csrc/core/*", "csrc/cpu/**/*", "csrc/torch/*", "csrc/storage/*", "csrc/python/*",
            "convext/backends/costs.py", "convext/backends/tables/*.json"),
    "cuda": ("csrc/core/*", "csrc/cuda/**/*", "csrc/python/*", "convext/triton/*.py",
             "convext/backends/native_cuda.py", "convext/backends/triton.py"),
}  # fmt: skip


def kernels(device_type: str, root: Path = ROOT) -> str | None:
    """A hash of the kernels' sources for that type of device; None where convext runs without its source tree."""
    if not (root / "csrc").is_dir():
        return None
    hashed = hashlib.sha256()
    files = {file for pattern in KERNEL_SOURCES[device_type] for file in root.glob(pattern) if file.is_file()}
    for file in sorted(files):
        hashed.update(f"{file.relative_to(root).as_posix()}\0".encode())
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str | None:
    """The commit of a source tree, "+" for local changes; None where convext runs without its source tree."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if dirty else "")


def current(device: torch.device):
    """A context in which a device is the current one; nothing to do for the CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def gpu(device: torch.device) -> dict:
    """Name, driver and libraries of a GPU, ready for JSON."""
    properties = torch.get_device_module(device).get_device_properties(device)
    found = {"name": properties.name, "memory_bytes": properties.total_memory}
    if device.type == "cuda":
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _driver() -> str | None:
    """The release of NVIDIA's driver, or None where nvidia-smi does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[0] or None


def record(device: torch.device = CPU, root: Path = ROOT) -> dict:
    """Machine, versions, and the commit and kernels of the source tree `root`, ready for JSON."""
    packages = ("convext", "torch", "torchvision", "triton", "onnxruntime", "openvino", *PEERS)
    return {
        "device": device.type,
        "gpu": None if device.type == "cpu" else gpu(device),
        "kernels": kernels("cpu" if device.type == "cpu" else "cuda", root),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "allocator": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "LD_PRELOAD"))},
        "output_pool": output_pool.limit(),
        "commit": commit(root),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most, measured on this machine."""

    where: str  # "1 thread", "NVIDIA H200"
    unit: str  # what multiplies: "float32 FMA", "bfloat16 matrix products"
    flops: float  # FLOP/s of that unit
    copy_bytes: float  # bytes/s, read plus written, of a copy far larger than the caches

    def share(self, flops: float, bytes_: float, seconds: float) -> tuple[float, str]:
        """How much of the ceiling that binds first was reached, as (share, "flops" or "copy").

        Above 1 is possible: taps in the padding count as FLOPs but need not be computed, fast algorithms multiply less,
        and tensors that stay in the caches are not bound by the copy.
        """
        return max((flops / self.flops / seconds, "flops"), (bytes_ / self.copy_bytes / seconds, "copy"))

    def __str__(self) -> str:
        return f"{self.where}: {self.unit} {self.flops / 1e9:.0f} GFLOP/s, copy {self.copy_bytes / 1e9:.1f} GB/s"


def ceilings(threads: int, dtype: torch.dtype = torch.float32) -> Ceilings:
    """Measures both for a number of the CPU's threads, in about a second. FMA speed is one thread's, multiplied; of
    bfloat16 where the CPU has instructions for it, of float32 elsewhere and for every other type."""
    from .. import _C

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        where = f"{threads} thread{'s' if threads > 1 else ''}"
        if dtype is torch.bfloat16 and _C.isa() == "avx512_bf16":
            return Ceilings(where, "bfloat16 dot products", threads * _C.fma_peak(DType.BFLOAT16), copy_rate())
        return Ceilings(where, "float32 FMA", threads * _C.fma_peak(), copy_rate())
    finally:
        torch.set_num_threads(before)


def copy_rate(seconds: float = 0.5, megabytes: int = 128) -> float:
    """Bytes/s of the best torch copy of that size, with the current number of threads."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8)
    target = torch.ones_like(source)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2.0 * source.numel() / best


def gpu_ceilings(device: torch.device, dtype: torch.dtype, *, size: int = 8192, copied: int = 1 << 31) -> Ceilings:
    """Measures both on a GPU: a product of two (size, size) matrices of random numbers, and a copy of `copied` bytes,
    each the median of ten after three."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    multiply = _device_seconds(device, lambda: torch.mm(a, b, out=product))
    copy = _device_seconds(device, lambda: target.copy_(source))
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
    unit = f"{'tf32' if tf32 else str(dtype).removeprefix('torch.')} matrix products"
    return Ceilings(gpu(device)["name"], unit, 2.0 * size**3 / multiply, 2.0 * copied / copy)


def _device_seconds(device: torch.device, call) -> float:
    events = torch.get_device_module(device)
    seconds = []
    for _ in range(13):
        start, end = events.Event(enable_timing=True), events.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.synchronize(device)
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:])
