"""What was found by trying to break a swapped model: each test once showed a difference from the plain one.

A plain and a swapped twin go through the same steps, without gradients and with them, and what they give is compared.
Where it can be told, what is right is written down as well: a result is so many times `Net.feats` of the input.
"""

import builtins
import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import gc
import importlib
import inspect
import io
import operator
import sys
import time
import types
import warnings
import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import X, agree, check, made, outcomes, times

import convext

pytestmark = pytest.mark.smoke
CL = torch.channels_last
MISSING = object()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def feats(self, x):
        return self.conv2(F.relu(self.bn(self.conv(x))))

    def forward(self, x):
        return self.feats(x)


def net(forward, held=None):
    """Makes a Net of a class of its own with this forward, which may use `self.held`."""

    def make():
        model = type("Net", (Net,), {"forward": forward})()
        model.held = held() if held else None
        if isinstance(model.held, Child):
            model.held.around.append(model)
        return model

    return make


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.c(x)


def during(change):
    """Steps: two calls before a change, two while it holds, one after it."""

    def steps(model):
        yield from times(2)(model)
        with change(model):
            yield from times(2)(model)
        yield model(X)

    return steps


@contextlib.contextmanager
def changed(owner, name, value):
    """`owner.name` is `value` inside, and whatever it was after."""
    in_slot = hasattr(inspect.getattr_static(type(owner), name, None), "__set__")
    former = getattr(owner, name, MISSING) if in_slot else vars(owner).get(name, MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if former is MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, former)


def rows(table):
    """Parameters from {name: what a test takes}."""
    return [pytest.param(*row, id=name) for name, row in table.items()]


# Calls that change what is read next


class Child(nn.Module):
    """Runs as it is written, and calls `act(model around it, number of the call)`."""

    def __init__(self, act=lambda model, call: None):
        super().__init__()
        self.act, self.calls, self.around = act, 0, []

    def forward(self, x):
        self.calls += 1
        self.act(self.around[0], self.calls)
        return x * 1.0


class LastInput(nn.Module):
    """Keeps what it was given, a size of it, and a tensor that it replaces at every call."""

    h = torch.zeros(1)

    def forward(self, x):
        self.size, self.kept, self.h = int(x.shape[0]), x * 2, self.h + 1
        return x * 1.0


class MoreEachTime(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return [x] * self.calls


@pytest.mark.parametrize(
    "forward, held, factors",
    rows(
        {
            "its count": (lambda m, x: m.held(m.feats(x)) * m.held.calls, Child, (1, 2, 3, 4)),
            "a list of the parent": (
                lambda m, x: m.held(m.feats(x)) * len(m.seen),
                lambda: Child(lambda model, call: model.seen.append(call)),
                (1, 2, 3, 4),
            ),
            "a configuration that both have": (
                lambda m, x: m.held(m.feats(x)) * (-1 if m.config.deep else 1),
                lambda: Child(lambda model, call: setattr(model.config, "deep", call % 2 == 0)),
                (1, -1, 1, -1),
            ),
            "the parent's mode": (
                lambda m, x: m.held(m.feats(x)) * (2 if m.training else 1),
                lambda: Child(lambda model, call: model.train(call % 2 == 0).bn.eval()),
                (1, 2, 1, 2),
            ),
            "a number of its own": (lambda m, x: m.held(m.feats(x)) / m.held.size, LastInput, (0.5, 0.5)),
            "a tensor of its own": (lambda m, x: m.held(m.feats(x)) + getattr(m.held, "kept", 0.0), LastInput, (3, 3)),
            "the list it returns": (lambda m, x: m.held(m.feats(x))[-1] * m.held.calls, MoreEachTime, (1, 2, 3)),
        }
    ),
)
def test_a_child_sets_what_the_parent_reads_after_it(forward, held, factors):
    def steps(model):
        model.seen, model.config = [], types.SimpleNamespace(deep=False)
        yield from times(len(factors))(model)

    check(net(forward, held), steps, factors)


def test_a_child_sees_another_batch_than_when_the_plan_was_made():
    make = net(lambda m, x: m.held(m.feats(x)) / m.held.size, LastInput)
    check(make, lambda m: (m(x) for x in (X, X, X[:1], X)))


def test_a_child_replaces_its_state_between_two_reads():
    def steps(model):
        for call in range(3):
            before, y, after = model(X)
            assert (float(before), float(after)) == (call, call + 1)
            yield y

    check(net(lambda m, x: (m.held.h, m.held(m.feats(x)), m.held.h), LastInput), steps, (1, 1, 1))


def test_a_child_replaces_the_layer_after_it():
    def steps(model):
        model.a, model.b = nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 1).double()
        model.head = model.a
        yield from times(4)(model)

    check(
        net(
            lambda m, x: F.relu(m.head(m.held(m.feats(x)))),
            lambda: Child(lambda model, call: setattr(model, "head", model.a if call % 2 else model.b)),
        ),
        steps,
        differs=True,
    )


class Chain(Net):
    """Two chains, between them a child."""

    def __init__(self, act=None):
        super().__init__()
        self.bn2, self.act2, self.child = nn.BatchNorm2d(4), nn.ReLU(), Child(act) if act else nn.Identity()
        if act:
            self.child.around.append(self)
        nn.init.uniform_(self.bn2.running_mean)

    def forward(self, x):
        y = self.child(self.conv(x))
        return self.act2(self.bn2(self.conv2(y)))


