"""Trains a network of torchvision's on ImageNet, swapped, on one or many processes and machines.

    python examples/train_imagenet.py --model resnet18 --size 32 --batch 16 --images 256 --lr 0.01 --ema 0.8 --epochs 2
    torchrun --nproc-per-node 8 examples/train_imagenet.py --data /data/imagenet --model resnet50 --amp

Expect: for each epoch its loss, images/s, and how many held-out pictures the moving average of the weights reads
rightly; without --data, of generated pictures, which it learns within two epochs. A run that was broken off and started
again with the same --checkpoint goes on after its last epoch, and ends with the same weights, bit for bit. --no-swap is
the same run in plain PyTorch: compare its images/s. Needs the extra `demo`.

--data is a folder with `train` and `val` as torchvision's ImageFolder takes them.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from rich.progress import track
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

import convext

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Stripes(Dataset):
    """Generated pictures (3, size, size): stripes under noise, whose direction is the class."""

    def __init__(self, count: int, classes: int, size: int, seed: int):
        self.count, self.classes, self.size, self.seed = count, classes, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        label = index % self.classes
        angle = torch.tensor(torch.pi * label / self.classes)
        axis = torch.linspace(-1, 1, self.size)
        phase = 6.28 * torch.rand(3, 1, 1, generator=generator)
        wave = torch.sin(9 * (axis[:, None] * angle.sin() + axis * angle.cos()) + phase)
        return wave + 0.5 * torch.randn(3, self.size, self.size, generator=generator), label


def datasets(options: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """(training pictures, held-out pictures, classes)."""
    if options.data is None:
        return (
            Stripes(options.images, options.classes, options.size, seed=1),
            Stripes(max(options.images // 4, options.classes), options.classes, options.size, seed=2),
            options.classes,
        )
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    train = torchvision.datasets.ImageFolder(
        options.data / "train",
        transforms.Compose([transforms.RandomResizedCrop(options.size), transforms.RandomHorizontalFlip(), *finish]),
    )
    held_out = torchvision.datasets.ImageFolder(
        options.data / "val",
        transforms.Compose(
            [transforms.Resize(options.size * 8 // 7), transforms.CenterCrop(options.size), *finish],
        ),
    )
    return train, held_out, len(train.classes)


class Training:
    """A model, the moving average of its weights, and what a checkpoint holds besides."""

    def __init__(self, options: argparse.Namespace, classes: int, device: torch.device, steps: int):
        self.options, self.device = options, device
        torch.manual_seed(options.seed)  # the same weights in each process
        model = torchvision.models.get_model(options.model, num_classes=classes).to(device)
        if options.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not options.no_swap:
            convext.swap(model)
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
        self.parallel = model if not dist.is_initialized() else DistributedDataParallel(model)
        self.optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.lr, total_steps=max(steps, 2))
        self.epoch = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp)

    def parts(self) -> dict:
        return {name: getattr(self, name) for name in ("model", "average", "optimizer", "schedule")}

    def save(self, path: Path) -> None:
        """Into a new file that then takes the place of the former: one that is broken off leaves the former."""
        new = path.with_name(path.name + ".new")
        torch.save({"epoch": self.epoch, **{name: part.state_dict() for name, part in self.parts().items()}}, new)
        os.replace(new, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.epoch = state["epoch"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def train(self, loader: DataLoader, show: bool) -> float:
        """One epoch; returns the mean loss over this process's pictures. Gradients of `--accumulate` batches make a
        step, and are exchanged among processes with the last of them."""
        self.parallel.train()
        every, total, seen = self.options.accumulate, 0.0, 0
        for number, (images, labels) in enumerate(track(loader, f"epoch {self.epoch + 1}", disable=not show), 1):
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            last = number % every == 0 or number == len(loader)
            waits = dist.is_initialized() and not last
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with self.autocast():
                    loss = F.cross_entropy(self.parallel(images), labels, label_smoothing=0.1)
                (loss / every).backward()
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                self.average.update_parameters(self.model)
            total += loss.item() * len(labels)
            seen += len(labels)
        self.epoch += 1
        return total / max(seen, 1)

    @torch.inference_mode()
    def accuracy(self, loader: DataLoader) -> float:
        self.average.eval()
        right = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in loader:
            with self.autocast():
                guesses = self.average(images.to(self.device)).argmax(1).cpu()
            right += torch.tensor([(guesses == labels).sum().item(), len(labels)], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(right)
        return (right[0] / right[1]).item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train and val; without it, pictures are generated")
    parser.add_argument("--model", default="resnet50", help="of torchvision's classification networks")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.99, help="share that the moving average keeps at each step")
    parser.add_argument("--size", type=int, default=224, help="of the pictures")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where autocast takes it")
    parser.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes; needs GPUs")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--checkpoint", type=Path, help="a file: written after each epoch, read at the start")
    parser.add_argument("--no-swap", action="store_true", help="plain PyTorch, to compare with")
    parser.add_argument("--images", type=int, default=512, help="how many to generate")
    parser.add_argument("--classes", type=int, default=4, help="of the generated ones")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    show = rank == 0

    train, held_out, classes = datasets(options)
    sampler = DistributedSampler(train, world, rank, shuffle=True, seed=options.seed, drop_last=True)
    how = {"batch_size": options.batch, "num_workers": options.workers, "pin_memory": device.type == "cuda"}
    loader = DataLoader(train, sampler=sampler, drop_last=True, **how)
    test_loader = DataLoader(held_out, sampler=DistributedSampler(held_out, world, rank, shuffle=False), **how)
    if not len(loader):
        raise SystemExit(f"{len(train)} pictures are less than one batch of {options.batch} in {world} processes")

    steps = options.epochs * -(-len(loader) // options.accumulate)
    training = Training(options, classes, device, steps)
    if options.checkpoint is not None and options.checkpoint.exists():
        training.load(options.checkpoint)
        if show:
            print(f"goes on after epoch {training.epoch}")
    while training.epoch < options.epochs:
        sampler.set_epoch(training.epoch)
        # What is drawn follows from the epoch alone.
        torch.manual_seed(options.seed + 1_000 * (training.epoch + 1) + 1_000_000 * rank)
        start = time.perf_counter()
        loss = training.train(loader, show)
        rate = world * len(loader) * options.batch / (time.perf_counter() - start)
        accuracy = training.accuracy(test_loader)
        if show:
            print(f"epoch {training.epoch}: loss {loss:.3f}, {rate:.1f} images/s, {accuracy:.1%} of held-out pictures")
            if options.checkpoint is not None:
                training.save(options.checkpoint)
        if world > 1:
            dist.barrier()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
