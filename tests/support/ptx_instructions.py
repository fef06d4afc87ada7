"""What PTX instructions do, as the PTX ISA says it: for each opcode a function that binds one to a machine
(ptx_machine.py) and returns an act. An act takes the mask of the threads that run it, or None for all.

An opcode or a modifier that is not known here is an error that names the line, never a guess. Arithmetic is IEEE's;
what the ISA allows to be approximate (.approx, the order of a matrix product's sum) is computed to within rounding.
"""

from __future__ import annotations

import re

import numpy as np
from ptx import (
    BITS,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    Address,
    Instruction,
    Pair,
    PtxError,
    Register,
    Symbol,
    Vector,
)

OPS = {}


def op(*names):
    def register(function):
        OPS.update(dict.fromkeys(names, function))
        return function

    return register


def bind(machine, instruction: Instruction):
    if instruction.opcode[0] not in OPS:
        raise PtxError("this instruction is not known here")
    return OPS[instruction.opcode[0]](machine, instruction)


def is_branch(instruction: Instruction) -> bool:
    return instruction.opcode[0] in ("bra", "brx", "ret", "exit")


def waits_for(instruction: Instruction) -> str | None:
    """Whom an instruction waits for: the "block", the "warp", or nobody."""
    name, *modifiers = instruction.opcode
    if name in ("bar", "barrier"):
        return "warp" if "warp" in modifiers else "block"
    return "warp" if name in ("shfl", "vote", "ldmatrix", "mma") else None


def members(machine, instruction: Instruction) -> np.ndarray:
    """Whether a thread is one that the instruction of a warp waits for."""
    if instruction.opcode[0] in ("ldmatrix", "mma"):
        return np.ones(machine.threads, bool)
    bits = machine.source(instruction.operands[-1], "b32")
    return (bits >> machine.lane.astype(np.uint32) & 1).astype(bool)


def _only(instruction: Instruction, *known: str) -> list[str]:
    """The modifiers, types left out, if they are of those known; a pattern that ends with * is known by its start."""
    rest = [part for part in instruction.opcode[1:] if part not in BITS]
    for part in rest:
        if not any(part == k or (k.endswith("*") and part.startswith(k[:-1])) for k in known):
            raise PtxError(f"the modifier .{part} is not known here")
    return rest


def _type(instruction: Instruction, *kinds: str) -> str:
    """The instruction's type, if it is of those: s32, or ints, floats."""
    (kind,) = instruction.types
    groups = {"ints": "usb", "floats": "f"}
    if any(kind == k or (kind[0] in groups.get(k, "") and kind not in ("bf16", "bf16x2", "f16x2")) for k in kinds):
        return kind
    raise PtxError(f"the type .{kind} is not known here")


# ---- integers and bits


def _binary(function, *kinds):
    def bound(machine, instruction):
        _only(instruction, "lo", "rn")
        kind = _type(instruction, *kinds)
        target, a, b = instruction.operands
        return machine.emit(target, kind, function, machine.source(a, kind), machine.source(b, kind))

    return bound


def _unary(function, *kinds):
    def bound(machine, instruction):
        _only(instruction)
        kind = _type(instruction, *kinds)
        target, a = instruction.operands
        return machine.emit(target, kind, function, machine.source(a, kind))

    return bound


def _flushed(function):
    """With .ftz: subnormal operands and results are zeros of their sign."""

    def flush(v):
        return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v)

    return lambda *sources: flush(function(*(flush(s) for s in sources)))


def _float_or(ints):
    """add, sub, mul of floats; `ints` serves the others."""

    def bound(machine, instruction):
        if instruction.types[-1] not in ("f32", "f64"):
            return ints(machine, instruction)
        rest = _only(instruction, "rn", "ftz")
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[instruction.opcode[0]]
        kind = _type(instruction, "f32", "f64")
        target, a, b = instruction.operands
        sources = machine.source(a, kind), machine.source(b, kind)
        return machine.emit(target, kind, _flushed(function) if "ftz" in rest else function, *sources)

    return bound


