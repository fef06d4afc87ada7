"""Derivatives: of every order, in both modes, through torch.func, of the functions and of the operators themselves."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import convext
from convext import autograd, backends
from convext.activation import FORWARD
from convext.problem import ACTIVATIONS, Geom

OPS = torch.ops.convext
GEOM = Geom((2, 1), (1, 0), (1, 2), 2)


def rand(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


X, W, B = rand(2, 4, 5, 5), rand(6, 2, 3, 2), rand(6)
DY = rand(2, 6, 3, 3)
MEAN, VAR = rand(6, seed=1), rand(6, seed=2).abs() + 0.5
GAMMA, BETA, RESIDUAL = rand(6, seed=3), rand(6, seed=4), rand(2, 6, 3, 3, seed=5)


def leaves(*tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def no_slow_fallbacks():
    """torch.func warns where an operator has no batching rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


# ---- the three passes ------------------------------------------------------------------------------------------------

PASSES = {
    "fprop": (lambda x, w, b: convext.conv2d(x, w, b, *GEOM), (X, W, B)),
    "fprop_op": (lambda x, w, b: OPS.fprop(x, w, b, *GEOM), (X, W, B)),
    "dgrad_op": (lambda dy, w: OPS.dgrad(dy, w, (5, 5), *GEOM), (DY, W)),
    "wgrad_op": (lambda dy, x: OPS.wgrad(dy, x, (3, 2), *GEOM), (DY, X)),
    "depthwise": (lambda x, w, b: convext.depthwise_conv2d(x, w, b, 2, 1), (X, rand(8, 1, 3, 3), rand(8))),
    "dilated": (lambda x, w, b: convext.dilated_conv2d(x, w, b, 1, 1), (X, rand(3, 4, 2, 2), rand(3))),
    "same_with_even_kernel": (lambda x, w: convext.conv2d(x, w, None, 1, "same"), (X[0], rand(3, 4, 2, 2))),
    "bn_act_op": (lambda y, *rest: OPS.bn_act(y, *rest, 1e-3, "silu"), (DY, MEAN, VAR, GAMMA, BETA, RESIDUAL)),
    "batch_stats_op": (lambda y: OPS.batch_stats(y), (DY,)),
}


@pytest.mark.parametrize("name", PASSES)
def test_gradients_of_both_modes_and_second_order(name):
    function, tensors = PASSES[name]
    inputs = leaves(*tensors)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_gradient_of_the_statistics_pass():
    arguments = DY, DY.flip(0), MEAN, VAR, GAMMA, BETA, RESIDUAL
    for training in (False, True):
        run = functools.partial(lambda training, *t: OPS.bn_act_backward(*t, 1e-3, "gelu", training), training)
        assert gradcheck(run, leaves(*arguments), fast_mode=True)


def fused(x, w, b, gamma, beta, residual, activation, training):
    return convext.conv_bn_relu(
        x,
        w,
        b,
        MEAN.clone(),
        VAR.clone(),
        gamma,
        beta,
        stride=GEOM.stride,
        padding=GEOM.padding,
        dilation=GEOM.dilation,
        groups=2,
        training=training,
        activation=activation,
        residual=residual,
    )


def parts(x, w, b, gamma, beta, residual, activation, training):
    y = F.batch_norm(F.conv2d(x, w, b, *GEOM), MEAN.clone(), VAR.clone(), gamma, beta, training)
    return FORWARD[activation](y + residual)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_gradients_of_both_modes_and_second_order(activation, training):
    inputs = leaves(X, W, B, GAMMA, BETA, RESIDUAL)

    def function(*tensors):
        return fused(*tensors, activation, training)

    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_act_gradients_of_both_modes_and_second_order(activation):
    def function(x, w, b, residual):
        return convext.conv_act(
            x,
            w,
            b,
            stride=GEOM.stride,
            padding=GEOM.padding,
            dilation=GEOM.dilation,
            groups=2,
            activation=activation,
            residual=residual,
        )

    inputs = leaves(X, W, B, RESIDUAL)
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_create_graph_gives_the_same_first_gradient(training):
    inputs = leaves(X, W, B, GAMMA, BETA, RESIDUAL)
    plain = torch.autograd.grad(fused(*inputs, "silu", training), inputs, DY)
    again = torch.autograd.grad(fused(*inputs, "silu", training), inputs, DY, create_graph=True)
    close(again, plain)


# ---- what is computed and kept ---------------------------------------------------------------------------------------


