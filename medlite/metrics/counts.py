"""Scores that follow from how often decisions and targets agree.

Counts are (..., C, 4): true positives, false positives, false negatives and true negatives of
each of C classes. They add up over samples, so a score of a whole set is the score of the sum.
Two-class problems count both classes. A class without a target has no score: it is NaN, and
means over classes leave it out (scikit-learn's balanced accuracy does the same).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from medlite.types import Labels


def class_counts(decided: Tensor, target: Tensor, *, labels: Labels, num_classes: int) -> Tensor:
    """Count agreements of each sample and class.

    Args:
        decided: int64 (B, ...), or (B, K) for "multilabel".
        target: as `decided`; `Batch.target`.
        labels: what the values mean.
        num_classes: C; 2 for "binary".

    Returns:
        int64 (B, C, 4).
    """
    target = target.long()
    if labels == "multilabel":
        true_positive, predicted, actual = decided * target, decided, target
        total = torch.ones_like(target)
    else:
        pairs = (target * num_classes + decided).reshape(len(target), -1)
        offset = torch.arange(len(pairs), device=pairs.device)[:, None] * num_classes**2
        confusion = torch.bincount(
            (pairs + offset).flatten(), minlength=len(pairs) * num_classes**2
        ).view(-1, num_classes, num_classes)
        true_positive = confusion.diagonal(dim1=1, dim2=2)
        predicted, actual = confusion.sum(1), confusion.sum(2)
        total = confusion.sum((1, 2))[:, None]
    false_positive, false_negative = predicted - true_positive, actual - true_positive
    true_negative = total - true_positive - false_positive - false_negative
    return torch.stack((true_positive, false_positive, false_negative, true_negative), dim=-1)


def sensitivity(counts: Tensor) -> Tensor:
    """Found share of each class, TP / (TP + FN), in [0, 1]; (..., C, 4) -> (..., C)."""
    return counts[..., 0] / (counts[..., 0] + counts[..., 2])


def specificity(counts: Tensor) -> Tensor:
    """Share of the others left alone, TN / (TN + FP), in [0, 1]; (..., C, 4) -> (..., C)."""
    return counts[..., 3] / (counts[..., 3] + counts[..., 1])


def dice(counts: Tensor) -> Tensor:
    """Overlap of each class, 2 TP / (2 TP + FP + FN), in [0, 1]; (..., C, 4) -> (..., C)."""
    true_positive, false_positive, false_negative, _ = counts.unbind(-1)
    score = 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    return score.where(true_positive + false_negative > 0, torch.nan)


def iou(counts: Tensor) -> Tensor:
    """Jaccard index of each class, Dice / (2 - Dice), in [0, 1]; (..., C, 4) -> (..., C)."""
    overlap = dice(counts)
    return overlap / (2 - overlap)


def mean_foreground_dice(counts: Tensor) -> Tensor:
    """Mean Dice of all classes but the first; (..., C, 4) -> (...)."""
    return dice(counts[..., 1:, :]).nanmean(-1)


def mean_foreground_iou(counts: Tensor) -> Tensor:
    """Mean Jaccard index of all classes but the first; (..., C, 4) -> (...)."""
    return iou(counts[..., 1:, :]).nanmean(-1)


def exclusive_accuracy(counts: Tensor) -> Tensor:
    """Share of right decisions where classes exclude each other; (..., C, 4) -> (...)."""
    return counts[..., 0].sum(-1) / (counts[..., 0] + counts[..., 2]).sum(-1)


def exclusive_balanced_accuracy(counts: Tensor) -> Tensor:
    """Mean sensitivity of the classes that occur; (..., C, 4) -> (...)."""
    return sensitivity(counts).nanmean(-1)


def multilabel_accuracy(counts: Tensor) -> Tensor:
    """Share of right decisions, averaged over labels; (..., C, 4) -> (...)."""
    right = counts[..., 0] + counts[..., 3]
    return (right / counts.sum(-1)).nanmean(-1)


def multilabel_balanced_accuracy(counts: Tensor) -> Tensor:
    """Mean of sensitivity and specificity, averaged over labels; (..., C, 4) -> (...)."""
    return ((sensitivity(counts) + specificity(counts)) / 2).nanmean(-1)
