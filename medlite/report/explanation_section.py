"""Explainability in the report: how alike both models' saliency maps are, with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from medlite.report.examples import as_rgb, enlarged
from medlite.report.gallery import picture
from medlite.report.lookup import number
from medlite.report.tables import Cell, plain, remark, table
from medlite.types import Measurement

HEAT = np.array([255, 80, 20])
"""colour of what is salient"""

SIDES = {"before": "uncompressed", "after": "deployed"}


def explanation_section(report: Mapping[str, Any], directory: Path | None) -> str:
    """A table and pictures; "" where nothing was explained.

    Args:
        report: of `RunResult.explanations`.
        directory: where the pictures are; None: without them.
    """
    if not report:
        return ""
    words = (
        f"{report['num_images']} test images of {report['num_groups']} {report['group_kind']}s, "
        "spread evenly over the split. Both models are explained for what the uncompressed one "
        "decided. Rank correlation and overlap of the most salient twentieth of the pixels: 1 "
        "where both models look at the same. Inside: share of the saliency within the annotated "
        "finding. Random weights: correlation with the maps of the same net, its weights in "
        "another order; a high one means that the method shows the image, not the model."
    )
    path = None if directory is None else directory / report["pictures"]
    pictures = "" if path is None or not path.exists() else _pictures(path)
    return f'{explanation_table(report)}<p class="muted">{escape(words)}</p>{pictures}'


def explanation_table(report: Mapping[str, Any]) -> str:
    """One row a method and where it was applied."""
    headings = ["method", "where", "rank correlation", "top 5 % overlap", "inside before"]
    headings += ["inside after", "change", "random weights"]
    rows = [
        [
            escape(row["method"].replace("_", " ")) + remark(row["note"]),
            escape(row["where"]),
            _with_interval(row, "rank_correlation"),
            _with_interval(row, "top_overlap"),
            plain(row["inside_before"]),
            plain(row["inside_after"]),
            _with_interval(row, "inside_change"),
            plain(row["randomised_correlation"]),
        ]
        for row in report["rows"]
    ]
    return table(headings, rows, num_words=2)


def explanation_measurements(report: Mapping[str, Any]) -> Iterator[Measurement]:
    """`explainability/<where>/<method>/<score>` of every row."""
    scores = {"rank_correlation": True, "top_overlap": True, "inside_after": None}
    for row in report.get("rows", ()):
        for score, is_better in scores.items():
            name = f"explainability/{row['where']}/{row['method']}/{score}"
            if row[score] is None:
                if row["num_images"] == 0:
                    yield Measurement.unavailable(name, "", row["note"])
                continue
            interval = row.get(f"{score}_interval")
            yield Measurement(
                name=name,
                value=row[score],
                unit="",
                n=row["num_images"],
                spread=None if interval is None else (interval[0], interval[1]),
                higher_is_better=is_better,
                note=row["note"],
            )


def heat(image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """An image (C, H, W) in grey with what is salient (H, W) in colour, uint8 (H', W', 3)."""
    grey = enlarged(as_rgb(image)).mean(-1, keepdims=True) * np.ones(3)
    share = saliency / max(float(np.quantile(saliency, 0.99)), 1e-12)
    weight = enlarged(np.clip(share, 0, 1))[..., None] * 0.8
    return (grey * (1 - weight) + HEAT * weight).round().astype(np.uint8)


def _with_interval(row: Mapping[str, Any], name: str) -> Cell:
    ends = row[f"{name}_interval"]
    return plain(row[name]) + remark("" if ends is None else " to ".join(map(number, ends)))


def _pictures(path: Path) -> str:
    """A row of pictures for every map."""
    body = "".join(
        f"<tr><th>{escape(_in_words(name))}</th>"
        + "".join(f"<td>{picture(each)}</td>" for each in pictures)
        + "</tr>"
        for name, pictures in read_heat(path).items()
    )
    return f'<table class="gallery">{body}</table>'


def read_heat(path: Path) -> dict[str, list[np.ndarray]]:
    """Name ("image", "<method>/<where>/<side>") -> pictures, uint8 (H, W, 3) each."""
    with np.load(path) as arrays:
        images = arrays["images"]
        maps = {name: arrays[name] for name in arrays.files if name != "images"}
    heated = {
        name: [heat(image, each) for image, each in zip(images, of_images, strict=True)]
        for name, of_images in maps.items()
    }
    return {"image": [enlarged(as_rgb(image)) for image in images]} | heated


def _in_words(name: str) -> str:
    method, *rest = name.split("/")
    side = SIDES[rest[-1]] if rest else ""
    return ", ".join(filter(None, (method.replace("_", " "), *rest[:-1], side)))
