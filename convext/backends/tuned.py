"""Choices that were measured on this machine and are kept from process to process (tune/ makes them).

One JSON file for each kind of machine, build of convext and release of torch, in the user's cache folder:

    {"format": 1, "machine": {...},
     "choices": {"fprop 1 64 56 56 64 3 3 1 1 1 1 1 1 1 FLOAT32 NCHW NHWC, bn relu, 2 threads, accuracy 0":
                 {"backend": "native", "variant": "...", "seconds": {"native ...": 1e-4, "aten ...": 2e-4}}},
     "aside": {"name of a kernel": "what was wrong with it"}}

It is read as data, never run, and replaced as a whole. A file that is broken, or of another machine or build, is put
aside under another name with one warning. Where the folder cannot be written, choices live as long as the process.

In mode "measure", a problem is measured where the selection first sees it (`see`, tune/first_sight.py). What was used
once stays in that mode, measured or not: `_settled` holds the keys, and a file that another process has added to since
is not read again. Only a kernel that is put aside goes.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import json
import math
import os
import platform
import re
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..problem import ConvProblem, DType, Pass, tf32_is_allowed

FORMAT = 1
MODES = "measure", "cached", "off"
_LOCK = threading.RLock()
_LOCK_SECONDS = 10.0  # to wait for another process that writes
_LOCK_SECONDS_AT_EXIT = 2.0
# In mode "measure", how many choices wait to be written, and for how many seconds after the first of them.
_BATCH, _BATCH_SECONDS = 16, 2.0
_MOST_SETTLED = 1 << 16  # keys, beyond which the process measures no more


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
        self.unwritten, self._since = 0, 0.0
        self._complained = False

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
            if not is_here(self.device_type):
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
            self._write(path, _LOCK_SECONDS)
        except (OSError, TimeoutError) as error:
            warnings.warn(f"convext: {_cannot_write(path, error)}", stacklevel=3)
            return None
        return path

    def write_later(self) -> None:
        """`write`, once there is a batch, or at exit. It waits for no other process, and says once where it cannot."""
        with _LOCK:
            if not self.unwritten:
                self._since = time.monotonic()
            self.unwritten += 1
            waited = time.monotonic() - self._since
        if self.unwritten >= _BATCH or waited > _BATCH_SECONDS:
            self.flush(0.0)

    def flush(self, wait: float) -> None:
        """Writes what waits to be written, and waits as many seconds for others. Never raises."""
        path = self.path() if self.unwritten and not self._complained else None
        if path is None:
            return
        try:
            self._write(path, wait)
        except TimeoutError:  # the next batch, or the end of the process, takes it along
            self._since = time.monotonic()
        except OSError as error:
            self._complained = True
            say(_cannot_write(path, error))

    def _write(self, path: Path, wait: float) -> None:
        """What others have added since stays in the file and is none of this process's: what it has used stays."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(path, wait), _LOCK:
            found = self.as_json()
            if path.exists():
                choices, aside = _contents_or_nothing(path, self.device_type)
                others = Kept(self.device_type)
                others.choices, others.aside = {**choices, **self.choices}, {**aside, **self.aside}
                found = others.as_json()
            _replace(path, found)
            self.unwritten = 0

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
mode: str | None = None  # convext.tuning sets it
_settled: set[str] = set()  # keys of what was used in mode "measure"

# What tune/ does for those whom it imports. measure_at_first_sight(pass, problem, kind, device): in bounded time and
# memory, where that may be done now; keeps what it finds and never raises. tune(model, x, train=...): convext.tune.
measure_at_first_sight: Callable[[Pass, ConvProblem, str, torch.device], object] | None = None
tune: Callable[..., object] | None = None


def mode_on(device_type: str) -> str:
    """The mode for a type of device. Without a setting it is "measure" but on the CPU, where the cost model knows more
    and a measurement takes the time of who waits for it: there it is "cached"."""
    return mode or ("cached" if device_type == "cpu" else "measure")


def of(device_type: str) -> Kept:
    """The choices for a type of device, read on first use."""
    with _LOCK:
        kept = _kept.get(device_type)
        if kept is None:
            kept = _kept[device_type] = Kept(device_type)
    kept.read()
    return kept


def lookup(pass_: Pass, problem: ConvProblem, kind: str = "") -> KeptChoice | None:
    """The choice that is kept for a pass over a problem with what follows it (`Epilogue.kind`), or None.

    Where nothing is measured at first sight, a kernel that is kept of the pass alone stands for each kind that nothing
    is kept of. ATen does not: it runs what follows as passes of its own, and the cost model knows more of that."""
    how = mode_on(problem.device)
    if how == "off":
        return None
    choices = of(problem.device).choices
    if not choices:
        return None
    found = choices.get(key(pass_, problem, kind))
    if found is None and kind and how == "cached":
        found = choices.get(key(pass_, problem))
        return None if found is not None and found.backend == "aten" else found
    return found


