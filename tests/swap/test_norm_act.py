"""Batch norm, sum and activation as one call behind 1-D, 3-D and transposed convolutions and whatever else, in
training, with gradients and without, and in evaluation."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import convext
from convext import batch_norm
from convext.problem import Epilogue

CONVS = {
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, (7,)),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, (3, 5, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d, nn.BatchNorm1d, (7,)),
    "conv_transpose2d": (nn.ConvTranspose2d, nn.BatchNorm2d, (5, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d, nn.BatchNorm3d, (3, 2, 4)),
}
ACTIVATIONS = {
    None: None, "relu": nn.ReLU(), "relu_": nn.ReLU(True), "relu6": nn.ReLU6(), "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(), "gelu": nn.GELU(), "silu_": nn.SiLU(True),
}  # fmt: skip


class Block(nn.Module):
    """Two convolutions with a batch norm each, and what may stand behind: a sum and an activation."""

    def __init__(self, kind="conv1d", activation="relu", adds=False, **settings):
        super().__init__()
        conv, norm, self.size = CONVS[kind]
        self.first, self.norm1 = conv(3, 4, 3, padding=1), norm(4, **settings)
        self.second, self.norm2 = conv(4, 4, 3, padding=1, bias=False), norm(4, **settings)
        self.act = None if ACTIVATIONS[activation] is None else copy.deepcopy(ACTIVATIONS[activation])
        self.adds = adds
        for norm in (self.norm1, self.norm2):
            for t in (norm.weight, norm.bias):
                if t is not None:
                    nn.init.uniform_(t, 0.5, 1.5)

    def acted(self, z):
        return z if self.act is None else self.act(z)

    def forward(self, x):
        x = self.acted(self.norm1(self.first(x)))
        y = self.norm2(self.second(x))
        if self.adds == "before":
            y = x + y
        elif self.adds:
            y = y + x
        return self.acted(y)

    def sample(self, dtype=torch.float64, n=3, memory_format=torch.contiguous_format):
        generator = torch.Generator().manual_seed(7)
        return torch.randn(n, 3, *self.size, dtype=dtype, generator=generator).contiguous(memory_format=memory_format)


def pair(*arguments, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = Block(*arguments, **settings).to(dtype)
    return model, convext.swap(copy.deepcopy(model))


def norms(model):
    """The words of the units that begin with a batch norm, of the plans that hold now."""
    plans = model.__dict__["forward"].present_plans()
    return [unit.words for plan in plans for unit in plan.units if type(unit.first).__name__ == "Norm"]


def everything(model, x, grad=True):
    """The result, gradients by all that has one, and buffers."""
    given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = model(given)
    found = {"y": y.detach().clone(memory_format=torch.preserve_format)}
    if grad:
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        model.zero_grad(set_to_none=True)
        (y * weights).sum().backward()
        found.update({"x": given.grad, **{name: p.grad for name, p in model.named_parameters()}})
    return {**found, **{name: b.clone() for name, b in model.named_buffers()}}


def same(model, swapped, x, tolerance=1e-10, **settings):
    """In float64 both round a few hundred times, of values of at most some ten."""
    expected, got = everything(model, x, **settings), everything(swapped, x, **settings)
    assert expected.keys() == got.keys()
    for name, a in expected.items():
        b = got[name]
        assert (a is None) == (b is None), name
        if a is not None:
            assert b.dtype is a.dtype, name
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert got["y"].stride() == expected["y"].stride()
    return got


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adds", [False, True, "before"])
def test_training_is_the_plain_models(kind, activation, adds):
    model, swapped = pair(kind, activation, adds)
    for grad in (True, False, True):
        same(model, swapped, model.sample(), grad=grad)
    name = [] if activation is None else [activation.removesuffix("_")]
    assert norms(swapped) == [["bn", *name], ["bn", *(["add"] if adds else []), *name]] * 2  # recorded and not
    assert not any(buffer.isnan().any() for buffer in swapped.buffers())


@pytest.mark.parametrize("kind", CONVS)
def test_evaluation_is_the_plain_models(kind):
    model, swapped = pair(kind, "silu", True)
    for _ in range(2):
        same(model, swapped, model.sample())
    model.eval(), swapped.eval()
    for grad in (True, False):
        same(model, swapped, model.sample(), grad=grad)
    assert norms(swapped)
    model.train(), swapped.train()
    same(model, swapped, model.sample())


@pytest.mark.parametrize(
    "settings",
    [{"momentum": None}, {"momentum": 0.7}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("kind", CONVS)
def test_settings_of_the_batch_norm(kind, settings):
    model, swapped = pair(kind, "gelu", True, **settings)
    for grad in (True, False, True):
        same(model, swapped, model.sample(), grad=grad)
    model.eval(), swapped.eval()
    same(model, swapped, model.sample())


@pytest.mark.parametrize("kind", ["conv3d", "conv_transpose2d", "conv_transpose3d"])
@pytest.mark.parametrize("adds", [False, True])
def test_channels_last(kind, adds):
    model, swapped = pair(kind, "relu", adds)
    form = torch.channels_last if kind.endswith("2d") else torch.channels_last_3d
    for one in (model, swapped):
        one.to(memory_format=form)
    same(model, swapped, model.sample(memory_format=form))
    assert norms(swapped)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_no_farther_from_float64_than_torchs(kind, dtype):
    """With an activation whose derivative does not jump where a rounding takes a value over zero."""
    model, swapped = pair(kind, "silu", True, dtype=torch.float32)
    model, swapped = model.to(dtype), swapped.to(dtype)
    x = model.sample(dtype)
    exact = everything(copy.deepcopy(model).double(), x.double())
    theirs, ours = everything(model, x), everything(swapped, x)
    for name, value in exact.items():
        assert ours[name].dtype is theirs[name].dtype, name
        if value.is_floating_point():
            error = [(one[name].double() - value).abs().max().item() for one in (theirs, ours)]
            # Both round alike often; beside an error of none, one rounding of the largest.
            assert error[1] <= 3 * error[0] + 4 * torch.finfo(dtype).eps * value.abs().max().item(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 3), (2, 2, 2, 2), (2, 2, 2, 1, 2)], ids=str)
def test_derivatives_of_first_and_second_order(shape, activation, adds, training):
    generator = torch.Generator().manual_seed(1)
    y, residual = (torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    gamma, beta, mean = (torch.rand(2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    mean, var = (None, None) if training else (mean.detach(), torch.tensor([0.5, 2.0], dtype=torch.float64))

    def function(y, gamma, beta, *residual):
        epilogue = Epilogue(None, mean, var, gamma, beta, residual[0] if residual else None, 1e-5, activation)
        return batch_norm.bn_act(y, epilogue, training)

    arguments = (y, gamma, beta, residual) if adds else (y, gamma, beta)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)
    plain = F.batch_norm(y, mean, var, gamma, beta, training, 0.0, 1e-5) + (residual if adds else 0)
    torch.testing.assert_close(
        function(*arguments), {"identity": lambda z: z, "relu": F.relu, "silu": F.silu}[activation](plain)
    )


class Dense(nn.Module):
    """Batch norm and activation before the convolution, behind a concatenation, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.last(F.relu(self.norm(torch.cat([x, self.first(x)], 1)), inplace=True))


