"""The passes of a case through `convext.conv2d`, and the comparison with the reference."""

import functools

import torch
from cases import BY_NAME
from reference import Nest

import convext

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PASSES = ["fprop", "dgrad", "wgrad", "dbias"]

# What PyTorch warns of where it cannot pad evenly: what it says is true of its own kernels.
EVEN_SAME = "ignore:Using padding='same' with even kernel"


@functools.lru_cache(maxsize=512)
def expected(name, dtype):
    """{pass: Expected} of the case with that name."""
    return Nest(BY_NAME[name]).expected(BY_NAME[name].operands(dtype, "cpu"))


def run(case, operands, passes=PASSES, conv2d=None):
    """{pass: result} of the asked passes, with no gradient asked for that is not needed."""
    conv2d = conv2d or convext.conv2d
    wanted = {"dgrad": operands.x, "wgrad": operands.w, "dbias": operands.bias}
    wanted = {name: t.detach() for name, t in wanted.items() if name in passes and t is not None}
    for t in wanted.values():
        t.requires_grad_()
    x, w = wanted.get("dgrad", operands.x), wanted.get("wgrad", operands.w)
    y = conv2d(x, w, wanted.get("dbias", operands.bias), *case.arguments)
    results = {"fprop": y.detach()} if "fprop" in passes else {}
    if wanted:
        results.update(zip(wanted, torch.autograd.grad(y, list(wanted.values()), operands.dy), strict=True))
    return results


def check(case, dtype, passes=PASSES, conv2d=None):
    """Runs the passes that the case has and compares each with float64."""
    operands = case.operands(dtype)
    results = run(case, operands, passes, conv2d)
    assert results
    for name, result in results.items():
        expected(case.name, dtype)[name].check(result, dtype, f"{name} of {case.name}")
