"""Why a forward cannot stand in a plan."""

import contextlib
import threading

_stack = threading.local()


class Untraceable(Exception):
    """Why a forward cannot stand in a plan, in words for the report."""

    def __init__(self, reason: str):
        super().__init__(reason)
        for raised in getattr(_stack, "lists", ())[-1:]:
            raised.append(self)


class ForNow(Untraceable):
    """A reason that passes by itself, such as a profiler that is on: it is not kept."""


@contextlib.contextmanager
def noticed():
    """The refusals that are raised inside, whoever catches them: a forward with `except Exception` would go another way
    than by itself."""
    lists = _stack.__dict__.setdefault("lists", [])
    lists.append([])
    try:
        yield lists[-1]
    finally:
        lists.pop()
