"""A swapped model does what its user has made of it: every kind of thing that a forward reads or stands in, changed.

Each test has a plain and a swapped twin, changes both in the same way after some calls, and compares.
"""

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import convext
from convext.swap.planned import PlannedForward

pytestmark = pytest.mark.smoke


class Mode(enum.Enum):
    KEEP, FLIP = 1, -1


class Policy:
    slope = 1.0

    def __init__(self, slope):
        self.slope = slope

    def apply(self, y):
        return y * self.slope


class Negative(Policy):
    def apply(self, y):
        return -y


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    nested: dict = dataclasses.field(default_factory=lambda: {"shift": 0.0, "list": [1.0, 2.0]})


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


Point = collections.namedtuple("Point", "a b")
SCALE = 1.0
TABLE = {"gain": 1.0}


def doubled(y, by=2.0):
    return y * by


def outer_function():
    factor = [1.0]
    exact = 1.0

    def inner(y):
        return y * factor[0] * exact

    return inner, factor


class Reader(nn.Module):
    """Its forward reads a value of every kind."""

    offset = 0.0
    names = ("a", "b")

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), F.relu
        self.policy, self.mode, self.config, self.slotted = Policy(1.0), Mode.KEEP, Config(), Slotted(1.0)
        self.table, self.levels, self.chosen, self.point = {"x": {"y": 1.0}}, [1.0, [2.0]], {"a"}, Point(1.0, 2.0)
        self.function, self.factor = outer_function()
        self.partial = functools.partial(doubled, by=1.0)
        self.child = nn.Dropout(0.25).eval()
        self.blocks, self.adapters, self.tail = nn.ModuleList(), nn.ModuleDict(), nn.Sequential()
        self.optional = None
        self.register_buffer("mask", None)
        self.register_parameter("gamma", None)
        self.register_buffer("shift", torch.ones(1, 8, 1, 1))
        self.plain_tensor = torch.ones(1, 8, 1, 1)
        self.count = 1

    @property
    def gain(self):
        return TABLE["gain"] * self.count

    @staticmethod
    def still(y):
        return y

    @classmethod
    def of_class(cls, y):
        return y + cls.offset

    def head(self, y):
        return y

    def forward(self, x):
        y = self.act(self.bn(self.conv(x))) * self.policy.slope * SCALE * self.gain
        y = self.policy.apply(y) * self.config.scale + self.config.nested["shift"] + self.config.nested["list"][1]
        y = y * self.slotted.value * self.table["x"]["y"] + self.levels[1][0] + self.point.b
        if self.mode is Mode.FLIP:
            y = -y
        if "b" in self.chosen:
            y = y + 1
        y = doubled(self.partial(self.function(self.still(self.of_class(self.head(y))))))
        if self.child.p > 0.5:
            y = y * 3
        for block in self.blocks:
            y = block(y)
        for name in self.adapters:
            y = y + self.adapters[name](y)
        if self.optional is not None:
            y = self.optional(y)
        if self.mask is not None:
            y = y * self.mask
        if self.gamma is not None:
            y = y * self.gamma
        y = y if self.shift is None else y + self.shift
        return self.tail(y) + self.plain_tensor * len(self.names)


def of_class(name, value):
    """A change of an attribute of a class, and its undoing."""

    @contextlib.contextmanager
    def change(models):
        owner, _, attribute = name.rpartition(".")
        owner = globals()[owner]
        former = owner.__dict__[attribute]
        setattr(owner, attribute, value)
        try:
            yield
        finally:
            setattr(owner, attribute, former)

    return change


@contextlib.contextmanager
def new_global(models):
    global SCALE
    SCALE = 2.0
    try:
        yield
    finally:
        SCALE = 1.0


@contextlib.contextmanager
def new_function(models):
    global doubled
    former, doubled = doubled, lambda y, by=5.0: y - by
    try:
        yield
    finally:
        doubled = former


@contextlib.contextmanager
def new_code(models):
    former, doubled.__code__ = doubled.__code__, (lambda y, by=1.0: y + by).__code__
    try:
        yield
    finally:
        doubled.__code__ = former


@contextlib.contextmanager
def new_defaults(models):
    former, doubled.__defaults__ = doubled.__defaults__, (7.0,)
    try:
        yield
    finally:
        doubled.__defaults__ = former


@contextlib.contextmanager
def in_a_global_dict(models):
    TABLE["gain"] = 4.0
    try:
        yield
    finally:
        TABLE["gain"] = 1.0


def each(function):
    """A change that is made to both twins."""

    @contextlib.contextmanager
    def change(models):
        for model in models:
            torch.manual_seed(3)
            function(model)
            model.eval()
        yield

    return change


