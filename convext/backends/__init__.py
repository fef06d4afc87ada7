"""Backends: who can run a pass over a problem, and the selection of one.

A backend is one object, `BACKEND` in its module, with these members:

    name                                  "native", "triton" or "aten"
    unavailable(device_type) -> str|None  why it is off on this machine and what to do about it
    reject(pass_, problem) -> str|None    why it cannot serve a problem, in words
    variant(pass_, problem) -> str        name of the kernel that would run
    fprop(problem, x, w, epilogue) -> y
    dgrad(problem, dy, w) -> dx
    wgrad(problem, dy, x, channels_last=False) -> dw        in that format, as `memory_format.laid_out` has it
    batch_stats(y) -> mean, var           biased, in the accumulate dtype
    bn_act(y, mean, var, gamma, beta, residual, eps, activation) -> out
    bn_act_backward(dout, y, mean, var, gamma, beta, residual, eps, activation, training)
        -> dy, dgamma, dbeta, dresidual   the last of size 0 where there is no residual

and, where it has something to say, these:

    prepared_fprop(problem, activation) -> call
        as `Choice.prepared_fprop`, with everything looked up beforehand that does not depend on the tensors
    takes_float_weights(problem) -> bool
        whether that call takes float32 weights for a problem in half precision
    prepared_sequence(blocks) -> native_sequence.Prepared|None
        fprops in a row as one call: swap/lower/program.py
    slower(pass_, problem) -> str|None    what was measured to be faster; only an automatic choice listens
    reject_batch_norm(y) -> str|None      why it cannot run the last three on tensors like y
    depthwise_backward(problem, dy, x, w, channels_last=False) -> dx, dw
        both gradients of a depthwise problem in one pass, dw in that format
    fprop_batch_stats(problem, x, w, bias) -> y, mean, var | None
        fprop and batch_stats(y) without reading y again, where a kernel does that

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

from ..problem import ConvProblem, Epilogue, Pass

# Order of preference by device type. On the CPU, Triton is there to be asked for by name only: ATen takes everything.
PRIORITY = {"cpu": ("native", "aten", "triton"), "cuda": ("native", "triton", "aten")}
ELSEWHERE = ("triton", "aten")
NAMES = ("native", "triton", "aten")


class BackendStatus(NamedTuple):
    """One line of `convext.backends()`."""

    name: str
    device: str
    available: bool
    reason: str | None  # why it is off, and what to do about it

    def __str__(self) -> str:
        return f"{self.name} on {self.device}: " + ("available" if self.available else f"off, {self.reason}")


class Choice:
    """What serves a pass over a problem: the backend, the name of its kernel, and why the ones before it were passed
    over. `counter` is a list of one number, the calls of that (backend, pass, variant)."""

    __slots__ = ("backend", "pass_", "problem", "variant", "passed_over", "counter", "run")

    def __init__(self, backend: Any, pass_: Pass, problem: ConvProblem, passed_over: dict[str, str]):
        self.backend = backend
        self.pass_ = pass_
        self.problem = problem
        self.variant = backend.variant(pass_, problem)
        self.passed_over = passed_over
        self.counter = counter(backend.name, pass_.name.lower(), self.variant)
        self.run = getattr(backend, pass_.name.lower())

    def prepared_fprop(self, activation: str, rounds_weights: bool = False) -> Callable[..., torch.Tensor]:
        """call(x, w, bias, mean, var, gamma, beta, residual, eps) -> y of this problem, for who calls it again and
        again. It checks nothing, and must not be kept beyond the present `epoch`. `rounds_weights`: w and bias may be
        float32 where the problem is in half precision."""
        if rounds_weights and not (hasattr(self.backend, "takes_float_weights")
                                   and self.backend.takes_float_weights(self.problem)):
            call = self.prepared_fprop(activation)
            return lambda x, w, bias, *others: call(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype),
                                                    *others)
        if hasattr(self.backend, "prepared_fprop"):
            return self.backend.prepared_fprop(self.problem, activation)
        run, problem = self.run, self.problem
        return lambda x, w, bias, mean, var, gamma, beta, residual, eps: run(
            problem, x, w, Epilogue(bias, mean, var, gamma, beta, residual, eps, activation))

    def __repr__(self) -> str:
        return f"<{self.pass_.name.lower()} of {self.problem}: {self.backend.name}, {self.variant}>"


class _Absent:
    """Stands for a backend whose module does not load."""

    def __init__(self, name: str, error: Exception):
        self.name = name
        self._error = error

    def unavailable(self, device_type: str) -> str:
        return (f"convext.backends.{self.name} does not load here ({type(self._error).__name__}: {self._error}): "
                "install what it names, or reinstall convext from source")


_lock = threading.RLock()
_loaded: dict[str, Any] = {}
_unavailable: dict[tuple[str, str], str | None] = {}
_choices: dict[tuple[Pass, ConvProblem, bool], Choice] = {}
_batch_norm: dict[tuple[torch.dtype, str, int], str] = {}
_counters: dict[tuple[str, str, str], list[int]] = {}
_forced: str | None = None

# Choices by the properties of the tensors of a call, for the direct path of ops.py. Holds what `select` answers, so it
# goes whenever `_choices` goes.
CALL_CACHE: dict[tuple[Any, ...], Choice] = {}
epoch = object()  # another one whenever kept choices cease to hold
CACHE_LIMIT = 4096  # a service with ever new shapes must not grow without bound


def get(name: str) -> Any:
    """The backend of that name, loaded on first use."""
    backend = _loaded.get(name)
    if backend is None:
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
        try:
            backend = importlib.import_module(f"{__name__}.{name}").BACKEND
        except Exception as error:  # whatever its toolchain raises: one backend's trouble must not stop the others
            backend = _Absent(name, error)
        _loaded[name] = backend
    return backend


def unavailable(name: str, device_type: str) -> str | None:
    """Why a backend is off for a type of device and what to do about it, or None where it is on."""
    key = name, device_type
    if key not in _unavailable:
        if name not in PRIORITY.get(device_type, ELSEWHERE):
            _unavailable[key] = f"has no kernels for {device_type}; nothing to do, another backend serves it"
        else:
            _unavailable[key] = get(name).unavailable(device_type)
    return _unavailable[key]


def backends() -> list[BackendStatus]:
    """Every backend on every type of device this torch knows here: name, device, available, and the reason if not."""
    devices = list(PRIORITY)
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is not None and here.type not in devices:
        devices.append(here.type)
    status = []
    for device in devices:
        for name in PRIORITY.get(device, ELSEWHERE):
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
            raise ValueError(f"backend: unknown name {name!r}, expected one of "
                             f"{', '.join(map(repr, NAMES))}, or None for the automatic choice")
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


def select(pass_: Pass, problem: ConvProblem, alone: bool = True) -> Choice:
    """Who serves a pass over a problem. `alone` False: as a part of a larger call, where a backend that could is not
    passed over because another's call is faster. Cached; raises RuntimeError with every reason where nobody does."""
    key = pass_, problem, alone
    choice = _choices.get(key)
    if choice is None:
        with _lock:
            choice = _select(*key)
            if len(_choices) >= CACHE_LIMIT:
                _choices.clear()
                CALL_CACHE.clear()
            _choices[key] = choice
    return choice


