"""PlannedForward: what stands as `container.forward` after a swap.

It traces the container's own forward once for each form in which it is called, and runs the compiled plan. Whenever
a plan cannot stand for the forward that the class defines, that forward runs instead.
"""
import functools
import inspect
import itertools
import operator
import weakref

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from .. import backends
from ..backends import native
from . import calls, chains, codegen, heads, layout, linears, pixelwise, place, sequences, squeeze_excite
from . import signature as signatures
from .audit import Untraceable
from .tracing import Trace

_GLOBAL_HOOKS = tuple(getattr(_torch_module, name) for name in (
    "_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_hooks", "_global_forward_pre_hooks"))
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_hooks = operator.itemgetter(*_HOOKS)
_training = operator.itemgetter("training")
_is_tracing = torch._C._get_tracing_state
_MOST_SIGNATURES, _MOST_TRACES, _MOST_VARIANTS = 8, 4, 16


class Variant:
    """A compiled plan for one combination of training flags, hooks and memory formats.

    function(owner, *tensors); chains; runs: those of pixelwise.py that run as steps; alone: why a convolution has
    nothing fused; layout: None outside the seam; contiguous(tensor) -> the same, contiguous."""

    def __init__(self, plan, opaque, in_seam, direct):
        trace = plan.trace
        modules = trace.modules
        self.chains, self.alone = chains.find(trace.graph, modules, opaque)
        taken = {node for chain in self.chains for node in chain.nodes}
        found_heads = heads.find(trace.graph, modules, opaque, taken) if direct else []
        if direct is not True:  # under autocast a LayerNorm is computed in float32
            found_heads = [head for head in found_heads if all(layer.kind != "layer norm" for layer in head.layers)]
        taken.update(node for head in found_heads for node in head.nodes)
        self.runs = pixelwise.find(trace.graph, modules, opaque, taken)
        self.layout = None
        if in_seam:
            aliases = chains.aliases_of(trace.graph, modules)
            units = self.chains + self.runs + found_heads
            self.layout = layout.Layout(trace.graph, modules, units, aliases, opaque, plan.result_of)

        def call_leaf(node):
            module = modules[node.target]
            if in_any_format(node):
                return module.__dict__["forward"].in_any_format
            return module

        def attribute(node):
            key, _, name = node.target.partition(".")
            module = modules[key]
            return operator.attrgetter(name) if module is None else lambda owner: getattr(module, name)

        self.fused = {}    # key of a convolution -> the function of its chain

        def is_free(node):
            return self.layout is None or node in self.layout.channels_last \
                or node in self.layout.free and node not in self.layout.pinned

        def fused_chain(chain):
            batch_norm = None if chain.batch_norm is None else modules[chain.batch_norm]
            channels_last = self.layout is not None and is_free(chain.last)
            self.fused[chain.conv] = place.bind(modules[chain.conv], batch_norm, chain.activation,
                                                _apart(chain, chain.nodes, modules), channels_last, direct)
            return self.fused[chain.conv]

        def apart_run(run):
            return pixelwise.Apart(_apart(run, run.core, modules, run.readers(trace.parameters)))

        def in_any_format(node):
            return self.layout is not None and node in self.layout.any_format

        def planned(node):
            """The PlannedForward of the container that a node calls, where nothing else sees the call, or None."""
            module = modules[node.target] if node.op == "call_module" and node.target not in opaque else None
            forward = module.__dict__.get("forward") if module is not None else None
            if not isinstance(forward, PlannedForward) or node.kwargs or len(node.args) != 1 \
                    or type(module).__call__ is not nn.Module.__call__ or "_compiled_call_impl" in module.__dict__ \
                    or self.layout is not None and node not in self.layout.any_format | self.layout.channels_last:
                return None
            return forward

        self.whole = None  # what runs all of the forward as a member of a sequence, where one unit does
        units, runners = self.chains, {}
        if direct is not True:  # under autocast a LayerNorm is computed in float32
            self.runs = []
        if direct:
            self.runs = [run for run in self.runs if is_free(run.last)]
            order = {node: position for position, node in enumerate(trace.graph.nodes)}
            units = sorted(self.chains + self.runs, key=lambda unit: order[unit.nodes[0]])
            excites = {n: squeeze_excite.match(f.owner, f.plan(f.owner, signatures.ONE_TENSOR))
                       for n in trace.graph.nodes if (f := planned(n)) is not None}
            nested = {n: (call_leaf(n), functools.partial(_whole_of, modules[n.target], in_any_format(n), direct))
                      for n in excites}
            units = sequences.find_blocks(trace.graph, units, modules, is_free, lambda n: excites.get(n) is not None)
            # One that is no sequence itself now would keep those around it from being one.
            units = sequences.find(trace.graph, units + found_heads, is_free,
                                   lambda n: n in nested and nested[n][1]() is not None)
            parts = sequences.Parts(modules, trace.parameters, fused_chain, apart_run, excites, nested,
                                    None if direct is True else direct)
            runners = {unit.last: parts.runner(unit) for unit in units}
            taken = {node for unit in units for node in unit.nodes}
            self.runs = [run for run in self.runs if run.last in taken]
        else:
            units = units + linears.find(trace.graph, modules, opaque, self.chains)
        if len(units) == len(runners) == 1:
            first, *inner, output = trace.graph.nodes
            if first.op == "placeholder" and set(inner) == set(units[0].nodes) and units[0].inputs == [first] \
                    and output.args[0] is units[0].last:
                self.whole = runners[units[0].last]

        def fused(unit):
            if isinstance(unit, linears.Linear):
                return linears.bind(modules[unit.conv], unit.activation, _apart(unit, unit.nodes, modules))
            if not direct:
                return fused_chain(unit)
            runner = runners[unit.last]
            return runner.function if isinstance(unit, chains.Chain) else runner

        self.contiguous = layout.contiguous if direct else torch.Tensor.contiguous
        self.function = codegen.generate(trace.graph, units, self.layout, call_leaf, fused, attribute, self.contiguous)

    def result(self, owner, tensors, in_seam):
        """The forward's, for the caller of the module."""
        result = self.function(owner, *tensors)
        return self.contiguous(result) if in_seam and self.layout.returns == "free" else result

    @property
    def works_in_any_format(self):
        return self.layout is not None and self.layout.accepts and self.layout.returns is not None


