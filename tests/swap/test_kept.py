"""Training: what a fused layer's readers do not keep for the backward pass, because they can compute it again from what
the layer itself keeps (autograd.Recomputable). Whatever is done between, values and gradients are the unswapped
model's."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import convext
from convext import functional, ops
from convext.activation import TABLE
from convext.backends import unavailable
from convext.bench.memory import saved_bytes
from convext.problem import ACTIVATIONS

MODULES = {name: next(iter(entry.modules)) for name, entry in TABLE.items()}
FLOAT64 = dict(rtol=1e-8, atol=1e-8)  # sums of some 1,000 terms of the order of 1

needs_library = pytest.mark.skipif(unavailable("native", "cpu") is not None, reason="the library is not built")


def block(c, k, activation="relu", size=3, **arguments):
    return [
        nn.Conv2d(c, k, size, padding=size // 2, bias=False, **arguments),
        nn.BatchNorm2d(k),
        MODULES[activation](),
    ]


def chain(activation="relu"):
    return nn.Sequential(*block(3, 6, activation), *block(6, 6, activation, groups=6), *block(6, 4, activation, 1))


class TwoReaders(nn.Module):
    """Both of them convolutions: the gradients that they return are added up."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Sequential(*block(3, 6)), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        y = self.first(x)
        return self.a(y) * self.b(y)


class OneReaderIsASum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(*block(3, 6)), nn.Sequential(*block(6, 6))

    def forward(self, x):
        y = self.first(x)
        return y + self.second(y)


class Residual(nn.Module):
    """A block of ResNet's with a convolution in its shortcut."""

    def __init__(self, activation="relu"):
        super().__init__()
        self.first, self.second = nn.Sequential(*block(3, 6, activation)), nn.Sequential(*block(6, 6)[:2])
        self.shortcut = nn.Sequential(*block(3, 6, size=1)[:2])
        self.activation, self.last = MODULES[activation](), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.last(self.activation(self.second(self.first(x)) + self.shortcut(x)))


class Pools(nn.Module):
    """In each way in which max pooling is written."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(*block(3, 4)) for _ in range(3))
        self.layer = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        a = self.layer(self.a(x))
        return a + F.max_pool2d(self.b(x), 3, stride=2, padding=1) + torch.max_pool2d(self.c(x), (3, 3), 2, 1)


class Rows(nn.Module):
    """A transformer's and ConvNeXt's two linear layers: enough rows that they run as convolutions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(self.conv(x).permute(0, 2, 3, 1).contiguous())


