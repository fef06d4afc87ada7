"""Choices that were measured on this machine and are kept from process to process (tune/ makes them).

One JSON file for each kind of machine, build of convext and release of torch, in the user's cache folder:

    {"format": 1, "machine": {...},
     "choices": {"fprop 1 64 56 56 64 3 3 1 1 1 1 1 1 1 FLOAT32 NCHW NHWC, 2 threads, fast":
                 {"backend": "native", "variant": "...", "seconds": {"native ...": 1e-4, "aten ...": 2e-4}}},
     "aside": {"name of a kernel": "what was wrong with it"}}

It is read as data, never run, and replaced as a whole. A file that is broken, or of another machine or build, is put
aside under another name with one warning. Where the folder cannot be written, choices live as long as the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..problem import ConvProblem, Pass

FORMAT = 1
MODES = "cached", "off"
_LOCK = threading.RLock()
_LOCK_SECONDS = 10.0  # to wait for another process that writes


class KeptChoice(NamedTuple):
    """What serves a pass over a problem, and what was measured: "backend variant" -> seconds of a call."""

    backend: str
    variant: str
    seconds: dict[str, float]

    @property
    def name(self) -> str:
        """As `seconds` names it."""
        return f"{self.backend} {self.variant}"


class Kept:
    """The choices of one type of device: those of its file, once it is read, and those of this process."""

    def __init__(self, device_type: str):
        self.device_type = device_type
        self.choices: dict[str, KeptChoice] = {}
        self.aside: dict[str, str] = {}
        self._read = False

    def path(self) -> Path | None:
        """Where they are kept, or None where there is no such place."""
        folder = cache_folder()
        if folder is None:
            return None
        about = json.dumps(machine(self.device_type), sort_keys=True).encode()
        return folder / f"{self.device_type}-{hashlib.sha256(about).hexdigest()[:16]}.json"

    def read(self) -> None:
        """Reads the file, once. Never raises."""
        with _LOCK:
            if self._read:
                return
            self._read = True
            if not _any_files(self.device_type):
                return
            path = self.path()
            if path is not None and path.exists():
                choices, aside = _contents_or_nothing(path, self.device_type)
                self.choices = {**choices, **self.choices}
                self.aside = {**aside, **self.aside}

    def write(self) -> Path | None:
        """Adds what this process found to the file; returns its path, or None where it cannot be written."""
        path = self.path()
        if path is None:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _file_lock(path), _LOCK:
                if path.exists():
                    choices, aside = _contents_or_nothing(path, self.device_type)
                    self.choices = {**choices, **self.choices}
                    self.aside = {**aside, **self.aside}
                _replace(path, self.as_json())
        except (OSError, TimeoutError) as error:
            warnings.warn(
                f"convext: {path} cannot be written, choices live as long as this process: {error}", stacklevel=3
            )
            return None
        return path

    def add(self, path: Path) -> int:
        """Adds the choices of a file that another machine of the kind wrote; returns how many. Raises ValueError and
        OSError as `contents` does."""
        choices, aside = contents(path, self.device_type)
        with _LOCK:
            self.choices.update(choices)
            self.aside.update(aside)
        return len(choices)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "machine": machine(self.device_type),
            "choices": {key: choice._asdict() for key, choice in sorted(self.choices.items())},
            "aside": dict(sorted(self.aside.items())),
        }


_kept: dict[str, Kept] = {}
mode = "cached"  # convext.tuning sets it


def of(device_type: str) -> Kept:
    """The choices for a type of device, read on first use."""
    with _LOCK:
        kept = _kept.get(device_type)
        if kept is None:
            kept = _kept[device_type] = Kept(device_type)
    kept.read()
    return kept


def lookup(pass_: Pass, problem: ConvProblem) -> KeptChoice | None:
    """The choice that is kept for a pass over a problem, or None."""
    if mode == "off":
        return None
    choices = of(problem.device).choices
    return choices.get(key(pass_, problem)) if choices else None


def aside(device_type: str) -> dict[str, str]:
    """Kernels that were measured to be wrong, to raise or to be far slower than expected -> why, in words."""
    return {} if mode == "off" else of(device_type).aside


def forget() -> None:
    """Drops what was read, so that files are read anew."""
    with _LOCK:
        _kept.clear()


def key(pass_: Pass, problem: ConvProblem) -> str:
    """What a choice depends on besides machine and build."""
    from . import native

    layouts = f"{problem.x_layout.name} {problem.y_layout.name}"
    extents = " ".join(map(str, problem.extents()))
    where = f", {torch.get_num_threads()} threads" if problem.device == "cpu" else ""
    return f"{pass_.name.lower()} {extents} {problem.dtype.name} {layouts}{where}, accuracy {native.accuracy()}"


# ---- files


def cache_folder() -> Path | None:
    """$CONVEXT_CACHE, or the user's cache folder as platformdirs says; None where that is not installed."""
    given = os.environ.get("CONVEXT_CACHE")
    if given:
        return Path(given)
    try:
        platformdirs = importlib.import_module("platformdirs")
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("convext"))