def _apart(unit, nodes, modules, readers=None):
    """function(x, residual) that runs the nodes of a chain or a run one by one, each as the forward wrote it.
    `readers`: node -> function of nothing that gives its value."""
    def step(node, previous):
        if node.op == "call_module":
            function, args, kwargs = modules[node.target], node.args, node.kwargs
        elif node.op == "call_method":
            function, args, kwargs = operator.methodcaller, node.args, node.kwargs
        else:
            function, args, kwargs = node.target, node.args, node.kwargs

        def run(value, residual):
            given = [value if a is previous else residual if a is unit.residual else a for a in args]
            if readers:
                given = [readers[a]() if isinstance(a, torch.fx.Node) else a for a in given]
            if node.op == "call_method":
                return function(node.target, *given[1:], **kwargs)(given[0])
            return function(*given, **kwargs)
        return run

    previous = [unit.source, *nodes[:-1]]
    steps = [step(node, before) for node, before in zip(nodes, previous)]

    def apart(x, residual=None):
        for run in steps:
            x = run(x, residual)
        return x

    return apart


def _whole_of(module, in_seam, direct):
    """(what runs all of a container's forward as a member of a sequence, its plan, the container), or None."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, PlannedForward) or in_seam and forward.result_in_any_format(1) is None:
        return None
    plan = forward.plan(module, signatures.ONE_TENSOR)
    variant = plan.variant(in_seam, direct) if plan is not None else None
    return None if variant is None or variant.whole is None else (variant.whole, plan, module)


class Plan:
    """A trace and its compiled variants."""

    def __init__(self, trace, signature):
        self.trace, self.signature = trace, signature
        leaves = trace.leaves
        self.types = list(map(type, leaves))
        self.leaves = leaves
        self.keys = [key for key in trace.modules if key != "0"]
        self.attributes = [m.__dict__ for m in leaves]
        self.watched = self.attributes + [m.__dict__ for m in trace.sequences]
        self.sequences = [m.__dict__ for m in trace.sequences]
        self.sequence_forwards = [d.get("forward") for d in self.sequences]
        self.forwards = [d.get("forward") for d in self.attributes]
        convs = [m for m in leaves if calls.is_conv(m)]
        telling = [m for m in convs if m.weight is not None and m.weight.dim() == 4
                   and m.weight.shape[1] > 1 and m.weight[0, 0].numel() > 1]
        self.weights = [m.__dict__ for m in telling or convs]
        self.variants, self.epoch = {}, backends.epoch

    def result_of(self, node):
        """What a leaf container returns whose own plan neither minds channels-last arguments nor hides such a result
        (see layout.Layout), else None."""
        module = self.trace.modules[node.target]
        forward = module.__dict__.get("forward") if module is not None else None
        if not isinstance(forward, PlannedForward) or node.kwargs or "_compiled_call_impl" in module.__dict__ \
                or type(module).__call__ is not nn.Module.__call__ or not node.args \
                or any(not isinstance(a, torch.fx.Node) for a in node.args):
            return None
        return forward.result_in_any_format(len(node.args))

    def variant(self, in_seam, direct=False):
        """The compiled variant for the modules' present state, or None where the plan cannot stand."""
        if self.epoch is not backends.epoch:     # prepared calls hold the backends' choices
            self.variants.clear()
            self.epoch = backends.epoch
        state = self.state()
        if state is None:
            return None
        key = *state, in_seam, direct
        variant = self.variants.get(key)
        if variant is None:
            if len(self.variants) >= _MOST_VARIANTS:
                self.variants.clear()
            variant = self.variants[key] = Variant(self, state[1], in_seam, direct)
        return variant

    def state(self):
        """(training flags, keys of the modules that must be called as they are), or None where the plan cannot
        stand."""
        training = tuple(map(_training, self.attributes))
        if [*map(type, self.leaves)] != self.types \
                or [*map(dict.get, self.attributes, itertools.repeat("forward"))] != self.forwards \
                or [*map(dict.get, self.sequences, itertools.repeat("forward"))] != self.sequence_forwards \
                or any(itertools.chain.from_iterable(map(_hooks, self.watched))):
            opaque = self._opaque()
            if opaque is None:
                return None
        else:
            opaque = self._foreign
        return training, opaque

    def watch(self, watch, owner=None):
        """Adds to a Watch that this plan, in the state it is in, stands for the owner's forward; False where the state
        is one that a Watch cannot tell. Without an owner, what is to be seen of it is left out (Trace.owner_stands)."""
        if self.state() is None or self.state()[1] or not self.trace.watch(watch, owner):
            return False
        for module, kind, attributes in zip(self.leaves, self.types, self.attributes):
            watch.type(module, kind)
            watch.item(attributes, "training", attributes["training"])
        for attributes in [*self.attributes, *self.sequences]:
            watch.item(attributes, "forward", attributes.get("forward"), "forward" not in attributes)
        for attributes in self.watched:
            for kind in _HOOKS:
                watch.empty(attributes, kind)
        return True

    def _opaque(self):
        """Keys of the modules that must be called as they are; None where a looked-through one listens."""
        for attributes in self.sequences:
            own = attributes.get("forward")
            if any(_hooks(attributes)) or own is not None and not isinstance(own, PlannedForward):
                return None
        opaque = set()
        for key, module, attributes, kind in zip(self.keys, self.leaves, self.attributes, self.types):
            own = attributes.get("forward")
            if any(_hooks(attributes)) or own is not None and not isinstance(own, PlannedForward):
                opaque.add(key)
            elif type(module) is not kind:
                return None
        return frozenset(opaque)

    @property
    def _foreign(self):
        """Leaves that had a forward of their own when the plan was made."""
        found = self.__dict__.get("_foreign_cache")
        if found is None:
            found = self._foreign_cache = frozenset(
                key for key, own in zip(self.keys, self.forwards)
                if own is not None and not isinstance(own, PlannedForward))
        return found


