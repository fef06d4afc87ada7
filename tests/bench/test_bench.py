"""The benchmarks' own arithmetic: turns, medians, ratios, agreement, and what counts as the same result."""

import dataclasses
import itertools
import math
import sys
import types

import pytest
import torch
from torch import nn

import convext
from convext import backends, cli, zoo
from convext.bench import inference, layers, machine, memory, model, problems, results, timing, training
from convext.bench.agreement import Agreement, bound, distance
from convext.bench.candidate import Skipped
from convext.bench.machine import Ceilings
from convext.bench.problems import Layer
from convext.bench.tables import Grid
from convext.bench.timing import Timing
from convext.problem import ConvProblem, Pass
from convext.tune.measure import bound_of, operands_of, reference_of


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


class Clock:
    """Stands in for time.perf_counter; calls advance it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, *seconds):
        steps = itertools.cycle(seconds)

        def run():
            self.now += next(steps)

        return run


def test_median_and_quartiles():
    sample = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert sample.median == 3.0
    assert sample.iqr == 2.0
    assert Timing((5.0,)).iqr == 0.0


def test_a_ratio_is_taken_round_by_round():
    # Both slow down threefold half way; a ratio of medians over unequal halves would not be 2.
    slow, fast = Timing((2.0, 2.0, 6.0)), Timing((1.0, 1.0, 3.0))
    assert fast.times_faster_than(slow) == 2.0


def test_turns_give_every_candidate_every_round(monkeypatch):
    clock = Clock(monkeypatch)
    timings = timing.interleave({"a": clock.call(1.0), "b": clock.call(0.5)}, seconds=0.0, min_rounds=4)
    assert timings["a"].seconds == (1.0,) * 4
    assert timings["b"].seconds == (0.5,) * 4


def test_short_calls_are_repeated_within_a_visit(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    tick = clock.call(0.001)
    timing.interleave({"a": lambda: (calls.append(1), tick())}, seconds=0.0, min_rounds=1)
    # Two to warm up, one before the clock starts, then as many as fill the visit.
    assert len(calls) == 3 + round(timing.VISIT_SECONDS / 0.001)


def test_time_is_up_after_the_seconds_given(monkeypatch):
    clock = Clock(monkeypatch)
    timings = timing.interleave({"a": clock.call(1.0)}, seconds=10.0, min_rounds=2, max_rounds=100)
    assert len(timings["a"].seconds) == 6  # each visit takes two seconds: one untimed call, one timed


def test_distance_is_relative_and_knows_what_is_not_comparable():
    ones = torch.ones(4)
    assert distance(ones, ones) == 0.0
    assert distance(1.5 * ones, ones) == 0.5
    assert distance(torch.ones(3), ones) == math.inf
    assert distance(torch.tensor([1.0, math.nan, 1.0, 1.0]), ones) == math.inf


def test_bound_follows_dtype_and_depth():
    shallow, deep = small_network(), nn.Sequential(*(small_network() for _ in range(4)))
    assert bound(deep, torch.float32) == pytest.approx(2 * bound(shallow, torch.float32))
    assert bound(shallow, torch.float64) < bound(shallow, torch.float32) < bound(shallow, torch.bfloat16)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_bound_holds_for_eager_itself_and_catches_a_wrong_weight(name):
    network, _ = zoo.build(name)
    x = zoo.sample(name, 1, size=96)
    with torch.no_grad():
        result = network(x)
        exact = network.double()(x.double())
        limit = bound(network, torch.float32)
        assert Agreement(distance(result, exact), limit).ok
        last = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
        last.weight[0] += 0.1
        assert not Agreement(distance(network(x.double()), exact), limit).ok


def test_seeded_networks_are_the_same_at_every_call_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, provenance = zoo.build("resnet18")
    second, _ = zoo.build("resnet18")
    assert "seeded" in provenance
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_seeded_networks_have_activations_of_a_trained_networks_scale():
    network, _ = zoo.build("resnet18")
    with torch.no_grad():
        spread = network(zoo.sample("resnet18", 2)).std().item()
    assert 0.05 < spread < 20


def test_collect_finds_resnet50s_convolutions():
    network, _ = zoo.build("resnet50")
    found = problems.collect(network, zoo.sample("resnet50", 1))
    assert sum(found.values()) == 53
    assert problems.title(next(iter(found))) == "3×224×224 -> 64, 7×7 /2"
    # 4.09 GMAC, the figure usually quoted, less the classifier's two million.
    assert sum(p.flops * count for p, count in found.items()) / 2 == pytest.approx(4.087e9, rel=1e-3)
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_collect_resolves_padding_given_as_a_word():
    found = problems.collect(nn.Sequential(nn.Conv2d(2, 2, 5, padding="same", dilation=2)), torch.zeros(1, 2, 9, 9))
    (problem,) = found
    assert (problem.pad_h, problem.pad_w, problem.p) == (4, 4, 9)


@pytest.mark.parametrize("pass_", list(Pass))
def test_measuring_a_layer_names_who_is_selected(pass_):
    problem = ConvProblem(1, 8, 7, 7, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    measured = layers.measure(Layer(problem), 2, pass_, seconds=0.0)
    assert {"aten", measured.selected} <= set(measured.timings)
    assert measured.regret >= 0.0
    assert ("native" in measured.timings) == ("native" not in measured.off) == (measured.ratio("native") is not None)
    assert layers.table([measured]).rows[0][:3] == ["8×7×7 -> 8, 3×3", "2", pass_.name.lower()]
    assert pass_.name.lower() in layers.summary([measured])
    assert measured.as_json()["pass"] == pass_.name.lower()


TRANSPOSED = [
    "transposed x 2x8x5x6, w 8x2x3x2, stride 2x1, padding 1x0, output padding 1x0, groups 2",
    "transposed x 2x8x20, w 8x4x3, dilation 2",
    "transposed x 1x4x3x4x5, w 4x6x2x3x2, stride 2, output padding 1",
]
PLAIN = [
    "x 2x8x9x7, w 4x4x3x3, padding 1, groups 2",
    "x 2x8x20, w 6x8x3, stride 2",
    "x 1x4x5x6x7, w 6x4x3x3x3, padding 1",
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("line", TRANSPOSED + PLAIN)
def test_a_pass_of_a_layer_is_what_autograd_computes(line, pass_, channels_last):
    """By every backend that serves it: the result of the layer as torch.nn.functional has it, or a gradient of that."""
    how = dict(batch=None, dtype=torch.float32, device="cpu", channels_last=channels_last)
    layer = problems.placed(problems.parse(line), **how)
    a, b = (t.double().requires_grad_() for t in operands_of(layer.computes(pass_), layer.problem))
    longer = layer.output_padding if layer.transposed else (0,) * layer.problem.axes
    setting = (*layer.problem.geom[:3], layer.transposed, longer, layer.problem.groups)
    if pass_ == Pass.FPROP:
        expected = torch.convolution(a, b, None, *setting)
    else:
        p = layer.problem
        dy, other = (b, a) if layer.transposed and pass_ == Pass.WGRAD else (a, b)
        x = other if pass_ == Pass.WGRAD else torch.zeros(p.y_shape if layer.transposed else p.x_shape).double()
        w = other if pass_ == Pass.DGRAD else torch.zeros(p.w_shape).double()
        of = x if pass_ == Pass.DGRAD else w
        of.requires_grad_()
        (expected,) = torch.autograd.grad(torch.convolution(x, w, None, *setting), of, dy)
    assert distance(reference_of(layer.computes(pass_), layer.problem, (a, b)), expected) < 1e-12
    operands = operands_of(layer.computes(pass_), layer.problem)
    with torch.no_grad():
        for name in layers.contenders(layer.problem, layer.computes(pass_))[0]:
            found = layers._call(name, pass_, layer, operands)()
            if isinstance(found, tuple):
                (found,) = (t for t in found if t is not None)
            assert distance(found, expected) < 1e-6, name
        measured = layers.measure(layer, 1, pass_, seconds=0.0)
    assert measured.as_json()["transposed"] is layer.transposed
    assert measured.name == pass_.name.lower()


def test_a_kernel_that_computes_something_else_is_not_timed(monkeypatch):
    native = backends.get("native", "cpu")
    monkeypatch.setattr(type(native), "dgrad", lambda self, problem, dy, w: torch.zeros(problem.x_shape))
    with pytest.raises(layers.WrongResult, match="dgrad of .* by native is 1.0e[+]00 away .* rounding explains"):
        layers.measure(problems.parse("x 1x8x9x9, w 8x8x3x3"), 1, Pass.DGRAD, seconds=0.0)


def test_the_bound_knows_of_tf32(monkeypatch):
    on_cpu = ConvProblem(1, 8, 7, 7, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    on_gpu, strict = dataclasses.replace(on_cpu, device="cuda"), bound_of(Pass.FPROP, on_cpu)
    monkeypatch.setattr(sys.modules[bound_of.__module__], "tf32_is_allowed", lambda: True)
    assert bound_of(Pass.FPROP, on_cpu) == strict < 2**-11 < bound_of(Pass.FPROP, on_gpu)
    monkeypatch.setattr(sys.modules[bound_of.__module__], "tf32_is_allowed", lambda: False)
    assert bound_of(Pass.FPROP, on_gpu) == strict


def test_regret_is_what_the_selection_gives_away():
    problem = ConvProblem(1, 8, 7, 7, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    timings = {"aten": Timing((2.0,)), "native": Timing((3.0,))}
    assert layers.Measurement(problem, 1, Pass.FPROP, timings, "native", "v", {}).regret == pytest.approx(0.5)
    assert layers.Measurement(problem, 1, Pass.FPROP, timings, "aten", "v", {}).regret == 0.0


def test_the_ceiling_that_binds_first_is_the_one_named():
    ceilings = Ceilings("1 thread", "float32 FMA", flops=100.0, copy_bytes=10.0)
    assert ceilings.share(flops=50.0, bytes_=1.0, seconds=1.0) == (0.5, "flops")
    assert ceilings.share(flops=50.0, bytes_=8.0, seconds=1.0) == (0.8, "copy")


def test_markdown_aligns_figures_to_the_right():
    grid = Grid(["network", "ms"], rows=[["resnet18", "3.2"]])
    assert grid.markdown() == "| network | ms |\n| --- | --: |\n| resnet18 | 3.2 |"


@pytest.mark.parametrize("train", [False, True])
def test_a_case_gives_timings_of_eager_and_convext(train):
    case = model.Case("resnet18", 1 + train, 1, train=train)
    threads = torch.get_num_threads()
    outcome = model.run(case, seconds=0.0)
    assert torch.get_num_threads() == threads
    assert set(outcome.timings) == {"eager", "convext"}
    assert outcome.agreement["convext"].ok
    assert "resnet18" in model.images_per_second(outcome)
    assert model.table([outcome]).rows[0][:3] == ["resnet18", str(1 + train), "1"]
    (row,) = model.memory_table([outcome]).rows
    assert row[:2] == ["resnet18", str(1 + train)] and len(row) == (6 if train else 4)
    eager, ours = (outcome.as_json()["memory"][name] for name in ("eager", "convext"))
    if not train:
        assert eager["saved_bytes"] == ours["saved_bytes"] == 0
        assert ours["peak_bytes"] > 0
        assert eager["peak_bytes"] >= 2 * 4 * 64 * 112 * 112  # the first convolution's result, and its batch norm's
    if train:
        assert 0 < ours["saved_bytes"] < eager["saved_bytes"] < eager["peak_bytes"]
        assert ours["saved_bytes"] < ours["peak_bytes"] < eager["peak_bytes"]


def test_a_training_case_takes_the_step_that_computes_again_beside_it():
    outcome = model.run(model.Case("resnet18", 2, 1, train=True, recompute=True), seconds=0.0)
    assert list(outcome.timings) == ["eager", "convext", "convext, recompute"] == list(outcome.memory)
    assert outcome.agreement["convext, recompute"].ok
    needed = outcome.as_json()["memory"]
    assert needed["convext, recompute"]["saved_bytes"] < needed["convext"]["saved_bytes"]
    grid = model.memory_table([outcome])
    assert grid.columns[2:5] == ["saved, MiB, eager", "convext", "convext, recompute"]
    assert len(grid.rows[0]) == len(grid.columns) == 8


def test_recompute_is_asked_of_training_alone(capsys):
    assert cli.main(["bench", "model", "--recompute"]) == 2
    assert "--recompute: expected --train" in capsys.readouterr().err


class Product(nn.Module):
    """Of what a layer makes of x, and of x itself, seen twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.layer(x) * x.view(16, 8).view(32, 4)


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    network, x, bytes_of_x = Product(), torch.ones(32, 4, requires_grad=True), 32 * 4 * 4
    assert memory.saved_bytes(network, x) == 2 * bytes_of_x
    assert memory.saved_bytes(network.layer, x) == bytes_of_x
    assert memory.saved_bytes(network.layer.requires_grad_(False), x) == 0


