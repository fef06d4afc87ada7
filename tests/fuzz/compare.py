"""Runs a call on a model and writes down all that its caller can see; compares two such records.

How far apart two right results may be: a sum of n products in a type of precision eps errs by about eps·sqrt(n) of its
size, which a few layers and Winograd's forms multiply by less than `MARGIN`. Where a result is further away, batch
norms of few values, or of values with a large mean, or a unit that rounding pushes across a kink may be the reason. So
the unswapped twin runs again, several times, with every operand, and in half of the runs every module's result, moved
by as much as such a sum errs, and what that does to each value is allowed too.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import nn

MARGIN = 32.0
MOVES = 8  # a unit close to its kink crosses it in half of the moves: all of them miss one in 256
RECORDS = []  # what hooks saw during a call


class Progress:
    """What was done in this process up to the first difference of each batch: shrinking is no progress."""

    def __init__(self):
        self.steps, self.runs, self.kinds, self.counts = 0, 0, {}, True
        self.first = None  # what the first difference of the batch said: a flaky one is not met again

    def count(self, name, steps):
        if self.counts and steps:
            self.steps += steps
            self.kinds[name] = self.kinds.get(name, 0) + steps

    def differ(self, difference):
        self.first, self.counts = self.first or str(difference), False
        return difference

    def begin(self):
        self.runs += self.counts


class Difference(AssertionError):
    """The twins differ."""


@dataclasses.dataclass
class Record:
    """What one twin answered.

    error   the type of what it raised, or None
    facts   everything that must be equal: types, extents, dtypes, flags, order in memory, calls of hooks
    values  group -> [(name, array)], which must be close
    """

    error: type = None
    message: str = ""
    facts: list = dataclasses.field(default_factory=list)
    values: dict = dataclasses.field(default_factory=dict)
    results: list = dataclasses.field(default_factory=list)


def array(t):
    t = t.detach()
    if t.is_sparse:
        t = t.to_dense()
    if t.device.type == "meta":
        return np.zeros(0)
    t = t.resolve_conj().resolve_neg()
    return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).numpy().copy().reshape(-1)


def walk(value, name, tensors, facts):
    """Lists the tensors of a result, and its structure as facts."""
    if isinstance(value, torch.Tensor):
        order = value.is_contiguous(), value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        facts.append(
            (
                name,
                type(value).__name__,
                str(value.dtype),
                tuple(value.shape),
                value.device.type,
                ("requires_grad", value.requires_grad),
                ("inference", value.is_inference()),
                ("contiguous, channels-last", order),
            )
        )
        tensors.append((name, value))
        return
    facts.append((name, type(value).__name__))
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            walk(part, f"{name}[{i}]", tensors, facts)
    elif isinstance(value, dict):
        for key, part in value.items():
            walk(part, f"{name}[{key!r}]", tensors, facts)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            walk(getattr(value, field.name), f"{name}.{field.name}", tensors, facts)
    elif value is None or isinstance(value, (bool, int, float, str)):
        facts.append((name, value))


def named_tensors(model):
    """[(name, parameter or buffer)], each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def state_of(model):
    """(facts, [(name, array)]) of the parameters, and of the buffers that are no floats."""
    facts, values = [], []
    for name, module in model.named_modules(remove_duplicate=False):
        facts.append((name, type(module).__name__, module.training))
    for name, p in model.named_parameters(remove_duplicate=False):
        facts.append((name, type(p).__name__, str(p.dtype), tuple(p.shape), p.requires_grad, p.is_contiguous()))
        values.append((name, array(p)))
    for name, b in model.named_buffers(remove_duplicate=False):
        facts.append((name, type(b).__name__, str(b.dtype), tuple(b.shape), b.requires_grad))
        if not b.is_floating_point():
            values.append((name, array(b)))
    return facts, values


def fresh(t):
    """A tensor that lies in memory as t does."""
    if t.numel() == 0:
        return t.clone()
    with torch.no_grad():
        copy = torch.empty(0, dtype=t.dtype, device="cpu").set_(
            t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride()
        )
    return copy.requires_grad_(t.requires_grad)