def _mul_ints(machine, instruction):
    rest, kind = _only(instruction, "lo", "hi", "wide"), _type(instruction, "ints")
    target, a, b = instruction.operands
    return _product(machine, target, kind, rest, a, b)


def _product(machine, target, kind, rest, a, b, c=None):
    """a * b + c: its low half, its high half, or all of it."""
    bits = BITS[kind]
    x, y = machine.source(a, kind), machine.source(b, kind)
    wide = f"{kind[0]}{2 * bits}"
    if "wide" in rest:
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 4}")
        z = machine.source(c, wide) if c is not None else dtype.type(0)
        return machine.emit(target, wide, lambda x, y, z: x.astype(dtype) * y.astype(dtype) + z, x, y, z)
    z = machine.source(c, kind) if c is not None else x.dtype.type(0)
    if "lo" in rest:
        return machine.emit(target, kind, lambda x, y, z: x * y + z, x, y, z)
    if "hi" not in rest:
        raise PtxError("which half of the product?")
    return machine.emit(target, kind, lambda x, y, z: _high(x, y) + z, x, y, z)


def _high(x, y):
    """The upper half of the product, of any width, signed or not."""
    bits = 8 * x.dtype.itemsize
    if bits < 64:
        dtype = np.dtype(f"{x.dtype.kind}{bits // 4}")
        return (x.astype(dtype) * y.astype(dtype) >> dtype.type(bits)).astype(x.dtype)
    products = [int(i) * int(j) >> 64 for i, j in zip(x.tolist(), y.tolist())]
    return np.array([p & (1 << 64) - 1 for p in products], np.uint64).view(x.dtype)


OPS["add"] = _float_or(_binary(np.add, "ints"))
OPS["sub"] = _float_or(_binary(np.subtract, "ints"))
OPS["mul"] = _float_or(_mul_ints)


@op("mad")
def _mad(machine, instruction):
    rest, kind = _only(instruction, "lo", "hi", "wide"), _type(instruction, "ints")
    target, a, b, c = instruction.operands
    return _product(machine, target, kind, rest, a, b, c)


def _quotient(x, y):
    """Rounded towards zero; by zero, which has no meaning, all bits are set."""
    y = np.where(y == 0, y.dtype.type(1), y)
    quotient = x // y
    return quotient + ((quotient < 0) & (quotient * y != x)).astype(x.dtype)


@op("div")
def _div(machine, instruction):
    kind = instruction.types[0]
    target, a, b = instruction.operands
    if kind in ("f32", "f64"):
        rest = _only(instruction, "rn", "full", "approx", "ftz")
        function = _flushed(np.divide) if "ftz" in rest else np.divide
        return machine.emit(target, kind, function, machine.source(a, kind), machine.source(b, kind))
    return _binary(_quotient, "ints")(machine, instruction)


OPS["rem"] = _binary(lambda x, y: x - _quotient(x, y) * y, "ints")
OPS["not"] = _unary(np.invert, "b16", "b32", "b64", "pred")
for _name, _function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    OPS[_name] = _binary(_function, "b16", "b32", "b64", "pred")


@op("neg", "abs")
def _sign(machine, instruction):
    rest, kind = _only(instruction, "ftz"), _type(instruction, "s16", "s32", "s64", "f32", "f64")
    function = {"neg": np.negative, "abs": np.abs}[instruction.opcode[0]]
    target, a = instruction.operands
    return machine.emit(target, kind, _flushed(function) if "ftz" in rest else function, machine.source(a, kind))


@op("min", "max")
def _extreme(machine, instruction):
    kind = instruction.types[0]
    rest = _only(instruction, "ftz", "NaN")
    least = instruction.opcode[0] == "min"
    if kind in ("f32", "f64") and "NaN" not in rest:  # a NaN gives way to a number
        function = np.fmin if least else np.fmax
    else:
        _type(instruction, "ints", "f32", "f64")
        function = np.minimum if least else np.maximum
    target, a, b = instruction.operands
    sources = machine.source(a, kind), machine.source(b, kind)
    return machine.emit(target, kind, _flushed(function) if "ftz" in rest else function, *sources)


