"""What command-line options may say, checked in one place: an `OptionError` names option, value and expectation."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TypeVar

import torch

MaybePath = TypeVar("MaybePath", Path, Path | None)


class UsageError(ValueError):
    """What was asked for cannot be done as asked; the message is the one line that the user reads."""


class OptionError(UsageError):
    """A command-line value that cannot be used."""

    def __init__(self, option: str, value: object, expected: str):
        super().__init__(f"{option}: got {str(value)!r}, expected {expected}")


class DType(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.value)
        return found


class MemoryFormat(str, Enum):
    contiguous = "contiguous"
    channels_last = "channels-last"

    @property
    def torch(self) -> torch.memory_format:
        return torch.channels_last if self is MemoryFormat.channels_last else torch.contiguous_format


def device(text: str) -> torch.device:
    """The device `text` names, if this machine has it."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise OptionError("--device", text, "cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise OptionError("--device", text, "cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError("--device", text, f"a GPU that torch sees ({torch.cuda.device_count()} found)")
    return found


def output(option: str, path: MaybePath) -> MaybePath:
    """A file that is to be written, if its folder exists."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise OptionError(option, path, "a file in an existing folder")
    return path


def integer(option: str, text: str) -> int:
    """`"8"` as 8, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(option, text, "an integer of at least 1")
    return int(text)


def integers(option: str, text: str) -> list[int]:
    """`"1,8"` as `[1, 8]`, each at least 1."""
    return [integer(option, part) for part in text.split(",")]


def gather_integers(arguments: list[str], options: tuple[str, ...] = ("--batch", "--threads")) -> list[str]:
    """Lets options take several integers: `--batch 1 8` becomes `--batch 1,8`, which is how they are parsed."""
    gathered: list[str] = []
    open_list = False
    for argument in arguments:
        if open_list and argument.isdecimal() and gathered[-1] not in options:
            gathered[-1] += f",{argument}"
            continue
        if argument in options:
            open_list = True
        elif not (open_list and gathered[-1] in options):
            open_list = False
        gathered.append(argument)
    return gathered
