"""Watches user code while it is captured, for effects that a recorded graph would lose or freeze.

The stand-ins (stand_ins.py) see what is read. They do not see `print(x.shape)`, `random.random() < p`,
`torch.is_grad_enabled()`, a context that is entered, or a custom autograd Function: the graph would do none of it
again. `Audit` follows every Python and C call made from user code during the capture, and stops at whatever is not
known to be a pure function of its arguments, before it runs. It stops as well at user code that does not run over the
capture's own globals: that would read what nobody notes. It errs towards refusing: a refused forward still runs, as
written.
"""
import contextlib
import dis
import functools
import gc
import sys
import types

from ..refusal import ForNow, Untraceable
from .stand_ins import Globals, List, NamespaceStandIn, is_library, root_of

_BUILTINS = frozenset(
    "len range isinstance issubclass getattr hasattr callable zip enumerate sum min max abs all any sorted reversed "
    "tuple list dict set int float bool str iter next map filter round divmod pow slice repr format chr ord".split())
_STDLIB = frozenset("collections typing functools itertools math operator abc enum numbers types dataclasses "
                    "_collections_abc builtins _operator".split())
_TORCH_PYTHON = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.overrides", "torch._jit_internal",
                 "torch.jit", "torch.fx", "torch.nn.modules.container", "torch.nn.modules.utils", "torch.nn.parameter",
                 "torch._VF", "torch.types", "torch.utils._device")
# Methods of nn.Module that only look, and the forwards of layers, which only compute.
_MODULE_METHODS = frozenset("__getattr__ children named_children modules named_modules parameters named_parameters "
                            "buffers named_buffers _named_members __hash__ __dir__ _get_name forward _conv_forward "
                            "_check_input_dim".split())
_TORCH_STATE = ("is_", "get_", "set_", "initial_seed", "manual_seed", "seed", "default_generator", "_")
_VALUES = (list, tuple, dict, set, frozenset, str, int, float, bool, type({}.keys()), type({}.items()),
           type({}.values()), slice, range, type(None), types.GeneratorType)
_COMPARES_WITH_NONE = ("IS_OP",)
# Instructions -> what they do that no graph does again. An operation of a graph that raises would find no handler.
_REFUSED = {
    **dict.fromkeys(("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE", "MATCH_KEYS"), "uses match"),
    **dict.fromkeys(("SETUP_WITH", "BEFORE_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL"), "enters a context"),
    **dict.fromkeys(("SETUP_FINALLY", "PUSH_EXC_INFO"), "handles exceptions"),
    "LOAD_BUILD_CLASS": "makes a class",
}


def is_user(frame):
    return not is_library(dict.get(frame.f_globals, "__name__", ""))


@functools.lru_cache(maxsize=4096)
def _effects(code):
    """(what the code does beyond its own locals, does it compare with None)"""
    stores, compares = None, False
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("STORE_ATTR", "DELETE_ATTR"):
            stores = stores or f"sets the attribute {instruction.argval!r}"
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stores = stores or f"sets the global {instruction.argval!r}"
        elif name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars:
            stores = stores or f"sets {instruction.argval!r} of the function around it"
        elif name in _REFUSED:
            stores = stores or _REFUSED[name]
        elif name in _COMPARES_WITH_NONE or name.endswith("NONE") and "JUMP" in name:
            compares = True
    return stores, compares


def _is_numpy(value):
    return isinstance(value, types.ModuleType) and root_of(value.__name__) in ("numpy", "random", "time")


@contextlib.contextmanager
def paused():
    """Suspends the audit in force: what convext does in between is not the user's."""
    profile = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)


def _is_torch(owner):
    """True of torch's modules of functions, and of its classes and their instances."""
    names = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(owner, "__module__", None)
    return any(root_of(name) == "torch" for name in (names, type(owner).__module__))


