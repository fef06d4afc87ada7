"""What user code sees in the place of its own objects while its forward is captured, so that nothing is read unseen.

Every frame of user code runs over globals that note each look-up (`Globals`), closure cells and defaults included. A
value that such a frame gets hold of is one of these, and whatever comes out of it is again:

    plain        numbers, strings, dtypes, enum members: they cannot change, as they are
    tensors      proxies of the trace; a plan reads them anew in each call, from where they were found
    modules      `ModuleStandIn`: attributes are looked up as Python would, each look-up noted; a call is a node
    functions    made anew over such globals; those of torch and the standard library as they are
    classes      `ClassStandIn`; those of torch and the standard library as they are
    containers   copies that refuse to be changed, all that is in them noted
    objects      `ObjectStandIn`, as modules; what is not of a class written in Python can only be compared

What a look-up finds is a fact (facts.py). The audit (audit.py) sees to it that no other user code runs, and that C and
library functions are called only where they are known to do nothing but compute.
"""

from __future__ import annotations

import builtins
import enum
import functools
import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ..method import ForwardMethod
from ..refusal import Untraceable
from .facts import ABSENT, PLAIN, Facts
from .pure import BUILTINS, is_library, is_of_layers, is_stdlib, why_impure

_PLAIN: frozenset[Any] = frozenset(
    (*PLAIN, torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size, slice, range)
)
_C_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    operator.attrgetter,
    operator.itemgetter,
    operator.methodcaller,
    torch._ops.OpOverloadPacket,
    torch._ops.OpOverload,
)
_FACTORIES = frozenset(
    (torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.full, torch.zeros, torch.ones, torch.empty)
    + (torch.arange, torch.linspace, torch.eye, torch.rand, torch.randn)
)
Place = tuple[Any, Any]  # where a value was found: (dictionary or list, key)
_GETATTRIBUTE: Any = object.__getattribute__
_MODULE_GETATTR = nn.Module.__getattr__


class Globals(dict[str, Any]):
    """A module's globals as functions that run in a capture see them: each look-up becomes a fact. Only the names by
    which the interpreter and the audit know a module are really in here."""

    __slots__ = ("recorder", "real")

    def __init__(self, recorder: Recorder, real: dict[str, Any]):
        super().__init__(__name__=real.get("__name__", ""), __builtins__=recorder.builtins)
        self.recorder, self.real = recorder, real

    def __getitem__(self, name: str) -> Any:
        recorder = self.recorder
        if recorder.over:
            raise RuntimeError(f"a function that was made while a forward was captured outlived that ({name})")
        value = recorder.facts.item_or_absent(self.real, name)
        if value is not ABSENT:
            return recorder.wrap(value, (self.real, name))
        value = recorder.facts.item_or_absent(builtins.__dict__, name)
        if value is ABSENT:
            raise KeyError(name)
        if name not in BUILTINS and not (isinstance(value, type) or value in (None, NotImplemented, Ellipsis)):
            raise Untraceable(f"its forward uses {name}()")
        return recorder.wrap(value)


class StandIn:
    """An object of the user's while a forward is captured. `__class__` is that of the object, but for user code."""

    __slots__ = ("_recorder", "_real")

    def __init__(self, recorder: Recorder, real: object):
        _set(self, "_recorder", recorder)
        _set(self, "_real", real)

    def __getattribute__(self, name: str) -> Any:
        recorder, real = _recorder(self), _real(self)
        if name == "__class__" and is_library(sys._getframe(1).f_globals.get("__name__")):
            return type(real)
        return recorder.load(real, name, self)

    def __setattr__(self, name: str, value: object) -> None:
        raise Untraceable(f"its forward sets the attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"its forward deletes the attribute {name!r}")

    def __eq__(self, other: object) -> Any:
        return _recorder(self).compared(self, "__eq__", other, self is other)

    def __ne__(self, other: object) -> Any:
        return _recorder(self).compared(self, "__ne__", other, self is not other)

    def __hash__(self) -> int:
        kind: Any = type(_real(self))
        if _recorder(self).facts.class_item(kind, "__hash__") is not object.__hash__ and kind is not nn.Module:
            if kind.__hash__ is not nn.Module.__hash__:
                raise Untraceable(f"its forward uses a {kind.__name__} as a key")
        return id(_real(self))

    def __bool__(self) -> bool:
        recorder, real = _recorder(self), _real(self)
        for name in ("__bool__", "__len__"):
            if recorder.facts.class_item(type(real), name) is not ABSENT:
                return bool(recorder.special(self, name))
        return True


_set = object.__setattr__
_recorder: Callable[[StandIn], Recorder] = StandIn.__dict__["_recorder"].__get__
_real: Callable[[StandIn], Any] = StandIn.__dict__["_real"].__get__


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *args: Any) -> Any:
        return _recorder(self).special(self, name, *args)

    method.__name__ = name
    return method


