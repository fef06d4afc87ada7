"""Elementwise operations behind a layer with gradients: a pass forward, one backward, no more kept than by torch."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from test_chain import BINARY, EPS, FORMATS, MODULES, REJOINED, UNARY, VECTOR, Behind, X, chains
from torch import nn

import convext
from convext.chain import OPERATIONS, Program

WEIGHTS = torch.randn(X.shape, generator=torch.Generator().manual_seed(11))
# Those whose derivative is no number: of up to three terms, none of them above 1.5, each with up to ten roundings,
# those of exp and of the polynomials among them; what is scaled before is as large.
CURVED = ("elu", "sigmoid", "tanh", "silu", "hardswish", "mish", "softplus", "gelu")


def half(z):
    return z * 0.5


def found(model, x, weights=WEIGHTS):
    """The chain's result, and the gradients of its weighted sum by x and by the tensor."""
    given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = model(given)[0]
    (z * weights.to(z.dtype)).sum().backward()
    return z.detach(), given.grad, None if model.tensor is None else model.tensor.grad


def agrees(model, x, roundings, weights=WEIGHTS, plans=None):
    """Swapped beside plain in float64: so many roundings of a derivative of about one. The tensor's gradient is a sum
    of as many terms as there are elements, each of which errs so, and which are added in float64."""
    swapped = convext.swap(copy.deepcopy(model))
    exact = found(copy.deepcopy(model).double(), x.double(), weights)
    got, like = found(swapped, x, weights), found(copy.deepcopy(model), x, weights)
    if plans is not None:
        assert chains(swapped) == plans
    scale = x.double().abs().clamp(min=1) * weights.double().abs()
    assert got[0].stride() == like[0].stride() and got[1].stride() == like[1].stride()
    assert bool(((got[1] - exact[1]).abs() <= roundings * EPS / 2 * scale).all()), "the gradient by x"
    if exact[2] is not None:
        assert got[2].shape == exact[2].shape and got[2].dtype is torch.float32
        assert bool(
            ((got[2] - exact[2]).abs() <= (roundings + 1) * EPS / 2 * (scale * x.abs().clamp(min=1)).sum()).all()
        )
    torch.testing.assert_close(got[0], exact[0].float(), rtol=(roundings + 8) * EPS, atol=16 * EPS)
    return swapped


def roundings_of(name):
    return 45 if any(part in name for part in CURVED) else 4


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("order", FORMATS)
def test_operations_of_one_operand(name, order, isa):
    function, _ = UNARY[name]
    x = X.contiguous(memory_format=FORMATS[order])
    for functions in ((function, half), (half, function), (function,)):
        swapped = agrees(Behind(*functions), x, roundings_of(name))
        assert chains(swapped) or len(functions) == 1


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_layers(module):
    agrees(Behind(module, half), X, roundings_of(str(module).lower()))


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shape", [(5, 1, 1), (1, 5, 1, 1), (1,), (), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("order", FORMATS)
def test_operations_with_a_tensor(name, shape, order, isa):
    tensor = (VECTOR if 5 in shape else torch.tensor([1.5])).reshape(shape)
    x = X.contiguous(memory_format=FORMATS[order])
    agrees(Behind(BINARY[name], torch.sub, tensor=tensor), x, 16, plans=[[name, "sub"]])


@pytest.mark.parametrize("name", REJOINED)
@pytest.mark.parametrize("order", FORMATS)
def test_a_value_may_be_taken_again(name, order, isa):
    function, words, _ = REJOINED[name]
    agrees(Behind(function), X.contiguous(memory_format=FORMATS[order]), 120, plans=[words] if words else [])