CHANGES = {
    "function as attribute": each(lambda m: setattr(m, "act", F.elu)),
    "own function as attribute": each(lambda m: setattr(m, "act", lambda y: y * 3)),
    "bound method as attribute": each(lambda m: setattr(m, "act", Policy(4.0).apply)),
    "module as attribute": each(lambda m: (delattr(m, "act"), setattr(m, "act", nn.Softplus()))),
    "object exchanged": each(lambda m: setattr(m, "policy", Policy(3.0))),
    "object's field": each(lambda m: setattr(m.policy, "slope", 3.0)),
    "object's field gone": each(lambda m: delattr(m.policy, "slope") or setattr(m.policy, "slope", -3.0)),
    "object's class": each(lambda m: setattr(m.policy, "__class__", Negative)),
    "object's dictionary": each(lambda m: setattr(m.policy, "__dict__", {"slope": 9.0})),
    "method in an object": each(lambda m: setattr(m.policy, "apply", lambda y: y + 5)),
    "enum member": each(lambda m: setattr(m, "mode", Mode.FLIP)),
    "dataclass field": each(lambda m: setattr(m.config, "scale", 2.5)),
    "nested dict": each(lambda m: m.config.nested.update(shift=1.5)),
    "list in a nested dict": each(lambda m: m.config.nested["list"].__setitem__(1, -2.0)),
    "slot": each(lambda m: setattr(m.slotted, "value", 2.0)),
    "dict in a dict": each(lambda m: m.table["x"].update(y=3.0)),
    "list in a list": each(lambda m: m.levels[1].__setitem__(0, 7.0)),
    "set": each(lambda m: m.chosen.add("b")),
    "namedtuple": each(lambda m: setattr(m, "point", Point(0.0, 9.0))),
    "list in a closure": each(lambda m: m.factor.__setitem__(0, 4.0)),
    "cell of a closure": each(lambda m: setattr(m.function.__closure__[0], "cell_contents", 6.0)),
    "partial": each(lambda m: m.partial.keywords.update(by=3.0)),
    "child's setting": each(lambda m: setattr(m.child, "p", 0.75)),
    "block in an empty list": each(lambda m: m.blocks.append(nn.Conv2d(8, 8, 3, padding=1))),
    "block in an empty dict": each(lambda m: m.adapters.update({"task": nn.Conv2d(8, 8, 1)})),
    "block in an empty sequence": each(lambda m: m.tail.append(nn.Conv2d(8, 8, 1))),
    "child that was None": each(lambda m: setattr(m, "optional", nn.Conv2d(8, 8, 1))),
    "buffer that was None": each(lambda m: setattr(m, "mask", torch.full((1, 8, 1, 1), 0.5))),
    "parameter that was None": each(lambda m: setattr(m, "gamma", nn.Parameter(torch.full((1, 8, 1, 1), 3.0)))),
    "buffer becomes None": each(lambda m: setattr(m, "shift", None)),
    "buffer becomes an attribute": each(lambda m: (delattr(m, "shift"), setattr(m, "shift", torch.zeros(8, 1, 1)))),
    "plain tensor": each(lambda m: setattr(m, "plain_tensor", torch.full((1, 8, 1, 1), 4.0))),
    "plain tensor in place": each(lambda m: m.plain_tensor.mul_(3)),
    "plain tensor through data": each(lambda m: m.plain_tensor.data.mul_(3)),
    "number": each(lambda m: setattr(m, "count", 3)),
    "number hides a class attribute": each(lambda m: setattr(m, "names", ("a", "b", "c"))),
    "method on the instance": each(lambda m: setattr(m, "head", lambda y: y + 2)),
    "class attribute": of_class("Reader.offset", 1.0),
    "tuple of the class": of_class("Reader.names", ("a",)),
    "method of the class": of_class("Reader.head", lambda self, y: y - 1),
    "property of the class": of_class("Reader.gain", property(lambda self: 5.0)),
    "static method": of_class("Reader.still", staticmethod(lambda y: y * 0.5)),
    "method of an object's class": of_class("Policy.apply", lambda self, y: y / 2),
    "forward of the class": of_class("Reader.forward", lambda self, x: self.bn(self.conv(x)) * 2),
    "global": new_global,
    "global function": new_function,
    "code of a function": new_code,
    "defaults of a function": new_defaults,
    "entry of a global dict": in_a_global_dict,
    "running statistics become None": each(
        lambda m: (setattr(m.bn, "running_mean", None), setattr(m.bn, "running_var", None))
    ),
    "bias becomes None": each(lambda m: setattr(m.conv, "bias", None)),
    "forward of a layer": each(lambda m: setattr(m.bn, "forward", lambda y: y * 2)),
    "_conv_forward of a layer": each(
        lambda m: setattr(m.conv, "_conv_forward", lambda x, w, b: F.conv2d(x, w, b, padding=1) * 2)
    ),
    "layer exchanged": each(lambda m: setattr(m, "conv", nn.Conv2d(3, 8, 1))),
}


