"""How alike two models' saliency maps are, and whether a map says anything of its model.

Shapes: N images, P pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medlite.metrics.intervals import bootstrap, percentile_interval
from medlite.metrics.statistics import mean_of
from medlite.safety.exemplars import rank_correlation

TOP_SHARE = 0.05
"""of the pixels: the most salient ones"""

INSENSITIVE = 0.5
"""a method whose maps of a net without knowledge correlate so much shows the image, not the net"""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One method on one runtime (or in torch), averaged over images; None where undefined."""

    method: str
    where: str
    num_images: int
    rank_correlation: float | None = None
    """Spearman, over pixels, of both models' maps; None without an uncompressed model"""
    rank_correlation_interval: tuple[float, float] | None = None
    top_overlap: float | None = None
    """intersection over union of the TOP_SHARE most salient pixels"""
    top_overlap_interval: tuple[float, float] | None = None
    inside_before: float | None = None
    inside_after: float | None = None
    """share of the saliency inside the annotated region, of images that have one"""
    inside_change: float | None = None
    inside_change_interval: tuple[float, float] | None = None
    randomised_correlation: float | None = None
    """with the maps of the same net, its weights in another order"""
    note: str = ""
    """why there is nothing, or what to beware of"""


def compare_maps(
    before: Sequence[np.ndarray] | None,
    after: Sequence[np.ndarray],
    regions: Sequence[np.ndarray | None],
    *,
    method: str,
    where: str,
    groups: Sequence[str],
    randomised_correlation: float | None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Average over images what both models' maps have in common; patients are resampled.

    Args:
        before: maps (H, W[, D]) of the uncompressed model, if there is one.
        after: of the deployed model, of the same images.
        regions: bool (H, W[, D]) of each image where the finding is; None where nobody knows.
        method: a name of `saliency.METHODS`.
        where: the runtime, or "torch".
        groups: the patient of each image.
        randomised_correlation: see `Agreement`.
        num_resamples: of patients.
        seed: of the bootstrap.
    """
    values = {"inside_after": _each(inside_share, after, regions)}
    if before is not None:
        values["rank_correlation"] = _each(map_correlation, before, after)
        values["top_overlap"] = _each(top_overlap, before, after)
        values["inside_before"] = _each(inside_share, before, regions)
        values["inside_change"] = values["inside_after"] - values["inside_before"]
    means, intervals = _averages(values, groups, num_resamples, seed)
    return Agreement(
        method=method,
        where=where,
        num_images=len(after),
        rank_correlation=means.get("rank_correlation"),
        rank_correlation_interval=intervals.get("rank_correlation"),
        top_overlap=means.get("top_overlap"),
        top_overlap_interval=intervals.get("top_overlap"),
        inside_before=means.get("inside_before"),
        inside_after=means.get("inside_after"),
        inside_change=means.get("inside_change"),
        inside_change_interval=intervals.get("inside_change"),
        randomised_correlation=randomised_correlation,
        note=_caution(after, randomised_correlation),
    )


def _caution(after: Sequence[np.ndarray], randomised_correlation: float | None) -> str:
    """What to beware of."""
    if all(_is_flat(each) for each in after):
        return "the maps are the same everywhere: nothing speaks for the decisions"
    if randomised_correlation is not None and randomised_correlation > INSENSITIVE:
        return "shows the image rather than the model: decides nothing"
    return ""


def map_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of two maps over their pixels.

    0 where one of them is the same everywhere, NaN where both are: no method saw anything there.
    """
    if _is_flat(first) and _is_flat(second):
        return float("nan")
    return float(rank_correlation(first.reshape(1, -1), second.reshape(1, -1))[0])


def top_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of the most salient pixels of both; ties by position.

    0 where one map is the same everywhere, NaN where both are.
    """
    if _is_flat(first) or _is_flat(second):
        return float("nan") if _is_flat(first) and _is_flat(second) else 0.0
    count = max(1, round(TOP_SHARE * first.size))
    one, other = (
        set(np.argsort(-each.ravel(), kind="stable")[:count].tolist()) for each in (first, second)
    )
    return len(one & other) / len(one | other)


def inside_share(saliency: np.ndarray, region: np.ndarray | None) -> float:
    """Share of the saliency inside a region; NaN where there is no region or no saliency."""
    if region is None or not region.any() or saliency.sum() <= 0:
        return float("nan")
    return float(saliency[region].sum() / saliency.sum())


def mean_correlation(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Mean absolute Spearman correlation: a map turned upside down is not another map."""
    correlations = np.abs(_each(map_correlation, first, second))
    known = correlations[np.isfinite(correlations)]
    return float(known.mean()) if len(known) else float("nan")


def _is_flat(saliency: np.ndarray) -> bool:
    return bool(saliency.max() == saliency.min())


def _each(measure: object, *lists: Sequence[np.ndarray | None]) -> np.ndarray:
    assert callable(measure)
    return np.array([measure(*pair) for pair in zip(*lists, strict=True)], dtype=np.float64)


def _averages(
    values: Mapping[str, np.ndarray], groups: Sequence[str], num_resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float] | None]]:
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    group = torch.from_numpy(index.astype(np.int64))
    known = {name: each for name, each in values.items() if np.isfinite(each).any()}
    statistics = {
        name: mean_of(torch.from_numpy(each), group, len(names)) for name, each in known.items()
    }
    samples = bootstrap(statistics, num_groups=len(names), num_resamples=num_resamples, seed=seed)
    means = {name: float(np.nanmean(each)) for name, each in known.items()}
    return means, {name: percentile_interval(each) for name, each in samples.items()}
