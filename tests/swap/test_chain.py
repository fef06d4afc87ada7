"""Elementwise operations behind a layer: one pass over its result, in its memory, wherever that cannot be seen."""

import copy
import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convext
from convext.backends import native
from convext.chain import MOST, OPERATIONS
from convext.swap.match import elementwise

EPS = torch.finfo(torch.float32).eps
VECTOR, ONE = torch.linspace(-2, 3, 5).view(5, 1, 1), torch.tensor([1.5])

# name -> (function, by how many roundings of its result that may be off). Arithmetic rounds once. Of the others: exp
# and the polynomials err by 2 to 4, and every operation behind them by one. Numbers are such as float32 holds.
UNARY = {
    "relu": (F.relu, 0),
    "relu_": (lambda z: z.relu_(), 0),
    "relu6": (F.relu6, 0),
    "hardtanh": (lambda z: F.hardtanh(z, -0.5, 0.25), 0),
    "clamp": (lambda z: z.clamp(-0.5, 0.25), 0),
    "clamp_crossed": (lambda z: torch.clamp(z, 0.5, -0.25), 0),
    "clamp_low": (lambda z: torch.clamp(z, min=-0.5), 0),
    "clamp_high": (lambda z: z.clamp_(max=0.5), 0),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.25), 1),
    "elu": (lambda z: F.elu(z, 0.75), 6),
    "sigmoid": (torch.sigmoid, 4),
    "sigmoid_": (lambda z: z.sigmoid_(), 4),
    "tanh": (torch.tanh, 6),
    "silu": (F.silu, 5),
    "hardswish": (F.hardswish, 3),
    "hardsigmoid": (F.hardsigmoid, 3),
    "mish": (F.mish, 8),
    "softplus": (F.softplus, 6),
    "gelu": (F.gelu, 8),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), 8),
    "add": (lambda z: z + 0.3125, 1),
    "add_": (lambda z: z.add_(0.3125), 1),
    "radd": (lambda z: 2 + z, 1),
    "sub": (lambda z: z - 0.3125, 1),
    "rsub": (lambda z: 0.3125 - z, 1),
    "mul": (lambda z: z * 0.3125, 1),
    "rmul": (lambda z: torch.mul(3, z), 1),
    "div": (lambda z: z / 0.3125, 1),
}
MODULES = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.LeakyReLU(0.375), nn.ELU(0.5), nn.GELU(), nn.GELU("tanh"),
           nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Mish(), nn.Softplus(), nn.PReLU(),
           nn.PReLU(5)]  # fmt: skip
BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "rsub": lambda z, t: t - z, "minimum": torch.minimum, "maximum": lambda z, t: torch.maximum(t, z),
}  # fmt: skip


class Behind(nn.Module):
    """A pool whose result is exact, so that what a chain makes of it can be told to the last place, and a convolution
    for the swap to have something to do. `function` gets the pool's result, and the tensor where it takes one."""

    def __init__(self, *functions, tensor=None, source=None):
        super().__init__()
        self.functions = functions
        for number, function in enumerate(functions):
            if isinstance(function, nn.Module):
                self.add_module(f"layer{number}", function)
        self.first = source or nn.AvgPool2d(1)
        self.last = nn.Conv2d(5, 5, 1)
        self.tensor = None if tensor is None else nn.Parameter(tensor.clone())
        self.takes_tensor = tensor is not None

    def forward(self, x):
        z = self.first(x)
        for function in self.functions:
            z = function(z, self.tensor) if self.takes_tensor else function(z)
        return z, self.last(z)


def chains(model):
    """The words of the chains in the plans of a swapped model."""
    plans = model.__dict__["forward"].present_plans()
    return [unit.words for plan in plans for unit in plan.units if type(unit.first).__name__ == "Chain"]