SHAPES = [(2, 5, 1, 3), (3, 5, 40, 41), (1, 600, 3, 5), (2, 1500, 3, 2), (1, 5, 130, 131)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", FORMATS)
def test_several_steps_with_a_tensor_of_any_shape(shape, order, isa):
    """Parts of planes and of pixels, whole and not, and channels beyond a part."""
    functions = [torch.sub, lambda z, t: z * t, lambda z, t: torch.tanh(z), lambda z, t: t + z, lambda z, t: z / 2]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=FORMATS[order])
    model = Behind(*functions, tensor=torch.linspace(-1, 1, shape[1]).view(-1, 1, 1))
    model.last = nn.Conv2d(shape[1], 1, 1)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    # z - t, z * t and tanh err by (1 + 1 + 6) / 2 roundings of values of at most 8, and so do the derivatives.
    agrees(model, x, 64, weights, plans=[["sub", "mul", "tanh", "add", "div"]])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_it_stands_behind_every_convolution(kind, dimensions):
    source = getattr(nn, f"{kind}{dimensions}d")(5, 5, 3)
    tensor = torch.randn(5, *[1] * dimensions)
    model = Behind(lambda z, t: z - t, lambda z, t: F.leaky_relu(z, 0.1), tensor=tensor, source=source)
    model.last = getattr(nn, f"Conv{dimensions}d")(5, 5, 1)
    x = torch.randn(2, 5, *[6] * dimensions)
    swapped = convext.swap(copy.deepcopy(model))
    for one in (model.double(), swapped):
        found(one, x.to(one.tensor.dtype), torch.tensor(1.0))
    assert chains(swapped) == [["sub", "leaky_relu"]]
    for expected, got in zip(model.parameters(), swapped.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad.float(), rtol=1e-4, atol=1e-4)


# ---- what torch does where derivatives jump, and with what is no number ----------------------------------------------

INTEGERS = torch.randint(-4, 5, X.shape, generator=torch.Generator().manual_seed(4)).float()
JUMPS = {
    "relu": lambda z: torch.relu(z), "relu6": lambda z: F.relu6(z - 2), "hardtanh": lambda z: F.hardtanh(z, -1, 2),
    "clamp": lambda z: z.clamp(-1, 2), "clamp_crossed": lambda z: z.clamp(2, -1), "low": lambda z: z.clamp(min=-1),
    "high": lambda z: z.clamp(max=2), "leaky_relu": lambda z: F.leaky_relu(z, 0.25), "elu": lambda z: F.elu(z, 0.5),
    "hardswish": lambda z: F.hardswish(z), "hardsigmoid": lambda z: F.hardsigmoid(z),
    "leaky_relu_": lambda z: F.leaky_relu(z, 0.25, True), "hardtanh_": lambda z: F.hardtanh(z, -1, 2, inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPS)
def test_where_derivatives_jump_it_is_torchs(name):
    model = Behind(lambda z: z * 1, JUMPS[name], lambda z: z * 2)
    swapped = convext.swap(copy.deepcopy(model))
    expected, got = found(model, INTEGERS), found(swapped, INTEGERS)
    assert len(chains(swapped)) == 1
    torch.testing.assert_close(got[1], expected[1], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("name", ["minimum", "maximum"])
@pytest.mark.parametrize("shape", [(5, 1, 1), (1,)], ids=str)
def test_at_ties_each_side_has_half(name, shape):
    model = Behind(BINARY[name], lambda z, t: z * 2, tensor=torch.arange(-2.0, 3.0)[: shape[0]].reshape(shape))
    swapped = convext.swap(copy.deepcopy(model))
    expected, got = found(model, INTEGERS, INTEGERS), found(swapped, INTEGERS, INTEGERS)
    assert chains(swapped) == [[name, "mul"]]
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])  # sums of small integers are exact


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_nan_and_infinity_are_as_in_torch(name):
    values = [float("nan"), float("inf"), -float("inf"), 2.0, -2.0]
    if any(part in name for part in ("gelu", "mish")):
        values[1:3] = [4.0, -4.0]
    # Of elu, hardswish and hardtanh torch's own do one thing with a NaN in vectors and another in the rest behind them.
    x = torch.tensor(values * 64).view(1, 5, 4, 16)
    is_binary = name in BINARY
    if is_binary:
        model = Behind(BINARY[name], lambda z, t: z * 1, tensor=torch.full((5, 1, 1), 2.0))
    else:
        model = Behind(UNARY[name][0], lambda z: z * 1)
    expected, got = found(model, x, torch.ones(())), found(convext.swap(copy.deepcopy(model)), x, torch.ones(()))
    for a, b in zip(expected, got):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=45 * EPS, atol=45 * EPS, equal_nan=True)


# ---- what is kept ----------------------------------------------------------------------------------------------------


LAST = X.contiguous(memory_format=torch.channels_last)  # which no convolution copies


