"""The native backend of CPU tensors: the hand-written kernels of ``convext/_C`` (C++ with AVX-512, AVX2 and portable
forms, picked at run time). native_cuda.py is that of CUDA tensors.

Which kernel serves a problem is decided in C++ (``csrc/core/select.cpp``); this file turns tensors and problems into
calls, and keeps packed weights between calls.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..memory_format import memory_format, suggests_channels_last
from ..problem import ACTIVATIONS, STATISTICS, ConvProblem, DType, Epilogue, Pass
from . import bindings, compiled_calls, costs, native_cuda, native_sequence, tuned
from .base import Backend, Candidate

_C: Any = None
try:
    _C = bindings.load("_C")
except ImportError as error:  # not built, or built for another Python
    _import_error = error


def _use_storage() -> str | None:
    """Lets results lie in the pool of dropped results, or says why they cannot: the library that makes their storage
    resizable holds for the release of torch that it was built with (csrc/storage/storage.cpp)."""
    built, running = _C.build_info()["torch"].split("+")[0], torch.__version__.split("+")[0]
    if built != running:
        return f"convext was built with torch {built} and runs with {running}"
    try:
        function = ctypes.CDLL(str(Path(__file__).parents[1] / "libconvext_storage.so")).convext_make_resizable
    except (OSError, AttributeError) as error:
        return f"convext/libconvext_storage.so did not load ({error})"
    _C.use_storage(ctypes.cast(function, ctypes.c_void_p).value)
    return None


# Why results come from torch's allocator and not from the pool, or None where they come from the pool.
why_no_output_pool = "the compiled library did not load" if _C is None else _use_storage()

_NHWC = 1
_CPU = 0


class _Plan(NamedTuple):
    """What a call needs beyond its tensors, decided once for a pass and problem."""

    variant: int
    name: str
    geom: list[int]
    pack_format: str | None
    input_size: list[int]
    kernel_size: list[int]


@functools.cache
def kernels() -> list[dict[str, Any]]:
    """What every CPU kernel says about itself, in the order of their indices."""
    return _C.variants()


@functools.cache
def _has_bf16_dot() -> bool:
    return _C.cpu_features().get("avx512bf16", False)


def _fields(problem: ConvProblem) -> tuple[int, ...]:
    """The problem as C++ takes it. The layouts are those the kernels see, not those the tensors arrive in."""
    return (*problem.image_extents(), int(problem.dtype), _NHWC, _NHWC, *problem.depth_extents())


def _arriving(problem: ConvProblem) -> tuple[int, ...]:
    """The same with the layouts that the tensors arrive in, for what follows from what a call costs."""
    layouts = int(problem.x_layout), int(problem.y_layout)
    return (*problem.image_extents(), int(problem.dtype), *layouts, *problem.depth_extents())


@functools.lru_cache(maxsize=4096)
def _plan(pass_: Pass, problem: ConvProblem, kind: str = "") -> _Plan | None:
    """`kind`: what follows an fprop (`Epilogue.kind`), which another kernel may have been measured to be best at."""
    choice = tuned.lookup(pass_, problem, kind)
    if choice is None and not tuned.aside("cpu"):
        costs.table()  # the library has it then
        index = _C.select(_CPU, int(pass_), _arriving(problem))
        if index < 0:
            return None
        if pass_ is not Pass.FPROP or _joins(index, problem):
            return _plan_of(pass_, problem, index)
    found = _usable(pass_, problem)
    if not found:
        return None
    measured = [index for index, _ in found if choice is not None and kernels()[index]["name"] == choice.variant]
    return _plan_of(pass_, problem, measured[0] if measured else _first(pass_, problem, found))


def _joins(index: int, problem: ConvProblem) -> bool:
    """Whether a kernel can be a step of a sequence (`prepared_sequence`), where the problem can."""
    kernel = kernels()[index]
    reads = problem.x_layout == _NHWC or problem.y_layout != _NHWC or kernel["reads_nchw"]
    return bool(reads and kernel["dtype"] == problem.dtype)


def _first(pass_: Pass, problem: ConvProblem, found: list[tuple[int, float]]) -> int:
    """The fastest of `found` (`_usable`), or one that can be a step of a sequence, where the other is faster by less
    than a call costs at least, which a step does without."""
    (best, least), *others = found
    if pass_ is not Pass.FPROP or _joins(best, problem):
        return best
    most = least + costs.table().limits["call_saving"]
    return next((index for index, seconds in others if seconds <= most and _joins(index, problem)), best)


def ranked(pass_: Pass, problem: ConvProblem) -> list[tuple[int, float]]:
    """(index, expected seconds) of the kernels that take a problem, the fastest first."""
    costs.table()  # the library has it then
    taken: list[tuple[int, float]] = _C.accepted(_CPU, int(pass_), _arriving(problem))
    return sorted(taken, key=lambda found: found[1])


def _usable(pass_: Pass, problem: ConvProblem) -> list[tuple[int, float]]:
    """Those of them that were not put aside."""
    aside = tuned.aside("cpu")
    return [found for found in ranked(pass_, problem) if kernels()[found[0]]["name"] not in aside]


def _plan_of(pass_: Pass, problem: ConvProblem, index: int) -> _Plan:
    p, fields = problem, _fields(problem)
    geom = [p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dil_h, p.dil_w, p.groups]
    if p.axes == 3:
        geom += [p.stride_d, p.pad_d, p.dil_d]
    packs = pass_ is not Pass.WGRAD
    pack_format = _C.pack_format(index, fields) if packs else None
    return _Plan(index, kernels()[index]["name"], geom, pack_format, [*p.x_shape[2:]], [*p.w_shape[2:]])


def bare_calls(
    pass_: Pass, problem: ConvProblem, a: torch.Tensor, b: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call of each kernel that takes the pass on these operands, with as little around it as can be: for
    timing. fprop has its weights packed before, dgrad packs them at every call, as training does."""
    ops, names = torch.ops.convext_cpu, kernels()

    def call_of(index: int) -> Callable[[], torch.Tensor]:
        plan = _plan_of(pass_, problem, index)
        geom, nhwc = plan.geom, problem.y_layout == _NHWC
        if pass_ is Pass.WGRAD:
            return functools.partial(ops.wgrad.default._op, index, a, b, plan.kernel_size, geom, False)
        if pass_ is Pass.DGRAD:
            nhwc = problem.x_layout == _NHWC
            return functools.partial(ops.dgrad.default._op, index, a, b, 0, 0, plan.input_size, geom, nhwc)
        packed, version, none = _packed_weight(b, plan), _version(b), ACTIVATIONS[Epilogue().activation]
        return lambda: ops.fprop.default._op(
            index, a, b, packed.number, version, None, None, None, None, None, None, geom, 0.0, none, nhwc
        )

    return {names[index]["name"]: call_of(index) for index, _ in ranked(pass_, problem)}


