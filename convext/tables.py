"""Tables as text: drawn by rich where it is installed, and plainly, by spaces alone, where it is not."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterable, Sequence

_GAP = "  "  # between the columns of a plain table
_NARROWEST = 6  # characters: no column is made narrower than this for the sake of the others


def render(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    caption: str = "",
    *,
    names: int | None = None,
    width: int | None = None,
) -> str:
    """The text of a table, without a newline at its end.

    Args:
        title: a line above the table; "" for none.
        columns: their headings.
        rows: of one value a column, printed by `str`; what is too long for its column goes on in the next line.
        caption: lines below the table; "" for none.
        names: how many columns from the left are words, aligned to the left; the others are figures, aligned to the
            right. Default: all.
        width: of the page, in characters; default: the terminal's, and at least 100, or 140 where there is no terminal.
            A table of very many columns is wider than the page.

    Raises ValueError if a row has more or fewer values than there are columns.
    """
    cells = [[str(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"rows: expected {len(columns)} values, one for each column, got {len(row)}: {row}")
    if width is None:
        width = max(shutil.get_terminal_size((140, 24)).columns, 100)
    names = len(columns) if names is None else names
    try:
        import rich  # noqa: F401
    except ImportError:
        return _plain(title, columns, cells, caption, names, width)
    return _rich(title, columns, cells, caption, names, width)


def _rich(title: str, columns: Sequence[str], rows: list[list[str]], caption: str, names: int, width: int) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A Text is taken as it is; in a str rich would look for markup, and a shape or a list in brackets can look like it.
    drawn = Table(
        title=Text(title) if title else None,
        title_justify="left",
        caption=Text(caption) if caption else None,
        caption_justify="left",
    )
    widths = _natural_widths([list(columns), *rows])
    for index, column in enumerate(columns):
        drawn.add_column(
            Text(column),
            justify="left" if index < names else "right",
            overflow="fold",
            min_width=min(widths[index], _NARROWEST),
        )
    for row in rows:
        drawn.add_row(*map(Text, row))
    width = max(width, (_NARROWEST + 3) * len(columns) + 1)  # rich would leave out what does not fit
    # Text alone, whatever the environment says of colours, and also in a notebook, where rich would draw it by itself.
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(drawn)
    return text.getvalue().rstrip("\n")


def _plain(title: str, columns: Sequence[str], rows: list[list[str]], caption: str, names: int, width: int) -> str:
    table = [list(columns), *rows]
    widths = _natural_widths(table)
    spare = width - len(_GAP) * (len(columns) - 1)
    while sum(widths) > spare and max(widths, default=0) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = textwrap.wrap(title, width)
    for index, row in enumerate(table):
        lines += _plain_row(row, widths, names)
        if index == 0:
            lines.append(_GAP.join("-" * w for w in widths))
    for paragraph in caption.splitlines():
        lines += textwrap.wrap(paragraph, width)
    return "\n".join(line.rstrip() for line in lines)


def _natural_widths(table: list[list[str]]) -> list[int]:
    """Of each column, that of its longest line."""
    return [
        max([1, *(len(line) for row in table for line in row[index].splitlines())]) for index in range(len(table[0]))
    ]


def _plain_row(row: list[str], widths: list[int], names: int) -> list[str]:
    """The lines of one row: as many as its tallest cell has."""
    folded = [
        [part for line in cell.splitlines() for part in textwrap.wrap(line, w) or [""]] for cell, w in zip(row, widths)
    ]
    lines = []
    for number in range(max(map(len, folded), default=0)):
        parts = [cell[number] if number < len(cell) else "" for cell in folded]
        lines.append(
            _GAP.join(
                part.ljust(w) if index < names else part.rjust(w) for index, (part, w) in enumerate(zip(parts, widths))
            )
        )
    return lines or [""]
