"""csrc/python/guards.h: every kind of fact notices its change, and the end of it."""

import gc
import subprocess
import sys
import weakref
from collections import OrderedDict, defaultdict

import pytest

_C = pytest.importorskip("convext._C", reason="guards are part of the compiled library")


class Base:
    inherited = 1


class Thing(Base):
    __slots__ = ("slot",)
    named = 1


def function(a=1, *, b=2):
    return a + b


def outer():
    inside = 5

    def inner():
        return inside

    return inner, lambda value: exec("") or _set_cell(inner, value)


def _set_cell(inner, value):
    inner.__closure__[0].cell_contents = value


def everything():
    """(guards, [(change, its opposite)]): a fact of each kind, and what breaks it."""
    thing, hooks, value, other = Thing(), {}, object(), object()
    thing.slot, thing.attribute = value, 1
    facts = {"here": value, "number": 1.5, "pair": (1, ("a", 2.0)), "hooks": hooks, "full": {"a": 1}}
    whole, kinds, items, members = {"a": value, "b": 2}, {"w": 1.0, "b": None}, [value, 3], {1, 2}
    inner, set_inside = outer()
    code, defaults, by_name = function.__code__, function.__defaults__, function.__kwdefaults__

    guards = _C.Guards()
    for key in ("here", "number", "pair"):
        guards.item(facts, key, facts[key])
    guards.absent(facts, "missing")
    guards.item_type(kinds, "w", float)
    guards.contents(whole, tuple(whole), tuple(whole.values()))
    guards.kinds(kinds, tuple(kinds), tuple(map(type, kinds.values())))
    guards.filled(facts, "hooks", False)
    guards.filled(facts, "full", True)
    guards.elements(items, tuple(items))
    guards.members(members, frozenset(members))
    guards.type(thing, Thing)
    guards.dict_of(thing, thing.__dict__)
    guards.class_item(Thing, "inherited", 1)
    guards.class_absent(Thing, "nowhere")
    guards.function(function, code, (defaults, by_name))
    guards.cell(inner.__closure__[0], 5)
    guards.attribute(thing, "slot", value)

    def put(target, key, new):
        def change():
            target[key] = new

        return change

    own = thing.__dict__
    return guards, [
        (put(facts, "here", other), put(facts, "here", value)),
        (put(facts, "number", 2.5), put(facts, "number", 1.5)),
        (put(facts, "number", 1), put(facts, "number", 1.5)),
        (put(facts, "pair", (1, ("b", 2.0))), put(facts, "pair", (1, ("a", 2.0)))),
        (put(facts, "missing", None), lambda: facts.pop("missing")),
        (put(hooks, "h", 1), hooks.clear),
        (put(facts, "hooks", {"a": 1}), put(facts, "hooks", hooks)),
        (facts["full"].clear, put(facts["full"], "a", 1)),
        (put(whole, "a", other), put(whole, "a", value)),
        (put(whole, "c", 1), lambda: whole.pop("c")),
        (lambda: put(whole, "z", whole.pop("b"))(), lambda: put(whole, "b", whole.pop("z"))()),
        (put(kinds, "w", None), put(kinds, "w", 3.0)),
        (put(kinds, "more", 1), lambda: kinds.pop("more")),
        (items.reverse, items.reverse),
        (lambda: members.add(3), lambda: members.discard(3)),
        (lambda: setattr(thing, "__class__", Other), lambda: setattr(thing, "__class__", Thing)),
        (lambda: setattr(thing, "__dict__", dict(own)), lambda: setattr(thing, "__dict__", own)),
        (lambda: setattr(Base, "inherited", 2), lambda: setattr(Base, "inherited", 1)),
        (lambda: setattr(Thing, "inherited", 2), lambda: delattr(Thing, "inherited")),
        (lambda: setattr(Base, "nowhere", 2), lambda: delattr(Base, "nowhere")),
        (
            lambda: setattr(function, "__code__", (lambda a=1, *, b=2: a).__code__),
            lambda: setattr(function, "__code__", code),
        ),
        (lambda: setattr(function, "__defaults__", (2,)), lambda: setattr(function, "__defaults__", defaults)),
        (lambda: setattr(function, "__kwdefaults__", {"b": 3}), lambda: setattr(function, "__kwdefaults__", by_name)),
        (lambda: set_inside(6), lambda: set_inside(5)),
        (lambda: setattr(thing, "slot", other), lambda: setattr(thing, "slot", value)),
    ]