class Audit:
    """Context manager: `with Audit() as audit: forward(...)`, then `audit.check()` outside."""

    def __init__(self):
        self.problem = None
        self.compares_with_none = False

    def __enter__(self):
        if sys.getprofile() is not None:
            raise ForNow("a Python profiler is on")
        self._collecting = gc.isenabled()
        gc.disable()     # whatever listens to the collector would look like a call of the forward's
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exc):
        sys.setprofile(None)
        if self._collecting:
            gc.enable()
        return False

    def check(self):
        if self.problem is not None:
            raise Untraceable(f"its forward {self.problem}")

    def _event(self, frame, event, arg):
        self._look(frame, event, arg)
        self.check()     # raises before the call is made, so that it leaves nothing behind

    def _look(self, frame, event, arg):
        if event == "call":
            if is_user(frame):
                self._enter_user_code(frame)
            if frame.f_back is not None and is_user(frame.f_back):
                self._call(frame)
        elif event == "c_call" and is_user(frame):
            self._c_call(frame, arg)

    def _enter_user_code(self, frame):
        name = dict.get(frame.f_globals, "__name__", "")
        if not isinstance(frame.f_globals, Globals) and not name.startswith("namedtuple_"):
            self.problem = f"runs {name}.{frame.f_code.co_name}, into which a capture does not look"
            return
        effects, compares = _effects(frame.f_code)
        if effects:
            self.problem = effects
        self.compares_with_none |= compares
        if isinstance(frame.f_globals, Globals):
            real = frame.f_globals.real
            for name in frame.f_code.co_names:
                if _is_numpy(real.get(name)):
                    self.problem = f"uses {name!r}, whose results a plan would freeze"
                elif name == "type" and "type" not in real:
                    self.problem = "looks at type(...) of a value"

    def _call(self, callee):
        module, name = dict.get(callee.f_globals, "__name__", ""), callee.f_code.co_name
        root = root_of(module)
        if root == "torch":
            if module.startswith("torch.nn.modules.") and name in _MODULE_METHODS:
                return
            if not any(module == m or module.startswith(m + ".") for m in _TORCH_PYTHON):
                self.problem = f"calls {module}.{name}"
        elif root == "convext":
            if not module.startswith(("convext.swap.capture", "convext.functional")):
                self.problem = f"calls {module}.{name}"
        elif root in sys.stdlib_module_names and root not in _STDLIB:
            self.problem = f"calls {module}.{name}"

    def _c_call(self, frame, function):
        name, owner = getattr(function, "__name__", "?"), getattr(function, "__self__", None)
        if isinstance(owner, types.ModuleType) and owner.__name__ == "builtins":
            if name not in _BUILTINS:
                self.problem = f"calls {name}()"
        elif isinstance(owner, types.ModuleType) and root_of(owner.__name__) in _STDLIB:
            return
        elif isinstance(owner, list) and name in ("append", "extend", "insert", "pop", "remove", "clear", "sort",
                                                  "reverse"):
            if type(owner) is List or not any(owner is value for value in frame.f_locals.values()):
                self.problem = "changes a list that outlives the call"
        elif isinstance(owner, (dict, set)) and name in ("update", "pop", "clear", "add", "discard", "remove",
                                                         "setdefault", "popitem"):
            if not any(owner is value for value in frame.f_locals.values()):
                self.problem = f"changes a {type(owner).__name__} that outlives the call"
        elif owner is None:
            module = getattr(function, "__module__", None) or "builtins"
            if not (root_of(module) in _STDLIB or root_of(module) == "torch"):
                self.problem = f"calls {module}.{name}"
        elif isinstance(owner, _VALUES) or isinstance(owner, type) and issubclass(owner, _VALUES):
            return
        elif isinstance(owner, NamespaceStandIn):
            self.problem = f"calls {name}()"
        elif _is_torch(owner):
            if name.startswith(_TORCH_STATE) and not name.startswith("__"):
                self.problem = f"calls torch's {name}(), which is state of the process"
        else:
            self.problem = f"calls {name}() of {type(owner).__name__}"