CHANGES = {
    "new weight": lambda m: setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight.detach() * 2)),
    "stride": lambda m: setattr(m.conv2, "stride", (2, 2)),
    "batch norm trains": lambda m: m.bn2.train(),
    "eps": lambda m: setattr(m.bn2, "eps", 10.0),
    "hook": lambda m: m.bn2.register_forward_hook(lambda layer, args, y: y * 3),
    "pre-hook": lambda m: m.conv2.register_forward_pre_hook(lambda layer, args: (args[0] * 2,)),
    "forward of a layer": lambda m: setattr(m.conv2, "forward", lambda x: x * 3),
    "class of an activation": lambda m: setattr(m.act2, "__class__", nn.Tanh),
    "new batch norm": lambda m: setattr(m, "bn2", nn.BatchNorm2d(4, eps=10.0).double().eval()),
    "new activation": lambda m: setattr(m, "act2", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_child_changes_the_chain_after_it(change):
    check(lambda: Chain(lambda model, call: CHANGES[change](model) if call == 3 else None), times(4), differs=True)


@pytest.mark.parametrize("change", CHANGES)
def test_a_hook_changes_layers_that_the_same_forward_uses_later(change):
    def steps(model):
        calls = iter(range(4))  # the plan has been made, with this hook in place, when the third comes
        model.conv.register_forward_hook(lambda *args: (CHANGES[change](model) if next(calls) == 2 else None) and None)
        yield from times(4)(model)

    check(Chain, steps, differs=True)


class HalvesTheWeight(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weights = [weight]

    def forward(self):
        with torch.no_grad():
            self.weights[0].mul_(0.5)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu(m.bn((m.conv(x), m.halve())[0])),
        lambda m, x: F.relu(m.bn((m.conv(x), m.alias.mul_(0.5))[0])),
    ],
    ids=["by a child", "by an alias"],
)
def test_a_weight_is_written_between_its_convolution_and_the_batch_norm_after_it(forward):
    def steps(model):
        model.halve, model.alias = HalvesTheWeight(model.conv.weight), model.conv.weight.data
        yield from times(3)(model)

    check(net(forward), steps, modes=(False,), differs=True)


class Fills(nn.Module):
    def __init__(self, put):
        super().__init__()
        self.conv, self.put = nn.Conv2d(4, 4, 1), put

    def forward(self, x, seen):
        x = F.relu(self.conv(x))
        self.put(seen, x)
        return x


def gives_both_children_one(self, x):
    seen = self.kind()
    y = self.held[1](self.held[0](self.feats(x), seen), seen)
    return y + len(seen), seen


@pytest.mark.parametrize("kind, put", [(list, list.append), (dict, lambda seen, y: seen.update({len(seen): y}))])
def test_a_child_fills_what_the_parent_gives_it(kind, put):
    def steps(model):
        model.kind = kind
        for _ in range(2):
            y, seen = model(X)
            assert len(seen) == 2
            agree(y, seen[1] + 2)
            yield y, seen

    check(net(gives_both_children_one, lambda: nn.ModuleList([Fills(put), Fills(put)])), steps)


class SelfChanging(nn.Sequential):
    def __init__(self):
        child = Child(lambda model, call: operator.setitem(model, 2, nn.Tanh()) if call == 2 else None)
        super().__init__(nn.Conv2d(3, 4, 3), child, nn.ReLU(), nn.Conv2d(4, 4, 1))
        child.around.append(self)


def test_a_sequential_is_changed_by_its_own_child():
    check(SelfChanging, times(4), differs=True)


class Half(nn.Module):
    def forward(self, x):
        return x * 0.5


@pytest.mark.parametrize("layer", ["held", "conv2"])
def test_a_hook_collects_what_the_forward_reads_after(layer):
    def steps(model):
        model.taken = {}
        model.get_submodule(layer).register_forward_hook(lambda layer, args, y: model.taken.update(kept=y * 2))
        yield from times(3)(model)
        model.taken.clear()
        yield model(X)

    check(net(lambda m, x: m.held(m.feats(x)) * 0 + m.taken["kept"], Half), steps, (1 if layer == "held" else 2,) * 4)


def test_a_hook_that_comes_later_sets_what_the_forward_reads_after_it():
    def flag(model):
        model.hot = False
        yield model(X)
        hook = model.held.register_forward_hook(lambda layer, args, y: setattr(model, "hot", bool(y.mean() > -1e9)))
        yield model(X)
        model.hot = False
        yield model(X)
        hook.remove()
        model.hot = False
        yield model(X)

    def parameter(model):
        model.gain = nn.Parameter(torch.ones(1))
        yield model(X)
        model.held.register_forward_hook(
            lambda layer, args, y: setattr(model, "gain", nn.Parameter(model.gain.detach() + 1))
        )
        yield from times(2)(model)

    check(net(lambda m, x: m.held(m.feats(x)) * (-1 if m.hot else 1), Half), flag, (0.5, -0.5, -0.5, 0.5))
    check(net(lambda m, x: m.held(m.feats(x) * m.gain) * m.gain, Half), parameter, (0.5, 1, 3))


# What proxies show


kind_of = type
LOW = {torch.float16, torch.float64}
Output = collections.namedtuple("Output", "logits aux")


class ReturnsNone(nn.Module):
    def forward(self, x):
        return None


def sum_in_place_is_the_same_tensor(self, x):
    y = self.feats(x)
    z = y
    z *= 3
    return y * 2 if z is y else y


