"""What people do with networks, on a swapped one beside its unswapped twin, in float64: both compute the same."""

import copy
import functools
import io
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import convext


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))


class Block(nn.Module):
    """An inverted residual: pointwise, depthwise, gate, pointwise."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        )
        self.gate = Gate(16)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        return x + self.project(self.gate(self.depthwise(self.expand(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block1, self.block2 = Block(), Block()
        self.head = nn.Linear(8, 5)

    def features(self, x):
        return self.block2(self.block1(self.stem(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def twins(training=True):
    """(unswapped, swapped), with statistics of some training."""
    torch.manual_seed(0)
    plain = Net().double()
    with torch.no_grad():
        for _ in range(4):
            plain(sample())
    plain.train(training)
    return plain, convext.swap(copy.deepcopy(plain))


def sample(n=4, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, dtype=torch.float64, generator=generator)


def close(a, b):
    # Sums of up to 600 float64 terms a layer, a dozen layers, and Adam's division by small roots behind them.
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def both_close(plain, swapped):
    """Parameters, gradients and statistics are the same."""
    close(dict(swapped.state_dict()), dict(plain.state_dict()))
    for (name, a), (_, b) in zip(plain.named_parameters(), swapped.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            close(b.grad, a.grad)


def steps(model, parameters, seeds, each=lambda model: None):
    """Some steps of training; the losses."""
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-2), []
    for seed in seeds:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(sample(seed=seed)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        each(model)
        losses.append(loss.detach())
    return torch.stack(losses)


def test_these_networks_fuse():
    _, swapped = twins(training=False)
    with torch.no_grad():
        swapped(sample())
    assert str(convext.report(swapped)).rstrip().endswith("11 convolutions, 11 by convext, 11 fused with what follows")


def test_transfer_learning_with_frozen_layers():
    found = []
    for model in twins():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.head = nn.Linear(8, 4, dtype=torch.float64)
        nn.init.constant_(model.head.weight, 0.1), nn.init.zeros_(model.head.bias)
        found.append((model, steps(model, model.head.parameters(), range(3))))
    (plain, a), (swapped, b) = found
    close(b, a)
    both_close(plain, swapped)


def test_gradual_unfreezing():
    found = []
    for model in twins():
        model.requires_grad_(False)
        losses = []
        for part in (model.head, model.block2, model.block1, model.stem):
            part.requires_grad_(True)
            losses.append(steps(model, [p for p in model.parameters() if p.requires_grad], range(2)))
        found.append((model, torch.cat(losses)))
    (plain, a), (swapped, b) = found
    close(b, a)
    both_close(plain, swapped)


def test_frozen_batch_norm_in_training():
    found = []
    for model in twins():

        def freeze(model):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)

        freeze(model)
        found.append((model, steps(model, [p for p in model.parameters() if p.requires_grad], range(3), freeze)))
    (plain, a), (swapped, b) = found
    close(b, a)
    both_close(plain, swapped)


def keep_map(maps, name, module, inputs, y):
    maps[name] = y.detach().clone()


def test_hooks_that_collect_feature_maps():
    found = []
    for model in twins(training=False):
        maps, handles = {}, []
        for name in ("stem.0", "stem.2", "block1", "block2.depthwise.0", "block2.gate"):
            keep = functools.partial(keep_map, maps, name)
            handles.append(model.get_submodule(name).register_forward_hook(keep))
        with torch.no_grad():
            model(sample(seed=1))
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            model(sample(seed=2))
        found.append(maps)
    assert len(found[1]) == 5
    close(found[1], found[0])


def grad_cam(model, layer, x, target):
    """The map of Grad-CAM (Selvaraju et al., 2017): ReLU of a layer's channels, weighted by their mean gradients."""
    kept = {}
    forward = layer.register_forward_hook(lambda module, inputs, y: kept.__setitem__("y", y))
    backward = layer.register_full_backward_hook(lambda module, before, dy: kept.__setitem__("dy", dy[0]))
    model(x)[:, target].sum().backward()
    forward.remove(), backward.remove()
    return F.relu((kept["dy"].mean((2, 3), keepdim=True) * kept["y"]).sum(1)).detach()


@pytest.mark.parametrize("name", ["block2", "block1.depthwise.0", "stem.1", "block2.gate.up"])
def test_grad_cam(name):
    a, b = (grad_cam(model, model.get_submodule(name), sample(seed=1), 2) for model in twins(training=False))
    assert a.abs().max() > 0 or name == "block2.gate.up"
    close(b, a)


