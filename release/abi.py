"""What compiled libraries use of Python, of torch and of the system's libraries, by their dynamic symbols.

    python release/abi.py LIBRARY ...     prints what does not hold, and exits with 1 if there is anything

libconvext*.abi3.so may use nothing of Python, and of torch only its stable ABI as of the oldest release that convext
runs with. abi3audit and torch-abi-audit judge them as well, where they are installed.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = (2, 10)
# Of later releases, asked for before each use (csrc/torch/torch_glue.h).
NEWER = {"torch_from_blob"}


class Symbol(NamedTuple):
    name: str
    text: str  # the name as C++ has it: "c10::Warning::Warning()"
    version: str  # "GLIBC_2.14", or nothing
    weak: bool


def undefined(library: Path) -> list[Symbol]:
    """The symbols that a library takes from others."""
    text = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^ +([Uw]) ([^@\n]+)(?:@+(\S+))?", text, re.M)
    names = "\n".join(name for _, name, _ in found)
    texts = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Symbol(name, text, version, kind == "w") for (kind, name, version), text in zip(found, texts, strict=True)]


def defined(library: Path) -> list[str]:
    """The symbols that a library shows to others, without their versions."""
    text = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f]+ [B-Zi] ([^@\n]+)", text, re.M)


def is_of_python(name: str) -> bool:
    return re.match(r"_?Py[A-Z_]", name) is not None


def is_of_torch(text: str) -> bool:
    """Whether a symbol is of torch's C++ beside its stable ABI: of one of its namespaces, or with a type out of one."""
    text = re.sub(r"\btorch::(stable|headeronly)::", "", text)
    return re.search(r"\b(at|c10|torch|caffe2)::", text) is not None


def is_stable(name: str) -> bool:
    """Whether it is of torch's stable ABI, plain C."""
    return name.startswith(("aoti_torch_", "torch_"))


def own_problems(library: Path) -> list[str]:
    found = []
    for symbol in undefined(library):
        if is_of_python(symbol.name):
            found.append(f"{library.name} uses {symbol.name} of Python")
        if is_of_torch(symbol.text):
            found.append(f"{library.name} uses {symbol.text} of torch, which is not of its stable ABI")
        if symbol.name in NEWER and not symbol.weak:
            found.append(f"{library.name} does not load without {symbol.name}, which torch 2.10 has not")
        if not symbol.version and not is_stable(symbol.name) and not symbol.weak and symbol.name.startswith("_ZNS"):
            found.append(f"{library.name} takes {symbol.name} from whoever has it, not from the standard library")
    return found


def problems_by_torch_abi_audit(library: Path) -> list[str]:
    command = [sys.executable, "-m", "torch_abi_audit.cli", "--json", library]
    ran = subprocess.run(command, capture_output=True, text=True)
    try:
        package = json.loads(ran.stdout)
        reports = package["extensions"] + package["bundled_libs"]
    except (ValueError, KeyError) as error:
        return [f"torch-abi-audit did not judge {library.name} ({error}): {ran.stdout}{ran.stderr}"]
    found = []
    for report in reports:
        torch = report["torch"]
        if torch["uses_torch"] and not torch["stable"]:
            found.append(f"torch-abi-audit: {library.name} uses {', '.join(torch['unstable_symbols'])}")
        least = tuple(map(int, (torch["min_torch_version"] or "0").split(".")[:2]))
        if least > OLDEST_TORCH and not set(torch["version_defining_symbols"]) <= NEWER:
            found.append(f"torch-abi-audit: {library.name} needs torch {torch['min_torch_version']}")
        if torch["unknown_shim_symbols"]:
            found.append(f"torch-abi-audit does not know {', '.join(torch['unknown_shim_symbols'])} of {library.name}")
    return found if reports else [f"torch-abi-audit found nothing in {library.name}"]


def problems_by_abi3audit(library: Path) -> list[str]:
    command = [sys.executable, "-m", "abi3audit", "--strict", "--report", "--assume-minimum-abi3", "3.10", library]
    ran = subprocess.run(command, capture_output=True, text=True)
    return [] if ran.returncode == 0 else [f"abi3audit refuses {library.name}: {ran.stdout}{ran.stderr}"]


TOOLS = {"abi3audit": problems_by_abi3audit, "torch_abi_audit": problems_by_torch_abi_audit}


def problems(libraries: list[Path]) -> list[str]:
    """What does not hold of libraries that know no Python, in words, one each."""
    stable = [library for library in libraries if library.name.endswith(".abi3.so")]
    found = [f"there is no library to audit among {libraries}"] if not stable else []
    for library in stable:
        found += own_problems(library)
    for library in set(libraries) - set(stable):  # takes torch's C++ headers, for one release
        found += [f"{library.name} uses {s.name} of Python" for s in undefined(library) if is_of_python(s.name)]
    for tool, judge in TOOLS.items():
        if importlib.util.find_spec(tool) is None:
            print(f"    {tool.replace('_', '-')} is not installed, and did not judge", file=sys.stderr)
            continue
        for library in stable:
            found += judge(library)
    return found


if __name__ == "__main__":
    wrong = problems(list(map(Path, sys.argv[1:])))
    print("\n".join(wrong) if wrong else "nothing but what they may use")
    sys.exit(bool(wrong))
