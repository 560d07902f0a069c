"""`medlite compare`: runs side by side, from their result.json files alone.

Imports no torch, so that it starts at once.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from medlite.errors import MedliteError, RecordError, did_you_mean
from medlite.report.comparison import (
    COLUMNS,
    ComparisonRow,
    mark_pareto,
    rows_of,
    sort_rows,
    tell_apart,
)
from medlite.report.frame import page
from medlite.report.frontier import Result, frontier_chart
from medlite.report.lookup import number
from medlite.report.result import FILE_NAME, RunResult, read_result, write_atomically
from medlite.report.section import Section
from medlite.report.tables import chip, table

Runs = Mapping[Path, RunResult]
"""run directory -> its record"""

SHOWN = {
    "dataset": "dataset",
    "model": "model",
    "compression": "compression",
    "runtime": "runtime",
    "hardware": "hardware",
    "metric": "metric",
    "over_control": "over control",
    "rare_sensitivity": "rare sens.",
    "ece": "ECE",
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
    "Pareto *: no run here is at least as good in metric, p50, size and peak memory "
    "and better in one of them"
)

OVER_SEEDS = "Means over the seeds \u00b1 the half width of their 95 % interval (Student's t)."

ONE_SEED = (
    "One seed: no ranking. Rows of a single seed say nothing of other seeds: "
    "give seeds=3, then --over-seeds"
)

NOTHING_SWEPT = (
    "--forgettability: no runs here differ in the strength of one compression step alone; "
    "run experiment=forgettability, or sweep one: "
    "-m compression=prune compression.prune.ratio=0.3,0.5,0.7"
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


def read_results(paths: Sequence[Path]) -> tuple[Runs, list[str]]:
    """All runs below `paths` by their directories, and why the others cannot be read.

    Raises:
        RecordError: there is nothing to read.
    """
    results: dict[Path, RunResult] = {}
    broken: list[str] = []
    for path in find_results(paths):
        try:
            results[path.parent] = read_result(path)
        except RecordError as error:
            broken.append(str(error))
    return results, broken


def compare(results: Runs) -> list[ComparisonRow]:
    """A row for each run and runtime."""
    labels = tell_apart(list(results.values()))
    return mark_pareto(
        [
            replace(row, compression=label)
            for result, label in zip(results.values(), labels, strict=True)
            for row in rows_of(result)
        ]
    )


def forgettability(results: Runs) -> list[Section]:
    """What each class loses as the compression grows, where that is all that runs differ in."""
    # Needs numpy and scipy, without which the verb starts at once.
    reader = importlib.import_module("medlite.report.forgettability")
    shown = importlib.import_module("medlite.report.forgettability_section")
    return [
        shown.forgettability_section(found) for found in reader.forgetting_curves(results.values())
    ]


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
    if value is None:
        return "-"
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
    writer.writerows(line.values for line in lines)
    return buffer.getvalue()


def as_html(lines: Sequence[Line], broken: Sequence[str], sections: Sequence[Section] = ()) -> str:
    """A self-contained page: the frontiers as pictures, the table, and the sections below it."""
    shared = shared_words(lines)
    columns = {k: heading for k, heading in headings_of(lines).items() if k not in shared}
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
    remark = f"{PARETO}. " * ("is_pareto" in columns) + OVER_SEEDS * ("seeds" in columns)
    remark += f" {ONE_SEED}." if is_one_seed(lines) else ""
    return page(
        "medlite compare",
        f'<header class="full">{heading}</header><main class="full">{charts}{grid}'
        f'<p class="muted">{remark}</p><ul>{unread}</ul>{below}</main>',
    )


def as_markdown(lines: Sequence[Line], sections: Sequence[Section] = ()) -> str:
    """The table as people put it into documents; what all rows share stands above it."""
    shared = shared_words(lines)
    columns = {k: heading for k, heading in headings_of(lines).items() if k not in shared}
    rows = [" | ".join(line.texts[column] for column in columns) for line in lines]
    head = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    table_lines = [f"| {row} |" for row in (*head, *rows)]
    notes = [OVER_SEEDS] * ("seeds" in columns) + [f"{ONE_SEED}."] * is_one_seed(lines)
    above = [f"{in_words(shared)}:", ""] if shared else []
    below = ["", *notes] if notes else []
    text = "\n".join([*above, *table_lines, *below]) + "\n"
    return "\n".join([text, *(section.to_markdown() for section in sections)])


def headings_of(lines: Sequence[Line]) -> dict[str, str]:
    """The columns that the lines have."""
    headings = SHOWN | {"seeds": "seeds"}
    return {name: headings[name] for name in lines[0].texts} if lines else SHOWN


def is_one_seed(lines: Sequence[Line]) -> bool:
    """Whether some recipe was run with one seed alone."""
    return any(line.texts.get("seeds", "1") == "1" for line in lines)


def frontiers(lines: Sequence[Line]) -> list[str]:
    """A chart for each dataset and runtime with several results: score against latency."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for line in lines:
        result = Result(line.row, line.values.get("metric_half_width"))
        groups.setdefault((line.row.dataset, line.row.runtime), []).append(result)
    charts = [
        frontier_chart(f"{dataset} on {runtime}", results)
        for (dataset, runtime), results in groups.items()
    ]
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
    columns = {k: heading for k, heading in headings_of(lines).items() if k not in shared}
    for column, heading in columns.items():
        is_word = column in WORDS
        grid.add_column(heading, justify="left" if is_word else "right", overflow="fold")
    for line in lines:
        grid.add_row(*(line.texts[column] for column in columns))
    output.print(grid)
    if "is_pareto" in columns:
        output.print(PARETO)
    if "seeds" in columns:
        output.print(OVER_SEEDS)
    if is_one_seed(lines):
        output.print(ONE_SEED)
    for section in sections:
        section.print_to(output)
    for text in broken:
        output.print(f"not read: {text}")


