"""Watches user code while it is traced, for effects that a recorded graph would lose or freeze.

A symbolic trace sees what happens to tensors. It does not see `self.features = x`, `print(x.shape)`,
`random.random() < p`, `torch.is_grad_enabled()` or a custom autograd Function: the graph would do none of it again.
`Audit` follows every Python and C call made from user code during the trace, and stops at whatever is not known to be
a pure function of its arguments, before it runs. It errs towards refusing: a refused forward still runs, as written.
"""
import contextlib
import dis
import functools
import gc
import sys
import types


class Untraceable(Exception):
    """Why a forward cannot stand in a plan, in words for the report."""


_BUILTINS = frozenset(
    "len range isinstance issubclass getattr hasattr callable zip enumerate sum min max abs all any sorted reversed "
    "tuple list dict set int float bool str iter next map filter round divmod pow slice super repr format chr ord "
    "__build_class__".split())
_STDLIB = frozenset("collections typing functools itertools math operator abc enum numbers types dataclasses "
                    "_collections_abc builtins _operator".split())
_TORCH_PYTHON = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.overrides", "torch._jit_internal",
                 "torch.jit", "torch.fx", "torch.nn.modules.container", "torch.nn.modules.utils", "torch.nn.parameter",
                 "torch._VF", "torch.types", "torch.utils._device")
# Methods of nn.Module that only look.
_MODULE_METHODS = frozenset("__getattr__ __call__ children named_children modules named_modules parameters "
                            "named_parameters buffers named_buffers _named_members __hash__ __dir__ _get_name".split())
_TORCH_STATE = ("is_", "get_", "set_", "initial_seed", "manual_seed", "seed", "default_generator", "_")
_VALUES = (list, tuple, dict, set, frozenset, str, int, float, bool, type({}.keys()), type({}.items()),
           type({}.values()), slice, range, type(None), types.GeneratorType)
_COMPARES_WITH_NONE = ("IS_OP",)


def is_user(frame):
    root = frame.f_globals.get("__name__", "").partition(".")[0]
    return root not in ("torch", "convext") and root not in sys.stdlib_module_names


@functools.lru_cache(maxsize=4096)
def _effects(code):
    """(what the code stores outside its own locals, does it compare with None)"""
    stores, compares = None, False
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("STORE_ATTR", "DELETE_ATTR"):
            stores = stores or f"sets the attribute {instruction.argval!r}"
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stores = stores or f"sets the global {instruction.argval!r}"
        elif name in _COMPARES_WITH_NONE or name.endswith("NONE") and "JUMP" in name:
            compares = True
    return stores, compares


def _is_numpy(value):
    return isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in ("numpy", "random", "time")


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
    return any(isinstance(name, str) and name.partition(".")[0] == "torch" for name in (names, type(owner).__module__))


class Audit:
    """Context manager: `with Audit() as audit: forward(...)`, then `audit.check()` outside."""

    def __init__(self):
        self.problem = None
        self.compares_with_none = False
        self.calling = self.asked = None    # the C function being called, and the one before the present event

    def __enter__(self):
        if sys.getprofile() is not None:
            raise Untraceable("a Python profiler is on")
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
        self.asked, self.calling = self.calling, arg if event == "c_call" else None
        if event == "call":
            if is_user(frame):
                self._enter_user_code(frame)
            if frame.f_back is not None and is_user(frame.f_back):
                self._call(frame)
        elif event == "c_call" and is_user(frame):
            self._c_call(frame, arg)

    def _enter_user_code(self, frame):
        stores, compares = _effects(frame.f_code)
        if stores:
            self.problem = stores
        self.compares_with_none |= compares
        for name in frame.f_code.co_names:
            if _is_numpy(frame.f_globals.get(name)):
                self.problem = f"uses {name!r}, whose results a plan would freeze"
            elif name == "type" and "type" not in frame.f_globals:
                self.problem = "looks at type(...) of a value"

    def _call(self, callee):
        module, name = callee.f_globals.get("__name__", ""), callee.f_code.co_name
        root = module.partition(".")[0]
        if root == "torch":
            if module.startswith("torch.nn.modules.") and name in _MODULE_METHODS:
                return
            if not any(module == m or module.startswith(m + ".") for m in _TORCH_PYTHON):
                self.problem = f"calls {module}.{name}"
        elif root in sys.stdlib_module_names and root not in _STDLIB:
            self.problem = f"calls {module}.{name}"

    def _c_call(self, frame, function):
        name, owner = getattr(function, "__name__", "?"), getattr(function, "__self__", None)
        if isinstance(owner, types.ModuleType) and owner.__name__ == "builtins":
            if name not in _BUILTINS:
                self.problem = f"calls {name}()"
        elif isinstance(owner, types.ModuleType) and owner.__name__.partition(".")[0] in _STDLIB:
            return
        elif isinstance(owner, list) and name in ("append", "extend", "insert", "pop", "remove", "clear"):
            if not any(owner is value for value in frame.f_locals.values()):
                self.problem = "changes a list that outlives the call"
        elif owner is None or isinstance(owner, _VALUES) or isinstance(owner, type) and issubclass(owner, _VALUES):
            return
        elif _is_torch(owner):
            if name.startswith(_TORCH_STATE) and not name.startswith("__"):
                self.problem = f"calls torch's {name}(), which is state of the process"
        else:
            self.problem = f"calls {name}() of {type(owner).__name__}"


def snapshot(root):
    """Everything that user code could leave behind in the modules; call the result to put it back.

    Returns a function that restores what changed and says whether anything did."""
    saved = []
    for module in root.modules():
        attributes = module.__dict__
        saved.append((attributes, dict(attributes)))
        for value in attributes.values():
            if isinstance(value, (dict, list, set)):
                saved.append((value, value.copy()))

    def restore():
        changed = False
        for live, copy in saved:
            if isinstance(live, dict):
                same = len(live) == len(copy) and all(live.get(key, saved) is value for key, value in copy.items())
            elif isinstance(live, list):
                same = len(live) == len(copy) and all(a is b for a, b in zip(live, copy))
            else:
                same = live == copy
            if not same:
                changed = True
                live.clear()
                (live.extend if isinstance(live, list) else live.update)(copy)
        return changed

    return restore
