"""What nvcc makes of the kernels, executed: the text of the assembly, the order of its operands, what the front end
does with the rest. g++, which compiles the same sources for the emulator, sees none of that. The interpreter is
tests/support/ptx*.py; its own tests are in test_ptx_machine.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu as harness
import numpy as np
import pytest
from nvcc import NVCC, compile_ptx
from ptx import Module, PtxError
from ptx_machine import Memory, launch

CSRC = harness.CSRC
FUNCTIONS = "tests/ptx_functions.cu"
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found: there is no PTX to run"),
    pytest.mark.timeout(1200),
]
RNG = np.random.default_rng(0)


# ---- each function of csrc/cuda/ptx/


class Out:
    """An array that a kernel fills."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, np.dtype(dtype)


RAN: dict[int, set[str]] = {}  # by module


def call(module: Module, name: str, *arguments) -> list[np.ndarray]:
    """One warp runs the kernel on arrays, numbers and Outs; what the latter hold then."""
    memory, parameters, outs = Memory(), b"", []
    for argument in arguments:
        if isinstance(argument, int):
            parameters += np.int32(argument).tobytes()
            continue
        if isinstance(argument, Out):
            address = memory.put(np.full(argument.shape, 0xFF, f"u{argument.dtype.itemsize}"), writable=True)
            outs.append((address, argument))
        else:
            address = memory.put(argument)
        parameters += np.uint64(address).tobytes()
    ran = launch(module.kernel(name), (1, 1, 1), (32, 1, 1), 2048, parameters, memory)
    RAN.setdefault(id(module), set()).update(ran)
    return [memory.read(address, o.dtype, int(np.prod(o.shape))).reshape(o.shape) for address, o in outs]


def words(*shape) -> np.ndarray:
    return RNG.integers(0, 2**32, shape, np.uint32)


def check_copy(module: Module):
    given = words(32, 4)
    for count in (32, 20, 0):
        (got,) = call(module, "copy", given, Out((32, 4), "u4"), count)
        copied = np.where(np.arange(32)[:, None] < count, given, 0)
        np.testing.assert_array_equal(got, copied[np.arange(32) ^ 1])


def check_copy_groups(module: Module):
    given = words(64, 4)
    (got,) = call(module, "copy_groups", given, Out((96, 4), "u4"))
    np.testing.assert_array_equal(got[:32], given[:32])
    assert (got[32:64] == 0xFFFFFFFF).all(), "the younger group has not been waited for"
    np.testing.assert_array_equal(got[64:], given[32:])


def check_words(module: Module):
    given = words(32, 4)
    (got,) = call(module, "words", given, Out((32, 4), "u4"))
    np.testing.assert_array_equal(got, given)


def check_pairs(module: Module):
    given = words(32, 4)
    (got,) = call(module, "pairs", given, Out((32, 4), "u4"))
    np.testing.assert_array_equal(got, given[np.arange(32) ^ 1])


def check_tf32(module: Module):
    """The nearest number with 10 bits behind the point, ties away from zero."""
    ulp = 2.0**-10
    given = np.array([1, 1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.4999 * ulp, -1 - ulp / 2, 2 - ulp / 4, 0, -0.0, 3e38,
                      np.inf, -np.inf, *RNG.normal(size=21)], np.float32)  # fmt: skip
    (got,) = call(module, "tf32", given, Out((32,), "f4"))
    significand, exponent = np.frexp(given.astype(np.float64))
    scaled = np.abs(significand) * 2**11
    wanted = np.where(np.isinf(given), given, np.sign(given) * np.floor(scaled + 0.5) * 2.0 ** (exponent - 11))
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


def small(*shape) -> np.ndarray:
    """Whole numbers whose products and sums every type holds, so that results are exact."""
    return RNG.integers(-8, 9, shape).astype(np.float32)


def check_product(module: Module, kind: str):
    a, b, c = small(16, 16), small(16, 16), small(16, 16)
    held = (
        (lambda v: v.astype(np.float16)) if kind == "f16" else (lambda v: (v.view(np.uint32) >> 16).astype(np.uint16))
    )
    by_rows, by_columns = call(module, f"product_{kind}", held(a), held(b), held(np.ascontiguousarray(b.T)), c,
                               Out((16, 16), "f4"), Out((16, 16), "f4"))  # fmt: skip
    np.testing.assert_array_equal(by_rows, c + a @ b)
    np.testing.assert_array_equal(by_columns, c + a @ b)


def check_product_tf32(module: Module):
    a, b, c = small(16, 8), small(8, 8), small(16, 16)
    (got,) = call(module, "product_tf32", a, b, c, Out((16, 16), "f4"))
    np.testing.assert_array_equal(got[:, :8], (c[:, :8] + a @ b))


