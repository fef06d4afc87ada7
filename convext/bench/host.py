"""What a call costs the host: convext's beside PyTorch's, of the smallest convolution, where nothing else is seen.

Calls on a GPU are timed up to the launch, of which nobody waits for the end. Without a GPU they are timed on paper
(`cuda_on_paper`): all that convext does for a call but the launch itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .tables import Grid
from .timing import Timing, interleave

TARGET = 1.15  # times PyTorch's
GPU_TARGETS = {"conv2d": 12e-6, "conv2d, recorded": 20e-6, "conv_bn_act": 12e-6}  # seconds up to the launch

Call = Callable[[], object]


class Cost(NamedTuple):
    """One kind of call: seconds of it by PyTorch and by convext, in the same rounds. PyTorch's are None on paper."""

    what: str
    pytorch: Timing | None
    convext: Timing

    @property
    def ratio(self) -> float | None:
        """convext's seconds over PyTorch's, the median over the rounds."""
        return None if self.pytorch is None else 1 / self.convext.times_faster_than(self.pytorch)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            **{
                name: timing and {"seconds": timing.median, "iqr": timing.iqr}
                for name, timing in (("pytorch", self.pytorch), ("convext", self.convext))
            },
            "ratio": self.ratio,
        }


def _without_gradients(call: Call) -> Call:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def calls() -> dict[str, tuple[Call, Call]]:
    """Name -> (PyTorch's call, convext's) of one value and one weight, on the CPU: the function, a layer that is built,
    one that was swapped; without gradients, with the graph recorded, and with its backward pass."""
    return _calls(torch.ones(1, 1, 1, 1, device="cpu"), torch.ones(1, 1, 1, 1, device="cpu"))


def calls_on_gpu(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """The same of a convolution of 16 channels in bfloat16, channels-last, and one with a batch norm in evaluation and
    a ReLU behind it: a single kernel, after a small one, or two where a gradient is recorded."""
    import convext

    kind = {"device": device, "dtype": torch.bfloat16}
    shapes = (1, 16, 4, 4), (16, 16, 3, 3)
    x, w = (torch.ones(shape, **kind).contiguous(memory_format=torch.channels_last) for shape in shapes)
    norm = [torch.ones(16, device=device) for _ in range(4)]
    recorded = w.clone().requires_grad_()

    def fused(weight: torch.Tensor) -> tuple[Call, Call]:
        return (
            lambda: F.relu(F.batch_norm(F.conv2d(x, weight), *norm)),
            lambda: convext.conv_bn_act(x, weight, None, *norm),
        )

    return _calls(x, w) | {"conv_bn_act": fused(w), "conv_bn_act, recorded": fused(recorded)}


def _calls(x: torch.Tensor, w: torch.Tensor) -> dict[str, tuple[Call, Call]]:
    import convext

    recorded = w.clone().requires_grad_()
    layer = torch.nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], bias=False).to(w)
    built = convext.nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], bias=False).to(w)
    for module in (layer, built):
        module.to(memory_format=torch.channels_last)
    swapped = convext.swap(copy.deepcopy(layer))
    dy = torch.ones_like(F.conv2d(x, w))

    def backward(conv2d: Callable[..., torch.Tensor]) -> Call:
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


@contextlib.contextmanager
def cuda_on_paper() -> Iterator[None]:
    """Within, tensors of the CPU are served as those of a GPU are, by the library of CUDA kernels, whose launches end
    before they reach a device: results are whatever their memory held. The library must be there
    (`native_cuda.not_built`)."""
    from .. import backends
    from ..backends import native_cuda

    where, cpu = native_cuda._where, backends.PRIORITY["cpu"]
    native_cuda._where = lambda t: (0, 0)
    backends.PRIORITY["cpu"] = backends.PRIORITY["cuda"]
    native_cuda._CUDA.set_launching(False)
    backends.forget()
    backends._unavailable["native", "cpu"] = None
    try:
        yield
    finally:
        native_cuda._where = where
        backends.PRIORITY["cpu"] = cpu
        native_cuda._CUDA.set_launching(True)
        backends.forget()


def measure(
    seconds: float,
    device: torch.device | None,
    clock: Callable[[], float] | None = None,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> list[Cost]:
    """Times each kind for about `seconds`, PyTorch and convext in turns. `device`: the CPU, a GPU, or None for a GPU on
    paper, without PyTorch. `clock` is that of `timing.interleave`; `track` goes through the kinds."""
    with contextlib.nullcontext() if device is not None else cuda_on_paper():
        on_cpu = device is not None and device.type == "cpu"
        kinds = calls() if on_cpu else calls_on_gpu(device or torch.device("cpu"))
        found = []
        for what in track([*kinds]):
            pytorch, ours = kinds[what]
            among = {"convext": ours} if device is None else {"pytorch": pytorch, "convext": ours}
            timings = interleave(among, seconds=seconds, visit=2e-3, clock=clock)
            found.append(Cost(what, timings.get("pytorch"), timings["convext"]))
    return found


def table(found: list[Cost]) -> Grid:
    grid = Grid(["call", "PyTorch µs", "convext µs", "times PyTorch's"])
    for cost in found:
        seconds = [timing and f"{1e6 * timing.median:.2f}" for timing in (cost.pytorch, cost.convext)]
        grid.rows.append([cost.what, *(text or "" for text in seconds), cost.ratio and f"{cost.ratio:.2f}" or ""])
    return grid


def summary(found: list[Cost]) -> str:
    above = [cost.what for cost in found if cost.ratio is not None and cost.ratio > TARGET]
    return (
        f"Above {TARGET} times PyTorch's: {', '.join(above)}" if above else f"No call costs {TARGET} times PyTorch's."
    )


def summary_on_gpu(found: list[Cost]) -> str:
    """Which calls take longer than `GPU_TARGETS` has it; the others have no target."""
    late = [
        f"{cost.what} (at most {1e6 * GPU_TARGETS[cost.what]:.0f} µs)"
        for cost in found
        if cost.convext.median > GPU_TARGETS.get(cost.what, float("inf"))
    ]
    return f"Longer than wanted: {', '.join(late)}" if late else "No call takes longer than wanted."
