"""Score against latency: which runs no other run beats."""

from __future__ import annotations

from collections.abc import Sequence

from medlite.report.comparison import ComparisonRow
from medlite.report.svg import MUTED, Chart

COLOURS = {"PASS": "#1d7f4e", "FAIL": "#b3261e"}
OPEN = "#98a2b0"


def frontier_chart(title: str, rows: Sequence[ComparisonRow]) -> str:
    """A dot a result, in the colour of its safety verdict; Pareto-optimal ones are larger.

    Those that lack the score or the latency are left out.
    """
    known = [
        (row, row.p50_ms, row.metric)
        for row in rows
        if row.p50_ms is not None and row.metric is not None
    ]
    times, scores = [time for _, time, _ in known], [score for *_, score in known]
    margin = 0.08 * (max(scores) - min(scores))
    chart = Chart(
        title=title,
        x_range=(0, 1.15 * max(times)),
        y_range=(min(scores) - margin, max(scores) + margin),
        width=860,
        height=340,
    )
    chart.axes(x_label=f"p50 ms, {title}", y_label=rows[0].metric_name)
    for row, time, score in known:
        chart.dot(time, score, colour_of(row), radius=6 if row.is_pareto else 3)
        label = row.compression if len({r.model for r in rows}) == 1 else name_of(row)
        chart.text(chart.x(time) + 8, chart.y(score) + 4, label, colour=MUTED)
    chart.legend([*COLOURS.items(), ("not judged or open", OPEN)])
    return chart.render()


def colour_of(row: ComparisonRow) -> str:
    """By the verdict of all seeds together."""
    found = [verdict for verdict in ("FAIL", "INCONCLUSIVE", "PASS") if verdict in row.safety]
    return COLOURS.get(found[0], OPEN) if found else OPEN


def name_of(row: ComparisonRow) -> str:
    """Model and recipe."""
    return f"{row.model} {row.compression}"