class Frozen(nn.Sequential):
    """Trains with its batch norms in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        for layer in self:
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self


def fixed():
    """A backbone of which the first layer learns nothing, and the second no convolution."""
    model = chain()
    for layer in (*model[:3], model[3]):
        layer.requires_grad_(False)
    return model


NETWORKS = {
    **{f"chain_{name}": lambda name=name: chain(name) for name in ACTIVATIONS},
    **{f"residual_{name}": lambda name=name: Residual(name) for name in ACTIVATIONS},
    "two_readers": TwoReaders,
    "one_reader_is_a_sum": OneReaderIsASum,
    "pools": Pools,
    "frozen": lambda: Frozen(*block(3, 6, "silu"), *block(6, 4)),
    "without_batch_norm": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ),
    "fixed": fixed,
}


def pair(make, dtype=torch.float64):
    """An unswapped model and a swapped one with the same parameters."""
    torch.manual_seed(3)
    plain = make().to(dtype)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return plain.train(), convext.swap(copy.deepcopy(plain)).train()


def image(dtype=torch.float64, height=8):
    return torch.randn(2, 3, height, 7, dtype=dtype, generator=torch.Generator().manual_seed(5)).requires_grad_()


PIXELS = 2 * 32 * 7 * 8  # bytes of one channel of an image of height 32
VECTORS = PIXELS  # more than the bytes of all that is (C) together


def step(model, x):
    """The result, every gradient and every buffer."""
    model.zero_grad()
    x.grad = None
    y = model(x)
    (y.sin() * torch.arange(y.shape[-1])).sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *gradients, *(b.clone().double() for b in model.buffers())]


def same(actual, expected, **bound):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(bound or FLOAT64))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_is_the_unswapped_models(network, channels_last):
    plain, swapped = pair(NETWORKS[network])
    x = image()
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(2):
        same(step(swapped, x), step(plain, x))


@needs_library
def test_linear_layers_in_a_row_keep_no_activation():
    plain, swapped = pair(Rows, torch.float32)
    x = image(torch.float32).detach().repeat(1, 1, 2, 2).requires_grad_()
    # Sums of up to 448 terms of the order of 1.
    same(step(swapped, x), step(plain, x), rtol=1e-4, atol=1e-4)
    pixels = 2 * 16 * 14 * 4  # bytes of one channel
    assert saved_bytes(plain, x) - saved_bytes(swapped, x) == pixels * (8 + 4)


def test_what_lies_between_two_fused_layers_is_not_kept():
    """Each tensor by its channels: of the swapped model the input and every convolution's output, of the unswapped one
    besides what each activation returned."""
    plain, swapped = pair(chain)
    x = image(height=32)
    assert 0 <= saved_bytes(swapped, x) - PIXELS * (3 + 6 + 6 + 4) < VECTORS
    assert 0 <= saved_bytes(plain, x) - PIXELS * (3 + 2 * (6 + 6 + 4)) < VECTORS


def test_the_summand_of_a_relu_is_not_kept():
    """PyTorch's ReLU keeps its result, and so does whoever reads it. x is there twice: as the kernels read it, for each
    of the two convolutions."""
    plain, swapped = pair(Residual)
    x = image(height=32)
    assert 0 <= saved_bytes(swapped, x) - PIXELS * (3 + 3 + 6 + 6 + 6 + 6) < VECTORS
    assert 0 <= saved_bytes(plain, x) - PIXELS * (3 + 6 + 6 + 6 + 6 + 6) < VECTORS


def test_max_pooling_keeps_its_indices_alone():
    def make():
        return nn.Sequential(*block(3, 4), nn.MaxPool2d(2))

    plain, swapped = pair(make)
    x, indices = image(height=32), 2 * 16 * 3 * 4 * 8
    assert 0 <= saved_bytes(swapped, x) - PIXELS * (3 + 4) - indices < VECTORS
    assert 0 <= saved_bytes(plain, x) - PIXELS * (3 + 4 + 4) - indices < VECTORS


@needs_library
@pytest.mark.parametrize(
    ("name", "most"),
    [("resnet50", 0.815), ("mobilenet_v2", 0.41), ("efficientnet_b0", 0.575), ("convnext_tiny", 0.705)],
)
def test_saved_bytes_of_networks(name, most):
    models = pytest.importorskip("torchvision").models
    plain = getattr(models, name)().train()
    x = torch.randn(1, 3, 224, 224)
    before = saved_bytes(plain, x)
    assert saved_bytes(convext.swap(plain), x) <= most * before


@pytest.mark.parametrize("network", ["chain_silu", "chain_gelu", "residual_silu", "two_readers", "pools", "frozen"])
def test_gradients_of_whole_blocks_are_checked_to_the_second_order(network):
    """Where no kink is near: ReLU's are of a network whose second derivatives are those of batch norms and of pooling's
    choice."""
    _, swapped = pair(NETWORKS[network])
    x = image().detach()[:, :, :5, :4].contiguous().requires_grad_()
    parameters = [p for p in swapped.parameters() if p.numel() < 30]

    def call(x, *parameters):
        names = [name for name, p in swapped.named_parameters() if p.numel() < 30]
        state = copy.deepcopy(dict(swapped.named_buffers()))  # each call trains the statistics of its own
        return torch.func.functional_call(swapped, {**dict(zip(names, parameters)), **state}, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("network", ["chain_relu", "chain_hardswish", "residual_relu", "pools", "two_readers"])
def test_the_gradient_of_a_gradient_is_the_unswapped_models(network):
    found = []
    for model in pair(NETWORKS[network]):
        x = image()
        given = [x, *model.parameters()]
        first = torch.autograd.grad(model(x).square().sum(), given, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)])
    same(found[1], found[0])


@pytest.mark.parametrize("network", ["chain_silu", "residual_relu", "two_readers"])
def test_batched_gradients_are_the_unswapped_models(network):
    found = []
    for model in pair(NETWORKS[network]):
        y = model(image())
        given = torch.arange(3 * y.numel(), dtype=torch.float64).cos().view(3, *y.shape)
        found.append(torch.autograd.grad(y, [*model.parameters()], given, is_grads_batched=True))
    same(found[1], found[0])


def test_a_graph_is_looked_through_for_anomalies():
    """Which checks every gradient, that of a handle among them."""
    plain, swapped = pair(chain)
    with torch.autograd.set_detect_anomaly(True):
        same(step(swapped, image()), step(plain, image()))


def test_a_graph_runs_more_than_once_and_in_parts():
    found = []
    for model in pair(chain):
        x = image()
        loss = model(x).square().sum()
        last, first = model[6].weight, model[0].weight
        found.append(
            [
                *torch.autograd.grad(loss, last, retain_graph=True),
                *torch.autograd.grad(loss, [model[3].weight], retain_graph=True),
                *torch.autograd.grad(loss, [x, first, last], retain_graph=True),
                *torch.autograd.grad(loss, [first, x]),
            ]
        )
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x)
    same(found[1], found[0])


@pytest.mark.parametrize("what", ["weight", "bias", "running_mean", "running_var"])
def test_who_writes_a_batch_norm_afterwards_does_not_change_the_layer_behind_it(what):
    """Its result was computed before. PyTorch refuses only the batch norm's own gradient by a weight that was
    written."""
    found = []
    for model in pair(lambda: Frozen(*block(3, 6), *block(6, 4))):
        loss = model(image()).square().sum()
        with torch.no_grad():
            getattr(model[1], what).add_(3.0)
        found.append(torch.autograd.grad(loss, model[3].weight, retain_graph=True))
        if what == "weight":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    same(found[1], found[0])


@pytest.mark.parametrize("change", ["another tensor", "in place"])
def test_a_hook_on_a_node_of_the_graph_changes_the_gradient(change):
    """What the reader has summed up is of another gradient then."""

    def fused_layers(node):
        """The nodes of fused layers behind y, the last layer's first."""
        following = [n for n, _ in node.next_functions if n is not None and "AccumulateGrad" not in n.name()]
        deeper = [found for n in following for found in fused_layers(n)]
        return [node, *deeper] if "ConvBN" in node.name() else deeper

    _, swapped = pair(chain)
    x, found = image(), []
    for factor in (1.0, 2.0):
        swapped.zero_grad()
        y = swapped(x)

        def hook(gradients, factor=factor):
            *others, last = gradients
            return (*others, last.mul_(factor) if change == "in place" else last * factor)

        if factor != 1.0:
            fused_layers(y.grad_fn)[1].register_prehook(hook)
        y.square().sum().backward()
        found.append([p.grad.clone() for p in swapped.parameters()])
    ones, twos = found
    first_two = 2 * 3
    same(twos[:first_two], [2 * g for g in ones[:first_two]])
    same(twos[first_two:], ones[first_two:])


