"""PlannedForward: what stands as `container.forward` after a swap.

It captures the container's own forward once for each form in which it is called, and runs the compiled plan. Whenever
a plan cannot stand for the forward that the class defines, that forward runs instead.
"""
import functools
import operator

import torch
from torch.nn.modules import module as _torch_module

from .. import backends
from ..backends import native
from . import calls, chains, codegen, heads, layout, linears, pixelwise, place, sequences, squeeze_excite
from .capture import signature as signatures
from .capture.trace import HOOKS, Trace
from .method import InstanceMethod
from .modes import function_mode_watches
from .refusal import ForNow, Untraceable

_GLOBAL_HOOKS = tuple(getattr(_torch_module, name) for name in (
    "_global_backward_pre_hooks", "_global_backward_hooks", "_global_forward_hooks", "_global_forward_pre_hooks"))
_is_tracing = torch._C._get_tracing_state
_MOST_SIGNATURES = 8   # that a container keeps plans for
_MOST_PLANS = 8        # for one signature: training and evaluation, with hooks and without, ...
_MOST_CAPTURES = 64    # for one signature: a forward that reads something new in each call runs as it is


class Variant:
    """A plan compiled for calls with gradients or without, in the user's memory format or in any.

    function(owner, *tensors); chains; runs: those of pixelwise.py that run as steps; alone: why a convolution has
    nothing fused; layout: None outside the seam; contiguous(tensor) -> the same, contiguous."""

    def __init__(self, plan, in_seam, direct):
        trace = plan.trace
        modules, opaque = trace.modules, trace.opaque
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
            if key == "at":
                values, name = trace.places[int(name)]
                return lambda owner: (owner.__dict__ if values is None else values)[name]
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
            if node not in trace.planned or node.kwargs or len(node.args) != 1 \
                    or self.layout is not None and node not in self.layout.any_format | self.layout.channels_last:
                return None
            return modules[node.target].__dict__["forward"]

        self.whole = None  # what runs all of the forward as a member of a sequence, where one unit does
        units, runners = self.chains, {}
        if direct is not True:  # under autocast a LayerNorm is computed in float32
            self.runs = []
        if direct:
            self.runs = [run for run in self.runs if is_free(run.last)]
            order = {node: position for position, node in enumerate(trace.graph.nodes)}
            units = sorted(self.chains + self.runs, key=lambda unit: order[unit.nodes[0]])
            excites = {n: squeeze_excite.match(f.plan(f.owner, signatures.ONE_TENSOR))
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

        self.contiguous = layout.contiguous_unrecorded if direct else layout.contiguous
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
    """What runs all of a container's forward as a member of a sequence, or None."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, PlannedForward) or in_seam and forward.result_in_any_format(1) is None:
        return None
    plan = forward.plan(module, signatures.ONE_TENSOR)
    return None if plan is None else plan.variant(in_seam, direct).whole


class _Guarded:
    """What stands as long as the facts do that it rests on."""

    def __init__(self, facts):
        self.facts = facts
        self.guards = facts.fill(native.new_guards())

    def holds(self, owner) -> bool:
        return self.guards.holds(owner)


class Refusal(_Guarded):
    """Why there is no plan."""

    def __init__(self, reason: Untraceable):
        super().__init__(reason.facts)
        self.reason = str(reason)


class Plan(_Guarded):
    """A captured forward and its compiled variants."""

    def __init__(self, trace, signature):
        super().__init__(trace.facts)
        self.trace, self.signature = trace, signature
        nested = {trace.modules[node.target] for node in trace.planned}
        inside = dict.fromkeys(part for m in trace.leaves for part in (m.modules() if m in nested else [m]))
        self.weights = layout.weights_to_ask([m for m in inside if calls.is_conv(m)])
        self.variants, self.epoch = {}, backends.epoch

    def result_of(self, node):
        """What a leaf container returns whose own plan neither minds channels-last arguments nor hides such a result
        (see layout.Layout), else None."""
        if node not in self.trace.planned or node.kwargs or not node.args \
                or any(not isinstance(a, torch.fx.Node) for a in node.args):
            return None
        return self.trace.modules[node.target].__dict__["forward"].result_in_any_format(len(node.args))

    def variant(self, in_seam, direct=False) -> Variant:
        """The plan compiled for such calls."""
        if self.epoch is not backends.epoch:     # prepared calls hold the backends' choices
            self.variants.clear()
            self.epoch = backends.epoch
        key = in_seam, direct
        variant = self.variants.get(key)
        if variant is None:
            variant = self.variants[key] = Variant(self, in_seam, direct)
        return variant


class PlannedForward(InstanceMethod):
    """A container's `forward` after the swap. Copies belong to the copied container; pickles carry no plan."""

    name = "forward"

    def _attach(self, owner):
        super()._attach(owner)
        self._plans = {}     # signature -> list of Plan and Refusal, the latest first
        self._captures = {}  # signature -> how often it was captured

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            owner = self.owner
            return type(owner).forward(owner, *args, **kwargs)
        owner = self.called()
        if _is_tracing() is not None or any(_GLOBAL_HOOKS) or function_mode_watches():
            return type(owner).forward(owner, *args, **kwargs)
        plan = self.plan(owner, signatures.of_call(args, kwargs))
        if plan is None:
            return type(owner).forward(owner, *args, **kwargs)
        tensors = args if plan.signature is signatures.ONE_TENSOR else signatures.tensors(args, kwargs)
        in_seam = layout.wanted(tensors) and layout.contiguous_weights(plan.weights)
        return plan.variant(in_seam, place.runs_direct()).result(owner, tensors, in_seam)

    def in_any_format(self, *tensors):
        """The call from another plan: arguments and result may be channels-last where the user's own are not."""
        owner = self.owner
        plan = self.plan(owner, signatures.of_call(tensors, {}))
        if plan is not None and layout.contiguous_weights(plan.weights) \
                and not any(owner.__dict__[name] for name in HOOKS):
            variant = plan.variant(True, place.runs_direct())
            if variant.works_in_any_format:
                return variant.function(owner, *tensors)
        return _restored(owner, tensors)

    # Plans.

    def plan(self, owner, signature) -> Plan | None:
        """The plan for calls of a signature in the owner's present state, or None."""
        found = None if signature is None else self._present(owner, signature) or self._make(owner, signature)
        return found if isinstance(found, Plan) else None

    def _present(self, owner, signature):
        """The Plan or Refusal that holds, or None."""
        plans = self._plans.get(signature, ())
        for position, plan in enumerate(plans):
            if plan.holds(owner):
                if position:
                    plans.insert(0, plans.pop(position))
                return plan
        return None

    def _make(self, owner, signature):
        if len(self._plans) >= _MOST_SIGNATURES and signature not in self._plans \
                or self._captures.get(signature, 0) >= _MOST_CAPTURES or not native.has_guards():
            return None
        if signature == signatures.ONE_TENSOR:
            signature = signatures.ONE_TENSOR
        try:
            made = Plan(Trace(owner, signature), signature)
        except ForNow:
            return None
        except Untraceable as reason:
            made = Refusal(reason)
        self._captures[signature] = self._captures.get(signature, 0) + 1
        present = set(owner.modules())  # a plan keeps its modules: not those that the owner has no more
        for plans in self._plans.values():
            plans[:] = [p for p in plans if isinstance(p, Refusal) or present.issuperset(p.trace.leaves)]
        plans = self._plans.setdefault(signature, [])
        plans.insert(0, made)
        del plans[_MOST_PLANS:]
        return made

    # What the report reads.

    def present_variants(self):
        """(variant, modules) of the plans that hold for the owner's present state: those that have run, else what
        would run."""
        owner = self.owner
        present = [p for plans in self._plans.values() for p in plans if p.holds(owner)]
        if not any(isinstance(p, Plan) for p in present):
            present = [self.plan(owner, signatures.default(owner))]
        return [(variant, plan.trace.modules) for plan in present if isinstance(plan, Plan)
                for variant in list(plan.variants.values()) or [plan.variant(False)]]

    def present_refusal(self):
        """Why there is no plan, where there is none."""
        owner = self.owner
        return next((plan.reason for plans in self._plans.values() for plan in plans
                     if isinstance(plan, Refusal) and plan.holds(owner)), None)

    def forget_refusals(self):
        """Lets a capture that was refused be tried again."""
        self._captures.clear()
        for plans in self._plans.values():
            plans[:] = [plan for plan in plans if isinstance(plan, Plan)]

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
