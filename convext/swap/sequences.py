"""Convolutions in a row that run as one call of the compiled library, without a tensor between them.

Two things are put together, in the graph of a container's forward:

    Block      chains of pointwise and depthwise convolutions and runs of layers over channels (pixelwise.py), each
               read by the next alone, as an inverted residual or ConvNeXt's block is made of them, squeeze and
               excitation between two of them included: they are computed a strip of rows at a time, so that what lies
               between them stays in the cache (csrc/cpu/runtime/block.h)
    Sequence   chains, runs, blocks and containers that are such a sequence themselves, one after the other with nothing
               else in between: one call computes them all (csrc/torch/ops_sequence.cpp)

Both stand only where a chain would run straight (place.runs_direct). A call looks up what a chain's own call looks up;
where anything is not as it was when the sequence was prepared, its members run one by one, and it is prepared anew.
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from .. import ops
from ..backends.native_sequence import Block as PreparedBlock
from ..backends.native_sequence import Step as PreparedStep
from ..problem import DTYPES
from . import pixelwise, place, squeeze_excite
from .chains import Chain
from .heads import Head
from .pixelwise import Run

# ---- finding them ----------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Chains and runs in order; `excited`: position of one -> the node of the squeeze and excitation before it."""
    chains: list[Chain | Run]
    excited: dict[int, fx.Node] = field(default_factory=dict)

    @property
    def last(self):
        return self.chains[-1].last

    @property
    def nodes(self):
        return [node for i, chain in enumerate(self.chains)
                for node in ([self.excited[i]] if i in self.excited else []) + chain.nodes]

    @property
    def inputs(self):
        """What it reads: the source, then each residual that is not the source."""
        source = self.chains[0].source
        return [source, *dict.fromkeys(c.residual for c in self.chains if c.residual not in (None, source))]


@dataclass
class Nested:
    """The call of a container that may be a sequence itself."""
    last: fx.Node

    @property
    def nodes(self):
        return [self.last]

    @property
    def inputs(self):
        return list(self.last.args)


@dataclass
class Sequence:
    """`members`: chains, runs, blocks and nested containers in the order of their calls."""
    members: list

    @property
    def last(self):
        return self.members[-1].last

    @property
    def nodes(self):
        return [node for member in self.members for node in member.nodes]

    @property
    def inputs(self):
        return self.members[0].inputs[:1]


def find_blocks(graph, found, modules, is_free, excites):
    """The chains and runs `found` in a graph, those that can run as one put together: a list of Chain, Run and Block.

    `is_free(node)`: whether a value may be channels-last; `excites(node)`: whether a node is squeeze and excitation.
    Whether the kernels take a block is seen when it is prepared."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    by_source, units, taken = {}, [], set()
    for chain in found:
        by_source.setdefault(chain.source, []).append(chain)
    for chain in found:
        if id(chain) in taken:
            continue
        block = Block([chain])
        while _suits(block.chains[-1], modules):
            node, excited = block.last, None
            if not is_free(node) or len(node.users) != 1:
                break
            follower = next(iter(node.users))
            if excites(follower) and follower.args == (node,) and len(follower.users) == 1:
                node, excited = follower, follower
            nexts = by_source.get(node, [])
            if len(nexts) != 1 or not _suits(nexts[0], modules) or id(nexts[0]) in taken \
                    or nexts[0].residual in block.nodes:
                break
            if excited is not None:
                block.excited[len(block.chains)] = excited
            block.chains.append(nexts[0])
        if len(block.chains) > 1 and _nothing_between(block, order, graph):
            units.append(block)
            taken.update(map(id, block.chains))
        else:
            units.append(chain)
    return [unit for unit in units if isinstance(unit, Block) or id(unit) not in taken]


def _suits(chain, modules):
    if isinstance(chain, Run):
        return True
    conv = modules[chain.conv]
    pointwise = conv.kernel_size == (1, 1) and conv.padding in ((0, 0), 0)
    return pointwise and conv.groups == 1 or conv.groups == conv.in_channels > 1


def _nothing_between(unit, order, graph):
    """True where nothing stands between the ends of a block that could write what it reads."""
    members = set(unit.nodes)
    start, end = order[unit.chains[0].nodes[0]], order[unit.last]
    return all(node in members or node.op in ("get_attr", "placeholder") for node in list(graph.nodes)[start:end + 1])


def find(graph, units, is_free, nests):
    """The units of a graph, those that follow each other put together: a list of Chain, Run, Block and Sequence.

    `nests(node)`: whether a node calls a container that may be a sequence itself. A LayerNorm or a head that nothing is
    put together with is left to its modules."""
    by_last = {unit.last: unit for unit in units}
    inside = {node for unit in units for node in unit.nodes}
    rows = [[]]
    for node in graph.nodes:
        if node in by_last:
            rows[-1].append(by_last[node])
        elif node not in inside and nests(node):
            rows[-1].append(Nested(node))
        elif node not in inside and node.op not in ("placeholder", "get_attr"):
            rows.append([])  # something else runs here
    found = []
    for row in rows:
        while row:
            length = _longest(row, is_free)
            alone = [] if isinstance(row[0], (Nested, Head)) or pixelwise.is_norm_alone(row[0]) else row[:1]
            found += [Sequence(row[:length])] if length > 1 else alone
            row = row[length:]
    return found


def _longest(row, is_free):
    """How many members from the first on can be one sequence: what they compute is read by themselves alone, but for
    the last one's result."""
    longest, values, nodes = 1, set(row[0].inputs), set()
    if len(values) > 1:
        return 1
    source = row[0].inputs[0]
    for length, member in enumerate(row, 1):
        is_head = isinstance(member, Head)
        if not values.issuperset(member.inputs) or not is_head and not is_free(member.last):
            break
        nodes.update(member.nodes)
        if all(nodes.issuperset(value.users) for value in values if value is not source):
            longest = length
        if is_head:
            break  # its result is no image
        values.add(member.last)
    return longest


