"""How the warps of each kernel access memory, counted by the emulator: shared memory without bank conflicts, global
memory in whole sectors. `pytest tests/cuda/test_accesses.py -k table` prints what was counted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import accesses
import cuda_on_cpu as harness
import pytest
from nvcc import NVCC, compile_ptx

pytestmark = [
    pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not())),
    pytest.mark.timeout(1200),
]

PROGRAM = "tests/cuda_on_cpu/accesses.cpp"
BATCH_NORM = "cuda/batch_norm/batch_norm_sm80.cu"


def count(program, *parts: str) -> list[accesses.Accesses]:
    done = harness.run(program, *parts)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return accesses.read(done.stdout, program)


@pytest.fixture(scope="session")
def counted(shared):
    """What every kernel does on problems of whole tiles."""
    with shared("cuda_race") as folder:
        program = harness.build(folder, "race", [*harness.kernel_sources(), BATCH_NORM], PROGRAM)
    return count(program)


def test_table(counted, record_property):
    record_property("told", accesses.summary(counted))
    assert len({row.kernel for row in counted}) > 50


class Limit(NamedTuple):
    """What kernels take in a file where they take more turns or sectors than the least, all patterns."""

    kernel: str
    where: str
    what: str
    most: float
    why: str


LIMITS = [
    Limit("(fprop|dgrad)_igemm", r"igemm/igemm_pixels\.h", "shared load 16", 2,
          "the epilogue's slab, once a tile: rows 8 banks apart, of which a thread reads 4 at multiples of 8"),
    Limit("fprop_igemm", r"tile/statistics\.h", "shared store 4", 3.67,
          "a thread's statistics, once a block: a warp has parts of several rows"),
    Limit("", r"tile/epilogue\.h", "global load 16", 2,
          "scale and shift, 32 bytes a thread in two loads: the second finds the sectors in the first-level cache"),
    Limit("depthwise", r"depthwise/depthwise\.h", "shared store 4", 5.92,
          "the filters, once a block: they come tap by tap, and go to rows of taps"),
    Limit("depthwise.*planes", r"depthwise/depthwise\.h", "global load [24]", 1.5,
          "the filters of a few planes, once a block: they start and end within a sector"),
    Limit("depthwise.*planes", r"tile/statistics\.h", "shared load 4", 4.5,
          "the parts of a plane's statistics, once a block: rows of one or two columns"),
    Limit("depthwise.*planes", r"tile/statistics\.h", "shared store 4", 3.4, "the same, on their way there"),
    Limit("fprop_depthwise.*planes", r"depthwise/depthwise_fprop_sm80\.cu", "global load [24]", 10.48,
          "an element a thread, a patch's width apart: the other columns find the sectors in the first-level cache"),
    Limit("[dw]grad_depthwise.*planes", r"depthwise/depthwise_patch\.h", "global load [24]", 4.13, "the same"),
    Limit("depthwise.*any", r"depthwise/depthwise_(fprop|backward_any)_sm80\.cu", "global load [248]", 16,
          "the weights of each thread's channel, one by one, from the first-level cache"),
    Limit("wgrad_depthwise.*(window|any)", r"depthwise/depthwise_(patch\.h|backward_any_sm80\.cu)",
          "global store [48]", 8, "a slab of dw, once a block: a tap of each channel, and those lie R*S apart"),
    Limit("batch_norm_stats", r"tile/statistics\.h", "shared load 4", 1.14,
          "the last rows of 8 channels: four parts of a column a warp"),
]  # fmt: skip
# What loads element by element, or has no tensor core to feed, is in the table alone.
HELD = re.compile(r".*_igemm_\w+_\d+x\d+x\d+_sm80|.*_depthwise_.*|batch_norm_.*")


def limit_of(row: accesses.Accesses) -> Limit | None:
    file = row.where.rpartition(":")[0]
    fits = (
        limit
        for limit in LIMITS
        if re.search(limit.kernel, row.kernel)
        and re.fullmatch(limit.where, file)
        and re.fullmatch(limit.what, row.what)
    )
    return next(fits, None)


def beyond(rows: list[accesses.Accesses]) -> list[accesses.Accesses]:
    """Those that take more than they may."""
    held = [row for row in rows if HELD.fullmatch(row.kernel)]
    return [row for row in held if row.excess > (limit.most + 0.005 if (limit := limit_of(row)) else 1)]


def test_banks_and_sectors(counted):
    assert beyond(counted) == [], "\n" + accesses.table(beyond(counted))


def test_limits_are_what_kernels_take(counted):
    """A kernel that has got better has a better limit."""
    most = dict.fromkeys(LIMITS, 0.0)
    for row in filter(lambda row: HELD.fullmatch(row.kernel), counted):
        if limit := limit_of(row):
            most[limit] = max(most[limit], row.excess)
    for limit, taken in most.items():
        assert taken == pytest.approx(limit.most, abs=0.005), limit


# ---- nvcc's code beside g++'s

IGEMM_FPROP = "fprop_igemm_bf16_64x64x64_sm80"
IGEMM = "cuda/igemm/igemm_fprop_sm80.cu", "CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 64x64, , true)"


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found: there is no PTX to count in")
@pytest.mark.parametrize("kernel", [IGEMM_FPROP, "batch_norm_act_bf16"])
def test_nvcc_accesses_memory_alike(tmp_path, counted, kernel):
    """What the emulator puts together of g++'s code is what the interpreter counts of nvcc's, where all 16 bytes of an
    access are one instruction in both. Smaller ones compilers split and join in their own ways."""
    csrc = harness.sources_of(tmp_path, IGEMM_FPROP, *IGEMM)
    source = BATCH_NORM if kernel.startswith("batch_norm") else IGEMM[0]
    library = harness.build(tmp_path / "host", "ptx", [IGEMM[0], BATCH_NORM], PROGRAM, csrc)
    ptx = compile_ptx(csrc, source, "compute_80", tmp_path / "kernels.ptx")
    command = [sys.executable, Path(harness.__file__).with_name("ptx_run.py"), "--count", library, ptx, kernel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    by_nvcc = {}
    for line in done.stdout.splitlines():
        memory, kind, size, *counts = line.split("\t")
        if size == "16":
            by_nvcc[f"{memory} {kind} 16"] = [int(c) for c in counts]
    by_gcc = defaultdict(lambda: [0, 0, 0])
    for row in counted:
        if row.kernel == kernel and row.bytes == 16:
            by_gcc[row.what] = [sum(pair) for pair in zip(by_gcc[row.what], (row.warps, row.turns, row.sectors))]
    assert by_nvcc and by_nvcc == by_gcc


# ---- planted bugs


class Mutant(NamedTuple):
    """An edit that leaves every result as it is, and must be seen here: in `what` of `kernel`."""

    file: str
    old: str
    new: str
    kernel: str
    what: str


MUTANTS = {
    "no_swizzle": Mutant(
        "cuda/tile/gemm.h",
        "row * ROW_BYTES + (chunk ^ turn) * 16",
        "row * ROW_BYTES + (chunk ^ turn * 0) * 16",
        IGEMM_FPROP,
        "shared load 16",
    ),
    "threads_along_pixels": Mutant(
        BATCH_NORM,
        "lane(threadIdx.x % d.lanes),\n        row(threadIdx.x / d.lanes)",
        "lane(threadIdx.x / (kThreads / d.lanes)),\n        row(threadIdx.x % (kThreads / d.lanes))",
        "batch_norm_act_bf16",
        "global load 16",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_seen(tmp_path, shared, name):
    mutant = MUTANTS[name]
    csrc = harness.sources_of(tmp_path, IGEMM_FPROP, *IGEMM)
    file = csrc / mutant.file
    assert file.read_text().count(mutant.old) == 1
    file.write_text(file.read_text().replace(mutant.old, mutant.new))
    with shared("accesses_mutants") as known:  # what the edit does not reach is compiled once
        program = harness.build(tmp_path / "build", "race", [IGEMM[0], BATCH_NORM], PROGRAM, csrc, known)
    rows = [row for row in beyond(count(program, mutant.kernel)) if row.kernel == mutant.kernel]
    assert mutant.what in {row.what for row in rows}, accesses.table(rows)
