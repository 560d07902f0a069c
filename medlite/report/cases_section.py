"""Exemplars and failure modes in the report: tables with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from medlite.report.examples import read_examples
from medlite.report.gallery import gallery
from medlite.report.lookup import number
from medlite.report.result import RunResult
from medlite.report.tables import plain, table

NUM_ROWS = 12


def exemplar_section(result: RunResult, directory: Path) -> str:
    """On which images both models agree least, and which classes those over-represent."""
    parts = []
    for runtime, report in result.exemplars.items():
        found = report["exemplars"]
        words = (
            f"{len(found)} of {report['num_images']} test images: at most the 5 % with the largest "
            f"disagreement ({report['measure']}) between the uncompressed model and {runtime}."
        )
        parts.append(f'<h3>{escape(runtime)}</h3><p class="muted">{escape(words)}</p>')
        if found:
            parts.append(pictures(result, directory, report["pictures"]))
            parts.append(case_table(found, {"disagreement": "disagreement"}))
        if report["classes"]:
            parts.append(class_table(report["classes"], len(found)))
    return "".join(parts)


def failure_section(result: RunResult, directory: Path) -> str:
    """The worst cases by loss and by change, and groups of images."""
    parts = []
    for runtime, report in result.failure_modes.items():
        words = (
            f"Loss: {report['loss']}. Worst: the {report['num_worst']} of {report['num_images']} "
            "test images with the largest loss."
        )
        parts.append(f"<h3>{escape(runtime)}</h3>{group_table(report)}")
        parts.append(f'<p class="muted">{escape(words)}</p>')
        losses = {"before": "loss before", "after": "loss after"}
        for kind, title in {
            "worst": "Worst by loss", "changed": "Made worse by compression",
        }.items():  # fmt: skip
            if report[kind]:
                parts.append(f"<h3>{title}, {escape(runtime)}</h3>")
                parts.append(pictures(result, directory, report[f"{kind}_pictures"]))
                parts.append(case_table(report[kind], losses))
    return "".join(parts)


def pictures(result: RunResult, directory: Path, name: str | None) -> str:
    """A gallery of what the npz `name` holds; "" where it is not there (any more)."""
    if name is None or not (directory / name).exists():
        return ""
    return gallery(read_examples(directory / name), result.dataset)


def case_table(cases: Sequence[Mapping[str, Any]], figures: Mapping[str, str]) -> str:
    """One row an image: its place in the test split, the truth and what each model says."""
    models = list(cases[0]["decisions"])
    rows = [
        [
            plain(case["position"]),
            escape(case["truth"]),
            *(escape(case["decisions"][model]) for model in models),
            *(plain(case[key]) for key in figures),
        ]
        for case in cases[:NUM_ROWS]
    ]
    headings = ["test image", "truth", *models, *figures.values()]
    return table(headings, rows, num_words=2 + len(models))


def class_table(classes: Sequence[Mapping[str, Any]], num_exemplars: int) -> str:
    """One row a class: its odds among the exemplars against those among the others."""
    rows = [
        [
            escape(each["class_name"]),
            f"{each['num_exemplars']} of {num_exemplars}",
            plain(each["num_others"]),
            odds_words(each),
            plain(each["p_value"]),
        ]
        for each in classes
    ]
    headings = ["class", "exemplars", "others", "odds ratio (95 % interval)", "p (Fisher, Holm)"]
    return table(headings, rows)


def odds_words(each: Mapping[str, Any]) -> str:
    """An odds ratio with its interval; what has no end is infinite."""
    low, high = (number(end) if end is not None else "\u221e" for end in each["interval"])
    ratio = each["odds_ratio"]
    shown = "not finite" if ratio is None else number(ratio)
    return f"{shown} ({low} to {high})"


def group_table(report: Mapping[str, Any]) -> str:
    """One row a group of images."""
    rows = [
        [
            escape(group["kind"]),
            escape(group["name"]),
            plain(group["num_images"]),
            plain(group["num_worst"]),
            plain(group["before"]),
            plain(group["after"]),
            plain(group["change"]),
            plain(group["interval"] and " to ".join(number(end) for end in group["interval"])),
        ]
        for group in report["groups"]
    ]
    headings = ["", "group", "images", "among the worst", "loss before", "loss after", "change"]
    return table([*headings, "95 % interval"], rows, num_words=2)