class Other(Base):
    __slots__ = ("slot",)


@pytest.mark.parametrize("index", range(25))
def test_each_kind_of_change_is_noticed_and_so_is_its_end(index):
    guards, changes = everything()
    assert len(changes) == 25 and guards.holds() and guards.broken() is None
    change, undo = changes[index]
    for _ in range(2):
        change()
        assert not guards.holds() and not guards.holds() and guards.broken() is not None
        undo()
        assert guards.holds() and guards.holds()


def test_zero_is_not_minus_zero_and_one_is_not_true():
    facts = {"zero": 0.0, "one": 1, "tuple": (0.0,)}
    guards = _C.Guards()
    for key, value in facts.items():
        guards.item(facts, key, value)
    for key, other in (("zero", -0.0), ("one", True), ("one", 1.0), ("tuple", (-0.0,))):
        former, facts[key] = facts[key], other
        assert not guards.holds()
        facts[key] = former
        assert guards.holds()


def test_changes_of_a_class_that_nobody_asked_for_do_not_matter():
    guards = _C.Guards()
    guards.class_item(Thing, "named", 1)
    assert guards.holds()
    Thing.unrelated = 1
    try:
        assert guards.holds()
    finally:
        del Thing.unrelated


class Plain:
    pass


def _store_global(space, value):
    exec(compile("def store(v):\n    global key\n    key = v", "here", "exec"), space)
    return lambda: space["store"](value)


def writers(space, thing):
    """Every way to write space["key"], the dictionary of `thing`, that CPython has: each tells of it by itself."""

    def attribute():
        thing.key = 2

    def delete_attribute():
        del thing.key

    def delete_item():
        del space["key"]

    def union():
        nonlocal space
        space |= {"key": 2}

    return {
        "attribute": attribute,
        "setattr": lambda: object.__setattr__(thing, "key", 2),
        "delattr": delete_attribute,
        "item": lambda: space.__setitem__("key", 2),
        "subscript": lambda: exec("space['key'] = 2", {"space": space}),
        "del": delete_item,
        "update": lambda: space.update(key=2),
        "union": union,
        "pop": lambda: space.pop("key"),
        "popitem": lambda: [space.popitem() for _ in list(space)],
        "clear": space.clear,
        "init": lambda: space.__init__(key=2),
        "globals": _store_global(space, 2),
    }


@pytest.mark.parametrize("writer", writers({}, Plain()))
@pytest.mark.parametrize("times", [1, 200], ids=["cold", "specialised"])
def test_every_way_to_write_a_dictionary_is_noticed(writer, times):
    """The interpreter has its own code for ways that were often gone. Before each look the value is the old one."""
    thing = Plain()
    thing.key = 1
    space = thing.__dict__
    write = writers(space, thing)[writer]
    guards = _C.Guards()
    guards.item(space, "key", 1)
    for _ in range(times):
        assert guards.holds() and guards.holds()
        write()
        assert not guards.holds() and not guards.holds()
        space["key"] = 1
    assert guards.holds()


@pytest.mark.parametrize(
    "write",
    [
        lambda d: d.update(h=1),
        lambda d: d.setdefault("h", 1),
        lambda d: d.__setitem__("h", 1),
        lambda d: d.__ior__({"h": 1}),
    ],
)
@pytest.mark.parametrize("kind", [dict, OrderedDict, defaultdict])
def test_a_dictionary_within_a_dictionary_is_noticed_when_it_is_filled_or_another(write, kind):
    hooks = kind()
    outer = {"hooks": hooks}
    guards = _C.Guards()
    guards.filled(outer, "hooks", False)
    for _ in range(3):
        assert guards.holds() and guards.holds()
        write(hooks)
        assert not guards.holds()
        hooks.popitem()
        assert guards.holds()
    for _ in range(10):  # the one before ends, and the next may lie at its address
        outer["hooks"] = hooks = kind()
        assert guards.holds() and guards.holds()
        write(hooks)
        assert not guards.holds()
        outer["hooks"] = hooks = kind()
        assert guards.holds()


