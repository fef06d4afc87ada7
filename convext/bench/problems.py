"""The convolutions that a network consists of, as problems; and shape files, which hold them as text.

A line of a shape file says how often a layer runs and what it is: x, its input (N, C, H, W), w, its weight, and what of
the geometry is not plain. Rows have (N, C, W), volumes (N, C, D, H, W); a value that is not the same along all axes
has one number for each.

    3: x 1x64x56x56, w 128x64x3x3, stride 2, padding 1
    1: transposed x 8x32x512x1024, w 32x16x3x7, stride 1x2, padding 1x3, output padding 0x1, groups 2
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..options import OptionError
from ..problem import DTYPES, ConvProblem, DType, Geom, Layout, Pass

ROOT = Path(__file__).resolve().parents[2]
# Beside the sources; an installation has them within the package (setup.py).
FOLDERS = (ROOT / "benchmarks" / "shapes", Path(__file__).resolve().parent / "shape_files")

_PLAIN = {"stride": 1, "padding": 0, "output padding": 0, "dilation": 1}


class Layer(NamedTuple):
    """A convolution as a layer: of a transposed one, `problem` is the convolution whose dgrad it computes."""

    problem: ConvProblem
    transposed: bool = False

    def computes(self, pass_: Pass) -> Pass:
        """Which pass over the problem a pass of the layer is: a transposed one's forward is dgrad, its dgrad fprop."""
        return {Pass.FPROP: Pass.DGRAD, Pass.DGRAD: Pass.FPROP}.get(pass_, pass_) if self.transposed else pass_

    @property
    def is_row(self) -> bool:
        """Whether it is what Conv1d computes: an image of one row. It has no channels-last form."""
        p = self.problem
        return p.axes == 2 and p.h == p.r == p.stride_h == p.dil_h == 1 and p.pad_h == 0 and p.w > 1

    @property
    def output_padding(self) -> tuple[int, ...]:
        """By how much a transposed layer's result is larger than its geometry says at least."""
        p = self.problem
        least = p.geom.input_size(p.y_shape[2:], p.w_shape[2:], (0,) * p.axes)
        return tuple(n - m for n, m in zip(p.x_shape[2:], least))

    def __str__(self) -> str:
        p, axes = self.problem, 1 if self.is_row else self.problem.axes
        x = p.y_shape if self.transposed else p.x_shape
        sizes = [(*s[:2], *s[2:][-axes:]) for s in (x, p.w_shape)]
        text = "transposed " * self.transposed + f"x {_joined(sizes[0])}, w {_joined(sizes[1])}"
        values = dict(zip(("stride", "padding", "dilation"), p.geom[:3]), **{"output padding": self.output_padding})
        for name, plain in _PLAIN.items():
            value = values[name][-axes:]
            if any(v != plain for v in value) and (self.transposed or name != "output padding"):
                text += f", {name} {value[0] if len({*value}) == 1 else _joined(value)}"
        return text + (f", groups {p.groups}" if p.groups != 1 else "")


def _joined(values: Iterable[int]) -> str:
    return "x".join(map(str, values))


def parse(text: str) -> Layer:
    """The layer that a text says, in `Layer`'s form or `ConvProblem`'s (which ends in the type and the device; without
    them, float32 on the CPU). Contiguous. Raises ValueError, which says what was expected, for any other."""
    shapes: dict[str, tuple[int, ...]] = {}
    values: dict[str, tuple[int, ...]] = {}
    dtype, device = DType.FLOAT32, "cpu"
    body = text.removeprefix("transposed ")
    for part in body.split(", "):
        found = re.fullmatch(r"(x|w|stride|padding|output padding|dilation|groups) (\d+(?:x\d+)*)", part)
        if found is None and part in {d.name.lower() for d in DType}:
            dtype = DType[part.upper()]
        elif found is None and part in ("cpu", "cuda"):
            device = part
        elif found is None or found[1] in shapes or found[1] in values:
            raise ValueError(
                f"got {part!r}, expected such as: x 1x64x56x56, w 128x64x3x3, stride 2, padding 1, groups 1"
            )
        else:
            numbers = tuple(map(int, found[2].split("x")))
            (shapes if found[1] in ("x", "w") else values)[found[1]] = numbers
    if shapes.keys() != {"x", "w"} or not 3 <= len(shapes["x"]) == len(shapes["w"]) <= 5:
        raise ValueError(f"got {text!r}, expected x and w with 3, 4 or 5 extents each")
    return _layer(shapes["x"], shapes["w"], values, text != body, dtype, device)


