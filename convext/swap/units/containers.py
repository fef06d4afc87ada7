"""The call of a container that has a plan of its own, which may join a sequence; and squeeze and excitation, which may
join a convolution, in a container or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ... import autograd
from ...autograd import Recomputable
from ...functional import ordinary
from ...problem import ACTIVATIONS
from ..capture.signature import ONE_TENSOR
from ..capture.trace import HOOKS
from ..method import ForwardMethod
from . import AnyLayout, AnyProgram, Call, Op, Unit
from .functions import Convolution, Place, found

if TYPE_CHECKING:
    from ..modes import Mode

# Name of the gate -> what computes it; csrc/cpu/kernels/elementwise/squeeze_excite.h numbers them in this order.
GATES: dict[str, tuple[Any, ...]] = {
    "sigmoid": (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"),
    "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid),
}


class Container(Op):
    """The call of a container with one tensor. excitation: what it computes with, where it is squeeze and excitation,
    or None."""

    in_strips = has_call = False

    def __init__(self, module: nn.Module, excitation: SqueezeExcite | None = None):
        self.container, self.excitation = module, excitation
        self.mode: Mode = None  # type: ignore[assignment]  # until it is settled

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        any_format = last in layout.any_format
        self.mode = mode._replace(in_seam=any_format)  # in which its own plan will run
        return not layout.in_seam or any_format or last in layout.channels_last

    def bind(self, fallback: Call, mode: Mode) -> Call:
        return self.container.__dict__["forward"].in_any_format if self.mode.in_seam else self.container

    def whole(self) -> Any:
        """What runs all of it as a member of a sequence, now, or None."""
        forward = self.container.__dict__.get("forward")
        return forward.whole(self.mode) if isinstance(forward, ForwardMethod) else None

    def joins(self) -> bool:
        """One that is no sequence itself now would keep those around it from being one."""
        return self.whole() is not None

    def emit(self, unit: Unit, program: AnyProgram, values: list[int]) -> Any:
        whole = self.whole()
        return None if whole is None else whole.emit(program, values)


class Excitation(Op):
    """Squeeze and excitation that is no container: as `Container.excitation`, part of the convolution behind it."""

    in_strips = has_call = False

    def __init__(self, excitation: SqueezeExcite):
        self.excitation = excitation

    def settle(self, last: fx.Node, layout: AnyLayout, mode: Mode) -> bool:
        return bool(layout.is_free(last))

    def joins(self) -> bool:
        return False  # by itself: it has no kernel without the convolution


class RecordedExcitation(Container):
    """Squeeze and excitation with gradients, of what the layer before does not keep. `plan`: of the container, of which
    `excitation` was read."""

    takes = "image"

    def __init__(self, module: nn.Module, excitation: SqueezeExcite, plan: Any):
        super().__init__(module, excitation)
        self.plan = plan

    def bind(self, fallback: Call, mode: Mode) -> Call:
        called, container, excitation, plan = super().bind(fallback, mode), self.container, self.excitation, self.plan

        def excited(x: Any) -> Any:
            if type(x) is Recomputable:
                forward = container.__dict__["forward"]
                stands = isinstance(forward, ForwardMethod) and forward.plan(container, ONE_TENSOR) is plan
                if stands and not any(container.__dict__[name] for name in HOOKS):
                    w1, b1, w2, b2 = map(found, excitation.places)
                    out = autograd.squeeze_excite(x, w1, b1, w2, b2, excitation.activation, excitation.gate)
                    if out is not None:
                        return out
            return called(ordinary(x))

        return excited


class SqueezeExcite(NamedTuple):
    """What a squeeze and excitation computes with."""

    squeeze: Convolution
    excite: Convolution
    activation: str
    gate: str

    @property
    def places(self) -> tuple[Place, ...]:
        return *self.squeeze[:2], *self.excite[:2]

    @property
    def codes(self) -> tuple[int, int]:
        """As the compiled library numbers them: (activation, gate)."""
        return ACTIVATIONS[self.activation], list(GATES).index(self.gate)
