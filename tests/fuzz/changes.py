"""What a user can do to a live model. Each change takes a `Session`, does the same to both twins, and returns what it
did in words, or None if there was nothing to do. `s.undo_change` takes a change back where a model may not run after.

Functions and classes that end up inside a model stand at module level, so that it still pickles.
"""

import collections
import copy
import functools
import io
import pickle
import sys
import threading
import types
import weakref

import compare
import helpers
import networks
import torch
import torch.nn.functional as F
from compare import RECORDS, Difference, state_of
from session import Call
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import convext

CHANGES = []


def change(function):
    CHANGES.append(function)
    return function


def tensors_of(result):
    found, facts = [], []
    compare.walk(result, "", found, facts)
    return [t for _, t in found]


# ---- layer settings --------------------------------------------------------------------------------------------------

SETTINGS = [
    (nn.Conv2d, "stride", ((1, 1), (2, 2), 2, (2, 1))),
    (nn.Conv2d, "padding", ((0, 0), (1, 1), (2, 2), 1, "same", (2, 0))),
    (nn.Conv2d, "dilation", ((1, 1), (2, 2), 2)),
    (nn.BatchNorm2d, "eps", (1e-5, 1e-2, 0.5)),
    (nn.BatchNorm2d, "momentum", (0.1, 0.5, None)),
    (nn.BatchNorm2d, "track_running_stats", (True, False)),
    (nn.BatchNorm2d, "affine", (True, False)),
    (nn.BatchNorm2d, "num_features", (3, 8)),
    (nn.GELU, "approximate", ("none", "tanh")),
    (nn.Hardtanh, "min_val", (0.0, -1.0, 0.5)),
    (nn.Hardtanh, "max_val", (6.0, 1.0, 3.0)),
    (nn.LeakyReLU, "negative_slope", (0.01, 0.5)),
    ((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Dropout), "inplace", (True, False)),
    ((nn.Dropout, nn.Dropout2d), "p", (0.0, 0.5, 0.9)),
    (nn.AdaptiveAvgPool2d, "output_size", (1, (1, 1), 2)),
    (nn.Flatten, "start_dim", (1, 2, 0)),
    (nn.LayerNorm, "eps", (1e-6, 0.5)),
    (nn.InstanceNorm2d, "eps", (1e-5, 0.5)),
    (nn.Upsample, "mode", ("nearest", "bilinear")),
    (nn.Upsample, "scale_factor", (2.0, 3.0)),
    ((nn.MaxPool2d, nn.AvgPool2d), "kernel_size", (3, 2)),
]


@change
def layer_setting(s):
    fitting = [(name, attribute, values) for kind, attribute, values in SETTINGS for name in s.modules(kind)]
    if not fitting:
        return None
    name, attribute, values = s.pick(fitting)
    value = s.pick(values)
    former = getattr(s.plain.get_submodule(name), attribute)
    s.undo_change = lambda model: setattr(model.get_submodule(name), attribute, former)
    s.each(name, lambda m: setattr(m, attribute, value))
    return f"{name}.{attribute} = {value!r}, was {former!r}"


@change
def padding_mode(s):
    name = s.pick(s.modules(nn.Conv2d, where=lambda m: isinstance(m.padding, tuple) and max(m.padding) < 4))
    if name is None:
        return None
    mode, former = s.pick(("zeros", "reflect", "circular", "replicate")), s.plain.get_submodule(name).padding_mode
    s.undo_change = lambda model: setattr(model.get_submodule(name), "padding_mode", former)
    s.each(name, lambda m: setattr(m, "padding_mode", mode))
    return f"{name}.padding_mode = {mode!r}"