class Vectors(nn.Module):
    """A batch norm of (N, C)."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv1d(3, 4, 3), nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return F.relu(self.norm(self.linear(self.conv(x).mean(2))))


class ByHand(nn.Module):
    """F.batch_norm behind F.conv_transpose1d."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(5)
        self.weight = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x):
        y, norm = F.conv_transpose1d(self.conv(x), self.weight), self.norm
        return F.silu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.2))


@pytest.mark.parametrize(
    "model, shape",
    [(Dense(), (2, 3, 5, 4)), (Vectors(), (5, 3, 8)), (ByHand(), (2, 3, 8))],
    ids=["2d", "1d", "by hand"],
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_it_stands_behind_anything(model, shape, order):
    if order is torch.channels_last and len(shape) != 4:
        pytest.skip("of images")
    model = copy.deepcopy(model).double()
    swapped, x = (
        convext.swap(copy.deepcopy(model)),
        torch.randn(shape, dtype=torch.float64).contiguous(memory_format=order),
    )
    for grad in (True, False):
        same(model, swapped, x, grad=grad)
    assert len(norms(swapped)) == 2


def test_a_value_that_two_read_is_a_value():
    class Twice(Block):
        def forward(self, x):
            y = self.norm1(self.first(x))
            return torch.relu(y) * self.second(y)

    torch.manual_seed(0)
    model = Twice().double()
    swapped = convext.swap(copy.deepcopy(model))
    same(model, swapped, model.sample())
    assert norms(swapped) == [["bn"]]


def test_statistics_that_another_reads_in_between_are_read_where_the_forward_reads_them():
    class Between(Block):
        def forward(self, x):
            y = self.norm1(self.first(x))
            before = self.norm1.running_mean * 1.0
            return torch.relu(y) * before.sum()

    torch.manual_seed(0)
    model = Between().double()
    swapped = convext.swap(copy.deepcopy(model))
    for grad in (True, False):
        same(model, swapped, model.sample(), grad=grad)


def test_shared_statistics():
    model, _ = pair("conv3d", "relu")
    model.norm2 = model.norm1
    swapped = convext.swap(copy.deepcopy(model))
    for grad in (True, False, True):
        same(model, swapped, model.sample(), grad=grad)
    model, _ = pair("conv3d", "relu", True)
    model.norm2.running_mean = model.norm1.running_mean
    swapped = convext.swap(copy.deepcopy(model))
    for grad in (True, False, True):
        same(model, swapped, model.sample(), grad=grad)


@pytest.mark.parametrize("kind", CONVS)
def test_hooks_are_heard(kind):
    model, swapped = pair(kind, "relu")
    same(model, swapped, model.sample())
    heard = []
    for one in (model, swapped):
        for layer in (one.first, one.norm1, one.act):
            layer.register_forward_hook(lambda module, given, y: heard.append(y.detach().clone()))
            layer.register_full_backward_hook(lambda module, given, gradient: heard.append(gradient[0].clone()))
    same(model, swapped, model.sample())
    assert len(heard) == 2 * 8  # the activation is called twice
    for a, b in zip(heard[:8], heard[8:]):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_what_is_frozen_and_unfrozen_is_seen():
    model, swapped = pair("conv3d", "relu", True)
    for change in (
        lambda m: m.norm1.requires_grad_(False), lambda m: m.first.requires_grad_(False), lambda m: m.norm1.eval(),
        lambda m: m.requires_grad_(False), lambda m: m.norm1.train(), lambda m: m.norm2.weight.requires_grad_(),
        lambda m: setattr(m.norm2, "momentum", 0.9), lambda m: m.requires_grad_(),
    ):  # fmt: skip
        change(model), change(swapped)
        same(model, swapped, model.sample())


def test_a_layer_that_is_replaced_is_called():
    model, swapped = pair("conv_transpose2d", "relu")
    same(model, swapped, model.sample())
    for one in (model, swapped):
        one.norm1 = nn.GroupNorm(2, 4).double()
    same(model, swapped, model.sample())


def test_one_value_a_channel_raises_as_torch():
    model, swapped = pair("conv1d", "relu")
    x = model.sample(n=1)[:, :, :1]
    messages = []
    for one in (model, swapped):
        before = copy.deepcopy(one.state_dict())
        with pytest.raises(ValueError) as error:
            one(x)
        messages.append(str(error.value))
        counts = [key for key in before if key.endswith("tracked")]
        assert all(torch.equal(before[key], value) for key, value in one.state_dict().items() if key not in counts)
        messages.append([int(one.state_dict()[key]) for key in counts])
    assert messages[:2] == messages[2:]


def test_other_inputs_raise_as_torch():
    model, swapped = pair("conv3d", "relu")
    for x in (torch.randn(3, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 3, 5, 4)):  # no batch; another dtype
        messages = []
        for one in (model, swapped):
            with pytest.raises((RuntimeError, ValueError)) as error:
                one(x)
            messages.append((type(error.value), str(error.value).split("\nconvext:")[0]))
        assert messages[0] == messages[1]


def test_autocast_follows_the_context():
    model, swapped = pair("conv3d", "relu", True, dtype=torch.float32)
    x = model.sample(torch.float32)
    results = []
    for one in (model, swapped):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x.clone().requires_grad_())
        y.float().sum().backward()
        results.append([y, *[p.grad for p in one.parameters()], *one.buffers()])
    for a, b in zip(*results):
        assert a.dtype is b.dtype
        torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05 * max(1.0, a.abs().max().item()))