@op("shl", "shr")
def _shift(machine, instruction):
    _only(instruction)
    kind = _type(instruction, "ints")
    target, a, b = instruction.operands
    left, bits = instruction.opcode[0] == "shl", BITS[kind]

    def function(x, count):  # a shift by all bits or more leaves what one by all of them leaves
        far = count >= bits
        by = np.where(far, 0, count).astype(x.dtype)
        if left:
            return np.where(far, 0, x << by)
        return np.where(far, np.where(x < 0, -1, 0) if kind[0] == "s" else 0, x >> by)

    return machine.emit(target, kind, function, machine.source(a, kind), machine.source(b, "u32"))


@op("shf")
def _funnel(machine, instruction):
    rest, kind = _only(instruction, "l", "r", "wrap", "clamp"), _type(instruction, "b32")
    target, a, b, c = instruction.operands

    def function(low, high, count):
        count = count & np.uint32(31) if "wrap" in rest else np.minimum(count, np.uint32(32))
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        if "l" in rest:
            return (both << count.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        return (both >> count.astype(np.uint64)).astype(np.uint32)

    return machine.emit(target, kind, function, *(machine.source(o, "u32") for o in (a, b, c)))


@op("bfe")
def _extract(machine, instruction):
    _only(instruction)
    kind = _type(instruction, "u32", "s32")
    target, a, b, c = instruction.operands

    def function(x, at, count):
        at, count = at & np.uint32(255), np.minimum(count & np.uint32(255), np.uint32(32)).astype(np.int64)
        wide = x.astype(np.int64) >> np.minimum(at, np.uint32(63)).astype(np.int64)
        if kind == "s32":  # what reaches past the last bit is the sign
            wide = np.where(count > 0, wide << (64 - count) >> (64 - count), 0)
        else:
            wide = wide & (np.int64(1) << count) - 1
        return wide.astype(x.dtype)

    return machine.emit(
        target, kind, function, machine.source(a, kind), machine.source(b, "u32"), machine.source(c, "u32")
    )


@op("bfi")
def _insert(machine, instruction):
    _only(instruction)
    kind = _type(instruction, "b32")
    target, *sources = instruction.operands

    def function(x, into, at, count):
        at, count = at & np.uint32(255), np.minimum(count & np.uint32(255), np.uint32(32))
        ones = (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)
        shift = np.minimum(at, np.uint32(32)).astype(np.uint64)
        mask = (ones << shift).astype(np.uint32)
        return into & ~mask | (x.astype(np.uint64) << shift).astype(np.uint32) & mask

    return machine.emit(target, kind, function, *(machine.source(o, "u32") for o in sources))


@op("prmt")
def _permute(machine, instruction):
    _only(instruction)
    target, a, b, c = instruction.operands

    def function(x, y, selector):
        both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
        out = np.zeros(x.shape, np.uint64)
        for i in range(4):
            pick = (selector >> np.uint32(4 * i)).astype(np.uint64)
            byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7) == 1, np.uint64(255), np.uint64(0))
            out |= np.where(pick & np.uint64(8) != 0, sign, byte) << np.uint64(8 * i)
        return out.astype(np.uint32)

    return machine.emit(target, _type(instruction, "b32"), function, *(machine.source(o, "u32") for o in (a, b, c)))


@op("lop3")
def _lookup(machine, instruction):
    _only(instruction)
    target, a, b, c, table = instruction.operands

    def function(x, y, z):
        out = np.zeros_like(x)
        for i in range(8):
            if table.bits >> i & 1:
                out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return out

    return machine.emit(target, _type(instruction, "b32"), function, *(machine.source(o, "u32") for o in (a, b, c)))


# ---- comparing and choosing

_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(name: str, is_float: bool):
    """With floats, a comparison with a NaN is false, and true where its name ends with u."""
    if not is_float:
        return np.not_equal if name == "ne" else _ORDERED[_UNSIGNED.get(name, name)]
    if name in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    if name == "ne":
        return lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y)
    if name in _ORDERED:
        return _ORDERED[name]
    ordered = np.not_equal if name == "neu" else _ORDERED[name[:-1]]
    return lambda x, y: ordered(x, y) | np.isnan(x) | np.isnan(y)