@change
def groups_with_a_fitting_weight(s):
    name = s.pick(s.modules(nn.Conv2d, where=lambda m: not parametrize.is_parametrized(m) and m.weight is not None))
    if name is None:
        return None
    conv = s.plain.get_submodule(name)
    groups = s.pick([g for g in (1, 2, 4, 8) if conv.out_channels % g == 0 and conv.in_channels % g == 0])
    weight = s.tensor(
        (conv.weight.shape[0], conv.in_channels // groups, *conv.weight.shape[2:]), conv.weight.dtype, -0.5, 0.5
    )
    former = conv.groups, conv.weight.detach().clone()

    def to(m, g, w):
        m.groups, m.weight = g, nn.Parameter(w.clone())

    s.undo_change = lambda model: to(model.get_submodule(name), *former)
    s.each(name, lambda m: to(m, groups, weight))
    return f"{name}.groups = {groups}, and a weight that fits"


# ---- plain attributes ------------------------------------------------------------------------------------------------

ATTRIBUTES = [  # class, path, values
    (networks.Residual, "add", ("operator", "torch", "in place", "alpha", "reversed", "method")),
    (networks.Residual, "activate_after", (True, False)),
    (networks.Residual, "drop_path", (None, helpers.halved, helpers.negated)),
    (networks.PreActivation, "function", (F.relu, torch.sigmoid, helpers.squash)),
    (networks.PreActivation, "scale", (0.5, 2.0)),
    (networks.SqueezeExcite, "by_mean", (True, False)),
    (networks.InvertedResidual, "use_res_connect", (True, False)),
    (networks.Pyramid, "mode", ("nearest", "bilinear")),
    (networks.Shuffle, "groups", (1, 2, 4)),
    (networks.Shuffle, "writes", (True, False)),
    (networks.Reads, "act", (F.relu, F.silu, helpers.squash, helpers.negated, torch.tanh)),
    (networks.Reads, "mode", tuple(networks.Mode)),
    (networks.Reads, "name", ("relu", "silu", "gelu")),
    (networks.Reads, "use", ("attributes", "holder", "table", "options")),
    (networks.Reads, "weights", ([1.0], [0.5, 2.0, 0.25], [])),
    (networks.Reads, "slope", (0.5, 2.0)),
    (networks.Reads, "scaler", (helpers.Scaler(2.0), helpers.negated)),
    (networks.Reads, "scaler.factor", (0.5, 3.0)),
    (networks.Reads, "holder.value", (1.0, 2.0)),
    (networks.Reads, "holder.level", (1.0, 2.0)),
    (networks.Reads, "options.scale", (0.5, 2.0)),
    (networks.Reads, "options.mode", tuple(networks.Mode)),
    (networks.Reads, "options", (networks.Options(scale=3.0),)),
    (networks.Base, "limit", (0.5, 2.0)),
    (networks.Base, "activation", (F.silu, helpers.negated)),
    (networks.Derived, "scale", (helpers.make_scaler(2.0), helpers.halved)),
    (networks.Derived, "clip", (helpers.halved,)),
    (networks.Derived, "head", (helpers.negated,)),
    (networks.Functional, "stride", (1, 2)),
    (networks.Functional, "eps", (1e-5, 0.5)),
    (networks.Functional, "standardize", (True, False)),
    (networks.OwnFunction, "rounds", (True, False)),
    (networks.Tied, "transposed", (True, False)),
    (networks.OwnCall, "factor", (0.5, 2.0)),
    (networks.Counts, "calls", (0, 1)),
    (networks.Head, "way", ("pool", "mean", "torch", "two")),
    (networks.Features, "keep", ([0], [], [0, 1])),
    (networks.ExtraArguments, "result", ("tensor", "tuple", "dict", "namedtuple", "dataclass", "list")),
]


def follow(module, path):
    *parents, last = path.split(".")
    for name in parents:
        module = getattr(module, name)
    return module, last


def set_path(module, path, value):
    owner, last = follow(module, path)
    setattr(owner, last, copy.deepcopy(value))


@change
def attribute(s):
    fitting = [(n, path, values) for kind, path, values in ATTRIBUTES for n in s.modules(kind)]
    if not fitting:
        return None
    name, path, values = s.pick(fitting)
    value = s.pick(values)
    try:
        owner, last = follow(s.plain.get_submodule(name), path)
        former = getattr(owner, last)
    except AttributeError:
        return None
    own = last in getattr(owner, "__dict__", {})

    def undo(model):
        owner, last = follow(model.get_submodule(name), path)
        setattr(owner, last, former) if own else delattr(owner, last)

    s.undo_change = undo
    s.each(name, lambda m: set_path(m, path, value))
    return f"{name}.{path} = {value!r}"


@change
def delete_attribute(s):
    fitting = [
        (n, path)
        for kind, path, _ in ATTRIBUTES
        for n in s.modules(kind)
        if "." not in path and path in s.plain.get_submodule(n).__dict__
    ]
    if not fitting:
        return None
    name, path = s.pick(fitting)
    former = s.plain.get_submodule(name).__dict__[path]
    s.undo_change = lambda model: setattr(model.get_submodule(name), path, former)
    s.each(name, lambda m: delattr(m, path))
    return f"del {name}.{path}"


@change
def entry_of_a_container(s):
    name = s.pick(s.modules(networks.Reads, networks.OwnGetattr))
    if name is None:
        return None
    way, value = s.rng.randrange(5), s.pick((0.5, 2.0, 3.0))

    def write(m):
        if isinstance(m, networks.OwnGetattr):
            m.config["scale"] = value
        elif way == 0:
            m.table["scale"] = value
        elif way == 1:
            m.table["inner"]["shift"][1] = value
        elif way == 2:
            m.weights.append(value)
        elif way == 3:
            m.options.steps[0] = value
        elif isinstance(m.holder, networks.Holder):
            m.holder.table["a"]["b"] = value

    s.each(name, write)
    return f"an entry of {name}: way {way}, {value}"


# ---- classes, globals, functions of torch ----------------------------------------------------------------------------


def twice(original):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        return result * 2 if isinstance(result, torch.Tensor) else result

    return wrapper


def new_head(self, x):
    return x - 1


def new_features(self, x):
    return self.conv(x) * 0.5


CLASS_ATTRIBUTES = [
    (networks.Reads, "slope", (0.5, 2.0)),
    (networks.Holder, "level", (2.0, 0.5)),
    (networks.Base, "limit", (0.5, 1.0)),
    (networks.Base, "activation", (staticmethod(F.silu), staticmethod(helpers.negated))),
    (networks.Base, "clip", (staticmethod(helpers.halved),)),
    (networks.Derived, "head", (new_head,)),
    (networks.Derived, "gain", (0.25, property(lambda self: 3.0))),
    (networks.Base, "features", (new_features,)),
    (networks.OwnCall, "factor", (2.0, 0.25)),
    (networks._Decorated, "body", (new_features,)),
    (networks.Counts, "calls", (5,)),
    (networks.Derived, "limit", (0.75,)),
]


@change
def class_attribute(s):
    fitting = [
        (kind, name, values)
        for kind, name, values in CLASS_ATTRIBUTES
        if s.modules(kind) or kind is networks.Holder and s.modules(networks.Reads)
    ]
    if not fitting:
        return None
    kind, name, values = s.pick(fitting)
    value = s.pick(values)
    s.patch(kind, name, value)
    return f"class {kind.__name__}.{name} = {value!r}"


def _taken(s, name):
    """Whether a method of that name was put into an instance: it may call one taken from there before, which stays the
    class's former one in an unswapped model. README's limits say so."""
    return any(name in module.__dict__ for module in s.plain.modules())


@change
def method_of_a_class(s):
    """Of the user's classes and of torch's."""
    kinds = sorted({type(m) for m in s.plain.modules()} - {nn.Identity}, key=lambda k: (k.__module__, k.__qualname__))
    kind = s.pick([k for k in kinds if getattr(sys.modules.get(k.__module__), k.__name__, None) is k])  # one for both
    if kind is None:
        return None
    names = ["forward", "__call__"] + (["_conv_forward"] if issubclass(kind, nn.Conv2d) else [])
    name = s.pick(names)
    if _taken(s, name):
        return None
    s.patch(kind, name, twice(getattr(kind, name)))
    return f"class {kind.__name__}.{name} doubles"


@change
def class_of_torch(s):
    kind, name = s.pick(
        (
            (nn.Conv2d, "forward"),
            (nn.BatchNorm2d, "forward"),
            (nn.ReLU, "forward"),
            (nn.SiLU, "forward"),
            (nn.Conv2d, "_conv_forward"),
            (nn.Sequential, "forward"),
            (nn.Linear, "forward"),
            (nn.Conv2d, "__call__"),
            (nn.modules.batchnorm._BatchNorm, "forward"),
            (nn.Module, "__call__"),
            (nn.GELU, "forward"),
        )
    )
    if _taken(s, name):
        return None
    s.patch(kind, name, twice(getattr(kind, name)))
    return f"class {kind.__name__}.{name} doubles"


FUNCTIONS = [
    (F, "relu"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "silu"),
    (F, "gelu"),
    (F, "hardtanh"),
    (F, "linear"),
    (torch, "relu"),
    (torch, "cat"),
    (torch, "flatten"),
    (torch, "add"),
    (F, "hardswish"),
    (F, "layer_norm"),
    (F, "adaptive_avg_pool2d"),
    (F, "dropout"),
    (F, "interpolate"),
    (torch, "sigmoid"),
]


@change
def function_of_torch(s):
    owner, name = s.pick(FUNCTIONS)
    s.patch(owner, name, twice(getattr(owner, name)))
    return f"{owner.__name__}.{name} doubles"


@change
def method_of_tensor(s):
    name = s.pick(("relu", "__add__", "mean", "permute"))
    s.patch(torch.Tensor, name, twice(getattr(torch.Tensor, name)))
    return f"torch.Tensor.{name} doubles"


@change
def module_global(s):
    way = s.rng.randrange(8)
    value = s.pick((0.25, 2.0))
    if way == 0:
        s.patch(networks, "GAIN", value)
    elif way == 1:
        s.patch(helpers, "OFFSET", value)
    elif way == 2:
        s.patch_item(networks.SETTINGS, "scale", value)
    elif way == 3:
        s.patch_item(networks.SETTINGS["nested"], "shift", value)
    elif way == 4:
        s.patch_item(networks.SETTINGS, "order", ["shift"])
    elif way == 5:
        s.patch(helpers, "shifted", helpers.negated)
    elif way == 6:
        s.patch(networks, "SETTINGS", {"scale": value, "order": ["scale"], "nested": {"shift": 0.0}})
    else:
        s.patch(helpers.shifted, "__defaults__", (value,))
    return f"way {way}, {value}"


@change
def code_or_closure(s):
    """The function stays, what it does changes."""
    way = s.rng.randrange(3)
    if way == 0:
        function = s.pick((helpers.squash, helpers.halved, helpers.negated, networks.Derived.head))
        s.patch(function, "__code__", (new_head if function is networks.Derived.head else helpers.gate).__code__)
        return f"the code of {function.__name__}"
    name = s.pick(s.modules(networks.Derived, where=lambda m: getattr(m.scale, "__closure__", None)))
    if name is None:
        return None
    cell = s.plain.get_submodule(name).scale.__closure__[0]
    s.patch(cell, "cell_contents", s.pick((2.0, 0.25)))
    return f"the closure of {name}.scale"


@change
def undo_a_patch(s):
    if not s.undo_stack:
        return None
    name, undo = s.undo_stack.pop()
    undo()
    return name


# ---- forwards of instances -------------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *args, **kwargs):
        result = self.forward(*args, **kwargs)
        return result * 1.5 if isinstance(result, torch.Tensor) else result


def pass_on(self, *args, **kwargs):
    result = type(self).forward(self, *args, **kwargs)
    return result + 0.5 if isinstance(result, torch.Tensor) else result


@change
def forward_of_an_instance(s):
    name = s.pick(s.modules())
    way = s.rng.randrange(5)

    def wrap(m):
        if way == 0:
            m.forward = Wrapper(m.forward)
        elif way == 1:
            m.forward = types.MethodType(pass_on, m)
        elif way == 2:
            m.forward = functools.partial(pass_on, m)
        elif way == 3:
            m.forward = torch.no_grad()(m.forward)
        else:
            m.forward = types.MethodType(torch.autocast("cpu", enabled=False)(m.forward.__func__), m)

    s.each(name, wrap)
    s.undo_change = lambda model: model.get_submodule(name).__dict__.pop("forward", None)
    return f"{name}.forward, way {way}"


@change
def forward_of_an_instance_dropped(s):
    name = s.pick(s.modules(where=lambda m: "forward" in m.__dict__))
    if name is None:
        return None
    s.each(name, lambda m: m.__dict__.pop("forward", None) and None)
    return name


@change
def class_of_an_instance(s):
    name = s.pick(s.modules(nn.Conv2d, networks._Decorated, nn.ReLU, nn.SiLU))
    if name is None:
        return None
    m = s.plain.get_submodule(name)
    if isinstance(m, nn.Conv2d):
        new = networks.Standardized
    elif isinstance(m, networks._Decorated):
        new = s.pick((networks.NoGrad, networks.UserDecorated, networks.GradInside, networks.OwnCall))
    else:
        new = s.pick((nn.Sigmoid, nn.Tanh, nn.Hardsigmoid))
    former = {id(model): type(model.get_submodule(name)) for model in s.models()}
    s.undo_change = lambda model: setattr(model.get_submodule(name), "__class__", former[id(model)])
    s.each(name, lambda m: setattr(m, "__class__", new))
    return f"{name}.__class__ = {new.__name__}"


def plus_one(conv, x, weight, bias):
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups) + 1


