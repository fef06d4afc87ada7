"""The layers against those of torch.nn, in eager mode, compiled, exported and traced."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convext
from convext.activation import FORWARD
from convext.problem import ACTIVATIONS


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# ---- Conv2d ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"], ids=str)
def test_every_padding_mode(padding_mode, padding):
    theirs = nn.Conv2d(4, 6, (3, 2), padding=padding, groups=2, padding_mode=padding_mode).double()
    ours = copy.deepcopy(theirs)
    ours.__class__ = convext.nn.Conv2d
    x = rand(2, 4, 6, 7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")
        close(ours(x), theirs(x))
        close(ours(x[0]), theirs(x[0]))


def test_class_reassignment_is_all_there_is_to_it():
    layer = nn.Conv2d(3, 4, 3)
    state, weight, attributes = layer.state_dict(), layer.weight, set(vars(layer))
    layer.__class__ = convext.nn.Conv2d
    assert isinstance(layer, nn.Conv2d) and layer.weight is weight and set(vars(layer)) == attributes
    assert list(layer.state_dict()) == list(state) == list(convext.nn.Conv2d(3, 4, 3).state_dict())
    assert repr(layer) == repr(nn.Conv2d(3, 4, 3))
    layer.__class__ = nn.Conv2d
    assert layer(torch.ones(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_layers_pickle_and_copy():
    x = rand(2, 4, 6, 6, dtype=torch.float32)
    for layer in (
        convext.nn.Conv2d(4, 4, 3),
        convext.nn.DepthwiseConv2d(4, 3, 2),
        convext.nn.DilatedConv2d(4, 2, 2),
        convext.nn.ConvBNReLU(4, 4, 3, momentum=None, activation="gelu").eval(),
    ):
        for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert type(again) is type(layer) and torch.equal(again(x), layer(x))


@pytest.mark.parametrize("fresh_process", [False, True])
def test_whole_layers_load_with_weights_only(fresh_process, tmp_path):
    """The user allows torch's classes, convext its own."""
    x, path = rand(2, 4, 6, 6, dtype=torch.float32), tmp_path / "model.pt"
    model = nn.Sequential(
        convext.nn.Conv2d(4, 4, 3),
        convext.nn.DepthwiseConv2d(4, 3, 2, padding_mode="reflect"),
        convext.nn.DilatedConv2d(8, 4, 1),
        convext.nn.ConvBNReLU(4, 4, 1, activation="gelu"),
    ).eval()
    torch.save(model, path)
    allowed = [nn.Sequential, nn.BatchNorm2d]
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global|GLOBAL torch.nn.modules"):
        torch.load(path, weights_only=True)
    if not fresh_process:
        with torch.serialization.safe_globals(allowed):
            again = torch.load(path, weights_only=True)
        assert [*map(type, again.modules())] == [*map(type, model.modules())]
        assert torch.equal(again(x), model(x))
        assert torch.serialization.get_safe_globals().count(convext.nn.ConvBNReLU) == 1
        return
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    code = f"""
import torch, convext
x, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
with torch.serialization.safe_globals([torch.nn.Sequential, torch.nn.BatchNorm2d]):
    model = torch.load({str(path)!r}, weights_only=True)
torch.testing.assert_close(model(x), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_depthwise_layer():
    layer = convext.nn.DepthwiseConv2d(4, 3, multiplier=2, stride=2, padding=1).double()
    assert (layer.groups, layer.out_channels, layer.weight.shape) == (4, 8, (8, 1, 3, 3))
    x = rand(2, 4, 6, 6)
    close(layer(x), F.conv2d(x, layer.weight, layer.bias, 2, 1, 1, 4))


def test_dilated_layer():
    layer = convext.nn.DilatedConv2d(4, 3, 3).double()
    x = rand(2, 4, 6, 6)
    close(layer(x), F.conv2d(x, layer.weight, layer.bias, dilation=2))
    assert convext.nn.DilatedConv2d(4, 3, 3, dilation=(3, 1)).dilation == (3, 1)


def test_weight_changed_in_place_between_calls():
    layer, x = convext.nn.Conv2d(4, 6, 3).double(), rand(1, 4, 6, 6)
    for change in (lambda w: w.mul_(2), lambda w: w.copy_(rand(6, 4, 3, 3)), lambda w: w[0].zero_()):
        with torch.no_grad():
            layer(x)
            change(layer.weight)
            close(layer(x), F.conv2d(x, layer.weight, layer.bias))
            layer.weight.data.add_(1)  # which no version counter sees
            close(layer(x), F.conv2d(x, layer.weight, layer.bias))


# ---- ConvBNReLU ------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """What ConvBNReLU stands for, out of torch.nn."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.bn = copy.deepcopy(layer.conv), copy.deepcopy(layer.bn)
        self.conv.__class__ = nn.Conv2d
        self.activation = layer.activation

    def forward(self, x, residual=None):
        y = self.bn(self.conv(x))
        return FORWARD[self.activation](y if residual is None else y + residual)


