"""Builds and runs the stand-alone C++ tests: `csrc/tests/cpu_*.cpp`, each linked with every CPU kernel and the
selection, and on a GPU `csrc/tests/cuda_*.cpp`, each linked with every CUDA kernel. Without a GPU the latter run on an
emulator, for which tests/support/cuda_on_cpu.py builds them.

    python csrc/tests/run.py                 with the flags of the library
    python csrc/tests/run.py --sanitize      under the address and undefined-behaviour sanitizers
    python csrc/tests/run.py --gpu           the CUDA kernels, for CONVEXT_CUDA_ARCHS (see setup.py)
    python csrc/tests/run.py --gpu --only-build --folder build/gpu

Flags and instruction sets are setup.py's, so what is tested is what is shipped. No torch is involved.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from setup import (  # noqa: E402
    CSRC,
    CXX_FLAGS,
    BuildError,
    Ninja,
    compile_cuda,
    compile_kernels,
    compiler,
    cpu_host,
    cuda_plan,
)

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]


def build(folder: Path, extra: list[str]) -> list[Path]:
    """Compiles everything into `folder` and returns the test programs."""
    ninja = Ninja(folder, "C++ tests")
    flags = " ".join([*CXX_FLAGS, *extra, "-pthread"])
    ninja.rule("cxx", f"{compiler()} -MMD -MF $out.d {flags} $flags -c $in -o $out")
    compile_kernels(ninja, "library", compiler())
    for host in cpu_host():
        ninja.compile("library", "cxx", host)
    programs = []
    for source in sorted((CSRC / "tests").glob("cpu_*.cpp")):
        test = source.stem
        ninja.compile(test, "cxx", source)
        ninja.objects[test] += ninja.objects["library"]
        ninja.rule(f"link_{test}", f"{compiler()} -o $out $in {flags}", depfile=False)
        programs.append(folder / "bin" / test)
        ninja.link(test, programs[-1])
    ninja.run()
    return programs


def build_for_gpu(folder: Path) -> list[Path]:
    """Compiles the tests of the CUDA kernels for a GPU and returns the programs. In the folder of a build of the
    library (setup.py --build-temp, its subfolder cuda) the kernels are not compiled again."""
    os.environ.setdefault("CONVEXT_BUILD_CUDA", "1")  # fails, with the reason, where it cannot be built
    toolkit, _ = cuda_plan()
    ninja = Ninja(folder, "C++ tests on the GPU")
    libraries = compile_cuda(ninja, "cuda", toolkit, compiler())
    kernels = list(ninja.objects["cuda"])
    programs = []
    for source in sorted((CSRC / "tests").glob("cuda_*.cpp")):
        test = source.stem
        ninja.compile(test, "cxx", source, flags=f"-isystem {toolkit / 'include'}")
        ninja.objects[test] += kernels
        ninja.rule(f"link_{test}", f"{compiler()} -o $out $in {libraries}", depfile=False)
        programs.append(folder / "bin" / test)
        ninja.link(test, programs[-1])
    ninja.run()
    return programs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="address and undefined-behaviour sanitizers")
    parser.add_argument("--gpu", action="store_true", help="the CUDA kernels' tests, on a GPU")
    parser.add_argument("--only-build", action="store_true", help="build, and print the programs' paths")
    parser.add_argument("--folder", type=Path, help="where to build; default: under build/")
    options = parser.parse_args()
    kind = "gpu-tests" if options.gpu else "sanitize" if options.sanitize else "cpp-tests"
    folder = (options.folder or ROOT / "build" / kind).resolve()
    programs = build_for_gpu(folder) if options.gpu else build(folder, SANITIZERS if options.sanitize else [])
    if options.only_build:
        print(*programs, sep="\n")
        return 0
    failed = []
    for program in programs:
        print(f"==> {program.name}", flush=True)
        environment = {"UBSAN_OPTIONS": "print_stacktrace=1", **os.environ}
        if subprocess.run([program], env=environment).returncode != 0:
            failed.append(program.name)
    where = " under sanitizers" if options.sanitize else " on the GPU" if options.gpu else ""
    print(f"C++ tests{where}: " + (f"FAILED {', '.join(failed)}" if failed else "passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BuildError as error:
        sys.exit(f"convext: the build failed: {error}")
