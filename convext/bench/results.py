"""Files of results: JSON, {"machine": what they were measured on, "results": [...]}, and whether they still hold."""

from __future__ import annotations

import json
from pathlib import Path

from . import machine


def write(path: Path | None, record: dict, results: list[dict]) -> None:
    """Writes the file, or nothing where there is no path."""
    if path is not None:
        path.write_text(json.dumps({"machine": record, "results": results}, indent=1, default=str) + "\n")


def read(path: Path) -> dict:
    """The contents of a file that `write` wrote. Raises ValueError for any other file."""
    try:
        contents = json.loads(path.read_text())
        contents["machine"]["time"], contents["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results ({type(error).__name__}: {error})") from error
    return contents


def stale(record: dict, root: Path = machine.ROOT) -> str | None:
    """Why figures measured on such a machine no longer speak of the kernels in the source tree, or None."""
    then, now = record.get("kernels"), machine.kernels(record.get("device", "cpu"), root)
    if then is None:
        return "which kernels were measured is not known"
    if now is None:
        return "there is no source tree to compare with"
    return None if then == now else f"of other kernels ({then}) than those at hand ({now})"


def describe(path: Path, root: Path = machine.ROOT) -> tuple[str, bool]:
    """One line on a file of results, and whether it speaks of the kernels at hand."""
    try:
        record = read(path)["machine"]
    except ValueError as error:
        return str(error), False
    where = record["gpu"]["name"] if record.get("gpu") else record.get("cpu", "unknown")
    reason = stale(record, root)
    told = f"{where}, {record['time']}, commit {record.get('commit') or 'unknown'}"
    return f"{told}: {reason or 'of the kernels at hand'}", reason is None
