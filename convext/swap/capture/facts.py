"""What a capture read, as facts that are checked before each call of the plan that stands on them (python/guards.h).

None stands for the owner of the plan, or for its dictionary: the owner holds the plan, so the plan must not hold the
owner.
"""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..refusal import Untraceable

if TYPE_CHECKING:
    from torch import nn

ABSENT = object()
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented))


class Facts:
    """The facts of one capture, each once. Raises Untraceable where two of them contradict each other: what was read
    changed while it was read."""

    def __init__(self, owner: nn.Module):
        self._owner: nn.Module | None = owner
        self._owned: dict[str, Any] | None = owner.__dict__
        # (name of the guard, id of its object, key) -> arguments of the guard
        self._facts: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.closed: str | None = None  # why nothing more may be read, in words

    def done(self) -> None:
        """Lets go of the owner: call once everything is read."""
        self._owner = self._owned = None

    def _add(self, guard: str, about: object, key: object, *arguments: Any) -> None:
        if self.closed is not None:
            raise Untraceable(self.closed)
        place = guard, id(about), key if isinstance(key, str) else id(key)
        subject = None if about is self._owner or about is self._owned else about
        known = self._facts.setdefault(place, (guard, subject, key, *arguments))
        if known[3:] != arguments and not all(a is b or a == b for a, b in zip(known[3:], arguments)):
            raise Untraceable("what its forward reads changed meanwhile")

    def item(self, dictionary: dict[Any, Any], key: object, value: object) -> None:
        """dictionary[key] is value."""
        self._add("item", dictionary, key, _Same(value))

    def absent(self, dictionary: dict[Any, Any], key: object) -> None:
        """There is no dictionary[key]."""
        self._add("absent", dictionary, key)

    def item_or_absent(self, dictionary: dict[Any, Any], key: object) -> Any:
        """dictionary.get(key) is what it is now; returns that, or ABSENT."""
        value = dictionary.get(key, ABSENT)
        if value is ABSENT:
            self.absent(dictionary, key)
        else:
            self.item(dictionary, key, value)
        return value

    def item_type(self, dictionary: dict[Any, Any], key: object, value: object) -> None:
        """The type of dictionary[key] is that of value."""
        self._add("item_type", dictionary, key, type(value))

    def contents(self, dictionary: dict[Any, Any]) -> None:
        """The dictionary holds just what it holds now, in this order."""
        self._add("contents", dictionary, "", _Same(tuple(dictionary)), _Same(tuple(dictionary.values())))

    def kinds(self, dictionary: dict[Any, Any]) -> None:
        """The dictionary holds just the keys that it holds now, and values of the types that they are of."""
        self._add("kinds", dictionary, "", _Same(tuple(dictionary)), _Same(tuple(map(type, dictionary.values()))))

    def filled(self, dictionary: dict[Any, Any], key: object) -> bool:
        """Whether dictionary[key], a dictionary itself, holds anything; returns that."""
        expected = bool(dictionary[key])
        self._add("filled", dictionary, key, expected)
        return expected

    def elements(self, values: Collection[Any]) -> None:
        """The list holds just what it holds now."""
        self._add("elements", values, "", _Same(tuple(values)))

    def members(self, values: Collection[Any]) -> None:
        """The set holds just what it holds now."""
        self._add("members", values, "", frozenset(values))

    def type(self, value: object) -> None:
        """The object is of the class that it is of now."""
        self._add("type", value, "", type(value))

    def dict_of(self, value: object) -> None:
        """The object's dictionary is the one that it has now."""
        if value is not self._owner:
            self._add("dict_of", value, "", _Same(value.__dict__))

    def class_item(self, kind: Any, name: str) -> Any:
        """What a class, or the first of its bases that has it, says of a name; returns that, or ABSENT."""
        for base in kind.__mro__:
            if name in base.__dict__:
                self._add("class_item", kind, name, _Same(base.__dict__[name]))
                return base.__dict__[name]
        self._add("class_absent", kind, name)
        return ABSENT

    def function(self, function: types.FunctionType) -> None:
        """A Python function's code and defaults are what they are now."""
        self._add(
            "function", function, "", _Same(function.__code__), _Same((function.__defaults__, function.__kwdefaults__))
        )

    def cell(self, cell: types.CellType) -> Any:
        """A closure's cell holds what it holds now; returns that."""
        value = cell.cell_contents
        self._add("cell", cell, "", _Same(value))
        return value

    def attribute(self, value: object, name: str, found: object) -> None:
        """getattr(value, name), of a slot, is `found`."""
        self._add("attribute", value, name, _Same(found))

    def include(self, others: Facts, owner: nn.Module) -> None:
        """All of the facts of a plan that `owner` holds."""
        for guard, subject, key, *arguments in others._facts.values():
            if subject is None:
                subject = owner if guard in ("type", "attribute") else owner.__dict__
            self._add(guard, subject, key, *arguments)
        self.dict_of(owner)

    def fill(self, guards: Any) -> Any:
        """Hands the facts to an empty _C.Guards."""
        for guard, subject, key, *arguments in self._facts.values():
            arguments = [a.value if isinstance(a, _Same) else a for a in arguments]
            if guard in ("item", "absent", "item_type", "filled", "class_item", "class_absent", "attribute"):
                arguments.insert(0, key)
            getattr(guards, guard)(subject, *arguments)
        return guards


class _Same:
    """A value that is compared by identity, its parts where it is a tuple."""

    __slots__ = ("value",)

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return _same(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, types.MethodType):  # made anew by each look
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    return type(a) in PLAIN and repr(a) == repr(b)
