"""Calls that convext/_call serves (csrc/call/call.cpp): they give what the others give, and whatever makes a call more
than a plain one keeps it from being served."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import autograd, backends, fast_call, functional
from convext.backends import compiled_calls, native

pytestmark = pytest.mark.skipif(compiled_calls.library is None, reason="convext/_call is not there")

X, W, B = torch.randn(2, 4, 7, 6), torch.randn(8, 4, 3, 3), torch.randn(8)


def served(x=X, w=W, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return fast_call.conv2d(x, w, bias, stride, padding, dilation, groups)


@contextlib.contextmanager
def in_python():
    """Nothing is served."""
    former = functional._conv2d_again
    functional._conv2d_again = fast_call._computed_in_python
    try:
        yield
    finally:
        functional._conv2d_again = former


PROBLEMS = {
    "plain": ((2, 4, 7, 6), (8, 4, 3, 3), {}),
    "one value": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "pairs": ((1, 3, 9, 8), (5, 3, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}),
    "pointwise": ((2, 16, 8, 8), (16, 16, 1, 1), {}),
    "strided pointwise": ((2, 16, 8, 8), (8, 16, 1, 1), {"stride": 2}),
    "groups": ((2, 8, 6, 6), (12, 4, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 8, 6, 6), (8, 1, 3, 3), {"groups": 8, "padding": 1}),
    "many channels": ((1, 64, 12, 12), (64, 64, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("backend", [None, "native", "aten"])
@pytest.mark.parametrize("channels_last", ["", "x", "w", "xw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_served_is_what_python_computes(name, dtype, channels_last, backend):
    """Values, formats and gradients of every part, bit for bit. `channels_last`: which operands are."""
    x_size, w_size, settings = PROBLEMS[name]
    x, w, b = torch.randn(x_size, dtype=dtype), torch.randn(w_size, dtype=dtype), torch.randn(w_size[0], dtype=dtype)
    if "x" in channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if "w" in channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(F.conv2d(x, w, b, **settings))

    def results():
        found = [convext.conv2d(x, w, None, **settings), convext.conv2d(x, w, b, **settings)]
        for needed in range(1, 8):
            tensors = [t.detach().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate((x, w, b))]
            y = convext.conv2d(*tensors, **settings)
            found += [y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)]
        return found

    with convext.backend(backend):
        with in_python():
            expected = results()
        first, again = results(), results()
        assert served(x, w, b, **settings) is not None
    for found in (first, again):
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e) and a.stride() == e.stride() and a.requires_grad == e.requires_grad


class _Subclass(torch.Tensor):
    pass


class _Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _WatchOperators(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def _autocast_elsewhere():
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_plain_call_is_served():
    for weights in (W, torch.nn.Parameter(W), torch.nn.Parameter(W, requires_grad=False)):
        torch.testing.assert_close(served(w=weights), F.conv2d(X, W))
    with torch.no_grad():
        assert not served(w=W.clone().requires_grad_()).requires_grad
    with torch.device("meta"):
        assert served().device == X.device
    with torch.inference_mode():
        y = served()
        assert y.is_inference() and served(X.clone(), W.clone()) is not None
    assert served(y.narrow(1, 0, 4), W) is not None  # an inference tensor, outside


@pytest.mark.parametrize("around", [
    _Watch, _WatchOperators, torch._C._AutoDispatchBelowAutograd, lambda: torch.autocast("cpu", torch.bfloat16),
    _autocast_elsewhere,
], ids=["function mode", "dispatch mode", "below autograd", "autocast", "autocast elsewhere"])  # fmt: skip
def test_what_stands_around_a_call_keeps_it_from_being_served(around):
    with around():
        assert served() is None
    assert served() is not None


@pytest.mark.parametrize("change", [
    lambda x: x.as_subclass(_Subclass), lambda x: x.to("meta"), lambda x: x[0], lambda x: x.to(torch.int64),
    lambda x: x.to(torch.complex64), torch._neg_view, lambda x: x.rename("N", "C", "H", "W"), lambda x: x[:0],
], ids=["subclass", "meta", "unbatched", "integers", "complex", "negated", "named", "empty"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Named tensors")
def test_other_tensors_are_not_served(change):
    assert served(change(X)) is None
    assert served() is not None


def test_transforms_and_tracers_are_not_served():
    found = []

    def f(x):
        found.append(served(x))
        return convext.conv2d(x, W)

    torch.func.vmap(f)(X[None])
    torch.func.grad(lambda x: f(x).sum())(X)
    torch.func.jvp(f, (X,), (X,))
    torch._vmap_internals._vmap(f)(X[None])
    torch.jit.trace(f, (X,), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(f)(X)
    with forward_ad.dual_level():
        f(forward_ad.make_dual(X, X))
    assert len(found) >= 7 and all(y is None for y in found)


@pytest.mark.parametrize("arguments", [
    {"stride": [1, 1]}, {"stride": True}, {"padding": "same"}, {"dilation": (1,)}, {"stride": (1, 1, 1)},
    {"stride": 2**70}, {"stride": 2**40}, {"groups": True}, {"padding": (1, True)}, {"stride": torch.tensor(1)},
])  # fmt: skip
def test_unusual_arguments_are_not_served(arguments):
    assert served(**arguments) is None


@pytest.mark.parametrize("arguments", [
    {"stride": 0}, {"padding": -1}, {"groups": 3}, {"w": W[:, :3]}, {"bias": B[:3]}, {"w": W.double()},
    {"x": X[..., :2]},
])  # fmt: skip
def test_what_raises_raises_at_every_call(arguments):
    for _ in range(3):
        assert served(**arguments) is None
        with pytest.raises(RuntimeError, match="convext: "):
            convext.conv2d(arguments.get("x", X), arguments.get("w", W), arguments.get("bias"),
                           arguments.get("stride", 1), arguments.get("padding", 0), 1,
                           arguments.get("groups", 1))  # fmt: skip


def test_settings_count_at_once():
    backends.reset_counts()

    def who():
        before = backends.counts()
        convext.conv2d(X, W)
        return [key[0] for key, calls in backends.counts().items() if calls > before.get(key, 0)]

    assert who() == who() == ["native"]
    with convext.backend("aten"):
        assert who() == who() == ["aten"]
    assert who() == ["native"]
    with convext.backend("triton"), contextlib.suppress(RuntimeError):
        assert served() is None
    x, w = torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3)
    kernels = []
    for accuracy in ("fast", "direct", "fast"):
        with convext.accuracy(accuracy):
            backends.reset_counts()
            convext.conv2d(x, w, padding=1)
            kernels.append([*backends.counts()])
    assert kernels[0] == kernels[2] != kernels[1]


def test_every_call_counts():
    convext.conv2d(X, W)
    backends.reset_counts()
    w = W.clone().requires_grad_()
    for _ in range(3):
        convext.conv2d(X, w).sum().backward()
    by_pass = {key[1]: calls for key, calls in backends.counts().items()}
    assert by_pass == {"fprop": 3, "wgrad": 3}


def test_weights_that_change_are_seen():
    w, other = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    changes = [
        lambda: w.mul_(2),
        lambda: w.data.add_(1),
        lambda: w.numpy().fill(0.5),
        lambda: setattr(w, "data", other.clone()),
        lambda: torch.utils.swap_tensors(w, other),
        lambda: w.untyped_storage().copy_(torch.randn(8 * 36).untyped_storage()),
        lambda: w.set_(torch.randn(8, 4, 3, 3)),
    ]
    for change in changes:
        torch.testing.assert_close(convext.conv2d(X, w), F.conv2d(X, w))
        change()
        assert served(w=w) is not None
        torch.testing.assert_close(convext.conv2d(X, w), F.conv2d(X, w))


def test_weights_that_come_and_go_at_one_address():
    for i in range(50):
        w = torch.full((8, 4, 3, 3), float(i))
        torch.testing.assert_close(served(w=w), F.conv2d(X, w))
        del w
        gc.collect(0)


def test_views_of_weights():
    base = torch.randn(16, 4, 3, 3)
    for w in (base[:8], base[8:], base.view(-1)[:288].view(8, 4, 3, 3)):
        for _ in range(2):
            torch.testing.assert_close(convext.conv2d(X, w), F.conv2d(X, w))
            base.add_(1)


def test_profilers_see_the_operators():
    convext.conv2d(X, W)
    with torch.profiler.profile() as profile:
        convext.conv2d(X, W)
    assert any(event.key == "convext_cpu::fprop" for event in profile.key_averages())


# ---- the graph -------------------------------------------------------------------------------------------------------


def recorded(*needed):
    """x, w, bias with gradients where needed, and y."""
    tensors = [t.clone().requires_grad_(name in needed) for name, t in zip("xwb", (X, W, B))]
    y = served(*tensors)
    assert y is not None and y.requires_grad
    return *tensors, y


def test_the_node_of_the_graph():
    x, w, b, y = recorded("x", "w", "b")
    assert y.grad_fn.name() == type(y.grad_fn).__name__ == "Conv2dFunctionBackward"
    assert [node.name() for node, _ in y.grad_fn.next_functions] == ["torch::autograd::AccumulateGrad"] * 3
    heard = []
    y.grad_fn.register_prehook(heard.append)
    y.grad_fn.register_hook(lambda *found: heard.append(found))
    y.sum().backward()
    assert len(heard) == 2
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    *_, y = recorded("b")
    assert [node for node, _ in y.grad_fn.next_functions[:2]] == [None, None]


@pytest.mark.parametrize(("needed", "expected"), [("x", "w"), ("w", "x"), ("b", ""), ("xw", "xw")])
def test_only_what_a_gradient_reads_is_saved(needed, expected):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x, w, _, _ = recorded(*needed)
    assert [t.data_ptr() for t in saved] == [{"x": x, "w": w}[name].data_ptr() for name in expected]


def test_a_saved_tensor_that_was_written_raises():
    x, w, b, y = recorded("w")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("unpack", [
    lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.as_subclass(_Subclass), lambda t: t.clone(),
])  # fmt: skip
def test_what_hooks_on_saved_tensors_give_back(unpack):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = served(x, w)
    found = torch.autograd.grad(y.sum(), (x, w))
    for a, e in zip(found, torch.autograd.grad(F.conv2d(x, w).sum(), (x, w))):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), e)


def test_higher_derivatives():
    x, w, b = (t.double().requires_grad_() for t in (X, W, B))
    assert served(x, w, b) is not None
    assert torch.autograd.gradcheck(convext.conv2d, (x, w, b))
    assert torch.autograd.gradgradcheck(convext.conv2d, (x[:1, :, :4, :4].detach().requires_grad_(), w, b))


def test_gradients_of_any_strides():
    x, w, _, y = recorded("x", "w")
    for dy in (torch.ones(()).expand(y.shape), torch.randn(*y.shape[:3], 2 * y.shape[3])[..., ::2],
               torch.randn_like(y).contiguous(memory_format=torch.channels_last)):  # fmt: skip
        found = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
        for a, e in zip(found, torch.autograd.grad(F.conv2d(x, w), (x, w), dy)):
            torch.testing.assert_close(a, e)
            assert a.stride() == e.stride()


def test_a_batched_gradient_of_either_vmap():
    x, w, _, y = recorded("x", "w")
    dy = torch.randn(3, *y.shape)
    expected = [torch.stack(t) for t in zip(*(torch.autograd.grad(F.conv2d(x, w), (x, w), d) for d in dy))]
    for found in (torch.autograd.grad(y, (x, w), dy, is_grads_batched=True, retain_graph=True),
                  torch.func.vmap(lambda d: torch.autograd.grad(y, (x, w), d, retain_graph=True))(dy)):  # fmt: skip
        for a, e in zip(found, expected):
            torch.testing.assert_close(a, e)


def test_weights_whose_gradients_are_to_be_contiguous():
    x, w = X.contiguous(memory_format=torch.channels_last), W.clone().requires_grad_()
    assert torch.autograd.grad(convext.conv2d(x, w).sum(), w)[0].is_contiguous(memory_format=torch.channels_last)
    with autograd.contiguous_weight_gradients():
        assert served(x, w) is None and served(x, W) is not None
        y = convext.conv2d(x, w)
        threads = []
        thread = threading.Thread(target=lambda: threads.append(served(x, w)))
        thread.start()
        thread.join()
    assert torch.autograd.grad(y.sum(), w)[0].is_contiguous()
    assert threads[0] is not None and served(x, w) is not None


def test_a_graph_over_inference_tensors_is_refused_as_by_pytorch():
    with torch.inference_mode():
        x = X.clone()
    w = W.clone().requires_grad_()
    for function in (F.conv2d, convext.conv2d):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(x, w)


def test_anomaly_mode_tells_where_the_call_was():
    x = X.clone().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning, match="_anomaly_mode_tells"):
        y = convext.conv2d(x, W)
        with pytest.raises(RuntimeError, match="returned nan"):
            torch.autograd.grad(y, x, torch.full_like(y, float("nan")))


# ---- the table -------------------------------------------------------------------------------------------------------


def test_threads_that_call_while_the_table_is_emptied():
    weights = [torch.randn(8, 4, 3, 3) for _ in range(4)]
    expected = [F.conv2d(X, w) for w in weights]
    wrong, done = [], threading.Event()

    def call():
        for i in range(300):
            w = weights[i % 4].clone().requires_grad_(i % 2 == 0)
            y = convext.conv2d(X, w)
            if w.requires_grad:
                y.sum().backward()
            if not torch.allclose(y.detach(), expected[i % 4], atol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=call) for _ in range(3)]
    emptier = threading.Thread(target=lambda: [backends.forget() for _ in iter(lambda: done.wait(1e-3), True)])
    for thread in (*threads, emptier):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    emptier.join()
    assert not wrong


def test_more_problems_than_the_table_holds(monkeypatch):
    for height in range(3, 5000, 7):
        x = torch.ones(1, 1, height, 3)
        assert convext.conv2d(x, torch.ones(1, 1, 3, 3)).shape == (1, 1, height - 2, 1)


def test_a_kernel_that_is_no_more_taken_is_not_served(monkeypatch):
    """What forgets plans of the native backend alone reaches the table."""
    assert served() is not None
    monkeypatch.setattr(native.NativeCpu, "reject", lambda *_: "put aside")
    native.forget_plans()
    backends.forget()
    backends.reset_counts()
    convext.conv2d(X, W)
    assert [key[0] for key in backends.counts()] == ["aten"]
    monkeypatch.undo()
    backends.forget()


@pytest.mark.parametrize(("x", "w", "stride"), [
    (torch.ones(1, 2, 5, 5), torch.ones(3, 2, 1, 1), (2, 2)),
    (torch.ones(1, 2, 5, 3, dtype=torch.bfloat16), torch.ones(3, 2, 3, 3, dtype=torch.bfloat16), (2, 2)),
    (torch.ones(1, 2, 5, 5, dtype=torch.float16), torch.ones(3, 2, 1, 1, dtype=torch.float16), (1, 1)),
], ids=["writes past its memory", "leaves parts unwritten", "sums in float16"])  # fmt: skip
def test_where_aten_is_worked_around_python_computes_the_weight_gradient(x, w, stride):
    geom = stride, (0, 0), (1, 1), 1
    with convext.backend("aten"):
        assert fast_call.plan(x, w, None, geom, 2).wgrad is None
        assert fast_call.plan(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3), None, geom, 2).wgrad is not None


def test_another_release_of_torch_goes_without(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    library, why = compiled_calls._load()
    assert library is None and "runs with 9.9.9" in why
