"""The table of compared runs: its rows as people read them, on the console and in files."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from medlite.errors import MedliteError, did_you_mean
from medlite.report.comparison import COLUMNS, ComparisonRow, setting, sort_rows
from medlite.report.frame import page
from medlite.report.frontier import Result, frontier_chart
from medlite.report.lookup import number
from medlite.report.section import Section
from medlite.report.tables import chip, table

SHOWN = {
    "dataset": "dataset",
    "model": "model",
    "compression": "compression",
    "runtime": "runtime",
    "hardware": "hardware",
    "machine": "machine",
    "metric": "metric",
    "over_control": "over control",
    "rare_sensitivity": "rare sens.",
    "ece": "ECE",
    "params": "params",
    "gmacs": "GMACs",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "levelled_p50_ms": "levelled p50 ms",
    "speedup": "speed-up",
    "size_kib": "size KiB",
    "peak_mib": "peak MiB",
    "int8_operators": "INT8 ops",
    "safety": "safety",
    "failed": "failed",
    "budgets": "budgets",
    "is_pareto": "Pareto",
}
"""columns for people and their headings; the csv has all"""

WORDS = ("dataset", "model", "compression", "runtime", "hardware", "machine")
FILE_WIDTH = 200
"""columns of a console that is not a terminal"""
VERDICTS = ("safety", "budgets")
WIDE = ("failed",)
"""columns that are shown where they are asked for"""
PARETO = (
    "Pareto *: no run here is at least as good in metric, levelled p50, size and peak memory "
    "and better in one of them."
)
LEVELLED = (
    "Levelled p50: what the uncompressed net took in the median of these runs, over the speed-up."
)
OVER_SEEDS = "Means over the seeds \u00b1 the half width of their 95 % interval (Student's t)."
ONE_SEED = (
    "No ranking: a row of a single seed says nothing of other seeds; "
    "give seeds=3, then --over-seeds."
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table: its texts by column, its plain values, and what ranks it."""

    texts: Mapping[str, str]
    values: Mapping[str, Any]
    row: ComparisonRow


def lines_of_runs(rows: Sequence[ComparisonRow]) -> list[Line]:
    """A line a run and runtime."""
    return [
        Line(texts={column: cell(row, column) for column in SHOWN}, values=asdict(row), row=row)
        for row in rows
    ]


def lines_of_seeds(rows: Sequence[ComparisonRow], sort: str) -> list[Line]:
    """A line for all runs of the same settings, with means over their seeds."""
    # Needs numpy and scipy, without which the verb starts at once.
    seeds = importlib.import_module("medlite.report.seeds")
    by_row = {id(summary.row): summary for summary in seeds.summarise_seeds(rows)}
    ordered = sort_rows([summary.row for summary in by_row.values()], sort)
    lines = []
    for row in ordered:
        summary = by_row[id(row)]
        texts = {column: summary.text(column) for column in SHOWN}
        deviation = summary.deviations["metric"]
        spread = "" if deviation is None else f" (sd {number(deviation)})"
        texts["metric"] = f"{summary.text('metric')}{spread} {row.metric_name}"
        texts["is_pareto"] = "*" if row.is_pareto else ""
        texts["seeds"] = str(summary.num_seeds)
        lines.append(Line(texts=texts, values=summary.to_json(), row=row))
    return lines


def with_columns(lines: Sequence[Line], chosen: Sequence[str]) -> list[Line]:
    """The lines with these columns, in this order, between what tells them apart and the seeds.

    Raises:
        MedliteError: no such column.
    """
    unknown = [f"{name}, {did_you_mean(name, SHOWN)}" for name in chosen if name not in SHOWN]
    if unknown:
        message = f"--columns: no column {'; '.join(unknown)}"
        raise MedliteError(message)
    kept = (*WORDS, *chosen, "seeds")
    return [
        replace(line, texts={name: line.texts[name] for name in kept if name in line.texts})
        for line in lines
    ]


def cell(row: ComparisonRow, column: str) -> str:
    """A value as people read it."""
    value = getattr(row, column)
    if value is None or value == ():
        return "-"
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return "*" if value else ""
    if column == "metric":
        return f"{number(value)} {row.metric_name}"
    return number(value) if isinstance(value, float) else str(value)


def as_csv(lines: Sequence[Line]) -> str:
    """All columns, full precision, empty where unavailable."""
    buffer = io.StringIO()
    columns = list(lines[0].values) if lines else list(COLUMNS)
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in line.values.items()}
        for line in lines
    )
    return buffer.getvalue()


