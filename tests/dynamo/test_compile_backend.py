"""torch.compile(model, backend="convext"): what it fuses, that it means what eager does, and what it leaves alone.

In float64 the networks' sums of at most a few hundred products round to about 1e-14; a mistake is far above 1e-9.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rewritten import PLANNED, compiled
from swap_models import TUTORIAL, Inverted, LeNet, NextBlock, NextNet
from torch import nn
from torch.utils._pytree import tree_leaves
from twins import agree, made, outcomes

import convext
from convext.dynamo import planned, registry

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = Path(convext.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _alone():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def image(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(found, expected):
    """Values and strides, but those of extents of one, which address nothing."""
    agree(found, expected)
    strides = [
        [[s for s, n in zip(t.stride(), t.shape) if n > 1] for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
        for values in (found, expected)
    ]
    assert strides[0] == strides[1]


def train(model, x, call):
    """Result, gradients and buffers of a step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = call(x)
    leaves = [t for t in tree_leaves(y) if isinstance(t, torch.Tensor) and t.requires_grad]
    sum((t * t).sum() for t in leaves).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y, x.grad, gradients, {name: b.clone() for name, b in model.named_buffers()}


FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def as_format(x, channels_last):
    return x.to(memory_format=torch.channels_last) if channels_last else x


@FORMATS
@pytest.mark.parametrize("name", TUTORIAL)
def test_it_means_what_eager_does(name, channels_last):
    """In evaluation and in training, strides, gradients and running statistics among it."""
    make, size, _ = TUTORIAL[name]
    if channels_last and make is LeNet:
        pytest.skip("its view of a channels-last image raises in eager, too")
    model = made(make)
    fast, backend = compiled(model)
    x = as_format(image(2, 3, size, size), channels_last)
    with torch.no_grad():
        same(fast(x), model(x))
        assert backend.texts
    model.train()
    twin = copy.deepcopy(model)
    agree(train(model, x, fast), train(twin, x, twin))


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (Inverted, torch.float32),
        (lambda: Inverted(nn.Sigmoid), torch.float32),
        (NextBlock, torch.float32),
        (NextNet, torch.float64),
    ],
    ids=["hardsigmoid", "sigmoid", "layer_norm", "head_float64"],
)
def test_a_network_of_one_row_is_one_call(make, dtype):
    """And that one of the compiled library, as in the swapped model: nothing is left for another compiler."""
    model = made(make).to(dtype)
    x = image(2, 3, 32, 32, dtype=dtype)
    expected = copy.deepcopy(model).double()(x.double()).detach()
    fast, backend = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            y = fast(x)
        assert backend.graphs == [["planned.default"]]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fast(x)
    # Sums of at most 256 products in a dozen layers.
    limit = 1e-9 if dtype is torch.float64 else 12 * 8 * torch.finfo(dtype).eps * 16
    assert (y.double() - expected).abs().max() <= limit * expected.abs().max()
    names = [event.key for event in profile.key_averages()]
    assert "convext_cpu::run_sequence" in names and not any(name.startswith("aten::conv") for name in names), names


def test_a_batch_of_any_size_is_one_graph():
    """In evaluation, where the whole graph is one call, and in training."""
    model = made(Inverted)
    model.head[0].p = 0.0  # dropout is another each time
    for training, dynamic in ((False, True), (False, None), (True, None)):
        model.train(training)
        twin, (fast, backend) = copy.deepcopy(model), compiled(model, dynamic=dynamic, fullgraph=True)
        with torch.set_grad_enabled(training):
            for n in (2, 3, 5, 8):
                x = image(n, 3, 32, 32, seed=n)
                agree(train(model, x, fast), train(twin, x, twin)) if training else agree(fast(x), twin(x))
        assert len(backend.graphs) == (1 if dynamic else 2)  # the first batch, and any other
    x = image(4, 3, 32, 32)
    torch._dynamo.mark_dynamic(x, 0)
    fast, backend = compiled(model.eval(), fullgraph=True)
    with torch.no_grad():
        agree([fast(x), fast(image(7, 3, 32, 32))], [model(x), model(image(7, 3, 32, 32))])
    assert len(backend.graphs) == 1