@op("setp")
def _setp(machine, instruction):
    name = instruction.opcode[1]
    combine = next((m for m in instruction.opcode[2:] if m in ("and", "or", "xor")), None)
    rest, kind = _only(instruction, name, "and", "or", "xor", "ftz"), instruction.types[0]
    if kind in ("bf16", "f16"):
        raise PtxError(f"the type .{kind} is not known here")
    target, a, b, *third = instruction.operands
    try:
        compare = _comparison(name, kind in ("f32", "f64"))
    except KeyError:
        raise PtxError(f"the comparison .{name} is not known here") from None
    if "ftz" in rest:
        plain = compare

        def compare(x, y):
            return plain(_flushed(lambda v: v)(x), _flushed(lambda v: v)(y))

    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    x, y = machine.source(a, kind), machine.source(b, kind)
    if combine is None and second is None:
        return machine.emit(first, "pred", compare, x, y)
    joined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine or "and"]
    other = machine.guard(third[0]) if third else lambda: np.ones(machine.threads, bool)
    targets = [(machine.raw(t), negated) for t, negated in ((first, False), (second, True)) if isinstance(t, Register)]

    def act(mask):
        result, third = compare(x, y), other()
        values = [joined(~result if negated else result, third) for _, negated in targets]
        for (target, _), value in zip(targets, values):
            np.copyto(target, value, where=True if mask is None else mask)

    return act


@op("selp")
def _selp(machine, instruction):
    _only(instruction)
    kind = instruction.types[0]
    target, a, b, p = instruction.operands
    predicate = machine.guard(p)
    x, y = machine.source(a, kind), machine.source(b, kind)
    return machine.emit(target, kind, lambda: np.where(predicate(), x, y))


# ---- floats


def _fma64(a, b, c):
    """a * b + c with the product's full width: by Dekker's and Knuth's error-free transformations."""

    def halves(v):
        big = v * 134217729.0
        high = big - (big - v)
        return high, v - high

    product = a * b
    (ah, al), (bh, bl) = halves(a), halves(b)
    below = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)
    exact = total + (rest + below)
    return np.where(np.isfinite(exact), exact, total)


@op("fma")
def _fma(machine, instruction):
    rest, kind = _only(instruction, "rn", "rm", "ftz"), _type(instruction, "f32", "f64")
    target, *sources = instruction.operands

    def nearest(a, b, c):  # a product of two float32 is exact in float64
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def down(a, b, c):
        value = nearest(a, b, c)
        return np.where(value > a.astype(np.float64) * b + c, np.nextafter(value, np.float32(-np.inf)), value)

    if kind == "f64" and "rm" in rest:
        raise PtxError("this rounding is not known here")
    function = _fma64 if kind == "f64" else down if "rm" in rest else nearest
    if "ftz" in rest:
        function = _flushed(function)
    return machine.emit(target, kind, function, *(machine.source(s, kind) for s in sources))


def _function(in_float64):
    def bound(machine, instruction):
        rest, kind = _only(instruction, "rn", "approx", "ftz"), _type(instruction, "f32", "f64")
        target, a = instruction.operands

        def function(x):
            return in_float64(x.astype(np.float64)).astype(x.dtype)

        return machine.emit(target, kind, _flushed(function) if "ftz" in rest else function, machine.source(a, kind))

    return bound


OPS["rcp"] = _function(lambda x: 1 / x)
OPS["sqrt"] = _function(np.sqrt)
OPS["ex2"] = _function(np.exp2)


@op("copysign")
def _copysign(machine, instruction):
    _only(instruction)
    kind = _type(instruction, "f32", "f64")
    target, a, b = instruction.operands  # b with the sign of a
    return machine.emit(target, kind, np.copysign, machine.source(b, kind), machine.source(a, kind))


# ---- conversions

