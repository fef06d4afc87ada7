"""nvcc, where there is one: PTX of the kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

from convext.bench import sass

NVCC = sass.tool("nvcc")


def compile_ptx(csrc: Path, source: str, arch: str, output: Path) -> Path:
    """The PTX of a source, relative to csrc, once."""
    if not output.exists():
        written = output.with_suffix(".part")
        command = [NVCC, "-std=c++20", "--expt-relaxed-constexpr", f"-I{csrc}", "-ptx", f"-arch={arch}"]
        done = subprocess.run([*command, csrc / source, "-o", written], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.rename(output)
    return output
