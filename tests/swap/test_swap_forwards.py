"""Forwards that a careless trace would freeze, lose or reorder, and the strides that user code sees."""

import collections
import copy
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

import convext
from convext.swap.capture import signature
from convext.swap.capture.trace import Trace
from convext.swap.match.graph import Graph
from convext.swap.planned import PlannedForward
from convext.swap.schedule import layout

pytestmark = pytest.mark.smoke
GLOBAL = []


def conv_bn(channels=3):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 7


class MaybeNone(nn.Module):
    """Cannot be traced, and returns None now and then."""

    def forward(self, x):
        return None if x.sum() > 0 else x * 2


class Attention(nn.Module):
    """Returns a tuple."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x), x.mean((2, 3))


def network(forward, **modules):
    """A module of one conv + bn chain `body`, and a forward."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()
            self.scale = nn.Parameter(torch.full((1, 3, 1, 1), 1.5))
            self.seen, self.count, self.rate, self.flag = [], 0, 0.5, True
            for name, module in modules.items():
                setattr(self, name, module)

    Network.forward = forward
    torch.manual_seed(0)
    return Network().double()


def stores(self, x):
    self.features = self.body(x)
    return torch.relu(self.features)


def counts(self, x):
    self.count += 1
    return torch.relu(self.body(x)) * self.count


def appends(self, x):
    y = torch.relu(self.body(x))
    self.seen.append(y)
    return y + len(self.seen)


def appends_globally(self, x):
    GLOBAL.append(1)
    return torch.relu(self.body(x)) + len(GLOBAL) % 2


def draws_in_python(self, x):
    y = torch.relu(self.body(x))
    return y if random.random() < 0.5 else -y


def draws_in_numpy(self, x):
    return torch.relu(self.body(x)) * float(numpy.random.rand())


def draws_in_torch(self, x):
    return torch.relu(self.body(x)) * torch.rand(1, dtype=torch.float64)


def drops_path(self, x):
    y = self.body(x)
    keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype) < self.rate
    return torch.relu(y * keep + x)


def decides_by_a_draw(self, x):
    y = torch.relu(self.body(x))
    return y if torch.rand(1).item() < 0.5 else -y


def decides_by_a_parameter(self, x):
    return torch.relu(self.body(x)) if self.scale.sum() > 4 else self.body(x)


def computes_on_a_parameter(self, x):
    return torch.relu(self.body(x)) * self.scale.abs().sum()


def asks_for_grad_mode(self, x):
    y = torch.relu(self.body(x))
    return y if torch.is_grad_enabled() else y * 2


def turns_grad_off(self, x):
    with torch.no_grad():
        y = self.body(x)
    return torch.relu(y + x)


def own_function(self, x):
    return torch.relu(Double.apply(self.body(x)))


def checkpoints(self, x):
    # To the end: where it may stop early, it does so before a batch norm's statistics count the batch again.
    with checkpoint.set_checkpoint_early_stop(False):
        return torch.relu(checkpoint.checkpoint(self.body, x, use_reentrant=False))


def asks_for_the_type(self, x):
    return torch.relu(self.body(x)) if type(x) is torch.Tensor else x


def is_instance(self, x):
    y = self.body(x)
    return torch.relu(y) if isinstance(y, torch.Tensor) and torch.is_tensor(x) and not isinstance(x, list) else x


def compares_with_none(self, x):
    y = self.other(x)
    x = torch.relu(self.body(x))
    return x if y is None else x + y


def unpacks(self, x):
    y, z = self.other(torch.relu(self.body(x)))
    return y * z[:, :, None, None]


def adds_in_place_to_the_input(self, x):
    x = x * 1
    y = self.body(x)
    x += y
    return torch.relu(y), x


def writes_between(self, x):
    """The input of the convolution changes before the chain ends: a moved convolution would read the new one."""
    x = x * 1
    y = self.body[0](x)
    x.mul_(2)
    return torch.relu(self.body[1](y)) + x