@needs_library
def test_the_pass_that_computes_again_sums_up_for_the_layer_before(monkeypatch):
    """One reader: no pass over y of its own. Two: their gradients are added first."""
    used = []
    in_one, alone = ops.bn_conv_backward, ops.bn_act_from_sums

    def with_sums(dout, y, epilogue, sums, *others):
        used.extend([dout.shape] * (sums is not None))
        return in_one(dout, y, epilogue, sums, *others)

    monkeypatch.setattr(ops, "bn_conv_backward", with_sums)
    monkeypatch.setattr(ops, "bn_act_from_sums", lambda *a: used.append(a[0].shape) or alone(*a))
    for make, times in ((chain, 2), (TwoReaders, 0)):
        used.clear()
        step(pair(make, torch.float32)[1], image(torch.float32))
        assert len(used) == times


@needs_library
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_passes_in_two_calls_are_bit_for_bit_those_of_one(activation, dtype, channels_last):
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    y = (torch.randn(3, 37, 19, 17) * 2 + 1).to(dtype).contiguous(memory_format=memory_format)
    dout = torch.randn_like(y)
    with convext.backend("native"):
        mean, var = torch.ops.convext.batch_stats(y)
        gamma, beta = torch.randn(2, 37, dtype=mean.dtype)
        epilogue = convext.problem.Epilogue(None, mean, var, gamma, beta, None, 1e-5, activation)
        out, sums = ops.bn_act_and_sums(dout, y, epilogue)
        assert torch.equal(out, ops.bn_act(y, epilogue))
        dy, dgamma, dbeta, _ = ops.bn_act_backward(dout, y, epilogue, True)
        assert all(map(torch.equal, ops.bn_act_from_sums(dout, y, epilogue, sums), (dy, dgamma, dbeta)))


