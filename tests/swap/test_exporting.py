"""A swapped model in the tools that record it: torch.export, ONNX, AOTInductor, TorchScript, torch.compile, FLOPs."""

import copy
import io
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convext

STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])


class Net(nn.Module):
    """What fuses, a residual, a depthwise and a transposed convolution, circular padding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.project = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.wrap = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        x = self.stem(x)
        return self.wrap(self.up(x + self.project(self.depthwise(x))))


def twins(training=False):
    """(unswapped, swapped and run once)."""
    torch.manual_seed(0)
    plain = Net().train(training)
    swapped = convext.swap(copy.deepcopy(plain))
    with torch.no_grad():
        copy.deepcopy(swapped)(sample())
        swapped.eval()(sample())
    return plain, swapped.train(training)


def sample(n=2):
    return torch.randn(n, 3, 12, 12)


def close(a, b):
    # Five layers' sums of at most 72 products in float32.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


OURS = ["convext.fprop.default"] * 3 + ["convext.dgrad.default", "convext.fprop.default"]


@STRICT
def test_a_swapped_model_exports_as_the_plain_one(strict):
    plain, swapped = twins()
    x = sample()
    program = torch.export.export(swapped, (x,), strict=strict)
    assert targets(program) == targets(torch.export.export(plain, (x,), strict=strict))
    close(program.module()(x), plain(x))


@STRICT
def test_it_exports_by_convexts_operators_where_asked_for(strict):
    plain, swapped = twins()
    x = sample()
    with convext.export_ops():
        program = torch.export.export(swapped, (x,), strict=strict)
        with convext.export_ops(False):
            assert not any("convext" in name for name in targets(torch.export.export(swapped, (x,), strict=strict)))
    assert [name for name in targets(program) if "conv" in name] == OURS
    close(program.module()(x), plain(x))
    assert not any("convext" in name for name in targets(torch.export.export(swapped, (x,), strict=strict)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
        (nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7)),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
        (nn.ConvTranspose3d(4, 6, 3), (2, 4, 3, 4, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@STRICT
def test_layers_of_every_kind(layer, shape, strict):
    plain = nn.Sequential(layer).eval()
    swapped, x = convext.swap(copy.deepcopy(plain)), torch.randn(shape)
    program = torch.export.export(swapped, (x,), strict=strict)
    assert targets(program) == targets(torch.export.export(plain, (x,), strict=strict))
    close(program.module()(x), plain(x))
    with convext.export_ops():
        program = torch.export.export(swapped, (x,), strict=strict)
    assert any("convext" in name for name in targets(program))
    close(program.module()(x), plain(x))


@pytest.mark.parametrize("ours", [False, True], ids=["pytorchs", "convexts"])
def test_a_batch_of_any_size_and_a_saved_program(ours):
    plain, swapped = twins()
    with convext.export_ops(ours):
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(swapped, (sample(),), dynamic_shapes=(batch,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    read = torch.export.load(file)
    for n in (1, 5):
        x = sample(n)
        close(read.module()(x), plain(x))


def test_the_setting_takes_true_and_false():
    with pytest.raises(TypeError, match="export_ops: expected True or False, got 1"):
        convext.export_ops(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_gets_plain_convolutions(dynamo):
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    plain, swapped = twins()
    swapped.wrap = nn.Identity()  # circular padding is Pad's "wrap" mode, which the evaluator lacks
    plain.wrap = nn.Identity()
    x, file = sample(), io.BytesIO()
    torch.onnx.export(swapped, (x,), file, dynamo=dynamo, **({} if dynamo else {"opset_version": 17}))
    model = onnx.load_from_string(file.getvalue())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 3 and kinds.count("ConvTranspose") == 1
    assert {node.domain for node in model.graph.node} == {""}
    evaluator = ReferenceEvaluator(model)
    (y,) = evaluator.run(None, {model.graph.input[0].name: x.numpy()})
    close(torch.from_numpy(y), plain(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_aotinductor_package_loads_and_runs(tmp_path):
    """With convext's operators; without, the program is the unswapped model's (above)."""
    plain, swapped = twins()
    x = sample()
    with torch.no_grad():
        with convext.export_ops():
            program = torch.export.export(swapped, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        close(torch._inductor.aoti_load_package(package)(x), plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_trace_saves_and_loads():
    plain, swapped = twins()
    x, file = sample(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(swapped, x)
    assert "convext::" not in str(traced.inlined_graph)
    torch.jit.save(traced, file)
    file.seek(0)
    close(torch.jit.freeze(torch.jit.load(file))(x), plain(x))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_torch_compile_takes_it_whole_for_every_batch(training):
    """One graph, and no more compilations for other batches than of the unswapped model."""
    graphs = []
    for model in twins(training):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
        results = []
        for n in (2, 3, 5, 8):
            torch.manual_seed(n)
            x = sample(n).requires_grad_()
            y = compiled(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        graphs.append((counter.frame_count, results))
    torch._dynamo.reset()
    (plain_count, expected), (count, found) = graphs
    assert count == plain_count <= 2  # one for the first batch, one for any other
    # Through a batch norm's backward a gradient is as far away as its summands are large.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_flops_are_counted_as_of_the_plain_model():
    plain, swapped = twins(training=True)
    with FlopCounterMode(display=False) as expected:
        plain(sample())
    with FlopCounterMode(display=False) as forward:
        swapped(sample())
    assert forward.get_total_flops() == expected.get_total_flops() > 0
    with FlopCounterMode(display=False) as both:
        swapped(sample()).sum().backward()
    # Twice as many, but for the gradient of the network's input. (PyTorch counts a depthwise layer's weight gradient
    # as if it had one group.)
    stem = sum(forward.get_flop_counts()["Net.stem.0"].values())
    assert both.get_total_flops() == 3 * forward.get_total_flops() - stem


def test_a_profiler_names_convexts_operators():
    _, swapped = twins()
    with torch.no_grad(), convext.layer_by_layer():
        swapped(sample())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            swapped(sample())
    names = {event.key for event in profile.key_averages()}
    assert any(name.startswith("convext_cpu::") for name in names), names
