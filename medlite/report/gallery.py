"""Example predictions as a picture table: a column an image, a row a way of looking at it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medlite.metrics.decisions import decisions, probabilities
from medlite.report.examples import COLOURS, Examples, as_data_uri, as_rgb, enlarged, overlay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medlite.types import Labels


def gallery(examples: Examples, dataset: Mapping[str, Any]) -> str:
    """Images with masks (segmentation) or with true and predicted classes (classification)."""
    is_segmentation = dataset["task"] == "segmentation"
    rows = [("image", [picture(enlarged(as_rgb(image))) for image in examples.images])]
    rows += mask_rows(examples, dataset) if is_segmentation else class_rows(examples, dataset)
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for label, cells in rows
    )
    keys = colour_keys(dataset["class_names"]) if is_segmentation else ""
    return f'<table class="gallery">{body}</table>{keys}'


def picture(pixels: np.ndarray) -> str:
    """An inline picture."""
    return f'<img alt="" src="{as_data_uri(pixels)}">'


def mask_rows(examples: Examples, dataset: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The annotation, then each candidate's mask with the annotation's outline."""
    pairs = list(zip(examples.images, examples.targets, strict=True))
    rows = [("annotation", [picture(overlay(image, truth)) for image, truth in pairs])]
    for candidate, logits in examples.logits.items():
        decided = decisions(torch.from_numpy(logits), dataset["labels"]).numpy()
        cells = [
            picture(overlay(image, mask, truth))
            for (image, truth), mask in zip(pairs, decided, strict=True)
        ]
        rows.append((candidate, cells))
    return rows


def colour_keys(class_names: Sequence[str]) -> str:
    """Which colour is which class."""
    entries = []
    for position, name in enumerate(class_names[1:]):
        colour = COLOURS[position % (len(COLOURS) - 1) + 1]
        rgb = ", ".join(str(channel) for channel in colour)
        entries.append(
            f'<span class="key"><i style="background:rgb({rgb})"></i>{escape(name)}</span>'
        )
    entries.append('<span class="key"><i class="outlined"></i>outline of the annotation</span>')
    return f'<p class="keys">{"".join(entries)}</p>'


def class_rows(examples: Examples, dataset: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The true classes, then each candidate's with its confidence."""
    names, labels = dataset["class_names"], dataset["labels"]
    truth = [named(target, names, labels) for target in examples.targets]
    rows = [("true class", [escape(words) for words in truth])]
    for candidate, logits in examples.logits.items():
        tensor = torch.from_numpy(logits)
        decided, probability = decisions(tensor, labels), probabilities(tensor, labels)
        cells = []
        for choice, shares, true in zip(decided.numpy(), probability.numpy(), truth, strict=True):
            words = named(choice, names, labels)
            share = "" if labels == "multilabel" else f" {confidence(shares):.0%}"
            kind = "right" if words == true else "wrong"
            cells.append(f'<span class="{kind}">{escape(words)}</span>{share}')
        rows.append((candidate, cells))
    return rows


def confidence(probability: np.ndarray) -> float:
    """Of the decided class; (K,)."""
    if len(probability) == 1:
        return float(max(probability[0], 1 - probability[0]))
    return float(probability.max())


def named(decided: np.ndarray, names: Sequence[str], labels: Labels) -> str:
    """The class, or every label that is present."""
    if labels != "multilabel":
        return names[int(decided)]
    return (
        ", ".join(name for name, is_there in zip(names, decided, strict=True) if is_there) or "none"
    )