@pytest.mark.parametrize(
    "forward, held, factor",
    rows(
        {
            "whether it can be called": (lambda m, x: m.feats(x() if callable(x) else x), None, 1),
            "its class": (lambda m, x: m.feats(x) * (2 if x.__class__ is torch.Tensor else 1), None, 2),
            "its type by another name": (lambda m, x: m.feats(x) * (2 if kind_of(x) is torch.Tensor else 1), None, 2),
            "a layer's type by another name": (
                lambda m, x: m.feats(x) * (2 if kind_of(m.bn) is nn.BatchNorm2d else 1),
                None,
                2,
            ),
            "isinstance as a default": (
                lambda m, x, _is=isinstance: m.feats(x) * (2 if _is(x, torch.Tensor) else 1),
                None,
                2,
            ),
            "a legacy tensor type": (
                lambda m, x: m.feats(x) * (2 if isinstance(x, torch.DoubleTensor) else 1),
                None,
                2,
            ),
            "whether contiguous is itself": (lambda m, x: m.feats(x) * (2 if x.contiguous() is x else 1), None, 2),
            "a sum in place": (sum_in_place_is_the_same_tensor, None, 6),
            "dropout in eval": (lambda m, x: (y := m.feats(x)) * (2 if m.held(y) is y else 1), nn.Dropout, 2),
            "dtype is": (lambda m, x: m.feats(x) * (2 if x.dtype is torch.float64 else 1), None, 2),
            "dtype in a set": (lambda m, x: m.feats(x) * (2 if x.dtype in LOW else 1), None, 2),
            "dtype of a dictionary": (
                lambda m, x: m.feats(x) * m.held.get(x.dtype, 1.0),
                lambda: {torch.float64: 2.0},
                2,
            ),
            "text of a dtype": (
                lambda m, x: m.feats(x) * m.held.get("{}".format(x.dtype), 1.0),  # noqa: UP032 (it is about format)
                lambda: {"torch.float64": 2.0},
                2,
            ),
            "text of a device": (lambda m, x: m.feats(x) * (2 if str(x.device) == "cpu" else 1), None, 2),
            "size in a dictionary": (lambda m, x: m.feats(x) * (3 if x.shape[2] in m.held else 1), lambda: {8: 1}, 3),
            "size that is not there": (lambda m, x: m.feats(x) * (3 if x.shape[2] in m.held else 1), lambda: {9: 1}, 1),
            "keys": (lambda m, x: m.feats(x["image"] if hasattr(x, "keys") else x), None, 1),
            "names of a proxy": (
                lambda m, x: m.feats(x) * (2 if hasattr(x, "node") or hasattr(x, "tracer") else 1),
                None,
                1,
            ),
            "whether a result is None": (
                lambda m, x: m.feats(x) * (2 if operator.is_(m.held(x), None) else 1),
                ReturnsNone,
                2,
            ),
        }
    ),
)
def test_a_forward_asks_what_a_value_is(forward, held, factor):
    check(net(forward, held), times(2), (factor, factor))