def _passes(function, *wanted):
    tensors = [t.clone().requires_grad_(want) for t, want in zip((X, W, B), wanted)]
    y = function(*tensors)
    backends.reset_counts()
    y.sum().backward()
    return {pass_ for _, pass_, _ in backends.counts()} & {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: convext.conv2d(x, w, b, *GEOM),
        lambda x, w, b: fused(x, w, b, None, None, None, "relu", True),
        lambda x, w, b: convext.conv_act(x, w, b, groups=2),
    ],
    ids=["conv2d", "conv_bn_relu", "conv_act"],
)
def test_only_needed_gradients_are_computed(function):
    assert _passes(function, False, True, True) == {"wgrad"}  # a first layer
    assert _passes(function, True, False, False) == {"dgrad"}  # a frozen one
    assert _passes(function, False, False, True) == set()
    assert _passes(function, True, True, True) == {"dgrad", "wgrad"}


def _saved(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        function()
    return kept


def test_conv2d_keeps_only_what_its_backward_reads():
    x, w = X.clone(), W.clone()
    assert _saved(lambda: convext.conv2d(x, w.requires_grad_(), None, *GEOM)) == [x.data_ptr()]
    w.requires_grad_(False)
    assert _saved(lambda: convext.conv2d(x.requires_grad_(), w, None, *GEOM)) == [w.data_ptr()]


def test_stride_0_gradient():
    x, w = leaves(X, W)
    convext.conv2d(x, w, None, *GEOM).sum().backward()
    expected = torch.autograd.grad(F.conv2d(*(pair := leaves(X, W)), None, *GEOM).sum(), pair)
    close((x.grad, w.grad), expected)


def test_functions_stand_in_the_graph_under_their_names():
    x = X.clone().requires_grad_()
    names = {
        convext.conv2d(x, W, groups=2): "Conv2dFunctionBackward",
        convext.depthwise_conv2d(x, rand(4, 1, 3, 3)): "DepthwiseConv2dFunctionBackward",
        convext.dilated_conv2d(x, rand(4, 4, 2, 2)): "DilatedConv2dFunctionBackward",
        fused(x, W, B, None, None, None, "relu", True): "ConvBNActFunctionBackward",
    }
    for y, name in names.items():
        assert y.grad_fn.name() == name
    for name in ("Conv2dFunction", "DepthwiseConv2dFunction", "DilatedConv2dFunction", "ConvBNActFunction"):
        assert issubclass(getattr(convext.autograd, name), torch.autograd.Function)


def test_an_output_of_the_fused_function_beside_the_first_is_not_differentiable():
    x = X.clone().requires_grad_()
    out, y, mean, var = autograd.ConvBNActFunction.apply(x, W, B, *[None] * 5, 1e-5, "relu", GEOM, None)
    assert out.requires_grad and not (y.requires_grad or mean.requires_grad or var.requires_grad)
    close(mean, F.conv2d(X, W, B, *GEOM).mean((0, 2, 3)))


# ---- forward mode ----------------------------------------------------------------------------------------------------


def test_fused_functions_refuse_forward_mode_by_name():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, X)
        with pytest.raises(NotImplementedError, match="ConvBNActFunction has no forward-mode"):
            autograd.ConvBNActFunction.apply(x, W, B, MEAN, VAR, None, None, None, 1e-5, "relu", GEOM, None)
        with pytest.raises(NotImplementedError, match="ConvActFunction has no forward-mode"):
            autograd.ConvActFunction.apply(x, W, B, None, GEOM, "relu")


def test_tangents_of_each_operand_alone():
    tangents = {"x": rand(2, 4, 5, 5, seed=9), "w": rand(6, 2, 3, 2, seed=9), "b": rand(6, seed=9)}
    for which, tangent in tangents.items():
        found = []
        for conv2d in (F.conv2d, convext.conv2d):
            with forward_ad.dual_level():
                operands = {"x": X, "w": W, "b": B}
                operands[which] = forward_ad.make_dual(operands[which], tangent)
                found.append(forward_ad.unpack_dual(conv2d(*operands.values(), *GEOM)).tangent)
        close(found[1], found[0])


# ---- torch.func ------------------------------------------------------------------------------------------------------


def _loss(conv2d):
    return lambda x, w, b: conv2d(x, w, b, *GEOM).sin().sum()


def _op(x, w, b, *geom):
    return OPS.fprop(x, w, b, *geom)


