"""Watches user code while it is captured, for effects that a recorded graph would lose or freeze.

The stand-ins (stand_ins.py) see what is read. They do not see `print(x.shape)`, `random.random() < p`,
`torch.is_grad_enabled()`, a context that is entered, or a custom autograd Function: the graph would do none of it
again. `Audit` follows every Python and C call made from user code during the capture, and stops at whatever is not
known to be a pure function of its arguments, before it runs. It stops as well at user code that does not run over the
capture's own globals: that would read what nobody notes. It errs towards refusing: a refused forward still runs, as
written.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import gc
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from torch import fx

from ..refusal import ForNow, Untraceable
from .pure import STDLIB, is_library, is_of_layers, is_stdlib, root_of, why_impure
from .stand_ins import ClassStandIn, Globals, List, StandIn

_TORCH_PYTHON = (
    "torch.nn.functional",
    "torch.functional",
    "torch._tensor",
    "torch.overrides",
    "torch._jit_internal",
    "torch.jit",
    "torch.fx",
    "torch.nn.modules.container",
    "torch.nn.modules.utils",
    "torch.nn.parameter",
    "torch._VF",
    "torch.types",
    "torch.utils._device",
)
Operand = tuple[Any, ...] | None  # see `_operand`
# Instructions -> what they do that no graph does again. An operation of a graph that raises would find no handler.
_REFUSED = {
    **dict.fromkeys(("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE", "MATCH_KEYS"), "uses match"),
    **dict.fromkeys(("SETUP_WITH", "BEFORE_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL"), "enters a context"),
    **dict.fromkeys(("SETUP_FINALLY", "PUSH_EXC_INFO"), "handles exceptions"),
    "LOAD_BUILD_CLASS": "makes a class",
}


def is_user(frame: types.FrameType) -> bool:
    return not is_library(dict.get(frame.f_globals, "__name__", ""))


@functools.lru_cache(maxsize=4096)
def _effects(code: types.CodeType) -> tuple[str | None, bool, frozenset[str], tuple[tuple[Operand, Operand], ...]]:
    """(what the code does beyond its own locals, does it compare with None, names of globals, pairs of operands whose
    identity it compares: each a constant's tuple or the chain of names that leads to it, None where it is another)"""
    stores, compares, names, pairs = None, False, set(), []
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    for at, instruction in enumerate(instructions):
        name = instruction.opname
        if name in ("STORE_ATTR", "DELETE_ATTR"):
            stores = stores or f"sets the attribute {instruction.argval!r}"
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stores = stores or f"sets the global {instruction.argval!r}"
        elif name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars:
            stores = stores or f"sets {instruction.argval!r} of the function around it"
        elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif name in _REFUSED:
            stores = stores or _REFUSED[name]
        elif name == "IS_OP":
            right, before = _operand(instructions, at - 1)
            left, _ = _operand(instructions, before)
            if right == (None,) or left == (None,):
                compares = True
            else:
                pairs.append((left, right))
        elif name.endswith("NONE") and "JUMP" in name:
            compares = True
    return stores, compares, frozenset(names), tuple(pairs)


def _operand(instructions: Sequence[dis.Instruction], at: int) -> tuple[Operand, int]:
    """((constant,), or the names that lead to an operand that is loaded last at `at`, or None; the place before it)"""
    chain: list[str] = []
    while at >= 0:
        instruction = instructions[at]
        name = instruction.opname
        if name == "LOAD_CONST" and not chain:
            return (instruction.argval,), at - 1
        if name == "LOAD_ATTR":
            chain.append(instruction.argval)
        elif name == "LOAD_GLOBAL" or name in ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF"):
            return (name == "LOAD_GLOBAL", instruction.argval, *reversed(chain)), at - 1
        else:
            return None, at - 1
        at -= 1
    return None, at


def _is_numpy(value: object) -> bool:
    return isinstance(value, types.ModuleType) and root_of(value.__name__) in ("numpy", "random", "time")


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Suspends the audit in force: what convext does in between is not the user's."""
    profile = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)


