"""Predictions of a split -> measurements under flat, stable keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from medlite.metrics import calibration
from medlite.metrics.decisions import decisions, probabilities
from medlite.metrics.distance import hausdorff95
from medlite.metrics.intervals import bootstrap, percentile_interval, wilson_interval
from medlite.metrics.names import class_keys
from medlite.metrics.statistics import GroupedScores, grouped_scores
from medlite.types import Measurement

if TYPE_CHECKING:
    from medlite.types import DataSpec, Predictions

NUM_RESAMPLES = 2000
LOWER_IS_BETTER = {"nll", "brier", "ece"}


def evaluate(
    predictions: Predictions, spec: DataSpec, *, prefix: str = "test"
) -> list[Measurement]:
    """Judge one model on one split.

    Keys behind the prefix: `nll`, `brier`, `ece`, `ece_adaptive`, `sensitivity/<class>`; for
    classification `auc`, `auc/<class>`, `accuracy`, `balanced_accuracy`; for segmentation `dice`
    (pooled over all pixels), `dice/<class>`, `dice_per_image`, `iou` and `hausdorff95_mm` (or
    `_px`). Intervals are 95 % bootstrap intervals over groups; a class's sensitivity in
    classification has a Wilson interval in which each group counts once. A class that does not
    occur makes its measurements unavailable, never 0. `auc/<class>` and `ece_adaptive` have no
    interval.
    """
    num_samples = len(predictions.logits)
    num_bad = int((~np.isfinite(predictions.logits)).reshape(num_samples, -1).any(1).sum())
    if num_bad:
        reason = f"the outputs of {num_bad} of {num_samples} images are not finite"
        return [Measurement.unavailable(f"{prefix}/{n}", "", reason) for n in score_names(spec)]
    scores = grouped_scores(predictions, spec)
    resampled = {k: v for k, v in scores.statistics.items() if not k.startswith("auc/")}
    samples = bootstrap(resampled, num_groups=scores.num_groups, num_resamples=NUM_RESAMPLES)
    rows = [
        score_measurement(
            name, scores, samples.get(name), spec=spec, prefix=prefix, num_samples=num_samples
        )
        for name in scores.statistics
    ]
    rows.append(adaptive_measurement(predictions, spec, prefix))
    if spec.task == "segmentation":
        rows.append(distance_measurement(predictions, spec, prefix))
    return rows


def score_names(spec: DataSpec) -> tuple[str, ...]:
    """The scores that every model of a task has, whatever its classes."""
    task = ("dice", "iou") if spec.task == "segmentation" else ("auc", "accuracy")
    return (*task, "nll", "brier", "ece")


def score_measurement(
    name: str,
    scores: GroupedScores,
    samples: np.ndarray | None,
    *,
    spec: DataSpec,
    prefix: str,
    num_samples: int,
) -> Measurement:
    """One statistic with its interval; `samples` are its bootstrap values where it has any."""
    unit = "nat" if name == "nll" else ""
    value, n, num_groups = scores.value(name), num_samples, scores.num_groups
    family, _, key = name.partition("/")
    if key:
        position = class_keys(spec.class_names).index(key)
        n = scores.num_samples_of_class[position]
        num_groups = scores.num_groups_of_class[position]
    if np.isnan(value):
        reason = "too few classes occur in this split"
        if key:
            name_of_class = spec.class_names[position]
            reason = f"{'every' if n else 'no'} image of this split is of class {name_of_class!r}"
        return Measurement.unavailable(f"{prefix}/{name}", unit, reason)
    if family == "sensitivity" and spec.task == "classification":
        spread: tuple[float, float] | None = wilson_interval(value * num_groups, num_groups)
        note = f"Wilson interval over {num_groups} {spec.group_kind}s that have the class"
    elif samples is None:
        spread, note = None, "no interval: one class of the macro average"
    elif num_groups < 2:
        spread, note = None, f"no interval: it rests on one {spec.group_kind}"
    else:
        spread = percentile_interval(samples)
        note = f"bootstrap interval over {scores.num_groups} {spec.group_kind}s"
    return Measurement(
        name=f"{prefix}/{name}",
        value=value,
        unit=unit,
        n=n,
        spread=spread,
        higher_is_better=name not in LOWER_IS_BETTER,
        note=note,
    )


def adaptive_measurement(predictions: Predictions, spec: DataSpec, prefix: str) -> Measurement:
    """Calibration error over bins of equal count; it has no interval, as its bins are quantiles."""
    judged = calibration.confidences(
        probabilities(torch.from_numpy(predictions.logits), spec.labels),
        torch.from_numpy(predictions.targets),
        labels=spec.labels,
        task=spec.task,
    )
    return Measurement(
        name=f"{prefix}/ece_adaptive",
        value=calibration.adaptive_calibration_error(judged),
        unit="",
        n=len(predictions.logits),
        higher_is_better=False,
        note=f"{calibration.NUM_BINS} bins of equal count",
    )


def distance_measurement(predictions: Predictions, spec: DataSpec, prefix: str) -> Measurement:
    """Mean Hausdorff distance over images and foreground classes that both sides have."""
    unit = "px" if spec.spacing_mm is None else "mm"
    name = f"{prefix}/hausdorff95_{unit}"
    decided = decisions(torch.from_numpy(predictions.logits), spec.labels).numpy()
    distances = hausdorff95(
        decided,
        predictions.targets,
        num_classes=len(spec.class_names),
        spacing_mm=spec.spacing_mm,
    )
    is_known = np.isfinite(distances)
    if not is_known.any():
        return Measurement.unavailable(name, unit, "no image has foreground on both sides")
    return Measurement(
        name=name,
        value=float(distances[is_known].mean()),
        unit=unit,
        n=int(is_known.sum()),
        higher_is_better=False,
        note=f"mean over outlines; {int((~is_known).sum())} without a counterpart are left out",
    )


def reliability(predictions: Predictions, spec: DataSpec) -> list[dict[str, float | int | None]]:
    """Each confidence bin's mean confidence, accuracy and count, for a reliability diagram.

    Empty where an output is not finite.
    """
    if not np.isfinite(predictions.logits).all():
        return []
    return calibration.reliability_bins(grouped_scores(predictions, spec).bins.sum(0))
