"""What csrc/tests/cuda_on_cpu/accesses.cpp counted, by kernel and line of its source."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Accesses:
    """All that a kernel does in one line of its source, of one kind."""

    kernel: str
    problem: str
    where: str  # "batch_norm/batch_norm_sm80.cu:190", the line that calls what tile/run.h and ptx/ have
    shared: bool
    store: bool
    bytes: int  # of a lane
    warps: int
    turns: int
    least_turns: int
    sectors: int
    least_sectors: int

    @property
    def conflicts(self) -> float:
        """Turns of the banks over the least: 1 is without conflict."""
        return self.turns / self.least_turns

    @property
    def spread(self) -> float:
        """Sectors over as many as would hold what is asked for: 1 where they are used to the full."""
        return self.sectors / self.least_sectors

    @property
    def excess(self) -> float:
        """Turns, or sectors, over the least."""
        return self.conflicts if self.shared else self.spread

    @property
    def what(self) -> str:
        return f"{'shared' if self.shared else 'global'} {'store' if self.store else 'load'} {self.bytes}"


def read(text: str, program: Path) -> list[Accesses]:
    rows = [line.split("\t") for line in text.splitlines() if "\t" in line]
    places = _lines(program, {row[2] for row in rows})
    found: dict[tuple, Accesses] = {}
    for kernel, problem, place, memory, kind, size, *counts in rows:
        key = kernel, problem, places[place], memory == "shared", kind == "store", int(size)
        total = found.setdefault(key, Accesses(*key, 0, 0, 0, 0, 0))
        total.warps += int(counts[0])
        total.turns += int(counts[1])
        total.least_turns += int(counts[2])
        total.sectors += int(counts[3])
        total.least_sectors += int(counts[4])
    return list(found.values())


# What kernels access memory through; their lines say little.
THROUGH = ("/ptx/", "/tile/run.h", "/cuda_on_cpu/")


def _lines(program: Path, places: Iterable[str]) -> dict[str, str]:
    """For each place in the program the innermost line of a kernel's own source."""
    places = sorted(places)
    done = subprocess.run(["addr2line", "-i", "-a", "-e", str(program), *places], capture_output=True, text=True,
                          check=True)  # fmt: skip
    frames: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("0x"):
            inside = frames.setdefault(hex(int(line, 16)), [])
        else:
            inside.append(line.split(" (")[0])
    found = {}
    for place, lines in frames.items():
        own = [line for line in lines if "/cuda/" in line and not any(part in line for part in THROUGH)]
        found[place] = (own or lines)[0].rpartition("/cuda/")[2]
    return found


def summary(rows: list[Accesses]) -> str:
    """Each kernel: all its accesses of a warp to shared and to global memory, what they take over the least, and the
    line that takes most."""
    lines = [f"{'kernel':<40}{'shared':>8}{'turns':>7}  {'most':<58}{'global':>8}{'sectors':>8}  most"]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        line = f"{kernel:<40}"
        for shared in (True, False):
            mine = [row for row in rows if row.kernel == kernel and row.shared == shared]
            taken = sum(row.turns + row.sectors for row in mine)
            least = sum(row.least_turns + row.least_sectors for row in mine)
            worst = max(mine, key=lambda row: row.excess, default=None)
            most = "" if worst is None or worst.excess == 1 else f"{worst.excess:.2f} {worst.where} {worst.what}"
            ratio = f"{taken / least:.2f}" if least else ""
            line += f"{sum(row.warps for row in mine):>8}{ratio:>{7 if shared else 8}}  {most:<58}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def table(rows: list[Accesses]) -> str:
    """Line by line."""
    lines = [f"{'kernel':<38}{'problem':<36}{'where':<44}{'what':<17}{'warps':>7}{'turns':>7}{'sectors':>9}"]
    for a in rows:
        turns, sectors = (f"{a.conflicts:.2f}", "") if a.shared else ("", f"{a.spread:.2f}")
        lines.append(f"{a.kernel:<38}{a.problem:<36}{a.where:<44}{a.what:<17}{a.warps:>7}{turns:>7}{sectors:>9}")
    return "\n".join(lines)
