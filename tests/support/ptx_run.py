"""Runs a test program of the CUDA kernels with what nvcc made of them.

    python ptx_run.py [--count] <program as a library> <its PTX> [the program's arguments ...]

The program is one of csrc/tests built in the form "ptx" of cuda_on_cpu.py, such as cuda_variants.cpp: it chooses cases,
fills buffers, launches and compares, all but the kernels themselves. The exit status is the program's. With --count it
says last how warps accessed memory (ptx_count.py): memory, kind, bytes of a lane, accesses of a warp, turns, sectors.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from ptx import Module, PtxError, demangled
from ptx_count import Count
from ptx_machine import Memory, Segment, launch

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.c_void_p,
    ctypes.c_uint64,
)


class Program:
    def __init__(self, library: Path, module: Module, watch=None):
        self._library = ctypes.CDLL(str(library))
        self._module, self._watch = module, watch
        symbols = [line.split() for line in _output("nm", "--defined-only", library).splitlines()]
        places = {name: int(address, 16) for address, _, name in symbols}
        base = ctypes.cast(self._library.main, ctypes.c_void_p).value - places["main"]
        self._names = dict(zip((base + place for place in places.values()), demangled(list(places))))
        self._message = None  # of the last failure: the program reads it

    def main(self, arguments: list[str]) -> int:
        callback = LAUNCH(self._launch)
        self._library.launch_with(callback)
        argv = [b"program", *(a.encode() for a in arguments)]
        return self._library.main(len(argv), (ctypes.c_char_p * len(argv))(*argv))

    def _launch(self, kernel, grid, block, shared_bytes, parameters, parameter_bytes):
        try:
            launch(self._kernel(self._names[kernel]), grid[:3], block[:3], shared_bytes,
                   ctypes.string_at(parameters, parameter_bytes), self._memory(), self._watch)  # fmt: skip
            return None
        except PtxError as error:
            self._message = ctypes.create_string_buffer(str(error).encode())
            return ctypes.addressof(self._message)

    def _kernel(self, signature: str):
        if signature not in self._module.by_signature:
            raise PtxError(f"the PTX has no kernel {signature}")
        return self._module.kernel(self._module.by_signature[signature])

    def _memory(self) -> Memory:
        address, size, read_only = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
        memory, i = Memory(), 0
        while self._library.device_buffer(ctypes.c_uint64(i), *map(ctypes.byref, (address, size, read_only))):
            if size.value:
                memory.add(Segment.of_host(address.value, size.value, not read_only.value))
            i += 1
        return memory


def _output(*command) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    counts = Count() if sys.argv[1] == "--count" else None
    library, ptx, *rest = sys.argv[1 if counts is None else 2 :]
    status = Program(Path(library), Module(Path(ptx).read_text()), counts).main(rest)
    ctypes.CDLL(None).fflush(None)  # the program's own lines first
    if counts is not None:
        print(*counts.lines(), sep="\n", flush=True)
    sys.exit(status)
