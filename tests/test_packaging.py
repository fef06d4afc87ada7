"""The package's files agree with one another, and ./dev refuses in one line on a machine that lacks something."""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

import convext

ROOT = Path(__file__).resolve().parents[1]


def dev(*arguments, path=None, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment} | ({"PATH": str(path)} if path else {})
    return subprocess.run(["/bin/sh", str(ROOT / "dev"), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def bare_machine(tmp_path):
    """A copy of ./dev on a PATH that holds the usual tools, but neither a compiler nor Python."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "cat", "find", "cksum", "sort", "rm", "grep", "ls", "tail"):
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
    for verb in ("demo", "test", "sanitize", "gpu-check", "lint", "wheel", "test-other-torch", "setup"):
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


def test_make_only_calls_dev():
    recipes = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    assert recipes and all(line.startswith("\t@./dev ") for line in recipes)
