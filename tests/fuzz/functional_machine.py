"""The state machine of the functional interface's fuzz: a few weights in many geometries, layouts and types, changed in
place between calls, against torch.nn.functional in float64.
"""

import math
import threading

import numpy as np
import torch
import torch.nn.functional as F
from compare import Difference, Progress, signs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import convext

EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# The largest ratio of Winograd's standard deviation to a plain sum's is 26.3/9·sqrt(1 + 34/32) = 4.2, that of weight
# gradients 28.7/16·sqrt(1 + 34/32) = 2.6 (docs/design.md), and the largest of 10⁵ normal errors is at 4.4 deviations.
MARGIN = 4.2 * 4.4
RNG = st.randoms(use_true_random=False)
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
LAYOUTS = ("contiguous", "channels-last", "sliced", "expanded", "transposed", "offset")


PROGRESS = Progress()


class Functional:
    """The tensors that calls share, and what was done."""

    def __init__(self, rng):
        self.rng, self.log, self.serial = rng, [], rng.randrange(1 << 16)
        self.weights, self.held = [], []
        for _ in range(2):
            self.new_weight()

    def values(self, shape, dtype, low=-1.0, high=1.0):
        self.serial += 1
        generator = torch.Generator().manual_seed(self.serial)
        return torch.rand(shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).to(dtype)

    def laid_out(self, shape, dtype, layout):
        """A tensor of that shape that lies in memory as `layout` says."""
        n, c, h, w = shape
        if layout == "channels-last":
            return self.values(shape, dtype).contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            return self.values((n, c + 1, h + 2, w + 1), dtype)[:, 1:, 1:-1, 1:]
        if layout == "expanded":
            return self.values((1, c, h, w), dtype).expand(shape)
        if layout == "transposed":
            return self.values((n, c, w, h), dtype).transpose(2, 3)
        if layout == "offset":
            return self.values((n * c * h * w + 1,), dtype)[1:].view(shape)
        return self.values(shape, dtype)

    def new_weight(self):
        rng = self.rng
        dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        size = rng.choice((1, 1, 2, 3, 3, 3, 5, 7))
        width = size if rng.randrange(4) else rng.choice((1, 3))
        shape = rng.choice((8, 16, 24, 32, 48)), rng.choice((1, 1, 2, 4, 8, 16, 32)), size, width
        layout = rng.choice(LAYOUTS)
        weight = self.laid_out(shape, dtype, layout)
        if rng.randrange(2):
            weight.requires_grad_()
        self.weights = [*self.weights[-2:], weight]
        self.log.append(f"a weight {tuple(shape)} {dtype} {layout}, requires_grad={weight.requires_grad}")

    def geometry(self, weight):
        """(groups, stride, padding, dilation) that fit the weight, and an image's shape."""
        rng = self.rng
        k, c, r, s = weight.shape
        groups = rng.choice([g for g in (1, 2, 4, 8, 16, k) if k % g == 0 and g * c <= 64] or [1])
        stride = rng.choice((1, 1, 2, (2, 1), 3))
        dilation = rng.choice((1, 1, 1, 2, (1, 2), 3))
        padding = rng.choice((0, r // 2, r // 2, (1, 2), "valid", "same", 4))
        if padding == "same" and stride != 1:
            padding = 1
        dh, dw = (dilation, dilation) if isinstance(dilation, int) else dilation
        low_h, low_w = max(1, dh * (r - 1) + 1), max(1, dw * (s - 1) + 1)
        h, w = rng.randint(low_h, low_h + 12), rng.randint(low_w, low_w + 12)
        image = rng.randint(1, 3), c * groups, h, w
        return dict(stride=stride, padding=padding, dilation=dilation, groups=groups), image

    # ---- one call and its check --------------------------------------------------------------------------------------

    def image(self, shape, dtype, like_residual=None):
        layout = self.rng.choice(LAYOUTS)
        return self.laid_out(shape, dtype, layout), layout

    def bias(self, weight):
        """None, a tensor of its own, or a slice of the weight."""
        way = self.rng.randrange(4)
        if way == 0:
            return None
        if way == 1 and weight.numel() >= weight.shape[0]:
            return weight.reshape(-1)[: weight.shape[0]] if weight.is_contiguous() else weight[:, 0, 0, 0]
        if way == 2:
            return self.values((2 * weight.shape[0],), weight.dtype)[::2]
        return self.values((weight.shape[0],), weight.dtype)

    def check(self, what, actual, expected, bound):
        if actual.shape != expected.shape:
            raise Difference(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        a, e = actual.detach().double().numpy(), expected.detach().numpy()
        bound = bound.detach().numpy() if isinstance(bound, torch.Tensor) else bound
        apart = np.abs(a - e)
        if not (apart <= bound).all():
            bad = ~(apart <= bound)
            k = np.unravel_index(np.argmax(np.where(bad, apart, -1)), apart.shape) if apart.ndim else ()
            raise Difference(
                f"{what}: {a[k]!r} at {tuple(map(int, k))}, expected {e[k]!r}; "
                f"{int(bad.sum())} of {bad.size} beyond the bound"
            )


def truth(function, operands, dy):
    """Result and gradients in float64 of those operands that want one, and the same of their absolute values."""
    wide = [
        None if t is None else t.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_()
        for t in operands
    ]
    y = function(*(wide if wide[-1] is not None else wide[:-1]))
    return y, torch.autograd.grad(y, [t for t in wide if t is not None], dy.double())


def conv_bounds(operands, geom, dy, dtype):
    """Bounds of y and of every gradient.

    Let S be the sum of the sizes of a result's terms. Partial sums of terms of either sign grow like a random walk, and
    their roundings add up to eps·S/√2; Winograd's tiles mix neighbours, so the largest S counts, and err `MARGIN` times
    that at most. Then comes the rounding to the dtype, of a few parts where a batch is summed image by image.
    """
    x, w, b = operands
    eps = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    sizes, grads = truth(
        lambda x, w, b=None: F.conv2d(x, w, b, **geom),
        [None if t is None else t.detach().abs() for t in (x, w, b)],
        dy.abs(),
    )
    return [MARGIN * eps * s.amax() + 2 * EPS[dtype] * s for s in (sizes.detach(), *grads)]


def step_conv2d(m):
    """Any convolution, through any of the entry points, forward and backward."""
    weight = m.rng.choice(m.weights)
    geom, shape = m.geometry(weight)
    x, layout = m.image(shape, weight.dtype)
    bias = m.bias(weight)
    return convolution(m, x, weight, bias, geom, layout)


def convolution(m, x, weight, bias, geom, layout, backward=None):
    rng = m.rng
    backward = rng.choice((False, False, True)) if backward is None else backward
    depthwise = weight.shape[1] == 1 and geom["groups"] == x.shape[1]
    name = (
        "depthwise_conv2d"
        if depthwise and rng.randrange(2)
        else "dilated_conv2d"
        if geom["groups"] == 1 and rng.randrange(4) == 0
        else "conv2d"
    )
    what = (
        f"{name} of {tuple(x.shape)} {x.dtype} {layout} by {tuple(weight.shape)} strides {weight.stride()}, "
        f"{geom}, bias {None if bias is None else tuple(bias.stride())}, backward {backward}"
    )
    m.log.append(what)
    arguments = dict(geom)
    if name != "conv2d":
        arguments.pop("groups")
    function = getattr(convext, name)
    leaves = [x, weight, bias]
    if backward:
        leaves = [None if t is None else _leaf(t) for t in leaves]
    with torch.set_grad_enabled(backward):
        y = function(*leaves, **arguments)
        again = function(*leaves, **arguments) if rng.randrange(3) == 0 else None
    if y.dtype != x.dtype or y.requires_grad != backward:
        raise Difference(f"{what}: {y.dtype}, requires_grad {y.requires_grad}")
    dy = m.laid_out(y.shape, y.dtype, rng.choice(LAYOUTS)) if y.numel() else torch.zeros_like(y)
    expected, grads = truth(lambda x, w, b=None: F.conv2d(x, w, b, **geom), [x, weight, bias], dy)
    bounds = conv_bounds((x, weight, bias), geom, dy, x.dtype)
    m.check(what, y, expected, bounds[0])
    if again is not None:
        m.check(f"{what}, again", again, expected, bounds[0])
    if backward:
        y.backward(dy)
        for label, leaf, grad, bound in zip(("dx", "dw", "dbias"), leaves, grads, bounds[1:]):
            m.check(f"{what}, {label}", leaf.grad, grad, bound)
    m.held.append((y.detach(), y.detach().clone()))
    return 1


def _leaf(t):
    """A leaf over the same memory, so that a cache meets it again at its address."""
    return t.detach().requires_grad_()


def step_one_weight_everywhere(m):
    """One weight in several geometries right after each other, and back."""
    weight = m.rng.choice(m.weights)
    places = [m.geometry(weight) for _ in range(2)]
    done = 0
    backward = m.rng.choice((False, True))
    for geom, shape in (*places, places[0]):
        x, layout = m.image(shape, weight.dtype)
        done += convolution(m, x, weight, None, geom, layout, backward)
    return done


def step_alias(m):
    """x is a view of the weight's own memory, or the weight of x's."""
    k, size = m.rng.choice((4, 8, 16)), m.rng.choice((1, 3))
    dtype = m.rng.choice((torch.float32, torch.float64))
    base = m.values((2, k, 12, 12), dtype)
    way = m.rng.randrange(3)
    if way == 0:
        weight = base.reshape(-1)[: k * k * size * size].view(k, k, size, size)
        x = base
    elif way == 1:
        x, weight = base[:, :, 1:, 2:], base[0, 0, 0, :1].expand(k, k, size, size)
    else:
        x, weight = base, base[:1, :, :size, :size].expand(k, k, size, size)
    return convolution(
        m, x, weight, base[0, :, 0, 0], dict(stride=1, padding=size // 2, dilation=1, groups=1), f"an alias, way {way}"
    )


def step_conv_bn_relu(m):
    """Everything fused: batch norm, residual, activation; evaluation and training; forward and backward."""
    rng = m.rng
    weight = rng.choice([w for w in m.weights if w.dtype != torch.bfloat16] or [m.values((8, 4, 3, 3), torch.float32)])
    geom, shape = m.geometry(weight)
    x, layout = m.image(shape, weight.dtype)
    k, dtype = weight.shape[0], weight.dtype
    bias = m.bias(weight)
    with torch.no_grad():
        convolved = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **geom)
    training = rng.choice((False, False, True))
    if convolved.numel() // k < 8 and training:
        return 0
    activation, affine = rng.choice(list(ACTIVATIONS)), rng.choice((True, True, False))
    backward = rng.choice((False, True))
    residual = None
    way = rng.randrange(4)
    if way == 1:
        residual = m.laid_out(convolved.shape, dtype, rng.choice(LAYOUTS))
    elif way == 2 and convolved.shape == x.shape:
        residual = x
    elif way == 3:
        residual = m.values((1, k, 1, 1), dtype)
    mean, var = m.values((k,), dtype), m.values((k,), dtype, 0.5, 1.5)
    gamma = m.values((k,), dtype, 0.5, 1.5) if affine else None
    beta = m.values((k,), dtype) if affine else None
    eps, momentum = rng.choice((1e-5, 1e-2)), rng.choice((0.1, 0.7))
    what = (
        f"conv_bn_relu of {tuple(x.shape)} {dtype} {layout} by {tuple(weight.shape)}, {geom}, {activation}, "
        f"residual {way}, training {training}, affine {affine}, backward {backward}"
    )
    m.log.append(what)
    alias = residual is x
    operands = [x, weight, bias, gamma, beta, None if alias else residual]
    leaves = [None if t is None else _leaf(t) if backward else t for t in operands]

    def fused(x, w, b, gamma, beta, r, mean, var):
        return convext.conv_bn_relu(
            x,
            w,
            b,
            mean,
            var,
            gamma,
            beta,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=x if alias else r,
            **geom,
        )

    def parts(x, w, b, gamma, beta, r, mean, var):
        y = F.batch_norm(F.conv2d(x, w, b, **geom), mean, var, gamma, beta, training, momentum, eps)
        r = x if alias else r
        return ACTIVATIONS[activation](y if r is None else y + r)

    calls = rng.randint(1, 3)
    for _ in range(calls):
        now_mean, now_var = mean.clone(), var.clone()
        with torch.set_grad_enabled(backward):
            y = fused(*leaves, now_mean, now_var)
    dy = m.values(y.shape, dtype)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in operands]
    wide_mean, wide_var = mean.double().clone(), var.double().clone()
    expected = parts(*wide, wide_mean, wide_var)
    # What moving the operands by the errors of their sums does, four times, is the measure of what rounding may do.
    wanted = [t for t in wide if t is not None]
    truths = [expected, *torch.autograd.grad(expected, wanted, dy.double())]
    by = MARGIN * EPS[dtype] * math.sqrt(max(weight[0].numel(), dy.numel() // k))
    generator = torch.Generator().manual_seed(m.serial)
    moves = [torch.zeros(()) for _ in truths]
    for _ in range(4):
        moved = [
            None if t is None else (t.detach() * signs(t, generator).mul_(by).add_(1)).requires_grad_() for t in wide
        ]
        y_moved = parts(*moved, mean.double().clone(), var.double().clone())
        others = [y_moved, *torch.autograd.grad(y_moved, [t for t in moved if t is not None], dy.double())]
        moves = [torch.maximum(b, (o - t).detach().abs().amax()) for b, o, t in zip(moves, others, truths)]
    scale = [t.detach().abs().amax() for t in truths]
    # A gradient that is zero but for rounding, as the bias's in front of a batch norm, is measured by its neighbours.
    largest = max(float(s) for s in scale[1:])
    bounds = [by * float(scale[0]) + 2 * moves[0], *(by * largest + 2 * b for b in moves[1:])]
    if training and bias is not None:
        # In training it is a sum of dy * gamma / sigma less its mean, over n pixels: each has that one mean's rounding.
        pixels = convolved.numel() // k
        sigma = (convolved.var((0, 2, 3), correction=0) + eps).sqrt()
        largest_dy = dy.abs().amax().double() * (1 if gamma is None else gamma.double().abs()) / sigma
        place = 1 + [id(t) for t in wanted].index(id(wide[2]))
        bounds[place] = bounds[place] + by * math.sqrt(pixels) * largest_dy
    m.check(what, y, expected, bounds[0])
    if training:
        m.check(f"{what}, running mean", now_mean, wide_mean, by * (1 + convolved.abs().amax()))
        m.check(f"{what}, running var", now_var, wide_var, by * (1 + convolved.abs().amax() ** 2))
    elif not torch.equal(now_mean, mean) or not torch.equal(now_var, var):
        raise Difference(f"{what}: statistics changed in evaluation")
    if backward:
        y.backward(dy)
        present = [t for t in leaves if t is not None]
        for i, (leaf, grad, bound) in enumerate(zip(present, truths[1:], bounds[1:])):
            if leaf.grad is None or leaf.grad.dtype != leaf.dtype:
                raise Difference(f"{what}: gradient {i} is {leaf.grad}")
            m.check(f"{what}, gradient {i} {tuple(leaf.shape)}", leaf.grad, grad, bound)
    return 1


WRITES = {
    "mul_": lambda t, v: t.mul_(1.5),
    "copy_": lambda t, v: t.copy_(v),
    ".data": lambda t, v: t.data.copy_(v),
    ".data.mul_": lambda t, v: t.data.mul_(-0.5),
    ".data[0]": lambda t, v: t.data[:1].fill_(0.25),
    ".data[-1]": lambda t, v: t.data[-1:].mul_(-1.0),
    ".data =": lambda t, v: setattr(t, "data", v),
    "numpy": lambda t, v: _numpy(t),
    "channel": lambda t, v: t.data[:, :1].mul_(0.5),
    "clamp": lambda t, v: t.data.clamp_(-0.1, 0.1),
    "set_": lambda t, v: t.set_(v),
    "same values": lambda t, v: t.mul_(1),
}


def _numpy(t):
    if t.dtype != torch.bfloat16:
        t.detach().numpy()[1:3] *= 2


def step_write(m):
    """A weight changes in place between calls."""
    weight = m.rng.choice(m.weights)
    way = m.rng.choice(list(WRITES))
    if any(s == 0 and n > 1 for s, n in zip(weight.stride(), weight.shape)):
        return 0
    geom, shape = m.geometry(weight)
    done = 0
    for turn in range(2):
        x, layout = m.image(shape, weight.dtype)
        done += convolution(m, x, weight, None, geom, layout, False)
        if turn == 0:
            m.log.append(f"the weight is written: {way}")
            with torch.no_grad():
                WRITES[way](weight, m.values(weight.shape, weight.dtype))
    return done


def step_new_weight(m):
    """The oldest weight dies, and its memory may become another's."""
    m.new_weight()
    return step_conv2d(m)


def step_threads(m):
    """Several threads, one weight, several geometries."""
    weight = m.rng.choice(m.weights).detach()
    places = [m.geometry(weight) for _ in range(3)]
    images = [m.laid_out(shape, weight.dtype, "contiguous") for _, shape in places]
    m.log.append(f"three threads: {tuple(weight.shape)} {weight.dtype}, {places}")
    results, errors = [None] * 3, []

    def run(i):
        try:
            for _ in range(3):
                results[i] = convext.conv2d(images[i], weight, None, **places[i][0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for (geom, _), x, y in zip(places, images, results):
        expected = F.conv2d(x.double(), weight.double(), None, **geom)
        bound = conv_bounds((x, weight, None), geom, torch.ones_like(y), x.dtype)[0]
        m.check(f"thread's {tuple(x.shape)}, {geom}", y, expected, bound)
    return 1


def step_errors(m):
    """What F.conv2d refuses, convext.conv2d refuses with the same type of error."""
    weight = m.rng.choice(m.weights).detach()
    geom, shape = m.geometry(weight)
    x = m.laid_out(shape, weight.dtype, "contiguous")
    way = m.rng.randrange(8)
    bias = None
    if way == 0:
        x = x[:, :-1]
    elif way == 1:
        geom["stride"] = 0
    elif way == 2:
        geom["groups"] = 3
    elif way == 3:
        bias = m.values((weight.shape[0] + 1,), weight.dtype)
    elif way == 4:
        x = x.to(torch.float64 if x.dtype == torch.float32 else torch.float32)
    elif way == 5:
        geom["dilation"] = 100
    elif way == 6:
        x = x[0, 0]
    else:
        geom["padding"] = -1
    m.log.append(f"errors, way {way}: {tuple(x.shape)} {x.dtype} by {tuple(weight.shape)}, {geom}")
    said = []
    for function in (F.conv2d, convext.conv2d):
        try:
            said.append(tuple(function(x, weight, bias, **geom).shape))
        except Exception as error:
            said.append(type(error))
    if said[0] != said[1]:
        raise Difference(f"{m.log[-1]}: F.conv2d {said[0]}, convext {said[1]}")
    return 1


STEPS = [
    step_conv2d,
    step_one_weight_everywhere,
    step_alias,
    step_conv_bn_relu,
    step_write,
    step_new_weight,
    step_threads,
    step_errors,
]


def make_functional_machine():
    def step(self, function, rng):
        m = self.functional
        m.rng = rng
        try:
            done = function(m)
            for y, then in m.held:
                if not torch.equal(y, then):
                    raise Difference("an earlier result has changed")
            m.held = m.held[-2:]
        except Exception as error:
            kind = "" if isinstance(error, Difference) else f"{type(error).__name__}: "
            text = f"{kind}{error}\n\nwhat was done:\n" + "\n".join(m.log)
            raise PROGRESS.differ(Difference(text)) from error
        PROGRESS.count(function.__name__, done)

    class FunctionalMachine(RuleBasedStateMachine):
        functional = None

        @initialize(rng=RNG)
        def build(self, rng):
            PROGRESS.begin()
            self.functional = Functional(rng)

    def make_rule(function):
        def do(self, rng):
            step(self, function, rng)

        do.__name__ = do.__qualname__ = function.__name__.removeprefix("step_")
        return rule(rng=RNG)(do)

    return type("FunctionalMachine", (FunctionalMachine,), {f.__name__: make_rule(f) for f in STEPS})
