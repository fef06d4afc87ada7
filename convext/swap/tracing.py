"""The graph of one container's own forward: children are leaves, plain nn.Sequentials are looked through.

A `torch.fx.Graph` whose call_module targets are keys of `Trace.modules`, one for each module object, not paths. The
trace is symbolic, so that control flow that depends on values fails instead of being frozen, and stricter than
torch.fx in what it takes for granted: `isinstance(x, torch.Tensor)` is true of tensors and refused where nobody can
know, `x += y` stays in place, operations on parameters alone and random numbers are recorded, not computed once.
"""
import operator
import random
import sys
import threading
from collections import OrderedDict
from itertools import repeat

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from . import signature as signatures
from .audit import Audit, Untraceable, paused, snapshot

_LOCK = threading.RLock()
_FX_FRAMES = ("torch.fx", "torch.nn.parameter", "convext")
_ORIGINAL_CALL = nn.Module.__call__
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def inlined(module):
    """True of a container whose forward does nothing but call its children one after the other: nn.Sequential's, or
    that of torchvision's IntermediateLayerGetter, which returns some of the results by name."""
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    return isinstance(module, nn.ModuleDict) and type(module).__name__ == "IntermediateLayerGetter" \
        and type(module).__module__ == "torchvision.models._utils"


class _Watched:
    """Answers isinstance() as the tensor would that this proxy stands for; raises where that is unknown."""

    @property
    def __class__(self):
        # torch's C++ asks as well, and would take what says yes for the memory of a tensor: only isinstance() is
        # answered. A property call is itself an event of the audit, so `calling` is read at the event before it.
        if self.tracer.audit.asked is not isinstance:
            return type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(_FX_FRAMES):
            return type(self)
        if self.tracer.is_tensor(self):
            return torch.Tensor
        raise Untraceable("its forward asks for the type of a value that only running it can tell")


class TracedAttribute(_Watched, fx.proxy.Attribute):
    pass


