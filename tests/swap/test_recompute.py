"""recompute=True: a layer of little arithmetic computes its convolution's output again in the backward pass. Gradients
are those of layers that keep it, bit for bit."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn as nn
from test_kept import NETWORKS, PIXELS, VECTORS, block, chain, image, needs_library, pair, same, step
from torch.utils.checkpoint import checkpoint

import convext
from convext import autograd
from convext.bench.memory import saved_bytes


def pointwise(layers=12):
    """1x1 convolutions in a row."""
    return nn.Sequential(*block(3, 6, size=1), *(m for _ in range(layers - 1) for m in block(6, 6, size=1)))


class Inverted(nn.Module):
    """Of MobileNetV2: the wide outputs are those of the first two layers."""

    def __init__(self, stride=1):
        super().__init__()
        self.adds = stride == 1
        self.stem = nn.Sequential(*block(3, 4))
        self.expand, self.depthwise = (
            nn.Sequential(*block(4, 24, "relu6", 1)),
            nn.Sequential(*block(24, 24, "relu6", groups=24, stride=stride)),
        )
        self.project, self.last = nn.Sequential(*block(24, 4, size=1)[:2]), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.project(self.depthwise(self.expand(x)))
        return self.last(x + y if self.adds else y)


class InputIsWritten(nn.Module):
    """After the first layer, which does not need it for the weight of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(*block(3, 6, size=1)), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        x = x * 1
        y = self.first(x)
        x.mul_(-2)
        return self.second(y)


RECOMPUTED = {**NETWORKS, "pointwise": pointwise, "inverted": Inverted, "inverted_strided": lambda: Inverted(2)}


def triple(make, dtype=torch.float64):
    """The unswapped model, the swapped one, and the one that computes again."""
    plain, swapped = pair(make, dtype)
    return plain, swapped, convext.swap(copy.deepcopy(plain), recompute=True)


@pytest.fixture
def computed(monkeypatch):
    """Filled with the shapes of the weights whose convolutions are computed again."""
    found = []
    right = autograd._convolved_again
    monkeypatch.setattr(autograd, "_convolved_again", lambda x, w, *rest: found.append(w.shape) or right(x, w, *rest))
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", RECOMPUTED)
def test_gradients_and_statistics_are_bit_for_bit_those_of_kept_outputs(network, dtype, channels_last):
    plain, swapped, again = triple(RECOMPUTED[network], dtype)
    x = image(dtype, height=16)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(2):
        found, expected = step(again, x), step(swapped, x)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) is (b is None) and (a is None or torch.equal(a, b))
        unswapped = step(plain, x)
        if dtype is torch.float64:
            same(found, unswapped)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_as_well(dtype):
    _, swapped, again = triple(Inverted, dtype)
    x = image(dtype, height=16)
    assert all(map(torch.equal, step(again, x), step(swapped, x)))


def test_of_two_in_a_row_the_larger_output_is_dropped(computed):
    _, _, again = triple(chain)  # 6, 6 and 4 channels; the first two are equal
    x = image(height=32)
    assert 0 <= saved_bytes(again, x) - PIXELS * (3 + 6) < VECTORS
    step(again, x)
    assert computed == [(4, 6, 1, 1), (6, 3, 3, 3)]
    _, _, again = triple(Inverted)  # of 4, 24, 24 and 4; the 4 behind the stem are kept for the sum
    assert 0 <= saved_bytes(again, x) - PIXELS * (3 + 4 + 24 + 4) < VECTORS
    computed.clear()
    step(again, x)
    assert computed == [(4, 24, 1, 1), (24, 4, 1, 1), (4, 3, 3, 3)]


def test_an_output_behind_a_stride_is_the_smaller_one(computed):
    _, _, again = triple(lambda: nn.Sequential(*block(3, 4, size=1, stride=2), *block(4, 8, size=1)))
    step(again, image(height=32))
    assert computed == [(8, 4, 1, 1)]
    computed.clear()
    _, _, again = triple(lambda: nn.Sequential(*block(3, 4, size=1), *block(4, 8, size=1, stride=2)))
    step(again, image(height=32))
    assert computed == [(4, 3, 1, 1)]


