"""How much accuracy may be given for speed."""

from __future__ import annotations

from . import backends

NAMES = ("fast", "strict")


class accuracy:
    """Says which float32 algorithms may run: a setting, and a context manager that puts the former one back.

        convext.accuracy("strict")            # from here on
        with convext.accuracy("fast"): ...    # inside only

    "fast", the default, allows Winograd's F(4x4, 3x3) in the forward pass of 3x3 convolutions of stride 1 on the CPU:
    fewer multiplications, and an error several times that of the direct form (bounded in tests/test_accuracy.py).
    "strict" allows the direct forms alone. float64 never runs Winograd. The report names the kernel of every layer, and
    so those that use it. The setting is the process's, as `convext.backend` is.

    Raises ValueError for any other name.
    """

    def __init__(self, name: str):
        if name not in NAMES:
            raise ValueError(f"accuracy: unknown name {name!r}, expected one of {', '.join(map(repr, NAMES))}")
        self.name = name
        self._former = _set(name)

    def __enter__(self) -> accuracy:
        return self

    def __exit__(self, *exc) -> None:
        _set(self._former)

    def __repr__(self) -> str:
        return f"convext.accuracy({self.name!r})"


def _set(name: str) -> str:
    native = backends.get("native")
    former = "fast" if native.winograd() else "strict"
    native.allow_winograd(name == "fast")
    backends.forget()
    return former
