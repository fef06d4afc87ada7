"""Counts how warps access memory in a run of the interpreter: what the emulator counts of g++'s code
(csrc/tests/cuda_on_cpu/warp_accesses.cpp), of nvcc's, and by itself."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

BANKS, BANK_BYTES, SECTOR = 32, 4, 32


class Kind(NamedTuple):
    memory: str  # "shared", "global"
    what: str  # "load", "store"
    bytes: int  # of a lane


class Count:
    """Sums by kind; a watch for ptx_machine.launch."""

    def __init__(self) -> None:
        self.warps: dict[Kind, int] = defaultdict(int)
        self.turns: dict[Kind, int] = defaultdict(int)
        self.sectors: dict[Kind, int] = defaultdict(int)

    def __call__(self, instruction, memory, write, threads, addresses, size, machine) -> None:
        if memory is machine.local or memory is machine.parameters:
            return
        name = "shared" if memory is machine.shared else "global"
        kind = Kind(name, "store" if write else "load", size)
        warps = threads // 32
        self.warps[kind] += len(np.unique(warps))
        if name == "global":
            first, last = addresses // SECTOR, (addresses + np.uint64(size - 1)) // SECTOR
            touched = np.unique(np.concatenate([_pairs(warps, first), _pairs(warps, last)]), axis=0)
            self.sectors[kind] += len(touched)
            return
        words = max(1, size // BANK_BYTES)
        at_once = BANKS // words  # lanes whose words the banks can bring together
        turn = threads // at_once
        word = addresses[:, None].astype(np.int64) // BANK_BYTES + np.arange(words)
        distinct = np.unique(_pairs(turn.repeat(words), word.ravel()), axis=0)
        in_bank: dict[tuple[int, int], int] = defaultdict(int)
        for where, which in distinct.tolist():
            in_bank[where, which % BANKS] += 1
        longest: dict[int, int] = defaultdict(int)
        for (where, _), count in in_bank.items():
            longest[where] = max(longest[where], count)
        self.turns[kind] += sum(longest.values())

    def lines(self) -> list[str]:
        return [
            f"{m}\t{w}\t{b}\t{n}\t{self.turns[k]}\t{self.sectors[k]}" for k, n in self.warps.items() for m, w, b in [k]
        ]


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack([a.astype(np.int64), b.astype(np.int64)], axis=1)