class Returns(Block):
    """A child that returns what `make` makes of its value."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(self.c(x) * 0 + x)


class Holder:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y.logits if hasattr(y := m.held(m.feats(x)), "logits") else y) * 2,
        lambda m, x: getattr(y := m.held(m.feats(x)), "logits", y) * 2,
    ],
    ids=["hasattr", "getattr"],
)
@pytest.mark.parametrize("result", [Holder, lambda y: Output(y, y * 2), lambda y: y], ids=["object", "tuple", "tensor"])
def test_a_forward_asks_for_an_attribute_of_what_a_child_returned(forward, result):
    check(net(forward, lambda: Returns(result)), times(2), (2, 2))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: getattr(m.held, f"{x.shape[-1]}", m.conv2)(m.feats(x)),
        lambda m, x: (m.held[key] if (key := str(x.shape[-1])) in m.held else m.conv2)(m.feats(x)),
    ],
    ids=["attribute", "key"],
)
def test_a_head_is_chosen_by_the_text_of_a_size(forward):
    check(
        net(forward, lambda: nn.ModuleDict({"8": nn.Conv2d(4, 4, 1)})),
        lambda m: (m(x) for x in (X, X, X[..., :6], X)),
        differs=True,
    )


@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_asks_for_a_node_of_autograd(grad):
    check(
        net(lambda m, x: (y := m.feats(x)) * (1 if y.grad_fn is None else 2)), times(2), (1 + grad,) * 2, modes=(grad,)
    )


@pytest.mark.parametrize(
    "forward, change, factors",
    rows(
        {
            "the gradient of a weight": (
                lambda m, x: m.feats(x) * (1 if m.conv.weight.grad is None else 2),
                lambda m: changed(m.conv.weight, "grad", torch.ones_like(m.conv.weight)),
                (1, 1, 2, 2, 1),
            ),
            "whether a weight has one": (
                lambda m, x: m.feats(x) * (2 if m.conv.weight.requires_grad is True else 1),
                lambda m: changed(m.conv.weight, "requires_grad", False),
                (2, 2, 1, 1, 2),
            ),
            "an attribute of a weight": (
                lambda m, x: m.feats(x) * getattr(m.conv.weight, "gain", 1.0),
                lambda m: changed(m.conv.weight, "gain", 3.0),
                (1, 1, 3, 3, 1),
            ),
            "an attribute of the input": (
                lambda m, x: m.feats(x) * getattr(x, "gain", 1.0),
                lambda m: changed(X, "gain", 3.0),
                (1, 1, 3, 3, 1),
            ),
            "hasattr of the input": (
                lambda m, x: m.feats(x) * (x.gain if hasattr(x, "gain") else 1.0),
                lambda m: changed(X, "gain", 3.0),
                (1, 1, 3, 3, 1),
            ),
            "the __dict__ of the input": (
                lambda m, x: m.feats(x) * (3 if "gain" in x.__dict__ else 1),
                lambda m: changed(X, "gain", 3.0),
                (1, 1, 3, 3, 1),
            ),
            "a method that torch.Tensor gets": (
                lambda m, x: m.feats(x) * (2 if hasattr(x, "frobnicate") else 1),
                lambda m: changed(torch.Tensor, "frobnicate", lambda t: t),
                (1, 1, 2, 2, 1),
            ),
        }
    ),
)
def test_what_a_tensor_has_changes(forward, change, factors):
    check(net(forward), during(change), factors)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.feats(x) * (2 if m.bn.weight is m.bn.bias else 1),
        lambda m, x: m.feats(x) + sum(p.sum() for p in m.parameters()),
    ],
    ids=["is", "parameters"],
)
def test_parameters_are_tied_later(forward):
    def steps(model):
        yield from times(2)(model)
        model.bn.bias = model.bn.weight
        yield from times(2)(model)

    check(net(forward), steps, differs=True)


def test_an_argument_is_a_buffer_or_a_parameter():
    def steps(model):
        model.register_buffer("ref", X.clone())
        for x in (X, X, model.ref, nn.Parameter(X.clone()), X):
            yield model(x)

    check(net(lambda m, x: m.feats(x) * (2 if x is m.ref else 1)), steps, (1, 1, 2, 1, 1))
    check(net(lambda m, x: m.feats(x) * (2 if isinstance(x, nn.Parameter) else 1)), steps, (1, 1, 1, 2, 1))


def unpacks_two(self, x):
    b, c = x.shape
    return self.feats(x) * c


def unpacks_three(self, x):
    c, h, w = x.shape  # written for one image: a batch is an error
    return self.conv(x) * h


def test_a_shape_is_unpacked_into_another_number_of_names():
    check(net(unpacks_two), times(1), raises=ValueError)
    check(net(unpacks_three), lambda m: (m(x) for x in (X[0], X[0], X)), raises=ValueError)
    check(net(unpacks_three), times(2, X[0]))


# Effects that an audit must see


@pytest.mark.parametrize(
    "forward, held, between, seen",
    rows(
        {
            "the slot of a dict": (
                lambda m, x: (dict.__setitem__(m.held, "n", 1), m.feats(x))[1],
                lambda: {"n": 0},
                lambda held: held.update(n=5),
                {"n": 1},
            ),
            "the slot of a list": (
                lambda m, x: (list.__iadd__(m.held, [1]), m.feats(x))[1],
                list,
                lambda held: held.clear(),
                [1],
            ),
            "difference_update of a set": (
                lambda m, x: (m.held.difference_update(["a"]), m.feats(x) * len(m.held))[1],
                lambda: {"a", "b"},
                lambda held: held.add("a"),
                {"b"},
            ),
        }
    ),
)
def test_a_container_of_the_model_is_changed_by_its_forward(forward, held, between, seen):
    def steps(model):
        for _ in range(3):
            yield model(X)
            assert model.held == seen
            between(model.held)

    check(net(forward, held), steps, (1, 1, 1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (list(map(print, ["called"])), m.feats(x))[1],
        lambda m, x: (m.held(), m.feats(x))[1],
    ],
    ids=["map", "partial"],
)
def test_a_forward_prints_at_every_call(forward):
    def steps(model):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            yield from times(2)(model)
        assert out.getvalue() == "called\n" * 2

    check(net(forward, lambda: functools.partial(print, "called")), steps, (1, 1))


def test_a_clock_in_a_partial_goes_on():
    def steps(model):
        (_, a), (_, b), (_, c) = (model(X) for _ in range(3))
        assert a < b < c
        yield model(X)[0]

    make = net(lambda m, x: (m.feats(x), m.held()), lambda: functools.partial(time.perf_counter))
    check(make, steps, (1,))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.feats(x) * (2 if m.held() else 1), id="partial"),
        pytest.param(
            lambda m, x: m.feats(x) * (2 if operator.call(torch.is_grad_enabled) else 1),
            id="operator.call",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="operator.call is of Python 3.11"),
        ),
    ],
)
def test_a_forward_asks_for_the_mode_of_autograd(forward, grad):
    outside, inside = 1 + grad, 2 - grad
    check(
        net(forward, lambda: functools.partial(torch.is_grad_enabled)),
        during(lambda m: torch.set_grad_enabled(not grad)),
        (outside, outside, inside, inside, outside),
        modes=(grad,),
    )


post = functools.singledispatch(F.relu)
post.register(torch.Tensor, lambda x: x * 3)
FROZEN = weakref.WeakSet()


def test_singledispatch_takes_the_function_of_a_tensor():
    check(net(lambda m, x: post(m.feats(x))), times(2), (3, 3))


def test_a_layer_is_put_into_a_weak_set():
    @contextlib.contextmanager
    def frozen(model):
        FROZEN.add(model.bn)
        yield
        FROZEN.discard(model.bn)

    check(net(lambda m, x: m.feats(x) * (2 if m.bn in FROZEN else 1)), during(frozen), (1, 1, 2, 2, 1))


# Stand-ins for what a model holds


class Special(Block):
    pass


@dataclasses.dataclass(frozen=True)
class Config:
    gain: float = 2.0


class Asked:
    """Its property fails, and then __getattr__ answers."""

    @property
    def gain(self):
        return self._missing

    def __getattr__(self, name):
        if name == "gain":
            return 3.0
        raise AttributeError(name)


def five_times(function):
    @functools.wraps(function)
    def inner(x):
        return function(x) * 5

    return inner


@five_times
def doubled(x):
    return x * 2


def activation_with_a_gain():
    function = functools.partial(F.leaky_relu, negative_slope=1.0)
    function.gain = 3.0
    return function


KINDS = {Block}
GAINS = {Block: 3.0}


@pytest.mark.parametrize(
    "forward, held, factor",
    rows(
        {
            "its class is in a set": (lambda m, x: m.feats(x) * (2 if m.held.__class__ in KINDS else 1), Block, 2),
            "its class is a key": (lambda m, x: m.feats(x) * GAINS.get(m.held.__class__, 1.0), Block, 3),
            "its class is a subclass": (
                lambda m, x: m.feats(x) * (2 if issubclass(m.held.__class__, Block) else 1),
                Special,
                2,
            ),
            "class of a list": (lambda m, x: m.feats(x) * (2 if m.held.__class__ is list else 1), lambda: [1], 2),
            "isinstance of OrderedDict": (
                lambda m, x: m.feats(x) * (2 if isinstance(m.held, collections.OrderedDict) else 1),
                lambda: collections.OrderedDict(a=2.0),
                2,
            ),
            "equality of OrderedDicts": (
                lambda m, x: m.feats(x) * (2 if m.held.a == m.held.b else 1),
                lambda: types.SimpleNamespace(a=collections.OrderedDict(x=1, y=2), b=collections.OrderedDict(y=2, x=1)),
                1,
            ),
            "text of a set": (lambda m, x: m.feats(x) * (2 if str(m.held) == "{1}" else 1), lambda: {1}, 2),
            "equal dataclasses are one key": (
                lambda m, x: m.feats(x) * len({m.held.a, m.held.b}),
                lambda: types.SimpleNamespace(a=Config(), b=Config()),
                1,
            ),
            "is_dataclass": (
                lambda m, x: m.feats(x) * (m.held.gain if dataclasses.is_dataclass(m.held) else 1),
                Config,
                2,
            ),
            "what a decorator wraps": (
                lambda m, x: getattr(m.held, "__wrapped__", m.held)(m.feats(x)),
                lambda: doubled,
                2,
            ),
            "attribute of a partial": (
                lambda m, x: m.held(m.feats(x)) * getattr(m.held, "gain", 1.0),
                activation_with_a_gain,
                3,
            ),
            "property that fails": (lambda m, x: m.feats(x) * getattr(m.held, "gain", 1.0), Asked, 3),
        }
    ),
)
def test_a_forward_asks_what_it_holds(forward, held, factor):
    check(net(forward, held), times(2), (factor, factor))


def applies_in_order(self, x):
    y = self.feats(x)
    for i in self.held:
        y = y * i + 1
    return y


def applies_items_in_order(self, x):
    y = self.feats(x)
    for _, layer in self.held.items():
        y = layer(y * 2) if isinstance(layer, nn.Module) else y * layer + 1
    return y


def late_set():
    """{1, 32}, in the order of a set that was larger once."""
    held = set(range(64))
    for i in set(range(64)) - {1, 32}:
        held.discard(i)
    return held


@pytest.mark.parametrize(
    "forward, held",
    [
        (applies_items_in_order, lambda: collections.OrderedDict(a=2.0, b=3.0)),
        (applies_items_in_order, lambda: collections.OrderedDict(a=nn.Tanh(), b=nn.Hardtanh(-0.1, 0.1))),
    ],
)
def test_an_ordered_dict_is_reordered(forward, held):
    def steps(model):
        yield from times(2)(model)
        model.held.move_to_end("a")
        yield model(X)

    check(net(forward, held), steps, differs=True)


def test_a_set_has_the_order_it_has():
    assert list(late_set()) != list({1, 32})
    check(net(applies_in_order, late_set), times(2))


def test_a_member_of_a_set_becomes_an_equal_one_of_another_type():
    def forward(self, x):
        y = self.feats(x).round().long()
        for value in self.held:
            y = y * value
        return y

    def steps(model):
        yield model(X)
        model.held.clear()
        model.held.add(1.0)
        y = model(X)
        assert y.dtype == torch.get_default_dtype()
        yield y

    check(net(forward, lambda: {1}), steps)


@pytest.mark.parametrize("value", [range(3), torch.Size([2, 3])], ids=["range", "Size"])
def test_a_forward_returns_a_sequence_that_is_no_list(value):
    def steps(model):
        for _ in range(2):
            y, found = model(X)
            assert found == value and type(found) is type(value)
            yield y

    check(net(lambda m, x: (m.feats(x), m.held), lambda: value), steps, (1, 1))


def test_a_forward_returns_one_list_twice():
    def steps(model):
        for _ in range(2):
            a, b = model(X)
            assert a is b
            yield a[0]

    check(net(lambda m, x: (values := [m.feats(x)], values)), steps, (1, 1))


# Facts that were missing


class Level(enum.Enum):
    LOW = 1


class Pair(collections.namedtuple("Pair", "a b")):
    gain = 2.0


class Slotted:
    __slots__ = ("gain",)


class Open:
    pass


def function(x):
    return x


def pair_with_a_gain():
    pair = Pair(1, 2)
    pair.gain = 3.0
    return pair


Level.gain, function.gain = 2.0, 3.0


def isinstance_that_lies(value, kind, former=isinstance):
    return former(value, kind) or kind is nn.ReLU and former(value, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "forward, held, change, factors",
    rows(
        {
            "a flag of torch.backends": (
                lambda m, x: m.feats(x) * (2 if torch.backends.cudnn.benchmark else 1),
                None,
                lambda m: torch.backends.cudnn.flags(enabled=True, benchmark=True),
                (1, 2),
            ),
            "isinstance itself": (
                lambda m, x: m.feats(x) * (2 if isinstance(m.bn, nn.ReLU) else 1),
                None,
                lambda m: changed(builtins, "isinstance", isinstance_that_lies),
                (1, 2),
            ),
            "a class that can be called": (
                lambda m, x: m.feats(x) * (2 if callable(m.held) else 1),
                Open,
                lambda m: changed(Open, "__call__", lambda self: 1),
                (1, 2),
            ),
            "the name of a class": (
                lambda m, x: m.feats(x) * (2 if m.__class__.__name__ == "Net" else 1),
                None,
                lambda m: changed(type(m), "__name__", "Other"),
                (2, 1),
            ),
            "the name of a function": (
                lambda m, x: m.feats(x) * (2 if function.__name__ == "function" else 1),
                None,
                lambda m: changed(function, "__name__", "other"),
                (2, 1),
            ),
            "an attribute of a function": (
                lambda m, x: m.held(m.feats(x)) * getattr(m.held, "gain", 1.0),
                lambda: function,
                lambda m: changed(function, "gain", 4.0),
                (3, 4),
            ),
            "an attribute of an enum": (
                lambda m, x: m.feats(x) * Level.gain,
                None,
                lambda m: changed(Level, "gain", 5.0),
                (2, 5),
            ),
            "what a member has of its enum": (
                lambda m, x: m.feats(x) * m.held.gain,
                lambda: Level.LOW,
                lambda m: changed(Level, "gain", 5.0),
                (2, 5),
            ),
            "what a tuple has of its class": (
                lambda m, x: m.feats(x) * m.held.gain,
                lambda: Pair(1, 2),
                lambda m: changed(Pair, "gain", 5.0),
                (2, 5),
            ),
            "an attribute of a tuple": (
                lambda m, x: m.feats(x) * getattr(m.held, "gain", 1.0),
                pair_with_a_gain,
                lambda m: changed(m.held, "gain", 5.0),
                (3, 5),
            ),
            "a slot without a value": (
                lambda m, x: m.feats(x) * getattr(m.held, "gain", 1.0),
                Slotted,
                lambda m: changed(m.held, "gain", 3.0),
                (1, 3),
            ),
            "an attribute of a class of torch": (
                lambda m, x: m.feats(x) * getattr(nn.Conv2d, "gain", 1.0),
                None,
                lambda m: changed(nn.Conv2d, "gain", 3.0),
                (1, 3),
            ),
        }
    ),
)
def test_a_forward_reads_what_changes(forward, held, change, factors):
    before, inside = factors
    check(net(forward, held), during(change), (before, before, inside, inside, before))


@pytest.mark.parametrize(
    "forward, held, change",
    rows(
        {
            "F of the activations": (
                lambda m, x: m.held(m.bn(m.conv(x))),
                nn.ReLU,
                lambda m: changed(
                    nn.modules.activation, "F", types.SimpleNamespace(relu=lambda x, inplace=False: x * 5)
                ),
            ),
            "eps, a property of the class": (
                lambda m, x: F.relu(m.bn(m.conv(x))),
                None,
                lambda m: changed(nn.BatchNorm2d, "eps", property(lambda self: 10.0)),
            ),
            "_call_impl of a class": (
                lambda m, x: m.held(m.feats(x)),
                Block,
                lambda m: changed(Block, "_call_impl", lambda self, *args, **kwargs: args[0] * 5),
            ),
            "_call_impl of a module": (
                lambda m, x: m.held(m.feats(x)),
                Block,
                lambda m: changed(m.held, "_call_impl", lambda *args, **kwargs: args[0] * 5),
            ),
            "_call_impl of a Sequential": (
                lambda m, x: m.held(m.feats(x)),
                lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
                lambda m: changed(m.held, "_call_impl", lambda *args, **kwargs: args[0] * 5),
            ),
            "torch.Tensor.__add__": (
                lambda m, x: m.conv2(y := m.conv(x)) + y,
                None,
                lambda m: changed(torch.Tensor, "__add__", lambda self, other: self * 5),
            ),
            "torch.Tensor.relu": (
                lambda m, x: m.conv(x).relu(),
                None,
                lambda m: changed(torch.Tensor, "relu", lambda self: self * 5),
            ),
        }
    ),
)
def test_what_layers_are_made_of_is_patched(forward, held, change):
    check(net(forward, held), during(change), differs=True)


def test_a_function_of_torchvision_is_patched():
    ops = pytest.importorskip("torchvision.ops")
    module = importlib.import_module("torchvision.ops.stochastic_depth")
    check(
        net(lambda m, x: m.held(m.bn(m.conv(x))) + m.conv(x), lambda: ops.StochasticDepth(0.1, "row")),
        during(lambda m: changed(module, "stochastic_depth", lambda x, p, mode, training: x * 5)),
        differs=True,
    )


def test_a_class_is_registered_as_a_sequence_later():
    def steps(model):
        yield from times(2)(model)
        Sequence.register(type(model.held))  # its registry is weak: the class dies with the model
        yield from times(2)(model)

    check(
        net(lambda m, x: m.feats(x) * (2 if isinstance(m.held, Sequence) else 1), lambda: type("Late", (), {})()),
        steps,
        (1, 1, 2, 2),
    )


class Twice(Net):
    def forward(self, x):
        return self.feats(x) * 2


class SevenTimes(Net):
    def forward(self, x):
        return self.feats(x) * 7


class Derived(Twice):
    def forward(self, x):
        return super().forward(x)


def test_the_bases_of_a_class_change_what_super_finds():
    check(Derived, during(lambda m: changed(Derived, "__bases__", (SevenTimes, Twice))), (2, 2, 7, 7, 2))


def test_a_partial_gets_another_state():
    def steps(model):
        yield from times(2)(model)
        model.held.__setstate__((torch.mul, (), {"other": 5.0}, {}))
        yield from times(2)(model)

    check(net(lambda m, x: m.held(m.feats(x)), lambda: functools.partial(torch.mul, other=2.0)), steps, (2, 2, 5, 5))


def test_a_module_of_python_is_replaced(monkeypatch):
    def forward(self, x):
        import found_by_breaking_config

        return self.feats(x) * found_by_breaking_config.gain

    def configuration(gain):
        module = types.ModuleType("found_by_breaking_config")
        module.gain = gain
        monkeypatch.setitem(sys.modules, "found_by_breaking_config", module)

    def steps(model):
        for gain in (2.0, 5.0, 2.0):
            configuration(gain)
            yield from times(2)(model)

    check(net(forward), steps, (2, 2, 5, 5, 2, 2))


# Strides, modes, dtypes, errors and memory


def test_a_replaced_layer_and_a_model_are_freed():
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model = convext.swap(made(Net))
            model(X), model(X)
            weight = weakref.ref(model.conv2.weight)
            model.conv2 = nn.Conv2d(4, 4, 3, padding=1).double()
            model(X), model(X)
            gc.collect()
            assert weight() is None


def test_a_model_dies_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        model = convext.swap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        dead, weight = weakref.ref(model), weakref.ref(model[0].weight)
        del model
        assert dead() is None and weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_an_eps_of_zero_is_an_error_as_in_eager(grad, train):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0)).double().train(train)
    with torch.set_grad_enabled(grad):
        results = [outcomes(model, times(2)) for model in (plain, convext.swap(copy.deepcopy(plain)))]
    agree(*reversed(results))


@pytest.mark.parametrize(
    "x",
    [X, X.bfloat16(), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 2, 2)],
    ids=["float64", "bfloat16", "channels", "size"],
)
def test_errors_have_the_class_and_text_of_eager(x):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()).eval()
    swapped = convext.swap(copy.deepcopy(plain))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, found = outcomes(plain, times(1, x)), outcomes(swapped, times(1, x))
        assert isinstance(expected[0], RuntimeError)
        agree(found, expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "kernel, groups, alone", [(1, 1, False), (3, 8, False), (3, 8, True)], ids=["1x1", "depthwise", "depthwise alone"]
)
def test_only_a_1x1_or_depthwise_weight_is_channels_last(kernel, groups, alone, grad):
    layer = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups).to(memory_format=CL)
    plain = nn.Sequential(*[] if alone else [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()], layer)
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6)
    with torch.set_grad_enabled(grad):
        assert swapped(x).stride() == plain(x).stride()
        assert torch.relu(swapped(x) + x).stride() == torch.relu(plain(x) + x).stride()


@pytest.mark.parametrize("grad", [False, True])
def test_one_channel_of_a_contiguous_input_is_contiguous(grad):
    model = convext.swap(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)).eval())
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            y = model(torch.randn(2, 3, 8, 8))
            assert y.stride() == (64, 64, 8, 1)
            assert torch.cat([y, y], 1).view(-1).shape == (256,)


class Pool(nn.Sequential):
    def forward(self, x):
        size = x.shape[-2:]
        for layer in self:
            x = layer(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Aspp(nn.Module):
    def __init__(self, c=8, k=16):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU())
        self.p = Pool(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(2 * k, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU())

    def forward(self, x):
        return self.project(torch.cat([self.a(x), self.p(x)], 1))


@pytest.mark.parametrize("weights", [torch.contiguous_format, CL], ids=["KCRS", "KRSC"])
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 8, 12, 12), torch.randn(2, 8, 12, 12).to(memory_format=CL), torch.randn(2, 8, 1, 1)],
    ids=["NCHW", "NHWC", "one pixel"],
)
def test_strides_of_a_pooled_branch_and_of_what_it_is_joined_with(weights, x):
    for train in (True, False):
        plain = Aspp().to(memory_format=weights).train(train)
        swapped = convext.swap(copy.deepcopy(plain))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert swapped(x).stride() == plain(x).stride()
                assert swapped.p(x).stride() == plain.p(x).stride()


def test_gradients_of_a_contiguous_input_can_be_viewed():
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(16, 8, 3), nn.ReLU()
    plain = nn.Sequential(*layers).double()
    penalties, seen = [], []
    for model in (plain, convext.swap(copy.deepcopy(plain))):
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        weights = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        x.register_hook(lambda t: seen.append(t.view(2, -1)) and None)
        model(x).sum().backward()
        penalty = ((g.view(2, -1).norm(2, dim=1) - 1) ** 2).mean()
        penalty.backward()
        penalties.append([penalty, torch.cat([t.view(-1) for t in weights]), model[0].weight.grad, seen[-1]])
        assert g.stride() == (192, 64, 8, 1) and weights[2].stride() == (144, 9, 3, 1)
    agree(*reversed(penalties))


@pytest.mark.parametrize("dtype", [torch.cfloat, torch.cdouble])
def test_complex_convolutions(dtype):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=dtype), nn.Conv2d(4, 4, 3, dtype=dtype))
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, 8, 8, dtype=dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(swapped(x), plain(x)) and swapped(x).dtype == dtype


@pytest.mark.parametrize("weights", ["cpu", "meta"])
@pytest.mark.parametrize("grad", [False, True])
def test_meta_tensors_give_shapes(weights, grad):
    model = convext.swap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval())
    with torch.set_grad_enabled(grad):
        model(torch.randn(2, 3, 8, 8))
        model.to(weights)
        for _ in range(2):
            y = model(torch.randn(2, 3, 8, 8, device="meta"))
            assert y.device.type == "meta" and y.shape == (2, 8, 4, 4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("decorated", [False, True])
def test_enable_grad_inside_inference_mode(decorated, train):
    make = net(torch.enable_grad()(Net.forward) if decorated else Net.forward)

    def steps(model):
        model.train(train)
        with torch.inference_mode(), torch.enable_grad():
            yield model(X)
        with torch.inference_mode():
            yield model(X)

    check(make, steps, None if train else (1, 1))


def test_enable_grad_inside_inference_mode_of_the_functional_form():
    w, b = torch.randn(8, 3, 3, 3, dtype=X.dtype, requires_grad=True), torch.randn(8, dtype=X.dtype, requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        for x in (X, X.clone()):
            agree(convext.conv2d(x, w, b), F.conv2d(x, w, b))


def test_a_report_names_three_dimensional_layers():
    model = convext.swap(nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.ConvTranspose3d(8, 3, 3)))
    with torch.no_grad():
        model(torch.randn(1, 3, 5, 5, 5))
    first, last = convext.report(model)
    assert (first.module, first.became, first.fused, first.reason) == ("0", "convext", "relu", "")
    assert (last.module, last.became, last.fused) == ("2", "convext", "")
    assert last.reason.startswith("no batch norm or elementwise operation behind it")


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(3, 8, 3, padding=1)],
        lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()],
        lambda: [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)],
        lambda: [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU())],
    ],
)
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last])
def test_empty_batches_have_the_strides_of_pytorch(layers, weights, images):
    plain = nn.Sequential(*layers()).eval().to(memory_format=weights)
    swapped = convext.swap(copy.deepcopy(plain))
    empty = torch.empty(0, 3, 8, 8).to(memory_format=images)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for x in (empty, torch.randn(2, 3, 8, 8), empty):
                y, expected = swapped(x), plain(x)
                assert y.stride() == expected.stride() and y.shape == expected.shape


@pytest.mark.parametrize("train", [False, True])
def test_inference_tensors_are_not_saved_for_backward_in_another_format(train):
    """The copy would be an ordinary tensor, which autograd does not refuse."""

    class Inference(nn.Conv2d):
        forward = torch.inference_mode()(nn.Conv2d.forward)

    part = net(lambda m, x: m.conv2(torch.relu(m.bn(m.conv(x)) * 1.0)))

    def steps(model):
        yield model.train(train)(X)

    check(lambda: nn.Sequential(Inference(3, 3, 1), part()), steps, raises=RuntimeError, modes=(True,))
    check(lambda: nn.Sequential(Inference(3, 3, 1), part()), steps, modes=(False,))


def test_batched_gradients_of_a_checkpoint():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).double().eval()
    results = []
    for model in (plain, convext.swap(copy.deepcopy(plain))):
        x = X.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        given = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)])
        results.append(torch.autograd.grad(y, x, given, is_grads_batched=True)[0])
    agree(results[1], results[0])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("attribute", ["kernel_size", "in_channels", "out_channels"])
def test_a_layer_without_an_attribute_that_its_forward_does_not_read(attribute, grad):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)).double().eval()
    swapped = convext.swap(copy.deepcopy(plain))
    for model in (plain, swapped):
        for conv in (model[0], model[2]):
            delattr(conv, attribute)
    with torch.set_grad_enabled(grad):
        # Sums of 3 and of 9 products.
        torch.testing.assert_close(swapped(X), plain(X), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shared", ["a view of the input", "a statistic", "a weight"])
def test_an_argument_that_is_written_may_share_memory_with_what_is_read(shared, train):
    def forward(self, x, other):
        y = self.bn(self.conv(x))
        other.mul_(2)
        return F.relu(y)

    make = net(forward)

    def steps(model):
        model.train(train)
        for _ in range(2):
            x = X.clone()
            given = {
                "a view of the input": x[:],
                "a statistic": model.bn.running_mean,
                "a weight": model.conv.weight.data,
            }
            yield model(x, given[shared])

    check(make, steps)


@pytest.mark.parametrize("train", [False, True])
def test_an_argument_that_a_container_writes_may_be_a_view_of_another(train):
    """Its forward writes from the first call on, or is replaced by one that does."""

    class Part(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    class Writes(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    def steps(model):
        model.train(train)
        for kind in (type(model.held), type(model.held), Writes, Writes):
            model.held.__class__ = kind
            x = X.clone()
            yield model(x, x[:])

    for kind in (Part, Writes):
        make = net(
            lambda m, x, other: F.relu(m.bn(m.conv(x)) + m.held(other)), lambda kind=kind: kind(nn.Conv2d(3, 4, 1))
        )
        check(make, steps)


@pytest.mark.parametrize("write", [torch.Tensor.__setitem__, lambda x, *item: x.__setitem__(*item)])
def test_an_item_set_through_its_method(write):
    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        write(x, (slice(None), 0), 0.0)
        return F.relu(self.bn(y))

    check(net(forward), lambda model: (model.train(train)(X) for train in (False, True)))


@pytest.mark.parametrize("with_norm", [False, True])
def test_a_sum_in_place_keeps_its_type(with_norm):
    def forward(self, x, other):
        y = self.conv(x)
        y = self.bn(y) if with_norm else y
        y += other
        return F.relu(y)

    x = torch.randn(2, 3, 8, 8)
    for train in (False, True):
        plain = net(forward)().train(train)
        swapped = convext.swap(copy.deepcopy(plain))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                other = torch.randn(2, 4, 8, 8, dtype=torch.float64)
                y, expected = swapped(x, other), plain(x, other)
                assert y.dtype is expected.dtype is torch.float32
                torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("image, other", [((1, 3, 8, 8), (2, 4, 8, 8)), ((2, 3, 8, 8), (3, 2, 4, 8, 8)),
                                          ((2, 3, 1, 1), (2, 4, 5, 5))])  # fmt: skip
def test_a_sum_may_be_larger_than_the_convolution(image, other, with_norm):
    make = net(lambda m, x, y: F.relu((m.bn(m.conv(x)) if with_norm else m.conv(x)) + y))
    x, y = torch.randn(image, dtype=X.dtype), torch.randn(other, dtype=X.dtype)
    check(make, lambda model: (model.train(train)(x, y) for train in (False, True)))


def test_statistics_after_a_call_that_raised():
    """The convolution refuses to save an inference tensor before the batch norm counts, which counts before it refuses
    one value a channel."""
    with torch.inference_mode():
        x = X.clone()

    def steps(model):
        for given, error in ((x, RuntimeError), (torch.ones(1, 3, 3, 3, dtype=X.dtype), ValueError)):
            with pytest.raises(error):
                model.train()(given)
            yield model[1].num_batches_tracked.clone(), model[1].running_mean.clone()

    check(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), steps, modes=(True,))


@pytest.mark.parametrize("momentum", [torch.tensor(0.3), True])
def test_a_momentum_that_is_no_number(momentum):
    def steps(model):
        model.bn.momentum = momentum
        for _ in range(2):
            yield model.train()(X), model.bn.running_mean.clone()

    check(net(lambda m, x: F.relu(m.bn(m.conv(x)))), steps)


def test_forwards_that_are_no_plain_methods():
    class Property(Net):
        @property
        def forward(self):
            return self.feats

    class Coroutine(Net):
        async def forward(self, x):
            return self.feats(x)

    def run(model):
        result = model(X)
        if isinstance(result, torch.Tensor):
            return result
        with pytest.raises(StopIteration) as stopped:
            result.send(None)
        return stopped.value.value

    for kind in (Property, Coroutine):
        plain = kind().double().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            swapped = convext.swap(copy.deepcopy(plain))
            agree(run(swapped), run(plain))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_the_gradient_of_a_summand_has_its_memory_format(with_norm, train):
    """PyTorch's backward of nn.InstanceNorm2d over one image is wrong where the gradient is channels-last."""

    class Residual(Net):
        def forward(self, x):
            y = self.conv2(F.relu(self.bn(self.conv(x))))
            return F.relu((self.held(y) if with_norm else y) + x)

    def block():
        model = Residual()
        model.conv, model.held = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        return model

    def steps(model):
        model.train(train)
        x = X[:1].clone().requires_grad_()
        before = model[:3](x)
        before.register_hook(lambda g: strides.append(g.stride()))
        strides = []
        model[3](before).square().sum().backward()
        yield x.grad, strides

    net_of = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GELU(), block())  # noqa: E731
    check(net_of, steps, modes=(True,))
