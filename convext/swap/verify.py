"""verify(model, sample): the model swapped and unswapped on the same input, forward and backward.

How far apart may they be? A few times as far as the unswapped model is from itself: its distance from a float64 run, or
what moving every operand by one rounding error does to it, whichever is larger. For a float64 model the first is no
measure. There the second counts times sqrt(n), n being the longest sum: n operands moved by eps at random move their
sum by eps sqrt(n), while rounding every one of its n partial sums, which grow like sqrt(n), moves it by eps n.

Gradients are not continuous: behind a ReLU a unit that rounding pushes across zero switches its whole gradient, and
which units do so is chance. They may also be as far apart as a move of every operand by 1024 eps, at most 1e-4, takes
them, which is far enough for some units to switch in every network. Verify in float64 where a finer measure is wanted.
"""
import copy
import dataclasses
import math

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .report import render, table

# A blocked sum and a plain one of the same numbers differ by a few times their own error; Winograd's forms, which
# trade multiplications for additions, by up to an order of magnitude.
MARGIN = 8.0


def _jolt(dtype):
    """The relative move that gradients are held against."""
    eps = torch.finfo(dtype).eps
    return max(eps, min(1024 * eps, 1e-4))



@dataclasses.dataclass
class Difference:
    """One output, gradient or buffer.

    error    largest distance of the swapped model's value from the unswapped one's
    own      how far the unswapped model's value is from itself (see the module)
    allowed  what `error` may be
    """

    name: str
    kind: str
    error: float
    own: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


class Verification:
    """What `verify` found. `ok`; `rows`, a `Difference` for each value; prints as a table of the worst of each kind."""

    def __init__(self, rows, title):
        self.rows, self.title = rows, title

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __bool__(self):
        return self.ok

    def worst(self):
        """The row of each kind that used most of what was allowed, and every row beyond it."""
        chosen = {}
        for row in self.rows:
            if row.kind not in chosen or _share(row) > _share(chosen[row.kind]):
                chosen[row.kind] = row
        return [row for row in self.rows if row is chosen[row.kind] or not row.ok]

    def __rich__(self):
        rows = [(r.kind, r.name, f"{r.error:.3g}", f"{r.own:.3g}", f"{r.allowed:.3g}", "yes" if r.ok else "NO")
                for r in self.worst()]
        verdict = "agree" if self.ok else "DISAGREE"
        return table(self.title, ["kind", "worst of it", "apart", "unswapped's own error", "allowed", "ok"], rows,
                     f"{len(self.rows)} values: swapped and unswapped {verdict}")

    def __str__(self):
        return render(self)

    __repr__ = __str__


def _share(row):
    return math.inf if not row.error <= row.allowed else row.error / row.allowed if row.allowed else 0.0


def verify(model: nn.Module, sample, *, seed: int = 0) -> Verification:
    """Runs a model swapped and unswapped on a sample, forward and backward, in its present mode, and compares.

    Args:
        model: swapped or not; neither it, nor its buffers and gradients, nor the random state change.
        sample: a tensor, or a tuple or list of positional arguments, or a dict of keyword arguments.
        seed: of the random numbers that dropout and the like draw, and of the gradient that is sent back.

    Returns a `Verification`: outputs, gradients of the inputs and parameters, and buffers.

    Raises TypeError if `model` is not an nn.Module or `sample` holds no tensor, ValueError if the unswapped model fails
    on the sample.
    """
    from . import revert, swap
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    args, kwargs = _arguments(sample)
    with torch.random.fork_rng():
        plain = _Run(revert(copy.deepcopy(model)), args, kwargs, seed, own=True)
        swapped = _Run(swap(copy.deepcopy(model)), args, kwargs, seed)
        wide = _Run(_widened(revert(copy.deepcopy(model))), _widened_values(args), _widened_values(kwargs), seed)
        moved, jolted = (
            _Run(_moved(revert(copy.deepcopy(model)), seed, by), _moved_values(args, seed, by),
                 _moved_values(kwargs, seed, by), seed)
            for by in (_eps, _jolt))
    terms = _longest_sum(model, args, kwargs)
    rows = [_difference(name, kind, value, swapped.values.get((name, kind)), wide.values.get((name, kind)),
                        moved.values.get((name, kind)), jolted.values.get((name, kind)), terms)
            for (name, kind), value in plain.values.items()]
    mode = "training" if model.training else "evaluation"
    return Verification(rows, f"{type(model).__name__} in {mode}, swapped against unswapped")