def test_images_of_any_size_are_one_graph():
    model = made(TUTORIAL["basic_block"][0])
    fast, backend = compiled(model, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for size in (12, 17, 24):
            x = image(2, 3, size, size + 1)
            same(fast(x), model(x))
    assert len(backend.graphs) == 1 and backend.texts


# ---- what changes between calls --------------------------------------------------------------------------------------


def test_weights_are_read_at_each_call():
    """Written, replaced, loaded, of another model: none is kept from the compilation or from the call before."""

    def steps(model):
        yield model(x)
        with torch.no_grad():
            inner.stem[0].weight.mul_(2), inner.stem[1].running_mean.add_(1), inner.expand[1].bias.sub_(1)
        yield model(x)
        inner.project[0].weight.data = inner.project[0].weight.data.flip(0).clone()
        yield model(x)
        inner.depthwise[0].weight = nn.Parameter(image(24, 1, 3, 3))
        inner.stem[1].running_var = inner.stem[1].running_var * 3
        yield model(x)
        inner.load_state_dict(made(Inverted).state_dict())
        yield model(x)
        inner.excite.bias = None
        yield model(x)

    x = image(2, 3, 32, 32)
    with torch.no_grad():
        inner = made(Inverted)
        expected = outcomes(inner, steps)
        inner = made(Inverted)
        fast, backend = compiled(inner)
        agree(outcomes(fast, steps), expected)
        assert len({y.sum().item() for y in expected}) == len(expected) - 1  # the first weights were loaded again
        assert len(backend.graphs) == 2  # without a bias it is another graph


def test_models_of_one_class_share_a_graph_and_nothing_else():
    x = image(2, 3, 32, 32)
    models = [made(Inverted) for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            model.stem[0].weight.mul_(number + 1)
    torch._dynamo.reset()
    _, backend = compiled(models[0])
    fast = [torch.compile(model, backend=backend) for model in models]
    with torch.no_grad():
        for _ in range(3):
            for one, model in zip(fast, models):
                agree(one(x), model(x))
    assert len(set(backend.texts)) == 1


def test_threads_have_plans_of_their_own():
    x = image(2, 3, 32, 32)
    model, found = made(Inverted), []
    with torch.no_grad():
        fast, _ = compiled(model)
        expected = fast(x)

        def call():
            with torch.no_grad():
                found.extend(fast(x) for _ in range(5))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 15 and all(torch.equal(y, expected) for y in found)


def test_compiled_code_keeps_no_weights():
    model = made(Inverted)
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    fast, backend = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            fast(image(2, 3, 32, 32))
    (text,) = backend.texts
    assert planned._texts.get(text).lent.tensors == ()
    del model, fast, backend
    gc.collect()
    assert [ref() for ref in storages] == [None] * len(storages)


def test_the_present_backend_and_settings_serve():
    model, x = made(NextBlock), image(2, 3, 32, 32)
    with torch.no_grad():
        fast, _ = compiled(model)
        expected = fast(x)

        def events(call):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                agree(call(), expected)
            return {event.key for event in profile.key_averages()}

        fast(x)
        assert "convext_cpu::run_sequence" in events(lambda: fast(x))
        with convext.backend("aten"):
            assert not {"convext_cpu::run_sequence", "convext_cpu::fprop"} & events(lambda: fast(x))
        with convext.layer_by_layer():
            assert "convext_cpu::run_sequence" not in events(lambda: fast(x))


# ---- what is left alone ----------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two convolutions, a batch norm, and a forward that a test gives."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def inside_is_returned(self, x):
    y = self.conv(x)
    z = self.bn(y)
    return y, z, F.relu(z)


def inside_is_written_through_a_view(self, x):
    y = self.conv(x)
    y.view(-1)[::2].mul_(-1)
    return F.relu(self.bn(y))


def input_is_written_behind(self, x):
    x = x * 1
    y = self.conv(x)
    x.add_(1)
    return F.relu(self.bn(y)) + x


def residual_is_written_before_the_sum(self, x):
    x = x * 1
    y = self.bn(self.conv(x))
    x.mul_(3)
    return F.relu(y + x)


def weight_is_written_between(self, x):
    y = self.conv(x)
    with torch.no_grad():
        self.bn.weight.mul_(2)
        self.bn.running_mean.add_(0.5)
    return F.relu(self.bn(y))


def sum_in_place(self, x):
    y = self.other(x)
    z = self.bn(self.conv(x))
    z += y
    return F.relu_(z), y


def sum_into_the_residual(self, x):
    y = self.other(x)
    y += self.bn(self.conv(x))
    return y, F.relu(y)


def twice_the_same(self, x):
    y = self.conv(x)
    return F.relu(y + y), F.relu(self.bn(self.conv(x)))


def strides_are_read(self, x):
    y = F.relu(self.bn(self.conv(x)))
    return y.as_strided((2, 4), (1, 2)), self.other(y).stride(), torch.empty_like(self.other(y)).stride()


def flattened(self, x):
    y = F.relu(self.bn(self.conv(x)))
    z = self.other(y.view(y.shape[0], 3, -1)[..., :36].reshape(-1, 3, 6, 6))
    return z.view(-1), F.pixel_shuffle(torch.cat([y, y, y, y], 1), 2)


def made_another_shape_in_place(self, x):
    y = F.relu(self.bn(self.conv(x)))
    y.transpose_(2, 3)
    return self.other(y)


def gradients_are_off_for_a_part(self, x):
    with torch.no_grad():
        y = self.conv(x)
    return F.relu(self.bn(y)) + self.other(x)


def autocast_for_a_part(self, x):
    y = self.conv(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        z = F.relu(self.bn.float()(self.conv(x.float())))
    return y, z.dtype, self.other(y)


def vmapped(self, x):
    return torch.func.vmap(lambda one: F.relu(self.conv(one)))(x) + self.bn(self.other(x))


def weight_is_computed(self, x):
    weight = self.conv.weight / self.conv.weight.norm()
    return F.relu(self.bn(F.conv2d(x, weight, self.conv.bias, padding=1)))


def another_padding(self, x):
    return F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.conv.weight, padding="valid")), F.conv2d(
        x, self.conv.weight, self.conv.bias, padding="same"
    )


def broken_in_two(self, x):
    y = F.relu(self.bn(self.conv(x)))
    torch._dynamo.graph_break()
    return self.other(y)


def one_image(self, x):
    return F.relu(self.conv(x[0]))


FORWARDS = [
    inside_is_returned,
    inside_is_written_through_a_view,
    input_is_written_behind,
    residual_is_written_before_the_sum,
    weight_is_written_between,
    sum_in_place,
    sum_into_the_residual,
    twice_the_same,
    strides_are_read,
    flattened,
    made_another_shape_in_place,
    gradients_are_off_for_a_part,
    vmapped,
    weight_is_computed,
    another_padding,
    broken_in_two,
    one_image,
]


@FORMATS
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_nothing_is_fused_over_what_shows(forward, channels_last):
    """Values, strides, statistics and gradients are eager's. Where eager raises, over a view of channels-last memory or
    a tensor that its backward pass needs as it was, so may the compiled call."""
    x = as_format(image(2, 3, 12, 12), channels_last)
    for training in (False, True):
        model = made(lambda: Layers(forward)).train(training)
        twin = copy.deepcopy(model)
        fast, _ = compiled(model)
        with torch.no_grad():
            for _ in range(2):
                try:
                    expected = twin(x)
                except RuntimeError:
                    return
                same(fast(x), expected)
        same(dict(model.state_dict()), dict(twin.state_dict()))
        try:
            expected = train(twin, x, twin)
        except RuntimeError:
            continue
        agree(train(model, x, fast), expected)


def test_what_stands_elsewhere_keeps_nothing_from_being_fused():
    """A change of what stands around, before and behind, and in between what says nothing to any tensor."""

    def forward(self, x):
        with torch.enable_grad():
            x = x * 2
        y = self.conv(x)
        torch._C._log_api_usage_once("convext.test")
        y = F.relu(self.bn(y))
        with torch.enable_grad():
            return y + 1

    model, x = made(lambda: Layers(forward)).requires_grad_(False), image(2, 3, 12, 12)
    fast, backend = compiled(model)
    with torch.no_grad():
        same(fast(x), model(x))
    (text,) = backend.texts
    assert [node[1].partition(":")[2] for node in json.loads(text)["nodes"]] == ["conv2d", "batch_norm", "relu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_autocast_and_half_precision(dtype):
    """Autocast around the call and in the forward; a model in half precision. Each rounds to its type, and no more: as
    far from float32's result as eager's is, within the half that another order of roundings may add."""
    model = made(lambda: Layers(autocast_for_a_part if dtype is None else inside_is_returned)).float()
    x = image(2, 3, 12, 12, dtype=torch.float32)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        fast, _ = compiled(model)
        if dtype is None:
            found, expected = fast(x), model(x)
            assert found[1] is expected[1] is torch.bfloat16
            torch.testing.assert_close(found[::2], expected[::2], rtol=1e-4, atol=1e-5)
            return
        expected = reference(x)
        with torch.autocast("cpu", dtype):
            check_half(fast(x), model(x), expected, dtype)
        model.to(dtype)
        check_half(compiled(model)[0](x.to(dtype)), model(x.to(dtype)), expected, dtype)


def check_half(found, plain, expected, dtype):
    for a, b, exact in zip(found, plain, expected):
        assert a.dtype is b.dtype and a.stride() == b.stride()
        scale = exact.abs().max()
        rounding = (b.float() - exact).abs().max() + 4 * torch.finfo(dtype).eps * scale
        assert (a.float() - exact).abs().max() <= 1.5 * rounding


def test_gradients_under_autocast():
    model = made(lambda: Layers(sum_in_place)).float().train()
    twin, double, x = copy.deepcopy(model), copy.deepcopy(model).double(), image(2, 3, 12, 12, dtype=torch.float32)
    exact = train(double, x.double(), double)
    fast, backend = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = train(model, x, fast), train(twin, x, twin)
    assert backend.count("conv_bn_act_train") > 0
    for a, b, c in zip(*map(tree_leaves, (found, plain, exact)), strict=True):
        assert a.dtype is b.dtype
        rounding = (b.double() - c.double()).abs().max() + 8 * torch.finfo(torch.bfloat16).eps * c.double().abs().max()
        assert (a.double() - c.double()).abs().max() <= 2 * rounding


def test_convolutions_of_every_kind():
    """Those that no pattern knows are convext's operators by themselves."""
    cases = [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv3d(4, 6, 3, stride=2), (2, 4, 5, 6, 7)),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 3, stride=2, output_padding=1), (2, 4, 3, 4, 5)),
    ]
    for layer, shape in cases:
        model = nn.Sequential(layer, nn.ReLU()).double()
        fast, backend = compiled(model, fullgraph=True)
        with torch.no_grad():
            same(fast(image(*shape)), model(image(*shape)))
        agree(train(model, image(*shape), fast), train(model, image(*shape), model))
        name = {"Conv": "conv", "ConvT": "conv_transpose"}[type(layer).__name__.rstrip("123d").removesuffix("ranspose")]
        assert backend.count(f"{name}{len(shape) - 2}d") == 2
        targets = [key for key in torch.ops.convext.__dict__ if key in ("fprop", "dgrad")]
        assert targets


