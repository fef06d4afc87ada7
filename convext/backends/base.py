"""What a backend is: one class, with a default for everything about which a backend has nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..problem import ConvProblem, Epilogue, Pass

if TYPE_CHECKING:
    from .native_sequence import Block, Prepared


NO_VOLUMES = "it has kernels for images, not for volumes"


class Candidate(NamedTuple):
    """A kernel that could serve a pass over a problem. cost: what the cost model expects, in units of its own, or None.
    run: called as the pass's method of the backend is. with_statistics: as `Backend.fprop_batch_stats`, where the
    kernel gives them."""

    backend: str
    variant: str
    cost: float | None
    run: Callable[..., torch.Tensor]
    with_statistics: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.variant}"


class Backend:
    """Computes passes over problems on one type of device, or on several. A module in this folder holds one, `BACKEND`.

    What raises NotImplementedError here every backend brings; it is called where neither `unavailable` nor `reject`
    gave a reason. Tensors are on one device and fit the problem, and gradients are recorded elsewhere.
    """

    name: str  # what users call it

    def unavailable(self, device_type: str) -> str | None:
        """Why it is off on this machine for a type of device and what to do about it, or None where it is on."""
        return None

    def reject(self, pass_: Pass, problem: ConvProblem) -> str | None:
        """Why it cannot serve a pass over a problem, in words, or None where it can."""
        return None

    def slower(self, pass_: Pass, problem: ConvProblem) -> str | None:
        """Why another was measured to be faster where this one can serve, in words, or None. Only an automatic choice
        reads it."""
        return None

    def slower_transposed(self, problem: ConvProblem) -> str | None:
        """Why ATen's transposed convolution was measured to be faster than dgrad with its bias, in words, or None. Only
        an automatic choice reads it."""
        return None

    def variant(self, pass_: Pass, problem: ConvProblem) -> str:
        """Name of the kernel that would run."""
        return f"{self.name}_{pass_.name.lower()}"

    def served(self, pass_: Pass, problem: ConvProblem, kind: str) -> tuple[str, Callable[..., torch.Tensor]]:
        """The name of the kernel that would run with what follows an fprop (`Epilogue.kind`), and the method."""
        return self.variant(pass_, problem), getattr(self, pass_.name.lower())

    def candidates(self, pass_: Pass, problem: ConvProblem, kind: str = "") -> list[Candidate]:
        """What it could run, the most promising first. `kind`: what follows an fprop (`Epilogue.kind`)."""
        return [Candidate(self.name, self.variant(pass_, problem), None, getattr(self, pass_.name.lower()))]

    def fprop(self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """y, in the format of `problem.y_layout`."""
        raise NotImplementedError

    def dgrad(self, problem: ConvProblem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """dx, in the format of `problem.x_layout`."""
        raise NotImplementedError

    def conv_transpose(
        self, problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """dgrad(x, w), which is the transposed convolution of x, and the bias, of C channels."""
        y = self.dgrad(problem, x, w)
        return y if bias is None else y.add_(bias.view(-1, *(1,) * problem.axes))

    def wgrad(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, channels_last: bool = False
    ) -> torch.Tensor:
        """dw, in that format, as `memory_format.laid_out` has it."""
        raise NotImplementedError

    def depthwise_backward(
        self, problem: ConvProblem, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, channels_last: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dgrad(dy, w) and wgrad(dy, x, channels_last) of a depthwise problem, in one pass where a kernel does both."""
        return self.dgrad(problem, dy, w), self.wgrad(problem, dy, x, channels_last)

    def prepared_fprop(
        self, problem: ConvProblem, activation: str, kind: str, run: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        """`Choice.prepared_fprop`, with everything looked up beforehand that does not depend on the tensors. `kind`:
        what the choice was made for; `run`: its fprop."""
        return lambda x, w, bias, mean, var, gamma, beta, residual, eps: run(
            problem, x, w, Epilogue(bias, mean, var, gamma, beta, residual, eps, activation)
        )

    def takes_float_weights(self, problem: ConvProblem) -> bool:
        """Whether `prepared_fprop` takes float32 weights for a problem in half precision."""
        return False

    def prepared_sequence(self, blocks: list[Block]) -> Prepared | None:
        """fprops in a row as one call, for swap/lower/program.py, or None where it cannot."""
        return None

    # ---- batch norm and activation of y (N, C, H, W): statistics are (C), in the accumulate dtype

    reads_exact_mean = False  # whether all passes also take a mean in float64, as its batch_stats may return it then

    def reject_batch_norm(self, y: torch.Tensor) -> str | None:
        """Why it cannot run what follows on tensors like y, in words, or None where it can."""
        return None

    def batch_stats(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean, var (biased)."""
        raise NotImplementedError

    def fprop_batch_stats(
        self,
        problem: ConvProblem,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        before: Epilogue | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """y and batch_stats(y) without reading y again, or None where no kernel does that. `before`: the convolution is
        of bn_act(x, before), which is not to be written either."""
        return None

    def bn_conv_backward(
        self,
        dgrad: ConvProblem,
        wgrad: ConvProblem,
        dout: torch.Tensor,
        y: torch.Tensor,
        epilogue: Epilogue,
        sums: torch.Tensor | None,
        x: torch.Tensor,
        before: Epilogue | None,
        w: torch.Tensor,
        dw_channels_last: bool,
        sums_up: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """dx, dw, dgamma, dbeta of bn_act(y, epilogue) where y = x * w has the statistics that the epilogue has, in
        fewer passes than one by one, or None where it cannot. The problems are those that dgrad and wgrad would serve.
        `before`: as in `fprop_batch_stats`. `sums`: what `bn_act_and_sums` found of dout. The last result is that of dx
        where `sums_up` says so."""
        return None

    def update_running(
        self,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        momentum: float,
        unbiased: float,
    ) -> bool:
        """Moves the running statistics by those of a batch (`ops.update_running`), or returns False."""
        return False

    def bn_act(self, y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """The epilogue, which has a mean and no bias, of y."""
        raise NotImplementedError

    def bn_act_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """dy, dgamma, dbeta, dresidual, the last of size 0 where there is no residual. `training`: mean and var are
        y's own."""
        raise NotImplementedError

    def bn_act_and_sums(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue
    ) -> tuple[torch.Tensor, ...] | None:
        """bn_act of y, without a residual, and what bn_act_from_sums wants besides; None where no pass does both."""
        return None

    def bn_act_from_sums(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, *found: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dy, dgamma, dbeta of bn_act_backward in training. `found` is of bn_act_and_sums and used up."""
        raise NotImplementedError

    def reject_gates(self, y: torch.Tensor) -> str | None:
        """Why it has none of the three passes below for tensors like y, or None where it has them."""
        return f"{self.name} has no passes for gates"

    def bn_act_image_sums(
        self, y: torch.Tensor, epilogue: Epilogue, dout: torch.Tensor | None, factor: float
    ) -> torch.Tensor:
        """(N, C), factor times the sum over each image's pixels of bn_act(y, epilogue), or of that times dout."""
        raise NotImplementedError

    def bn_act_gated(self, y: torch.Tensor, epilogue: Epilogue, gates: torch.Tensor) -> torch.Tensor:
        """bn_act(y, epilogue) times gates (N, C)."""
        raise NotImplementedError

    def bn_act_gated_backward(
        self, dout: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, gates: torch.Tensor, shifts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dout * gates + shifts, both (N, C), and the sums that bn_act_and_sums finds of that."""
        raise NotImplementedError

    def act_backward(
        self, dout: torch.Tensor, z: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """dz = dout * activation'(z) and its sum by channel, in z's dtype, or None where no pass does both."""
        return None


class Absent(Backend):
    """Stands for a backend whose module does not load."""

    def __init__(self, name: str, module: str, error: Exception):
        self.name, self._module, self._error = name, module, error

    def unavailable(self, device_type: str) -> str:
        return (
            f"{self._module} does not load here ({type(self._error).__name__}: {self._error}): "
            "install what it names, or reinstall convext from source"
        )
