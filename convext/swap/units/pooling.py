"""Max pooling, with gradients, of what the layer before does not keep: PyTorch's keeps its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...autograd import MaxPool2dFunction, Recomputable
from ...functional import ordinary
from . import Call, Op

if TYPE_CHECKING:
    from ..modes import Mode

Settings = tuple[Any, Any, Any, Any, Any, Any]  # kernel size, stride, padding, dilation, ceil mode, return indices


class MaxPool(Op):
    """F.max_pool2d(x, *settings())"""

    in_strips = has_call = False
    takes = "image"

    def __init__(self, settings: Callable[[], Settings]):
        self.settings = settings

    def bind(self, fallback: Call, mode: Mode) -> Call:
        settings = self.settings

        def pooled(x: Any) -> Any:
            if type(x) is Recomputable:
                *given, indices = settings()
                if indices is False:
                    size, stride, *others = given
                    return MaxPool2dFunction.apply(x.values, x.handle, size, [] if stride is None else stride, *others)[
                        0
                    ]
            return fallback(ordinary(x))

        return pooled