def test_transforms_and_forward_mode():
    model, swapped = pair("conv1d", "silu", True)
    model.eval(), swapped.eval()
    x = model.sample()
    for call in (
        lambda m: torch.func.grad(lambda x: m(x).sum())(x),
        lambda m: torch.func.jvp(m, (x,), (x.cos(),))[1],
        lambda m: torch.func.vmap(lambda one: m(one[None]))(x),
        lambda m: torch.autograd.functional.jacobian(lambda x: m(x).sum((1, 2)), x, vectorize=True),
        lambda m: torch.autograd.functional.hessian(lambda x: m(x).square().sum(), x[:1, :, :3]),
    ):
        torch.testing.assert_close(call(swapped), call(model))


def test_the_result_may_be_written_and_detached():
    model, swapped = pair("conv3d", "silu")  # a ReLU's result is kept
    gradients = []
    for one in (model, swapped):
        y = one(model.sample())
        y.mul_(2)
        y.sum().backward()
        gradients.append(one.second.weight.grad)
        assert not y._is_view()
        one(model.sample()).detach_()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "conv_transpose2d"])
def test_what_is_kept_may_go_elsewhere_and_come_back_and_be_computed_again(kind):
    model, swapped = pair(kind, "relu", True)
    form = {"conv1d": torch.contiguous_format, "conv3d": torch.channels_last_3d}.get(kind, torch.channels_last)
    x, gradients = model.sample(memory_format=form), []
    for one in (model, swapped):
        for context in (torch.autograd.graph.save_on_cpu(), None):
            one.zero_grad()
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            if context is None:
                torch.utils.checkpoint.checkpoint(one, given, use_reentrant=False).square().sum().backward()
            else:
                with context:
                    one(given).square().sum().backward()
            gradients.append([given.grad, *[p.grad.clone() for p in one.parameters()]])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_no_more_is_kept_than_by_torch():
    for kind, activation, adds in itertools.product(CONVS, ACTIVATIONS, (False, True)):
        model, swapped = pair(kind, activation, adds, dtype=torch.float32)
        x = model.sample(torch.float32, n=40)
        sizes = []
        for one in (model, swapped):
            one(x)
            storages = {}

            def pack(t, storages=storages):
                storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                one(x)
            sizes.append(sum(size for size, _ in storages.values() if size >= 4 * 40 * 4))  # no vectors of channels
        assert sizes[1] <= sizes[0], (kind, activation, adds)