def backward(tensors, inputs, model, how, seed):
    """Sends seeded gradients back. how: "once", "twice" (the second must raise), "retained", "double" """
    generator = torch.Generator("cpu").manual_seed(seed)
    outputs = [t for _, t in tensors if t.requires_grad]
    if not outputs:
        return
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.dtype) for t in outputs]
    if how == "double":
        leaves = [p for p in [*inputs, *model.parameters()] if p.requires_grad]
        first = torch.autograd.grad(outputs, leaves, grads, create_graph=True, allow_unused=True)
        penalty = sum((g * g).sum() for g in first if g is not None)
        if isinstance(penalty, torch.Tensor) and penalty.requires_grad:
            penalty.backward()
        return
    if how == "retained":
        torch.autograd.backward(outputs, grads, retain_graph=True)
    torch.autograd.backward(outputs, grads)
    if how == "twice":
        torch.autograd.backward(outputs, grads)


def record(model, call, way):
    """Runs `way(model, args, kwargs)` under the call's contexts, and backward after it if the call wants it."""
    target = dict(model.named_modules(remove_duplicate=False))[call.target]  # whatever hides it in __dict__
    args, kwargs = call.fresh_arguments()
    inputs = [a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
    for p in model.parameters():
        p.grad = None
    RECORDS.clear()
    r, tensors = Record(), []
    torch.manual_seed(call.seed)
    try:
        with call.contexts():
            result = way(target, args, kwargs)
        walk(result, "y", tensors, r.facts)
        r.values["output"] = [(name, array(t)) for name, t in tensors]
        if call.backward:
            with call.backward_contexts():
                backward(tensors, inputs, model, call.backward, call.seed)
    except Exception as error:  # what plain PyTorch raises, the swapped model must raise too
        r.error, r.message = type(error), str(error)
        return r
    finally:
        r.values["buffer"] = [(n, array(b)) for n, b in model.named_buffers() if b.is_floating_point()]
        # In a double backward PyTorch sends zeros, which hooks hear, where nothing depends on a value.
        heard = [fact for fact in RECORDS if call.backward != "double" or fact[0] != "backward"]
        r.facts += [("hooks", *fact) for fact in sorted(heard, key=repr)]
        RECORDS.clear()
    where = [
        t.untyped_storage().data_ptr()
        for t in [*inputs, *(t for _, t in tensors)]
        if t.device.type == "cpu" and t.layout is torch.strided and t.numel()
    ]
    r.facts.append(("storages shared by inputs and results", [where.index(p) for p in where]))
    r.facts.append(("versions of inputs", [t._version for t in inputs if not t.is_inference()]))
    r.values["input"] = [(f"input {i}", array(t)) for i, t in enumerate(inputs)]
    if call.backward:
        grads = []
        for name, t in [*((f"input {i}", t) for i, t in enumerate(inputs)), *model.named_parameters()]:
            grad = t.grad if t.is_leaf else None
            if grad is None:
                r.facts.append((f"gradient of {name}", None))
            else:
                r.facts.append((f"gradient of {name}", type(grad).__name__, str(grad.dtype), tuple(grad.shape)))
                grads.append((name, array(grad)))
        r.values["gradient"] = grads
    r.results = [t.detach() for _, t in tensors]
    return r


def undefined_gradients(r):
    """True where a call's gradients are PyTorch's by chance: at a value that is no number, its derivatives of hardtanh
    and hardswish on the CPU are 0, 1 or no number by the value's place in a vector of the processor."""
    return r.error is None and any(np.isnan(a).any() for _, a in r.values["output"])


def _whole(values):
    return np.concatenate([a.astype(np.float64, copy=False) for _, a in values]) if values else np.zeros(0)


def distance(a, b):
    """|a - b| with equal infinities and NaNs zero apart, and other ones infinitely far."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(np.subtract(a, b, dtype=np.float64))
    if not np.isfinite(apart).all():
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))
    return apart


def size_of(whole):
    finite = whole[np.isfinite(whole)]
    return float(np.abs(finite).max(initial=0.0))


def first_of(a, b):
    """The first facts that differ, in words."""
    for p, s in zip(a, b):
        if p != s:
            return f"unswapped {p}, swapped {s}"
    return f"unswapped has {len(a)} facts, swapped {len(b)}: {[f for f in (a + b) if f not in a or f not in b][:3]}"


def close(plain, swapped, eps, terms, moved, what):
    """Raises `Difference` unless the records agree. moved(): the records of the unswapped twin with moved operands."""
    if plain.error is not swapped.error:

        def said(r):
            return f"raised {r.error.__name__}: {r.message[:300]}" if r.error else "returned"

        raise Difference(f"{what}: unswapped {said(plain)}; swapped {said(swapped)}")
    if plain.error is not None:
        return
    if plain.facts != swapped.facts:
        raise Difference(f"{what}: {first_of(plain.facts, swapped.facts)}")
    fast = MARGIN * eps * math.sqrt(terms)
    moves = None
    for group, values in plain.values.items():
        others = swapped.values.get(group, [])
        if [n for n, _ in values] != [n for n, _ in others]:
            raise Difference(
                f"{what}, {group}: unswapped has {[n for n, _ in values]}, swapped {[n for n, _ in others]}"
            )
        a, b = _whole(values), _whole(others)
        if np.array_equal(a, b, equal_nan=True):
            continue
        size = max(size_of(a), 1.0 if group == "buffer" else 0.0)
        if (distance(a, b) <= fast * size).all():
            continue
        if moves is None:
            moves = moved()
        for i, ((name, p), (_, s)) in enumerate(zip(values, others)):
            apart = distance(p, s)
            if (apart <= fast * size).all():
                continue
            runs = [distance(p, m.values[group][i][1]) for m in moves if m.error is None and group in m.values]
            finite = [np.where(np.isfinite(d), d, 0.0) for d in runs]
            allowed = fast * size + 2 * max((float(d.max(initial=0.0)) for d in finite), default=0.0)
            chance = np.zeros(apart.shape, bool)  # where moving an operand makes it finite or not
            for d in runs:
                chance |= ~np.isfinite(d)
            bad = ~((apart <= allowed) | chance)
            if bad.any():
                k = int(np.argmax(np.where(bad, apart, -1.0)))
                raise Difference(
                    f"{what}, {group} {name!r}: unswapped {p[k]!r}, swapped {s[k]!r} at flat index {k}; "
                    f"{int(bad.sum())} of {bad.size} are more than {allowed:.3g} apart"
                )


def move(model, call, eps, terms, seed):
    """Moves every operand, in place and unseen by autograd, and returns what puts it back."""
    by = 4 * eps * math.sqrt(terms)
    generator = torch.Generator("cpu").manual_seed(seed)
    saved, done = [], set()
    for t in [*(t for _, t in named_tensors(model)), *call.tensors()]:
        if (
            t.is_floating_point()
            and t.device.type == "cpu"
            and t.numel()
            and t.data_ptr() not in done
            and t.layout is torch.strided
        ):
            done.add(t.data_ptr())
            saved.append((t, t.detach().clone()))
            _write(t, (t.detach().double() * signs(t, generator).mul_(by).add_(1)).to(t.dtype))
    others = [(t, t.detach().clone()) for _, t in named_tensors(model) if not t.is_floating_point()]
    counted = numbers(model)

    def restore():
        counted()
        for t, values in [*saved, *others]:
            _write(t, values)

    return restore


def numbers(model):
    """What gives the modules' numbers the values that they have now: a forward may count its calls."""
    kept = [(m, {k: v for k, v in m.__dict__.items() if isinstance(v, (int, float))}) for m in model.modules()]

    def restore():
        for module, attributes in kept:
            module.__dict__.update(attributes)

    return restore


def signs(t, generator):
    """1 or -1 for each element of t, in float64."""
    return torch.randint(0, 2, t.shape, generator=generator, dtype=torch.float64, device="cpu").mul_(2).sub_(1)


def moving_results(eps, terms, seed):
    """A hook for all modules that moves what they return, and with it the gradients that come back: where those cancel
    whatever the operands are, as a batch norm's do, only their own rounding is left."""
    by = 4 * eps * math.sqrt(terms)
    generator = torch.Generator("cpu").manual_seed(seed)

    def hook(module, args, out):
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.device.type == "cpu":
            return out * signs(out, generator).mul_(by).add_(1).to(out.dtype)
        return None

    return nn.modules.module.register_module_forward_hook(hook)


def _write(t, values):
    with torch.no_grad():
        t = t.data
        if any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape)):
            index = tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())
            t, values = t[index], values[index]
        t.copy_(values)
