"""verify(model, sample): the model as it is, a freshly swapped copy and an unswapped one on the same input, forward and
backward.

How far apart may two right results be? As far as rounding takes them, and that is measured on the unswapped copy: it
runs again with every operation on operands that are moved, each element at random, by what the operation's own rounding
errors amount to (a Monte Carlo arithmetic). How much that is follows from the length n of the sums that it forms. Let u
be the unit roundoff, half of eps, of the type that sums are kept in.

A chain of n sums makes n rounding errors of random sign, each u times the partial sum at that place. With products of
random sign and size p the k-th partial sum is about p sqrt(k), with products of the mean m it is k m. The variance of
the whole error is the sum over k,

    u² (n²/2 p² + n³/3 m²).

The first part is what becomes of the sum if both factors of each product are moved by u sqrt(n)/2: each product moves
by u sqrt(n/2) p, and n of them at random by u n/sqrt(2) p. The second part is u sqrt(n/3) times the sum itself, n m. So
operands move by u sqrt(n)/2 and the results of sums by u sqrt(n/3), and a rounding of each result to its own type comes
on top. Blocked sums err less than a chain; this is the bound for all orders of adding up.

The measure is one of the quantity's own making, not of its size. The running mean of a channel whose mean is near zero
is a sum that cancels: its error goes with the size of the activations times the momentum, whatever is left of the mean.
Neither eager's distance from a float64 run, which is small by luck in some channel, nor a multiple of the mean
says so; moving each of the activations does. The same goes for the gradient of a bias before a batch norm, which is
nothing but rounding errors. A batch norm's sums may be formed of activations less one of them, or less an older mean,
because the variance cancels otherwise. What is then summed has a mean m of up to the activations' size about zero, the
root of their mean square, whatever their own mean is; so that size, not the mean, stands in the second part.

Two results may be MARGIN times as far apart as the moved ones are from the unmoved, or one rounding (eps) of the
largest element where that is more. `MARGIN` says what it is made of. What was measured is the root of the mean square
over ROUNDS[0] runs; where that is not enough to let a value pass, over ROUNDS[1]: of a tensor of one element one run
tells little. The limit does not grow with the number of runs.

Gradients are not continuous: behind a ReLU a unit that rounding pushes across zero switches its whole gradient, and
which units do so is chance. So inputs and parameters are also moved by 1024 eps, at most 1e-4, in ROUNDS runs as well.
That switches up to a thousand times as many units as rounding does, some in every network, and the furthest that it
takes a gradient is more than what one of rounding's few switches does to it, unless that is the largest of all. Twice
as far is allowed: of normally distributed shares the largest of fifty is 2.3 deviations, and one beyond twice that a
matter of one in 100,000. Verify in float64, where the move is as much smaller as eps is, for a finer measure.

Integers, such as a batch norm's count of batches, are equal unless rounding changes them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..tables import render
from . import swapping

# Winograd's forms, which trade multiplications for additions, err up to three times as much as a chain of sums; the
# difference of two results has sqrt(2) times the error of one; and the largest of a tensor's errors is up to twice as
# large in one run as in another.
MARGIN = 3 * math.sqrt(2) * 2

# Runs with moved operands: of all values, and of those that these few would not let pass.
ROUNDS = 2, 12

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Key = tuple[str, str]  # name and kind of a value
Values = dict[Key, torch.Tensor]
WITHOUT_GRADIENTS = ", no_grad"


def _jolt(dtype: torch.dtype) -> float:
    """The relative move that gradients are held against."""
    eps = torch.finfo(dtype).eps
    return max(eps, min(1024 * eps, 1e-4))


@dataclasses.dataclass
class Difference:
    """One output, gradient or buffer of one of two models beside another's.

    name     of the parameter or buffer, or the position of the output or input
    kind     "output", "gradient of input", "gradient", "buffer"; with ", no_grad" of a call under torch.no_grad()
    of       "live": the model as it is, or "copy": a freshly swapped copy of it
    error    largest distance of its value from the other's
    own      how far rounding takes the unswapped model's value (see the module)
    allowed  what `error` may be
    """

    name: str
    kind: str
    of: str
    error: float
    own: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


class Verification:
    """What `verify` found. Prints as a table of the worst of each kind.

    ok     whether everything agrees
    rows   a `Difference` from the unswapped copy for each value of the live model and of the freshly swapped copy
    stale  a `Difference` for each value of the live model that is further from the freshly swapped copy's than rounding
           explains: what the model has kept from earlier calls does not fit what it is now
    """

    def __init__(self, rows: list[Difference], stale: list[Difference], title: str):
        self.rows, self.stale, self.title = rows, stale, title

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) and not self.stale

    def __bool__(self) -> bool:
        return self.ok

    def worst(self) -> list[Difference]:
        """The row of each kind that used most of what was allowed, and every row beyond it."""
        chosen: dict[str, Difference] = {}
        for row in self.rows:
            if row.kind not in chosen or _share(row) > _share(chosen[row.kind]):
                chosen[row.kind] = row
        return [row for row in self.rows if row is chosen[row.kind] or not row.ok]

    def __str__(self) -> str:
        rows = [
            (r.of, r.kind, r.name, f"{r.error:.3g}", f"{r.own:.3g}", f"{r.allowed:.3g}", "yes" if r.ok else "NO")
            for r in self.worst()
        ]
        verdict = "agree" if all(row.ok for row in self.rows) else "DISAGREE"
        caption = f"{len(self.rows)} values: swapped and unswapped {verdict}"
        if self.stale:
            worst = max(self.stale, key=_share)
            caption += (
                f"\nthe live model and a fresh copy of it differ in {len(self.stale)} values, most in "
                f"{worst.kind} {worst.name}: {worst.error:.3g} apart, {worst.allowed:.3g} allowed"
            )
        return render(
            self.title,
            ["model", "kind", "worst of it", "apart", "unswapped's own error", "allowed", "ok"],
            rows,
            caption,
        )

    __repr__ = __str__


def _share(row: Difference) -> float:
    return math.inf if not row.error <= row.allowed else row.error / row.allowed if row.allowed else 0.0


def verify(
    model: nn.Module, sample: torch.Tensor | tuple[Any, ...] | list[Any] | dict[str, Any], *, seed: int = 0
) -> Verification:
    """Runs a model as it is, swapped anew and unswapped on a sample, in its present mode, and compares.

    The model itself is called four times, twice with gradients and backward, then twice under torch.no_grad(), so that
    what a swap has kept from earlier calls is used. Two deep copies of it, one swapped, one not, tell what is right.

    Args:
        model: swapped or not. Its parameters, buffers, gradients, flags and hooks, the attributes of its modules and
            the random states of torch, Python and NumPy are afterwards what they were; what its forward changes
            elsewhere is not put back. Its hooks run, those on parameters' gradients apart.
        sample: a tensor, or a tuple or list of positional arguments, or a dict of keyword arguments. The model gets
            copies of the tensors.
        seed: of the random numbers that dropout and the like draw, and of the gradient that is sent back; default 0.

    Returns a `Verification`, which is true where all agrees: outputs, gradients of the inputs and parameters, buffers.

    Raises TypeError if `model` is not an nn.Module or `sample` holds no tensor, ValueError if a parameter or buffer is
    not initialised yet, if the model cannot be deep-copied, or if the unswapped model fails on the sample. What the
    swapped model raises where the unswapped one does not is raised as it is.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> found = convext.verify(convext.swap(model), torch.randn(2, 3, 12, 12))
        >>> bool(found), found.stale, found.rows[0].kind, found.rows[0].name
        (True, [], 'output', '[0]')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    args, kwargs = _arguments(sample)
    with torch.inference_mode(False), _random_states():
        unswapped, fresh = swapping.revert(_copied(model)), swapping.swap(swapping.revert(_copied(model)))
        plain = _Model(unswapped, args, kwargs, seed)
        try:
            expected = plain.values()
        except Exception as error:
            raise ValueError(f"sample: the unswapped {type(model).__name__} fails on it: {error}") from error
        terms = _longest_sum(model, args, kwargs)
        models = {"live": _Model(model, args, kwargs, seed), "copy": _Model(fresh, args, kwargs, seed)}
        found = {of: each.values_of_calls(2) for of, each in models.items()}
        limits = _Limits(
            expected,
            lambda number: plain.values(rounding=_Rounding(seed + 1 + number, terms)),
            lambda number: plain.values(jolt=seed + 1 + number),
        )
        rows = [
            limits.difference(of, key, values, [expected])
            for of, values in found.items()
            for key in _keys(expected, *values)
        ]
        stale = [
            limits.difference("live", key, found["live"], found["copy"])
            for key in _keys(*found["live"], *found["copy"])
        ]
    mode = "training" if model.training else "evaluation"
    return Verification(
        rows, [row for row in stale if not row.ok], f"{type(model).__name__} in {mode}, swapped against unswapped"
    )


