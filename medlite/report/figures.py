"""The report's charts: training curves, latency, reliability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from medlite.report.lookup import number, split_candidate
from medlite.report.svg import Chart

DEPLOYED, BASELINE = "#1b63b0", "#98a2b0"
MAX_DOTS = 250

Curve = Sequence[tuple[float, float]]
Bins = Sequence[Mapping[str, float | int | None]]


def curve(rows: Iterable[Mapping[str, float | None]], name: str) -> Curve:
    """(epoch, value) pairs of one column, without the epochs where it is missing."""
    return [
        (float(row.get("epoch") or position), float(value))
        for position, row in enumerate(rows)
        if (value := row.get(name)) is not None
    ]


def lines_chart(title: str, curves: Mapping[str, Curve]) -> str:
    """Lines "training" and "validation" over epochs; "" where there is no point to draw."""
    points = [point for line in curves.values() for point in line]
    if not points:
        return ""
    epochs, values = zip(*points, strict=True)
    margin = 0.06 * (max(values) - min(values))
    chart = Chart(
        title=title,
        x_range=(min(epochs), max(epochs)),
        y_range=(min(values) - margin, max(values) + margin),
        height=220,
    )
    chart.axes(x_label="epoch", y_label=title, has_whole_x=True)
    colours = {"training": BASELINE, "validation": DEPLOYED}
    for name, line in curves.items():
        chart.line(line, colours[name])
        if len(line) == 1:
            chart.dot(*line[0], colours[name])
    chart.legend([(name, colours[name]) for name in curves if curves[name]])
    return chart.render()


def training_charts(rows: Sequence[Mapping[str, float | None]], metric: str) -> list[str]:
    """Loss of training and validation, and the metric that picked the checkpoint."""
    losses = {"training": curve(rows, "loss"), "validation": curve(rows, "val/loss")}
    scores = {"validation": curve(rows, f"val/{metric}")}
    charts = [lines_chart("loss", losses), lines_chart(metric, scores)]
    return [chart for chart in charts if chart]


def latency_chart(samples_ms: Mapping[str, Sequence[float]]) -> str:
    """A row of dots for each candidate, with its quartiles and 90th percentile.

    The axis ends where 99 % of all samples lie; slower ones are counted at the row's end.
    """
    names = [name for name, samples in samples_ms.items() if len(samples)]
    if not names:
        return ""
    everything = np.concatenate([samples_ms[name] for name in names])
    end = float(np.quantile(everything, 0.99)) * 1.08
    chart = Chart(
        title="latency of single queries",
        x_range=(0, end),
        y_range=(0, len(names)),
        width=860,
        height=76 + 46 * len(names),
        left=160,
    )
    chart.axes(x_label="milliseconds", has_y_ticks=False)
    chart.legend([("baseline", BASELINE), ("deployed", DEPLOYED)])
    for row, name in enumerate(names):
        latency_row(chart, name, np.asarray(samples_ms[name]), len(names) - row - 0.5, end)
    return chart.render()


def latency_row(chart: Chart, name: str, samples: np.ndarray, middle: float, end: float) -> None:
    """One candidate's samples."""
    colour = BASELINE if split_candidate(name)[0] else DEPLOYED
    shown = samples[samples <= end][:: max(1, len(samples) // MAX_DOTS)]
    offsets = np.random.default_rng(0).uniform(-0.26, 0.26, len(shown))
    for sample, offset in zip(shown, offsets, strict=True):
        chart.dot(float(sample), middle + float(offset), colour, radius=1.8, opacity=0.28)
    low, median, high, late = (float(q) for q in np.quantile(samples, (0.25, 0.5, 0.75, 0.9)))
    chart.box((low, middle - 0.3), (min(high, end), middle + 0.3), colour, 0.22)
    for value, reach in ((median, 0.36), (late, 0.2)):
        if value <= end:
            x = chart.x(value)
            chart.rule(x, chart.y(middle - reach), x, chart.y(middle + reach), "#1a2230")
    chart.text(chart.left - 10, chart.y(middle) - 2, name, anchor="end")
    figures = f"p50 {number(median)}  p90 {number(late)}"
    chart.text(chart.left - 10, chart.y(middle) + 12, figures, anchor="end", colour="#64707f")
    num_slower = int((samples > end).sum())
    if num_slower:
        chart.text(chart.x(end), chart.y(middle) + 4, f"+{num_slower} slower", anchor="end")


def reliability_chart(title: str, bins_of: Mapping[str, Bins]) -> str:
    """Accuracy against confidence; dots grow with the samples in their bin."""
    chart = Chart(title=title, x_range=(0, 1), y_range=(0, 1), height=320)
    chart.axes(x_label="confidence", y_label="came true")
    chart.line([(0, 0), (1, 1)], "#c9d0d8", is_dashed=True)
    colours = dict(zip(bins_of, (BASELINE, DEPLOYED), strict=False))
    if len(bins_of) == 1:
        colours = dict.fromkeys(bins_of, DEPLOYED)
    for name, bins in bins_of.items():
        draw_bins(chart, bins, colours[name])
    chart.legend([(name, colours[name]) for name in bins_of])
    return chart.render()


def draw_bins(chart: Chart, bins: Bins, colour: str) -> None:
    """The filled bins of one candidate."""
    filled = [row for row in bins if row["count"]]
    most = max((int(row["count"] or 0) for row in filled), default=1)
    points = [(float(row["confidence"] or 0), float(row["accuracy"] or 0)) for row in filled]
    chart.line(points, colour)
    for point, row in zip(points, filled, strict=True):
        share = math.log1p(int(row["count"] or 0)) / math.log1p(most)
        chart.dot(*point, colour, radius=2 + 3.5 * share)
