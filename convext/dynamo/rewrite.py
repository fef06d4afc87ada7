"""What the swap's patterns find in one of Dynamo's graphs becomes operators in that graph.

    without gradients, on the CPU   each row of units (swap/schedule/sequence.py) is one operator, `planned`
    else                            each convolution with what is fused with it is one (recorded.py)

An operator stands in the place of the last of its nodes. The patterns have seen to it that nothing between its ends
writes what it reads, or sees a value of its inside (swap/match/). Elementwise operations that are in no convolution's
epilogue are left to Inductor, which fuses any number of them, and whatever else stands in the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from .. import backends, checks, functional
from ..memory_format import suggests_channels_last
from ..problem import DTYPES
from ..swap.match import match
from ..swap.match.graph import Graph
from ..swap.modes import Mode
from ..swap.plan import shares, weights_of
from ..swap.schedule.layout import Layout, contiguous_weights
from ..swap.schedule.sequence import schedule
from ..swap.units.chain import Chain
from ..swap.units.conv import Conv, is_usual
from ..swap.units.functions import NOWHERE, found
from . import planned, recorded
from .graph import FPROP, SAYS_NOTHING, DynamoGraph, NotForUs
from .planned import PLANNED, Part, Untold

if TYPE_CHECKING:
    from ..swap.schedule.sequence import Row
    from ..swap.units import Unit


class Rewritten(NamedTuple):
    """What became of a graph.

    in_seam  whether values between layers are in another memory format than the user's own calls would give them
    whole    function(*inputs) of a graph that is one operator and nothing else, or None
    """

    in_seam: bool = False
    whole: Callable[..., Any] | None = None


_AS_IT_WAS = Rewritten()


def rewrite(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Rewritten:
    """Changes the graph of a module. `inputs`: tensors and numbers like those that it will be called with."""
    graph = graph_module.graph
    if backends.forced() not in (None, "native", "triton") or not any(n.target in _CONVOLUTIONS for n in graph.nodes):
        return _AS_IT_WAS
    try:
        captured = DynamoGraph(graph_module, inputs)
    except NotForUs:
        return _AS_IT_WAS
    rewriting = _Rewriting(graph, captured, inputs)
    rewriting.run()
    graph.lint()  # type: ignore[no-untyped-call]
    graph_module.recompile()
    return Rewritten(rewriting.mode.in_seam, rewriting.whole())


_CONVOLUTIONS = {*recorded.TRACED, *FPROP}


def _of_the_batch(unit: Unit) -> bool:
    """True of a unit that writes running statistics, or normalises by the batch's own."""
    return any(isinstance(op, Conv) and op.batch_norm is not None and op.batch_norm.by_batch for op in unit.ops)


def _served(device: str) -> bool:
    """True where convext has kernels for a type of device."""
    return any(backends.unavailable(name, device) is None for name in ("native", "triton"))


class _Edit(NamedTuple):
    """An operator, what it reads, and the nodes that it stands for, in order. format_is_told: of its result."""

    nodes: list[fx.Node]
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    format_is_told: bool