def test_a_swapped_model_gives_the_same_graphs():
    plain = made(TUTORIAL["basic_block"][0])
    swapped, x = convext.swap(copy.deepcopy(plain)), image(2, 3, 12, 12)
    graphs = []
    for model in (plain, swapped):
        fast, backend = compiled(model)
        with torch.no_grad():
            agree(fast(x), plain(x))
        graphs.append((backend.graphs, [json.loads(text)["nodes"] for text in backend.texts]))
    assert graphs[0] == graphs[1]


def test_without_convolutions_or_kernels_a_graph_is_left_alone():
    class Untouched(nn.Module):
        def forward(self, x):
            return F.relu(x).sum() + 1

    fast, backend = compiled(Untouched())
    fast(image(2, 3, 4, 4))
    assert backend.graphs == [["relu", "sum", "add"]]
    model = made(TUTORIAL["basic_block"][0])
    fast, backend = compiled(model)
    with convext.backend("aten"), torch.no_grad():
        agree(fast(image(2, 3, 12, 12)), model(image(2, 3, 12, 12)))
    assert backend.count("conv2d") == 3 and backend.count("batch_norm") == 3 and not backend.texts


def test_other_tensors_and_inference_mode():
    from torch.testing._internal.two_tensor import TwoTensor

    model, x = made(TUTORIAL["basic_block"][0]), image(2, 3, 12, 12)
    fast, backend = compiled(model)
    with torch.no_grad():
        found, expected = fast(TwoTensor(x, 2 * x)), model(TwoTensor(x, 2 * x))
        agree((found.a, found.b), (expected.a, expected.b))
        assert not backend.texts
    with torch.inference_mode():
        same(fast(x), model(x))
        assert backend.texts


