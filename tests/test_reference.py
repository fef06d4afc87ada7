"""The reference that all else is measured by: equal to PyTorch in float64, and strict enough to notice errors."""

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, MEMORY
from reference import Nest


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_pytorch_in_float64(case):
    operands = case.operands(torch.float64)
    inputs = [t.detach().requires_grad_() for t in (operands.x, operands.w, operands.bias) if t is not None]
    y = F.conv2d(*inputs[:2], inputs[2] if case.bias else None, *case.arguments)
    actual = [y, *torch.autograd.grad(y, inputs, operands.dy)]
    expected = Nest(case).expected(operands)
    assert len(actual) == len(expected)
    for result, (name, value) in zip(actual, expected.items(), strict=True):
        value.check(result, torch.float64, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bound_notices_one_dropped_tap_and_one_wrong_rounding(dtype):
    case = BY_NAME["three_by_three"]
    operands = case.operands(dtype)
    expected = Nest(case).expected(operands)["fprop"]
    rounded = expected.value.to(dtype)
    expected.check(rounded)
    dropped = operands.w.clone()
    dropped[0, 0, 0, 0] = 0
    with pytest.raises(AssertionError, match="times the error"):
        expected.check(Nest(case).fprop(operands.x, dropped, operands.bias).to(dtype))
    with pytest.raises(AssertionError, match="times the error"):
        expected.check(rounded * (1 + 4 * torch.finfo(dtype).eps * case.gemm_k("fprop") ** 0.5))
    with pytest.raises(AssertionError, match="times the error"):
        expected.check(rounded.clone().index_fill_(0, torch.tensor(1), float("nan")))


@pytest.mark.parametrize("memory", MEMORY)
def test_memory_changes_strides_and_not_values(memory):
    t = torch.randn(2, 3, 4, 5)
    laid = MEMORY[memory](t)
    assert laid.shape == t.shape
    assert memory == "expanded" or torch.equal(laid, t)
    if memory not in ("contiguous", "misaligned"):
        assert laid.stride() != t.stride()
    if memory == "misaligned":
        assert laid.data_ptr() % 16 == 4