class layer_by_layer:
    """Makes every convolution of a swapped network a call of its own: a setting, and a context manager that puts the
    former one back.

        with convext.layer_by_layer(): ...   # what a profiler sees inside are layers
        convext.layer_by_layer(True)         # from here on
        convext.layer_by_layer(False)        # together again, the default

    Convolutions compute the same bit for bit; squeeze and excitation, LayerNorm and linear layers are torch's own then.
    What lies between two layers is a tensor again. The setting is the process's.

    Args:
        on: True, the default, for calls of their own; False for calls of several layers.

    Raises TypeError for anything but True and False.

    Example:
        >>> with convext.layer_by_layer():
        ...     convext.layer_by_layer.on
        True
        >>> convext.layer_by_layer.on
        False
    """

    on = False

    def __init__(self, on: bool = True):
        if not isinstance(on, bool):
            raise TypeError(f"layer_by_layer: expected True or False, got {on!r}")
        self._former, layer_by_layer.on = layer_by_layer.on, on

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        layer_by_layer.on = self._former


# ---- running them ----------------------------------------------------------------------------------------------------


class Step:
    """A chain as it stands in a sequence: its prepared state, and where its tensors are. `excite` is the
    SqueezeExcite before it, None where there is none."""

    __slots__ = ("state", "attributes", "parameters", "bn_attributes", "affine", "statistics", "activation", "excite")

    def __init__(self, chain, modules, function, excite=None):
        self.state, self.activation = function.state, chain.activation
        self.attributes, self.parameters = self.state.attributes, self.state.parameters
        if chain.batch_norm is None:
            self.bn_attributes, self.affine, self.statistics = {"eps": 0.0}, {}, {}
        else:
            bn = modules[chain.batch_norm]
            self.bn_attributes, self.affine, self.statistics = bn.__dict__, bn._parameters, bn._buffers
        self.excite = excite

    @property
    def choice(self):
        return self.state.choice

    @property
    def eps(self):
        return self.bn_attributes["eps"]

    def tensors(self):
        """Weight, bias, mean, var, gamma, beta, and those of the squeeze and excitation before it."""
        mine = (self.parameters.get("weight"), self.parameters.get("bias"), self.statistics.get("running_mean"),
                self.statistics.get("running_var"), self.affine.get("weight"), self.affine.get("bias"))
        if self.excite is None:
            return mine
        squeeze, excite = self.excite.squeeze._parameters, self.excite.excite._parameters
        return *mine, squeeze.get("weight"), squeeze.get("bias"), excite.get("weight"), excite.get("bias")

    def prepared(self, before, residual):
        """The PreparedStep that reads the output of the problem `before`, which its own call has seen; None where it
        cannot be one."""
        if self.state.call is None:
            return None
        tensors = self.tensors()
        if self.statistics and tensors[2] is None:  # the batch's own statistics are wanted
            return None
        if any(not t.is_contiguous() for t in tensors[6:] if t is not None):
            return None
        excite = self.excite and (self.excite.activation, squeeze_excite.GATES.index(self.excite.gate))
        return PreparedStep(self.state.choice.problem, self.activation, residual,
                            tuple(t is not None for t in tensors), excite)

    def facts(self, tensors):
        """What a prepared call relies on besides which tensors are there; None where they are none of torch's own."""
        w, settings = tensors[0], place.settings_of(self.attributes)
        return None if type(w) not in place.PLAIN else (settings, w.shape, w.stride(), place.dtypes(*tensors))

    def places(self):
        """(dictionary, name) of each of `tensors`."""
        mine = [(self.parameters, "weight"), (self.parameters, "bias"), (self.statistics, "running_mean"),
                (self.statistics, "running_var"), (self.affine, "weight"), (self.affine, "bias")]
        if self.excite is None:
            return mine
        return mine + [(conv._parameters, name) for conv in (self.excite.squeeze, self.excite.excite)
                       for name in ("weight", "bias")]