def machine(device_type: str) -> dict[str, str]:
    """What choices are measured on: processor or GPU, instruction set, build, torch."""
    build = _build()
    if device_type == "cpu":
        from . import native

        name, isa = cpu_name(), native.isa()
    else:
        properties = torch.get_device_module(device_type).get_device_properties(0)
        name, isa = str(properties.name), f"{torch.version.cuda} {torch.version.hip}"
        build += f" {_triton_kernels()}"
    return {"device": device_type, "name": name, "isa": isa, "build": build, "torch": torch.__version__}


def cpu_name() -> str:
    """The CPU's model name, or the architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_builds: dict[str, str] = {}


def _build() -> str:
    """A hash of the libraries that hold kernels, which are the same under every Python."""
    folder = Path(__file__).resolve().parents[1]
    libraries = sorted(folder.glob("libconvext*.abi3.so"))
    about = str([(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in libraries])
    if about not in _builds:
        hashed = hashlib.sha256()
        for file in libraries:
            hashed.update(file.read_bytes())
        _builds[about] = hashed.hexdigest()[:16]
    return _builds[about]


def _triton_kernels() -> str:
    """A hash of what Triton compiles, and with which release."""
    from . import triton

    hashed = hashlib.sha256(str(triton.release()).encode())
    for file in sorted((Path(__file__).resolve().parents[1] / "triton").glob("*.py")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]


def _any_files(device_type: str) -> bool:
    folder = cache_folder()
    try:
        return folder is not None and any(folder.glob(f"{device_type}-*.json"))
    except OSError:
        return False


def _contents_or_nothing(path: Path, device_type: str) -> tuple[dict[str, KeptChoice], dict[str, str]]:
    """The contents of a file; one that does not hold is put aside, and counts as empty."""
    try:
        return contents(path, device_type)
    except (OSError, ValueError) as error:
        kept_as = path.with_suffix(".broken")
        with contextlib.suppress(OSError):
            path.replace(kept_as)
        warnings.warn(f"convext: {path} holds no choices ({error}); it is now {kept_as.name}", stacklevel=3)
        return {}, {}


def contents(path: Path, device_type: str) -> tuple[dict[str, KeptChoice], dict[str, str]]:
    """(choices, kernels put aside) of a file. Raises ValueError where it is none of this machine's, OSError where it
    cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    there, here = found.get("machine"), machine(device_type)
    if there != here:
        differs = [name for name in here if not isinstance(there, dict) or there.get(name) != here[name]]
        raise ValueError(f"it was measured elsewhere: {', '.join(differs)} differ")
    choices, aside = found.get("choices"), found.get("aside")
    if not isinstance(choices, dict) or not isinstance(aside, dict):
        raise ValueError("it lacks choices")
    if not all(isinstance(reason, str) for reason in aside.values()):
        raise ValueError("its reasons are no text")
    return {key: _choice(key, value) for key, value in choices.items()}, aside


def _choice(key: str, value: Any) -> KeptChoice:
    if isinstance(value, dict) and value.keys() == set(KeptChoice._fields):
        backend, variant, seconds = value["backend"], value["variant"], value["seconds"]
        if isinstance(backend, str) and isinstance(variant, str) and isinstance(seconds, dict):
            if all(type(s) is float and s > 0 and math.isfinite(s) for s in seconds.values()):
                return KeptChoice(backend, variant, seconds)
    raise ValueError(f"no choice stands at {key!r}")


def _replace(path: Path, found: dict[str, Any]) -> None:
    """Writes a file as a whole, or leaves it as it is."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(number, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    filelock = importlib.import_module("filelock")  # torch requires it
    with filelock.FileLock(str(path) + ".lock", timeout=_LOCK_SECONDS):
        yield