def _refused(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *args: Any) -> Any:
        raise Untraceable(f"its forward asks for {name} of a {type(_real(self)).__name__}")

    method.__name__ = name
    return method


for _name in "len iter getitem contains next reversed int float index neg pos abs invert lt le gt ge".split():
    setattr(StandIn, f"__{_name}__", _forwarded(f"__{_name}__"))
for _name in "repr str format dir reduce reduce_ex setitem delitem sizeof".split():
    setattr(StandIn, f"__{_name}__", _refused(f"__{_name}__"))


class CallableStandIn(StandIn):
    """That of an object that can be called."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _recorder(self).special(self, "__call__", *args, **kwargs)


class ModuleStandIn(StandIn):
    """That of an nn.Module: a call is a node of the graph, or what the trace makes of it."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _recorder(self).tracer.call_module(_real(self), args, kwargs)


class NamespaceStandIn(StandIn):
    """That of a Python module."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        recorder, real = _recorder(self), _real(self)
        value = recorder.facts.item_or_absent(real.__dict__, name)
        if value is not ABSENT:
            return recorder.wrap(value, (real.__dict__, name))
        getter = recorder.facts.item_or_absent(real.__dict__, "__getattr__")
        if getter is ABSENT and type(real) is types.ModuleType:
            raise AttributeError(f"module {real.__name__!r} has no attribute {name!r}")
        value = getattr(real, name) if is_library(real.__name__) else None
        if not isinstance(value, (types.ModuleType, torch._ops.OpOverloadPacket)):
            raise Untraceable(f"its forward asks {real.__name__} for {name!r}, which that makes when asked")
        return recorder.wrap(value)


class _Factory:
    """That of a function of torch's that makes tensors of numbers, dtypes and devices, and so refuses the proxies of
    those before a trace hears of the call."""

    __slots__ = "_recorder", "_real"

    def __init__(self, recorder: Recorder, real: Callable[..., Any]):
        self._recorder, self._real = recorder, real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return self._recorder.tracer.create_proxy("call_function", self._real, args, kwargs)
        return self._real(*args, **kwargs)


class ClassStandIn(type):
    """Metaclass of what stands for a class of the user's."""

    def __new__(meta, recorder: Recorder, real: type) -> ClassStandIn:
        made = super().__new__(meta, real.__name__, (), {})
        type.__setattr__(made, "_recorder", recorder)
        type.__setattr__(made, "_real", real)
        return made

    def __init__(cls, recorder: Recorder, real: type):
        super().__init__(real.__name__, (), {})

    def __getattribute__(cls, name: str) -> Any:
        recorder, real = _class_part(cls, "_recorder"), _class_part(cls, "_real")
        if name == "__class__" and is_library(sys._getframe(1).f_globals.get("__name__")):
            return ClassStandIn
        return recorder.load_of_class(real, name, cls)

    def __setattr__(cls, name: str, value: object) -> None:
        raise Untraceable(f"its forward sets the attribute {name!r} of a class")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable(f"its forward makes a {_class_part(cls, '_real').__name__}")

    def __instancecheck__(cls, value: object) -> bool:
        recorder: Recorder = _class_part(cls, "_recorder")
        return recorder.isinstance(value, cls)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(_real_class(other), _class_part(cls, "_real"))

    def __eq__(cls, other: object) -> bool:
        return _class_part(cls, "_real") is _real_class(other)

    def __hash__(cls) -> int:
        return hash(_class_part(cls, "_real"))


_class_part: Callable[[type, str], Any] = type.__getattribute__