def test_peak_bytes_counts_what_is_there_at_once():
    """Of convext's results as well, which come from a pool otherwise, and in units in which malloc hands them out."""
    mega = 1_000_000

    def chain():
        y = torch.zeros(mega) + 1  # both of them
        y = y * 2  # the first is gone
        del y
        return convext.conv2d(torch.zeros(1, 1, 1000, 500), torch.zeros(1, 1, 1, 1))

    assert 8 * mega <= memory.peak_bytes(chain) < 8 * mega + 10_000
    assert 4 * mega <= memory.peak_bytes(lambda: convext.conv2d(torch.zeros(1, 1, 1000, 500), torch.zeros(1, 1, 1, 1)))
    assert memory.peak_bytes(lambda: None) == 0


def test_only_the_peers_asked_for_take_part():
    assert {"torch.compile", "ONNX Runtime", "OpenVINO"} < set(model.peers(train=False))
    outcome = model.run(model.Case("resnet18", 1, 1), peers=["eager channels-last"], seconds=0.0)
    assert set(outcome.timings) == {"eager", "convext", "eager channels-last"}


def test_a_wrong_result_is_not_timed(monkeypatch):
    def broken(network):
        with torch.no_grad():
            network.conv1.weight[0] += 0.1
        return network

    monkeypatch.setattr(convext, "swap", broken)
    with pytest.raises(model.Disagreement, match="rounding explains"):
        model.run(model.Case("resnet18", 1, 1), seconds=0.0)