def work(index: int, problem: ConvProblem) -> list[float]:
    """What a launch of a kernel does, a count for each of `costs.native_terms()`."""
    counts: list[float] = _C.work(index, _arriving(problem))
    return counts


def _rejects_block(block: native_sequence.Block) -> bool:
    return (
        _C.reject_block(
            [_fields(step.problem) for step in block.steps], [step.excite is not None for step in block.steps]
        )
        is not None
    )


def forget_plans() -> None:
    """Drops cached selections; call after a setting that selection depends on has changed."""
    forget_measured()
    compiled_calls.forget()
    _has_bf16_dot.cache_clear()


def forget_measured() -> None:
    """Drops what was cached of selections; call after a choice was kept of a problem that nothing ran of. All that ran
    stays what it was, and so do the calls that compiled_calls keeps."""
    _plan.cache_clear()
    native_cuda.forget_plans()


# Packed weights by the storage of the weight: id -> (weak reference to the storage, {TensorImpl's address:
# _PackedWeight}). The C++ side keeps the packings of each and packs anew where the weights have changed
# (packed_weight.h); what belongs to a storage goes with it. The weak reference is to the storage, because torch
# refuses to exchange or convert tensors with weak references (torch.utils.swap_tensors), and because what was packed
# belongs to the memory: another tensor at an address of before lies in another storage.
_packed: dict[int, tuple[weakref.ref[Any], dict[int, _PackedWeight]]] = {}
_storages_gone = [0]  # how many that had packed weights
# Tensors that share a storage: as many may have packed weights, and as many that begin at one address, so that tensors
# that come and go over memory that stays leave no more behind.
_MOST_OF_STORAGE, _MOST_AT_ADDRESS = 1024, 4