def test_a_function_of_weights():
    def function(x, weight, bias, mean, var):
        return F.relu(F.batch_norm(F.conv2d(x, weight, bias), mean, var))

    operands = image(2, 3, 6, 6), image(4, 3, 3, 3), image(4), image(4), image(4).abs() + 1
    fast, backend = compiled(function)
    same(fast(*operands), function(*operands))
    same(fast(*(2 * t for t in operands)), function(*(2 * t for t in operands)))
    assert len(backend.texts) == 1
    fast, _ = compiled(function)
    leaves = [t.clone().requires_grad_(i < 3) for i, t in enumerate(operands)]
    found = torch.autograd.grad(fast(*leaves).square().sum(), leaves[:3])
    agree(found, torch.autograd.grad(function(*leaves).square().sum(), leaves[:3]))


def test_the_operator_means_its_text():
    """torch's own checks of an operator; and by plan and function by function it gives the same."""
    model, x = made(Inverted), image(2, 3, 32, 32)
    with torch.no_grad():
        fast, backend = compiled(model)
        expected = fast(x)
        given = [*model.named_parameters(), *model.named_buffers()]
    (text,) = backend.texts
    shapes = [tuple(shape) for _, shape in json.loads(text)["parameters"]]
    assert len(shapes) == len([name for name, _ in given if "num_batches" not in name])
    conv = nn.Conv2d(3, 4, 3).double()
    fast, backend = compiled(conv)
    with torch.no_grad():
        fast(x)
        (text,) = backend.texts
        arguments = [x], [conv.weight.detach(), conv.bias.detach()], text
        torch.library.opcheck(PLANNED, arguments, test_utils=("test_schema", "test_faketensor"))
        known = planned._texts.get(text)
        agree(known.one_by_one(*arguments[:2]), PLANNED(*arguments))
        other = [x], [conv.weight.detach()[:2], conv.bias.detach()[:2]], text  # not what the text was written for
        agree(PLANNED(*other), F.conv2d(x, conv.weight[:2], conv.bias[:2]))
    assert expected.shape == (2, 5)