def test_what_takes_much_arithmetic_is_kept(computed):
    wide, narrow = nn.Conv2d(257, 4, 1), nn.Conv2d(256, 4, 1)
    for conv, times in ((wide, 0), (narrow, 1), (nn.Conv2d(29, 4, 3), 0), (nn.Conv2d(58, 58, 7, groups=58), 1)):
        model = convext.swap(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()), recompute=True)
        computed.clear()
        model(torch.randn(2, conv.in_channels, 8, 8)).sum().backward()
        assert len(computed) == times
    computed.clear()
    model = convext.swap(nn.Sequential(copy.deepcopy(narrow), nn.BatchNorm2d(4), nn.ReLU()), recompute=True).bfloat16()
    model(torch.randn(2, 256, 8, 8, dtype=torch.bfloat16)).sum().backward()
    assert not computed  # an element has half the bytes


def test_nothing_is_computed_twice_along_a_row(computed):
    """Half the outputs are dropped, and each is computed once: by its reader, for both. None is left behind."""
    _, _, again = triple(pointwise)
    y = again(image())
    alive = []
    right = autograd._convolved_again

    def noted(*args):
        made = right(*args)
        alive.append(weakref.ref(made))
        return made

    autograd._convolved_again = noted
    try:
        for _ in range(2):
            computed.clear()
            y.sum().backward(retain_graph=True)
            assert len(computed) == 6
    finally:
        autograd._convolved_again = right
    gc.collect()
    assert len(alive) == 12 and not any(made() is not None for made in alive)


def test_two_readers_compute_it_once_for_both_and_the_layer(computed):
    from test_kept import TwoReaders

    step(triple(TwoReaders)[2], image())
    assert computed == [(6, 3, 3, 3)]


@needs_library
@pytest.mark.parametrize(
    ("name", "most"),
    [("resnet50", 0.50), ("mobilenet_v2", 0.40), ("efficientnet_b0", 0.45), ("convnext_tiny", 0.60)],
)
def test_saved_bytes_of_networks(name, most):
    models = pytest.importorskip("torchvision").models
    plain = getattr(models, name)().train()
    x = torch.randn(1, 3, 224, 224)
    before = saved_bytes(plain, x)
    assert saved_bytes(convext.swap(plain, recompute=True), x) <= most * before


# ---- weights and inputs that are written -----------------------------------------------------------------------------


