"""The native backend of CUDA tensors: the hand-written kernels of ``convext/_CUDA``.

The library knows no torch: it gets addresses, the device and the stream. This file owns what has to do with memory: it
brings tensors into the order a kernel reads, allocates results and scratch memory from torch's caching allocator (so
that calls can be captured in a CUDA graph), and passes the current stream of the tensors' device.

Which kernel serves a problem is decided in C++ (``core`` and ``cuda`` in ``csrc/``). Tensors that arrive in NCHW are
either read as they are or transposed first, whatever the model of the costs says is cheaper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..memory_format import laid_out
from ..problem import (
    ACTIVATIONS,
    STATISTICS,
    ConvProblem,
    DType,
    Epilogue,
    Layout,
    Pass,
    accumulate_dtype,
    tf32_is_allowed,
)
from . import bindings, tuned
from .base import NO_VOLUMES, Backend, Candidate

_CUDA: Any = None
try:
    _CUDA = bindings.load("_CUDA")
except ImportError as error:  # not built, or built for another Python
    _import_error = error

_FORMATS = {Layout.NCHW: torch.contiguous_format, Layout.NHWC: torch.channels_last}
_ALIGNMENT = 16  # bytes: the kernels' widest access


class _Plan(NamedTuple):
    """What a launch needs beyond its tensors, decided once for a pass and problem."""

    name: str
    fields: list[int]
    prepared: Any  # the kernel and the problem, as launches take them
    x_layout: Layout  # as the kernel reads and writes them
    y_layout: Layout
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    accumulate: torch.dtype
    krsc: bool  # weights lie in channels-last order
    workspace: int  # bytes
    facts: dict[str, Any]  # what the kernel says about itself
    writes_dx: bool  # the wgrad kernel can write dx in the same pass
    stats_rows: int  # of partial batch statistics that the fprop kernel can write


def _fields(problem: ConvProblem, x_layout: Layout, y_layout: Layout) -> list[int]:
    return [
        *problem.image_extents(),
        int(problem.dtype),
        int(x_layout),
        int(y_layout),
        *problem.depth_extents(),
    ]


# Kernels that are worth measuring beside the one that the cost model takes. The costs are of an order of magnitude
# alone (csrc/cuda/cost.h).
_MOST_CANDIDATES, _WITHIN_REACH = 4, 4.0


@functools.lru_cache(maxsize=4096)
def _plan_for(pass_: Pass, problem: ConvProblem, tf32: bool, kind: str = "") -> _Plan | None:
    """`kind`: what follows an fprop, which another kernel may have been measured to be best at."""
    ranked, kept = _ranked(pass_, problem, tf32), tuned.lookup(pass_, problem, kind)
    measured = [way for way in ranked if kept is not None and _variants()[way.kernel]["name"] == kept.variant]
    return _plan_of(problem, (measured or ranked)[0]) if ranked else None


class _Way(NamedTuple):
    """A kernel, and the layouts that it reads and writes."""

    cost: float
    kernel: int
    x_layout: Layout
    y_layout: Layout


@functools.cache
def _variants() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _CUDA.variants()
    return found


def _ranked(pass_: Pass, problem: ConvProblem, tf32: bool) -> list[_Way]:
    """The kernels that take a problem and were not put aside, each in its cheapest way, the cheapest first."""
    size, aside = problem.dtype.torch.itemsize, tuned.aside("cuda")
    best: dict[int, _Way] = {}
    for x_layout in {problem.x_layout, Layout.NHWC}:
        for y_layout in {problem.y_layout, Layout.NHWC}:
            copies = (x_layout != problem.x_layout) * _CUDA.copy_cost(problem.x_size * size)
            copies += (y_layout != problem.y_layout) * _CUDA.copy_cost(problem.y_size * size)
            for index, cost in _CUDA.accepted(int(pass_), _fields(problem, x_layout, y_layout), tf32):
                way = _Way(cost + copies, index, x_layout, y_layout)
                if _variants()[index]["name"] not in aside and (index not in best or way.cost < best[index].cost):
                    best[index] = way
    return sorted(best.values(), key=lambda way: way.cost)


def _plan_of(problem: ConvProblem, way: _Way) -> _Plan:
    _, index, x_layout, y_layout = way
    fields = _fields(problem, x_layout, y_layout)
    known = _variants()[index]
    return _Plan(
        known["name"],
        fields,
        _CUDA.Prepared(index, fields),
        x_layout,
        y_layout,
        problem.x_shape,
        problem.y_shape,
        problem.accumulate_dtype,
        _CUDA.weight_order(index, fields) == "krsc",
        _CUDA.workspace(index, fields),
        known,
        known["writes_dx"],
        _CUDA.stats_rows(index, fields),
    )


def _tf32(problem: ConvProblem) -> bool:
    """Whether kernels that round to tf32 may serve the problem: always where it has nothing to round."""
    return problem.dtype is not DType.FLOAT32 or tf32_is_allowed()


def _plan_or_none(pass_: Pass, problem: ConvProblem, kind: str = "") -> _Plan | None:
    return _plan_for(pass_, problem, _tf32(problem), kind)


def _plan(pass_: Pass, problem: ConvProblem, kind: str = "") -> _Plan:
    """Of a problem that is not rejected."""
    plan = _plan_or_none(pass_, problem, kind)
    assert plan is not None
    return plan


def forget_plans() -> None:
    """Drops cached selections; call after a setting that selection depends on has changed."""
    _plan_for.cache_clear()
    _variants.cache_clear()


def _dense(t: torch.Tensor, layout: Layout) -> torch.Tensor:
    """t in the layout, without gaps, and aligned as the kernels need it."""
    memory_format = _FORMATS[layout]
    if not t.is_contiguous(memory_format=memory_format):
        t = t.contiguous(memory_format=memory_format)
    return t if t.data_ptr() % _ALIGNMENT == 0 else t.clone(memory_format=memory_format)


def _weights(w: torch.Tensor, plan: _Plan) -> torch.Tensor:
    return _dense(w, Layout.NHWC if plan.krsc else Layout.NCHW)


def _empty(like: torch.Tensor, shape: tuple[int, ...], layout: Layout) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_FORMATS[layout])


def _in_format(t: torch.Tensor, wanted: Layout, written: Layout) -> torch.Tensor:
    """What a kernel wrote, in the layout that the call is to return."""
    return t if wanted is written else t.contiguous(memory_format=_FORMATS[wanted])


def _scratch(like: torch.Tensor, size: int) -> torch.Tensor | None:
    return torch.empty(size, dtype=torch.uint8, device=like.device) if size else None


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _where(t: torch.Tensor) -> tuple[int, int]:
    """Index of the tensor's device, and that device's current stream."""
    index = t.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _launch(
    plan: _Plan,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "identity",
    w: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
) -> None:
    workspace = _scratch(out, plan.workspace)
    _CUDA.launch(
        plan.prepared,
        *_where(out),
        a.data_ptr(),
        b.data_ptr(),
        out.data_ptr(),
        _address(workspace),
        0,
        _address(shift),
        _address(residual),
        ACTIVATIONS[activation],
        _address(w),
        _address(dx),
        _address(stats),
    )


def _channels(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A per-channel tensor as the kernels read it."""
    if t is None or t.dtype is dtype and t.is_contiguous():
        return t
    return t.to(dtype).contiguous()


