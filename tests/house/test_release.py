"""What is handed out: libraries that know no Python, what they use of others, the wheels, the kernel hub's layout."""

import ctypes
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from project import ROOT, load_setup

import convext

RELEASE = ROOT / "release"
if not RELEASE.exists():
    pytest.skip("there is no source tree here", allow_module_level=True)
sys.path.insert(0, str(RELEASE))

import abi  # noqa: E402
import hub  # noqa: E402
import wheels  # noqa: E402

PACKAGE = Path(convext.__file__).parent
pytestmark = pytest.mark.timeout(1200)  # the first test of a wheel waits for its build

LIBRARIES = sorted(PACKAGE.glob("libconvext*.so"))
BINDINGS = sorted(PACKAGE.glob(f"_*{sysconfig.get_config_var('EXT_SUFFIX')}"))


def compiled(folder: Path, name: str, text: str, *flags: str) -> Path:
    """A shared library of C++ text."""
    setup = load_setup()
    source = folder / f"{name}.cpp"
    source.write_text(text)
    library = folder / name
    command = [*setup.compiler().split(), "-std=c++17", "-O1", "-fPIC", "-shared", source, "-o", library, *flags]
    subprocess.run(command, check=True, capture_output=True)
    return library


# ---- what the libraries use ------------------------------------------------------------------------------------------


def test_the_libraries_use_nothing_of_python_and_of_torch_its_stable_abi_alone():
    """By their symbols, and by the audits that are installed (./dev wheel installs them)."""
    names = {library.name for library in LIBRARIES}
    assert {"libconvext.abi3.so", "libconvext_storage.so"} <= names
    assert abi.problems(LIBRARIES) == []
    used = {symbol.name for symbol in abi.undefined(PACKAGE / "libconvext.abi3.so")}
    assert any(map(abi.is_stable, used))  # the audit has read what it judges
    assert BINDINGS and any(abi.is_of_python(symbol.name) for symbol in abi.undefined(BINDINGS[0]))


OFFENCES = {
    "Python": ("PyObject* PyList_New(long);", "PyList_New(1);", "uses PyList_New of Python"),
    "private Python": ("void* _PyType_Lookup();", "_PyType_Lookup();", "uses _PyType_Lookup of Python"),
    "a newer shim": ("int torch_from_blob();", "torch_from_blob();", "does not load without torch_from_blob"),
}  # fmt: skip


@pytest.mark.parametrize("case", OFFENCES)
def test_a_library_that_uses_more_is_refused(tmp_path, case):
    declaration, call, said = OFFENCES[case]
    text = f'struct PyObject; extern "C" {{ {declaration} void f() {{ {call} }} }}'
    found = abi.own_problems(compiled(tmp_path, "libother.abi3.so", text))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    "declaration", ["namespace c10 { void g(int); }", "namespace at { struct T { void g(int); }; }",
                    "namespace c10 { struct T; } void g(c10::T*); namespace c10 { using ::g; struct T {} t; }"]
)  # fmt: skip
def test_a_library_that_uses_more_of_torch_is_refused(tmp_path, declaration):
    call = "at::T().g(1);" if "at {" in declaration else "c10::g(&c10::t);" if "struct" in declaration else "c10::g(1);"
    found = abi.own_problems(compiled(tmp_path, "libother.abi3.so", f"{declaration}\nvoid f() {{ {call} }}"))
    assert len(found) == 1 and "of torch, which is not of its stable ABI" in found[0]


def test_names_of_ours_are_not_taken_for_torchs(tmp_path):
    text = 'namespace format2at { void g(); } extern "C" int torch_get_num_threads(); void atc10() {}\n'
    text += "void f() { format2at::g(); torch_get_num_threads(); atc10(); }"
    assert abi.own_problems(compiled(tmp_path, "libother.abi3.so", text)) == []


# manylinux_2_28, as auditwheel's policy has it: what glibc 2.28 and GCC 8 have.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.mark.parametrize("library", LIBRARIES + BINDINGS, ids=lambda library: library.name)
def test_libraries_want_no_newer_system_than_manylinux_2_28(library):
    versioned = [symbol for symbol in abi.undefined(library) if symbol.version.partition("_")[0] in NEWEST]
    assert len(versioned) > 10
    for symbol in versioned:
        family, _, number = symbol.version.partition("_")
        assert tuple(map(int, number.split("."))) <= NEWEST[family], symbol


