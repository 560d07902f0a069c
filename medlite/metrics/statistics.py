"""Every score of a set of predictions as a function of how much each patient counts.

With all weights 1 a statistic is the score itself; with the weights of a resample it is one value
of the bootstrap; and two models' statistics at the same weights make a paired comparison. Most
scores are formulas of sums over samples, so each sample is looked at once.

Shapes: N samples, G groups, R resamples, C classes, K logits, Q calibration columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from medlite.metrics import calibration, counts
from medlite.metrics.decisions import decisions, probabilities
from medlite.metrics.names import class_keys
from medlite.metrics.ranking import macro_auc, one_vs_rest, weighted_auc
from medlite.metrics.task import count_formulas

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.metrics.intervals import Statistic
    from medlite.types import DataSpec, Predictions

BLOCK_VALUES = 4_000_000
"""logits at a time in double precision"""


@dataclass(frozen=True, kw_only=True)
class GroupedScores:
    """The scores of one model on one split, ready for any weighting of its groups.

    counts: (G, C, 4), see `medlite.metrics.counts`. bins: (G, Q, bins, 3), see
    `calibration.bin_sums`. num_samples_of_class, num_groups_of_class: (C,).
    """

    statistics: dict[str, Statistic]
    counts: Tensor
    bins: Tensor
    num_groups: int
    num_samples_of_class: tuple[int, ...]
    num_groups_of_class: tuple[int, ...]

    def value(self, name: str) -> float:
        """The score itself: every group counts once."""
        return float(self.statistics[name](torch.ones(1, self.num_groups).double()))


def group_sums(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Add the samples of each group; (N, ...) -> float64 (G, ...)."""
    sums = torch.zeros(num_groups, *values.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, group, values.double())


def pooled(sums: Tensor, formula: Callable[[Tensor], Tensor]) -> Statistic:
    """A statistic that is a formula of weighted sums: (G, ...) sums, (R, ...) -> (R,)."""
    flat = sums.reshape(len(sums), -1)
    return lambda weights: formula((weights @ flat).reshape(-1, *sums.shape[1:]))


def mean_of(values: Tensor, group: Tensor, num_groups: int) -> Statistic:
    """The mean over samples of (N,) values; NaN ones do not count."""
    is_known = ~values.isnan()
    sums = group_sums(torch.stack((values.nan_to_num(), is_known), dim=1), group, num_groups)
    return pooled(sums, lambda totals: totals[:, 0] / totals[:, 1])


def sample_sums(predictions: Predictions, spec: DataSpec) -> dict[str, Tensor]:
    """Counts, calibration bins, NLL and Brier score of each sample, block by block."""
    num_values = int(np.prod(predictions.logits.shape[1:]))
    block = max(1, BLOCK_VALUES // num_values)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(predictions.logits), block):
        logits = torch.from_numpy(predictions.logits[start : start + block]).double()
        target = torch.from_numpy(predictions.targets[start : start + block])
        probability = probabilities(logits, spec.labels)
        judged = calibration.confidences(probability, target, labels=spec.labels, task=spec.task)
        parts.append(
            (
                counts.class_counts(
                    decisions(logits, spec.labels),
                    target,
                    labels=spec.labels,
                    num_classes=len(spec.class_names),
                ),
                calibration.bin_sums(judged),
                calibration.negative_log_likelihood(logits, target, labels=spec.labels),
                calibration.brier_score(probability, target, labels=spec.labels),
            )
        )
    names = ("counts", "bins", "nll", "brier")
    return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))


def class_auc(weights: Tensor, *, score: Tensor, is_positive: Tensor, group: Tensor) -> Tensor:
    """Area under one class's ROC curve by the weights of its samples' groups, (R, G) -> (R,)."""
    return weighted_auc(score, is_positive, weights[:, group])


def auc_statistics(predictions: Predictions, spec: DataSpec, group: Tensor) -> dict[str, Statistic]:
    """The macro area under the ROC curve, and that of each logit."""
    logits = torch.from_numpy(predictions.logits).double()
    probability = probabilities(logits, spec.labels)
    is_positive = one_vs_rest(
        torch.from_numpy(predictions.targets), labels=spec.labels, num_logits=logits.shape[1]
    )
    result: dict[str, Statistic] = {
        "auc": lambda weights: macro_auc(probability, is_positive, weights[:, group])
    }
    keys = class_keys(spec.class_names)[-logits.shape[1] :]
    for key, score, truth in zip(keys, probability.unbind(1), is_positive.unbind(1), strict=True):
        result[f"auc/{key}"] = partial(class_auc, score=score, is_positive=truth, group=group)
    return result


def grouped_scores(predictions: Predictions, spec: DataSpec) -> GroupedScores:
    """Look at every sample once and make all statistics of the task.

    Names: `nll`, `brier`, `ece`, `sensitivity/<class>`; for classification also `auc`,
    `auc/<class>`, `accuracy`, `balanced_accuracy`; for segmentation `dice`, `iou`,
    `dice/<class>`, `dice_per_image`. Logits must be finite.
    """
    unique, index = np.unique(np.asarray(predictions.groups), return_inverse=True)
    group, num_groups = torch.from_numpy(index.astype(np.int64)), len(unique)
    sums = sample_sums(predictions, spec)
    count_sums = group_sums(sums["counts"], group, num_groups)
    bins = group_sums(sums["bins"], group, num_groups)
    statistics: dict[str, Statistic] = {
        name: pooled(count_sums, formula) for name, formula in count_formulas(spec).items()
    }
    statistics |= {name: mean_of(sums[name], group, num_groups) for name in ("nll", "brier")}
    statistics["ece"] = pooled(bins, calibration.calibration_error)
    keys = class_keys(spec.class_names)
    for position, key in enumerate(keys):
        statistics[f"sensitivity/{key}"] = pooled(count_sums[:, position], counts.sensitivity)
    if spec.task == "classification":
        statistics |= auc_statistics(predictions, spec, group)
    else:
        per_image = counts.mean_foreground_dice(sums["counts"])
        statistics["dice_per_image"] = mean_of(per_image, group, num_groups)
        for position, key in enumerate(keys[1:], start=1):
            statistics[f"dice/{key}"] = pooled(count_sums[:, position], counts.dice)
    return GroupedScores(
        statistics=statistics,
        counts=count_sums,
        bins=bins,
        num_groups=num_groups,
        num_samples_of_class=occurrences(sums["counts"]),
        num_groups_of_class=occurrences(count_sums),
    )


def occurrences(class_counts: Tensor) -> tuple[int, ...]:
    """In how many rows of (rows, C, 4) each class has a target."""
    has_target = class_counts[..., 0] + class_counts[..., 2] > 0
    return tuple(has_target.sum(0).tolist())