@pytest.mark.parametrize("name", ["eager channels-last", "ONNX Runtime", "OpenVINO", "ncnn", "MNN"])
def test_peers_compute_the_same(name):
    network, x = small_network().eval(), torch.randn(2, 3, 16, 16)
    expected = inference.prepare(network, x).result()
    try:
        candidate = inference.PEERS[name](network, x, 1)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert distance(candidate.result(), expected) <= bound(network, torch.float32)


def test_a_peer_that_is_not_installed_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name: None)
    for name, install in {
        "OpenVINO": "openvino not installed: pip install openvino",
        "zentorch": "zentorch, deprecated, safetensors not installed: pip install zentorch deprecated safetensors",
        "ncnn": "ncnn, pnnx not installed: pip install ncnn pnnx",
        "MNN": "onnx, MNN not installed: pip install onnx MNN",
        "ExecuTorch": "executorch not installed: pip install executorch",
    }.items():
        with pytest.raises(Skipped, match=install):
            inference.PEERS[name](small_network(), torch.randn(1, 3, 8, 8), 1)


def test_a_zentorch_for_another_torch_is_skipped_with_both_releases(monkeypatch):
    monkeypatch.setattr(inference, "_require", lambda *packages: None)
    monkeypatch.setattr(inference.importlib.metadata, "version", lambda name: "1.99.0.1")
    with pytest.raises(Skipped, match=r"zentorch 1.99.0.1 is for torch 1.99, this is torch \d"):
        inference.PEERS["zentorch"](small_network(), torch.randn(1, 3, 8, 8), 1)