def make():
    torch.manual_seed(0)
    model = Reader().eval()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-0.5, 0.5), model.bn.running_var.uniform_(0.5, 2), model.bn.weight.uniform_(1, 2)
    return model.double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_forward_reads_may_change(change, calls):
    plain, model = make(), convext.swap(make())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    assert any(row.fused for row in convext.report(model))
    with torch.no_grad():
        for _ in range(calls):
            close(model(x), plain(x))
        before = plain(x)
        with CHANGES[change]((plain, model)):
            plain.double(), model.double()
            assert plain(x).shape != before.shape or not torch.allclose(plain(x), before)  # the change matters
            for _ in range(3):
                close(model(x), plain(x))
            with torch.enable_grad():
                close(model(x), plain(x))
        for _ in range(2):
            close(model(x), plain(x))


def test_a_forward_that_reads_everything_is_planned_once():
    model, x = convext.swap(make()), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    forward = model.__dict__["forward"]
    with torch.no_grad():
        for _ in range(5):
            model(x)
    assert list(forward._captures.values()) == [1] and forward.present_refusal() is None


def held(y):
    return y


class Pair(collections.namedtuple("Pair", "a b")):
    gain = 2.0


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.conv, self.bn, self.held = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), value

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * getattr(self.held, "gain", 1.0)


def test_attributes_that_a_function_or_a_named_tuple_gets_later():
    for value in (held, Pair(1, 2)):
        plain = Holder(value).eval().double()
        model, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 3, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(3):
                close(model(x), plain(x))
            try:
                for m in (plain, model):
                    m.held.gain = 5.0
                for _ in range(2):
                    close(model(x), plain(x))
            finally:
                held.__dict__.clear()


# ---- layers that are not what their class says -----------------------------------------------------------------------


def chain(act=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act or nn.ReLU()).eval()
    with torch.no_grad():
        model[1].running_mean.uniform_(), model[1].weight.uniform_(2, 3), model[1].bias.uniform_(1, 2)
    return model.double()


