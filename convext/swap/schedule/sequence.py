"""Which units of a graph are computed cooperatively, in one call, without a tensor between them.

    block      pointwise and depthwise convolutions and layers over channels, each read by the next alone, as an
               inverted residual or ConvNeXt's block is made of them, squeeze and excitation between two of them
               included: computed a strip of rows at a time, so that what lies between them stays in the cache
               (csrc/cpu/runtime/block.h)
    row        blocks, one after the other with nothing else in between: one call computes them all
               (csrc/torch/ops_sequence.cpp)

A schedule is a list of rows, a row a list of blocks, a block a list of units, each of one or more. What is in no row
runs as the forward has it. Whether the kernels take a row is seen when it is prepared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import kept

if TYPE_CHECKING:
    from torch import fx

    from ..match.graph import Graph
    from ..modes import Mode
    from ..units import Unit
    from .layout import Layout

    Block = list[Unit]
    Row = list[Block]
    BySource = dict[fx.Node, list[Unit]]


def schedule(graph: Graph, layout: Layout, mode: Mode, recompute: bool) -> list[Row]:
    """The rows of a graph's units. `recompute`: of those that record gradients, as kept.py has it."""
    units = sorted((unit for unit in graph.units if unit.runs), key=lambda unit: graph.order[unit.nodes[0]])
    units = [unit for unit in units if unit.first.settle(unit.last, layout, mode)]
    if mode.direct:
        return rows(graph, blocks(graph, units, layout), layout)
    kept.settle(units, layout, recompute)
    return [[[unit]] for unit in units]


def blocks(graph: Graph, units: list[Unit], layout: Layout) -> list[Block]:
    by_source: BySource = {}
    taken: set[Unit] = set()
    found = []
    for unit in units:
        by_source.setdefault(unit.source, []).append(unit)
    for unit in units:
        if unit not in taken:
            block = _block_from(unit, by_source, layout, taken)
            if len(block) == 1 or _something_between(block, graph):
                block = [unit]
            else:
                taken.update(block)
            found.append(block)
    return [block for block in found if len(block) > 1 or block[0] not in taken]


def _block_from(unit: Unit, by_source: BySource, layout: Layout, taken: set[Unit]) -> Block:
    """The longest block that begins with a unit."""
    block = [unit]
    while block[-1].in_strips and layout.is_free(block[-1].last):
        added = _only_reader(block[-1].last, by_source)
        if added and added[0].first.excitation is not None:
            added += _only_reader(added[0].last, by_source)
        if (
            not added
            or not added[-1].in_strips
            or not all(behind.first.takes_excitation for behind in added[1:])
            or added[-1] in taken
            or any(added[-1].residual in member.nodes for member in block + added)
        ):
            break
        block += added
    return block


def _only_reader(node: fx.Node, by_source: BySource) -> list[Unit]:
    """[the unit that alone reads a node], or []. Squeeze and excitation reads it twice."""
    found = by_source.get(node, [])
    if len(found) != 1:
        return []
    alone = len(node.users) == 1 or found[0].first.excitation is not None and set(node.users) <= set(found[0].nodes)
    return list(found) if alone else []


def _something_between(block: Block, graph: Graph) -> bool:
    """True where a node stands between the ends of a block that could write what it reads."""
    members = {node for unit in block for node in unit.all_nodes}
    start, end = graph.order[block[0].nodes[0]], graph.order[block[-1].last]
    return any(
        node not in members and node.op not in ("get_attr", "placeholder") for node in graph.nodes[start : end + 1]
    )


def inputs_of(block: Block) -> list[fx.Node]:
    """What a block reads: the source, then each residual that is not the source."""
    source = block[0].source
    return [source, *dict.fromkeys(unit.residual for unit in block if unit.residual not in (None, source))]


def rows(graph: Graph, found: list[Block], layout: Layout) -> list[Row]:
    """Blocks that follow each other put together. What is not worth a call of its own is left out alone."""
    found = [block for block in found if block[0].first.joins()]
    by_last = {block[-1].last: block for block in found}
    inside = {node for block in found for unit in block for node in unit.all_nodes}
    adjacent: list[Row] = [[]]
    for node in graph.nodes:
        if node in by_last and by_last[node][0].first.by_itself:
            adjacent += [[by_last[node]], []]
        elif node in by_last:
            adjacent[-1].append(by_last[node])
        elif node not in inside and node.op not in ("placeholder", "get_attr"):
            adjacent.append([])  # something else runs here
    made = []
    for row in adjacent:
        while row:
            length = _longest(row, layout)
            if length > 1 or len(row[0]) > 1 or row[0][0].has_call:
                made.append(row[:length])
            row = row[length:]
    return made


def _longest(row: Row, layout: Layout) -> int:
    """How many blocks from the first on can be one row: what they compute is read by themselves alone, but for the last
    one's result."""
    longest, values = 1, set(inputs_of(row[0]))
    nodes: set[fx.Node] = set()
    if len(values) > 1:
        return 1
    source = row[0][0].source
    for length, block in enumerate(row, 1):
        unit = block[-1]
        if not values.issuperset(inputs_of(block)) or unit.is_image and not layout.is_free(unit.last):
            break
        nodes.update(node for member in block for node in member.all_nodes)
        if all(nodes.issuperset(value.users) for value in values if value is not source):
            longest = length
        if not unit.is_image:
            break  # nothing follows
        values.add(unit.last)
    return longest
