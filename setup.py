"""Builds convext's C++ library with ninja; all metadata is in pyproject.toml.

Three libraries that know no Python come out of `csrc/`, whose folders say how a file is compiled. They are compiled
once for all releases of Python:

* ``convext/libconvext.abi3.so``: the CPU kernels, what runs them, the selection and the torch-facing ops. Always built.
  Every file in ``csrc/cpu/kernels/`` is compiled once for each instruction set; which copy runs is decided at run time.
  Those in ``csrc/torch/`` see torch's stable ABI, no others do.
* ``convext/libconvext_cuda.abi3.so``: ``csrc/cuda/``. Built when nvcc is there and agrees with torch's CUDA on the
  major version.
* ``convext/libconvext_storage.so``: ``csrc/storage/`` makes results in the pool of dropped results resizable.

``csrc/core/`` is in the first two, ``csrc/compat/`` in all. For each Python there are ``convext/_C`` and
``convext/_CUDA``, bindings alone: the two files of ``csrc/python/``; and ``convext/_call``: ``csrc/call/`` serves calls
of problems that were called before, between Python's tensors and the kernels.

The first uses torch's stable ABI (target 2.10), the second no torch at all: a build survives another torch release. The
third and ``_call`` take torch's C++ headers, and are left unloaded where torch is of another release than they were
built with.

Environment:
    CONVEXT_BUILD_CUDA    auto (default): build the CUDA library where it can be built, GPU or not; 1: fail with the
                          reason where it cannot; gpu: build it where there is a GPU, and for that alone; 0: skip it.
    CONVEXT_CUDA_ARCHS    semicolon-separated, default "80;90" (plus PTX of the newest for what comes).
    TORCH_CUDA_ARCH_LIST  as torch's own extensions take it ("8.0;9.0+PTX"), where the one before is not set.
    CONVEXT_TORCH         the folder of the torch to build beside, where this Python has none to import: of another
                          Python's (release/wheels.py).
    CXX                   the C++ compiler, default c++ or g++.
    MAX_JOBS              parallel compile jobs, default limited by cores and memory.

What is said begins with "convext: ", for ./dev picks it out of pip's output.
"""

import errno
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10
GIB_PER_JOB = 1.0  # the largest translation unit's peak, with room to spare
USUAL_CUDA_HOME = "/usr/local/cuda"
OLDEST_GLIBC = (2, 28)  # as manylinux_2_28 has it
OLDEST_CUDA_ARCH = 80  # the kernels copy asynchronously and multiply bfloat16
CUDA_FAMILIES = {  # the names that TORCH_CUDA_ARCH_LIST knows besides numbers
    **{"volta": "7.0", "turing": "7.5", "ampere": "8.0;8.6", "ada": "8.9", "hopper": "9.0"},
    "blackwell": "10.0;12.0",
}

CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{CSRC}"),
    # Contraction into FMA and errno-free math, but not -ffast-math: NaN and infinity are values like any other.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
LINK_FLAGS = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-Wl,--version-script"]
# The libraries that know no Python, by their names in the package. "abi3" to audits: the part of Python's ABI that
# never changes, of which they use nothing.
CPU_LIBRARY, CUDA_LIBRARY, STORAGE_LIBRARY = (
    *("libconvext.abi3.so", "libconvext_cuda.abi3.so"),
    "libconvext_storage.so",
)
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


