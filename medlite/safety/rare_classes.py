"""Which classes are rare: where compression hurts first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medlite.metrics.statistics import GroupedScores
    from medlite.types import DataSpec


@dataclass(frozen=True, kw_only=True)
class RareClass:
    """One class and how often it occurs."""

    name: str
    prevalence: float
    """share of the training images, of a segmentation of the foreground's training pixels; of the
    test split where the training set is not known"""
    train_count: int | None
    """None where only predictions are known, without the set that the models learned from"""
    test_count: int
    """test images that have it"""


def by_prevalence(spec: DataSpec, scores: GroupedScores, num_test: int) -> list[RareClass]:
    """Every class, the rarest first; the background of a segmentation aside.

    Args:
        spec: the dataset.
        scores: of any model on the test split, for how often a class is there.
        num_test: images of the test split.
    """
    first = 1 if spec.task == "segmentation" else 0
    counts = spec.class_counts or scores.num_samples_of_class
    total = sum(counts[first:])
    if spec.labels == "multilabel":  # images have several classes, or none
        total = spec.num_samples.get("train", total) if spec.class_counts else num_test
    found = [
        RareClass(
            name=name,
            prevalence=counts[position] / total if total else 0.0,
            train_count=spec.class_counts[position] if spec.class_counts else None,
            test_count=scores.num_samples_of_class[position],
        )
        for position, name in enumerate(spec.class_names)
    ]
    return sorted(found[first:], key=lambda each: each.prevalence)