def test_what_nobody_asked_for_changes_and_what_was_asked_for_is_still_noticed():
    """A loop at the top of a program writes into the dictionary in which a forward's globals are."""
    space, other, value = {"name": 1, "more": 2}, {"a": 1}, object()
    space["value"] = value
    guards = _C.Guards()
    guards.item(space, "name", 1)
    guards.item(other, "a", 1)
    guards.item(space, "value", value)
    guards.absent(space, "nowhere")
    assert guards.holds()
    for i in range(20):
        space["i"] = i
        space[f"new{i}"] = i
        assert guards.holds()
    space["i"], other["a"] = -1, 2
    assert not guards.holds() and not guards.holds()
    other["a"] = 1
    assert guards.holds()
    space["nowhere"] = None
    assert not guards.holds()
    del space["nowhere"]
    assert guards.holds()


def test_guards_of_one_dictionary_notice_each_for_itself_and_may_end():
    space = {"a": 1, "b": 1}
    first, second = _C.Guards(), _C.Guards()
    first.item(space, "a", 1)
    second.item(space, "b", 1)
    assert first.holds() and second.holds()
    space["a"] = 2
    assert second.holds() and not first.holds()
    space["b"] = 2
    assert not second.holds() and not first.holds()
    space.update(a=1, b=1)
    assert second.holds() and first.holds()
    del first
    space["b"] = 3
    assert not second.holds()
    second.item(space, "a", 1)
    space["b"] = 1
    assert second.holds()
    del second
    space["a"] = 5  # nobody listens


def test_the_owners_dictionary_may_be_another_one():
    owner = Plain()
    owner.key = 1
    guards = _C.Guards()
    guards.item(None, "key", 1)
    for _ in range(10):
        assert guards.holds(owner) and guards.holds(owner)
        owner.__dict__ = {"key": 2}
        assert not guards.holds(owner) and not guards.holds(owner)
        owner.__dict__ = {"key": 1}
        assert guards.holds(owner)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="dictionaries are watched from Python 3.12 on")
def test_guards_hold_and_break_where_python_has_no_watcher_left():
    program = """
import ctypes
import torch  # takes one
nothing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 3)(lambda *_: 0)
add = ctypes.pythonapi.PyDict_AddWatcher
taken = 0
try:
    while add(nothing) >= 0:
        taken += 1
except RuntimeError:
    pass
assert taken > 0
from convext import _C
space, guards = {"a": 1, "hooks": {}}, _C.Guards()
guards.item(space, "a", 1)
guards.filled(space, "hooks", False)
for _ in range(3):
    assert guards.holds() and guards.holds()
    space["a"] = 2
    assert not guards.holds()
    space["a"] = 1
    space["hooks"]["h"] = 1
    assert not guards.holds()
    space["hooks"].clear()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_facts_about_the_owner_are_about_whom_holds_is_given():
    a, b = Thing(), Thing()
    a.x, b.x = 1, 2
    guards = _C.Guards()
    guards.item(None, "x", 1)
    guards.type(None, Thing)
    assert guards.holds(a) and guards.holds(a) and not guards.holds(b) and not guards.holds()
    b.x = 1
    assert guards.holds(b) and guards.holds(a)
    a.x = 3
    assert guards.holds(b) and not guards.holds(a)


def test_guards_that_hold_each_other_are_collected():
    class Holder:
        pass

    holder = Holder()
    holder.guards = _C.Guards()
    holder.guards.item({}, "x", holder)
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "call",
    [
        lambda g: g.item("no dictionary", "key", 1),
        lambda g: g.function(len, None, (None, None)),
        lambda g: g.cell(3, 1),
        lambda g: g.elements((1,), (1,)),
    ],
)
def test_wrong_arguments_are_refused(call):
    with pytest.raises(TypeError):
        call(_C.Guards())