class Known:
    """What a call without gradients on one tensor found, for the next one on a tensor like it. `watch` tells whether
    the plan's modules are as they were; it knows nothing of the owner, which holds this."""

    __slots__ = ("plan", "variant", "in_seam", "contiguous", "epoch", "watch")

    def __init__(self, plan, variant, in_seam):
        self.plan, self.variant, self.in_seam = plan, variant, in_seam
        self.contiguous, self.epoch = layout.contiguous_weights(plan.weights), backends.epoch
        self.watch = None

    def holds(self, owner):
        return self.watch is not None and self.epoch is backends.epoch and self.plan.trace.owner_stands(owner) \
            and self.watch.holds() and layout.contiguous_weights(self.plan.weights) is self.contiguous


class PlannedForward:
    """A container's `forward` after the swap. Copies belong to the copied container; pickles carry no plan."""

    def __init__(self, owner):
        self._attach(owner)

    def _attach(self, owner):
        self._owner = weakref.ref(owner)
        self._plans = {}       # signature -> list of Plan, the latest first
        self._refusals = {}    # (signature, training) -> why there is no plan
        self._known = {}       # properties of a call's one tensor -> Known
        self.__name__, self.__doc__ = "forward", type(owner).forward.__doc__

    @property
    def owner(self):
        owner = self._owner()
        if owner is None:
            raise ReferenceError("the module of this forward is gone: keep the module, not only its forward")
        return owner

    @property
    def __signature__(self):
        return inspect.signature(type(self.owner).forward.__get__(self.owner))

    @property
    def __wrapped__(self):
        return type(self.owner).forward.__get__(self.owner)

    def __getstate__(self):
        return {"owner": self.owner}

    def __setstate__(self, state):
        self._attach_later(state["owner"])

    def _attach_later(self, owner):
        # While unpickling, the owner may still be without its attributes: nothing of it is read here.
        self._owner = weakref.ref(owner)
        self._plans, self._refusals, self._known = {}, {}, {}
        self.__name__ = "forward"

    def __copy__(self):
        raise TypeError("a swapped module's forward cannot be copied apart from its module")

    def __deepcopy__(self, memo):
        owner = memo.get(id(self.owner))
        if owner is None:
            raise TypeError("a swapped module's forward cannot be copied apart from its module; "
                            "copy the whole module, or convext.revert() it first")
        twin = PlannedForward.__new__(PlannedForward)
        twin._attach_later(owner)
        return twin

    def __call__(self, *args, **kwargs):
        owner = self.owner
        if torch.compiler.is_compiling() or _is_tracing() is not None or any(_GLOBAL_HOOKS):
            return type(owner).forward(owner, *args, **kwargs)
        signature, direct = signatures.of_call(args, kwargs), place.runs_direct()
        if direct and signature is signatures.ONE_TENSOR:
            x, = args
            properties = x.shape, x.stride(), x.dtype, x.device, direct
            known = self._known.get(properties)
            if known is not None and known.holds(owner):
                return known.variant.result(owner, args, known.in_seam)
        else:
            properties = None
        plan = self.plan(owner, signature)
        if plan is None:
            return type(owner).forward(owner, *args, **kwargs)
        tensors = args if plan.signature is signatures.ONE_TENSOR else signatures.tensors(args, kwargs)
        in_seam = layout.wanted(tensors) and layout.contiguous_weights(plan.weights)
        variant = plan.variant(in_seam, direct)
        if variant is None:
            return type(owner).forward(owner, *args, **kwargs)
        if properties is not None:
            self._know(properties, plan, variant, in_seam)
        return variant.result(owner, tensors, in_seam)

    def _know(self, properties, plan, variant, in_seam):
        """Remembers what was found for a call. Only one that comes again is worth a Watch."""
        former = self._known.get(properties)
        known = Known(plan, variant, in_seam)
        if former is not None and (former.plan, former.variant, former.in_seam) == (plan, variant, in_seam):
            watch = native.new_watch()
            if watch is not None and plan.watch(watch):
                known.watch = watch
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        self._known[properties] = known

    def in_any_format(self, *tensors):
        """The call from another plan: arguments and result may be channels-last where the user's own are not."""
        owner = self.owner
        plan = self.plan(owner, signatures.of_call(tensors, {}))
        if plan is not None and layout.contiguous_weights(plan.weights) and not any(_hooks(owner.__dict__)):
            variant = plan.variant(True, place.runs_direct())
            if variant is not None and variant.works_in_any_format:
                return variant.function(owner, *tensors)
        return _restored(owner, tensors)

    # Plans.

    def plan(self, owner, signature):
        """The plan for calls of a signature in the owner's present state, or None."""
        if signature is None:
            return None
        plans = self._plans.get(signature)
        if plans is not None:
            for position, plan in enumerate(plans):
                if plan.trace.current(owner):
                    if position:
                        plans.insert(0, plans.pop(position))
                    return plan
        if (signature, owner.training) in self._refusals:
            return None
        return self._make(owner, signature)

    def _make(self, owner, signature):
        if len(self._plans) + len(self._refusals) >= 2 * _MOST_SIGNATURES:
            return None
        if signature == signatures.ONE_TENSOR:
            signature = signatures.ONE_TENSOR
        try:
            plan = Plan(Trace(owner, signature), signature)
        except Untraceable as reason:
            if "profiler" not in str(reason):     # that one passes
                self._refusals[signature, owner.training] = str(reason)
            return None
        plans = self._plans.setdefault(signature, [])
        plans.insert(0, plan)
        del plans[_MOST_TRACES:]
        return plan

    # What the report reads.

    def present_variants(self):
        """(variant, modules) of the plans that hold for the owner's present state: those that have run, else what
        would run."""
        owner, found = self.owner, []
        if not any(plan.trace.current(owner) for plans in self._plans.values() for plan in plans):
            self.plan(owner, signatures.default(owner))
        for plans in self._plans.values():
            for plan in plans:
                if plan.trace.current(owner):
                    ran = [v for key, v in plan.variants.items() if key[:2] == plan.state()]
                    variants = ran or [v for v in [plan.variant(False)] if v is not None]
                    found += [(variant, plan.trace.modules) for variant in variants]
        return found

    def present_refusal(self):
        """Why there is no plan, where there is none."""
        training = self.owner.training
        return next((reason for (_, mode), reason in self._refusals.items() if mode == training), None)

    def forget_refusals(self):
        self._refusals.clear()

    def result_in_any_format(self, count):
        """What a call with `count` tensors would return where it takes channels-last tensors as they come: "free" or
        "channels-last" (see layout.Layout), else None."""
        plan = self.plan(self.owner, ((signatures.TENSOR,) * count, ()))
        variant = plan and plan.variant(True)
        return variant.layout.returns if variant and variant.works_in_any_format else None


def _restored(module, tensors):
    """module(*tensors) with contiguous arguments; what it writes into them reaches the originals."""
    given = [t.contiguous() for t in tensors]
    tracked = not any(t.is_inference() for t in given)
    versions = [t._version for t in given] if tracked else None
    result = module(*given)
    for position, (before, now) in enumerate(zip(tensors, given)):
        if now is not before and (not tracked or now._version != versions[position]):
            before.copy_(now)
    return result


def returned_kind(module, signature):
    """signature.TENSOR where a leaf is certain to return one tensor, else None."""
    if calls.module_returns_tensor(module):
        return signatures.TENSOR
    forward = module.__dict__.get("forward")
    if signature is None or not isinstance(forward, PlannedForward):
        return None
    plan = forward.plan(module, signature)
    if plan is not None and plan.trace.result in plan.trace.tensors:
        return signatures.TENSOR
    return None