@pytest.mark.parametrize("last_alone", [False, True])
def test_a_weight_that_was_written_raises_as_pytorchs(last_alone):
    """PyTorch needs the weight for the gradient of the input; the layer behind needs it for its own weight's, too."""
    plain, _, again = triple(chain)
    messages = []
    for model in (plain, again):
        loss = model(image()).square().sum()
        with torch.no_grad():
            model[6 if model is plain or not last_alone else 0].weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
            torch.autograd.grad(loss, [model[3].weight] if last_alone else list(model.parameters()))
        messages.append(str(raised.value).split(":")[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("how", ["fused optimizer", "data", "numpy", "bias"])
def test_a_weight_that_was_written_behind_torchs_back_raises(how):
    def make():
        model = chain()
        model[0].bias = nn.Parameter(torch.ones(6))
        return model

    _, _, again = triple(make, torch.float32)
    loss = again(image(torch.float32)).square().sum()
    loss.backward(retain_graph=True)
    if how == "fused optimizer":
        torch.optim.SGD(again.parameters(), lr=0.1, fused=True).step()
    elif how == "data":
        again[0].weight.data.mul_(2)
    elif how == "numpy":
        again[0].weight.detach().numpy()[0, 0, 0, 0] += 1
    else:
        again[0].bias.data[0] += 1
    with pytest.raises(RuntimeError, match=r"recompute=True: the weight or the bias of a convolution with weight \["):
        loss.backward()


def test_after_the_backward_pass_weights_may_be_written():
    _, swapped, again = triple(Inverted)
    for model in (swapped, again):
        for optimizer in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.AdamW(model.parameters(), fused=True)):
            step(model, image())
            optimizer.step()
    assert all(map(torch.equal, swapped.parameters(), again.parameters()))


def test_an_input_that_was_written_in_between_is_not_read_again():
    """The result of the first layer was computed before."""
    plain, _, again = triple(InputIsWritten)
    x = image().detach().contiguous(memory_format=torch.channels_last).requires_grad_()  # as it is kept
    found = []
    for model in (plain, again):
        loss = model(x).square().sum()
        found.append(torch.autograd.grad(loss, model.second.weight, retain_graph=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    same(found[1], found[0])


def test_a_weight_that_was_written_in_between_is_not_read_again():
    class WeightIsWritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Sequential(*block(3, 6, size=1)), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            y = self.first(x)
            self.first[0].weight.detach().mul_(2)
            return self.second(y)

    found = []
    for model in triple(WeightIsWritten):
        found.append(torch.autograd.grad(model(image()).square().sum(), model.second.weight))
    same(found[2], found[0])


@pytest.mark.parametrize("what", ["weight", "bias", "running_mean", "running_var"])
def test_who_writes_a_batch_norm_afterwards_does_not_change_the_layer_behind_it(what):
    found = []
    for model in triple(NETWORKS["frozen"]):
        loss = model(image()).square().sum()
        with torch.no_grad():
            getattr(model[1], what).add_(3.0)
        found.append(torch.autograd.grad(loss, model[3].weight, retain_graph=True))
    same(found[2], found[0])


# ---- whatever PyTorch does with a graph ------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["inverted", "residual_silu", "pools", "without_batch_norm"])
def test_saved_tensors_go_through_hooks(network):
    _, swapped, again = triple(RECOMPUTED[network])
    expected, seen = step(swapped, image()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.clone(), lambda t: t):
        same(step(again, image()), expected)
    assert seen


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("network", ["inverted", "residual_relu", "chain_silu"])
def test_in_a_checkpoint(network, use_reentrant):
    _, swapped, again = triple(RECOMPUTED[network])
    expected = step(swapped, image())
    x = image()
    y = checkpoint(again, x, use_reentrant=use_reentrant)
    (y.sin() * torch.arange(y.shape[-1])).sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in again.parameters())]
    same(found, expected[: len(found)])


@pytest.mark.parametrize("network", ["chain_silu", "chain_relu", "inverted", "frozen", "two_readers"])
def test_the_gradient_of_a_gradient_is_the_unswapped_models(network):
    found = []
    for model in triple(RECOMPUTED[network]):
        x = image()
        given = [x, *model.parameters()]
        first = torch.autograd.grad(model(x).square().sum(), given, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)])
    same(found[2], found[0])


