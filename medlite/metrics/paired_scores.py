"""The scores that only a comparison of two models looks at, for any weighting of the patients.

They stand beside those of `medlite.metrics.statistics`, which every evaluation reports.

Shapes: N samples, G groups, R resamples, C classes, K logits, Q calibration columns.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from medlite.metrics import calibration, counts
from medlite.metrics.decisions import decisions, probabilities
from medlite.metrics.distance import hausdorff95, normalised_surface_dice, surface_name
from medlite.metrics.names import class_keys
from medlite.metrics.ranking import one_vs_rest, weighted_auc, weighted_average_precision
from medlite.metrics.statistics import group_sums, mean_of, pooled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from medlite.metrics.intervals import Statistic
    from medlite.metrics.statistics import GroupedScores
    from medlite.types import DataSpec, Predictions


def paired_scores(
    predictions: Predictions, spec: DataSpec, scores: GroupedScores
) -> dict[str, Statistic]:
    """The statistics of `scores` and more; the areas under curves are those of this function.

    Added: `specificity/<class>`, `ece_adaptive`; for classification `ap`, `ap/<class>` and, where
    classes exclude each other, `ece_classwise`; for segmentation `nsd_2mm/<class>` (or `_2px`), and
    `ece/<class>` where there are several foreground classes. Hausdorff distances are not of one
    model alone: see `surface_distances`.
    """
    keys, group = class_keys(spec.class_names), group_of(predictions)
    result = dict(scores.statistics)
    for position, key in enumerate(keys):
        result[f"specificity/{key}"] = pooled(scores.counts[:, position], counts.specificity)
    result["ece_adaptive"] = adaptive_statistic(predictions, spec, group, scores.num_groups)
    if spec.task == "classification":
        result |= curve_statistics(predictions, spec, group)
        if spec.labels == "multiclass":
            result["ece_classwise"] = classwise_statistic(predictions, group, scores.num_groups)
        return result
    if scores.bins.shape[1] > 1:
        for column, key in enumerate(keys[1:]):
            bins = scores.bins[:, column : column + 1]
            result[f"ece/{key}"] = pooled(bins, calibration.calibration_error)
    return result | surface_statistics(predictions, spec, group, scores.num_groups)


def group_of(predictions: Predictions) -> Tensor:
    """The position of each sample's group among the sorted groups, int64 (N,)."""
    _, index = np.unique(np.asarray(predictions.groups), return_inverse=True)
    return torch.from_numpy(index.astype(np.int64))


def curve_statistics(
    predictions: Predictions, spec: DataSpec, group: Tensor
) -> dict[str, Statistic]:
    """Areas under the ROC and precision-recall curves of each logit, and their means.

    A class is ranked once a resample: its mean reuses what was computed for the class.
    """
    logits = torch.from_numpy(predictions.logits).double()
    probability = probabilities(logits, spec.labels)
    is_positive = one_vs_rest(
        torch.from_numpy(predictions.targets), labels=spec.labels, num_logits=logits.shape[1]
    )
    keys = class_keys(spec.class_names)[-logits.shape[1] :]
    areas = {"auc": weighted_auc, "ap": weighted_average_precision}
    result: dict[str, Statistic] = {}
    for name, area in areas.items():
        by_class = {
            f"{name}/{key}": once_a_resample(
                partial(class_area, area=area, score=score, is_positive=truth, group=group)
            )
            for key, score, truth in zip(
                keys, probability.unbind(1), is_positive.unbind(1), strict=True
            )
        }
        result |= by_class
        result[name] = partial(mean_over_classes, parts=tuple(by_class.values()))
    return result


def once_a_resample(statistic: Statistic) -> Statistic:
    """The same statistic, which remembers its value at the last weights."""
    return lru_cache(maxsize=1)(statistic)


def class_area(
    weights: Tensor,
    *,
    area: Callable[[Tensor, Tensor, Tensor], Tensor],
    score: Tensor,
    is_positive: Tensor,
    group: Tensor,
) -> Tensor:
    """One class's area by the weights of its samples' groups; NaN where all are of the class."""
    if bool(is_positive.all()):
        return torch.full((len(weights),), torch.nan, dtype=weights.dtype)
    return area(score, is_positive, weights[:, group])


def mean_over_classes(weights: Tensor, *, parts: tuple[Statistic, ...]) -> Tensor:
    """The mean of the classes that are defined."""
    return torch.stack([part(weights) for part in parts]).nanmean(0)


