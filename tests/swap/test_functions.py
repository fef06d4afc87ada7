"""What is fused are functions of tensors that are found by name, whoever calls them: a layer of torch's, the forward
itself, or a module without a convolution that stands between them, which a capture looks through."""

import copy

import pytest
import torch
import torch.nn.functional as F
from swap_models import Inverted, NextBlock, NextNet
from torch import nn
from torch.profiler import ProfilerActivity, profile
from twins import X, check

import convext


class Functional(nn.Module):
    """A convolution and a batch norm of its own parameters, given to them in one way or another (`how`)."""

    def __init__(self, how="places", activation=F.relu):
        super().__init__()
        self.how, self.activation = how, activation
        self.weight, self.offset = nn.Parameter(torch.randn(4, 3, 3, 3) / 5), nn.Parameter(torch.randn(4))
        self.gamma, self.beta = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4) / 5)
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        if self.how == "names":
            z = F.conv2d(x, weight=self.weight, bias=self.offset, padding=1)
            z = F.batch_norm(z, weight=self.gamma, running_var=self.var, bias=self.beta, running_mean=self.mean)
        elif self.how == "lists":
            z = F.batch_norm(F.conv2d(x, self.weight, None, [1, 1], [1, 1]), self.mean, self.var)
        else:
            z = F.conv2d(x, self.weight, self.offset, 1, 1)
            z = F.batch_norm(z, self.mean, self.var, self.gamma, self.beta, self.training, 0.3, 1e-4)
        return self.last(self.activation(z))


def _fused(model, x=X):
    """How many units that are more than a convolution the plans of a swapped model hold."""
    with torch.no_grad():
        model(x)
    forward = model.__dict__["forward"]
    return [unit.words for compiled in forward.present_plans() for unit in compiled.units if unit.words]


@pytest.mark.parametrize("how", ["places", "names", "lists"])
def test_functions_of_a_forward_are_fused(how):
    assert _fused(convext.swap(Functional(how).double().eval())) == [["bn", "relu"]]

    def steps(model):
        yield model(X)
        with torch.no_grad():
            model.weight.mul_(2), model.gamma.add_(1), model.mean.sub_(1)
        yield model(X)
        model.weight = nn.Parameter(torch.ones(4, 3, 1, 1, dtype=torch.float64))
        yield model(X)
        model.weight, model.beta = nn.Parameter(torch.ones(4, 3, 5, 5, dtype=torch.float64)), None
        yield model(X)
        yield model(X.to(memory_format=torch.channels_last))
        model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
        yield model(X).stride()

    check(lambda: Functional(how), steps)