class _Builder:
    """What a sequence is made of, while it is put together. Values are numbered: 0 is the input."""

    def __init__(self):
        self.blocks, self.steps = [], []
        self.flat = False     # whether the result is (N, C), not an image

    def add(self, steps, source, residuals, before=None):
        """Adds a block and returns the value that it computes; None where a step has no kernel yet. `before`: the
        problem whose output the first step reads, for one that does not know."""
        prepared = []
        for step, residual in zip(steps, residuals):
            ready = step.prepared(before, residual)
            if ready is None:
                return None
            prepared.append(ready)
            before = ready.problem
            self.steps.append(step)
        self.blocks.append(PreparedBlock(source, tuple(prepared)))
        return len(self.blocks)


class _Runner:
    """function(*inputs) of a block or a sequence: prepared where it can be, else `apart`, one by one. `autocast`: the
    dtype that the input is cast to, or None."""

    def __init__(self, autocast):
        self.autocast = autocast
        self.prepared = self.refused = None

    def __call__(self, x, *others):
        if self.autocast is not None and x.dtype is not self.autocast:
            x = ops.autocast_cast(x, "cpu", self.autocast)
        if layer_by_layer.on:
            return self.apart(x, *others)
        if self.prepared is not None and not others:
            y = self.prepared(x)
            if y is not None:
                return y
            self.prepared = None
        y = self.apart(x, *others)
        signature = x.shape, x.stride(), x.dtype, x.device
        if not others and signature != self.refused:
            self.prepared = self._prepare(x, signature)
            self.refused = None if self.prepared is not None else signature
        return y

    def _prepare(self, x, signature):
        builder = _Builder()
        if x.dtype not in DTYPES or self.emit(builder, [0]) is None:
            return None
        return _prepared(builder, x, signature)


@dataclass
class Parts:
    """What the runners of one graph are made of: the modules by their keys, the container's own parameters,
    fused(chain) that makes a chain's function, apart(run) that makes a run's, node -> SqueezeExcite or None,
    node -> (call, resolve) of a nested container, and autocast's dtype or None."""
    modules: dict
    parameters: dict
    fused: Callable
    apart: Callable
    excites: dict
    nested: dict
    autocast: torch.dtype | None

    def runner(self, unit):
        if isinstance(unit, Chain):
            return ChainRunner(unit, self.modules, self.fused(unit))
        if isinstance(unit, Run):
            return RunRunner(unit, self)
        if isinstance(unit, Block):
            return BlockRunner(unit, self)
        if isinstance(unit, Head):
            return HeadRunner(unit, self)
        if isinstance(unit, Nested):
            return NestedRunner(*self.nested[unit.last])
        return SequenceRunner(unit.inputs[0], [(m.last, m.inputs, self.runner(m)) for m in unit.members], self.autocast)


class BlockRunner(_Runner):
    def __init__(self, block, parts):
        super().__init__(parts.autocast)
        inputs = block.inputs
        self.functions, self.calls, self.steps = [], {}, []
        self.residuals = [None if c.residual is None else inputs.index(c.residual) for c in block.chains]
        self.step_residuals = []  # of each step
        for i, (chain, residual) in enumerate(zip(block.chains, self.residuals)):
            if isinstance(chain, Run):
                steps = [pixelwise.LayerStep(layer, chain, parts) for layer in chain.layers]
                self.functions.append(parts.apart(chain))
            else:
                excite = None
                if i in block.excited:
                    node = block.excited[i]
                    self.calls[i], excite = parts.nested[node][0], parts.excites[node]
                self.functions.append(parts.fused(chain))
                steps = [Step(chain, parts.modules, self.functions[-1], excite)]
            self.steps += steps
            self.step_residuals += [None] * (len(steps) - 1) + [residual]

    def apart(self, *given):
        y = given[0]
        for i, (function, residual) in enumerate(zip(self.functions, self.residuals)):
            if i in self.calls:
                y = self.calls[i](y)
            y = function(y) if residual is None else function(y, given[residual])
        return y

    def emit(self, builder, values):
        residuals = [None if r is None else values[r] for r in self.step_residuals]
        return builder.add(self.steps, values[0], residuals, self.before())

    def before(self):
        """The problem whose output the block reads, where its first layer does not know."""
        first = self.functions[0]
        return first.source if isinstance(first, pixelwise.Apart) else None


