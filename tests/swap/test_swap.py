"""What a swap keeps: classes, keys, parameters, hooks, copies, and whatever the user does with the model afterwards."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from swap_models import BasicBlock, Blocks, CalledTwice, ControlFlow, LeNet, SharedReLU
from torch import nn
from torch.nn.utils import prune

import convext
from convext.swap.calls import is_swapped
from convext.swap.planned import PlannedForward

pytestmark = pytest.mark.smoke


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.act(self.bn(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))


def make(maker=Net, dtype=torch.float64):
    torch.manual_seed(0)
    return maker().to(dtype)


def sample(dtype=torch.float64, n=2, size=8):
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(5))


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def fused(model):
    return [row.fused for row in convext.report(model)]


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_swap_returns_the_same_model_with_the_same_class_keys_and_parameters():
    model = make()
    kinds = [type(m) for m in model.modules()]
    modules, keys, parameters = list(model.modules()), list(model.state_dict()), list(map(id, model.parameters()))
    assert convext.swap(model) is model
    assert list(model.modules()) == modules
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys and list(map(id, model.parameters())) == parameters
    assert all(is_swapped(m) for m in modules if isinstance(m, nn.Conv2d))


def test_swap_of_a_swapped_model_changes_nothing_but_what_is_new():
    model = convext.swap(make())
    forwards = {m: m.__dict__.get("forward") for m in model.modules()}
    convext.swap(model)
    assert {m: m.__dict__.get("forward") for m in model.modules()} == forwards
    model.stem.append(make(BasicBlock).conv1)
    model.stem[3] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double()
    reference = convext.revert(copy.deepcopy(model))
    convext.swap(model)
    assert is_swapped(model.stem[3][0])
    assert model.__dict__["forward"] is forwards[model]
    close(model(sample()), reference(sample()))
    assert fused(model) == ["bn + relu", "relu", "bn + add + relu"]


def test_revert_puts_everything_back():
    model = make()
    before = {m: (type(m), dict(m.__dict__)) for m in model.modules()}
    convext.swap(model)
    model(sample())
    assert convext.revert(model) is model
    for m, (kind, attributes) in before.items():
        assert type(m) is kind and m.__dict__.keys() == attributes.keys()
        assert all(m.__dict__[name] is value for name, value in attributes.items())
    assert fused(model) == ["", ""] and all(row.reason == "not swapped" for row in convext.report(model))


def test_root_may_be_a_convolution():
    conv = make(lambda: nn.Conv2d(3, 4, 3))
    expected = conv(sample())
    convext.swap(conv)
    assert is_swapped(conv)
    close(conv(sample()), expected)
    assert convext.report(conv)[""].became == "convext"


@pytest.mark.parametrize("function", [convext.swap, convext.revert, convext.report])
def test_anything_but_a_module_is_refused(function):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        function(3)


def test_failing_swap_leaves_the_model_as_it_was(monkeypatch):
    model = make()
    before = {m: (type(m), set(m.__dict__)) for m in model.modules()}
    made = []

    def fail(self, owner, signature):
        made.append(owner)
        if len(made) == 2:
            raise MemoryError("no more")

    monkeypatch.setattr(PlannedForward, "plan", fail)
    with pytest.raises(MemoryError):
        convext.swap(model)
    assert {m: (type(m), set(m.__dict__)) for m in model.modules()} == before


def test_users_own_forward_in_an_instance_stays():
    model = make()
    own = lambda x: x * 2  # noqa: E731
    model.stem.forward = own
    convext.swap(model)
    assert model.stem.forward is own
    close(model(sample(n=2)[:, [0, 1, 2, 0]]), convext.revert(model)(sample()[:, [0, 1, 2, 0]]))
    assert model.stem.forward is own


def test_forward_put_into_a_layer_after_the_swap_is_called():
    model = convext.swap(make())
    model(sample())
    seen = []
    model.conv.forward = lambda x: seen.append(x.shape) or F.conv2d(x, model.conv.weight, model.conv.bias, padding=1)
    expected = convext.revert(copy.deepcopy(model))
    close(model(sample()), expected(sample()))
    assert len(seen) == 2


# ---- layers that stay alone ------------------------------------------------------------------------------------------


class OwnConv(nn.Conv2d):
    pass


def test_subclasses_parametrized_and_lazy_layers_are_left_alone_with_a_reason():
    model = nn.Sequential(OwnConv(3, 4, 1), nn.Conv2d(4, 4, 1), nn.LazyConv2d(4, 1), nn.LazyConvTranspose3d(4, 1))
    torch.nn.utils.parametrizations.weight_norm(model[1])
    kinds = list(map(type, model))
    convext.swap(model)
    assert list(map(type, model)) == kinds
    words = "subclass", "parametrized", "lazy", "lazy"
    for word, row in zip(words, convext.report(model), strict=True):
        assert word in row.reason


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [torch.nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "pruning"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_layers_that_compute_their_weight_in_a_hook_run_by_themselves(change, when):
    plain, swapped = make().eval(), make().eval()
    change(plain.conv)
    if when == "after":
        convext.swap(swapped)(sample())
    change(swapped.conv)
    convext.swap(swapped)
    for model in (plain, swapped):
        with torch.no_grad():
            next(p for name, p in model.conv.named_parameters() if name in ("weight_v", "weight_orig")).mul_(2)
    close(swapped(sample()), plain(sample()))
    assert "hooks" in convext.report(swapped)["conv"].reason


def test_convolution_called_twice_runs_by_itself():
    model = convext.swap(make(CalledTwice))
    row = convext.report(model)["conv"]
    assert row.fused == "" and row.reason == "called more than once in one forward"


# ---- hooks -----------------------------------------------------------------------------------------------------------


def hear(module, kind, heard, name):
    if kind == "forward":
        return module.register_forward_hook(lambda m, args, out: heard.append((name, out.detach().clone())))
    if kind == "forward_pre":
        return module.register_forward_pre_hook(lambda m, args: heard.append((name, args[0].detach().clone())))
    return module.register_full_backward_hook(lambda m, grad_in, grad_out: heard.append((name, grad_out[0].clone())))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("training", [False, True])
def test_whoever_listens_is_heard(when, kind, training):
    for name in ("stem", "stem.0", "stem.1", "stem.2", "conv", "bn", "act", "fc", ""):
        plain, swapped = make().train(training), make().train(training)
        plain.act.inplace = swapped.act.inplace = False  # backward hooks forbid it
        expected, heard = [], []
        hear(plain.get_submodule(name), kind, expected, name)
        if when == "after":
            convext.swap(swapped)
            swapped(sample())
            plain(sample())
            expected.clear()
        hear(swapped.get_submodule(name), kind, heard, name)
        convext.swap(swapped)
        for model in (plain, swapped):
            model(sample().requires_grad_()).square().sum().backward()
        assert len(heard) == len(expected) == 1, (name, kind)
        close(heard[0][1], expected[0][1])
        for a, b in zip(swapped.parameters(), plain.parameters(), strict=True):
            close(a.grad, b.grad)
        for a, b in zip(swapped.buffers(), plain.buffers(), strict=True):
            close(a, b)


def test_fusion_comes_back_when_a_hook_goes():
    model = convext.swap(make().eval())
    calls = []
    handle = hear(model.bn, "forward", calls, "bn")
    model(sample())
    assert convext.report(model)["conv"].fused == "" and len(calls) == 1
    handle.remove()
    model(sample())
    assert convext.report(model)["conv"].fused == "bn + add + relu" and len(calls) == 1


def test_a_forward_that_reads_on_after_a_hook_runs_as_it_is():
    """A hook may do anything, to what the forward reads next as well."""
    model = convext.swap(make().eval())
    calls = []
    hear(model.act, "forward", calls, "act")
    expected = convext.revert(make().eval())(sample())
    close(model(sample()), expected)
    assert len(calls) == 1 and "reads on after" in convext.report(model)["conv"].reason


def test_hook_that_changes_the_output_counts():
    plain, swapped = make().eval(), convext.swap(make().eval())
    for model in (plain, swapped):
        model.conv.register_forward_hook(lambda m, args, out: out * 3)
    close(swapped(sample()), plain(sample()))


def test_global_module_hooks_hear_every_layer():
    plain, swapped = make().eval(), convext.swap(make().eval())
    swapped(sample())
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: heard.append(type(m).__name__))
    try:
        plain(sample())
        expected = heard.copy()
        heard.clear()
        swapped(sample())
    finally:
        handle.remove()
    assert heard == expected


# ---- batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda bn: None,
        lambda bn: setattr(bn, "momentum", None),
        lambda bn: setattr(bn, "momentum", 0.7),
        lambda bn: bn.eval(),
        lambda bn: setattr(bn, "eps", 0.1),
        lambda bn: bn.requires_grad_(False),
        lambda bn: setattr(bn, "track_running_stats", False),
        lambda bn: setattr(bn, "weight", None) or setattr(bn, "bias", None),
        lambda bn: setattr(bn, "bias", None),
        lambda bn: [setattr(bn, n, None) for n in ("running_mean", "running_var", "num_batches_tracked")],
        lambda bn: setattr(bn, "num_batches_tracked", None),
    ],
    ids="default cumulative momentum frozen eps no_grad untracked not_affine no_bias no_statistics no_counter".split(),
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_every_setting(change, when, training):
    plain, swapped = make().train(training), make().train(training)
    change(plain.bn)
    if when == "after":
        convext.swap(swapped)(sample())
        swapped.load_state_dict(make().state_dict())
    change(swapped.bn)
    convext.swap(swapped)
    for step in range(3):
        x = sample(n=3 + step)
        a, b = swapped(x), plain(x)
        close(a, b)
    a.sum().backward(), b.sum().backward()
    for p, q in zip(swapped.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad)
    for p, q in zip(swapped.buffers(), plain.buffers(), strict=True):
        close(p, q)


def test_one_value_per_channel_in_training_raises_as_before():
    for model in (make(), convext.swap(make())):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(sample(n=1, size=1))


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (3, 8), (2, 3, 8)])
def test_wrong_input_raises_the_same_type(shape):
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(Exception) as expected:
        make()(x)
    with pytest.raises(expected.type):
        convext.swap(make())(x)


# ---- life after the swap ---------------------------------------------------------------------------------------------


def test_deep_copy_is_independent_and_planned():
    model = convext.swap(make().eval())
    model(sample())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv.weight.zero_()
        twin.conv.bias.zero_()
    assert twin.forward.owner is twin and model.forward.owner is model
    assert not torch.equal(twin(sample()), model(sample()))
    close(model(sample()), make().eval()(sample()))
    close(twin(sample()), convext.revert(copy.deepcopy(twin))(sample()))
    assert fused(twin) == ["bn + relu", "bn + add + relu"]


def test_nothing_but_the_model_keeps_the_model_alive():
    model = convext.swap(make())
    model(sample())
    gone = weakref.ref(model), weakref.ref(model.conv)
    gc.disable()
    try:
        del model
        assert gone[0]() is None and gone[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("saved", ["model", "state_dict", "pickle"])
def test_saving_and_loading(saved):
    model = convext.swap(make().eval())
    expected = model(sample())
    file = io.BytesIO()
    if saved == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif saved == "model":
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        torch.save(model.state_dict(), file)
        file.seek(0)
        twin = Net().double().eval()
        twin.load_state_dict(torch.load(file))
    close(twin(sample()), expected)
    if saved != "state_dict":
        assert is_swapped(twin.conv) and twin.forward.owner is twin
        assert fused(twin) == ["bn + relu", "bn + add + relu"]
    model.load_state_dict(make(lambda: Net()).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_changes_after_the_swap(dtype):
    model = convext.swap(make(dtype=torch.float32).eval())
    model(sample(torch.float32))
    reference = make(dtype=torch.float32).eval().double()(sample(torch.float32).double())
    found = model.to(dtype)(sample(torch.float32).to(dtype))
    assert found.dtype is dtype
    # The longest sum has 4*3*3 products, and there are four layers.
    close(found.double(), reference, 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * 36**0.5)
    convext.verify(model, sample(torch.float32).to(dtype))


def test_memory_format_changes_after_the_swap():
    model = convext.swap(nn.Sequential(*make().stem, nn.Conv2d(4, 5, 3), nn.ReLU()).double().eval())
    x = sample()
    expected = model(x)
    assert expected.is_contiguous()
    model.to(memory_format=torch.channels_last)
    for given in (x, x.to(memory_format=torch.channels_last)):
        found = model(given)
        close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_autocast_follows_the_context():
    plain, swapped = make(dtype=torch.float32), convext.swap(make(dtype=torch.float32))
    for training in (True, False):
        plain.train(training), swapped.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = swapped(sample(torch.float32)), plain(sample(torch.float32))
        assert a.dtype == b.dtype
        close(a.float(), b.float(), 8 * torch.finfo(torch.bfloat16).eps)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        return torch.relu(self.norm(self.second(x)) + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_weights_once_for_calls_without_gradients(dtype):
    plain = Residual().eval()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        before = swapped(x)
        for change in (1.0, -2.0):  # the copies in half precision follow the weights
            for model in (plain, swapped):
                model.first.weight.mul_(change)
            for _ in range(3):
                with torch.autocast("cpu", dtype):
                    found, expected = swapped(x), plain(x)
                assert found.dtype == expected.dtype == dtype
                close(found.float(), expected.float(), 8 * torch.finfo(dtype).eps)
        close(swapped(x), plain(x), 1e-5)  # and out of the context nothing is cast
        assert not torch.equal(before, swapped(x))
        with pytest.raises(RuntimeError):
            swapped(x.to(dtype))


def test_autocast_fuses_the_residual(count_native):
    swapped = convext.swap(Residual().eval())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), convext.backend("native"):
        for _ in range(3):
            swapped(torch.randn(2, 8, 9, 9))
    assert sum(count_native().values()) == 6


def test_autocast_with_a_residual_in_float32_adds_in_float32():
    class Outside(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x)) + x

    plain = Outside(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(1, 8, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            found, expected = swapped(x), plain(x)
            assert found.dtype == expected.dtype == torch.float32
            close(found, expected, 8 * torch.finfo(torch.bfloat16).eps)


def test_frozen_parameters_get_no_gradient():
    model = convext.swap(make())
    model.conv.weight.requires_grad_(False)
    model(sample()).sum().backward()
    assert model.conv.weight.grad is None and model.conv.bias.grad is not None and model.stem[0].weight.grad is not None


@pytest.mark.parametrize(
    "replacement",
    [
        ("fc", lambda: nn.Linear(4, 7)),
        ("conv", lambda: nn.Conv2d(4, 4, 5, padding=2)),
        ("bn", lambda: nn.Identity()),
        ("act", lambda: nn.SiLU()),
        ("act", lambda: nn.Tanh()),
        ("conv", lambda: OwnConv(4, 4, 1)),
        ("stem", lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())),
    ],
)
def test_replacing_a_module_after_the_swap(replacement):
    name, maker = replacement
    model = convext.swap(make().eval())
    model(sample())
    setattr(model, name, maker().double())
    reference = convext.revert(copy.deepcopy(model))
    close(model(sample()), reference(sample()))
    convext.swap(model)
    close(model(sample()), reference(sample()))


def test_changing_a_sequential_inside():
    model = convext.swap(make().eval())
    model(sample())
    model.stem[2] = nn.Tanh()
    close(model(sample()), convext.revert(copy.deepcopy(model))(sample()))
    del model.stem[2]
    close(model(sample()), convext.revert(copy.deepcopy(model))(sample()))


@pytest.mark.parametrize(
    "setting",
    [("stride", (2, 2)), ("padding", (0, 0)), ("dilation", (2, 2)), ("padding", "same"), ("padding_mode", "circular")],
)
def test_changing_a_layers_geometry_after_the_swap(setting):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    swapped = convext.swap(copy.deepcopy(model))
    swapped(sample())
    for m in (model, swapped):
        setattr(m[0], *setting)
    close(swapped(sample()), model(sample()))


def test_replacing_a_parameter_and_its_data():
    model = convext.swap(make().eval())
    for change in (
        lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight * 2)),
        lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 3),
        lambda m: m.conv.weight.data.mul_(0.1),
        lambda m: setattr(m.conv, "bias", None),
    ):
        model(sample())
        change(model)
        close(model(sample()), convext.revert(copy.deepcopy(model))(sample()))


def test_optimizer_built_before_the_swap_trains_the_same():
    models = make(), make()
    losses = []
    for model, swap in zip(models, (False, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(6):
            if swap and step == 2:  # in the middle of training
                convext.swap(model)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(sample(n=4)), torch.tensor([0, 1, 1, 0]))
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    close(*losses)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        close(a, b)


def test_checkpoints_load_both_ways():
    plain, swapped = make(), convext.swap(make())
    swapped(sample())
    plain.load_state_dict(swapped.state_dict())
    close(plain.eval()(sample()), swapped.eval()(sample()))
    swapped.load_state_dict(make(lambda: Net()).state_dict())
    close(swapped(sample()), make().eval()(sample()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model = convext.swap(make().eval())
    with context():
        found = model(sample())
    assert not found.requires_grad
    close(found.clone(), make().eval()(sample()))


def test_swap_of_a_submodule_only():
    model = make().eval()
    expected = model(sample())
    convext.swap(model.stem)
    assert type(model.conv) is nn.Conv2d and "forward" not in model.__dict__
    close(model(sample()), expected)
    convext.swap(model)
    close(model(sample()), expected)
    assert fused(model) == ["bn + relu", "bn + add + relu"]
    convext.revert(model.stem)
    assert not is_swapped(model.stem[0]) and is_swapped(model.conv)
    close(model(sample()), expected)


def test_functional_call_uses_the_given_parameters():
    model = convext.swap(make().eval())
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}
    expected = torch.func.functional_call(make().eval(), parameters, (sample(),))
    close(torch.func.functional_call(model, parameters, (sample(),)), expected)


def test_func_grad_and_vmap_over_a_swapped_model():
    plain, swapped = make().eval(), convext.swap(make().eval())
    parameters = {name: p.detach() for name, p in plain.named_parameters()}

    def loss(parameters, model, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    grads = [
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(parameters, model, sample())
        for model in (plain, swapped)
    ]
    for name in parameters:
        close(grads[0][name], grads[1][name])


def test_gradient_of_the_gradient():
    results = []
    for model in (make(), convext.swap(make())):
        x = sample().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_forward_mode_is_right():
    plain, swapped = make().eval(), convext.swap(make().eval())
    tangent = torch.ones_like(sample())
    expected = torch.func.jvp(plain, (sample(),), (tangent,))[1]
    close(torch.func.jvp(swapped, (sample(),), (tangent,))[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(training):
    plain, swapped = make().train(training), convext.swap(make().train(training))
    compiled = torch.compile(swapped, backend="aot_eager")
    a, b = compiled(sample()), plain(sample())
    close(a, b)
    a.sum().backward(), b.sum().backward()
    for p, q in zip(swapped.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)
    for p, q in zip(swapped.buffers(), plain.buffers(), strict=True):
        close(p, q)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fx_and_jit_traces_go_through_the_forward_as_written():
    model = convext.swap(make().eval())
    expected = model(sample())
    graph = torch.fx.symbolic_trace(model)
    assert {n.target for n in graph.graph.nodes if n.op == "call_module"} >= {"bn", "act", "fc", "stem.1"}
    close(graph(sample()), expected)
    close(torch.jit.trace(model, sample(), check_trace=False)(sample()), expected)


def test_data_parallel_training_in_one_process():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    store = torch.distributed.HashStore()
    init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for order in ("swap first", "wrap first"):
            model = make()
            wrapped = DistributedDataParallel(convext.swap(model) if order == "swap first" else model)
            convext.swap(wrapped)
            assert fused(wrapped) == ["bn + relu", "bn + add + relu"]
            wrapped(sample()).sum().backward()
            plain = make()
            plain(sample()).sum().backward()
            for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True):
                close(a.grad, b.grad)
    finally:
        destroy_process_group()


def test_ordinary_use_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    model = convext.swap(make().train()).eval()  # the plan for evaluation is made inside
    expected = make().eval()(sample())
    with torch.no_grad(), ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: model(sample()), range(32)):
            close(found.detach(), expected.detach())


# ---- the report and the check ----------------------------------------------------------------------------------------


def test_report_says_what_became_of_each_layer():
    model = convext.swap(make(LeNet, torch.float32).eval())
    before = convext.report(model)["conv1"]
    assert (before.layer, before.became) == ("3 -> 6, 5x5", "convext")
    assert (before.fused, before.backend) == ("relu", "")
    model(sample(torch.float32, size=32))
    row = convext.report(model)["conv1"]
    assert row.backend in ("native", "aten") and row.variant
    assert row.backend == "native" or "native: " in row.reason
    report = convext.report(model)
    assert report.to_dict()["conv2"]["fused"] == "relu" and len(list(report)) == len(report) == 2
    text = str(report)
    assert "conv1" in text and "3 -> 6, 5x5" in text and "2 convolutions, 2 by convext, 2 fused" in text


def test_report_of_what_runs_unfused_still_says_who_computed_it():
    model = convext.swap(make(ControlFlow).eval())
    model(sample())
    row = convext.report(model)["conv"]
    assert row.fused == "" and row.backend and "decides by the value" in row.reason
    model = convext.swap(make(Blocks).eval())
    assert {row.fused for row in convext.report(model)} == {"bn + relu6", ""}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_verify_agrees_and_leaves_no_trace(training, dtype):
    model = convext.swap(make(SharedReLU, dtype)).train(training)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    found = convext.verify(model, sample(dtype))
    assert found.ok and bool(found)
    assert {"output", "gradient", "gradient of input", "buffer"} <= {row.kind for row in found.rows}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "agree" in str(found)


def test_verify_draws_its_numbers_wherever_the_default_device_is():
    """A generator of the CPU's draws on the CPU alone."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 6, 6)
    with torch.device("meta"):
        assert convext.verify(model, x).ok


def test_verify_sees_a_difference(monkeypatch):
    from convext import functional

    model = make(SharedReLU)
    right = functional.chained_conv_bn_act
    monkeypatch.setattr(
        functional, "chained_conv_bn_act", lambda x, w, e, *rest: right(x, w, e._replace(eps=e.eps * 1.01), *rest)
    )
    found = convext.verify(model, sample())
    assert not found.ok and "DISAGREE" in str(found)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (3, TypeError, "sample: expected a tensor"),
        ((), TypeError, "sample: expected a tensor"),
        (torch.zeros(2, 5, 8, 8), ValueError, "sample: the unswapped Net fails on it"),
    ],
)
def test_bad_sample_is_named(bad, error, match):
    with pytest.raises(error, match=match):
        convext.verify(make(dtype=torch.float32), bad)


def test_a_layer_that_was_replaced_is_freed():
    model, x = convext.swap(make().eval()), sample()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                model(x)
    gone = weakref.ref(model.conv)
    model.conv = copy.deepcopy(model.conv)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(x)
    gc.collect()
    assert gone() is None
