"""What a figure depends on besides the code: machine, versions, commit; and the machine's own ceilings, measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch


def cpu_name() -> str:
    """The CPU's model name, or the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree that convext is imported from, "+" for local changes; None for an installation."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if dirty else "")


def record() -> dict:
    """Machine, versions and commit, ready for JSON."""
    packages = ("convext", "torch", "torchvision", "onnxruntime", "openvino")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "allocator": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "LD_PRELOAD"))},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _best_rate(work: float, call, seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return work / best


def gemm_rate(seconds: float = 0.5, size: int = 1024) -> float:
    """FLOP/s of the best float32 torch.mm of two size x size matrices, with the current number of threads."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return _best_rate(2.0 * size**3, lambda: torch.mm(a, b, out=out), seconds)


def copy_rate(seconds: float = 0.5, megabytes: int = 128) -> float:
    """Bytes/s read plus written by the best copy of a buffer far larger than the caches."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8)
    target = torch.ones_like(source)
    return _best_rate(2.0 * source.numel(), lambda: target.copy_(source), seconds)


def ceilings(threads: int) -> str:
    """What this machine reaches at most with that many threads, measured now, in words."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm, copy = gemm_rate(), copy_rate()
    finally:
        torch.set_num_threads(before)
    plural = "s" if threads > 1 else ""
    return f"{threads} thread{plural}: float32 matrix product {gemm / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s"
