"""The setting that makes every layer of a swapped network a call of its own."""

from __future__ import annotations


class layer_by_layer:
    """Makes every convolution of a swapped network a call of its own: a setting, and a context manager that puts the
    former one back.

        with convext.layer_by_layer(): ...   # what a profiler sees inside are layers
        convext.layer_by_layer(True)         # from here on
        convext.layer_by_layer(False)        # together again, the default

    Convolutions compute the same bit for bit; squeeze and excitation, LayerNorm and linear layers are torch's own then.
    What lies between two layers is a tensor again. The setting is the process's.

    Args:
        on: True, the default, for calls of their own; False for calls of several layers.

    Raises TypeError for anything but True and False.

    Example:
        >>> with convext.layer_by_layer():
        ...     convext.layer_by_layer.on
        True
        >>> convext.layer_by_layer.on
        False
    """

    on = False

    def __init__(self, on: bool = True):
        if not isinstance(on, bool):
            raise TypeError(f"layer_by_layer: expected True or False, got {on!r}")
        self._former, layer_by_layer.on = layer_by_layer.on, on

    def __enter__(self) -> layer_by_layer:
        return self

    def __exit__(self, *exc: object) -> None:
        layer_by_layer.on = self._former
