"""nn.Conv1d, Conv3d and the transposed ones in a swap: exchanged by themselves, as nn.Conv2d is, in any container."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convext
from convext.swap.calls import is_swapped
from convext.swap.capture.standard import is_standard
from convext.swap.conv_forward import own_method


class Wave(nn.Module):
    """Dilated convolutions over rows, with sums around them."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv1d(3, channels, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(channels, channels, 3, padding=d, dilation=d), nn.BatchNorm1d(channels), nn.ReLU(True)
            )
            for d in (1, 2, 4)
        )
        self.depthwise = nn.Conv1d(channels, channels, 4, groups=channels, padding="same", padding_mode="circular")

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.depthwise(x)


class Mixed(nn.Module):
    """Images, and rows that are made of them: a plan computes the former, and calls the layers of the latter."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.row = nn.Conv1d(8, 8, 3, padding=1)
        self.back = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        rows = torch.relu(self.row(x.mean(2)))
        return self.back(x + rows.unsqueeze(2))


class Vocoder(nn.Module):
    """Rows, made longer."""

    def __init__(self):
        super().__init__()
        self.row = nn.Conv1d(4, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.out = nn.Conv1d(6, 2, 3, padding="same", padding_mode="reflect")

    def forward(self, x):
        return torch.tanh(self.out(F.leaky_relu(self.up(F.leaky_relu(self.row(x), 0.1)), 0.1)))


class UNet(nn.Module):
    """Images: down, up again to the size of before, and on with what was there."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.row = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        skip = self.down(x)
        return self.out(torch.cat((skip, self.row(self.inner(skip), output_size=skip.shape[2:])), 1))


class Volumes(nn.Module):
    """A 3-D U-Net of one step."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.row = nn.Conv3d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.depthwise = nn.Conv3d(16, 16, 3, padding=1, groups=16, padding_mode="circular")

    def forward(self, x):
        x = self.down(x)
        return self.depthwise(torch.cat((x, self.up(torch.relu(self.row(x)))), 1))


MODELS = {
    "rows": (Wave, (2, 3, 40)),
    "rows_and_images": (Mixed, (2, 3, 8, 9)),
    "longer_rows": (Vocoder, (2, 4, 20)),
    "images_made_larger": (UNet, (2, 3, 8, 12)),
    "volumes": (Volumes, (2, 2, 4, 6, 8)),
}


def made(name, dtype=torch.float64):
    maker, shape = MODELS[name]
    torch.manual_seed(0)
    return maker().to(dtype), torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(5))


def rows(model):
    """Every layer that is no 2-D convolution's."""
    kinds = nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    return [m for m in model.modules() if isinstance(m, kinds)]


def exchanged(layer):
    return own_method(layer)[1]


def outcome(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), (x, *model.parameters())), list(model.buffers())


def same(ours, theirs, x):
    torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_model_is_the_same_and_reverts(name, training, count_native):
    plain, x = made(name)
    plain.train(training)
    model = copy.deepcopy(plain)
    kinds, keys = [*map(type, model.modules())], list(model.state_dict())
    assert convext.swap(model) is model and all(is_swapped(m) and is_standard(m) for m in rows(model))
    assert [*map(type, model.modules())] == kinds and list(model.state_dict()) == keys
    with convext.backend("native"):
        for _ in range(3):
            same(model, plain, x)
    assert {pass_ for pass_, _ in count_native()} >= {"fprop", "wgrad"}
    convext.swap(model)
    forwards = [exchanged(m) for m in rows(model)]
    assert None not in forwards
    convext.swap(model)
    assert all(exchanged(m) is forward for m, forward in zip(rows(model), forwards))
    convext.revert(model)
    assert not any("_conv_forward" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())
    same(model, plain, x)


