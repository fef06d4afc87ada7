"""The folders of csrc/ and of convext/swap/: who includes or imports whom, without a circle or an arrow upwards; and
who sees torch, Python, CUDA."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PACKAGE = CSRC.parent / "convext"

# Folder -> the folders that its files may include, from the bottom up. Its own goes without saying.
ARROWS = {
    "core": [],
    "cpu/simd": ["core"],
    "cpu/kernels": ["core", "cpu/simd"],
    **{f"cpu/kernels/{family}": ["core", "cpu/simd", "cpu/kernels"]
       for family in ("depthwise", "elementwise", "gemm", "roofline")},
    **{f"cpu/kernels/{family}": ["core", "cpu/simd", "cpu/kernels", "cpu/kernels/gemm"]
       for family in ("direct", "pointwise", "stem", "winograd")},
    "cpu/kernels/grouped": ["core", "cpu/simd", "cpu/kernels", "cpu/kernels/gemm", "cpu/kernels/stem"],
    "compat": [],
    "cpu/runtime": ["core", "cpu/kernels/elementwise", "cpu/kernels/gemm", "cpu/kernels/roofline"],
    "cuda": ["core"],
    "cuda/ptx": ["core", "cuda"],
    "cuda/tile": ["core", "cuda", "cuda/ptx"],
    **{f"cuda/{family}": ["core", "cuda", "cuda/ptx", "cuda/tile"]
       for family in ("batch_norm", "depthwise", "igemm", "simt", "stem")},
    "torch": ["core", "cpu/kernels/elementwise", "cpu/runtime"],
    "call": ["core", "cpu/runtime"],
    "storage": ["core"],
    "python": ["core", "cpu/runtime", "cuda", "cuda/batch_norm"],
}  # fmt: skip

# A pattern of headers from outside -> the only folders that may include them.
OUTSIDE = {
    r"(torch|ATen|c10)/": ["torch", "storage", "call"],
    r"(pybind11/|Python\.h)": ["python", "call"],
    r"cuda(_\w+)?\.h": ["cuda"],
    r"immintrin\.h": ["cpu/simd"],
}


def sources(csrc: Path) -> dict[str, str]:
    """Path from csrc/ -> text, without the tests, which may include everything."""
    files = [file for file in csrc.rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".inc")]
    named = {file.relative_to(csrc).as_posix(): file.read_text() for file in files}
    return {name: text for name, text in named.items() if not name.startswith("tests/")}


def folder(name: str) -> str:
    return name.rpartition("/")[0]


def includes(name: str, text: str) -> list[str]:
    """The files of csrc/ that a file includes: plain names are of its own folder, the others start at csrc/."""
    found = re.findall(r'^ *#include "([^"]+)"', text, re.M)
    return [target if "/" in target else f"{folder(name)}/{target}" for target in found]


def problems(csrc: Path) -> list[str]:
    files = sources(csrc)
    found = [f"{name} is in a folder without arrows" for name in files if folder(name) not in ARROWS]
    for name, text in files.items():
        for target in includes(name, text):
            if target not in files:
                found.append(f"{name} includes {target}, which is not there")
            elif folder(target) != folder(name) and folder(target) not in ARROWS.get(folder(name), []):
                found.append(f"{name} includes {target}")
        for header in re.findall(r"^ *#include <([^>]+)>", text, re.M):
            for pattern, allowed in OUTSIDE.items():
                if re.match(pattern, header) and folder(name) not in allowed:
                    found.append(f"{name} includes <{header}>")
    return found + [f"{' -> '.join(circle)} is a circle" for circle in circles(files)]


def circles(files: dict[str, str], targets=includes) -> list[list[str]]:
    """Rings of files that include each other. targets(name, text): those that a file includes."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done and name in files:
            for target in targets(name, files[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in files:
        visit(name, [])
    return found


def test_includes_point_one_way():
    assert len(sources(CSRC)) > 100
    assert problems(CSRC) == []


def test_arrows_point_to_what_stands_above_in_the_table():
    order = list(ARROWS)
    for place, below in ARROWS.items():
        assert all(order.index(target) < order.index(place) for target in below), place


@pytest.mark.parametrize(("name", "line", "said"), [
    ("core/a.h", '#include "cpu/simd/vec.h"', "core/a.h includes cpu/simd/vec.h"),
    ("cpu/runtime/a.h", '#include "cpu/simd/vec.h"', "cpu/runtime/a.h includes cpu/simd/vec.h"),
    ("cpu/kernels/gemm/a.h", '#include "cpu/kernels/direct/d.h"', "gemm/a.h includes cpu/kernels/direct/d.h"),
    ("cpu/runtime/a.h", "#include <torch/csrc/stable/tensor.h>", "includes <torch/csrc/stable/tensor.h>"),
    ("torch/a.h", "#include <pybind11/pybind11.h>", "includes <pybind11/pybind11.h>"),
    ("core/a.h", '#include "gone.h"', "core/a.h includes core/gone.h, which is not there"),
    ("core/b.h", '#include "b.h"', "core/b.h -> core/b.h is a circle"),
    ("elsewhere/a.h", "", "elsewhere/a.h is in a folder without arrows"),
])  # fmt: skip
def test_what_points_another_way_is_found(tmp_path, name, line, said):
    for file in ("cpu/simd/vec.h", "cpu/kernels/direct/d.h", name):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line if file == name else "")
    found = problems(tmp_path)
    assert len(found) == 1 and said in found[0]


# ---- convext/swap/ ---------------------------------------------------------------------------------------------------

# From the bottom up: a module, or a folder of modules, imports of the swap what stands before it, and its own folder.
SWAP = ["refusal", "method", "modes", "switches", "conv_forward", "calls", "capture", "units", "match",
        "schedule", "lower", "plan", "planned", "eligible", "swapping", "report", "verify", "__init__"]  # fmt: skip
# Who of the rest of the package may import the swap, and is not imported by it.
ABOVE_THE_SWAP = {"__init__", "__main__", "cli", "bench", "demo", "dynamo", "tune"}


def modules_of(package: Path) -> dict[str, str]:
    """Path from the package, without .py -> text."""
    return {path.relative_to(package).with_suffix("").as_posix(): path.read_text() for path in package.rglob("*.py")}


def imports(name: str, text: str, modules: dict[str, str]) -> list[str]:
    """The modules of the package that one of them imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("convext")):
            base = name.split("/")[: -node.level] if node.level else []
            path = [*base, *(node.module or "").removeprefix("convext").split(".")]
            for alias in node.names:
                parts = [
                    "/".join(filter(None, [*path, *more]))
                    for more in ([alias.name], [alias.name, "__init__"], [], ["__init__"])
                ]
                found.append(next((part for part in parts if part in modules), parts[0]))
    return found


def layer(module: str) -> tuple[str, str]:
    """(the part of the package, the part of that): ("swap", "match") of "swap/match/head"."""
    return (*module.split("/"), "")[:2]


def swap_problems(package: Path) -> list[str]:
    modules, found = modules_of(package), []
    for name, text in modules.items():
        top, own = layer(name)
        if top == "swap" and own not in SWAP:
            found.append(f"{name} is in no layer")
            continue
        for target in imports(name, text, modules):
            other, below = layer(target)
            if top == "swap" == other:
                upwards = below not in SWAP[: SWAP.index(own)] and below != own
            else:
                upwards = other == "swap" and top not in ABOVE_THE_SWAP or top == "swap" and other in ABOVE_THE_SWAP
            if upwards:
                found.append(f"{name} imports {target}")
    swap = {name: text for name, text in modules.items() if name.startswith("swap/")}
    rings = circles(swap, lambda name, text: imports(name, text, modules))
    return found + [f"{' -> '.join(ring)} is a circle" for ring in rings]


def test_the_swap_imports_one_way():
    modules = modules_of(PACKAGE)
    arrows = {
        (layer(name)[1], layer(target)[1])
        for name, text in modules.items()
        if name.startswith("swap/")
        for target in imports(name, text, modules)
        if target.startswith("swap/")
    }
    assert {
        ("planned", "plan"),
        ("plan", "lower"),
        ("lower", "schedule"),
        ("match", "units"),
        ("units", "capture"),
        ("match", "match"),
        ("__init__", "report"),
    } <= arrows
    assert swap_problems(PACKAGE) == []


@pytest.mark.parametrize(("name", "line", "said"), [
    ("swap/capture/a", "from ..planned import PlannedForward", "swap/capture/a imports swap/planned"),
    ("swap/capture/a", "def f():\n    from ..planned import PlannedForward", "swap/capture/a imports swap/planned"),
    ("swap/match/a", "from ..lower import calls", "swap/match/a imports swap/lower/calls"),
    ("swap/match/a", "from ..lower import lower", "swap/match/a imports swap/lower/__init__"),
    ("swap/report", "from . import swap", "swap/report imports swap/__init__"),
    ("swap/plan", "from ..cli import app", "swap/plan imports cli"),
    ("swap/elsewhere", "", "swap/elsewhere is in no layer"),
    ("nn", "from .swap.plan import Plan", "nn imports swap/plan"),
    ("nn", "from convext.swap import report", "nn imports swap/report"),
    ("swap/units/b", "from . import b", "swap/units/b -> swap/units/b is a circle"),
])  # fmt: skip
def test_an_import_that_points_another_way_is_found(tmp_path, name, line, said):
    for file in (
        "cli",
        "swap/__init__",
        "swap/planned",
        "swap/plan",
        "swap/report",
        "swap/lower/__init__",
        "swap/lower/calls",
        name,
    ):
        (tmp_path / f"{file}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{file}.py").write_text(line if file == name else "")
    assert swap_problems(tmp_path) == [said]
