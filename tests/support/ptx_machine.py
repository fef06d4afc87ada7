"""Runs a kernel's PTX: all threads of some blocks at once, a NumPy array for each register, one element a thread.

Threads that part at a branch go on one group after another, the one that is furthest behind first, so that they meet
again where the text lets them. Instructions of a whole warp wait for all lanes that their mask names, barriers for the
block. Shared memory, registers and local memory start as 0xFF, which reads as NaN. A copy of cp.async lands when its
thread waits for it and no sooner, so that a wait that is missing is seen. Loads and stores outside of the memory that
was lent, or not aligned, end the run with the line in question.

What no run in lockstep can show are races; those are the emulator's part (csrc/tests/cuda_on_cpu).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import ptx_instructions
from ptx import BITS, Address, Immediate, Instruction, Kernel, PtxError, Register, Special, Symbol

WARP = 32
LANES_AT_ONCE = 4096  # registers of so many threads are kept at a time
SHARED_START = 1024  # the system's own part of shared memory, which no kernel may touch

# What a value of each type is to NumPy: bits, where it has no such type.
DTYPES = {kind: np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}") for kind, bits in BITS.items() if bits > 1}
DTYPES |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
UNSIGNED = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}


@dataclass
class Segment:
    """Memory that a kernel may use. `data` goes on to a multiple of 16 bytes, of which `bytes` count."""

    address: int
    bytes: int
    data: np.ndarray
    writable: bool = True

    @classmethod
    def of_host(cls, address: int, size: int, writable: bool) -> Segment:
        room = (ctypes.c_char * ((size + 15) // 16 * 16)).from_address(address)
        return cls(address, size, np.frombuffer(room, np.uint8), writable)


class Memory:
    """Global memory: segments with nothing between them."""

    def __init__(self, segments: list[Segment] = ()):
        self.segments: list[Segment] = []
        for segment in segments:
            self.add(segment)

    def add(self, segment: Segment) -> None:
        self.segments = sorted([*self.segments, segment], key=lambda s: s.address)
        self._bases = np.array([s.address for s in self.segments], np.uint64)

    def put(self, values: np.ndarray, writable: bool = False) -> int:
        """A copy of the array; its address."""
        raw = np.frombuffer(values.tobytes(), np.uint8)
        data = np.full((len(raw) + 15) // 16 * 16, 0xFF, np.uint8)
        data[: len(raw)] = raw
        address = max([1 << 40] + [s.address + s.bytes + 4096 for s in self.segments]) // 256 * 256 + 256
        self.add(Segment(address, len(raw), data, writable))
        return address

    def read(self, address: int, dtype, count: int) -> np.ndarray:
        (segment,) = (s for s in self.segments if s.address == address)
        return segment.data[: count * np.dtype(dtype).itemsize].view(dtype).copy()

    def _places(self, addresses: np.ndarray, size: int):
        """(segment, which of the addresses, where in it)."""
        which = np.searchsorted(self._bases, addresses, "right").astype(np.int64) - 1
        for i in np.unique(which):
            chosen = slice(None) if (which == i).all() else which == i
            at = addresses[chosen].astype(np.int64)
            if i < 0 or (wild := at + size > self.segments[i].address + self.segments[i].bytes).any():
                bad = int(at[0] if i < 0 else at[wild][0])
                raise PtxError(f"{size} bytes at {bad:#x} are in nobody's memory")
            yield self.segments[i], chosen, at - self.segments[i].address

    def load(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        out = np.empty((len(addresses), count), UNSIGNED[8 * size])
        for segment, chosen, at in self._places(addresses, size * count):
            out[chosen] = segment.data.view(out.dtype)[at[:, None] // size + np.arange(count)]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        for segment, chosen, at in self._places(addresses, size * count):
            if not segment.writable:
                raise PtxError(f"a store into what may only be read, at {int(addresses[chosen][0]):#x}")
            segment.data.view(values.dtype)[at[:, None] // size + np.arange(count)] = values[chosen]


class PerThread:
    """Memory that a thread, or its block, has for itself: rows of bytes, and the row of each thread."""

    def __init__(self, what: str, rows: np.ndarray, size: int, start: int = 0):
        self.what, self.rows, self.start = what, rows, start
        self.size, self.pitch = start + size, (start + size + 127) // 128 * 128
        self.data = np.full((int(rows.max()) + 1) * self.pitch, 0xFF, np.uint8)

    def _index(self, threads: np.ndarray, offsets: np.ndarray, size: int, count: int) -> np.ndarray:
        at = offsets.astype(np.int64)
        wild = (at < self.start) | (at + size * count > self.size)
        if wild.any():
            raise PtxError(f"{size * count} bytes at {int(at[wild][0]):#x} are outside of {self.what} memory, "
                           f"[{self.start:#x}, {self.size:#x})")  # fmt: skip
        return ((self.rows[threads] * self.pitch + at) // size)[:, None] + np.arange(count)

    def load(self, threads, offsets, size: int, count: int) -> np.ndarray:
        return self.data.view(UNSIGNED[8 * size])[self._index(threads, offsets, size, count)]

    def store(self, threads, offsets, values: np.ndarray) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        self.data.view(values.dtype)[self._index(threads, offsets, size, count)] = values


# ---- a kernel's control flow


@dataclass
class Stretch:
    """Instructions that run one after another."""

    start: int
    end: int  # one past the last, the branch included
    head: str | None  # "warp" or "block": whom the first instruction waits for
    branch: Instruction | None


def stretches(kernel: Kernel) -> dict[int, Stretch]:
    """By their start."""
    code = kernel.instructions
    starts = {0, len(code), *kernel.labels.values()}
    for i, instruction in enumerate(code):
        if ptx_instructions.is_branch(instruction):
            starts.add(i + 1)
        if waits := ptx_instructions.waits_for(instruction):
            starts.add(i)
            if waits == "block":
                starts.add(i + 1)
    order = sorted(starts)
    found = {}
    for start, end in zip(order, order[1:]):
        last = code[end - 1]
        branch = last if ptx_instructions.is_branch(last) else None
        found[start] = Stretch(start, end, ptx_instructions.waits_for(code[start]), branch)
    return found


class Machine:
    """Some blocks of a launch, all at once."""

    def __init__(self, kernel: Kernel, grid, block, blocks: range, shared_bytes: int, parameters: bytes, memory: Memory,
                 watch=None):  # fmt: skip
        self.kernel, self.memory, self.watch = kernel, memory, watch
        per_block = block[0] * block[1] * block[2]
        padded = (per_block + WARP - 1) // WARP * WARP
        self.threads = len(blocks) * padded
        self.warps = self.threads // WARP
        linear = np.tile(np.arange(padded), len(blocks))
        self.block_of = np.repeat(np.arange(len(blocks)), padded)
        self.lane = linear % WARP
        self.alive = linear < per_block
        index = np.array(blocks)[self.block_of]
        self._specials = {"%laneid": self.lane, "%warpid": linear // WARP}
        self._specials |= {f"%tid.{a}": v for a, v in zip("xyz", _coordinates(linear, block))}
        self._specials |= {f"%ctaid.{a}": v for a, v in zip("xyz", _coordinates(index, grid))}
        self._specials |= {f"%ntid.{a}": v for a, v in zip("xyz", block)}
        self._specials |= {f"%nctaid.{a}": v for a, v in zip("xyz", grid)}

        self._offsets, sizes = {}, {"shared": 0, "local": 0}
        # What has no size, the launch's, comes behind what has.
        for name, variable in sorted(kernel.variables.items(), key=lambda item: item[1].bytes == 0):
            if variable.space in sizes:
                at = (sizes[variable.space] + variable.align - 1) // variable.align * variable.align
                self._offsets[name] = at + (SHARED_START if variable.space == "shared" else 0)
                sizes[variable.space] = at + variable.bytes
        self.shared = PerThread("shared", self.block_of, sizes["shared"] + shared_bytes, SHARED_START)
        self.local = PerThread("local", np.arange(self.threads), sizes["local"])
        self.parameters = PerThread("parameter", np.zeros(self.threads, int), max(len(parameters), 1))
        self.parameters.data[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        self._parameter_offsets = {p.name: p.offset for p in kernel.parameters}

        self._registers: dict[str, np.ndarray] = {}
        self.copies = _Copies(self)
        self._pc = np.zeros(self.threads, np.int64)
        self._parked = np.zeros(self.threads, bool)
        self._stretches = stretches(kernel)
        self._acts: dict[int, list] = {}
        self.reached: set[int] = set()

    # ---- what instructions are bound to

    def raw(self, register: Register) -> np.ndarray:
        found = self._registers.get(register.name)
        if found is None:
            if register.bits == 1:
                found = np.zeros(self.threads, bool)
            else:
                found = np.full(self.threads, (1 << register.bits) - 1, UNSIGNED[register.bits])
            self._registers[register.name] = found
        return found

    def source(self, operand, kind: str, wider: bool = False) -> np.ndarray:
        """The operand's values by thread, as they will be whenever one looks. Where the register may be wider, as in
        loads, stores and conversions, its low bits."""
        bits, dtype = BITS[kind], DTYPES[kind]
        if isinstance(operand, Register):
            fits = operand.bits == bits or (wider and operand.bits > bits)
            if operand.negated or not fits:
                raise PtxError(f"{operand.name} has {operand.bits} bits, .{kind} wants {bits}")
            return self.raw(operand).view(dtype)[:: operand.bits // bits]
        if isinstance(operand, Immediate):
            if operand.is_float and operand.is_float != bits:
                raise PtxError(f"a constant of {operand.is_float} bits where .{kind} is wanted")
            pattern = operand.bits & (1 << bits) - 1
            value = np.array(pattern != 0) if bits == 1 else np.array(pattern, UNSIGNED[bits]).view(dtype)
        elif isinstance(operand, Special):
            if operand.name not in self._specials:
                raise PtxError(f"{operand.name} is not known here")
            value = np.asarray(self._specials[operand.name]).astype(dtype)
        elif isinstance(operand, Symbol):
            value = np.array(self.address_of(operand.name), np.uint64).astype(dtype)
        else:
            raise PtxError(f"{operand} is no operand of .{kind}")
        return np.broadcast_to(value, self.threads)

    def address_of(self, name: str) -> int:
        if name in self._parameter_offsets:
            return self._parameter_offsets[name]
        if name not in self._offsets:
            raise PtxError(f"{name} is not known here")
        return self._offsets[name]

    def addresses(self, operand: Address):
        """A function that returns the address of each thread, in 64 bits."""
        base = operand.base
        kind = f"u{base.bits}" if isinstance(base, Register) else "u64"
        register, offset = self.source(base, kind), np.uint64(operand.offset & (1 << 64) - 1)
        if kind == "u32":  # of shared memory: the sum stays in 32 bits
            return lambda: (register + offset.astype(np.uint32)).astype(np.uint64)
        return lambda: register + offset

    def emit(self, operand, kind: str, function, *sources, wider: bool = False):
        """An act that writes function(*sources) to the operand, for the threads of its mask: a value of `kind`, widened
        where the register is and may be wider."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} cannot be written")
        bits = BITS[kind]
        if operand.bits != bits and not (wider and operand.bits > bits):
            raise PtxError(f"{operand.name} has {operand.bits} bits, .{kind} wants {bits}")
        target = self.raw(operand)
        if operand.bits == bits:
            target = target.view(DTYPES[kind])
            if isinstance(function, np.ufunc):

                def act(mask):
                    function(*sources, out=target, where=True if mask is None else mask)

                return act
        elif kind[0] == "s":
            target = target.view(f"i{operand.bits // 8}")

        def act(mask):
            value = function(*sources)
            if value.dtype.kind == "f" and target.dtype.kind != "f":
                value = value.view(UNSIGNED[8 * value.dtype.itemsize])
            np.copyto(target, value, casting="unsafe", where=True if mask is None else mask)

        return act

    def space(self, name: str, threads: np.ndarray, addresses: np.ndarray):
        """(memory, addresses in it) for accesses of the threads; generic addresses tell by their window."""
        if name == "generic":
            windows = np.unique(addresses >> np.uint64(60))
            if len(windows) != 1:
                raise PtxError("threads of one access are in several kinds of memory")
            name = {0: "global", 1: "shared", 2: "local", 3: "param"}.get(int(windows[0]), "global")
            addresses = addresses if name == "global" else addresses & np.uint64((1 << 60) - 1)
        if name == "global":
            return _Global(self.memory), addresses
        return {"shared": self.shared, "local": self.local, "param": self.parameters}[name], addresses

    # ---- running

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self.alive.any():
                waiting = self.alive & ~self._parked
                if not waiting.any():
                    raise PtxError(self._deadlock())
                here = int(self._pc[waiting].min())
                # Those who wait there already come along.
                self._step(self._stretches[here], self.alive & (self._pc == here))

    def _step(self, stretch: Stretch, mask: np.ndarray) -> None:
        if stretch.head == "block":
            self._parked |= mask
            self._release_blocks()
            return
        if stretch.head == "warp":
            mask = self._whole_warps(self.kernel.instructions[stretch.start], mask)
            if not mask.any():
                return
        self.reached.add(stretch.start)
        everyone = None if mask.all() else mask
        for i, act in enumerate(self._bound(stretch)):
            try:
                act(everyone)
            except PtxError as error:
                raise self.kernel.instructions[stretch.start + i].error(str(error)) from error
        self._pc[mask] = stretch.end
        if stretch.branch is not None:
            self._branch(stretch.branch, mask)
        elif stretch.end == len(self.kernel.instructions):
            self._leave(mask)

    def _bound(self, stretch: Stretch) -> list:
        if stretch.start not in self._acts:
            code = self.kernel.instructions[stretch.start : stretch.end - (stretch.branch is not None)]
            self._acts[stretch.start] = [self._bind(instruction) for instruction in code]
        return self._acts[stretch.start]

    def _bind(self, instruction: Instruction):
        try:
            act = ptx_instructions.bind(self, instruction)
        except PtxError as error:
            raise instruction.error(str(error)) from error
        if instruction.guard is None:
            return act
        guard = self.guard(instruction.guard)

        def guarded(mask):
            chosen = guard() & (self.alive if mask is None else mask)
            if chosen.any():
                act(chosen)

        return guarded

    def guard(self, register: Register):
        values = self.raw(register)
        return (lambda: ~values) if register.negated else (lambda: values)

    def _branch(self, branch: Instruction, mask: np.ndarray) -> None:
        taken = mask if branch.guard is None else mask & self.guard(branch.guard)()
        if branch.opcode[0] in ("ret", "exit"):
            self._leave(taken)
        elif branch.opcode[0] == "bra":
            self._pc[taken] = self._label(branch, branch.operands[0])
        else:  # brx.idx
            targets = [self._label(branch, Symbol(name)) for name in self.kernel.tables[branch.operands[1].name]]
            index = self.source(branch.operands[0], "u32")[taken]
            if (index >= len(targets)).any():
                raise branch.error("a branch past the end of its table")
            self._pc[taken] = np.array(targets)[index]

    def _label(self, branch: Instruction, target: Symbol) -> int:
        if not isinstance(target, Symbol) or target.name not in self.kernel.labels:
            raise branch.error("its label is not there")
        return self.kernel.labels[target.name]

    def _leave(self, mask: np.ndarray) -> None:
        self.alive &= ~mask
        self._parked[:] = False  # whoever waited for these looks again

    def _whole_warps(self, instruction: Instruction, mask: np.ndarray) -> np.ndarray:
        """Of the threads in `mask`, those of warps of which all are there whom the instruction wants; others wait."""
        wanted = ptx_instructions.members(self, instruction) & self.alive
        missing = (wanted & ~mask).reshape(self.warps, WARP).any(axis=1)
        if not missing.any():
            self._parked[mask] = False
            return mask
        there = mask & ~np.repeat(missing, WARP)
        self._parked |= mask & ~there
        self._parked[there] = False
        return there

    def _release_blocks(self) -> None:
        at_barrier = self._parked & np.isin(self._pc, [s.start for s in self._stretches.values() if s.head == "block"])
        late = np.unique(self.block_of[self.alive & ~at_barrier])
        free = at_barrier & self.alive & ~np.isin(self.block_of, late)
        self.reached.update(int(pc) for pc in np.unique(self._pc[free]))
        self._parked[free] = False
        self._pc[free] += 1

    def _deadlock(self) -> str:
        places = {}
        for pc in self._pc[self.alive]:
            places[int(pc)] = places.get(int(pc), 0) + 1
        code = self.kernel.instructions
        return "deadlock: " + "; ".join(
            f"{n} threads at line {code[pc].line}, {code[pc].text}" for pc, n in places.items()
        )