def adaptive_statistic(
    predictions: Predictions, spec: DataSpec, group: Tensor, num_groups: int
) -> Statistic:
    """Calibration error over bins of equal count (Nixon et al. 2019).

    The bins are those of the whole split, for resamples too, so that samples are sorted once.
    """
    judged = calibration.confidences(
        probabilities(torch.from_numpy(predictions.logits), spec.labels),
        torch.from_numpy(predictions.targets),
        labels=spec.labels,
        task=spec.task,
    )
    shape = (num_groups, judged.confidence.shape[1], calibration.NUM_BINS, 3)
    sums = torch.zeros(shape, dtype=torch.float64)
    rows = group[:, None].expand(-1, judged.confidence.shape[2]).flatten()
    for column in range(shape[1]):
        confidence = judged.confidence[:, column].flatten()
        outcome = judged.outcome[:, column].flatten()
        values = torch.stack((confidence, outcome, torch.ones_like(confidence)), dim=1)
        cells = rows * calibration.NUM_BINS + calibration.bins_of_equal_count(confidence)
        of_column = torch.zeros(num_groups * calibration.NUM_BINS, 3, dtype=torch.float64)
        of_column.index_add_(0, cells, values.double())
        sums[:, column] = of_column.reshape(num_groups, calibration.NUM_BINS, 3)
    return pooled(sums, calibration.calibration_error)


def classwise_statistic(predictions: Predictions, group: Tensor, num_groups: int) -> Statistic:
    """Calibration error of every class's probability, averaged over classes.

    Kull et al. 2019, "Beyond temperature scaling" (arXiv 1910.12656), equation 4; bins of equal
    width. In [0, 1], lower is better.
    """
    probability = probabilities(torch.from_numpy(predictions.logits).double(), "multiclass")
    target = torch.from_numpy(predictions.targets)
    outcome = calibration.as_columns(target, labels="multiclass", num_logits=probability.shape[1])
    judged = calibration.Confidences(probability[..., None], outcome)
    bins = group_sums(calibration.bin_sums(judged), group, num_groups)
    return pooled(bins, calibration.calibration_error)


def surface_statistics(
    predictions: Predictions, spec: DataSpec, group: Tensor, num_groups: int
) -> dict[str, Statistic]:
    """Mean normalised surface Dice of each foreground class, over the images that have it."""
    shares = normalised_surface_dice(
        decisions(torch.from_numpy(predictions.logits), spec.labels).numpy(),
        predictions.targets,
        num_classes=len(spec.class_names),
        spacing_mm=spec.spacing_mm,
    )
    name = surface_name(spec.spacing_mm)
    return {
        f"{name}/{key}": mean_of(torch.from_numpy(of_class), group, num_groups)
        for key, of_class in zip(class_keys(spec.class_names)[1:], shares.T, strict=True)
    }


def surface_distances(
    first: Predictions, second: Predictions, spec: DataSpec
) -> tuple[dict[str, Statistic], dict[str, Statistic], dict[str, int]]:
    """Mean Hausdorff distance of each foreground class, over the outlines that both models have.

    An outline that one of the models misses has no distance; were it left out for that model
    alone, the model that misses the hard ones would look nearer. Misses are what sensitivity and
    Dice count.

    Returns:
        Statistics of the first model, of the second, and how many outlines were compared; all by
        `hausdorff95_mm/<class>` (or `_px`).
    """
    group = group_of(first)
    num_groups = len(set(first.groups))
    before, after = (distances_of(side, spec) for side in (first, second))
    is_shared = np.isfinite(before) & np.isfinite(after)
    unit = "px" if spec.spacing_mm is None else "mm"
    sides: tuple[dict[str, Statistic], dict[str, Statistic]] = ({}, {})
    num_shared: dict[str, int] = {}
    for column, key in enumerate(class_keys(spec.class_names)[1:]):
        name, shared = f"hausdorff95_{unit}/{key}", is_shared[:, column]
        num_shared[name] = int(shared.sum())
        for side, distances in zip(sides, (before, after), strict=True):
            values = np.where(shared, distances[:, column], np.nan)
            side[name] = mean_of(torch.from_numpy(values), group, num_groups)
    return *sides, num_shared


def distances_of(predictions: Predictions, spec: DataSpec) -> np.ndarray:
    """(N, C - 1), see `medlite.metrics.distance.hausdorff95`."""
    decided = decisions(torch.from_numpy(predictions.logits), spec.labels).numpy()
    return hausdorff95(
        decided,
        predictions.targets,
        num_classes=len(spec.class_names),
        spacing_mm=spec.spacing_mm,
    )
