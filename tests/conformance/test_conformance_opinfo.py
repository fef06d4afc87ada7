"""PyTorch's own samples and error inputs (OpInfo) for conv2d through `convext.conv2d`, and for its like."""

import importlib.util
import sys
import types
import unittest

if importlib.util.find_spec("expecttest") is None:
    # PyTorch's own tests derive a class from its TestCase; nothing here comes near it.
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

import pytest
import torch
from cases import Case, Operands
from passes import DTYPES, EVEN_SAME
from places import BACKENDS, default_device
from reference import Nest
from torch.nn.functional import conv2d as aten_conv2d
from torch.nn.modules.utils import _pair as pair
from torch.testing._internal.common_methods_invocations import op_db

import convext

pytestmark = pytest.mark.filterwarnings(EVEN_SAME, "ignore:.*:UserWarning:torch")
(CONV2D,) = [op for op in op_db if op.name == "nn.functional.conv2d"]


def case_of(name, x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A `Case` with the shapes and arguments of a sample."""
    padding = padding if isinstance(padding, str) else pair(padding)
    return Case(name, tuple(x.shape), tuple(w.shape), pair(stride), padding, pair(dilation), groups, bias is not None)


def samples(dtype, device):
    return list(CONV2D.sample_inputs(device, dtype, requires_grad=True))


SAMPLES = range(len(samples(torch.float32, "cpu")))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", SAMPLES)
def test_sample(index, dtype, backend, served_by):
    sample = samples(dtype, default_device())[index]
    x, w, *bias = (sample.input, *sample.args)
    bias = bias[0] if bias else None
    case = case_of(f"sample {index}", x, w, bias, **sample.kwargs)
    with convext.backend(backend), served_by(backend):
        y = convext.conv2d(x, w, bias, **sample.kwargs)
        generator = torch.Generator("cpu").manual_seed(index)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator, device="cpu").to(y.device, dtype)
        inputs = [t for t in (x, w, bias) if t is not None]
        actual = [y, *torch.autograd.grad(y, inputs, dy)]
    operands = Operands(*(None if t is None else t.detach().cpu() for t in (x, w, bias, dy)))
    expected = Nest(case).expected(operands)
    assert len(expected) == len(actual)
    for result, (name, value) in zip(actual, expected.items(), strict=True):
        value.check(result, dtype, name)


ERRORS = list(CONV2D.error_inputs("cpu"))


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_error_input(index):
    error, sample = ERRORS[index], ERRORS[index].sample_input
    with pytest.raises(error.error_type):
        aten_conv2d(sample.input, *sample.args, **sample.kwargs)
    with pytest.raises(error.error_type, match="input|weight|bias|stride|padding|dilation|groups"):
        convext.conv2d(sample.input, *sample.args, **sample.kwargs)


# ---- rows and transposed convolutions, beside PyTorch's own results --------------------------------------------------

OTHERS = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in (
    "conv1d", "conv_transpose1d", "conv_transpose2d",
)}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("name", OTHERS)
def test_samples_of_its_like(name, backend):
    """In float64: the values are standard normal, and no sum is longer than a thousand products."""
    found = 0
    for sample in OTHERS[name].sample_inputs(default_device(), torch.float64, requires_grad=True):
        inputs = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        results = []
        for function in (getattr(torch.nn.functional, name), getattr(convext, name)):
            with convext.backend(backend):
                y = function(sample.input, *sample.args, **sample.kwargs)
            results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
        found += 1
    assert found > 5


@pytest.mark.parametrize("name", OTHERS)
def test_error_inputs_of_its_like(name):
    for error in OTHERS[name].error_inputs("cpu") if OTHERS[name].error_inputs_func else ():
        sample = error.sample_input
        with pytest.raises(error.error_type) as theirs:
            getattr(torch.nn.functional, name)(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(error.error_type) as ours:
            getattr(convext, name)(sample.input, *sample.args, **sample.kwargs)
        assert type(ours.value) is type(theirs.value)
