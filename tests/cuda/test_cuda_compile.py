"""nvcc compiles every kernel for sm_80, sm_90a and PTX: no spills, no local memory, the instructions it should have,
and in machine code what its source promises."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from convext.bench import sass

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))


NVCC, CUOBJDUMP = sass.tool("nvcc"), sass.tool("cuobjdump")
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


# ---- what the machine code is made of (convext/bench/sass.py)

needs_disassembler = pytest.mark.skipif(sass.why_not() is not None, reason=str(sass.why_not()))
PROMISES = sass.promises(CSRC)


@pytest.fixture(scope="session")
def kernels(compiled):
    """kernels(source, arch): the machine code of every kernel in the file, read once."""
    done = {}

    def get(source: Path, arch: str) -> list[sass.Kernel]:
        if (source, arch) not in done:
            done[source, arch] = sass.read(compiled(source, arch)[0])
        return done[source, arch]

    return get


@needs_disassembler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_kernels_keep_what_their_sources_promise(kernels, source, arch):
    found = kernels(source, arch)
    assert found
    for kernel in found:
        promise = sass.promised(kernel, PROMISES)
        assert promise is not None or kernel.tile is None, f"{kernel.name}: its tile has no @sass line"
        assert promise is None or promise.broken_by(kernel) == []
        assert sass.slow_in_main_loop(kernel) == []
        if kernel.tile is not None:  # a round of the main loop is a stage, whole
            assert kernel.step["tensor"] == kernel.tile.warp_mmas, kernel.name


@needs_disassembler
@pytest.mark.parametrize("source", [s for s in SOURCES if s.stem.startswith(("igemm", "stem"))], ids=lambda s: s.stem)
def test_the_cost_model_knows_the_machine_code(kernels, source):
    """csrc/cuda/machine_code.inc, to within what another release of the compiler may change; `convext bench sass
    --write` renews it."""
    text = (CSRC / "cuda" / "machine_code.inc").read_text()
    known = {
        name: tuple(map(int, numbers.split(", ")))
        for name, numbers in re.findall(r"CONVEXT_MACHINE_CODE\((\w+), ([\d, ]+)\)", text)
    }
    for kernel in kernels(source, "sm_90a"):
        if (name := sass.variant(kernel)) is None:
            continue
        issue, shared, blocks = known[name]
        assert issue == pytest.approx(kernel.cycles()["issue"], rel=0.1), name
        assert shared == kernel.cycles()["shared"], name
        promise = sass.promised(kernel, PROMISES)
        assert blocks == kernel.blocks(int(promise.values["shared"])), name


@needs_disassembler
def test_every_promise_speaks_of_a_kernel(kernels):
    names = [kernel.name for source in SOURCES for kernel in kernels(source, "sm_90a")]
    for promise in PROMISES:
        assert any(re.match(promise.pattern, name) for name in names), (
            f"{promise.where}: no kernel is {promise.pattern}"
        )
