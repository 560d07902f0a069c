"""Score against latency: which runs no other run beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medlite.report.comparison import ComparisonRow
from medlite.report.svg import MUTED, Chart

COLOURS = {"PASS": "#1d7f4e", "FAIL": "#b3261e"}
OPEN = "#98a2b0"
LABEL_WIDTH, LINE_HEIGHT = 70, 12


@dataclass(frozen=True)
class Result:
    """One dot: a row, and the half width of its score's interval, None where it has none."""

    row: ComparisonRow
    half_width: float | None = None


def frontier_chart(title: str, results: Sequence[Result]) -> str:
    """A dot a result, in the colour of its safety verdict; Pareto-optimal ones are larger.

    A score's interval is a line through its dot. Results that lack the score or the latency are
    left out; "" where fewer than two are left.
    """
    known = [
        (each.row, each.row.p50_ms, each.row.metric, each.half_width or 0.0)
        for each in results
        if each.row.p50_ms is not None and each.row.metric is not None
    ]
    if len(known) < 2:
        return ""
    low = min(score - half_width for *_, score, half_width in known)
    high = max(score + half_width for *_, score, half_width in known)
    chart = Chart(
        title=title,
        x_range=(0, 1.15 * max(time for _, time, *_ in known)),
        y_range=(low - 0.08 * (high - low), high + 0.08 * (high - low)),
        width=860,
        height=340,
        left=64,
    )
    is_one_model = len({row.model for row, *_ in known}) == 1
    chart.axes(x_label=f"p50 ms, {title}", y_label=known[0][0].metric_name)
    places: list[tuple[float, float]] = []
    for row, time, score, half_width in known:
        x, colour = chart.x(time), colour_of(row)
        if half_width:
            chart.rule(x, chart.y(score - half_width), x, chart.y(score + half_width), colour)
        chart.dot(time, score, colour, radius=6 if row.is_pareto else 3)
        label = row.compression if is_one_model else name_of(row)
        places.append(free_place(x + 8, chart.y(score) + 4, places))
        chart.text(*places[-1], label, colour=MUTED)
    chart.legend([*COLOURS.items(), ("not judged or open", OPEN)])
    return chart.render()


def free_place(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where words can start, in pixels: as far below `y` as words near it need.

    >>> free_place(10, 50, [(12, 48), (14, 60), (300, 50)])
    (10, 72)
    """
    for top in sorted(top for left, top in taken if abs(x - left) < LABEL_WIDTH):
        if abs(y - top) < LINE_HEIGHT:
            y = top + LINE_HEIGHT
    return x, y


def colour_of(row: ComparisonRow) -> str:
    """By the verdict of all seeds together."""
    found = [verdict for verdict in ("FAIL", "INCONCLUSIVE", "PASS") if verdict in row.safety]
    return COLOURS.get(found[0], OPEN) if found else OPEN


def name_of(row: ComparisonRow) -> str:
    """Model and recipe."""
    return f"{row.model} {row.compression}"