def writes_the_residual_between(self, x):
    shortcut = x * 1
    y = self.body(x) + shortcut
    shortcut.mul_(3)
    return torch.relu(y) + shortcut


def writes_through_a_view(self, x):
    x = x * 1
    flat = x.view(x.size(0), -1)
    y = self.body[0](x)
    flat.mul_(2)
    return torch.relu(self.body[1](y)) + x


def reuses_the_sum(self, x):
    y = self.body(x) + x
    return torch.relu(y) + y


def adds_itself(self, x):
    y = self.body(x)
    return torch.relu(y + y)


def adds_with_alpha(self, x):
    return torch.relu(torch.add(self.body(x), x, alpha=3))


def broadcasts(self, x):
    return torch.relu(self.body(x) + x.mean((2, 3), keepdim=True)), F.relu(self.body(x[:1]) + x)


def promotes(self, x):
    return torch.relu(self.body(x) + x.float())


def uses_a_weight(self, x):
    return torch.relu(self.body(x)) + F.conv2d(x, self.body[0].weight, padding=1)


def uses_a_config(self, x):
    y = self.body(x)
    return torch.relu(y) if self.flag else y * self.rate


def by_shape(self, x):
    n, c = x.shape[0], x.size(1)
    return torch.relu(self.body(x)).reshape(n, c, -1).sum(2) / x.shape[-1]


def returns_a_structure(self, x):
    y = torch.relu(self.body(x))
    return collections.OrderedDict(out=y, aux=[y.mean(), (x,)])


def reads_strides(self, x):
    y = torch.relu(self.body(x))
    return y * y.stride(1) + (1 if y.is_contiguous() else 100)


def writes_an_alias_of_the_result(self, x):
    y = torch.relu(self.body(x))
    z = y.view(y.size(0), -1)
    z.add_(1)
    return F.max_pool2d(y, 2), z


def swaps_an_argument(self, x):
    return torch.relu(self.body(x)), (lambda a, b=2: a * b)(x), {"k": x}["k"]


FORWARDS = [
    stores,
    counts,
    appends,
    appends_globally,
    draws_in_python,
    draws_in_numpy,
    draws_in_torch,
    drops_path,
    decides_by_a_draw,
    decides_by_a_parameter,
    computes_on_a_parameter,
    asks_for_grad_mode,
    turns_grad_off,
    own_function,
    checkpoints,
    asks_for_the_type,
    is_instance,
    adds_in_place_to_the_input,
    writes_between,
    writes_the_residual_between,
    writes_through_a_view,
    reuses_the_sum,
    adds_itself,
    adds_with_alpha,
    broadcasts,
    promotes,
    uses_a_weight,
    uses_a_config,
    by_shape,
    returns_a_structure,
    reads_strides,
    writes_an_alias_of_the_result,
    swaps_an_argument,
]
# What must be seen through all the same, for the rest would be an easy promise.
FUSED = {
    drops_path,
    computes_on_a_parameter,
    is_instance,
    uses_a_config,
    by_shape,
    returns_a_structure,
    broadcasts,
    adds_itself,
    reads_strides,
    draws_in_torch,
}


# Autograd refuses what these write over, with and without convext.
NO_BACKWARD = {adds_in_place_to_the_input, writes_between, writes_through_a_view, writes_an_alias_of_the_result}


def observe(model, x, backward=True):
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    GLOBAL.clear()
    observed = []
    for step in range(3):
        model.train(step == 1)
        given = x.clone().requires_grad_()
        out = [t for t in torch.utils._pytree.tree_leaves(model(given)) if isinstance(t, torch.Tensor)]
        if backward:
            sum(t.square().sum() for t in out if t.requires_grad).backward()
        with torch.no_grad():
            quiet = [t for t in torch.utils._pytree.tree_leaves(model(x.clone()))]
        observed += [
            *out,
            given.grad,
            *quiet,
            *(t for t in model.buffers()),
            random.random(),
            torch.rand(1),
            len(model.seen),
            model.count,
            len(GLOBAL),
            [t.stride() for t in out],
            [t.stride() for t in quiet],
        ]
        model.flag = not model.flag
        model.rate /= 2
        with torch.no_grad():
            model.scale.sub_(0.2)
    return [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in observed]