class TracedValue(_Watched, fx.Proxy):
    def __getattr__(self, name):
        if not hasattr(torch.Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return TracedAttribute(self, name)

    def __iter__(self):
        raise Untraceable("its forward iterates over a tensor or unpacks a result")


def _in_place(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split():
    setattr(TracedValue, f"__{_name}__", _in_place(getattr(operator, _name)))


class _RecordEverything(TorchFunctionMode):
    """Torch functions that meet no proxy (factories, arithmetic on parameters) become nodes as well."""

    def __init__(self, tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(t, fx.Proxy) for t in types):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name.startswith("__") or name in ("item", "tolist", "numpy", "_make_subclass"):
            raise Untraceable(f"its forward reads {name.strip('_')!r} of a parameter or buffer")
        if torch.overrides.is_tensor_method_or_property(function):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", function, args, kwargs)


class _Tracer(fx.proxy.TracerBase):
    def __init__(self, trace):
        super().__init__()
        self.trace = trace
        self.graph = fx.Graph()
        self.tensors = set()     # nodes whose value is known to be one tensor
        self.guessed = None      # path of a leaf whose result is taken for something else than None
        self.inside = []         # nested inlined containers
        self.audit = Audit()

    # What torch.fx calls.
    def proxy(self, node):
        return TracedValue(node, self)

    def create_arg(self, value):
        if isinstance(value, fx.Proxy):
            return value.node
        if isinstance(value, torch.Tensor):
            return self._attribute(value)
        if isinstance(value, nn.Module):
            raise Untraceable("its forward passes a module to a function")
        if type(value) in (list, tuple):
            return type(value)(map(self.create_arg, value))
        if type(value) is dict:
            return {key: self.create_arg(item) for key, item in value.items()}
        if type(value) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (list(map(self.create_arg, value.items())),), {})
        if type(value) is slice:
            return slice(*map(self.create_arg, (value.start, value.stop, value.step)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.create_node("call_function", type(value), tuple(map(self.create_arg, value)), {})
        if isinstance(value, _PLAIN) or value is Ellipsis or callable(value) and hasattr(value, "__name__") \
                or isinstance(value, (torch.memory_format, torch.layout)):
            return value
        if isinstance(value, (range, torch.Size)):
            return tuple(value)
        raise Untraceable(f"its forward uses a {type(value).__name__} as an argument")

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        if kind in ("call_function", "call_method") and returns_tensor(node):
            self.tensors.add(node)
        return node

    def to_bool(self, proxy):
        raise Untraceable("its forward decides by the value or the shape of a tensor")

    def iter(self, proxy):
        raise Untraceable("its forward loops over a tensor or unpacks a result")

    def keys(self, proxy):
        raise Untraceable("its forward unpacks a mapping")

    # What this module calls.
    def is_tensor(self, proxy):
        return isinstance(proxy, TracedValue) and proxy.node in self.tensors

    def new_tensor(self):
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        self.tensors.add(node)
        return self.proxy(node)

    def _attribute(self, tensor):
        for module in self.trace.owner.modules():
            for kind in ("_parameters", "_buffers"):
                for name, value in getattr(module, kind).items():
                    if value is tensor:
                        return self.graph.create_node("get_attr", f"{self.trace.key(module)}.{name}", (), {})
        raise Untraceable("its forward uses a tensor that is neither an argument, a parameter nor a buffer")

    def call_module(self, module, args, kwargs):
        from .planned import PlannedForward, returned_kind
        own = module.__dict__.get("forward")
        if inlined(module) and (own is None or isinstance(own, PlannedForward)) and module not in self.inside:
            self.trace.inline(module)
            self.inside.append(module)
            try:
                return type(module).forward(module, *args, **kwargs)
            finally:
                self.inside.pop()
        if module is self.trace.owner:
            raise Untraceable("its forward calls itself")
        if module not in self.trace.descendants:
            raise Untraceable(f"its forward calls a {type(module).__name__} that is not among its submodules")
        node = self.create_node("call_module", self.trace.key(module), *map(self.create_arg, (tuple(args), kwargs)),
                                name=self.trace.descendants[module].replace(".", "_"))
        with paused(), _pop_mode_temporarily():
            known = returned_kind(module, self.kinds(args, kwargs)) == signatures.TENSOR
        if known:
            self.tensors.add(node)
        elif self.guessed is None:
            self.guessed = self.trace.descendants[module]
        return self.proxy(node)

    def kinds(self, args, kwargs):
        """The signature that a leaf will be called with, or None where it cannot be known."""
        positional = tuple(map(self._kind, args))
        named = tuple((name, self._kind(value)) for name, value in kwargs.items())
        return None if None in positional or any(k is None for _, k in named) else (positional, named)

    def _kind(self, value):
        if isinstance(value, fx.Proxy):
            return signatures.TENSOR if self.is_tensor(value) else None
        if type(value) in (list, tuple):
            return (type(value), len(value), signatures.TENSOR) if all(map(self.is_tensor, value)) else None
        return signatures.kind(value)


class Trace:
    """One traced forward, and what it took for constant.

    graph      call_module targets and the first part of a get_attr target are keys of `modules`
    modules    every module that the graph calls or that owns a tensor it reads; key "0", the owner, holds None
    paths      their names as seen from the owner, by the same keys
    sequences  the containers looked through
    tensors    the nodes known to hold one tensor
    parameters the owner's own, by name
    """

    def __init__(self, owner, signature):
        self.owner_type, self.forward = type(owner), type(owner).forward
        self.owner = owner
        self.descendants = {module: name for name, module in owner.named_modules() if module is not owner}
        self.modules, self._keys = {"0": owner}, {owner: "0"}
        self.sequences = []
        self._run(signature)
        self._freeze()

    def key(self, module):
        if module not in self._keys:
            self._keys[module] = str(len(self.modules))
            self.modules[self._keys[module]] = module
        return self._keys[module]

    def inline(self, module):
        if module not in self.sequences:
            self.sequences.append(module)

    def _run(self, signature):
        tracer = _Tracer(self)
        args, kwargs = signatures.build(signature, tracer.new_tensor)
        random_state, restore = random.getstate(), snapshot(self.owner)
        try:
            with _LOCK, _calls_to(tracer), _RecordEverything(tracer), tracer.audit as audit:
                result = self.forward(self.owner, *args, **kwargs)
            audit.check()
        except Untraceable:
            raise
        except Exception as error:
            tracer.audit.check()
            raise Untraceable(f"tracing it raised {type(error).__name__}: {_one_line(error)}") from error
        finally:
            changed = restore()
            drew = random.getstate() != random_state
            random.setstate(random_state)
        if changed:
            raise Untraceable("its forward changes attributes of its modules")
        if drew:
            raise Untraceable("its forward draws random numbers in Python")
        if tracer.guessed is not None and audit.compares_with_none:
            raise Untraceable(f"its forward compares with None, and what {tracer.guessed!r} returns is not known")
        self.result = tracer.create_arg(result)
        tracer.graph.output(self.result)
        self.graph, self.tensors = tracer.graph, tracer.tensors

    def _freeze(self):
        """Remembers what the trace depends on, in a form that `current` compares fast.

        The plan is held by the owner, so neither the owner nor its dictionary is kept here. That of its parameters is:
        no parameter holds its module."""
        paths = self.descendants
        by_path = {name: module for module, name in paths.items()}
        parents = {id(m): m for m in self.sequences}
        for module in self.leaves:
            *prefix, _ = paths[module].split(".")
            for end in range(1, len(prefix) + 1):
                parent = by_path[".".join(prefix[:end])]
                parents[id(parent)] = parent
        self.children = list(self.owner._modules.values())
        self.containers = [(m._modules, list(m._modules.values())) for m in parents.values()]
        self.own_attributes = _plain_attributes(self.owner)
        self.attributes = [(m.__dict__, _plain_attributes(m)) for m in self.sequences]
        self.sequence_types = [type(m) for m in self.sequences]
        self.paths = {key: paths.get(m, "") for key, m in self.modules.items()}
        self.modules["0"], self.parameters = None, self.owner._parameters
        del self.owner, self.descendants, self._keys

    @property
    def leaves(self):
        """The modules that the graph calls or takes tensors from, without the owner."""
        return [m for key, m in self.modules.items() if key != "0"]

    def owner_stands(self, owner):
        """False once something of the owner itself that the trace took for constant has changed."""
        return type(owner) is self.owner_type and self.owner_type.forward is self.forward \
            and [*owner._modules.values()] == self.children and _same(owner.__dict__, self.own_attributes)

    def current(self, owner):
        """False once anything that the trace took for constant has changed."""
        if not self.owner_stands(owner):
            return False
        for modules, values in self.containers:
            if [*modules.values()] != values:
                return False
        for attributes, expected in self.attributes:
            if not _same(attributes, expected):
                return False
        return [*map(type, self.sequences)] == self.sequence_types

    def watch(self, watch, owner=None):
        """Adds what `current` checks to a Watch, without an owner what it checks besides `owner_stands`; False where it
        cannot: a value that may change in place."""
        containers, expected = self.containers, self.attributes
        if owner is not None:
            watch.type(owner, self.owner_type)
            watch.attribute(self.owner_type, "forward", self.forward)
            containers = [(owner._modules, self.children), *containers]
            expected = [(owner.__dict__, self.own_attributes), *expected]
        for modules, values in containers:
            watch.values(modules, tuple(values))
        for module in self.sequences:
            watch.type(module, type(module))
        for attributes, (count, names, values) in expected:
            if any(isinstance(value, (list, dict, set)) for value in values):
                return False
            watch.length(attributes, count)
            for name in names:
                watch.item(attributes, name, attributes[name])
        return True


def _same(attributes, expected):
    count, names, values = expected
    return len(attributes) == count and [*map(attributes.get, names, repeat(_MISSING))] == values


_MISSING = object()
# Of nn.Module itself: looked at elsewhere (hooks, children) or of no meaning for a forward.
_MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"} | {"forward", "_is_full_backward_hook"}


def _plain_attributes(module):
    """(number of attributes, names, values) of those that a forward may have decided by."""
    found = {name: value for name, value in module.__dict__.items()
             if name not in _MODULE_STATE and isinstance(value, _PLAIN + (tuple, list, dict, set, frozenset))}
    values = [value.copy() if isinstance(value, (list, dict, set)) else value for value in found.values()]
    return len(module.__dict__), list(found), values


def _one_line(error):
    return str(error).strip().split("\n")[0][:120]


class _calls_to:
    """While active, module calls of this thread go to the tracer."""

    def __init__(self, tracer):
        self.tracer = tracer

    def __enter__(self):
        tracer, thread, outer = self.tracer, threading.get_ident(), nn.Module.__call__

        def __call__(module, *args, **kwargs):
            if threading.get_ident() != thread:
                return outer(module, *args, **kwargs)
            return tracer.call_module(module, args, kwargs)

        self.outer = outer
        nn.Module.__call__ = __call__

    def __exit__(self, *exc):
        nn.Module.__call__ = self.outer
        return False


from .calls import returns_tensor  # noqa: E402
