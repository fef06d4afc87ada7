"""Two minutes at most of the stateful fuzz of the swap, and tests of the fuzz itself. `./dev fuzz` runs it for long."""

import warnings

import pytest

pytest.importorskip("hypothesis")
import helpers  # noqa: E402
import networks  # noqa: E402
import torch  # noqa: E402
from changes import CHANGES, CLASS_ATTRIBUTES, FUNCTIONS  # noqa: E402
from machine import FAULTS, PROGRESS, make_machine  # noqa: E402
from run import options, run_batch, run_for  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
SECONDS, MINIMUM, MOST = 75, 100, 60


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_swapped_and_unswapped_agree(record_property):
    """From fixed seeds: a slow machine does fewer batches."""
    batches, steps = run_for(make_machine(), PROGRESS, SECONDS, MINIMUM, most=MOST)
    record_property("told", f"fuzz of the swap: {steps} steps, seeds 0 to {batches - 1}, no difference")


@pytest.mark.parametrize("twin", ["plain", "rounding"])
def test_two_unswapped_twins_agree(twin):
    """The fuzz does not cry wolf: not over the same model twice, nor over one whose sums are rounded otherwise."""
    run_for(make_machine(twin), PROGRESS, seconds=0, minimum=200)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_finds_a_planted_fault(fault):
    machine = make_machine(fault, [c for c in CHANGES if c.__name__ in FAULTS[fault]])
    found = next(filter(None, (run_batch(machine, seed, options(shrink=False), PROGRESS) for seed in range(10))), None)
    assert found and "Difference" in found, f"10 batches did not find: {fault.__doc__}"


def test_patches_are_undone():
    """Whatever a run does to classes, globals and torch is as before after it."""

    def places():
        torchs = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Module, nn.Sequential, torch.Tensor
        names = "forward", "__call__", "_conv_forward", "relu", "mean", "permute", "__add__"
        found = [(kind, name, kind.__dict__.get(name)) for kind, name, _ in CLASS_ATTRIBUTES]
        found += [(owner, name, getattr(owner, name)) for owner, name in FUNCTIONS]
        found += [(kind, name, kind.__dict__.get(name)) for kind in torchs for name in names]
        return (
            found,
            repr(networks.SETTINGS),
            networks.GAIN,
            helpers.OFFSET,
            helpers.shifted.__defaults__,
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_backward_hooks),
        )

    before = places()
    patching = [
        c
        for c in CHANGES
        if c.__name__
        in (
            "class_attribute",
            "method_of_a_class",
            "class_of_torch",
            "function_of_torch",
            "method_of_tensor",
            "module_global",
            "code_or_closure",
            "global_hook",
            "undo_a_patch",
        )
    ]
    steps = PROGRESS.steps
    run_batch(make_machine("plain", patching), 0, options(examples=10), PROGRESS)
    assert PROGRESS.steps > steps + 50
    assert places() == before