def test_functions_train_as_layers_do():
    def steps(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.train()
        for _ in range(3):
            y = model(X)
            if torch.is_grad_enabled():
                optimizer.zero_grad()
                y.square().mean().backward()
                optimizer.step()
            yield y
            yield from (model.mean, model.var, model.weight, model.gamma)
        yield model.eval()(X)
        yield model.train()(X[:1, :, :1, :1].expand(1, 3, 2, 2))

    check(Functional, steps)
    model = convext.swap(Functional().double())
    assert _fused(model) == [["bn", "relu"]]
    found = []
    model(X).sum().register_hook(found.append)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = model(X)
    assert "Conv" in type(y.grad_fn.next_functions[0][0]).__name__ and found


def test_statistics_that_something_between_updates():
    """A function that updates statistics writes: nothing that reads them moves across it."""

    class Shared(Functional):
        def forward(self, x):
            z = F.conv2d(x, self.weight, self.offset, 1, 1)
            F.batch_norm(2 * x[:, :1].expand(-1, 4, -1, -1) + 1, self.mean, self.var, training=True, momentum=0.5)
            z = F.batch_norm(z, self.mean, self.var, self.gamma, self.beta, False)
            other = F.batch_norm(F.conv2d(x, self.weight, None, 1, 1), self.mean, self.var, training=True)
            return self.last(F.relu(z) + other)

    def steps(model):
        for _ in range(2):
            yield from (model(X), model.mean, model.var)

    check(Shared, steps, differs=True)


def test_a_count_beside_a_batch_norm():
    class Counts(Functional):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x):
            z = F.conv2d(x, self.weight, self.offset, 1, 1)
            self.count.add_(1)
            return self.last(F.relu(F.batch_norm(z, self.mean, self.var, training=True, momentum=0.1)))

    def steps(model):
        for _ in range(2):
            yield from (model(X), model.count, model.mean)

    check(Counts, steps, differs=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.conv2d(x, m.weight, m.offset, padding="same"),
        lambda m, x: F.conv2d(x, m.weight * 2, m.offset, padding=1),
        lambda m, x: F.conv2d(x, m.weight, m.offset, padding=1).unflatten(1, (2, 2)).flatten(1, 2),
        lambda m, x: F.conv2d(x[0], m.weight, m.offset, padding=1)[None],
        lambda m, x: F.batch_norm(F.conv2d(x, m.weight, padding=1), None, None, training=True),
        lambda m, x: F.batch_norm(F.conv2d(x, m.weight, padding=1), m.mean, m.var, m.gamma.abs(), m.beta),
        lambda m, x: F.batch_norm(F.conv2d(x, m.weight, padding=1), m.mean, m.var, None, m.beta),
        lambda m, x: F.batch_norm(F.conv2d(x, m.weight, padding=1), m.mean, m.var, momentum=0, training=True),
        lambda m, x: F.conv2d(x, m.weight, m.offset, padding=x.shape[0] - 1),
    ],
    ids=lambda call: "",
)
def test_functions_that_are_called_otherwise(call):
    class Otherwise(Functional):
        def forward(self, x):
            return self.last(F.relu(call(self, x)))

    def steps(model):
        yield from (model(X), model(X), model.mean, model.var)

    check(Otherwise, steps)


def test_functions_raise_as_they_do():
    class Raises(Functional):
        def forward(self, x):
            z = F.conv2d(x, self.weight, self.offset, 1, 1)
            return self.last(F.batch_norm(z, self.mean, None, self.gamma, self.beta, False))

    check(Raises, lambda model: (model(X) for _ in range(2)), raises=RuntimeError)