def _layer(
    x: tuple[int, ...],
    w: tuple[int, ...],
    values: dict[str, tuple[int, ...]],
    transposed: bool,
    dtype: DType,
    device: str,
) -> Layer:
    axes = len(x) - 2
    (groups,) = values.get("groups", (1,))
    along = {}
    for name, plain in _PLAIN.items():
        value = values.get(name, (plain,))
        if len(value) not in (1, axes):
            raise ValueError(f"{name}: got {_joined(value)}, expected one number, or one for each of {axes} axes")
        along[name] = value * axes if len(value) == 1 else value
        if axes == 1:
            along[name] = (plain, *along[name])
    if axes == 1:
        x, w = (*x[:2], 1, x[2]), (*w[:2], 1, w[2])
    if "output padding" in values and not transposed:
        raise ValueError("output padding: only a transposed layer has it")
    if groups < 1 or x[1] != (w[0] if transposed else w[1] * groups) or w[0] % groups:
        expected = "as many channels of x as filters" if transposed else "channels of x / groups in w"
        raise ValueError(f"w: got {_joined(w)} with {groups} groups and x {_joined(x)}, expected {expected}")
    geom = Geom(along["stride"], along["padding"], along["dilation"], groups)
    if 0 in geom.stride or 0 in geom.dilation or 0 in x or 0 in w:
        raise ValueError("got a 0, expected extents, strides and dilations of at least 1")
    size = geom.input_size(x[2:], w[2:], along["output padding"]) if transposed else geom.output_size(x[2:], w[2:])
    if min(size) < 1:
        raise ValueError(f"got {_joined(x)} and filters {_joined(w)}, which leave no result")
    whole = (x[0], w[1] * groups, *size) if transposed else x
    tensors = (torch.empty(shape, dtype=dtype.torch, device="meta") for shape in (whole, w))
    problem = dataclasses.replace(ConvProblem.of_fprop(*tensors, geom), device=device)
    if transposed and problem.y_shape != x:
        raise ValueError(f"output padding: got {_joined(along['output padding'])}, expected less than the stride")
    return Layer(problem, transposed)


