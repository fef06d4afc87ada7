"""First and second derivatives of every public function, checked numerically; forward mode right or refusing.

Numerical derivatives mean nothing on the kink of an activation, so the inputs are drawn until no pre-activation lies
near one: `away_from_kinks` searches, and says so where it finds nothing. First derivatives are checked element by
element, second ones along random directions (`fast_mode`), which is what keeps this within seconds.
"""

import pytest
import torch
import torch.nn.functional as F
from places import BACKENDS
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import convext

# Where each activation, or its derivative, is not differentiable.
KINKS = {"identity": (), "relu": (0,), "relu6": (0, 6), "silu": (), "hardswish": (-3, 3), "gelu": ()}
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
MARGIN = 1e-3  # gradcheck steps by 1e-6, and a batch norm divides by a standard deviation near 1


def doubles(*shapes, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu") for shape in shapes]
    return [t.to(torch.get_default_device()).requires_grad_() for t in drawn]


CONVOLUTIONS = {
    "conv2d": (convext.conv2d, (2, 4, 4, 3), (2, 2, 3, 2), dict(stride=(2, 1), padding=(1, 2), groups=2)),
    "conv2d_same_even_kernel": (convext.conv2d, (1, 2, 3, 4), (2, 2, 2, 4), dict(padding="same")),
    "conv2d_unbatched": (convext.conv2d, (2, 4, 3), (2, 2, 3, 3), dict(padding=1)),
    "conv2d_strided_dgrad_hole": (convext.conv2d, (1, 2, 6, 5), (2, 2, 1, 2), dict(stride=(3, 3))),
    "conv2d_pointwise": (convext.conv2d, (2, 3, 3, 3), (4, 3, 1, 1), {}),
    "depthwise_conv2d": (convext.depthwise_conv2d, (2, 3, 5, 4), (3, 1, 3, 3), dict(stride=2, padding=1)),
    "depthwise_conv2d_multiplier": (convext.depthwise_conv2d, (1, 2, 4, 4), (6, 1, 3, 2), dict(padding=1)),
    "dilated_conv2d": (convext.dilated_conv2d, (1, 2, 5, 5), (2, 2, 3, 3), dict(padding=2, dilation=(2, 3))),
}  # fmt: skip


def convolution(name):
    function, x_shape, w_shape, arguments = CONVOLUTIONS[name]
    inputs = doubles(x_shape, w_shape, w_shape[:1])
    return (lambda x, w, bias: function(x, w, bias, **arguments)), inputs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@BACKENDS
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, backend, served_by):
    function, inputs = convolution(name)
    with convext.backend(backend), served_by(backend):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)


@BACKENDS
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_convolution_where_only_some_inputs_need_gradients(needed, backend):
    function, inputs = convolution("conv2d")
    for index, t in enumerate(inputs):
        t.requires_grad_(index in needed)
    with convext.backend(backend):
        assert gradcheck(function, inputs)
        # Linear in each input alone: only a product of two has second derivatives.
        assert needed == (2,) or gradgradcheck(function, inputs, fast_mode=True)


def batch_norm(x, w, bias, gamma, beta, residual, mean, var, training, activation, geometry):
    """The formula of `conv_bn_relu` in PyTorch's own functions, up to the activation and past it."""
    z = F.batch_norm(F.conv2d(x, w, bias, **geometry), mean, var, gamma, beta, training)
    z = z if residual is None else z + residual
    return z, ACTIVATIONS[activation](z)


def away_from_kinks(activation, training, residual, affine, geometry):
    """Inputs (x, w, bias, gamma, beta, residual) and running statistics, no pre-activation within MARGIN of a kink."""
    statistics = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
    for seed in range(200):
        x, w, bias, gamma, beta, r = doubles((2, 2, 3, 3), (3, 2, 2, 3), 3, 3, 3, (2, 3, 2, 3), seed=seed)
        inputs = [x, w, bias, gamma if affine else None, beta if affine else None, r if residual else None]
        with torch.no_grad():
            if affine:
                gamma.mul_(4)  # reaches both ends of relu6 and hardswish
            z, _ = batch_norm(*inputs, *(s.clone() for s in statistics), training, activation, geometry)
        if all((z - kink).abs().min() > MARGIN for kink in KINKS[activation]):
            return inputs, statistics
    raise AssertionError(f"no seed keeps {activation} away from its kinks")


GEOMETRY = dict(stride=(1, 1), padding=(0, 1))


def fused(activation, training, statistics, geometry=GEOMETRY):
    def function(x, w, bias, gamma, beta, residual):
        mean, var = (s.clone() for s in statistics)
        return convext.conv_bn_relu(
            x, w, bias, mean, var, gamma, beta, **geometry, training=training, activation=activation, residual=residual
        )

    return function


@BACKENDS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_bn_relu(activation, residual, training, backend, served_by):
    inputs, statistics = away_from_kinks(activation, training, residual, True, GEOMETRY)
    function = fused(activation, training, statistics)
    with convext.backend(backend), served_by(backend):
        torch.testing.assert_close(
            function(*inputs),
            batch_norm(*inputs, *(s.clone() for s in statistics), training, activation, GEOMETRY)[1],
        )
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)


