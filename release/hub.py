"""Lays convext out for the Hugging Face kernel hub, from the wheels in dist/: build/kernel-hub/ (`./dev kernel-hub`).

    convext/          the compiled libraries, for torch's stable ABI: a variant for the CPU, and one for CUDA if the
                      wheels hold its library; the bindings of every Python that there is a wheel for
    convext-triton/   Python alone, with Triton's kernels

Each folder is what a repository of the hub holds: `kernels.get_local_kernel(folder)` loads it, as `get_kernel` would
from there.
"""

import base64
import hashlib
import json
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).resolve().parent / "hub"
FOLDER = ROOT / "build" / "kernel-hub"
PACKAGE = "convext"

# Older releases of the kernels package import a variant by this file.
FORMER_ENTRY = '''"""The variant under the name that it had for older releases of the kernels package."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(__name__ + ".variant", Path(__file__).parents[1] / "__init__.py")
_variant = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_variant)
globals().update({name: getattr(_variant, name) for name in _variant.__all__})
'''


def value(text: str, key: str) -> str:
    """The value of a key in build.toml, as JSON has it too: a string, a number, a list."""
    found = re.search(rf"^{key} = (.*)$", text, re.M)
    if found is None:
        sys.exit(f"dev: build.toml has no {key}")
    return json.loads(found[1])


def cuda_of(package: Path) -> tuple[str, list[str]] | None:
    """(CUDA's version, architectures) of the CUDA library as its build has noted them: ("13.0", ["8.0", "9.0+PTX"])."""
    for module in package.glob("_C.*.so"):
        found = re.search(rb"CUDA library built with nvcc (\d+\.\d+) for ([\w, ]+)", module.read_bytes())
        if found is not None:
            archs = [f"{arch[3:-1]}.{arch[-1]}" for arch in found[2].decode().split(", ")]
            return found[1].decode(), [*archs[:-1], f"{archs[-1]}+PTX"]
    return None


def complete(variant: Path, build: str, backend: str, archs: list[str]) -> None:
    """Adds the files beside the package: what is imported, and metadata.json."""
    shutil.copy(SOURCES / "variant.py", variant / "__init__.py")
    name = value(build, "name")
    former = variant / name.replace("-", "_") / "__init__.py"
    if not former.exists():
        former.parent.mkdir()
        former.write_text(FORMER_ENTRY)
    files = sorted(file for file in variant.rglob("*") if file.is_file())
    sums = {
        file.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in files
    }
    content = hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:7]
    metadata = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{backend}_{content}",
        "version": value(build, "version"),
        "license": value(build, "license"),
        "python-depends": [],
        "backend": {"type": backend, **({"archs": archs} if archs else {})},
        "digest": {"algorithm": "sha256", "files": sums},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def lay_out(wheels: list[Path], folder: Path) -> list[Path]:
    """Writes both repositories into `folder` and returns their variants."""
    shutil.rmtree(folder, ignore_errors=True)
    unpacked = folder / "unpacked"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(unpacked, [name for name in opened.namelist() if name.startswith(f"{PACKAGE}/")])
    package = unpacked / PACKAGE

    compiled, python = ((SOURCES / name / "build.toml").read_text() for name in ("convext", "convext-triton"))
    oldest = value(compiled, "cpu")
    framework, system = f"torch-stable-abi{oldest.replace('.', '')}", f"{platform.machine()}-linux"
    cuda = cuda_of(package) if list(package.glob("libconvext_cuda*")) else None
    targets = [(compiled, f"{framework}-cpu-{system}", "cpu", [], ("libconvext_cuda*", "_CUDA.*"))]
    if cuda is not None:
        targets.append((compiled, f"{framework}-cu{cuda[0].replace('.', '')}-{system}", "cuda", cuda[1], ()))
    targets.append((python, "torch-cuda", "cuda", value(python, "cuda_capabilities"), ("*.so",)))

    variants = []
    for build, variant, backend, archs, without in targets:
        repository = folder / value(build, "name")
        place = repository / "build" / variant
        shutil.copytree(package, place / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", *without))
        (repository / "build.toml").write_text(build)
        complete(place, build, backend, archs)
        variants.append(place)
    shutil.rmtree(unpacked)
    return variants


def main() -> None:
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        sys.exit("dev: there is no wheel in dist/: ./dev wheel makes them")
    for variant in lay_out(wheels, FOLDER):
        size = sum(file.stat().st_size for file in variant.rglob("*") if file.is_file())
        print(f"    {size / 2**20:5.1f} MiB  {variant.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