def compile_kernels(build: "Ninja", library: str, cxx: str) -> None:
    """Adds the files in csrc/cpu/kernels to the objects of `library`. All of them include the vectors and with them the
    compiler's intrinsics, which take GCC longer to read than most kernels to compile: it reads them once for each
    instruction set. Other compilers read them each time."""
    macros = subprocess.run([*cxx.split(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    gcc = "__GNUC__" in macros and "__clang__" not in macros
    for source, isa, flags in cpu_kernels():
        header = build.precompile("cxx", "cpu/simd/half.h", isa, flags) if gcc else None
        build.compile(library, "cxx", source, f".{isa}", flags, header)


def cpu_host() -> list[Path]:
    """The files of the CPU library that are compiled once and see neither torch nor Python."""
    return sorted(file for place in ("core", "compat", "cpu/runtime") for file in (CSRC / place).glob("*.cpp"))


class BuildError(RuntimeError):
    """A build problem told in one line: the cause and the remedy."""


def say(text: str) -> None:
    print(f"convext: {text}", file=sys.stderr, flush=True)


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler: tried $CXX, c++, g++ and clang++; on Debian, apt-get install g++")


def check_compiler(cxx: str) -> None:
    """Whether it takes what the kernels are compiled with, before minutes are spent on the files that come first."""
    for isa, flags in ISA_FLAGS.items():
        command = [*cxx.split(), *flags, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        tried = subprocess.run(command, input="#include <cstdint>\n", capture_output=True, text=True)
        if tried.returncode != 0:
            said = next(iter(tried.stderr.strip().splitlines()), f"exit status {tried.returncode}")
            raise BuildError(
                f"{cxx} does not compile C++20 for {isa} ({said}): set CXX to GCC 10, Clang 11 or a later one; "
                "on Debian, apt-get install g++"
            )


def check_python() -> None:
    """Whether Python's headers and the packages that the build needs are there."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise BuildError(f"{header} is missing: on Debian, apt-get install python3-dev")
    for package in ("pybind11",) if os.environ.get("CONVEXT_TORCH") else ("torch", "pybind11"):
        try:
            __import__(package)
        except ImportError as error:
            raise BuildError(
                f"{package} cannot be imported ({error}): pip install {package}, or leave --no-build-isolation out"
            ) from None


class Torch(NamedTuple):
    """The torch that the libraries are built beside."""

    folder: Path
    version: str
    cuda: str | None


def torch_beside() -> Torch:
    folder = os.environ.get("CONVEXT_TORCH")
    if folder:
        try:
            facts = runpy.run_path(os.path.join(folder, "version.py"))
        except OSError as error:
            raise BuildError(f"CONVEXT_TORCH is no folder of a torch ({error})") from None
        return Torch(Path(folder), facts["__version__"], facts["cuda"])
    import torch

    return Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda)


MEMINFO = Path("/proc/meminfo")


def at_once(gib: float) -> int:
    """How many processes of that size the machine has cores and memory for. Memory that holds copies of files is free,
    too, though SC_AVPHYS_PAGES does not count it: after a build or a test it may hold nothing else."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = re.search(r"^MemAvailable: +(\d+) kB$", MEMINFO.read_text(), re.M) if MEMINFO.exists() else None
    return max(1, min(cores, int(int(found[1]) / 2**20 / gib) if found else cores))


def jobs() -> int:
    return max(1, int(os.environ["MAX_JOBS"])) if os.environ.get("MAX_JOBS") else at_once(GIB_PER_JOB)


def gpu_archs() -> list[str]:
    """The architectures of the GPUs that torch sees: ["90"]."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)]


def cuda_archs() -> list[str]:
    """The architectures to compile for, the oldest first: ["80", "90"]."""
    ours, torchs = (os.environ.get(name, "").strip() for name in ("CONVEXT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"))
    if ours:
        name, archs = "CONVEXT_CUDA_ARCHS", [part.strip() for part in ours.split(";") if part.strip()]
    elif torchs:
        name, archs = "TORCH_CUDA_ARCH_LIST", []
        for part in re.split(r"[;, ]+", torchs):
            family = CUDA_FAMILIES.get(part.lower().removesuffix("+ptx"), part)
            archs += [one.replace(".", "").removesuffix("+PTX") for one in family.split(";") if one]
    elif os.environ.get("CONVEXT_BUILD_CUDA", "").strip().lower() == "gpu":
        name, archs = "the GPUs", gpu_archs()
    else:
        return ["80", "90"]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not archs:
        given = f"names {wrong[0]!r}" if wrong else "names no architecture"
        raise BuildError(f"{name} {given}: give for example {'80;90' if name != 'TORCH_CUDA_ARCH_LIST' else '8.0;9.0'}")
    number = {arch: int(arch.rstrip("af")) for arch in archs}
    return sorted({arch for arch in archs if number[arch] >= OLDEST_CUDA_ARCH}, key=lambda arch: (number[arch], arch))


def cuda_plan() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None, and one line that says what was decided and why."""
    torch = torch_beside()
    wish = os.environ.get("CONVEXT_BUILD_CUDA", "auto").strip().lower()
    if wish not in ("auto", "gpu", "0", "1"):
        raise BuildError(f"CONVEXT_BUILD_CUDA must be auto, gpu, 0 or 1, got {wish!r}")

    def off(reason: str) -> tuple[None, str]:
        if wish == "1":
            raise BuildError(f"CONVEXT_BUILD_CUDA=1, but {reason}")
        return None, f"CUDA library skipped: {reason}"

    if wish == "0":
        return off("CONVEXT_BUILD_CUDA=0")
    if not any((CSRC / "cuda").rglob("*.cu")):
        return off("this source tree holds no CUDA kernels")
    if torch.cuda is None:
        return off(f"torch {torch.version} is built without CUDA (pip install a CUDA build of torch)")
    if wish == "gpu" and not gpu_archs():
        return off("torch sees no GPU here (CONVEXT_BUILD_CUDA=1 builds it all the same)")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), shutil.which("nvcc"), USUAL_CUDA_HOME]
    toolkits = [Path(h).resolve().parents[1] if h.endswith("nvcc") else Path(h) for h in homes if h]
    # A launcher on PATH, such as a wrapper in /usr/local/bin, is no toolkit: that has its compiler's parts beside it.
    parts = ("bin/nvcc", "nvvm")
    toolkit = next((t for t in toolkits if all((t / part).exists() for part in parts)), None)
    if toolkit is None:
        return off("nvcc was not found (set CUDA_HOME, or put nvcc on PATH)")
    nvcc = toolkit / "bin" / "nvcc"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        return off(f"{nvcc} --version printed no release (set CUDA_HOME to another toolkit)")
    major = torch.cuda.split(".")[0]
    if release[1] != major:
        return off(
            f"nvcc is {release[1]}.{release[2]} and torch's CUDA is {torch.cuda}: the majors differ "
            f"(set CUDA_HOME to a toolkit of CUDA {major})"
        )
    archs = cuda_archs()
    if not archs:
        return off(f"all architectures asked for are older than sm_{OLDEST_CUDA_ARCH}, which the kernels need")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    unknown = [arch for arch in archs if f"sm_{arch.rstrip('af')}" not in known]
    if known and unknown:
        return off(
            f"nvcc {release[1]}.{release[2]} does not compile for sm_{unknown[0]} "
            "(set CUDA_HOME to a newer toolkit, or CONVEXT_CUDA_ARCHS)"
        )
    return toolkit, f"CUDA library built with nvcc {release[1]}.{release[2]} for {', '.join('sm_' + a for a in archs)}"


# Seconds of a core that a file takes, where it is not half a one, or half a minute for CUDA's: they tell how long a
# build will last.
SECONDS = {
    **{"batch_norm": 14.0, "call": 13.0, "depthwise_taps": 9.0, "bindings": 7.5, "gemm": 4.5, "winograd": 4.5},
    **{"storage": 4.0, "stem_fprop": 2.3, "ops_sequence": 2.3, "ops_conv": 2.2, "depthwise_wgrad": 2.0, "staging": 2.0},
    **{"ops_batch_norm": 1.5, "pointwise_fprop": 1.5, "gemm_wgrad": 1.2, "stem_wgrad": 1.2},
}
OTHER_SECONDS = {".cpp": 0.5, ".cu": 30.0}


def in_words(seconds: float) -> str:
    """About how long, as one would say it: "1 min 10 s"."""
    tens = max(1, round(seconds / 10)) * 10
    return f"{tens} s" if tens < 60 else f"{tens // 60} min {tens % 60} s"


class Progress:
    """Says how far a build is: how many of its files are compiled, which was the last, and how long the rest will take.
    On a terminal in one line that changes, elsewhere in a line every few seconds."""

    INTERVAL = 3.0
    TELLING = 0.1  # the share from which on the time so far tells of the time left

    def __init__(self, library: str, seconds: dict[str, float]):
        self.library, self.seconds = library, seconds
        self.began, self.told, self.done = time.monotonic(), 0.0, 0.0
        self.terminal = sys.stderr.isatty()

    def finished(self, count: int, output: str) -> None:
        total, now = len(self.seconds), time.monotonic()
        self.done += self.seconds.get(output, 0.0)
        if count < total and now - self.told < self.INTERVAL:
            return
        self.told = now
        share = self.done / sum(self.seconds.values()) if self.done else 0.0
        if count == total:
            rest = f", done in {now - self.began:.0f} s"
        elif share >= self.TELLING:
            rest = f", about {in_words((now - self.began) * (1 / share - 1))} left"
        else:
            rest = ""
        name = re.sub(r"^cpu\.kernels\.\w+\.|\.o$", "", Path(output).name)
        line = f"convext: {self.library}: {count} of {total}, {name}{rest}"
        ending = "\n" if count == total or not self.terminal else ""
        print(("\r\033[K" if self.terminal else "") + line, end=ending, file=sys.stderr, flush=True)


def why_it_failed(output: str, folder: Path) -> str:
    """The cause and the remedy of a compilation that failed, out of what it printed."""
    if re.search(r"No space left on device|Disk quota exceeded", output):
        return no_space(folder)
    # What the compiler says, what its driver says of it, what the shell says of the driver.
    if re.search(r"memory exhausted|out of memory|annot allocate memory|bad_alloc|\bKilled\b|code=137", output):
        count = jobs()
        cure = "set MAX_JOBS=1 to run one at a time" if count > 1 else "free some, or add swap"
        return (
            f"too little memory for {count} compiler{'s at once' * (count > 1)} of up to {GIB_PER_JOB:.0f} GiB: "
            f"{cure}, and run it again, what is compiled is kept"
        )
    first = re.search(r"^.*\b(?:error|fatal): .*$", output, re.M)
    return f"a file does not compile: {first[0].strip()}" if first else "ninja failed, with the output above"


def no_space(folder: Path) -> str:
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    return (
        f"no space is left on the disk ({free >> 20} MiB are free at {folder}; the compiler's own files go to TMPDIR): "
        "free some and run it again, what is compiled is kept"
    )


class Ninja:
    """Collects rules and edges, writes build.ninja, runs it. What is compiled already is not compiled again, also where
    the last run was ended half-way."""

    def __init__(self, folder: Path, name: str = "build"):
        self.folder, self.name = folder, name
        self.text = ["ninja_required_version = 1.5"]
        self.edges: list[tuple[float, list[str]]] = []
        self.objects: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.files: dict[Path, str] = {}  # from the folder that ninja runs in

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.text += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.text += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, output: str, what: str, seconds: float, *bindings: str) -> None:
        self.seconds[output] = seconds
        self.edges.append((seconds, [f"build {output}: {what}", *(f"  {binding}" for binding in bindings)]))

    def compile(
        self, library: str, rule: str, source: Path, tag: str = "", flags: str = "", header: Path | None = None
    ) -> None:
        """Adds one object. `header` is one that precompile has given."""
        output = f"{library}/{source.relative_to(CSRC).with_suffix('').as_posix().replace('/', '.')}{tag}.o"
        inputs = source.as_posix()
        if header is not None:
            inputs += f" | {header}.gch"
            flags += f" -include {header}"
        self.edge(
            output, f"{rule} {inputs}", SECONDS.get(source.stem, OTHER_SECONDS[source.suffix]), f"flags = {flags}"
        )
        self.objects.setdefault(library, []).append(output)

    def precompile(self, rule: str, include: str, tag: str, flags: str) -> Path:
        """A header that includes one of csrc/, and GCC's digest of it, for files with the same rule and flags."""
        header = Path("headers", f"{tag}.h")
        if header not in self.files:
            self.files[header] = f'#include "{include}"\n'
            self.edge(f"{header}.gch", f"{rule} {header}", 0.7, f"flags = {flags} -x c++-header")
        return header

    def link(self, library: str, output: Path) -> None:
        self.edge(output.as_posix(), f"link_{library} {' '.join(self.objects[library])}", 0.5)

    def link_shared(self, library: str, output: Path, cxx: str, exports: str, libraries: str, inputs: str = "") -> None:
        """Links a shared library that shows the symbols `exports` and no others: those of csrc/compat, and templates of
        the standard library's, stay its own. `inputs`: files among `libraries` that it is linked anew for."""
        script = Path(f"{library}.exports")
        self.files[script] = exports
        flags = f"{' '.join(LINK_FLAGS)} {script} -Wl,-soname,{output.name}"  # by that name others find it, beside them
        self.rule(f"link_{library}", f"{cxx} {flags} -o $out $in {libraries}", depfile=False)
        objects = " ".join(self.objects[library])
        self.edge(output.as_posix(), f"link_{library} {objects} | {script} {inputs}".rstrip(), 0.5)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            file = self.folder / name
            file.parent.mkdir(exist_ok=True)
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
        self.edges.sort(key=lambda edge: -edge[0])  # no long one is left for the end
        lines = [*self.text, *(line for _, edge in self.edges for line in edge)]
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            import ninja

            program = Path(ninja.BIN_DIR) / "ninja"
        except ImportError:
            program = Path(shutil.which("ninja") or "")
        if not program.name:
            raise BuildError("ninja was not found: pip install ninja")
        command = [program, "-C", self.folder, "-j", str(jobs())]
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
        status = re.compile(r"\[(\d+)/\d+\] \w+ (\S+)$")
        planned = subprocess.run([*command, "-n"], env=environment, capture_output=True, text=True).stdout
        outputs = [found[2] for found in map(status.match, planned.splitlines()) if found]
        progress = Progress(self.name, {output: self.seconds.get(output, 0.0) for output in outputs})
        said = []
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as running:
            for line in running.stdout:
                found = status.match(line.rstrip())
                if found:
                    progress.finished(int(found[1]), found[2])
                elif not line.startswith("ninja: "):
                    said.append(line)
                    print(line, end="", file=sys.stderr, flush=True)
        if running.returncode != 0:
            raise BuildError(why_it_failed("".join(said), self.folder))


def static_cudart(toolkit: Path) -> Path:
    archive = next((file for d in ("lib64", "lib") if (file := toolkit / d / "libcudart_static.a").exists()), None)
    if archive is None:
        raise BuildError(f"libcudart_static.a is in neither lib64 nor lib of {toolkit}")
    return archive


def compile_cuda(build: Ninja, product: str, toolkit: Path, cxx: str) -> str:
    """Adds the CUDA kernels and their selection, for CONVEXT_CUDA_ARCHS, to the objects of `product`; the flags to link
    them with. They need no torch, and cudart is linked statically, so that what comes out loads on a machine without a
    GPU or a toolkit."""
    archs = cuda_archs()
    targets = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    newest = archs[-1].rstrip("af")
    targets.append(f"-gencode arch=compute_{newest},code=compute_{newest}")  # PTX for what comes
    nvcc = f"{toolkit / 'bin' / 'nvcc'} -ccbin {cxx.split()[0]} {' '.join(NVCC_FLAGS)} {' '.join(targets)}"
    build.rule("nvcc", f"{nvcc} -MD -MF $out.d $flags -c $in -o $out")
    build.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(CXX_FLAGS)} -DCONVEXT_CUDA_LIBRARY $flags -c $in -o $out")
    for source in sorted((CSRC / "cuda").rglob("*.cu")):
        build.compile(product, "nvcc", source)
    for source in sorted(file for place in ("core", "compat", "cuda") for file in (CSRC / place).glob("*.cpp")):
        build.compile(product, "cxx", source, flags=f"-isystem {toolkit / 'include'}")
    return f"{static_cudart(toolkit)} -ldl -lrt -lpthread"