@change
def conv_forward_of_an_instance(s):
    name = s.pick(s.modules(nn.Conv2d))
    if name is None:
        return None
    if "_conv_forward" in s.plain.get_submodule(name).__dict__:
        s.each(name, lambda m: delattr(m, "_conv_forward"))
        return f"{name}: dropped"
    s.each(name, lambda m: setattr(m, "_conv_forward", types.MethodType(plus_one, m)))
    return name


# ---- children --------------------------------------------------------------------------------------------------------


def parent_of(name):
    parent, _, last = name.rpartition(".")
    return parent, last


@change
def replace_a_child(s):
    name = s.pick([n for n in s.modules() if n])
    if name is None:
        return None
    parent, last = parent_of(name)
    old = s.plain.get_submodule(name)
    s.serial += 1
    try:
        copy.deepcopy(old)
    except RuntimeError:
        return None  # pruned in a call with gradients: torch cannot copy it
    if isinstance(old, nn.Conv2d) and type(old).forward is nn.Conv2d.forward and s.flag():
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            old.padding,
            old.dilation,
            old.groups,
            bias=s.flag(),
        ).to(s.dtype)
    else:
        new = s.pick(
            (
                lambda: nn.Identity(),
                lambda: networks.activation(s.rng),
                lambda: nn.Sequential(),
                lambda: networks.randomize(copy.deepcopy(old), s.serial),
                lambda: nn.LeakyReLU(0.3),
                lambda: nn.Sequential(copy.deepcopy(old), nn.ReLU()),
            )
        )()
    new = networks.randomize(new, s.serial).train(old.training)
    former = {}

    def exchange(model):
        owner = model.get_submodule(parent)
        former[id(model)] = owner._modules[last]
        setattr(owner, last, copy.deepcopy(new)) if s.serial % 2 else owner._modules.update({last: copy.deepcopy(new)})

    s.both(exchange)
    s.undo_change = lambda model: model.get_submodule(parent)._modules.update({last: former[id(model)]})
    return f"{name} = {new}".replace("\n", " ")


@change
def drop_a_child(s):
    name = s.pick([n for n in s.modules() if n])
    if name is None:
        return None
    parent, last = parent_of(name)
    way = s.pick(("None", "del"))
    former = {id(m): m.get_submodule(name) for m in s.models()}

    def drop(model):
        owner = model.get_submodule(parent)
        setattr(owner, last, None) if way == "None" else delattr(owner, last)

    s.both(drop)
    s.undo_change = lambda model: model.get_submodule(parent).add_module(last, former[id(model)])
    return f"{name}, {way}"


@change
def grow_a_container(s):
    name = s.pick(s.modules(nn.ModuleList, nn.ModuleDict, nn.Sequential))
    if name is None:
        return None
    kind = s.plain.get_submodule(name)
    new = networks.randomize(
        s.pick(
            (
                lambda: nn.Conv2d(8, 8, 1),
                lambda: nn.ReLU(),
                lambda: nn.LeakyReLU(0.2),
                lambda: nn.SiLU(inplace=True),
                lambda: nn.Identity(),
                lambda: nn.Sequential(nn.Hardtanh(-1, 1)),
            )
        )(),
        s.serial,
    ).to(s.dtype)
    way, key = s.rng.randrange(3), f"new{len(kind)}"

    def grow(m):
        part = copy.deepcopy(new)
        if isinstance(m, nn.ModuleDict):
            m[key] = part
        elif way == 0:
            m.append(part)
        elif way == 1:
            m.insert(0, part)
        else:
            m.extend([part])

    before = {}

    def remember(m):
        before[id(m)] = collections.OrderedDict(m._modules)

    s.each(name, remember)
    s.each(name, grow)

    def undo(model):
        m = model.get_submodule(name)
        m._modules.clear()
        m._modules.update(before[id(m)])

    s.undo_change = undo
    return f"{name} gets {new}, way {way}"


