"""Whether choices that were measured on this machine count."""

from __future__ import annotations

from . import backends
from .backends import native, tuned


class tuning:
    """Says whether what `convext.tune` measured decides who computes: a setting, and a context manager that puts the
    former one back.

        >>> convext.tuning("off")  # from here on
        convext.tuning('off')
        >>> with convext.tuning("cached"):  # inside only
        ...     y = convext.conv2d(torch.randn(1, 8, 14, 14), torch.randn(8, 8, 3, 3))
        >>> convext.tuning("cached")  # the default again
        convext.tuning('cached')

    Args:
        mode: "cached": a problem that was measured goes to who was fastest, any other by the cost model; or "off": all
            go by the cost model. It is cached until it is set.

    What was measured lies in the folder that `convext doctor` names, `$CONVEXT_CACHE` where that is set. Results may
    differ by rounding from one choice to another, and so from one number of threads to another. The setting is the
    process's, as `convext.backend` is.

    Raises ValueError for any other mode.
    """

    def __init__(self, mode: str):
        if mode not in tuned.MODES:
            raise ValueError(f"tuning: unknown mode {mode!r}, expected one of {', '.join(map(repr, tuned.MODES))}")
        self.mode = mode
        self._former = _set(mode)

    def __enter__(self) -> tuning:
        return self

    def __exit__(self, *exc: object) -> None:
        _set(self._former)

    def __repr__(self) -> str:
        return f"convext.tuning({self.mode!r})"


def _set(mode: str) -> str:
    former, tuned.mode = tuned.mode, mode
    native.forget_plans()
    backends.forget()
    return former
