"""A fusion pattern is added by the edits that docs/design.md lists, "One place to touch", and by no other: one file in
convext/swap/match/ and its name in PATTERNS. In a copy of the package it is then selected, and reported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import convext

PACKAGE = Path(convext.__file__).resolve().parent

PATTERN = '''"""A convolution and the clamp behind it, which is a ReLU: y = conv(x).clamp_min(0)"""
from ..units import Unit
from ..units.conv import Conv


def match(graph, mode):
    for node in graph.nodes:
        convolution, follower = graph.convolution(node), graph.follower(node)
        if convolution is not None and follower is not None \\
                and (follower.op, follower.target, follower.args) == ("call_method", "clamp_min", (node, 0)):
            yield Unit(node.args[0], [Conv(convolution, activation="relu")], [node, follower])
'''

USE = """
import copy
import json
import torch
import convext
from convext.swap.lower import calls

steps = []
prepared = calls.prepared
def counted(program, *args):
    made = prepared(program, *args)
    if made is not None:
        steps.append(len(program.ops))
    return made
calls.prepared = counted


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(8, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x).clamp_min(0)).clamp_min(0)


torch.manual_seed(0)
plain = Network().double().eval()
swapped = convext.swap(copy.deepcopy(plain))
x = torch.randn(2, 8, 16, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
eps = torch.finfo(x.dtype).eps
for gradients in (False, True):
    with torch.set_grad_enabled(gradients), convext.backend("native"):
        for _ in range(2):
            y, expected = swapped(x), plain(x)
            # Two sums, of 8 * 9 and of 64 * 9 products; the clamp moves no value away from another.
            assert (y - expected).abs().max() <= 4 * eps * (8 * 9 + 64 * 9) ** 0.5 * expected.abs().max()
            assert (y >= 0).all() and (y == 0).any()
for name, row in convext.report(swapped).to_dict().items():
    print(name, row["fused"] or row["reason"].partition(";")[0], sep=": ")
print(steps)
texts = []
def backend(graph_module, inputs):
    run = convext.dynamo.compiled(graph_module, inputs, lambda graph_module, inputs: graph_module.forward)
    planned = [node for node in graph_module.graph.nodes if node.target is torch.ops.convext.planned.default]
    texts.extend([call[1].rpartition(":")[2] for call in json.loads(node.args[2])["nodes"]] for node in planned)
    return run
with torch.no_grad():
    y = torch.compile(copy.deepcopy(plain), backend=backend)(x)
    assert (y - plain(x)).abs().max() <= 4 * eps * (8 * 9 + 64 * 9) ** 0.5 * y.abs().max() and (y == 0).any()
print(texts)
log = []
swapped.second.register_forward_hook(lambda module, args, out: log.append(out))
assert torch.equal(swapped(x), log[0].clamp_min(0)) and (log[0] < 0).any()  # somebody listens: the module runs
print(convext.__file__)
"""


def _copied(folder: Path) -> Path:
    """A copy of the package, its libraries as links."""
    for path in PACKAGE.rglob("*"):
        target = folder / "convext" / path.relative_to(PACKAGE)
        if path.suffix in (".py", ".so"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path) if path.suffix == ".so" else shutil.copyfile(path, target)
    return folder / "convext"


def _said(folder: Path) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=250,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    *said, file = run.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return said


def test_a_pattern_is_one_file_and_one_name(tmp_path):
    package, alone = _copied(tmp_path), "nothing follows that can be fused"
    assert _said(tmp_path) == [f"first: {alone}", f"second: {alone}", "[]", "[['conv2d'], ['conv2d']]"]

    (package / "swap" / "match" / "conv_clamp.py").write_text(PATTERN)
    listed = package / "swap" / "match" / "__init__.py"
    before = listed.read_text()
    assert before.count('    "conv_bn_act",\n') == 1
    listed.write_text(before.replace('    "conv_bn_act",\n', '    "conv_clamp",\n    "conv_bn_act",\n'))
    # Both are one call of the compiled library, of two steps; and so they are in a compiled graph.
    found = "[['conv2d', 'clamp_min', 'conv2d', 'clamp_min']]"
    assert _said(tmp_path) == ["first: relu", "second: relu", "[2]", found]


def test_the_edits_are_those_of_the_documentation():
    text = (Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text()
    assert "| a fusion pattern | one file in `convext/swap/match/`, its name in the `PATTERNS` of that folder |" in text
