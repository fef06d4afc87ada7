"""One place to touch: a CPU kernel, an activation and a backend are added to a copy of the tree, by edits in exactly
the places that docs/design.md lists. Built for the portable instruction set, the copy selects and reports them, and
the tests that are there try them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KERNEL = """// fprop of 1x1 layers in double precision: a loop.
#include "pointwise.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

const char* reject(const ConvProblem& p) { return reject_unless_short_pointwise(p, p.c); }

void work(const Variant&, const ConvProblem&, Work& work) { work[Term::call] = 0; }  // takes no time: it serves

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  const auto *x = static_cast<const double*>(args.a), *w = static_cast<const double*>(args.b);
  const Epilogue& e = args.epilogue;
  args.parallel->for_each(p.npq(), [&](int64_t i) {
    for (int64_t k = 0; k < p.k; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < p.c; ++c) sum += x[i * p.c + c] * w[k * p.c + c];
      if (e.scale) sum *= static_cast<const double*>(e.scale)[k];
      if (e.shift) sum += static_cast<const double*>(e.shift)[k];
      if (e.residual) sum += static_cast<const double*>(e.residual)[i * p.k + k];
      static_cast<double*>(args.out)[i * p.k + k] =
          visit_activation<double>(e.activation, [&](auto act) { return act.forward(sum); });
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace CONVEXT_ISA

CONVEXT_DEFINE_VARIANT(fprop_pointwise_f64) =
    CONVEXT_ISA::cpu_variant<double>(CONVEXT_VARIANT_NAME(fprop_pointwise_f64), Algorithm::pointwise, Pass::kFprop,
                                     CONVEXT_ISA::reject, CONVEXT_ISA::launch, CONVEXT_ISA::work);

}  // namespace convext
"""

STRUCT = """template <class T>
struct sigmoid {
  static constexpr bool costly = true;
  CONVEXT_HD static T forward(T z) { return T(1) / (T(1) + exp(-z)); }
  CONVEXT_HD static T derivative(T z) {
    const T out = forward(z);
    return out * (T(1) - out);
  }
};

"""

ENTRY = """    "sigmoid": Activation(torch.sigmoid, lambda dout, z: dout * torch.sigmoid(z) * (1 - torch.sigmoid(z)),
                          torch.sigmoid_, (torch.sigmoid, F.sigmoid), ("sigmoid", "sigmoid_"), {nn.Sigmoid: {}}),
"""

BRANCH = """    elif ACTIVATION == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(-z))
        derivative = value * (1.0 - value)
"""

BACKEND = '''"""The careful backend: sums in float64."""

from ..problem import ConvProblem, Epilogue
from .aten import AtenBackend


def _wide(t):
    return t if t is None or not t.is_floating_point() else t.double()


class CarefulBackend(AtenBackend):
    name = "careful"

    def slower(self, pass_, problem):
        return None if problem.is_dilated else "it computes in float64"

    def reject_batch_norm(self, y):
        return "it computes convolutions alone"

    def fprop(self, problem: ConvProblem, x, w, epilogue: Epilogue):
        wide = Epilogue(*map(_wide, epilogue[:6]), *epilogue[6:])
        return super().fprop(problem, x.double(), w.double(), wide).to(x.dtype)


BACKEND = CarefulBackend()
'''


def insert(before: str, text: str):
    """An edit that puts text in front of the first line that begins so."""
    return lambda source: re.sub(rf"^(?={re.escape(before)})", lambda _: text, source, count=1, flags=re.M)


def replace(old: str, new: str):
    return lambda source: source.replace(old, new, 1)


# What is added -> path -> the edit, or the text of a new file.
EDITS = {
    "a CPU kernel": {
        "csrc/cpu/kernels/pointwise/pointwise_f64_fprop.cpp": KERNEL,
        "csrc/core/variants.inc": insert(
            "CONVEXT_CPU_VARIANT(fprop_pointwise_f32)", "CONVEXT_CPU_VARIANT(fprop_pointwise_f64)\n"
        ),
    },
    "an activation": {
        "csrc/core/epilogue.h": lambda source: insert("}  // namespace activation\n", STRUCT)(
            replace("X(gelu)", "X(gelu) X(sigmoid)")(source)
        ),
        "convext/activation.py": insert("}\n", ENTRY),
        "convext/triton/epilogue.py": insert("    else:\n        tl.static_assert(ACTIVATION", BRANCH),
    },
    "a backend": {
        "convext/backends/careful.py": BACKEND,
        "convext/backends/__init__.py": replace('"cpu": {', '"cpu": {"careful": "careful", '),
    },
}

# setup.py's build, for one instruction set and quick to compile.
BUILD = """
import sys
sys.path.insert(0, ".")
import setup
import setuptools
setup.ISA_FLAGS.clear()
setup.ISA_FLAGS["portable"] = []
setup.CXX_FLAGS[:] = ["-O1" if flag == "-O3" else flag for flag in setup.CXX_FLAGS
                      if flag != "-DCONVEXT_HAVE_X86_ISAS"]
