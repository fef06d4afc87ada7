"""convext/_call (csrc/call/call.cpp), which keeps plans of calls, where it holds for this torch. What plans follow from
is dropped here, with whatever else is kept of the selection."""

from __future__ import annotations

from typing import Any

import torch

from . import bindings


def _load() -> tuple[Any, str | None]:
    """The library, or None and why."""
    try:
        built = bindings.load("_C").build_info()["torch"].split("+")[0]
    except ImportError as error:
        return None, f"the compiled library did not load ({error})"
    running = torch.__version__.split("+")[0]
    if built != running:
        return None, f"convext was built with torch {built} and runs with {running}"
    try:
        return bindings.load("_call"), None
    except ImportError as error:
        return None, f"convext/_call did not load ({error})"


library, why_not = _load()


def forget() -> None:
    """Drops every plan."""
    if library is not None:
        library.forget()


def count() -> None:
    """Adds the library's calls since the last time to the counters of the selection."""
    if library is not None:
        library.count()


def record_weights(record: bool) -> None:
    """Whether the library serves this thread's calls that record a gradient of weights; it does at first."""
    if library is not None:
        library.record_weights(record)
