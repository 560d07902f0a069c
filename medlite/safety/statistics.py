"""Paired comparisons of two models on the same patients.

Shapes: G groups (patients), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import binom

from medlite.metrics.intervals import CONFIDENCE, Statistic, bootstrap, percentile_interval

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PairedLoss:
    """How much worse the second model is than the first, with its bootstrap."""

    first: float
    second: float
    loss: float
    """first - second where higher is better, second - first otherwise"""
    samples: np.ndarray
    """(R,) resampled losses, NaN where a resample leaves the score undefined"""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % percentile interval of the loss."""
        return percentile_interval(self.samples)

    def discordant(self, num_groups: int) -> tuple[float, float]:
        """How many of the groups were lost, and gained, for the loss and its spread to be these.

        Where each group is a yes or a no these are their numbers, but for the chance in the
        resamples; where a group has several samples, groups that count in part add up to them.
        """
        known = self.samples[np.isfinite(self.samples)]
        changed = num_groups * float(known.var()) + self.loss**2
        changed = min(max(changed, abs(self.loss)), 1.0)
        return num_groups * (changed + self.loss) / 2, num_groups * (changed - self.loss) / 2


def paired_bootstrap(
    first: Mapping[str, Statistic],
    second: Mapping[str, Statistic],
    *,
    higher_is_better: Mapping[str, bool],
    num_groups: int,
    num_resamples: int,
    seed: int,
) -> dict[str, PairedLoss]:
    """Resample patients, score both models on the same resample, take the difference.

    Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. The statistics of
    both models refer to the same groups in the same order.

    Args:
        first: statistics of the model to compare with.
        second: statistics of the other model under the same names.
        higher_is_better: which names to compare, and what better means for each.
        num_groups: G.
        num_resamples: R.
        seed: the same seed gives the same interval.
    """

    def loss_of(name: str, weights: Tensor) -> Tensor:
        difference = first[name](weights) - second[name](weights)
        return difference if higher_is_better[name] else -difference

    losses = {name: partial(loss_of, name) for name in higher_is_better}
    samples = bootstrap(losses, num_groups=num_groups, num_resamples=num_resamples, seed=seed)
    everyone = torch.ones(1, num_groups, dtype=torch.float64)
    return {
        name: PairedLoss(
            first=float(first[name](everyone)),
            second=float(second[name](everyone)),
            loss=float(loss(everyone)),
            samples=samples[name],
        )
        for name, loss in losses.items()
    }


def tango_score(num_lost: float, num_gained: float, num_pairs: float, loss: float) -> float:
    """How many standard errors the net loss of paired yes-or-no outcomes lies above `loss`.

    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17: the variance is that of the likeliest rates
    under which the true loss is `loss`, so it is right where few or none were lost.

    Args:
        num_lost: pairs of which only the first is a yes.
        num_gained: pairs of which only the second is.
        num_pairs: all of them.
        loss: in (-1, 1).
    """
    net = num_lost - num_gained
    linear = (2 * num_pairs - net) * loss - num_lost - num_gained
    constant = -num_gained * loss * (1 - loss)
    root = math.sqrt(max(linear**2 - 8 * num_pairs * constant, 0.0))
    gain_rate = max((root - linear) / (4 * num_pairs), 0.0)
    variance = num_pairs * (2 * gain_rate + loss * (1 - loss))
    distance = net - num_pairs * loss
    if distance == 0:
        return 0.0
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def tango_interval(
    num_lost: float, num_gained: float, num_pairs: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The losses that are less than a normal quantile away from what was seen, by `tango_score`."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    seen = (num_lost - num_gained) / num_pairs

    def end(beyond: float) -> float:
        if seen == beyond:
            return beyond
        return float(
            brentq(
                lambda loss: abs(tango_score(num_lost, num_gained, num_pairs, loss)) - z,
                seen,
                beyond * (1 - 1e-12),
            )
        )

    return end(-1.0), end(1.0)


def mcnemar_p_value(num_only_first_right: int, num_only_second_right: int) -> float:
    """Exact two-sided test that two models are right equally often.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions or
    percentages": samples that only one of them got right fall to either side like a fair coin.
    """
    discordant = num_only_first_right + num_only_second_right
    fewer = min(num_only_first_right, num_only_second_right)
    return float(min(1.0, 2 * binom.cdf(fewer, discordant, 0.5))) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted so that the chance of any false rejection keeps its level.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted.tolist()
