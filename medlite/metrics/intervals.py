"""How sure a number is: intervals of proportions and the bootstrap over groups.

Shapes: G groups (patients), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import beta

if TYPE_CHECKING:
    from torch import Tensor

Statistic = Callable[["Tensor"], "Tensor"]
"""weights of the groups (R, G) float64 -> values (R,), NaN where they leave it undefined"""

CONFIDENCE = 0.95
CHUNK = 100
"""resamples at a time, so that memory stays at CHUNK times the number of samples"""


def wilson_interval(
    num_hits: float, num_trials: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Score interval of a proportion, honest for few trials and near 0 and 1.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_hits / num_trials
    shrink = 1 + z**2 / num_trials
    centre = (share + z**2 / (2 * num_trials)) / shrink
    spread = z / shrink * math.sqrt(share * (1 - share) / num_trials + (z / num_trials / 2) ** 2)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def clopper_pearson_interval(
    num_hits: float, num_trials: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Exact interval of a proportion: covers at least as often as it says, at any number of trials.

    Clopper & Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the
    binomial". Wider than Wilson's, which covers as often as it says on average only.
    """
    tail, num_misses = (1 - confidence) / 2, num_trials - num_hits
    low = float(beta.ppf(tail, num_hits, num_misses + 1)) if num_hits > 0 else 0.0
    high = float(beta.isf(tail, num_hits + 1, num_misses)) if num_misses > 0 else 1.0
    return low, high


def resampled_weights(num_groups: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each group was drawn with replacement, float64 (up to CHUNK, G) at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, num_resamples, CHUNK):
        rows = min(CHUNK, num_resamples - start)
        drawn = generator.integers(num_groups, size=(rows, num_groups))
        drawn += np.arange(rows)[:, None] * num_groups
        counts = np.bincount(drawn.ravel(), minlength=rows * num_groups)
        yield torch.from_numpy(counts.reshape(rows, num_groups)).double()


def bootstrap(
    statistics: Mapping[str, Statistic], *, num_groups: int, num_resamples: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every statistic on the same resamples of whole groups (never of pixels or slices).

    Returns:
        float64 (R,) for each name.
    """
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for weights in resampled_weights(num_groups, num_resamples, seed):
        for name, statistic in statistics.items():
            chunks[name].append(statistic(weights).numpy())
    return {name: np.concatenate(parts) for name, parts in chunks.items()}


def percentile_interval(
    samples: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """The middle of the bootstrap's values; None where half of the resamples have no value."""
    finite = samples[np.isfinite(samples)]
    if 2 * len(finite) < len(samples):
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
