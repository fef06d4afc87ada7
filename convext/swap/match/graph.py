"""A captured forward as patterns look at it."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from .. import calls
from ..capture import signature as signatures
from ..units.functions import NOWHERE, Affine, BatchNorm, Convolution, LayerNormalization, Place, geom_of

if TYPE_CHECKING:
    from ..capture.captured import Captured
    from ..method import ForwardMethod
    from ..units import Unit

Node = Any  # an fx.Node whose arguments are known better than torch.fx has their types


class Graph:
    """The graph of a captured forward, and what patterns have found in it.

    nodes      in order; modules: those that they call, by their keys
    units      what is found; reasons: {convolution: why nothing is fused with it}, for the report
    result     what the forward returns; contiguous, lender: as in Captured
    strict     whether statistics that units may share are taken for shared
    """

    def __init__(self, trace: Captured, strict: bool = False):
        self.strict = strict
        self.graph, self.modules = trace.graph, trace.modules
        self.nodes, self.order = list(trace.graph.nodes), {node: i for i, node in enumerate(trace.graph.nodes)}
        self.units: list[Unit] = []
        self.reasons: dict[nn.Module | None, str] = {}
        self._trace, self._opaque = trace, trace.opaque
        self.contiguous, self.lender = trace.contiguous, trace.lender
        self._taken: set[fx.Node] = set()

    @property
    def result(self) -> Any:
        return self.nodes[-1].args[0]

    def take(self, unit: Unit) -> None:
        self.units.append(unit)
        if unit.runs:
            self._taken.update(unit.all_nodes)

    def is_untaken(self, node: fx.Node) -> bool:
        return node not in self._taken

    def is_opaque(self, node: fx.Node) -> bool:
        """True of the call of a module that must be called as it is."""
        return node.op == "call_module" and node.target in self._opaque

    def module(self, node: fx.Node, *kinds: type) -> Any:
        """The module that a node calls with one argument, if it may be looked into and is exactly of one of the kinds,
        else None."""
        if (
            node.op != "call_module"
            or len(node.args) != 1
            or node.kwargs
            or node.target in self._opaque
            or not isinstance(node.args[0], fx.Node)
        ):
            return None
        module = self.modules[node.target]
        return module if not kinds or type(module) in kinds else None

    def follower(self, node: fx.Node) -> fx.Node | None:
        """The only reader of a node, where it may belong to a unit, else None."""
        users = node.users
        reader = next(iter(users)) if len(users) == 1 else None
        return reader if reader is not None and self.may_join(reader) else None

    def may_join(self, node: fx.Node) -> bool:
        """True of a node that a unit may take."""
        return node not in self._taken and node.op != "output" and not self.is_opaque(node)

    def container(self, node: fx.Node) -> ForwardMethod | None:
        """The planned forward of the container that a node calls with tensors alone, or None."""
        if (
            node not in self._trace.planned
            or node.kwargs
            or not node.args
            or any(not isinstance(a, fx.Node) for a in node.args)
        ):
            return None
        forward: ForwardMethod = self.modules[node.target].__dict__["forward"]
        return forward

    def attribute(self, node: Node) -> Callable[[nn.Module], Any]:
        """function(owner) that reads the tensor of a get_attr node."""
        key, _, name = node.target.partition(".")
        if key == "at":
            values, name = self._trace.places[int(name)]
            return lambda owner: (owner.__dict__ if values is None else values)[name]
        module = self.modules[key]
        return operator.attrgetter(name) if module is None else lambda owner: getattr(module, name)

    def place(self, node: object) -> Place | None:
        """(dictionary, name) where the tensor of a get_attr node is found, or None of what is not in a dictionary."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        target: Any = node.target
        key, _, name = target.partition(".")
        if key == "at":
            values, name = self._trace.places[int(name)]
            return (values, name) if isinstance(values, dict) else None
        return next(((values, name) for values in self._trace.tensors_of(key) if name in values), None)

    def _places(self, *values: object) -> list[Any] | None:
        """The places of nodes, nowhere of None; None where one is neither."""
        places = [NOWHERE if value is None else self.place(value) for value in values]
        return None if None in places else places

    def convolution(self, node: fx.Node) -> Convolution | None:
        """The Convolution that a node computes of its first argument, or None."""
        module = self.module(node)
        if module is not None and calls.is_conv(module):
            return Convolution.of_layer(module) if self.uses[node.target] == 1 else None
        given = calls.arguments_of(node, F.conv2d)
        if given is None:
            return None
        weight, bias, *settings = given
        places, geom = self._places(weight, bias), geom_of(*settings)
        if places is None or weight is None or geom is None:
            return None
        owner = self.modules.get(weight.target.partition(".")[0])
        return Convolution(places[0], places[1], geom, owner if isinstance(owner, _ConvNd) else None)

    def batch_norm(self, node: fx.Node, kinds: tuple[type[nn.Module], ...] = (nn.BatchNorm2d,)) -> BatchNorm | None:
        """The BatchNorm that a node computes of its first argument, by such a layer or by a function, or None."""
        module = self.module(node)
        if module is not None and type(module) in kinds:
            return BatchNorm.of_layer(module) if self.uses[node.target] == 1 else None
        if type(node.target) is calls.BatchNormOf:
            return BatchNorm.of_layer(node.target.layer) if self.uses[node.target.key] == 1 else None
        given = calls.arguments_of(node, F.batch_norm)
        if given is None:
            return None
        *tensors, by_batch, momentum, eps = given
        places = self._places(*tensors)
        if places is None or type(by_batch) is not bool or momentum is None:
            return None
        mean, var, weight, bias = places
        return BatchNorm(mean, var, weight, bias, NOWHERE, by_batch, momentum, eps).as_usual()

    def dimensions(self, node: fx.Node) -> tuple[int, ...]:
        """How many dimensions a batch norm's node takes its input with."""
        if node.op == "call_module":
            return {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(self.modules[node.target])]
        return (4,) if type(node.target) is calls.BatchNormOf else (2, 3, 4, 5)

    def linear(self, node: fx.Node) -> Affine | None:
        """The Affine that a node computes of its first argument, or None."""
        module = self.module(node, nn.Linear)
        if module is not None:
            return Affine.of_layer(module)
        given = calls.arguments_of(node, F.linear)
        places = None if given is None or given[0] is None else self._places(*given)
        return None if places is None else Affine(*places)

    def layer_norm(self, node: fx.Node) -> LayerNormalization | None:
        """The LayerNormalization that a node computes of its first argument, or None."""
        module = self.module(node, nn.LayerNorm)
        if module is not None:
            return LayerNormalization.of_layer(module)
        given = calls.arguments_of(node, F.layer_norm)
        if given is None:
            return None
        shape, weight, bias, eps = given
        places = self._places(weight, bias)
        return None if places is None else LayerNormalization.of(places[0], places[1], shape, eps)

    def activation(self, node: fx.Node) -> str | None:
        return calls.activation(node, self.modules)

    def values_read(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads but for tensors that are found by name."""
        return [value for value in node.all_input_nodes if value.op != "get_attr"]

    def parameters_read(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the tensors that are found by name among what a node reads."""
        return [value for value in node.all_input_nodes if value.op == "get_attr"]

    @functools.cached_property
    def uses(self) -> Counter[Any]:
        """Key of a module -> how often it is called, two for each of its parameters that is read outside its call."""
        times = Counter(node.target for node in self.nodes if node.op == "call_module")
        times.update(node.target.key for node in self.nodes if type(node.target) is calls.BatchNormOf)
        for node in self.nodes:
            if node.op == "get_attr":
                times[node.target.partition(".")[0]] += 2
        return times

    @functools.cached_property
    def aliases(self) -> dict[fx.Node, set[fx.Node]]:
        """For each node, the nodes whose memory its value may share."""
        aliases = {}
        for node in self.nodes:
            aliases[node] = {node}
            if node.op != "placeholder":
                for source in calls.shared_arguments(node, self.modules):
                    aliases[node] |= aliases[source]
        return aliases

    def crosses_a_write(
        self, nodes: Sequence[fx.Node], inputs: Iterable[fx.Node], parameters: Iterable[fx.Node] = ()
    ) -> bool:
        """True where a node between the ends of `nodes`, which run at the last one's place, may write what they read:
        an input, or through an argument or a tensor of a module, which may share memory with any other of these; or
        where it may do anything, such as to put another in the place of one of `parameters`, which are read there."""
        reads = set().union(*(self.aliases[node] for node in inputs))
        members, first, last = set(nodes), self.order[nodes[0]], self.order[nodes[-1]]
        for node in self.nodes[min([first, *(self.order[p] for p in parameters)]) + 1 : last]:
            if node in members:
                continue
            if self._may_write_held(node):
                return True
            targets = calls.written(node, self.modules) if self.order[node] > first else []
            if any(self.aliases[target] & reads or self._is_held(target, node) for target in targets):
                return True
        return False

    def are_neighbours(self, nodes: Sequence[fx.Node]) -> bool:
        """True where nothing but themselves runs between the first and the last of some nodes."""
        between = self.nodes[self.order[nodes[0]] : self.order[nodes[-1]]]
        return all(node in nodes or node.op in ("get_attr", "placeholder") for node in between)

    def statistics_between(
        self, norm: BatchNorm, at: fx.Node, nodes: Sequence[fx.Node]
    ) -> list[tuple[Place, Place]] | None:
        """What must not share memory, so that a batch norm at a node may run at the place of the last of `nodes`: its
        statistics, and what others in between may write of such, or may read where it writes them. None where that
        cannot be told, or where all are to be taken for shared."""
        members: set[fx.Node] = set(nodes)
        others: list[Place] = []
        for node in self.nodes[self.order[at] + 1 : self.order[nodes[-1]]]:
            if node in members or node.op in ("get_attr", "placeholder"):
                continue
            module = self.modules[node.target] if node.op == "call_module" else getattr(node.target, "layer", None)
            for part in module.modules() if isinstance(module, nn.Module) else ():
                if norm.by_batch or part.training:
                    others += [(part._buffers, name) for name in part._buffers]
            if norm.by_batch:
                held = {alias for value in node.all_input_nodes for alias in self.aliases[value]}
                for place in [self.place(alias) for alias in held if alias.op == "get_attr"]:
                    if place is None:
                        return None
                    others.append(place)
        own = [place for place in (norm.mean, norm.var, norm.count) if place is not NOWHERE]
        pairs = [(mine, other) for mine in own for other in others]
        return None if pairs and self.strict else pairs

    def _may_write_held(self, node: Node) -> bool:
        """True where a node may write a tensor that is found by name, other than as one of `calls.written`."""
        if node in self._trace.barriers:
            return True
        if node.op == "call_module":
            if self.is_opaque(node):
                return True
            if node not in self._trace.planned:
                return False
            forward = self.container(node)
            plan = forward and forward.plan(forward.owner, ((signatures.TENSOR,) * len(node.args), ()))
            return plan is None or Graph(plan.trace).writes_held
        if node.op != "call_function" or calls.is_known(node):
            return False
        return any(alias.op == "get_attr" for value in node.all_input_nodes for alias in self.aliases[value])

    @functools.cached_property
    def writes_held(self) -> bool:
        return any(
            self._may_write_held(node)
            or any(
                alias.op == "get_attr" for target in calls.written(node, self.modules) for alias in self.aliases[target]
            )
            for node in self.nodes
        )

    def _is_held(self, target: fx.Node, writer: fx.Node) -> bool:
        """True where what a node may write may be a tensor that a module holds, or an argument."""
        origins = {alias.op for alias in self.aliases[target]}
        return "get_attr" in origins or "placeholder" in origins and not self._leaves_arguments_alone(writer)

    def _leaves_arguments_alone(self, node: fx.Node) -> bool:
        """True of the call of a container whose plan writes none of its arguments."""
        forward = None if self.is_opaque(node) else self.container(node)
        plan = None if forward is None else forward.plan(forward.owner, ((signatures.TENSOR,) * len(node.args), ()))
        return plan is not None and not Graph(plan.trace).writes_arguments

    @functools.cached_property
    def writes_arguments(self) -> bool:
        return any(
            alias.op == "placeholder" and not self._leaves_arguments_alone(node)
            for node in self.nodes
            for target in calls.written(node, self.modules)
            for alias in self.aliases[target]
        )