def exports(version: str) -> str:
    """What a library shows to its bindings: what csrc/core/api.h marks. Under a version of its own, because some of the
    names are in both libraries, and each means its own kernels."""
    return f"{version} {{ global: _ZN7convext*; _ZNK7convext*; _ZTVN7convext*; _ZTIN7convext*; local: *; }};\n"


def torch_flags() -> tuple[str, str]:
    """What finds torch's headers, and its libraries."""
    torch = torch_beside()
    # Ninja looks at no header of the system's: the release is among the flags, so that another one compiles anew.
    return f"'-DCONVEXT_TORCH=\"{torch.version}\"' -isystem {torch.folder / 'include'}", f"-L{torch.folder / 'lib'}"


def build_cpu_library(folder: Path, cxx: str) -> list[Path]:
    """Compiles and links the CPU library, and the one that knows torch's storages; their paths."""
    headers, beside = torch_flags()
    build = Ninja(folder, "CPU library")
    build.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(CXX_FLAGS)} $flags -c $in -o $out")
    compile_kernels(build, "cpu", cxx)
    for host in cpu_host():
        build.compile("cpu", "cxx", host)
    for source in sorted((CSRC / "torch").glob("*.cpp")):
        build.compile("cpu", "cxx", source, flags=f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} {headers}")
    # The standard library first: torch's has copies of some of its symbols, other ones in another release.
    build.link_shared("cpu", Path(CPU_LIBRARY), cxx, exports("CONVEXT_CPU"), f"-lstdc++ {beside} -ltorch_cpu")
    build.compile("storage", "cxx", CSRC / "storage" / "storage.cpp", flags=f"-O1 -std=c++20 {headers}")
    build.compile("storage", "cxx", CSRC / "compat" / "older_systems.cpp")
    shown = "{ global: convext_make_resizable; local: *; };\n"
    build.link_shared("storage", Path(STORAGE_LIBRARY), cxx, shown, f"-lstdc++ {beside} -lc10")
    build.run()
    return [folder / CPU_LIBRARY, folder / STORAGE_LIBRARY]