def as_html(lines: Sequence[Line], broken: Sequence[str], sections: Sequence[Section] = ()) -> str:
    """A self-contained page: the frontiers as pictures, the table, and the sections below it."""
    shared, columns = shared_words(lines), columns_of(lines)
    body = [
        [
            chip(line.texts[column]) if column in VERDICTS else escape(line.texts[column])
            for column in columns
        ]
        for line in lines
    ]
    unread = "".join(f"<li>not read: {escape(text)}</li>" for text in broken)
    heading = (
        f'<p class="kind">medlite compare</p><h1>{len(lines)} results</h1>'
        f"<p>{escape(in_words(shared))}</p>"
    )
    charts = "".join(f'<div class="wide">{chart}</div>' for chart in frontiers(lines))
    grid = table(list(columns.values()), body, num_words=len(WORDS) - len(shared))
    below = "".join(section.to_html() for section in sections)
    return page(
        "medlite compare",
        f'<header class="full">{heading}</header><main class="full">{charts}{grid}'
        f'<p class="muted">{" ".join(remarks(lines))}</p><ul>{unread}</ul>{below}</main>',
    )


def as_markdown(lines: Sequence[Line], sections: Sequence[Section] = ()) -> str:
    """The table as people put it into documents; what all rows share stands above it."""
    shared, columns = shared_words(lines), columns_of(lines)
    rows = [" | ".join(line.texts[column] for column in columns) for line in lines]
    head = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    table_lines = [f"| {row} |" for row in (*head, *rows)]
    above = [f"{in_words(shared)}:", ""] if shared else []
    below = ["", *remarks(lines)] if remarks(lines) else []
    text = "\n".join([*above, *table_lines, *below]) + "\n"
    return "\n".join([text, *(section.to_markdown() for section in sections)])


def columns_of(lines: Sequence[Line]) -> dict[str, str]:
    """The columns that the lines have and do not share, with their headings."""
    headings, shared = SHOWN | {"seeds": "seeds"}, shared_words(lines)
    names = lines[0].texts if lines else SHOWN
    return {name: headings[name] for name in names if name not in shared}


def remarks(lines: Sequence[Line]) -> list[str]:
    """What is to be known of the table: its marks, its intervals, and what it does not rank."""
    columns = columns_of(lines)
    is_one_seed = any(line.texts.get("seeds", "1") == "1" for line in lines)
    return [
        *([PARETO] if "is_pareto" in columns else []),
        *([LEVELLED] if "levelled_p50_ms" in columns else []),
        *([OVER_SEEDS] if "seeds" in columns else []),
        *([ONE_SEED] if is_one_seed else []),
    ]


def frontiers(lines: Sequence[Line]) -> list[str]:
    """A chart of score against latency for what is ranked together, on each runtime."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for line in lines:
        result = Result(line.row, line.values.get("metric_half_width"))
        groups.setdefault((*setting(line.row), line.row.runtime), []).append(result)
    has_machines = len({line.row.machine for line in lines}) > 1
    charts = []
    for results in groups.values():
        row = results[0].row
        title = f"{row.dataset.partition(' (')[0]} on {row.runtime}, hardware {row.hardware}"
        title += f", {row.machine}" if has_machines else ""
        charts.append(frontier_chart(title, results))
    return [chart for chart in charts if chart]


def print_table(
    lines: Sequence[Line], broken: Sequence[str], sections: Sequence[Section] = ()
) -> None:
    """For the console; what all rows share stands once, above the table."""
    from rich.table import Table

    from medlite.report.terminal import console

    output = console(FILE_WIDTH)
    shared = shared_words(lines)
    title = f"{len(lines)} results: {in_words(shared)}".rstrip(": ")
    grid = Table(title=title, title_justify="left")
    for column, heading in columns_of(lines).items():
        is_word = column in WORDS
        grid.add_column(heading, justify="left" if is_word else "right", overflow="fold")
    for line in lines:
        grid.add_row(*(line.texts[column] for column in columns_of(lines)))
    output.print(grid)
    for remark in remarks(lines):
        output.print(remark)
    for section in sections:
        section.print_to(output)
    for text in broken:
        output.print(f"not read: {text}")


def shared_words(lines: Sequence[Line]) -> dict[str, str]:
    """The words that are the same in all rows."""
    values = {column: {line.texts[column] for line in lines} for column in WORDS}
    return {k: min(v) for k, v in values.items() if len(v) == 1}


def in_words(shared: Mapping[str, str]) -> str:
    """What all rows share, for a line above them."""
    return ", ".join(f"{SHOWN[column]} {value}" for column, value in shared.items())
