"""What a call is expected to take on the CPU: counts of what the kernels and ATen do, times seconds that were measured.

The counts follow from the problem: a native kernel's stand beside it (csrc/core/work.h), ATen's are below. The seconds
are data. A table of them is a JSON file that `convext bench calibrate` writes:

    {"format": 1,
     "machine": {"cpu": "...", "isa": "avx512", "threads": 1, "torch": "2.11.0", "time": "..."},
     "meanings": {...},
     "limits": {"transposed_channels": 4, ...},
     "kernels": {"fprop_direct_f32_avx512": {"call": 2e-6, "product": 1e-11, ...}, ...},
     "aten": {"float32 fprop onednn NHWC": {"call": 1e-5, ...}, ...}}

Those of the package lie in `tables/`. A table of the user's own, in the folder of what was tuned, comes first. What a
table leaves out, the next says: the user's, the package's of this model of CPU, of this instruction set, and of those
below it. One that is broken is refused with a warning, and the next serve.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..problem import ConvProblem, DType, Pass
from . import tuned

FORMAT = 1
PACKAGED = Path(__file__).parent / "tables"
# Of which a CPU that has one has those before it; a table is for one of them.
ISAS = ("portable", "avx2", "avx512")

# What a table counts of kernels': name -> meaning, those of csrc/core/work.h.
KERNEL_TERMS = {
    "call": "a launch, besides",
    "product": "a multiplication and addition of a vector",
    "reload": "one of those that loads an operand which its neighbours load, too",
    "tap": "the address of a tap's pixel, for each panel of columns",
    "gather": "an element or vector that is put in another order before it is multiplied",
    "scatter": "one that is put back",
    "output": "a vector of results that is finished and stored",
    "row": "a vector of sums that is begun anew for a row of outputs",
    "operand": "an element of an activation that is read as it lies",
    "weight": "an element of weights that is read, and packed where they are new at every call",
    "copy": "an element of an activation whose memory order is changed",
    "convert": "an element of an activation whose type is changed",
}
# The same of ATen's. The first seven are of every row.
ATEN_TERMS = {
    "call": "a call, besides",
    "product": "a multiplication and addition of a block of result channels",
    "deep": "one of a block of the channels that are summed over",
    "output": "a block of channels of a pixel of the result",
    "x": "an element of x",
    "y": "an element of y",
    "weight": "an element of the weights",
    "column": "an element of the matrix that a convolution is unfolded into",
    "image": "an image",
    "group": "a group of an image",
    "flop": "a multiplication and addition",
    "full": "a multiplication and addition of blocks of channels on both sides",
    "tap": "a tap of an output pixel",
}
_UNMEASURED = 1e-6  # seconds of a term of a kernel that no table speaks of: one that was measured is preferred
_NEVER = 1.0  # of a kernel that another always beats
_EVERY = ("call", "product", "deep", "output", "x", "y", "weight")
_BLOCK = 16  # channels that oneDNN and MKL lay side by side
_ONEDNN_LEAST = 20480  # elements of x: see `aten_row`

# Numbers that no kernel's work says: name -> meaning. At and below a number of channels, filters, columns or FLOP,
# ATen's kernels were measured to win.
LIMITS = {
    "bfloat16_pixels": "of an output: with more, products in float32 lose to those of bfloat16",
    "transposed_channels": "channels of a transposed convolution's result",
    "volume_columns": "result channels a group of a volume's filter, where ATen has oneDNN's kernels",
    "volume_channels": "channels of x, of a volume's weight gradient, where ATen has oneDNN's kernels",
    "volume_filters": "filters of a volume's dgrad in NDHWC, where ATen has oneDNN's kernels",
    "volume_pointwise_filters": "filters of 1x1x1 over NCDHW, which ATen multiplies as it lies; not of dgrad",
    "volume_pointwise_channels_fprop": "channels of x under filters of 1x1x1 over NCDHW",
    "volume_pointwise_channels_dgrad": "the same for the gradient of x",
    "volume_pointwise_channels_wgrad": "the same for the gradient of the weights",
    "volume_pointwise_flops": "FLOP of a forward pass of filters of 1x1x1 over NCDHW",
    "call_saving": "seconds that a forward pass which convext/_call serves takes a kernel less, beside ATen",
    "candidates": "kernels that are worth measuring beside the one that is expected to be fastest",
    "within_reach": "times the fastest's expected seconds, up to which they are",
}
_MACHINE = ("cpu", "isa", "threads", "torch", "time")


class Table(NamedTuple):
    """Seconds of one of each term: of kernels by name, of ATen's ways by row; numbers that neither says."""

    machine: dict[str, Any]
    limits: dict[str, float]
    kernels: dict[str, dict[str, float]]
    aten: dict[str, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        about = {f"kernels.{term}": f"seconds: {meaning}" for term, meaning in KERNEL_TERMS.items()}
        about |= {f"aten.{term}": f"seconds: {meaning}" for term, meaning in ATEN_TERMS.items()}
        about |= {f"limits.{name}": meaning for name, meaning in LIMITS.items()}
        return {"format": FORMAT, "machine": self.machine, "meanings": about, "limits": self.limits,
                "kernels": dict(sorted(self.kernels.items())), "aten": dict(sorted(self.aten.items()))}  # fmt: skip


# ---- tables


def native_terms() -> tuple[str, ...]:
    """Names of the terms of a native kernel's work; none without the compiled library."""
    from . import native

    return () if native._C is None else tuple(native._C.work_terms())


def parse(found: object) -> Table:
    """A table out of a JSON file's contents. Raises ValueError, which says what is wrong with it and where."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    machine = found.get("machine")
    if not isinstance(machine, dict) or not all(name in machine for name in _MACHINE):
        raise ValueError(f"machine lacks some of {', '.join(_MACHINE)}")
    if machine["isa"] not in ISAS:
        raise ValueError(f"machine.isa is {machine['isa']!r}, expected one of {', '.join(ISAS)}")
    limits = _numbers("limits", found.get("limits"), LIMITS)
    kernels, aten = (
        {row: _numbers(f"{part}.{row}", terms, known) for row, terms in _rows(part, found.get(part)).items()}
        for part, known in (("kernels", KERNEL_TERMS), ("aten", ATEN_TERMS))
    )
    return Table(machine, limits, kernels, aten)


def _rows(part: str, found: object) -> dict[str, object]:
    if not isinstance(found, dict):
        raise ValueError(f"{part} is missing or no object")
    return found


def _numbers(where: str, found: object, known: Iterable[str]) -> dict[str, float]:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is missing or no object")
    names = set(known)
    for name, value in found.items():
        if name not in names:
            raise ValueError(f"{where}.{name} is unknown, expected some of {', '.join(sorted(names))}")
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{where}.{name} is {value!r}, expected a finite number that is not negative")
    return {name: float(value) for name, value in found.items()}


def read(path: Path) -> Table:
    """The table of a file. Raises ValueError where it is none, OSError where it cannot be read."""
    try:
        return parse(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no table of costs: {error}") from None


def isa_class(isa: str) -> str:
    """The instruction set whose tables speak of one of `_C.isa()`'s names."""
    return next((name for name in reversed(ISAS) if isa.startswith(name)), ISAS[0])


def _isa() -> str:
    from . import native

    return native.isa()


def user_path() -> Path | None:
    """Where this user's table of this CPU's model is kept, or None where there is no such place."""
    folder = tuned.cache_folder()
    if folder is None:
        return None
    about = f"{tuned.cpu_name()} {isa_class(_isa())}".encode()
    return folder / f"costs-{hashlib.sha256(about).hexdigest()[:16]}.json"


def _chain() -> list[tuple[Path, Table]]:
    """The tables that count here, the first before the others."""
    cpu, isa = tuned.cpu_name(), isa_class(_isa())
    found: list[tuple[Path, Table]] = []
    own = user_path()
    if own is not None and own.exists():
        try:
            table = read(own)
            there = table.machine["cpu"], table.machine["isa"]
            if there != (cpu, isa):
                raise ValueError(f"{own} was measured on {there[0]}, {there[1]}, and this is {cpu}, {isa}")
            found.append((own, table))
        except (ValueError, OSError) as error:
            warnings.warn(f"convext: {error}; the package's tables count instead", stacklevel=3)
    packaged = [(path, read(path)) for path in sorted(PACKAGED.glob("*.json"))]
    found += [one for one in packaged if (one[1].machine["cpu"], one[1].machine["isa"]) == (cpu, isa)]
    for name in reversed(ISAS[: ISAS.index(isa) + 1]):
        # The one that is for all of an instruction set bears its name.
        found += [one for one in packaged if one[0].stem == name and one not in found]
    return found


def merged(tables: Iterable[Table]) -> Table:
    """One table, in which each row and limit is that of the first table that has it."""
    limits: dict[str, float] = {}
    kernels: dict[str, dict[str, float]] = {}
    aten: dict[str, dict[str, float]] = {}
    machine: dict[str, Any] = {}
    for table in reversed(list(tables)):
        machine = table.machine
        limits |= table.limits
        kernels |= table.kernels
        aten |= table.aten
    return Table(machine, limits, kernels, aten)


_given: list[Table] = []  # by `use`
_tables: dict[str, Table] = {}  # by instruction set
_handed: list[str] = []  # of which the compiled library has the seconds


def table() -> Table:
    """What counts under the instruction set in use, handed to the compiled library as well."""
    isa = _isa()
    found = _tables.get(isa)
    if found is None:
        found = _tables[isa] = merged([*_given, *(one for _, one in _chain())])
    if _handed[:1] != [isa]:
        _hand_over(found.kernels)
        _handed[:] = [isa]
    return found


def sources() -> list[str]:
    """The files that count, the first before the others."""
    return [str(path) for path, _ in _chain()]


def use(given: Table | None) -> None:
    """Has a table come before all others, or none: for measurements and tests."""
    _given[:] = [] if given is None else [given]
    forget()


def forget() -> None:
    """Has tables read anew, and drops whatever was selected by those of before."""
    from .. import backends
    from . import native

    _tables.clear()
    _handed.clear()
    native.forget_plans()
    backends.forget()


def compared_isas() -> tuple[str, ...]:
    """The instruction set in use and the next below. Half a vector can be the better fit; a quarter never was, and is
    neither measured nor chosen where a wider one takes the problem, as the direct kernels of each take any."""
    return ISAS[: ISAS.index(isa_class(_isa())) + 1][-2:]


def _hand_over(kernels: Mapping[str, Mapping[str, float]]) -> None:
    from . import native

    terms, compared, known = native_terms(), compared_isas(), native.kernels()
    # What the library does to operands before any kernel sees them, by what a kernel is for.
    staging = {
        (kernel["pass"], kernel["dtype"], kernel["isa"]): kernels[kernel["name"]]
        for kernel in known
        if kernel["algorithm"] == "direct" and kernel["name"] in kernels
    }
    seconds = []
    for kernel in known:
        if isa_class(kernel["isa"]) not in compared:
            seconds.append([_NEVER] * len(terms))
            continue
        row = kernels.get(kernel["name"])
        if row is None:
            staged = staging.get((kernel["pass"], kernel["dtype"], kernel["isa"]), {})
            row = dict.fromkeys(terms, _UNMEASURED) | {term: staged.get(term, 0.0) for term in ("copy", "convert")}
        seconds.append([row.get(term, 0.0) for term in terms])
    native._C.set_costs(seconds)


# ---- ATen


def aten_row(pass_: Pass, p: ConvProblem) -> str:
    """The row that speaks of what ATen does for a pass over images on one thread. With more it takes oneDNN's
    kernels for some small 1x1 filters, too; but who serves, and so the result's last bits, must not depend on that.

    In float32 it takes oneDNN's kernels, or unfolds and multiplies (torch/csrc's use_mkldnn, in
    aten/src/ATen/native/Convolution.cpp): tests/backends/test_costs.py compares with what torch says."""
    strided = not p.is_unit_stride or p.dil_h > 1 or p.dil_w > 1
    suits = strided or p.n >= 16 or not p.is_pointwise
    large = p.groups > 1 or (p.r > 3 and p.s > 3) or p.n > 1 or p.x_size > _ONEDNN_LEAST
    onednn = p.dtype is DType.BFLOAT16 or p.dtype is DType.FLOAT32 and suits and large
    if onednn:
        how = "onednn_depthwise" if p.is_depthwise and p.groups > 1 else "onednn_groups" if p.groups > 1 else "onednn"
    else:
        how = ("gemm1x1" if p.is_pointwise else "gemm") + ("_groups" if p.groups > 1 else "")
    return f"{p.dtype.name.lower()} {pass_.name.lower()} {how} {p.x_layout.name}"


def aten_work(pass_: Pass, p: ConvProblem) -> tuple[str, dict[str, float]]:
    """(row, counts by term) of what ATen does for a pass over images on the CPU."""
    row = aten_row(pass_, p)
    dgrad = pass_ is Pass.DGRAD
    columns, depth = (p.c_per_group, p.k_per_group) if dgrad else (p.k_per_group, p.c_per_group)
    how = row.split(" ")[2]
    pixel_taps: float = p.npq * p.r * p.s
    if how.startswith("onednn"):  # its kernels skip taps that meet padding
        pixel_taps *= _inside(p.h, p.p, p.r, p.stride_h, p.pad_h, p.dil_h)
        pixel_taps *= _inside(p.w, p.q, p.s, p.stride_w, p.pad_w, p.dil_w)
    work: dict[str, float] = dict.fromkeys(_EVERY, 1.0)
    work["product"] = pixel_taps * p.groups * depth * _blocks(columns)
    work["deep"] = pixel_taps * p.groups * columns * _blocks(depth)
    work["output"] = (p.n * p.h * p.w if dgrad else p.npq) * p.groups * _blocks(columns)
    work["x"], work["y"], work["weight"] = p.x_size, p.y_size, p.w_size
    if how.startswith("gemm"):
        work |= {"column": pixel_taps * p.c, "image": p.n, "group": p.n * p.groups, "flop": p.flops / 2}
    elif how == "onednn_groups":
        work |= {"column": pixel_taps * p.c, "group": p.n * p.groups, "flop": pixel_taps * p.k * p.c_per_group}
    elif how == "onednn":
        work |= {"full": pixel_taps * _blocks(p.c) * _blocks(p.k) * _BLOCK, "tap": pixel_taps}
    return row, {term: float(count) for term, count in work.items()}


def _inside(extent: int, out: int, taps: int, stride: int, pad: int, dilation: int) -> float:
    """Share of an axis' taps that meet the input and not the padding, over all outputs."""
    met = 0
    for tap in range(taps):
        shift = tap * dilation - pad  # 0 <= i * stride + shift < extent
        first, last = max(0, -(shift // stride)), min(out - 1, (extent - 1 - shift) // stride)
        met += max(0, last - first + 1)
    return met / (out * taps)


def _blocks(channels: int) -> int:
    return -(-channels // _BLOCK)


def aten_seconds(pass_: Pass, p: ConvProblem) -> float | None:
    """What ATen is expected to take for a pass over images on the CPU; None where no table says."""
    row, work = aten_work(pass_, p)
    seconds = table().aten.get(row)
    return None if seconds is None else sum(count * seconds.get(term, 0.0) for term, count in work.items())