def older_forms(libc: str) -> dict[str, str]:
    """name -> name@version: what the C library offers in a form newer than OLDEST_GLIBC's, and in that one, too. From
    2.34 on these are the functions of threads and of dlopen, in which nothing but their place has changed."""
    text = subprocess.run(["nm", "-D", libc], capture_output=True, text=True).stdout
    forms: dict[str, list[tuple[tuple[int, ...], str, str]]] = {}
    for name, at, version in re.findall(r"^[0-9a-f]+ \w ([^@\s]+)(@@?)GLIBC_([\d.]+)$", text, re.M):
        forms.setdefault(name, []).append((tuple(map(int, version.split("."))), version, at))
    older = {}
    for name, found in forms.items():
        fitting = [(number, version) for number, version, _ in found if number <= OLDEST_GLIBC]
        if fitting and any(number > OLDEST_GLIBC and at == "@@" for number, _, at in found):
            older[name] = f"{name}@GLIBC_{max(fitting)[1]}"
    return older


def build_cuda_library(folder: Path, toolkit: Path, cxx: str) -> Path:
    """Compiles and links the CUDA library; its path."""
    build = Ninja(folder, "CUDA library")
    libraries, inputs = compile_cuda(build, "cuda", toolkit, cxx), ""

    def system_library(name: str) -> str:
        command = [*cxx.split(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    older = older_forms(system_library("libc.so.6"))
    if older and shutil.which("objcopy"):
        # cudart asks for whatever form is here: it gets a copy that asks for the older ones, and for where they were.
        build.files[Path("older_forms")] = "".join(f"{name} {form}\n" for name, form in sorted(older.items()))
        build.rule("older", "objcopy --redefine-syms=older_forms $in $out", depfile=False)
        inputs = "libcudart_static.a"
        build.edge(inputs, f"older {static_cudart(toolkit)} | older_forms", 0.5)
        places = " ".join(map(system_library, ("libpthread.so.0", "libdl.so.2", "librt.so.1")))
        libraries = f"{inputs} -Wl,--no-as-needed {places}"
    build.link_shared("cuda", Path(CUDA_LIBRARY), cxx, exports("CONVEXT_CUDA"), libraries, inputs)
    build.run()
    return folder / CUDA_LIBRARY


def build_bindings(folder: Path, output: Path, libraries: dict[str, Path], cxx: str, defines: str) -> list[Path]:
    """Compiles and links, for the Python that runs this, the bindings of the libraries, by the names of the modules,
    and ``_call``; the first of them is `output`, and the others lie beside it."""
    import pybind11

    python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    build = Ninja(folder, "bindings")
    build.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(CXX_FLAGS)} $flags -c $in -o $out")
    modules = []

    def link(name: str, libraries: str, inputs: str = "", standard: str = "") -> None:
        build.compile(name, "cxx", CSRC / "compat" / "older_systems.cpp", flags=standard)
        module = output.with_name(output.name.replace("_C", name, 1))
        shown = f"{{ global: PyInit_{name}; local: *; }};\n"
        # Python's own symbols are the interpreter's.
        build.link_shared(name, module, cxx, shown, f"-Wl,-z,undefs {libraries}", inputs)
        modules.append(module)

    for name, library in libraries.items():
        source = CSRC / "python" / f"bindings{'_cuda' if name == '_CUDA' else ''}.cpp"
        flags = "-DCONVEXT_CUDA_LIBRARY" if name == "_CUDA" else defines
        build.compile(name, "cxx", source, flags=f"-O1 {python} {flags}")  # nothing hot in it
        link(name, f"{library} -Wl,-rpath,'$$ORIGIN' -lstdc++", str(library))
    headers, beside = torch_flags()
    standard = "-std=c++20"  # as torch itself is compiled
    build.compile("_call", "cxx", CSRC / "call" / "call.cpp", flags=f"-O2 {standard} {python} {headers}")
    link("_call", f"-lstdc++ {beside} -lc10 -ltorch_cpu -ltorch_python", standard=standard)
    build.run()
    return modules


class BuildWithNinja(build_ext):
    beside: tuple[Path, ...] = ()  # what was built besides the declared extension

    def copy_extensions_to_source(self) -> None:
        """The last step of --inplace, which knows of the declared extension alone."""
        super().copy_extensions_to_source()
        for library in self.beside:
            self.copy_file(str(library), str(ROOT / "convext"))

    def build_extension(self, ext: Extension) -> None:
        check_python()
        cxx = compiler()
        check_compiler(cxx)
        torch = torch_beside()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        toolkit, cuda_line = cuda_plan()
        if toolkit is not None:
            will = cuda_line.replace("built", "will be built, which takes minutes,")
            say(f"{will} (CONVEXT_CUDA_ARCHS says for which); CONVEXT_BUILD_CUDA=0 leaves it out")
        version = subprocess.run([*cxx.split(), "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
        info = {
            "CONVEXT_BUILT_WITH_TORCH": torch.version,
            "CONVEXT_BUILT_WITH_COMPILER": f"{Path(cxx.split()[0]).name} {version}",
            "CONVEXT_CUDA_PLAN": cuda_line,
        }
        defines = " ".join(f"""'-D{key}="{value}"'""" for key, value in info.items())

        own = Path(self.build_temp).resolve()
        # One folder for every Python that builds here: build/temp.linux-x86_64 of build/temp.linux-x86_64-cpython-311.
        shared = own.with_name(own.name.removesuffix(f"-{sys.implementation.cache_tag}"))
        libraries = build_cpu_library(shared, cxx)
        modules = {"_C": libraries[0]}
        if toolkit is not None:
            modules["_CUDA"] = build_cuda_library(shared / "cuda", toolkit, cxx)
            libraries.append(modules["_CUDA"])
        bindings = build_bindings(own / "bindings", output, modules, cxx, defines)
        self.beside = (*bindings[1:], *(output.with_name(library.name) for library in libraries))
        for library in libraries:
            self.copy_file(str(library), str(output.parent))
        for former in set(output.parent.glob("*.so")) - {output, *self.beside}:
            former.unlink()  # of a build with other settings
        isas = ", ".join(reversed(ISA_FLAGS))
        say(f"CPU library built ({isas}) with torch {torch.version}; {cuda_line}")


class BuildWithShapes(build_py):
    """The package as it stands, and in it the shape files of `convext bench layers`, which lie beside it here."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in sorted((ROOT / "benchmarks" / "shapes").glob("*.txt")):
                target = Path(self.build_lib) / "convext" / "bench" / "shape_files" / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(file), str(target))


if __name__ == "__main__":  # csrc/tests/run.py imports the flags
    commands = {"build_ext": BuildWithNinja, "build_py": BuildWithShapes}
    try:
        setup(ext_modules=[Extension("convext._C", sources=[])], cmdclass=commands)
    except (BuildError, subprocess.CalledProcessError) as error:
        sys.exit(f"convext: the build failed: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"convext: the build failed: {no_space(ROOT)}")