class Audit:
    """Context manager: `with Audit() as audit: forward(...)`, then `audit.check()` outside."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.compares_with_none = False

    def __enter__(self) -> Audit:
        if sys.getprofile() is not None:
            raise ForNow("a Python profiler is on")
        self._collecting = gc.isenabled()
        gc.disable()  # whatever listens to the collector would look like a call of the forward's
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exc: object) -> Literal[False]:
        sys.setprofile(None)
        if self._collecting:
            gc.enable()
        return False

    def check(self) -> None:
        if self.problem is not None:
            raise Untraceable(f"its forward {self.problem}")

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        self._look(frame, event, arg)
        self.check()  # raises before the call is made, so that it leaves nothing behind

    def _look(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            if is_user(frame):
                self._enter_user_code(frame)
            if frame.f_back is not None and is_user(frame.f_back):
                self._call(frame)
        elif event == "c_call" and is_user(frame):
            self._c_call(frame, arg)

    def _enter_user_code(self, frame: types.FrameType) -> None:
        name = dict.get(frame.f_globals, "__name__", "")
        if not isinstance(frame.f_globals, Globals) and not name.startswith("namedtuple_"):
            self.problem = f"runs {name}.{frame.f_code.co_name}, into which a capture does not look"
            return
        effects, compares, names, pairs = _effects(frame.f_code)
        if effects:
            self.problem = effects
        self.compares_with_none |= compares
        if isinstance(frame.f_globals, Globals):
            real = frame.f_globals.real
            for name in names:
                if _is_numpy(real.get(name)):
                    self.problem = f"uses {name!r}, whose results a plan would freeze"
                elif name == "type" and "type" not in real:
                    self.problem = "looks at type(...) of a value"
            if pairs and self.problem is None:
                if not all(self._is_no_value(frame, operand) for pair in pairs for operand in pair):
                    self.problem = "asks whether two values are one object"

    def _is_no_value(self, frame: types.FrameType, operand: Operand) -> bool:
        """True of an operand of `is` that is the same throughout a call of the function and no tensor: a constant, or
        what names lead to from a global or from the first argument of a method."""
        if operand is None:
            return False
        if len(operand) == 1:
            return True
        is_global, root, *chain = operand
        code = frame.f_code
        if is_global:
            try:
                value = frame.f_globals[root]
            except KeyError:
                return False
        elif code.co_argcount and code.co_varnames[0] == root:
            value = frame.f_locals[root]
        else:
            return False
        for name in chain:
            if not isinstance(value, (StandIn, ClassStandIn, type, enum.Enum)):
                return False
            value = getattr(value, name)
        return not isinstance(value, fx.Proxy)

    def _call(self, callee: types.FrameType) -> None:
        module, name = dict.get(callee.f_globals, "__name__", ""), callee.f_code.co_name
        root = root_of(module)
        if root == "torch":
            if is_of_layers(module, name):
                return
            if not any(module == m or module.startswith(m + ".") for m in _TORCH_PYTHON):
                self.problem = f"calls {module}.{name}"
        elif root == "convext":
            if not module.startswith(("convext.swap.capture", "convext.functional")):
                self.problem = f"calls {module}.{name}"
        elif is_stdlib(module):
            if root not in STDLIB or _hold_stand_ins([*callee.f_locals.values()]):
                self.problem = f"calls {module}.{name}"

    def _c_call(self, frame: types.FrameType, function: object) -> None:
        name, owner = getattr(function, "__name__", "?"), getattr(function, "__self__", None)
        if isinstance(owner, (list, dict, set)) and name in _MUTATORS:
            if type(owner) is List or not any(owner is value for value in frame.f_locals.values()):
                self.problem = f"changes a {type(owner).__name__.lower()} that outlives the call"
        else:
            self.problem = why_impure(function)


_MUTATORS = frozenset(
    "append extend insert pop remove clear sort reverse update add discard setdefault popitem "
    "difference_update intersection_update symmetric_difference_update move_to_end".split()
)


def _hold_stand_ins(values: Iterable[Any]) -> bool:
    return any(
        isinstance(v, (StandIn, ClassStandIn, fx.Proxy)) or type(v) in (list, tuple) and _hold_stand_ins(v)
        for v in values
    )