def _arguments(sample):
    args, kwargs = ((), sample) if isinstance(sample, dict) else \
        (tuple(sample), {}) if isinstance(sample, (tuple, list)) else ((sample,), {})
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise TypeError(f"sample: expected a tensor, or a tuple, list or dict of arguments with one, "
                        f"got {type(sample).__name__}")
    return args, kwargs


class _Run:
    """One forward and backward pass. values: {(name, kind): tensor}"""

    def __init__(self, model, args, kwargs, seed, own=False):
        model.zero_grad(set_to_none=True)
        inputs = []

        def leaf(value):
            if not isinstance(value, torch.Tensor):
                return value
            value = value.detach().clone(memory_format=torch.preserve_format)
            inputs.append(value.requires_grad_(value.is_floating_point()))
            return value

        args, kwargs = pytree.tree_map(leaf, (args, kwargs))
        torch.manual_seed(seed)
        try:
            with torch.enable_grad():
                result = model(*args, **kwargs)
        except Exception as error:
            if own:
                raise ValueError(f"sample: the unswapped {type(model).__name__} fails on it: {error}") from error
            raise
        outputs = [(f"[{i}]", t) for i, t in enumerate(_tensors_of(result))]
        self.values = {(name, "output"): t.detach() for name, t in outputs}
        self._backward([t for _, t in outputs if t.requires_grad], seed)
        self.values |= {(f"[{i}]", "gradient of input"): t.grad for i, t in enumerate(inputs) if t.grad is not None}
        self.values |= {(n, "gradient"): p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.values |= {(n, "buffer"): b for n, b in model.named_buffers()}

    @staticmethod
    def _backward(outputs, seed):
        if outputs:
            generator = torch.Generator("cpu").manual_seed(seed)
            torch.autograd.backward(outputs, [
                torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device, t.dtype)
                for t in outputs])


def _tensors_of(result):
    """The tensors of a forward's result, those in objects with attributes of their own included."""
    leaves = pytree.tree_leaves(result)
    return [t for leaf in leaves
            for t in ([leaf] if isinstance(leaf, torch.Tensor) else
                      [v for v in getattr(leaf, "__dict__", {}).values() if isinstance(v, torch.Tensor)])]


def _widened(model):
    return model.double()


def _widened_values(values):
    return pytree.tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, values)


def _eps(dtype):
    return torch.finfo(dtype).eps


def _move(t, generator, by):
    """t with every element up or down by the relative amount `by(dtype)`."""
    signs = torch.randint(0, 2, t.shape, generator=generator, device="cpu").to(t.device, torch.float64) * 2 - 1
    return (t.double() * (1 + signs * by(t.dtype))).to(t.dtype)


@torch.no_grad()
def _moved(model, seed, by):
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    for p in model.parameters():
        if p.is_floating_point():
            p.copy_(_move(p, generator, by))
    return model


def _moved_values(values, seed, by):
    generator = torch.Generator("cpu").manual_seed(seed + 2)
    return pytree.tree_map(
        lambda v: _move(v.detach(), generator, by) if isinstance(v, torch.Tensor) and v.is_floating_point() else v,
        values)


def _longest_sum(model, args, kwargs):
    """Of the forward pass over the operands of an output, of the backward pass over batch and pixels."""
    operands = [p[0].numel() for p in model.parameters() if p.dim() > 1]
    pixels = [t.numel() // (t.shape[1] if t.dim() > 3 else 1) for t in pytree.tree_leaves((args, kwargs))
              if isinstance(t, torch.Tensor)]
    return max([1, *operands, *pixels])


def _difference(name, kind, plain, swapped, wide, moved, jolted, terms):
    if swapped is None or swapped.shape != plain.shape or swapped.dtype != plain.dtype:
        return Difference(name, kind, math.inf, 0.0, 0.0)
    if not plain.is_floating_point():
        return Difference(name, kind, _distance(plain, swapped), 0.0, 0.0)
    own = _distance(plain, moved) * math.sqrt(terms) if plain.dtype is torch.float64 else \
        max(_distance(plain, wide), _distance(plain, moved))
    size = float(plain.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if plain.numel() else 0.0
    allowed = MARGIN * max(own, torch.finfo(plain.dtype).eps * size)
    if kind.startswith("gradient"):
        allowed = max(allowed, _distance(plain, jolted))
    return Difference(name, kind, _distance(plain, swapped), own, allowed)


def _distance(a, b):
    """Largest distance of two tensors; infinite where one is not finite and the other differs."""
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs())
    return float(apart.nan_to_num(math.inf).max())
