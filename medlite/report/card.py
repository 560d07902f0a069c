"""The deployment card: what a reader must know before believing a table of latencies.

Nine categories after a 2025 review of efficient medical imaging that asks for deployment-first
reporting, and MLPerf Inference's disclosure rules. Every field is filled from the run, each with
its provenance; what was not measured says so.
"""

from __future__ import annotations

from pathlib import Path

from medlite.report import card_categories
from medlite.report.lookup import Lookup
from medlite.report.result import CardCategory, RunResult, write_atomically


def build_card(result: RunResult) -> list[CardCategory]:
    """All nine categories from the other parts of a result."""
    found = Lookup(result.measurements)
    categories = {
        "Task": card_categories.task_fields(result),
        "Hardware platform": card_categories.hardware_fields(result, found),
        "Software stack": card_categories.software_fields(result),
        "Numerical precision": card_categories.precision_fields(result, found),
        "Inference protocol": card_categories.protocol_fields(result),
        "Latency": card_categories.latency_fields(result, found),
        "Memory": card_categories.memory_fields(found),
        "Energy and power": card_categories.energy_fields(found),
        "Reliability and safety": card_categories.safety_fields(result, found),
    }
    return [CardCategory(title=title, fields=tuple(rows)) for title, rows in categories.items()]


def write_card_markdown(result: RunResult, path: Path) -> None:
    """Write the card as Markdown, a table a category.

    Raises:
        RecordError: the file cannot be written.
    """
    lines = [f"# Deployment card: {result.name}", "", result.verdict.get("summary", ""), ""]
    for category in result.card:
        lines += [f"## {category.title}", "", "| field | value | provenance | note |"]
        lines += ["|---|---|---|---|"]
        for row in category.fields:
            cells = (row.label, row.value, row.provenance, row.note)
            lines.append(f"| {' | '.join(escaped(cell) for cell in cells)} |")
        lines.append("")
    write_atomically(path, "\n".join(lines))


def escaped(text: str) -> str:
    """A cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
