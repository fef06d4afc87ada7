"""A unit runs at the place of its last node: whatever stands between its ends and minds what it reads or writes keeps
it from reaching so far. And what a capture takes out of the graph returns its very argument, or stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import X, check

Z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.register_buffer("index", torch.tensor([0, 1]))

    def forward(self, x, z):
        return type(self).run(self, x, z)


def _class(run, base=Base):
    return type("Model", (base,), {"run": staticmethod(run)})


def _steps(*others, train=True):
    def steps(model):
        for _ in range(2):
            yield model.train(train)(X, Z)
            yield [buffer.clone() for buffer in model.buffers()]
            yield [getattr(model, name) for name in others]

    return steps


# ---- statistics


def _reads_statistics(m, x, z):
    y = F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var, training=True)
    seen = m.mean.clone()
    return F.relu(y), seen


def _reads_a_layers_statistics(m, x, z):
    y = m.bn(m.conv(x))
    seen = m.bn.running_mean * 2
    return F.relu(y), seen


def _shares_statistics(m, x, z):
    y = m.bn(m.conv(x))
    return F.relu(y) + m.other(z)


class Shared(Base):
    """Two layers with one pair of statistics."""

    def __init__(self):
        super().__init__()
        self.other._buffers.update(self.bn._buffers)


class Child(nn.Module):
    def __init__(self, bn):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), bn

    def forward(self, z):
        return self.bn(self.conv(z))


class SharedWithAChild(Base):
    def __init__(self):
        super().__init__()
        self.child = Child(self.bn)


def _calls_a_child(m, x, z):
    y = m.bn(m.conv(x))
    k = m.child(z)
    return y.relu() + k


@pytest.mark.parametrize(
    ("run", "base"),
    [
        (_reads_statistics, Base),
        (_reads_a_layers_statistics, Base),
        (_shares_statistics, Base),
        (_shares_statistics, Shared),
        (_calls_a_child, SharedWithAChild),
    ],
)
def test_statistics_are_read_and_written_in_order(run, base):
    check(_class(run, base), _steps())


def test_statistics_that_come_to_be_shared():
    def steps(model):
        model.train()
        yield from (model(X, Z), model(X, Z))
        model.other._buffers.update(model.bn._buffers)
        yield from (model(X, Z), model.bn.running_mean, model.bn.running_var)
        model.other.running_mean = model.bn.running_mean.detach()[:]  # a view
        yield from (model(X, Z), model.bn.running_mean)

    check(_class(_shares_statistics), steps)


# ---- effects


class Changes(nn.Module):
    def __init__(self, conv, replaces):
        super().__init__()
        self.held, self.replaces, self.calls = [conv], replaces, 0

    def forward(self):
        self.calls += 1
        weight = self.held[0].weight
        if self.replaces:
            self.held[0].weight = nn.Parameter(weight.detach() * 2)
        else:
            weight.data.mul_(2)


class Writes(nn.Module):
    """A container with a plan of its own, which writes what is no argument of it."""

    def __init__(self, weight):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 3, 1), weight

    def forward(self, z):
        self.weight.detach().mul_(1.5)
        return self.conv(z)


def _with(part):
    class Model(Base):
        def __init__(self):
            super().__init__()
            self.part = part(self.conv)

    return Model


def _between(m, x, z):
    y = m.conv(x)
    m.part()
    return y.relu()


def _behind_the_weight(m, x, z):
    weight, conv2d = m.conv.weight, F.conv2d
    m.part()
    return conv2d(x, weight).relu()


def _between_with_an_argument(m, x, z):
    y = m.conv(x)
    k = m.part(z)
    return y.relu(), k


@pytest.mark.parametrize(
    ("run", "part"),
    [
        (_between, lambda conv: Changes(conv, False)),
        (_between, lambda conv: Changes(conv, True)),
        (_behind_the_weight, lambda conv: Changes(conv, True)),
        (_between_with_an_argument, lambda conv: Writes(conv.weight)),
    ],
)
def test_calls_with_effects_keep_their_place(run, part):
    check(_class(run, _with(part)), _steps(train=False), modes=(False,))


@torch.library.custom_op("convext_tests::scale_", mutates_args={"w"})
def scale(w: torch.Tensor, by: float) -> torch.Tensor:
    w.mul_(by)
    return w + 1


def _norm(m, x):
    return F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var)


WRITERS = [
    lambda m, x, z: (F.conv2d(x, m.weight), scale(m.weight, 2.0)),
    lambda m, x, z: (F.conv2d(x, m.weight), scale(x, 2.0)),
    lambda m, x, z: (_norm(m, x), torch.batch_norm(z, None, None, m.mean, m.var, True, 0.1, 1e-5, False)),
    lambda m, x, z: (_norm(m, x), F.instance_norm(z, m.mean, m.var)),
    lambda m, x, z: (_norm(m, x), torch.native_batch_norm(z, None, None, m.mean, m.var, True, 0.1, 1e-5)[0]),
    lambda m, x, z: (F.conv2d(x, m.weight), F.embedding(m.index, m.weight.view(3, 27), max_norm=0.1)),
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: "")
def test_functions_that_write(write):
    def run(m, x, z):
        y, k = write(m, x.clone(), z)
        return y.relu(), k

    check(_class(run), _steps(train=False), modes=(False,))


# ---- identities and dropouts


class Passes(Base):
    def __init__(self):
        super().__init__()
        self.same, self.drop, self.drop1d = nn.Identity(), nn.Dropout(0.5), nn.Dropout1d()


def _asks_for_none(m, x, z):
    kept = m.same(None)
    return m.conv(x) if kept is None else m.conv(x) * 0


def _asks_for_the_type(m, x, z):
    return m.conv(x) if isinstance(m.same([x]), list) else x


def _a_list(m, x, z):
    both = m.same([m.conv(x), x])
    return both[0] + both[1]


PASSES = [_asks_for_none, _asks_for_the_type, _a_list, lambda m, x, z: m.same((m.conv(x), x))]


@pytest.mark.parametrize("run", PASSES)
def test_an_identity_returns_what_it_is_given(run):
    check(_class(run, Passes), _steps(train=False))


def _odd(change):
    def steps(model):
        model.eval()
        change(model)
        yield model(X, Z)

    return steps


@pytest.mark.parametrize(
    ("run", "change", "error"),
    [
        (lambda m, x, z: m.drop1d(m.conv(x)), lambda m: None, RuntimeError),
        (lambda m, x, z: m.drop(m.conv(x)), lambda m: setattr(m.drop, "p", 2.0), ValueError),
        (lambda m, x, z: F.dropout(m.conv(x), 3.0, False), lambda m: None, ValueError),
        (lambda m, x, z: m.same(m.conv(x), 3), lambda m: None, TypeError),
        (lambda m, x, z: m.same(m.conv(x), foo=1), lambda m: None, TypeError),
        (lambda m, x, z: m.drop(m.conv(x), 1), lambda m: None, TypeError),
    ],
)
def test_what_does_nothing_in_evaluation_raises_as_it_does(run, change, error):
    check(_class(run, Passes), _odd(change), raises=error)


# ---- tensors of odd shapes


def _negative(t):
    return torch.complex(t, t).conj().imag


ODD = [
    (lambda m: setattr(m.conv, "bias", nn.Parameter(m.conv.bias.detach()[None])), False, RuntimeError),
    (lambda m: setattr(m.conv, "bias", nn.Parameter(torch.ones(1, dtype=torch.float64))), False, RuntimeError),
    (lambda m: setattr(m.bn, "running_mean", torch.randn(1, 3, dtype=torch.float64)), False, RuntimeError),
    (lambda m: setattr(m.bn, "weight", nn.Parameter(torch.ones(2, dtype=torch.float64))), False, RuntimeError),
    (lambda m: setattr(m.bn, "weight", nn.Parameter(torch.ones(3, 1, dtype=torch.float64))), True, None),
    (lambda m: setattr(m.bn, "running_mean", _negative(torch.ones(3, dtype=torch.float64))), True, None),
    (lambda m: setattr(m.bn, "running_var", torch.ones(1, dtype=torch.float64).expand(3)), True, None),
    (lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.detach().to_sparse())), False, RuntimeError),
]


@pytest.mark.parametrize(("change", "train", "error"), ODD)
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after calls"])
def test_tensors_of_odd_shapes_are_for_the_layers(change, train, error, before):
    torch.set_num_threads(1)  # PyTorch's threads race for the one element of an expanded variance

    def steps(model):
        model.train(train)
        if before:
            yield from (model(X, Z), model(X, Z))
        change(model)
        yield from (model(X, Z), model.bn.running_mean, model.bn.running_var)

    check(_class(lambda m, x, z: F.relu(m.bn(m.conv(x)))), steps, raises=error, modes=(False,))


def test_statistics_that_want_gradients():
    def steps(model):
        model.eval()
        yield model(X, Z)
        model.bn.running_mean.requires_grad_()
        yield model(X, Z)

    check(_class(lambda m, x, z: F.relu(m.bn(m.conv(x)))), steps, raises=RuntimeError, modes=(True,))
