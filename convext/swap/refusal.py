"""Why a forward cannot stand in a plan."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_stack = threading.local()


class Untraceable(Exception):
    """Why a forward cannot stand in a plan, in words for the report."""

    facts: Any  # what the reason rests on, a capture's Facts, once that is over

    def __init__(self, reason: str):
        super().__init__(reason)
        for raised in getattr(_stack, "lists", ())[-1:]:
            raised.append(self)


class ForNow(Untraceable):
    """A reason that passes by itself, such as a profiler that is on: it is not kept."""


@contextlib.contextmanager
def noticed() -> Iterator[list[Untraceable]]:
    """The refusals that are raised inside, whoever catches them: a forward with `except Exception` would go another way
    than by itself."""
    lists = _stack.__dict__.setdefault("lists", [])
    lists.append([])
    try:
        yield lists[-1]
    finally:
        lists.pop()
