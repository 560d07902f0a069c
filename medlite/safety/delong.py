"""DeLong's test: do two models that saw the same images rank them equally well?

Shapes: N samples, m positives, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata


@dataclass(frozen=True, kw_only=True)
class DeLong:
    """Two areas under the ROC curve, with the variances of a pair."""

    areas: tuple[float, float]
    covariance: np.ndarray
    """(2, 2) of the areas"""

    @property
    def variance(self) -> float:
        """Of the difference of the areas, at least 0."""
        (first, shared), (_, second) = self.covariance
        return max(0.0, float(first + second - 2 * shared))

    @property
    def p_value(self) -> float | None:
        """Two-sided, of equal areas; None where the areas differ and their variance is 0."""
        difference = self.areas[0] - self.areas[1]
        if difference == 0:
            return 1.0
        if self.variance == 0:
            return None
        return float(2 * norm.sf(abs(difference) / np.sqrt(self.variance)))


def delong(first: np.ndarray, second: np.ndarray, is_positive: np.ndarray) -> DeLong | None:
    """Areas and their covariance, by the placements of each sample among the other class.

    DeLong, DeLong & Clarke-Pearson 1988, "Comparing the areas under two or more correlated
    receiver operating characteristic curves: a nonparametric approach"; by mid-ranks, in
    O(N log N), as Sun & Xu 2014, "Fast implementation of DeLong's algorithm", section III. Takes
    samples as independent: not for several images of one patient.

    Args:
        first: (N,) scores of one model.
        second: (N,) scores of the other.
        is_positive: (N,) bool.

    Returns:
        None with fewer than two positives or two negatives, which leave no variance.
    """
    num_positive = int(is_positive.sum())
    num_negative = len(is_positive) - num_positive
    if min(num_positive, num_negative) < 2:
        return None
    placements = [placements_of(scores, is_positive) for scores in (first, second)]
    of_positives, of_negatives = (np.stack(part) for part in zip(*placements, strict=True))
    areas = of_positives.mean(1)
    covariance = np.cov(of_positives) / num_positive + np.cov(of_negatives) / num_negative
    return DeLong(areas=(float(areas[0]), float(areas[1])), covariance=covariance)


def placements_of(scores: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of negatives below each positive (m,), and of positives above each negative (n,)."""
    positive, negative = scores[is_positive], scores[~is_positive]
    among_all = rankdata(np.concatenate((positive, negative)))
    num_positive, num_negative = len(positive), len(negative)
    below = (among_all[:num_positive] - rankdata(positive)) / num_negative
    above = 1 - (among_all[num_positive:] - rankdata(negative)) / num_positive
    return below, above