X = torch.cat([torch.linspace(-9, 9, 1200), torch.randn(1200, generator=torch.Generator().manual_seed(3))])
X = torch.cat([X, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3, 60.0, -60.0, 100.0, -100.0])])[:2400].view(
    2, 5, 16, 15
)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def compared(model, x, ulps, of_z=False):
    """Swapped beside plain in float64, to so many roundings of the result; strides as in plain. GELU's are of z: far
    below zero it is z times what cancels in torch's own as well."""
    plain, swapped = copy.deepcopy(model), convext.swap(copy.deepcopy(model))
    with torch.no_grad():
        like = plain(x)[0]
        exact = copy.deepcopy(model).double()(x.double())[0]
        found = swapped(x)[0]
        again = swapped(x)[0]
    assert found.stride() == like.stride()
    error = (found.double() - exact).abs()
    of = x.double().abs() if of_z else exact.abs()
    allowed = ulps * EPS / 2 * of + torch.finfo(torch.float32).tiny
    assert bool((error <= allowed).all()), f"off by {(error / (EPS / 2 * of + 1e-38)).max():.1f} roundings"
    assert torch.equal(found, again)
    return swapped


def test_the_numbering_is_the_librarys():
    assert list(OPERATIONS) == native._C.chain_operations()


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("order", FORMATS)
def test_operations_of_one_operand(name, order, isa):
    function, ulps = UNARY[name]
    swapped = compared(Behind(function), X.contiguous(memory_format=FORMATS[order]), ulps, "gelu" in name)
    assert len(chains(swapped)) == 1


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_layers(module):
    swapped = compared(Behind(module), X, 8, isinstance(module, nn.GELU))
    assert len(chains(swapped)) == 1


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shape", [(5, 1, 1), (1, 5, 1, 1), (1,), (), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("order", FORMATS)
def test_operations_with_a_tensor(name, shape, order):
    tensor = (VECTOR if 5 in shape else ONE).reshape(shape)
    swapped = compared(Behind(BINARY[name], tensor=tensor), X.contiguous(memory_format=FORMATS[order]), 1)
    assert chains(swapped) == [[name]]


@pytest.mark.parametrize("name", UNARY)
def test_nan_and_infinity_pass_as_in_torch(name):
    function, _ = UNARY[name]
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38] * 10).view(1, 5, 2, 5)
    if "gelu" in name:  # torch's is NaN at infinity, and infinite at 3e38
        x = torch.where(x > 1e38, torch.tensor(4.0), x)
    model = Behind(function)
    with torch.no_grad():
        expected, found = function(x.clone()), convext.swap(model)(x)[0]
    assert torch.equal(expected.isnan(), found.isnan())
    assert torch.allclose(expected, found, equal_nan=True, atol=1e-30)


def test_minimum_and_maximum_of_nan():
    for name, side in itertools.product(("minimum", "maximum"), (0, 1)):
        tensor, x = VECTOR.clone(), X.clone()
        (tensor if side else x).view(-1)[1] = float("nan")
        model = Behind(BINARY[name], tensor=tensor)
        with torch.no_grad():
            assert torch.equal(model(x)[0].isnan(), convext.swap(copy.deepcopy(model))(x)[0].isnan())


@pytest.mark.parametrize("shape", [(1, 5, 7, 9), (3, 5, 40, 41), (2, 5, 1, 3)], ids=str)
@pytest.mark.parametrize("order", FORMATS)
def test_several_steps_go_in_one_pass(shape, order):
    functions = [torch.sub, lambda z, t: z * t, lambda z, t: torch.tanh(z), lambda z, t: t + z, lambda z, t: z / 2]
    x = torch.randn(shape).contiguous(memory_format=FORMATS[order])
    model = Behind(*functions, tensor=VECTOR)
    swapped = convext.swap(copy.deepcopy(model))
    with torch.no_grad():
        expected, found = model(x)[0], swapped(x)[0]
    assert chains(swapped) == [["sub", "mul", "tanh", "add", "div"]]
    assert found.stride() == expected.stride()
    # z - t and the product round once each, tanh by 6 halves of an ulp of what is at most 1, the sum once.
    torch.testing.assert_close(found, expected, rtol=4 * EPS, atol=(3 + 1 + 5) * EPS)


