"""What verify finds, what it lets pass, and what it leaves as it was."""

import copy
import random
import types
from collections import OrderedDict

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import convext

FLOATS = [torch.float32, torch.float64]


class Block(nn.Module):
    """Plain, pointwise and depthwise convolutions, batch norms, ReLU6 and a residual."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.act = nn.ReLU6()

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(y)) + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.block, self.drop, self.fc = Block(), nn.Dropout(0.25), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.drop(self.block(self.stem(x)).mean((2, 3))))


def make(dtype=torch.float32, training=True, maker=Net):
    """A network whose activations reach beyond ReLU6's six and whose statistics are those of some training."""
    torch.manual_seed(0)
    model = maker().to(dtype)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(1, 4), m.bias.normal_()
        for _ in range(20):
            model(sample(dtype))
    return model.train(training)


def sample(dtype=torch.float32, n=4, size=12):
    return torch.randn(n, 3, size, size, dtype=dtype)


# ---- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed"), [("resnet18", 15), ("mobilenet_v2", 0), ("mobilenet_v2", 5)])
def test_stock_networks_agree_in_training(name, seed):
    """Their first batch norms have means near zero, whose errors go with the size of the activations."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(seed)
    found = convext.verify(getattr(models, name)(weights=None), torch.randn(2, 3, 64, 64), seed=seed)
    assert found.ok, found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_small_networks_agree(training, dtype):
    for seed in range(4):
        found = convext.verify(convext.swap(make(dtype, training)), sample(dtype), seed=seed)
        assert found.ok, found


def test_one_number_is_enough():
    """Of one element a single run with moved operands tells nothing: it may not move at all."""

    class Loss(Net):
        def forward(self, x):
            return super().forward(x).sum()

    for seed in range(8):
        torch.manual_seed(seed)
        found = convext.verify(Loss(), sample(), seed=seed)
        assert found.ok, found


def test_gradient_that_is_nothing_but_rounding_agrees():
    """A bias before a batch norm has none."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
    for seed in range(8):
        found = convext.verify(model, sample(), seed=seed)
        (bias,) = (r for r in found.rows if (r.name, r.kind, r.of) == ("0.bias", "gradient", "live"))
        assert found.ok and bias.own > 0, found


def test_the_limit_is_of_the_size_of_rounding():
    """An alarm that never rings is none: no output, statistic or gradient of a smooth network has more than some
    thousand roundings' room."""

    class Smooth(Net):
        def __init__(self):
            super().__init__()
            self.stem[2] = self.block.act = nn.SiLU()

    for dtype in FLOATS:
        model, x = make(dtype, maker=Smooth), sample(dtype)
        found = convext.verify(model, x)
        assert found.ok, found
        for row in found.rows:
            if row.kind in ("output", "buffer") and not row.name.endswith("num_batches_tracked"):
                assert 0 < row.allowed < 4096 * torch.finfo(dtype).eps, row
    counts = [row for row in found.rows if row.name.endswith("num_batches_tracked")]
    assert counts and all(row.allowed == 0 for row in counts)


def test_a_complex_output_is_compared():
    class Spectrum(nn.Sequential):
        def forward(self, x):
            return torch.fft.rfft2(super().forward(x))

    found = convext.verify(Spectrum(nn.Conv2d(3, 4, 3), nn.ReLU()), sample())
    output = next(row for row in found.rows if row.kind == "output")
    assert found.ok and 0 < output.allowed < 1e-2, found


def test_a_sparse_gradient_is_compared():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv = nn.Embedding(9, 4, sparse=True), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, indices):
            return F.relu(self.conv(self.words(indices).permute(0, 3, 1, 2)))

    found = convext.verify(Words(), torch.randint(0, 9, (2, 5, 5)))
    assert found.ok and ("words.weight", "gradient") in {(row.name, row.kind) for row in found.rows}, found


def test_settings_given_as_ints():
    """F.conv2d takes them."""
    for name, value in (("stride", 2), ("padding", 1), ("dilation", 2), ("stride", [2, 1]), ("padding", [1])):
        model = convext.swap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        setattr(model[0], name, value)
        found = convext.verify(model, sample())
        assert found.ok and "agree" in str(found), found


# ---- real errors -----------------------------------------------------------------------------------------------------


def _forward(module, function):
    """Plants another forward in a module of the model that verify takes for the right one's swap."""
    module.forward = types.MethodType(function, module)


def _bias_dropped(model):
    model.block.conv3.bias = None


def _filter_transposed(model):
    conv = model.block.conv2
    conv.weight.data = conv.weight.data.transpose(2, 3).contiguous()


def _filter_stale(model):
    model.block.conv1.weight.data[5] *= 0.99


def _wrong_eps(model):
    model.block.bn2.eps = 1e-3


def _wrong_stride(model):
    model.block.conv1.stride = (2, 1)


def _wrong_offset(model):
    """Odd columns where the stride wants even ones."""
    model.block.conv1.padding = (1, 0)
    model.block.conv1.stride = (2, 2)