def assert_same(ours, theirs, x, residual=None):
    """Outputs, gradients and buffers over three calls."""
    for _ in range(3):
        a, b = (t.clone().requires_grad_() for t in (x, x))
        out, expected = ours(a, residual), theirs(b, residual)
        close(out, expected)
        wanted = [p for p in ours.parameters() if p.requires_grad]
        wanted_theirs = [p for p in theirs.parameters() if p.requires_grad]
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        close(torch.autograd.grad(out, (a, *wanted), dout), torch.autograd.grad(expected, (b, *wanted_theirs), dout))
        close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(momentum=None),
        dict(affine=False),
        dict(track_running_stats=False),
        dict(bias=True, eps=1e-2),
        dict(affine=False, track_running_stats=False, activation="silu"),
        dict(stride=2, groups=2, dilation=2, padding=2),
    ],
    ids=str,
)
def test_conv_bn_relu_is_its_parts(arguments, training):
    ours = convext.nn.ConvBNReLU(4, 6, 3, **arguments).double().train(training)
    theirs = Parts(ours).train(training)
    assert_same(ours, theirs, rand(2, 4, 7, 7))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_bn_relu_with_a_residual(activation):
    ours = convext.nn.ConvBNReLU(4, 6, 3, padding=1, activation=activation).double()
    assert_same(ours, Parts(ours), rand(2, 4, 5, 5), rand(2, 6, 5, 5))


def test_frozen_batch_norm_in_a_training_model():
    ours = convext.nn.ConvBNReLU(4, 6, 3).double()
    ours.bn.eval()
    for p in ours.bn.parameters():
        p.requires_grad_(False)
    before = ours.bn.running_mean.clone()
    assert_same(ours, Parts(ours), rand(2, 4, 5, 5))
    assert torch.equal(ours.bn.running_mean, before) and ours.bn.num_batches_tracked == 0


def test_one_value_per_channel_raises_and_counts_nothing():
    layer = convext.nn.ConvBNReLU(4, 6, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1, 4, 3, 3))
    close(layer.state_dict(), before)


def test_state_dict_reads_like_two_layers():
    keys = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert list(convext.nn.ConvBNReLU(4, 6, 3).state_dict()) == keys
    assert "activation='relu'" in repr(convext.nn.ConvBNReLU(4, 6, 3))
    with pytest.raises(ValueError, match="activation"):
        convext.nn.ConvBNReLU(4, 6, 3, activation="tanh")


def test_half_and_channels_last():
    layer = convext.nn.ConvBNReLU(4, 8, 3).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    out = layer(torch.ones(2, 4, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last))
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)


# ---- compiled, exported, traced --------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = convext.nn.Conv2d(4, 8, 3, padding="same")
        self.reflect = convext.nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")
        self.block = convext.nn.ConvBNReLU(8, 8, 3, padding=1, activation="silu")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.reflect(self.stem(x).relu())
        return self.head(self.block(x, x).mean((2, 3)))


def run(network, x):
    out = network(x)
    gradients = torch.autograd.grad(out.sin().sum(), list(network.parameters()))
    return out.detach(), gradients, [b.clone() for b in network.buffers()]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(backend, training):
    check_compiled(backend, training)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor():
    check_compiled("inductor", training=True)


