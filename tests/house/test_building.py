"""setup.py: which CUDA library is built, how far a build is, that it goes on where it stopped, and what stops it, told
in one line with the remedy."""

import errno
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from project import ROOT, load_setup


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, with none of the settings that the tests' own environment may have."""
    for name in (
        "CONVEXT_BUILD_CUDA",
        "CONVEXT_CUDA_ARCHS",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CUDA_PATH",
        "MAX_JOBS",
    ):
        monkeypatch.delenv(name, raising=False)
    return load_setup()


# ---- the CUDA library ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "archs"),
    [
        ({}, ["80", "90"]),
        ({"CONVEXT_CUDA_ARCHS": "90a; 80"}, ["80", "90a"]),
        ({"CONVEXT_CUDA_ARCHS": "120", "TORCH_CUDA_ARCH_LIST": "8.0"}, ["120"]),
        ({"TORCH_CUDA_ARCH_LIST": "7.5;8.0;9.0+PTX"}, ["80", "90"]),
        ({"TORCH_CUDA_ARCH_LIST": "Ampere Hopper+PTX"}, ["80", "86", "90"]),
        ({"TORCH_CUDA_ARCH_LIST": "10.3a, 12.0"}, ["103a", "120"]),
        ({"TORCH_CUDA_ARCH_LIST": "Turing"}, []),
        ({"CONVEXT_BUILD_CUDA": "gpu"}, ["80", "100"]),
        ({"CONVEXT_BUILD_CUDA": "gpu", "CONVEXT_CUDA_ARCHS": "90"}, ["90"]),
    ],
)
def test_architectures(setup, monkeypatch, environment, archs):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup, "gpu_archs", lambda: ["75", "80", "100"])
    assert setup.cuda_archs() == archs


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CONVEXT_CUDA_ARCHS", ";", "CONVEXT_CUDA_ARCHS names no architecture: give for example 80;90"),
        ("CONVEXT_CUDA_ARCHS", "sm_90", "CONVEXT_CUDA_ARCHS names 'sm_90': give for example 80;90"),
        ("TORCH_CUDA_ARCH_LIST", "Fermi", "TORCH_CUDA_ARCH_LIST names 'Fermi': give for example 8.0;9.0"),
    ],
)
def test_architectures_that_are_none(setup, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(setup.BuildError, match=f"^{re.escape(said)}$"):
        setup.cuda_archs()


@pytest.fixture
def toolkit(setup, monkeypatch, tmp_path):
    """A CUDA toolkit 13.0 that compiles for sm_80 and sm_90, on a machine with no other, and a torch for CUDA 13."""
    program = tmp_path / "cuda" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    (tmp_path / "cuda" / "nvvm").mkdir()
    program.write_text(
        "#!/bin/sh\ncase $1 in\n--version) echo Cuda compilation tools, release 13.0, V13.0.88 ;;\n"
        "--list-gpu-code) echo sm_75; echo sm_80; echo sm_90 ;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(setup, "USUAL_CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr(setup, "gpu_archs", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    return tmp_path / "cuda"


def test_the_cuda_library_is_built_where_it_can_be_without_a_gpu(setup, toolkit, monkeypatch):
    assert setup.cuda_plan() == (toolkit, "CUDA library built with nvcc 13.0 for sm_80, sm_90")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    assert setup.cuda_plan() == (toolkit, "CUDA library built with nvcc 13.0 for sm_90")


def test_the_cuda_library_is_built_for_the_gpu_alone_where_that_is_the_wish(setup, toolkit, monkeypatch):
    monkeypatch.setenv("CONVEXT_BUILD_CUDA", "gpu")
    assert setup.cuda_plan() == (
        None,
        "CUDA library skipped: torch sees no GPU here (CONVEXT_BUILD_CUDA=1 builds it all the same)",
    )
    monkeypatch.setattr(setup, "gpu_archs", lambda: ["90"])
    assert setup.cuda_plan() == (toolkit, "CUDA library built with nvcc 13.0 for sm_90")


def test_the_gpus_here_are_those_that_torch_sees(setup, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(10, 0), (9, 0), (9, 0)][index])
    assert setup.gpu_archs() == ["90", "100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup.gpu_archs() == []


WHY_NOT = {
    "no nvcc": ({"CUDA_HOME": "/nowhere"}, "13.0", "nvcc was not found (set CUDA_HOME, or put nvcc on PATH)"),
    "another major": (
        {},
        "12.8",
        "nvcc is 13.0 and torch's CUDA is 12.8: the majors differ (set CUDA_HOME to a toolkit of CUDA 12)",
    ),
    "a torch for the CPU": (
        {},
        None,
        f"torch {torch.__version__} is built without CUDA (pip install a CUDA build of torch)",
    ),
    "an old GPU": (
        {"CONVEXT_CUDA_ARCHS": "75"},
        "13.0",
        "all architectures asked for are older than sm_80, which the kernels need",
    ),
    "a new GPU": (
        {"CONVEXT_CUDA_ARCHS": "90;121a"},
        "13.0",
        "nvcc 13.0 does not compile for sm_121a (set CUDA_HOME to a newer toolkit, or CONVEXT_CUDA_ARCHS)",
    ),
}


@pytest.mark.parametrize("case", WHY_NOT)
def test_why_the_cuda_library_is_not_built(setup, toolkit, monkeypatch, case):
    environment, cuda, reason = WHY_NOT[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert setup.cuda_plan() == (None, f"CUDA library skipped: {reason}")
    monkeypatch.setenv("CONVEXT_BUILD_CUDA", "1")
    with pytest.raises(setup.BuildError, match=re.escape(f"CONVEXT_BUILD_CUDA=1, but {reason}")):
        setup.cuda_plan()


# ---- what the machine must have --------------------------------------------------------------------------------------


def test_a_compiler_that_is_too_old_is_refused_before_anything_is_compiled(setup, tmp_path):
    old = tmp_path / "g++-7"
    old.write_text("#!/bin/sh\necho \"g++-7: error: unrecognized command line option '-mavx512f'\" >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(
        setup.BuildError, match=r"g\+\+-7 does not compile C\+\+20 for portable \(g\+\+-7: error: unrec"
    ):
        setup.check_compiler(str(old))
    setup.check_compiler(setup.compiler())


def test_missing_headers_and_packages_are_named(setup, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(
        setup.BuildError, match=r"^pybind11 cannot be imported \(.*\): pip install pybind11, or leave --no"
    ):
        setup.check_python()
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(setup.BuildError, match=r"Python\.h is missing: on Debian, apt-get install python3-dev$"):
        setup.check_python()


# ---- the build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(setup, tmp_path, monkeypatch):
    """build(**commands): runs a build with one edge for each command, which makes $1; build.ran() says which ran."""
    pytest.importorskip("ninja")
    monkeypatch.setenv("MAX_JOBS", "1")
    folder = tmp_path / "build"

    def run(**commands):
        ninja = setup.Ninja(folder, "the library")
        for name, command in commands.items():
            script = (
                tmp_path / f"{name}-{zlib.crc32(command.encode())}"
            )  # ninja prints what it runs, which is no output
            script.write_text(f"echo {name} >> {tmp_path}/ran\n{command}\n")
            ninja.rule(name, f"exec sh {script} $out", depfile=False)
            ninja.edge(f"{name}.o", name, 1.0)
        (tmp_path / "ran").write_text("")
        ninja.run()

    run.folder, run.ran = folder, lambda: (tmp_path / "ran").read_text().split()
    return run


def test_a_build_says_how_far_it_is(setup, build, capsys, monkeypatch):
    monkeypatch.setattr(setup.Progress, "INTERVAL", 0.0)
    build(a="touch $1", b="echo a warning; touch $1", c="touch $1")
    lines = capsys.readouterr().err.splitlines()
    assert "a warning" in lines
    progress = [line for line in lines if line.startswith("convext: ")]
    assert re.fullmatch(r"convext: the library: 1 of 3, \w, about 10 s left", progress[0])
    assert re.fullmatch(r"convext: the library: 2 of 3, \w, about 10 s left", progress[1])
    assert re.fullmatch(r"convext: the library: 3 of 3, \w, done in \d s", progress[2])
    build(a="touch $1", b="echo a warning; touch $1", c="touch $1; true")
    assert build.ran() == ["c"]
    assert capsys.readouterr().err.startswith("convext: the library: 1 of 1, c, done in")


def test_the_time_left_goes_by_what_files_take(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup.time, "monotonic", lambda: clock[0])
    clock = [100.0]
    seconds = {"h.gch": 1.0, "a.o": 9.0, "b.o": 60.0, "_C/cpu.kernels.direct.direct.avx2.o": 30.0}
    progress = setup.Progress("CPU library", seconds)
    clock[0] += 5
    progress.finished(1, "h.gch")  # too little to tell
    clock[0] += 15
    progress.finished(2, "a.o")
    clock[0] += 1
    progress.finished(3, "_C/cpu.kernels.direct.direct.avx2.o")  # too soon to say
    clock[0] += 100
    progress.finished(4, "b.o")
    assert capsys.readouterr().err.splitlines() == [
        "convext: CPU library: 1 of 4, h.gch",
        "convext: CPU library: 2 of 4, a, about 3 min 0 s left",
        "convext: CPU library: 4 of 4, b, done in 121 s",
    ]
    progress.INTERVAL = 0.0
    progress.finished(3, "_C/cpu.kernels.direct.direct.avx2.o")
    assert ", direct.avx2, about" in capsys.readouterr().err


def test_a_build_goes_on_where_it_stopped(setup, build):
    """After an error, and after an end so sudden that half an object lies there."""
    sound = {"a": "touch $1", "b": "touch $1", "c": "touch $1"}
    with pytest.raises(setup.BuildError, match="^a file does not compile: b.cpp:3:1: error: no such type$"):
        build(**sound | {"b": "echo 'b.cpp:3:1: error: no such type' >&2; exit 1"})
    finished = set(build.ran()) - {"b"}
    build(**sound)
    assert set(build.ran()) == {"a", "b", "c"} - finished
    with pytest.raises(setup.BuildError):
        build(**sound, d="printf half > $1; kill -9 $PPID")  # ninja itself
    assert (build.folder / "d.o").read_text() == "half"
    build(**sound, d="touch $1; printf whole > $1")
    assert build.ran() == ["d"] and (build.folder / "d.o").read_text() == "whole"


STOPS = {
    "no space": ("cat /proc/version > /dev/full", r"^no space is left on the disk \(\d+ MiB are free at .*free some"),
    "the compiler is killed": ("kill -9 $$", "^too little memory for 2 compilers at once of up to 1 GiB: set MAX"),
    "the compiler has no memory": ("ulimit -v 60000; g++ -x c++ -include algorithm -fsyntax-only - < /dev/null",
                                   "^too little memory for 2 compilers at once"),
    "something else": ("exit 1", "^ninja failed, with the output above$"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_what_stops_a_build_is_told_with_the_remedy(setup, build, monkeypatch, case):
    command, said = STOPS[case]
    if case == "the compiler has no memory" and setup.shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    monkeypatch.setenv("MAX_JOBS", "2")
    with pytest.raises(setup.BuildError, match=said) as raised:
        build(a=command)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("gib", "count"), [(64.0, 6), (4.5, 4), (0.3, 1)])
def test_no_more_compilers_run_than_there_is_memory_for(setup, monkeypatch, tmp_path, gib, count):
    """What holds copies of files is free, too."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemFree:  1024 kB\nMemAvailable:   {int(gib * 2**20)} kB\n")
    monkeypatch.setattr(setup, "MEMINFO", meminfo)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda process: range(6), raising=False)
    assert setup.jobs() == count
    monkeypatch.setenv("MAX_JOBS", "3")  # who asks for it knows better
    assert setup.jobs() == 3


def test_the_last_line_of_a_failed_build_is_the_cause(tmp_path):
    code = "import os, setup; os.environ['CXX'] = 'none'; os.environ['PATH'] = ''\nsetup.compiler()"
    text = (ROOT / "setup.py").read_text().partition('if __name__ == "__main__":')[2]
    program = tmp_path / "build.py"
    for raised, last in (
        (code, "no C++ compiler: tried $CXX, c++, g++ and clang++; on Debian, apt-get install g++"),
        (f"raise OSError({errno.ENOSPC}, 'no')", "no space is left on the disk"),
    ):
        body = text.replace("setup(ext_modules", "fail(ext_modules")
        program.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom setup import *\nimport errno, subprocess\n"
            f"def fail(**_):\n    {raised.replace(chr(10), chr(10) + '    ')}\nif True:{body}"
        )
        ran = subprocess.run([sys.executable, program], capture_output=True, text=True)
        assert ran.returncode == 1
        assert ran.stderr.splitlines()[-1].startswith(f"convext: the build failed: {last}")


@pytest.fixture
def edges(setup, monkeypatch, tmp_path):
    """edges(): {output: (rule and inputs, flags)} of what setup.py builds for the CPU."""
    pytest.importorskip("pybind11")
    monkeypatch.setenv("CONVEXT_BUILD_CUDA", "0")
    found = {}
    monkeypatch.setattr(
        setup.Ninja,
        "run",
        lambda ninja: found.update({lines[0].split()[1].rstrip(":"): lines for _, lines in ninja.edges}),
    )

    def collect(folder="temp") -> dict[str, list[str]]:
        monkeypatch.setattr(setup.BuildWithNinja, "copy_file", lambda *_: None)  # nothing is compiled
        command = setup.BuildWithNinja(setup.setup.__globals__["Distribution"]())
        command.build_lib, command.build_temp, command.plat_name = str(tmp_path), str(tmp_path / folder), "here"
        command.ensure_finalized()
        command.build_extension(setup.Extension("convext._C", sources=[]))
        return dict(found)

    return collect


def test_another_release_of_torch_compiles_what_sees_torch_and_the_rest_not(edges, monkeypatch):
    """Ninja looks at no header outside the tree, and a new release may lie where the old one was."""
    before = edges()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    after = edges()
    changed = {output for output, lines in after.items() if lines != before[output]}
    objects = {output for output in before if output.endswith(".o")}
    seeing = {o for o in objects if o.startswith(("cpu/torch.", "storage/storage."))}
    assert len(seeing) > 1 and changed == seeing | {"_C/python.bindings.o", "_call/call.call.o"}


def test_what_knows_no_python_is_compiled_in_a_folder_of_all_pythons(edges, setup, monkeypatch, tmp_path):
    """So a second Python compiles its bindings alone."""
    folders = {}
    monkeypatch.setattr(setup.Ninja, "__init__", remembering(setup.Ninja.__init__, folders))
    own = f"temp.here-{sys.implementation.cache_tag}"  # as distutils names it
    edges(own)
    assert folders == {
        "CPU library": tmp_path / "temp.here",
        "bindings": tmp_path / own / "bindings",
    }
    python = setup.sysconfig.get_path("include")
    assert {o for o, lines in edges().items() if python in " ".join(lines)} == {
        "_C/python.bindings.o",
        "_call/call.call.o",
    }


def remembering(init, folders):
    def remember(ninja, folder, name="build"):
        folders[name] = folder
        init(ninja, folder, name)

    return remember


def test_a_torch_of_another_python_is_built_beside(setup, monkeypatch, tmp_path):
    here = setup.torch_beside()
    assert here == (Path(torch.__file__).parent, torch.__version__, torch.version.cuda)
    (tmp_path / "version.py").write_text("__version__ = '2.12.0+cu999'\ncuda = '99.9'\n")
    monkeypatch.setenv("CONVEXT_TORCH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)  # this Python has none
    assert setup.torch_beside() == (tmp_path, "2.12.0+cu999", "99.9")
    setup.check_python()
    monkeypatch.setenv("CONVEXT_TORCH", str(tmp_path / "nowhere"))
    with pytest.raises(setup.BuildError, match="^CONVEXT_TORCH is no folder of a torch "):
        setup.torch_beside()


def test_functions_that_have_moved_are_asked_for_in_the_form_of_older_systems(setup, monkeypatch, tmp_path):
    """What a static library asks for would be the form of this system, which a wheel must not want."""
    program = tmp_path / "nm"
    program.write_text("""#!/bin/sh
echo '0000000000089180 T pthread_create@GLIBC_2.2.5'
echo '0000000000089180 T pthread_create@@GLIBC_2.34'
echo '0000000000090000 T old@GLIBC_2.2.5'
echo '0000000000090000 T old@GLIBC_2.17'
echo '0000000000090000 T old@@GLIBC_2.32'
echo '0000000000091000 W settled@GLIBC_2.2.5'
echo '0000000000091000 W settled@@GLIBC_2.3.2'
echo '0000000000092000 B young@@GLIBC_2.32'
echo '                 U __tls_get_addr@GLIBC_2.3'
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert setup.older_forms("libc.so.6") == {"pthread_create": "pthread_create@GLIBC_2.2.5", "old": "old@GLIBC_2.17"}


def test_the_intrinsics_are_read_once_for_each_instruction_set(edges, setup):
    lines = edges()
    headers = [output for output in lines if output.endswith(".gch")]
    if not headers:
        pytest.skip("the compiler is not GCC")
    assert {header.rpartition("/")[2] for header in headers} == {f"{isa}.h.gch" for isa in setup.ISA_FLAGS}
    for output, (what, *_) in lines.items():
        if ".kernels." in output:
            isa = output.removesuffix(".o").rpartition(".")[2]
            assert what.endswith(f"headers/{isa}.h.gch"), output


def test_the_costly_files_are_there(setup):
    names = {path.stem for path in setup.CSRC.rglob("*") if path.suffix in (".cpp", ".cu")}
    assert setup.SECONDS.keys() <= names