@pytest.mark.parametrize("library", LIBRARIES + BINDINGS, ids=lambda library: library.name)
def test_libraries_show_what_is_theirs_alone(library):
    """Two that are loaded together never take a symbol of the other's by chance: same names have other versions."""
    shown = [name for name in abi.defined(library) if not name.startswith("CONVEXT_")]
    if library in BINDINGS:
        assert shown == [f"PyInit_{library.name.partition('.')[0]}"]
    elif library.name == "libconvext_storage.so":
        assert shown == ["convext_make_resizable"]
    else:
        assert shown and all(re.match(r"_ZN?K?7convext", name) for name in shown), shown


USES = r"""
#include <exception>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
namespace {
int alive = 0;
struct Counted : std::runtime_error {
  Counted() : std::runtime_error("counted") { ++alive; }
  Counted(const Counted& other) : std::runtime_error(other) { ++alive; }
  ~Counted() override { --alive; }
};
}  // namespace
extern "C" int text() {
  std::ostringstream out;
  std::stringstream both;
  out << "a" << 12 << 0.5;
  both << out.str();
  std::string read;
  both >> read;
  return out.str() == "a120.5" && read == "a120.5";
}
extern "C" int too_long(long count) {
  try {
    std::allocator<double>().deallocate(std::allocator<double>().allocate(count), count);
  } catch (const std::bad_array_new_length&) {
    return 1;
  }
  return 0;
}
extern "C" int exceptions() {
  std::exception_ptr first, second;
  try {
    throw Counted();
  } catch (...) {
    first = std::current_exception();
  }
  second = first;
  first = nullptr;
  if (alive != 1) return 0;
  try {
    std::rethrow_exception(second);
  } catch (const Counted& counted) {
    if (counted.what() != std::string("counted")) return 0;
  }
  second = nullptr;
  return alive == 0;
}
extern "C" int shared() {
  auto one = std::make_shared<int>(3);
  std::weak_ptr<int> weak = one;
  auto two = one;
  one.reset();
  const bool still = !weak.expired() && two.use_count() == 1;
  two.reset();
  return still && weak.expired();
}
"""


def test_what_stands_in_for_newer_libraries_does_what_they_do(tmp_path):
    setup = load_setup()
    compat = [str(file) for file in (ROOT / "csrc" / "compat").glob("*.cpp")]
    script = tmp_path / "exports"
    script.write_text("{ global: text; too_long; exceptions; shared; local: *; };")
    flags = ("-O0", *compat, *setup.LINK_FLAGS[1:], str(script), "-lstdc++")  # nothing is inlined
    library = compiled(tmp_path, "libuses.so", USES, *flags)
    plain = {symbol.version for symbol in abi.undefined(compiled(tmp_path, "libplain.so", USES, "-O0"))}
    if not {"GLIBCXX_3.4.26", "CXXABI_1.3.13", "GLIBCXX_3.4.29", "GLIBC_2.32"} <= plain:
        pytest.skip("this compiler and its libraries are none of the newer ones")
    test_libraries_want_no_newer_system_than_manylinux_2_28(library)
    loaded = ctypes.CDLL(str(library))
    assert loaded.text() == loaded.exceptions() == loaded.shared() == 1
    assert loaded.too_long(ctypes.c_long(2**62)) == 1 and loaded.too_long(ctypes.c_long(10)) == 0


# ---- the wheels ------------------------------------------------------------------------------------------------------


