"""nvcc compiles every kernel for sm_80, sm_90a and PTX: no spills, no local memory, the instructions it should have."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))


def find(program: str) -> str | None:
    """A program of the CUDA toolkit, or the copy that triton's wheel brings."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders += [Path(p) / "triton" / "backends" / "nvidia" / "bin" for p in site.getsitepackages()]
    found = [str(folder / program) for folder in folders if (folder / program).exists()]
    return found[0] if found else shutil.which(program)


NVCC, CUOBJDUMP = find("nvcc"), find("cuobjdump")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc was not found"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="session")
def ptx(shared):
    """ptx(source): the PTX that ships for what comes after sm_90, made once. No kernel asks for its architecture, so
    what runs on sm_90a is made from it, too."""

    def get(source: Path) -> Path:
        with shared(f"ptx_{source.stem}") as folder:
            output = folder / f"{source.stem}.ptx"
            if not output.exists():
                nvcc("-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}", "-ptx", "-arch=compute_90", source, output)
        return output

    return get


@pytest.fixture(scope="session")
def compiled(shared, ptx):
    """compiled(source, arch): (cubin, what ptxas said), each once."""

    def get(source: Path, arch: str) -> tuple[Path, str]:
        with shared(f"cubin_{source.stem}_{arch}") as folder:
            output, said = folder / f"{source.stem}.cubin", folder / "said"
            if not said.exists():
                options = ["-cubin", f"-arch={arch}", "-Xptxas", "-v"]
                if arch == "sm_90a":
                    told = nvcc(*options, ptx(source), output)
                else:
                    told = nvcc("-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", *options, source, output)
                said.write_text(told)
        return output, said.read_text()

    return get


def nvcc(*arguments) -> str:
    """Runs it on the arguments but the last, into that; what it said."""
    *arguments, output = map(str, arguments)
    run = subprocess.run([NVCC, *arguments, "-o", output], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_no_kernel_asks_for_its_architecture():
    """PTX for compute_90 and for compute_90a are the same then."""
    files = [file for file in CSRC.rglob("*") if file.suffix in (".cu", ".cuh", ".h")]
    assert len(files) > 20
    assert not [file for file in files if "__CUDA_ARCH" in file.read_text()]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_spills_and_no_local_memory(compiled, source, arch):
    _, log = compiled(source, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames, log
    assert all(frame == ("0", "0", "0") for frame in frames), log


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_ptx(ptx, source):
    assert ".entry" in ptx(source).read_text()


@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump was not found")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", [s for s in SOURCES if s.stem.startswith("igemm")], ids=lambda s: s.stem)
def test_direct_family_uses_tensor_cores_and_asynchronous_copies(compiled, source, arch):
    cubin, _ = compiled(source, arch)
    sass = subprocess.run([CUOBJDUMP, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert kernels
    for text in kernels:
        name = text.split(maxsplit=1)[0]
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} uses local memory"
        if "reduce_splits" in name:
            continue
        assert "HMMA" in text, f"{name} has no tensor-core instruction"
        vector = name.split("EEELb", 1)[1]  # the template's booleans: DGRAD for two of the passes, then VECTOR
        if vector.startswith("1E" if "wgrad" in name else ("0ELb1E", "1ELb1E")):
            assert "LDGSTS" in text, f"{name} has no asynchronous copy"
