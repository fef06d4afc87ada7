"""The source tree that the tests lie in: convext itself is the installed one, which need not lie there."""

import importlib.util
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_setup() -> types.ModuleType:
    """setup.py, which says how C++ is compiled."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
