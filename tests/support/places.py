"""Where the operator tests run: every backend of the CPU, and where there is a GPU, its backends there too.

    @BACKENDS
    def test(backend): ...

Tests with the mark `gpu` make their tensors on the GPU without a word about it: conftest.py makes that the default
device for them. CONVEXT_TEST_GPU names another device to take for the GPU; `cpu` rehearses those tests without one:

    CONVEXT_TEST_GPU=cpu python -m pytest -m gpu -k native
    CONVEXT_TEST_GPU=cpu TRITON_INTERPRET=1 python -m pytest -m gpu -k triton
"""

import os

import pytest
import torch

from convext.backends import PRIORITY

GPU = os.environ.get("CONVEXT_TEST_GPU") or ("cuda" if torch.cuda.is_available() else None)

# Triton on the CPU is its interpreter, which tests/triton/triton_interpreter.py runs.
ON_CPU = sorted(set(PRIORITY["cpu"]) - {"triton"})


def on_gpu(*names):
    """Parameters for backends on the GPU, none where there is no GPU."""
    return [pytest.param(name, marks=pytest.mark.gpu, id=f"gpu-{name}") for name in names if GPU]


def backends(*on_the_gpu):
    """The parameter `backend`: all of the CPU's, and the named ones of the GPU."""
    return pytest.mark.parametrize("backend", [*ON_CPU, *on_gpu(*on_the_gpu)])


BACKENDS = backends("native", "triton")


def default_device():
    """Where a test's tensors are born, as a string such as "cpu" or "cuda"."""
    return torch.get_default_device().type