_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """The nearest, ties to even; NaN is the canonical one."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (rounded >> np.uint32(16)).astype(np.uint16))


def f32_to_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest, ties away from zero; 13 low bits that nobody looks at."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), np.where(np.isinf(values), bits, rounded))


@op("cvt")
def _cvt(machine, instruction):
    rest = _only(instruction, "rn", "rz", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "satfinite")
    kinds = instruction.types
    if len(kinds) != 2:
        raise PtxError("a conversion has two types")
    to, of = kinds
    target, *sources = instruction.operands
    if "ftz" in rest or "satfinite" in rest:
        raise PtxError("this conversion is not known here")
    if to in ("bf16x2", "f16x2") and of == "f32" and rest == ["rn"]:  # the first operand is the upper half

        def halves(high, low):
            to_16 = f32_to_bf16 if to == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
            return to_16(high).astype(np.uint32) << np.uint32(16) | to_16(low)

        return machine.emit(target, "b32", halves, *(machine.source(s, of) for s in sources))
    (source,) = sources
    if to == "tf32" and of == "f32" and rest == ["rna"]:
        return machine.emit(target, "b32", f32_to_tf32, machine.source(source, of))
    x = machine.source(source, "u16" if of == "bf16" else of, wider=True)
    if of == "bf16" and to == "f32":
        return machine.emit(target, to, bf16_to_f32, x)
    if to == "bf16" and of == "f32" and rest == ["rn"]:
        return machine.emit(target, "u16", f32_to_bf16, x)
    if "bf16" in kinds or "tf32" in kinds:
        raise PtxError("this conversion is not known here")
    dtype = np.dtype({"s": "i", "u": "u", "b": "u", "f": "f"}[to[0]] + str(BITS[to] // 8))
    if of[0] == "f":
        whole = next((_TO_WHOLE[m] for m in rest if m in _TO_WHOLE), None)
        if to[0] == "f":
            if "rz" in rest:
                raise PtxError("this conversion is not known here")

            def to_float(x):
                value = (whole(x) if whole else x).astype(dtype)
                if "sat" in rest:  # to [0, 1], and NaN to 0
                    value = np.where(value > 0, np.minimum(value, dtype.type(1)), dtype.type(0))
                return value

            return machine.emit(target, to, to_float, x)
        if whole is None:
            raise PtxError("how is it rounded?")

        def to_int(x):  # out of range, the nearest end; NaN is 0
            limits = np.iinfo(dtype)
            value = whole(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
            inside = np.where((value > limits.min) & (value < limits.max), value, 0).astype(dtype)
            return np.where(value <= limits.min, limits.min, np.where(value >= limits.max, limits.max, inside)).astype(
                dtype
            )

        return machine.emit(target, to, to_int, x, wider=True)
    if "sat" in rest or "rz" in rest:
        raise PtxError("this conversion is not known here")
    return machine.emit(target, to, lambda x: x.astype(dtype), x, wider=True)


# ---- moving


@op("mov")
def _mov(machine, instruction):
    _only(instruction)
    kind = instruction.types[0]
    target, source = instruction.operands
    bits = BITS[kind]
    if isinstance(target, Vector):
        each = f"u{bits // len(target.items)}"
        x = machine.source(source, f"u{bits}")
        parts = x.view(f"u{bits // len(target.items) // 8}").reshape(machine.threads, -1)
        acts = [
            machine.emit(item, each, np.array, parts[:, i]) for i, item in enumerate(target.items) if _is_real(item)
        ]
        return lambda mask: [act(mask) for act in acts]
    if isinstance(source, Vector):
        each = f"u{bits // len(source.items)}"
        parts = [machine.source(item, each) for item in source.items]
        return machine.emit(
            target, f"u{bits}", lambda: np.ascontiguousarray(np.stack(parts, 1)).view(f"u{bits // 8}").ravel()
        )
    return machine.emit(target, kind, np.array, machine.source(source, kind))


def _is_real(item) -> bool:
    return not (isinstance(item, Symbol) and item.name == "_")


@op("cvta")
def _cvta(machine, instruction):
    rest = _only(instruction, "to", "global", "shared", "local", "param")
    windows = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    window = np.uint64(next(windows[m] for m in rest if m != "to"))
    kind = _type(instruction, "u64")
    target, a = instruction.operands
    function = np.subtract if "to" in rest else np.add
    return machine.emit(target, kind, function, machine.source(a, kind), np.broadcast_to(window, machine.threads))


_HINTS = (
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "volatile",
    "weak",
    "relaxed",
    "cta",
    "gpu",
    "sys",
    "L1_*",
    "L2_*",
)
_SPACES = ("global", "shared", "local", "param", "const")


def _access(instruction):
    """(space, type, elements) of a load or store."""
    rest = _only(instruction, *_SPACES, "v2", "v4", *_HINTS)
    space = next((m for m in rest if m in _SPACES), "generic")
    return space, instruction.types[0], next((int(m[1]) for m in rest if m in ("v2", "v4")), 1)


def _chosen(machine, mask) -> np.ndarray:
    return np.arange(machine.threads) if mask is None else np.flatnonzero(mask)


def _aligned(addresses: np.ndarray, size: int) -> None:
    odd = addresses % np.uint64(size) != 0
    if odd.any():
        raise PtxError(f"{size} bytes at {int(addresses[odd][0]):#x}, which is no multiple of them")


@op("ld")
def _ld(machine, instruction):
    space, kind, count = _access(instruction)
    target, source = instruction.operands
    targets = list(target.items) if isinstance(target, Vector) else [target]
    if not isinstance(source, Address) or len(targets) != count:
        raise PtxError("it does not load as many elements as it names registers")
    size, addresses = BITS[kind] // 8, machine.addresses(source)
    staging = np.zeros((count, machine.threads), f"u{size}")
    view = staging.view({"s": "i", "f": "f"}.get(kind[0], "u") + str(size)) if kind != "bf16" else staging
    plain = kind if kind != "bf16" else "u16"
    acts = [machine.emit(t, plain, np.array, view[i], wider=True) for i, t in enumerate(targets) if _is_real(t)]

    def act(mask):
        threads = _chosen(machine, mask)
        at = addresses()[threads]
        _aligned(at, size * count)
        memory, inside = machine.space(space, threads, at)
        _watch(machine, instruction, memory, False, threads, inside, size * count)
        staging[:, threads] = memory.load(threads, inside, size, count).T
        for write in acts:
            write(mask)

    return act


@op("st")
def _st(machine, instruction):
    space, kind, count = _access(instruction)
    target, source = instruction.operands
    sources = list(source.items) if isinstance(source, Vector) else [source]
    if not isinstance(target, Address) or len(sources) != count:
        raise PtxError("it does not store as many elements as it names registers")
    size, addresses = BITS[kind] // 8, machine.addresses(target)
    values = [machine.source(s, f"u{8 * size}", wider=True) for s in sources]

    def act(mask):
        threads = _chosen(machine, mask)
        at = addresses()[threads]
        _aligned(at, size * count)
        memory, inside = machine.space(space, threads, at)
        _watch(machine, instruction, memory, True, threads, inside, size * count)
        memory.store(threads, inside, np.stack([v[threads] for v in values], 1))

    return act


def _watch(machine, instruction, memory, write, threads, addresses, size) -> None:
    if machine.watch is not None:
        machine.watch(instruction, memory, write, threads, addresses, size, machine)


# ---- asynchronous copies


_COPY = ("async", "ca", "cg", "shared", "shared_cta", "global", "L2_*", "commit_group", "wait_group", "wait_all")


@op("cp")
def _cp(machine, instruction):
    if instruction.opcode[1] != "async":
        raise PtxError("this copy is not known here")
    rest = _only(instruction, *_COPY)
    if "commit_group" in rest:
        return machine.copies.commit
    if "wait_all" in rest:
        return lambda mask: machine.copies.wait(mask, None)
    if "wait_group" in rest:
        left = instruction.operands[0].bits
        return lambda mask: machine.copies.wait(mask, left)
    target, source, size, *taken = instruction.operands
    if size.bits not in ((16,) if "cg" in rest else (4, 8, 16)):
        raise PtxError("a copy has 4, 8 or 16 bytes, past the first-level cache 16")
    to, of, size = machine.addresses(target), machine.addresses(source), size.bits
    wanted = machine.source(taken[0], "u32") if taken else np.broadcast_to(np.uint32(size), machine.threads)

    def act(mask):
        threads = _chosen(machine, mask)
        destinations, sources, bytes_read = to()[threads], of()[threads], wanted[threads]
        _aligned(destinations, size)
        if (bytes_read > size).any():
            raise PtxError("more bytes are read than written")
        data = np.zeros((len(threads), size), np.uint8)  # past src-size, zeros
        for count in np.unique(bytes_read[bytes_read > 0]):
            some = bytes_read == count
            _aligned(sources[some], size)
            memory, inside = machine.space("global", threads[some], sources[some])
            _watch(machine, instruction, memory, False, threads[some], inside, int(count))
            data[some, :count] = memory.load(threads[some], inside, 1, int(count))
        _watch(machine, instruction, machine.shared, True, threads, destinations, size)
        machine.copies.issue(threads, destinations, data)

    return act


# ---- a warp together


@op("bar", "barrier")
def _warp_barrier(machine, instruction):
    """Of a warp: its lanes have met, and memory is in order as it is. Barriers of a block are the machine's."""
    _only(instruction, "warp", "sync")
    return lambda mask: None