def _number(dtype: torch.dtype) -> int:
    """The dtype as C++ numbers it."""
    return int(DType[str(dtype).removeprefix("torch.").upper()])


def not_built() -> str | None:
    """Why the library is not there and what to do about it, or None. Selection needs the library, but no GPU."""
    if _CUDA is not None:
        return None
    if isinstance(_import_error, bindings.LockIsOff):
        return f"{_import_error}; leave that out"
    remedy = (
        "build convext from source with nvcc on the PATH, of the same major version as torch's CUDA, and "
        "CONVEXT_BUILD_CUDA not 0"
    )
    if isinstance(_import_error, ModuleNotFoundError):
        return f"the CUDA library, convext/_CUDA, was not built: {remedy}"
    return f"convext/_CUDA did not load ({_import_error}): {remedy}"


def in_words(reasons: list[tuple[str, str]]) -> str:
    """(kernel, reason) pairs as one line: each reason once, with its kernels. Those of other dtypes are left out."""
    kernels: dict[str, list[str]] = {}
    for name, reason in reasons:
        kernels.setdefault(reason, []).append(name)
    if kernels.pop("it computes in another dtype", None) and not kernels:
        return "no kernel is compiled for its dtype"
    said = [f"{reason} ({', '.join(names)})" for reason, names in kernels.items()]
    return "; ".join(said) or "no kernel is compiled for it"


def beyond_all_kernels(problem: ConvProblem) -> str | None:
    """Why no compiled kernel, here or on the CPU, takes a problem of such extents, in words, or None."""
    if min(problem.c, problem.k, problem.taps) == 0:
        return "it has no channels or no filter taps"
    return "an extent exceeds 32 bits" if max(problem.extents()) >= 2**31 else None