class _PackedWeight(NamedTuple):
    """What is kept of one tensor. owner: _C.PackedWeight. address: where the tensor was first seen."""

    number: int
    owner: Any
    address: int


_NOT_KEPT = _PackedWeight(0, None, 0)


def _storage_gone(
    key: int, reference: weakref.ref[Any], packed: dict[int, Any] = _packed, gone: list[int] = _storages_gone
) -> None:
    entry = packed.get(key)
    if entry is None or entry[0] is not reference:
        return
    del packed[key]
    gone[0] += 1
    for kept in entry[1].values():
        kept.owner.forget()  # a sequence may hold it still


def _packed_weight(w: torch.Tensor, plan: _Plan) -> _PackedWeight:
    """Where the packings of w are kept. To be held until the call that uses its number has begun."""
    if plan.pack_format is None:
        return _NOT_KEPT
    if w._is_view():
        # A view is made for one call: its packing goes into scratch memory. A view of all of a tensor, such as filters
        # of height one are of a 1-D convolution's, stands for that tensor: whether a packing is of weights that lie so,
        # of these extents, strides, dtype and version, is asked at every call (packed_weight.h).
        base = w._base
        if base is None or base.numel() != w.numel():
            return _NOT_KEPT
        w = base
    return _number_kept(w)


def _number_kept(w: torch.Tensor) -> _PackedWeight:
    try:
        storage = w.untyped_storage()
    except NotImplementedError:  # a tensor of torch.func whose transform has ended
        return _NOT_KEPT
    key = id(storage)
    entry = _packed.get(key)
    if entry is None or entry[0]() is not storage:
        entry = (weakref.ref(storage, functools.partial(_storage_gone, key)), {})
        _packed[key] = entry
    kept = entry[1].get(w._cdata)
    return _new_packed_weight(w, entry[1]) if kept is None else kept


def _new_packed_weight(w: torch.Tensor, others: dict[int, _PackedWeight]) -> _PackedWeight:
    owner, address = _C.PackedWeight(), w.data_ptr()
    here = [impl for impl, kept in [*others.items()] if kept.address == address]
    if len(here) >= _MOST_AT_ADDRESS:
        others.pop(here[0], None)
    elif len(others) >= _MOST_OF_STORAGE:
        others.pop(next(iter(others)), None)
    return others.setdefault(w._cdata, _PackedWeight(owner.number(), owner, address))


def packed_number(w: torch.Tensor) -> int:
    """The number under which packings of w, which is no view, are kept; 0 for a tensor without memory."""
    return _number_kept(w).number


def launched(pass_: Pass, problem: ConvProblem) -> tuple[int, bool]:
    """(index of the kernel, whether it packs the weights) of a pass that this backend serves."""
    plan = _plan(pass_, problem)
    assert plan is not None
    return plan.variant, plan.pack_format is not None


def direct_calls() -> int:
    """The address of the library's functions of plain data (csrc/cpu/runtime/direct.h)."""
    address: int = _C.direct_calls()
    return address


def forget_packed(t: torch.Tensor) -> None:
    """Whatever is kept of weights in the tensor's memory is packed anew when it is next used."""
    entry = _packed.get(id(t.untyped_storage()))
    for kept in [] if entry is None else [*entry[1].values()]:
        kept.owner.forget()


