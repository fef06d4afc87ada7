"""Whatever goes wrong in the middle, nothing is lost or left half done: the next call is right."""

import contextlib
import copy
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convext
from convext.bench.memory import free_memory
from convext.swap.planned import PlannedForward


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.ReLU())
        self.project = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.project(self.depthwise(self.expand(x)))


def twins():
    torch.manual_seed(0)
    plain = Net().double()
    return plain, convext.swap(copy.deepcopy(plain))


def state(model):
    return {module: (type(module), dict(module.__dict__)) for module in model.modules()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_interrupted_inside_a_swap(monkeypatch, error, at):
    """The model is as it was, and can be swapped."""
    plain, _ = twins()
    model, calls, attach = copy.deepcopy(plain), [], PlannedForward._attach

    def interrupted(self, owner):
        calls.append(owner)
        if len(calls) == at:
            raise error("now")
        attach(self, owner)

    before = state(model)
    monkeypatch.setattr(PlannedForward, "_attach", interrupted)
    with pytest.raises(error, match="now"):
        convext.swap(model)
    monkeypatch.undo()
    assert {m: (t, set(d)) for m, (t, d) in state(model).items()} == {m: (t, set(d)) for m, (t, d) in before.items()}
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(convext.swap(model)(x), plain(x), rtol=1e-10, atol=1e-10)


class Interrupted(BaseException):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_interrupted_anywhere_inside_steps():
    """A signal arrives at a moment of its own in each of many steps, and raises as control-C does; what the next whole
    step computes from the same parameters and statistics is what an unswapped model computes."""
    assert threading.current_thread() is threading.main_thread()
    plain, swapped = twins()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    saved = copy.deepcopy(plain.state_dict())

    def step(model):
        for parameter in model.parameters():
            parameter.grad = None
        y = model(x)
        y.square().sum().backward()
        with torch.no_grad():
            model.eval()
            evaluated = model(x)
            model.train()
        return [y.detach(), evaluated, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]

    expected = step(plain)

    def interrupt(*_):
        raise Interrupted

    former = signal.signal(signal.SIGALRM, interrupt)
    times, interrupted = 120, 0
    try:
        for i in range(times):
            if i % 4 == 0:
                swapped = convext.swap(copy.deepcopy(plain).train())  # in its first step it is captured, too
            swapped.load_state_dict(saved)
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 * 1.07**i)
                step(swapped)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
            swapped.train()
            swapped.load_state_dict(saved)
            for found, value in zip(step(swapped), expected, strict=True):
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert interrupted > times // 4


@pytest.mark.skipif(sys.platform != "linux", reason="what a process may map is limited by Linux's RLIMIT_AS")
def test_out_of_memory_inside_a_backward():
    script = """
        import copy, resource, torch, convext
        from torch import nn
        torch.set_num_threads(1)
        torch.manual_seed(0)
        plain = nn.Sequential(*(m for _ in range(4) for m in (
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())))
        model = convext.swap(copy.deepcopy(plain))
        convext.output_pool(0)
        x = torch.randn(1, 16, 512, 512)
        small = torch.randn(2, 16, 16, 16)
        model(small).sum().backward()
        before = copy.deepcopy(model.state_dict())
        y = model(x)
        pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + 2**22, resource.RLIM_INFINITY))
        try:
            y.square().sum().backward()
        except RuntimeError as error:
            print("said:", "memory" in str(error).lower())
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        del y
        model.load_state_dict(before)
        plain.load_state_dict(before)
        model.zero_grad()
        a, b = model(small), plain(small)
        a.square().sum().backward(), b.square().sum().backward()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * float(q.grad.abs().max()))
        print("right afterwards")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["said: True", "right afterwards"], done.stdout + done.stderr


def test_meta_tensors():
    """Shapes without memory, and a model built on the meta device and then given memory."""
    plain, swapped = twins()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    meta = convext.swap(copy.deepcopy(plain)).to("meta")
    y = meta(x.to("meta"))
    assert y.device.type == "meta" and y.shape == plain(x).shape
    with torch.device("meta"):
        built = convext.swap(Net().double())
    built.to_empty(device="cpu").load_state_dict(plain.state_dict())
    torch.testing.assert_close(built.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("empty", ["batch", "filters"])
def test_extents_of_zero(empty):
    """As PyTorch does: a result without elements, or its own error."""
    torch.manual_seed(0)
    filters = 0 if empty == "filters" else 4
    with pytest.warns(UserWarning) if filters == 0 else contextlib.nullcontext():  # initialising nothing
        layers = [nn.Conv2d(3, filters, 3), nn.BatchNorm2d(filters), nn.ReLU()]
    plain = nn.Sequential(*layers).eval()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(0 if empty == "batch" else 2, 3, 8, 8, requires_grad=True)

    def outcome(model):
        try:
            y = model(x)
            y.sum().backward()
            return y.shape, x.grad.shape
        except RuntimeError as error:
            return str(error).split("\nconvext: ")[0]

    assert outcome(swapped) == outcome(plain)


GIB = 2**30


def test_tensors_of_more_than_two_to_the_31_elements():
    """The result and both gradients at the far end of the memory, where an index of 32 bits would be another. One after
    the other; 13 GiB at most."""
    side, stride, padding = 23200, (8, 8), (1, 1)
    if free_memory(torch.device("cpu")) < 16 * GIB:
        pytest.skip("needs 16 GiB of free memory")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 4, 3, 3, generator=generator).bfloat16()
    crop = torch.randn(1, 4, 80, 80, generator=generator).bfloat16()
    exact_x, exact_w = crop.double().requires_grad_(), w.double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, None, stride, padding)
    exact_dy = torch.zeros_like(exact)
    exact_dy[..., -4:, -4:] = torch.randn(1, 4, 4, 4, generator=generator).bfloat16().double()
    exact.backward(exact_dy)

    def close(found, value):
        # The last rounding, to eight bits; sums of 36 and 16 products in float32 are far below it.
        value = value.detach()
        torch.testing.assert_close(found.double(), value, rtol=2**-8, atol=2**-8 * float(value.abs().max()) / 8)

    x = torch.empty(1, 4, side, side, dtype=torch.bfloat16, memory_format=torch.channels_last).zero_()
    assert x.numel() > 2**31
    x[..., -80:, -80:] = crop
    geom = (stride, padding, (1, 1), 1)
    with torch.no_grad(), convext.backend("native"):
        y = convext.conv2d(x, w, None, stride, padding)
        close(y[..., -4:, -4:], exact[..., -4:, -4:])
        dy = torch.zeros_like(y)
        dy[..., -4:, -4:] = exact_dy[..., -4:, -4:].bfloat16()
        close(torch.ops.convext.wgrad(dy, x, [3, 3], *geom), exact_w.grad)
        del x, y
        dx = torch.ops.convext.dgrad(dy, w, [side, side], *geom, True)
        assert dx.numel() > 2**31
        close(dx[..., -40:, -40:], exact_x.grad[..., -40:, -40:])