OURS = {"function": convext.conv2d, "operator": _op}


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(f, (0, 1, 2))(X, W, B),
        lambda f: jacrev(f, 1)(X, W, B),
        lambda f: jacfwd(f, 2)(X, W, B),
        lambda f: hessian(f, 2)(X, W, B),
        lambda f: grad(lambda x: grad(f)(x, W, B).sin().sum())(X),
        lambda f: jvp(lambda x: jvp(lambda w: f(x, w, B), (W,), (W,))[1], (X,), (X,)),
        lambda f: jvp(grad(f, 1), (X, W, B), (X, W, B)),
        lambda f: grad(lambda w: jvp(lambda x: f(x, w, B), (X,), (X,))[1])(W),
        lambda f: vmap(grad(f, 1), (0, None, None))(X[:, None], W, B),
        lambda f: grad(lambda w: vmap(f, (0, None, None))(X[:, None], w, B).sum())(W),
        lambda f: vmap(lambda x: grad(lambda w: vmap(f, (0, None, None))(x, w, B).sum())(W))(X[:, None, None]),
    ],
    ids=[
        "grad",
        "jacrev",
        "jacfwd",
        "hessian",
        "grad_grad",
        "jvp_jvp",
        "jvp_grad",
        "grad_jvp",
        "per_sample",
        "grad_vmap",
        "vmap_grad_vmap",
    ],
)
def test_transforms_are_pytorchs(ours, transform):
    close(transform(_loss(ours)), transform(_loss(F.conv2d)))


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "dims",
    [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0), (None, 0, 0), (1, 2, 1)],
    ids=str,
)
def test_vmap_over_any_operand(dims, groups, ours):
    def batched(shape, dim):
        return rand(*shape) if dim is None else rand(*shape[:dim], 3, *shape[dim:])

    operands = batched((2, 4, 4, 4), dims[0]), batched((6, 4 // groups, 3, 2), dims[1]), batched((6,), dims[2])

    def both(conv2d):
        def loss(x, w, b):
            y = conv2d(x, w, b, (1, 1), (1, 1), (1, 1), groups)
            return y.sin().sum(), y

        return vmap(grad(loss, (0, 1, 2), has_aux=True), dims)(*operands)

    close(both(ours), both(F.conv2d))


def _fused_ops(x, w, training):
    if training:
        return OPS.conv_bn_act_train(x, w, B, None, None, GAMMA, BETA, RESIDUAL, 1e-5, "silu", *GEOM)[0].sin().sum()
    return OPS.conv_bn_act(x, w, B, MEAN, VAR, GAMMA, BETA, RESIDUAL, 1e-5, "silu", *GEOM).sin().sum()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(f, (0, 1))(X, W),
        lambda f: jvp(f, (X, W), (X, W)),
        lambda f: grad(lambda x: grad(f)(x, W).sin().sum())(X),
        lambda f: vmap(f, (0, None))(X.expand(3, -1, -1, -1, -1) + rand(3, 1, 1, 1, 1), W),
        lambda f: vmap(f, (None, 0))(X, W.expand(3, -1, -1, -1, -1) + rand(3, 1, 1, 1, 1)),
        lambda f: vmap(grad(f), (0, None))(X.expand(3, -1, -1, -1, -1) + rand(3, 1, 1, 1, 1), W),
    ],
    ids=["grad", "jvp", "grad_grad", "vmap_x", "vmap_w", "vmap_grad"],
)
def test_transforms_of_the_fused_operators(transform, training):
    def ours(x, w):
        return _fused_ops(x, w, training)

    def theirs(x, w):
        mean, var = (None, None) if training else (MEAN, VAR)
        y = F.batch_norm(F.conv2d(x, w, B, *GEOM), mean, var, GAMMA, BETA, training)
        return F.silu(y + RESIDUAL).sin().sum()

    close(transform(ours), transform(theirs))


def test_vmap_of_the_batch_norm_operators():
    y, stats = rand(3, 2, 6, 3, 3), rand(3, 6).abs() + 0.5
    close(vmap(OPS.batch_stats)(y), tuple(map(torch.stack, zip(*map(OPS.batch_stats, y)))))
    arguments = GAMMA, BETA, RESIDUAL, 1e-5, "gelu"
    close(
        vmap(lambda y, v: OPS.bn_act(y, MEAN, v, *arguments))(y, stats),
        torch.stack([OPS.bn_act(one, MEAN, v, *arguments) for one, v in zip(y, stats)]),
    )
    close(
        vmap(lambda v: OPS.bn_act_backward(DY, RESIDUAL, MEAN, v, *arguments, True))(stats),
        tuple(map(torch.stack, zip(*(OPS.bn_act_backward(DY, RESIDUAL, MEAN, v, *arguments, True) for v in stats)))),
    )


