"""report(model): what became of each convolution of a model, with what it is fused, and who computes it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .. import autograd, backends, functional
from ..memory_format import suggests_channels_last
from ..problem import DTYPES, ConvProblem, Geom, Pass
from ..tables import render
from . import calls
from .eligible import left_alone, why_unplanned
from .planned import PlannedForward


@dataclasses.dataclass
class Row:
    """One convolution.

    module   its name in the model
    layer    "64 -> 128, 3x3, stride 2"
    became   "convext", or the class whose code it still runs
    fused    what runs with it in one call: "bn + add + relu", or ""
    backend  who computed it last, and by which variant: "" until it has run
    variant
    reason   why it was left alone, why nothing is fused with it, or why a faster backend passed
    """

    module: str
    layer: str
    became: str
    fused: str = ""
    backend: str = ""
    variant: str = ""
    reason: str = ""


class Report:
    """The rows of a report. Prints as a table; iterates over `Row`s; `to_dict()` gives {module: {column: text}}."""

    def __init__(self, rows: list[Row], title: str):
        self.rows, self.title = rows, title

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, module: str) -> Row:
        """The row of a module by its name. Raises KeyError where there is none."""
        for row in self.rows:
            if row.module == module:
                return row
        raise KeyError(module)

    def to_dict(self) -> dict[str, dict[str, str]]:
        return {
            row.module: {name: text for name, text in dataclasses.asdict(row).items() if name != "module"}
            for row in self.rows
        }

    def summary(self) -> str:
        """One line: how many layers, how many exchanged, how many fused with something."""
        exchanged = sum(row.became == "convext" for row in self.rows)
        fused = sum(bool(row.fused) for row in self.rows)
        return f"{len(self.rows)} convolutions, {exchanged} by convext, {fused} fused with what follows"

    def __str__(self) -> str:
        notes = _notes(row.reason for row in self.rows)
        rows = [(*dataclasses.astuple(row)[:-1], notes.get(row.reason, row.reason)) for row in self.rows]
        caption = [f"{note}: {reason}" for reason, note in notes.items()] + [self.summary()]
        return render(self.title, [f.name for f in dataclasses.fields(Row)], rows, "\n".join(caption))

    __repr__ = __str__


def _notes(reasons: Iterable[str]) -> dict[str, str]:
    """{reason: "note 1"} of the long ones that several rows share: they stand once, below the table."""
    counted = Counter(reasons)
    shared = [reason for reason, count in counted.items() if count > 1 and len(reason) > 30]
    return {reason: f"note {number}" for number, reason in enumerate(shared, 1)}


def report(model: nn.Module) -> Report:
    """What became of each convolution of a model: print it, or read its rows.

    Args:
        model: swapped or not. Backend and variant are those of its last call, so run it first.

    Returns a `Report`: one `Row` a convolution, in the order of `model.named_modules()`, and by its module's name.

    Raises TypeError if `model` is not an nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> row = convext.report(convext.swap(model))["0"]
        >>> row.layer, row.became, row.fused
        ('3 -> 8, 3x3', 'convext', 'bn + relu')
        >>> convext.report(model).summary()
        '1 convolutions, 1 by convext, 1 fused with what follows'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    places = _places(model)
    rows = [
        _row(model, name, module, places.get(module))
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd)
    ]
    return Report(rows, f"{type(model).__name__}: convolutions")


@dataclasses.dataclass
class _Place:
    """Where a convolution stands: its op, what runs with it in one call, and why nothing more does."""

    op: Any = None
    fused: str = ""
    reason: str = ""

    @property
    def last(self) -> Any:
        """Its last input there, or None."""
        return self.op.state.last if self.op is not None else None


def _places(model: nn.Module) -> dict[nn.Module | None, _Place]:
    """{convolution: where the outermost plan that reaches it has put it}; what has run goes before what has not."""
    places: dict[nn.Module | None, _Place] = {}
    for module in model.modules():
        forward = module.__dict__.get("forward")
        for compiled in forward.present_plans() if isinstance(forward, PlannedForward) else ():
            followers = {unit.source: unit for unit in compiled.units if unit.is_image and unit.first.module is None}
            for unit in compiled.units:
                op, conv = unit.first, unit.first.module
                if conv is None:
                    if isinstance(op.behind, _ConvNd):
                        behind = followers[unit.last].words if unit.last in followers else []
                        places.setdefault(op.behind, _Place(fused=" + ".join(unit.words + behind)))
                    continue
                behind = followers[unit.last].words if unit.last in followers else []
                place = _Place(op, " + ".join(unit.words + behind), "" if behind else compiled.reasons.get(conv, ""))
                known = places.get(conv)
                if known is None or known.op is None or known.last is None and place.last is not None:
                    places[conv] = place
            for conv, reason in compiled.reasons.items():
                places.setdefault(conv, _Place(reason=reason))
    return places


def _row(model: nn.Module, name: str, module: _ConvNd, place: _Place | None) -> Row:
    exchanged = calls.is_swapped(module) or place is not None and place.op is not None
    row = Row(name, describe(module), "convext" if exchanged else _class_name(module))
    if exchanged:
        if place is None and not calls.is_conv(module):
            row.reason = "no batch norm or elementwise operation behind it was fused"
        elif place is None:
            row.reason = _why_no_plan(model, name)
        else:
            row.fused, row.reason = place.fused, place.reason
        last = place and place.last or calls.last_input(module)
        if last is not None:
            row.backend, row.variant, passed_over = _serving(module, last, place and place.op)
            row.reason = "; ".join(filter(None, [row.reason, passed_over]))
    else:
        row.reason = left_alone(module) or "not swapped"
    return row


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    return f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn") else kind.__name__