def test_checkpointed_parts_are_left_to_pytorch():
    from torch.utils.checkpoint import checkpoint

    def forward(self, x):
        inside = checkpoint(lambda v: F.relu(self.bn(self.conv(v))), x, use_reentrant=False)
        return self.other(inside)

    model = made(lambda: Layers(forward)).train()
    twin, x = copy.deepcopy(model), image(2, 3, 8, 8)
    fast, _ = compiled(model)
    agree(train(model, x, fast)[:3], train(twin, x, twin)[:3])


# ---- torch.compile(backend="convext") --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_by_its_name_with_inductor(training):
    """A network with pooling and elementwise operations between convolutions, which are Inductor's."""

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.other(torch.tanh(y) * 2 + y)

    model = made(lambda: Layers(forward)).train(training)
    twin, x = copy.deepcopy(model), image(2, 3, 12, 12)
    fast = torch.compile(model, backend="convext", fullgraph=True)
    if training:
        agree(train(model, x, fast), train(twin, x, twin))
        return
    with torch.no_grad():
        for _ in range(2):
            same(fast(x), twin(x))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fast(x)
    names = [event.key for event in profile.key_averages()]
    assert "convext::planned" in names and not any("conv2d" in name or "max_pool2d" in name for name in names), names


def test_modes_and_options_are_inductors(monkeypatch):
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(
        compile_fx,
        "compile_fx",
        lambda module, inputs, config_patches, **_: seen.append(config_patches) or module.forward,
    )
    for settings in ({}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"size_asserts": False}}):
        torch._dynamo.reset()
        torch.compile(lambda x: x.sin(), backend="convext", **settings)(torch.ones(2))
    plain, tuned, options = seen
    assert not plain and tuned["max_autotune"] is True and options == {"size_asserts": False}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Unexpected optimization option no_such"):
        torch.compile(lambda x: x.sin(), backend="convext", options={"no_such": 1})(torch.ones(2))


@pytest.mark.parametrize("first", ["torch", "torch._dynamo"])
def test_the_name_is_known_with_and_without_dynamo(first):
    """In a source tree too, and `import convext` does not import Dynamo for it."""
    code = f"""
import {first}, sys, torch
before = "torch._dynamo" in sys.modules
import convext
assert ("torch._dynamo" in sys.modules) is before
assert "convext" in torch._dynamo.list_backends()
from torch._dynamo.backends.registry import lookup_backend
assert lookup_backend("convext") is convext.dynamo.backend is lookup_backend("convext")
assert not any("convext" in type(finder).__module__ for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)


def test_the_metadata_say_the_same():
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    entry = registry.ENTRY
    assert f'[project.entry-points.{entry.group}]\n{entry.name} = "{entry.value}"\n' in project.read_text()
    assert entry.load() is convext.dynamo.backend