def assert_observed_the_same(model, x, backward=True):
    twin = convext.swap(copy.deepcopy(model))
    expected, found = observe(model, x, backward), observe(twin, x, backward)
    assert len(expected) == len(found)
    for a, b in zip(found, expected):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        else:
            assert a == b
    return twin


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_forward_does_what_it_did(forward):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    twin = assert_observed_the_same(network(forward), x, forward not in NO_BACKWARD)
    if forward in FUSED:
        assert convext.report(twin)["body.0"].fused


def test_children_of_unknown_kind():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for sign in (1, -1):
        assert_observed_the_same(network(compares_with_none, other=MaybeNone()), sign * x.abs())
    assert_observed_the_same(network(unpacks, other=Attention()), x)


def test_forward_with_arguments_of_several_kinds():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()

        def forward(self, x, skip=None, scale=1.0, parts=(), *, flip: bool = False):
            y = self.body(x)
            if skip is not None:
                y = y + skip
            y = F.relu(y) * scale
            for part in parts:
                y = y + part
            return y.flip(3) if flip else y

    torch.manual_seed(0)
    plain = Network().double().eval()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    calls = [
        ((x,), {}),
        ((x, x), {}),
        ((x,), {"skip": x}),
        ((x, None, 2.0), {}),
        ((x, x, 2), {"flip": True}),
        ((x,), {"parts": [x, x]}),
        ((x,), {"parts": (x,)}),
        ((x, x), {"parts": [x], "scale": 0.5}),
    ]
    for args, kwargs in calls * 2:
        torch.testing.assert_close(swapped(*args, **kwargs), plain(*args, **kwargs), rtol=1e-12, atol=1e-12)
    for step in range(40):  # ever new constants do not fill the memory
        torch.testing.assert_close(swapped(x, scale=step), plain(x, scale=step), rtol=1e-12, atol=1e-12)
    assert len(swapped.__dict__["forward"]._plans) < 20
    with pytest.raises(TypeError, match="unexpected keyword argument 'skp'"):
        swapped(x, skp=x)


def test_tracing_leaves_nothing_behind_in_the_model():
    model = network(stores)
    before = set(model.__dict__)
    convext.swap(model)
    assert set(model.__dict__) - before == {"forward"} and model.seen == []
    assert (
        "sets the attribute 'features'" in convext.report(model)["body.0"].reason
        or convext.report(model)["body.0"].fused == "bn"
    )


