"""Whether a model's confidence can be believed: calibration error, NLL and Brier score.

Which confidences are judged depends on the task. Multi-class classification: that of the decided
class ("top label", Guo et al. 2017, "On Calibration of Modern Neural Networks"). Binary and
multi-label: the probability of each label. Segmentation: the probability of each foreground class
over all pixels ("class-wise", Kull et al. 2019, "Beyond temperature scaling", eq. 4). Each such
series of confidences is called a column, and errors are averaged over columns.

Shapes: B batch, K logits, P positions (pixels; 1 for classification), Q columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.types import Labels, Task

NUM_BINS = 15
"""as in Guo et al. 2017"""


class Confidences(NamedTuple):
    """What was claimed and what came true, both (B, Q, P)."""

    confidence: Tensor
    outcome: Tensor


def as_columns(target: Tensor, *, labels: Labels, num_logits: int) -> Tensor:
    """The target as what each probability should have been, (B, K, P) bool."""
    if labels == "multilabel":
        return target.bool()[:, :, None]
    flat = target.long().reshape(len(target), -1)
    if labels == "binary":
        return flat.bool()[:, None]
    return F.one_hot(flat, num_logits).bool().movedim(-1, 1)


def confidences(probability: Tensor, target: Tensor, *, labels: Labels, task: Task) -> Confidences:
    """The confidences that are judged, see the module.

    Args:
        probability: (B, K, ...).
        target: as `Batch.target`.
        labels: what the logits mean.
        task: what the model is for.
    """
    probability = probability.reshape(*probability.shape[:2], -1)
    outcome = as_columns(target, labels=labels, num_logits=probability.shape[1])
    if labels == "multiclass" and task == "classification":
        confidence, decided = probability.max(dim=1, keepdim=True)
        return Confidences(confidence, outcome.gather(1, decided))
    first = int(labels == "multiclass")
    return Confidences(probability[:, first:], outcome[:, first:])


def bin_sums(judged: Confidences, num_bins: int = NUM_BINS) -> Tensor:
    """Sort confidences into bins of equal width; the sums of batches add up.

    Returns:
        float64 (B, Q, num_bins, 3): sum of confidence, sum of outcomes, count.
    """
    confidence, outcome = judged.confidence.double(), judged.outcome.double()
    values = torch.stack((confidence, outcome, torch.ones_like(confidence)), dim=-1)
    index = (confidence * num_bins).long().clamp(0, num_bins - 1)
    sums = values.new_zeros(*index.shape[:2], num_bins, 3)
    return sums.scatter_add_(2, index[..., None].expand_as(values), values)


def calibration_error(sums: Tensor) -> Tensor:
    """Expected calibration error: mean |confidence - accuracy| over bins, weighted by count.

    In [0, 1], lower is better. Bins of equal width hide over- and underconfidence that cancel
    within a bin, and small sets look worse than they are: so does a resample, whose interval is
    therefore shifted upwards (a difference of two models on one resample is not).

    Args:
        sums: (..., Q, bins, 3) of `bin_sums`.

    Returns:
        (...), averaged over columns.
    """
    gap = (sums[..., 0] - sums[..., 1]).abs().sum(-1)
    return (gap / sums[..., 2].sum(-1)).mean(-1)


def bins_of_equal_count(confidence: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """The bin of each confidence, the lowest first; (N,) -> int64 (N,).

    Equal confidences share the bin of their middle one, so that the order of the samples decides
    nothing; the bins are then not quite equal.
    """
    ordered, order = confidence.sort(stable=True)
    _, tie, sizes = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    middle = sizes.cumsum(0) - sizes // 2 - 1
    parts = torch.arange(len(ordered)).tensor_split(num_bins)
    bin_at = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    bins = torch.empty_like(order)
    bins[order] = bin_at[middle][tie]
    return bins


def adaptive_calibration_error(judged: Confidences, num_bins: int = NUM_BINS) -> float:
    """Calibration error over bins that hold equally many samples, see `bins_of_equal_count`.

    Nixon et al. 2019, "Measuring Calibration in Deep Learning" (adaptive calibration error), here
    for the columns of this module. In [0, 1], lower is better. Needs all samples at once.
    """
    errors = []
    for confidence, outcome in zip(*(part.unbind(1) for part in judged), strict=True):
        gap = (confidence.double() - outcome.double()).flatten()
        sums = gap.new_zeros(num_bins)
        sums.index_add_(0, bins_of_equal_count(confidence.flatten(), num_bins), gap)
        errors.append(float(sums.abs().sum()) / len(gap))
    return sum(errors) / len(errors)


def negative_log_likelihood(logits: Tensor, target: Tensor, *, labels: Labels) -> Tensor:
    """Minus the log probability of the truth, in nats, at least 0, lower is better.

    Averaged over positions, and over labels where there are several.

    Args:
        logits: (B, K, ...).
        target: as `Batch.target`.
        labels: what the logits mean.

    Returns:
        (B,)
    """
    flat = logits.reshape(*logits.shape[:2], -1)
    outcome = as_columns(target, labels=labels, num_logits=flat.shape[1]).to(flat.dtype)
    if labels == "multiclass":
        return -(F.log_softmax(flat, dim=1) * outcome).sum(1).mean(-1)
    loss = F.binary_cross_entropy_with_logits(flat, outcome, reduction="none")
    return loss.mean((1, 2))


def brier_score(probability: Tensor, target: Tensor, *, labels: Labels) -> Tensor:
    """Squared error of the probabilities, lower is better.

    Multi-class: summed over classes, in [0, 2] (Brier 1950, "Verification of forecasts expressed
    in terms of probability"). Binary and multi-label: of each label's probability, in [0, 1],
    averaged over labels. Averaged over positions.

    Args:
        probability: (B, K, ...).
        target: as `Batch.target`.
        labels: what the logits mean.

    Returns:
        (B,)
    """
    flat = probability.reshape(*probability.shape[:2], -1)
    outcome = as_columns(target, labels=labels, num_logits=flat.shape[1]).to(flat.dtype)
    error = (flat - outcome).square()
    return error.sum(1).mean(-1) if labels == "multiclass" else error.mean((1, 2))


def reliability_bins(sums: Tensor) -> list[dict[str, float | int | None]]:
    """What a reliability diagram draws: each bin's mean confidence, accuracy and count.

    Args:
        sums: (Q, bins, 3) of `bin_sums`, added over samples; columns are pooled.
    """
    pooled = sums.sum(0)
    width = 1 / len(pooled)
    rows: list[dict[str, float | int | None]] = []
    for position, (confidence, outcome, count) in enumerate(pooled.tolist()):
        rows.append(
            {
                "lower": position * width,
                "upper": (position + 1) * width,
                "confidence": confidence / count if count else None,
                "accuracy": outcome / count if count else None,
                "count": int(count),
            }
        )
    return rows