def packed_bytes() -> int:
    """Bytes of packed weights that are kept."""
    return sum(kept.owner.bytes() for _, all_kept in [*_packed.values()] for kept in [*all_kept.values()])


def _version(w: torch.Tensor | None) -> int:
    return 0 if w is None or w.is_inference() else w._version  # inference tensors keep no version counter


def has_guards() -> bool:
    """Whether the library is built, without which nothing says that a plan still holds."""
    return _C is not None


def new_guards() -> Any:
    """Empty guards (csrc/python/guards.h)."""
    return _C.Guards()


def places(tensors: list[torch.Tensor]) -> Any:
    """Where tensors lie (`native_sequence.places`)."""
    return native_sequence.places(_C, tensors)


def isa() -> str:
    """The instruction set in use; "" without the compiled library."""
    return "" if _C is None else _C.isa()


def accuracy() -> int:
    """The accuracy setting, a position in convext.accuracy's names; 0 without the compiled library."""
    return 0 if _C is None else _C.accuracy()


def set_accuracy(accuracy: int) -> None:
    """Sets it; without the compiled library there are no algorithms to choose among."""
    if _C is not None:
        _C.set_accuracy(accuracy)
        forget_plans()


def output_pool_limit() -> int:
    """Bytes of dropped results that the library may keep; 0 without it."""
    return 0 if _C is None else _C.output_pool_limit()


def set_output_pool_limit(size: int) -> None:
    """Sets it; without the compiled library there is no pool."""
    if _C is not None:
        _C.set_output_pool_limit(size)


def output_pool_kept() -> int:
    """Bytes that the library keeps now."""
    return 0 if _C is None else _C.output_pool_kept()


def _one_axis(t: Any) -> Any:
    """A volume whose planes and rows are one axis, as the library reads it: t itself, or a copy where they are not."""
    if t is None or t.shape[2] == 1 or t.shape[3] == 1 or t.stride(2) == t.shape[3] * t.stride(3):
        return t
    return t.contiguous(memory_format=memory_format(suggests_channels_last(t), 5))


def _fprop(
    plan: _Plan | None, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue
) -> torch.Tensor:
    assert plan is not None
    if problem.axes == 3:
        x, w = _one_axis(x), _one_axis(w)
        epilogue = epilogue._replace(residual=_one_axis(epilogue.residual))
    packed = _packed_weight(w, plan)
    bias, mean, var, gamma, beta, residual, eps, activation = epilogue
    return torch.ops.convext_cpu.fprop.default(
        plan.variant, x, w, packed.number, _version(w), bias, mean, var, gamma, beta, residual, plan.geom, eps,
        ACTIVATIONS[activation], problem.y_layout == _NHWC,
    )  # fmt: skip


