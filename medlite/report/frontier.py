"""Score against latency: which runs no other run beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medlite.report.comparison import ComparisonRow
from medlite.report.svg import MUTED, Chart

OPEN = "#98a2b0"
COLOURS = {"FAIL": "#b3261e", "INCONCLUSIVE": OPEN, "PASS": "#1d7f4e"}
"""the worst first, as several seeds have several verdicts"""
CHARACTER_WIDTH, LINE_HEIGHT, BESIDE = 6, 12, 8
"""of words in a chart, about, and their distance from a dot; in pixels"""


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
        (each.row, each.row.levelled_p50_ms, each.row.metric, each.half_width or 0.0)
        for each in results
        if each.row.levelled_p50_ms is not None and each.row.metric is not None
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
    told = [part for part in ("dataset", "model") if len({getattr(r, part) for r, *_ in known}) > 1]
    chart.axes(x_label=f"levelled p50 ms, {title}", y_label=known[0][0].metric_name)
    taken: list[Label] = []
    for row, time, score, half_width in known:
        x, colour = chart.x(time), colour_of(row)
        if half_width:
            chart.rule(x, chart.y(score - half_width), x, chart.y(score + half_width), colour)
        chart.dot(time, score, colour, radius=6 if row.is_pareto else 3)
        words = " ".join(getattr(row, part) for part in (*told, "compression"))
        label = place_label(words, x, chart.y(score) + 4, taken, chart)
        taken.append(label)
        chart.text(label.left, label.y, words, colour=MUTED)
    judged = [(word, colour) for word, colour in COLOURS.items() if colour != OPEN]
    chart.legend([*judged, ("not judged or open", OPEN)])
    return chart.render()


@dataclass(frozen=True)
class Label:
    """Where words stand, in pixels; `y` is that of their foot."""

    left: float
    right: float
    y: float

    def covers(self, other: Label) -> bool:
        """Whether both could not be read."""
        is_beside = self.right < other.left or other.right < self.left
        return not is_beside and abs(self.y - other.y) < LINE_HEIGHT


def place_label(words: str, x: float, y: float, taken: Sequence[Label], chart: Chart) -> Label:
    """To the right of a dot, or to its left where the picture ends, on the next free line.

    Args:
        words: what is written.
        x: the dot's, in pixels.
        y: of the foot of words beside the dot.
        taken: where words stand already.
        chart: whose picture the words must not leave.
    """
    width = CHARACTER_WIDTH * len(words)
    left = x + BESIDE if x + BESIDE + width < chart.width else max(0.0, x - BESIDE - width)
    floor = chart.height - chart.bottom
    steps = range(int(floor // LINE_HEIGHT))
    lines = [y + step * LINE_HEIGHT for step in steps] + [y - step * LINE_HEIGHT for step in steps]
    places = [Label(left, left + width, line) for line in lines if chart.top <= line <= floor]
    return next(
        (place for place in places if not any(map(place.covers, taken))),
        Label(left, left + width, y),
    )


def colour_of(row: ComparisonRow) -> str:
    """By the verdict of all seeds together."""
    return next((colour for word, colour in COLOURS.items() if word in row.safety), OPEN)
