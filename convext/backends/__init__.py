"""Backends: who can run a pass over a problem, and the selection of one. base.py says what a backend is.

`convext.backends()` lists the backends; the module is callable for that.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..problem import ConvProblem, Pass
from . import compiled_calls, tuned
from .base import Absent, Backend, Candidate

# THE table of backends: type of device -> those that serve it in order of preference, name -> module in this folder.
# None stands for every other type. On the CPU, Triton is there to be asked for by name only: ATen takes everything.
PRIORITY: dict[str | None, dict[str, str]] = {
    "cpu": {"native": "native", "aten": "aten", "triton": "triton"},
    "cuda": {"native": "native_cuda", "triton": "triton", "aten": "aten"},
    None: {"triton": "triton", "aten": "aten"},
}
NAMES = tuple(dict.fromkeys(name for row in (PRIORITY["cuda"], *PRIORITY.values()) for name in row))


class BackendStatus(NamedTuple):
    """One line of `convext.backends()`."""

    name: str
    device: str
    available: bool
    reason: str | None  # why it is off, and what to do about it

    def __str__(self) -> str:
        return f"{self.name} on {self.device}: " + ("available" if self.available else f"off, {self.reason}")


class Choice:
    """What serves a pass over a problem, with what follows it (`Epilogue.kind`): the backend, the name of its kernel,
    and why the ones before it were passed over. `counter` is a list of one number, the calls of that (backend, pass,
    variant). `measured`: the candidate that was measured to be the fastest, where one was."""

    __slots__ = ("backend", "pass_", "problem", "kind", "variant", "passed_over", "counter", "run")

    def __init__(
        self,
        backend: Backend,
        passed_over: dict[str, str],
        pass_: Pass,
        problem: ConvProblem,
        kind: str = "",
        measured: Candidate | None = None,
    ):
        self.backend = backend
        self.pass_ = pass_
        self.problem = problem
        self.kind = kind
        self.run: Callable[..., torch.Tensor]
        if measured is None or measured.backend != backend.name:
            self.variant, self.run = backend.served(pass_, problem, kind)
        else:
            self.variant, self.run = measured.variant, measured.run
        self.passed_over = passed_over
        self.counter = counter(backend.name, pass_.name.lower(), self.variant)

    def prepared_fprop(self, activation: str, rounds_weights: bool = False) -> Callable[..., torch.Tensor]:
        """call(x, w, bias, mean, var, gamma, beta, residual, eps) -> y of this problem, for who calls it again and
        again. It checks nothing, and must not be kept beyond the present `epoch`. `rounds_weights`: w and bias may be
        float32 where the problem is in half precision."""
        call = self.backend.prepared_fprop(self.problem, activation, self.kind, self.run)
        if not rounds_weights or self.backend.takes_float_weights(self.problem):
            return call
        return lambda x, w, bias, *others: call(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype), *others)

    def __repr__(self) -> str:
        return f"<{self.pass_.name.lower()} of {self.problem}: {self.backend.name}, {self.variant}>"


_lock = threading.RLock()
_loaded: dict[str, Backend] = {}  # by module
_unavailable: dict[tuple[str, str], str | None] = {}
_choices: dict[tuple[Pass, ConvProblem, bool, str], Choice] = {}
_batch_norm: dict[tuple[torch.dtype, str, int], Backend] = {}
_counters: dict[tuple[str, str, str], list[int]] = {}
_forced: str | None = None

# Choices by the properties of the tensors of a call, for the direct path of ops.py. Holds what `select` returns, so it
# goes whenever `_choices` goes.
CALL_CACHE: dict[tuple[Any, ...], Choice] = {}
epoch = object()  # another one whenever kept choices cease to hold
CACHE_LIMIT = 4096  # a service with ever new shapes must not grow without bound


def row(device_type: str) -> dict[str, str]:
    """name -> module of the backends that serve a type of device, in order of preference."""
    return PRIORITY.get(device_type, PRIORITY[None])


def get(name: str, device_type: str = "cpu") -> Backend:
    """The backend of that name for a type of device, loaded on first use."""
    module = row(device_type).get(name)
    if module is None:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
    backend = _loaded.get(module)
    if backend is None:
        try:
            backend = importlib.import_module(f"{__name__}.{module}").BACKEND
        except Exception as error:  # whatever its toolchain raises: one backend's trouble must not stop the others
            backend = Absent(name, f"{__name__}.{module}", error)
        _loaded[module] = backend
    return backend


def unavailable(name: str, device_type: str) -> str | None:
    """Why a backend is off for a type of device and what to do about it, or None where it is on."""
    key = name, device_type
    if key not in _unavailable:
        if name not in row(device_type):
            _unavailable[key] = f"has no kernels for {device_type}; nothing to do, another backend serves it"
        else:
            _unavailable[key] = get(name, device_type).unavailable(device_type)
    return _unavailable[key]


def backends() -> list[BackendStatus]:
    """Every backend on every type of device this torch knows here: name, device, available, and the reason if not."""
    devices = [device for device in PRIORITY if device is not None]
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None and here.type not in devices:
        devices.append(here.type)
    status = []
    for device in devices:
        for name in row(device):
            reason = unavailable(name, device)
            status.append(BackendStatus(name, device, reason is None, reason))
    return status


def forget() -> None:
    """Drops every cached choice: call after something that selection depends on has changed."""
    global epoch
    with _lock:
        epoch = object()
        _choices.clear()
        CALL_CACHE.clear()
        compiled_calls.forget()
        _batch_norm.clear()
        _unavailable.clear()


class backend:
    """Makes one backend serve every call: a setting, and a context manager that puts the former one back.

        >>> convext.backend("native")  # from here on
        convext.backend('native')
        >>> convext.backend(None)  # automatic again, the default
        convext.backend(None)
        >>> with convext.backend("aten"):  # inside only
        ...     y = convext.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))

    Args:
        name: "native", "triton", "aten", or None for the automatic choice.

    A call that the backend cannot serve raises RuntimeError with its reason. The setting is the process's, not the
    thread's, because backward passes run on threads of their own: two threads must not use it differently at once.

    Raises ValueError for a name that is none of "native", "triton", "aten".
    """

    def __init__(self, name: str | None):
        if name is not None and name not in NAMES:
            raise ValueError(
                f"backend: unknown name {name!r}, expected one of "
                f"{', '.join(map(repr, NAMES))}, or None for the automatic choice"
            )
        self.name = name
        self._former = _force(name)

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _force(self._former)

    def __repr__(self) -> str:
        return f"convext.backend({self.name!r})"


def _force(name: str | None) -> str | None:
    global _forced
    with _lock:
        former, _forced = _forced, name
        forget()
        return former


def forced() -> str | None:
    """The backend that `convext.backend` set, or None for the automatic choice."""
    return _forced


def select(
    pass_: Pass, problem: ConvProblem, alone: bool = True, kind: str = "", device: torch.device | None = None
) -> Choice:
    """Who serves a pass over a problem, for a call that is about to run.

    `alone` False: as a part of a larger call, where a backend that could is not passed over because another's call is
    faster. `kind`: what follows an fprop (`Epilogue.kind`). `device`: where the tensors are. Where it was never seen
    before, it may be measured (`convext.tuning`). Cached; raises RuntimeError with every reason where nobody serves."""
    key = pass_, problem, alone, kind
    choice = _choices.get(key)
    if choice is None:
        if _forced is None and not _is_empty(problem):
            if alone:
                tuned.see(pass_, problem, kind, torch.device(problem.device) if device is None else device)
            else:
                tuned.settle(pass_, problem, kind)
        with _lock:
            choice = _select(*key)
            if len(_choices) >= CACHE_LIMIT:
                _choices.clear()
                CALL_CACHE.clear()
            _choices[key] = choice
    return choice


def would_serve(pass_: Pass, problem: ConvProblem, kind: str = "") -> Choice:
    """Who served, or would serve now: for reports. Nothing is measured or kept; else as `select`."""
    choice = _choices.get((pass_, problem, True, kind))
    return _select(pass_, problem, True, kind) if choice is None else choice


def _first(device_type: str, why_not: Callable[[Backend], str | None], what: str) -> tuple[Backend, dict[str, str]]:
    """The first backend in order of preference that is on and has no reason against it, and the reasons of those before
    it. Raises RuntimeError with all of them where there is none."""
    reasons: dict[str, str] = {}
    for name in row(device_type) if _forced is None else (_forced,):
        reason = unavailable(name, device_type)
        if reason is None:
            candidate = get(name, device_type)
            reason = why_not(candidate)
            if reason is None:
                return candidate, reasons
        reasons[name] = reason
    lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    setting = f" (convext.backend({_forced!r}) is set)" if _forced else ""
    raise RuntimeError(f"no backend serves {what}{setting}:{lines}")


def _is_empty(problem: ConvProblem) -> bool:
    return 0 in problem.x_shape or 0 in problem.w_shape or 0 in problem.y_shape


def _select(pass_: Pass, problem: ConvProblem, alone: bool, kind: str) -> Choice:
    if _is_empty(problem):  # nothing to compute, so no kernel to choose, whatever the setting
        return Choice(get("aten", problem.device), {"native": "nothing to compute: an extent is 0"}, pass_, problem)

    measured = _measured(pass_, problem, kind) if alone and _forced is None else None
    fastest = None if measured is None else measured.backend

    def why_not(candidate: Backend) -> str | None:
        reason = candidate.reject(pass_, problem)
        if reason is None and alone and _forced is None:
            if fastest is None:
                reason = candidate.slower(pass_, problem)
            elif candidate.name != fastest:
                reason = f"{fastest} was measured to be faster"
        return reason

    what = f"{pass_.name.lower()} of {problem}"
    return Choice(*_first(problem.device, why_not, what), pass_, problem, kind, measured)


def _measured(pass_: Pass, problem: ConvProblem, kind: str) -> Candidate | None:
    """What was measured to be the fastest and can still serve, or None."""
    choice = tuned.lookup(pass_, problem, kind)
    if choice is None or choice.backend not in row(problem.device) or unavailable(choice.backend, problem.device):
        return None
    backend = get(choice.backend, problem.device)
    if backend.reject(pass_, problem) is not None:
        return None
    able = backend.candidates(pass_, problem, kind)
    return next((candidate for candidate in able if candidate.variant == choice.variant), None)


def select_batch_norm(y: torch.Tensor) -> Backend:
    """The backend of batch_stats, bn_act and bn_act_backward for tensors like y."""
    if y.numel() == 0:  # nothing to compute, as in _select
        return get("aten", y.device.type)
    key = (y.dtype, y.device.type, y.dim())
    found = _batch_norm.get(key)
    if found is None or found.reject_batch_norm(y) is not None:
        what = f"batch norm of {tuple(y.shape)}, {y.dtype}, {y.device.type}"
        found, _ = _first(y.device.type, lambda candidate: candidate.reject_batch_norm(y), what)
        _batch_norm[key] = found
    return found


def counter(backend_name: str, pass_name: str, variant: str) -> list[int]:
    """The counter of one (backend, pass, variant): add to its only element."""
    return _counters.setdefault((backend_name, pass_name, variant), [0])


def counts() -> dict[tuple[str, str, str], int]:
    """Calls so far by (backend, pass, variant); those that never ran are left out."""
    compiled_calls.count()
    return {key: count[0] for key, count in _counters.items() if count[0]}


def reset_counts() -> None:
    """Sets every call counter to 0."""
    compiled_calls.count()
    for count in _counters.values():
        count[0] = 0


class _CallableModule(types.ModuleType):
    def __call__(self) -> list[BackendStatus]:
        return backends()


sys.modules[__name__].__class__ = _CallableModule