@change
def shrink_a_container(s):
    name = s.pick(s.modules(nn.ModuleList, nn.ModuleDict, nn.Sequential, where=len))
    if name is None:
        return None
    key = s.pick(s.plain.get_submodule(name)._modules)
    at = list(s.plain.get_submodule(name)._modules).index(key)
    before = {}

    def shrink(m):
        before[id(m)] = collections.OrderedDict(m._modules)
        del m[key if isinstance(m, nn.ModuleDict) else at]

    s.each(name, shrink)

    def undo(model):
        m = model.get_submodule(name)
        m._modules.clear()
        m._modules.update(before[id(m)])

    s.undo_change = undo
    return f"del {name}[{key!r}]"


@change
def exchange_two_children(s):
    name = s.pick(s.modules(nn.Sequential, nn.ModuleList, where=lambda m: len(m) > 1))
    if name is None:
        return None
    first, second = s.rng.sample(list(s.plain.get_submodule(name)._modules), 2)

    def exchange(m):
        m._modules[first], m._modules[second] = m._modules[second], m._modules[first]

    s.each(name, exchange)
    s.undo_change = lambda model: exchange(model.get_submodule(name))
    return f"{name}: {first} and {second}"


@change
def share_a_child(s):
    """One layer in two places."""
    names = s.modules(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.SiLU, nn.GELU)
    if len(names) < 2:
        return None
    source = s.pick(names)
    kind = s.plain.get_submodule(source)
    target = s.pick([n for n in names if n != source and type(s.plain.get_submodule(n)) is type(kind)])
    if target is None:
        return None
    parent, last = parent_of(target)
    former = {id(m): m.get_submodule(target) for m in s.models()}
    s.both(lambda m: setattr(m.get_submodule(parent), last, m.get_submodule(source)))
    s.undo_change = lambda m: setattr(m.get_submodule(parent), last, former[id(m)])
    return f"{target} = {source}"


@change
def move_an_attribute_into_dict(s):
    """An entry of __dict__ hides a submodule."""
    names = [n for n in s.modules(nn.Conv2d, nn.BatchNorm2d, nn.ReLU) if n and not parent_of(n)[1].isdigit()]
    name = s.pick(names)
    if name is None:
        return None
    parent, last = parent_of(name)
    s.both(lambda m: m.get_submodule(parent).__dict__.__setitem__(last, helpers.halved))
    s.undo_change = lambda m: m.get_submodule(parent).__dict__.pop(last)
    s.undo_stack.append(
        (
            f"{name} hidden",
            lambda: [m.get_submodule(parent).__dict__.pop(last, None) for m in s.models() if parent in s.modules()],
        )
    )
    return f"{name} is hidden by a function"


# ---- hooks -----------------------------------------------------------------------------------------------------------


def shapes(values):
    return tuple(
        tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__
        for v in (values if isinstance(values, tuple) else (values,))
    )


def see(module, args, out):
    RECORDS.append(("forward", type(module).__name__, shapes(args), shapes(out)))


def see_before(module, args):
    RECORDS.append(("pre", type(module).__name__, shapes(args)))


def see_with_kwargs(module, args, kwargs, out):
    RECORDS.append(("kwargs", type(module).__name__, shapes(args), tuple(kwargs), shapes(out)))


def see_backward(module, dx, dy):
    RECORDS.append(("backward", type(module).__name__, shapes(dx), shapes(dy)))


def see_before_backward(module, dy):
    RECORDS.append(("pre backward", type(module).__name__, shapes(dy)))


def triple(module, args, out):
    return out * 3 if isinstance(out, torch.Tensor) else None


