"""Builds the CUDA kernels with g++ for the emulator in csrc/tests/cuda_on_cpu, in the forms that the tests run.

plain   the fast one, for the whole list of cases
asan    address sanitizer: shared memory past its end, local arrays; and vector loads and stores at addresses that do
        not fit them, bad shifts and indices
race    every load and store checked for races in shared memory, and counted in global memory
ptx     a library for ptx_run.py, which runs the launches: of the kernels only their addresses matter
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import re
import shutil
import site
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = "tests/cuda_on_cpu"
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,alignment,bounds,shift,integer-divide-by-zero", "-fno-sanitize-recover=all"],
    "race": [],
    "ptx": ["-fPIC", "-shared"],
}


def cuda_include() -> Path | None:
    """A folder with CUDA's headers: a toolkit's, or what torch's CUDA wheels or triton bring."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(t) / "include" for t in toolkits if t]
    for packages in {*site.getsitepackages(), site.getusersitepackages()}:
        folders += sorted(Path(packages).glob("nvidia/*/include"))
        folders.append(Path(packages) / "triton" / "backends" / "nvidia" / "include")
    needed = ("cuda_bf16.h", "cuda_fp16.h", "vector_types.h")
    return next((f for f in folders if all((f / name).exists() for name in needed)), None)


def why_not() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"the emulator switches stacks on x86-64 and aarch64, this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "g++ was not found"
    if cuda_include() is None:
        return "CUDA's headers were not found: no toolkit, and no CUDA wheel of torch"
    return None


def flags(csrc: Path, form: str) -> list[str]:
    """The compiler's flags for one form."""
    found = [
        "-std=c++20",
        {"plain": "-O2", "ptx": "-O0"}.get(form, "-O1"),
        "-g1",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-fno-strict-aliasing",
        f'-DCONVEXT_CUDA_ON_CPU="{EMULATOR}/cuda_names.h"',
        f"-I{csrc}",
        "-isystem",
        str(cuda_include()),
    ]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and " avx2 " in cpuinfo.read_text():
        found.append("-march=x86-64-v3")
    return found + SANITIZERS[form]


def build(folder: Path, form: str, kernels: list[str], main: str, csrc: Path = CSRC, known: Path | None = None) -> Path:
    """The program `main` with `kernels` (sources, relative to csrc) in one form; the path of the executable.
    A second program in the same folder uses the objects of the first. `known` is a folder of objects for builds from
    other csrc: what the preprocessor makes the same text of is compiled once.

    Raises RuntimeError with the compiler's words where it does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = flags(csrc, form)
    hosts = [f"{EMULATOR}/fiber.cpp", f"{EMULATOR}/emulator.cpp", main]
    if form == "race":
        # race.cpp stands in for the thread sanitizer's library.
        hosts += [f"{EMULATOR}/race.cpp", f"{EMULATOR}/warp_accesses.cpp"]
    if form == "ptx":
        hosts += [f"{EMULATOR}/elsewhere.cpp", f"{EMULATOR}/warp_accesses.cpp"]
    # Vectors are loaded and stored whole, as nvcc does it; -g tells which function an access comes from.
    sanitized = ["-fsanitize=thread", "-fno-tree-sra", "-g"] if form == "race" else []
    jobs = [(source, [*common, *sanitized]) for source in kernels] + [(source, common) for source in hosts]
    objects = compile_all(folder, csrc, jobs, known)
    program = folder / Path(main).stem
    if program.exists():
        return program
    _run(["g++", *SANITIZERS[form], *objects, "-o", str(program)])
    return program


def compile_all(folder: Path, csrc: Path, jobs: list[tuple[str, list[str]]], known: Path | None = None) -> list[str]:
    """Compiles (source relative to csrc, flags) pairs, as many at a time as there are cores; the object files."""

    def compile_one(job: tuple[str, list[str]]) -> str:
        source, arguments = job
        command = ["g++", *arguments, "-x", "c++", str(csrc / source)]
        output = folder / (source.replace("/", ".") + ".o")
        if known is not None:
            elsewhere = [a for a in arguments if a != f"-I{csrc}"]  # where it lies does not change what it says
            text = "\0".join([*elsewhere, _run([*command, "-E", "-P"])])
            output = known / f"{hashlib.sha256(text.encode()).hexdigest()}.o"
        if not output.exists():
            written = folder / f"{output.name}.part"  # of two that compile the same at once, the last counts
            _run([*command, "-c", "-o", str(written)])
            written.rename(output)
        return str(output)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(compile_one, jobs))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def kernel_sources() -> list[str]:
    """Every .cu that holds variants."""
    sources = (CSRC / "cuda").rglob("*.cu")
    return sorted(p.relative_to(CSRC).as_posix() for p in sources if p.name != "batch_norm_sm80.cu")


def sources_of(folder: Path, variant: str, source: str, instance: str | None) -> Path:
    """A copy of csrc in which there is this variant alone. `instance` is what its source file is to have of all the
    instances of its templates; None leaves the file as it is."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    if instance is not None:
        text = (csrc / source).read_text()
        head, *_ = re.split(r"^CONVEXT_(?:IGEMM|STEM)\w*\(", text, maxsplit=1, flags=re.M)  # where the instances begin
        (csrc / source).write_text(f"{head}{instance}\n}}  // namespace convext\n")
    (csrc / "core" / "variants.inc").write_text(
        f"CONVEXT_CUDA_VARIANT({variant})\n#undef CONVEXT_CPU_VARIANT\n#undef CONVEXT_CUDA_VARIANT\n"
    )
    return csrc


def run(program: Path, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)