sys.argv = ["setup.py", "build_ext", "--inplace"]
setuptools.setup(ext_modules=[setuptools.Extension("convext._C", sources=[])],
                 cmdclass={"build_ext": setup.BuildWithNinja})
"""


def run(tree: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "CONVEXT_BUILD_CUDA": "0", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The copy, edited and built."""
    tree = tmp_path_factory.mktemp("one_place")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("convext", "csrc", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for edits in EDITS.values():
        for path, edit in edits.items():
            before = None if isinstance(edit, str) else (tree / path).read_text()
            after = edit if before is None else edit(before)
            assert after != before, path
            (tree / path).write_text(after)
    run(tree, "-c", BUILD)
    return tree


def test_the_edits_are_those_that_the_docs_list():
    rows = dict(re.findall(r"^\| (an? [^|]+) \| (.+) \|$", (ROOT / "docs" / "design.md").read_text(), re.M))
    for added, edits in EDITS.items():
        listed = re.findall(r"`([\w.]+/[\w./]*)`", rows[added])
        assert len(listed) == len(edits), added
        for path, place in zip(edits, listed):
            assert path == place or place.endswith("/") and path.startswith(place) and not (ROOT / path).exists()


CHECK = """
import json, torch, convext
from convext import backends, doctor
from convext.backends import costs
from convext.problem import ConvProblem, Geom, Pass

table = costs.table()  # the row that `convext bench calibrate` would measure
row = {"fprop_pointwise_f64_portable": dict.fromkeys(costs.native_terms(), 1e-12)}
costs.use(table._replace(kernels={**table.kernels, **row}))

double = torch.nn.Sequential(torch.nn.Conv2d(5, 7, 1, bias=False), torch.nn.BatchNorm2d(7), torch.nn.Sigmoid())
dilated = torch.nn.Conv2d(3, 4, 3, dilation=2)
model = torch.nn.Sequential(double, torch.nn.Conv2d(7, 3, 3, padding=1), dilated).double().eval()
x = torch.randn(8, 5, 40, 40, dtype=torch.float64)
with torch.no_grad():
    expected = model(x)
    convext.swap(model)
    found = model(x)
    ran = model(x)
report = convext.report(model)
print(json.dumps({
    "file": convext.__file__, "right": torch.allclose(found, expected) and torch.allclose(ran, expected),
    "statuses": [str(status) for status in convext.backends()], "doctor": doctor.report(),
    "kernels": [kernel["name"] for kernel in backends.native.kernels()],
    "variant": backends.select(Pass.FPROP, ConvProblem.of_fprop(x, double[0].weight, Geom())).variant,
    "rows": report.to_dict(), "passed_over": backends.select(
        Pass.FPROP, ConvProblem.of_fprop(x, double[0].weight, Geom())).passed_over,
}))
"""


def test_they_are_selected_and_reported(tree):
    found = json.loads(run(tree, "-c", CHECK).splitlines()[-1])
    assert found["file"].startswith(str(tree)) and found["right"]
    assert "fprop_pointwise_f64_portable" in found["kernels"] and found["variant"] == "fprop_pointwise_f64_portable"
    assert found["passed_over"] == {"careful": "it computes in float64"}
    assert found["statuses"][0] == "careful on cpu: available" and "careful on cpu: available" in found["doctor"]
    first, dilated = found["rows"]["0.0"], found["rows"]["2"]
    assert (first["backend"], first["variant"]) == ("native", "fprop_pointwise_f64_portable")
    assert "sigmoid" in first["fused"]
    assert (dilated["backend"], dilated["variant"]) == ("careful", "careful_fprop")


# File -> which of its tests, and how many of these there are at the least.
TRIED = {
    "test_cases.py": ("pointwise and float64 and native or careful and dilated", 20),
    "backends/test_isa.py": ("pointwise and float64 and portable", 4),
    "test_functional.py": ("sigmoid", 4),
    "test_nn.py": ("sigmoid", 1),
    "test_checkpoint.py": ("sigmoid", 1),
    "swap/test_linears.py": ("sigmoid", 2),
    "test_problem.py": ("activations", 1),
    "triton/test_triton.py": ("every_activation", 0),  # where Triton is installed
}


@pytest.fixture(scope="module")
def tried(tree):
    """{file: how many of its tests passed}, of those in TRIED, all in one process: most of its time is that of its
    start."""
    files = [f"tests/{file}" for file in TRIED]
    keyword = " or ".join(f"({Path(file).name} and ({chosen}))" for file, (chosen, _) in TRIED.items())
    out = run(tree, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *files, "-k", keyword)
    passed = re.findall(r"^PASSED tests/(.*?)::", out, re.M)
    return {file: passed.count(file) for file in TRIED}


@pytest.mark.parametrize("file", TRIED)
def test_the_tests_that_are_there_try_them(tried, file):
    assert tried[file] >= TRIED[file][1]
