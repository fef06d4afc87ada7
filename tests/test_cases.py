"""Every edge case, in every pass and dtype, on every backend, against float64."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from passes import DTYPES, EVEN_SAME, PASSES, check
from places import BACKENDS

import convext

pytestmark = pytest.mark.filterwarnings(EVEN_SAME)
EVERY_PASS = [(case, pass_) for case in CASES for pass_ in PASSES if pass_ != "dbias" or case.bias]


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "pass_"), EVERY_PASS, ids=lambda value: str(value))
def test_pass_equals_float64(case, pass_, dtype, backend, served_by):
    with convext.backend(backend), served_by(backend, nothing_to_compute=0 in case.x):
        check(case, dtype, [pass_])


@BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_format_of_output_is_what_aten_decides(case, backend):
    on_cpu, operands = case.operands(device="cpu"), case.operands()  # the rule is one for all devices: the CPU's
    theirs = F.conv2d(on_cpu.x, on_cpu.w, on_cpu.bias, *case.arguments)
    with convext.backend(backend):
        ours = convext.conv2d(operands.x, operands.w, operands.bias, *case.arguments)
    assert ours.shape == theirs.shape
    if ours.dim() == 4:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert ours.is_contiguous(memory_format=memory_format) == theirs.is_contiguous(memory_format=memory_format)


def depthwise(x, w, bias, stride, padding, dilation, groups):
    return convext.depthwise_conv2d(x, w, bias, stride, padding, dilation)


def dilated(x, w, bias, stride, padding, dilation, groups):
    return convext.dilated_conv2d(x, w, bias, stride, padding, dilation)


SPECIAL = [
    *((depthwise, case) for case in CASES if case.groups == case.batched_x[1] and case.w[1] == 1),
    *((dilated, case) for case in CASES if case.groups == 1),
]


@BACKENDS
@pytest.mark.parametrize(("conv2d", "case"), SPECIAL, ids=lambda v: getattr(v, "__name__", str(v)))
def test_depthwise_and_dilated_functions(conv2d, case, backend, served_by):
    with convext.backend(backend), served_by(backend, nothing_to_compute=0 in case.x):
        check(case, torch.float32, conv2d=conv2d)


def test_dilated_conv2d_dilates_by_two_where_not_told():
    x, w = torch.randn(1, 4, 9, 9), torch.randn(4, 4, 3, 3)
    torch.testing.assert_close(convext.dilated_conv2d(x, w), F.conv2d(x, w, dilation=2))
