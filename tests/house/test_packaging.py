"""The package's files agree with one another, and ./dev refuses in one line on a machine that lacks something."""

import csv
import http.server
import importlib.metadata
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from email.parser import Parser
from pathlib import Path
from types import SimpleNamespace

import pytest

import convext

ROOT = Path(__file__).resolve().parents[2]


def dev(*arguments, path=None, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment} | ({"PATH": str(path)} if path else {})
    return subprocess.run(["/bin/sh", str(ROOT / "dev"), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def bare_machine(tmp_path):
    """A copy of ./dev on a PATH that holds the usual tools, but neither a compiler nor Python."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "cat", "find", "cksum", "sort", "rm", "grep", "ls", "tail", "head", "sed", "tee"):
        (tools / tool).symlink_to(shutil.which(tool))
    for name in ("dev", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "convext"):
        (tmp_path / name).mkdir()

    def run(verb, **environment):
        environment = {"PATH": str(tools), "HOME": str(tmp_path), **environment}
        return subprocess.run(["/bin/sh", "dev", verb], cwd=tmp_path, capture_output=True, text=True, env=environment)

    return run


def python_that(tmp_path: Path, *answers: str) -> str:
    """A stand-in for Python that exits as told, one answer a call that is no version question."""
    count = tmp_path / "calls"
    lines = "\n".join(f"  {index}) exit {answer} ;;" for index, answer in enumerate(answers))
    script = tmp_path / "python-stand-in"
    script.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo Python 3.9.2; exit 0 ;; esac\n"
        f"n=0; [ ! -e {count} ] || read -r n < {count}\necho $((n + 1)) > {count}\ncase $n in\n{lines}\nesac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_versions_agree():
    stated = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert convext.__version__ == stated


def test_the_command_is_installed():
    try:
        entry_points = importlib.metadata.distribution("convext").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("convext runs from its source tree")
    (command,) = (e for e in entry_points if e.group == "console_scripts")
    assert command.name == "convext"
    assert callable(command.load())


def test_dev_names_every_verb_it_has():
    text = dev("help").stdout
    for verb in ("demo", "test", "sanitize", "gpu-check", "lint", "docs", "wheel", "test-other-torch", "setup"):
        assert re.search(rf"^  {verb}\b", text, re.M)


def test_dev_refuses_an_unknown_verb():
    refused = dev("frobnicate")
    assert refused.returncode == 1
    assert refused.stderr.endswith("dev: no verb 'frobnicate'\n")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (("1",), "Python 3.9.2 is too old: convext needs 3.10 or later"),
        (("0", "1"), "has no venv module: on Debian, apt-get install python3-venv"),
        (("0", "0", "1"), "has no headers (Python.h): on Debian, apt-get install python3-dev"),
    ],
)
def test_dev_says_what_python_lacks(bare_machine, tmp_path, answers, message):
    refused = bare_machine("demo", PYTHON=python_that(tmp_path, *answers))
    assert refused.returncode == 1
    assert message in refused.stderr and refused.stderr.count("\n") == 1


def test_dev_says_that_there_is_no_python(bare_machine):
    refused = bare_machine("test")
    assert refused.returncode == 1
    assert refused.stderr == "dev: no python3: install Python 3.10 or later, or set PYTHON\n"


def test_dev_says_that_there_is_no_compiler_before_it_downloads_anything(bare_machine, tmp_path):
    refused = bare_machine("test", PYTHON=python_that(tmp_path, "0", "0", "0"))
    assert refused.returncode == 1
    assert "no C++ compiler" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.fixture
def installing(bare_machine, tmp_path):
    """installing(text, status): ./dev setup on a machine where all is there and pip prints that text and ends so."""

    def run(text: str, status: int, ready: bool = True, **environment) -> subprocess.CompletedProcess:
        compiler = shutil.copy(shutil.which("true"), tmp_path / "bin" / "c++")
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "says").write_text(text)
        python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\ncat {tmp_path}/says\nexit {status}\n')
        python.chmod(0o755)
        named = dict(re.findall(r"^OWN_(TORCH\w*)=(\S+)", (ROOT / "dev").read_text(), re.M))
        requirements = f"torch=={named['TORCH']} torchvision=={named['TORCHVISION']}"
        stand_in = python_that(tmp_path, *"0" * 20)
        (tmp_path / ".venv" / (".ready" if ready else ".begun")).write_text(
            requirements if ready else f"{stand_in} {requirements}"
        )
        return bare_machine("setup", PYTHON=stand_in, CXX=str(compiler), **environment)

    return run


def test_dev_shows_how_far_the_build_is(installing):
    told = [
        "  convext: CUDA library will be built, which takes minutes, with nvcc 13.0 for sm_90",
        "  convext: CPU library: 43 of 121, batch_norm.avx2, about 1 min 10 s left",
        "  [43/126] something of another package",
        "  Created wheel for convext: filename=convext-0.1.0.whl",
        "  convext: CPU library: 121 of 121, _C.so, done in 90 s",
        "Successfully installed convext-0.1.0",
    ]
    done = installing("\n".join(told) + "\n", 0)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("  convext: ") for line in told if line.startswith("  convext")]
    assert done.stdout.splitlines() == ["==> building and installing convext[demo]", *(f"    {line}" for line in lines)]


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        ("  convext: the build failed: no C++ compiler: tried $CXX", "the build failed: no C++ compiler: tried $CXX"),
        ("OSError: [Errno 28] No space left on device", "failed: no space is left on the disk"),
        ("WARNING: Retrying after ProxyError('Cannot connect to proxy.', NewConnectionError)", "the proxy refused"),
        ("Tunnel connection failed: 403 Forbidden\nERROR: No matching distribution found for x", "the proxy refused"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "set PIP_CERT"),
        ("NewConnectionError('[Errno -2] Name or service not known')", "the package index cannot be reached"),
        ("MemoryError", "too little memory"),
        ("ERROR: No matching distribution found for torch==2.11.0", "nothing that fits torch==2.11.0 and Python 3.9.2"),
    ],
)
@pytest.mark.parametrize("ready", [True, False], ids=["building", "downloading"])
def test_dev_says_in_one_line_why_an_installation_failed(installing, pip, said, ready):
    refused = installing(f"Collecting torch\n{pip}\n", 2, ready)
    assert refused.returncode == 1
    assert said in refused.stderr and refused.stderr.startswith("dev: ") and refused.stderr.count("\n") == 1


def test_dev_knows_how_pip_says_that_a_proxy_refuses(installing):
    """The words are this pip's own."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(403, "Forbidden")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "download", "--retries", "1", "--no-cache-dir", "--proxy",
             f"http://127.0.0.1:{proxy.server_port}", "--index-url", "https://index.invalid/simple", "convext"],
            env={**environment, "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        proxy.shutdown()
    assert asked.returncode == 1
    refused = installing(asked.stdout + asked.stderr, 1)
    assert refused.stderr.startswith("dev: the installation failed: the proxy refused; set https_proxy to one that ")
    assert refused.stderr.count("\n") == 1


def test_dev_shows_the_end_of_a_log_that_it_cannot_explain(installing):
    refused = installing("one\ntwo\n", 2)
    assert refused.stderr == "one\ntwo\ndev: the installation failed; the whole output is in .venv/install.log\n"


def test_dev_goes_on_with_an_environment_whose_installation_broke_off(installing, tmp_path):
    kept = tmp_path / ".venv" / "lib"
    kept.mkdir(parents=True)
    done = installing("", 0, ready=False)
    assert done.returncode == 0, done.stderr
    assert "going on with .venv" in done.stdout and kept.exists() and (tmp_path / ".venv" / ".ready").exists()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and "torch==" in asked[0] and ".[demo]" in asked[1]


# ---- another torch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def other_torch(bare_machine, tmp_path):
    """other_torch(**environment): ./dev setup with these wishes, on a machine where all is there; returns that, and
    what pip was asked for. The environments' Python is a stand-in that writes it down; torchvision loads in it where
    the file `fits` is there, which pip lays there once it is asked for torch===."""
    asked = tmp_path / "asked"

    def run(**environment):
        python = tmp_path / "python-stand-in"
        python.write_text(
            rf"""#!/bin/sh
case "$*" in
*venv\ .venv*)
  mkdir -p "$3/bin" "$3/lib/python3/site-packages/torch-2.13.0+cpu.dist-info"
  cp {python} "$3/bin/python" ;;
*import\ torchvision*) [ -e {tmp_path}/fits ] ;;
*"pip install"*)
  shift 4
  echo "$0 $*" >> {asked}
  case "$*" in *===*) : > {tmp_path}/fits ;; esac ;;
esac
"""
        )
        python.chmod(0o755)
        asked.write_text("")
        tools = tmp_path / "bin"
        for tool in ("mkdir", "cp"):
            if not (tools / tool).exists():
                (tools / tool).symlink_to(shutil.which(tool))
        compiler = shutil.copy(shutil.which("true"), tools / "c++")
        done = bare_machine("setup", PYTHON=str(python), CXX=str(compiler), **environment)
        return done, asked.read_text().splitlines()

    return run


def test_each_torch_has_an_environment_of_its_own(other_torch, tmp_path):
    (tmp_path / "fits").touch()
    done, asked = other_torch(TORCH="2.13.0")
    assert done.returncode == 0, done.stderr
    made, installed = asked
    assert made.startswith(".venv-torch-2.13.0/bin/python torch==2.13.0 torchvision>=0.25 ")
    assert installed.startswith(".venv-torch-2.13.0/bin/python ") and installed.endswith(
        ".[demo] torch==2.13.0 torchvision>=0.25"
    )
    assert other_torch(TORCH="2.13.0")[1] == []  # nothing changed
    _, asked = other_torch(TORCH="2.10.0", TORCHVISION="0.25.0")
    assert asked[0].startswith(".venv-torch-2.10.0-torchvision-0.25.0/bin/python torch==2.10.0 torchvision==0.25.0 ")
    assert other_torch(TORCH="2.13.0")[1] == []  # the other has left it as it was
    assert sorted(file.name for file in tmp_path.glob(".venv*")) == [
        ".venv-torch-2.10.0-torchvision-0.25.0",
        ".venv-torch-2.13.0",
    ]


def test_another_triton_comes_last_for_torch_names_its_own(other_torch, tmp_path):
    (tmp_path / "fits").touch()
    own = re.search(r"^OWN_TORCH=(\S+)", (ROOT / "dev").read_text(), re.M)[1]
    _, asked = other_torch(TRITON="3.9.0")
    assert asked[0].startswith(f".venv-torch-{own}-triton-3.9.0/bin/python torch=={own} ")
    assert asked[-1] == f".venv-torch-{own}-triton-3.9.0/bin/python --no-deps --upgrade triton==3.9.0"
    assert other_torch(TRITON="newest")[1][-1].endswith(" --no-deps --upgrade triton")


def test_the_newest_torch_is_asked_for_again(other_torch, tmp_path):
    (tmp_path / "fits").touch()
    _, asked = other_torch(TORCH="newest")
    assert asked[0].startswith(".venv-torch-newest/bin/python torch torchvision>=0.25 ") and len(asked) == 2
    _, asked = other_torch(TORCH="newest")
    assert asked == [".venv-torch-newest/bin/python --upgrade torch torchvision>=0.25"]
    packages = tmp_path / ".venv-torch-newest" / "lib" / "python3" / "site-packages"
    (packages / "torch-2.13.0+cpu.dist-info").rename(packages / "torch-2.15.0.dist-info")  # the index had another one
    _, asked = other_torch(TORCH="newest")
    assert len(asked) == 2 and ".[demo]" in asked[1]  # what was built beside the former is built anew


def test_a_build_of_torch_that_torchvisions_does_not_fit_is_replaced(other_torch):
    done, asked = other_torch(TORCH="2.13.0")
    assert done.returncode == 0, done.stderr
    assert asked[1] == ".venv-torch-2.13.0/bin/python torch===2.13.0 torchvision>=0.25"


@pytest.mark.parametrize("torch", ["2.9.1", "==2.13.0", "latest", "2"])
def test_dev_says_which_torch_it_can_do_with(other_torch, torch):
    refused, asked = other_torch(TORCH=torch)
    assert refused.returncode == 1 and not asked
    assert refused.stderr == (
        f"dev: TORCH: got '{torch}', expected a release from 2.10.0 on, such as 2.13.0, or newest\n"
    )


def test_ci_takes_the_newest_torch_that_pip_finds():
    program = (ROOT / "dev").read_text()
    assert (
        'beside "${WISH_TORCH:-newest}"'
        in re.search(r"^verb_test_other_torch\(\) \{\n(.*?)^\}", program, re.M | re.S)[1]
    )
    assert "TORCH=" not in (ROOT / ".ci" / "run").read_text()


def test_dev_builds_the_cuda_library_where_there_is_a_gpu_unless_told_otherwise(installing, tmp_path):
    program = (ROOT / "dev").read_text()
    assert 'export CONVEXT_BUILD_CUDA="${CONVEXT_BUILD_CUDA:-gpu}"' in program
    installing("", 0)
    installing("", 0)  # nothing changed
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    installing("", 0, CONVEXT_BUILD_CUDA="auto")
    installing("", 0, CONVEXT_BUILD_CUDA="auto", CONVEXT_CUDA_ARCHS="90")
    assert len((tmp_path / "asked").read_text().splitlines()) == 3


def test_ci_tests_with_the_cuda_library():
    text = (ROOT / ".ci" / "run").read_text()
    assert text.index("export CONVEXT_BUILD_CUDA=auto") < text.index("./dev test")


def test_the_readme_gives_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^\./dev demo$", readme, re.M) and re.search(r"^\./dev test$", readme, re.M)


@pytest.mark.parametrize("file", sorted((ROOT / "csrc" / "cuda").rglob("*.cu")), ids=lambda file: file.stem)
def test_a_cuda_file_opens_with_its_budget(file):
    opening = re.match(r"(//.*\n)+", file.read_text())[0].lower()
    assert all(word in opening for word in ("=", "register", "shared memory", "flop")), opening


def test_cuda_sources_include_no_header_of_torch():
    files = [file for file in (ROOT / "csrc" / "cuda").rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        includes = re.findall(r"^#include [<\"](.*)[>\"]", file.read_text(), re.M)
        assert not [name for name in includes if re.match(r"(torch|ATen|c10|pybind11)\b", name)], file


def test_lint_runs_first_in_ci_and_with_the_releases_that_the_extra_names():
    text = (ROOT / "pyproject.toml").read_text()
    tools = re.findall(r'"([^"]+)"', re.search(r"^lint = (.*)$", text, re.M)[1])
    assert {tool.partition("==")[0] for tool in tools} >= {"ruff", "mypy"}
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", tool) for tool in tools)
    verbs = re.findall(r"^\./dev ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert verbs[0] == "lint"


def test_pre_commit_runs_what_lint_runs_and_downloads_nothing():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.*)", text) == ["local"]
    entries = re.findall(r"entry: (.*)", text)
    assert len(entries) == text.count("- id: ") == text.count("language: system")
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    lint = re.search(r"^verb_lint\(\) \{\n(.*?)^\}", (ROOT / "dev").read_text(), re.M | re.S)[1]
    tools = set(re.findall(r"\$VENV/bin/([a-z-]+)", lint))
    assert {"ruff", "mypy", "clang-format"} <= tools <= {Path(entry.split()[0]).name for entry in entries}


def test_the_types_of_every_public_module_are_checked():
    text = (ROOT / "pyproject.toml").read_text()
    files = re.search(r"^\[tool\.mypy\]\nstrict = true\n.*?^files = \[(.*?)\]", text, re.M | re.S)[1]
    checked = {file for pattern in re.findall(r'"(.*?)"', files) for file in ROOT.glob(pattern)}
    assert {ROOT / "convext" / f"{name}.py" for name in ("__init__", "functional", "nn", "cli")} <= checked
    assert ROOT / "convext" / "backends" / "__init__.py" in checked


def test_make_only_calls_dev():
    recipes = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    assert recipes and all(line.startswith("\t@./dev ") for line in recipes)


# ---- what is published -----------------------------------------------------------------------------------------------


def setup_py(tree: Path, scratch: Path, *command) -> None:
    """Runs a command of setup.py on a tree without compiling; what setuptools notes down goes to `scratch`."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", scratch, *command]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=250)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(names of the files in the sdist, files below convext/ in the wheel, metadata)"""
    if not (ROOT / "setup.py").exists():
        pytest.skip("there is no source tree here")
    scratch = tmp_path_factory.mktemp("published")
    tree = shutil.copytree(
        ROOT,
        scratch / "tree",
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
        ),
    )
    setup_py(tree, scratch, "sdist", "--dist-dir", scratch / "dist")
    setup_py(tree, scratch, "build_py", "--build-lib", scratch / "lib")
    (archive,) = (scratch / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wheel = {file.relative_to(scratch / "lib").as_posix() for file in (scratch / "lib").rglob("*") if file.is_file()}
    return names, wheel, Parser().parsestr((scratch / "convext.egg-info" / "PKG-INFO").read_text())


def test_the_sdist_holds_every_tracked_file(published):
    if not (ROOT / ".git").exists():
        pytest.skip("there is no repository here to compare with")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(tracked) > 200
    assert set(tracked) - published[0] == {".gitignore"}


def test_the_wheel_holds_the_package_its_mark_of_types_its_shapes_and_its_tables_of_costs_alone(published):
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "convext").rglob("*.py")}
    shapes = {f"convext/bench/shape_files/{file.name}" for file in (ROOT / "benchmarks" / "shapes").glob("*.txt")}
    assert "convext/bench/shape_files/resnet50.txt" in shapes
    tables = {file.relative_to(ROOT).as_posix() for file in (ROOT / "convext/backends/tables").glob("*.json")}
    assert len(tables) > 2 and published[1] == modules | shapes | tables | {"convext/py.typed"}
    assert tables | {"convext/py.typed"} <= published[0]


def test_the_licence_is_named_and_published(published):
    names, _, metadata = published
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE"] and "LICENSE" in names
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("BSD 3-Clause License\n") and "the convext developers" in text
    assert all(f"\n{clause}. " in text for clause in (1, 2, 3))


def test_the_citation_and_the_changelog_speak_of_this_version():
    fields = dict(re.findall(r"^([a-z-]+): *(.*)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert fields["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= fields.keys()  # those that the format demands
    assert fields["version"] == convext.__version__
    assert fields["license"] == "BSD-3-Clause"
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    assert headings[1].partition(" ")[0].strip("[]") == convext.__version__


# ---- what is installed, and what is left of it ----------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path):
    """An environment with this package in it, and torch from the one that runs the tests."""
    if not any(importlib.metadata.distributions(name="pip")):  # looking for the module would upset setuptools
        pytest.skip("pip is not installed here")
    folder, python, home = tmp_path / "environment", tmp_path / "environment" / "bin" / "python", tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torchs.pth").write_text(sysconfig.get_path("purelib"))

    wheel = tmp_path / "convext-0.0.1-py3-none-any.whl"
    package = Path(convext.__file__).parent
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(package.rglob("*")):
            if file.suffix in (".py", ".so", ".typed", ".json"):
                archive.write(file, file.relative_to(package.parent))
        about = "convext-0.0.1.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: convext\nVersion: 0.0.1\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", "[console_scripts]\nconvext = convext.__main__:main\n")
        with io.StringIO() as record:
            csv.writer(record).writerows([name, "", ""] for name in [*archive.namelist(), f"{about}/RECORD"])
            archive.writestr(f"{about}/RECORD", record.getvalue())

    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("CONVEXT_", "PYTHON", "XDG"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(home, *command):
        home.mkdir(exist_ok=True)
        ran = subprocess.run(
            command, cwd=home, env={**environment, "HOME": str(home)}, capture_output=True, text=True, timeout=200
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def pip(*arguments):  # what it starts keeps files of its own
        command = [sys.executable, "-m", "pip", "--python", python, "--isolated", "--no-cache-dir", *arguments]
        return run(tmp_path / "home_of_pip", *command)

    before = {file for file in folder.rglob("*")}
    pip("install", "--no-deps", "--no-index", wheel)
    return SimpleNamespace(folder=folder, before=before, home=home, pip=pip, python=lambda *a: run(home, python, *a))


USE = """
import torch, convext
from convext import doctor

model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), torch.randn(1, 3, 12, 12)
convext.swap(model)(x).sum().backward()
convext.verify(model, x)
convext.tune(model, x, seconds=0.0)
print(convext.__file__)
print(doctor.report())
"""


def test_an_uninstallation_leaves_the_caches_that_the_doctor_names(installed):
    pytest.importorskip("platformdirs")  # without it nothing is kept
    file, *report = installed.python("-c", USE).splitlines()
    assert Path(file).is_relative_to(installed.folder)
    installed.pip("uninstall", "--yes", "convext")
    assert {path for path in installed.folder.rglob("*")} == installed.before
    named = [Path(path) for line in report for path in re.findall(rf"{re.escape(str(installed.home))}[^ ,]*", line)]
    kept = [path for path in installed.home.rglob("*") if path.is_file()]
    assert any(path.name.startswith("cpu-") for path in kept)  # what tune has measured
    for path in kept:
        assert any(path.is_relative_to(place) or path.is_relative_to(place.parent) for place in named), path
