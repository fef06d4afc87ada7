"""The triton backend: kernels of convext/triton/, for GPUs that the compiled library does not serve.

It runs on any device that Triton has a compiler for (NVIDIA, AMD, Intel), and on the CPU in Triton's interpreter when
TRITON_INTERPRET=1, which checks numbers and is far too slow for anything else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..memory_format import laid_out, memory_format, suggests_channels_last
from ..problem import ConvProblem, Epilogue, Layout, Pass, accumulate_dtype
from . import tuned
from .base import NO_VOLUMES, Backend

if TYPE_CHECKING:
    from ..triton.launch import Launch

OLDEST = (3, 6)  # what PyTorch 2.10, the oldest supported, ships
_INSTEAD = "ATen serves {device} instead"


def release() -> str | None:
    """Of the triton package, by whichever of its names it was installed: "3.6.0"; None where that does not tell."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _installed_version() -> tuple[int, int] | None:
    """None where there is no triton package."""
    if importlib.util.find_spec("triton") is None:
        return None
    version = release()
    if version is None:
        return OLDEST  # built from source: taken at its word
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    return major, minor


class TritonBackend(Backend):
    name = "triton"

    def unavailable(self, device_type: str) -> str | None:
        instead = _INSTEAD.format(device=device_type)
        version = _installed_version()
        if version is None:
            return f"Triton is not installed (pip install triton); {instead}"
        if version < OLDEST:
            return (
                f"Triton {'.'.join(map(str, version))} is older than {'.'.join(map(str, OLDEST))} "
                f"(pip install -U triton); {instead}"
            )
        if device_type == "cpu":
            if os.environ.get("TRITON_INTERPRET") == "1":
                return None
            return "Triton has no compiler for the CPU; TRITON_INTERPRET=1 runs its interpreter, to check numbers only"
        module = getattr(torch, device_type, None)
        if module is None or not module.is_available():
            return f"torch sees no {device_type} device"
        try:
            import triton

            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # whatever the driver of this machine raises
            return f"Triton finds no driver for {device_type} ({error}); {instead}"
        return None

    def reject(self, pass_: Pass, problem: ConvProblem) -> str | None:
        if problem.axes == 3:
            return NO_VOLUMES
        tiles = max(problem.x_size, problem.y_size) // 16 * max(1, problem.r * problem.s)
        if tiles >= 2**31:
            return "more tiles than the 2^31 - 1 that one launch holds"
        why = tuned.aside(problem.device).get(self.variant(pass_, problem))
        return None if why is None else f"it was put aside: {why}"

    def reject_batch_norm(self, y: torch.Tensor) -> str | None:
        if y.dim() != 4:
            return f"the tensor has {y.dim()} dimensions, not 4"
        return None

    def variant(self, pass_: Pass, problem: ConvProblem) -> str:
        """<pass>_<family>_<dtype>_triton. Which tile runs is the launch's business."""
        family = "depthwise" if problem.is_depthwise else "dilated" if problem.is_dilated else "direct"
        return f"{pass_.name.lower()}_{family}_{problem.dtype.name.lower()}_triton"

    # Allocation: what the operators in convext/triton/ops.py promise as well.

    def empty_y(self, problem: ConvProblem, like: torch.Tensor) -> torch.Tensor:
        return _empty(like, problem.y_shape, problem.y_layout == Layout.NHWC)

    def empty_x(self, problem: ConvProblem, like: torch.Tensor) -> torch.Tensor:
        return _empty(like, problem.x_shape, problem.x_layout == Layout.NHWC)

    def empty_like(self, y: torch.Tensor) -> torch.Tensor:
        return _empty(y, y.shape, suggests_channels_last(y))

    def empty_statistics(self, y: torch.Tensor) -> torch.Tensor:
        return y.new_empty(y.shape[1], dtype=accumulate_dtype(y.dtype))

    def fprop(self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        from ..triton import depthwise, direct

        y = self.empty_y(problem, x)
        if problem.is_depthwise:
            depthwise.fprop(problem, x, w, epilogue, y).run()
        else:
            _run(direct.fprop(problem, x, w, epilogue, y))
        return y

    def dgrad(self, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        from ..triton import depthwise, direct

        dx = self.empty_x(problem, dy)
        if problem.is_depthwise:
            _run(depthwise.backward(problem, dy, None, w, dx, None))
        else:
            _run(direct.dgrad(problem, dy, w, dx))
        return dx

    def wgrad(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
    ) -> torch.Tensor:
        from ..triton import depthwise, wgrad

        dw = x.new_empty(problem.w_shape)
        if problem.is_depthwise:
            _run(depthwise.backward(problem, dy, x, None, None, dw))
        else:
            _run(wgrad.wgrad(problem, dy, x, dw))
        return laid_out(dw, channels_last)

    def depthwise_backward(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, channels_last: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from ..triton import depthwise

        dx, dw = self.empty_x(problem, dy), x.new_empty(problem.w_shape)
        _run(depthwise.backward(problem, dy, x, w, dx, dw))
        return dx, laid_out(dw, channels_last)

    def batch_stats(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from ..triton import batch_norm

        mean, var = self.empty_statistics(y), self.empty_statistics(y)
        if y.numel() == 0:
            return mean.fill_(float("nan")), var.fill_(float("nan"))
        _run(batch_norm.batch_stats(y, mean, var))
        return mean, var

    def bn_act(self, y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        from ..triton import batch_norm

        out = self.empty_like(y)
        if y.numel():
            batch_norm.bn_act(y, *epilogue[1:], out).run()
        return out

    def bn_act_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        from ..triton import batch_norm

        dy = self.empty_like(y)
        dz = None if epilogue.residual is None else self.empty_like(y)
        dgamma, dbeta = self.empty_statistics(y), self.empty_statistics(y)
        if y.numel():
            _run(batch_norm.bn_act_backward(dout, y, *epilogue[1:], training, dy, dgamma, dbeta, dz))
        else:
            dgamma.zero_()
            dbeta.zero_()
        return dy, dgamma, dbeta, y.new_empty(0) if dz is None else dz


def _empty(like: torch.Tensor, shape: Sequence[int], channels_last: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def _run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.run()


BACKEND = TritonBackend()