def _candidates(device_type: str) -> tuple[str, ...]:
    return PRIORITY.get(device_type, ELSEWHERE) if _forced is None else (_forced,)


def _is_empty(problem: ConvProblem) -> bool:
    return 0 in problem.x_shape or 0 in problem.w_shape or 0 in problem.y_shape


def _select(pass_: Pass, problem: ConvProblem, alone: bool) -> Choice:
    if _is_empty(problem):  # nothing to compute, so no kernel to choose, whatever the setting
        return Choice(get("aten"), pass_, problem, {"native": "nothing to compute: an extent is 0"})
    reasons: dict[str, str] = {}
    for name in _candidates(problem.device):
        reason = unavailable(name, problem.device)
        if reason is None:
            candidate = get(name)
            reason = candidate.reject(pass_, problem)
            if reason is None and alone and _forced is None and hasattr(candidate, "slower"):
                reason = candidate.slower(pass_, problem)
        if reason is None:
            return Choice(candidate, pass_, problem, reasons)
        reasons[name] = reason
    raise RuntimeError(_nobody(f"{pass_.name.lower()} of {problem}", reasons))


def _nobody(what: str, reasons: dict[str, str]) -> str:
    lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    setting = f" (convext.backend({_forced!r}) is set)" if _forced else ""
    return f"no backend serves {what}{setting}:{lines}"


def select_batch_norm(y: torch.Tensor) -> Any:
    """The backend of batch_stats, bn_act and bn_act_backward for tensors like y."""
    if y.numel() == 0:  # nothing to compute, as in _select
        return get("aten")
    key = (y.dtype, y.device.type, y.dim())
    name = _batch_norm.get(key)
    if name is not None:
        candidate = get(name)
        if not hasattr(candidate, "reject_batch_norm") or candidate.reject_batch_norm(y) is None:
            return candidate
    reasons: dict[str, str] = {}
    for name in _candidates(y.device.type):
        reason = unavailable(name, y.device.type)
        if reason is None:
            candidate = get(name)
            if hasattr(candidate, "reject_batch_norm"):
                reason = candidate.reject_batch_norm(y)
        if reason is None:
            _batch_norm[key] = name
            return candidate
        reasons[name] = reason
    raise RuntimeError(_nobody(f"batch norm of {tuple(y.shape)}, {y.dtype}, {y.device.type}", reasons))


def counter(backend_name: str, pass_name: str, variant: str) -> list[int]:
    """The counter of one (backend, pass, variant): add to its only element."""
    return _counters.setdefault((backend_name, pass_name, variant), [0])


def counts() -> dict[tuple[str, str, str], int]:
    """Calls so far by (backend, pass, variant); those that never ran are left out."""
    return {key: count[0] for key, count in _counters.items() if count[0]}


def reset_counts() -> None:
    """Sets every call counter to 0."""
    for count in _counters.values():
        count[0] = 0


class _CallableModule(types.ModuleType):
    def __call__(self) -> list[BackendStatus]:
        return backends()


sys.modules[__name__].__class__ = _CallableModule