class _Rewriting:
    """One graph's, of which `captured` is what the patterns see."""

    def __init__(self, graph: fx.Graph, captured: DynamoGraph, inputs: Sequence[Any]):
        self.graph, self.captured = graph, captured
        states = set(captured.states.values())
        values = *inputs, *captured.values.values(), *captured.examples.values()
        wanted = any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
        records = wanted and any(state.gradients for state in states)
        casts = next((state.autocast for state in states if state.autocast is not None), None)
        self.mode = Mode(self._in_seam(), not records, None if records else casts)
        self.found, self.layout, self.rows = self._matched()
        self.now: dict[fx.Node, fx.Node] = {}  # of nodes that are no more: what stands in their place

    def _in_seam(self) -> bool:
        """Whether values between layers may be in any memory format: where those of the user's own calls are contiguous
        all along, as their arguments are."""
        captured = self.captured
        if captured.moves or backends.forced() not in (None, "native"):
            return False
        for t in captured.data:
            if t.layout is not torch.strided or not t.is_contiguous() or suggests_channels_last(t):
                return False
            if backends.unavailable("native", t.device.type) is not None:
                return False
        return contiguous_weights(weights_of(captured))

    def _matched(self) -> tuple[Graph, Layout, list[Row]]:
        for strict in (False, True):
            found_ = match(self.captured, self.mode, strict)
            if not any(shares(found(a), found(b)) for unit in found_.units for a, b in unit.distinct):
                break
        layout = Layout(found_, self.mode)
        return found_, layout, schedule(found_, layout, self.mode, False)

    # What becomes an operator.

    def run(self) -> None:
        edits = [edit for row in self.rows for edit in self._edits(row)]
        for node in self.captured.passed:
            node.replace_all_uses_with(node.all_input_nodes[0])  # which it returns
            self.graph.erase_node(node)
        order = {node: number for number, node in enumerate(self.graph.nodes)}
        told = set()
        for edit in sorted(edits, key=lambda edit: order[edit.nodes[-1]]):
            made = self._apply(edit)
            if edit.format_is_told:
                told.add(made)
        self._trace_the_others()
        self._make_contiguous(told)

    def _edits(self, row: Row) -> Iterator[_Edit]:
        units = [unit for block in row for unit in block]
        if any(isinstance(op, Chain) for unit in units for op in unit.ops):
            return
        edit = self._planned(units)
        if edit is not None:
            yield edit
            return
        for unit in units:
            edit = self._planned([unit]) or self._by_operator(unit)
            if edit is not None:
                yield edit

    def _planned(self, units: list[Unit]) -> _Edit | None:
        """The operator of a row, or None."""
        inner = {node for unit in units for node in unit.all_nodes if node.op != "get_attr"}
        nodes = sorted(inner, key=self.found.order.__getitem__)
        if not self.mode.direct or any(_of_the_batch(unit) for unit in units):
            return None
        read = dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in inner)
        values = dict.fromkeys(value for unit in units for value in unit.inputs if value not in inner)
        parameters = [node for node in read if node not in values]
        if any(node.op != "get_attr" for node in parameters) or not all(map(self._is_on_the_cpu, read)):
            return None
        origins = self.captured.origins
        states = {self.captured.states[origins[node]].autocast for node in nodes}
        examples: list[Any] = [found(self.found.place(node) or NOWHERE) for node in parameters]
        last = nodes[-1]
        example = self.captured.examples[last]
        if len(states) > 1 or not all(isinstance(t, torch.Tensor) for t in (*examples, example)):
            return None
        in_seam = self.mode.in_seam and (not units[-1].is_image or self.layout.is_free(last))
        channels_last = (in_seam or suggests_channels_last(example)) if example.dim() == 4 else None
        part = Part([*values], parameters, nodes, examples, in_seam, channels_last, *states)
        try:
            text = part.text()
        except Untold:
            return None
        args = [origins[v] for v in values], [origins[p] for p in parameters], text
        return _Edit([origins[node] for node in nodes], PLANNED, args, {}, True)

    def _is_on_the_cpu(self, node: fx.Node) -> bool:
        value = self.captured.examples[node]
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return False
        return value.device.type == "cpu" and backends.unavailable("native", "cpu") is None

    def _by_operator(self, unit: Unit) -> _Edit | None:
        """The operator of a convolution with what is fused with it, or None."""
        op, origins = unit.first, self.captured.origins
        if len(unit.ops) != 1 or not isinstance(op, Conv) or not self._means_the_same(unit, op):
            return None
        w, *others = [self.captured.found.get(name) for _, name in op.places[:6]]
        residual = None if unit.residual is None else origins[unit.residual]
        geom, norm = op.convolution.geom, op.batch_norm
        arguments = (*others, residual, op.eps, op.activation, *geom)
        function: Any = recorded.conv_bn_act
        settings: dict[str, Any] = {"channels_last": op.channels_last}
        if norm is not None and norm.by_batch:
            function, settings["momentum"] = recorded.conv_bn_act_train, norm.momentum
        nodes = [origins[node] for node in unit.nodes]
        return _Edit(nodes, function, (origins[unit.source], w, *arguments), settings, False)

    def _means_the_same(self, unit: Unit, op: Conv) -> bool:
        """True where the operator does what its nodes do, strides included."""
        examples, states = self.captured.examples, self.captured.states
        x, residual = examples[unit.source], None if unit.residual is None else examples[unit.residual]
        tensors: tuple[Any, ...] = tuple(map(found, op.places[:6]))
        if not all(isinstance(t, torch.Tensor) for t in (x, *tensors, residual) if t is not None) or x is None:
            return False
        if tensors[0] is None or not _served(x.device.type) or any(n == 0 for t in (x, tensors[0]) for n in t.shape):
            return False
        (autocast, *more) = {states[self.captured.origins[node]].autocast for node in unit.nodes}
        if more:
            return False
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            if not is_usual(op, x, tensors, residual):
                return False
            w, bias, *norm = tensors
            if autocast is not None:
                x, w, bias = functional.autocast(x, w, bias)
        try:
            checks.check_conv(x, w, bias, op.convolution.geom)
            checks.check_batch_norm(x.dtype, w.shape[0], *norm)
        except (RuntimeError, TypeError, ValueError):  # Inductor's to raise, or to take
            return False
        return True

    def _apply(self, edit: _Edit) -> fx.Node:
        last = edit.nodes[-1]
        args, kwargs = fx.map_arg((edit.args, edit.kwargs), lambda node: self.now.get(node, node))
        with self.graph.inserting_after(last):
            made = self.graph.call_function(edit.function, args, kwargs)
        made.meta = dict(last.meta)
        last.replace_all_uses_with(made)
        self.now[last] = made
        for node in reversed(edit.nodes):
            self.graph.erase_node(node)
        return made

    def _trace_the_others(self) -> None:
        """Convolutions that no operator has taken: of rows and volumes, transposed, of weights that are computed."""
        for node in self.graph.nodes:
            traced = recorded.TRACED.get(node.target) if node.op == "call_function" else None
            given = [] if traced is None else [value.meta.get("example_value") for value in node.all_input_nodes]
            if given and all(isinstance(t, torch.Tensor) and t.dtype in DTYPES for t in given):
                if all(t.layout is torch.strided and _served(t.device.type) for t in given):
                    node.target = traced

    def _make_contiguous(self, told: set[fx.Node]) -> None:
        for node in [node for node in self.found.nodes if node in self.layout.must_be_contiguous]:
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            here = self.captured.origins[node]
            here = self.now.get(here, here)
            if here in told or not isinstance(self.captured.examples[node], torch.Tensor):
                continue
            with self.graph.inserting_after(here):
                made = self.graph.call_method("contiguous", (here,))
            made.meta = dict(here.meta)
            here.replace_all_uses_with(made, delete_user_cb=functools.partial(operator.is_not, made))

    # A graph that is one operator.

    def whole(self) -> Callable[..., Any] | None:
        """function(*inputs) -> what the graph returns, or None."""
        arguments = {node: i for i, node in enumerate(n for n in self.graph.nodes if n.op == "placeholder")}
        *rest, output = [n for n in self.graph.nodes if n.op != "placeholder" and n.target not in SAYS_NOTHING]
        if len(rest) != 1 or rest[0].target is not PLANNED:
            return None
        inputs, parameters, text = rest[0].args
        results = output.args[0]
        if not isinstance(results, (list, tuple)) or any(result is not rest[0] for result in results):
            return None
        if not all(node in arguments for node in (*inputs, *parameters)):
            return None
        order = [arguments[node] for node in (*inputs, *parameters)]
        chosen = operator.itemgetter(*order, 0, 0)  # of two or more, a tuple
        first, last, count = len(inputs), len(order), len(results)

        def whole(*given: Any) -> tuple[torch.Tensor, ...]:
            tensors = chosen(given)
            return (planned.run(tensors[:first], [*tensors[first:last]], text),) * count

        return whole