def kept_bytes(model, x):
    """Of the storages that autograd saves in a call, parameters and the caller's input apart, each once."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = model(x)
    del result
    return sum(size for size, _ in storages.values())


IN_PLACE = {
    "relu_": nn.ReLU(True), "leaky_relu_": nn.LeakyReLU(0.1, True), "relu6_": nn.ReLU6(True), "elu_": nn.ELU(0.5, True),
    "hardtanh_": nn.Hardtanh(-1, 1, True), "silu_": nn.SiLU(True), "hardswish_": nn.Hardswish(True),
    "mish_": nn.Mish(True),
}  # fmt: skip
KEEPING = [(f,) for f, _ in UNARY.values()] + [(f,) for f, *_ in REJOINED.values()] + [(m,) for m in IN_PLACE.values()]
KEEPING += [(half, f) for (f,) in KEEPING] + [(f, half) for (f,) in KEEPING]
KEEPING += [(lambda z: z.mul_(2), m) for m in IN_PLACE.values()]


@pytest.mark.parametrize("number", range(len(KEEPING)))
def test_no_more_is_kept_than_by_torch(number):
    """The source is a convolution, which keeps nothing of its result, and another reads the chain's and keeps that."""
    model = Behind(*KEEPING[number], source=nn.Conv2d(5, 5, 1))
    swapped = convext.swap(copy.deepcopy(model))
    assert kept_bytes(swapped, LAST) <= kept_bytes(model, LAST)
    exact = found(copy.deepcopy(model).double(), X.double())
    got = found(swapped, LAST)
    torch.testing.assert_close(got[1], exact[1].float(), rtol=1e-4, atol=1e-4)


def test_what_is_kept_with_a_tensor_is_no_more_either():
    for name, learns in itertools.product(BINARY, (True, False)):
        model = Behind(BINARY[name], lambda z, t: torch.tanh(z), tensor=VECTOR, source=nn.Conv2d(5, 5, 1))
        model.tensor.requires_grad_(learns)
        swapped = convext.swap(copy.deepcopy(model))
        assert kept_bytes(swapped, LAST) <= kept_bytes(model, LAST), (name, learns)


def test_a_forward_that_writes_over_its_values_has_them_written(monkeypatch):
    """As in torch: one tensor, from the convolution to the result; and no other forward."""
    own = convext.chain.overwrite
    written = []
    monkeypatch.setattr(convext.chain, "overwrite", lambda x, *program: written.append(x) or own(x, *program))
    for writes in (True, False):
        first = (lambda z: z.mul_(2)) if writes else (lambda z: z * 2)
        model = Behind(first, nn.LeakyReLU(0.1, True), source=nn.Conv2d(5, 5, 1))
        exact = found(copy.deepcopy(model).double(), X.double())
        got = found(convext.swap(model), LAST)
        torch.testing.assert_close(got[1], exact[1].float(), rtol=1e-5, atol=1e-5)
        assert [x.data_ptr() for x in written] == ([got[0].data_ptr()] if writes else [])
        written.clear()