def _relu_for_relu6(model):
    model.block.act = nn.ReLU()


def _no_residual(model):
    _forward(
        model.block,
        lambda self, x: self.bn3(self.conv3(self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))))),
    )


def _wrong_groups(model):
    conv = model.block.conv2
    conv.weight.data = conv.weight.data.roll(1, 0)


def _momentum_twice(model):
    model.stem[1].momentum = 0.19


def _biased_variance(model):
    def forward(self, x):
        before = self.running_var.clone()
        y = nn.BatchNorm2d.forward(self, x)
        if self.training:
            n = x.numel() / x.shape[1]
            self.running_var.data.copy_(0.9 * before + (self.running_var - 0.9 * before) * ((n - 1) / n))
        return y

    _forward(model.stem[1], forward)


def _count_off_by_one(model):
    def forward(self, x):
        y = nn.BatchNorm2d.forward(self, x)
        if self.training:
            self.num_batches_tracked.data.add_(1)
        return y

    _forward(model.block.bn1, forward)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.25


class _Open(torch.autograd.Function):
    """ReLU6 whose gradient is ReLU's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu6(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * (x > 0)


def _gradient_scaled(model):
    _forward(model.fc, lambda self, x: F.linear(_Scaled.apply(x), self.weight, self.bias))


def _gradient_open_above(model):
    _forward(model.block.act, lambda self, x: _Open.apply(x))


def _gradient_missing(model):
    conv = model.block.conv3
    _forward(conv, lambda self, x: F.conv2d(x, self.weight, self.bias.detach()))


EVERYWHERE = [
    _bias_dropped,
    _filter_transposed,
    _filter_stale,
    _wrong_eps,
    _wrong_stride,
    _wrong_offset,
    _relu_for_relu6,
    _no_residual,
    _wrong_groups,
    _gradient_scaled,
    _gradient_open_above,
    _gradient_missing,
]
STATISTICS = [_momentum_twice, _biased_variance, _count_off_by_one]


@pytest.fixture
def swapped_wrong(monkeypatch):
    """f(plant): verify then takes a model with an error planted in it for the freshly swapped copy."""

    def use(plant):
        swap = convext.swap

        def wrong(model):
            plant(model)
            return swap(model)

        monkeypatch.setattr(__import__("sys").modules["convext.swap.swapping"], "swap", wrong)

    return use


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("plant", "training"),
    [
        *((plant, training) for plant in EVERYWHERE for training in (True, False)),
        *((plant, True) for plant in STATISTICS),
    ],
)
def test_a_planted_error_is_found(plant, training, dtype, swapped_wrong):
    model, x = make(dtype, training), sample(dtype)
    swapped_wrong(plant)
    found = convext.verify(model, x)
    assert any(not row.ok for row in found.rows if row.of == "copy")
    assert all(row.ok for row in found.rows if row.of == "live")
    assert not found and "DISAGREE" in str(found)


@pytest.mark.parametrize("plant", STATISTICS)
def test_statistics_do_not_matter_in_evaluation(plant, swapped_wrong):
    """The planted errors above are what is found there, not the planting."""
    model, x = make(training=False), sample()
    swapped_wrong(plant)
    assert convext.verify(model, x).ok


# ---- the live model --------------------------------------------------------------------------------------------------


class Stale(nn.Module):
    """Scales by a plain number, and keeps what it was at the first call in one mode. A copy has kept nothing."""

    def __init__(self, when):
        super().__init__()
        self.when, self.scale, self.kept = when, 1.0, []

    def __getstate__(self):
        return {**self.__dict__, "kept": []}

    def forward(self, x):
        if not self.when(torch.is_grad_enabled()):
            return x * self.scale
        if not self.kept:
            self.kept.append(self.scale)
        return x * self.kept[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("when", [bool, lambda gradients: not gradients], ids=["with gradients", "without"])
def test_what_the_live_model_has_kept_is_seen(when, training):
    model, x = convext.swap(nn.Sequential(make(), Stale(when))).train(training), sample()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            model(x)
    assert convext.verify(model, x).ok
    model[1].scale = 1.01
    found = convext.verify(model, x)
    assert not found.ok and "the live model and a fresh copy of it differ in" in str(found)
    assert "output" + ("" if when(True) else ", no_grad") in {row.kind for row in found.stale}
    assert all(row.ok for row in found.rows if row.of == "copy")
    assert found.stale[0].error == pytest.approx(0.01 * float(_output(model, x, when(True)).abs().max()), rel=0.2)
    model[1].kept.clear()
    assert convext.verify(model, x).ok


def _output(model, x, gradients):
    """What verify sees: its own seed."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        found = copy.deepcopy(model)(x).detach()
    torch.set_rng_state(state)
    return found


