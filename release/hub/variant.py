"""convext from a build variant of the kernel hub.

The package lies in the folder of its name beside this file and is imported under that name, which its operators
(torch.ops.convext), pickled models and swapped models carry. So there is one convext in a process: where another one
was imported before, this raises ImportError.
"""

import importlib.util
import sys
from pathlib import Path

_PLACE = Path(__file__).resolve().parent / "convext"


def _package():
    known = sys.modules.get("convext")
    if known is None:
        spec = importlib.util.spec_from_file_location("convext", _PLACE / "__init__.py")
        known = sys.modules["convext"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(known)
        except BaseException:
            del sys.modules["convext"]
            raise
    elif Path(known.__file__).resolve().parent != _PLACE:
        raise ImportError(
            f"convext was imported before, from {known.__file__}, and a process has one: "
            "get the kernel first, or use that one"
        )
    return known


_convext = _package()
__all__ = list(_convext.__all__)
globals().update({name: getattr(_convext, name) for name in __all__})


def __getattr__(name: str):
    return getattr(_convext, name)