def _arguments(sample: Any) -> tuple[Args, Kwargs]:
    args, kwargs = (
        ((), sample)
        if isinstance(sample, dict)
        else (tuple(sample), {})
        if isinstance(sample, (tuple, list))
        else ((sample,), {})
    )
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise TypeError(
            f"sample: expected a tensor, or a tuple, list or dict of arguments with one, got {type(sample).__name__}"
        )
    return args, kwargs


def _copied(model: nn.Module) -> nn.Module:
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(t, UninitializedTensorMixin):
            raise ValueError(f"model: {name} is not initialised yet; call the model once, then verify it")
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"model: this {type(model).__name__} cannot be deep-copied, and verify compares it with "
            f"copies of it: {error}"
        ) from error


def _keys(*found: Values) -> list[Key]:
    """All names of values, in the order of the first that has them."""
    return list(dict.fromkeys(key for values in found for key in values))


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """What is drawn in here changes no random state."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


# ---- one model -------------------------------------------------------------------------------------------------------


class _Model:
    """A model with its sample."""

    def __init__(self, model: nn.Module, args: Args, kwargs: Kwargs, seed: int):
        self.model, self.args, self.kwargs, self.seed = model, args, kwargs, seed

    def values_of_calls(self, times: int) -> list[Values]:
        """[{(name, kind): tensor}] of so many calls with gradients, one after the other, and of as many without."""
        calls = [[self._call_unchanged(gradients) for _ in range(times)] for gradients in (True, False)]
        return [with_gradients | without for with_gradients, without in zip(*calls)]

    def values(self, rounding: _Rounding | None = None, jolt: int | None = None) -> Values:
        """{(name, kind): tensor} of a call with gradients, and of one without. The model is afterwards what it was.

        rounding: a `_Rounding` in which to run; jolt: the seed of signs by which inputs and parameters are moved before
        a call with gradients, the only one then."""
        if jolt is not None:
            return self._call_unchanged(True, jolt=jolt)
        return self._call_unchanged(True, rounding) | self._call_unchanged(False, rounding)

    def _call_unchanged(self, gradients: bool, rounding: _Rounding | None = None, jolt: int | None = None) -> Values:
        with _Unchanged(self.model):
            generator = None if jolt is None else torch.Generator("cpu").manual_seed(jolt)
            if generator is not None:
                _move_parameters(self.model, generator)
            with rounding or contextlib.nullcontext():
                return self._call(gradients, generator)

    def _call(self, gradients: bool, generator: torch.Generator | None) -> Values:
        try:
            return self._run(gradients, generator, in_place=False)
        except RuntimeError as error:
            # Its backward is a call of backward() of its own, which nobody can ask for single gradients.
            if "checkpoint" not in str(error) or "use_reentrant" not in str(error):
                raise
        return self._run(gradients, generator, in_place=True)

    def _run(self, gradients: bool, generator: torch.Generator | None, in_place: bool) -> Values:
        model = self.model
        inputs: list[torch.Tensor] = []

        def given(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = _twin(value.detach())
            if generator is not None and value.is_floating_point():
                value.copy_(_jolted(value, generator))
            inputs.append(value.requires_grad_(gradients and value.is_floating_point()))
            return value

        args, kwargs = pytree.tree_map(given, (self.args, self.kwargs))
        _seed(self.seed)
        with torch.set_grad_enabled(gradients):
            outputs = _tensors_of(model(*args, **kwargs))
        suffix = "" if gradients else WITHOUT_GRADIENTS
        values = {(f"[{i}]", "output" + suffix): t.detach().clone() for i, t in enumerate(outputs)}
        if gradients:
            names = {id(p): (name, "gradient") for name, p in model.named_parameters() if p.requires_grad}
            names |= {id(t): (f"[{i}]", "gradient of input") for i, t in enumerate(inputs) if t.requires_grad}
            leaves = [t for t in [*model.parameters(), *inputs] if id(t) in names]
            with torch.enable_grad():
                found = self._backward([t for t in outputs if t.requires_grad], leaves, in_place)
            values |= {names[id(t)]: g for t, g in zip(leaves, found) if g is not None}
        return values | {(name, "buffer" + suffix): b.detach().clone() for name, b in model.named_buffers()}

    def _backward(
        self, outputs: list[torch.Tensor], leaves: list[torch.Tensor], in_place: bool
    ) -> Sequence[torch.Tensor | None]:
        """The gradients of the leaves, None where there is none. `in_place`: through their `grad`."""
        if not outputs or not leaves:
            return []
        generator = torch.Generator("cpu").manual_seed(self.seed)
        sent = [
            torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device, t.dtype)
            for t in outputs
        ]
        if not in_place:  # backward() would also add to the gradients of leaves that no module names
            return torch.autograd.grad(outputs, leaves, sent, allow_unused=True)
        for t in leaves:
            t.grad = None
        torch.autograd.backward(outputs, sent)
        return [t.grad for t in leaves]


def _twin(t: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor with the same strides: what was kept for calls is kept for strides, too."""
    if t.layout is not torch.strided or any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride())):
        return t.clone()
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _tensors_of(result: object) -> list[torch.Tensor]:
    """The tensors of a forward's result, those in objects with attributes of their own included."""
    leaves = pytree.tree_leaves(result)
    return [
        t
        for leaf in leaves
        for t in (
            [leaf]
            if isinstance(leaf, torch.Tensor)
            else [v for v in getattr(leaf, "__dict__", {}).values() if isinstance(v, torch.Tensor)]
        )
    ]