def test_prints_at_every_call(capsys):
    def forward(self, x):
        print("shape", tuple(x.shape))
        return torch.relu(self.body(x))

    model = convext.swap(network(forward))
    capsys.readouterr()
    for _ in range(2):
        model(torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    assert capsys.readouterr().out == "shape (2, 3, 6, 6)\n" * 2


# ---- the seam between layers -----------------------------------------------------------------------------------------

native = pytest.mark.skipif(convext.backends.unavailable("native", "cpu") is not None, reason="native backend is off")


class Looking(nn.Module):
    """Notes the strides of what it gets."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, x):
        self.log.append(x.stride())
        return x


class Block(nn.Module):
    def __init__(self, *inside):
        super().__init__()
        self.inside = nn.Sequential(*inside)
        self.body = conv_bn()

    def forward(self, x):
        return F.relu(self.body(self.inside(x)) + x)


def inner_variants(model):
    return [
        v
        for m in model.modules()
        if isinstance(m.__dict__.get("forward"), PlannedForward)
        for plans in m.__dict__["forward"]._plans.values()
        for plan in plans
        for v in plan.by_mode.values()
    ]


@native
def test_values_between_layers_are_channels_last_and_the_users_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.MaxPool2d(2), Block()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    convext.swap(model)
    inside = []
    right = convext.ops.conv_bn_act
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convext.ops, "conv_bn_act", lambda x, *a: inside.append((x.stride(1), a[-1])) or right(x, *a))
        found = model(x)
    assert found.is_contiguous() and found.stride() == expected.stride()
    assert inside == [(64, True), (1, True), (1, True)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@native
@pytest.mark.parametrize("grad", [True, False])
def test_user_modules_and_hooks_between_layers_see_contiguous_tensors(grad):
    torch.manual_seed(0)
    log, hooked = [], []
    model = nn.Sequential(Block(), Looking(log), Block(Looking(log)), Block()).double()
    convext.swap(model)
    model[3].register_forward_pre_hook(lambda m, args: hooked.append(args[0].stride()))
    model[3].body.register_forward_hook(lambda m, args, out: hooked.append(out.stride()))
    with torch.set_grad_enabled(grad):
        out = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert log == [(192, 64, 8, 1)] * 2 and hooked == [(192, 64, 8, 1)] * 2 and out.is_contiguous()


@native
def test_block_that_starts_to_listen_gets_contiguous_tensors_and_its_writes_are_kept():
    torch.manual_seed(0)

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.body = nn.ReLU(inplace=True), conv_bn()

        def forward(self, x):
            return F.relu(self.body(self.act(x)))  # writes its argument

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = Block(), Writes()

        def forward(self, x):
            x = self.stem(x) - 1
            y = self.block(x)
            return y * x  # sees what the block wrote

    plain = Network().double().eval()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(swapped(x), plain(x), rtol=1e-10, atol=1e-10)
        seen = []
        swapped.block.body[0].register_forward_hook(lambda m, args, out: seen.append(args[0].stride()))
        torch.testing.assert_close(swapped(x), plain(x), rtol=1e-10, atol=1e-10)
        assert seen == [(192, 64, 8, 1)]
    with torch.inference_mode():
        torch.testing.assert_close(swapped(x).clone(), plain(x).clone(), rtol=1e-10, atol=1e-10)


def test_dropout_draws_the_same_mask_in_training():
    torch.manual_seed(0)
    plain = nn.Sequential(*conv_bn(), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Dropout2d())
    plain.double()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = []
    for model in (plain, swapped):
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


@native
def test_seam_is_for_contiguous_inputs_of_the_native_backend():
    x = torch.randn(2, 3, 8, 8)
    assert layout.wanted([x])
    assert not layout.wanted([x.to(memory_format=torch.channels_last)])
    assert not layout.wanted([x.transpose(2, 3)])
    with convext.backend("aten"):
        assert not layout.wanted([x])


@pytest.mark.skipif(convext.backends.unavailable("native", "cpu") is not None, reason="the compiled library's own copy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 37, 5, 3), (1, 64, 9, 17), (3, 2, 1, 1), (0, 3, 4, 4), (2, 1, 4, 6)])
def test_a_channels_last_image_is_handed_back_contiguous(shape, dtype):
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    for given in (x, x[:, :, 1:], x.transpose(2, 3), x.flatten(2), x[:1]):
        result = layout.contiguous_unrecorded(given)
        assert torch.equal(result, given)
        images = given.dim() == 4 and given.numel() > 0
        assert result.stride() == (torch.empty(given.shape) if images else given.contiguous()).stride()


class Segments(nn.Module):
    """As torchvision's networks for segmentation: a backbone that returns features by name, a head for each."""

    def __init__(self):
        super().__init__()
        getter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
        layers = {"stem": conv_bn(), "relu": nn.ReLU(inplace=True), "one": Block(), "two": Block(), "three": Block()}
        self.backbone = getter(nn.Sequential(collections.OrderedDict(layers)), {"one": "aux", "two": "out"})
        self.classifier, self.aux_classifier = nn.Sequential(Block(), nn.Conv2d(3, 2, 1)), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        size, features = x.shape[-2:], self.backbone(x)
        result = collections.OrderedDict()
        result["out"] = F.interpolate(self.classifier(features["out"]), size=size, mode="bilinear")
        result["aux"] = self.aux_classifier(features["aux"])
        return result


def assert_same_results(found, expected):
    assert type(found) is type(expected) and list(found) == list(expected)
    for a, b in zip(found.values(), expected.values()):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@native
@torch.no_grad()
def test_a_backbone_that_returns_features_by_name_is_looked_through():
    torch.manual_seed(0)
    plain, log = Segments().double().eval(), []
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = plain(x)
    for _ in range(2):
        found = swapped(x)
        assert_same_results(found, expected)
    assert found["out"].data_ptr() != found["aux"].data_ptr()
    [compiled] = swapped.__dict__["forward"].present_plans()
    # Between the image and the results no value is copied to another order of memory.
    pinned = {node.name for node in compiled.layout.must_be_contiguous}
    assert pinned == {"interpolate", "aux_classifier"}
    # Called by itself, it does what it did.
    assert_same_results(swapped.backbone(x), plain.backbone(x))
    # What hooks it, changes it or replaces it is noticed.
    handle = swapped.backbone.register_forward_hook(lambda m, args, out: log.append(list(out)))
    assert_same_results(swapped(x), expected)
    assert log == [["aux", "out"]]
    handle.remove()
    for model in (plain, swapped):
        model.backbone.return_layers["one"] = "other"
        model.backbone.return_layers["two"] = "aux"
        model.backbone.return_layers["stem"] = "out"
    assert_same_results(swapped(x), plain(x))


@native
@torch.no_grad()
def test_features_that_are_written_in_place_keep_their_values():
    """Features are the backbone's own values, some of them another layer's argument and result at once."""

    class Writes(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone, self.body = backbone, conv_bn()

        def forward(self, x):
            features = self.backbone(x)
            one, two = features["aux"], features["out"]
            y = F.relu(self.body(one))
            one += two  # after its reader
            z = self.body[0](two)
            two.view(-1).mul_(2)  # through a view
            return {"y": y, "z": z, "one": one, "two": two, "sum": y + one}

    torch.manual_seed(0)
    plain = Writes(Segments().backbone).double().eval()
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = plain(x)
    for _ in range(2):
        assert_same_results(swapped(x), expected)


@native
@torch.no_grad()
def test_a_write_into_what_a_container_returned_reaches_its_argument():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()

        def forward(self, x):
            return {"y": F.relu(self.body(x)), "x": x}

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.same, self.body = conv_bn(), Same(), conv_bn()

        def forward(self, x):
            x = self.stem(x)
            out = self.same(x)
            early = self.body(x)
            back = out["x"]
            back += early  # writes x
            return {"early": early, "late": self.body[0](x), "y": out["y"]}

    torch.manual_seed(0)
    plain = Network().double().eval()
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = plain(x)
    for _ in range(2):
        assert_same_results(swapped(x), expected)


def test_what_a_result_may_share_memory_with():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block = nn.Conv2d(3, 3, 1), Block()

        def forward(self, x, y):
            a = self.conv(x)
            b = a
            b += y  # the first argument alone
            c = b.mul_(y)
            d = torch.add(c, y, out=x)  # nobody looks who is written
            e = F.interpolate(c, scale_factor=1)  # a new tensor, whatever the size
            f = self.block(y)  # a container's result: anything that it was given
            f += c  # and so it may be no tensor
            return F.relu(e, inplace=True), d, f

    network = Network()
    network.block = convext.swap(network.block)  # else it would be looked through
    trace = Trace(network, ((signature.TENSOR,) * 2, ()))
    found = {
        node.name: {alias.name for alias in aliases - {node}}
        for node, aliases in Graph(trace).aliases.items()
        if node.op != "output"
    }
    x, y = (node.name for node in trace.graph.nodes if node.op == "placeholder")
    assert found == {
        x: set(),
        y: set(),
        "conv": set(),
        "iadd": {"conv"},
        "mul_": {"conv", "iadd"},
        "add": {"conv", "iadd", "mul_", x, y},
        "interpolate": set(),
        "block": {y},
        "iadd_1": {"conv", "iadd", "mul_", "block", y},
        "relu": {"interpolate"},
    }
