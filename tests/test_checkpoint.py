"""Activation checkpointing and hooks on saved tensors: a swapped network ends where an unswapped one does, statistics
and their counts included. torch.utils.checkpoint runs a region a second time in the backward pass, and by default stops
that run, with an exception out of the hook on saved tensors, when the last tensor that it needs has been recomputed."""

import copy
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import convext
from convext.activation import TABLE
from convext.problem import ACTIVATIONS

MODULES = {name: next(iter(entry.modules)) for name, entry in TABLE.items()}


def conv(c, k, **arguments):
    return nn.Conv2d(c, k, 3, padding=1, bias=False, **arguments)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Frozen(nn.Sequential):
    """Trains with its first batch norm in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def chains(**arguments):
    return nn.Sequential(
        conv(4, 5), nn.BatchNorm2d(5, **arguments), nn.ReLU(), conv(5, 4), nn.BatchNorm2d(4, **arguments), nn.ReLU()
    )


def learns_no_batch_norm():
    model = chains()
    for layer in (model[1], model[4]):
        layer.requires_grad_(False)
    return model


REGIONS = {
    "two_chains": chains,
    "ends_in_a_batch_norm": lambda: nn.Sequential(
        conv(4, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 4), nn.BatchNorm2d(4)
    ),
    "ends_in_a_convolution": lambda: nn.Sequential(conv(4, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 4)),
    "one_convolution": lambda: conv(4, 4),
    "begins_with_a_batch_norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4)),
    "residual": Residual,
    "depthwise": lambda: nn.Sequential(
        conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ),
    "cumulative_average": lambda: chains(momentum=None),
    "without_parameters": lambda: chains(affine=False),
    "untracked": lambda: chains(track_running_stats=False),
    "frozen_batch_norm": lambda: Frozen(*chains()),
    "fixed_parameters": learns_no_batch_norm,
    **{
        f"activation_{name}": functools.partial(
            lambda activation: nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), activation()), MODULES[name]
        )
        for name in ACTIVATIONS
    },
}


def save_convolutions(ctx, op, *args, **kwargs):
    convolutions = (
        torch.ops.aten.convolution.default,
        torch.ops.convext.fprop.default,
        torch.ops.convext.conv_bn_act_train.default,
        torch.ops.convext.conv_bn_act.default,
    )
    return CheckpointPolicy.MUST_SAVE if op in convolutions else CheckpointPolicy.PREFER_RECOMPUTE


def save_nothing(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


def selective(policy):
    def run(region, x):
        return checkpoint(
            region, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
        )

    return run


def without_early_stop(region, x):
    with set_checkpoint_early_stop(False):
        return checkpoint(region, x, use_reentrant=False)


def nested(region, x):
    return checkpoint(lambda x: checkpoint(region, x, use_reentrant=False), x, use_reentrant=False)


def twice(region, x):
    """Two calls of one region inside one checkpoint."""
    return checkpoint(lambda x: region(region(x)), x, use_reentrant=False)


def on_the_cpu(region, x):
    with torch.autograd.graph.save_on_cpu():
        return region(x)


def packed_as_copies(region, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        return region(x)


WAYS = {
    "plain": lambda region, x: region(x),
    "reentrant": lambda region, x: checkpoint(region, x, use_reentrant=True),
    "early_stop": lambda region, x: checkpoint(region, x, use_reentrant=False),
    "without_early_stop": without_early_stop,
    "nested": nested,
    "twice": twice,
    "selective_saving_convolutions": selective(save_convolutions),
    "selective_saving_nothing": selective(save_nothing),
    "save_on_cpu": on_the_cpu,
    "packed_as_copies": packed_as_copies,
}


def trained(region, way, steps=3):
    """Three steps of training; the outputs, and the gradients by x."""
    torch.manual_seed(1)
    found = []
    region.train()
    optimiser = torch.optim.SGD(region.parameters(), 0.05)
    for _ in range(steps):
        x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
        y = way(region, x)
        (y.sin() * torch.arange(5)).mean().backward()
        optimiser.step()
        found += y.detach(), x.grad, *[p.grad.clone() for p in region.parameters() if p.requires_grad]
        optimiser.zero_grad()
    return found


def same(actual, expected):
    """To rounding: the sums are of the order of 100 terms, and batch norm divides by deviations of the order of 1."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def same_state(model, plain):
    ours, theirs = model.state_dict(), plain.state_dict()
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert a.item() == b.item(), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("region", REGIONS)
def test_a_swapped_region_ends_where_the_unswapped_one_does(region, way):
    plain = REGIONS[region]().double()
    if isinstance(plain, nn.Conv2d):
        plain = nn.Sequential(plain)
    swapped = convext.swap(copy.deepcopy(plain))
    same(trained(swapped, WAYS[way]), trained(plain, WAYS[way]))
    same_state(swapped, plain)