@pytest.mark.parametrize("name", ["ncnn", "MNN", "ExecuTorch"])
def test_an_engine_that_would_take_another_type_is_not_asked(name):
    with pytest.raises(Skipped, match="float32 alone, not bfloat16"):
        inference.PEERS[name](small_network(), torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), 1)


def test_a_converter_that_fails_is_told_in_one_line(tmp_path):
    with pytest.raises(Skipped, match="^its converter failed with status 3: no such thing$"):
        inference._run([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"], str(tmp_path))


def test_a_peer_that_raises_or_errs_is_told_and_the_others_go_on(monkeypatch):
    def raises(network, x, threads):
        raise ValueError("no\nsuch luck")

    def errs(network, x, threads):
        right = inference.prepare(network, x)
        return dataclasses.replace(right, result=lambda: right.result() * 1.1)

    monkeypatch.setitem(inference.PEERS, "ncnn", raises)
    monkeypatch.setitem(inference.PEERS, "MNN", errs)
    outcome = model.run(model.Case("resnet18", 1, 1), peers=["ncnn", "MNN", "eager channels-last"], seconds=0.0)
    assert set(outcome.timings) == {"eager", "convext", "eager channels-last"}
    assert outcome.skipped["ncnn"] == f"it raised ValueError: no (torch {torch.__version__})"
    assert outcome.skipped["MNN"].startswith("its result is 1.0e-01 away")


def test_a_training_step_moves_weights_and_result_puts_them_back():
    network = nn.Sequential(small_network(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    before = [p.clone() for p in network.parameters()]
    candidate = training.prepare(network, torch.randn(4, 3, 8, 8))
    first, second = candidate.result(), candidate.result()
    assert torch.equal(first, second) and first.norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    candidate.call()
    assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


# On a GPU, with a stand-in for one: CPU tensors, and events that read a clock which only calls advance.


class StandIn:
    """A device module, torch.cuda's part of it, in which a fill takes a second and `busy(s)` takes s."""

    def __init__(self, monkeypatch):
        self.now, self.fills = 0.0, 0
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        self.Event, self.synchronize = Event, lambda device=None: None
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: self)
        monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
        fill = torch.Tensor.fill_

        def counted_fill(t, value):
            self.fills += 1
            self.now += 1.0
            return fill(t, value)

        monkeypatch.setattr(torch.Tensor, "fill_", counted_fill)

    def busy(self, seconds):
        def call():
            self.now += seconds

        return call


def test_on_a_gpu_every_call_is_timed_alone_with_cold_caches(monkeypatch):
    gpu = StandIn(monkeypatch)
    calls = {"a": gpu.busy(0.25), "b": gpu.busy(0.5)}
    timings = timing.interleave_on_gpu(calls, torch.device("cpu"), seconds=0.0, min_rounds=6)
    assert timings["a"].seconds == (0.25,) * 6 and timings["b"].seconds == (0.5,) * 6
    assert gpu.fills == 12  # one before each timed call, outside of what is timed


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("depthwise", [False, True])
def test_what_stands_for_aten_on_a_gpu_computes_the_pass(pass_, fused, depthwise):
    if fused and pass_ != Pass.FPROP:
        return
    problem = ConvProblem(2, 8, 7, 6, 8, 3, 3, 2, 1, 1, 1, 1, 1, 8 if depthwise else 1)
    operands = operands_of(pass_, problem)
    theirs = layers._aten_call(pass_, Layer(problem), operands, fused)()
    if isinstance(theirs, tuple):
        theirs = next(t for t in theirs if t is not None)
    ours = layers._call("native", pass_, Layer(problem), operands, fused)()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_fused_rows_are_for_gpus():
    on_cpu = ConvProblem(1, 8, 7, 7, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    on_gpu = dataclasses.replace(on_cpu, device="cuda")
    assert [fused for *_, fused in layers.jobs({Layer(on_cpu): 1}, list(Pass))] == [False] * 3
    assert [(p, fused) for _, _, p, fused in layers.jobs({Layer(on_gpu): 2}, list(Pass))] == [
        (Pass.FPROP, False),
        (Pass.FPROP, True),
        (Pass.DGRAD, False),
        (Pass.WGRAD, False),
    ]


def test_table_has_a_column_for_each_backend_and_leaves_out_what_was_not_measured():
    problem = ConvProblem(1, 8, 7, 7, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    timings = {"aten": Timing((2.0,)), "triton": Timing((1.0,))}
    row = layers.Measurement(problem, 3, Pass.FPROP, timings, "triton", "v", {"native": "not built"}, fused=True)
    grid = layers.table([row], Ceilings("X", "products", flops=problem.flops / 0.5, copy_bytes=1e12))
    assert dict(zip(grid.columns, grid.rows[0])) == {
        "layer": "8×7×7 -> 8, 3×3", "n": "3", "pass": "fprop + bn + relu", "aten, ms": "2000.000", "native, ms": "–",
        "native, ×": "–", "triton, ms": "1000.000", "triton, ×": "2.00", "GFLOP/s": "0", "GB/s": "0.0",
        "of ceiling": "50% flops", "selected": "v"}  # fmt: skip
    modelled = dataclasses.replace(row, timings=timings | {"native": Timing((1.5,))}, off={}, predicted=1.25)
    other = layers.table([modelled, row])
    assert [dict(zip(other.columns, cells))["predicted, ms"] for cells in other.rows] == ["1250.000", "–"]
    assert modelled.as_json()["predicted_s"] == 1.25 and "predicted_s" not in row.as_json()
    assert "behind ATen on 0 of 1 layers" in layers.summary([row])


def test_ceilings_of_a_gpu_are_work_over_its_median_time(monkeypatch):
    gpu = StandIn(monkeypatch)
    gpu.get_device_properties = lambda device: types.SimpleNamespace(name="stand-in", total_memory=1)
    mm, copy = torch.mm, torch.Tensor.copy_
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (gpu.busy(0.5)(), mm(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: (gpu.busy(0.25)(), copy(*a)))
    found = machine.gpu_ceilings(torch.device("cpu"), torch.float32, size=4, copied=16)
    assert (found.where, found.flops, found.copy_bytes) == ("stand-in", 2 * 4**3 / 0.5, 2 * 16 / 0.25)


class TestResults:
    @pytest.fixture
    def tree(self, tmp_path):
        for name in (
            "csrc/core/a.h",
            "csrc/cpu/kernels/direct/b.cpp",
            "csrc/cuda/tile/c.h",
            "csrc/tests/d.cpp",
            "convext/triton/e.py",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        return tmp_path

    @pytest.mark.parametrize(("changed", "devices"), [
        ("csrc/core/a.h", {"cpu", "cuda"}), ("csrc/cpu/kernels/direct/b.cpp", {"cpu"}),
        ("csrc/cuda/tile/c.h", {"cuda"}), ("convext/triton/e.py", {"cuda"}), ("csrc/tests/d.cpp", set()),
    ])  # fmt: skip
    def test_hash_follows_the_kernels_of_the_device(self, tree, changed, devices):
        before = {device: machine.kernels(device, tree) for device in ("cpu", "cuda")}
        (tree / changed).write_text("other")
        assert {device for device, was in before.items() if machine.kernels(device, tree) != was} == devices

    def test_hash_follows_names_and_is_none_without_sources(self, tree, tmp_path_factory):
        before = machine.kernels("cuda", tree)
        (tree / "csrc/cuda/tile/c.h").rename(tree / "csrc/cuda/tile/f.h")
        assert machine.kernels("cuda", tree) != before
        assert machine.kernels("cuda", tmp_path_factory.mktemp("installed")) is None

    def test_a_file_says_whether_it_speaks_of_the_kernels_at_hand(self, tree):
        record = {
            "device": "cuda",
            "gpu": {"name": "NVIDIA H200"},
            "time": "then",
            "commit": "abc",
            "kernels": machine.kernels("cuda", tree),
        }
        results.write(tree / "r.json", record, [{"pass": "fprop"}])
        assert results.read(tree / "r.json")["results"] == [{"pass": "fprop"}]
        assert results.describe(tree / "r.json", tree) == (
            "NVIDIA H200, then, commit abc: of the kernels at hand",
            True,
        )
        (tree / "csrc/cuda/tile/c.h").write_text("other")
        line, current = results.describe(tree / "r.json", tree)
        assert not current and "of other kernels" in line and machine.kernels("cuda", tree) in line

    def test_what_cannot_be_told_is_not_current(self, tree):
        assert results.stale({"kernels": "0"}, tree / "nowhere") == "there is no source tree to compare with"
        assert results.stale({}, tree) == "which kernels were measured is not known"
        (tree / "r.json").write_text("[]")
        assert "holds no results" in results.describe(tree / "r.json", tree)[0]

    def test_record_names_the_kernels(self):
        assert machine.record()["kernels"] == machine.kernels("cpu")