def test_per_sample_gradients_of_a_network():
    model = (
        torch.nn.Sequential(
            convext.nn.Conv2d(4, 6, 3, padding=1),
            convext.nn.ConvBNReLU(6, 4, 1, activation="silu"),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 25, 3),
        )
        .double()
        .eval()
    )
    state = dict(model.named_parameters())

    def loss(state, x):
        return functional_call(model, state, (x[None],)).sin().sum()

    batched = vmap(grad(loss), (None, 0))(state, X)
    for i in range(len(X)):
        close({name: g[i] for name, g in batched.items()}, grad(loss)(state, X[i]))


# ---- vmap, torch.func's and the older one, over whole layers ---------------------------------------------------------


class Layer(torch.nn.Module):
    """activation(batch_norm(conv(x)) + x), by convext.conv_bn_relu, nn.ConvBNReLU, or PyTorch's functions."""

    def __init__(self, by, activation, tracked=True):
        super().__init__()
        torch.manual_seed(3)
        self.layer = convext.nn.ConvBNReLU(
            3, 3, 3, padding=1, activation=activation, track_running_stats=tracked
        ).double()
        self.by, self.activation = by, activation
        for p in self.layer.bn.parameters():
            torch.nn.init.normal_(p)
        if tracked:
            self.layer.bn.running_mean.normal_()

    def forward(self, x):
        conv, bn = self.layer.conv, self.layer.bn
        if self.by == "module":
            return self.layer(x, x)
        given = conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias
        training = self.training or bn.running_mean is None
        if self.by == "function":
            return convext.conv_bn_relu(x, *given, padding=1, training=training, activation=self.activation, residual=x)
        y = F.batch_norm(F.conv2d(x, conv.weight, padding=1), *given[2:], training)
        return FORWARD[self.activation](y + x)


def _batched_gradients(model, x):
    out = model(x).mean((2, 3))
    vectors = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return torch.autograd.grad(out, (x, *model.parameters()), vectors, is_grads_batched=True)


def _batched_second_gradients(model, x):
    out = model(x).sin().mean((2, 3))
    vectors = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    first = torch.autograd.grad(out, (x, *model.parameters()), vectors, is_grads_batched=True, create_graph=True)
    total = sum(g.sin().sum() for g in first)
    return (*first, *torch.autograd.grad(total, (x, *model.parameters())))


