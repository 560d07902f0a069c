"""Areas under the ROC and precision-recall curves: exact, with ties, weighted for the bootstrap.

Shapes: N samples, K logits, R sets of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.types import Labels


def weighted_auc(scores: Tensor, is_positive: Tensor, weights: Tensor) -> Tensor:
    """The chance that a positive scores above a negative; ties count half. Higher is better.

    This is the Mann-Whitney statistic, equal to the area under the exact ROC curve (Bamber 1975,
    "The area above the ordinal dominance graph and the area below the ROC graph").

    Args:
        scores: (N,).
        is_positive: (N,) bool.
        weights: (R, N), how often each sample counts.

    Returns:
        (R,) in [0, 1]; NaN where positives or negatives have no weight.
    """
    ordered, order = scores.sort()
    _, tie_sizes = ordered.unique_consecutive(return_counts=True)
    last_of_tie = tie_sizes.cumsum(0) - 1
    positive = is_positive[order].to(weights.dtype)
    weights = weights[:, order]
    positive_upto = (weights * positive).cumsum(1)[:, last_of_tie]
    negative_upto = (weights * (1 - positive)).cumsum(1)[:, last_of_tie]
    negative_before = torch.nn.functional.pad(negative_upto, (1, 0))[:, :-1]
    wins = positive_upto.diff(dim=1, prepend=torch.zeros_like(positive_upto[:, :1]))
    area = (wins * (negative_before + negative_upto) / 2).sum(1)
    return area / (positive_upto[:, -1] * negative_upto[:, -1])


def weighted_average_precision(scores: Tensor, is_positive: Tensor, weights: Tensor) -> Tensor:
    """Precision at each threshold, weighted by the recall that it adds. Higher is better.

    sum over thresholds of (recall_t - recall_(t-1)) precision_t, the step-wise area under the
    precision-recall curve (Davis & Goadrich 2006, "The relationship between precision-recall and
    ROC curves", section 4, says why not to interpolate linearly). Equal scores are one threshold.
    A classifier by chance has the share of positives.

    Args:
        scores: (N,).
        is_positive: (N,) bool.
        weights: (R, N), how often each sample counts.

    Returns:
        (R,) in [0, 1]; NaN where positives have no weight.
    """
    ordered, order = scores.sort(descending=True)
    _, tie_sizes = ordered.unique_consecutive(return_counts=True)
    last_of_tie = tie_sizes.cumsum(0) - 1
    weights = weights[:, order]
    found = (weights * is_positive[order].to(weights.dtype)).cumsum(1)[:, last_of_tie]
    called = weights.cumsum(1)[:, last_of_tie]
    gained = found.diff(dim=1, prepend=torch.zeros_like(found[:, :1]))
    precision = found / called.where(called > 0, 1.0)
    return (gained * precision).sum(1) / found[:, -1]


def one_vs_rest(target: Tensor, *, labels: Labels, num_logits: int) -> Tensor:
    """Which logits should be high; (N,) or (N, K) -> (N, K) bool."""
    if labels == "multiclass":
        return one_hot(target.long(), num_logits).bool()
    return target.bool().reshape(len(target), num_logits)


def macro_auc(probability: Tensor, is_positive: Tensor, weights: Tensor) -> Tensor:
    """Mean one-vs-rest area over the logits, as MedMNIST defines it.

    Yang et al. 2023, "MedMNIST v2". A class that has no positive or no negative is left out of
    the mean (MedMNIST's own code fails there).

    Args:
        probability: (N, K).
        is_positive: (N, K) bool.
        weights: (R, N).

    Returns:
        (R,) in [0, 1]; NaN where no class has both positives and negatives.
    """
    columns = zip(probability.unbind(1), is_positive.unbind(1), strict=True)
    return torch.stack([weighted_auc(*column, weights) for column in columns]).nanmean(0)