def counts(model):
    return [t.item() for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")]


def nodes(y):
    """The names of the graph behind y."""
    seen, found = [y.grad_fn], set()
    while seen:
        node = seen.pop()
        found.add(node.name())
        seen += [following for following, _ in node.next_functions if following is not None]
    return found


def test_both_runs_of_a_checkpointed_region_count():
    swapped = convext.swap(chains().double())
    assert "ConvBNActFunctionBackward" in nodes(swapped(torch.randn(2, 4, 6, 5, dtype=torch.float64)))
    assert counts(swapped) == [1, 1]
    trained(swapped, WAYS["early_stop"])
    assert counts(swapped) == [7, 7]
    trained(swapped, WAYS["plain"])
    assert counts(swapped) == [10, 10]


class Fused(nn.Sequential):
    def __init__(self, **arguments):
        super().__init__(
            convext.nn.ConvBNReLU(4, 5, 3, padding=1, **arguments),
            convext.nn.ConvBNReLU(5, 4, 3, padding=1, **arguments),
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arguments", [{}, dict(momentum=None), dict(track_running_stats=False)], ids=str)
def test_a_fused_layer_ends_where_its_parts_do(arguments, way):
    plain = chains(**arguments).double()
    fused = Fused(**arguments).double()
    fused.load_state_dict(dict(zip(fused.state_dict(), plain.state_dict().values(), strict=True)))
    same(trained(fused, WAYS[way]), trained(plain, WAYS[way]))
    same_state(fused, plain)


@pytest.mark.parametrize("way", ["early_stop", "without_early_stop", "reentrant"])
def test_the_function_updates_its_statistics_before_it_saves(way):
    def batch_norm(x, w, mean, var):
        return F.relu(F.batch_norm(F.conv2d(x, w), mean, var, training=True))

    def fused(x, w, mean, var):
        return convext.conv_bn_relu(x, w, None, mean, var, None, None, training=True)

    found = []
    for function in (batch_norm, fused):
        torch.manual_seed(0)
        x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5, 5), (4, 3, 2, 2)))
        mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        WAYS[way](lambda x, w=w, m=mean, v=var, f=function: f(x, w, m, v), x).square().sum().backward()
        found.append((mean, var, x.grad, w.grad))
    same(found[1], found[0])


class Stop(Exception):
    pass


def stop(t):
    raise Stop


def test_a_hook_that_raises_finds_the_statistics_updated():
    """As F.batch_norm leaves them: the hook is run when all is computed."""
    layer = convext.nn.ConvBNReLU(4, 5, 3)
    x = torch.randn(2, 4, 5, 5)
    y = layer.conv(x)
    with pytest.raises(Stop), torch.autograd.graph.saved_tensors_hooks(stop, lambda t: t):
        layer(x)
    assert counts(layer) == [1]
    torch.testing.assert_close(layer.bn.running_mean, 0.1 * y.mean((0, 2, 3)))


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("what", ["residual", "residual_of_a_transform", "input", "one_value", "activation"])
def test_a_call_that_raises_updates_nothing(what, recorded):
    layer = convext.nn.ConvBNReLU(4, 5, 3)
    before = copy.deepcopy(layer.state_dict())
    x, residual, call = torch.randn(2, 4, 5, 5), None, layer
    if what.startswith("residual"):
        residual = torch.randn(3, 5, 3, 3)
    if what == "residual_of_a_transform":

        def call(x, residual):
            return torch.func.grad(lambda x: layer(x, residual).sum())(x)
    elif what == "input":
        x = torch.randn(2, 3, 5, 5)
    elif what == "one_value":
        x = torch.randn(1, 4, 3, 3)
    elif what == "activation":
        layer.activation = "tanh"
    with torch.set_grad_enabled(recorded), pytest.raises((RuntimeError, ValueError)):
        call(x, residual)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("order", ["eval train", "train eval train", "eval train train eval"])
def test_a_graph_of_evaluation_mode_keeps_its_statistics(order):
    """F.batch_norm's graph does not refuse when a batch that is trained on has moved the running statistics; it takes
    the moved ones, of which the gradient is not that of what was computed. Here each has those that it ran with."""
    plain = chains().double()
    fused = Fused().double()
    fused.load_state_dict(dict(zip(fused.state_dict(), plain.state_dict().values(), strict=True)))
    swapped = convext.swap(copy.deepcopy(plain))
    found = []
    for model in (plain, fused, swapped):
        torch.manual_seed(0)
        outputs = []
        for mode in order.split():
            outputs.append(model.train(mode == "train")(torch.randn(2, 4, 6, 5, dtype=torch.float64)))
            for layer in model.modules() if model is plain and mode == "eval" else ():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.running_mean, layer.running_var = layer.running_mean.clone(), layer.running_var.clone()
        sum(y.sin().sum() for y in outputs).backward()
        found.append([p.grad for p in model.parameters()])
    same(found[1], found[0])
    same(found[2], found[0])
    same_state(fused, plain)
    same_state(swapped, plain)
