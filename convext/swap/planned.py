"""PlannedForward: what stands as `container.forward` after a swap.

It captures the container's own forward once for each form in which it is called, and runs the compiled plan. Whenever
a plan cannot stand for the forward that the class defines, that forward runs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as _torch_module

from ..backends import native
from .capture import signature as signatures
from .capture.trace import HOOKS
from .method import ForwardMethod
from .modes import Mode, function_mode_watches, present
from .plan import Plan, Refusal
from .refusal import ForNow, Untraceable
from .schedule import layout

if TYPE_CHECKING:
    from torch import nn

    from .capture.signature import Signature
    from .lower import Compiled

_GLOBAL_HOOKS = tuple(
    getattr(_torch_module, name)
    for name in (
        "_global_backward_pre_hooks",
        "_global_backward_hooks",
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
    )
)
_is_tracing = torch._C._get_tracing_state
_MOST_SIGNATURES = 8  # that a container keeps plans for
_MOST_PLANS = 8  # for one signature: training and evaluation, with hooks and without, ...
_MOST_CAPTURES = 64  # for one signature: a forward that reads something new in each call runs as it is


class PlannedForward(ForwardMethod):
    """A container's `forward` after the swap. Copies belong to the copied container; pickles carry no plan.

    recompute  whether layers of little arithmetic compute their outputs again in the backward pass"""

    recompute = False

    def _attach(self, owner: nn.Module) -> None:
        super()._attach(owner)
        self._plans: dict[Signature, list[Plan | Refusal]] = {}  # the latest first
        self._captures: dict[Signature, int] = {}  # how often each was captured

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
        return plan.compiled(present(in_seam)).result(owner, tensors, in_seam)

    def in_any_format(self, *tensors: torch.Tensor) -> Any:
        """The call from another plan: arguments and result may be channels-last where the user's own are not."""
        owner = self.owner
        plan = self.plan(owner, signatures.of_call(tensors, {}))
        if (
            plan is not None
            and layout.contiguous_weights(plan.weights)
            and not any(owner.__dict__[name] for name in HOOKS)
        ):
            compiled = plan.compiled(present(True))
            if compiled.works_in_any_format:
                return compiled.function(owner, *tensors)
        return _restored(owner, tensors)

    def _settings(self) -> dict[str, Any]:
        return {"recompute": self.recompute}

    # Plans.

    def plan(self, owner: nn.Module, signature: Signature | None) -> Plan | None:
        """The plan for calls of a signature in the owner's present state, or None."""
        found = None if signature is None else self._present(owner, signature) or self._make(owner, signature)
        return found if isinstance(found, Plan) else None

    def _present(self, owner: nn.Module, signature: Signature) -> Plan | Refusal | None:
        """The Plan or Refusal that holds, or None."""
        plans: list[Plan | Refusal] = self._plans.get(signature, ())  # type: ignore[arg-type]
        for position, plan in enumerate(plans):
            if plan.holds(owner):
                if position:
                    plans.insert(0, plans.pop(position))
                return plan
        return None

    def _make(self, owner: nn.Module, signature: Signature) -> Plan | Refusal | None:
        if (
            len(self._plans) >= _MOST_SIGNATURES
            and signature not in self._plans
            or self._captures.get(signature, 0) >= _MOST_CAPTURES
            or not native.has_guards()
        ):
            return None
        if signature == signatures.ONE_TENSOR:
            signature = signatures.ONE_TENSOR
        try:
            made: Plan | Refusal = Plan(owner, signature, self.recompute)
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

    def present_plans(self) -> list[Compiled]:
        """The `Compiled` of the plans that hold for the owner's present state: those that have run, else what would
        run."""
        owner = self.owner
        plans: list[Plan | Refusal | None] = [p for plans in self._plans.values() for p in plans if p.holds(owner)]
        if not any(isinstance(p, Plan) for p in plans):
            plans = [self.plan(owner, signatures.default(owner))]
        return [
            compiled
            for plan in plans
            if isinstance(plan, Plan)
            for compiled in list(plan.by_mode.values()) or [plan.compiled(Mode())]
        ]

    def present_refusal(self) -> str | None:
        """Why there is no plan, where there is none."""
        owner = self.owner
        return next(
            (
                plan.reason
                for plans in self._plans.values()
                for plan in plans
                if isinstance(plan, Refusal) and plan.holds(owner)
            ),
            None,
        )

    def set_recompute(self, recompute: bool) -> None:
        if recompute is not self.recompute:
            self.recompute = recompute
            self._plans.clear()

    def forget_refusals(self) -> None:
        """Lets a capture that was refused be tried again."""
        self._captures.clear()
        for plans in self._plans.values():
            plans[:] = [plan for plan in plans if isinstance(plan, Plan)]

    # What plans around this one ask.

    def result_in_any_format(self, count: int) -> str | None:
        plan = self.plan(self.owner, ((signatures.TENSOR,) * count, ()))
        compiled = plan and plan.compiled(Mode(in_seam=True))
        return compiled.layout.returns if compiled and compiled.works_in_any_format else None

    def whole(self, mode: Mode) -> Any:
        if mode.in_seam and self.result_in_any_format(1) is None:
            return None
        plan = self.plan(self.owner, signatures.ONE_TENSOR)
        return None if plan is None else plan.compiled(mode).whole


def _restored(module: nn.Module, tensors: Sequence[torch.Tensor]) -> Any:
    """module(*tensors) with contiguous arguments; what it writes into them reaches the originals."""
    given = [t.contiguous() for t in tensors]
    tracked = not any(t.is_inference() for t in given)
    versions: Any = [t._version for t in given] if tracked else None
    result = module(*given)
    for position, (before, now) in enumerate(zip(tensors, given)):
        if now is not before and (not tracked or now._version != versions[position]):
            before.copy_(now)
    return result