def _dgrad(plan: _Plan | None, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    assert plan is not None
    if problem.axes == 3:
        dy, w = _one_axis(dy), _one_axis(w)
    packed = _packed_weight(w, plan)
    return torch.ops.convext_cpu.dgrad.default(
        plan.variant, dy, w, packed.number, _version(w), plan.input_size, plan.geom, problem.x_layout == _NHWC
    )


def _conv_transpose(
    plan: _Plan | None, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    assert plan is not None
    if problem.axes == 3:
        x, w = _one_axis(x), _one_axis(w)
    packed = _packed_weight(w, plan)
    return torch.ops.convext_cpu.conv_transpose.default(
        plan.variant, x, w, packed.number, _version(w), bias, plan.input_size, plan.geom, problem.x_layout == _NHWC
    )


def _wgrad(
    plan: _Plan | None, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
) -> torch.Tensor:
    assert plan is not None
    if problem.axes == 3:
        dy, x = _one_axis(dy), _one_axis(x)
    return torch.ops.convext_cpu.wgrad.default(plan.variant, dy, x, plan.kernel_size, plan.geom, channels_last)


def _in_pieces(problem: ConvProblem, plan: _Plan) -> bool:
    """Whether a pass over images can run a piece at a time (csrc/cpu/runtime/training.h)."""
    takes = problem.axes == 2 and problem.dtype in (DType.FLOAT32, DType.FLOAT64)
    return takes and bool(kernels()[plan.variant]["dtype"] == problem.dtype)


def _norm_arguments(epilogue: Epilogue | None) -> tuple[Any, ...]:
    """mean, var, gamma, beta, eps, activation."""
    if epilogue is None:
        return None, None, None, None, 0.0, ACTIVATIONS["identity"]
    _, mean, var, gamma, beta, _, eps, activation = epilogue
    return mean, var, gamma, beta, eps, ACTIVATIONS[activation]


def _slower_volume(pass_: Pass, p: ConvProblem) -> str | None:
    """The rules of volumes, by the limits that were measured."""
    limits, columns = costs.table().limits, p.c_per_group if pass_ is Pass.DGRAD else p.k_per_group
    if p.is_pointwise:
        if p.x_layout == _NHWC or p.groups > 1:
            return None
        few = p.k <= limits["volume_pointwise_filters"] and pass_ is not Pass.DGRAD
        few = few or p.c <= limits[f"volume_pointwise_channels_{pass_.name.lower()}"]
        if few or pass_ is Pass.FPROP and p.flops <= limits["volume_pointwise_flops"]:
            return "ATen multiplies so few channels as they lie, without a copy"
        return None
    flat = p.t == 1 or p.r == p.s == 1
    if flat or p.is_dilated or not _is_onednns(p):
        return None
    few = columns <= limits["volume_columns"]
    if p.groups == 1 and pass_ is Pass.WGRAD:
        overlap = p.stride_d < p.t or p.stride_h < p.r or p.stride_w < p.s
        few = p.c <= limits["volume_channels"] and overlap
    elif p.groups == 1 and pass_ is Pass.DGRAD:
        few = p.is_unit_stride and (few or p.x_layout == _NHWC and p.k <= limits["volume_filters"])
    return "oneDNN's kernels for volumes were measured to be faster with so few channels" if few else None


def _is_onednns(p: ConvProblem) -> bool:
    """Whether ATen would take one of oneDNN's kernels."""
    x, w = (torch.empty(1, dtype=p.dtype.torch).expand(shape) for shape in (p.x_shape, p.w_shape))
    stride, padding, dilation, groups = p.geom
    none = (0,) * p.axes
    chosen = torch._C._select_conv_backend(x, w, None, stride, padding, dilation, False, none, groups)
    return bool(chosen == torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]


class NativeCpu(Backend):
    name = "native"

    def unavailable(self, device_type: str) -> str | None:
        if _C is None:
            if isinstance(_import_error, bindings.LockIsOff):
                return f"{_import_error}; leave that out"
            missing = isinstance(_import_error, ModuleNotFoundError)
            why = "was not built" if missing else f"did not load ({_import_error})"
            return f"convext/_C {why}: build it with `pip install .` from the source tree"
        return None

    def reject(self, pass_: Pass, problem: ConvProblem) -> str | None:
        why = native_cuda.beyond_all_kernels(problem)
        if why is None and _plan(pass_, problem) is None:
            reasons = _C.reject_reasons(_CPU, int(pass_), _fields(problem))
            why = native_cuda.in_words(reasons + tuned.why_aside("cpu"))
        return why

    def slower(self, pass_: Pass, problem: ConvProblem) -> str | None:
        """Of images, where ATen's expected time is less than that of the kernel that would run; of volumes, the classes
        of problems that were measured to lose."""
        p = problem
        plan = _plan(pass_, p)
        assert plan is not None
        theirs = None if p.axes == 3 else costs.aten_seconds(pass_, p)
        if theirs is None:
            return self._slower_by_limits(pass_, p, kernels()[plan.variant])
        own = _C.cost(plan.variant, _arriving(p))
        if pass_ is Pass.FPROP and compiled_calls.library is not None:
            own -= costs.table().limits["call_saving"]
        return None if own <= theirs else f"{own * 1e6:.1f} µs expected, ATen's {theirs * 1e6:.1f}"

    @staticmethod
    def _slower_by_limits(pass_: Pass, p: ConvProblem, kernel: dict[str, Any]) -> str | None:
        """Where no table says what ATen takes."""
        if p.dtype is DType.BFLOAT16 and _has_bf16_dot() and not p.is_depthwise:
            plain = kernel["dtype"] != p.dtype and kernel["algorithm"] != "winograd"
            if plain and (p.npq > costs.table().limits["bfloat16_pixels"] or pass_ is Pass.WGRAD):
                return "ATen multiplies bfloat16 with this CPU's bfloat16 instructions, twice as fast as float32"
        return None if p.axes == 2 or p.is_depthwise else _slower_volume(pass_, p)

    def slower_transposed(self, problem: ConvProblem) -> str | None:
        p = problem
        measured = p.dtype is DType.FLOAT32 and p.groups == 1 and p.y_layout == p.x_layout == _NHWC
        if measured and p.axes == 2 and p.h > 1 and p.c <= costs.table().limits["transposed_channels"]:
            return f"{p.c} channels leave most lanes of a vector empty"
        return None

    def variant(self, pass_: Pass, problem: ConvProblem) -> str:
        plan = _plan(pass_, problem)
        assert plan is not None
        return plan.name

    def served(self, pass_: Pass, problem: ConvProblem, kind: str) -> tuple[str, Callable[..., torch.Tensor]]:
        if not kind:
            return super().served(pass_, problem, kind)
        plan = _plan(pass_, problem, kind)
        assert plan is not None
        return plan.name, functools.partial(self._fprop_of_kind, kind)

    def _fprop_of_kind(
        self, kind: str, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue
    ) -> torch.Tensor:
        return _fprop(_plan(Pass.FPROP, problem, kind), problem, x, w, epilogue)

    def candidates(self, pass_: Pass, problem: ConvProblem, kind: str = "") -> list[Candidate]:
        found, limits = _usable(pass_, problem), costs.table().limits
        launch: Callable[..., torch.Tensor] = (_fprop, _dgrad, _wgrad)[pass_]
        plans = [(_plan_of(pass_, problem, index), cost) for index, cost in found[: int(limits["candidates"])]]
        return [
            Candidate(self.name, plan.name, cost, functools.partial(launch, plan))
            for plan, cost in plans
            if cost <= limits["within_reach"] * found[0][1]
        ]

    def fprop(self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        return _fprop(_plan(Pass.FPROP, problem), problem, x, w, epilogue)

    def takes_float_weights(self, problem: ConvProblem) -> bool:
        """They are rounded as they are packed, once, and not at every call."""
        return True

    def prepared_fprop(
        self, problem: ConvProblem, activation: str, kind: str, run: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        plan = _plan(Pass.FPROP, problem, kind)
        assert plan is not None
        op, code = torch.ops.convext_cpu.fprop.default._op, ACTIVATIONS[activation]
        variant, geom = plan.variant, plan.geom
        nhwc = problem.y_layout == _NHWC

        def call(
            x: torch.Tensor,
            w: torch.Tensor,
            bias: torch.Tensor | None,
            mean: torch.Tensor | None,
            var: torch.Tensor | None,
            gamma: torch.Tensor | None,
            beta: torch.Tensor | None,
            residual: torch.Tensor | None,
            eps: float,
        ) -> torch.Tensor:
            packed = _packed_weight(w, plan)
            return op(
                variant, x, w, packed.number, _version(w), bias, mean, var, gamma, beta, residual, geom, eps, code, nhwc
            )

        return call

    def prepared_sequence(self, blocks: list[native_sequence.Block]) -> native_sequence.Prepared | None:
        steps = [step for block in blocks for step in block.steps]
        convolution = native_sequence.StepKind.CONVOLUTION
        plans = [
            _plan(Pass.FPROP, step.problem, step.epilogue_kind) if step.kind is convolution else None for step in steps
        ]
        chosen = [None if plan is None else kernels()[plan.variant] for plan in plans]
        if (
            any(
                kernel is not None and kernel["dtype"] != step.problem.dtype or step.problem.y_layout != _NHWC
                for kernel, step in zip(chosen, steps)
            )
            or any(step.problem.x_layout != _NHWC for step in steps[1:])
            or steps[0].problem.x_layout != _NHWC
            and not (chosen[0] and chosen[0]["reads_nchw"])
            or any(len(block.steps) > 1 and _rejects_block(block) for block in blocks)
        ):
            return None
        ops, program = torch.ops.convext_cpu, _C.SequenceProgram()
        native_sequence.fill(program, blocks, plans)
        op = ops.run_sequence.default._op

        def keep(
            tensors: Sequence[Sequence[torch.Tensor | None]], eps: list[float], flat: bool
        ) -> native_sequence.CachedTensors:
            operands = [t for step in tensors for t in step if t is not None]
            weights = [step[0] for step in tensors]
            packs = [
                (number, plan)
                for number, (plan, w) in enumerate(zip(plans, weights))
                if w is not None and plan is not None and plan.pack_format
            ]

            def pack() -> list[_PackedWeight]:
                return [_packed_weight(weights[number], plan) for number, plan in packs]  # type: ignore[arg-type]

            def hand_over() -> native_sequence.Handed:
                gone = _storages_gone[0]
                packed = pack()

                def packed_are_kept() -> bool:
                    """Looks only after a storage has gone: where a tensor lies at an address of before, its packed
                    weights may have been those of a storage that is no more."""
                    nonlocal gone
                    now = _storages_gone[0]
                    if gone != now:
                        if any(present is not kept for present, kept in zip(pack(), packed)):
                            return False
                        gone = now
                    return True

                lie = places(operands)
                numbers = [kept.number for kept in packed]
                number = ops.keep_sequence.default(program.number, operands, numbers, eps, flat)
                return native_sequence.Handed(number, lie, packed_are_kept)

            tracked = all(w is not None and not w.is_inference() for w in weights)
            version = operator.attrgetter("_version") if tracked else _version
            return native_sequence.CachedTensors(operands, weights, version, hand_over)

        def run(x: torch.Tensor, kept: native_sequence.CachedTensors) -> torch.Tensor:
            handed = kept.current()
            return op(handed.number, x, [*map(kept.version, kept.weights)])

        return native_sequence.Prepared(keep, run, new_guards)

    def dgrad(self, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _dgrad(_plan(Pass.DGRAD, problem), problem, dy, w)

    def conv_transpose(
        self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return _conv_transpose(_plan(Pass.DGRAD, problem), problem, x, w, bias)

    def wgrad(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
    ) -> torch.Tensor:
        return _wgrad(_plan(Pass.WGRAD, problem), problem, dy, x, channels_last)

    reads_exact_mean = True

    def batch_stats(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.convext_cpu.batch_stats.default(y)

    def fprop_batch_stats(
        self,
        problem: ConvProblem,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        before: Epilogue | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """A piece of the batch at a time, whose sums are taken while it is in the cache."""
        plan = _plan(Pass.FPROP, problem, STATISTICS)
        assert plan is not None
        if problem.y_layout != _NHWC or not _in_pieces(problem, plan):
            return None
        packed = _packed_weight(w, plan)
        return torch.ops.convext_cpu.fprop_batch_stats.default(
            plan.variant, x, *_norm_arguments(before), w, packed.number, _version(w), bias, plan.geom
        )

    def bn_conv_backward(
        self,
        dgrad: ConvProblem,
        wgrad: ConvProblem,
        dout: torch.Tensor,
        y: torch.Tensor,
        epilogue: Epilogue,
        sums: torch.Tensor | None,
        x: torch.Tensor,
        before: Epilogue | None,
        w: torch.Tensor,
        dw_channels_last: bool,
        sums_up: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        plans = _plan(Pass.DGRAD, dgrad), _plan(Pass.WGRAD, wgrad)
        assert plans[0] is not None and plans[1] is not None
        if not (dgrad.x_layout == dgrad.y_layout == wgrad.x_layout == wgrad.y_layout == _NHWC) or not (
            _in_pieces(dgrad, plans[0]) and _in_pieces(wgrad, plans[1])
        ):
            return None
        packed = _packed_weight(w, plans[0])
        return torch.ops.convext_cpu.bn_conv_backward.default(
            plans[0].variant, plans[1].variant, dout, y, *_norm_arguments(epilogue), sums, x, *_norm_arguments(before),
            sums_up, w, packed.number, _version(w), plans[0].geom, dw_channels_last,
        )  # fmt: skip

    def update_running(
        self,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        momentum: float,
        unbiased: float,
    ) -> bool:
        for t in (running_mean, running_var):
            if (
                t.dtype not in (torch.float32, torch.float64)
                or t.device.type != "cpu"
                or not t.is_contiguous()
                or t.is_neg()
                or t.is_inference()
            ):
                return False
        torch.ops.convext_cpu.update_running.default(running_mean, running_var, mean, var, momentum, unbiased)
        return True

    def bn_act(self, y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        _, mean, var, gamma, beta, residual, eps, activation = epilogue
        return torch.ops.convext_cpu.bn_act.default(y, mean, var, gamma, beta, residual, eps, ACTIVATIONS[activation])

    def bn_act_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        _, mean, var, gamma, beta, residual, eps, activation = epilogue
        return torch.ops.convext_cpu.bn_act_backward.default(
            dout, y, mean, var, gamma, beta, residual, eps, ACTIVATIONS[activation], training
        )

    def bn_act_and_sums(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue
    ) -> tuple[torch.Tensor, ...] | None:
        _, mean, var, gamma, beta, _, eps, activation = epilogue
        return torch.ops.convext_cpu.bn_act_and_sums.default(
            dout, y, mean, var, gamma, beta, eps, ACTIVATIONS[activation]
        )

    def bn_act_from_sums(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, *found: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, mean, var, gamma, beta, _, eps, activation = epilogue
        dy, dgamma, dbeta = torch.ops.convext_cpu.bn_act_from_sums.default(
            dout, y, mean, var, gamma, beta, eps, ACTIVATIONS[activation], *found
        )
        return found[1] if dy.numel() == 0 else dy, dgamma, dbeta

    def reject_gates(self, y: torch.Tensor) -> str | None:
        if y.dtype not in (torch.float32, torch.float64):
            return f"{y.dtype} is not float32 or float64"
        return None if y.is_contiguous(memory_format=torch.channels_last) else "y is not channels-last"

    def bn_act_image_sums(
        self, y: torch.Tensor, epilogue: Epilogue, dout: torch.Tensor | None, factor: float
    ) -> torch.Tensor:
        return torch.ops.convext_cpu.bn_act_image_sums.default(dout, y, *_norm_arguments(epilogue), factor)

    def bn_act_gated(self, y: torch.Tensor, epilogue: Epilogue, gates: torch.Tensor) -> torch.Tensor:
        return torch.ops.convext_cpu.bn_act_gated.default(y, *_norm_arguments(epilogue), gates)

    def bn_act_gated_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, gates: torch.Tensor, shifts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.convext_cpu.bn_act_gated_backward.default(dout, y, *_norm_arguments(epilogue), gates, shifts)

    def act_backward(
        self, dout: torch.Tensor, z: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        dz, _, sums, _ = torch.ops.convext_cpu.bn_act_backward.default(
            dout, z, None, None, None, None, None, 0.0, ACTIVATIONS[activation], False
        )
        return dz, sums.to(z.dtype)

    def reject_batch_norm(self, y: torch.Tensor) -> str | None:
        return None if y.dim() == 4 else f"y has {y.dim()} dimensions, not 4"


BACKEND = NativeCpu()
