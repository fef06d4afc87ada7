"""torch.ops.convext.planned(inputs, parameters, text): a part of a graph, run by a plan of the swap's, no gradients.

    text   what is computed: the nodes of a graph over torch's own functions, as JSON

The operator means what the text says: those functions, called one by one. How they are run is settled at each call, as
in a swapped model: by the present backend, setting and shapes, and one by one where the kernels do not take them. So
nothing stale can be in a graph, nor in a cache of compiled graphs, and sizes may be symbolic where it is compiled.

What is made of a text belongs to the thread. It holds no tensor between two calls (swap/capture/captured.py, `Lender`),
so that a model can go while the code compiled for it stays.
"""

from __future__ import annotations

import contextlib
import json
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from .. import backends, ops
from ..backends import native
from ..memory_format import memory_format
from ..swap.capture.captured import Captured, Lender
from ..swap.modes import present
from ..swap.plan import Compilation

_library: Any = ops.LIBRARY
_library.define("planned(Tensor[] inputs, Tensor[] parameters, str text) -> Tensor")
PLANNED = torch.ops.convext.planned.default

# Where a text's functions are found, and they alone.
_HOMES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch._C._nn": torch._C._nn,
    "operator": operator,
}
_MOST_TEXTS = 256  # that a thread keeps plans for


class Untold(Exception):
    """A node that no text can tell of."""