def test_activation_maximisation():
    found = []
    for model in twins(training=False):
        x = sample(1, seed=1).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            (-model.features(x)[:, 3].mean()).backward()
            optimizer.step()
        found.append(x.detach())
    close(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    found = []
    for model in twins():
        x = sample(seed=1).requires_grad_()
        y = model.stem(x)
        y = checkpoint(model.block1, y, use_reentrant=reentrant)
        y = checkpoint(model.block2, y, use_reentrant=reentrant)
        model.head(y.mean((2, 3))).square().sum().backward()
        found.append((model, x.grad))
    (plain, a), (swapped, b) = found
    close(b, a)
    both_close(plain, swapped)


def test_an_ema_copy():
    found = []
    for model in twins():
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        losses = steps(model, model.parameters(), range(4), ema.update_parameters)
        ema.eval()
        with torch.no_grad():
            found.append((losses, ema(sample(seed=9)), dict(ema.state_dict())))
    close(found[1], found[0])


def test_gradient_accumulation():
    found = []
    for model in twins():
        for seed in range(3):
            (F.cross_entropy(model(sample(seed=seed)), torch.tensor([0, 1, 2, 3])) / 3).backward()
        found.append(model)
    both_close(*found)


def test_per_sample_gradients():
    found = []
    for model in twins(training=False):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x, model=model):
            return F.cross_entropy(functional_call(model, parameters, (x[None],)), torch.tensor([1]))

        found.append(vmap(grad(loss), (None, 0))(parameters, sample(3, seed=1)))
    close(found[1], found[0])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations(kind, when):
    """Of a layer that was swapped, or before it is."""
    register = getattr(parametrizations, kind)
    found = []
    for model in twins():
        is_swapped = bool(found)
        if when == "before":
            convext.revert(model)
        torch.manual_seed(1)  # spectral_norm draws its vectors
        for block in (model.block1, model.block2):
            register(block.expand[0])
        if when == "before" and is_swapped:
            convext.swap(model)
        found.append((model, steps(model, model.parameters(), range(3))))
    (plain, a), (swapped, b) = found
    # What the parametrization computes itself amplifies rounding.
    torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-8)


def test_pruning():
    found = []
    for model in twins():
        for block in (model.block1, model.block2):
            prune.l1_unstructured(block.depthwise[0], "weight", amount=0.4)
            prune.ln_structured(block.expand[0], "weight", amount=0.25, n=2, dim=0)
        losses = [steps(model, model.parameters(), range(2))]
        for block in (model.block1, model.block2):
            prune.remove(block.depthwise[0], "weight"), prune.remove(block.expand[0], "weight")
        losses.append(steps(model, model.parameters(), range(2)))
        assert (model.block1.depthwise[0].weight == 0).sum() < 10  # pruned ones learn again
        found.append((model, torch.cat(losses)))
    (plain, a), (swapped, b) = found
    close(b, a)
    both_close(plain, swapped)


def test_a_whole_pickled_model_trains_on():
    found = []
    for model in twins():
        steps(model, model.parameters(), range(2))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        found.append((read, steps(read, read.parameters(), range(2))))
    (plain, a), (swapped, b) = found
    close(b, a)
    both_close(plain, swapped)


def test_inference_mode_between_steps_of_training():
    found = []
    for model in twins():
        evaluated = []

        def evaluate(model, evaluated=evaluated):
            model.eval()
            with torch.inference_mode():
                evaluated.append(model(sample(seed=7)).clone())
            model.train()

        found.append((steps(model, model.parameters(), range(3), evaluate), torch.stack(evaluated)))
    close(found[1], found[0])


def test_threads_that_infer_while_one_trains_a_copy():
    plain, swapped = twins(training=False)
    expected = {seed: plain(sample(seed=seed)).detach() for seed in range(4)}
    learner_plain, learner = twins()
    losses, wrong = [], []

    def infer(seed):
        with torch.no_grad():
            for _ in range(20):
                y = swapped(sample(seed=seed))
                if not torch.allclose(y, expected[seed], rtol=1e-8, atol=1e-9):
                    wrong.append(seed)

    threads = [threading.Thread(target=infer, args=(seed,)) for seed in range(4)]
    threads.append(threading.Thread(target=lambda: losses.append(steps(learner, learner.parameters(), range(4)))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    close(losses[0], steps(learner_plain, learner_plain.parameters(), range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_after_its_parent_did():
    plain, swapped = twins(training=False)
    x = sample(seed=1)
    with torch.no_grad():
        expected = swapped(x)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest's may run here
        try:
            torch.set_num_threads(1)  # OpenMP's threads did not come along
            with torch.no_grad():
                same = torch.equal(swapped(x), expected)
            swapped.train()
            swapped(x).sum().backward()
            os.write(write, b"same" if same else b"else")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said == b"same"
    close(expected, plain(x).detach())