def describe(module: _ConvNd) -> str:
    """A layer in a few words: "64 -> 128, 3x3, stride 2, groups 1" without what is usual."""
    text = [f"{module.in_channels} -> {module.out_channels}", "x".join(map(str, module.kernel_size))]
    for setting, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(module, setting)
        if isinstance(value, str):
            text.append(f"{setting} {value}")
            continue
        value = (value,) * len(module.kernel_size) if isinstance(value, int) else tuple(value)
        if any(v != usual for v in value):
            text.append(f"{setting} " + (str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))))
    if module.groups != 1:
        text.append("depthwise" if module.groups == module.in_channels else f"groups {module.groups}")
    if module.padding_mode != "zeros":
        text.append(f"{module.padding_mode} padding")
    return ", ".join(text)


def _why_no_plan(model: nn.Module, name: str) -> str:
    """Why no plan reaches a convolution: the nearest container with something to say."""
    parts = name.split(".") if name else []
    for end in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:end])
        container = model.get_submodule(path)
        forward = container.__dict__.get("forward")
        where = f"{path or type(container).__name__}: "
        if isinstance(forward, PlannedForward):
            refused = forward.present_refusal()
            return where + refused if refused else "no traced forward calls it"
        reason = why_unplanned(container)
        if not isinstance(container, (nn.ModuleList, nn.ModuleDict)) and reason:
            return where + reason
    return ""


def last_problem(model: nn.Module, name: str) -> tuple[ConvProblem, str] | None:
    """The problem of the last call of a swapped model's convolution, by its name, and what followed it there
    (`Epilogue.kind`); None where convext has not run it. Of a transposed one, it is the problem whose dgrad it is.
    Raises KeyError where there is no such convolution."""
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, _ConvNd):
        known = [n for n, m in model.named_modules() if isinstance(m, _ConvNd)]
        raise KeyError(f"no convolution {name!r}; there are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}")
    place = _places(model).get(module)
    last = place and place.last or calls.last_input(module)
    call = None if last is None else _call(module, last, place and place.op)
    return None if call is None else (call[1], _kind(place and place.op))


def _kind(op: Any) -> str:
    """What followed the convolution in the last call of an op, or by itself."""
    kind: str = "" if op is None else op.state.kind
    return kind


def _call(module: _ConvNd, last: tuple[Any, ...], op: Any) -> tuple[Pass, ConvProblem] | None:
    """The pass over the problem of the last input, in a call of an op or by itself; None where there are no kernels."""
    shape, strides, dtype, device = last
    if dtype not in DTYPES or op is None and module.padding_mode != "zeros" or len(shape) != module.weight.dim():
        return None
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    pass_, problem = _problem(module, like, module.weight.to("meta"), op)
    return pass_, dataclasses.replace(problem, device=device.type)


def _serving(module: _ConvNd, last: tuple[Any, ...], op: Any) -> tuple[str, str, str]:
    """(backend, variant, why a backend before it was passed over) for the problem of the last input."""
    call = _call(module, last, op)
    if call is None:
        return ("aten", "", f"{last[2]} has no kernels") if last[2] not in DTYPES else ("", "", "")
    try:
        choice = backends.would_serve(*call, _kind(op) if call[0] is Pass.FPROP else "")
    except RuntimeError as error:
        return "", "", str(error)
    slower = choice.backend.slower_transposed(choice.problem) if call[0] is Pass.DGRAD else None
    if slower and backends.forced() is None:
        return "aten", "aten_conv_transpose", f"{choice.backend.name}: {slower}"
    passed = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over.items())
    return choice.backend.name, choice.variant, passed


def _problem(module: _ConvNd, x: torch.Tensor, w: torch.Tensor, op: Any) -> tuple[Pass, ConvProblem]:
    """The pass over the problem that a call of a layer with x was, by itself or in that of an op."""
    settings: Any = module.stride, module.padding, module.dilation, module.groups
    if isinstance(module, nn.Conv2d):
        x, geom = functional.normalised(x, w, *(settings if op is None else op.convolution.geom))
        return Pass.FPROP, ConvProblem.of_fprop(x, w, geom, op is not None and op.channels_last)
    if isinstance(module, nn.Conv3d):
        x, geom = functional.normalised(x, w, module.stride, module.padding, module.dilation, module.groups, 3)
        return Pass.FPROP, ConvProblem.of_fprop(x, w, geom, suggests_channels_last(x) or suggests_channels_last(w))
    if isinstance(module, nn.Conv1d):
        x, geom = functional.normalised_row(x, w, *settings)
        return Pass.FPROP, ConvProblem.of_fprop(x.unsqueeze(2), w.unsqueeze(2), geom)
    channels_last = autograd.result_is_channels_last(x, w)
    longer = module.output_padding
    if not isinstance(module, nn.ConvTranspose1d):
        geom = Geom(*settings)
    else:
        (_, geom), longer = functional.normalised_row(x, w, *settings), (0, *longer)
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    size = geom.input_size(x.shape[2:], w.shape[2:], longer)
    return Pass.DGRAD, ConvProblem.of_dgrad(x, w, size, geom, channels_last)
