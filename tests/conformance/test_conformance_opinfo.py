"""PyTorch's own samples and error inputs for conv2d (OpInfo), through `convext.conv2d`."""

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
