"""Layers over the channels of each pixel, as ConvNeXt (Liu et al., 2022) has them behind its depthwise convolutions:

    y = permute(y, NHWC)   linear and LayerNorm layers, activations   y = permute(y, NCHW)
    [y = scale * y]   [y = y + residual]

Over a channels-last image a permutation is a view, a linear layer a 1x1 convolution, and a LayerNorm a kernel of its
own (csrc's layer_norm.h). So such a run of layers is steps of a sequence like any convolution's. A LayerNorm2d, which
permutes by itself, is a run of one layer.
"""
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from .. import backends
from ..backends.native_sequence import Step as PreparedStep
from ..memory_format import suggests_channels_last
from ..problem import DTYPES, ConvProblem, Layout, Pass
from . import calls, chains, place

_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
_DTYPES = torch.float32, torch.float64, torch.bfloat16
_NORM_DTYPES = torch.float32, torch.float64  # of the LayerNorm's kernel
_POINTWISE = 1, 1, 1, 1, 0, 0, 1, 1, 1  # filter, stride, padding, dilation, groups

# ---- finding them ----------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """`kind`: "linear", "layer norm" or "mean", that over all pixels (heads.py). `module` is its key in the trace's
    modules, None of the mean; what follows is of linear layers alone.
    `scale`: name of a parameter of the container that multiplies its output by channels, or None; `scale_shapes`: those
    that it may have, where -1 stands for the channels."""
    module: str | None
    kind: str = "linear"
    activation: str = "identity"
    scale: str | None = None
    scale_shapes: tuple = ()


@dataclass
class Run:
    """Layers over channels from `source`, in order.

    core           its nodes in order; `parameters`: besides them, those that read the scale
    residual       what is added at the end, or None
    comes_second   the sum is `residual + y`, and so in the memory format of the residual
    constants      (key of a module, attribute, value) of what it was found by besides types"""
    source: fx.Node
    layers: list = field(default_factory=list)
    core: list = field(default_factory=list)
    parameters: list = field(default_factory=list)
    residual: fx.Node | None = None
    comes_second: bool = False
    constants: list = field(default_factory=list)

    @property
    def nodes(self):
        return self.core + self.parameters

    @property
    def last(self):
        return self.core[-1]

    @property
    def inputs(self):
        """What it reads: the source, and the residual if that is another value."""
        return [self.source] if self.residual in (None, self.source) else [self.source, self.residual]

    def readers(self, parameters):
        """node -> function of nothing, of each of `parameters`, from the dictionary of the container's own."""
        readers = {}
        for node in self.parameters:
            if node.op == "get_attr":
                name = node.target.partition(".")[2]
                readers[node] = lambda name=name: parameters[name]
            else:
                readers[node] = lambda read=readers[node.args[0]]: read().reshape(1, -1, 1, 1)
        return readers

    @property
    def parts(self):
        """What it computes, in words."""
        parts = []
        for layer in self.layers:
            parts.append(layer.kind)
            parts += [layer.activation] if layer.activation != "identity" else []
            parts += ["scale"] if layer.scale is not None else []
        return parts + (["add"] if self.residual is not None else [])


