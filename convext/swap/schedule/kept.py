"""With gradients: which units' results are kept for the backward pass, and which are computed again.

A fused layer keeps its convolution's output for its own backward pass. Its result, behind batch norm and activation,
follows from that, so a reader need not keep it a second time (`autograd.Recomputable`). That holds where every reader
is a unit that can: whatever else reads a value, a sum, a mean, a user's code, keeps it anyway or may do anything with
it, and gets an ordinary tensor.

With `recompute` a layer of little arithmetic does not keep its convolution's output either (`autograd.is_cheap`). Of
two units of which one reads what the other does not keep, one alone may: whoever needs the second's output would have
to compute the first's for it, and along a chain of them all that come before. The larger output goes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from ..units import Unit
    from .layout import Layout


def settle(units: list[Unit], layout: Layout, recompute: bool) -> None:
    """Tells the ops whose results need not be kept and, with `recompute`, whose convolutions' outputs need not."""
    readers = {unit.nodes[0]: unit for unit in units if len(unit.ops) == 1 and unit.first.takes is not None}
    for unit in units:
        value = unit.last
        if len(unit.ops) == 1 and unit.first.gives is not None and value not in layout.must_be_contiguous:
            unit.first.keeps = not all(_takes(readers.get(reader), value, unit.first.gives) for reader in value.users)
    if recompute:
        _settle_outputs(units)


def _settle_outputs(units: list[Unit]) -> None:
    """Drops the largest output first, and none beside one that is dropped. An output's size is that of one pixel of the
    chain's first input times the share of pixels that strides have left."""
    before: dict[Unit, Unit] = {}  # the unit whose result it reads and that does not keep it
    pixels: dict[Unit, float] = {}
    sizes: dict[Unit, float] = {}
    kept = {unit.last: unit for unit in units if not unit.first.keeps}
    for unit in units:
        source = kept.get(unit.source)
        if source is not None:
            before[unit] = source
        channels, share = unit.first.output() or (0, 1.0)
        pixels[unit] = share * (1.0 if source is None else pixels[source])
        if channels:
            sizes[unit] = channels * pixels[unit]
    beside: set[Unit] = set()
    behind: dict[Unit, list[Unit]] = {}
    for unit, source in before.items():
        behind.setdefault(source, []).append(unit)
    for unit in sorted(sizes, key=lambda unit: -sizes[unit]):  # of equals, the first
        if unit not in beside:
            unit.first.recompute = True
            beside.update(behind.get(unit, ()))
            if unit in before:
                beside.add(before[unit])


def _takes(reader: Unit | None, value: fx.Node, form: str) -> bool:
    """True of a unit that reads a value as its first op's input, and as nothing else."""
    return reader is not None and reader.first.takes == form and reader.source is value and reader.residual is not value