LAYERS = {
    nn.Conv3d: (convext.nn.Conv3d, F.conv3d, 3, "3 -> 4, 3x3x3"),
    nn.ConvTranspose1d: (convext.nn.ConvTranspose1d, F.conv_transpose1d, 1, "3 -> 4, 3"),
    nn.ConvTranspose2d: (convext.nn.ConvTranspose2d, F.conv_transpose2d, 2, "3 -> 4, 3x3"),
    nn.ConvTranspose3d: (convext.nn.ConvTranspose3d, F.conv_transpose3d, 3, "3 -> 4, 3x3x3"),
}


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_a_layer_of_another_kind_alone_and_one_of_convexts(kind, tmp_path):
    ours, function, axes, text = LAYERS[kind]
    x = torch.randn(2, 3, *(5,) * axes)
    for layer in (convext.swap(kind(3, 4, 3)), convext.swap(ours(3, 4, 3))):
        expected = function(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        (row,) = convext.report(layer)
        assert row.became == "convext" and row.layer == text and row.variant
        torch.save(layer, tmp_path / "layer.pt")
        with torch.serialization.safe_globals([kind]):
            again = torch.load(tmp_path / "layer.pt", weights_only=True)
        assert is_swapped(again) and torch.equal(again(x), layer(x))
        assert type(convext.revert(layer)) is kind and not is_swapped(layer) and exchanged(layer) is None


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "Transpose" in kind.__name__], ids=lambda k: k.__name__)
def test_a_transposed_layer_takes_the_size_of_its_result_and_raises_as_torchs(kind):
    axes = LAYERS[kind][2]
    plain = kind(3, 4, 3, stride=2, padding=1)
    layer, x = convext.swap(copy.deepcopy(plain)), torch.randn(2, 3, *(5,) * axes)
    for size in ([9] * axes, [10] * axes, [2, 4, *(10,) * axes]):
        torch.testing.assert_close(layer(x, output_size=size), plain(x, size), rtol=1e-5, atol=1e-5)
    for wrong in ((x, [8] * axes), (x, [9] * 6), (torch.randn(2, 4, *(5,) * axes),), ([1.0],), (x, None, 1), ()):
        with pytest.raises(Exception) as theirs:
            plain(*wrong)
        with pytest.raises(type(theirs.value)) as found:
            layer(*wrong)
        assert type(found.value) is type(theirs.value)
    plain.padding_mode = layer.padding_mode = "circular"
    for m in (plain, layer):
        with pytest.raises(ValueError, match="Only `zeros` padding mode is supported"):
            m(x)


def test_a_layer_alone_and_one_of_convexts():
    x = torch.randn(2, 3, 9)
    for layer in (convext.swap(nn.Conv1d(3, 4, 3)), convext.swap(convext.nn.Conv1d(3, 4, 3))):
        expected = F.conv1d(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        (row,) = convext.report(layer)
        assert row.became == "convext" and row.layer == "3 -> 4, 3"
        assert type(convext.revert(layer)) is nn.Conv1d and not is_swapped(layer)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name):
    plain, x = made(name)
    model = convext.swap(copy.deepcopy(plain))
    model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(exchanged(m).is_of(m) for m in rows(again))
        with torch.no_grad():
            rows(again)[0].weight.mul_(2)
        other = convext.revert(copy.deepcopy(again))
        same(again, other, x)
    plain(x)
    same(model, plain, x)
    shallow = copy.copy(rows(model)[0])
    with pytest.raises(RuntimeError, match=f"{type(shallow).__name__} is a shallow copy"):
        shallow(torch.randn(1, shallow.in_channels, *(9,) * len(shallow.kernel_size), dtype=torch.float64))


def listen(model, heard):
    for m in rows(model):
        m.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        m.register_forward_hook(lambda m, args, y: heard.append(args[0].shape) or y + 1)
        m.register_full_backward_hook(lambda m, dx, dy: heard.append("backward"))


@pytest.mark.parametrize("name", MODELS)
def test_hooks_are_heard(name):
    plain, x = made(name)
    model = convext.swap(copy.deepcopy(plain))
    model(x)
    plain(x)
    heard = [], []
    for m, h in zip((model, plain), heard):
        listen(m, h)
    same(model, plain, x)
    assert heard[0] == heard[1] and len(heard[0]) >= 3


CHANGES = {
    "dilation": lambda m: [setattr(m, name, (3,) * len(m.kernel_size)) for name in ("padding", "dilation")],
    "weight": lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)),
    "weight_data": lambda m: m.weight.data.add_(1),
    "no_bias": lambda m: setattr(m, "bias", None),
    "padding_mode": lambda m: setattr(m, "padding_mode", "replicate"),
    "own_conv_forward": lambda m: setattr(
        m, "_conv_forward", lambda x, w, b: (F.conv1d if x.dim() == 3 else F.conv3d)(x, w * 3, b, m.stride, 1)
    ),
    "own_forward": lambda m: setattr(m, "forward", lambda *args, **kwargs: type(m).forward(m, *args, **kwargs) * 2),
}
_OF_CONVOLUTIONS = "dilation", "padding_mode", "own_conv_forward"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_changes_after_the_swap_count(name, change):
    plain, x = made(name)
    plain.eval()
    model = convext.swap(copy.deepcopy(plain))
    before = model(x)
    for m in (model, plain):
        layer = m.layers[0][0] if name == "rows" else m.row
        if isinstance(layer, nn.modules.conv._ConvTransposeNd) and change in _OF_CONVOLUTIONS:
            pytest.skip("such layers have no such thing")
        CHANGES[change](layer)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(model(x), before), "the change must matter"


