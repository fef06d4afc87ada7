"""Builds and runs the stand-alone C++ tests of the CPU, `csrc/tests/cpu_*.cpp`, each linked with every CPU kernel and
the selection. Those of the CUDA kernels, which run on an emulator, are built by tests/cuda_on_cpu.py.

    python csrc/tests/run.py                 with the flags of the library
    python csrc/tests/run.py --sanitize      under the address and undefined-behaviour sanitizers

Flags and instruction sets are setup.py's, so what is tested is what is shipped. No torch is involved.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from setup import CSRC, CXX_FLAGS, ISA_FLAGS, Ninja, compiler  # noqa: E402

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]


def build(folder: Path, extra: list[str]) -> list[Path]:
    """Compiles everything into `folder` and returns the test programs."""
    ninja = Ninja(folder)
    flags = " ".join([*CXX_FLAGS, *extra, "-pthread"])
    ninja.rule("cxx", f"{compiler()} -MMD -MF $out.d {flags} $flags -c $in -o $out")
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for isa, isa_flags in ISA_FLAGS.items():
            ninja.compile("library", "cxx", source, f".{isa}", " ".join([f"-DCONVEXT_ISA={isa}", *isa_flags]))
    ninja.compile("library", "cxx", CSRC / "select.cpp")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="address and undefined-behaviour sanitizers")
    sanitize = parser.parse_args().sanitize
    folder = ROOT / "build" / ("sanitize" if sanitize else "cpp-tests")
    failed = []
    for program in build(folder, SANITIZERS if sanitize else []):
        print(f"==> {program.name}", flush=True)
        environment = {"UBSAN_OPTIONS": "print_stacktrace=1", **os.environ}
        if subprocess.run([program], env=environment).returncode != 0:
            failed.append(program.name)
    where = " under sanitizers" if sanitize else ""
    print(f"C++ tests{where}: " + (f"FAILED {', '.join(failed)}" if failed else "passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
