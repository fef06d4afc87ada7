"""The seam between layers: which values of a plan may be channels-last although the caller's tensors are contiguous.

The kernels like channels-last; user code may look at strides, `view`, or write through views. So a value is *free*
when a contiguous input would have made it contiguous, and every reader does the same to either format. A free value
may be in either format; any other is made contiguous where it is computed, once, before anybody can alias it.

A third kind is *channels-last* whatever the input was, in the forward as it is written: what comes out of a permutation
from NHWC (match/channel_layers.py), and what convolutions make of it. It is so here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ... import backends, ops
from ...memory_format import dense_strides, suggests_channels_last, where_copied
from .. import calls
from ..units import Format
from ..units.functions import found

if TYPE_CHECKING:
    from ..match.graph import Graph
    from ..modes import Mode
    from ..units import Unit
    from ..units.functions import Place

Asked = tuple[dict[str, Any], str, int, int]  # what `weights_to_ask` makes of a place

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def wanted(tensors: Sequence[torch.Tensor]) -> bool:
    """True where the native backend would serve, and the caller's tensors are contiguous and not channels-last. An
    empty one is contiguous whatever its strides are, which a user may look at."""
    forced = backends.forced()
    if (
        forced is not None
        and forced != "native"
        or torch._C._are_functorch_transforms_active()
        or ops.batched_the_older_way(*tensors)
    ):
        return False
    for t in tensors:
        if (
            t.dtype not in _DTYPES
            or backends.unavailable("native", t.device.type) is not None
            or not t.is_contiguous()
            or suggests_channels_last(t)
            or t.numel() == 0
        ):
            return False
    return bool(tensors)


def weights_to_ask(places: Iterable[Place]) -> list[Asked]:
    """What `contiguous_weights` takes: for the place of each convolution's weight, the dimension whose stride tells a
    contiguous weight from a channels-last one, with the stride of the former. Where there are no taps to order that is
    the last dimension; a weight of one channel and one tap is both, which asks for nothing."""
    asked: list[Asked] = []
    for place in places:
        weight = found(place)
        if weight is None or weight.dim() != 4:
            asked.append((*place, 0, -1))
        elif (taps := weight.shape[2] * weight.shape[3]) > 1:
            asked.append((*place, 1, taps))
        elif weight.shape[1] > 1:
            asked.append((*place, 3, 1))
    return asked


def contiguous_weights(asked: list[Asked]) -> bool:
    """True when no weight asks for a channels-last output."""
    in_vmap = ops.batches_the_older_way()
    for values, name, dimension, stride in asked:
        weight = values.get(name)
        if weight is None or in_vmap and ops.batched_the_older_way(weight):
            return False
        if not weight.is_contiguous() or weight.stride(dimension) != stride:
            return False
    return True


def contiguous(t: torch.Tensor) -> torch.Tensor:
    """t.contiguous() with a contiguous tensor's strides for extents of one, too: those are what an interpolation or a
    concatenation of it goes by. A sparse tensor has no order in memory."""
    if t.layout is not torch.strided:
        return t
    if t.dim() == 4 and t.is_contiguous() and t.stride() != dense_strides(t.shape, False) and t.numel():
        with where_copied(t):
            return t.clone(memory_format=torch.contiguous_format)
    if t.is_contiguous():
        return t
    with where_copied(t):
        return t.contiguous()


def contiguous_unrecorded(t: torch.Tensor) -> Any:
    """The same where nothing is recorded: a channels-last image on the CPU is copied by convext, several times as fast
    as by torch, whose copy reads one value from each of as many cache lines as there are channels."""
    if (
        type(t) is not torch.Tensor
        or t.dim() != 4
        or t.device.type != "cpu"
        or t.dtype not in _DTYPES
        or t.layout is not torch.strided
        or t.is_contiguous()
        or not t.is_contiguous(memory_format=torch.channels_last)
        or t.is_neg()
        or t.is_inference()
        and not torch.is_inference_mode_enabled()
    ):
        return contiguous(t)
    return torch.ops.convext_cpu.to_nchw.default(t)


class Layout:
    """Which nodes of a graph with units are of which kind.

    in_seam              False: every value has the format that the user's own calls would give it; all sets are empty
    free                 may be channels-last
    channels_last        are
    must_be_contiguous   made so where they are computed
    any_format           calls of containers with free arguments
    accepts              no argument of the container must be contiguous
    returns              "free" or "channels-last" where its result is one tensor of that kind, else None"""

    def __init__(self, graph: Graph, mode: Mode):
        self.in_seam, self.accepts = mode.in_seam, False
        self.returns: str | None = None
        self.free: set[fx.Node] = set()
        self.channels_last: set[fx.Node] = set()
        self.any_format: set[fx.Node] = set()
        self.must_be_contiguous: set[fx.Node] = set()
        self._plain: set[fx.Node] = set()
        if self.in_seam:
            self._visit_all(graph)

    def is_free(self, node: fx.Node) -> bool:
        """True of a value that may be channels-last."""
        return (
            not self.in_seam or node in self.channels_last or node in self.free and node not in self.must_be_contiguous
        )

    def _visit_all(self, graph: Graph) -> None:
        units = {unit.last: unit for unit in graph.units if unit.format is not Format.AS_NODES}
        inside = {node for unit in units.values() for node in unit.all_nodes} - set(units)
        *nodes, output = graph.nodes
        for node in nodes:
            if node not in inside:
                self._visit(graph, node, units.get(node))
        result, returns = graph.result, None
        if isinstance(result, fx.Node):
            returns = "channels-last" if result in self.channels_last else "free" if result in self.free else None
        if returns != "free":
            self.must_be_contiguous |= self.free.intersection(output.all_input_nodes)
        self._must_be_contiguous_as_aliases(graph.aliases)
        self.returns = None if returns == "free" and result in self.must_be_contiguous else returns
        self.accepts = not any(node.op == "placeholder" for node in self.must_be_contiguous)

    def _visit(self, graph: Graph, node: fx.Node, unit: Unit | None) -> None:
        if node.op == "placeholder":
            self.free.add(node)
            return
        if node.op == "get_attr" or unit is None and self._is_metadata(node):
            self._plain.add(node)
            return
        if unit is not None and not unit.is_image:
            return  # the same from either format
        inputs = node.all_input_nodes if unit is None else unit.inputs
        kind = self._kind(graph, node, unit, inputs)
        if kind is None:
            self.must_be_contiguous |= self.free.intersection(inputs)
            if node in graph.contiguous:  # of contiguous inputs; so its readers may take it as an argument's like
                self.free.add(node)
        else:
            (self.free if kind == "free" else self.channels_last).add(node)

    def _kind(self, graph: Graph, node: fx.Node, unit: Unit | None, inputs: list[fx.Node]) -> str | None:
        """ "free", "channels-last", or None."""
        if unit is not None and unit.format is Format.CHANNELS_LAST:
            if not unit.comes_second or unit.residual in self.channels_last:
                return "channels-last"
            return "free" if unit.residual in self.free else None
        tensors = [i for i in inputs if i not in self._plain]
        # What a container returns for free arguments; None where it minds their format or hides that of its result.
        called = graph.container(node) if unit is None else None
        nested = None if called is None else called.result_in_any_format(len(node.args))
        if tensors and all(i in self.channels_last for i in tensors):
            return "channels-last" if unit is not None or nested is not None else None
        if not tensors or not all(i in self.free for i in tensors):
            return None
        if nested is not None:
            self.any_format.add(node)
            return nested
        reads_any = unit is not None or not graph.is_opaque(node) and calls.reads_any_strides(node, graph.modules)
        return "free" if reads_any else None

    def _is_metadata(self, node: fx.Node) -> bool:
        """Sizes and numbers made of them."""
        inputs = node.all_input_nodes
        if inputs and all(i in self._plain and i.op != "get_attr" for i in inputs):
            return node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "builtins")
        if self.free.isdisjoint(inputs) and self.channels_last.isdisjoint(inputs):
            return False
        return (
            node.op == "call_method"
            and node.target in calls.METADATA_METHODS
            or node.op == "call_function"
            and node.target is getattr
            and node.args[1] in calls.METADATA_ATTRIBUTES
        )

    def _must_be_contiguous_as_aliases(self, aliases: dict[fx.Node, set[fx.Node]]) -> None:
        grown = True
        while grown:
            pinned = self.must_be_contiguous
            more = {
                alias
                for node in self.free
                if node in pinned or not pinned.isdisjoint(aliases[node])
                for alias in aliases[node]
                if alias in self.free
            }
            grown = not more <= pinned
            pinned |= more