def stand_in(path: Path, *said: str, status: int = 0) -> Path:
    """A program that says that it is some Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said) + f"exit {status}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with CPythons of some releases, in the places where they may be."""
    pyenv, uv = tmp_path / "pyenv" / "versions", tmp_path / "uv"
    for variable, folder in (("PATH", "bin"), ("PYENV_ROOT", "pyenv"), ("UV_PYTHON_INSTALL_DIR", "uv")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    on_path = tmp_path / "bin"
    on_path.mkdir()
    return {
        "3.10": stand_in(on_path / "python3.10", "CPython", "cpython-310-x86_64-linux-gnu", "3.10", "True"),
        "chosen by pyenv alone": stand_in(on_path / "python3.11", "python3.11: command not found", status=127),
        "3.11.9": stand_in(pyenv / "3.11.9" / "bin" / "python3.11", "CPython", "cpython-311-x", "3.11", "True"),
        "3.11.10": stand_in(pyenv / "3.11.10" / "bin" / "python3.11", "CPython", "cpython-311-x", "3.11", "True"),
        "no headers": stand_in(pyenv / "3.12.1" / "bin" / "python3.12", "CPython", "cpython-312-x", "3.12", "False"),
        "3.13": stand_in(uv / f"cpython-3.13.5-{sys.platform}-x" / "bin" / "python3.13", "CPython", "cpython-313-x",
                         "3.13", "True"),
        "3.14t": stand_in(on_path / "python3.14", "CPython", "cpython-314t-x", "3.14", "True"),
        "PyPy": stand_in(on_path / "pypy", "PyPy", "pypy311-pp73", "3.11", "True"),
    }  # fmt: skip


def test_a_wheel_is_made_for_each_python_that_is_here_and_those_missing_are_named(machine, capsys):
    assert wheels.chosen([]) == {"cp310": machine["3.10"], "cp311": machine["3.11.10"], "cp313": machine["3.13"]}
    assert capsys.readouterr().out.splitlines() == [
        "==> no CPython 3.12, 3.14 with headers on PATH, under pyenv or uv: no wheel for it"
    ]


def test_pythons_are_named_by_hand(machine, capsys):
    free, headless, pypy = (str(machine[name]) for name in ("3.14t", "no headers", "PyPy"))
    assert wheels.chosen([free]) == {"cp314t": free}
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match=r"^dev: .*python3\.12 has no headers \(Python\.h\)"):
        wheels.chosen([headless])
    for wrong in (pypy, "/nowhere/python3"):
        with pytest.raises(SystemExit, match="^dev: .* is no CPython that runs"):
            wheels.chosen([wrong])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree for this Python without the CUDA library, from what is compiled here already."""
    for needed in ("pybind11", "ninja", "setuptools"):
        pytest.importorskip(needed)
    setup = load_setup()
    shared = ROOT / "build" / f"temp.{sysconfig.get_platform()}"
    if not (shared / setup.CPU_LIBRARY).exists():
        pytest.skip("nothing was compiled in this tree, and all of it would take minutes")
    scratch = tmp_path_factory.mktemp("wheel")
    base = scratch / "build"
    shutil.copytree(shared, base / shared.name, ignore=shutil.ignore_patterns("cuda"))  # with its times
    environment = {
        **os.environ,
        **{"CONVEXT_BUILD_CUDA": "0", "CONVEXT_TORCH": str(Path(torch.__file__).parent), "MAX_JOBS": "1"},
    }
    command = [
        *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", scratch, "build", "--build-base", base),
        *("bdist_wheel", "--dist-dir", scratch / "dist", "--bdist-dir", scratch / "bdist"),
    ]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    (made,) = (scratch / "dist").glob("*.whl")
    return made, ran.stderr


@pytest.fixture
def unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel[0]) as opened:
        opened.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked"


@pytest.mark.slow
def test_a_second_python_compiles_its_bindings_alone(wheel):
    """Of a tree where the libraries are compiled."""
    steps = re.findall(r"^convext: (.*): (\d+) of (\d+), (\S+), done", wheel[1], re.M)
    assert [(library, last) for library, last, *_ in steps] == [("bindings", "6")], wheel[1]


@pytest.mark.slow
def test_the_wheel_holds_bindings_of_its_python_and_libraries_of_none(wheel):
    with zipfile.ZipFile(wheel[0]) as opened:
        libraries = {name for name in opened.namelist() if name.endswith(".so")}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = f"_C{suffix}", f"_call{suffix}"
    assert libraries == {f"convext/{n}" for n in (*modules, "libconvext.abi3.so", "libconvext_storage.so")}
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}" in wheel[0].name


@pytest.mark.slow
def test_the_wheel_runs(unpacked):
    """From where it is unpacked, and finds its libraries there."""
    program = """
import torch, convext
x, w = torch.randn(1, 16, 9, 9), torch.randn(32, 16, 3, 3)
with convext.backend("native"):
    assert torch.allclose(convext.conv2d(x, w), torch.conv2d(x, w), atol=1e-4)
print(convext.__file__, *(line.split()[-1] for line in open("/proc/self/maps") if "/libconvext" in line), sep="\\n")
"""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    ran = subprocess.run([sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    places = set(ran.stdout.splitlines())
    assert {Path(place).name for place in places} == {"__init__.py", "libconvext.abi3.so", "libconvext_storage.so"}
    assert all(Path(place).is_relative_to(unpacked) for place in places)


@pytest.mark.slow
def test_auditwheel_takes_the_wheel_for_manylinux_2_28(wheel, tmp_path, monkeypatch):
    pytest.importorskip("auditwheel", reason="./dev wheel installs it, and asks it of every wheel")
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    (tmp_path / "dist").mkdir()
    made = wheels.repaired(wheel[0])
    assert made.parent == tmp_path / "dist" and wheels.PLATFORM in made.name
    with zipfile.ZipFile(made) as opened:
        assert not [name for name in opened.namelist() if "torch" in name and name.endswith(".so")]


# ---- the kernel hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def laid_out(wheel, tmp_path):
    hub.lay_out([wheel[0]], tmp_path)
    return tmp_path


def load(repository: Path, backend: str | None, program: str) -> list[str]:
    """What a program prints of `kernel`, which is loaded as from the hub, where convext is not installed."""
    program = f"""