def aside(device_type: str) -> dict[str, str]:
    """Kernels that were measured to be wrong, to raise or to be far slower than expected -> why, in words."""
    return {} if mode_on(device_type) == "off" else of(device_type).aside


def why_aside(device_type: str) -> list[tuple[str, str]]:
    """(kernel, reason) of those, as other reasons against a kernel are told."""
    return [(name, f"it was put aside: {reason}") for name, reason in aside(device_type).items()]


def forget() -> None:
    """Drops what was read, so that files are read anew, and what was used, so that it may change."""
    with _LOCK:
        _kept.clear()
        _settled.clear()


def key(pass_: Pass, problem: ConvProblem, kind: str = "") -> str:
    """What a choice depends on besides machine and build."""
    from . import native

    layouts = f"{problem.x_layout.name} {problem.y_layout.name}"
    extents = " ".join(map(str, problem.extents()))
    what = f"{pass_.name.lower()} {extents} {problem.dtype.name} {layouts}" + (f", {kind}" if kind else "")
    if problem.device == "cpu":
        where = f"{torch.get_num_threads()} threads"
    else:  # what torch lets cuDNN do, which is ATen's
        tf32 = "tf32" if problem.dtype is DType.FLOAT32 and tf32_is_allowed() else "no tf32"
        where = f"{tf32}, cudnn.benchmark {torch.backends.cudnn.benchmark}"
    return f"{what}, {where}, accuracy {native.accuracy()}"


# ---- what the selection sees


class _Thread(threading.local):
    """Whether this thread's calls are those of a transform, of which nothing is measured."""

    transforms = 0


_thread = _Thread()
_recorder: Counter[tuple[Pass, ConvProblem, str]] | None = None


def see(pass_: Pass, problem: ConvProblem, kind: str, device: torch.device) -> None:
    """Told by the selection before it chooses, for a call on that device that is about to run. It may measure."""
    if _recorder is not None:
        _recorder[pass_, problem, kind] += 1
    elif mode_on(problem.device) == "measure":
        named = key(pass_, problem, kind)
        if named in _settled or len(_settled) >= _MOST_SETTLED:
            return
        if measure_at_first_sight is not None and not _thread.transforms and named not in of(problem.device).choices:
            measure_at_first_sight(pass_, problem, kind, device)
        _settled.add(named)


def settle(pass_: Pass, problem: ConvProblem, kind: str) -> None:
    """Told of what is used without having been measured."""
    if _recorder is None and mode_on(problem.device) == "measure" and len(_settled) < _MOST_SETTLED:
        _settled.add(key(pass_, problem, kind))


def is_settled(pass_: Pass, problem: ConvProblem, kind: str) -> bool:
    """Whether it was used in mode "measure", or is known: then it is measured no more."""
    named = key(pass_, problem, kind)
    return named in _settled or named in of(problem.device).choices


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Calls inside, on this thread, are measured nowhere: those of torch.func's transforms."""
    _thread.transforms += 1
    try:
        yield
    finally:
        _thread.transforms -= 1


@contextlib.contextmanager
def recorded() -> Iterator[Counter[tuple[Pass, ConvProblem, str]]]:
    """What the selection sees inside, on all threads; nothing of it is measured at first sight. What is cached of the
    selection, it does not see."""
    global _recorder
    former, _recorder = _recorder, Counter()
    try:
        yield _recorder
    finally:
        _recorder = former


def say(text: str) -> None:
    """Warns; where a filter makes an error of it, it says nothing: the call that it happens in is the user's."""
    with contextlib.suppress(Warning):
        warnings.warn(f"convext: {text}", stacklevel=3)


def _at_exit() -> None:
    for kept in [*_kept.values()]:
        kept.flush(_LOCK_SECONDS_AT_EXIT)


def _in_a_forked_child() -> None:
    """What waits to be written is the parent's to write."""
    for kept in _kept.values():
        kept.unwritten = 0


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_forked_child)


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
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        isa += f", cuDNN {cudnn}, driver {_driver()}"
    return {"device": device_type, "name": name, "isa": isa, "build": build, "torch": torch.__version__}


def _driver() -> str:
    """Release of NVIDIA's driver, "" where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
        return found.group() if found else ""
    return ""


def is_here(device_type: str) -> bool:
    """Whether there is such a device: kernels can be asked about without."""
    if device_type == "cpu":
        return True
    try:
        return bool(torch.get_device_module(device_type).is_available())
    except RuntimeError:  # a type that has no module, such as meta
        return False


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


def _cannot_write(path: Path, error: Exception) -> str:
    return f"{path} cannot be written, choices live as long as this process: {error}"


@contextlib.contextmanager
def _file_lock(path: Path, wait: float) -> Iterator[None]:
    filelock = importlib.import_module("filelock")  # torch requires it
    with filelock.FileLock(str(path) + ".lock", timeout=wait):
        yield
