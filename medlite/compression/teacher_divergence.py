"""How far a student's logits are from its teacher's: soft and hard labels, weighted means."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from medlite.types import Labels


def softened_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    labels: Labels,
    weights: Tensor | None = None,
) -> Tensor:
    """T^2 KL(teacher || student) of probabilities at temperature T, mean over images and pixels.

    Args:
        logits: (B, K[, H, W, D]) of the student.
        teacher_logits: the same shape.
        temperature: T; the factor T^2 keeps the size of the gradient (section 2 of the paper).
        labels: "multiclass" compares softmax distributions over K, otherwise each of the K
            logits gives a Bernoulli distribution, and the mean is over them too.
        weights: of the mean, (B, 1[, H, W, D]), or (B, K) for K distributions; None: all equal.
    """
    student, teacher = logits.float() / temperature, teacher_logits.float() / temperature
    if labels == "multiclass":
        divergence = F.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none"
        ).sum(1, keepdim=True)
    else:
        probability = teacher.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(student, probability, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(teacher, probability, reduction="none")
        divergence = cross_entropy - entropy
    return temperature**2 * _weighted_mean(divergence, weights)


def hard_divergence(
    logits: Tensor, teacher_logits: Tensor, *, labels: Labels, weights: Tensor | None = None
) -> Tensor:
    """Cross entropy with the teacher's decisions, mean over images and pixels.

    Args:
        logits: (B, K[, H, W, D]) of the student.
        teacher_logits: the same shape.
        labels: "multiclass" decides for one of K, otherwise each logit for itself.
        weights: as of `softened_divergence`.
    """
    if labels == "multiclass":
        entropy = F.cross_entropy(logits, teacher_logits.argmax(1), reduction="none").unsqueeze(1)
    else:
        decisions = (teacher_logits > 0).to(logits.dtype)
        entropy = F.binary_cross_entropy_with_logits(logits, decisions, reduction="none")
    return _weighted_mean(entropy, weights)


def _weighted_mean(divergence: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of weighted values over the sum of weights: equal weights change nothing."""
    if weights is None:
        return divergence.mean()
    return (weights * divergence).sum() / weights.expand_as(divergence).sum()