def halve_input(module, args):
    return tuple(a * 0.5 if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def halve_gradient(module, dx, dy):
    return tuple(None if g is None else g * 0.5 for g in dx)


def write_out(module, args, out):
    with torch.no_grad():
        if isinstance(out, torch.Tensor) and not out.is_leaf:
            out.data.mul_(0.5)


HOOKS = {
    "see": lambda m: m.register_forward_hook(see),
    "triple": lambda m: m.register_forward_hook(triple),
    "triple first": lambda m: m.register_forward_hook(triple, prepend=True),
    "always": lambda m: m.register_forward_hook(see, always_call=True),
    "write": lambda m: m.register_forward_hook(write_out),
    "pre see": lambda m: m.register_forward_pre_hook(see_before),
    "pre halve": lambda m: m.register_forward_pre_hook(halve_input),
    "kwargs": lambda m: m.register_forward_hook(see_with_kwargs, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(see_backward),
    "halve gradient": lambda m: m.register_full_backward_hook(halve_gradient),
    "pre backward": lambda m: m.register_full_backward_pre_hook(see_before_backward),
    "by hand": lambda m: m._forward_hooks.update({10**6: triple}),
}


@change
def hook(s):
    name, kind = s.pick(s.modules()), s.pick(HOOKS)
    handles = s.each(name, HOOKS[kind])
    if handles is not None and handles[0] is not None:
        s.handles.append(handles)
    if kind == "by hand":
        s.undo_change = lambda model: model.get_submodule(name)._forward_hooks.pop(10**6, None)
    elif handles is not None:
        s.undo_change = lambda model: handles[0 if model is s.plain else 1].remove()
    return f"{kind} on {name!r}"


@change
def hooks_removed(s):
    if not s.handles:
        return None
    for handle in s.handles.pop(s.rng.randrange(len(s.handles))):
        handle.remove()
    return "one"


@change
def all_hooks_cleared(s):
    name = s.pick(s.modules(where=lambda m: m._forward_hooks or m._forward_pre_hooks))
    if name is None:
        return None

    def clear(m):
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()

    s.each(name, clear)
    return f"those of {name!r}"


@change
def global_hook(s):
    register = s.pick(
        (
            lambda: nn.modules.module.register_module_forward_hook(see),
            lambda: nn.modules.module.register_module_forward_pre_hook(see_before),
            lambda: nn.modules.module.register_module_forward_hook(triple_convolution),
            lambda: nn.modules.module.register_module_full_backward_hook(see_backward),
        )
    )
    handle = register()
    s.undo_stack.append(("a global hook", handle.remove))
    return "of every module"


def triple_convolution(module, args, out):
    return out * 3 if isinstance(module, nn.Conv2d) else None


def note_state(module, state, prefix, metadata):
    state[f"{prefix}note"] = torch.zeros(())


def drop_note(module, state, prefix, *rest):
    state.pop(f"{prefix}note", None)


@change
def hook_on_the_state_dict(s):
    name = s.pick(s.modules())
    for register in (
        lambda m: m.register_state_dict_post_hook(note_state),
        lambda m: m.register_load_state_dict_pre_hook(drop_note),
    ):
        s.handles.append(s.each(name, register))
    return f"on {name!r}"


def treble(gradient):
    return gradient * 3


@change
def hook_on_a_parameter(s):
    names = [n for n, p in s.plain.named_parameters() if p.requires_grad]
    if not names:
        return None
    name = s.pick(names)
    s.handles.append(s.both(lambda m: dict(m.named_parameters())[name].register_hook(treble)))
    return name


# ---- parameters and buffers ------------------------------------------------------------------------------------------


def entries(s, include_none=False, only=None):
    """[(module's name, parameter's or buffer's name)]"""
    found = []
    for name in s.modules():
        module = s.plain.get_submodule(name)
        for table in (module._parameters, module._buffers):
            found += [
                (name, key)
                for key, t in table.items()
                if (t is not None and t.is_floating_point() or include_none and t is None)
                and (only is None or only(module, key))
            ]
    return found


def tensor_at(model, place):
    return getattr(model.get_submodule(place[0]), place[1])


WAYS = {
    "mul_": lambda t, v: t.mul_(1.5),
    "copy_": lambda t, v: t.copy_(v),
    ".data.mul_": lambda t, v: t.data.mul_(1.5),
    ".data.copy_": lambda t, v: t.data.copy_(v),
    ".data =": lambda t, v: setattr(t, "data", v.clone()),
    ".data[0]": lambda t, v: t.data[:1].fill_(0.5),
    "[0]": lambda t, v: t[:1].fill_(0.5),
    ".data last": lambda t, v: t.data[-1:].mul_(-1),
    "clamp": lambda t, v: t.data.clamp_(-0.05, 0.05),
    "numpy": lambda t, v: numpy_scale(t),
    "numpy all": lambda t, v: numpy_write(t, v),
    "foreach": lambda t, v: torch._foreach_mul_([t], 1.25),
    "lerp": lambda t, v: t.lerp_(v, 0.5),
    "init": lambda t, v: nn.init.uniform_(t, 0.1, 0.5),
    "set_": lambda t, v: t.set_(v.clone()),
    "detach": lambda t, v: t.detach().mul_(0.5),
    "view": lambda t, v: t.view(-1).mul_(0.75) if t.is_contiguous() else None,
    "vector": lambda t, v: nn.utils.vector_to_parameters(v.reshape(-1), [t]),
    "channels-last .data": lambda t, v: setattr(
        t, "data", v.clone().contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v.clone()
    ),
}


def numpy_scale(t):
    view = t.detach().numpy()
    view[-1:] *= 2


def numpy_write(t, values):
    t.detach().numpy()[...] = values.numpy()


@change
def write_a_tensor(s):
    place = s.pick(entries(s))
    if place is None:
        return None
    way = s.pick(WAYS)
    t = tensor_at(s.plain, place)
    scale = place[1] in ("running_var", "var") or place[1] == "weight" and t.dim() == 1
    values = s.tensor(t.shape, t.dtype, *((0.5, 1.5) if scale else (-0.5, 0.5)))

    def write(model):
        with torch.no_grad():
            WAYS[way](tensor_at(model, place), values)

    if place[1] in ("running_var", "var") and way in ("clamp", ".data last", "numpy"):
        way = "copy_"
    s.both(write)
    return f"{'.'.join(place)} through {way}"


@change
def replace_a_parameter(s):
    place = s.pick(entries(s))
    if place is None:
        return None
    t = tensor_at(s.plain, place)
    values = s.tensor(t.shape, t.dtype, 0.25, 1.0)
    is_parameter = isinstance(t, nn.Parameter)

    def replace(model):
        new = values.clone()
        setattr(model.get_submodule(place[0]), place[1], nn.Parameter(new) if is_parameter else new)

    s.both(replace)
    return ".".join(place)


@change
def swap_tensors(s):
    place = s.pick(entries(s))
    if place is None:
        return None
    t = tensor_at(s.plain, place)
    values = s.tensor(t.shape, t.dtype, 0.25, 1.0)
    is_parameter = isinstance(t, nn.Parameter)
    del t
    if any(weakref.getweakrefcount(tensor_at(m, place)) for m in s.models()):
        return None  # of torch's own, that an export or a checkpoint left, here or there: then it refuses

    def exchange(model):
        new = nn.Parameter(values.clone()) if is_parameter else values.clone()
        torch.utils.swap_tensors(tensor_at(model, place), new)

    s.both(exchange)
    return ".".join(place)


@change
def tensor_to_none(s):
    place = s.pick(entries(s, only=lambda m, key: not parametrize.is_parametrized(m)))
    if place is None:
        return None
    former = {id(m): tensor_at(m, place) for m in s.models()}
    s.both(lambda m: setattr(m.get_submodule(place[0]), place[1], None))
    s.undo_change = lambda m: setattr(m.get_submodule(place[0]), place[1], former[id(m)])
    return ".".join(place)


@change
def none_to_tensor(s):
    place = s.pick([(n, key) for n, key in entries(s, include_none=True) if tensor_at(s.plain, (n, key)) is None])
    if place is None:
        return None
    module = s.plain.get_submodule(place[0])
    sizes = {
        nn.Conv2d: lambda m: (m.out_channels,),
        nn.BatchNorm2d: lambda m: (m.num_features,),
        networks.Reads: lambda m: isinstance(c := m._modules["conv"], nn.Conv2d) and (1, c.out_channels, 1, 1) or None,
        networks.PixelBlock: lambda m: m.norm.normalized_shape,
        networks.Functional: lambda m: (m.weight.shape[0],),
    }
    size = next((f(module) for kind, f in sizes.items() if isinstance(module, kind)), None)
    if size is None or place[1] == "num_batches_tracked":
        return None
    values = s.tensor(size, None, 0.25, 1.0)
    is_parameter = place[1] in module._parameters

    def write(model):
        new = values.clone()
        setattr(model.get_submodule(place[0]), place[1], nn.Parameter(new) if is_parameter else new)

    s.both(write)
    s.undo_change = lambda m: setattr(m.get_submodule(place[0]), place[1], None)
    return ".".join(place)


@change
def parameter_becomes_other(s):
    """A parameter becomes a buffer or a plain attribute, a buffer a plain attribute."""
    place = s.pick(entries(s, only=lambda m, key: not parametrize.is_parametrized(m)))
    if place is None:
        return None
    way = s.pick(("buffer", "attribute", "parameter"))

    def become(model):
        module, name = model.get_submodule(place[0]), place[1]
        t = getattr(module, name).detach().clone()
        delattr(module, name)
        if way == "buffer":
            module.register_buffer(name, t)
        elif way == "parameter":
            module.register_parameter(name, nn.Parameter(t))
        else:
            module.__dict__[name] = t

    s.both(become)
    return f"{'.'.join(place)} becomes a {way}"


@change
def tie_two_weights(s):
    names = s.modules(nn.Conv2d, where=lambda m: not parametrize.is_parametrized(m) and m.weight is not None)
    if len(names) < 2:
        return None
    first = s.pick(names)
    shape = s.plain.get_submodule(first).weight.shape
    second = s.pick([n for n in names if n != first and s.plain.get_submodule(n).weight.shape == shape])
    if second is None:
        return None
    s.both(lambda m: setattr(m.get_submodule(second), "weight", m.get_submodule(first).weight))
    return f"{second}.weight = {first}.weight"


@change
def freeze(s):
    name, on = s.pick(s.modules()), s.flag()
    s.each(name, lambda m: m.requires_grad_(on) and None)
    return f"{name!r}.requires_grad_({on})"


@change
def freeze_one(s):
    names = [n for n, p in s.plain.named_parameters()]
    if not names:
        return None
    name = s.pick(names)
    s.both(
        lambda m: (
            dict(m.named_parameters())[name].requires_grad_(not dict(m.named_parameters())[name].requires_grad) and None
        )
    )
    return name


@change
def mode(s):
    name, on = s.pick(["", "", *s.modules()]), s.flag()
    s.each(name, lambda m: m.train(on) and None)
    return f"{name!r}.train({on})"


@change
def training_flag(s):
    name = s.pick(s.modules())
    s.each(name, lambda m: setattr(m, "training", not m.training))
    return f"{name!r}.training"


# ---- training --------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.01, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
}


@change
def train_steps(s):
    """The unswapped twin's gradients serve both, so that rounding does not add up over steps."""
    if not any(p.requires_grad for p in s.plain.parameters()):
        return None
    said = "the former optimizer"
    if s.optimizers is None or s.flag():
        said = s.pick(OPTIMIZERS)
        s.optimizers = s.both(lambda m: OPTIMIZERS[said](list(m.parameters())))
        if s.optimizers is None:
            return None
    for _ in range(2):
        s.serial += 1
        if not s.compare(s.default_call("once")):
            break
        for p, q in zip(s.plain.parameters(), s.swapped.parameters()):
            if p.grad is not None:
                p.grad.clamp_(-1, 1).nan_to_num_()
            q.grad = None if p.grad is None else p.grad.clone()
        if s.both(lambda m: s.optimizers[m is s.swapped].step() or True) is None:
            break  # an optimizer whose state is of the dtype that the parameters had refuses, on both sides
    return said


@change
def average_weights(s):
    """An exponential moving average, written back."""
    values = [s.tensor(p.shape, p.dtype, -0.2, 0.2) if p.dim() > 1 else None for p in s.plain.parameters()]

    def average(model):
        with torch.no_grad():
            for p, v in zip(model.parameters(), values):
                if v is not None:
                    p.lerp_(v, 0.25)

    s.both(average)
    return "of all"


@change
def load_state(s):
    assign, strict, drop = s.flag(), s.flag(), s.flag()
    scale = s.pick((0.5, 1.25))

    def load(model):
        state = {
            k: v * scale if v.is_floating_point() and not k.endswith("var") else v.clone()
            for k, v in model.state_dict().items()
        }
        if drop and state:
            state.pop(next(iter(state)))
        result = model.load_state_dict(state, strict=strict, assign=assign)
        return len(result.missing_keys), len(result.unexpected_keys)

    results = s.both(load)
    if results is not None and results[0] != results[1]:
        raise Difference(f"load_state_dict: unswapped {results[0]}, swapped {results[1]}")
    return f"assign={assign}, strict={strict}, one dropped: {drop}"


@change
def state_dict_from_the_other(s):
    """Checkpoints load both ways."""
    first, second = s.plain.state_dict(), s.swapped.state_dict()
    if list(first) != list(second) or getattr(first, "_metadata", None) != getattr(second, "_metadata", None):
        raise Difference(f"state_dict: {list(first)} and {list(second)}")
    first = {k: v.clone() for k, v in first.items()}
    s.both(lambda m: m.load_state_dict(first) and None)
    return "the unswapped one's"


# ---- casts, layouts --------------------------------------------------------------------------------------------------


@change
def cast(s):
    dtype = s.pick((torch.float32, torch.float64, torch.float32, torch.float64, torch.bfloat16))
    former = s.dtype
    s.align()
    s.both(lambda m: m.to(dtype) and None)
    s.dtype = dtype

    def undo(model):
        model.to(former)
        s.dtype = former

    s.undo_change = undo
    return f"all to {dtype}"


@change
def cast_a_part(s):
    name, dtype = s.pick(s.modules()), s.pick((torch.float32, torch.float64, torch.bfloat16))
    s.align()
    s.each(name, lambda m: m.to(dtype) and None)
    s.undo_change = lambda m: m.to(s.dtype)
    return f"{name!r} to {dtype}"


@change
def memory_format(s):
    name, order = s.pick(["", *s.modules()]), s.pick((torch.channels_last, torch.contiguous_format))
    s.each(name, lambda m: m.to(memory_format=order) and None)
    return f"{name!r} to {order}"


@change
def shared_memory(s):
    s.both(lambda m: m.share_memory() and None)
    return "all"


@change
def number_of_threads(s):
    former, now = torch.get_num_threads(), s.pick((1, 2, 3))
    torch.set_num_threads(now)
    s.undo_stack.append(("the number of threads", lambda: torch.set_num_threads(former)))
    return str(now)


# ---- copies ----------------------------------------------------------------------------------------------------------


def deep(model):
    return copy.deepcopy(model)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@change
def continue_with_a_copy(s):
    if _taken(s, "forward"):
        return None  # it may call one that was taken from the module that is given up here, and does not keep it alive
    way = s.pick((deep, deep, through_pickle, through_file))
    copies = s.both(way)
    if copies is None:
        return f"{way.__name__} fails"
    before = [state_of(m) for m in s.models()]
    s.former = [(*s.models(), s.dtype)]
    s.plain, s.swapped = copies
    s.calls_after_change()
    after = [state_of(m) for m in s.former[0][:2]]
    for (facts, values), (now_facts, now_values) in zip(before, after):
        changed = [n for (n, a), (_, b) in zip(values, now_values) if a.tobytes() != b.tobytes()]
        if (facts != now_facts or changed) and not _shares(s):
            raise Difference(f"calls of a copy changed the original's {changed}")
    return way.__name__


def _shares(s):
    """True if the unswapped copy shares something with its original: a forward bound to it, for one."""
    return any("forward" in m.__dict__ or m._forward_hooks for m in s.plain.modules())


@change
def back_to_the_original(s):
    if not s.former:
        return None
    former, s.former = s.former[0], [(*s.models(), s.dtype)]
    s.plain, s.swapped, s.dtype = former
    return "the copy is set aside"


# ---- parametrizations, pruning, fusion -------------------------------------------------------------------------------


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


PARAMETRIZATIONS = {
    "times": lambda m: parametrize.register_parametrization(m, "weight", Times(1.5)),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "bias times": lambda m: parametrize.register_parametrization(m, "bias", Times(2.0)),
}


@change
def parametrization(s):
    name = s.pick(s.modules(nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    if name is None:
        return None
    plain, swapped = (m.get_submodule(name) for m in s.models())
    if parametrize.is_parametrized(plain) and type(plain) is type(swapped):
        return None  # deep copies share the class that parametrizing made, and the first removal takes it from both
    if parametrize.is_parametrized(plain, "weight"):
        keep = s.flag()
        s.each(name, lambda m: parametrize.remove_parametrizations(m, "weight", leave_parametrized=keep) and None)
        return f"removed from {name}, parametrized kept: {keep}"
    kind = s.pick(PARAMETRIZATIONS)
    s.each(name, lambda m: PARAMETRIZATIONS[kind](m) and None)
    return f"{kind} on {name}"


@change
def pruning(s):
    name = s.pick(s.modules(nn.Conv2d, nn.Linear, where=lambda m: not parametrize.is_parametrized(m)))
    if name is None:
        return None
    if prune.is_pruned(s.plain.get_submodule(name)):
        s.each(name, lambda m: prune.remove(m, "weight") and None)
        return f"made permanent in {name}"
    way = s.pick(
        (
            lambda m: prune.l1_unstructured(m, "weight", 0.4),
            lambda m: prune.ln_structured(m, "weight", 0.3, 2, 0),
            lambda m: prune.random_unstructured(m, "weight", 0.4),
        )
    )
    s.each(name, lambda m: way(m) and None)
    return name


@change
def fuse(s):
    """torch's own fusion of convolutions and batch norms."""
    pairs = []
    for name in s.modules(nn.Sequential):
        m = s.plain.get_submodule(name)
        keys = list(m._modules)
        pairs += [
            [f"{name}.{a}".lstrip("."), f"{name}.{b}".lstrip(".")]
            for a, b in zip(keys, keys[1:])
            if type(m._modules[a]) is nn.Conv2d and type(m._modules[b]) is nn.BatchNorm2d
        ]
    pair = s.pick(pairs)
    if pair is None:
        return None
    s.both(lambda m: m.eval() and None)
    s.both(lambda m: torch.ao.quantization.fuse_modules(m, [pair], inplace=True) and None)
    return f"{pair}"


# ---- convext's own ---------------------------------------------------------------------------------------------------


@change
def swap_again(s):
    s.swapped = s.swap(s.swapped)
    return "without a revert"


@change
def revert_and_swap(s):
    s.swapped = convext.revert(s.swapped)
    s.compare_state()
    said = "revert"
    if s.flag():
        s.calls_after_change()
        said += ", calls"
    s.swapped = s.swap(s.swapped)
    return f"{said}, swap"


@change
def verify_and_report(s):
    if not s.is_convext or any(p.dtype not in (torch.float32, torch.float64) for p in s.plain.parameters()):
        return None
    call = Call((s.image().requires_grad_(),), backward="once", seed=s.serial)
    if not s.compare(call):  # verify wants a model that runs, forward and backward
        return None
    before, random = state_of(s.swapped), torch.get_rng_state()
    if s.flag():
        if not str(convext.report(s.swapped)):
            raise Difference("an empty report")
        return "report"
    if _taken(s, "forward"):
        return None  # it may run the module that it was taken from, in every copy too
    try:
        copy.deepcopy(s.plain)
    except RuntimeError:
        return None  # a model that torch cannot copy, which verify refuses
    verification = convext.verify(s.swapped, call.args[0])
    if not verification.ok:
        raise Difference(f"verify says\n{verification}")
    if not torch.equal(random, torch.get_rng_state()):
        raise Difference("verify changed the random state")
    (facts, values), (now_facts, now_values) = before, state_of(s.swapped)
    if facts != now_facts or any(a.tobytes() != b.tobytes() for (_, a), (_, b) in zip(values, now_values)):
        raise Difference("verify changed the model")
    return "verify"


# ---- calls -----------------------------------------------------------------------------------------------------------


@change
def call_under_contexts(s):
    names = [
        s.pick(("no_grad", "no_grad", "enable_grad", "inference_mode")),
        s.pick(
            (
                "autocast",
                "function mode",
                "dispatch mode",
                "anomaly",
                "saved tensors",
                "save on cpu",
                "profiler",
                "aten",
                "native",
                "layer by layer",
                "no output pool",
                "strict",
                "deterministic",
                "meta device",
            )
        ),
    ]
    if s.flag():
        names.reverse()
    if names[0] == "dispatch mode" and "profiler" in names:
        return None
    backward = "once" if "enable_grad" in names and s.flag() else None
    call = Call((s.image(),), names=tuple(names), backward=backward, seed=s.serial)
    for _ in range(2):
        s.compare(call)
    return ", ".join(names)


@change
def call_with_another_input(s):
    layout = s.pick(("contiguous", "channels-last", "sliced", "expanded", "transposed"))
    batch, size = s.rng.randint(0, 4), (s.rng.randint(1, 15), s.rng.randint(1, 15))
    dtype = s.pick((None, None, None, torch.float32, torch.float64, torch.bfloat16))
    backward = s.pick((None, "once"))
    if batch == 0:
        x = s.tensor((0, networks.IN_CHANNELS, *size), dtype)
    else:
        x = s.image(layout, batch, size, dtype)
    if s.rng.randrange(6) == 0:
        x = x[0] if batch else x[:, :2]
    if backward and s.flag():
        x.requires_grad_()
    for kind in (None, backward, None):
        s.compare(Call((x,), names=() if kind else ("no_grad",), backward=kind, seed=s.serial))
    return f"{layout} {tuple(x.shape)} {x.dtype}"


@change
def other_size_from_here_on(s):
    s.batch, s.size = s.rng.randint(1, 3), (s.rng.randint(6, 14), s.rng.randint(6, 14))
    return f"{s.batch}, {s.size}"


@change
def call_with_nonfinite_pixels(s):
    if not {torch.bfloat16, torch.float16}.isdisjoint(p.dtype for p in s.plain.parameters()):
        return None  # PyTorch's own fast way for 3x3 filters makes NaN of infinity: test_winograd has what is right
    x = s.image()
    for _ in range(s.rng.randint(1, 2)):
        x.view(-1)[s.rng.randrange(x.numel())] = s.pick((float("nan"), float("inf"), -float("inf")))
    for _ in range(3):
        s.compare(Call((x,), names=("no_grad",), seed=s.serial))
    return "NaN or infinity"


@change
def call_with_extra_arguments(s):
    if type(s.plain) is not networks.ExtraArguments or "stem" not in s.modules(nn.Conv2d):
        return None
    kwargs = {}
    x = s.image()
    if s.flag():
        kwargs["skip"] = s.tensor((1, s.plain.stem.out_channels, 1, 1))
    if s.flag():
        kwargs["flag"] = s.flag()
    if s.flag():
        kwargs["scales"] = s.pick(([], [2.0], [0.5, 0.5], (3.0,)))
    positional = (x, kwargs.pop("skip")) if "skip" in kwargs and s.flag() else (x,)
    for backward in s.pick(((None, None), (None, "once"), ("once", None))):
        s.compare(Call(positional, kwargs, names=() if backward else ("no_grad",), backward=backward, seed=s.serial))
    return ", ".join(kwargs) or "none"


@change
def call_badly(s):
    way = s.rng.randrange(5)
    x = s.image()
    args, kwargs = {
        0: ((), {}),
        1: ((x, x, x, x), {}),
        2: ((x,), {"unknown": 1}),
        3: ((x[:, :1],), {}),
        4: ((None,), {}),
    }[way]
    s.compare(Call(args, kwargs, names=("no_grad",), seed=s.serial))
    return f"way {way}"


@change
def backward_in_other_ways(s):
    how = s.pick(("twice", "retained", "double"))
    x = s.image()
    if s.flag():
        x.requires_grad_()
    s.compare(Call((x,), backward=how, seed=s.serial))
    return how


@change
def call_a_submodule(s):
    """What each submodule got in a call is found by hooks, as people do it."""
    seen = {}
    names = {id(m): n for n, m in s.plain.named_modules()}

    def note(module, args, kwargs):
        if id(module) in names and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            seen[names[id(module)]] = tuple(args[0].shape)

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for model in s.models() for m in model.modules()]
    try:
        ran = s.compare(s.default_call())
    finally:
        for handle in handles:
            handle.remove()
    name = s.pick([n for n in seen if n])
    if not ran or name is None:
        return None
    for backward in s.pick(((None, None, None), ("once", None), ("once", "once"))):
        x = s.tensor(seen[name])
        s.compare(Call((x,), target=name, names=() if backward else ("no_grad",), backward=backward, seed=s.serial))
    return name


@change
def write_into_a_result(s):
    def write(model, args, kwargs):
        result = model(*args, **kwargs)
        for t in tensors_of(result):
            if t.is_floating_point():
                t.mul_(2)
        return result

    call = s.default_call(s.pick((None, "once")))
    for _ in range(2):
        s.compare(call, write, "a write into the result")
    return "in place"


@change
def use_a_result(s):
    """Views, resizes, shared memory, arrays."""
    way = s.rng.randrange(5)

    def use(model, args, kwargs):
        result = model(*args, **kwargs)
        found = []
        for t in tensors_of(result):
            if way == 0:
                found.append(t.view(-1))
            elif way == 1:
                t = t.detach()
                size = t.untyped_storage().size()
                t.untyped_storage().resize_(0)
                t.untyped_storage().resize_(size)
                found.append(t.zero_())
            elif way == 2:
                found.append(t.detach().resize_(3))
                found[-1] = found[-1].zero_()
            elif way == 3:
                found.append(t.detach().share_memory_())
            else:
                found.append(copy.deepcopy(t.detach()))
        return found

    for _ in range(2):
        s.compare(s.default_call(), use, f"a use of the result, way {way}")
    return f"way {way}"


@change
def call_from_threads(s):
    if any(m.training for m in s.plain.modules()) or s.modules(networks.Counts) or s.handles or s.undo_stack:
        return None
    calls = [Call((s.image(),), names=(), seed=s.serial) for _ in range(3)]
    grad = s.flag()

    def many(model, args, kwargs):
        results, errors = [None] * len(calls), []

        def run(i):
            try:
                with torch.set_grad_enabled(grad):
                    for _ in range(2):
                        results[i] = model(*calls[i].fresh_arguments()[0])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    for _ in range(2):
        s.compare(calls[0], many, "three threads")
    return f"gradients: {grad}"


@change
def call_with_checkpointing(s):
    reentrant = s.flag()
    x = s.image().requires_grad_()

    def way(model, args, kwargs):
        return checkpoint(model, *args, use_reentrant=reentrant)

    for _ in range(2):
        s.compare(Call((x,), backward="once", seed=s.serial), way, f"checkpoint, reentrant={reentrant}")
    return f"reentrant={reentrant}"


@change
def checkpoint_of_a_block(s):
    """A forward of an instance that checkpoints its class's."""
    name = s.pick([n for n in s.modules(where=lambda m: m._modules) if n])
    if name is None:
        return None
    s.each(name, lambda m: setattr(m, "forward", types.MethodType(checkpointed, m)))
    s.undo_change = lambda model: model.get_submodule(name).__dict__.pop("forward", None)
    return name


def checkpointed(self, *args):
    return checkpoint(type(self).forward, self, *args, use_reentrant=False)


def first_tensor(result):
    return tensors_of(result)[0]


@change
def call_functionally(s):
    way = s.pick(
        ("functional_call", "grad", "vmap", "jvp", "vjp", "dual numbers", "jacrev of a sum", "batched gradients")
    )
    scale = s.pick((0.5, 1.25))

    def functional(model, args, kwargs):  # the order of derivatives in memory is nobody's promise
        return torch.utils._pytree.tree_map(torch.Tensor.contiguous, answer(model, args))

    def answer(model, args):
        params = {n: p.detach() * scale for n, p in model.named_parameters()}
        x = args[0]

        def f(params, x):
            return first_tensor(torch.func.functional_call(model, params, (x,)))

        if way == "functional_call":
            return f(params, x)
        if way == "grad":
            return torch.func.grad(lambda p: (f(p, x) ** 2).sum())(params)
        if way == "vmap":
            return torch.vmap(lambda x: first_tensor(model(x.unsqueeze(0))), randomness="same")(x)
        if way == "jvp":
            return torch.func.jvp(lambda x: first_tensor(model(x)), (x,), (torch.ones_like(x),))
        if way == "vjp":
            y, pull = torch.func.vjp(lambda x: first_tensor(model(x)), x)
            return y, pull(torch.ones_like(y))
        if way == "dual numbers":
            with torch.autograd.forward_ad.dual_level():
                y = first_tensor(model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))))
                return tuple(torch.autograd.forward_ad.unpack_dual(y))
        if way == "jacrev of a sum":
            return torch.func.jacrev(lambda x: first_tensor(model(x)).sum((-1,)).sum(0))(x)
        x = x.clone().requires_grad_()
        y = first_tensor(model(x))
        grads = torch.stack([torch.ones_like(y), -torch.ones_like(y)])
        return torch.autograd.grad(y, x, grads, is_grads_batched=True)

    call = Call((s.image(),), seed=s.serial)
    for _ in range(2):
        s.compare(call, functional, way)
    return way


