"""Files of results: JSON, {"machine": what they were measured on, "results": [...]}, and whether they still hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine


def write(path: Path | None, record: dict, results: list[dict]) -> None:
    """Writes the file, or nothing where there is no path."""
    if path is not None:
        path.write_text(json.dumps({"machine": record, "results": results}, indent=1, default=str) + "\n")


def as_csv(results: list[dict]) -> str:
    """One line a result, with a header; what is nested has a column each, such as `seconds.native.median_s`. Where a
    result has no such value, the cell is empty."""
    rows = [dict(_flat(result)) for result in json.loads(json.dumps(results, default=str))]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, part in items:
        yield from _flat(part, f"{name}.{key}" if name else str(key))


def publish(record: dict, results: list[dict], *, json: Path | None, csv: Path | None, html: Path | None) -> None:
    """Writes the files that are asked for: the figures with what they were measured on, the figures as a table, and a
    page (`page.render`)."""
    write(json, record, results)
    if csv is not None:
        csv.write_text(as_csv(results))
    if html is not None:
        from . import page

        html.write_text(page.render([as_read(record, results)]), encoding="utf-8")


def as_read(record: dict, results: list[dict]) -> dict:
    """What `read` gives of a file that `write` wrote."""
    contents: dict = json.loads(json.dumps({"machine": record, "results": results}, default=str))
    return contents


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
