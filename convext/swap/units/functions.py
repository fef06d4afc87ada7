"""Convolutions and batch norms as functions of tensors that are found by name, whoever calls them.

A layer of torch's is one, and so is a call of `F.conv2d` or `F.batch_norm` in a forward: what such a function reads
besides its input are places, which a call looks up anew, and settings, which are facts of the plan that it stands in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ... import functional
from ...problem import Geom

EMPTY: dict[str, Any] = {}
Place = tuple[dict[str, Any], str]  # a dictionary and the name of a tensor in it
NOWHERE: Place = (EMPTY, "")


def found(place: Place) -> torch.Tensor | None:
    values, name = place
    return values.get(name)


class Convolution(NamedTuple):
    """conv2d(x, weight, bias).

    geom   its settings
    layer  the module whose row of the report tells of it, or None
    """

    weight: Place
    bias: Place
    geom: Geom
    layer: nn.Module | None

    @classmethod
    def of_layer(cls, conv: nn.Conv2d) -> Convolution | None:
        """That of a layer, exactly of torch's class or convext's; None where it takes more than a Geom to say:
        padding="same", another padding than zeros."""
        settings = [conv.__dict__.get(name) for name in ("stride", "padding", "dilation", "groups")]
        geom = geom_of(*settings) if conv.__dict__.get("padding_mode") == "zeros" else None
        if geom is None:
            return None
        return cls((conv._parameters, "weight"), (conv._parameters, "bias"), geom, conv)

    @property
    def is_pointwise(self) -> bool:
        """True where each output reads one pixel, as far as the present weight tells."""
        weight, geom = found(self.weight), self.geom
        return weight is not None and weight.shape[2:] == (1, 1) and geom.padding == (0, 0) and geom.groups == 1

    @property
    def is_depthwise(self) -> bool:
        weight = found(self.weight)
        return weight is not None and weight.shape[1:2] == (1,) and self.geom.groups > 1


def geom_of(stride: Any, padding: Any, dilation: Any, groups: Any) -> Geom | None:
    """The Geom of settings that are ints, or tuples and lists of two; None of others, and of what PyTorch refuses."""
    stride, padding, dilation = [tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)]
    geom = functional.plain_geom(stride, padding, dilation, groups)
    if geom is None or min(*geom.stride, *geom.dilation, geom.groups) < 1 or min(geom.padding) < 0:
        return None
    return geom


class BatchNorm(NamedTuple):
    """batch_norm(x): (x - mean) / sqrt(var + eps) * weight + bias.

    mean, var  the running statistics; where it is by batch, those that are to be updated
    count      of batches, which a call counts up, or nowhere
    by_batch   whether mean and variance are the batch's own
    momentum   of the running statistics; None averages over all batches, by the count
    """

    mean: Place
    var: Place
    weight: Place
    bias: Place
    count: Place  # type: ignore[assignment]  # a tuple has a method of that name
    by_batch: bool
    momentum: float | None
    eps: float

    @classmethod
    def of_layer(cls, layer: nn.Module) -> BatchNorm | None:
        """That of a layer, as BatchNorm2d.forward and 1d's and 3d's go by its settings, or None as of `as_usual`."""
        settings, statistics, affine = layer.__dict__, layer._buffers, layer._parameters
        names = "training", "track_running_stats", "momentum", "eps"
        if any(name not in settings for name in names):
            return None
        training, tracks, momentum, eps = [settings[name] for name in names]
        mean, var = (statistics, "running_mean"), (statistics, "running_var")
        by_batch = bool(training) or found(mean) is None and found(var) is None
        counts = training and tracks
        if training and not tracks:
            mean = var = NOWHERE
        return cls(
            mean,
            var,
            (affine, "weight"),
            (affine, "bias"),
            (statistics, "num_batches_tracked") if counts else NOWHERE,
            by_batch,
            momentum,
            eps,
        ).as_usual()

    def as_usual(self) -> BatchNorm | None:
        """Itself, or None where PyTorch raises, or takes what the fused call does not."""
        if type(self.eps) not in (float, int) or self.eps <= 0:
            return None
        if found(self.weight) is None and found(self.bias) is not None:
            return None
        if (found(self.mean) is None) is not (found(self.var) is None):
            return None
        usual = type(self.momentum) in (float, int, type(None)) if self.by_batch else found(self.mean) is not None
        return self if usual else None

    def factor(self) -> float:
        """The weight of the next batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        count = found(self.count)
        return 0.0 if count is None else 1.0 / (float(count) + 1.0)


class Affine(NamedTuple):
    """linear(x, weight, bias) over the last dimension of x."""

    weight: Place
    bias: Place

    @classmethod
    def of_layer(cls, layer: nn.Linear) -> Affine:
        return cls((layer._parameters, "weight"), (layer._parameters, "bias"))


class LayerNormalization(NamedTuple):
    """layer_norm(x, shape, weight, bias, eps) over the last dimensions of x, which are of that shape."""

    weight: Place
    bias: Place
    shape: tuple[int, ...]
    eps: float

    @classmethod
    def of_layer(cls, layer: nn.LayerNorm) -> LayerNormalization | None:
        """That of a layer, exactly of torch's class or one that normalises over the channels of an image."""
        affine = layer._parameters
        return cls.of((affine, "weight"), (affine, "bias"), *map(layer.__dict__.get, ("normalized_shape", "eps")))

    @classmethod
    def of(cls, weight: Place, bias: Place, shape: Any, eps: Any) -> LayerNormalization | None:
        """None where the settings are no numbers."""
        if not isinstance(shape, (list, tuple)) or not all(type(n) is int for n in shape) or type(eps) is not float:
            return None
        return cls(weight, bias, tuple(shape), eps)
