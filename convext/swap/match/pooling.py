"""Max pooling behind a convolution, with gradients: units/pooling.py says what for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .. import calls
from ..units import Format, Unit
from ..units.pooling import MaxPool, Settings

if TYPE_CHECKING:
    from ..modes import Mode
    from .graph import Graph, Node


def match(graph: Graph, mode: Mode) -> Iterator[Unit]:
    if mode.direct:
        return
    results = {unit.last for unit in graph.units if unit.runs and unit.first.gives == "image"}
    for node in graph.nodes:
        op = _max_pool(graph, node)
        if op is not None and node.args[0] in results:
            yield Unit(node.args[0], [op], [node], format=Format.AS_NODES)


def _max_pool(graph: Graph, node: Node) -> MaxPool | None:
    module = graph.module(node, nn.MaxPool2d)
    if module is not None:
        return MaxPool(functools.partial(_of_layer, module))
    if node.op != "call_function" or node.target not in (F.max_pool2d, torch.max_pool2d):
        return None
    names, defaults = ("kernel_size", "stride", "padding", "dilation", "ceil_mode"), (None, None, 0, 1, False)
    if len(node.args) > 1 + len(names) or set(node.kwargs) - {*names} or node.all_input_nodes != [node.args[:1][0]]:
        return None
    values = [calls.argument(node, 1 + i, name, default) for i, (name, default) in enumerate(zip(names, defaults))]
    return None if values[0] is None else MaxPool(lambda: (*values, False))  # type: ignore[arg-type, return-value]


def _of_layer(layer: nn.MaxPool2d) -> Settings:
    """As MaxPool2d.forward reads them, at the time of a call."""
    names = "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    return tuple(getattr(layer, name) for name in names)
