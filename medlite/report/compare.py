"""`medlite compare`: runs side by side, from their result.json files alone.

Imports no torch, so that it starts at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from medlite.errors import RecordError
from medlite.report.comparison import COLUMNS, ComparisonRow, mark_pareto, rows_of, sort_rows
from medlite.report.frame import page
from medlite.report.lookup import number
from medlite.report.result import FILE_NAME, read_result, write_atomically
from medlite.report.tables import chip, table

SHOWN = {
    "dataset": "dataset",
    "model": "model",
    "compression": "compression",
    "runtime": "runtime",
    "hardware": "hardware",
    "metric": "metric",
    "params": "params",
    "gmacs": "GMACs",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "speedup": "speed-up",
    "size_kib": "size KiB",
    "peak_mib": "peak MiB",
    "int8_operators": "INT8 ops",
    "safety": "safety",
    "budgets": "budgets",
    "is_pareto": "Pareto",
}
"""columns for people and their headings; the csv has all"""

WORDS = ("dataset", "model", "compression", "runtime", "hardware")
FILE_WIDTH = 200
"""columns of a console that is not a terminal"""
VERDICTS = ("safety", "budgets")
PARETO = (
    "Pareto *: no run here is at least as good in metric, p50 and size and better in one of them"
)


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Every result.json at or below `paths`.

    Raises:
        RecordError: a path does not exist, or none holds a result.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        message = f"{', '.join(missing)}: no such file or directory"
        raise RecordError(message)
    found: set[Path] = set()
    for path in paths:
        found |= {path} if path.is_file() else set(path.rglob(FILE_NAME))
    if not found:
        searched = ", ".join(map(str, paths))
        message = f"no {FILE_NAME} below {searched}; run `medlite` first or name another directory"
        raise RecordError(message)
    return sorted(found)


def compare(paths: Sequence[Path]) -> tuple[list[ComparisonRow], list[str]]:
    """Rows of all runs below `paths`, and what is wrong with those that cannot be read.

    Raises:
        RecordError: there is nothing to read.
    """
    rows: list[ComparisonRow] = []
    broken: list[str] = []
    for path in find_results(paths):
        try:
            rows += rows_of(read_result(path))
        except RecordError as error:
            broken.append(str(error))
    return mark_pareto(rows), broken


def cell(row: ComparisonRow, column: str) -> str:
    """A value as people read it."""
    value = getattr(row, column)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "*" if value else ""
    if column == "metric":
        return f"{number(value)} {row.metric_name}"
    return number(value) if isinstance(value, float) else str(value)


def as_csv(rows: Sequence[ComparisonRow]) -> str:
    """All columns, full precision, empty where unavailable."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return buffer.getvalue()


def as_html(rows: Sequence[ComparisonRow], broken: Sequence[str]) -> str:
    """A self-contained page."""
    body = [
        [
            chip(cell(row, column))
            if column in ("safety", "budgets")
            else escape(cell(row, column))
            for column in SHOWN
        ]
        for row in rows
    ]
    unread = "".join(f"<li>not read: {escape(text)}</li>" for text in broken)
    heading = f'<p class="kind">medlite compare</p><h1>{len(rows)} results</h1>'
    grid = table(list(SHOWN.values()), body, num_words=len(WORDS))
    return page(
        "medlite compare",
        f'<header class="full">{heading}</header><main class="full">{grid}'
        f'<p class="muted">{PARETO}.</p><ul>{unread}</ul></main>',
    )


def print_table(rows: Sequence[ComparisonRow], broken: Sequence[str]) -> None:
    """For the console; what all rows share stands once, above the table."""
    from rich.console import Console
    from rich.table import Table

    output = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    shared = shared_words(rows)
    together = ", ".join(f"{SHOWN[column]} {value}" for column, value in shared.items())
    grid = Table(title=f"{len(rows)} results: {together}".rstrip(": "), title_justify="left")
    columns = [column for column in SHOWN if column not in shared]
    for column in columns:
        is_word = column in WORDS
        grid.add_column(SHOWN[column], justify="left" if is_word else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(cell(row, column) for column in columns))
    output.print(grid)
    output.print(PARETO)
    for text in broken:
        output.print(f"not read: {text}", markup=False)


def shared_words(rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """The words that are the same in all rows, where there are several."""
    values = {column: {getattr(row, column) for row in rows} for column in WORDS}
    return {k: min(v) for k, v in values.items() if len(v) == 1 and len(rows) > 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and write it as csv and html.

    Returns:
        0, or 1 if a result could not be read.

    Raises:
        MedliteError: nothing to compare, or an unknown column.
    """
    parser = argparse.ArgumentParser(prog="medlite compare", description="Compare finished runs.")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("outputs")])
    parser.add_argument("--sort", default="metric", metavar="COLUMN", help=", ".join(COLUMNS))
    parser.add_argument("--csv", type=Path, help="default: compare.csv in the first directory")
    parser.add_argument("--html", type=Path, help="default: compare.html in the first directory")
    options = parser.parse_args(argv)
    rows, broken = compare(options.paths)
    rows = sort_rows(rows, options.sort)
    print_table(rows, broken)
    first = options.paths[0]
    beside = first if first.is_dir() else first.parent
    for path, text in (
        (options.csv or beside / "compare.csv", as_csv(rows)),
        (options.html or beside / "compare.html", as_html(rows, broken)),
    ):
        write_atomically(path, text)
    return 1 if broken else 0
