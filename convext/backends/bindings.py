"""The bindings of the compiled libraries, ``convext/_C`` and ``convext/_CUDA``, loaded or not and why.

They count on Python's global interpreter lock: guards hear of changes of dictionaries and check hundreds of them
without locks of their own (csrc/python/guards.h), and settings are read between calls. They do not declare that they
could do without, so a free-threaded Python switches its lock on when they are imported; where PYTHON_GIL=0 or -X gil=0
keeps it off, they are not used.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from types import ModuleType


class LockIsOff(ImportError):
    """Python runs without its global interpreter lock, and was told to."""


def free_threaded() -> bool:
    """Whether this Python can run without the lock."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def lock_is_on() -> bool:
    """Whether one thread at a time runs Python code now."""
    asked = getattr(sys, "_is_gil_enabled", None)  # Python 3.13
    return asked is None or bool(asked())


def load(name: str) -> ModuleType:
    """The bindings of that name. Raises ImportError where they were not built, do not load, or must not be used."""
    module = importlib.import_module(f"convext.{name}")
    if not lock_is_on():
        raise LockIsOff("it needs Python's global interpreter lock, which PYTHON_GIL=0 or -X gil=0 keeps off")
    return module
