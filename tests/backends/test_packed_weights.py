"""Packed weights are never another geometry's, never those of memory that is gone, and follow every change of the
weights: at once where torch or a whole filter tells, within the lines of a filter otherwise."""

import copy
import gc
import multiprocessing
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convext
from convext.backends import native, native_sequence

LINE = 64  # bytes: csrc/cpu/runtime/packed_weight.h


@pytest.fixture(autouse=True)
def plain_sums():
    """Whether weights are stale is asked here, not how Winograd rounds; its packings are in test_winograd_packings."""
    with convext.accuracy("direct"):
        yield


EPS = 2**-23


def sum_error(terms, magnitude):
    """Bound of the error of a float32 sum of so many terms, whose magnitudes add up to `magnitude` at most: it grows as
    the square root of their number, 4 is room, another 4 steps for the epilogue (docs/design.md)."""
    return 4 * EPS * (terms**0.5 + 4) * magnitude


def operands(k, c, r, channels_last=False, groups=1, dtype=torch.float32):
    w = torch.rand(k, c // groups, r, r, dtype=dtype) * 2 - 1
    if channels_last:
        w = w.to(memory_format=torch.channels_last)
    return nn.Parameter(w), torch.rand(2, c, 9, 9, dtype=dtype) * 2 - 1


def lines_of_a_filter(w):
    size = w[0].numel() * w.element_size()
    return 1 if size <= LINE else -(-size // LINE)


# How a convolution is called: by itself, its gradient alone, or within a sequence.


class Single:
    def __init__(self, w, x, **settings):
        self.w, self.x, self.settings = w, x, settings

    def __call__(self):
        with torch.no_grad(), convext.backend("native"):
            return convext.conv2d(self.x, self.w, **self.settings)

    def expected(self):
        """In float64."""
        with torch.no_grad():
            return F.conv2d(self.x.double(), self.w.double(), **self.settings)

    def error(self):
        """What a result may be off."""
        w = self.w.detach().double().abs()
        return sum_error(w[0].numel(), (w.sum((1, 2, 3)).max() * self.x.abs().max()).item())


class Gradient(Single):
    """dgrad, whose packing is another one."""

    def _gradient(self, conv2d, dtype):
        x = self.x.detach().to(dtype).requires_grad_()
        y = conv2d(x, self.w.to(dtype), **self.settings)
        dy = torch.rand(y.shape, generator=torch.Generator().manual_seed(1), device="cpu") * 2 - 1
        return torch.autograd.grad(y, x, dy.to(dtype))[0]

    def __call__(self):
        with convext.backend("native"):
            return self._gradient(convext.conv2d, self.w.dtype)

    def expected(self):
        return self._gradient(F.conv2d, torch.float64)

    def error(self):
        w = self.w.detach().double().abs()
        return sum_error(w[:, 0].numel(), w.sum((0, 2, 3)).max().item() * self.settings.get("groups", 1))


class Sequence(Single):
    """In a swapped model, whose layers run in one call."""

    def __init__(self, w, x, **settings):
        super().__init__(w, x, **settings)
        k, c, r, _ = w.shape
        groups = settings.get("groups", 1)
        conv = nn.Conv2d(c * groups, k, r, padding=settings.get("padding", 0), groups=groups, bias=False)
        conv.weight = w
        self.model = convext.swap(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(k, 8, 1), nn.ReLU()).eval())
        self.last = copy.deepcopy(self.model[2]).double()

    def __call__(self):
        with torch.no_grad(), convext.backend("native"):
            return self.model(self.x)

    def expected(self):
        with torch.no_grad():
            return F.relu(self.last(F.relu(super().expected())))

    def error(self):
        w, last = self.w.detach().double().abs(), self.last.weight.detach().abs().sum((1, 2, 3)).max().item()
        largest = (w.sum((1, 2, 3)).max() * self.x.abs().max()).item()
        return super().error() * last + sum_error(len(w) + 1, largest * last + 1)


WAYS = [Single, Gradient, Sequence]


def apart(call):
    """How far a call's result is from the right one, as a multiple of what it may be."""
    return ((call() - call.expected()).abs().max() / call.error()).item()


def agree(call):
    assert apart(call) <= 1


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request):
    return request.param


# One weight, many geometries.

