"""The machine code of the CUDA kernels, read without a GPU: registers, occupancy, what a loop issues, promises.

`read` disassembles a library or a cubin with the toolkit's cuobjdump and nvdisasm, or with Triton's copies of them.
What a kernel promises stands in its source as lines that begin with ``// @sass``:

    // @sass igemm_pixels<Tile<.*, 128, 128, .*, true> shared=73792 warps=16 per_mma=2.8

a regular expression for the kernels' names, as `name` writes them, then `key=value` pairs:

    shared    bytes of dynamic shared memory of a launch; occupancy follows from it
    warps     on a multiprocessor, at least; warps_sm_80 where sm_80 holds fewer
    per_mma   instructions of the main loop for each matrix instruction, at most
    loads     bytes of every load from global memory in a loop, at least
    stores    the same of stores
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import site
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..problem import ConvProblem, DType, Layout, Pass
from .problems import title
from .tables import Grid


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared: int  # bytes; each block takes RESERVED more than it asks for
    registers: int = 65536


RESERVED = 1024
LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_86": Limits(48, 16, 100 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
}
# Which machine code runs where: sm_86 and sm_89 take that of sm_80.
RUNS_ON = {"sm_80": ("sm_80", "sm_86", "sm_89"), "sm_90": ("sm_90",)}

# Of one multiprocessor, per clock. Issue: one instruction for each of four schedulers; shared memory: 32 banks of four
# bytes (CUDA C++ Programming Guide, "Compute Capability 8.x", "9.0"). Multiply-adds of mma.sync: 1024 dense ones of 16
# bits on A100 (its white paper: 312 TFLOP/s of 108 multiprocessors at 1410 MHz); on H100 2048, of which mma.sync gets
# 62 % (Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", 2024).
SCHEDULERS, SHARED_BYTES = 4, 128
MULTIPLY_ADDS = {"sm_80": 1024.0, "sm_90": 0.62 * 2048}

# Pipes, by the first part of an opcode; everything else that begins with U is the uniform data path.
PIPES = {
    "tensor": {"HMMA", "IMMA", "DMMA", "BMMA", "HGMMA"},
    "ldsm": {"LDSM"},
    "shared": {"LDS", "STS", "ATOMS", "SHFL"},
    "copy": {"LDGSTS", "UTMALDG"},
    "global": {"LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG", "CCTL"},
    "local": {"LDL", "STL"},
    "barrier": {"BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "MEMBAR", "ERRBAR", "SYNCS"},
    "branch": {"BRA", "BRX", "JMP", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "NOP", "YIELD", "KILL"},
    "special": {"S2R", "S2UR", "CS2R", "MUFU"},
    "float": {
        *(
            "FADD",
            "FMUL",
            "FFMA",
            "FSETP",
            "FSEL",
            "FMNMX",
            "FCHK",
            "FSET",
            "FRND",
            "F2F",
            "F2FP",
            "F2I",
            "I2F",
            "I2FP",
        ),
        *("HADD2", "HMUL2", "HFMA2", "HSETP2", "HMNMX2", "DADD", "DMUL", "DFMA", "DSETP"),
    },
    "uniform": {"R2UR", "LDC", "VOTEU"},
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code. `target`: the index that a branch goes to."""

    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    text: str
    target: int | None = None

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        return _PIPE_OF.get(self.base) or ("uniform" if self.base.startswith("U") else "integer")

    @property
    def bytes(self) -> int:
        """Width of a load or store for one thread."""
        for part in self.opcode.split(".")[1:]:
            if part in ("128", "64"):
                return int(part) // 8
            if part in ("U8", "S8", "U16", "S16"):
                return int(part[1:]) // 8
        return 4