def read(path: Path) -> dict[Layer, int]:
    """The layers of a shape file, with how often each runs. Raises OptionError, which names file and line."""
    layers: dict[Layer, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        count, colon, rest = text.partition(": ")
        try:
            if not colon or not count.isdecimal() or int(count) < 1:
                raise ValueError(f"got {text!r}, expected how often it runs, a colon, and a layer")
            layer = parse(rest.strip())
            layers[layer] = layers.get(layer, 0) + int(count)
        except ValueError as error:
            raise OptionError("FILE", f"{path}:{number}", f"a line of a shape file ({error})") from error
    if not layers:
        raise OptionError("FILE", path, "a shape file with at least one layer")
    return layers


def names() -> dict[str, Path]:
    """The shape files that convext brings, by their short names."""
    return {path.stem: path for folder in FOLDERS[::-1] if folder.is_dir() for path in sorted(folder.glob("*.txt"))}


def find(name: str) -> Path:
    """A shape file by its path, or by the short name of one that convext brings. Raises OptionError."""
    if Path(name).is_file():
        return Path(name)
    if name in names():
        return names()[name]
    raise OptionError("FILE", name, f"a shape file or one of {', '.join(names())}; a network: --from-model {name}")


def placed(layer: Layer, *, batch: int | None, dtype: torch.dtype, device: str, channels_last: bool) -> Layer:
    """The layer in another setting; `batch` None leaves the number of images."""
    layout = Layout(channels_last and not layer.is_row)
    changed = {"dtype": DTYPES[dtype], "device": device, "x_layout": layout, "y_layout": layout}
    return layer._replace(problem=dataclasses.replace(layer.problem, n=batch or layer.problem.n, **changed))


_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def collect_layers(model: nn.Module, *inputs: torch.Tensor) -> dict[Layer, int]:
    """Every distinct convolution that `model(*inputs)` runs, of any kind, in order of first use, with the number of
    times it runs. `model` must be unswapped, and may be on the device "meta"."""
    return _walked(model, inputs, _KINDS)


def collect(model: nn.Module, x: torch.Tensor) -> dict[ConvProblem, int]:
    """The problems of every distinct Conv2d that `model(x)` runs, in order of first use, with the number of times.

    `model` must be unswapped: the hooks set here would unfuse a swapped one. `padding="same"` counts as the symmetric
    padding that it amounts to for odd kernels.
    """
    return {layer.problem: count for layer, count in _walked(model, (x,), (nn.Conv2d,)).items()}


def _walked(model: nn.Module, inputs: tuple[torch.Tensor, ...], kinds: tuple[type, ...]) -> dict[Layer, int]:
    seen: Counter[Layer] = Counter()
    noting: dict[bool, Callable] = {
        False: lambda module, inputs: seen.update([_of_module(module, inputs[0])]),
        True: lambda module, inputs, output: seen.update([_of_transposed(module, inputs[0], output)]),
    }
    hooks = []
    for module in model.modules():
        if isinstance(module, kinds):
            transposed = module.transposed
            register = module.register_forward_hook if transposed else module.register_forward_pre_hook
            hooks.append(register(noting[transposed]))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(seen)


def _as_image(t: torch.Tensor, axes: int) -> torch.Tensor:
    """With a batch axis, and of a row an image of one row."""
    t = t if t.dim() == axes + 2 else t.unsqueeze(0)
    return t.unsqueeze(2) if axes == 1 else t


def _geom(module: nn.Module) -> Geom:
    padding = module.padding
    if isinstance(padding, str):
        same = padding == "same"
        padding = tuple(d * (k - 1) // 2 * same for d, k in zip(module.dilation, module.kernel_size, strict=True))
    row = len(module.stride) == 1
    values = zip((1, 0, 1), (module.stride, tuple(padding), module.dilation))
    return Geom(*((plain, *value) if row else value for plain, value in values), module.groups)


def _of_module(module: nn.Module, x: torch.Tensor) -> Layer:
    axes = len(module.stride)
    w = module.weight.unsqueeze(2) if axes == 1 else module.weight
    return Layer(ConvProblem.of_fprop(_as_image(x, axes), w, _geom(module)))


def _of_transposed(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Layer:
    axes = len(module.stride)
    x, y = _as_image(x, axes), _as_image(y, axes)
    w = module.weight.unsqueeze(2) if axes == 1 else module.weight
    return Layer(ConvProblem.of_dgrad(x, w, tuple(y.shape[2:]), _geom(module)), transposed=True)


def title(problem: ConvProblem, transposed: bool = False) -> str:
    """The problem in a few characters: `64×56×56 -> 64, 3×3 /2 d1 g1`, ones left out; of a transposed layer, its own
    input and output, as in `64×28×28 -> 32, 2×2 /2 transposed`."""
    axes = problem.axes
    sizes, taps = (shape[2:][-axes:] for shape in (problem.x_shape, problem.w_shape))
    channels = problem.c, problem.k
    if transposed:
        sizes, channels = problem.y_shape[2:], channels[::-1]
    text = f"{'×'.join(map(str, (channels[0], *sizes)))} -> {channels[1]}, {'×'.join(map(str, taps))}"
    strides = problem.geom.stride
    text += f" /{max(strides)}" if not problem.is_unit_stride else ""
    text += f" d{max(problem.geom.dilation)}" if problem.is_dilated else ""
    text += f" g{problem.groups}" if problem.groups > 1 else ""
    return text + " transposed" * transposed
