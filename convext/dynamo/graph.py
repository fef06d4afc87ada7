"""One of Dynamo's graphs as the patterns of the swap see it (swap/match/).

Dynamo records torch's functions and methods, whatever modules call them, and gives parameters and buffers as arguments
of the graph. To the patterns those are tensors that are found by name. What they find holds for every call of the
compiled code: settings are constants of the graph, and dtypes, extents and strides are guarded.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..swap import calls
from ..swap.capture.captured import Captured

FPROP = frozenset((torch.ops.convext.fprop, torch.ops.convext.fprop.default))
_SET_GRADIENTS = torch._C._set_grad_enabled
# Functions of no tensor that compute nothing: they stay where they are, and no pattern need see them.
SAYS_NOTHING = frozenset((torch._C._log_api_usage_once,))
# Methods and functions that give a tensor other strides in place: what is known of a value's is not so for long.
_RESHAPE_IN_PLACE = frozenset(
    "t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ resize_ resize_as_ as_strided_ set_ detach_ rename_".split()
)


class State(NamedTuple):
    """What stands around a node: whether gradients are recorded, and the dtype to which autocast casts on the CPU."""

    gradients: bool
    autocast: torch.dtype | None


class NotForUs(Exception):
    """A graph that is left as it is."""


class DynamoGraph(Captured):
    """The graph of `owner`, as Dynamo captured it.

    origins   Dynamo's nodes of this graph's
    examples  what Dynamo knows of their values: fake tensors, symbolic numbers
    values    the tensors that are found by name, by that name: examples; found: Dynamo's nodes of them
    states    of Dynamo's nodes
    passed    Dynamo's dropouts that return their argument, which are no nodes here
    data      the tensors that are arguments, not found by name
    moves     True where a tensor is given other strides in place

    Raises NotForUs.
    """

    def __init__(self, owner: fx.GraphModule, inputs: Sequence[Any]):
        self.graph, self.modules, self.places = fx.Graph(), {"0": None}, []
        self.origins: dict[fx.Node, fx.Node] = {}
        self.examples: dict[fx.Node, Any] = {}
        self.values: dict[str, Any] = {}
        self.found: dict[str, fx.Node] = {}
        self.states: dict[fx.Node, State] = {}
        self.data: list[torch.Tensor] = []
        self.moves = False
        self._barriers: set[fx.Node] = set()
        self._here: dict[fx.Node, fx.Node] = {}
        self._numbers: dict[fx.Node, int] = {}  # of those that are found by name: the place
        self._enter_all(owner, inputs)
        self.barriers = self._barriers
        here = dict(self.origins)
        self.drop_dropouts()
        present = set(self.graph.nodes)
        self.passed = [origin for node, origin in here.items() if node not in present]
        self.origins = {node: origin for node, origin in here.items() if node in present}
        if not self.moves:
            self.contiguous = {node for node in present if node.op[:5] == "call_" and self._is_contiguous(node)}

    def _is_contiguous(self, node: fx.Node) -> bool:
        value = self.examples.get(node)
        return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.is_contiguous()

    def _enter_all(self, owner: fx.GraphModule, inputs: Sequence[Any]) -> None:
        source = owner.graph
        by_name = _found_by_name(source)
        given = iter(inputs)
        state = State(torch.is_grad_enabled(), _autocast_on_the_cpu())
        entered: dict[fx.Node, State] = {}  # what was before each autocast
        for node in source.nodes:
            state = self._state_behind(node, state, entered)
            self.states[node] = state
            if node.op == "placeholder":
                self._enter_argument(node, next(given), by_name)
            elif node.op == "get_attr":
                self._enter_place(node, operator.attrgetter(node.target)(owner))
            elif not _is_a_count(node) and node.target not in SAYS_NOTHING:
                self._enter(node)

    def _enter_argument(self, node: fx.Node, value: Any, by_name: set[fx.Node]) -> None:
        if (node in by_name or isinstance(value, nn.Parameter)) and _has_fixed_sizes(value):
            self._enter_place(node, value)
            return
        self._note(node, self.graph.placeholder(node.name))
        if isinstance(value, torch.Tensor):
            if is_traceable_wrapper_subclass(value):
                raise NotForUs  # whose operators are taken apart, DTensor's for example
            self.data.append(value)

    def _enter_place(self, node: fx.Node, value: Any) -> None:
        self.values[node.name], self.found[node.name] = value, node
        self.places.append((self.values, node.name))
        self._numbers[node] = len(self.places) - 1

    def _read(self, node: fx.Node) -> fx.Node:
        """What stands here for a node that is read now: a tensor that is found by name is looked up by each reader."""
        if node not in self._numbers:
            return self._here[node]
        made = self.graph.create_node("get_attr", f"at.{self._numbers[node]}", (), {})
        self.origins[made], self.examples[made] = node, node.meta.get("example_value")
        return made

    def _enter(self, node: fx.Node) -> None:
        target, args, kwargs = node.target, node.args, node.kwargs
        if node.op == "call_module":
            self.modules[target] = nn.Module()  # whatever it does
            self.opaque = {*self.opaque, str(target)}
        elif target in FPROP and _is_plain_fprop(node):  # a swapped layer
            target, args = F.conv2d, args[:7]
        made = self.graph.create_node(node.op, target, fx.map_arg(args, self._read), fx.map_arg(kwargs, self._read))
        self._note(node, made)
        name = str(getattr(target, "__name__", target))
        self.moves = self.moves or name in _RESHAPE_IN_PLACE
        if node.op == "call_function" and _may_do_anything(node):
            if (getattr(target, "__module__", None) or "").startswith(("torch._functorch", "torch._C._functorch")):
                raise NotForUs  # what is computed between these is of other tensors than the graph shows
            self._barriers.add(made)

    def _note(self, node: fx.Node, made: fx.Node) -> None:
        self._here[node], self.origins[made] = made, node
        self.examples[made] = node.meta.get("example_value")

    def _state_behind(self, node: Any, state: State, entered: dict[fx.Node, State]) -> State:
        if node.op != "call_function":
            return state
        if node.target is _SET_GRADIENTS:
            return State(bool(node.args[0]), state.autocast)
        if node.target is _enter_autocast:
            entered[node] = state
            device, dtype, enabled, *_ = (*node.args, None, True)[:4]
            if device != "cpu":
                return state
            dtype = torch.get_autocast_dtype("cpu") if dtype is None else dtype
            return State(state.gradients, dtype if enabled else None)
        if node.target is _exit_autocast:
            return State(state.gradients, entered[node.args[0]].autocast)
        return state


def _autocast_on_the_cpu() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _found_by_name(source: fx.Graph) -> set[fx.Node]:
    """The arguments that a function takes as its parameters."""
    return {
        value
        for node in source.nodes
        if node.op == "call_function" and (calls.takes_parameters(node.target) or node.target in FPROP) and node.args
        for value in (*node.args[1:], *node.kwargs.values())
        if isinstance(value, fx.Node) and value.op == "placeholder"
    }


def _has_fixed_sizes(value: Any) -> bool:
    """True of a tensor of torch's own, in memory, that has the same extents in every call."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not is_traceable_wrapper_subclass(value)
        and all(type(n) is int for n in (*value.shape, *value.stride()))
    )