CHECKS = {
    "copy": check_copy,
    "copy_groups": check_copy_groups,
    "words": check_words,
    "pairs": check_pairs,
    "tf32": check_tf32,
    "product_bf16": lambda module: check_product(module, "bf16"),
    "product_f16": lambda module: check_product(module, "f16"),
    "product_tf32": check_product_tf32,
}
ARCHS = ["compute_80", "compute_90"]


@pytest.fixture(scope="session")
def functions(shared):
    """functions(arch): the kernels of ptx_functions.cu, compiled once."""
    modules = {}

    def get(arch: str) -> Module:
        if arch not in modules:
            with shared("ptx_functions") as folder:
                modules[arch] = Module(compile_ptx(CSRC, FUNCTIONS, arch, folder / f"{arch}.ptx").read_text())
        return modules[arch]

    return get


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CHECKS)
def test_functions_do_what_they_say(functions, arch, name):
    CHECKS[name](functions(arch))


HEADERS = sorted((CSRC / "cuda" / "ptx").glob("*.h"))


def test_every_function_is_called():
    text = (CSRC / FUNCTIONS).read_text()
    names = {name for header in HEADERS for name in re.findall(r"CONVEXT_DEVICE \w+ (\w+)\(", header.read_text())}
    assert len(names) >= 12
    assert [name for name in sorted(names) if not re.search(rf"\bptx::{name}\b", text)] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_every_line_of_assembly_runs(functions, arch):
    module = functions(arch)
    for check in CHECKS.values():
        check(module)
    written = {
        opcode
        for header in HEADERS
        for opcode in re.findall(r'(?:asm(?: volatile)?|CONVEXT_MMA)\(\s*"([a-z]\w*\.[\w.]*)', header.read_text())
    }
    assert len(written) >= 12
    assert written - RAN[id(module)] == set()


# (header, what stands there, what a slip of the pen makes of it, the check that must see it)
SLIPS = {
    "fragments_swapped": ("ldmatrix.h", 'x4.shared.b16 {%0, %1, %2, %3}, [%4];"',
                          'x4.shared.b16 {%0, %2, %1, %3}, [%4];"', "product_bf16"),
    "not_transposed": ("ldmatrix.h", "m8n8.x4.trans.shared", "m8n8.x4.shared", "product_f16"),
    "rows_swapped": ("mma.h", "{%4, %5, %6, %7}", "{%5, %4, %6, %7}", "product_bf16"),
    "halves_of_b_swapped": ("mma.h", "{%8, %9}", "{%9, %8}", "product_tf32"),
    "sums_swapped": ("mma.h", "{%0, %1, %2, %3};", "{%0, %1, %3, %2};", "product_f16"),
    "sums_forgotten": ("mma.h", '"+f"(d[0]), "+f"(d[1])', '"=f"(d[0]), "=f"(d[1])', "product_bf16"),
    "another_type": ("mma.h", "f32.f16.f16.f32", "f32.bf16.bf16.f32", "product_f16"),
    "words_swapped_on_the_way_in": ("shared.h", "[%0], {%1, %2, %3, %4}", "[%0], {%1, %2, %4, %3}", "words"),
    "words_swapped_on_the_way_out": ("shared.h", "v4.b32 {%0, %1, %2, %3}", "v4.b32 {%1, %0, %2, %3}", "copy"),
    "pair_swapped_on_the_way_in": ("shared.h", "[%0], {%1, %2};", "[%0], {%2, %1};", "pairs"),
    "pair_swapped_on_the_way_out": ("shared.h", "v2.b32 {%0, %1}", "v2.b32 {%1, %0}", "pairs"),
    "words_swapped_to_global": ("global.h", "{%1, %2, %3, %4}", "{%1, %3, %2, %4}", "copy"),
    "size_forgotten": ("cp_async.h", "[%0], [%1], 16, %2", "[%0], [%1], 16", "copy"),
    "waits_for_another_group": ("cp_async.h", "wait_group %0;", "wait_group 1;", "copy"),
    "waits_for_all": ("cp_async.h", "cp.async.wait_group %0;", "cp.async.wait_group 0;", "copy_groups"),
    "no_group": ("cp_async.h", "cp.async.commit_group;", "", "copy_groups"),
    "rounds_down": ("mma.h", "cvt.rna.tf32.f32 %0, %1;", "and.b32 %0, %1, 0xFFFFE000;", "tf32"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_a_line_of_assembly_is_seen(tmp_path, slip):
    header, old, new, check = SLIPS[slip]
    csrc = tmp_path / "csrc"
    for folder in ("core", "cuda/ptx"):
        shutil.copytree(CSRC / folder, csrc / folder)
    for name in ("compat.h", "runtime.h"):
        shutil.copy(CSRC / "cuda" / name, csrc / "cuda")
    (csrc / "tests").mkdir()
    shutil.copy(CSRC / FUNCTIONS, csrc / FUNCTIONS)
    file = csrc / "cuda" / "ptx" / header
    assert file.read_text().count(old) == 1, f"{old} is {file.read_text().count(old)} times in {header}"
    file.write_text(file.read_text().replace(old, new))
    module = Module(compile_ptx(csrc, FUNCTIONS, "compute_80", tmp_path / "slip.ptx").read_text())
    with pytest.raises((AssertionError, PtxError)):
        CHECKS[check](module)


# ---- whole kernels

EMULATOR = pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not()))
BATCH_NORM = "cuda/batch_norm/batch_norm_sm80.cu"


