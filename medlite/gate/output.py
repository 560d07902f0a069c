"""The gate's report for the console and as a page."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.table import Table

from medlite.report import tables
from medlite.report.frame import page
from medlite.report.lookup import number


def as_table(report: dict[str, Any], title: str) -> Table:
    """Judged losses first, then those without a margin."""
    grid = Table(title=title, title_justify="left")
    for heading in ("item", "verdict"):
        grid.add_column(heading, overflow="fold")
    for heading in ("before", "after", "loss", "95 %", "margin"):
        grid.add_column(heading, justify="right")
    grid.add_column("note", overflow="fold")
    for item in (*report["items"], *report["shown"]):
        values = [item[name] for name in ("baseline", "compressed", "difference")]
        ends = item["interval"]
        margin = item.get("margin")
        grid.add_row(
            item["name"].removeprefix("safety/").replace("_", " "),
            item.get("verdict", "shown"),
            *("-" if value is None else number(value) for value in values),
            "-" if ends is None else " to ".join(number(end) for end in ends),
            "-" if margin is None else f"{margin:g}",
            tables.safety_note(item),
        )
    return grid


def as_html(plain: dict[str, Any]) -> str:
    """A page without scripts: who was compared, by which margins, and what came out."""
    report = plain["report"]
    margins = tables.pairs_table(plain["margins"])
    header = (
        f'<header class="full"><p class="kind">medlite gate</p>'
        f"<h1>{escape(plain['compressed'])} {tables.chip(report['verdict'])}</h1>"
        f'<p class="muted">against {escape(plain["baseline"])}</p></header>'
    )
    body = (
        f"{tables.safety_table(report)}"
        f'<p class="muted">{tables.safety_remark(report)}</p>'
        f"{tables.class_intervals_table(report)}{tables.operating_points_table(report)}"
        f"<h2>Margins ({escape(plain['safety'])})</h2>{margins}"
    )
    return page("medlite gate", f'{header}<main class="full">{body}</main>')