def _is_a_count(node: Any) -> bool:
    """True of the call that counts a batch norm's batches, which stands between a convolution and its batch norm. It
    stays where it is, and no pattern need see it: it writes an integer tensor that nothing else in the graph reads, so
    that it does the same before or behind anything. (Memory under tensors of another type, which nobody has who uses
    torch.compile: AOTAutograd takes no written argument that shares memory with one of another dtype.)"""
    if node.op != "call_method" or node.target != "add_" or node.users or node.kwargs or len(node.args) != 2:
        return False
    count, one = node.args
    if not isinstance(count, fx.Node) or count.op != "placeholder" or type(one) is not int or len(count.users) != 1:
        return False
    value = count.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype is torch.int64 and value.dim() == 0


def _is_plain_fprop(node: Any) -> bool:
    """True of convext's operator where it is conv2d of an image."""
    if len(node.args) < 7 or node.kwargs or len(node.args[3]) != 2 or node.args[7:] not in ((), (False,)):
        return False
    x = node.args[0].meta.get("example_value")
    return isinstance(x, torch.Tensor) and x.dim() == 4


def _may_do_anything(node: fx.Node) -> bool:
    """True of a function that changes what stands around others (gradients, autocast, transforms), that runs graphs of
    its own, or that returns no value."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return "example_value" not in node.meta or node.meta["example_value"] is None
