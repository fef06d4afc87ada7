"""`convext demo`: photographs through two networks before and after the swap, then training on digits likewise."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import convext

from .. import zoo
from ..bench import inference
from ..bench.agreement import Agreement, bound, distance
from ..bench.timing import Timing, interleave
from . import digits, photos, picture
from .profile import LayerTime, layer_times

NETWORKS = ("resnet50", "mobilenet_v2")
SECONDS = 12.0  # of timing, for each network
ROUNDS = 40  # at most


@dataclass(frozen=True)
class Settings:
    """What the command line may choose."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    image: Path | None
    train: bool
    output: Path


@dataclass(frozen=True)
class Compared:
    """One network before and after the swap."""

    weights: str
    agreement: Agreement
    timings: dict[str, Timing]
    layers: tuple[list[LayerTime], list[LayerTime]]
    swapped: nn.Module


def run(settings: Settings, console: Console) -> int:
    """Runs the demo; returns the exit status: 0, or 1 where results disagree or training misses its target."""
    pictures = photos.load(settings.image)
    x = photos.batch_of(pictures, settings.batch).to(settings.device, settings.dtype)
    source = settings.image or "scikit-learn's two photographs"
    console.print(
        f"{source}, batch {settings.batch}, {str(settings.dtype).removeprefix('torch.')}, {settings.device}, "
        f"{torch.get_num_threads()} threads",
        soft_wrap=True,
    )
    failures, layers = [], {}
    for name in NETWORKS:
        compared = _compare(name, x, console)
        layers[name] = compared.layers
        console.print(_sentence(name, settings.batch, compared), soft_wrap=True)
        if not compared.agreement.ok:
            failures.append(f"{name}: outputs before and after the swap disagree")
    with torch.no_grad():
        maps = picture.feature_maps(compared.swapped, x)
    picture.draw(settings.output, layers, pictures[0], maps)
    console.print(f"picture: {settings.output}", soft_wrap=True)
    if settings.train:
        failures += _train(settings, console)
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red")
    return 1 if failures else 0


def _compare(name: str, x: torch.Tensor, console: Console) -> Compared:
    model, weights = zoo.build(name, pretrained=True)
    model = model.to(x.device, x.dtype)
    swapped = convext.swap(copy.deepcopy(model))
    candidates = {"before": inference.prepare(model, x), "after": inference.prepare(swapped, x)}
    reference, result = (candidate.result() for candidate in candidates.values())
    agreement = Agreement(distance(result, reference), bound(model, x.dtype))
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    with _progress(console) as progress:
        task = progress.add_task(f"{name}, before and after in turns", total=ROUNDS, unit="rounds")
        timings = interleave(
            {which: candidate.call for which, candidate in candidates.items()},
            seconds=SECONDS,
            max_rounds=ROUNDS,
            synchronize=synchronize,
            on_round=lambda rounds: progress.update(task, completed=rounds),
        )
        progress.update(task, total=len(timings["before"].seconds))
    return Compared(weights, agreement, timings, (layer_times(model, x), layer_times(swapped, x)), swapped)


def _sentence(name: str, batch: int, compared: Compared) -> str:
    before, after = compared.timings["before"], compared.timings["after"]
    distance_, allowed = compared.agreement.distance, compared.agreement.bound
    return (
        f"[bold]{name}[/bold], {compared.weights}: "
        f"{batch / before.median:.1f} -> {batch / after.median:.1f} images/s, "
        f"[bold]{after.times_faster_than(before):.2f}×[/bold]; "
        f"outputs {distance_:.1e} apart, rounding explains {allowed:.1e}"
    )


def _train(settings: Settings, console: Console) -> list[str]:
    failures, runs = [], {}
    for name, target in digits.TARGETS.items():
        with _progress(console) as progress:
            task = progress.add_task(f"{name} on digits", total=2 * digits.EPOCHS, unit="epochs")
            on_epoch = partial(progress.advance, task)
            before = digits.train(name, settings.device, swapped=False, on_epoch=on_epoch)
            after = digits.train(name, settings.device, on_epoch=on_epoch)
        console.print(
            f"[bold]{name}[/bold], trained before and after the swap: {before.accuracy:.1%} and {after.accuracy:.1%} "
            f"of 360 held-out digits read correctly after {before.seconds:.1f} and {after.seconds:.1f} s",
            soft_wrap=True,
        )
        runs[name] = before, after
        if after.accuracy < target:
            failures.append(f"{name} reads {after.accuracy:.1%} of the held-out digits, expected {target:.0%}")
    path = settings.output.with_stem(f"{settings.output.stem}-digits")
    picture.draw_losses(path, runs)
    console.print(f"picture: {path}", soft_wrap=True)
    return failures


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}")
    still = not console.is_terminal or console.is_dumb_terminal  # cannot redraw a line: say nothing meanwhile
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=still)