REJOINED = {
    "swish": (lambda z: z * torch.sigmoid(z), ["sigmoid", "mul"], 5),
    "swish_exchanged": (lambda z: torch.sigmoid(z) * z, ["sigmoid", "mul"], 5),
    "mish": (lambda z: z * torch.tanh(F.softplus(z)), ["softplus", "tanh", "mul"], 14),
    "hardswish": (lambda z: z * torch.clamp((z + 3) / 6, 0, 1), ["add", "div", "clamp_min", "clamp_max", "mul"], 4),
    "difference": (lambda z: torch.relu(z) - z, ["relu", "sub"], 1),
    "minuend": (lambda z: z - torch.relu(z), ["relu", "rsub"], 1),
    "behind": (lambda z: F.relu(z * 2) * torch.sigmoid(F.relu(z * 2)), None, 6),
}


@pytest.mark.parametrize("name", REJOINED)
@pytest.mark.parametrize("order", FORMATS)
def test_a_value_may_be_taken_again(name, order, isa):
    function, words, roundings = REJOINED[name]
    swapped = compared(Behind(function), X.contiguous(memory_format=FORMATS[order]), roundings)
    assert chains(swapped) == ([words] if words else [])


def test_a_value_taken_again_falls_back():
    """What the kernel does not take runs as the forward has it: other types, a tensor of another shape."""
    model = Behind(lambda z, t: (z * t) * torch.sigmoid(z * 1.0), tensor=torch.randn(5, 16, 15))
    agrees(model, X)
    model = Behind(lambda z: z * torch.sigmoid(z)).double()
    agrees(model, X.double())


def test_long_chains_are_parted():
    model = Behind(*[lambda z: z + 0.5] * (MOST + 3))
    assert [len(words) for words in chains(compared(model, X.abs(), MOST + 3))] == [MOST, 3]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_it_stands_behind_every_convolution(kind, dimensions):
    source = getattr(nn, f"{kind}{dimensions}d")(5, 5, 3)
    x = torch.randn(2, 5, *[6] * dimensions)
    tensor = torch.randn(5, *[1] * dimensions)
    model = Behind(lambda z, t: z - t, lambda z, t: F.leaky_relu(z, 0.1), tensor=tensor, source=source)
    model.last = getattr(nn, f"Conv{dimensions}d")(5, 5, 1)
    swapped = convext.swap(copy.deepcopy(model))
    with torch.no_grad():
        expected, found = model(x), swapped(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ["sub", "leaky_relu"] in chains(swapped)


def agrees(model, x, change=lambda model: None):
    """Swapped as plain, before and after a change to both, in float32; what both return."""
    swapped = convext.swap(copy.deepcopy(model))
    results = []
    for stage in (lambda model: None, change):
        stage(model), stage(swapped)
        with torch.no_grad():
            expected, found = model(x), swapped(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        results.append(found)
    return results


def test_the_tensor_is_looked_up_in_each_call():
    def replace(model):
        model.tensor = nn.Parameter(torch.full((5, 1, 1), 7.0))

    before, after = agrees(Behind(torch.mul, tensor=VECTOR), X, replace)
    assert not torch.equal(before[0], after[0])

    def write(model):
        model.tensor.data.mul_(3)

    agrees(Behind(torch.mul, tensor=VECTOR), X, write)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(16, 15), torch.randn(5, 16, 15), torch.randn(2, 5, 16, 15), torch.randn(1, 1, 1, 15),
     VECTOR.double(), torch.randn(1, 1, 5, 1, 1), torch.randn(10, 1, 1)[::2]],
    ids=lambda t: f"{tuple(t.shape)} {t.dtype}",
)  # fmt: skip
def test_other_tensors_are_left_to_torch(tensor):
    class Alone(Behind):
        def forward(self, x):
            return self.first(x) * self.tensor

    agrees(Alone(tensor=tensor), X)