class Written(nn.Module):
    """Something is added to a chain's result in place."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.out, self.function = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 2, 1), function

    def forward(self, x):
        y = self.function(self.conv(x) * 2)
        y += x
        return self.out(y)


@pytest.mark.parametrize("name", [name for name in UNARY if not name.endswith("_")])
def test_the_result_may_be_written_wherever_torch_lets_it(name):
    model = Written(UNARY[name][0])
    outcomes = []
    for one in (copy.deepcopy(model).double(), convext.swap(copy.deepcopy(model))):
        x = LAST.to(one.conv.weight.dtype).clone().requires_grad_()
        try:
            one(x).square().mean().backward()
            outcomes.append(x.grad)
        except RuntimeError as error:
            outcomes.append("modified by an inplace operation" in str(error))
    if isinstance(outcomes[0], bool):
        assert outcomes == [True, True]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", FORMATS)
def test_what_is_kept_may_go_elsewhere_and_come_back(order):
    """As torch.autograd.graph.save_on_cpu does, in contiguous memory."""
    x = X.contiguous(memory_format=FORMATS[order])
    for functions in ((half, F.silu), (half, torch.tanh)):
        model = Behind(*functions)
        plain = found(convext.swap(copy.deepcopy(model)), x)
        with torch.autograd.graph.save_on_cpu():
            got = found(convext.swap(copy.deepcopy(model)), x)
        assert all(torch.equal(a, b) for a, b in zip(plain[:2], got))


def test_checkpoints_compute_it_again():
    model = Tail()
    swapped = convext.swap(copy.deepcopy(model))
    gradients = []
    for call in (swapped, lambda x: torch.utils.checkpoint.checkpoint(swapped, x, use_reentrant=False)):
        swapped.zero_grad()
        call(X.clone().requires_grad_()).square().mean().backward()
        gradients.append([p.grad.clone() for p in swapped.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


# ---- as part of a network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sigmoid", "silu", "clamp", "gelu", "mish", "softplus", "leaky_relu", "relu6", "tanh"]
)
@pytest.mark.parametrize("learns", [True, False])
def test_second_derivatives(name, learns):
    function, _ = UNARY[name]
    model = Behind(lambda z, t: z * t, lambda z, t: z + t, lambda z, t: function(z), tensor=VECTOR)
    model.tensor.requires_grad_(learns)
    results = []
    for one in (copy.deepcopy(model).double(), convext.swap(copy.deepcopy(model))):
        # Beyond, torch's own second derivative of mish in float32 is no number.
        x = X.clamp(-9, 9).to(one.tensor.dtype).requires_grad_()
        z = one(x)[0]
        wanted = (x, one.tensor) if learns else (x,)
        first = torch.autograd.grad((z * WEIGHTS).sum(), wanted, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), wanted)
        results.append([*first, *second])
    for exact, got in zip(*results):
        # Sums of 480 products an element of the tensor, each of a value of up to 27 with some ten roundings.
        scale = exact.abs().max().item()
        torch.testing.assert_close(got, exact.float(), rtol=0, atol=2000 * EPS * scale)


def test_a_summand_that_is_written_changes_no_first_derivative_and_is_refused_by_a_second():
    model = Behind(lambda z, t: z + t, lambda z, t: torch.sigmoid(z) * 2, tensor=VECTOR)
    swapped = convext.swap(copy.deepcopy(model))
    gradients = []
    for one in (model, swapped):
        x = X.clone().requires_grad_()
        z = one(x)[0]
        with torch.no_grad():
            one.tensor.mul_(3)
        z.sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=45 * EPS, atol=45 * EPS)
    x = X.clone().requires_grad_()
    z = convext.swap(Behind(lambda z, t: z + t, lambda z, t: F.silu(z) * 2, tensor=VECTOR))
    result = z(x)[0]
    with torch.no_grad():
        z.tensor.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), x, create_graph=True)


class Tail(nn.Module):
    def __init__(self, reads=1):
        super().__init__()
        self.reads = reads
        self.conv, self.norm, self.act = nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.Mish()
        self.scale, self.out = nn.Parameter(torch.rand(6, 1, 1) + 0.5), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        z = self.norm(self.conv(x)) * self.scale
        if self.reads == 2:
            return self.out(self.act(z) + 1) + z.mean()
        return self.out(self.act(z) + 1)


def steps(model, x, count=3):
    """The gradients of all parameters and of x in each of some steps."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    gradients = []
    for _ in range(count):
        given = x.clone().requires_grad_()
        optimizer.zero_grad(set_to_none=True)
        model(given).square().mean().backward()
        gradients.append([given.grad, *[p.grad for p in model.parameters() if p.grad is not None]])
        optimizer.step()
    return gradients