def test_gradients_are_checked_to_the_second_order():
    _, _, again = triple(lambda: chain("silu"))
    x = image().detach()[:, :, :5, :4].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(again.eval(), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(again, (x,), fast_mode=True)


def test_a_graph_runs_more_than_once_and_in_parts():
    found = []
    for model in triple(chain):
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
    same(found[2], found[0])


def test_batched_gradients_are_the_unswapped_models():
    found = []
    for model in triple(chain):
        y = model(image())
        given = torch.arange(3 * y.numel(), dtype=torch.float64).cos().view(3, *y.shape)
        found.append(torch.autograd.grad(y, [*model.parameters()], given, is_grads_batched=True))
    same(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_of_the_forward_pass_decides(dtype, inside):
    _, swapped, again = triple(Inverted, torch.float32)
    found = []
    for model in (swapped, again):
        with torch.autocast("cpu", dtype):
            loss = model(image(torch.float32)).float().square().sum()
        with torch.autocast("cpu", dtype, enabled=inside):
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_autocast_of_the_backward_pass_alone_changes_no_output(computed):
    """What is computed again is so in the dtype that it was computed in."""
    _, _, again = triple(chain, torch.float32)
    loss, dtypes = again(image(torch.float32)).square().sum(), []
    right = autograd._convolved_again
    autograd._convolved_again = lambda *args: dtypes.append((y := right(*args)).dtype) or y
    try:
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    finally:
        autograd._convolved_again = right
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_it_changes_nothing(mode, training, computed):
    _, swapped, again = triple(Inverted)
    with mode():
        assert torch.equal(swapped.train(training)(image()), again.train(training)(image()))
    assert not computed


def test_a_graph_is_looked_through_for_anomalies():
    plain, _, again = triple(chain)
    with torch.autograd.set_detect_anomaly(True):
        same(step(again, image()), step(plain, image()))


def test_compiled_autograd_runs_the_backward_pass():
    from torch._dynamo import compiled_autograd

    plain, _, again = triple(Inverted)
    plain(image()).square().sum().backward()
    loss = again(image()).square().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    same([p.grad for p in again.parameters()], [p.grad for p in plain.parameters()])


# ---- who asks for it -------------------------------------------------------------------------------------------------


def test_copies_and_pickles_compute_again(computed):
    _, swapped, again = triple(chain)
    for twin in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        computed.clear()
        step(twin, image())
        assert len(computed) == 2
    computed.clear()
    step(copy.deepcopy(swapped), image())
    assert not computed


def test_a_second_swap_says_it_anew(computed):
    _, swapped, _ = triple(chain)
    for recompute, times in ((True, 2), (True, 2), (False, 0)):
        step(swapped, image())
        computed.clear()
        step(convext.swap(swapped, recompute=recompute), image())
        assert len(computed) == times
    with pytest.raises(TypeError, match="recompute: expected a bool, got 1"):
        convext.swap(swapped, recompute=1)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
def test_a_layer_that_computes_again(activation, unbatched, computed):
    torch.manual_seed(0)
    kept = convext.nn.ConvBNReLU(3, 6, 1, activation=activation).double()
    again = copy.deepcopy(kept)
    again.recompute = True
    assert "recompute=True" in repr(again) and "recompute" not in repr(kept)
    x = image().detach()[0] if unbatched else image().detach()
    residual = torch.randn(6, *x.shape[-2:], dtype=x.dtype) if unbatched else None
    found = []
    for layer in (kept, again):
        given = x.clone().requires_grad_()
        layer(given, residual).sin().sum().backward()
        found.append([given.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert all(map(torch.equal, *found))
    assert computed == [(6, 3, 1, 1)]
    x = image(height=32)
    assert 0 <= saved_bytes(kept, x) - saved_bytes(again, x) - PIXELS * 6 < VECTORS
    assert convext.nn.ConvBNReLU(3, 6, 1, recompute=True).recompute


def test_a_layer_pickled_before_there_was_recompute_keeps():
    layer = convext.nn.ConvBNReLU(3, 6, 1)
    del layer.__dict__["recompute"]
    layer(image(torch.float32)).sum().backward()


def test_layers_in_a_row_each_compute_again(computed):
    """Each result is an ordinary tensor that the next layer keeps."""
    torch.manual_seed(0)
    layers = [convext.nn.ConvBNReLU(c, 6, 1, recompute=True) for c in (3, 6, 6)]
    again = nn.Sequential(*layers).double()
    kept = copy.deepcopy(again)
    for layer in kept:
        layer.recompute = False
    assert all(map(torch.equal, step(again, image()), step(kept, image())))
    assert len(computed) == 3


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_conv_act_computes_again_what_the_activation_saw(activation, computed):
    w, bias = torch.randn(6, 3, 1, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        given = [image(), w.clone().requires_grad_(), bias.clone().requires_grad_()]
        convext.conv_act(*given, activation=activation, recompute=recompute).sin().sum().backward()
        found.append([t.grad for t in given])
    assert all(map(torch.equal, *found))
    assert len(computed) == (activation != "relu")


def test_what_a_batch_norm_kept_twice_it_keeps_once():
    """A copy of its bias, which its own gradient and the layer behind it both read."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t
        return t

    _, swapped = pair(lambda: nn.Sequential(*block(3, 6), nn.Conv2d(6, 4, 3)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = swapped(image())
    bias = swapped[1].bias
    own = bias.untyped_storage().data_ptr()
    copies = [t for t in seen.values() if t.untyped_storage().data_ptr() != own and torch.equal(t, bias.detach())]
    assert len(copies) == 1
    y.sum().backward()


def test_compiled_calls_ignore_it():
    model = nn.Sequential(*block(3, 6, size=1))
    again = convext.swap(copy.deepcopy(model), recompute=True)
    compiled = torch.compile(again, backend="aot_eager")
    for a, b in zip(step(compiled, image(torch.float32)), step(model, image(torch.float32)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