def test_a_replaced_method_or_function_of_other_layers_is_called(monkeypatch):
    for name, kind, function, method in (
        ("volumes", nn.Conv3d, "conv3d", "_conv_forward"),
        ("volumes", nn.ConvTranspose3d, "conv_transpose3d", "forward"),
        ("images_made_larger", nn.ConvTranspose2d, "conv_transpose2d", "forward"),
        ("longer_rows", nn.ConvTranspose1d, "conv_transpose1d", "forward"),
    ):
        plain, x = made(name)
        plain.eval()
        model = convext.swap(copy.deepcopy(plain))
        before = model(x)
        for place, attribute in ((F, function), (kind, method)):
            original = getattr(place, attribute)
            with monkeypatch.context() as patch:
                patch.setattr(place, attribute, lambda *args, f=original, **kwargs: f(*args, **kwargs) * 3)
                torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
                assert not torch.allclose(model(x), before), "the change must matter"
            torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_a_replaced_method_or_function_is_called(monkeypatch):
    plain, x = made("rows_and_images")
    plain.eval()
    model = convext.swap(copy.deepcopy(plain))
    model(x)
    original = F.conv1d
    for place, name, other in (
        (F, "conv1d", lambda x, *others: original(x, *others) * 3),
        (nn.Conv1d, "_conv_forward", lambda self, x, w, b: original(x, w, b, padding=1) * 5),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


def test_what_is_no_plain_layer_is_left_alone_with_a_reason():
    class Own(nn.Conv1d):
        pass

    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), nn.LazyConv1d(4, 3), Own(4, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 2)), nn.LazyConvTranspose1d(4, 2),
        nn.Conv1d(4, 4, 1),
    )  # fmt: skip
    report = convext.report(convext.swap(model))
    reasons = [row.reason for row in report]
    assert "parametrized" in reasons[0] and "lazy" in reasons[1] and "subclass of torch.nn.Conv1d" in reasons[2]
    assert "parametrized" in reasons[3] and "lazy" in reasons[4]
    assert [is_swapped(m) for m in model] == [False] * 5 + [True]
    model(torch.randn(2, 3, 9))
    convext.swap(model)
    assert is_swapped(model[1]) and is_swapped(model[4])


def test_the_report_names_the_kernel():
    model, x = made("rows", torch.float32)
    convext.swap(model)
    with torch.no_grad(), convext.backend("native"):
        model(x)
        report = convext.report(model)
    assert report["layers.2.0"].variant.startswith("fprop_") and report["layers.2.0"].backend == "native"
    assert report["layers.2.0"].layer == "8 -> 8, 3, padding 4, dilation 4"
    assert report["stem"].reason.startswith("no batch norm or elementwise operation behind it")


def test_the_report_names_the_kernel_of_a_transposed_layer_and_revert_makes_it_torchs():
    up, wide = convext.nn.ConvTranspose1d(16, 8, 4, 2, 1), convext.nn.ConvTranspose2d(16, 3, 2, 2)
    model = nn.ModuleList([up, wide])
    with torch.no_grad(), convext.backend("native"):
        up(torch.randn(2, 16, 50)), wide(torch.randn(2, 16, 7, 7))
        variants = [row.variant for row in convext.report(model)]
        assert all(variant.startswith("dgrad_") for variant in variants)
    assert all(is_swapped(layer) for layer in model)
    wide(torch.randn(2, 16, 7, 7).contiguous(memory_format=torch.channels_last))
    row = convext.report(model)["1"]
    assert row.backend == "aten" and "lanes of a vector empty" in row.reason
    assert [*map(type, convext.revert(model))] == [nn.ConvTranspose1d, nn.ConvTranspose2d]


@pytest.mark.parametrize("name", MODELS)
def test_verify_agrees(name):
    model, x = made(name, torch.float32)
    assert convext.verify(convext.swap(model), x).ok


@pytest.mark.parametrize("name", MODELS)
def test_autocast_follows_the_context(name):
    plain, x = made(name, torch.float32)
    model = convext.swap(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_and_exports(name):
    torch._dynamo.reset()
    plain, x = made(name)
    plain.eval()
    model = convext.swap(copy.deepcopy(plain))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(compiled, plain, x)
    program = torch.export.export(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    kept = {"volumes": ("conv3d", "conv_transpose3d"), "images_made_larger": ("conv_transpose2d",)}
    for operator in kept.get(name, ("conv1d",)):
        assert any(f"aten.{operator}." in target for target in targets)
    assert not any("convext" in target for target in targets)


@pytest.mark.parametrize("name", MODELS)
def test_transforms_of_a_swapped_model(name):
    plain, x = made(name)
    plain.eval()
    model = convext.swap(copy.deepcopy(plain))
    found = []
    for m in (model, plain):
        parameters = dict(m.named_parameters())

        def loss(parameters, x, m=m):
            return torch.func.functional_call(m, parameters, (x[None],)).square().sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
