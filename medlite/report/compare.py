"""`medlite compare`: runs side by side, from their result.json files alone.

Imports no torch, so that it starts at once.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from medlite.errors import RecordError
from medlite.report.comparison import (
    COLUMNS,
    ComparisonRow,
    level_latencies,
    mark_pareto,
    rows_of,
    sort_rows,
)
from medlite.report.comparison_table import (
    SHOWN,
    WIDE,
    WORDS,
    as_csv,
    as_html,
    as_markdown,
    lines_of_runs,
    lines_of_seeds,
    print_table,
    with_columns,
)
from medlite.report.result import FILE_NAME, RunResult, read_result, write_atomically
from medlite.report.sameness import tell_apart
from medlite.report.section import Section

Runs = Mapping[Path, RunResult]
"""run directory -> its record"""

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
    """All runs below `paths` by their directories, the oldest first, and what cannot be read.

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
    return dict(sorted(results.items(), key=lambda item: item[1].created_at)), broken


def compare(results: Runs) -> list[ComparisonRow]:
    """A row for each run and runtime, the oldest first."""
    runs = [(result, row) for result in results.values() for row in rows_of(result)]
    names = tell_apart([(result, row.runtime) for result, row in runs])
    called = [replace(row, **asdict(each)) for (_, row), each in zip(runs, names, strict=True)]
    return mark_pareto(level_latencies(called))


def forgettability(results: Runs) -> list[Section]:
    """What each class loses as the compression grows, where that is all that runs differ in."""
    # Needs numpy and scipy, without which the verb starts at once.
    reader = importlib.import_module("medlite.report.forgettability")
    shown = importlib.import_module("medlite.report.forgettability_section")
    return [
        shown.forgettability_section(found) for found in reader.forgetting_curves(results.values())
    ]


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
        default=[name for name in SHOWN if name not in (*WORDS, *WIDE)],
        help="those to show: " + ", ".join(name for name in SHOWN if name not in WORDS),
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
