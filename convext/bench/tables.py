"""Results as tables: for the terminal and for documents (Markdown), from the same rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import tables


@dataclass
class Grid:
    """Column titles and rows of text; the first `names` columns are left-aligned."""

    columns: list[str]
    names: int = 1
    rows: list[list[str]] = field(default_factory=list)

    def text(self, width: int | None = None) -> str:
        """For a page of that many characters; default: the terminal."""
        return tables.render("", self.columns, self.rows, names=self.names, width=width)

    def markdown(self) -> str:
        rule = ["---" if index < self.names else "--:" for index in range(len(self.columns))]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.columns, rule, *self.rows])
