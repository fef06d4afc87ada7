"""A few minutes' confidence: needs torch and pytest and nothing else, and runs under another torch than built with."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import convext
from convext.problem import DType

pytestmark = pytest.mark.smoke


def test_public_names_are_there():
    for name in ("conv2d", "depthwise_conv2d", "dilated_conv2d", "conv_bn_relu", "swap", "revert", "report", "verify",
                 "backend", "backends"):  # fmt: skip
        assert callable(getattr(convext, name)), name
    for name in ("Conv2d", "DepthwiseConv2d", "DilatedConv2d", "ConvBNReLU"):
        assert issubclass(getattr(convext.nn, name), nn.Module)
    for name in ("Conv2dFunction", "DepthwiseConv2dFunction", "DilatedConv2dFunction", "ConvBNActFunction"):
        assert issubclass(getattr(convext.autograd, name), torch.autograd.Function)
    assert issubclass(convext.nn.Conv2d, nn.Conv2d)


def test_native_backend_is_on_for_the_cpu():
    (native,) = [status for status in convext.backends() if status.name == "native" and status.device == "cpu"]
    assert native.available, native.reason


def test_the_cuda_library_loads_and_selects_without_a_gpu_and_without_torch():
    """So a wheel that holds it can be installed beside any torch, one for the CPU alone too."""
    library = importlib.util.find_spec("convext._CUDA")
    if library is None:
        pytest.skip("the CUDA library was not built (CONVEXT_BUILD_CUDA=auto ./dev test builds it, as CI does)")
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_CUDA", {library.origin!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
fields = [2, 64, 28, 28, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1, {int(DType.BFLOAT16)}, 1, 1, 1, 1, 1, 0, 1]
index, _ = module.select(0, fields, False)
print(module.variants()[index]["name"])
"""
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert ran.stdout.startswith("fprop_igemm_bf16_"), ran.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (8, 1), (1, 2), (2, 1)])
def test_conv2d_and_its_gradients_equal_pytorch(groups, dilation, backend, dtype, served_by):
    shapes = (2, 8, 9, 8), (16, 8 // groups, 3, 3), (16,)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    arguments = dict(stride=(1, 2), padding=2, dilation=dilation, groups=groups)
    expected = F.conv2d(*inputs, **arguments)
    with convext.backend(backend), served_by(backend):
        actual = convext.conv2d(*inputs, **arguments)
        gradients = torch.autograd.grad(actual.sum(), inputs)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs), **tolerance)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.bn(self.conv(x)) + x).mean((2, 3)))


def test_swap_keeps_answers_and_gradients(count_native):
    plain, swapped = Tiny().double(), Tiny().double()
    swapped.load_state_dict(plain.state_dict())
    parameters = dict(swapped.named_parameters())
    assert convext.swap(swapped) is swapped
    assert {name: id(p) for name, p in swapped.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with convext.backend("native"):
        for training in (True, False):
            plain.train(training), swapped.train(training)
            expected, actual = plain(x), swapped(x)
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
            plain.zero_grad(), swapped.zero_grad()
            expected.square().sum().backward()
            actual.square().sum().backward()
            for name, p in plain.named_parameters():
                torch.testing.assert_close(parameters[name].grad, p.grad, rtol=1e-8, atol=1e-8)
    for name, t in plain.state_dict().items():
        torch.testing.assert_close(swapped.state_dict()[name], t, rtol=1e-8, atol=1e-8)
    assert {pass_ for pass_, _ in count_native()} >= {"fprop", "dgrad", "wgrad"}
    assert "stem.0" in str(convext.report(swapped))
    convext.revert(swapped)
    assert type(swapped.stem[0]) is nn.Conv2d
    torch.testing.assert_close(swapped(x), plain(x), rtol=1e-8, atol=1e-8)


def test_doctor_reports():
    ran = subprocess.run([sys.executable, "-m", "convext"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for word in ("torch", torch.__version__.split("+")[0], "native", "aten"):
        assert word in ran.stdout
