"""The settings of a swap that are on or off."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class _Switch:
    """A setting, and a context manager that puts the former one back. Each subclass keeps its own in `on`."""

    on: ClassVar[bool] = False

    def __init__(self, on: bool = True):
        if not isinstance(on, bool):
            raise TypeError(f"{type(self).__name__}: expected True or False, got {on!r}")
        self._former = self._set(on)

    @classmethod
    def _set(cls, on: bool) -> bool:
        former, cls.on = cls.on, on
        return former

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._set(self._former)


class layer_by_layer(_Switch):
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


class export_ops(_Switch):
    """Makes `torch.export` record a swapped network's convolutions as `torch.ops.convext.*`: a setting, and a context
    manager that puts the former one back.

        with convext.export_ops(): program = torch.export.export(model, (x,))
        convext.export_ops(True)     # from here on
        convext.export_ops(False)    # PyTorch's own again, the default

    By default a swapped network is exported as it was written, with PyTorch's own convolutions, so that the program
    runs, and is lowered to other formats, without convext. With its operators it computes by convext's kernels, and
    needs `import convext` wherever it runs. The setting is the process's.

    Args:
        on: True, the default, for convext's operators; False for PyTorch's.

    Raises TypeError for anything but True and False.

    Example:
        >>> model, x = convext.swap(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))).eval(), torch.randn(1, 3, 8, 8)
        >>> with convext.export_ops():
        ...     program = torch.export.export(model, (x,))
        >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        ['convext.fprop.default']
    """