def test_the_result_is_freed_when_the_last_reader_has_run():
    """And with it its memory, though the graph lives on."""
    gc.collect()
    _, swapped = pair(chain)
    alive = []
    right = functional.chained_conv_bn_act

    def counted(given, *rest):
        out = right(given, *rest)
        alive.append(torch._C._WeakTensorRef(out.values if isinstance(out, convext.autograd.Recomputable) else out))
        return out

    functional.chained_conv_bn_act = counted
    try:
        y = swapped(image())
    finally:
        functional.chained_conv_bn_act = right
    assert len(alive) == 3 and alive[0].expired() and alive[1].expired()
    y.sum().backward()


@pytest.mark.parametrize("filters", ["of another dtype", "of other channels"])
def test_a_layer_behind_one_that_is_fused_raises_as_pytorchs(filters):
    messages = []
    for model in pair(chain):
        weight = model[6].weight
        model[6].weight = nn.Parameter(weight.float() if filters == "of another dtype" else weight[:, :4].clone())
        with pytest.raises(RuntimeError) as raised:
            model(image())
        messages.append(str(raised.value).split("\n")[0])
    assert messages[0] == messages[1]


def test_a_layer_behind_one_that_is_fused_runs_by_itself():
    """Where it has one value for each channel in training it raises, and a bias of an odd kind is the layers': either
    way they get an ordinary tensor."""
    plain, swapped = pair(lambda: nn.Sequential(*block(3, 6), *block(6, 4)))
    for model in (plain, swapped):
        model[4].running_mean = torch.zeros(8, dtype=torch.float64)[::2]  # not as the fused call reads it
    x = image()
    same(step(swapped, x), step(plain, x))


def test_compiled_autograd_runs_the_backward_pass():
    from torch._dynamo import compiled_autograd

    plain, swapped = pair(lambda: nn.Sequential(*block(3, 6), *block(6, 6, "silu"), nn.MaxPool2d(2), *block(6, 4)))
    plain(image()).square().sum().backward()
    loss = swapped(image()).square().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    same([p.grad for p in swapped.parameters()], [p.grad for p in plain.parameters()])


def test_copies_and_pickles_in_the_middle_of_training():
    plain, swapped = pair(chain)
    expected = [step(plain, image()) for _ in range(2)][1]
    step(swapped, image())
    for twin in (copy.deepcopy(swapped), convext.swap(pickle.loads(pickle.dumps(swapped)))):
        same(step(twin, image()), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_training_mode_without_gradients_the_chain_is_fused_and_keeps_nothing(autocast, monkeypatch):
    """As KernelBench runs its networks."""
    calls = []
    right = ops.conv_bn_act_train
    monkeypatch.setattr(ops, "conv_bn_act_train", lambda *a: calls.append(a[2].activation) or right(*a))
    plain, swapped = pair(chain, torch.float32)
    x = image(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = swapped(x)
    assert calls == ["relu"] * 3 and y.grad_fn is None
    monkeypatch.undo()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = plain(x)
    # Three layers round to bfloat16, each result and what enters the next; sums of 27 terms in float32.
    bound = dict(rtol=0.05, atol=0.1) if autocast else dict(rtol=1e-4, atol=1e-4)
    same([y, *swapped.buffers()], [expected, *plain.buffers()], **bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_as_little(dtype):
    plain, swapped = pair(chain, torch.float32)
    x = image(torch.float32)
    with torch.autocast("cpu", dtype):
        assert saved_bytes(swapped, x) < saved_bytes(plain, x)
        y = swapped(x)
        y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in swapped.parameters())


def test_gradients_of_contiguous_weights_are_contiguous_whatever_else_reads_the_value():
    """A value that both a layer and a pooling read may be channels-last inside; the layer's weight gradient is not."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
            self.conv, self.pool = nn.Conv2d(6, 6, 3, padding=1), nn.MaxPool2d(3, 1, 1)

        def forward(self, x):
            v = self.act(self.bn(self.first(x)))
            return self.conv(v), self.pool(v)

    plain = Fork()
    found = []
    for model in (plain, convext.swap(copy.deepcopy(plain))):
        y, z = model(torch.ones(2, 6, 7, 6))
        found.append(torch.autograd.grad((y + z).square().sum(), [model.conv.weight, model.first.weight]))
    assert [gradient.stride() for gradient in found[1]] == [gradient.stride() for gradient in found[0]]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])
def test_a_batch_norms_bias_written_behind_torchs_back_changes_no_gradient(activation):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation()).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for model in (plain, convext.swap(copy.deepcopy(plain))):
        given = x.clone().requires_grad_()
        y = model(given)
        model[1].bias.data = model[1].bias.data * 2 + 1
        (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found.append([given.grad, *(p.grad for p in model.parameters())])
    for expected, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