@pytest.mark.parametrize(
    "rest",
    [
        lambda m, x: m.norm(F.conv2d(x, m.weight, m.offset, 1, 1)),
        lambda m, x: m.last(F.relu(m.norm(F.conv2d(x, m.weight, m.offset, 1, 1)))),
        lambda m, x: F.relu(m.linear(x)),
    ],
    ids=["conv", "sequence", "linear"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_value_that_is_no_tensor_raises_as_it_does(rest, autocast):
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return None if self.training else self.conv(F.avg_pool2d(x, 2, 2, 1))

    class Given(Functional):
        def __init__(self):
            super().__init__()
            self.nothing, self.norm, self.linear = Nothing(), nn.BatchNorm2d(4), nn.Linear(3, 3)

        def forward(self, x):
            return rest(self, self.nothing(x))

    def steps(model):
        model.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for x in [torch.randn(2, 3, 4, 4)] * 3:
                yield [*model(x).shape]
            model.nothing.train()
            yield model(x)

    check(Given, steps, raises=TypeError)


class Gate(nn.Module):
    """Without a convolution: it has no plan of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.activation = nn.Parameter(torch.rand(4, 1, 1) + 0.5), nn.ReLU()
        self.calls = 0

    def forward(self, x):
        return self.activation(x)


class Gated(nn.Module):
    def __init__(self, gate=Gate):
        super().__init__()
        self.first, self.bn, self.gate = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), gate()
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.last(self.gate(self.bn(self.first(x))))


def test_a_module_of_the_users_is_looked_through():
    model = convext.swap(Gated().double().eval())
    assert _fused(model) == [["bn", "relu"]]

    def steps(model):
        yield model(X)
        log = []
        handle = model.gate.register_forward_hook(lambda module, args, y: log.append(y.detach().sum()) or 2 * y)
        yield from (model(X), list(log))
        handle.remove()
        yield model(X)
        model.gate.activation = nn.SiLU()
        yield model(X)
        model.gate.forward = lambda x: x * model.gate.scale
        yield model(X)
        del model.gate.forward
        handle = model.gate.activation.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        yield model(X)
        handle.remove()
        model.gate = nn.Tanh()
        yield model(X)

    check(Gated, steps, differs=True)


def test_what_a_module_that_is_looked_through_reads():
    class Reads(Gate):
        def forward(self, x):
            if self.training:
                x = x * 3
            return self.activation(x * self.scale + self.offset)

    Reads.offset = 0.5

    def steps(model):
        yield model(X)
        with torch.no_grad():
            model.gate.scale.mul_(2)
        yield model(X)
        model.gate.scale = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        yield model(X)
        yield model.train()(X)
        model.eval()
        yield model(X)
        Reads.offset = -2.0
        yield model(X)
        Reads.offset = 0.5
        Reads.forward, kept = Gate.forward, Reads.forward
        yield model(X)
        Reads.forward = kept
        yield model(X)

    check(lambda: Gated(Reads), steps, differs=True)


def test_a_module_with_effects_is_called():
    class Counts(Gate):
        def forward(self, x):
            self.calls += 1
            return self.activation(x)

    def steps(model):
        for _ in range(3):
            yield from (model(X), model.gate.calls)

    check(lambda: Gated(Counts), steps, differs=False)


def test_modules_that_are_looked_through_may_hold_such():
    class Outer(Gate):
        def __init__(self):
            super().__init__()
            self.inner = Gate()

        def forward(self, x):
            return self.inner(x)

    model = convext.swap(Gated(Outer).double().eval())
    assert _fused(model) == [["bn", "relu"]]

    def steps(model):
        yield model(X)
        model.gate.inner = Gate()
        model.gate.inner.activation = nn.Identity()
        yield model(X)
        model.gate.inner.register_forward_hook(lambda module, args, y: -y)
        yield model(X)

    check(lambda: Gated(Outer), steps, differs=True)


def test_a_forward_that_wraps_a_layers_is_called():
    """Around the library's code stands a context, which a graph of that code would lose."""

    class Frozen(nn.Softplus):
        forward = torch.no_grad()(nn.Softplus.forward)

    def steps(model):
        for _ in range(2):
            y = model(X)
            yield y
            if torch.is_grad_enabled():
                model.zero_grad()
                y.sum().backward()
                yield [p.grad is None for p in model.parameters()]

    check(lambda: Gated(Frozen), steps)


def _timm_block():
    from timm.layers import BatchNormAct2d

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn1 = nn.Conv2d(3, 16, 1, bias=False), BatchNormAct2d(16, act_layer=nn.SiLU)
            self.middle, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), BatchNormAct2d(16, act_layer=nn.ReLU6)
            self.last, self.bn3 = nn.Conv2d(16, 3, 1), BatchNormAct2d(3, apply_act=False)

        def forward(self, x):
            return self.bn3(self.last(self.bn2(self.middle(self.bn1(self.first(x)))))) + x

    return Block()


def test_timms_batch_norm_with_an_activation():
    assert _fused(convext.swap(_timm_block().double().eval())) == [["bn", "silu"], ["bn", "relu6"], ["bn", "add"]]

    def steps(model):
        for training in (False, True, False):
            model.train(training)
            for _ in range(2):
                yield from (model(X), model.bn1.running_mean, model.bn1.num_batches_tracked)
        model.bn1.act = nn.Hardswish()
        yield model(X)
        model.bn1.drop = nn.Dropout(1.0)
        yield model.train()(X)
        model.bn2.momentum = None
        yield from (model(X), model.bn2.running_var)
        model.bn3.act.register_forward_hook(lambda module, args, y: 2 * y)
        yield model(X)
        model.bn2.eps = 0.5
        yield model.eval()(X)
        yield model(X[0])

    check(_timm_block, steps, raises=AssertionError)


def test_timms_batch_norm_has_code_of_its_own(monkeypatch):
    """Where nothing is fused with it, too: whoever replaces that of torch's layers does not reach it."""
    from timm.layers import BatchNormAct2d

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = BatchNormAct2d(3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(self.bn(x))

    torchs = nn.modules.batchnorm._BatchNorm.forward

    def steps(model):
        for training in (False, True, True):
            yield model.train(training)(X)
            with monkeypatch.context() as patch:
                patch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: 2 * torchs(self, x))
                yield from (model(X), model(X[:1]), model.bn.running_mean, model.bn.num_batches_tracked)
            model.bn.momentum = None
        model.bn.track_running_stats = False
        yield from (model(X), model.eval()(X))

    check(First, steps)


FACTORIES = {
    "tensor": lambda z: torch.tensor(0.3, device=z.device, dtype=z.dtype),
    "tensor_of_a_size": lambda z: torch.tensor(z.shape[0]) + torch.tensor([z.shape[1], 1]).sum(),
    "as_tensor": lambda z: torch.as_tensor([[0.3]], dtype=z.dtype, device=z.device),
    "scalar_tensor": lambda z: torch.scalar_tensor(z.shape[0], device=z.device),
    "full": lambda z: torch.full((z.shape[0], 1, 1, 1), 0.3, dtype=z.dtype),
    "zeros": lambda z: torch.zeros(z.shape[0], 1, 1, 1, device=z.device),
    "ones": lambda z: torch.ones(1, z.size(1), 1, 1, dtype=z.dtype),
    "empty": lambda z: torch.empty(z.shape[1:], device=z.device).fill_(0.3),
    "arange": lambda z: torch.arange(z.shape[3], device=z.device),
    "linspace": lambda z: torch.linspace(0, 1, z.shape[3]),
    "eye": lambda z: torch.eye(z.shape[2], z.shape[3]),
    "no_values": lambda z: torch.tensor(0.3),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_tensors_made_from_what_a_value_is_do_not_stop_a_capture(name):
    """Their sizes, dtype and device are those of each call."""

    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            z = F.relu(self.bn(self.conv(x)))
            return torch.minimum(z, FACTORIES[name](z).to(z.dtype))

    assert _fused(convext.swap(Makes().double().eval()))[0][:2] == ["bn", "relu"]

    def steps(model):
        for training in (False, True):
            yield model.train(training)(X)
            yield model(torch.cat([X, X])[:, :, 1:])
            yield model.float()(X.float()).dtype
            model.double()

    check(Makes, steps)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "efficientnet_b0", "mobilenetv4_conv_small", "repvgg_a0"])