import sys
from pathlib import Path
import kernels
kernel = kernels.get_local_kernel(Path({str(repository)!r}), backend={backend!r})
{program}"""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_the_layout_is_that_of_the_kernel_hub(laid_out):
    """In the words of the package that loads it, whose schema of build.toml is kernel-builder's own."""
    kernels = pytest.importorskip("kernels")
    from kernels.variants import parse_variant

    system = f"{platform.machine()}-linux"
    variants = {folder.name for folder in laid_out.glob("*/build/*")}
    assert variants == {f"torch-stable-abi210-cpu-{system}", "torch-cuda"}  # the wheel has no CUDA library
    for variant in laid_out.glob("*/build/*"):
        assert parse_variant(variant.name).variant_str == variant.name
        metadata = kernels._rust.Metadata.read_from_file(variant / "metadata.json")
        kernels._rust.Build.open(variant.parents[1])
        assert metadata.name.python_name == variant.parents[1].name.replace("-", "_")
        assert metadata.id.isidentifier() and metadata.license == "BSD-3-Clause"
        digest = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
        files = {file.relative_to(variant).as_posix() for file in variant.rglob("*") if file.is_file()}
        assert digest.keys() == files - {"metadata.json"}
        assert (variant / metadata.name.python_name / "__init__.py").exists()
    assert not list((laid_out / "convext-triton").rglob("*.so"))


def test_build_toml_that_kernel_builder_refuses_is_found(tmp_path):
    kernels = pytest.importorskip("kernels")
    for name in ("convext", "convext-triton"):
        text = (RELEASE / "hub" / name / "build.toml").read_text()
        (tmp_path / "build.toml").write_text(text)
        kernels._rust.Build.open(tmp_path)  # raises ValueError for what it does not know
        for wrong in (text.replace("edition = 5", "edition = 4"), text.replace("[general]", "[general]\nsort = 1")):
            (tmp_path / "build.toml").write_text(wrong)
            with pytest.raises(ValueError):
                kernels._rust.Build.open(tmp_path)


COMPUTES = """
import torch
x, w = torch.randn(1, 16, 9, 9), torch.randn(32, 16, 3, 3)
with kernel.backend({backend!r}):
    assert torch.allclose(kernel.conv2d(x, w, padding=1), torch.conv2d(x, w, padding=1), atol=1e-4)
model = torch.nn.Sequential(torch.nn.Conv2d(16, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
expected = model(x)
assert torch.allclose(kernel.swap(model)(x), expected, atol=1e-4)
print(*(status for status in kernel.backends.backends() if status.device == "cpu"), sep="\\n")
print(kernel.__name__, Path(sys.modules["convext"].__file__).parent)
"""


@pytest.mark.slow
def test_the_kernels_package_loads_the_compiled_variant(laid_out):
    pytest.importorskip("kernels")
    native, *_, name = load(laid_out / "convext", "cpu", COMPUTES.format(backend="native"))
    (variant,) = (laid_out / "convext" / "build").iterdir()
    assert native == "native on cpu: available"
    assert name.startswith("_convext_cpu_") and name.endswith(f" {variant / 'convext'}")


@pytest.mark.slow
def test_the_kernels_package_loads_the_variant_of_python_alone(laid_out):
    pytest.importorskip("kernels")
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA, and the variant is for it")
    pytest.importorskip("triton")
    lines = load(laid_out / "convext-triton", None, COMPUTES.format(backend="triton"))
    assert lines[0].startswith("native on cpu: off") and "triton on cpu: available" in lines[2]
    assert lines[-1].startswith("_convext_triton_cuda_")


@pytest.mark.slow
def test_a_process_has_one_convext(laid_out):
    pytest.importorskip("kernels")
    repository = str(laid_out / "convext")
    program = f"""
import convext
from pathlib import Path
import kernels
try:
    kernels.get_local_kernel(Path({repository!r}), backend="cpu")
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith(f"convext was imported before, from {PACKAGE}"), ran.stderr