def find(graph, modules, opaque, taken):
    """The runs in a graph: a list of Run, each as long as it goes. `taken`: nodes that belong to others already."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    aliases = chains.aliases_of(graph, modules)
    runs, taken = [], set(taken)
    for node in order:
        run = None if node in taken else _run_from(node, modules, opaque, taken)
        if run is not None and not chains.crosses_a_write(run, order, aliases, modules):
            runs.append(run)
            taken.update(run.nodes)
    return runs


def _run_from(node, modules, opaque, taken):
    """The run that begins with a node, or None."""
    if node.op == "call_module" and calls.is_layer_norm_2d(modules[node.target]):
        if node.target in opaque or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        return Run(node.args[0], [Layer(node.target, "layer norm")], [node])
    if _permutation(node, modules) != _TO_NHWC or node.op == "call_module" and node.target in opaque:
        return None
    grown = Grower(Run(node.args[0], [], [node]), modules, opaque, taken)
    grown.note_permutation(node)
    return grown.run if grown.inside() and grown.run.layers else None


class Grower:
    """Adds what follows in the graph to a run, or to a head."""

    def __init__(self, run, modules, opaque, taken):
        self.run, self.modules, self.opaque, self.taken = run, modules, opaque, taken

    def follower(self):
        """The only reader of the last node, where it may belong to the run, else None."""
        users = self.run.last.users
        node = next(iter(users)) if len(users) == 1 else None
        if node is None or node in self.taken or node.op == "output" \
                or node.op == "call_module" and node.target in self.opaque:
            return None
        return node

    def note_permutation(self, node):
        if node.op == "call_module":
            self.note(node, "dims")

    def note(self, node, name):
        self.run.constants.append((node.target, name, _frozen(getattr(self.modules[node.target], name))))

    def inside(self):
        """Follows the run while its values are in the order NHWC; False where it does not come back."""
        run, modules = self.run, self.modules
        while (node := self.follower()) is not None:
            layer = run.layers[-1] if run.layers else None
            first = bool(node.args) and node.args[0] is run.last and node.all_input_nodes == [run.last]
            if first and layer is not None and _permutation(node, modules) == _TO_NCHW:
                run.core.append(node)
                self.note_permutation(node)
                self.outside()
                return True
            if not (first and (self.takes_layer(node) or calls.passes_through(node, modules))) \
                    and not self.takes_scale(node, ((-1,),)):
                return False
            run.core.append(node)
        return False

    def takes_layer(self, node):
        """True of a LayerNorm or linear layer, and of an activation behind the latter, that reads the last node alone;
        notes it."""
        layers, modules = self.run.layers, self.modules
        kind = type(modules[node.target]) if node.op == "call_module" else None
        if kind in (nn.LayerNorm, nn.Linear) and len(node.args) == 1 and not node.kwargs:
            layers.append(Layer(node.target, "layer norm" if kind is nn.LayerNorm else "linear"))
            return True
        if ends_in_linear(layers) and (name := calls.activation(node, modules)):
            layers[-1].activation = name
            if kind is nn.GELU:
                self.note(node, "approximate")
            return True
        return False

    def outside(self):
        """What follows in the order NCHW: a scale by channels, and a sum."""
        run, modules = self.run, self.modules
        while ends_in_linear(run.layers) and (node := self.follower()) is not None:
            first = bool(node.args) and node.args[0] is run.last
            if (pair := calls.summands(node)) and (first or not calls.writes_first_argument(node, modules)):
                run.residual, run.comes_second = pair[1] if first else pair[0], not first
                run.core.append(node)
                return
            if not (first and node.all_input_nodes == [run.last] and calls.passes_through(node, modules)) \
                    and not self.takes_scale(node, ((-1, 1, 1), (1, -1, 1, 1))):
                return
            run.core.append(node)

    def takes_scale(self, node, shapes):
        """True of a node that multiplies by a parameter of the owner, of one of the shapes, where -1 stands for the
        channels; notes it as the scale of the last layer."""
        run, layer = self.run, self.run.layers[-1] if self.run.layers else None
        if not ends_in_linear(run.layers) or layer.scale is not None or not calls.is_product(node) \
                or len(node.args) != 2 or run.last not in node.args:
            return False
        factor, between = next((a for a in node.args if a is not run.last), None), []
        if isinstance(factor, fx.Node) and factor.op == "call_method" and factor.target in ("reshape", "view") \
                and len(factor.users) == 1 and (1, -1, 1, 1) in shapes \
                and factor.args[1:] in ((1, -1, 1, 1), ((1, -1, 1, 1),), ([1, -1, 1, 1],)):
            between, factor, shapes = [factor], factor.args[0], ((-1,),)
        if not isinstance(factor, fx.Node) or factor.op != "get_attr" or len(factor.users) != 1:
            return False
        key, _, name = factor.target.partition(".")
        if key != "0" or "." in name:
            return False
        layer.scale, layer.scale_shapes = name, shapes
        run.parameters += [factor, *between]
        return True


def ends_in_linear(layers):
    """True where the last layer is a linear one that nothing but a scale follows so far."""
    return bool(layers) and layers[-1].kind == "linear" and layers[-1].activation == "identity"


def _permutation(node, modules):
    """The order in which a node permutes its first argument's dimensions, or None."""
    if node.op == "call_module":
        return calls.permutation_of(modules[node.target]) if len(node.args) == 1 and not node.kwargs else None
    if node.kwargs or not node.args or not (node.op == "call_method" and node.target == "permute"
                                            or node.op == "call_function" and node.target is torch.permute):
        return None
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    return tuple(dims) if all(type(d) is int for d in dims) else None