@op("shfl")
def _shfl(machine, instruction):
    rest, kind = _only(instruction, "sync", "up", "down", "bfly", "idx"), _type(instruction, "b32")
    target, a, b, c, _ = instruction.operands
    first, predicate = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    x, by, clamp = (machine.source(o, "u32") for o in (a, b, c))
    warps = machine.lane.size // 32
    out, inside = np.zeros(machine.threads, np.uint32), np.zeros(machine.threads, bool)
    write = [machine.emit(first, kind, np.array, out)]
    if isinstance(predicate, Register):
        write.append(machine.emit(predicate, "pred", np.array, inside))

    def act(mask):
        lane, step = machine.lane, (by & np.uint32(31)).astype(np.int64)
        bound, segment = (
            (clamp & np.uint32(31)).astype(np.int64),
            (clamp >> np.uint32(8) & np.uint32(31)).astype(np.int64),
        )
        highest = lane & segment | bound & ~segment
        if "up" in rest:
            source = lane - step
            good = source >= highest
        elif "down" in rest:
            source = lane + step
            good = source <= highest
        elif "bfly" in rest:
            source = lane ^ step
            good = source <= highest
        else:
            source = lane & segment | step & ~segment
            good = source <= highest
        source = np.where(good, source, lane)
        present = np.ones(machine.threads, bool) if mask is None else mask
        at = source + np.arange(warps).repeat(32) * 32
        if not present[at][present].all():
            raise PtxError("a lane reads another that is not there")
        out[:], inside[:] = x[at], good
        for w in write:
            w(mask)

    return act


