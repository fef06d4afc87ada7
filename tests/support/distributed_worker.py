"""One of two processes that train small networks together, swapped and unswapped, for test_distributed.py.

    python distributed_worker.py RANK FOLDER

runs every scenario and writes {name: "" or how it failed} to FOLDER/RANK.json.
"""

import contextlib
import datetime
import json
import math
import pathlib
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import convext
from convext.swap.calls import is_swapped as is_swapped_layer

STEPS, IMAGES, SIZE = 3, 4, 10
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


class Block(nn.Module):
    def __init__(self, batch_norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), batch_norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), batch_norm(6)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    def __init__(self, batch_norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), batch_norm(6), nn.ReLU())
        self.block1, self.block2, self.fc = Block(batch_norm), Block(batch_norm), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class SyncedBatchNorm(nn.BatchNorm2d):
    """Statistics over all processes' images: torch.nn.SyncBatchNorm has no CPU."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        var = all_reduce((x - mean[:, None, None]).square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (var + self.eps).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def network(maker=Net):
    torch.manual_seed(3)
    return maker().double()


def images(whole=False):
    """This process's, or all of them."""
    everything = torch.randn(2 * IMAGES, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return everything if whole else everything[dist.get_rank() * IMAGES :][:IMAGES]


def plain(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def trained(model, x):
    """{what: tensor}: outputs and gradients of every step, then parameters and buffers."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        output = model(x)
        output.square().mean().backward()
        found[f"output {step}"] = plain(output)
        found |= {
            f"gradient {step} of {name}": plain(p.grad) for name, p in model.named_parameters() if p.grad is not None
        }  # FSDP gives a process those of its own shard
        optimizer.step()
    found |= {f"parameter {name}": plain(p) for name, p in model.named_parameters()}
    found |= {f"buffer {name}": plain(b) for name, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            found["evaluated"] = plain(model(x))
    return found


def same(found, expected):
    """Equal to rounding. A sum over n = N·H·W operands errs by eps·sqrt(n) of its size in either order of adding; a
    quantity goes through six layers forward and six backward in each of the steps. Factor 4, as in reference.py:
    the largest of some thousand errors."""
    assert found.keys() == expected.keys()
    layers, n = 6, 2 * IMAGES * SIZE * SIZE
    tolerance = 4 * torch.finfo(torch.float64).eps * math.sqrt(n) * 2 * layers * STEPS
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()) if value.numel() else 0.0)  # a shard may hold nothing of a parameter
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        apart = float((found[name] - value).abs().max()) if value.numel() else 0.0
        assert apart <= tolerance * scale, f"{name}: {apart:.3g} apart, {tolerance * scale:.3g} allowed"


def without_prefix(found, prefix="module."):
    return {name.replace(prefix, ""): value for name, value in found.items()}


def is_swapped(model):
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions and all(map(is_swapped_layer, convolutions))


def before_and_after(wrap, maker=Net, x=None):
    """A model swapped, then wrapped, and one wrapped, then swapped, with outputs that are computed again and without,
    train as one that is only wrapped does. Returns that one's values."""
    x = images() if x is None else x
    expected = trained(wrap(network(maker)), x)
    for recompute in (False, True):
        for swapped in (
            wrap(convext.swap(network(maker), recompute=recompute)),
            convext.swap(wrap(network(maker)), recompute=recompute),
        ):
            is_swapped(swapped)
            same(trained(swapped, x), expected)
    return expected


# ---- data parallel ---------------------------------------------------------------------------------------------------


@scenario
def distributed_data_parallel():
    before_and_after(DistributedDataParallel)


@scenario
def distributed_data_parallel_with_synchronised_batch_norm():
    """Then two halves of a batch are the whole."""
    found = before_and_after(DistributedDataParallel, lambda: Net(SyncedBatchNorm))
    alone = trained(convext.swap(network()), images(whole=True))
    mine = slice(dist.get_rank() * IMAGES, (dist.get_rank() + 1) * IMAGES)
    alone = {name: v[mine] if name.startswith(("output", "eval")) else v for name, v in alone.items()}
    same(without_prefix(found), alone)


@scenario
def torchs_own_synchronised_batch_norm():
    """It trains on accelerators alone, and says so; it evaluates anywhere."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm
    expected, x = converted(network()), images()
    for model in (convext.swap(converted(network())), converted(convext.swap(network()))):
        is_swapped(model)
        messages = []
        for each in (expected, model):
            with contextlib.suppress(ValueError):
                each.train()(x)
                messages.append("trained")
                continue
            messages.append("refused")
        assert messages == ["refused", "refused"], messages
        for _ in range(3):
            with torch.no_grad():
                same({"y": model.eval()(x)}, {"y": expected.eval()(x)})


# ---- sharded ---------------------------------------------------------------------------------------------------------


def sharded(model):
    for part in (model.block1, model.block2, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    return model


@scenario
def fully_sharded():
    before_and_after(sharded)


def trained_flat(use_orig_params, swapped_first):
    """FSDP of the first kind, which views weights into one flat parameter, freed between calls."""

    def wrap(model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)

    expected = trained(wrap(network()), images())
    for recompute in (False, True):
        model = (
            wrap(convext.swap(network(), recompute=recompute))
            if swapped_first
            else convext.swap(wrap(network()), recompute=recompute)
        )
        is_swapped(model)
        same(trained(model, images()), expected)


@scenario
def flat_parameters_swapped_then_wrapped():
    trained_flat(use_orig_params=False, swapped_first=True)


@scenario
def flat_parameters_wrapped_then_swapped():
    trained_flat(use_orig_params=False, swapped_first=False)


@scenario
def flat_parameters_with_the_original_ones_swapped_then_wrapped():
    trained_flat(use_orig_params=True, swapped_first=True)


@scenario
def flat_parameters_with_the_original_ones_wrapped_then_swapped():
    trained_flat(use_orig_params=True, swapped_first=False)


# ---- tensors of several processes, checkpoints -----------------------------------------------------------------------


@scenario
def distributed_tensors():
    """Images spread over the processes, parameters the same in both: the gradients are those of all images."""
    mesh = init_device_mesh("cpu", (2,))

    def convolutions():
        return nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU())

    x = distribute_tensor(images(whole=True), mesh, [Shard(0)])
    expected = trained(network(convolutions), images(whole=True))
    same(trained(distribute_module(network(convolutions), mesh), x), expected)
    same(trained(distribute_module(convext.swap(network(convolutions)), mesh), x), expected)
    same(trained(convext.swap(distribute_module(network(convolutions), mesh)), x), expected)


@scenario
def checkpoints():
    """Saved from a swapped model, loaded into an unswapped one, and the other way; sharded and not."""
    for wrap in (lambda model: model, sharded):
        for saved_swapped, loaded_swapped in ((True, False), (False, True), (True, True)):
            folder = FOLDER / f"checkpoint {wrap.__name__} {saved_swapped} {loaded_swapped}"
            source = wrap(convext.swap(network()) if saved_swapped else network())
            trained(source, images(whole=True))  # in both processes, so that the statistics are the same
            dcp.save(get_model_state_dict(source), checkpoint_id=folder)
            torch.manual_seed(9)
            target = Net().double()
            target = wrap(convext.swap(target) if loaded_swapped else target)
            with torch.no_grad():
                for _ in range(3):
                    target.eval()(images())  # what a swap keeps of these weights must not outlive them
            state = get_model_state_dict(target)
            dcp.load(state, checkpoint_id=folder)
            set_model_state_dict(target, state)
            for name, value in get_model_state_dict(source).items():
                assert torch.equal(plain(value), plain(state[name])), name
            assert [*source.state_dict()] == [*target.state_dict()]
            with torch.no_grad():
                same({"y": plain(target.eval()(images()))}, {"y": plain(source.eval()(images()))})


@scenario
def a_distributed_model_is_not_verified():
    """verify compares with copies, which sharded models refuse; it says so, in all processes."""
    try:
        convext.verify(convext.swap(sharded(network())), images())
    except ValueError as error:
        assert "model: this FSDPNet cannot be deep-copied" in str(error), error
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    rank, FOLDER = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{FOLDER / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=40),
    )
    found = {}
    for name, function in SCENARIOS.items():
        try:
            function()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (FOLDER / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()