def _real_class(kind: Any) -> Any:
    return _class_part(kind, "_real") if type(kind) is ClassStandIn else kind


def _cannot_change(self: Any, *args: Any, **kwargs: Any) -> None:
    raise Untraceable(f"its forward changes a {type(self).__mro__[1].__name__} that outlives the call")


def _constant(kind: type, *mutators: str) -> Any:
    return type(
        kind.__name__.capitalize(),
        (kind,),
        {"__class__": property(lambda self: kind), **{name: _cannot_change for name in mutators}},
    )


List = _constant(
    list, *"append extend insert pop remove clear sort reverse __setitem__ __delitem__ __iadd__ __imul__".split()
)
Dict = _constant(dict, *"__setitem__ __delitem__ pop popitem clear update setdefault __ior__".split())
Set = _constant(
    set, *"add discard remove pop clear update __ior__ __iand__ __isub__ __ixor__ __iter__ __repr__".split()
)


class Super:
    """super() of a stand-in."""

    def __init__(self, recorder: Recorder, start: type, subject: StandIn):
        self.recorder, self.start, self.subject = recorder, start, subject

    def __getattribute__(self, name: str) -> Any:
        recorder, start, subject = (object.__getattribute__(self, n) for n in ("recorder", "start", "subject"))
        real = _real(subject)
        kind = type(real)
        recorder.know(real)
        mro = kind.__mro__
        recorder.facts.attribute(kind, "__mro__", mro)
        for base in mro[mro.index(start) + 1 :]:
            recorder.facts.class_item(base, name)
            if name in base.__dict__:
                return recorder.bound(base.__dict__[name], name, real, subject)
        raise AttributeError(f"'super' object has no attribute {name!r}")


def _is_written_in_python(kind: type) -> bool:
    return bool(kind.__flags__ & 1 << 9) or kind is types.SimpleNamespace


def _alike(copy: Any, content: Any) -> bool:
    """Whether a copy holds the very objects that it held."""
    if isinstance(copy, set):
        return bool(set.copy(copy) == content)
    now = list(dict.items(copy)) if isinstance(copy, dict) else list(list.__iter__(copy))
    if len(now) != len(content):
        return False
    pairs = zip(now, content)
    if isinstance(copy, dict):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    return all(a is b for a, b in pairs)


class Tracer(Protocol):
    """What a recorder asks of its tracer (trace.py)."""

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy: ...
    def tensor(self, tensor: torch.Tensor, place: Place | None) -> fx.Proxy: ...
    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy: ...
    def type_of(self, proxy: fx.Proxy) -> type | None: ...