def run(folder: Path, csrc: Path, source: str, main: str, *arguments: str) -> subprocess.CompletedProcess:
    """The test program `main`, its kernels from nvcc's PTX of `source`."""
    library = harness.build(folder / "host", "ptx", [source], main, csrc)
    ptx = compile_ptx(csrc, source, "compute_80", folder / "kernels.ptx")
    command = [sys.executable, Path(harness.__file__).with_name("ptx_run.py"), library, ptx, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


FPROP, DGRAD, WGRAD = (f"cuda/igemm/igemm_{name}_sm80.cu" for name in ("fprop", "dgrad", "wgrad"))
TILE_64x64 = "CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 64x64, , true)"
DEPTHWISE, BACKWARD = "cuda/depthwise/depthwise_fprop_sm80.cu", "cuda/depthwise/depthwise_backward_{}_sm80.cu"

# Variant -> its source, its instance there (harness.sources_of), and small named cases with borders and a rest.
WHOLE = {
    "fprop_igemm_bf16_64x64x64_sm80": (FPROP, TILE_64x64, ["direct_3x3", "grouped_stride_2"]),
    "fprop_igemm_f16_128x64x64_sm80": (FPROP, "CONVEXT_IGEMM(cuda::fp16, f16, 64, Tile, 128x64, , true)",
                                       ["direct_3x3_stride_2"]),
    "dgrad_igemm_bf16_64x64x64_sm80": (DGRAD, TILE_64x64, ["direct_3x3", "direct_3x3_stride_2"]),
    "wgrad_igemm_bf16_64x64x64_sm80": (WGRAD, TILE_64x64, ["direct_3x3"]),
    "wgrad_igemm_tf32_64x32x32_sm80": (WGRAD, "CONVEXT_IGEMM(float, tf32, 32, Tile, 64x32, , true)", ["grouped"]),
    "fprop_depthwise_bf16_window_sm80": (DEPTHWISE, None, ["depthwise_3x3", "depthwise_3x3_stride_2_odd_image"]),
    "wgrad_depthwise_bf16_window_sm80": (BACKWARD.format("window"), None, ["depthwise_3x3"]),
    "dgrad_depthwise_bf16_planes_sm80": (BACKWARD.format("planes"), None, ["depthwise_nchw"]),
    "wgrad_depthwise_bf16_any_sm80": (BACKWARD.format("any"), None, ["depthwise_dilated"]),
    "fprop_simt_f32_64x64x16_sm80": ("cuda/simt/simt_sm80.cu", None, ["grouped_small_groups"]),
}  # fmt: skip


@EMULATOR
@pytest.mark.parametrize("variant", WHOLE)
def test_kernels(tmp_path, variant):
    source, instance, names = WHOLE[variant]
    csrc = harness.sources_of(tmp_path, variant, source, instance)
    cases = [word for name in names for word in ("--case", name)]
    done = run(tmp_path, csrc, source, "tests/cuda_variants.cpp", variant, *cases)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    runs = int(re.search(r"(\d+) runs, 0 failures", done.stdout)[1])
    assert runs == 3 * len(names)  # one for each of the emulator's policies, with an epilogue of its own


@EMULATOR
def test_batch_norm(tmp_path):
    cases = ["--case", "channels_last_vector", "--case", "contiguous"]
    done = run(tmp_path, CSRC, BATCH_NORM, "tests/cuda_batch_norm.cpp", "--one-order", *cases)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"\d{4,} checks, 0 failures", done.stdout)


@EMULATOR
def test_a_slip_in_a_kernels_assembly_is_seen(tmp_path):
    """In a whole kernel, too: what the micro-kernels see is not theirs alone."""
    variant = "fprop_igemm_bf16_64x64x64_sm80"
    source, instance, _ = WHOLE[variant]
    csrc = harness.sources_of(tmp_path, variant, source, instance)
    file = csrc / "cuda" / "ptx" / "ldmatrix.h"
    file.write_text(file.read_text().replace("x4.shared.b16 {%0, %1,", "x4.shared.b16 {%1, %0,"))
    done = run(tmp_path, csrc, source, "tests/cuda_variants.cpp", variant, "--case", "direct_3x3")
    assert done.returncode == 1 and "direct_3x3" in done.stdout, (done.stdout + done.stderr)[-4000:]
