"""Two twins that go through the same: one swapped, one not."""

import contextlib
import copy
import dataclasses
import math

import networks
import torch
from compare import (
    MARGIN,
    MOVES,
    Difference,
    close,
    distance,
    first_of,
    fresh,
    move,
    moving_results,
    named_tensors,
    numbers,
    record,
    size_of,
    state_of,
    undefined_gradients,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import convext

EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class LeakyMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.relu:
            return nn.functional.leaky_relu(args[0], 0.3)
        return function(*args, **(kwargs or {}))


class LoggingMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


CONTEXTS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function mode": LeakyMode,
    "dispatch mode": LoggingMode,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save on cpu": lambda: torch.autograd.graph.save_on_cpu(),
    "meta device": lambda: torch.device("meta"),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "aten": lambda: convext.backend("aten"),
    "native": lambda: convext.backend("native"),
    "layer by layer": convext.layer_by_layer,
    "no output pool": lambda: convext.output_pool(0),
    "strict": lambda: convext.accuracy("strict"),
    "deterministic": lambda: _deterministic(),
}
AROUND_BACKWARD = {"anomaly", "saved tensors", "save on cpu", "aten", "deterministic"}


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Call:
    """One call of both twins. backward: None or a way of compare.backward"""

    args: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)
    target: str = ""
    names: tuple = ()
    backward: str = None
    seed: int = 0

    def tensors(self):
        return [a for a in [*self.args, *self.kwargs.values()] if isinstance(a, torch.Tensor)]

    def fresh_arguments(self):
        def copied(a):
            return fresh(a) if isinstance(a, torch.Tensor) else copy.copy(a)

        return tuple(map(copied, self.args)), {name: copied(a) for name, a in self.kwargs.items()}

    def contexts(self):
        return self._enter(self.names)

    def backward_contexts(self):
        return self._enter([n for n in self.names if n in AROUND_BACKWARD])

    @staticmethod
    def _enter(names):
        stack = contextlib.ExitStack()
        for name in names:
            stack.enter_context(CONTEXTS[name]())
        return stack

    def __str__(self):
        inputs = ", ".join(
            f"{tuple(a.shape)} {str(a.dtype).removeprefix('torch.')} strides {a.stride()}"
            f"{' requires grad' if a.requires_grad else ''}"
            if isinstance(a, torch.Tensor)
            else repr(a)
            for a in [*self.args, *self.kwargs.values()]
        )
        return "call" + "".join(
            (
                f" of {self.target!r}" if self.target else "",
                f" with {inputs}",
                f" under {', '.join(self.names)}" if self.names else "",
                f", backward {self.backward}" if self.backward else "",
            )
        )


def directly(model, args, kwargs):
    return model(*args, **kwargs)