WEIGHTS = [(64, 32, 3), (64, 16, 1), (32, 1, 5), (48, 4, 3), (128, 64, 1)]


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_one_weight_with_many_groups(shape):
    k, c, r = shape
    w = nn.Parameter(torch.rand(k, c, r, r) * 2 - 1)
    groups = [g for g in (1, 2, 4, 8, 32) if k % g == 0]
    settings = [
        dict(groups=g, stride=s, dilation=d, padding=d * (r // 2)) for g in groups for s in (1, 2) for d in (1, 2)
    ]
    for setting in settings + settings[::-1]:
        x = torch.rand(1, c * setting["groups"], 12, 12) * 2 - 1
        for kind in (Single, Gradient):
            agree(kind(w, x, **setting))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_winograd_packings_and_those_of_other_arithmetic_are_apart(dtype):
    """A weight is called under every accuracy, instruction set and, as float32, with inputs of two types."""
    w, x = operands(64, 64, 3, dtype=dtype)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    eps = torch.finfo(dtype).eps if dtype is not torch.float64 else 2**-40
    from convext.backends.native import _C

    best = _C.best_isa()
    try:
        for isa in ("portable", "avx2", "avx512", "avx512_bf16", "portable"):
            try:
                _C.set_isa(isa)
            except ValueError:
                continue
            native.forget_plans()
            for accuracy in ("direct", "strict", "fast", "direct"):
                with convext.accuracy(accuracy), convext.backend("native"), torch.no_grad():
                    y = convext.conv2d(x, w, padding=1)
                assert (y.double() - exact).abs().max() < 64 * eps * 576**0.5
    finally:
        _C.set_isa(best)
        native.forget_plans()


# Changes that no version tells.


def scale_by_numpy(w):
    w.detach().numpy()[...] *= -2


def some_filters_through_data(w):
    w.data[1:4] = 0.5


def new_data(w):
    new = w.detach().clone()
    new[2] += 1
    w.data = new


def new_data_of_other_strides(w):
    w.data = w.data.transpose(2, 3)


def clamped(w):
    w.data.clamp_(-0.1, 0.1)


def set_to_other_memory(w):
    with torch.no_grad():
        w.set_(torch.rand_like(w))


def exchanged_filters(w):
    w.data.copy_(w.data.flip(0).clone())


def swapped_tensors(w):
    torch.utils.swap_tensors(w, nn.Parameter(torch.rand_like(w)))


def one_element_of_each_filter_in_sight(w):
    """The first line of every filter, then everything else: what was looked at last is not what has changed."""
    w.data.flatten(1)[:, -1] += 1
    w.data.flatten(1)[:, :1] -= 1
    w.data += 0.25


CHANGES = [
    scale_by_numpy,
    some_filters_through_data,
    new_data,
    new_data_of_other_strides,
    clamped,
    set_to_other_memory,
    exchanged_filters,
    swapped_tensors,
    one_element_of_each_filter_in_sight,
]
SHAPES = [(64, 64, 3), (32, 3, 7), (48, 8, 1), (40, 24, 1)]
CASES = [
    (change, shape)
    for change in CHANGES
    for shape in SHAPES
    if not (change is new_data_of_other_strides and shape[2] == 1)
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("change, shape", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_change_of_whole_filters_is_seen_by_the_next_call(way, change, shape, channels_last):
    k, c, r = shape
    w, x = operands(k, c, r, channels_last)
    call = way(w, x, padding=r // 2)
    for _ in range(3):
        agree(call)
    before = call.expected()
    change(w)
    assert (call.expected() - before).abs().max() > 10 * call.error(), "the change changed nothing"
    for _ in range(3):
        agree(call)
    change(w)
    agree(call)


def test_depthwise_weights_are_compared_whole(way):
    w, x = operands(32, 32, 3, groups=32)
    call = way(w, x, padding=1, groups=32)
    agree(call)
    for i in (0, 5, 100, w.numel() - 1):
        w.data.view(-1)[i] += 1
        agree(call)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 32, 3), (40, 24, 1), (16, 3, 7), (32, 16, 1), (64, 8, 1)], ids=str)
def test_a_single_element_through_data_is_seen_within_the_lines_of_a_filter(way, shape, channels_last):
    """The limit that the README states; nothing else about the weight has changed."""
    k, c, r = shape
    w, x = operands(k, c, r, channels_last)
    call, lines = way(w, x, padding=r // 2), lines_of_a_filter(w)
    agree(call)
    for i in torch.randint(w.numel(), (8,)).tolist():
        place = torch.unravel_index(torch.tensor(i), w.shape)
        w.data[place] += 1
        for _ in range(lines - 1):
            call()
        agree(call)


@pytest.mark.parametrize("what", ["model", "tensor"])
def test_refresh_has_the_next_call_see_a_single_element(way, what):
    w, x = operands(64, 64, 3)
    call = way(w, x, padding=1)
    late = 0
    for i in range(6):
        agree(call)
        w.data.view(-1)[(7919 * i + 5) % w.numel()] += 1
        late += apart(call) > 1  # in general too early to tell
        w.data.view(-1)[(7919 * i + 5000) % w.numel()] += 1
        holder = nn.Module()
        holder.w = w
        if what == "model":
            assert convext.refresh(holder) is holder
        else:
            assert convext.refresh(w) is w
        agree(call)
    assert late > 0, "every element was seen at once: this test could not fail"


@pytest.mark.parametrize("wrong", [None, 3, "model", [torch.ones(1)]], ids=repr)
def test_refresh_says_what_it_wants(wrong):
    with pytest.raises(TypeError, match="refresh: model must be an nn.Module or a Tensor, got " + type(wrong).__name__):
        convext.refresh(wrong)


def test_refresh_takes_what_has_no_packed_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert convext.refresh(model) is model
    for t in (torch.ones(()), torch.empty(0), torch.ones(2, 2).to_sparse(), torch.empty(3, device="meta")):
        assert convext.refresh(t) is t


def write_elsewhere(w, done):
    w.data[3:5] = 0.25
    done.set()


def test_a_change_by_another_process_is_seen(way):
    w, x = operands(32, 32, 3)
    call = way(w, x, padding=1)
    agree(call)
    w.share_memory_()
    agree(call)
    context = multiprocessing.get_context("spawn")
    done = context.Event()
    process = context.Process(target=write_elsewhere, args=(w.detach(), done))
    process.start()
    process.join()
    assert done.is_set() and process.exitcode == 0
    assert (w[3:5] == 0.25).all()
    agree(call)


@pytest.mark.parametrize(
    "change",
    [new_data, new_data_of_other_strides, set_to_other_memory, swapped_tensors],
    ids=lambda change: change.__name__,
)
def test_a_sequence_follows_its_tensors_without_dlpacks_table(change, monkeypatch):
    """As under a torch that does not offer it."""
    monkeypatch.setattr(native_sequence, "places", lambda compiled, tensors: native_sequence._PlacesInPython(tensors))
    w, x = operands(64, 64, 3)
    call = Sequence(w, x, padding=1)
    for _ in range(3):
        agree(call)
        change(w)
    agree(call)


# The cache and the life of the weights.


def test_nothing_hangs_on_the_tensor(way):
    w, x = operands(32, 32, 3)
    call = way(w, x, padding=1)
    agree(call)
    assert not weakref.getweakrefs(w)
    assert not vars(w)
    assert w._use_count() == 1  # torch refuses to exchange tensors that others hold


def test_a_module_converts_by_swapping_its_tensors():
    model = convext.swap(
        nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.ReLU()
        ).eval()
    )
    x = torch.rand(1, 16, 8, 8)
    former = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float64):
            model.to(dtype)
            given = x.to(dtype)
            for _ in range(2):
                with torch.no_grad(), convext.backend("native"):
                    y = model(given)
            expected = convext.revert(copy.deepcopy(model)).double()
            with torch.no_grad():
                tolerance = 2**-40 if dtype is torch.float64 else 64 * torch.finfo(dtype).eps
                torch.testing.assert_close(y.double(), expected(given.double()), rtol=tolerance, atol=tolerance)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(former)


def test_memory_is_given_back_when_weights_are_gone(way):
    gc.collect()
    before, storages = native.packed_bytes(), len(native._packed)
    for _ in range(20):
        w, x = operands(64, 64, 3)
        call = way(w, x, padding=1)
        agree(call)
        held = native.packed_bytes() - before
        assert 0 < held <= 4 * w.numel() * 4  # one weight's alone: its own packings and the second layer's
        del w, call
        gc.collect()
        assert native.packed_bytes() == before and len(native._packed) == storages


def test_replaced_data_frees_what_was_packed_of_it(way):
    w, x = operands(64, 64, 3)
    call = way(w, x, padding=1)
    gc.collect()
    agree(call)
    once = native.packed_bytes()
    for _ in range(10):
        w.data = torch.rand_like(w)
        agree(call)
    assert native.packed_bytes() == once
    w.data = torch.empty(0)  # what frees the memory of a model that is put aside
    assert native.packed_bytes() < once


def test_tensors_that_come_and_go_over_one_memory_leave_little_behind():
    memory = torch.rand(64, 32, 3, 3)
    x = torch.rand(1, 32, 8, 8)
    gc.collect()
    before, alive = native.packed_bytes(), []
    with torch.no_grad(), convext.backend("native"):
        for i in range(40):
            memory[i % 64] = i
            alive.append(nn.Parameter(memory))
            torch.testing.assert_close(convext.conv2d(x, alive[-1]), F.conv2d(x, memory), rtol=1e-5, atol=1e-3)
    assert native.packed_bytes() - before <= 5 * memory.numel() * 4


def test_another_tensor_at_the_address_of_a_former_one_is_another_weight(way):
    """They differ in one element, which no line at hand need show, and in nothing else that is seen from outside."""
    content, x = operands(64, 64, 3)
    content = content.detach()
    again = 0
    addresses = set()
    w = nn.Parameter(content.clone())
    call = way(w, x, padding=1)
    for i in range(30):
        agree(call)
        again += w.data_ptr() in addresses
        addresses.add(w.data_ptr())
        w.data = torch.empty(0)  # its memory is free now
        content.view(-1)[(7919 * i) % content.numel()] += 1
        w.data = content.clone()
    assert again > 0, "no address came back: this test could not fail"


def test_inference_tensors_and_views_are_followed():
    x = torch.rand(1, 16, 8, 8)
    with torch.inference_mode(), convext.backend("native"):
        w = torch.rand(32, 16, 3, 3)
        for i in range(4):
            torch.testing.assert_close(convext.conv2d(x, w), F.conv2d(x, w), rtol=1e-5, atol=1e-4)
            w[i] += 1
    base = torch.rand(64, 16, 3, 3)
    with torch.no_grad(), convext.backend("native"):
        for i in range(4):
            for part in (base[:32], base[16:48], base[32:], base.detach()[:32]):
                torch.testing.assert_close(convext.conv2d(x, part), F.conv2d(x, part), rtol=1e-5, atol=1e-4)
            base[8 * i] += 1


def test_another_default_device_changes_nothing(way):
    w, x = operands(32, 32, 3)
    call = way(w, x, padding=1)
    with torch.device("meta"):
        y = call()
    assert y.device.type == "cpu"
    assert (y - call.expected()).abs().max() <= call.error()


# Threads.


def test_threads_that_share_a_changing_weight_never_see_half_of_it(way):
    """All weights are one number, which one thread changes while no other calls, so that each result is of one number
    too; then all call at once."""
    w, x = operands(64, 64, 3)
    x = torch.ones_like(x)[:, :, :3, :3]
    calls = [way(w, x) for _ in range(3)]
    for call in calls:
        call()
    # A thread that makes a leaf's gradient accumulator in an operator waits for the interpreter, one in a Function's
    # apply holds that and waits for the former's lock: PyTorch stands still. While this is alive, nobody makes one.
    accumulator = w.expand_as(w).grad_fn
    turns, wrong = 12, []
    barrier = threading.Barrier(len(calls), timeout=120)

    def work(call, index):
        try:
            torch.set_num_threads(1)
            for turn in range(turns):
                if index == 0:
                    w.data.fill_((turn % 7 + 1) / 8)
                barrier.wait()
                for _ in range(3):
                    agree(call)
                barrier.wait()
        except Exception as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(call, i)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del accumulator
    assert not wrong, wrong[0]


def test_two_tensors_of_one_memory_in_two_threads_keep_apart():
    """Their strides differ: each thread packs its own order of the same memory, while the other's kernel runs."""
    memory = torch.rand(64, 64, 3, 3) * 2 - 1
    one, two = nn.Parameter(memory), nn.Parameter(memory.transpose(2, 3))
    x = torch.rand(1, 64, 12, 12) * 2 - 1
    wrong = []

    def work(w):
        torch.set_num_threads(1)
        call = Single(w, x)
        expected, error = call.expected(), call.error()
        for _ in range(60):
            off = (call() - expected).abs().max().item()
            if off > error:
                wrong.append(off)

    threads = [threading.Thread(target=work, args=(w,)) for w in (one, two, one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class InItsOwnLibrary(torch.optim.SGD):
    """Writes as those do that step in C++ of their own: torch is not told."""

    def __init__(self, params):
        super().__init__(params, lr=0.05)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
        InItsOwnLibrary,
    ],
)
def test_steps_of_fused_optimizers_are_seen(optimizer, channels_last):
    """They leave version counters alone, and here every filter's first and last line: taps that meet only padding,
    channels that are zero."""
    model = nn.Sequential(nn.Conv2d(64, 24, 5, padding=4, dilation=2, bias=False), nn.ReLU()).double().float()
    x = torch.randn(2, 64, 4, 7)
    x[:, :16] = x[:, 48:] = 0
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    swapped = convext.swap(model)
    with convext.backend("native"):
        opt = optimizer(list(swapped.parameters()))
        for _ in range(4):
            w = swapped[0].weight.detach()
            y = swapped(x)
            expected = F.conv2d(x.double(), w.double(), padding=4, dilation=2).relu()
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-3)  # a step changes it by more than 0.1
            opt.zero_grad()
            (y * y).sum().backward()
            before = y.detach()
            opt.step()
            with torch.no_grad():
                assert (F.conv2d(x, swapped[0].weight, padding=4, dilation=2).relu() - before).abs().max() > 0.1