def shared_words(lines: Sequence[Line]) -> dict[str, str]:
    """The words that are the same in all rows, where there are several."""
    values = {column: {line.texts[column] for line in lines} for column in WORDS}
    return {k: min(v) for k, v in values.items() if len(v) == 1 and len(lines) > 1}


def in_words(shared: Mapping[str, str]) -> str:
    """What all rows share, for a line above them."""
    return ", ".join(f"{SHOWN[column]} {value}" for column, value in shared.items())


def main(
    argv: Sequence[str] | None = None, *, over_seeds: Callable[[Runs], list[Section]] | None = None
) -> int:
    """Print the comparison and write it as csv and html.

    Args:
        argv: the words after the verb.
        over_seeds: further sections below a table over seeds.

    Returns:
        0, or 1 if a result could not be read.

    Raises:
        MedliteError: nothing to compare, an unknown column, or no strength that was swept.
    """
    parser = argparse.ArgumentParser(prog="medlite compare", description="Compare finished runs.")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("outputs")])
    parser.add_argument("--sort", default="metric", metavar="COLUMN", help=", ".join(COLUMNS))
    parser.add_argument(
        "--over-seeds", action="store_true", help="one row for runs that differ in their seed alone"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        default=list(SHOWN),
        help="those to show, in place of all: "
        + ", ".join(name for name in SHOWN if name not in WORDS),
    )
    parser.add_argument("--csv", type=Path, help="default: compare.csv in the first directory")
    parser.add_argument("--html", type=Path, help="default: compare.html in the first directory")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument(
        "--forgettability",
        action="store_true",
        help="--over-seeds, with what each class loses as the compression grows",
    )
    options = parser.parse_args(argv)
    results, broken = read_results(options.paths)
    rows, sections = compare(results), []
    if options.over_seeds or options.forgettability:
        lines = lines_of_seeds(rows, options.sort)
        sections = forgettability(results)
        if options.forgettability and not sections:
            raise RecordError(NOTHING_SWEPT)
        sections += over_seeds(results) if over_seeds else []
    else:
        lines = lines_of_runs(sort_rows(rows, options.sort))
    lines = with_columns(lines, options.columns)
    print_table(lines, broken, sections)
    first = options.paths[0]
    beside = first if first.is_dir() else first.parent
    for path, text in (
        (options.csv or beside / "compare.csv", as_csv(lines)),
        (options.html or beside / "compare.html", as_html(lines, broken, sections)),
    ):
        write_atomically(path, text)
    if options.markdown is not None:
        write_atomically(options.markdown, as_markdown(lines, sections))
    return 1 if broken else 0
