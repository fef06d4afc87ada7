"""Results as tables: for the terminal (rich) and for documents (Markdown), from the same rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Grid:
    """Column titles and rows of text; the first `names` columns are left-aligned."""

    columns: list[str]
    names: int = 1
    rows: list[list[str]] = field(default_factory=list)

    def rich(self, title: str = "") -> Table:
        table = Table(title=title or None, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.names else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if index < self.names else "--:" for index in range(len(self.columns))]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.columns, rule, *self.rows])
