"""The graph of one container's own forward: layers and containers with plans of their own are leaves, all other modules
are looked through.

A `torch.fx.Graph` whose call_module targets are keys of `Trace.modules`, one for each module object, not paths. The
forward runs on proxies of tensors and stand-ins of everything else (stand_ins.py), so that what it read is known
(`Trace.facts`), and control flow that depends on values fails instead of being frozen. It is stricter than torch.fx in
what it takes for granted: `isinstance(x, torch.Tensor)` is true of tensors and refused where nobody can know, `x += y`
stays in place, operations on parameters alone and random numbers are recorded, not computed once.
"""

from __future__ import annotations

import dis
import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from .. import calls
from ..calls import METADATA_ATTRIBUTES, METADATA_METHODS, module_returns_tensor, returns_tensor
from ..method import ForwardMethod
from ..refusal import Untraceable, noticed
from . import signature as signatures
from . import standard
from .audit import Audit, is_user, paused
from .captured import Captured
from .facts import ABSENT, PLAIN, Facts
from .pure import root_of
from .signature import Signature
from .stand_ins import ClassStandIn, Dict, Globals, List, ModuleStandIn, Place, Recorder, Set, StandIn

_LOCK = threading.RLock()
_PLAIN = (*PLAIN, torch.dtype, torch.device)
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
Trials = dict[tuple[nn.Module, Signature], "Trace | Untraceable"]  # of modules' forwards, or why there is none


def is_sequential(module: nn.Module) -> bool:
    """True of a container whose forward does nothing but call its children one after the other: nn.Sequential's, or
    that of torchvision's IntermediateLayerGetter, which returns some of the results by name."""
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    return (
        isinstance(module, nn.ModuleDict)
        and type(module).__name__ == "IntermediateLayerGetter"
        and type(module).__module__ == "torchvision.models._utils"
    )


_TENSOR_NAMES = frozenset(dir(torch.Tensor)) - {"__class__", "__dict__", "__hash__"}


class _Traced:
    """What a proxy shows to user code: what a tensor has, and nothing of its own."""

    def __getattribute__(self, name: str) -> Any:
        if name not in _TENSOR_NAMES and is_user(sys._getframe(1)):
            raise Untraceable(f"its forward asks for {name!r} of a value")
        return super().__getattribute__(name)

    def __hash__(self) -> int:
        if is_user(sys._getframe(1)):
            raise Untraceable("its forward uses a value as a key")
        return id(self)

    def __repr__(self) -> NoReturn:
        raise Untraceable("its forward makes a string of a value")

    __str__ = __repr__

    def __format__(self, how: str) -> NoReturn:
        raise Untraceable("its forward makes a string of a value")

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        here = next((i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti), None)
        node = self.node
        if (
            here is None
            or here.opname != "UNPACK_SEQUENCE"
            or not (
                node.op == "call_method"
                and node.target == "size"
                and len(node.args) == 1
                or node.op == "call_function"
                and node.target is getattr
                and node.args[1] == "shape"
            )
        ):
            raise Untraceable("its forward iterates over a tensor or unpacks a result")
        extents = self.tracer.create_proxy("call_function", unpacked, (self, here.argval), {})
        return iter([extents[i] for i in range(here.argval)])


def unpacked(values: Sequence[Any], count: int) -> Sequence[Any]:
    """The values, if they are as many; else the ValueError that unpacking them raises."""
    if len(values) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(values)})")
    if len(values) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    return values


class TracedAttribute(_Traced, fx.proxy.Attribute):
    pass


def _with_plain_lists(value: Any) -> Any:
    """The same with plain lists in the place of those that stand for the user's, which torch.fx does not look into."""
    if isinstance(value, list):
        return [_with_plain_lists(item) for item in value]
    if type(value) is tuple:
        return tuple(_with_plain_lists(item) for item in value)
    return {key: _with_plain_lists(item) for key, item in value.items()} if type(value) is dict else value


class TracedValue(_Traced, fx.Proxy):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _with_plain_lists(args), _with_plain_lists(kwargs)
        return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> TracedAttribute:
        if name not in METADATA_ATTRIBUTES and not callable(getattr(torch.Tensor, name, None)):
            tracer: Any = self.tracer
            tracer.guessed = tracer.guessed or name  # it may be None
        return TracedAttribute(self, name)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split():
    setattr(TracedValue, f"__{_name}__", _in_place(getattr(operator, _name)))