class _Unchanged:
    """A context that puts back what calls in it change in a model, in place and without new objects: values of
    parameters, buffers and tensors that are attributes, their requires_grad and grad, and the attributes of its
    modules, with the contents of those that are dicts, lists and sets (hooks, buffers and parameters are such). Within
    it, hooks on the parameters' gradients are off: the copies have none.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.modules = [(m, dict(m.__dict__)) for m in self.model.modules()]
        holders = [
            v
            for _, attributes in self.modules
            for v in attributes.values()
            if type(v) in (dict, OrderedDict, list, set)
        ]
        self.contents = [(holder, _items(holder), holder.copy()) for holder in holders]
        found = {
            id(t): t
            for holder in [*(d for _, d in self.modules), *holders]
            for t in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(t, torch.Tensor)
        }
        self.tensors = [(t, t.detach().clone(), t.requires_grad, t.grad if t.is_leaf else None) for t in found.values()]
        self.hooks: list[Any] = [(p, p._backward_hooks, p._post_accumulate_grad_hooks) for p in self.model.parameters()]
        for p, *_ in self.hooks:
            p._backward_hooks = p._post_accumulate_grad_hooks = None

    def __exit__(self, *exception: object) -> None:
        for holder, items, kept in self.contents:
            if _items(holder) != items:
                holder.clear()
                (holder.extend if isinstance(holder, list) else holder.update)(kept)
        for module, attributes in self.modules:
            if _items(module.__dict__) != _items(attributes):
                module.__dict__.clear()
                module.__dict__.update(attributes)
        for p, hooks, post_hooks in self.hooks:
            p._backward_hooks, p._post_accumulate_grad_hooks = hooks, post_hooks
        for t, value, requires_grad, grad in self.tensors:
            if not torch.equal(t.detach(), value):
                with torch.inference_mode(t.is_inference()), torch.no_grad():
                    t.detach().copy_(value)
            if t.is_leaf:
                if t.requires_grad != requires_grad:
                    t.requires_grad_(requires_grad)
                if t.grad is not grad:
                    t.grad = grad


def _items(holder: Any) -> list[Any]:
    """What a container holds, by identity."""
    if isinstance(holder, dict):
        return [(key, id(value)) for key, value in holder.items()]
    return list(map(id, holder))


# ---- what rounding allows --------------------------------------------------------------------------------------------


class _Limits:
    """How far values may be apart.

    expected: the unswapped model's values; rounded, jolted: number -> those of another run with moved operands, and of
    another with moved inputs and parameters."""

    def __init__(self, expected: Values, rounded: Callable[[int], Values], jolted: Callable[[int], Values]):
        self.expected, self.runs = expected, (rounded, jolted)
        self.distances: tuple[list[dict[Key, float]], list[dict[Key, float]]] = [], []

    def difference(self, of: str, key: Key, found: list[Values], others: list[Values]) -> Difference:
        """The worst `Difference` of one value in some runs from that in others."""
        name, kind = key
        error = max(_distance(a.get(key), b.get(key)) for a in found for b in others)
        for rounds in ROUNDS if key in self.expected and error < math.inf else ROUNDS[:1]:
            own, allowed = self._allowed(key, rounds)
            if error <= allowed:
                break
        return Difference(name, kind, of, error, own, allowed)

    def _allowed(self, key: Key, rounds: int) -> tuple[float, float]:
        """(how far rounding takes a value, how far it may be from another)"""
        plain = self.expected.get(key)
        if plain is None:
            return 0.0, 0.0
        own = math.sqrt(sum(d**2 for d in self._distances(0, key, rounds)) / rounds)
        if not (plain.is_floating_point() or plain.is_complex()):
            return own, own
        info = torch.finfo(plain.dtype)
        size = float(_real(plain).nan_to_num(0.0, 0.0, 0.0).abs().max()) if plain.numel() else 0.0
        allowed = max(MARGIN * own, info.eps * size, info.smallest_normal)  # kernels may flush what is smaller to zero
        if key[1].startswith("gradient"):
            allowed = max(allowed, 2 * max(self._distances(1, key, rounds)))
        return own, allowed

    def _distances(self, kind: int, key: Key, rounds: int) -> list[float]:
        """From a value to that of each of so many runs of one kind."""
        distances = self.distances[kind]
        while len(distances) < rounds:
            values = self.runs[kind](len(distances))
            distances.append({k: _distance(v, values.get(k)) for k, v in self.expected.items()})
        return [found[key] for found in distances[:rounds]]


def _real(t: torch.Tensor) -> torch.Tensor:
    t = t.detach() if t.layout is torch.strided else t.detach().to_dense()
    return torch.view_as_real(t.to(torch.complex128)) if t.is_complex() else t.double()


def _distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """Largest distance of two tensors; infinite where one is missing, is of another shape or type, or is not finite
    where the other differs."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.numel() == 0:
        return 0.0
    a, b = _real(a), _real(b)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs())
    return float(apart.nan_to_num(math.inf).max())