def test_a_backend_that_is_asked_for_computes_it():
    for kind in CONVS:
        model, swapped = pair(kind, "relu", True, dtype=torch.float32)
        x = model.sample(torch.float32)
        with convext.backend("aten"):
            theirs = everything(convext.swap(copy.deepcopy(model)), x)
        convext.backends.reset_counts()
        with convext.backend("native"):
            ours = everything(swapped, x)
        counts = convext.backends.counts()
        assert (
            counts[("native", "bn_act", "native_bn_act")]
            == counts[("native", "batch_stats", "native_batch_stats")]
            == 2
        )
        expected = everything(model, x)
        for name, value in expected.items():
            if value.is_floating_point():
                scale = value.abs().max().item()
                for one in (theirs, ours):
                    torch.testing.assert_close(one[name], value, rtol=0, atol=1e-4 * max(1.0, scale))


def test_the_report_tells_it():
    model, swapped = pair("conv1d", "relu", True)
    swapped(model.sample())
    report = convext.report(swapped)
    assert report["first"].fused == "bn + relu" and report["second"].fused == "bn + add + relu"


# ---- convext.conv_bn_act of rows and volumes -------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_conv_bn_act_of_rows_and_volumes(axes, training, batched, adds):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    size, conv = (6, 4, 5)[:axes], (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    x, w, bias = random(2, 3, *size), random(4, 3, *[3] * axes), random(4)
    residual, gamma, beta = random(2, 4, *size), random(4), random(4)
    if not batched:
        x, residual = x[0], residual[0]
    found = []
    for fused in (True, False):
        mean, var, count = torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(3)
        given = [t.detach().clone().requires_grad_() for t in (x, w, bias, gamma, beta, residual)]
        x_, w_, bias_, gamma_, beta_, residual_ = given
        if fused:
            y = convext.conv_bn_act(
                x_, w_, bias_, mean, var, gamma_, beta_, padding=1, training=training, momentum=0.3,
                activation="silu", residual=residual_ if adds else None, num_batches_tracked=count,
            )  # fmt: skip
        else:
            y = conv(x_, w_, bias_, padding=1)
            y = F.batch_norm(y if batched else y[None], mean, var, gamma_, beta_, training, 0.3)
            count += training
            y = F.silu((y if batched else y[0]) + (residual_ if adds else 0))
        y.square().sum().backward()
        found.append([y.detach(), mean, var, count, *[t.grad for t in given if t.grad is not None]])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    y = convext.conv_act(x, w, bias, padding=1, activation="relu", residual=residual)
    torch.testing.assert_close(y, F.relu(conv(x, w, bias, padding=1) + residual))


def test_layers_of_rows_and_volumes_in_one_call():
    for kind in ("conv1d", "conv3d"):
        model, _ = pair(kind, "relu")
        other = copy.deepcopy(model)
        x = model.sample()
        y = convext.nn.conv_bn_act(model.first, model.norm1, x, "relu")
        torch.testing.assert_close(y, F.relu(other.norm1(other.first(x))))
        for a, b in zip(model.buffers(), other.buffers()):
            torch.testing.assert_close(a, b)


def test_rows_and_volumes_raise_as_images_do():
    x, w, bn = torch.randn(1, 3, 3), torch.randn(4, 3, 3), [torch.zeros(4), torch.ones(4), None, None]
    with pytest.raises(ValueError, match="activation"):
        convext.conv_bn_act(x, w, None, *bn, activation="tan")
    with pytest.raises(ValueError, match="activation"):
        convext.conv_act(x, w, activation="tan")
    with pytest.raises(RuntimeError, match="residual"):
        convext.conv_bn_act(x, w, None, *bn, residual=torch.randn(1, 4, 9))
    with pytest.raises(RuntimeError, match="running_mean"):
        convext.conv_bn_act(x, w, None, torch.zeros(3), torch.ones(3), None, None)
    with pytest.raises(ValueError, match="more than 1 value"):
        convext.conv_bn_act(x, w, None, *bn, training=True)
    assert not bn[0].any()
