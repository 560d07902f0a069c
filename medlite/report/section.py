"""A part of the comparison below its table, for the console, documents and the page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from medlite.report.tables import table

if TYPE_CHECKING:
    from rich.console import Console

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table of plain texts, its first column words, with what must be known to read it."""

    title: str
    headings: tuple[str, ...] = ()
    rows: Rows = ()
    remarks: tuple[str, ...] = ()
    chart: str = ""
    """SVG, for the page alone"""

    def to_html(self) -> str:
        """With its chart."""
        chart = f'<div class="wide">{self.chart}</div>' if self.chart else ""
        cells = [[escape(text) for text in row] for row in self.rows]
        grid = table(self.headings, cells) if cells else ""
        remarks = "".join(f'<p class="muted">{escape(remark)}</p>' for remark in self.remarks)
        return f"<section><h2>{escape(self.title)}</h2>{chart}{grid}{remarks}</section>"

    def to_markdown(self) -> str:
        """Ends in a line break."""
        lines = [f"**{self.title}**", ""]
        if self.rows:
            head = [" | ".join(self.headings), "|".join("---" for _ in self.headings)]
            lines += [f"| {row} |" for row in (*head, *map(" | ".join, self.rows))]
            lines.append("")
        return "\n".join([*lines, *self.remarks]).rstrip() + "\n"

    def print_to(self, output: Console) -> None:
        """On the console."""
        from rich.table import Table

        output.print(f"\n{self.title}", markup=False, highlight=False)
        if self.rows:
            grid = Table()
            for position, heading in enumerate(self.headings):
                grid.add_column(heading, justify="right" if position else "left", overflow="fold")
            for row in self.rows:
                grid.add_row(*row)
            output.print(grid)
        for remark in self.remarks:
            output.print(remark, markup=False, highlight=False)