class _RecordEverything(TorchFunctionMode):
    """Torch functions that meet no proxy (factories, arithmetic on tensors of those) become nodes as well."""

    def __init__(self, tracer: _Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, fx.Proxy) for t in types):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name.startswith("__") or name in ("item", "tolist", "numpy", "_make_subclass"):
            raise Untraceable(f"its forward reads {name.strip('_')!r} of a tensor")
        if torch.overrides.is_tensor_method_or_property(function):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", function, args, kwargs)


class _Tracer(fx.proxy.TracerBase):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.graph = fx.Graph()
        self.types: dict[fx.Node, type] = {}  # node whose value is known to be one tensor -> its type
        self.guessed: Any = None  # path of a leaf whose result is taken for something else than None
        self.inside: list[nn.Module] = []  # the modules that are being looked through
        self.audit = Audit()
        self.recorder = Recorder(self, trace.facts)
        # id of a tensor -> (the tensor, its proxy, where it was found)
        self._tensors: dict[int, tuple[torch.Tensor, fx.Proxy, Place]] = {}

    def end(self) -> None:
        """Lets go of the user's objects."""
        self.recorder.end()
        self._tensors.clear()
        self.trace = self.audit = None  # type: ignore[assignment]  # nobody asks for them any more

    # What torch.fx calls.
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedValue(node, self)

    def create_arg(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return value.node
        if isinstance(value, torch.Tensor):
            raise Untraceable("its forward uses a tensor that is neither an argument nor found by name")
        if isinstance(value, (StandIn, ClassStandIn)):
            what = "module" if isinstance(value, ModuleStandIn) else "object"
            raise Untraceable(f"its forward passes {'a' if what == 'module' else 'an'} {what} to a function")
        if type(value) in (list, tuple, List):
            return (tuple if type(value) is tuple else list)(map(self.create_arg, value))
        if type(value) is dict:
            return {key: self.create_arg(item) for key, item in value.items()}
        if type(value) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (list(map(self.create_arg, value.items())),), {})
        if type(value) is slice:
            return slice(*map(self.create_arg, (value.start, value.stop, value.step)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.create_node("call_function", type(value), tuple(map(self.create_arg, value)), {})
        if isinstance(getattr(value, "__globals__", None), Globals):
            raise Untraceable("its forward passes a function of its own to a function")
        if (
            isinstance(value, _PLAIN)
            or value is Ellipsis
            or callable(value)
            and hasattr(value, "__name__")
            or isinstance(value, (torch.memory_format, torch.layout))
        ):
            return value
        if isinstance(value, (range, torch.Size)):
            return tuple(value)
        raise Untraceable(f"its forward uses a {type(value).__name__} as an argument")

    def create_node(
        self, kind: str, target: fx.node.Target, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        if kind in ("call_function", "call_method"):
            if returns_tensor(node):
                self.types[node] = torch.Tensor
            elif self.guessed is None and not _is_of_metadata(node):
                self.guessed = getattr(target, "__name__", target)
        return node

    def to_bool(self, proxy: fx.Proxy) -> NoReturn:
        raise Untraceable("its forward decides by the value or the shape of a tensor")

    def iter(self, proxy: fx.Proxy) -> NoReturn:
        raise Untraceable("its forward loops over a tensor or unpacks a result")

    def keys(self, proxy: fx.Proxy) -> NoReturn:
        raise Untraceable("its forward unpacks a mapping")

    # What this module and the recorder call.
    def type_of(self, proxy: fx.Proxy) -> type | None:
        """The type of a value where it is known to be one tensor, else None."""
        return self.types.get(proxy.node) if isinstance(proxy, TracedValue) else None

    def is_tensor(self, proxy: object) -> bool:
        return isinstance(proxy, fx.Proxy) and self.type_of(proxy) is not None

    def new_tensor(self) -> fx.Proxy:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        self.types[node] = torch.Tensor
        return self.proxy(node)

    def tensor(self, tensor: torch.Tensor, place: Place | None) -> fx.Proxy:
        """The proxy of a tensor that user code found in a place: (dictionary or list, key)."""
        if type(tensor) not in signatures.TENSOR_TYPES or place is None:
            raise Untraceable(f"its forward uses a {type(tensor).__name__} that is not found by name")
        known = self._tensors.get(id(tensor))
        if self.trace.facts.closed is not None:
            raise Untraceable(self.trace.facts.closed)
        if known is not None:
            for values, key in {(id(p[0]), p[1]): p for p in (known[2], place)}.values():
                if known[2][0] is not place[0] or known[2][1] != place[1]:
                    self._one_and_the_same(values, key, tensor)
            return known[1]
        with paused(), _pop_mode_temporarily():
            node = self.graph.create_node("get_attr", self.trace.place(*place), (), {})
        self.types[node] = type(tensor)
        proxy = self.proxy(node)
        self._tensors[id(tensor)] = tensor, proxy, place
        return proxy

    def _one_and_the_same(self, values: Any, key: Any, tensor: torch.Tensor) -> None:
        """Notes that a tensor which was found in several places is in this one."""
        if isinstance(values, dict):
            self.trace.facts.item(values, key, tensor)

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = module.__dict__.get("forward")
        calls_forward = standard.calls_forward(module, self.recorder.facts)
        if module is self.trace.owner:
            raise Untraceable("its forward calls itself")
        if module not in self.trace.descendants:
            raise Untraceable(f"its forward calls a {type(module).__name__} that is not among its submodules")
        if (
            calls_forward
            and module not in self.inside
            and (own is None or isinstance(own, ForwardMethod) and is_sequential(module))
            and not self._listens(module)
        ):
            if calls.is_batch_norm_act(module) and standard.is_standard(module, children=("drop", "act")):
                return self._batch_norm_act(module, *args, **kwargs)
            if is_sequential(module) or self._can_look_through(module, args, kwargs):
                return self._look_through(module, args, kwargs)
        node = self.create_node(
            "call_module",
            self.trace.key(module),
            self.create_arg(tuple(args)),
            self.create_arg(kwargs),
            name=self.trace.descendants[module].replace(".", "_"),
        )
        with paused(), _pop_mode_temporarily():
            returns_tensor, effect = self.trace.leaf(module, node, self.kinds(args, kwargs))
        is_opaque = self.trace.key(module) in self.trace.opaque
        if type(module) is nn.Identity and not is_opaque and len(args) == 1 and not kwargs:
            self.graph.erase_node(node)
            return args[0]  # whatever that is
        if returns_tensor and calls.is_dropout(module):
            returns_tensor = len(args) == 1 and self.is_tensor(args[0])  # which may be the result
        if returns_tensor:
            self.types[node] = torch.Tensor
        elif self.guessed is None:
            self.guessed = self.trace.descendants[module]
        if effect is not None:
            if any(map(_may_change, (*args, *kwargs.values()))):
                raise Untraceable(f"its forward gives a list to {self.trace.descendants[module]!r}, which {effect}")
            self.trace.facts.closed = f"its forward reads on after {self.trace.descendants[module]!r}, which {effect}"
            self.trace.effect = effect
        return self.proxy(node)

    def _can_look_through(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True of a module of the user's, or of a library built on torch, without a plan of its own, whose forward can
        be captured for such a call."""
        signature = self.kinds(args, kwargs)
        if (
            signature is None
            or root_of(type(module).__module__) in ("torch", "convext")
            or isinstance(module, torch.jit.ScriptModule)
            or module_returns_tensor(module)
        ):
            return False
        with paused(), _pop_mode_temporarily():
            inside = self.trace.trial(module, signature)
        return isinstance(inside, Trace) and inside.effect is None

    def _look_through(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module's forward as part of the one that calls it."""
        self.inside.append(module)
        try:
            forward = self.recorder.forward(type(module))
            return self.recorder.function(forward)(self.recorder.wrap(module), *args, **kwargs)
        finally:
            self.inside.pop()

    def _batch_norm_act(self, module: Any, x: Any) -> Any:
        """The parts of timm's BatchNormAct2d, whose own forward asks for the number of its input's dimensions."""
        with paused(), _pop_mode_temporarily():
            standard.note(module, self.trace.facts)
        part = calls.BatchNormOf(module, self.trace.key(module))
        stand_in = self.recorder.wrap(module)
        return stand_in.act(stand_in.drop(self.create_proxy("call_function", part, (x,), {})))

    def _listens(self, module: nn.Module) -> bool:
        """Whether somebody listens to a module's calls, or stands in for them: noted."""
        facts, attributes = self.recorder.facts, module.__dict__
        self.recorder.know(module)
        listens = [facts.filled(attributes, name) for name in HOOKS]
        facts.item_or_absent(attributes, "forward")
        return any(listens) or facts.item_or_absent(attributes, "_compiled_call_impl") not in (ABSENT, None)

    def kinds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature | None:
        """The signature that a leaf will be called with, or None where it cannot be known."""
        positional = tuple(map(self._kind, args))
        named = tuple((name, self._kind(value)) for name, value in kwargs.items())
        return None if None in positional or any(k is None for _, k in named) else (positional, named)

    def _kind(self, value: Any) -> signatures.Kind:
        if isinstance(value, fx.Proxy):
            return signatures.TENSOR if self.is_tensor(value) else None
        if type(value) in (list, tuple, List):
            kind = tuple if type(value) is tuple else list
            return (kind, len(value), signatures.TENSOR) if all(map(self.is_tensor, value)) else None
        return signatures.kind(value)


class Trace(Captured):
    """One captured forward, and the facts that it stands on: a `Captured`, and

    paths      the names of `modules` as seen from the owner, by the same keys
    tensors    the nodes known to hold one tensor
    facts      everything that was read
    nested_weights  of the convolutions in planned containers, as `Plan.weights`

    Raises Untraceable where the forward cannot stand in a plan; `facts` of the exception says what that rests on.
    """

    def __init__(self, owner: nn.Module, signature: Signature, trials: Trials | None = None):
        self.owner, self.facts = owner, Facts(owner)
        self._trials = {} if trials is None else trials
        self.descendants = {module: name for name, module in owner.named_modules() if module is not owner}
        self.modules: dict[Any, Any] = {"0": owner}
        self._keys = {owner: "0"}
        self.places: list[Place] = []
        self.opaque: set[str] = set()  # somebody listens, or they are not what their class says
        self.planned: set[fx.Node] = set()  # their facts are among these facts
        self.nested_weights: list[Any] = []
        self.effect: str | None = None  # what the last call of the forward may do besides computing, in words
        self._homes: dict[int, nn.Module] = {}  # id of a dictionary of parameters or buffers -> the module
        with noticed() as refusals:
            try:
                standard.note_functions(self.facts)
                tracer = _Tracer(self)
                try:
                    self._run(tracer, signature, refusals)
                finally:
                    tracer.end()
            except Untraceable as refusal:
                self.facts.done()
                refusal.facts = self.facts
                raise
            finally:
                refusals.clear()  # their tracebacks would lead back to this
        self._freeze()

    def key(self, module: nn.Module) -> str:
        if module not in self._keys:
            self._keys[module] = str(len(self.modules))
            self.modules[self._keys[module]] = module
        return self._keys[module]

    def place(self, values: Any, key: Any) -> str:
        """The get_attr target of a tensor found in a dictionary or list."""
        if not self._homes:
            for module in (self.owner, *self.descendants):
                self._homes[id(module.__dict__["_parameters"])] = self._homes[id(module.__dict__["_buffers"])] = module
        home = self._homes.get(id(values))
        if home is not None and isinstance(key, str) and "." not in key:
            return f"{self.key(home)}.{key}"
        self.places.append((None if values is self.owner.__dict__ else values, key))
        return f"at.{len(self.places) - 1}"

    def trial(self, module: nn.Module, signature: Signature) -> Trace | Untraceable:
        """The Trace of a module's own forward, to see whether it does anything but compute, or why there is none."""
        found = self._trials.get((module, signature))
        if found is None:
            try:
                found = Trace(module, signature, self._trials)
            except Untraceable as refusal:
                found = refusal.with_traceback(None)
            self._trials[module, signature] = found
        return found

    def leaf(self, module: nn.Module, node: fx.Node, signature: Signature | None) -> tuple[bool, str | None]:
        """Notes what the plan takes for granted of a module that a node calls.

        Returns (whether it is certain to return one tensor, what else a call may do, in words, or None)."""
        attributes, facts, kind = module.__dict__, self.facts, type(module)
        facts.type(module)
        facts.dict_of(module)
        listens = {name: facts.filled(attributes, name) for name in HOOKS}
        own = facts.item_or_absent(attributes, "forward")
        compiled = facts.item_or_absent(attributes, "_compiled_call_impl")
        calls_forward = standard.calls_forward(module, facts) and compiled in (ABSENT, None)
        standard.note_code(module, facts)
        effect = None
        if listens["_forward_hooks"] or listens["_forward_pre_hooks"]:
            effect = "has hooks"
        elif not calls_forward or own is not ABSENT and not isinstance(own, ForwardMethod):
            if not calls_forward or not standard.is_swaps(module, "forward", own):
                effect = "is called in a way of its own"
        if effect is None and isinstance(own, ForwardMethod):
            plan = None if signature is None else own.plan(module, signature)
            if plan is None:
                return False, "runs as it is written"
            facts.include(plan.facts, module)
            self.nested_weights += plan.weights
            if not any(listens.values()):
                self.planned.add(node)
            else:
                self.opaque.add(self.key(module))
            return plan.trace.result in plan.trace.tensors and not any(listens.values()), plan.trace.effect
        if effect is None and standard.is_standard(module):
            standard.note(module, facts)
            if any(listens.values()):
                self.opaque.add(self.key(module))
            return module_returns_tensor(module), None
        self.opaque.add(self.key(module))
        if effect is None and standard.is_of_a_library(module, facts):
            return module_returns_tensor(module), None
        if effect is not None or signature is None or kind.__module__.startswith("convext."):
            return effect is None and module_returns_tensor(module), effect or "runs as it is written"
        inside = self.trial(module, signature)
        facts.include(inside.facts, module)
        if not isinstance(inside, Trace):
            return False, "runs as it is written"
        return inside.result in inside.tensors, inside.effect

    def _run(self, tracer: _Tracer, signature: Signature, refusals: list[Untraceable]) -> None:
        recorder = tracer.recorder
        forward = recorder.forward(type(self.owner))
        if self.facts.class_item(type(self.owner), "__call__") is ABSENT or not hasattr(forward, "__get__"):
            raise Untraceable("its class has no forward")
        args, kwargs = signatures.build(signature, tracer.new_tensor, List)
        random_state = random.getstate()
        try:
            with _LOCK, _RecordEverything(tracer):
                run = recorder.bound(forward, "forward", self.owner, recorder.wrap(self.owner))
                with tracer.audit:
                    result = run(*args, **kwargs)
            tracer.audit.check()
            if refusals:
                raise refusals[0]
            recorder.check()
        except Untraceable:
            raise
        except Exception as error:
            tracer.audit.check()
            if refusals:
                raise refusals[0] from error
            raise Untraceable(f"tracing it raised {type(error).__name__}: {_one_line(error)}") from error
        finally:
            drew = random.getstate() != random_state
            random.setstate(random_state)
        if drew:
            raise Untraceable("its forward draws random numbers in Python")
        if tracer.guessed is not None and tracer.audit.compares_with_none:
            raise Untraceable(f"its forward compares with None, and what {tracer.guessed!r} returns is not known")
        if _outlives(result) or _twice(result):
            raise Untraceable("its forward returns a list that outlives the call, or one twice")
        self.graph, self.tensors = tracer.graph, set(tracer.types)
        output = self.graph.output(tracer.create_arg(result))
        self.drop_dropouts()
        self.result = output.args[0]

    def _freeze(self) -> None:
        """Lets go of the owner: the plan is held by it. Its dictionaries of tensors are kept: no tensor holds its
        module."""
        self.facts.done()
        self.paths = {key: self.descendants.get(m, "") for key, m in self.modules.items()}
        self.modules["0"], self._owned = None, (self.owner._parameters, self.owner._buffers)
        self.opaque = frozenset(self.opaque)  # type: ignore[assignment]  # nobody adds to it any more
        del self.owner, self.descendants, self._keys, self._homes, self._trials

    def tensors_of(self, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._owned if self.modules[key] is None else super().tensors_of(key)

    @property
    def leaves(self) -> list[nn.Module]:
        """The modules that the graph calls or takes tensors from, without the owner."""
        return [m for key, m in self.modules.items() if key != "0"]


def _outlives(value: object) -> bool:
    """True of a container of the user's own, which a caller may change, of one that holds such, and of what a graph
    cannot return as it is."""
    if isinstance(value, (Dict, List, Set, range, torch.Size, slice)):
        return True
    return (
        isinstance(value, (list, tuple))
        and any(map(_outlives, value))
        or isinstance(value, dict)
        and any(map(_outlives, value.values()))
    )


def _twice(value: object) -> bool:
    """True where one list or dictionary stands in a result twice."""
    seen: set[int] = set()

    def visit(value: object) -> bool:
        if isinstance(value, (list, dict)):
            if id(value) in seen:
                return True
            seen.add(id(value))
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return any([visit(part) for part in parts])

    return visit(value)


def _may_change(value: object) -> bool:
    """True of an argument that a callee may change, or that holds such a one."""
    return isinstance(value, (list, dict, set)) or isinstance(value, tuple) and any(map(_may_change, value))


def _is_of_metadata(node: fx.Node) -> bool:
    """True of sizes and the like, and of what is made of them: never None."""
    if node.op == "call_method":
        return node.target in METADATA_METHODS
    if node.target is getattr:
        return node.args[1] in METADATA_ATTRIBUTES
    return getattr(node.target, "__module__", "") == "_operator" or node.target is unpacked


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]