@pytest.mark.parametrize(
    "kind, name, function",
    [
        (nn.Conv2d, "forward", lambda self, x: F.conv2d(x, self.weight) * 2),
        (nn.Conv2d, "_conv_forward", lambda self, x, w, b: F.conv2d(x, w) * 3),
        (nn.BatchNorm2d, "forward", lambda self, x: x * 2),
        (nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: x * 2),
        (nn.ReLU, "forward", lambda self, x: x - 1),
        (nn.Sequential, "forward", lambda self, x: -self[1](self[0](x))),
        (nn.Module, "__call__", None),
    ],
)
@pytest.mark.parametrize("when", ["before the swap", "after calls"])
def test_code_of_torchs_classes_may_be_replaced(kind, name, function, when, monkeypatch):
    if function is None:
        original = nn.Module.__call__
        function = lambda self, *args: original(self, *args) * 2  # noqa: E731
    plain, model, x = chain(), chain(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        if when == "after calls":
            convext.swap(model)
            for _ in range(3):
                close(model(x), plain(x))
        with monkeypatch.context() as patched:
            patched.setattr(kind, name, function)
            convext.swap(model)
            for _ in range(3):
                close(model(x), plain(x))
        for _ in range(3):
            close(model(x), plain(x))
    assert [row.fused for row in convext.report(model)] == ["bn + relu"]


@pytest.mark.parametrize(
    "place, name", [(F, "conv2d"), (F, "batch_norm"), (F, "relu"), (torch, "relu"), (torch, "batch_norm")]
)
def test_functions_of_torch_may_be_replaced(place, name, monkeypatch):
    plain, model, x = chain(), convext.swap(chain()), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    original, seen = getattr(place, name), []

    def counted(*args, **kwargs):
        seen.append(name)
        return original(*args, **kwargs) * 2

    with torch.no_grad():
        for _ in range(3):
            close(model(x), plain(x))
        with monkeypatch.context() as patched:
            patched.setattr(place, name, counted)
            for _ in range(2):
                expected, times = plain(x), len(seen)
                close(model(x), expected)
                assert len(seen) == 2 * times
                seen.clear()
        close(model(x), plain(x))


def to_buffers(module, *names):
    for name in names:
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        module.register_buffer(name, value)


def to_attributes(module, *names):
    for name in names:
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        setattr(module, name, value)


@pytest.mark.parametrize("change", [to_buffers, to_attributes])
@pytest.mark.parametrize(
    "index, names",
    [(1, ("weight", "bias")), (1, ("weight",)), (0, ("bias",)), (0, ("weight",)), (0, ("weight", "bias"))],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_parameters_may_be_buffers_or_attributes(change, index, names, when):
    plain, model, x = chain(), chain(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        if when == "after":
            convext.swap(model)
            for _ in range(3):
                close(model(x), plain(x))
        change(plain[index], *names), change(model[index], *names)
        convext.swap(model)
        for _ in range(3):
            close(model(x), plain(x))


@pytest.mark.parametrize(
    "act, change",
    [
        (nn.GELU(), ("approximate", "tanh")),
        (nn.Hardtanh(0, 6), ("max_val", 1.0)),
        (nn.Hardtanh(0, 6), ("min_val", -2.0)),
        (nn.ReLU6(), ("max_val", 1.0)),
        (nn.LeakyReLU(0.1), ("negative_slope", 0.7)),
        (nn.ELU(), ("alpha", 3.0)),
        (nn.Softplus(), ("beta", 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_settings_of_an_activation_may_change(act, change, when):
    plain, model = chain(copy.deepcopy(act)), chain(copy.deepcopy(act))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) * 3
    with torch.no_grad():
        before = plain(x)
        if when == "after":
            convext.swap(model)
            for _ in range(3):
                close(model(x), before)
        setattr(plain[2], *change), setattr(model[2], *change)
        convext.swap(model)
        assert not torch.allclose(plain(x), before)
        for _ in range(3):
            close(model(x), plain(x))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_batch_norm_of_mixed_dtypes_is_refused_as_before(name):
    for layers in (3, 2):
        plain = chain()[:layers].float()
        model, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            for _ in range(3):
                model(x)
            for m in (plain, model):
                setattr(m[1], name, type(getattr(m[1], name))(getattr(m[1], name).double()))
                with pytest.raises(RuntimeError):
                    m(x)


# ---- contexts and effects: not planned, and right --------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def body(self, x):
        return F.relu(self.bn(self.conv(x)))


DECORATORS = {
    "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": torch.autocast("cpu", enabled=False),
    "no_grad": torch.no_grad(),
    "enable_grad": torch.enable_grad(),
    "inference_mode": torch.inference_mode(),
}


@pytest.mark.parametrize("name", DECORATORS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_contexts_of_a_forward_hold(name, inside, training):
    context = DECORATORS[name]

    class Net(Base):
        if inside:

            def forward(self, x):
                with context:
                    return self.body(x)
        else:

            @context
            def forward(self, x):
                return self.body(x)

    torch.manual_seed(0)
    plain = Net().train(training)
    model, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, 8, 8)
    for outer in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with outer:
            for _ in range(3):
                a, b = plain(x), model(x)
                assert (a.dtype, a.requires_grad, a.is_inference()) == (b.dtype, b.requires_grad, b.is_inference())
                torch.testing.assert_close(b.float(), a.float(), rtol=0.02, atol=0.02)
    assert model.forward.present_refusal()


class Leaky(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.relu:
            return F.leaky_relu(args[0], 0.3)
        if function is F.conv2d:
            return function(*args, **(kwargs or {})) * 2
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_a_function_mode_sees_what_the_users_code_calls(grad):
    class Net(Base):
        def forward(self, x):
            return self.body(x)

    plain = Net().eval().double()
    model, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            close(model(x), plain(x))
        with Leaky():
            for _ in range(2):
                close(model(x), plain(x))
        with torch.device("cpu"):
            close(model(x), plain(x))
        assert [row.fused for row in convext.report(model)] == ["bn + relu"]


def _except(self, x):
    try:
        return F.conv2d(x, self.conv.weight, padding=x.shape[1] - 4)
    except RuntimeError:
        return self.body(x)


def _counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.body(x) * self.calls


def _list_argument(self, x, found=None):
    y = self.body(x)
    if found is not None:
        found.append(y)
    return y


def _matches(self, x):
    match self.conv:
        case nn.Conv2d():
            return self.body(x)
    return x


def _swallows(self, x):
    try:
        return self.body(x) * (2 if x.sum() > 0 else 3)
    except Exception:
        return x


def _imports(self, x):
    import math

    return self.body(x) * math.pi


def _own_class(self, x):
    class Local:
        factor = 2

    return self.body(x) * Local.factor


@pytest.mark.parametrize(
    "forward", [_except, _counts, _list_argument, _matches, _swallows, _imports, _own_class], ids=lambda f: f.__name__
)
def test_effects_and_handlers_of_a_forward_happen(forward):
    net = type("Net", (Base,), {"forward": forward})
    torch.manual_seed(0)
    plain = net().eval().double()
    model = convext.swap(copy.deepcopy(plain))
    with torch.no_grad():
        for sign in (1, -1, 1):
            x = sign * torch.rand(1, 3, 8, 8, dtype=torch.float64)
            if forward is _list_argument:
                lists = [], []
                close(model(x, lists[0]), plain(x, lists[1]))
                assert len(lists[0]) == 1
                close(lists[0][0], lists[1][0])
            close(model(x), plain(x))
    assert getattr(model, "calls", 0) == getattr(plain, "calls", 0)


def test_a_class_with_a_call_of_its_own_is_called_once():
    class Twice(Base):
        def __call__(self, x):
            return super().__call__(x) * 2

        def forward(self, x):
            return self.body(x)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 3, 1), Twice()

        def forward(self, x):
            return self.inner(self.stem(x)) + 1

    plain = Around().eval().double()
    model, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                close(model(x), plain(x))


def test_arguments_that_are_one_tensor_are_one():
    class Net(Base):
        def forward(self, x, y):
            return self.body(x) * (2 if x is y else 3)

    plain = Net().eval().double()
    model = convext.swap(copy.deepcopy(plain))
    a, b = (torch.randn(1, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for x, y in ((a, b), (a, a), (a, b), (a, a)):
            close(model(x, y), plain(x, y))


def test_a_list_that_a_forward_returns_is_the_users_own():
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.names = ["a"]

        def forward(self, x):
            return self.body(x), self.names

    model, x = convext.swap(Net().eval()), torch.randn(1, 3, 8, 8)
    for _ in range(3):
        assert model(x)[1] is model.names


# ---- what a forward is to others -------------------------------------------------------------------------------------


class Net(Base):
    def forward(self, x, scale: float = 1.0):
        """Doc."""
        return self.body(x) * scale


def test_a_planned_forward_is_a_bound_method_to_who_asks():
    model = convext.swap(Net().eval())
    forward, bound = model.forward, types.MethodType(Net.forward, model)
    for name in (
        "__self__",
        "__func__",
        "__code__",
        "__name__",
        "__qualname__",
        "__defaults__",
        "__annotations__",
        "__doc__",
        "__module__",
        "__globals__",
    ):
        assert getattr(forward, name) == getattr(bound, name), name
    assert not hasattr(forward, "__wrapped__")
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(types.MethodType(forward.__func__, model)(x, 2.0), model(x, 2.0))
    assert copy.copy(forward) is forward
    both = copy.deepcopy([model, forward])
    assert both[0].forward is both[1] and both[1].__self__ is both[0]


def test_a_shallow_copy_of_a_swapped_model_says_what_to_do():
    model, x = convext.swap(Net().eval()), torch.randn(1, 3, 8, 8)
    for make_copy in (copy.copy, lambda m: m._replicate_for_data_parallel()):
        with pytest.raises(RuntimeError, match="shallow copy.*deepcopy.*revert"):
            make_copy(model)(x)
    conv = convext.swap(nn.Conv2d(3, 4, 1))
    with pytest.raises(RuntimeError, match="shallow copy"):
        copy.copy(conv)(x)
    model(x)


def test_torchscript_says_to_revert_first():
    with pytest.raises(RuntimeError, match="revert"):
        torch.jit.script(convext.swap(Net().eval()))


def test_a_wrapped_forward_is_unwrapped_in_any_order():
    plain = Net().eval().double()
    model, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    planned = model.forward

    @functools.wraps(planned)
    def wrapped(*args, **kwargs):
        return planned(*args, **kwargs) * 2

    model.forward = wrapped
    with torch.no_grad():
        close(model(x), plain(x) * 2)
        assert isinstance(planned, PlannedForward)
        convext.swap(model)
        close(model(x), plain(x) * 2)
        model.forward = planned
        for _ in range(3):
            close(model(x), plain(x))
        del model.forward
        close(model(x), plain(x))
        convext.swap(model)
        close(model(x), plain(x))


def test_type_keyed_tools_find_their_layers():
    from torch.ao.quantization import fuse_modules
    from torch.fx.experimental.optimization import fuse

    model, x = convext.swap(chain().float()), torch.randn(1, 3, 8, 8)
    expected = model(x)
    fused = fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    merged = fuse(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
