"""Builds convext's C++ library with ninja; all metadata is in pyproject.toml.

Three libraries come out of `csrc/`, whose folders say how a file is compiled:

* ``convext/_C``: the CPU kernels, what runs them, the selection and the torch-facing ops. Always built. Every file in
  ``csrc/cpu/kernels/`` is compiled once for each instruction set; which copy runs is decided at run time. Those in
  ``csrc/torch/`` see torch's stable ABI, no others do.
* ``convext/_storage``: ``csrc/storage/`` makes results in the pool of dropped results resizable, a few lines.
* ``convext/_CUDA``: ``csrc/cuda/``. Built when nvcc is there and agrees with torch's CUDA on the major version.

``csrc/core/`` is in the first and the last, and ``csrc/python/`` holds a file of bindings for each.

The first uses torch's stable ABI (target 2.10), the third no torch at all: a build survives another torch release. The
second takes torch's C++ headers, and is left unloaded where torch is of another release than it was built with.

Environment:
    CONVEXT_BUILD_CUDA  auto (default): build the CUDA library where it can be built; 1: fail with the reason where it
                        cannot; 0: skip it.
    CONVEXT_CUDA_ARCHS  semicolon-separated, default "80;90" (plus PTX of the newest for what comes).
    CXX                 the C++ compiler, default c++ or g++.
    MAX_JOBS            parallel compile jobs, default limited by cores and memory.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10
GIB_PER_JOB = 1.0  # the largest translation unit's peak, with room to spare

CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{CSRC}"),
    # Contraction into FMA and errno-free math, but not -ffast-math: NaN and infinity are values like any other.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
ISA_FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    CXX_FLAGS.append("-DCONVEXT_HAVE_X86_ISAS")
# A line of the files in csrc/cpu/kernels that read and write bfloat16: AVX512-BF16 offers nothing to the others.
BF16_LINE = "// Compiled for AVX512-BF16, too."


def cpu_kernels() -> Iterator[tuple[Path, str, str]]:
    """(source, instruction set, flags) of everything that the files in csrc/cpu/kernels are compiled to."""
    for source in sorted((CSRC / "cpu" / "kernels").rglob("*.cpp")):
        for isa, flags in ISA_FLAGS.items():
            if isa != "avx512_bf16" or BF16_LINE in source.read_text().splitlines():
                yield source, isa, " ".join([f"-DCONVEXT_ISA={isa}", *flags])


def cpu_host() -> list[Path]:
    """The files of the CPU library that are compiled once and see neither torch nor Python."""
    return sorted([*(CSRC / "core").glob("*.cpp"), *(CSRC / "cpu" / "runtime").glob("*.cpp")])


class BuildError(RuntimeError):
    """A build problem told in one line."""


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler: tried $CXX, c++, g++ and clang++; on Debian, apt-get install g++")


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        memory = cores * GIB_PER_JOB
    return max(1, min(cores, int(memory / GIB_PER_JOB)))


def cuda_plan() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None, and one line that says what was decided and why."""
    import torch

    wish = os.environ.get("CONVEXT_BUILD_CUDA", "auto").strip().lower()
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"CONVEXT_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")

    def off(reason: str) -> tuple[None, str]:
        if wish == "1":
            raise BuildError(f"CONVEXT_BUILD_CUDA=1, but {reason}")
        return None, f"CUDA library skipped: {reason}"

    if wish == "0":
        return off("CONVEXT_BUILD_CUDA=0")
    if not any((CSRC / "cuda").rglob("*.cu")):
        return off("this source tree holds no CUDA kernels")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), shutil.which("nvcc"), "/usr/local/cuda"]
    toolkits = [Path(h).resolve().parents[1] if h.endswith("nvcc") else Path(h) for h in homes if h]
    # A launcher on PATH, such as a wrapper in /usr/local/bin, is no toolkit: that has its compiler's parts beside it.
    parts = ("bin/nvcc", "nvvm")
    toolkit = next((t for t in toolkits if all((t / part).exists() for part in parts)), None)
    if toolkit is None:
        return off("nvcc was not found (set CUDA_HOME, or put nvcc on PATH)")
    text = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        return off(f"{toolkit / 'bin' / 'nvcc'} --version printed no release")
    if torch.version.cuda is None:
        return off(f"torch {torch.__version__} is built without CUDA")
    if release[1] != torch.version.cuda.split(".")[0]:
        return off(f"nvcc is {release[1]}.{release[2]} and torch's CUDA is {torch.version.cuda}: the majors differ")
    return toolkit, f"CUDA library built with nvcc {release[1]}.{release[2]}"


