"""A torch.autograd.Function of the user's own inside a swapped forward: its backward and its jvp are not derivatives of
what its forward computes, so whoever traces through it gets other gradients."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function

import convext


class StraightThrough(Function):
    """Rounds, and passes the gradient as if it had not."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, dy):
        return dy


class Reversal(Function):
    """The identity, and the gradient's negative multiple: a domain classifier's (Ganin and Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -ctx.factor * dy, None


class Scaled(Function):
    """In the newer form, with setup_context; its gradient is thrice that of the identity."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return 3 * dy

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


class Doubled(Function):
    """Two results, of which one wants no gradient; it saves a tensor."""

    @staticmethod
    def forward(ctx, x):
        sign = x.sign()
        ctx.save_for_backward(sign)
        ctx.mark_non_differentiable(sign)
        return x.abs(), sign

    @staticmethod
    def backward(ctx, dy, _):
        (sign,) = ctx.saved_tensors
        return 5 * sign * dy


FUNCTIONS = {
    "straight_through": StraightThrough.apply,
    "reversal": lambda x: Reversal.apply(x, 0.5),
    "setup_context": Scaled.apply,
    "two_results": lambda x: Doubled.apply(x)[0],
}
alias = StraightThrough.apply


def by_helper(x):
    return alias(x)


class Net(nn.Module):
    """function(activation(bn(conv(x)))), with more layers behind it."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x):
        y = self.function(2 * F.relu(self.bn(self.conv(x))))
        return F.relu(self.bn2(self.conv2(y)) + y)


class BetweenTheParts(Net):
    """In the middle of what would be one chain."""

    def forward(self, x):
        y = F.relu(self.bn(self.function(self.conv(x))))
        return F.relu(self.function(self.bn2(self.conv2(y))))


class OfTheWeights(Net):
    """Quantises the filters: a straight-through estimator as networks of few bits train by."""

    def forward(self, x):
        y = F.relu(self.bn(F.conv2d(x, self.function(4 * self.conv.weight), self.conv.bias, padding=1)))
        return F.relu(self.bn2(self.conv2(y)))


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def in_a_layer(function):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        Layer(function),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)


class Rounds(Trunk):
    def forward(self, x):
        return self.conv2(StraightThrough.apply(2 * self.bn(self.conv(x))))


class Reverses(Trunk):
    def forward(self, x):
        return self.conv2(Reversal.apply(F.relu(self.bn(self.conv(x))), 0.25))


class Scales(Trunk):
    def forward(self, x):
        return Scaled.apply(self.conv2(self.bn(self.conv(x))))


class TakesBoth(Trunk):
    def forward(self, x):
        size, sign = Doubled.apply(self.bn(self.conv(x)))
        return self.conv2(size + sign)


class ByHelper(Trunk):
    def forward(self, x):
        return self.conv2(by_helper(2 * self.bn(self.conv(x))))


class ByInstance(Trunk):
    """Through an attribute that holds the class."""

    def __init__(self):
        super().__init__()
        self.estimator = StraightThrough

    def forward(self, x):
        return self.conv2(self.estimator.apply(2 * self.bn(self.conv(x))))


def gradients(model, x, training):
    model.train(training)
    found = []
    for _ in range(3):
        given = x.clone().requires_grad_()
        model.zero_grad()
        y = model(given)
        (y.sin() * torch.arange(y.shape[-1])).sum().backward()
        found.append((y.detach(), given.grad, *[p.grad.clone() for p in model.parameters()]))
    return found, model.state_dict()


def compare(plain, training):
    torch.manual_seed(1)
    plain = plain.double()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    # Sums of some 100 terms of the order of 1 to 100, in double.
    torch.testing.assert_close(gradients(swapped, x, training), gradients(plain, x, training), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("network", [Net, BetweenTheParts, OfTheWeights, in_a_layer], ids=lambda n: n.__name__)
def test_a_function_keeps_its_backward(network, function, training):
    compare(network(FUNCTIONS[function]), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "network", [Rounds, Reverses, Scales, TakesBoth, ByHelper, ByInstance], ids=lambda n: n.__name__
)
def test_a_function_called_by_its_name_keeps_its_backward(network, training):
    compare(network(), training)


def test_a_function_keeps_its_jvp():
    torch.manual_seed(1)
    plain = Scales().double().eval()
    swapped = convext.swap(copy.deepcopy(plain))
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected, actual = (torch.func.jvp(model, (x,), (x.cos(),)) for model in (plain, swapped))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_reversed_gradient_has_the_other_sign(training):
    """By what the right value is, not only by an unswapped twin."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    plain, reversed_ = Net(nn.Identity()).double(), Net(FUNCTIONS["reversal"]).double()
    reversed_.load_state_dict(plain.state_dict())
    (found, _), (turned, _) = (gradients(convext.swap(model), x, training) for model in (plain, reversed_))
    names = [name for name, _ in plain.named_parameters()]
    for (y, dx, *by), (y_turned, dx_turned, *by_turned) in zip(found, turned):
        torch.testing.assert_close(y_turned, y)
        torch.testing.assert_close(dx_turned, -0.5 * dx)
        for name, a, b in zip(names, by_turned, by):
            torch.testing.assert_close(a, b if name.startswith(("conv2", "bn2")) else -0.5 * b)
