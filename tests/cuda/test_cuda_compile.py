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
def compiled(tmp_path_factory):
    """compiled(source, arch): (cubin, what ptxas said), each once."""
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def get(source: Path, arch: str) -> tuple[Path, str]:
        if (source, arch) not in done:
            output = folder / f"{source.stem}.{arch}.cubin"
            command = [
                NVCC,
                "-std=c++20",
                "-O3",
                "--expt-relaxed-constexpr",
                f"-I{CSRC}",
                "-cubin",
                f"-arch={arch}",
                "-Xptxas",
                "-v",
                str(source),
                "-o",
                str(output),
            ]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            done[source, arch] = output, run.stderr
        return done[source, arch]

    return get


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_spills_and_no_local_memory(compiled, source, arch):
    _, log = compiled(source, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames, log
    assert all(frame == ("0", "0", "0") for frame in frames), log


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_ptx(tmp_path, source):
    command = [
        NVCC,
        "-std=c++20",
        "--expt-relaxed-constexpr",
        f"-I{CSRC}",
        "-ptx",
        "-arch=compute_90",
        source,
        "-o",
        tmp_path / "out.ptx",
    ]
    subprocess.run(command, check=True)
    assert ".entry" in (tmp_path / "out.ptx").read_text()


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
