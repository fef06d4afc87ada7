"""Whether it is measured on this machine who computes, and whether what was measured counts."""

from __future__ import annotations

from . import backends
from .backends import native, tuned


class tuning:
    """Says whether measurements decide who computes: a setting, and a context manager that puts the former one back.

        >>> convext.tuning("off")  # from here on
        convext.tuning('off')
        >>> with convext.tuning("cached"):  # inside only
        ...     y = convext.conv2d(torch.randn(1, 8, 14, 14), torch.randn(8, 8, 3, 3))
        >>> convext.tuning(None)  # each device's own again
        convext.tuning(None)

    Args:
        mode: "measure": a problem that is met for the first time is measured, in about 20 ms and a quarter of the free
            memory, and goes to who was fastest from then on, in other processes too; "cached": a problem that was
            measured before goes to who was fastest, any other by the cost model; "off": all go by the cost model; or
            None, as it is until it is set: "cached" on the CPU, where `convext.tune` measures, "measure" elsewhere.

    Nothing is measured under `torch.use_deterministic_algorithms`, in CUDA graph captures, and while a compiler, a
    tracer or a transform is at work; what the model chose there stays. In one process and mode a choice that was used
    stays, unless `convext.tune` measures it or its kernel turns out to be wrong. A kernel whose result is wrong, that
    raises or that takes ten times as long as expected serves no more on this machine: a warning says so, and
    `convext doctor`.

    What was measured lies in the folder that `convext doctor` names, `$CONVEXT_CACHE` where that is set. Results may
    differ by rounding from one choice to another, and so from one number of threads to another. The setting is the
    process's, as `convext.backend` is.

    Raises ValueError for any other mode.
    """

    def __init__(self, mode: str | None):
        if mode is not None and mode not in tuned.MODES:
            raise ValueError(
                f"tuning: unknown mode {mode!r}, expected one of {', '.join(map(repr, tuned.MODES))}, or None for the "
                "default of each device"
            )
        self.mode = mode
        self._former = _set(mode)

    def __enter__(self) -> tuning:
        return self

    def __exit__(self, *exc: object) -> None:
        _set(self._former)

    def __repr__(self) -> str:
        return f"convext.tuning({self.mode!r})"


def _set(mode: str | None) -> str | None:
    former, tuned.mode = tuned.mode, mode
    native.forget_plans()
    backends.forget()
    return former