def _run_fprop(plan: _Plan, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    bias, mean, var, gamma, beta, residual, eps, activation = epilogue
    y = _empty(x, plan.y_shape, plan.y_layout)
    x, w, bias = _dense(x, plan.x_layout), _weights(w, plan), _channels(bias, plan.accumulate)
    if residual is not None:
        residual = _dense(residual, plan.y_layout)
    if mean is None:
        _launch(plan, x, w, y, bias, residual, activation)
    else:
        # Neither scale and shift nor weights in another order are kept from call to call: that the tensors behind them
        # are as they were, no version counter can prove (it does not see what is written through `.data`), and to read
        # them would take as long as to compute again.
        norm = [_channels(t, plan.accumulate) for t in (mean, var, gamma, beta)]
        folded = torch.empty(2 * problem.k, dtype=plan.accumulate, device=x.device)
        workspace = _scratch(y, plan.workspace)
        _CUDA.launch_folded(
            plan.prepared,
            *_where(y),
            x.data_ptr(),
            w.data_ptr(),
            y.data_ptr(),
            _address(workspace),
            folded.data_ptr(),
            [_address(t) for t in norm],
            eps,
            _address(bias),
            _address(residual),
            ACTIVATIONS[activation],
        )
    return _in_format(y, problem.y_layout, plan.y_layout)


def _run_fprop_batch_stats(
    plan: _Plan, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With a plan that writes statistics."""
    y = _empty(x, plan.y_shape, plan.y_layout)
    acc = plan.accumulate
    stats = torch.empty(plan.stats_rows * (2 * problem.k + 1), dtype=acc, device=x.device)
    mean, var = (torch.empty(problem.k, dtype=acc, device=x.device) for _ in range(2))
    _launch(plan, _dense(x, plan.x_layout), _weights(w, plan), y, _channels(bias, acc), stats=stats)
    _CUDA.merge_stats(
        problem.k, plan.stats_rows, _number(acc), *_where(y), _address(stats), _address(mean), _address(var)
    )
    return _in_format(y, problem.y_layout, plan.y_layout), mean, var


def _run_dgrad(plan: _Plan, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    dx = _empty(dy, plan.x_shape, plan.x_layout)
    _launch(plan, _dense(dy, plan.y_layout), _weights(w, plan), dx)
    return _in_format(dx, problem.x_layout, plan.x_layout)


def _run_wgrad(
    plan: _Plan, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
) -> torch.Tensor:
    dw = _empty_dw(problem, plan, x, channels_last)
    _launch(plan, _dense(dy, plan.y_layout), _dense(x, plan.x_layout), dw)
    return laid_out(dw, channels_last)


_RUN: dict[Pass, Callable[..., torch.Tensor]] = {
    Pass.FPROP: _run_fprop,
    Pass.DGRAD: _run_dgrad,
    Pass.WGRAD: _run_wgrad,
}


def _empty_dw(problem: ConvProblem, plan: _Plan, x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Memory for dw in the order that the kernel writes, with the strides asked for where both mean the same order."""
    either = problem.is_pointwise or problem.c_per_group == 1
    return _empty(x, problem.w_shape, Layout(channels_last if either else plan.krsc))


def _norm_layout(y: torch.Tensor) -> Layout:
    channels_last = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    return Layout.NHWC if channels_last else Layout.NCHW


def _norm_shape(y: torch.Tensor, layout: Layout) -> list[int]:
    return [*y.shape, _number(y.dtype), int(layout)]


def _norm_parameters(y: torch.Tensor, epilogue: Epilogue) -> tuple[list[torch.Tensor | None], list[int]]:
    tensors = [_channels(t, accumulate_dtype(y.dtype)) for t in epilogue.norm]
    return tensors, [_address(t) for t in tensors]


class NativeCuda(Backend):
    name = "native"

    def unavailable(self, device_type: str) -> str | None:
        reason = not_built()
        if reason is not None:
            return reason
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"the kernels need compute capability 8.0, the device has {major}.{minor}"
        return None

    def reject(self, pass_: Pass, problem: ConvProblem) -> str | None:
        why = NO_VOLUMES if problem.axes == 3 else beyond_all_kernels(problem)
        if why is None and _plan_or_none(pass_, problem) is None:
            reasons = _CUDA.reject_reasons(int(pass_), _fields(problem, Layout.NHWC, Layout.NHWC), _tf32(problem))
            why = in_words(reasons + tuned.why_aside("cuda"))
        return why

    def variant(self, pass_: Pass, problem: ConvProblem) -> str:
        return _plan(pass_, problem).name

    def served(self, pass_: Pass, problem: ConvProblem, kind: str) -> tuple[str, Callable[..., torch.Tensor]]:
        plan = _plan(pass_, problem, kind)
        if problem.dtype is DType.FLOAT32:  # whether tf32 is allowed is asked at every call
            return plan.name, functools.partial(self._run_by_setting, pass_, kind)
        return plan.name, functools.partial(_RUN[pass_], plan)

    def _run_by_setting(self, pass_: Pass, kind: str, problem: ConvProblem, *arguments: Any) -> torch.Tensor:
        return _RUN[pass_](_plan(pass_, problem, kind), problem, *arguments)

    def candidates(self, pass_: Pass, problem: ConvProblem, kind: str = "") -> list[Candidate]:
        ranked = _ranked(pass_, problem, _tf32(problem))
        found = []
        for way in ranked[:_MOST_CANDIDATES]:
            if way.cost <= _WITHIN_REACH * ranked[0].cost:
                plan = _plan_of(problem, way)
                run = functools.partial(self._run_allowed, plan, pass_, kind)
                statistics = functools.partial(_run_fprop_batch_stats, plan) if plan.stats_rows else None
                found.append(Candidate(self.name, plan.name, way.cost, run, statistics))
        return found

    def _run_allowed(self, plan: _Plan, pass_: Pass, kind: str, problem: ConvProblem, *arguments: Any) -> torch.Tensor:
        """A plan's kernel, or where it rounds to tf32 and that is allowed no more, one that does not."""
        if plan.facts["arithmetic"] == "tf32" and not _tf32(problem):
            return self._run_by_setting(pass_, kind, problem, *arguments)
        return _RUN[pass_](plan, problem, *arguments)

    def fprop(self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        return _run_fprop(_plan(Pass.FPROP, problem), problem, x, w, epilogue)

    def fprop_batch_stats(
        self,
        problem: ConvProblem,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        before: Epilogue | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The statistics come out of the kernel's registers."""
        plan = _plan(Pass.FPROP, problem, STATISTICS)
        return _run_fprop_batch_stats(plan, problem, x, w, bias) if plan.stats_rows and before is None else None

    def dgrad(self, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _run_dgrad(_plan(Pass.DGRAD, problem), problem, dy, w)

    def wgrad(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
    ) -> torch.Tensor:
        return _run_wgrad(_plan(Pass.WGRAD, problem), problem, dy, x, channels_last)

    def depthwise_backward(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, channels_last: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = _plan(Pass.WGRAD, problem)
        if not plan.writes_dx:
            return super().depthwise_backward(problem, dy, x, w, channels_last)
        dx = _empty(x, plan.x_shape, plan.x_layout)
        dw = _empty_dw(problem, plan, x, channels_last)
        _launch(plan, _dense(dy, plan.y_layout), _dense(x, plan.x_layout), dw, w=_weights(w, plan), dx=dx)
        return _in_format(dx, problem.x_layout, plan.x_layout), laid_out(dw, channels_last)

    def batch_stats(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = _norm_layout(y)
        y = _dense(y, layout)
        shape = _norm_shape(y, layout)
        mean, var = (torch.empty(y.shape[1], dtype=accumulate_dtype(y.dtype), device=y.device) for _ in range(2))
        workspace = _scratch(y, _CUDA.norm_workspace(shape))
        _CUDA.batch_stats(shape, *_where(y), _address(y), _address(mean), _address(var), _address(workspace))
        return mean, var

    def bn_act(self, y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        layout = _norm_layout(y)
        y = _dense(y, layout)
        residual = None if epilogue.residual is None else _dense(epilogue.residual, layout)
        out = _empty(y, tuple(y.shape), layout)
        kept, parameters = _norm_parameters(y, epilogue)
        _CUDA.bn_act(
            _norm_shape(y, layout),
            *_where(y),
            parameters,
            epilogue.eps,
            ACTIVATIONS[epilogue.activation],
            _address(y),
            _address(residual),
            _address(out),
        )
        return out

    def bn_act_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        layout = _norm_layout(y)
        y, dout = _dense(y, layout), _dense(dout, layout)
        residual = None if epilogue.residual is None else _dense(epilogue.residual, layout)
        shape = _norm_shape(y, layout)
        dy = _empty(y, tuple(y.shape), layout)
        dresidual = y.new_empty(0) if residual is None else _empty(y, tuple(y.shape), layout)
        dgamma, dbeta = (torch.empty(y.shape[1], dtype=accumulate_dtype(y.dtype), device=y.device) for _ in range(2))
        kept, parameters = _norm_parameters(y, epilogue)
        workspace = _scratch(y, _CUDA.norm_workspace(shape))
        _CUDA.bn_act_backward(
            shape,
            *_where(y),
            parameters,
            epilogue.eps,
            ACTIVATIONS[epilogue.activation],
            training,
            _address(dout),
            _address(y),
            _address(residual),
            _address(dy),
            _address(dgamma),
            _address(dbeta),
            _address(dresidual) if residual is not None else 0,
            _address(workspace),
        )
        return dy, dgamma, dbeta, dresidual

    def reject_batch_norm(self, y: torch.Tensor) -> str | None:
        if y.dim() != 4:
            return f"y has {y.dim()} dimensions, not 4"
        if y.numel() == 0:
            return "there is nothing to normalise"
        if y.numel() // y.shape[1] >= 2**31:
            return "there are more than 2^31 pixels"
        return None


BACKEND = NativeCuda()