def check_compiled(backend, training):
    torch._dynamo.reset()
    network = Network().double().train(training)
    compiled = torch.compile(copy.deepcopy(network), backend=backend, fullgraph=True)
    x = rand(2, 4, 6, 6)
    close(run(compiled, x), run(network, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_for_any_size_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    network = Network().double().eval()
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for n in (3, 4, 5):
        x = rand(n, 4, 6 + n, 7 + n)
        close(compiled(x), network(x))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_under_autocast():
    torch._dynamo.reset()
    network = Network()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(torch.ones(2, 4, 6, 6)).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exports_as_one_operator_a_layer(strict):
    network, x = Network().double().eval(), rand(2, 4, 6, 6)
    program = torch.export.export(network, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if "convext" in str(node.target)]
    assert targets == ["convext.fprop.default", "convext.fprop.default", "convext.conv_bn_act.default"]
    close(program.module()(x), network(x))
    close(program.run_decompositions().module()(x), network(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_trace_runs_on_pytorchs_operators():
    network, x = Network().double().eval(), rand(2, 4, 6, 6)
    expected = network(x)  # warm: the short way must not end up in the trace
    traced = torch.jit.trace(network, x)
    assert "convext::" not in str(traced.inlined_graph)
    close(traced(x), expected)


def test_flops_of_a_training_step():
    layer = convext.nn.Conv2d(4, 6, 3, groups=2, bias=False)
    x = torch.ones(2, 4, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 6 * 6) * 6 * (3 * 3 * 2)


def test_activation_checkpointing():
    network, x = Network().double(), rand(2, 4, 6, 6).requires_grad_()
    torch.manual_seed(0)
    expected = torch.autograd.grad(copy.deepcopy(network)(x).sum(), x)
    for reentrant in (False, True):
        out = torch.utils.checkpoint.checkpoint(copy.deepcopy(network), x, use_reentrant=reentrant)
        x.grad = None
        out.sum().backward()  # the reentrant form knows no autograd.grad
        close((x.grad,), expected)


def test_inference_mode():
    network, x = Network().double().eval(), rand(2, 4, 6, 6)
    expected = network(x).detach()
    with torch.inference_mode():
        close(network(x.clone()), expected)


# ---- operators -------------------------------------------------------------------------------------------------------

X, W, B = torch.ones(2, 4, 5, 6), torch.ones(6, 2, 3, 3), torch.ones(6)
GEOM = ((2, 1), (1, 1), (1, 1), 2)
Y = torch.ones(2, 6, 3, 6)
P = torch.ones(6)
OPS = torch.ops.convext
OPERATORS = {
    "fprop": (X, W, B, *GEOM),
    "dgrad": (Y, W, (5, 6), *GEOM),
    "wgrad": (Y, X, (3, 3), *GEOM),
    "conv_bn_act": (X, W, B, P, P, P, P, Y, 1e-5, "relu", *GEOM),
    "conv_bn_act_train": (X, W, B, None, None, P, P, Y, 1e-5, "relu", *GEOM),
    "batch_stats": (Y,),
    "bn_act": (Y, P, P, P, P, Y, 1e-5, "relu"),
    "bn_act_backward": (Y, Y, P, P, P, P, Y, 1e-5, "relu", True),
}


@pytest.mark.parametrize("channels_last", [(), (0,), (1,), (0, 1)], ids=["nchw", "first", "second", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_kernels_know_shapes_dtypes_and_strides(name, dtype, channels_last):
    tensors = iter(range(9))
    arguments = [
        a.to(
            dtype,
            memory_format=torch.channels_last
            if a.dim() == 4 and next(tensors) in channels_last
            else torch.contiguous_format,
        )
        if isinstance(a, torch.Tensor)
        else a
        for a in OPERATORS[name]
    ]
    if "bn" in name or name == "batch_stats":
        arguments = [
            a.float() if isinstance(a, torch.Tensor) and a.dim() == 1 and i > 2 else a for i, a in enumerate(arguments)
        ]
    op = getattr(OPS, name)
    real = op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    real, fake = ((t,) if isinstance(t, torch.Tensor) else t for t in (real, fake))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def test_every_operator_is_listed():
    assert set(OPERATORS) == set(convext.ops.NAMES)
