"""`medlite audit`: what is claimed of published networks, beside what is measured."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from typing import Literal

from medlite.audit.audit import AGREES, DIFFERS, OPEN, Audit, AuditRow
from medlite.audit.claims import REGISTRY, Claim, read_claims
from medlite.command_line import conf_directory
from medlite.errors import MedliteError, did_you_mean
from medlite.report.frame import page
from medlite.report.lookup import number
from medlite.report.result import write_atomically
from medlite.report.tables import table

HEADINGS = ("model", "quantity", "claimed", "measured", "verdict", "input", "source", "reason")
SCALES = {"params": (1e6, "M"), "macs": (1e9, "G")}
RUNS = Path("outputs/runs")
FILE_WIDTH = 220
"""columns of a console that is not a terminal"""


def main(argv: Sequence[str]) -> int:
    """Check the claims of all networks or of those that are named.

    Returns:
        0; a claim that differs is a finding, not a failure.

    Raises:
        MedliteError: a network without claims, or a registry that cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="medlite audit", description="Published claims beside what is measured."
    )
    parser.add_argument("models", nargs="*", metavar="model=NAME[,NAME]", help="default: all")
    looked_up = f"finished runs in which metrics are looked up; default: {RUNS}"
    parser.add_argument("--runs", nargs="+", type=Path, metavar="DIRECTORY", help=looked_up)
    parser.add_argument("--claims", type=Path, default=REGISTRY, help="another registry")
    parser.add_argument("--config-dir", type=Path, help="where its models are, beside medlite's")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wandb", choices=("offline", "online"), help="log the table there")
    options = parser.parse_args(argv)
    claims = _choose(read_claims(options.claims), options.models)
    directories = [conf_directory(), *([options.config_dir] if options.config_dir else [])]
    runs = options.runs or ([RUNS] if RUNS.exists() else [])
    for directory in [*runs, *directories]:
        if not directory.is_dir():
            message = f"{directory}: no such directory"
            raise MedliteError(message)
    audit = Audit(directories, runs)
    rows = [audit.check(claim) for claim in _with_progress(claims)]
    print_table(rows)
    writers: dict[str, Callable[[Sequence[AuditRow]], str]] = {
        "csv": as_csv,
        "html": as_html,
        "json": as_json,
    }
    for name, write in writers.items():
        path: Path | None = getattr(options, name)
        if path is not None:
            write_atomically(path, write(rows))
    if options.wandb:
        log_table(rows, options.wandb)
    return 0


def as_cells(row: AuditRow) -> list[str]:
    """A row as people read it."""
    scale, letter = SCALES.get(row.quantity, (1.0, row.unit))

    def shown(value: float) -> str:
        return f"{number(value / scale)} {letter}".rstrip()

    measured = "-" if row.measured is None else shown(row.measured)
    words = (row.verdict, row.input, row.source, row.reason)
    return [row.model, row.quantity, shown(row.claimed), measured, *words]


def as_csv(rows: Sequence[AuditRow]) -> str:
    """All columns, full precision, empty where not measured."""
    buffer = io.StringIO()
    columns = [field.name for field in fields(AuditRow)]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return buffer.getvalue()


def as_json(rows: Sequence[AuditRow]) -> str:
    """`{"rows": [{model, quantity, claimed, measured, input, source, reason ...}]}`."""
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"


def as_html(rows: Sequence[AuditRow]) -> str:
    """A self-contained page."""
    body = [[escape(cell) for cell in as_cells(row)] for row in rows]
    heading = f'<p class="kind">medlite audit</p><h1>{escape(summary(rows))}</h1>'
    grid = table(HEADINGS, body, num_words=len(HEADINGS))
    return page(
        "medlite audit",
        f'<header class="full">{heading}</header><main class="full">{grid}</main>',
    )


def summary(rows: Sequence[AuditRow]) -> str:
    """How many claims hold."""
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in (AGREES, DIFFERS, OPEN)
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{len(rows)} claims: {told}"


def print_table(rows: Sequence[AuditRow]) -> None:
    """For the console."""
    from rich.console import Console
    from rich.table import Table

    output = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    grid = Table(title=summary(rows), title_justify="left")
    for heading in HEADINGS:
        is_number = heading in ("claimed", "measured")
        grid.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(_literal, as_cells(row)))
    output.print(grid)


def log_table(rows: Sequence[AuditRow], mode: Literal["offline", "online"]) -> None:
    """The table as a W&B run of its own."""
    import wandb

    columns: list[str | int] = [field.name for field in fields(AuditRow)]
    run = wandb.init(
        project="medlite", mode=mode, name="audit", job_type="audit",
        settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    try:
        data = [list(asdict(row).values()) for row in rows]
        run.log({"audit": wandb.Table(columns=columns, data=data)})
    finally:
        wandb.finish()


def _choose(claims: list[Claim], words: Sequence[str]) -> list[Claim]:
    if not words:
        return claims
    known = list(dict.fromkeys(claim.model for claim in claims))
    names: list[str] = []
    for word in words:
        key, separator, value = word.partition("=")
        if key != "model" or not separator:
            message = f"{word}: expected model=NAME or model=NAME,NAME"
            raise MedliteError(message)
        names += value.split(",")
    for name in names:
        if name not in known:
            message = f"model={name}: nothing is claimed of it, {did_you_mean(name, known)}"
            raise MedliteError(message)
    return [claim for claim in claims if claim.model in names]


def _with_progress(claims: Sequence[Claim]) -> Iterator[Claim]:
    from rich.progress import track

    yield from track(claims, "Counting", disable=not sys.stdout.isatty(), transient=True)


def _literal(text: str) -> str:
    from rich.markup import escape as escape_markup

    return escape_markup(text)