@op("vote")
def _vote(machine, instruction):
    rest = _only(instruction, "sync", "ballot")
    if "ballot" not in rest:
        raise PtxError("this vote is not known here")
    target, predicate, _ = instruction.operands
    ask = machine.guard(predicate)
    out = np.zeros(machine.threads, np.uint32)
    write = machine.emit(target, _type(instruction, "b32"), np.array, out)

    def act(mask):
        says = (ask() if mask is None else ask() & mask).reshape(-1, 32)
        answer = (says.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        out[:] = answer.repeat(32)
        write(mask)

    return act


@op("ldmatrix")
def _ldmatrix(machine, instruction):
    """Lanes 8m to 8m + 7 bring the addresses of the rows of matrix m. Lane l gets of each the elements 2(l % 4) and the
    next of row l / 4; with .trans, of column l / 4."""
    rest = _only(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
    _type(instruction, "b16")
    count = next(int(m[1]) for m in rest if m in ("x1", "x2", "x4"))
    target, source = instruction.operands
    targets = list(target.items) if isinstance(target, Vector) else [target]
    if len(targets) != count:
        raise PtxError("it does not load as many matrices as it names registers")
    addresses = machine.addresses(source)
    out = np.zeros((count, machine.threads), np.uint32)
    writes = [machine.emit(t, "b32", np.array, out[i]) for i, t in enumerate(targets)]

    def act(mask):
        warps = np.arange(machine.threads // 32) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))
        threads = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
        at = addresses()[threads]
        _aligned(at, 16)
        _watch(machine, instruction, machine.shared, False, threads, at, 16)
        rows = machine.shared.load(threads, at, 2, 8).reshape(len(warps), count, 8, 8)
        if "trans" in rest:
            rows = rows.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), count, 32)
        out.reshape(count, -1, 32)[:, warps] = words.transpose(1, 0, 2)
        for write in writes:
            write(mask)

    return act


def _places(rows, columns, width: int) -> np.ndarray:
    """For the elements of a matrix in order, where they are among (register, lane, part of it): rows and columns give
    the element's, by those three."""
    where = np.asarray(rows) * width + np.asarray(columns)
    order = np.argsort(where.ravel(), kind="stable")
    assert (where.ravel()[order] == np.arange(where.size)).all(), "each element has one place"
    return order


def _fragments(k: int, parts: int):
    """Of m16n8k(k) with `parts` elements a register: places of A, B and D, by the ISA's tables. i counts a thread's
    elements, register by register."""
    lane = np.arange(32)[None, :, None]
    group, place = lane // 4, lane % 4
    part = np.arange(parts)[None, None, :]

    def register(n):
        return np.arange(n)[:, None, None] + 0 * lane + 0 * part

    a, b, d = register(4), register(2), np.arange(4)[:, None, None] + 0 * lane
    if k == 16 and parts == 2:
        i = 2 * a + part
        a_row = group + 8 * ~((i < 2) | ((4 <= i) & (i < 6)))
        a_column = place * 2 + (i & 1) + 8 * (i >= 4)
        i = 2 * b + part
        b_row = place * 2 + (i & 1) + 8 * (i >= 2)
    elif k == 8 and parts == 1:
        a_row = group + 8 * ((a == 1) | (a == 3))
        a_column = place + 4 * (a >= 2)
        b_row = place + 4 * b
    else:
        raise PtxError("this shape is not known here")
    d_row = group + 8 * (d >= 2)
    d_column = place * 2 + (d & 1)
    return _places(a_row, a_column, k), _places(b_row, group + 0 * b_row, 8), _places(d_row, d_column, 8)


@op("mma")
def _mma(machine, instruction):
    shape = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.(\w+)\.f32",
                         ".".join(instruction.opcode))  # fmt: skip
    if shape is None or shape[2] != shape[3]:
        raise PtxError("this matrix product is not known here")
    kind, k = shape[2], int(shape[1])
    parts = 1 if kind == "tf32" else 2
    a_places, b_places, d_places = _fragments(k, parts)
    sizes = {0: 4, 1: 4, 2: 2, 3: 4}
    for i, size in sizes.items():
        if not isinstance(instruction.operands[i], Vector) or len(instruction.operands[i].items) != size:
            raise PtxError(f"operand {i} has not {size} registers")
    target, a, b, c = (o.items for o in instruction.operands)
    a, b = ([machine.source(item, "b32") for item in side] for side in (a, b))
    c = [machine.source(item, "f32") for item in c]
    out = np.zeros((4, machine.threads), np.float32)
    writes = [machine.emit(item, "f32", np.array, out[i]) for i, item in enumerate(target)]

    def elements(registers) -> np.ndarray:
        """(warps, a register's elements of all lanes)."""
        bits = np.stack(registers)  # (registers, threads)
        if kind == "tf32":
            values = (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
        else:
            halves = bits[..., None].view(np.uint16)
            values = bf16_to_f32(halves) if kind == "bf16" else halves.view(np.float16)
        return values.reshape(len(registers), -1, 32, parts).transpose(1, 0, 2, 3).reshape(machine.threads // 32, -1)

    def act(mask):
        left = elements(a)[:, a_places].reshape(-1, 16, k).astype(np.float64)
        right = elements(b)[:, b_places].reshape(-1, k, 8).astype(np.float64)
        before = np.stack(c).reshape(4, -1, 32).transpose(1, 0, 2).reshape(-1, 128)
        sums = (left @ right).reshape(-1, 128) + before[:, d_places]
        after = np.empty_like(before)
        after[:, d_places] = sums
        out[:] = after.reshape(-1, 4, 32).transpose(1, 0, 2).reshape(4, -1)
        for write in writes:
            write(mask)

    return act