@change
def call_without_a_module(s):
    """The forward as others hold it."""
    way = s.pick(("forward", "__call__", "type", "__func__"))

    def call(model, args, kwargs):
        if way == "forward":
            return model.forward(*args, **kwargs)
        if way == "__call__":
            return model.__call__(*args, **kwargs)
        if way == "__func__":
            return model.forward.__func__(model.forward.__self__, *args, **kwargs)
        return type(model).forward(model, *args, **kwargs)

    for _ in range(2):
        s.compare(s.default_call(), call, f"its {way}")
    return way


# ---- what takes long: rarely -----------------------------------------------------------------------------------------


def rarely(s):
    return s.rng.randrange(12) == 11


@change
def compile_it(s):
    if not rarely(s):
        return None
    way = s.pick(("torch.compile", "module.compile"))
    torch._dynamo.reset()

    def compiled(model, args, kwargs):
        if way == "torch.compile":
            return torch.compile(model, backend="eager")(*args, **kwargs)
        model.compile(backend="eager")
        try:
            return model(*args, **kwargs)
        finally:
            model._compiled_call_impl = None

    try:
        s.compare(s.default_call(s.pick((None, "once"))), compiled, way)
    finally:
        torch._dynamo.reset()
    return way


@change
def export_it(s):
    if not rarely(s):
        return None

    def exported(model, args, kwargs):
        # A copy: an export that fails may leave fake tensors in the place of the model's own.
        return torch.export.export(copy.deepcopy(model), args, strict=False).module()(*args)

    s.compare(s.default_call(), exported, "torch.export")
    return "non-strict"


@change
def trace_it(s):
    if s.rng.randrange(4) != 3:
        return None

    def traced(model, args, kwargs):
        return torch.fx.symbolic_trace(model)(*args)

    s.compare(s.default_call(), traced, "torch.fx")
    return "torch.fx.symbolic_trace"
