"""Shortcuts in the report: what both models tell from images that lack what matters."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from medlite.report.lookup import number
from medlite.report.tables import Cell, chip, plain, table

SCORES = {"auc": "AUC", "marked": "share of the true foreground that is marked"}


def shortcut_section(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each runtime; "" where nothing was hidden."""
    return "".join(_of_runtime(runtime, report) for runtime, report in reports.items())


def verdict_of(row: Mapping[str, Any]) -> str:
    """One word for a row."""
    if row["limit"] is None:
        return "shown"
    return "SUSPECT" if row["is_suspect"] else "no sign"


def _of_runtime(runtime: str, report: Mapping[str, Any]) -> str:
    score = SCORES[report["score"]]
    headings = ["probe", "verdict", f"{score}, before", "after", "95 % interval", "suspect above"]
    headings += ["after - before", "95 % interval"]
    whole = [plain(report[f"clean_{side}"]) for side in ("baseline", "compressed")]
    rows: list[list[Cell]] = [["whole images", "", *whole, "", "", "", ""]]
    rows += [
        [
            escape(row["what"]),
            chip(verdict_of(row)),
            plain(row["baseline"]),
            plain(row["compressed"]),
            _interval(row["interval"]),
            plain(row["limit"] and f"{row['limit']:g}"),
            plain(row["difference"]),
            _interval(row["difference_interval"]),
        ]
        for row in report["rows"]
    ]
    words = (
        f"{report['num_images']} test images of {report['num_groups']} {report['group_kind']}s; "
        "hidden pixels take the values of the nearest visible ones. Suspect: the whole interval of "
        "the deployed model lies above what a model without shortcuts would have. What lies "
        "outside of an annotated finding, or at the border, may bear on the class all the same."
    )
    return (
        f"<h3>{escape(runtime)}</h3>{table(headings, rows, num_words=2)}"
        f'<p class="muted">{escape(words)}</p>'
    )


def _interval(ends: tuple[float, float] | None) -> Cell:
    return plain(ends and " to ".join(number(end) for end in ends))
