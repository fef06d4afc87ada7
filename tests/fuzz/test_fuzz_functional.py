"""Less than a minute of the stateful fuzz of the functional interface, and a test of the fuzz itself."""

import pytest

pytest.importorskip("hypothesis")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from functional_machine import PROGRESS, make_functional_machine  # noqa: E402
from run import options, run_batch, run_for  # noqa: E402

import convext  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
SECONDS, MINIMUM = 45, 300


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_agrees_with_torch(record_property):
    """From fixed seeds: a slow machine does fewer batches."""
    batches, steps = run_for(make_functional_machine(), PROGRESS, SECONDS, MINIMUM, most=60)
    record_property("told", f"fuzz of the functions: {steps} steps, seeds 0 to {batches - 1}, no difference")


def plain(monkeypatch, conv2d=F.conv2d):
    def conv_bn_relu(x, w, b, mean, var, gamma, beta, *, training, momentum, eps, activation, residual, **geom):
        y = F.batch_norm(conv2d(x, w, b, **geom), mean, var, gamma, beta, training, momentum, eps)
        y = y if residual is None else y + residual
        return y if activation == "identity" else getattr(F, activation)(y)

    monkeypatch.setattr(convext, "conv2d", conv2d)
    monkeypatch.setattr(convext, "dilated_conv2d", conv2d)
    monkeypatch.setattr(
        convext, "depthwise_conv2d", lambda x, w, b=None, **geom: conv2d(x, w, b, **geom, groups=x.shape[1])
    )
    monkeypatch.setattr(convext, "conv_bn_relu", conv_bn_relu)


def test_torch_agrees_with_itself(monkeypatch):
    """Bounds are wide enough for PyTorch's own float32 and bfloat16."""
    plain(monkeypatch)
    run_for(make_functional_machine(), PROGRESS, seconds=0, minimum=300)


def test_finds_a_stale_weight(monkeypatch):
    """A cache that is keyed by address and version, and so misses writes through .data."""
    cache = {}

    def stale(x, w, b=None, **geom):
        key = w.data_ptr(), w._version, w.shape
        if torch.is_grad_enabled() and w.requires_grad:
            return F.conv2d(x, w, b, **geom)
        return F.conv2d(x, cache.setdefault(key, w.detach().clone()), b, **geom)

    plain(monkeypatch, stale)
    found = None
    for seed in range(20):
        found = found or run_batch(make_functional_machine(), seed, options(shrink=False, examples=10), PROGRESS)
    assert found and "beyond the bound" in found