def is_norm_alone(unit):
    return isinstance(unit, Run) and all(layer.kind == "layer norm" for layer in unit.layers)


# ---- running them ----------------------------------------------------------------------------------------------------


class Apart:
    """function(x, residual=None) of a run: its modules one by one, as the forward wrote them. `source`: a problem whose
    output is like the last input, or None."""

    def __init__(self, function):
        self.function, self.source = function, None

    def __call__(self, *given):
        x = given[0]
        self.source = None if x.dim() != 4 or x.dtype not in DTYPES else _identity_of(x)
        return self.function(*given)


class LayerStep:
    """A layer of a run as a step of a sequence (see sequences.Step)."""

    excite = None

    def __init__(self, layer, run, parts):
        attributes = {} if layer.module is None else parts.modules[layer.module].__dict__
        self.layer, self.attributes, self.parameters = layer, attributes, attributes.get("_parameters", {})
        self.scales = parts.parameters if layer.scale is not None else {}
        self.constants = [(parts.modules[key].__dict__, name, value) for key, name, value in run.constants]
        self.choice = None  # of a linear layer, once it is prepared
        self.activation = layer.activation

    @property
    def eps(self):
        return self.attributes["eps"] if self.layer.kind == "layer norm" else 0.0

    def tensors(self):
        weight, bias = self.parameters.get("weight"), self.parameters.get("bias")
        if self.layer.kind != "linear":
            return None, None, None, None, weight, bias
        return weight, bias, None, None, self.scales.get(self.layer.scale), None

    def prepared(self, before, residual):
        """The PreparedStep that reads the output of the problem `before`; None where it cannot be one."""
        tensors, c = self.tensors(), before.k
        kind = self.layer.kind
        dtypes = _NORM_DTYPES if kind == "layer norm" else _DTYPES
        if self.facts(tensors) is None or before.dtype.torch not in dtypes or not self._fits(c):
            return None
        filters = (c, *before.y_shape[2:], 1, 1, 0, 0, 1, 1, c) if kind == "mean" else \
            (tensors[0].shape[0] if kind == "linear" else c, *_POINTWISE)
        problem = ConvProblem(*before.y_shape, *filters, before.dtype, before.y_layout, Layout.NHWC, before.device)
        if kind == "linear":
            self.choice = backends.select(Pass.FPROP, problem, alone=False)
        present = tuple(t is not None for t in tensors)
        return PreparedStep(problem, self.activation, residual, present, None, None if kind == "linear" else kind)

    def _fits(self, c):
        if self.layer.kind == "mean":
            return True
        if self.layer.kind == "layer norm":
            return tuple(self.attributes["normalized_shape"]) == (c,)
        weight, _, _, _, scale, _ = self.tensors()
        if weight is None or weight.dim() != 2 or weight.shape[1] != c:
            return False
        shapes = [tuple(weight.shape[0] if extent == -1 else extent for extent in s) for s in self.layer.scale_shapes]
        return self.layer.scale is None or scale is not None and scale.is_contiguous() and tuple(scale.shape) in shapes

    def facts(self, tensors):
        """What a prepared call relies on besides which tensors are there; None where they are none of torch's own, or
        the run is not what was found."""
        if any(t is not None and type(t) not in place.PLAIN for t in tensors):
            return None
        shapes = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        if any(_frozen(attributes[name]) != value for attributes, name, value in self.constants):
            return None
        return shapes, tuple(self.attributes.get("normalized_shape", ()))

    def places(self):
        """(dictionary, name) of each of the tensors."""
        scale = [(self.scales, self.layer.scale)] if self.layer.scale is not None else []
        return [(self.parameters, "weight"), (self.parameters, "bias"), *scale]


def _identity_of(x):
    layout = Layout(suggests_channels_last(x))
    return ConvProblem(*x.shape, x.shape[1], *_POINTWISE, DTYPES[x.dtype], layout, layout, x.device.type)


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value