class _Global:
    """Global memory, with the threads that it does not care for."""

    def __init__(self, memory: Memory):
        self._memory = memory

    def load(self, threads, addresses, size: int, count: int) -> np.ndarray:
        return self._memory.load(addresses, size, count)

    def store(self, threads, addresses, values: np.ndarray) -> None:
        self._memory.store(addresses, values)


class _Copies:
    """The copies of cp.async that are under way, with the group of their thread that they belong to."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self._groups = np.zeros(machine.threads, np.int64)  # committed so far
        self._under_way: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def issue(self, threads: np.ndarray, destinations: np.ndarray, data: np.ndarray) -> None:
        self._under_way.append((threads, self._groups[threads], destinations, data))

    def commit(self, mask) -> None:
        self._groups += 1 if mask is None else mask

    def wait(self, mask, groups_left: int | None) -> None:
        """Until at most so many of the youngest groups are under way; None: nothing at all, committed or not."""
        waiting = np.ones(self._machine.threads, bool) if mask is None else mask
        still = []
        for threads, group, destinations, data in self._under_way:
            lands = waiting[threads]
            if groups_left is not None:
                lands = lands & (group < self._groups[threads] - groups_left)
            self._machine.shared.store(threads[lands], destinations[lands], data[lands])
            if not lands.all():
                still.append((threads[~lands], group[~lands], destinations[~lands], data[~lands]))
        self._under_way = still


def _coordinates(linear: np.ndarray, extents) -> tuple[np.ndarray, ...]:
    x, y, _ = extents
    return linear % x, linear // x % y, linear // (x * y)


def launch(kernel: Kernel, grid, block, shared_bytes: int, parameters: bytes, memory: Memory, watch=None) -> set[str]:
    """Runs the kernel over the whole grid; the texts of the opcodes that ran. `watch(instruction, memory, write,
    threads, addresses, bytes, machine)` sees each access to shared and global memory."""
    if len(parameters) != kernel.parameter_bytes:
        raise PtxError(f"{kernel.name} takes {kernel.parameter_bytes} bytes of parameters, not {len(parameters)}")
    count = grid[0] * grid[1] * grid[2]
    step = max(1, LANES_AT_ONCE // (block[0] * block[1] * block[2]))
    ran: set[str] = set()
    for first in range(0, count, step):
        blocks = range(first, min(count, first + step))
        machine = Machine(kernel, grid, block, blocks, shared_bytes, parameters, memory, watch)
        machine.run()
        for start in machine.reached:
            stretch = machine._stretches[start]
            ran.update(".".join(i.opcode) for i in kernel.instructions[stretch.start : stretch.end])
    return ran
