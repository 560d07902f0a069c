"""Percentiles and ratios of latency that say how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import bdtr

CONFIDENCE = 0.99
NUM_RESAMPLES = 2000


def percentile_bound(samples: Sequence[float], percentile: float) -> float | None:
    """A latency that the `percentile` does not exceed, with 99 % confidence.

    MLPerf Inference's early-stopping estimate (MLCommons, inference_policies, "Early stopping",
    with c = .99 and d = 0): with t the largest number such that BinomCDF(t; n, 1 - p) <= 1 - c,
    drop the t - 1 slowest of n samples; the slowest of the rest is the bound.

    Args:
        samples: latencies, any order, any unit.
        percentile: p in (0, 1).

    Returns:
        The bound in the samples' unit; None where there are fewer than `least_samples`.
    """
    rank_from_slowest = _num_overlatency(len(samples), percentile)
    if rank_from_slowest < 1:
        return None
    return float(np.sort(np.asarray(samples))[-rank_from_slowest])


def least_samples(percentile: float) -> int:
    """The least number of samples for which `percentile_bound` exists: 64, 130, 662 for .9 .95 .99.

    >>> least_samples(0.9)
    64
    """
    num_samples = 1
    while _num_overlatency(num_samples, percentile) < 1:
        num_samples += 1
    return num_samples


def round_interval(
    statistic: Callable[..., float], *rounds: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float]:
    """A 95 % bootstrap interval that resamples whole rounds (Efron 1979, percentile method).

    Neighbouring samples are not independent, rounds nearly are. Several candidates that were
    timed in the same rounds are resampled together, so that what disturbed both cancels.

    Args:
        statistic: takes as many flat arrays of samples as there are `rounds`.
        rounds: for each candidate its samples, round by round.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    num_rounds = len(rounds[0])
    arrays = [[np.asarray(block) for block in candidate] for candidate in rounds]
    values = []
    for _ in range(NUM_RESAMPLES):
        drawn = generator.integers(num_rounds, size=num_rounds)
        values.append(statistic(*(np.concatenate([c[i] for i in drawn]) for c in arrays)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _num_overlatency(num_samples: int, percentile: float) -> int:
    """The largest t with BinomCDF(t; n, 1 - p) <= 1 - c; below 1 where there is none."""
    t = np.arange(num_samples + 1)
    admissible = bdtr(t, num_samples, 1 - percentile) <= 1 - CONFIDENCE
    return int(np.count_nonzero(admissible)) - 1