@BACKENDS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_conv_bn_relu_without_affine_or_bias(training, backend):
    (x, w, _, _, _, _), statistics = away_from_kinks("silu", training, False, False, GEOMETRY)
    function = fused("silu", training, statistics)
    with convext.backend(backend):
        assert gradcheck(function, [x, w, None, None, None, None])
        assert gradgradcheck(function, [x, w, None, None, None, None], fast_mode=True)


@BACKENDS
@pytest.mark.parametrize("needed", [(0,), (1,), (3,), (4,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_conv_bn_relu_where_only_some_inputs_need_gradients(training, needed, backend):
    inputs, statistics = away_from_kinks("relu6", training, True, True, GEOMETRY)
    for index, t in enumerate(inputs):
        t.requires_grad_(index in needed)
    with convext.backend(backend):
        assert gradcheck(fused("relu6", training, statistics), inputs)


@BACKENDS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_module(momentum, training, backend):
    module = convext.nn.ConvBNReLU(2, 3, 3, padding=1, momentum=momentum, activation="gelu").double().train(training)
    parameters = {name: t.detach().requires_grad_() for name, t in module.named_parameters()}
    buffers = dict(module.named_buffers())
    (x,) = doubles((2, 2, 4, 3))

    def function(x, *values):
        state = dict(zip(parameters, values, strict=True)) | {name: t.clone() for name, t in buffers.items()}
        return torch.func.functional_call(module, state, (x,))

    with convext.backend(backend):
        assert gradcheck(function, [x, *parameters.values()])
        assert gradgradcheck(function, [x, *parameters.values()], fast_mode=True)


def jvp_or_refusal(function, inputs):
    """The tangent of `function` along ones, or the words of the exception it refuses with."""
    with forward_ad.dual_level():
        duals = [None if t is None else forward_ad.make_dual(t.detach(), torch.ones_like(t)) for t in inputs]
        try:
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
        except (RuntimeError, NotImplementedError) as error:
            return str(error)
    assert tangent is not None, "forward mode gave no tangent and no error: read as zero, and wrong"
    return tangent


@BACKENDS
@pytest.mark.parametrize("name", ["conv2d", "depthwise_conv2d", "dilated_conv2d"])
def test_forward_mode_of_convolution_is_right_or_refuses(name, backend):
    function, inputs = convolution(name)
    with convext.backend(backend):
        result = jvp_or_refusal(function, inputs)
        if isinstance(result, str):
            assert "forward" in result.lower() or "jvp" in result, result
        else:
            step = 1e-6
            ahead, behind = (function(*(t.detach() + sign * step for t in inputs)) for sign in (1, -1))
            torch.testing.assert_close(result, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@BACKENDS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_forward_mode_of_conv_bn_relu_is_right_or_refuses(training, backend):
    inputs, statistics = away_from_kinks("relu", training, True, True, GEOMETRY)
    function = fused("relu", training, statistics)
    with convext.backend(backend):
        result = jvp_or_refusal(function, inputs)
        if isinstance(result, str):
            assert "forward" in result.lower() or "jvp" in result, result
        else:
            step = 1e-6
            ahead, behind = (function(*(t.detach() + sign * step for t in inputs)) for sign in (1, -1))
            torch.testing.assert_close(result, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_func_grad_and_vmap(backend):
    function, (x, w, bias) = convolution("conv2d")
    xs = torch.stack([x.detach(), 2 * x.detach(), -x.detach()])

    def loss(w, x):
        return function(x, w, bias.detach()).square().sum()

    def theirs(w, x):
        return F.conv2d(x, w, bias.detach(), **CONVOLUTIONS["conv2d"][3]).square().sum()

    with convext.backend(backend):
        for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))):
            images = x.detach() if transform is torch.func.grad else xs
            ours = transform(loss)(w.detach(), images)
            torch.testing.assert_close(ours, transform(theirs)(w.detach(), images))
        for in_dims in ((0, None, None), (None, 0, None), (0, 0, 0)):
            operands = [
                t.detach() if d is None else torch.stack([t.detach(), -t.detach(), 3 * t.detach()])
                for t, d in zip((x, w, bias), in_dims, strict=True)
            ]
            ours = torch.func.vmap(function, in_dims=in_dims)(*operands)
            singly = [
                function(*(t if d is None else t[i] for t, d in zip(operands, in_dims, strict=True))) for i in range(3)
            ]
            torch.testing.assert_close(ours, torch.stack(singly))


@BACKENDS
def test_func_grad_and_vmap_of_conv_bn_relu(backend):
    inputs, statistics = away_from_kinks("relu", False, True, True, GEOMETRY)
    inputs = [t.detach() for t in inputs]
    function = fused("relu", False, statistics)

    def theirs(*inputs):
        return batch_norm(*inputs, *statistics, False, "relu", GEOMETRY)[1]

    def gradients(function):
        return torch.func.grad(lambda *t: function(*t).square().sum(), argnums=tuple(range(6)))

    xs = torch.stack([inputs[0], -inputs[0]])
    in_dims = (0, None, None, None, None, None)
    with convext.backend(backend):
        torch.testing.assert_close(gradients(function)(*inputs), gradients(theirs)(*inputs))
        ours = torch.func.vmap(gradients(function), in_dims=in_dims)(xs, *inputs[1:])
        torch.testing.assert_close(ours, torch.func.vmap(gradients(theirs), in_dims=in_dims)(xs, *inputs[1:]))
