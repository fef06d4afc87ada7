"""Torch is all that convext needs to run: everything is tried in a process that refuses to import the rest."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Torch itself takes NumPy where it finds it, so it comes up without.
BLOCK = """
import sys

class Blocker:  # finds what another finder does, those apart: for who only asks whether they are there, too
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in ("numpy", "rich", "typer", "torchvision")
        return None if blocked else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Blocker, sys.meta_path)
sys.argv[0] = "convext"
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-c", BLOCK + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def printed(code: str) -> str:
    found = run(code)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_blocker_blocks():
    for package in ("numpy", "rich", "typer"):
        found = run(f"import {package}")
        assert found.returncode == 1 and f"No module named '{package}'" in found.stderr


def test_importing_convext_takes_neither_numpy_nor_what_draws():
    code = (
        "import torch\nbefore = set(sys.modules)\nimport convext\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert {"numpy", "rich", "typer", "torchvision"}.isdisjoint(printed(code).split())
    plain = subprocess.run([sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True, check=True)
    assert {"rich", "typer", "torchvision"}.isdisjoint(plain.stdout.split())


NETWORK = """
import torch, convext
torch.manual_seed(0)
torch.set_num_threads(1)
nn = torch.nn
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), convext.nn.ConvBNReLU(8, 8, 3),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
x = torch.randn(2, 3, 9, 9)
"""


def test_swap_report_verify_and_revert_run():
    text = printed(
        NETWORK
        + """
expected = model.eval()(x)
convext.swap(model)
torch.testing.assert_close(model(x), expected)
report = convext.report(model)
print(report)
print([(row.layer, row.fused) for row in report])
verification = convext.verify(model, x)
print(verification)
print(bool(verification))
convext.revert(model)
print(type(model[0]) is nn.Conv2d)
"""
    )
    assert re.search(r"^module +layer +became +fused ", text, re.M) and "fused with what follows\n" in text
    assert re.search(r"^model +kind +worst of it ", text, re.M) and " values: swapped and unswapped agree\n" in text
    assert "('3 -> 8, 3x3, padding 1', 'bn + relu')" in text and text.endswith("True\nTrue\n")


def test_every_operator_runs_forward_and_backward():
    assert (
        printed(
            NETWORK
            + """
w, d = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
s = torch.rand(4) + 0.5
calls = [convext.conv2d(x, w), convext.dilated_conv2d(x, w), convext.depthwise_conv2d(x, d),
         convext.conv_act(x, w, activation="gelu"), convext.conv_bn_relu(x, w, None, s, s, s, s),
         convext.conv_bn_relu(x, w, None, None, None, s, s, training=True)]
for y in calls:
    y.sum().backward()
with convext.backend("aten"), convext.accuracy("strict"), convext.output_pool(0), convext.layer_by_layer():
    model(x).sum().backward()
convext.backends()
print(bool(w.grad.isfinite().all() and d.grad.isfinite().all()))
"""
        )
        == "True\n"
    )


MAIN = "from convext.__main__ import main\nsys.exit(main({arguments}))"


@pytest.mark.parametrize(
    "code",
    [
        MAIN.format(arguments=["doctor"]),
        "sys.argv[1:] = []\nimport runpy\nrunpy.run_module('convext', run_name='__main__', alter_sys=False)",
    ],
    ids=["convext doctor", "python -m convext"],
)
def test_the_doctors_report_is_printed(code):
    text = printed(code)
    for line in ("convext ", "running with: torch", "CPU: ", "backends:", "serves cpu: "):
        assert re.search(f"^{line}", text, re.M)


@pytest.mark.parametrize("arguments", [[], ["report", "--model", "resnet18"]])
def test_any_other_command_says_in_one_line_what_to_install(arguments):
    found = run(MAIN.format(arguments=arguments))
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == (
        'convext: typer and rich not installed: pip install "convext[cli]"; `convext doctor` runs without\n'
    )


def test_torch_is_the_only_requirement_and_the_extras_say_the_rest():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dependencies = \["torch>=[0-9.]+"\]$', text, re.M)
    extras = dict(re.findall(r"^(\w+) = \[(.*)\]$", text.partition("[project.optional-dependencies]")[2], re.M))
    assert "typer" in extras["cli"] and "rich" in extras["cli"]
    for extra in ("demo", "smoke"):
        assert '"convext[cli]"' in extras[extra] and '"numpy"' in extras[extra]
    assert "convext[demo,smoke]" in extras["test"] and "convext[demo]" in extras["bench"]