class RunRunner(BlockRunner):
    """A run that no chain is put together with."""

    def __init__(self, run, parts):
        super().__init__(Block([run]), parts)


class HeadRunner:
    """A head as the last member of a sequence."""

    def __init__(self, head, parts):
        self.function = parts.apart(head)
        self.steps = [pixelwise.LayerStep(layer, head, parts) for layer in head.layers]

    def __call__(self, *given):
        return self.function(*given)

    def emit(self, builder, values):
        value = values[0]
        for step in self.steps:
            before = builder.blocks[value - 1].steps[-1].problem if value > 0 else self.function.source
            value = builder.add([step], value, [None], before)
            if value is None:
                return None
        builder.flat = True
        return value


class ChainRunner:
    """A chain as a member of a sequence."""

    def __init__(self, chain, modules, function):
        self.function, self.step = function, Step(chain, modules, function)

    def __call__(self, *given):
        return self.function(*given)

    def emit(self, builder, values):
        return builder.add([self.step], values[0], [values[1] if len(values) > 1 else None])


class NestedRunner:
    """A container's call as a member of a sequence. `call` is what the plan would call; `resolve()` returns what runs
    all
    of the container, or None."""

    def __init__(self, call, resolve):
        self.call, self.resolve = call, resolve

    def __call__(self, *given):
        return self.call(*given)

    def emit(self, builder, values):
        whole = self.resolve()
        return None if whole is None else whole.emit(builder, values)


class SequenceRunner(_Runner):
    """`members`: (node of the result, nodes that it reads, function) of each in order.

    Where the kernels refuse the sequence, it is tried without its first member: that is often the network's first
    layer, whose input is the caller's, in whatever layout."""

    def __init__(self, source, members, autocast):
        super().__init__(autocast)
        names = {source: 0}
        self.members = []
        for last, inputs, function in members:
            self.members.append((function, [names[node] for node in inputs]))
            names[last] = len(names)
        first, *rest = members
        self.rest = None
        if len(rest) > 1 and all(source not in inputs for _, inputs, _ in rest):
            self.rest = SequenceRunner(first[0], rest, autocast)

    def apart(self, x):
        if self.refused is not None and self.rest is not None and not layer_by_layer.on:
            return self.rest(self.members[0][0](x))
        values = [x]
        for function, inputs in self.members:
            values.append(function(*[values[i] for i in inputs]))
        return values[-1]

    def emit(self, builder, values):
        numbers = list(values)
        for function, inputs in self.members:
            number = function.emit(builder, [numbers[i] for i in inputs])
            if number is None:
                return None
            numbers.append(number)
        return numbers[-1]


def _prepared(builder, x, signature):
    """call(x) -> y for calls like this one, or None where the kernels cannot run it; it answers None where something is
    not as it was."""
    steps = builder.steps
    choices = [step.choice for step in steps if step.choice is not None]
    backend = choices[0].backend if choices else None
    if not hasattr(backend, "prepared_sequence") or any(choice.backend is not backend for choice in choices) \
            or not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return None
    sequence = backend.prepared_sequence(builder.blocks)
    if sequence is None:
        return None
    present = [step.present for block in builder.blocks for step in block.steps]
    expected = [(step, step.facts(step.tensors()), there) for step, there in zip(steps, present)]
    counters = {id(choice.counter): choice.counter for choice in choices}  # one for each kernel
    times = Counter(id(choice.counter) for choice in choices)
    counts = [(counter, times[key]) for key, counter in counters.items()]
    run, guards, kept = sequence.run, None, None

    def look_up():
        """The tensors and eps of every step, handed over, or None where something is not as it was."""
        tensors = []
        for step, facts, there in expected:
            given = step.tensors()
            if facts is None or tuple(t is not None for t in given) != there or step.facts(given) != facts:
                return None
            tensors.append(given)
        return sequence.keep(tensors, [step.eps for step in steps], builder.flat)

    def again(x):
        nonlocal guards, kept
        if (x.shape, x.stride(), x.dtype, x.device) != signature:
            return None
        if guards is None or not guards.holds():
            kept = look_up()
            if kept is None:
                return None
            guards = _guards(sequence.guards(), steps)
        for counter, calls in counts:
            counter[0] += calls
        try:
            return run(x, kept)
        except RuntimeError:  # a weight of another shape through `.data`, which no dictionary shows
            return None

    return again


def _guards(guards, steps):
    """Notes which tensors the steps have. Everything else that `look_up` looks at is among the facts of the plan that
    holds the sequence."""
    for step in steps:
        for values, name in step.places():
            if name in values:
                guards.item(values, name, values[name])
            else:
                guards.absent(values, name)
    return guards