class Session:
    """The twins, what was done to them, and what must be undone in the end.

    rng answers like random.Random; swap(model) makes the second twin and returns it; twin_context is around its calls.
    """

    def __init__(self, rng, swap=convext.swap, twin_context=contextlib.nullcontext):
        self.rng, self.swap, self.twin_context = rng, swap, twin_context
        self.is_convext = swap is convext.swap
        self.undo_stack = []  # what changed outside the twins: classes, globals, settings of torch
        self.log = []
        self.build()

    # ---- the twins ---------------------------------------------------------------------------------------------------

    def build(self):
        name, model = networks.build(self.rng)
        self.dtype = self.rng.choice((torch.float32, torch.float64))
        model = model.to(self.dtype).train(self.rng.randrange(3) == 0)
        if self.rng.randrange(5) == 0:
            model = model.to(memory_format=torch.channels_last)
        self.log.append(f"{name}, {self.dtype}, {'training' if model.training else 'evaluation'}")
        self.plain, self.swapped = model, copy.deepcopy(model)
        self.former = []  # other twins: what these were copied from
        self.handles = []  # [(plain's, swapped's)] of hooks
        self.optimizers = None
        self.held = []  # results of earlier calls, which later ones must not touch
        self.undo_change = None
        self.serial = 0
        self.swapped = self.swap(self.swapped)
        self.batch = self.rng.choice((1, 2, 2, 3))
        self.size = self.rng.randint(6, 14), self.rng.randint(6, 14)

    def models(self):
        return self.plain, self.swapped

    def both(self, change, what="the change"):
        """change(model) of each; both must raise the same or nothing. Returns what the first returned, or None."""
        results, errors = [], []
        for model in self.models():
            torch.manual_seed(self.serial)
            try:
                results.append(change(model))
                errors.append(None)
            except Exception as error:
                errors.append(error)
        if type(errors[0]) is not type(errors[1]):
            raise Difference(f"{what}: unswapped {errors[0]!r}, swapped {errors[1]!r}")
        if errors[0] is not None:
            self.log.append(f"  both raised {type(errors[0]).__name__}")
            return None
        return tuple(results)

    def each(self, name, change):
        """change(submodule of that name) of each twin."""
        return self.both(lambda model: change(model.get_submodule(name)))

    def modules(self, *kinds, where=lambda m: True):
        """Names of submodules; not of one that an entry of __dict__ hides."""
        return [
            name
            for name, m in self.plain.named_modules()
            if (not kinds or isinstance(m, kinds)) and self.resolves(name) and where(m)
        ]

    def resolves(self, name):
        try:
            return isinstance(self.plain.get_submodule(name), nn.Module)
        except AttributeError:
            return False

    def align(self):
        """Gives the swapped twin the other's values, where the two have the right to differ: rounding that a cast to a
        finer type or calls in one would lay bare, or how far a forward came before it raised."""
        with torch.no_grad():
            for (_, p), (_, q) in zip(named_tensors(self.plain), named_tensors(self.swapped)):
                if p.shape == q.shape and not torch.equal(p, q):
                    q.copy_(p)

    def pick(self, options):
        options = list(options)
        return self.rng.choice(options) if options else None

    def flag(self):
        return self.rng.choice((False, True))

    def seed(self):
        return self.rng.randrange(1 << 16)

    # ---- what must be undone ---------------------------------------------------------------------------------------

    def patch(self, owner, name, value):
        missing = object()
        former = owner.__dict__.get(name, missing) if isinstance(owner, type) else getattr(owner, name, missing)
        setattr(owner, name, value)

        def undo():
            if former is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, former)

        self.undo_stack.append((f"{getattr(owner, '__name__', owner)}.{name}", undo))

    def patch_item(self, container, key, value):
        former = container[key]
        container[key] = value

        def undo():
            container[key] = former

        self.undo_stack.append((f"entry {key!r}", undo))

    def close(self):
        while self.undo_stack:
            self.undo_stack.pop()[1]()

    # ---- calls -------------------------------------------------------------------------------------------------------

    def tensor(self, shape, dtype=None, low=-2.0, high=2.0):
        self.serial += 1
        generator = torch.Generator("cpu").manual_seed(self.serial * 7919 + 13)
        values = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.mul_(high - low).add_(low).to(dtype or self.dtype)

    def image(self, layout="contiguous", batch=None, size=None, dtype=None):
        n, (h, w) = batch or self.batch, size or self.size
        c = networks.IN_CHANNELS
        if layout == "channels-last":
            return self.tensor((n, c, h, w), dtype).contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            return self.tensor((n, c + 2, h + 1, w + 2), dtype)[:, 1:-1, 1:, 1:-1]
        if layout == "expanded":
            return self.tensor((1, c, h, w), dtype).expand(n, c, h, w)
        if layout == "transposed":
            return self.tensor((n, c, w, h), dtype).transpose(2, 3)
        return self.tensor((n, c, h, w), dtype)

    def default_call(self, backward=None):
        x = self.image()
        if backward and self.serial % 2:
            x.requires_grad_()
        return Call((x,), names=() if backward else ("no_grad",), backward=backward, seed=self.serial)

    def epsilon(self, call):
        types = {t.dtype for t in [*self.plain.parameters(), *self.plain.buffers(), *call.tensors()]}
        eps = max((EPS[d] for d in types if d in EPS), default=EPS[torch.float32])
        low = "autocast" in call.names or any(
            isinstance(m, (networks.Autocast, networks.AutocastInside)) for m in self.plain.modules()
        )
        return max(eps, EPS[torch.bfloat16]) if low else eps

    def terms(self, call):
        operands = [p[0].numel() for p in self.plain.parameters() if p.dim() > 1 and p.shape[0]]
        pixels = [t.numel() // max(1, t.shape[1] if t.dim() > 3 else 1) for t in call.tensors()]
        # A value passes through every layer forward and back, and the layers' errors add up as a random walk does.
        layers = sum(any(p is not None for p in m._parameters.values()) for m in self.plain.modules())
        return max([1, *operands, *pixels]) * max(1, layers)

    def compare(self, call, way=directly, way_name=""):
        """Runs both twins; returns True if the call returned, False if both raised."""
        what = f"{call}{way_name and f' through {way_name}'}"
        self.log.append(f"  {what}")
        if any(
            p.is_floating_point() and p.device.type == "cpu" and not torch.isfinite(p).all()
            for p in self.plain.parameters()
        ):
            # What they make of padding depends on which of PyTorch's own ways is taken: none at all, or NaN.
            self.log[-1] += ": left out, as weights are not finite"
            return False
        uncounted = numbers(self.plain)
        plain = record(self.plain, call, way)
        with self.twin_context():
            swapped = record(self.swapped, call, way)
        if plain.error is RuntimeError and "modified by an inplace operation" in plain.message and not swapped.error:
            # Who saves less for backward need not raise, but its gradients must be those of the values then saved.
            call = dataclasses.replace(call, names=(*call.names, "saved tensors"))
            buffers = plain.values["buffer"]
            counted = numbers(self.plain)
            uncounted()
            plain = self.unwritten(call, way)
            counted()
            plain.values["buffer"] = buffers  # of one call, not two
        if undefined_gradients(plain) and undefined_gradients(swapped):
            plain.values.pop("gradient", None), swapped.values.pop("gradient", None)
        eps, terms = self.epsilon(call), self.terms(call)
        if eps == EPS[torch.bfloat16]:
            terms = 1  # sums are kept in float32: what counts is the rounding of each result

        def moved():
            runs = []
            for seed in range(MOVES):
                restore = move(self.plain, call, eps, terms, seed)
                handle = moving_results(eps, terms, seed) if seed % 2 else None
                try:
                    runs.append(record(self.plain, call, way))
                finally:
                    restore()
                    if handle is not None:
                        handle.remove()
            return runs

        close(plain, swapped, eps, terms, moved, what)
        if plain.results and len(self.held) < 3:
            self.held.append(
                [(p, p.clone(), s, s.clone()) for p, s in zip(plain.results, swapped.results) if p.device.type == "cpu"]
            )
        if plain.error is not None:
            self.align()
            return False
        if eps == EPS[torch.bfloat16]:
            self.align()  # statistics that carry its rounding, to be compared with those of finer calls
        given = [t for t in call.tensors() if t.is_floating_point()]
        return any(not torch.isfinite(t).all() for t in given) or all(
            bool((p.abs() <= 1e6).all()) for p in plain.results if p.is_floating_point() and p.device.type == "cpu"
        )

    def unwritten(self, call, way):
        """What the unswapped twin answers when everything that it saves for backward is a copy."""
        restore = move(self.plain, call, 0.0, 1, 0)
        try:
            return record(self.plain, call, way)
        finally:
            restore()

    def compare_state(self):
        (facts, values), (other_facts, other_values) = state_of(self.plain), state_of(self.swapped)
        if facts != other_facts:
            raise Difference(f"state: {first_of(facts, other_facts)}")
        eps = max((EPS[p.dtype] for p in self.plain.parameters() if p.dtype in EPS), default=EPS[torch.float32])
        for (name, p), (_, s) in zip(values, other_values):
            if p.tobytes() == s.tobytes():
                continue
            # Statistics that became parameters, or were folded into some, carry the rounding of the calls before.
            allowed = MARGIN * max(eps, EPS[self.dtype]) * math.sqrt(self.terms(Call(()))) * max(1.0, size_of(p))
            if not (distance(p, s) <= (allowed if p.dtype.kind == "f" else 0)).all():
                raise Difference(f"state: {name!r} differs by {distance(p, s).max():.3g}")
        for results in self.held:
            for p, p_then, s, s_then in results:
                if _bits_equal(p, p_then) and not _bits_equal(s, s_then):
                    raise Difference("an earlier result of the swapped model has changed")
        if self.serial % 5 == 0:
            self.held.clear()

    def calls_after_change(self):
        """Plans warm up on the second or third call; modes alternate."""
        pattern = self.rng.choice(("nnb", "nnn", "bnn", "bb", "nbn"))
        for kind in pattern:
            if not self.compare(self.default_call("once" if kind == "b" else None)):
                return False
        return True

    def step(self, change):
        """One change and the calls after it; returns how many steps that was."""
        self.undo_change = None
        self.serial += 1
        self.log.append(f"{change.__name__}")
        place = len(self.log) - 1
        said = change(self)
        if said is None:
            del self.log[place:]
            return 0
        self.log[place] = f"{change.__name__}: {said}"
        if not self.calls_after_change():
            self.recover()
        self.compare_state()
        return 1

    def recover(self):
        """The model no longer runs: take the change back, or begin anew."""
        if self.undo_change is not None:
            self.log.append("  taken back")
            self.both(self.undo_change)
            if self.calls_after_change():
                return
        self.log.append("  it no longer runs: new twins")
        while self.undo_stack:
            self.undo_stack.pop()[1]()
        self.build()
        self.calls_after_change()

    def story(self):
        return "\n".join(self.log)


def _bits_equal(a, b):
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
