"""With gradients: which units' results are kept for the backward pass, and which are computed again.

A fused layer keeps its convolution's output for its own backward pass. Its result, behind batch norm and activation,
follows from that, so a reader need not keep it a second time (`autograd.Recomputable`). That holds where every reader
is a unit that can: whatever else reads a value, a sum, a mean, a user's code, keeps it anyway or may do anything with
it, and gets an ordinary tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from ..units import Unit
    from .layout import Layout


def settle(units: list[Unit], layout: Layout) -> None:
    """Tells the ops whose results need not be kept."""
    readers = {unit.nodes[0]: unit for unit in units if len(unit.ops) == 1 and unit.first.takes is not None}
    for unit in units:
        value = unit.last
        if len(unit.ops) == 1 and unit.first.gives is not None and value not in layout.must_be_contiguous:
            unit.first.keeps = not all(_takes(readers.get(reader), value, unit.first.gives) for reader in value.users)


def _takes(reader: Unit | None, value: fx.Node, form: str) -> bool:
    """True of a unit that reads a value as its first op's input, and as nothing else."""
    return reader is not None and reader.first.takes == form and reader.source is value and reader.residual is not value