def test_a_setting_that_changes_is_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.factor, self.act = nn.Conv2d(5, 5, 3), 2.0, nn.LeakyReLU(0.1)

        def forward(self, x):
            return self.act(self.conv(x) * self.factor)

    def change(model):
        model.factor, model.act.negative_slope = 5, 0.7

    before, after = agrees(Scaled(), X, change)
    assert not torch.equal(before, after)


class Kept(nn.Module):
    """Forwards in which what a chain would overwrite is seen again, or belongs to the caller."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.other = how, nn.Conv2d(5, 5, 3), nn.Conv2d(5, 5, 3)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "returned":
            return y, torch.tanh(y) * 2
        if self.how == "view":
            row = y[0]
            return torch.tanh(y) * 2, row
        if self.how == "argument":
            return torch.tanh(x) * 2 + self.conv(x).mean(), x
        if self.how == "twice":
            return torch.sigmoid(y) * y, y * y
        if self.how == "in place":
            z = y
            y.mul_(3)
            return z, torch.tanh(y)
        if self.how == "written":
            y = torch.tanh(y) * 2
            y[0] = 0
            return y, self.other(x)
        return None


@pytest.mark.parametrize("how", ["returned", "view", "argument", "twice", "in place", "written"])
def test_what_others_hold_is_not_overwritten(how):
    x = X.clone()
    agrees(Kept(how), x)
    assert torch.equal(x, X)


def test_what_a_hook_saw_stays():
    model = convext.swap(nn.Sequential(nn.Conv2d(5, 5, 3), nn.Tanh(), nn.Conv2d(5, 5, 1)))
    seen = []
    model[0].register_forward_hook(lambda module, given, y: seen.append((y, y.clone())))
    with torch.no_grad():
        model(X), model(X)
    assert len(seen) == 2 and all(torch.equal(y, then) for y, then in seen)


def test_gradients_are_recorded():
    model = Behind(lambda z, t: z * t, lambda z, t: torch.tanh(z), tensor=VECTOR)
    swapped = convext.swap(copy.deepcopy(model))
    for one in (model, swapped):
        one(X)[0].sum().backward()
    torch.testing.assert_close(swapped.tensor.grad, model.tensor.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype):
    model = Behind(lambda z: torch.tanh(z * 2)).to(dtype)
    with torch.no_grad():
        assert torch.equal(model(X.to(dtype))[0], convext.swap(copy.deepcopy(model))(X.to(dtype))[0])


def test_one_pixel_and_one_channel_keep_torchs_strides():
    for channels, side in ((5, 3), (1, 8)):
        model = nn.Sequential(nn.Conv2d(5, channels, 3), nn.Tanh())
        swapped, x = convext.swap(copy.deepcopy(model)), torch.randn(2, 5, side, side)
        for order in FORMATS.values():
            given = x.contiguous(memory_format=order)
            with torch.no_grad():
                assert swapped(given).stride() == model(given).stride()


def test_backends_that_are_asked_for_compute_it():
    model = convext.swap(nn.Sequential(nn.Conv2d(5, 5, 3), nn.Tanh()))
    with torch.no_grad(), convext.backend("aten"):
        assert torch.equal(model(X), torch.tanh(model[0](X)))


METHODS = [name for table in (elementwise._BINARY, elementwise._UNARY, elementwise._SETTINGS) for name in table]


@pytest.mark.parametrize("name", [name for name in METHODS if isinstance(name, str)])
def test_a_method_of_tensors_that_is_replaced_is_called(name, monkeypatch):
    arguments = {"clamp": (-0.1, 0.1), "clamp_": (-0.1, 0.1), "clip": (-0.1, 0.1)}.get(name, ())
    if name in elementwise._BINARY:
        arguments = (torch.tensor([0.75]),) if name in ("minimum", "maximum", "min", "max") else (0.75,)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 5, 3)
            self.tensor = nn.Parameter(torch.tensor([0.75]))

        def forward(self, x):
            y = self.conv(x)
            return getattr(y, name)(*(self.tensor if isinstance(a, torch.Tensor) else a for a in arguments))

    plain = Calls()
    swapped = convext.swap(copy.deepcopy(plain))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(swapped(X), plain(X), rtol=1e-5, atol=1e-6)
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *given: torch.neg(own(*given)))
        torch.testing.assert_close(swapped(X), plain(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_statistics_that_move_between_its_operations_are_read_where_the_forward_reads_them(kind, inside):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            norm = kind(1, track_running_stats=True)
            self.conv, self.norm = nn.Conv2d(5, 5, 3), norm
            self.holder = nn.Sequential(norm) if inside else norm

        def forward(self, x):
            z = self.conv(x) * self.norm.running_var
            g = self.holder(x[:, :1] * 3)
            return z + 1, g

    plain = Between().train()
    swapped = convext.swap(copy.deepcopy(plain))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(swapped(X), plain(X), rtol=1e-5, atol=1e-5)


LAYERS = {
    "conv1d": nn.Conv1d(5, 5, 3), "conv3d": nn.Conv3d(5, 5, 3), "conv_transpose1d": nn.ConvTranspose1d(5, 5, 3),
    "conv_transpose2d": nn.ConvTranspose2d(5, 5, 3), "conv_transpose3d": nn.ConvTranspose3d(5, 5, 3),
    "conv2d": nn.Conv2d(5, 5, 3), "batch_norm": nn.BatchNorm2d(5), "group_norm": nn.GroupNorm(5, 5),
    "layer_norm": nn.LayerNorm(6), "instance_norm": nn.InstanceNorm2d(5), "max_pool1d": nn.MaxPool1d(2),
    "max_pool2d": nn.MaxPool2d(2), "max_pool3d": nn.MaxPool3d(2), "avg_pool1d": nn.AvgPool1d(2),
    "avg_pool2d": nn.AvgPool2d(2), "avg_pool3d": nn.AvgPool3d(2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_replaced_function_kept_stays(name, monkeypatch):
    layer = copy.deepcopy(LAYERS[name])
    dimensions = int(name[-2]) if name.endswith("d") else 2
    model = convext.swap(nn.Sequential(layer, nn.Tanh(), getattr(nn, f"Conv{dimensions}d")(5, 5, 1)))
    x = torch.randn(2, 5, *[6] * dimensions)
    own, kept = getattr(F, name), []

    def keeps(*args, **named):
        result = own(*args, **named)
        kept.append((result, result.clone()))
        return result

    with torch.no_grad():
        model(x), model(x)
        monkeypatch.setattr(F, name, keeps)
        model(x), model(x)
    assert kept and all(torch.equal(now, then) for now, then in kept)


def test_a_sparse_operand_is_left_to_torch():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 5, 3)
            self.register_buffer("mask", (torch.rand(2, 5, 14, 13) > 0.5).float().to_sparse())

        def forward(self, x):
            return self.conv(x) * self.mask

    plain = Masked()
    with torch.no_grad():
        expected, found = plain(X), convext.swap(copy.deepcopy(plain))(X)
    assert found.layout is expected.layout
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [lambda z: z.clamp(max=1e300), lambda z: F.leaky_relu(z, 1e300)])
def test_numbers_beyond_float32_raise_as_in_torch(function):
    model = Behind(function)
    with torch.no_grad(), pytest.raises(RuntimeError) as expected:
        model(X)
    with torch.no_grad(), pytest.raises(RuntimeError) as found:
        convext.swap(copy.deepcopy(model))(X)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("name", ["tanh", "elu", "leaky_relu", "hardswish", "silu", "gelu", "mish"])
def test_the_sign_of_zero_is_torchs(name):
    function, _ = UNARY[name]
    x = torch.tensor([0.0, -0.0] * 25).view(1, 5, 2, 5)
    with torch.no_grad():
        swapped = convext.swap(Behind(function, source=nn.MaxPool2d(1)))  # a mean would lose it
        found = swapped(x)[0]
    assert len(chains(swapped)) == 1
    assert torch.equal(found.signbit(), function(x.clone()).signbit())