def test_what_goes_wrong_from_the_second_call_on_is_seen():
    """As a kept call would: a count that verify cannot put back, of the live model's calls alone."""
    calls = []

    class Second(nn.Module):
        live = False

        def __getstate__(self):
            return {**self.__dict__, "live": False}

        def forward(self, x):
            calls.extend([None] * self.live)
            return x * 1.01 if self.live and len(calls) == 2 else x

    model = nn.Sequential(make(), Second())
    model[1].live = True
    found = convext.verify(model, sample())
    assert {row.kind for row in found.stale} >= {"output"} and len(calls) == 4
    assert all(row.ok for row in found.rows if row.of == "copy")


class Unruly(nn.Module):
    """A forward that changes all that a forward can change of its module."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("rebound", torch.zeros(4))
        self.register_buffer("written", torch.zeros(4))
        self.plain, self.calls, self.history, self.table = torch.zeros(2), 0, [], {"calls": 0}

    def forward(self, x):
        x = self.bn(self.conv(x))
        x = x * 1.0 + random.random() * 0.01 + float(numpy.random.rand()) * 0.01 + torch.rand(1, device=x.device) * 0.01
        self.rebound = self.rebound + 1
        self.written += 1
        self.plain += 1
        self.calls += 1
        self.history.append(self.calls)
        self.table["calls"] += 1
        self.conv.weight.requires_grad_(False)
        self.bn.training = False
        self.lazily = x.detach()
        with torch.no_grad():
            self.conv.bias.add_(1)
        self.register_forward_hook(lambda *_: None)
        return x


def test_the_model_is_afterwards_what_it_was():
    model = convext.swap(nn.Sequential(Unruly(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    model[1].bias.requires_grad_(False)
    model(sample()).sum().backward()
    model[0].conv.weight.requires_grad_(True)
    fired = []
    for p in model[2].parameters():
        p.register_hook(fired.append)
        p.register_post_accumulate_grad_hook(fired.append)
    elsewhere = torch.ones(4, 1, 1, requires_grad=True)
    elsewhere.grad = torch.full((4, 1, 1), 7.0)
    model[3].forward = lambda x: F.relu(x) * elsewhere
    x = sample().requires_grad_()
    x.grad = torch.full_like(x, 3.0)

    def state():
        holders = [m.__dict__ for m in model.modules()]
        holders += [v for d in holders for v in d.values() if isinstance(v, (dict, OrderedDict, list, set))]
        found = [[(k, id(v)) for k, v in h.items()] if isinstance(h, dict) else list(map(id, h)) for h in holders]
        tensors = [*model.parameters(), *model.buffers(), model[0].plain, x, elsewhere]
        values = [
            (t.detach().clone(), t.requires_grad, id(t.grad), None if t.grad is None else t.grad.clone())
            for t in tensors
        ]
        return found, values, torch.get_rng_state(), random.getstate(), numpy.random.get_state()

    def same(a, b):
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        return numpy.array_equal(a, b) if isinstance(a, numpy.ndarray) else a == b

    before = state()
    seen = x.detach().clone()
    found = convext.verify(model, x)
    assert found.ok, found
    assert same(before, state()) and torch.equal(seen, x) and not fired
    model(x).sum().backward()
    assert fired, "the hooks are on again"


def test_a_failing_call_leaves_the_model_as_it_was():
    class Fails(nn.Module):
        def __getstate__(self):
            return {**self.__dict__, "live": False}

        def __init__(self):
            super().__init__()
            self.live = True

        def forward(self, x):
            if self.live:
                raise ArithmeticError("only this one")
            return x

    model = convext.swap(nn.Sequential(*make().stem, Fails()))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ArithmeticError, match="only this one"):
        convext.verify(model, sample())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # without gradients, rightly
def test_reentrant_checkpoints_are_verified():
    """They forbid asking for single gradients."""

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.inner, self.reentrant = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), reentrant

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    for reentrant in (True, False):
        model = convext.swap(Checkpointed(reentrant))
        grad = model.inner[0].weight.grad = torch.ones_like(model.inner[0].weight)
        found = convext.verify(model, sample())
        assert found.ok and sum(r.kind == "gradient" for r in found.rows if r.of == "live") == 4, found
        assert model.inner[0].weight.grad is grad and (grad == 1).all()
        assert model.inner[2].weight.grad is None


def test_frozen_models_and_inference_mode():
    model = convext.swap(make(training=False).requires_grad_(False))
    with torch.inference_mode():
        found = convext.verify(model, sample())
    assert found.ok and not any(p.requires_grad for p in model.parameters())
    assert {"output", "output, no_grad", "gradient of input"} <= {row.kind for row in found.rows}


def test_what_cannot_be_copied_is_named():
    class Sealed(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one of me")

    with pytest.raises(ValueError, match="model: this Sealed cannot be deep-copied.*there is only one of me"):
        convext.verify(Sealed(), sample())


def test_what_is_not_initialised_is_named():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="model: 0.weight is not initialised yet"):
        convext.verify(model, sample())
    assert isinstance(model[0], nn.LazyConv2d)