def _jolted(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """t with every element up or down by the relative amount `_jolt`."""
    signs = torch.randint(0, 2, t.shape, generator=generator, device="cpu").to(t.device, torch.float64) * 2 - 1
    return (t.double() * (1 + signs * _jolt(t.dtype))).to(t.dtype)


@torch.no_grad()
def _move_parameters(model: nn.Module, generator: torch.Generator) -> None:
    for p in model.parameters():
        if p.is_floating_point():
            p.copy_(_jolted(p, generator))


def _longest_sum(model: nn.Module, args: Args, kwargs: Kwargs) -> int:
    """Of the forward pass over the operands of an output, of the backward pass over batch and pixels."""
    operands = [p[:1].numel() for p in model.parameters() if p.dim() > 1]
    pixels = [
        t.numel() // (t.shape[1] if t.dim() > 3 and t.shape[1] else 1)
        for t in pytree.tree_leaves((args, kwargs))
        if isinstance(t, torch.Tensor)
    ]
    return max([1, *operands, *pixels])


# Operations that choose, move or compare values, or make them from nothing, and round none.
_EXACT = frozenset(
    f"aten::{name}"
    for name in """
    _to_copy abs adaptive_max_pool2d adaptive_max_pool3d alias amax amin argmax argmin as_strided bernoulli cat clamp
    clamp_max clamp_min clone constant_pad_nd copy copy_ detach embedding empty empty_like eq expand fill flip full_like
    gather ge gt hardtanh hardtanh_backward index index_put index_select isfinite isinf isnan le lift_fresh logical_and
    logical_not logical_or lt masked_fill max max_pool2d_with_indices max_pool3d_with_indices maximum min minimum ne neg
    new_empty new_empty_strided new_full new_ones new_zeros nonzero ones_like pixel_shuffle pixel_unshuffle
    reflection_pad2d relu repeat replication_pad2d roll scatter select_backward select_scatter sign slice_backward
    slice_scatter sort stack threshold threshold_backward topk unfold where zero zeros_like""".split()
)
# Sums over the last extent of the second operand from the right.
_PRODUCTS = frozenset(f"aten::{name}" for name in "mm bmm mv dot addmm addmv baddbmm".split())
_BATCH_NORMS = frozenset(("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"))


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation on operands moved by what its own rounding errors amount to (see the module).

    terms: the length of a sum in an operation that is not known here.
    """

    def __init__(self, seed: int, terms: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.terms = seed, terms
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        name = schema.name
        if name == "aten::_to_copy":
            return self._converted(func, args, kwargs)
        if _is_exact(func):
            return func(*args, **kwargs)
        if name == "aten::convolution":
            return self._sums(func, args, kwargs, _products(args[1], args[8], args[6]))
        if name == "aten::convolution_backward":
            return self._convolution_backward(func, args, kwargs)
        if name in _PRODUCTS:
            return self._sums(func, args, kwargs, max(1, args[-2].shape[-1]))
        if name in _BATCH_NORMS and args[5]:
            return self._batch_norm(func, args, kwargs)
        if schema.is_mutable:
            return self._in_place(func, args, kwargs)
        if func.namespace != "aten" or "attention" in name or "rnn" in name or "lstm" in name or "gru" in name:
            return self._sums(func, args, kwargs, self.terms)
        result = func(*self._all_moved(args, 1), **self._all_moved(kwargs, 1))
        given = max((t.numel() for t in _floats((args, kwargs))), default=0)
        made = next((t.numel() for t in _floats(result)), 0)
        terms = given // made if made else 1
        return result if terms <= 1 else self._sums(func, args, kwargs, terms)

    def _sums(self, func: Any, args: Args, kwargs: Kwargs, terms: int) -> Any:
        result = func(*self._all_moved(args, terms), **self._all_moved(kwargs, terms))
        return self._summed(result, terms)

    def _convolution_backward(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        dy, x, w = args[:3]
        mask = list(args[-1])
        transposed, groups = args[7], args[9]
        dx, *_ = self._sums(func, (*args[:-1], [mask[0], False, False]), kwargs, _products(w, groups, not transposed))
        _, dw, db = self._sums(func, (*args[:-1], [False, *mask[1:]]), kwargs, _pixels(x if transposed else dy))
        return dx, dw, db

    def _batch_norm(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        """In training: statistics of moved operands, with which the operands, moved as in one operation, are normed."""
        x, weight, bias, running_mean, running_var, _, momentum, _ = args
        terms = _pixels(x)
        _, mean, rstd, *others = func(self._moved(x, terms), *args[1:], **kwargs)
        size = torch.hypot(mean, rstd.reciprocal())  # of the activations: their standard deviation about zero
        error, rstd = self._summed(size, terms) - size, self._summed(rstd, terms)
        shifted = mean + error
        if running_mean is not None:
            running_mean.add_(error.to(running_mean.dtype), alpha=momentum)
            running_var.copy_(self._summed(running_var, terms))
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (self._moved(x, 1) - shifted.view(shape)) * rstd.view(shape)
        y = y if weight is None else self._moved(y, 1) * weight.view(shape)
        y = y if bias is None else y + bias.view(shape)
        return self._moved(y.to(x.dtype), 1), shifted, rstd, *others

    def _in_place(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        """What is written to is moved afterwards, other operands before."""
        arguments = func._schema.arguments
        writes = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        written = [v for a, v in zip(arguments, args) if a.name in writes] + [
            v for k, v in kwargs.items() if k in writes
        ]
        terms = 1 if func.namespace == "aten" else self.terms
        result = func(
            *[v if a.name in writes else self._all_moved(v, terms) for a, v in zip(arguments, args)],
            **{k: v if k in writes else self._all_moved(v, terms) for k, v in kwargs.items()},
        )
        for t in _floats(written):
            t.copy_(self._moved(t, 1))
        return result

    def _converted(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        result = func(*args, **kwargs)
        narrower = (
            result.is_floating_point()
            and args[0].is_floating_point()
            and torch.finfo(result.dtype).eps > torch.finfo(args[0].dtype).eps
        )
        return self._moved(result, 1) if narrower else result

    def _all_moved(self, values: Any, terms: int) -> Any:
        return pytree.tree_map(lambda t: self._moved(t, terms) if _is_float(t) else t, values)

    def _moved(self, t: torch.Tensor, terms: int) -> torch.Tensor:
        summing = 0.0 if terms <= 1 else _accumulating(t.dtype) * math.sqrt(terms) / 2
        return self._by(t, _roundoff(t.dtype) + summing)

    def _summed(self, result: Any, terms: int) -> Any:
        """The result of sums of `terms` terms, moved by what depends on its own size."""
        return (
            result
            if terms <= 1
            else pytree.tree_map(
                lambda t: self._by(t, _accumulating(t.dtype) * math.sqrt(terms / 3)) if _is_float(t) else t, result
            )
        )

    def _by(self, t: torch.Tensor, amount: float) -> torch.Tensor:
        """t with each element moved by a relative amount of that standard deviation."""
        if t.numel() == 0 or t.device.type == "meta":
            return t
        generator = self.generators.get(t.device)
        if generator is None:
            generator = self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        reach = math.sqrt(3) * amount
        return t * torch.empty_like(t).uniform_(1 - reach, 1 + reach, generator=generator)


def _is_exact(func: Any) -> bool:
    name = func._schema.name
    if torch.Tag.nondeterministic_seeded in func.tags or name in _EXACT or name.removesuffix("_") in _EXACT:
        return True
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns)  # views


def _is_float(t: object) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point() and t.layout is torch.strided


def _floats(values: object) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(values) if _is_float(t)]


def _products(w: torch.Tensor, groups: int, transposed: bool) -> int:
    """In one output of a convolution with these weights. That of its gradient is the transposed one."""
    return max(1, w.numel() // max(1, groups * w.shape[1] if transposed else w.shape[0]))


def _pixels(t: torch.Tensor) -> int:
    """Values of one channel."""
    return max(1, t.numel() // max(1, t.shape[1]))


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _accumulating(dtype: torch.dtype) -> float:
    """The unit roundoff of the type that sums are kept in."""
    return _roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
