"""Robustness in the report: what each corruption takes from both models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from medlite.report.figures import BASELINE, DEPLOYED
from medlite.report.lookup import number
from medlite.report.svg import Chart
from medlite.report.tables import Cell, chip, plain, remark, table


def robustness_section(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A table and small charts for each runtime; "" where nothing was corrupted."""
    return "".join(_of_runtime(runtime, report) for runtime, report in reports.items())


def _of_runtime(runtime: str, report: Mapping[str, Any]) -> str:
    verdict = chip(report["verdict"]) if report["verdict"] else ""
    rows = _by_corruption(report["rows"])
    charts = "".join(
        f"<figure>{corruption_chart(name, of_corruption, report)}</figure>"
        for name, of_corruption in rows.items()
    )
    words = (
        f"{report['num_images']} test images of {report['num_groups']} {report['group_kind']}s, "
        f"the same ones for both models. Degradation: the share of the {report['metric']} on "
        "clean images that is lost, averaged over the severities; its interval is a 95 % paired "
        f"bootstrap interval over {report['group_kind']}s. These verdicts are not part of the gate."
    )
    return (
        f"<h3>{escape(runtime)} {verdict}</h3>{corruption_table(report)}"
        f'<p class="muted">{escape(words)}</p><div class="charts small">{charts}</div>'
    )


def corruption_table(report: Mapping[str, Any]) -> str:
    """One row a corruption: the task metric by severity, and how much more is lost."""
    items = {item["name"].removeprefix("robustness/"): item for item in report["items"]}
    rows_of = _by_corruption(report["rows"])
    severities = sorted({row["severity"] for row in report["rows"]})
    headings = ["corruption", "verdict", *(f"severity {severity}" for severity in severities)]
    headings += ["before", "after", "degrades more by", "95 % interval"]
    clean = _change(report["clean_baseline"], report["clean_compressed"])
    rows = [["none", *_judged(items.get("clean")), clean, *[""] * (len(severities) - 1)]]
    rows[0] += _losses(items.get("clean"))
    for name, of_corruption in rows_of.items():
        by_severity = {row["severity"]: row for row in of_corruption}
        scores = [_change(by_severity[s]["baseline"], by_severity[s]["compressed"])
                  for s in severities]  # fmt: skip
        rows.append([escape(words_of(name)), *_judged(items.get(name)), *scores])
        rows[-1] += _losses(items.get(name))
    return table(headings, rows, num_words=2)


def corruption_chart(
    name: str, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> str:
    """The task metric of both models over the severities, from clean images on."""
    lines = {"baseline": BASELINE, "compressed": DEPLOYED}
    points = {
        side: [(0.0, report[f"clean_{side}"]), *((row["severity"], row[side]) for row in rows)]
        for side in lines
    }
    known = {
        side: [(float(severity), float(score)) for severity, score in line if score is not None]
        for side, line in points.items()
    }
    scores = [score for line in known.values() for _, score in line]
    chart = Chart(
        title=f"{report['metric']} under {words_of(name)}",
        x_range=(0, max(row["severity"] for row in rows)),
        y_range=(min(scores, default=0), max(scores, default=1)),
        width=300,
        height=190,
    )
    chart.axes(x_label="severity", y_label=words_of(name), has_whole_x=True)
    for side, line in known.items():
        if line:
            chart.line(line, lines[side])
        for point in line:
            chart.dot(*point, lines[side])
    chart.legend([("before", BASELINE), ("after", DEPLOYED)] if known["baseline"] else [])
    return chart.render()


def words_of(corruption: str) -> str:
    """A corruption's name in words."""
    return corruption.replace("_", " ")


def _by_corruption(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    names = dict.fromkeys(row["corruption"] for row in rows)
    return {name: [row for row in rows if row["corruption"] == name] for name in names}


def _judged(item: Mapping[str, Any] | None) -> list[Cell]:
    return [plain(None) if item is None else chip(item["verdict"]) + remark(item["note"])]


def _change(before: float | None, after: float | None) -> Cell:
    if before is None:
        return plain(after)
    return f'<span class="muted">{number(before)} &rarr;</span> {plain(after)}'


def _losses(item: Mapping[str, Any] | None) -> list[Cell]:
    if item is None:
        return [plain(None)] * 4
    interval = item["interval"] and " to ".join(number(end) for end in item["interval"])
    return [*(plain(item[k]) for k in ("baseline", "compressed", "difference")), plain(interval)]