@dataclass(frozen=True)
class Tile:
    """csrc/cuda/tile/gemm.h's, as a kernel's name has it."""

    element: str
    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int
    blocks: int
    row_bytes: int

    @property
    def bits(self) -> int:
        return 32 if self.element == "float" else 16

    @property
    def block_k(self) -> int:
        return self.row_bytes * 8 // self.bits

    @property
    def warp_mmas(self) -> int:
        """Matrix instructions of a warp in a stage: 16 x 8 results and 32 bytes of the reduction each."""
        return self.block_m // self.warps_m // 16 * (self.block_n // self.warps_n // 8) * (self.row_bytes // 32)

    @property
    def rounds_wait(self) -> bool:
        """Whether a round of the main loop brings in a stage, and waits for one; with one stage it only multiplies."""
        return self.stages > 1

    @property
    def shared_traffic(self) -> int:
        """Bytes that pass through shared memory for a stage: in once, and out once for each warp that needs them."""
        fragments = self.block_m * self.warps_n + self.block_n * self.warps_m
        return (fragments + self.block_m + self.block_n) * self.row_bytes


@dataclass(frozen=True)
class Loop:
    """Instructions [first, last] of a kernel without those of loops inside."""

    kernel: Kernel = field(repr=False, compare=False)
    first: int
    last: int

    @cached_property
    def inner(self) -> list[Loop]:
        inside = [o for o in self.kernel.loops if self.first <= o.first and o.last <= self.last and o != self]
        return [o for o in inside if not any(o != p and p.first <= o.first and o.last <= p.last for p in inside)]

    @cached_property
    def instructions(self) -> list[Instruction]:
        skip = {i for o in self.inner for i in range(o.first, o.last + 1)}
        return [self.kernel.instructions[i] for i in range(self.first, self.last + 1) if i not in skip]

    def count(self, *pipes: str) -> int:
        return sum(i.pipe in pipes for i in self.instructions)

    def holds(self, pipe: str) -> bool:
        """Whether it, or a loop inside, has instructions of the pipe."""
        return any(i.pipe == pipe for i in self.kernel.instructions[self.first : self.last + 1])

    def by_pipe(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for instruction in self.instructions:
            found[instruction.pipe] = found.get(instruction.pipe, 0) + 1
        return found


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    symbol: str
    name: str  # demangled, without its namespaces and arguments
    arch: str
    registers: int
    stack: int  # bytes: spills and arrays with an index
    shared: int  # bytes of static shared memory
    threads: int  # of a block, at most
    instructions: list[Instruction] = field(repr=False)

    @cached_property
    def loops(self) -> list[Loop]:
        """Every stretch that a branch goes back over, the innermost for each first instruction merged."""
        last: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            if instruction.target is not None and instruction.target < i:  # one that stays is the end of the code
                last[instruction.target] = i
        return [Loop(self, first, end) for first, end in sorted(last.items())]

    @cached_property
    def main_loop(self) -> Loop | None:
        """The loop over the stages: the smallest that holds matrix instructions and waits at a barrier, or None. With
        one stage, the smallest with matrix instructions."""
        waits = self.tile is None or self.tile.rounds_wait
        found = [loop for loop in self.loops if loop.holds("tensor") and (loop.holds("barrier") or not waits)]
        return min(found, key=lambda loop: loop.last - loop.first, default=None)

    @cached_property
    def tile(self) -> Tile | None:
        """The tile that a matrix-product kernel names among its template arguments, or None."""
        found = re.search(r"Tile<(\w+)" + r", (\d+)" * 7 + r"\b", self.name)
        return Tile(found[1], *(int(n) for n in found.groups()[1:])) if found else None

    @cached_property
    def step(self) -> dict[str, float]:
        """What a warp issues in one round of the main loop, by pipe. A loop of matrix instructions inside, over the mma
        steps of a stage, counts as often as it runs; others, over taps that end and pixels that are skipped, run seldom
        and count for nothing."""
        if self.main_loop is None or self.tile is None:
            return {}
        counts: dict[str, float] = dict(self.main_loop.by_pipe())
        left = self.tile.warp_mmas - counts.get("tensor", 0)
        for loop in self.main_loop.inner:
            if matrix := loop.count("tensor"):
                for pipe, count in loop.by_pipe().items():
                    counts[pipe] = counts.get(pipe, 0) + count * left / matrix
        return counts

    @property
    def per_mma(self) -> float | None:
        """Instructions of the main loop for each matrix instruction."""
        return sum(self.step.values()) / self.step["tensor"] if self.step.get("tensor") else None

    def cycles(self) -> dict[str, float]:
        """The least cycles of a multiprocessor for one round of the main loop of one block, by what bounds it."""
        tile = self.tile
        if tile is None or not self.step:
            return {}
        warps = tile.warps_m * tile.warps_n
        return {
            "issue": sum(self.step.values()) * warps / SCHEDULERS,
            "tensor": tile.block_m
            * tile.block_n
            * tile.block_k
            / (MULTIPLY_ADDS[self.arch] * (1 if tile.bits == 16 else 0.5)),
            "shared": (tile.shared_traffic if tile.rounds_wait else self.shared_reads * warps) / SHARED_BYTES,
        }

    @property
    def shared_reads(self) -> int:
        """Bytes that a warp's loads in a main loop without loops inside take out of shared memory."""
        loads = self.main_loop.instructions if self.main_loop else []
        return sum(512 if i.base == "LDSM" else 32 * i.bytes for i in loads if i.base in ("LDS", "LDSM"))

    @cached_property
    def loop_accesses(self) -> list[Instruction]:
        """The accesses to global memory in loops, copies to shared memory among them."""
        inside = {i for loop in self.loops for i in range(loop.first, loop.last + 1)}
        return [i for at, i in enumerate(self.instructions) if at in inside and i.pipe in ("global", "copy")]

    def warps(self, dynamic: int, where: str | None = None) -> int:
        """Warps that a multiprocessor holds with `dynamic` bytes of shared memory a block."""
        return self.blocks(dynamic, where) * (self.threads // 32)

    def blocks(self, dynamic: int, where: str | None = None) -> int:
        limits, warps = LIMITS[where or self.arch], -(-self.threads // 32)
        registers = -(-self.registers // 8) * 8 * 32 * warps  # allocated in units of 256 a warp
        shared = self.shared + dynamic
        if self.arch != "sm_90":  # whose compiler counts the reserved part
            shared += RESERVED
        return min(limits.registers // registers, limits.warps // warps, limits.blocks, limits.shared // max(1, shared))


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy that Triton's wheel brings."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders += [Path(p) / "triton" / "backends" / "nvidia" / "bin" for p in site.getsitepackages()]
    found = (str(folder / name) for folder in folders if (folder / name).exists())
    return next(found, None) or shutil.which(name)


def why_not() -> str | None:
    """Why machine code cannot be read here, or None."""
    missing = [name for name in ("cuobjdump", "nvdisasm", "c++filt") if tool(name) is None]
    return f"{', '.join(missing)} not found: install Triton or the CUDA toolkit, and binutils" if missing else None


def _run(*command: object, input_: str | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, input=input_, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def read(path: Path) -> list[Kernel]:
    """Every kernel of a cubin, or of all cubins in a library. Raises RuntimeError where the tools are missing or refuse
    the file."""
    if reason := why_not():
        raise RuntimeError(reason)
    if path.suffix == ".cubin":
        return list(_kernels(path))
    with tempfile.TemporaryDirectory() as folder:
        _run(tool("cuobjdump"), "-xelf", "all", path.resolve(), cwd=Path(folder))
        return [kernel for cubin in sorted(Path(folder).glob("*.cubin")) for kernel in _kernels(cubin)]


def _kernels(cubin: Path) -> Iterator[Kernel]:
    text = _run(tool("nvdisasm"), "-c", cubin)
    found = re.search(r"\.target\s+(sm_\d+)", text)
    if found is None:
        raise RuntimeError(f"{cubin}: nvdisasm names no target")
    usage = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(
            r"Function (\S+):\n(.*)", _run(tool("cuobjdump"), "--dump-resource-usage", cubin)
        )
    }
    threads = dict(_max_threads(cubin.read_bytes()))
    sections = re.split(r"^\t\.section\t\.text\.(\S+?),.*$", text, flags=re.M)[1:]
    bodies = {name: body for name, body in zip(sections[::2], sections[1::2]) if name in usage}
    names = _run(tool("c++filt"), input_="\n".join(bodies)).splitlines()
    for (symbol, body), name in zip(bodies.items(), names):
        used = usage[symbol]
        yield Kernel(
            symbol,
            _short(name),
            found[1],
            used["REG"],
            used["STACK"],
            used["SHARED"],
            threads[symbol],
            list(_instructions(body)),
        )


def _short(name: str) -> str:
    """void convext::cuda::igemm_pixels<convext::cuda::Tile<float, 64>, false>(...) without what is always the same."""
    name = re.sub(r"convext::(cuda::)?|\(anonymous namespace\)::|\((?:int|bool|convext::\w+::\w+)\)", "", name)
    name, depth = name.removeprefix("void "), 0
    for i, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            return name[:i]
    return name


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def _instructions(body: str) -> Iterator[Instruction]:
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if found := re.match(r"^(\.L_\w+):", line):
            labels[found[1]] = len(lines)
        elif found := _LINE.search(line):
            lines.append((found[2], found[3]))
    for opcode, operands in lines:
        to = re.search(r"`\((\.L_\w+)\)", operands) if opcode.split(".")[0] in ("BRA", "JMP") else None
        yield Instruction(opcode, f"{opcode} {operands}".strip(), labels.get(to[1]) if to else None)


def _max_threads(elf: bytes) -> Iterator[tuple[str, int]]:
    """(kernel, threads of a block) from the sections .nv.info.KERNEL: attributes of (format, number, size or value)."""
    offset, size, count, names_at = *struct.unpack_from("<Q", elf, 40), *struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, offset + size * i) for i in range(count)]
    strings = sections[names_at][4]
    for name_at, _, _, _, start, length in sections:
        name = elf[strings + name_at : elf.index(b"\0", strings + name_at)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = start
        while at < start + length:
            form, number, value = struct.unpack_from("<BBH", elf, at)
            if (form, number) == (4, 5):  # EIFMT_SVAL, EIATTR_MAX_THREADS
                x, y, z = struct.unpack_from("<III", elf, at + 4)
                yield name.removeprefix(".nv.info."), x * y * z
            at += 4 + (value if form == 4 else 0)


@dataclass(frozen=True)
class Promise:
    """What a source file says of kernels: see the module's words."""

    where: str
    pattern: str
    values: dict[str, float]

    def broken_by(self, kernel: Kernel) -> list[str]:
        """What the kernel does not keep, in words."""
        wrong, said, values = [], f"{kernel.arch} {kernel.name} ({self.where})", self.values
        if "warps" in values:
            warps, least = (
                kernel.warps(int(values.get("shared", 0))),
                values.get(f"warps_{kernel.arch}", values["warps"]),
            )
            if warps < least:
                wrong.append(f"{said}: {warps} warps a multiprocessor, {least:g} promised")
        if "per_mma" in values:
            if kernel.per_mma is None:
                wrong.append(f"{said}: no loop with matrix instructions")
            elif kernel.per_mma > values["per_mma"]:
                said = f"{said}: {kernel.per_mma:.2f} instructions a matrix instruction"
                wrong.append(f"{said}, {values['per_mma']:g} promised")
        for key, opcode in (("loads", "LDG"), ("stores", "STG")):
            if key in values:
                found = [i for i in kernel.loop_accesses if i.base == opcode]
                narrow = ", ".join(i.opcode for i in found if i.bytes < values[key])
                if narrow or not found:
                    wrong.append(
                        f"{said}: {narrow or 'no access at all'} in a loop, {key} of {values[key]:g} bytes promised"
                    )
        return wrong


def promises(csrc: Path) -> list[Promise]:
    """Those of every source file in the folder. Raises ValueError for a line that is none."""
    found = []
    for path in sorted([*csrc.rglob("*.cu"), *csrc.rglob("*.h")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "@sass" not in line:
                continue
            where = f"{path.relative_to(csrc)}:{number}"
            parts = re.fullmatch(r"// +@sass +(.*?)((?: +\w+=[\d.]+)+)", line)
            if parts is None:
                raise ValueError(f"{where}: not `// @sass PATTERN key=value ...`")
            values = {key: float(value) for key, value in (pair.split("=") for pair in parts[2].split())}
            if unknown := set(values) - {"shared", "warps", "warps_sm_80", "per_mma", "loads", "stores"}:
                raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
            found.append(Promise(where, parts[1], values))
    return found


def promised(kernel: Kernel, of: Iterable[Promise]) -> Promise | None:
    """The first promise that speaks of the kernel."""
    return next((p for p in of if re.match(p.pattern, kernel.name)), None)


def slow_in_main_loop(kernel: Kernel) -> list[str]:
    """What has no place in a loop of matrix instructions: calls, divisions, special registers, local memory."""
    loop = kernel.main_loop
    if loop is None:
        return []
    whole = kernel.instructions[loop.first : loop.last + 1]
    return [
        f"{kernel.arch} {kernel.name}: {i.text} in the main loop"
        for i in whole
        if i.base in ("S2R", "S2UR", "LDL", "STL", "I2F")
        or i.opcode.startswith("MUFU.RCP")
        # ptxas leaves some loops by a CALL to a label of the same function, which is a jump.
        or (i.base == "CALL" and "`(.L_" not in i.text)
    ]


# ---- what the cost model takes from here


DTYPES = {"float": "tf32", "__half": "f16", "__nv_bfloat16": "bf16"}


def variant(kernel: Kernel) -> str | None:
    """The variant whose main loop the kernel is (csrc/core/variants.inc), or None."""
    tile = kernel.tile
    found = re.match(r"igemm_(pixels|wgrad)<.*>, (?:(true|false), )?(true|false)>$", kernel.name)
    if tile is not None and kernel.name.startswith("stem_"):
        pass_, dtype = kernel.name[len("stem_") :].split("<")[0], DTYPES[tile.element]
        return f"{pass_}_stem_{dtype}_{tile.block_m}x{tile.block_n}x16_sm80"
    if tile is None or found is None:
        return None
    pass_ = "wgrad" if found[1] == "wgrad" else "dgrad" if found[2] == "true" else "fprop"
    dtype = DTYPES[tile.element]
    gather = "" if found[3] == "true" else "_gather"
    return f"{pass_}_igemm_{dtype}_{tile.block_m}x{tile.block_n}x{tile.block_k}{gather}_sm80"


def machine_code(kernels: Iterable[Kernel], said: list[Promise], arch: str = "sm_90") -> str:
    """csrc/cuda/machine_code.inc out of the kernels of that architecture."""
    lines = [
        "// Of each matrix-product kernel what a block's step of the main loop costs in issue slots and in shared",
        "// memory, in cycles of a multiprocessor, and how many blocks one holds: as nvcc compiles it for",
        f"// {arch}. Written by `convext bench sass --write`; tests/cuda/test_cuda_compile.py compares it.",
    ]
    for kernel in sorted(kernels, key=lambda k: variant(k) or ""):
        name, cycles, promise = variant(kernel), kernel.cycles(), promised(kernel, said)
        if name is None or not cycles or promise is None or kernel.arch != arch:
            continue
        blocks = kernel.blocks(int(promise.values["shared"]))
        lines.append(f"CONVEXT_MACHINE_CODE({name}, {cycles['issue']:.0f}, {cycles['shared']:.0f}, {blocks})")
    return "\n".join([*lines, "#undef CONVEXT_MACHINE_CODE", ""])


def table(kernels: Iterable[Kernel], said: list[Promise]) -> Grid:
    """One row a kernel: its resources, and what a step of its main loop is made of and bound by."""
    grid = Grid(
        ["kernel", "on", "registers", "spills, B", "shared, B", "blocks", "warps", "a matrix instr.", "tensor", "ldsm"]
        + ["shared", "copy", "integer", "float", "other", "cycles: issue", "tensor ", "shared "],
        names=2,
    )
    for kernel in kernels:
        promise, step, cycles = promised(kernel, said), kernel.step, kernel.cycles()
        dynamic = int(promise.values.get("shared", 0)) if promise else 0
        other = sum(step.values()) - sum(
            step.get(p, 0) for p in ("tensor", "ldsm", "shared", "copy", "integer", "float")
        )
        for where in RUNS_ON[kernel.arch]:
            resources = [kernel.registers, kernel.stack, dynamic, kernel.blocks(dynamic, where)]
            row = [kernel.name, where, *(str(n) for n in resources), str(kernel.warps(dynamic, where))]
            pipes = [step.get(p, 0) for p in ("tensor", "ldsm", "shared", "copy", "integer", "float")] if step else []
            row += [f"{kernel.per_mma:.2f}", *(f"{n:.0f}" for n in [*pipes, other])] if step else [""] * 8
            row += [f"{cycles[bound]:.0f}" for bound in ("issue", "tensor", "shared")] if cycles else [""] * 3
            grid.rows.append(row)
    return grid


def accesses(kernels: Iterable[Kernel]) -> Grid:
    """One row a kernel without matrix instructions: the accesses to global memory in its loops by width, and how many
    instructions a loop with such an access issues for each 16 bytes that it moves."""
    grid = Grid(["kernel", "on", "registers", "loads", "stores", "instructions for 16 bytes"], names=2)
    for kernel in kernels:
        if kernel.main_loop is not None or not kernel.loop_accesses:
            continue
        widths = {
            kind: sorted({i.bytes for i in kernel.loop_accesses if i.base == kind}, reverse=True)
            for kind in ("LDG", "STG")
        }
        moving = [o for o in kernel.loops if any(i.pipe == "global" for i in o.instructions)]
        moved = {o: sum(i.bytes for i in o.instructions if i.pipe == "global") for o in moving}
        most = max(moving, key=lambda o: moved[o])
        cost = len(most.instructions) / (moved[most] / 16)
        texts = [", ".join(map(str, widths[kind])) or "none" for kind in ("LDG", "STG")]
        grid.rows.append([kernel.name, kernel.arch, str(kernel.registers), *texts, f"{cost:.1f}"])
    return grid


# An H200's, for predictions. The clock is an estimate under load, of 1980 MHz at most; of memory, what the cost model
# reckons with (kMemoryBytes in csrc/cuda/cost.h), 4.6 of the data sheet's 4.8 TB/s.
CLOCK, PROCESSORS = 1.755e9, 132
COPY_BYTES = 20 * PROCESSORS * CLOCK


def predicted_seconds(pass_: Pass, problem: ConvProblem) -> float:
    """What the cost model expects of the kernel that it selects for a problem, which is not rejected, on an H200."""
    from ..backends import native_cuda

    cycles: float = native_cuda._CUDA.select(int(pass_), native_cuda._plan(pass_, problem).fields, True)[1]
    return cycles / CLOCK


def predictions(problems: dict[ConvProblem, int], dtype_name: str) -> Grid:
    """One row a layer and pass: the kernel that the cost model selects, the time that it predicts on an H200, and the
    share of the ceiling that this would be. Computed, not measured."""
    from ..backends import native_cuda

    dtype = DType[dtype_name.upper()]
    grid = Grid(["layer", "n", "pass", "kernel", "predicted, us", "of ceiling", "bound by"], names=4)
    rate = MULTIPLY_ADDS["sm_90"] * PROCESSORS * CLOCK * 2
    for problem, count in problems.items():
        for pass_ in Pass:
            asked = dataclasses.replace(problem, device="cuda", dtype=dtype, x_layout=Layout.NHWC, y_layout=Layout.NHWC)
            if native_cuda.BACKEND.reject(pass_, asked) is not None:
                continue
            seconds = predicted_seconds(pass_, asked)
            bytes_ = (asked.x_size + asked.y_size) * dtype.torch.itemsize
            # Depthwise kernels form no matrix products: memory alone is their ceiling.
            products = 0.0 if asked.is_depthwise else asked.flops / rate
            share, bound = max((products / seconds, "products"), (bytes_ / COPY_BYTES / seconds, "memory"))
            kernel = native_cuda.BACKEND.variant(pass_, asked)
            numbers = [f"{seconds * 1e6:.1f}", f"{share:.0%}", bound]
            grid.rows.append([title(asked), str(count), pass_.name.lower(), kernel, *numbers])
    return grid
