"""Paired comparisons of two models on the same patients.

Shapes: G groups (patients), R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import binom

from medlite.metrics.intervals import Statistic, bootstrap, percentile_interval

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