def test_timms_networks_fuse(name):
    import timm

    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert convext.verify(plain, x)
        swapped(x)
    before_norms = [m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    assert sum("bn" in row.fused for row in convext.report(swapped)) == len(before_norms) > 20


@pytest.mark.parametrize(
    "make",
    [Inverted, NextBlock, NextNet, lambda: NextBlock(by_hand=True)],
    ids=["se", "layers", "head", "by_hand"],
)
def test_steps_of_a_block_are_found_in_the_forward_that_calls_them(make):
    """Squeeze and excitation between two convolutions, LayerNorm and linear layers, as layers or as functions of their
    weights: the network is one call of the compiled library."""
    torch.manual_seed(0)
    plain = make().eval()
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = plain.double()(x.double())
        for _ in range(3):
            y = swapped(x)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            swapped(x)
    # A dozen layers' sums of at most 576 products.
    assert (y - expected).abs().max() <= 12 * 8 * torch.finfo(torch.float32).eps * 24 * expected.abs().max()
    names = {event.key for event in events.key_averages()}
    assert "convext_cpu::run_sequence" in names
    assert not {"aten::conv2d", "aten::linear", "aten::layer_norm", "aten::mean"} & names, names


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_a_linear_layer_by_hand_trains_as_the_layer_does(activation):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.weight, self.offset = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2).contiguous()
            return activation(F.linear(x, self.weight, self.offset))

    torch.manual_seed(0)
    plain, x = ByHand(), torch.randn(2, 3, 16, 16)
    exact, swapped = copy.deepcopy(plain).double(), convext.swap(copy.deepcopy(plain))
    for model, given in ((exact, x.double()), (swapped, x), (swapped, x)):
        model.zero_grad()
        model(given).square().sum().backward()
    for a, b in zip(swapped.parameters(), exact.parameters()):
        # Gradients are sums over 512 pixels, of products of such of 8 and 6.
        assert (a.grad - b.grad).abs().max() <= 16 * torch.finfo(torch.float32).eps * 23 * b.grad.abs().max()
