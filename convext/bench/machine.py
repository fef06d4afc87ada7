"""What a figure depends on besides the code: machine, versions, commit; and the machine's own ceilings, measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Ceilings:
    """What a number of threads reaches at most on this machine, measured."""

    threads: int
    fma_flops: float  # FLOP/s of float32 FMAs on registers
    copy_bytes: float  # bytes/s, read plus written, of a copy far larger than the caches

    def share(self, flops: float, bytes_: float, seconds: float) -> tuple[float, str]:
        """How much of the ceiling that binds first was reached, as (share, "fma" or "copy").

        Above 1 is possible: taps in the padding count as FLOPs but need not be computed, fast algorithms multiply less,
        and tensors that stay in the caches are not bound by the copy.
        """
        by_fma, by_copy = flops / self.fma_flops, bytes_ / self.copy_bytes
        return max((by_fma / seconds, "fma"), (by_copy / seconds, "copy"))

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        return (
            f"{self.threads} thread{plural}: float32 FMA {self.fma_flops / 1e9:.0f} GFLOP/s, "
            f"copy {self.copy_bytes / 1e9:.1f} GB/s"
        )


def ceilings(threads: int) -> Ceilings:
    """Measures both, in about a second. FMA speed is one thread's times their number."""
    from .. import _C

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Ceilings(threads, threads * _C.fma_peak(), copy_rate())
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
