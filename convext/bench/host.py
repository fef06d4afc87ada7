"""What a call costs the host: convext's beside PyTorch's, of the smallest convolution, where nothing else is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .tables import Grid
from .timing import Timing, interleave

TARGET = 1.15  # times PyTorch's


class Cost(NamedTuple):
    """One kind of call: seconds of it by PyTorch and by convext, in the same rounds."""

    what: str
    pytorch: Timing
    convext: Timing

    @property
    def ratio(self) -> float:
        """convext's seconds over PyTorch's, the median over the rounds."""
        return 1 / self.convext.times_faster_than(self.pytorch)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            **{
                name: {"seconds": timing.median, "iqr": timing.iqr}
                for name, timing in (("pytorch", self.pytorch), ("convext", self.convext))
            },
            "ratio": self.ratio,
        }


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def calls() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> (PyTorch's call, convext's) of one value and one weight, on the CPU: the function, a layer that is built,
    one that was swapped; without gradients, with the graph recorded, and with its backward pass."""
    import convext

    x, dy = torch.ones(1, 1, 1, 1, device="cpu"), torch.ones(1, 1, 1, 1, device="cpu")
    w = torch.ones(1, 1, 1, 1, device="cpu")
    recorded = w.clone().requires_grad_()
    layer = torch.nn.Conv2d(1, 1, 1, bias=False, device="cpu")
    built = convext.nn.Conv2d(1, 1, 1, bias=False, device="cpu")
    swapped = convext.swap(copy.deepcopy(layer))

    def backward(conv2d: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(conv2d(x, recorded), recorded, dy)

    return {
        "conv2d": (lambda: F.conv2d(x, w), lambda: convext.conv2d(x, w)),
        "conv2d, recorded": (lambda: F.conv2d(x, recorded), lambda: convext.conv2d(x, recorded)),
        "conv2d and its backward": (backward(F.conv2d), backward(convext.conv2d)),
        "layer": (_without_gradients(lambda: layer(x)), _without_gradients(lambda: built(x))),
        "layer, recorded": (lambda: layer(x), lambda: built(x)),
        "swapped layer": (_without_gradients(lambda: layer(x)), _without_gradients(lambda: swapped(x))),
        "swapped layer, recorded": (lambda: layer(x), lambda: swapped(x)),
    }


def measure(
    seconds: float, clock: Callable[[], float] | None = None, on_each: Callable[[], object] = lambda: None
) -> list[Cost]:
    """Times each kind for about `seconds`, PyTorch and convext in turns. `clock` is that of `timing.interleave`."""
    found = []
    for what, (pytorch, ours) in calls().items():
        timings = interleave({"pytorch": pytorch, "convext": ours}, seconds=seconds, visit=2e-3, clock=clock)
        found.append(Cost(what, timings["pytorch"], timings["convext"]))
        on_each()
    return found


def table(found: list[Cost]) -> Grid:
    grid = Grid(["call", "PyTorch µs", "convext µs", "times PyTorch's"])
    for cost in found:
        seconds = [f"{1e6 * timing.median:.2f}" for timing in (cost.pytorch, cost.convext)]
        grid.rows.append([cost.what, *seconds, f"{cost.ratio:.2f}"])
    return grid


def summary(found: list[Cost]) -> str:
    above = [cost.what for cost in found if cost.ratio > TARGET]
    return (
        f"Above {TARGET} times PyTorch's: {', '.join(above)}" if above else f"No call costs {TARGET} times PyTorch's."
    )