def trains_as_plain(model, swapped, x):
    exact = copy.deepcopy(model).double()
    for expected, got in zip(steps(exact, x.double()), steps(swapped, x)):
        assert len(expected) == len(got)
        largest = max(a.abs().max().item() for a in expected)  # that by a bias before a batch norm is zero
        for a, b in zip(expected, got):
            torch.testing.assert_close(b, a.float(), rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("reads", [1, 2])
def test_a_network_trains_as_the_plain_one(reads):
    model = Tail(reads)
    swapped = convext.swap(copy.deepcopy(model))
    trains_as_plain(model, swapped, X)
    assert chains(swapped) == ([["mul", "mish", "add"]] if reads == 1 else [])


def test_what_is_frozen_and_unfrozen_is_seen():
    model = Tail()
    swapped = convext.swap(copy.deepcopy(model))
    for change in (
        lambda m: m.scale.requires_grad_(False), lambda m: m.requires_grad_(False) and m.out.requires_grad_(),
        lambda m: m.scale.requires_grad_(), lambda m: m.eval(), lambda m: m.requires_grad_(), lambda m: m.train(),
    ):  # fmt: skip
        change(model), change(swapped)
        trains_as_plain(copy.deepcopy(model), copy.deepcopy(swapped), X)


def test_hooks_in_between_hear_what_they_would():
    model = Tail()
    swapped = convext.swap(copy.deepcopy(model))
    heard = []
    for one in (model, swapped):
        one(X)
        one.act.register_forward_hook(lambda module, given, z: heard.append(z.detach().clone()))
        one.act.register_full_backward_hook(lambda module, given, gradient: heard.append(gradient[0].clone()))
        one(X).sum().backward()
    half_of_them = len(heard) // 2
    assert half_of_them == 2
    for expected, got in zip(heard[:half_of_them], heard[half_of_them:]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_transforms_and_forward_mode_run_torchs_operations():
    model = Behind(lambda z, t: z * t, lambda z, t: torch.tanh(z), tensor=VECTOR)
    swapped = convext.swap(copy.deepcopy(model))
    for call in (
        lambda m: torch.func.grad(lambda x: m(x)[0].sum())(X),
        lambda m: torch.func.jvp(lambda x: m(x)[0], (X,), (WEIGHTS,))[1],
        lambda m: torch.func.vmap(lambda x: m(x[None])[0])(X),
        lambda m: torch.autograd.functional.jacobian(lambda x: m(x)[0].sum((2, 3)), X[:, :, :2, :2], vectorize=True),
    ):
        torch.testing.assert_close(call(swapped), call(model), rtol=45 * EPS, atol=45 * EPS)


@pytest.mark.parametrize("order", FORMATS)
def test_gradients_do_not_depend_on_the_number_of_threads(order):
    model = convext.swap(Behind(lambda z, t: z * t, lambda z, t: torch.tanh(z), tensor=VECTOR))
    x = torch.randn(8, 5, 100, 101).contiguous(memory_format=FORMATS[order])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model.tensor.grad = None
            results.append(found(model, x, torch.tensor(0.75)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


def test_every_operation_says_what_it_keeps():
    for name in OPERATIONS:
        if name != "keep":
            assert Program.of(["mul", name], [-1, -1], [2.0, 0.5]).saves([]) in ("nothing", "output", "input")
    assert Program.of(["mul", "tanh"], [0, -1], [0.0, 0.0]).saves([True]) == "input"
    assert Program.of(["mul", "tanh"], [0, -1], [0.0, 0.0]).saves([False]) == "output"
    assert Program.of(["add", "sub"], [0, 1], [0.0, 0.0]).saves([True, True]) == "nothing"
    for in_place, kept in ((True, "output"), (False, "input")):
        assert Program.of(["leaky_relu"], [-1], [0.5], in_place).saves([]) == kept
        assert Program.of(["hardtanh_min", "hardtanh_max"], [-1, -1], [-1, 1], in_place).saves([]) == kept


# ---- torch.min(z, torch.tensor(number, device=z.device)) -------------------------------------------------------------

MADE = {
    "min": lambda z: torch.min(z, torch.tensor(0.5, device=z.device)),
    "max": lambda z: torch.max(torch.tensor(0.5, device=z.device), z),
    "minimum": lambda z: torch.minimum(z, torch.tensor(-1, device=z.device)),
    "mul": lambda z: z * torch.tensor(2.5, device=z.device),
    "rsub": lambda z: torch.tensor(3, device=z.device) - z,
    "div": lambda z: z / torch.tensor(0.5, device=z.device, dtype=z.dtype),
    "add": lambda z: z + torch.tensor(0.5),
}


@pytest.mark.parametrize("name", MADE)
def test_a_tensor_of_a_number_is_an_operand(name):
    model = Behind(lambda z: z + 1, MADE[name], half)
    operation = name + "imum" if name in ("min", "max") else name
    agrees(model, INTEGERS, 4, plans=[["add", operation, "mul"]])
    swapped = convext.swap(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(swapped(X)[0], model(X)[0])
    assert chains(swapped) == [["add", operation, "mul"]]
    x = X.double()  # runs as the forward has it
    assert torch.equal(swapped.double()(x)[0], model.double()(x)[0])


def test_a_tensor_of_a_number_that_is_made_elsewhere_is_as_in_torch():
    model = Behind(lambda z: z + 1, MADE["add"])
    swapped = convext.swap(copy.deepcopy(model))

    def outcome(one):
        try:
            with torch.no_grad(), torch.device("meta"):
                return one(X)[0].device
        except (RuntimeError, NotImplementedError) as error:
            return str(error)

    with torch.no_grad():
        swapped(X), swapped(X)
    assert chains(swapped) == [["add", "add"]]
    assert outcome(swapped) == outcome(model)


def test_a_tensor_of_a_number_that_is_read_twice_is_none():
    def twice(z):
        number = torch.tensor(0.5, device=z.device)
        return torch.min(z, number) * number

    agrees(Behind(twice, half), INTEGERS, 4)