def _batched_gradients_of_gradients(model, x):
    (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    chosen = dx[:, :, 2, 2]
    vectors = torch.eye(chosen.numel(), dtype=dx.dtype).view(-1, *chosen.shape)
    return torch.autograd.grad(chosen, (x, *model.parameters()), vectors, is_grads_batched=True)


def _vmap_of_grad(model, x):
    out = model(x).mean((2, 3))
    vectors = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return vmap(lambda v: torch.autograd.grad(out, (x, *model.parameters()), v, retain_graph=True))(vectors)


def _jacobian(**arguments):
    return lambda model, x: torch.autograd.functional.jacobian(
        lambda x: model(x).sin().mean((2, 3)), x.detach(), **arguments
    )


def _hessian(**arguments):
    return lambda model, x: torch.autograd.functional.hessian(lambda x: model(x).sin().mean(), x.detach(), **arguments)


def _forward_over_reverse(model, x):
    def loss(x):
        return model(x).sin().sum()

    return jvp(grad(loss), (x.detach(),), (x.detach().cos(),))


def _older_vmap_of_a_call(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        y = torch._vmap_internals.vmap(lambda x: model(x).sin())(torch.stack((x, x.flip(0), 2 * x)))
    return torch.autograd.grad(y.sum(), (x, *model.parameters()))


TRANSFORMS = {
    "is_grads_batched": _batched_gradients,
    "is_grads_batched_with_a_graph": _batched_second_gradients,
    "is_grads_batched_of_gradients": _batched_gradients_of_gradients,
    "vmap_of_grad": _vmap_of_grad,
    "jacobian": _jacobian(vectorize=True),
    "jacobian_forward": _jacobian(vectorize=True, strategy="forward-mode"),
    "hessian": _hessian(vectorize=True),
    "hessian_forward": _hessian(vectorize=True, outer_jacobian_strategy="forward-mode"),
    "forward_over_reverse": _forward_over_reverse,
    "older_vmap_of_a_call": _older_vmap_of_a_call,
}


@pytest.mark.parametrize("by", ["function", "module"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_fused_layer(transform, activation, training, by):
    found = []
    for which in ("parts", by):
        # The older vmap cannot write batched statistics into running ones, nor could it by PyTorch's own functions.
        model = Layer(which, activation, transform != "older_vmap_of_a_call").train(training)
        model.layer.bn.num_batches_tracked = None  # grad and jvp refuse to count, as for torch.nn.BatchNorm2d
        result = TRANSFORMS[transform](model, rand(2, 3, 4, 5).requires_grad_())
        found.append((result, model.layer.bn.running_mean, model.layer.bn.running_var))
    close(found[1], found[0])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.nn.Conv2d(5, 3, 3, padding=1)
        self.norm1, self.norm2 = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(3)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_swapped_network(transform, training):
    plain = Block().double().train(training)
    for norm in (plain.norm1, plain.norm2):
        if transform == "older_vmap_of_a_call" and training:  # which cannot write batched statistics into running ones
            norm.running_mean = norm.running_var = norm.track_running_stats = None
        norm.num_batches_tracked = None  # grad and jvp refuse to count
    swapped = convext.swap(copy.deepcopy(plain))
    found = []
    for model in (plain, swapped):
        result = TRANSFORMS[transform](model, rand(2, 3, 4, 5).requires_grad_())
        found.append((result, model.state_dict()))
    close(found[1], found[0])


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
@pytest.mark.parametrize("groups", [1, 3])
def test_batched_gradients_of_a_convolution(ours, groups):
    found = []
    for conv2d in (F.conv2d, ours):
        x, w, b = leaves(rand(2, 3, 4, 5), rand(6, 3 // groups, 3, 3), rand(6))
        y = conv2d(x, w, b, (1, 1), (1, 1), (1, 1), groups).sin()
        first = torch.autograd.grad(
            y, (x, w, b), torch.stack((y.detach(), y.detach().cos())), is_grads_batched=True, create_graph=True
        )
        second = torch.autograd.grad(
            first, (x, w, b), [torch.stack((g.detach(), g.detach().sin())) for g in first], is_grads_batched=True
        )
        found.append((first, second))
    close(found[1], found[0])


def test_a_call_costs_no_look_at_signatures(monkeypatch):
    """What makes `apply` of torch.autograd.Function dear, in Python or called back from C."""

    def fail(*args, **kwargs):
        raise AssertionError("a signature was looked up")

    x, w = leaves(X, W)
    monkeypatch.setattr(torch.autograd.function.inspect, "signature", fail)
    y = convext.conv2d(x, w, None, *GEOM)
    z = fused(x, w, None, None, None, None, "relu", True)
    assert y.grad_fn is not None and z.grad_fn is not None


def test_the_function_of_a_graph_is_found_by_compiled_autograd():
    """Its cache of graphs asks a Function for a key."""
    x, w = leaves(X, W)
    for y in (convext.dilated_conv2d(x, rand(4, 4, 2, 2)), fused(x, w, None, None, None, None, "relu", True)):
        assert y.grad_fn._compiled_autograd_key()


def test_compiled_autograd_runs_the_backward_passes():
    from torch._dynamo import compiled_autograd

    model = torch.nn.Sequential(convext.nn.Conv2d(4, 4, 3), convext.nn.ConvBNReLU(4, 3, 2, bias=True)).double()
    found, graphs = [], []

    def compiler(graph):
        graphs.append(graph)
        return graph

    def gradients():
        x = X.clone().requires_grad_()
        return torch.autograd.grad(model(x).sin().sum(), (x, *model.parameters()))

    found.append(gradients())
    with compiled_autograd._enable(compiler):
        x = X.clone().requires_grad_()
        model.zero_grad()
        model(x).sin().sum().backward()
        found.append((x.grad, *[p.grad for p in model.parameters()]))
    assert len(graphs) == 1
    close(found[1], found[0])


def test_inference_mode_trains_the_statistics_as_pytorch_does():
    fused = convext.nn.ConvBNReLU(4, 3, 2).double()
    plain = torch.nn.Sequential(copy.deepcopy(fused.conv), copy.deepcopy(fused.bn), torch.nn.ReLU())
    for model in (fused, plain):
        with torch.inference_mode():
            model(X)
        model(X).sum().backward()
        with torch.inference_mode():
            inside = model.eval()(X.clone())
        model.train()
        assert inside.is_inference()
    for a, b in zip(fused.bn.state_dict().values(), plain[1].state_dict().values(), strict=True):
        close(a, b)
    close(fused.conv.weight.grad, plain[0].weight.grad)
    close(fused.eval()(X), plain.eval()(X))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_result_under_vmap_may_be_written_into(channels_last):
    x, w = torch.randn(2, 2, 3, 6, 6, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    w = w.to(memory_format=torch.channels_last) if channels_last else w
    grads = []
    for conv2d in (F.conv2d, convext.conv2d):
        given = w.clone().requires_grad_()
        y = torch.vmap(lambda t, conv2d=conv2d, given=given: conv2d(t, given).mul_(3).relu_())(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a)
