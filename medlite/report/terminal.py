"""The end of a run, as the console shows it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from medlite.report.comparison import gain_over_control
from medlite.report.lookup import Lookup, interval, quantity
from medlite.report.result import RunResult


def console(width: int = 120) -> Console:
    """The console; wide enough for whole tables where it is not a terminal but a file.

    Brackets are what they are: engines and paths have them, and would be taken for markup.
    """
    return Console(markup=False, width=None if sys.stdout.isatty() else width)


def print_summary(result: RunResult, output: Console) -> None:
    """One row a candidate, then the safety gate and the verdict."""
    output.print(candidates_table(result))
    for runtime, report in result.safety.items():
        output.print(f"safety on {runtime}: {report['verdict']}")
        for item in report["items"]:
            if item["verdict"] != "PASS":
                output.print(f"  {item['verdict']}: {item['name']}: {item.get('note', '')}")
    for runtime in result.control:
        gain = gain_over_control(result, runtime)
        if gain is not None:
            told = f"{result.primary_metric} {gain:+.3f}"
            output.print(f"beside as much further training in float, {runtime}: {told}")
    for candidate, reason in result.failures.items():
        output.print(f"not measured: {candidate}: {reason}")
    output.print(result.verdict["summary"], style="bold")


def candidates_table(result: RunResult) -> Table:
    """Metric, latency, memory and size of every candidate on its runtime."""
    found = Lookup(result.measurements)
    table = Table(title=result.name, title_justify="left")
    table.add_column("candidate")
    for heading in (result.primary_metric, "95 %", "p50", "p90", "speed-up", "peak", "disk"):
        table.add_column(heading, justify="right")
    for candidate in found.candidates():
        score = found.score(result.primary_metric, candidate)
        speedup = found.get(f"speedup/{candidate}/ratio")
        table.add_row(
            candidate,
            quantity(score),
            interval(score),
            quantity(found.of("latency", candidate, "p50_ms")),
            quantity(found.of("latency", candidate, "p90_ms")),
            quantity(speedup),
            quantity(found.of("memory", candidate, "peak_mib")),
            quantity(found.of("size", candidate, "disk_kib")),
        )
    return table