class Recorder:
    """The stand-ins of one capture. `over` once it has ended."""

    def __init__(self, tracer: Tracer, facts: Facts):
        self.tracer, self.facts, self.over = tracer, facts, False
        self._made: dict[int, tuple[Any, Any]] = {}  # id of an object -> (the object, what stands for it)
        self._copies: list[tuple[Any, Any]] = []  # (copy of a container, what was in it)
        for function, own in (
            (builtins.super, self.super),
            (builtins.callable, self.callable),
            (builtins.isinstance, self.isinstance),
            (builtins.issubclass, self.issubclass),
        ):
            self._made[id(function)] = function, own
        self.builtins = {**builtins.__dict__, "__import__": self.import_}

    def end(self) -> None:
        """Lets go of everything: what stands for something holds the recorder, and that must not hold the user's."""
        self.over = True
        self.tracer = self.builtins = None  # type: ignore[assignment]  # nobody asks for them any more
        self._made.clear()
        self._copies.clear()

    def check(self) -> None:
        """Raises Untraceable where a container that stands for one of the user's was changed, by whatever way."""
        for copy, content in self._copies:
            if not _alike(copy, content):
                raise Untraceable(f"its forward changes a {type(copy).__name__.lower()} that outlives the call")

    # Values.

    def wrap(self, value: Any, place: Place | None = None) -> Any:
        """What user code sees in the place of a value. `place`: (dictionary or list, key) where it was found."""
        kind = type(value)
        if kind in _PLAIN or isinstance(value, (fx.Proxy, StandIn, ClassStandIn)):
            return value
        if isinstance(value, torch.Tensor):
            return self.tracer.tensor(value, place)
        known = self._made.get(id(value))
        if known is None:
            known = self._made[id(value)] = value, self._make(value, kind)
        return known[1]

    def _make(self, value: Any, kind: type) -> Any:
        if isinstance(value, nn.Module):
            return ModuleStandIn(self, value)
        if kind is types.FunctionType:
            return self.function(value)
        if kind is types.MethodType:
            return types.MethodType(self.wrap(value.__func__), self.wrap(value.__self__))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return NamespaceStandIn(self, value)
        if isinstance(value, enum.Enum):
            self._constant_members(value)
            self._note_class(kind)
            return value
        if isinstance(value, _C_FUNCTIONS):
            return self._c_function(value)
        if kind is functools.partial:
            for name in ("func", "args", "keywords"):
                self.facts.attribute(value, name, getattr(value, name))
            if value.__dict__:
                raise Untraceable("its forward uses a partial with attributes")
            return functools.partial(self.wrap(value.func), *self.wrap(value.args), **self.wrap(value.keywords))
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            return self._container(value, kind)
        return (CallableStandIn if callable(value) else StandIn)(self, value)

    def _constant_members(self, member: enum.Enum) -> None:
        """An enum member: its value cannot be another, what is in it may be."""
        for value in member.__dict__.values():
            if not isinstance(value, (*_PLAIN, type, enum.Enum)) and not self._is_constant(value):
                raise Untraceable(f"its forward uses {member}, whose value may change in place")
        self.facts.contents(member.__dict__)

    def _is_constant(self, value: object) -> bool:
        return (
            type(value) in _PLAIN
            or isinstance(value, (enum.Enum, type, types.BuiltinFunctionType))
            or isinstance(value, (tuple, frozenset))
            and all(map(self._is_constant, value))
        )

    def _c_function(self, value: Any) -> Any:
        why = why_impure(value)
        if why is not None:
            raise Untraceable(f"its forward {why}")
        owner = getattr(value, "__self__", None)
        if (
            owner is None
            or isinstance(owner, (types.ModuleType, type))
            or type(owner) in _PLAIN
            or type(owner).__module__ in ("torch._C", "torch")
        ):
            return _Factory(self, value) if value in _FACTORIES else value
        raise Untraceable(f"its forward uses {value.__name__}() of a {type(owner).__name__}")

    def _container(self, value: Any, kind: type) -> Any:
        wrap, facts = self.wrap, self.facts
        if isinstance(value, tuple):
            if kind is tuple:
                return tuple(wrap(item) for item in value)
            if (
                hasattr(kind, "_fields")
                and kind.__new__.__module__.startswith("namedtuple_")
                and not hasattr(value, "__dict__")
            ):
                self._note_class(kind)
                return tuple.__new__(kind, [wrap(item) for item in value])
        elif kind is frozenset and all(map(self._is_constant, value)):
            return value
        elif kind is set and all(isinstance(item, (str, enum.Enum, type)) for item in value):
            facts.members(value)
            return self._copy(Set(value))
        elif kind is list:
            facts.elements(value)
            return self._copy(List([wrap(item, (value, i)) for i, item in enumerate(value)]))
        elif kind is dict:
            if not all(self._is_constant(key) for key in value):
                raise Untraceable("its forward uses a dict by keys that may change")
            tensors = value and all(item is None or isinstance(item, torch.Tensor) for item in value.values())
            (facts.kinds if tensors else facts.contents)(value)
            return self._copy(Dict({key: wrap(item, (value, key)) for key, item in value.items()}))
        raise Untraceable(f"its forward uses a {kind.__name__}, into which a capture does not look")

    def _copy(self, copy: Any) -> Any:
        content = set.copy(copy) if isinstance(copy, set) else list(copy.items() if isinstance(copy, dict) else copy)
        self._copies.append((copy, content))
        return copy

    def _note_class(self, kind: type) -> None:
        """Notes all that a class of the user's says itself."""
        for name in kind.__dict__:
            self.facts.class_item(kind, name)

    # Functions and classes.

    def function(self, function: Any) -> Any:
        """A function as user code of the capture calls it."""
        real = function.__globals__
        if isinstance(real, Globals) or is_library(real.get("__name__")):
            return function
        known = self._made.get(id(function))
        if known is not None:
            return known[1]
        self.facts.function(function)
        self.facts.attribute(function, "__name__", function.__name__)
        cells = function.__closure__
        made = types.FunctionType(
            function.__code__,
            self._globals(real),
            function.__name__,
            None,
            cells and tuple(types.CellType() for _ in cells),
        )
        self._made[id(function)] = function, made  # before its cells: it may be in one of them
        for cell, new in zip(cells or (), made.__closure__ or ()):
            try:
                new.cell_contents = self.wrap(self.facts.cell(cell))
            except ValueError:
                raise Untraceable(f"its forward calls {function.__name__}() before all that it uses is there") from None
        if function.__defaults__:
            made.__defaults__ = tuple(self.wrap(value) for value in function.__defaults__)
        self.facts.contents(function.__dict__)
        if function.__dict__:
            made.__dict__.update({name: self.wrap(value) for name, value in function.__dict__.items()})
        if function.__kwdefaults__:
            self.facts.contents(function.__kwdefaults__)
            made.__kwdefaults__ = {name: self.wrap(value) for name, value in function.__kwdefaults__.items()}
        return made

    def forward(self, kind: type) -> Any:
        """A class's forward: user code, or that of torch's layers, but no wrapper around one."""
        found = self.facts.class_item(kind, "forward")
        module, name = getattr(found, "__globals__", {}).get("__name__", ""), getattr(found, "__name__", "")
        if is_library(module) and not is_of_layers(module, name):
            raise Untraceable(f"its forward calls {module}.{name}")
        return found

    def _globals(self, real: dict[str, Any]) -> Any:
        known = self._made.get(id(real))
        if known is None:
            known = self._made[id(real)] = real, Globals(self, real)
        return known[1]

    def _class(self, kind: type) -> Any:
        if kind is type:
            raise Untraceable("its forward looks at type(...) of a value")
        if is_library(kind.__module__) and not issubclass(kind, nn.Module) or issubclass(kind, BaseException):
            return kind
        if issubclass(kind, enum.Enum):
            for member in kind.__members__.values():
                self._constant_members(member)
            self.facts.contents(kind._member_map_)
            self._note_class(kind)
            return kind
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            self._note_class(kind)
            return kind
        return ClassStandIn(self, kind)

    def import_(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
    ) -> Any:
        """`import` inside a function: of what is imported already."""
        real = globals.real if isinstance(globals, Globals) else globals
        if level == 0 and name not in sys.modules:
            raise Untraceable(f"its forward imports {name}")
        if level == 0:
            self.facts.item(sys.modules, name, sys.modules[name])
        return self.wrap(builtins.__import__(name, real, None, fromlist, level))

    # Attributes.

    def know(self, value: object) -> Any:
        """Notes the class of an object and which dictionary it has; returns that, or None."""
        self.facts.type(value)
        if not hasattr(value, "__dict__"):
            return None
        self.facts.dict_of(value)
        return value.__dict__

    def load(self, value: object, name: str, stand_in: StandIn) -> Any:
        """Attribute `name` of an object, looked up as object.__getattribute__ does."""
        kind = type(value)
        if name == "__class__":
            self.facts.type(value)
            return self.wrap(kind)
        if not _is_written_in_python(kind):
            raise Untraceable(f"its forward uses {name!r} of a {kind.__name__}, into which a capture does not look")
        if self.facts.class_item(kind, "__getattribute__") is not _GETATTRIBUTE:
            raise Untraceable(f"its forward uses a {kind.__name__}, which looks up attributes by itself")
        attributes, found = self.know(value), self.facts.class_item(kind, name)
        if isinstance(found, property):
            if found.fget is None:
                raise AttributeError(name)
            try:
                return self.function(found.fget)(stand_in)
            except AttributeError:
                return self._otherwise(attributes, name, value, stand_in)
        if isinstance(found, types.MemberDescriptorType):
            slot = getattr(value, name, ABSENT)
            if slot is ABSENT:
                raise Untraceable(f"its forward asks for {name!r} of a {kind.__name__}, which has none yet")
            self.facts.attribute(value, name, slot)
            return self.wrap(slot)
        if found is not ABSENT and hasattr(type(found), "__set__"):
            raise Untraceable(f"its forward uses {name!r} of a {kind.__name__}, a {type(found).__name__}")
        if attributes is not None:
            own = attributes.get(name, ABSENT)
            if own is not ABSENT:
                return self._own(attributes, name, own, kind, stand_in)
            self.facts.absent(attributes, name)
        if found is not ABSENT:
            return self.bound(found, name, value, stand_in)
        return self._otherwise(attributes, name, value, stand_in)

    def _otherwise(self, attributes: Any, name: str, value: object, stand_in: StandIn) -> Any:
        """What __getattr__ returns for an attribute that an object does not have."""
        kind = type(value)
        getter = self.facts.class_item(kind, "__getattr__")
        if getter is _MODULE_GETATTR:
            return self._of_module(attributes, name, kind)
        if getter is ABSENT:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        return self.bound(getter, "__getattr__", value, stand_in)(name)

    def _own(self, attributes: Any, name: str, own: object, kind: type, stand_in: StandIn) -> Any:
        """What an object's dictionary says of a name."""
        if isinstance(own, ForwardMethod):
            self.facts.item(attributes, name, own)
            return self.bound(self.facts.class_item(kind, "forward"), name, None, stand_in)
        if isinstance(own, torch.Tensor):
            self.facts.item_type(attributes, name, own)
        else:
            self.facts.item(attributes, name, own)
        return self.wrap(own, (attributes, name))

    def _of_module(self, attributes: Any, name: str, kind: type) -> Any:
        """What nn.Module.__getattr__ returns."""
        for part in ("_parameters", "_buffers", "_modules"):
            values = self.facts.item_or_absent(attributes, part)
            if values is ABSENT:
                continue
            if part == "_modules":
                value = self.facts.item_or_absent(values, name)
            else:
                self.facts.kinds(values)
                value = values.get(name, ABSENT)
            if value is not ABSENT:
                return self.wrap(value, (values, name))
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    def bound(self, found: Any, name: str, value: object, stand_in: StandIn) -> Any:
        """What a class says of a name, as an attribute of an object of that class."""
        if found is _MODULE_GETATTR:
            real = _real(stand_in)
            return lambda wanted: self._of_module(self.know(real), wanted, type(real))
        if isinstance(found, types.FunctionType):
            if is_stdlib(found.__globals__.get("__name__")):
                raise Untraceable(f"its forward uses {name!r} of a {type(_real(stand_in)).__name__}")
            return types.MethodType(self.function(found), stand_in)
        if isinstance(found, property) and found.fget is not None:
            return self.function(found.fget)(stand_in)
        if isinstance(found, staticmethod):
            return self.wrap(found.__func__)
        if isinstance(found, classmethod) and isinstance(found.__func__, types.FunctionType):
            return types.MethodType(self.function(found.__func__), self.wrap(type(_real(stand_in))))
        if hasattr(type(found), "__get__") and not isinstance(found, (type, types.BuiltinFunctionType)):
            raise Untraceable(
                f"its forward uses {name!r} of a {type(_real(stand_in)).__name__}, a {type(found).__name__}"
            )
        return self.wrap(found)

    def load_of_class(self, kind: type, name: str, stand_in: type) -> Any:
        """Attribute `name` of a class of the user's."""
        if name in ("__name__", "__qualname__", "__module__"):
            self.facts.attribute(kind, name, getattr(kind, name))
            return getattr(kind, name)
        if (
            type(kind) is not type
            and self.facts.class_item(type(kind), name) is not ABSENT
            or issubclass(kind, torch.autograd.Function)
        ):
            raise Untraceable(f"its forward uses {name!r} of the class {kind.__name__}")
        found = self.facts.class_item(kind, name)
        if found is ABSENT:
            raise AttributeError(f"type object {kind.__name__!r} has no attribute {name!r}")
        if isinstance(found, types.FunctionType):
            return self.function(found)
        if isinstance(found, staticmethod):
            return self.wrap(found.__func__)
        if isinstance(found, classmethod) and isinstance(found.__func__, types.FunctionType):
            return types.MethodType(self.function(found.__func__), stand_in)
        if hasattr(type(found), "__get__") and not isinstance(found, (type, types.BuiltinFunctionType)):
            raise Untraceable(f"its forward uses {name!r} of the class {kind.__name__}")
        return self.wrap(found)

    def special(self, stand_in: StandIn, name: str, *args: Any, **kwargs: Any) -> Any:
        """A special method of an object, which Python looks for in its class alone."""
        real = _real(stand_in)
        kind = type(real)
        if not _is_written_in_python(kind):
            raise Untraceable(f"its forward uses a {kind.__name__}, into which a capture does not look")
        self.know(real)
        found = self.facts.class_item(kind, name)
        if not isinstance(found, types.FunctionType) or is_stdlib(found.__globals__.get("__name__")):
            raise Untraceable(f"its forward asks for {name} of a {kind.__name__}")
        return self.function(found)(stand_in, *args, **kwargs)

    def compared(self, stand_in: StandIn, name: str, other: object, identical: bool) -> Any:
        """stand_in == other, or !=."""
        kind = type(_real(stand_in))
        self.facts.type(_real(stand_in))
        if name == "__ne__" and self.facts.class_item(kind, "__ne__") is object.__ne__:
            equal = self.compared(stand_in, "__eq__", other, stand_in is other)
            return not equal if isinstance(equal, bool) else equal
        if self.facts.class_item(kind, name) is getattr(object, name):
            return identical
        return self.special(stand_in, name, other)

    # Builtins that would look behind a stand-in.

    def isinstance(self, value: Any, kinds: Any) -> bool:
        """isinstance() for user code."""
        if type(kinds) is tuple:
            return any([self.isinstance(value, kind) for kind in kinds])
        if type(kinds) is types.UnionType:
            return self.isinstance(value, kinds.__args__)
        if not issubclass(type(kinds), type):
            raise TypeError("isinstance() arg 2 must be a type, a tuple of types, or a union")
        kind = _real_class(kinds)
        meta: Any = type(kind)
        if issubclass(type(value), fx.Proxy):
            return self._is_tensor_of(value, kind)
        if type(value) in (List, Dict, Set):
            return issubclass(type(value).__mro__[1], kind)
        if meta.__instancecheck__ is not type.__instancecheck__ and issubclass(type(value), StandIn):
            raise Untraceable(f"its forward asks {kind.__name__}, which answers by itself, whether something is one")
        if issubclass(type(value), StandIn):
            self.facts.type(_real(value))
            return issubclass(type(_real(value)), kind)
        return isinstance(_real_class(value), kind)

    def _is_tensor_of(self, value: fx.Proxy, kind: Any) -> bool:
        found = self.tracer.type_of(value)
        if (
            found is None
            or kind not in (torch.Tensor, object)
            and (
                issubclass(type(kind), type(torch.FloatTensor))
                or type(kind) is not type
                or issubclass(kind, torch.Tensor)
                and value.node.op == "placeholder"
            )
        ):
            raise Untraceable("its forward asks for the type of a value that only running it can tell")
        return issubclass(found, kind)

    def issubclass(self, kind: Any, kinds: Any) -> bool:
        """issubclass() for user code."""
        if type(kinds) is tuple:
            return any([self.issubclass(kind, one) for one in kinds])
        return issubclass(_real_class(kind), _real_class(kinds))

    def callable(self, value: Any) -> bool:
        """callable() for user code."""
        if issubclass(type(value), fx.Proxy):
            raise Untraceable("its forward asks whether a value can be called")
        if issubclass(type(value), StandIn):
            self.facts.class_item(type(_real(value)), "__call__")
            return callable(_real(value))
        return callable(value)

    def super(self, start: Any = None, subject: Any = None) -> Super:
        """super() for user code, with or without arguments."""
        if start is None:
            frame = sys._getframe(1)
            start, subject = frame.f_locals.get("__class__"), frame.f_locals.get(frame.f_code.co_varnames[0])
        if type(start) is ClassStandIn:
            start = _class_part(start, "_real")
        if not isinstance(subject, StandIn) or not isinstance(start, type) or start not in type(_real(subject)).__mro__:
            raise Untraceable("its forward uses super() in a way that a capture cannot follow")
        return Super(self, start, subject)
