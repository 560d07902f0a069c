"""The thresholds at which a classifier is used, chosen on validation patients before compression.

The likeliest class is one way to decide, and it hides a rare class: a model that never names it
loses nothing by compression. A clinic that must not miss it calls it from a lower probability on.
So each class has a threshold at which the uncompressed model finds a stated share of its
validation cases, and both models are compared at that threshold on the test split.

Shapes: N samples, K logits, G groups, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from medlite.metrics import counts
from medlite.metrics.decisions import probabilities
from medlite.metrics.names import class_keys
from medlite.metrics.paired_scores import group_of
from medlite.metrics.ranking import one_vs_rest
from medlite.metrics.statistics import group_sums, pooled

if TYPE_CHECKING:
    from medlite.metrics.intervals import Statistic
    from medlite.types import DataSpec, Predictions


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """From which probability on a class is called."""

    class_name: str
    threshold: float | None
    """None where no validation image has the class"""
    num_positives: int
    """validation images that have it"""
    sensitivity: float | None
    specificity: float | None
    """both on the validation split, at the threshold"""


def choose_operating_points(
    validation: Predictions, spec: DataSpec, *, sensitivity: float
) -> tuple[OperatingPoint, ...]:
    """For each class the highest threshold that finds a share of its validation images.

    Empty for segmentation, whose pixels are decided together, and where outputs are not finite.

    Args:
        validation: what the uncompressed model says of the validation split.
        spec: the dataset.
        sensitivity: the least share to be found, in (0, 1].
    """
    if spec.task == "segmentation" or not np.isfinite(validation.logits).all():
        return ()
    names = spec.class_names[-validation.logits.shape[1] :]
    columns = zip(names, *_columns(validation, spec), strict=True)
    return tuple(_choose(name, score, truth, sensitivity) for name, score, truth in columns)


def thresholds_of(points: tuple[OperatingPoint, ...], spec: DataSpec) -> dict[str, float]:
    """Class key -> threshold, of the classes that have one."""
    keys = dict(zip(spec.class_names, class_keys(spec.class_names), strict=True))
    return {keys[p.class_name]: p.threshold for p in points if p.threshold is not None}


def point_statistics(
    predictions: Predictions, spec: DataSpec, thresholds: Mapping[str, float]
) -> dict[str, Statistic]:
    """`sensitivity_at_point/<class>` and `specificity_at_point/<class>` for any weighting."""
    if not thresholds:
        return {}
    group, num_groups = group_of(predictions), len(set(predictions.groups))
    keys = class_keys(spec.class_names)[-predictions.logits.shape[1] :]
    result: dict[str, Statistic] = {}
    for key, score, truth in zip(keys, *_columns(predictions, spec), strict=True):
        if key not in thresholds:
            continue
        called = torch.from_numpy(score >= thresholds[key]).long()
        of_samples = counts.class_counts(
            called, torch.from_numpy(truth), labels="binary", num_classes=2
        )
        sums = group_sums(of_samples[:, 1], group, num_groups)
        result[f"sensitivity_at_point/{key}"] = pooled(sums, counts.sensitivity)
        result[f"specificity_at_point/{key}"] = pooled(sums, counts.specificity)
    return result


def _columns(predictions: Predictions, spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and truth, each (K, N)."""
    logits = torch.from_numpy(predictions.logits).double()
    targets = torch.from_numpy(predictions.targets)
    truth = one_vs_rest(targets, labels=spec.labels, num_logits=logits.shape[1])
    return probabilities(logits, spec.labels).numpy().T, truth.numpy().T


def _choose(name: str, score: np.ndarray, truth: np.ndarray, least: float) -> OperatingPoint:
    positives = np.sort(score[truth])[::-1]
    if not len(positives):
        return OperatingPoint(
            class_name=name, threshold=None, num_positives=0, sensitivity=None, specificity=None
        )
    threshold = positives[math.ceil(round(least * len(positives), 9)) - 1]
    others = score[~truth]
    return OperatingPoint(
        class_name=name,
        threshold=float(threshold),
        num_positives=len(positives),
        sensitivity=float((positives >= threshold).mean()),
        specificity=float((others < threshold).mean()) if len(others) else None,
    )
