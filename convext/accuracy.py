"""How much accuracy may be given for speed."""

from __future__ import annotations

from . import backends
from .backends import native

NAMES = ("fast", "strict", "direct")  # in the order of Accuracy, csrc/core/select.h


class accuracy:
    """Says which algorithms may run: a setting, and a context manager that puts the former one back.

        >>> convext.accuracy("strict")  # from here on
        convext.accuracy('strict')
        >>> with convext.accuracy("direct"):  # inside only
        ...     y = convext.conv2d(torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3))
        >>> convext.accuracy("fast")  # the default again
        convext.accuracy('fast')

    Args:
        name: "fast", "strict" or "direct".

    It concerns 3x3 convolutions of stride 1 on the CPU, their outputs and gradients. "fast", the default, allows
    Winograd's F(4x4, 3x3) and F(3x3, 3x3): a quarter to a third of the multiplications, and up to about 3 times the
    error of a plain sum, twice for the gradient of the weights. "strict" allows F(2x2, 3x3), for outputs and gradients
    of inputs, where there are enough channels for its error to be no larger than a plain sum's (derived in
    docs/design.md, tested in tests/test_accuracy.py). "direct" allows the direct forms alone. Half precision does the
    same in float32 arithmetic; float64 never runs Winograd. The report names the kernel of every layer, and so those
    that use it. The setting is the process's, as `convext.backend` is.

    Raises ValueError for any other name.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"accuracy: unknown name {name!r}, expected one of {', '.join(map(repr, NAMES))}")
        self.name = name
        self._former = _set(name)

    def __enter__(self) -> accuracy:
        return self

    def __exit__(self, *exc: object) -> None:
        _set(self._former)

    def __repr__(self) -> str:
        return f"convext.accuracy({self.name!r})"


def _set(name: str) -> str:
    former = NAMES[native.accuracy()]
    native.set_accuracy(NAMES.index(name))
    backends.forget()
    return former