class Part(NamedTuple):
    """What becomes a text.

    inputs, parameters  nodes from outside, of values and of tensors that are found by name
    nodes               in order, the result last
    examples            of the parameters: tensors of their dtypes and shapes
    in_seam             values between layers may be in any memory format (swap/schedule/layout.py)
    channels_last       the format of the result, where that is an image, else None
    autocast            the dtype to which tensors on the CPU are cast, or None
    """

    inputs: list[fx.Node]
    parameters: list[fx.Node]
    nodes: list[fx.Node]
    examples: list[torch.Tensor]
    in_seam: bool
    channels_last: bool | None
    autocast: torch.dtype | None

    def text(self) -> str:
        """Raises Untold."""
        numbers = {node: number for number, node in enumerate([*self.inputs, *self.parameters, *self.nodes])}

        def told(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if value not in numbers:
                    raise Untold(value.name)
                return {"node": numbers[value]}
            if type(value) is tuple:
                return {"tuple": list(map(told, value))}
            if isinstance(value, list):
                return list(map(told, value))
            if value is None or type(value) in (bool, int, float, str):
                return value
            raise Untold(repr(value))

        def line(node: fx.Node) -> list[Any]:
            kwargs = {name: told(value) for name, value in node.kwargs.items()}
            target = node.target if node.op == "call_method" else _name_of(node.target)
            return [node.op, target, list(map(told, node.args)), kwargs]

        said = {
            "inputs": len(self.inputs),
            "parameters": [[str(t.dtype).removeprefix("torch."), [*map(int, t.shape)]] for t in self.examples],
            "nodes": list(map(line, self.nodes)),
            "in_seam": self.in_seam,
            "channels_last": self.channels_last,
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
        }
        return json.dumps(said, separators=(",", ":"))


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", "")
    for home, module in _HOMES.items():
        if name and getattr(module, name, None) is function:
            return f"{home}:{name}"
    raise Untold(repr(function))


class _Lent(dict[int, torch.Tensor]):
    """The tensors of a call by their numbers: as a dictionary in which they are found, but without its being filled and
    emptied, which for a network's hundreds of tensors would take as long as a layer."""

    tensors: Sequence[torch.Tensor] = ()

    def get(self, number: Any, default: Any = None) -> Any:
        return self.tensors[number]

    def __missing__(self, number: int) -> torch.Tensor:
        return self.tensors[number]


class _Text(Captured):
    """A text as a graph over the tensors that are lent to it."""

    lender: Lender

    def __init__(self, text: str):
        said = json.loads(text)
        self.graph, self.modules, self.lent = fx.Graph(), {"0": None}, _Lent()
        self.parameters = [(getattr(torch, dtype), torch.Size(shape)) for dtype, shape in said["parameters"]]
        self.places = [(self.lent, number) for number in range(len(self.parameters))]
        self.in_seam: bool = said["in_seam"]
        self.channels_last: bool | None = said["channels_last"]
        self.autocast = None if said["autocast"] is None else getattr(torch, said["autocast"])
        nodes = [self.graph.placeholder(f"x{number}") for number in range(said["inputs"])]
        nodes += [self.graph.create_node("get_attr", f"at.{number}", (), {}) for number in range(len(self.parameters))]

        def meant(value: Any) -> Any:
            if isinstance(value, dict):
                return nodes[value["node"]] if "node" in value else tuple(map(meant, value["tuple"]))
            return list(map(meant, value)) if isinstance(value, list) else value

        for op, target, args, kwargs in said["nodes"]:
            if op == "call_function":
                home, name = target.split(":")
                target = getattr(_HOMES[home], name)
            given = {name: meant(value) for name, value in kwargs.items()}
            nodes.append(self.graph.create_node(op, target, tuple(map(meant, args)), given))
        self.graph.output(nodes[-1])
        self.drop_dropouts()
        self.compilation, self.lender = Compilation(self), Lender()
        self._there: Any = None  # where the parameters of the last call lay

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is not None:
            return torch.autocast("cpu", self.autocast)
        if ops._autocast_active():
            return torch.autocast("cpu", enabled=False)
        return contextlib.nullcontext()

    def one_by_one(self, inputs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the operator means."""
        given = iter(inputs)
        found: dict[fx.Node, Any] = {}
        with self._casting():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    found[node] = next(given)
                elif node.op == "get_attr":
                    found[node] = parameters[int(str(node.target).partition(".")[2])]
                elif node.op == "output":
                    break
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
                    function: Callable[..., Any] = (
                        operator.methodcaller(node.target, *args[1:], **kwargs)
                        if node.op == "call_method"
                        else node.target
                    )
                    found[node] = function(args[0]) if node.op == "call_method" else function(*args, **kwargs)
        result: Any = node.args[0]
        return self._in_format(found[result])

    def _in_format(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.channels_last is None else y.contiguous(memory_format=memory_format(self.channels_last, 4))

    def run(self, inputs: Sequence[torch.Tensor], parameters: list[torch.Tensor]) -> torch.Tensor:
        """The same by a plan, where there are kernels. Not differentiable."""
        if any([x.device.type != "cpu" for x in inputs]) or not self._known(parameters):
            return self.one_by_one(inputs, parameters)
        self.lent.tensors = parameters
        try:
            with self._casting():
                in_seam = self.in_seam and backends.forced() in (None, "native")
                y = self.compilation.compiled(present(in_seam)).function(None, *inputs)
            return self._in_format(y)
        finally:
            self.lent.tensors = ()

    def _known(self, parameters: list[torch.Tensor]) -> bool:
        """True of tensors that a plan of the text takes: where they lie as before, those of the call before."""
        if self._there is not None and self._there.still(parameters):
            return True
        self._there, self.lender.time = None, object()
        if not all(
            t.dtype is dtype and t.shape == shape and t.device.type == "cpu" and t.layout is torch.strided
            for t, (dtype, shape) in zip(parameters, self.parameters)
        ):
            return False
        self._there = native.places(parameters)
        return True


class _Texts(threading.local):
    def __init__(self) -> None:
        self.known: OrderedDict[str, _Text] = OrderedDict()

    def get(self, text: str) -> _Text:
        known = self.known.get(text)
        if known is None:
            known = self.known[text] = _Text(text)
            if len(self.known) > _MOST_TEXTS:
                self.known.popitem(last=False)
        self.known.move_to_end(text)
        return known


_texts = _Texts()


def run(inputs: Sequence[torch.Tensor], parameters: list[torch.Tensor], text: str) -> torch.Tensor:
    """The operator, past the dispatcher. Records no gradient."""
    known = _texts.get(text)
    recorded = torch.is_grad_enabled()
    if recorded:
        torch._C._set_grad_enabled(False)
    try:
        return known.run(inputs, parameters)
    finally:
        if recorded:
            torch._C._set_grad_enabled(True)


def _fake(inputs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], text: str) -> torch.Tensor:
    return _texts.get(text).one_by_one(inputs, parameters)


_library.impl("planned", run, "CompositeExplicitAutograd")
torch.library.register_fake("convext::planned", _fake, lib=_library)
