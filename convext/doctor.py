"""`convext doctor`: what is installed, what this machine offers, what therefore runs. Plain text for a bug report."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import ModuleType

import torch

from . import __version__, backends
from .backends import bindings, compiled_calls, costs, native, tuned
from .backends.tuned import cpu_name
from .bench.machine import commit, version

PACKAGES = ("torchvision", "triton", "numpy", "onnxruntime", "openvino")


def report() -> str:
    """The whole report, one `section: value` or indented line each."""
    sections = [_versions(), _build(), _cpu(), _gpus(), _backends(), _choices(), _costs(), _caches()]
    return "\n".join(line for section in sections for line in section)


def _versions() -> list[str]:
    source = commit()
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := version(name)))
    return [
        f"convext {__version__}" + (f", source tree at {source}" if source else ""),
        f"running with: torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"threads of Python: {_lock()}",
        f"beside: {versions}",
    ]


def _lock() -> str:
    """Whether threads run Python code at once, and what convext makes of it."""
    if not bindings.free_threaded():
        return "one at a time, under the global interpreter lock"
    if bindings.lock_is_on():
        return "one at a time: convext has switched on the lock that this Python could do without"
    return "all at once, the lock is off; so the compiled libraries are, too"


def _library() -> ModuleType | ImportError:
    """The compiled library, or the error that loading it gave."""
    try:
        return bindings.load("_C")
    except ImportError as error:
        return error


def _build() -> list[str]:
    library = _library()
    if isinstance(library, ImportError):
        return [f"built with: the compiled library does not load ({library}); fix: pip install . from the source tree"]
    info = dict(library.build_info())
    cuda = info.pop("cuda", "CUDA library: unknown")
    built = ", ".join(f"{key} {value}" for key, value in info.items())
    why_not = native.why_no_output_pool
    pool = "on" if why_not is None else f"off, {why_not}; fix: reinstall convext beside this torch"
    why_not = compiled_calls.why_not
    calls = "on" if why_not is None else f"off, {why_not}; fix: reinstall convext beside this torch"
    return [f"built with: {built}", cuda, f"pool of results: {pool}", f"calls without Python: {calls}"]


def _cpu() -> list[str]:
    threads = f"threads: {torch.get_num_threads()} (torch.set_num_threads changes it)"
    library = _library()
    if isinstance(library, ImportError):
        return [f"CPU: {cpu_name()}", threads]
    features = library.cpu_features()
    offered = " ".join(name for name, there in features.items() if there) or "none that convext knows"
    lacking = " ".join(name for name, there in features.items() if not there)
    return [
        f"CPU: {cpu_name()}",
        f"  offers {offered}" + (f"; lacks {lacking}" if lacking else ""),
        f"  kernels in use: {library.isa()} (best here: {library.best_isa()})",
        threads,
    ]


def _gpus() -> list[str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return ["GPUs: none usable, this torch is built for the CPU alone"]
    if not torch.cuda.is_available():
        return [f"GPUs: torch (CUDA {torch.version.cuda}) finds none"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ["GPUs:"] + [
        f"  {index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        for index, gpu in enumerate(found)
    ]


def _backends() -> list[str]:
    statuses = backends.backends()
    devices = dict.fromkeys(status.device for status in statuses)
    serving = [_serving(device, [s.name for s in statuses if s.device == device and s.available]) for device in devices]
    return ["backends:", *(f"  {status}" for status in statuses), *serving]


def _choices() -> list[str]:
    """What was measured here and is kept, and which kernels were put aside."""
    here = torch.accelerator.current_accelerator(check_available=True)
    return [line for device in dict.fromkeys(["cpu", here.type if here else "cpu"]) for line in _choices_on(device)]


def _choices_on(device: str) -> list[str]:
    kept = tuned.of(device)
    path = kept.path()
    if path is None:
        where = "nowhere, platformdirs is not installed; fix: pip install platformdirs, or set CONVEXT_CACHE"
    else:
        where = f"in {path}" if path.exists() else f"none, {path.parent} is where they would be"
    lines = [
        f"choices measured on {device}: {len(kept.choices)}, kept {where}; convext.tuning: {tuned.mode_on(device)}"
    ]
    for name, reason in kept.aside.items():
        about = tuned.machine(device)
        lines.append(f"  put aside: {name}, {reason}")
        lines.append(
            f"    please report this line: {name} on {about['name']} ({about['isa']}), build {about['build']}, "
            f"torch {about['torch']}: {reason}"
        )
    return lines


def _costs() -> list[str]:
    """The tables by which the CPU's kernels and ATen are chosen where nothing was measured."""
    if native.BACKEND.unavailable("cpu") is not None:
        return ["tables of costs: none, the compiled library is off"]
    return ["tables of costs, the first before the others:", *(f"  {source}" for source in costs.sources())]


def _caches() -> list[str]:
    """What running convext leaves outside the package."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    places = {
        "Triton's compiled kernels": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "weights for the demo and the benchmarks": Path(torch.hub.get_dir()) / "checkpoints",
    }
    lines = [f"  {what}: {place}" + ("" if place.exists() else " (not there)") for what, place in places.items()]
    return ["caches, which pip uninstall leaves, as the choices; other programs share them:", *lines]


def _serving(device: str, names: list[str]) -> str:
    """Who therefore serves a type of device, in the order in which they are asked."""
    if device != "cpu" and not torch.get_device_module(device).is_available():
        return f"serves {device}: nobody, torch sees no such device"
    return f"serves {device}: " + ", ".join([names[0], *(f"{name} what is left" for name in names[1:])])
