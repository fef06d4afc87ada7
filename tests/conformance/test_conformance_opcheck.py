"""torch.library.opcheck for every operator in torch.ops.convext, and fake against real strides, which opcheck does not
compare on the CPU."""

import pytest
import torch
from cases import BY_NAME, PROBLEMS
from places import BACKENDS, backends, on_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

import convext
from convext.problem import ACTIVATIONS


def flat(case):
    """The case's geom as the schemas take it."""
    stride, padding, dilation, groups = case.geom
    return [*stride], [*padding], [*dilation], groups


def per_channel(case, count):
    return [torch.rand(case.w[0]) + 0.5 for _ in range(count)]


def fprop(case, o):
    yield (o.x, o.w, o.bias, *flat(case))
    yield (o.x, o.w, o.bias, *flat(case), True)


def dgrad(case, o):
    yield (o.dy, o.w, case.x[2:], *flat(case))
    yield (o.dy, o.w, case.x[2:], *flat(case), True)


def wgrad(case, o):
    yield (o.dy, o.x, case.w[2:], *flat(case))


def conv_bn_act(case, o):
    mean, var, gamma, beta = per_channel(case, 4)
    yield (o.x, o.w, o.bias, mean, var, gamma, beta, torch.randn_like(o.dy), 1e-5, "silu", *flat(case))
    yield (o.x, o.w, None, mean, var, None, None, None, 1e-3, "identity", *flat(case), True)
    yield (o.x, o.w, o.bias, None, None, None, None, None, 1e-5, "gelu", *flat(case))


def conv_bn_act_train(case, o):
    gamma, beta = per_channel(case, 2)
    yield (o.x, o.w, o.bias, None, None, gamma, beta, torch.randn_like(o.dy), 1e-5, "hardswish", *flat(case))
    yield (o.x, o.w, *[None] * 6, 1e-5, "silu", *flat(case))


def batch_stats(case, o):
    yield (o.dy,)


def bn_act(case, o):
    mean, var, gamma, beta = per_channel(case, 4)
    for activation in ACTIVATIONS:
        yield (o.dy, mean, var, gamma, beta, torch.randn_like(o.dy), 1e-5, activation)
    yield (o.dy, mean, var, None, None, None, 1e-5, "relu")


def bn_act_backward(case, o):
    mean, var, gamma, beta = per_channel(case, 4)
    dout, residual = torch.randn_like(o.dy), torch.randn_like(o.dy)
    for training in (False, True):
        yield (dout, o.dy, mean, var, gamma, beta, residual, 1e-5, "silu", training)
        yield (dout, o.dy, mean, var, None, None, None, 1e-5, "identity", training)


# Arguments for each operator, from a case and its operands. A new operator needs an entry: `test_every_operator...`.
SAMPLES = {
    f.__name__: f for f in (fprop, dgrad, wgrad, conv_bn_act, conv_bn_act_train, batch_stats, bn_act, bn_act_backward)
}
# opcheck traces with symbolic sizes, seconds a call: two cases that differ in groups and in memory format.
CASES = [BY_NAME["groups_with_multiplier"], BY_NAME["channels_last_everything"]]


def test_every_operator_has_samples():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("convext::")}
    # `planned` computes what its text says, which the backend of torch.compile writes: tests/dynamo.
    assert registered - {"convext::planned"} == {f"convext::{name}" for name in SAMPLES}


def recorded(arguments):
    """The arguments with gradients asked for."""
    return tuple(
        t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, case):
    operator = getattr(torch.ops.convext, name).default
    first, *others = SAMPLES[name](case, case.operands())
    torch.library.opcheck(operator, recorded(first))
    for arguments in (first, *others):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", on_gpu("native", "triton"))
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_there(name, backend):
    first, *others = SAMPLES[name](CASES[1], CASES[1].operands())
    with convext.backend(backend):
        torch.library.opcheck(getattr(torch.ops.convext, name).default, recorded(first))


def described(results):
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(t.shape), strides(t), t.dtype, t.device.type) for t in results]


def strides(t):
    """Strides, but for extents of 1, where any stride means the same."""
    return [stride for extent, stride in zip(t.shape, t.stride(), strict=True) if extent > 1]


# A batch norm of no values is not defined: the public functions do not let one reach these operators.
DEFINED = [(name, case) for case in PROBLEMS for name in SAMPLES if case.x[0] or name in ("fprop", "dgrad", "wgrad")]


@backends("native")  # the interpreter's suite does so for Triton
@pytest.mark.parametrize(("name", "case"), DEFINED, ids=str)
def test_fake_strides_are_the_real_ones(name, case, backend):
    operator = getattr(torch.ops.convext, name).default
    with convext.backend(backend):
        for arguments in SAMPLES[name](case, case.operands()):
            real = operator(*arguments)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
                fake = operator(*fakes)
            assert described(fake) == described(real)


@BACKENDS
def test_compiles_without_a_graph_break(backend):
    """Through the fake kernels and the registered gradients, with sizes that change."""
    with convext.backend(backend):
        compiled = torch.compile(
            lambda x, w: convext.conv2d(x, w, padding=1).relu(), fullgraph=True, backend="aot_eager", dynamic=True
        )
        for size in (5, 8):
            x, w = torch.randn(2, 4, size, size, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
            expected = torch.nn.functional.conv2d(x, w, padding=1).relu()
            actual = compiled(x, w)
            torch.testing.assert_close(actual, expected)
            gradients = [torch.autograd.grad(y.square().sum(), (x, w)) for y in (actual, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_exports(backend):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = convext.nn.ConvBNReLU(4, 6, 3, padding=1)

        def forward(self, x):
            return self.block(x)

    layer, x = Layer().eval(), torch.randn(2, 4, 5, 5)
    with convext.backend(backend), torch.no_grad():
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), layer(x))
    assert any("convext" in str(node.target) for node in exported.graph.nodes)