class Ninja:
    """Collects rules and edges, writes build.ninja, runs it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = ["ninja_required_version = 1.5"]
        self.objects: dict[str, list[str]] = {}

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.text += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.text += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, library: str, rule: str, source: Path, tag: str = "", flags: str = "") -> None:
        output = f"{library}/{source.relative_to(CSRC).with_suffix('').as_posix().replace('/', '.')}{tag}.o"
        self.text += [f"build {output}: {rule} {source.as_posix()}", f"  flags = {flags}"]
        self.objects.setdefault(library, []).append(output)

    def link(self, library: str, output: Path) -> None:
        self.text.append(f"build {output.as_posix()}: link_{library} {' '.join(self.objects[library])}")

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.text) + "\n")
        try:
            import ninja

            program = Path(ninja.BIN_DIR) / "ninja"
        except ImportError:
            program = Path(shutil.which("ninja") or "")
        if not program.name:
            raise BuildError("ninja was not found: pip install ninja")
        subprocess.run([program, "-C", self.folder, "-j", str(jobs())], check=True)


def compile_cuda(build: Ninja, product: str, toolkit: Path, cxx: str) -> str:
    """Adds the CUDA kernels and their selection, for CONVEXT_CUDA_ARCHS, to the objects of `product`; the flags to link
    them with. They need no torch, and cudart is linked statically, so that what comes out loads on a machine without a
    GPU or a toolkit."""
    archs = [a.strip() for a in os.environ.get("CONVEXT_CUDA_ARCHS", "80;90").split(";") if a.strip()]
    if not archs:
        raise BuildError("CONVEXT_CUDA_ARCHS names no architecture: give for example 80;90")
    targets = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX for what comes
    library = next((d for d in (toolkit / "lib64", toolkit / "lib") if (d / "libcudart_static.a").exists()), None)
    if library is None:
        raise BuildError(f"libcudart_static.a is in neither lib64 nor lib of {toolkit}")
    nvcc = f"{toolkit / 'bin' / 'nvcc'} -ccbin {cxx.split()[0]} {' '.join(NVCC_FLAGS)} {' '.join(targets)}"
    build.rule("nvcc", f"{nvcc} -MD -MF $out.d $flags -c $in -o $out")
    build.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(CXX_FLAGS)} -DCONVEXT_CUDA_LIBRARY $flags -c $in -o $out")
    for source in sorted((CSRC / "cuda").rglob("*.cu")):
        build.compile(product, "nvcc", source)
    for source in sorted([*(CSRC / "core").glob("*.cpp"), *(CSRC / "cuda").glob("*.cpp")]):
        build.compile(product, "cxx", source, flags=f"-isystem {toolkit / 'include'}")
    return f"-L{library} -lcudart_static -ldl -lrt -lpthread"


def build_cuda_library(folder: Path, cpu_library: Path, toolkit: Path, cxx: str, python: str) -> Path:
    """Compiles and links convext/_CUDA beside the CPU library; the path of it."""
    build = Ninja(folder)
    libraries = compile_cuda(build, "_CUDA", toolkit, cxx)
    build.rule("link__CUDA", f"{cxx} -shared -o $out $in {libraries}", depfile=False)
    build.compile("_CUDA", "cxx", CSRC / "python" / "bindings_cuda.cpp", flags=python)
    library = cpu_library.with_name(cpu_library.name.replace("_C", "_CUDA", 1))
    build.link("_CUDA", library)
    build.run()
    return library


class BuildWithNinja(build_ext):
    beside: tuple[Path, ...] = ()  # what was built besides the declared extension

    def copy_extensions_to_source(self) -> None:
        """The last step of --inplace, which knows of the declared extension alone."""
        super().copy_extensions_to_source()
        for library in self.beside:
            self.copy_file(str(library), str(ROOT / "convext"))

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        toolkit, cuda_line = cuda_plan()
        torch_root = Path(torch.__file__).parent
        cxx = compiler()
        version = subprocess.run([*cxx.split(), "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
        stable_abi = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {torch_root / 'include'}"
        python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        info = {
            "CONVEXT_BUILT_WITH_TORCH": torch.__version__,
            "CONVEXT_BUILT_WITH_COMPILER": f"{Path(cxx.split()[0]).name} {version}",
            "CONVEXT_CUDA_PLAN": cuda_line,
        }
        defines = " ".join(f"""'-D{key}="{value}"'""" for key, value in info.items())

        build = Ninja(Path(self.build_temp).resolve())
        build.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(CXX_FLAGS)} $flags -c $in -o $out")
        build.rule("link__C", f"{cxx} -shared -o $out $in -L{torch_root / 'lib'} -ltorch_cpu", depfile=False)
        for source, isa, flags in cpu_kernels():
            build.compile("_C", "cxx", source, f".{isa}", flags)
        for host in cpu_host():
            build.compile("_C", "cxx", host)
        for source in sorted((CSRC / "torch").glob("*.cpp")):
            build.compile("_C", "cxx", source, flags=stable_abi)
        bindings = CSRC / "python" / "bindings.cpp"
        build.compile("_C", "cxx", bindings, flags=f"-O1 {python} {defines}")  # nothing hot in it
        build.link("_C", output)
        build.rule("link__storage", f"{cxx} -shared -o $out $in -L{torch_root / 'lib'} -lc10", depfile=False)
        build.compile(
            "_storage",
            "cxx",
            CSRC / "storage" / "storage.cpp",
            flags=f"-O1 -std=c++20 {python} -isystem {torch_root / 'include'}",
        )
        storage = output.with_name(output.name.replace("_C", "_storage", 1))
        build.link("_storage", storage)
        build.run()
        self.beside = (storage,)
        if toolkit is not None:
            folder = Path(self.build_temp).resolve() / "cuda"
            self.beside += (build_cuda_library(folder, output, toolkit, cxx, python),)
        isas = ", ".join(reversed(ISA_FLAGS))
        print(f"convext: CPU library built ({isas}) with torch {torch.__version__}; {cuda_line}", file=sys.stderr)


if __name__ == "__main__":  # csrc/tests/run.py imports the flags
    try:
        setup(ext_modules=[Extension("convext._C", sources=[])], cmdclass={"build_ext": BuildWithNinja})
    except (BuildError, subprocess.CalledProcessError) as error:
        sys.exit(f"convext: the build failed: {error}")
