"""csrc/python/guards.h: every kind of fact notices its change, and the end of it."""

import gc
import weakref

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
